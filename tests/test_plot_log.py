"""plot_log.py on logs of training runs: what it reads, what it draws, what it refuses."""

import json

import pytest
from PIL import Image

import plot_log
from conftest import ROOT, assert_refused, run

SCRIPT = ROOT / "scripts" / "plot_log.py"
VALUES = dict.fromkeys(plot_log.PANELS, 1.0)


def write_log(path, steps=(50, 100, 150, 200), end=""):
    lines = [
        {"epoch": 0, "step": 0, "args": {}},
        {"epoch": 0, "step": 60, "bad_image": "x.jpg: is no image"},
    ]
    lines += [{"epoch": step // 101, "step": step, **VALUES, "lr": step / 1000} for step in steps]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


def test_whole_command(tmp_path):
    log = write_log(tmp_path / "log.jsonl", end='{"epoch": 1, "st')  # a killed run's last line
    result = run(SCRIPT, log)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path}/log.png\n"
    with Image.open(tmp_path / "log.png") as image:
        assert image.size == (1320, 1320)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "log.png"]


def test_draws_what_the_log_says(tmp_path):
    logs = {
        name: plot_log.read_log(write_log(tmp_path / name, steps))
        for name, steps in (("a", (50, 200)), ("b", (9,)))
    }
    axes = plot_log.draw(logs).axes
    assert len(axes) == 8
    lr = next(axis for axis in axes if axis.get_title(loc="left") == "learning rate")
    assert [line.get_xydata().tolist() for line in lr.lines] == [
        [[50, 0.05], [200, 0.2]],
        [[9, 0.009]],
    ]


def test_epochs_have_borders_in_a_single_log(tmp_path):
    log = plot_log.read_log(write_log(tmp_path / "log.jsonl"))
    assert [line.get_xdata()[0] for line in plot_log.draw({"a": log}).axes[0].lines[1:]] == [150]


def test_a_loss_that_was_never_finite_leaves_a_gap(tmp_path):
    log = write_log(tmp_path / "log.jsonl")
    log.write_text(log.read_text().replace('"loss": 1.0', '"loss": null', 1))
    assert plot_log.read_log(log)["loss"].isna().tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no step"),
        ('{"epoch": 0, "step": 1}\n', "no step"),
        ("[1]\n2\n", "no step"),
        ("x\n{}\n", "line 1 is not JSON"),
    ],
)
def test_what_is_no_log(tmp_path, capsys, text, words):
    (tmp_path / "log.jsonl").write_text(text)
    assert plot_log.main([str(tmp_path / "log.jsonl")]) == 2
    assert words in capsys.readouterr().err


def test_no_file_and_no_format(tmp_path):
    assert_refused(run(SCRIPT, tmp_path / "log.jsonl"), "log.jsonl")
    assert_refused(run(SCRIPT, "log.jsonl", "-o", "log.txt"), "--output log.txt", "png")
    assert_refused(run(SCRIPT, "log.jsonl", "-o", "log.pgf"), "--output log.pgf", "png")
