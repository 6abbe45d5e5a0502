"""scripts/reproduce.py: its plans, the whole chain on small data, and each check on a fault that it
is there to find.
"""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import reproduce
import v83
import v86
import v98
import v107
from common.errors import InputError
from common.files import sha256_of
from common.reproduction import checks, disk, prepare, published, report, running
from common.reproduction.machine import Machine, driver_version, fit, parse_machine
from common.reproduction.plan import (
    Expected,
    Setup,
    Step,
    count_all,
    make_plan,
    obstacles,
    parse_stage_flags,
    typed,
)
from common.reproduction.running import Runner, last_line
from common.reproduction.state import State, identity, lock
from conftest import ON_ONE_CORE, ROOT, assert_refused, called, readme_block, run
from reproduction_runs import (
    ARCH,
    INPUT_SIZE,
    NETWORK,
    REHEARSAL,
    expect_own_score,
    expectations,
    in_folder,
    make_input,
    start,
)
from test_readme import parse_stage, python_commands

PAGE = "docs/REPRODUCE.md"
STAGES = {"v83": v83, "v86": v86, "v98": v98, "v107": v107}


@pytest.fixture(scope="session")
def small_input(tmp_path_factory):
    path = make_input(tmp_path_factory.mktemp("reproduce") / "rehearsal")
    expect_own_score(path)
    return path


def place_weights(output, stage, source=None, change=None):
    """Put the small network where the author's weights of a stage are expected."""
    epoch = {"v98": 1, "v107": 9}[stage]
    target = output / "published" / stage / "train" / f"checkpoint_{epoch:04}.pth.tar"
    target.parent.mkdir(parents=True)
    shutil.copy(source or ROOT / "weights" / f"{stage}.pth.tar", target)
    if change:
        content = v98.read_checkpoint(target)
        change(content["state_dict"])
        torch.save(content, target)
    return target


def small_run(data, output, *flags):
    """The command on small data with the small network; returns the CompletedProcess."""
    return run(
        *("scripts/reproduce.py", "--cpu", "--stages", "v98", *NETWORK),
        *("--input", data, "--output", output, "--expect", expectations(data), *flags),
    )


@pytest.fixture
def runner(tmp_path):
    """A Runner with an empty state; afterwards signals do what they did before."""
    former = {number: signal.getsignal(number) for number in running.SIGNALS}
    with (tmp_path / "lock").open("w") as lock:
        runner = Runner(State(tmp_path / "state.json"), {}, tmp_path, lock, hidden=True)
        runner.environment |= ON_ONE_CORE
        yield runner
    for number, handler in former.items():
        signal.signal(number, handler)


def setup_for(machine, **options):
    return Setup(Path("input"), Path("reproduce"), machine, Expected(), **options)


def obstacles_of(setup):
    return obstacles(setup, make_plan(setup), count_all(setup))


# ---- plans ----


@pytest.mark.parametrize("number", range(5))
def test_printed_plans(number, capsys):
    """Those that the page shows are what the command prints, down to the sum."""
    command, _, shown = readme_block("Plans for four machines", PAGE, number).partition("\n")
    command, _, grep = command.partition(" | grep -E ")
    _, script, *flags = shlex.split(command.removeprefix("$ "))
    assert script == "scripts/reproduce.py"
    result = called(reproduce.main, flags, capsys)
    assert result.returncode == 0
    printed = result.stdout.partition("\n\nCommands")[0]
    if grep:
        (pattern,) = shlex.split(grep)
        printed = "\n".join(re.findall(f"^.*(?:{pattern}).*$", printed, re.MULTILINE))
    assert printed.strip() == shown.strip()


def test_plans_are_shown_for_the_four_machines():
    text = (ROOT / PAGE).read_text()
    for gpus in ("1 x H200", "4 x A100-40", "8 x A100-80", "16 x A100-40"):
        assert f'$ python scripts/reproduce.py --plan --train --gpus "{gpus}"' in text


def test_the_memory_table_is_the_documented_one():
    text = (ROOT / "docs" / "PERFORMANCE.md").read_text()
    rows = re.findall(r"^\| (v\d+) \| \d+ of \d+ px \| (.*) \|$", text, re.MULTILINE)
    documented = {}
    for stage, cells in rows:
        pairs = [re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cell) for cell in cells.split(" | ")]
        documented[stage] = tuple(tuple(float(pair[number]) for pair in pairs) for number in (1, 2))
    assert documented == published.MEMORY


@pytest.mark.parametrize(
    ("gpus", "plain", "checkpointed"),
    [
        ("1 x H200", "v83 v86", "v98 v107"),
        ("1 x A100-80", "v83", "v86 v98"),
        ("2 x A100-80", "v83 v86", "v98 v107"),
        ("4 x A100-40", "v83 v86", "v98 v107"),
        ("4 x H100", "v83 v86 v98", "v107"),
        ("8 x A100-40", "v83 v86 v98", "v107"),
        ("16 x A100-40", "v83 v86 v98 v107", ""),
        ("1 x V100-16", "", ""),
    ],
)
def test_what_fits_is_what_the_documents_say(gpus, plain, checkpointed):
    fits = {stage: fit(stage, parse_machine(gpus)) for stage in STAGES}
    assert [stage for stage in STAGES if fits[stage].ok and not fits[stage].flags] == plain.split()
    with_flag = [stage for stage in STAGES if fits[stage].flags]
    assert with_flag == checkpointed.split()
    for stage in with_flag:
        assert fits[stage].ok and fits[stage].flags == ("--grad-checkpointing",)


def test_an_extraction_that_does_not_fit_names_a_smaller_batch():
    small = parse_machine("2 x GTX-3")
    (said,) = {line for line in obstacles_of(setup_for(small)) if "extraction" in line}
    assert "4.0 GB for 128 images at once, 3 there" in said
    assert "extract: --batch-size 32" in said
    flags = {"extract": ["--batch-size", "32"]}
    plan = make_plan(setup_for(small, stage_flags=flags))
    assert [step.fits for step in plan if step.target_set == "t"] == ["fits: 1.2 of 3 GB"]
    assert not [step for step in plan if step.obstacle]


