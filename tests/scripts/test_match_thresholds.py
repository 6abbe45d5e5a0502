"""scripts/dev/match_thresholds.py: the tables of a small data set."""

import numpy as np
import pytest
from PIL import Image

import match_thresholds
from common.sample_images import dead_leaves, generator
from conftest import assert_refused, called

REFERENCES = 12


@pytest.fixture
def folder(tmp_path):
    """References, a query that is a crop of the first, and one that is no copy."""
    for name in ("reference_images", "query_images"):
        (tmp_path / name).mkdir()
    images = [dead_leaves(generator(0, "reference", number), 128) for number in range(REFERENCES)]
    for number, image in enumerate(images):
        image.save(tmp_path / "reference_images" / f"R{number:06}.png")
    images[0].crop((10, 10, 100, 90)).save(tmp_path / "query_images" / "Q00000.png")
    other = dead_leaves(generator(0, "query", 0), 128)
    other.save(tmp_path / "query_images" / "Q00001.png")
    table = "query_id,reference_id\nQ00000,R000000\nQ00001,\n"
    (tmp_path / "public_ground_truth.csv").write_text(table)
    return tmp_path


def printed_table(folder, capsys):
    """The rows of the first table, without the line that counts the images."""
    result = called(match_thresholds.main, [folder], capsys)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    return [line for line in lines if line.startswith("|")]


def test_images_of_one_color_do_not_match(folder, capsys):
    """Their descriptors are zero: as match.py, the table leaves them out."""
    before = printed_table(folder, capsys)
    assert [row.split(" | ")[1] for row in before[2:]] == ["1.000"] * 8  # µAP
    gray = Image.fromarray(np.full((128, 128, 3), 128, np.uint8))
    gray.save(folder / "query_images" / "Q00002.png")
    gray.save(folder / "reference_images" / f"R{REFERENCES:06}.png")
    with (folder / "public_ground_truth.csv").open("a") as table:
        table.write("Q00002,\n")
    assert printed_table(folder, capsys) == before


def test_an_unreadable_image_is_refused(folder, capsys):
    path = folder / "query_images" / "Q00001.png"
    path.write_bytes(b"no image")
    assert_refused(called(match_thresholds.main, [folder], capsys), path, "make the data set again")
