"""plot_log.py on logs of training runs: what it reads, what it draws, what it shows in TensorBoard,
what it refuses.
"""

import json
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plot_log
import v83
from conftest import ROOT, assert_refused, called, run
from stage_process import TRAINING, log_lines

SCRIPT = ROOT / "scripts" / "plot_log.py"
VALUES = dict.fromkeys(plot_log.PANELS, 1.0)


def write_log(path, steps=(50, 100, 150, 200), end=""):
    lines = [
        {"epoch": 0, "step": 0, "args": {}},
        {"epoch": 0, "step": 60, "bad_image": "x.jpg: is no image"},
    ]
    for step in steps:
        lines.append({"epoch": step // 101, "step": step, **VALUES, "lr": step / 1000})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


def test_whole_command(tmp_path):
    log = write_log(tmp_path / "log.jsonl", end='{"epoch": 1, "st')  # a killed run's last line
    result = run(SCRIPT, log)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path}/log.png\n"
    with Image.open(tmp_path / "log.png") as image:
        assert image.size == (1560, 1320)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "log.png"]


def test_draws_what_the_log_says(tmp_path):
    logs = {}
    for name, steps in (("a", (50, 200)), ("b", (9,))):
        logs[name] = plot_log.read_log(write_log(tmp_path / name, steps))
    axes = plot_log.draw(logs).axes
    assert len(axes) == 9
    lr = next(axis for axis in axes if axis.get_title(loc="left") == "learning rate")
    first, second = lr.lines
    assert first.get_xydata().tolist() == [[50, 0.05], [200, 0.2]]
    assert second.get_xydata().tolist() == [[9, 0.009]]


def test_epochs_have_borders_in_a_single_log(tmp_path):
    log = plot_log.read_log(write_log(tmp_path / "log.jsonl"))
    for axis in plot_log.draw({"a": log}).axes:
        _, border = axis.lines
        assert border.get_xdata()[0] == 150


def test_a_loss_that_was_never_finite_leaves_a_gap(tmp_path):
    log = write_log(tmp_path / "log.jsonl")
    log.write_text(log.read_text().replace('"loss": 1.0', '"loss": null', 1))
    assert plot_log.read_log(log)["loss"].isna().tolist() == [True, False, False, False]


def test_a_log_of_former_versions_has_no_overflows(tmp_path):
    log = write_log(tmp_path / "log.jsonl")
    log.write_text(log.read_text().replace('"overflows"', '"others"'))
    table = plot_log.read_log(log)
    assert table["overflows"].isna().all() and (table["skipped"] == 1).all()
    assert len(plot_log.draw({"a": table}).axes) == 9


def test_a_step_that_was_logged_again_counts_once(tmp_path):
    log = write_log(tmp_path / "log.jsonl", steps=(50, 100, 150))
    with log.open("a") as file:
        print('{"step": 100, "loss": 7, "epoch": 0}', file=file)
    assert plot_log.read_log(log)["loss"].tolist() == [1, 7, 1]


def test_an_image_needs_no_torch(tmp_path):
    log = write_log(tmp_path / "log.jsonl")
    program = "import sys, plot_log; plot_log.main(sys.argv[1:]); print('torch' in sys.modules)"
    result = run("-c", program, log, PYTHONPATH=str(ROOT / "scripts"))
    assert result.stdout.splitlines()[-1] == "False", result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no step"),
        ('{"epoch": 0, "step": 1}\n', "no step"),
        ("[1]\n2\n", "no step"),
        ("x\n{}\n", "line 1 is not JSON"),
    ],
)
def test_refuses_what_is_not_a_log(tmp_path, capsys, text, words):
    (tmp_path / "log.jsonl").write_text(text)
    assert plot_log.main([str(tmp_path / "log.jsonl")]) == 2
    assert words in capsys.readouterr().err


def test_no_file_and_no_format(tmp_path):
    assert_refused(run(SCRIPT, tmp_path / "log.jsonl"), "log.jsonl")
    assert_refused(run(SCRIPT, "log.jsonl", "-o", "log.txt"), "--output log.txt", "png")
    assert_refused(run(SCRIPT, "log.jsonl", "-o", "log.pgf"), "--output log.pgf", "png")


# ---- TensorBoard ----


def read_board(folder):
    """{name: {step: value}} of the scalars in a folder of event files; no step may be there
    twice.
    """
    board = EventAccumulator(str(folder))
    board.Reload()
    scalars = {}
    for name in board.Tags()["scalars"]:
        events = board.Scalars(name)
        scalars[name] = {event.step: event.value for event in events}
        assert len(scalars[name]) == len(events)
    return scalars


def show(log, folder):
    assert plot_log.main([str(log), "--tensorboard", str(folder)]) == 0