def test_batches_that_do_not_divide(monkeypatch):
    """A mask that is set is narrowed, on this machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,4,5,6,GPU-8932f937")
    placement = fit("v98", parse_machine("6 x A100-80"))
    assert not placement.ok and placement.words.endswith("CUDA_VISIBLE_DEVICES=0,1,2,3")
    here = replace(parse_machine("6 x A100-80"), assumed=False)
    assert fit("v98", here).words.endswith("CUDA_VISIBLE_DEVICES=2,3,4,5")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert fit("v98", here).words.endswith("CUDA_VISIBLE_DEVICES=0,1,2,3")


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        ({}, ""),
        ({"arch": "resnet18"}, "v83-first v83 v86 v98 v107"),
        ({"input_size": 256}, "v86 v98 v107"),
        ({"stage_flags": {"all": ["--batch-size=16"]}}, "v83-first v83 v86 v98 v107"),
        ({"stage_flags": {"v83": ["-b", "16"]}}, "v83-first v83"),
        ({"stage_flags": {"v107": ["--num-negatives", "8"], "extract": ["-b8"]}}, "v107"),
        ({"stage_flags": {"all": ["--amp", "bf16"]}}, ""),
    ],
)
def test_flags_that_decide_the_memory_of_training(options, unknown):
    """The table says nothing of them, so it refuses nothing."""
    plan = make_plan(setup_for(parse_machine("1 x V100-16"), train=True, **options))
    trainings = [step for step in plan if step.trains]
    said = [step.name.removeprefix("train-") for step in trainings if not step.obstacle]
    assert said == unknown.split()
    assert not any(step.fits for step in trainings if not step.obstacle)


def test_a_finished_training_need_not_fit():
    """Of a machine that only extracts and evaluates."""
    setup = setup_for(parse_machine("2 x A100-40"), train=True)
    steps = make_plan(setup)
    assert obstacles(setup, steps, {})
    finished = {step.name for step in steps if step.trains}
    assert not obstacles(setup, steps, {}, finished)


def test_weights_of_imagenet_are_announced():
    def announced(**options):
        plan = make_plan(setup_for(Machine(0, "", 0, 2), train=True, **options))
        return [step.name for step in plan if step.note and "FAULTS.md" in step.remedy]

    assert announced() == ["train-v83-first"]
    assert not announced(stage_flags={"v83": ["--no-pretrained"]})


@pytest.mark.parametrize("text", ["A100-80", "0 x A100-80", "8 x A100", "8 x Unknown", "x"])
def test_other_machines_are_refused(text, capsys):
    result = called(reproduce.main, ["--plan", "--gpus", text], capsys)
    assert_refused(result, "--gpus", "8 x A100-80")


@pytest.mark.parametrize(
    "text",
    ["8 x A100-80", "8xA100-80GB", "8 x A100 80GB", "8 x a100 80 GB", "8 x NVIDIA A100-SXM4-80GB"],
)
def test_names_of_machines(text):
    machine = parse_machine(text)
    assert (machine.gpus, machine.memory) == (8, 80) and "A100" in machine.name.upper()


def test_a_machine_whose_name_ends_in_a_number():
    with pytest.raises(InputError, match="4 x RTX 4090: must be like"):
        parse_machine("4 x RTX 4090")
    assert parse_machine("4 x RTX 4090-24").memory == 24
    assert parse_machine("2 x NVIDIA H200").memory == 141


def test_the_driver_is_in_the_report(tmp_path, monkeypatch):
    ask = tmp_path / "nvidia-smi"
    ask.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    ask.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    here = Machine(2, "A100", 80, 8, cuda="13.0", driver=driver_version())
    assert "; driver 580.65.06; CUDA 13.0; " in report.circumstances(here)["machine"]
    ask.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert driver_version() == ""


def test_training_commands_are_the_published_ones():
    """Those of the README, but for --resume, --output, --weight and the folders."""
    commands = python_commands(readme_block("Train"))[:-1]
    steps = [
        step
        for step in make_plan(setup_for(parse_machine("16 x A100-40"), train=True))
        if step.trains
    ]
    assert len(commands) == len(steps) == 5
    for (script, *flags), step in zip(commands, steps, strict=True):
        expected = vars(parse_stage(script, *flags))
        _, own_script, *own_flags = step.command
        assert own_script == f"exp/{script}"
        args = vars(STAGES[script.removesuffix(".py")].parse_args(own_flags))
        assert args["resume"] == "auto" and args["output"].startswith("reproduce/exp/v")
        for name in ("resume", "output", "weight", "data"):
            args.pop(name), expected.pop(name)
        assert args == expected


def test_weights_go_from_stage_to_stage():
    steps = {step.name: step for step in make_plan(setup_for(Machine(0, "", 0, 2), train=True))}
    for before, after, epoch in (("v83", "v86", 5), ("v86", "v98", 5), ("v98", "v107", 1)):
        path = Path(f"reproduce/exp/{before}/train/checkpoint_{epoch:04}.pth.tar")
        assert path in steps[f"train-{before}"].writes
        assert path in steps[f"train-{after}"].needs
        assert str(path) in steps[f"train-{after}"].command
    assert steps["train-v83"].prepared.endswith(
        "cp reproduce/exp/v83-first/train/checkpoint_0004.pth.tar reproduce/exp/v83/train/"
    )


def test_training_v107_needs_the_public_ground_truth(full_size, tmp_path):
    """In phase 2 too, and it is asked for before the first stage is trained."""
    data = full_size
    (data / "public_ground_truth.csv").rename(data / "private_ground_truth.csv")
    setup = Setup(
        data,
        tmp_path / "out",
        Machine(0, "", 0, 2),
        Expected(),
        train=True,
        stages=("v107",),
        phase=2,
    )
    steps = make_plan(setup)
    (line,) = obstacles_of(setup)
    assert line.startswith(f"{data / 'public_ground_truth.csv'}: is missing; git clone")
    (training,) = [step for step in steps if step.name == "train-v107"]
    assert data / "public_ground_truth.csv" in training.needs
    assert not obstacles_of(replace(setup, train=False))


def test_downloads_go_where_images_are(tmp_path):
    (tmp_path / "train_images").mkdir()
    machine = Machine(0, "", 0, 2)
    setup = Setup(tmp_path, tmp_path / "out", machine, Expected(), download=True, stages=("v107",))
    (step,) = [step for step in make_plan(setup) if step.name == "download-training_images"]
    assert step.command[4] == f"{tmp_path}/train_images/"
    assert step.writes == (tmp_path / "train_images",)


def test_published_weights_and_own_training_share_no_folder():
    machine = Machine(0, "", 0, 2)
    outputs = []
    for train in (False, True):
        outputs.append(
            {
                path.parent
                for step in make_plan(setup_for(machine, train=train))
                for path in step.writes
            }
        )
    assert not outputs[0] & outputs[1]


def test_training_images_are_extracted_once_for_both_phases(tmp_path):
    setup = setup_for(Machine(0, "", 0, 2), stages=("v107",))
    steps = [make_plan(setup), make_plan(replace(setup, phase=2))]
    shared = [step for step in steps[0] if step.name == "extract-v107-negatives"]
    again = [step for step in steps[1] if step.name == "extract-v107-negatives"]
    assert shared[0].command == again[0].command and shared[0].writes == again[0].writes
    (negatives,) = shared[0].writes
    for plan in steps:
        assert sum(negatives in step.writes for step in plan) == 1
        (subtraction,) = [step for step in plan if step.name.startswith("subtract")]
        assert negatives in subtraction.needs
        written = [path for step in plan for path in step.writes]
        assert len(set(written)) == len(written)


def test_contamination_is_said_beside_the_score():
    """Of v107 in phase 1, wherever its weights come from."""
    machine = Machine(0, "", 0, 2)
    for options, is_said in (
        ({}, True),
        ({"train": True}, True),
        ({"references": 50_000}, True),
        ({"phase": 2}, False),
    ):
        steps = make_plan(setup_for(machine, stages=("v107",), **options))
        notes = {step.check.keywords["note"] for step in steps if step.name.startswith("evaluate")}
        assert notes == {published.CONTAMINATED if is_said else ""}


def test_published_scores_are_those_of_the_readme():
    text = (ROOT / "README.md").read_text()
    for title, score in published.SCORES.items():
        assert f"{score.average_precision:.4f}" in text
        assert score.recall_p90 is None or f"{score.recall_p90:.4f}" in text, title


def test_disk_is_counted_where_it_is_written(tmp_path):
    """Images lie on the disk of --input, which is another than that of --output."""
    shared = Path("/dev/shm")  # noqa: S108
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two filesystems")
    setup = setup_for(Machine(0, "", 0, 2), download=True, stages=("v98",))
    setup = replace(setup, input=tmp_path / "input", output=tmp_path / "out")
    (both,) = disk.filesystems(setup, make_plan(setup), set())
    assert both.names == f"{tmp_path}/input and {tmp_path}/out"
    setup = replace(setup, input=shared / "input")
    steps = make_plan(setup)
    data, results = disk.filesystems(setup, steps, set())
    assert (data.names, results.names) == (f"{shared}/input", f"{tmp_path}/out")
    assert data.needed + results.needed == both.needed and data.needed > 100 > results.needed
    names = {step.name for step in steps if step.downloads}
    assert [one.names for one in disk.filesystems(setup, steps, names)] == [f"{tmp_path}/out"]


def test_what_is_written_already_needs_no_disk(tmp_path):
    setup = replace(setup_for(Machine(0, "", 0, 2), train=True), output=tmp_path)
    steps = make_plan(setup)
    (before,) = disk.filesystems(setup, steps, set())
    training = next(step for step in steps if step.name == "train-v86")
    extraction = next(step for step in steps if step.unfinished)
    for path in (training.writes[0], extraction.unfinished / "qr" / "0.npy"):
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(10**8)
    (after,) = disk.filesystems(setup, steps, set())
    assert before.needed - after.needed == pytest.approx(0.2)


def test_a_link_is_the_same_command_wherever_it_points_to(tmp_path):
    (tmp_path / "data").mkdir()
    link = tmp_path / "input"
    link.symlink_to(tmp_path / "data")
    assert reproduce.from_root(link) == link
    assert reproduce.from_root(ROOT / "docs" / ".." / "input") == Path("input")


# ---- the chain ----


@pytest.fixture(scope="module")
def finished(small_input, tmp_path_factory):
    """The rehearsal as it is written, stopped by SIGTERM, killed, and ended; then with a score to
    compare with, and v98 alone.
    """
    output = small_input.parent
    command = [in_folder(word, output) for word in REHEARSAL]
    process = start(*command)
    wait_for(output / "probe" / "published" / "v98", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    process = start(*command)
    wait_for(output / "published" / "v98" / "extract", process)
    process.kill()
    process.wait()
    whole = run(*command)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    (output / "report.md").rename(output / "report-of-all.md")
    return output, small_run(small_input, output)


def test_the_rehearsal_of_both_networks(finished):
    output, _ = finished
    report = (output / "report-of-all.md").read_text()
    rows = re.findall(r"^\| (v98|v107|v107 \+ NES) \| (.*) \|$", report, re.MULTILINE)
    assert [title for title, _ in rows] == ["v98", "v107", "v107 + NES"]
    assert all(cells.endswith("| no expected score") for _, cells in rows)
    assert "| subtract-v107 |" in report


def wait_for(path, process):
    """Wait until a file or folder is there."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_whole_chain_after_a_signal_and_a_kill(finished, small_input):
    output, result = finished
    assert result.returncode == 0, result.stdout + result.stderr
    report = (output / "report.md").read_text()
    (row,) = re.findall(r"^\| v98 \| .*$", report, re.MULTILINE)
    assert row.endswith("| +0.0000000 | +0.0000000 | reproduced |")
    assert "contaminated" not in report  # v98 saw no label
    assert report.startswith("# Rehearsal, not DISC21: from given weights\n")
    assert f"- expected: what {expectations(small_input)} says\n" in report
    assert "expected µAP" in report and "published µAP" not in report
    assert "known answers of weights/v98.pth.tar" in report
    assert f"tensors, SHA-256 {sha256_of(ROOT / 'weights' / 'v98.pth.tar')}" in report
    for step in make_plan(setup_for(Machine(0, "", 0, 2), stages=("v98",))):
        assert list(output.glob(f"*-{step.name}.log"))
        assert f"| {step.name} |" in report


