"""--tensorboard: it shows what log.jsonl has, and each epoch's first views."""

import importlib
import sys

import pytest
from stage_process import TRAINING, log_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_board(folder):
    """{name: {step: value}} of the scalars, {step: (height, width)} of the views."""
    board = EventAccumulator(str(folder))
    board.Reload()
    scalars = {name: board.Scalars(name) for name in board.Tags()["scalars"]}
    assert all(len({event.step for event in events}) == len(events) for events in scalars.values())
    sizes = {event.step: (event.height, event.width) for event in board.Images("views")}
    return {
        name: {event.step: event.value for event in events} for name, events in scalars.items()
    }, sizes


def train(stage, data, output, *flags):
    argv = [*TRAINING, *flags, "--tensorboard", "--output", output, data / "training_images"]
    return importlib.import_module(stage).main([str(argument) for argument in argv])


@pytest.mark.parametrize(
    ("stage", "flags", "columns"), [("v83", [], 2), ("v107", ["--num-negatives", 2], 4)]
)
def test_shows_the_log_and_the_first_views(data, tmp_path, stage, flags, columns):
    for epochs in (1, 3):  # in two runs
        assert (
            train(
                stage,
                data,
                tmp_path,
                *flags,
                "--resume",
                "auto",
                "--log-every",
                1,
                "--epochs",
                epochs,
            )
            == 0
        )
    lines = [line for line in log_lines(tmp_path) if "loss" in line]
    scalars, sizes = read_board(tmp_path / "train" / "tensorboard")
    assert scalars.keys() == lines[0].keys() - {"epoch", "step"}
    for name, values in scalars.items():
        assert values == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-6)
    steps = len(lines) // 3
    assert sizes == {epoch * steps + 1: (2 + 34 * 4, 2 + 34 * columns) for epoch in range(3)}


def test_is_not_installed(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert train("v83", data, tmp_path) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line == "v83.py: error: --tensorboard: is not installed; pip install tensorboard"