def test_tensorboard_has_the_log_of_a_run(data, tmp_path, monkeypatch, capfd):
    """Of a run that was continued, as one process after another shows it."""
    monkeypatch.chdir(tmp_path)
    for epochs in (1, 3):
        flags = ["--resume", "auto", "--log-every", "1", "--epochs", epochs, "--output", "v83"]
        argv = [str(argument) for argument in [*TRAINING, *flags, data / "training_images"]]
        assert v83.main(argv) == 0
        log = tmp_path / "v83" / "train" / "log.jsonl"
        result = called(plot_log.main, [log, "--tensorboard", tmp_path / "board"], capfd)
        assert (result.returncode, result.stdout) == (0, f"{tmp_path}/board/v83\n")
    lines = [line for line in log_lines(tmp_path / "v83") if "loss" in line]
    assert len(lines) == 30
    scalars = read_board(tmp_path / "board" / "v83")
    assert scalars.keys() == lines[0].keys() - {"epoch", "step"}
    for name, values in scalars.items():
        logged = {line["step"]: line[name] for line in lines}
        assert values == pytest.approx(logged, rel=1e-6)


def test_tensorboard_has_a_folder_for_each_run(tmp_path):
    logs = [tmp_path / "a" / "v83" / "train" / "log.jsonl", tmp_path / "b" / "small.jsonl"]
    for number, log in enumerate(logs, start=1):
        log.parent.mkdir(parents=True)
        write_log(log, steps=(50 * number,))
    result = run(SCRIPT, *logs, "--tensorboard", "board", cwd=tmp_path)
    assert result.stdout.split() == ["board/a/v83", "board/b/small"], result.stderr
    for run_folder, step in zip(result.stdout.split(), (50, 100), strict=True):
        assert read_board(tmp_path / run_folder)["lr"] == {step: pytest.approx(step / 1000)}
    twice = tmp_path / "a" / "v83.jsonl"
    write_log(twice)
    refused = run(SCRIPT, logs[0], twice, "--tensorboard", "board", cwd=tmp_path)
    assert_refused(refused, twice, "same run")


def test_tensorboard_replaces_its_own_files_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = write_log(tmp_path / "log.jsonl")
    board = tmp_path / "board" / "log"
    show(log, "board")
    (board / "events.out.tfevents.1.others").touch()
    write_log(log, steps=(50, 150))
    show(log, "board")
    assert read_board(board)["lr"] == pytest.approx({50: 0.05, 150: 0.15})
    assert len(list(board.iterdir())) == 2


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_tensorboard_leaves_a_gap_where_no_loss_was_finite(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    log = write_log(tmp_path / "log.jsonl", steps=(50, 100))
    log.write_text(log.read_text().replace('"loss": 1.0', f'"loss": {value}', 1))
    show(log, "board")
    scalars = read_board(tmp_path / "board" / "log")
    assert scalars["loss"].keys() == {100}
    assert scalars["skipped"].keys() == {50, 100}


def test_tensorboard_follows_a_running_log(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"epoch": 0, "step": 0, "args": {}}\n')  # of a run that has just begun
    command = [sys.executable, SCRIPT, log, "--tensorboard", "board", "--follow"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    def wait_for(steps):
        end = time.monotonic() + 60
        while read_board(board).get("lr", {}).keys() != steps:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)

    try:
        board = tmp_path / process.stdout.readline().rstrip("\n")
        write_log(log, steps=(50, 100), end='{"epoch": 1, "st')
        wait_for({50, 100})
        write_log(log, steps=(50, 100, 150))
        wait_for({50, 100, 150})
        write_log(log, steps=(50, 70))  # of a run that was resumed from step 50
        wait_for({50, 70})
        log.rename(tmp_path / "moved.jsonl")
        write_log(log, steps=(50, 70, 90))
        wait_for({50, 70, 90})
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()


def test_tensorboard_is_optional(tmp_path, monkeypatch, capsys):
    log = write_log(tmp_path / "log.jsonl")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert plot_log.main([str(log), "--tensorboard", str(tmp_path / "board")]) == 2
    error = "plot_log.py: error: --tensorboard: not installed; pip install tensorboard\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path / "board").exists()


def test_tensorboard_refuses(tmp_path, capsys):
    log = write_log(tmp_path / "log.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    taken = tmp_path / "taken"
    taken.touch()
    for argv, words in (
        ([log, "--follow"], ["--follow", "--tensorboard"]),
        ([log, "--tensorboard", taken, "-o", "x.png"], ["--output", "--tensorboard"]),
        ([log, "--tensorboard", taken], [taken]),
        ([empty, "--tensorboard", tmp_path / "board"], [empty, "no step"]),
        ([tmp_path / "none", "--tensorboard", tmp_path / "board", "--follow"], ["none"]),
    ):
        assert_refused(called(plot_log.main, argv, capsys), *words)