def test_finished_steps_are_not_run_again(finished, small_input):
    output, _ = finished
    logs = {path: path.stat().st_mtime_ns for path in output.glob("*.log")}
    result = small_run(small_input, output)
    assert result.returncode == 0
    assert result.stdout.count(": done before\n") == 2 * 5  # in the plan, and in the run
    assert "\nIn all: nothing is left to do\n" in result.stdout
    assert logs == {path: path.stat().st_mtime_ns for path in output.glob("*.log")}


def copy_of_run(output, copy):
    """Copy a run and its data, as if it had been run there; returns the copy."""
    shutil.copytree(output, copy, symlinks=True)
    state = (copy / "state.json").read_text().replace(str(output), str(copy))
    (copy / "state.json").write_text(state)
    return copy


def test_another_expected_score_is_not_reproduced(finished, tmp_path):
    copy = copy_of_run(finished[0], tmp_path / "reproduce")
    expect = expectations(copy / "input")
    expected = json.loads(expect.read_text())
    expected["scores"]["v98"][0] += 0.002
    expect.write_text(json.dumps(expected))
    result = small_run(copy / "input", copy)
    assert result.returncode == 1, result.stderr
    report = (copy / "report.md").read_text()
    assert "| not reproduced: µAP |" in report
    assert "\n3. " in report and "another --input-size" in report


# ---- planted faults, through the command ----


def copied(small_input, tmp_path):
    return shutil.copytree(small_input, tmp_path / "input", symlinks=True)


@pytest.mark.parametrize("folder", ["query_images", "reference_images"])
def test_a_missing_image(small_input, tmp_path, folder, capsys):
    data = copied(small_input, tmp_path)
    path = sorted((data / folder).iterdir())[-1]
    path.unlink()
    flags = ["--cpu", "--stages", "v98", *NETWORK, "--input", data, "--output", tmp_path / "out"]
    flags += ["--expect", expectations(small_input)]
    result = called(reproduce.main, flags, capsys)
    number = len(list((small_input / folder).iterdir()))
    assert_refused(result, f"{data / folder}: {number - 1} images, expected {number}")


