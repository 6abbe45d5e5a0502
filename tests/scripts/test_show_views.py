"""scripts/dev/show_views.py: the image shows what the first samples of an epoch are trained on."""

import numpy as np
import pytest
from PIL import Image

import show_views
import v83
import v86
import v98
import v107
from conftest import ROOT, assert_refused, called, run

SCRIPT = ROOT / "scripts" / "dev" / "show_views.py"
SIDE = 32


@pytest.fixture
def show(data, capsys):
    """Run the command in this process: show(stage, output, *flags) -> CompletedProcess."""

    def show_stage(stage, output, *flags, images=data / "training_images"):
        flags = ["--input-size", SIDE, *flags]
        return called(show_views.main, [stage, images, "--output", output, *flags], capsys)

    return show_stage


def check_cell(shown, view):
    """Assert that a part of the image has the pixels of a view, and others where it is erased."""
    same = (shown == view.pixels).all(axis=2)
    if view.erasing is not None:
        top, left, height, width, _ = view.erasing
        erased = np.s_[top : top + height, left : left + width]
        assert same[erased].mean() < 0.1
        same[erased] = True
    assert same.all()


@pytest.mark.parametrize(
    ("module", "columns", "flags", "parameters"),
    [
        (v83, 2, [], {"ncrops": 2}),
        (v86, 3, ["--ncrops", 3], {"ncrops": 3}),
        (v98, 4, ["--start-epoch", 2], {"ncrops": 2, "fast_input": False}),
        (v107, 4, ["--num-negatives", 2], {"num_negatives": 2, "fast_input": False}),
    ],
)
def test_shows_what_training_sees(show, data, tmp_path, module, columns, flags, parameters):
    rows = 5
    output = tmp_path / "views.png"
    result = show(module.__name__, output, "--seed", 3, "--count", rows, *flags)
    assert result.returncode == 0 and result.stdout == f"{output}\n", result.stderr
    grid = np.asarray(Image.open(output))
    assert grid.shape == (2 + rows * (SIDE + 2), 2 + columns * (SIDE + 2), 3)

    dataset = module.TrainDataset(
        data / "training_images", input_size=SIDE, sample_size=10**6, seed=3, **parameters
    )
    dataset.epoch = 2 if "--start-epoch" in flags else 0
    order = module.epoch_batches(3, dataset.epoch, len(dataset), 1).ravel()
    for row in range(rows):
        views, _ = dataset[order[row]]
        for column, view in enumerate(views):
            top, left = 2 + row * (SIDE + 2), 2 + column * (SIDE + 2)
            check_cell(grid[top : top + SIDE, left : left + SIDE], view)


def test_shows_fewer_samples_where_there_are_no_more(show, tmp_path):
    result = show("v83", tmp_path / "views.jpg", "--count", 100, "--sample-size", 3)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "views.jpg").size == (2 + 2 * (SIDE + 2), 2 + 3 * (SIDE + 2))


def test_refuses_what_it_cannot_use(show, tmp_path):
    output = tmp_path / "views.png"
    assert_refused(show("v98", output, images=tmp_path / "none"), tmp_path / "none")
    assert_refused(show("v98", tmp_path / "none" / "views.png"), "none")
    assert_refused(show("v98", tmp_path / "views.txt"), "--output", "views.txt", "png")
    assert_refused(show("v98", output, "--seed", "-1"), "--seed")
    assert_refused(show("v99", output), "v99")
    assert not output.exists()


def test_the_whole_command(data, tmp_path):
    output = tmp_path / "views.png"
    result = run(SCRIPT, "v83", data / "training_images", "--output", output, "--count", 1)
    assert result.returncode == 0, result.stderr
    assert output.exists()
