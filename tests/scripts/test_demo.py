"""scripts/demo.py: its commands parse and chain, its table is right, other folders stay."""

import importlib

import pytest

import demo
import hash_images
import report
from conftest import ROOT, assert_refused, run


@pytest.mark.parametrize("stage", demo.STAGES)
def test_commands_parse_and_chain(stage):
    commands = [demo.extract_command(stage, "demo")]
    if stage != "start":
        commands.append(demo.train_command(stage, "demo"))
    for script, *flags in commands:
        assert (ROOT / script).is_file()
        args = importlib.import_module(script.removeprefix("exp/").removesuffix(".py")).parse_args(
            flags
        )
        assert args.arch == demo.ARCH
        assert args.output == f"demo/exp/{stage}"
    if stage == "start":
        assert args.weight == demo.START and (ROOT / demo.START).is_file()
        return
    # An extraction loads the last checkpoint of the training before it.
    assert (
        demo.checkpoint(stage, "demo")
        == f"demo/exp/{stage}/train/checkpoint_{args.epochs - 1:04}.pth.tar"
    )
    previous = {"v83": "start", "v86": "v83", "v98": "v86", "v107": "v98"}.get(stage)
    assert args.weight == (demo.checkpoint(previous, "demo") if previous else None)
    assert args.no_pretrained == (previous is None)


def test_table():
    lines = demo.table(
        [demo.Score("v83", 0.51234, 0.3, 61.7), demo.Score("dHash, 256 bits", 1, 0, 2)]
    ).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| v83 | 0.5123 | 0.3000 | 62 |",
        "| dHash, 256 bits | 1.0000 | 0.0000 | 2 |",
    ]


def test_ends_with_a_page(tmp_path, monkeypatch, capsys):
    commands = []
    folder = f"{tmp_path}/demo"

    def record(command):
        commands.append(command)
        return '{"average_precision": 0, "recall_p90": 0}'

    monkeypatch.setattr(demo, "run", record)
    assert demo.main(["--folder", folder]) == 0
    script, *flags = commands[-1]
    args = report.parse_args(flags)
    assert script == "scripts/report.py"
    assert ["scripts/eval_metrics.py", str(args.submission), str(args.ground_truth)] in commands
    assert args.submission.name == "v98_iso_phase2.h5"
    hashes = next(command for command in commands if command[0] == "scripts/dev/hash_images.py")
    hashes = hash_images.parse_args(hashes[1:])
    assert hashes.phase == 2 and demo.HASHES.keys() == set(hash_images.HASHES)
    scored = [command[1] for command in commands if command[0] == "scripts/eval_metrics.py"]
    assert scored[-2:] == [f"{hashes.output}/{name}.csv" for name in demo.HASHES]
    assert capsys.readouterr().out.endswith(f"To look at: {args.output.as_uri()}\n")


def test_replaces_its_own_files_and_no_others(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    demo.prepare(mine)
    (mine / "exp" / "v83").mkdir(parents=True)
    demo.prepare(mine)
    assert not (mine / "exp").exists()
    (theirs / "input").mkdir(parents=True)
    (theirs / "input" / "photo.jpg").touch()
    assert_refused(run("scripts/demo.py", "--folder", theirs), theirs, "--folder")
    assert (theirs / "input" / "photo.jpg").exists()


def test_stops_at_the_first_failure(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "demo"
    monkeypatch.setitem(
        demo.STAGES, "untrained", demo.STAGES["untrained"] + " --batch-size 7777777"
    )
    run_command = demo.run

    def run_small(command):
        if "make_dataset" in command[0]:
            command = [*command, "--references", "6", "--queries", "3"]
            command += ["--training", "4", "--size", "128"]
        return run_command(command)

    monkeypatch.setattr(demo, "run", run_small)
    assert demo.main(["--folder", str(folder)]) == 2
    output = capfd.readouterr()
    assert f"$ python scripts/make_dataset.py {folder}/input" in output.out
    assert output.out.count("$ python") == 2  # nothing ran after the training that failed
    errors = [line for line in output.err.splitlines() if "error:" in line]
    assert (
        "v83.py: error:" in errors[0]
        and "demo.py: error: exp/v83.py ended with code 2" in errors[1]
    )