def test_a_half_downloaded_set(full_size, runner):
    """Its names are checked too, not the numbers alone."""
    setup = replace(setup_for(Machine(0, "", 0, 2), stages=("v98",)), input=full_size)
    (step,) = [step for step in make_plan(setup) if step.name == "check-data"]
    with pytest.raises(InputError, match=r"images are missing: .* --download"):
        runner.run([step])


def test_swapped_phases(small_input, tmp_path):
    data = copied(small_input, tmp_path)
    (data / "query_images").rename(data / "q")
    (data / "query_images_phase2").rename(data / "query_images")
    (data / "q").rename(data / "query_images_phase2")
    expect = expectations(small_input)
    result = small_run(data, tmp_path / "reproduce", "--expect", expect)
    assert_refused(result, "public_ground_truth.csv", "query_id have no image in query_images")


def test_a_flipped_weight(tmp_path, monkeypatch):
    """A flipped bit shows by the file's checksum; another weight, by the SHA-256."""
    path = place_weights(tmp_path, "v98")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    # In this process, which has imported torch.
    monkeypatch.setattr(checks, "in_a_process", lambda function, *arguments: function(*arguments))
    with pytest.raises(InputError, match=r"checkpoint_0001.pth.tar: .*delete the file"):
        checks.check_weights(path, ARCH, None)


def test_another_file_of_weights(small_input, tmp_path):
    output = tmp_path / "reproduce"
    place_weights(output, "v98", ROOT / "weights" / "v107.pth.tar")
    digest = sha256_of(ROOT / "weights" / "v98.pth.tar")
    (tmp_path / "expect.json").write_text(json.dumps({"images": {}, "sha256": {"v98": digest}}))
    result = small_run(small_input, output, "--expect", tmp_path / "expect.json")
    assert_refused(result, "weights-v98", "is not the file that --sha256 names")


def run_probe(output, arch, input_size=INPUT_SIZE):
    """Run the step alone that looks at the weights of v98, in this process."""
    setup = Setup(
        Path("input"),
        output,
        Machine(0, "", 0, 2),
        Expected(),
        stages=("v98",),
        arch=arch,
        input_size=input_size,
        stage_flags={"extract": ["-j", "0"]},
    )
    (step,) = [step for step in make_plan(setup) if step.name == "probe-v98"]
    step.prepare()
    v98.extract(v98.parse_args([str(word) for word in step.command[2:]]))
    step.check(log=None)


def test_a_collapsed_network(tmp_path):
    def collapse(weights):
        weights["module.bn.weight" if "module.bn.weight" in weights else "bn.weight"].zero_()

    place_weights(tmp_path, "v98", change=collapse)
    with pytest.raises(InputError, match=r"mean cosine .* collapsed"):
        run_probe(tmp_path, ARCH)


def test_an_own_network_that_has_collapsed(tmp_path):
    """The remedy keeps the stages before it."""
    weights = tmp_path / "exp" / "v98" / "train" / "checkpoint_0001.pth.tar"
    with h5py.File(tmp_path / "probe.h5", "w") as file:
        file["query"] = np.eye(1, 256).repeat(12, axis=0)
    options = {"output": None, "arch": ARCH, "input_size": INPUT_SIZE}
    with pytest.raises(InputError, match=r"collapsed; .* move .*/exp/v98 away and add --stage-f"):
        checks.check_probe(tmp_path / "probe.h5", None, stage="v98", weights=weights, **options)


def test_another_input_size(tmp_path):
    place_weights(tmp_path, "v98")
    expected = f"known answers .* --input-size is 64, recorded with {INPUT_SIZE}"
    with pytest.raises(InputError, match=expected):
        run_probe(tmp_path, ARCH, input_size=64)


def test_a_checkpoint_of_another_architecture(tmp_path, monkeypatch):
    path = place_weights(tmp_path, "v98")
    with pytest.raises(v98.InputError, match="holds other weights than --arch has"):
        run_probe(tmp_path, "resnet18")
    # In this process, which has imported torch.
    monkeypatch.setattr(checks, "in_a_process", lambda function, *arguments: function(*arguments))
    with pytest.raises(InputError, match=r"tensors \(arch .*\), not 1,118"):
        checks.check_weights(path, published.ARCH, None)


def test_a_full_disk_in_the_middle(finished, tmp_path):
    output = copy_of_run(finished[0], tmp_path / "reproduce")
    shutil.rmtree(output / "probe")
    limit = (
        "import resource, runpy, sys; sys.path.insert(0, 'scripts'); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = ["scripts/reproduce.py", "--cpu", "--stages", "v98", *NETWORK]
    data = output / "input"
    command += ["--expect", expectations(data), "--input", data, "--output", output]
    result = run("-c", limit, *command)
    assert_refused(result, output)
    assert small_run(data, output).returncode == 0


# ---- what keeps it from starting ----


def test_a_wrong_folder(tmp_path, capsys):
    """Where it is mistyped, nothing else is said of it."""
    for name, words in ("nowhere", "no such folder; give --input"), ("file", "is no folder"):
        (tmp_path / "file").touch()
        flags = ["--cpu", "--stages", "v98", "--input", tmp_path / name]
        result = called(reproduce.main, [*flags, "--output", tmp_path / "out"], capsys)
        assert_refused(result, f"nothing was started: {tmp_path / name}: {words}")
        assert "aws" not in result.stdout and "git clone" not in result.stdout


def test_missing_data_are_named_before_anything_starts(tmp_path, capsys):
    """All together, in the last lines, with the commands that fetch them."""
    (tmp_path / "reference_images").mkdir()
    (tmp_path / "reference_images" / "R000000.jpg").touch()
    (tmp_path / "reference_images" / "R000001.jpg.6eF5b5da").touch()  # aws leaves such
    flags = ["--cpu", "--stages", "v98", "--input", tmp_path, "--output", tmp_path / "out"]
    result = called(reproduce.main, flags, capsys)
    query, reference, truth = result.stdout.splitlines()[-3:]
    bucket = "s3://drivendata-competition-fb-isc-data/all"
    assert f"images: is missing; give --download, or run: aws s3 cp {bucket}/query_images/" in query
    assert query.endswith(f" {tmp_path}/query_images/ --recursive --no-sign-request")
    assert f"images; give --download, or run: aws s3 sync {bucket}/reference_images/" in reference
    assert "public_ground_truth.csv: is missing; git clone" in truth
    assert "python exp/v98.py" not in result.stdout
    assert_refused(result, "nothing was started; first of the 3 reasons above", "query_images")
    result = called(reproduce.main, [*flags, "--plan"], capsys)
    assert result.returncode == 0 and "python exp/v98.py" in result.stdout
    result = called(reproduce.main, [*flags[1:], "--plan", "--gpus", "1 x H200"], capsys)
    assert "aws" not in result.stdout  # the data are to lie on another machine
    assert not (tmp_path / "out").exists()


def test_other_data_are_not_downloaded(tmp_path, capsys):
    data = tmp_path / "query_images"
    data.mkdir()
    (tmp_path / "reference_images").mkdir()
    (data / "a.jpg").touch()
    expect = tmp_path / "expect.json"
    expect.write_text('{"images": {"query_images": 36}}')
    flags = ["--cpu", "--stages", "v98", "--input", tmp_path, "--output", tmp_path / "out"]
    flags += ["--expect", expect]
    assert_refused(called(reproduce.main, [*flags, "--download"], capsys), "--download", expect)
    result = called(reproduce.main, flags, capsys)
    assert_refused(result, f"{data}: 1 images, expected 36 ({expect}); correct one")
    assert "reference_images: holds no image" in result.stdout
    assert "aws" not in result.stdout and "git clone" not in result.stdout


def test_more_images_than_disc21_has():
    wrong = checks.wrong_count("input/query_images", "query_images", 50_001, Expected(), "")
    assert wrong == "input/query_images: 50,001 images, DISC21 has 50,000; move the others away"


def test_phase_2_after_a_stopped_phase_1(full_size, tmp_path):
    """Both extract into v107's folder: said before phase 2 begins, not hours later."""
    (full_size / "private_ground_truth.csv").touch()
    setup = setup_for(Machine(0, "", 0, 2), stages=("v107",))
    setup = replace(setup, input=full_size, output=tmp_path / "out")
    unfinished = tmp_path / "out" / "published" / "v107" / "extract" / "unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "inputs.json").write_text('{"--target-set": "qr"}')
    assert not obstacles_of(setup)
    (line,) = obstacles_of(replace(setup, phase=2))
    assert line.startswith(f"{unfinished}: ") and "--target-set qr was stopped" in line
    assert "first end that" in line and line.endswith("or delete the folder")
    assert not obstacles_of(replace(setup, phase=2, stage_flags={"extract": ["--start-over"]}))
    (unfinished / "inputs.json").write_text('{"--target-set": "t"}')
    assert not obstacles_of(replace(setup, phase=2))
    (line,) = obstacles_of(setup)
    assert "--target-set t was stopped" in line


@pytest.fixture
def full_size(tmp_path, monkeypatch):
    """Folders as of DISC21, with an image in each that counts as all of them."""
    data = tmp_path / "full"
    for name, image in zip(
        published.IMAGES, ("T000000", "R000000", "Q00000", "Q50000"), strict=True
    ):
        (data / name).mkdir(parents=True)
        (data / name / f"{image}.jpg").touch()
    (data / "public_ground_truth.csv").touch()
    monkeypatch.setattr(checks, "count_images", lambda root, name: published.IMAGES[name])
    return data


def test_a_gpu_too_small(full_size, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "find_machine", lambda cpu: parse_machine("1 x V100-16"))
    flags = ["--train", "--input", full_size, "--output", tmp_path / "out"]
    result = called(reproduce.main, flags, capsys)
    assert_refused(result, "v83-first: does not fit", "16.3 GB with --grad-checkpointing")
    assert not (tmp_path / "out").exists()


def test_no_gpu_at_full_size(full_size, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(reproduce, "find_machine", lambda cpu: Machine(0, "CPU", 0, 4))
    flags = ["--input", full_size, "--output", tmp_path / "out"]
    result = called(reproduce.main, flags, capsys)
    hours = 3_100_000 * 2 / 4 / 3600
    assert_refused(result, "no GPU", f"{hours:.0f} hours", "2 CPU seconds an image", "--cpu")


def test_too_few_references_for_a_look(small_input, tmp_path, capsys):
    """Refused before anything starts. Without --stages, v98 alone is looked at."""
    flags = ["--cpu", *NETWORK, "--input", small_input, "--output", tmp_path / "out"]
    flags += ["--expect", expectations(small_input), "--references"]
    result = called(reproduce.main, [*flags, 3], capsys)
    assert_refused(result, "nothing was started: --references 3: must lie between")
    assert not (tmp_path / "out").exists()
    place_weights(tmp_path / "out", "v98")
    result = called(reproduce.main, [*flags, 40, "--plan"], capsys)
    assert "36 of 36 query_images, 48 of 48 reference_images" in result.stdout
    assert "02-weights-v98: the file is there\n" in result.stdout
    assert "v107" not in result.stdout and "cannot start" not in result.stdout


def test_the_newer_name_of_the_network():
    args = reproduce.parse_args(["--cpu", "-a", "tf_efficientnetv2_m.in21k_ft_in1k"])
    assert reproduce.make_setup(args).arch == published.ARCH


def test_bad_expectations_and_flags(tmp_path, capsys):
    expect = tmp_path / "expect.json"
    for text, word in (
        ('{"scores": {"v98": [1, 2, 3]}}', "expect.json"),
        ('{"scores": {"v99": [1, 2]}}', "'v99' is none of v98, v107"),
        ('{"scores": {"v98": ["high", 2]}}', "high"),
        ('{"score": {}}', "'score' is none of scores"),
        ('{"images": {"query_images": "many"}}', "many"),
        ('{"sha256": {"v98": "1198"}}', "64 hexadecimal digits"),
        ("[]", "expect.json"),
    ):
        expect.write_text(text)
        assert_refused(called(reproduce.main, ["--cpu", "--expect", expect], capsys), word)
    expect.write_text(json.dumps({"sha256": {"v98": "A" * 64}}))
    assert reproduce.read_expected(expect) == Expected(sha256={"v98": "a" * 64}, source=expect)
    expect.write_text('{"scores": {}}')
    assert reproduce.read_expected(expect) == Expected({}, {}, {}, False, expect)
    with pytest.raises(InputError, match="before the colon"):
        parse_stage_flags(["v84: --lr 1"])
    with pytest.raises(InputError, match="No closing quotation; correct it"):
        parse_stage_flags(["v83: --lr '0.01"])
    assert parse_stage_flags(["all: --lr 1", "all:-j 0"]) == {"all": ["--lr", "1", "-j", "0"]}


# ---- single checks ----


def write_log(tmp_path, losses, pos_pairs=5.0, skipped=0, stage="v86"):
    """The log of a stage, of 20 lines an epoch."""
    lines = [{"epoch": 0, "step": 0, "args": {}}]
    for number, loss in enumerate(losses, 1):
        line = {"epoch": (number - 1) // 20, "step": 50 * number, "loss": loss}
        lines.append(line | {"pos_pairs": pos_pairs, "skipped": skipped, "overflows": 2})
    path = tmp_path / "exp" / stage / "train" / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_strays_are_facts_and_remedies_fit(tmp_path, monkeypatch):
    """Of a stray file, no download gets rid."""
    root, log = Path("input"), tmp_path / "check-data.log"
    truths = (root / "public_ground_truth.csv",)

    def check(*lines):
        log.write_text("\n$ python scripts/check_input.py input\n" + "\n".join(lines) + "\n")
        return checks.check_data(root, ["query_images"], Expected(), log, truths)

    stray = "input/query_images: 1 entries are no images: R000001.jpg.6eBfa8"
    monkeypatch.setattr(checks, "count_images", lambda root, name: published.IMAGES[name])
    assert stray in check(stray, "input: 1 findings").facts
    missing = "input/query_images: 1 of DISC21's 50,000 images are missing: Q00001"
    with pytest.raises(InputError, match=r"Q00001; likely .* --download"):
        check(stray, missing, "input: 2 findings")
    repeated = "input/query_images: 1 images differ in their suffix alone: Q00001; rename them"
    with pytest.raises(InputError, match=r"rename them$"):
        check(repeated, "input: 1 findings")
    with pytest.raises(InputError, match=r"3 rows; its source: git clone .* input/$"):
        check("input/public_ground_truth.csv: 3 rows", "input: 1 findings")
    for lines in ([stray, "Traceback (most recent call last):", "OSError: broken"], []):
        with pytest.raises(InputError, match=r"check-data\.log: .* did not end with its summary"):
            check(*lines)


FALLING = [1.3 - number / 100 for number in range(40)]


@pytest.mark.parametrize(
    ("log", "word"),
    [
        ({"losses": [*FALLING, None]}, "no finite loss"),
        ({"losses": FALLING, "pos_pairs": 0}, "no positive pair"),
        ({"losses": FALLING, "skipped": 1}, "were skipped"),
        ({"losses": []}, "no line with a loss"),
    ],
)
def test_faults_of_training(tmp_path, log, word):
    with pytest.raises(InputError, match=word):
        checks.check_training(write_log(tmp_path, **log), tmp_path / "train.log")


@pytest.mark.parametrize(
    ("stage", "folders"),
    [
        ("v86", "{}/v86"),
        ("v83", "{0}/v83-first and {0}/v83"),
        ("v83-first", "{0}/v83-first and {0}/v83"),
    ],
)
def test_a_stage_is_trained_again_alone(tmp_path, stage, folders):
    """What a fault of it costs: not the stages before it."""
    path = write_log(tmp_path, [*FALLING, None], stage=stage)
    with pytest.raises(InputError) as caught:
        checks.check_training(path, tmp_path / "train.log")
    remedy = f"move {folders.format(tmp_path / 'exp')} away and add --stage-flags"
    assert str(caught.value).endswith(f"{remedy} '{stage.partition('-')[0]}: --amp bf16'")


def test_a_loss_that_has_not_fallen_is_a_warning_in_the_report(runner, tmp_path, capsys):
    """Days of training are not thrown away for it."""
    path = write_log(tmp_path, FALLING[::-1])
    check = partial(checks.check_training, path)
    step = Step("train-v86", ("python", "-c", ""), check, writes=(path,))
    runner.circumstances = {"machine": "A", "commit": "c", "versions": "v"}
    runner.run([step])
    assert "warning: the loss has not fallen" in capsys.readouterr().out
    setup = setup_for(Machine(0, "", 0, 2), train=True)
    report.write_report(tmp_path / "report.md", setup, [step], runner.state)
    text = (tmp_path / "report.md").read_text()
    assert "\n- train-v86: warning: the loss has not fallen" in text


def test_a_good_training_gives_its_curve(tmp_path):
    findings = checks.check_training(write_log(tmp_path, FALLING), tmp_path / "train.log")
    assert findings.curve[0] == [50, 1.3] and findings.curve[-1] == [2000, 0.91]
    assert len(findings.curve) == 10
    assert "loss 1.2850 in the first tenth, 0.9250 in the last" in findings.facts
    assert "2,000 steps, 0 skipped, 80 overflows" in findings.facts[1]


def test_a_resumed_training_is_judged_by_its_own_lines(tmp_path):
    """Not by those of v83's first run, which are in the checkpoint that the second starts from."""
    path = write_log(tmp_path, FALLING)
    findings = checks.check_training(path, tmp_path / "train.log", first_epoch=1)
    assert findings.curve[0][0] == 1050 and "1,000 steps" in findings.facts[1]
    plan = make_plan(setup_for(Machine(0, "", 0, 2), train=True))
    first_epochs = [step.check.keywords["first_epoch"] for step in plan if step.trains]
    assert first_epochs == [0, 5, 0, 0, 0]
    path = write_log(tmp_path, [*FALLING[:20], *FALLING[:20][::-1]])
    findings = checks.check_training(path, tmp_path / "train.log", first_epoch=1)
    assert any(fact.startswith(checks.WARNING) for fact in findings.facts)


def test_rows_and_norms_of_an_extraction(small_input, tmp_path):
    rng = np.random.default_rng(0)
    ids = {
        "query": sorted(checks.images_by_id(small_input, "query_images")),
        "reference": sorted(checks.images_by_id(small_input, "reference_images")),
    }
    path = tmp_path / "fb-isc-submission.h5"

    def check(change):
        rows = {name: rng.normal(size=(len(ids[name]), 256)) for name in ids}
        rows = {
            name: (value / np.linalg.norm(value, axis=1, keepdims=True)).astype(np.float32)
            for name, value in rows.items()
        }
        names = {name: list(value) for name, value in ids.items()}
        change(rows, names)
        with h5py.File(path, "w") as file:
            for name in ids:
                file[name] = rows[name]
                file[f"{name}_ids"] = np.array(names[name], "S8")
        checks.check_extraction(path, None, images=small_input, queries="query_images")

    check(lambda rows, names: None)

    def lose_a_row(rows, names):
        rows["query"] = rows["query"][1:]
        names["query"] = names["query"][1:]

    def shrink(rows, names):
        rows["reference"][3] *= 0.9

    def collapse(rows, names):
        rows["reference"][:] = rows["reference"][0]

    for change, word in (
        (lose_a_row, "ids are not those"),
        (shrink, "not of length 1, such as row 3"),
        (collapse, "collapsed"),
    ):
        with pytest.raises(InputError, match=word):
            check(change)


def test_rows_of_the_negatives(small_input, tmp_path):
    path = tmp_path / "train_feats.npy"
    number = checks.count_images(small_input, "training_images")
    rows = np.random.default_rng(0).normal(size=(number, 256)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(path, rows)
    assert f"{number} rows of length 1" in checks.check_negatives(path, small_input, None).facts[0]
    np.save(path, rows[1:])
    with pytest.raises(InputError, match=f"{number - 1} rows of {number} training images"):
        checks.check_negatives(path, small_input, None)
    np.save(path, 0.9 * rows)
    with pytest.raises(InputError, match="not of length 1"):
        checks.check_negatives(path, small_input, None)


def test_an_evaluation_without_a_score(tmp_path):
    log = tmp_path / "evaluate.log"
    log.write_text("\n$ python scripts/eval_metrics.py\nno score came out\n")
    with pytest.raises(InputError, match=r"evaluate\.log: has no score"):
        checks.check_score(
            log,
            title="v98",
            expected=None,
            tolerance=0.001,
            word="published",
            note="",
            phase=1,
            is_look=False,
            whole=None,
            trained=False,
            changed=set(),
        )


def test_verdicts(tmp_path):
    log = tmp_path / "evaluate.log"
    log.write_text(
        '\n$ python scripts/eval_metrics.py\n{"average_precision": 0.65, "recall_p90": 0.57}\n'
    )
    expected = published.Score(0.6519, 0.5710)

    def check(tolerance, expected=expected, whole=None, note="", word="published", trained=False):
        return checks.check_score(
            log,
            title="v98",
            expected=expected,
            tolerance=tolerance,
            word=word,
            note=note,
            phase=1,
            is_look=whole is not None,
            whole=whole,
            trained=trained,
            changed=set(),
        )

    def verdict(*arguments, **options):
        return check(*arguments, **options).score

    assert verdict(0.0015)["verdict"] == "not reproduced: µAP"
    assert len(verdict(0.0015)["causes"]) == 3
    assert verdict(0.0001)["verdict"] == "not reproduced: µAP and R@P90"
    recall = replace(expected, average_precision=0.65)
    assert verdict(0.0001, recall)["verdict"] == "not reproduced: R@P90"
    assert verdict(0.01)["verdict"] == "reproduced"
    assert verdict(0.01, None)["verdict"] == "no published score"
    assert verdict(0.01, None, word="expected")["verdict"] == "no expected score"
    look = verdict(0.01, None, whole=expected)["verdict"]
    assert "compares with none" in look and look.endswith("should lie above the published 0.6519")
    causes = "".join(verdict(0.001, word="expected")["causes"])
    assert "0.4955" not in causes and "--input-size" in causes
    own = verdict(0.001, word="expected", trained=True)["causes"]
    assert own == [checks.OWN_TRAINING, *checks.CAUSES_ELSEWHERE[:2]]
    assert check(0.01, note="contaminated").facts == [
        "v98: 0.6500000 / 0.5700000 (published 0.6519 / 0.571; contaminated): reproduced"
    ]


@pytest.mark.parametrize("found", [0.0, 0.5, 0.9])
def test_likely_causes(found):
    """Of own training, input size and exponent only where a flag has changed them."""

    def causes(phase, trained, changed=()):
        score = {"average_precision": found, "recall_p90": 0.5}
        expected = published.Score(0.6, 0.5)
        three = checks.likely_causes(score, expected, "published", phase, trained, changed)
        assert len(set(three)) == 3
        return " | ".join(three)

    assert found == 0 or "25,000" in causes(1, trained=False)
    assert "25,000" not in causes(2, trained=False)
    own = causes(1, trained=True)
    assert own.startswith(checks.OWN_TRAINING)
    assert "size" not in own and "GeM" not in own and "SHA-256" not in own
    if found == 0.5:
        flags = {"all": ["--gem-p", "3"], "extract": ["--input-size=512"]}
        setup = setup_for(Machine(0, "", 0, 2), train=True, stage_flags=flags)
        evaluation = make_plan(setup)[-1]
        own = causes(1, trained=True, changed=evaluation.check.keywords["changed"])
        assert "input size" in own and "GeM" in own


@pytest.mark.parametrize("text", ["{", "3", "[1]", '{"a": {}}', '[{"stage": "v98"}]'])
def test_records_of_another_shape(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"state.json: cannot be read"):
        State(path)
    path.write_text(f'{{"steps": {{"one": {text}}}, "digests": {{}}}}')
    with pytest.raises(InputError, match=r"state.json: cannot be read"):
        State(path)
    path.write_text(text)
    with pytest.raises(InputError, match=r"state.json: cannot be read"):
        checks.read_known(path)


def test_known_answers_survive_writing(tmp_path):
    entries = checks.read_known(checks.KNOWN_ANSWERS)
    checks.write_known(tmp_path / "known.json", entries * 2)
    assert checks.read_known(tmp_path / "known.json") == entries * 2
    assert checks.KNOWN_ANSWERS.read_text() == (
        checks.write_known(tmp_path / "one.json", entries) or (tmp_path / "one.json").read_text()
    )


def test_a_changed_training_run_is_not_continued(tmp_path):
    """A stage would go on in its folder, with other weights or another command."""
    setup = replace(setup_for(Machine(0, "", 0, 2), train=True), output=tmp_path)
    step = next(step for step in make_plan(setup) if step.name == "train-v86")
    start, result = step.needs[0], step.writes[0]
    start.parent.mkdir(parents=True)
    start.touch()
    state = State(tmp_path / "state.json")
    state.begin(step, {})
    changed = replace(step, command=(*step.command, "--lr", "1"))
    assert not state.is_finished(changed)  # it has trained nothing yet
    result.parent.mkdir(parents=True)
    result.touch()
    assert not state.is_finished(step)
    with pytest.raises(InputError, match=f"another command.* move {result.parent} away"):
        state.is_finished(changed)
    for text in (
        *("-j 2", "-j2", "--workers 2 --start-over", "--workers=2 --grad-checkpointing"),
        *("--dist-url tcp://localhost:10002", "--dist-url=env://", "--dist-backend gloo"),
        *("--timeout 60", "--log-every=5", "--checkpoint-every 100", "--max-skipped 3"),
        "--max-bad=0.1",
    ):
        assert not state.is_finished(replace(step, command=(*step.command, *text.split())))
    for text in ("--batch-size 32", "-b32", "--max-bad 0.1 --lr 1"):
        with pytest.raises(InputError, match="another command"):
            state.is_finished(replace(step, command=(*step.command, *text.split())))
    start.write_text("other")
    with pytest.raises(InputError, match=r"0005.pth.tar, which has changed"):
        state.is_finished(step)
    start.unlink()
    with pytest.raises(InputError, match=r"0005.pth.tar, which is missing"):
        state.is_finished(step)
    result.unlink()
    assert not state.is_finished(step)


def test_an_extraction_is_the_same_in_other_batches():
    step = make_plan(setup_for(Machine(0, "", 0, 2)))[2]
    assert step.name == "probe-v98"
    for text in ("--batch-size 32", "--batch-size=32", "-b 32", "-b32 -j4"):
        assert identity(replace(step, command=(*step.command, *text.split()))) == identity(step)
    other = replace(step, command=(*step.command, "--gem-eval-p", "2"))
    assert identity(other) != identity(step)


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock(tmp_path).close()
    assert "cannot be locked against a second run ([Errno 37]" in capsys.readouterr().err


def test_known_answers_that_differ_name_a_remedy(tmp_path):
    (entry, *_) = checks.read_known(checks.KNOWN_ANSWERS)
    rows = np.array(entry["descriptors"])
    path = tmp_path / "probe" / "published" / "v98" / "extract" / "fb-isc-submission.h5"
    assert "least cosine 1.0" in checks.compare_known(rows, entry, path, entry["input_size"])
    with pytest.raises(InputError, match="--stage-flags 'extract: --amp off'"):
        checks.compare_known(rows[::-1], entry, path, entry["input_size"])
    with pytest.raises(InputError, match=f"delete {tmp_path / 'probe'}, and run again"):
        checks.compare_known(rows[1:], entry, path, entry["input_size"])


def test_each_step_keeps_where_it_ran(tmp_path):
    step = Step("one", ("python", "x.py"), None, prepared="mkdir y")
    state = State(tmp_path / "state.json")
    here = {"machine": "A", "commit": "c1", "versions": "v"}
    state.begin(step, here)
    state.begin(step, here)
    assert report.lines_of_circumstances([(step, state.records["one"])]) == [
        "- machine: A",
        "- commit: c1",
        "- versions: v",
    ]
    state.begin(step, here | {"commit": "c2"})
    other = replace(step, name="two")
    state.begin(other, here | {"commit": "c2"})
    lines = report.lines_of_circumstances([(one, state.records[one.name]) for one in (step, other)])
    assert lines[:3] == ["- machine: A", "- commit: c1 (one)", "- commit: c2 (one, two)"]
    assert state.records["one"]["typed"] == ["mkdir y", "python x.py"]


def test_a_finished_extraction_is_kept_when_its_check_fails(runner, tmp_path):
    """A kill during the check is the same: what it wrote is neither checked nor hashed yet."""
    result, verdicts = tmp_path / "result", iter([InputError("check"), InputError("check"), None])

    def check(log):
        verdict = next(verdicts)
        if verdict:
            raise verdict
        return checks.Findings(["fine"])

    script = f"open({str(result)!r}, 'a').write('x')"
    step = Step("extract", ("python", "-c", script), check, writes=(result,), keeps=True)
    with pytest.raises(InputError, match="check"):
        runner.run([step])
    runner.state = State(tmp_path / "state.json")
    with pytest.raises(InputError, match="check"):
        runner.run([step])
    assert result.read_text() == "x"
    result.unlink()  # the remedy where images were unreadable
    runner.run([step])
    assert result.read_text() == "x" and runner.state.is_finished(step)


def test_seconds_survive_a_kill(runner, tmp_path, monkeypatch):
    """They are recorded while a step runs."""
    monkeypatch.setattr(running, "SECONDS_BETWEEN_RECORDS", 0)
    state, recorded = tmp_path / "state.json", tmp_path / "recorded"
    script = f"import time, shutil; time.sleep(1.5); shutil.copy({str(state)!r}, {str(recorded)!r})"
    step = Step("slow", ("python", "-c", script), lambda log: checks.Findings())
    runner.run([step])
    assert State(recorded).records["slow"]["seconds"] > 0.5


def test_a_signal_before_any_step(small_input, tmp_path):
    """Here while torch looks for GPUs."""
    slow = tmp_path / "torch.py"
    slow.write_text(f"import pathlib, time; pathlib.Path({str(tmp_path)!r}, 'asked').touch()\n")
    slow.write_text(slow.read_text() + "time.sleep(60)\n")
    command = ["scripts/reproduce.py", "--plan", "--input", small_input, "--output", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment)
    wait_for(tmp_path / "asked", process)
    process.terminate()
    assert process.wait(10) == 75


def test_a_failed_download_of_weights(runner):
    """What helps on a machine without internet."""
    setup = replace(setup_for(Machine(0, "", 0, 2), stages=("v98",)), output=runner.folder)
    (step,) = [step for step in make_plan(setup) if step.name == "weights-v98"]
    runner.environment["https_proxy"] = "http://localhost:9"
    path = f"{runner.folder}/published/v98/train/checkpoint_0001.pth.tar"
    remedy = (
        f"run `python scripts/download_weights.py v98 --exp {runner.folder}/published` elsewhere,"
    )
    with pytest.raises(InputError, match=f"cannot be downloaded .*{remedy} .* at {path}; "):
        runner.run([step])


def test_the_last_line_is_of_the_last_run(tmp_path):
    log = tmp_path / "step.log"
    log.write_text("\n$ python x.py\nx.py: error: old\n\n$ python x.py\n")
    assert last_line(log) == ""
    log.write_text(log.read_text() + "50%\r60%")
    assert last_line(log) == "60%"
    log.write_text(log.read_text() + "\nx.py: error: new\nand more\n")
    assert last_line(log) == "x.py: error: new"


def test_download_by_aws(small_input, tmp_path, runner):
    """With a stand-in for aws, which copies. The rest of the folder is fetched, and counted."""
    (tmp_path / "bin").mkdir()
    aws = tmp_path / "bin" / "aws"
    aws.write_text(f'#!/bin/sh\nmkdir -p "$4"\ncp {small_input}/"${{4##*/input/}}"* "$4"\n')
    aws.chmod(0o755)
    runner.environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    data = tmp_path / "input"
    machine = Machine(0, "", 0, 2)
    expected = Expected(images={"query_images": 36, "reference_images": 49})
    options = {"download": True, "stages": ("v98",)}
    query, reference, *_ = make_plan(Setup(data, tmp_path / "out", machine, expected, **options))
    assert typed(reference.command).startswith(
        f"aws s3 sync {published.BUCKET}/reference_images/ {data}/reference_images/"
    )
    runner.run([query])
    with pytest.raises(InputError, match=r"48 of 49 images; run this again with --download"):
        runner.run([reference])
    assert len(list((data / "query_images").iterdir())) == 36


def test_download_without_aws(full_size, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["--cpu", "--download", "--input", full_size, "--output", tmp_path / "out"]
    assert_refused(called(reproduce.main, flags, capsys), "aws is not installed", "awscli")


def test_runs_in_one_folder_keep_apart(small_input):
    """A first look, phase 2 and own training do not make the full run's steps run again."""
    machine = Machine(0, "", 0, 2)
    variants = ({}, {"train": True}, {"references": 40}, {"phase": 2, "stages": ("v107",)})
    commands = {}
    for options in variants:
        for step in make_plan(setup_for(machine, **options)):
            assert commands.setdefault(step.name, step.command) == step.command
    for options in variants:
        names = [step.name for step in make_plan(setup_for(machine, **options))]
        assert len(set(names)) == len(names)
        assert any(name.startswith("evaluate") for name in names)


def test_a_first_look_links_a_part(small_input, tmp_path):
    root = tmp_path / "look"
    arguments = (small_input, root, small_input / "public_ground_truth.csv", "query_images")
    for _ in range(2):  # the second time nothing changes
        prepare.link_part(*arguments, 40)
        links = sorted((root / "reference_images").iterdir())
        assert len(links) == 40 and all(link.is_symlink() for link in links)
    text = (small_input / "public_ground_truth.csv").read_text()
    wanted = set(re.findall(r"R\d{6}", text))
    assert wanted <= {link.stem for link in links}
    queries = {path.stem for path in (root / "query_images").iterdir()}
    assert queries == set(re.findall(r"Q\d{5}", text))
    (root / "query_images" / "Q99999.jpg").symlink_to(tmp_path / "gone")
    links[0].unlink()
    links[0].symlink_to(links[1].readlink())
    prepare.link_part(*arguments, 40)
    assert links[0].readlink().name == links[0].name
    assert queries == {path.stem for path in (root / "query_images").iterdir()}
    with pytest.raises(InputError, match="must lie between"):
        prepare.link_part(*arguments, 3)
