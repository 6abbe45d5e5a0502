"""hash_images.py: perceptual hashes of small folders, and what it refuses."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

import hash_images
from conftest import ROOT, assert_refused, run

SCRIPT = ROOT / "scripts" / "dev" / "hash_images.py"
QUERY_FOLDERS = {1: "query_images", 2: "query_images_phase2"}
SOURCES = {1: (7, 2), 2: (3, 0, 11)}  # {phase: references that its queries are made of}


def make_image(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path):
    """Twelve references; two queries of phase 1, three of phase 2, each a smaller reference."""
    references = tmp_path / "reference_images"
    references.mkdir()
    for i in range(12):
        make_image(i).save(references / f"R{i:06}.png")
    for phase, seeds in SOURCES.items():
        queries = tmp_path / QUERY_FOLDERS[phase]
        queries.mkdir()
        for i, seed in enumerate(seeds):
            smaller = make_image(seed).resize((100, 90))
            smaller.save(queries / f"Q{i:05}.jpg")
    return tmp_path


@pytest.mark.parametrize("phase", [1, 2])
def test_finds_the_smaller_copies(data, phase):
    sources = SOURCES[phase]
    output = data / "new" / "hashes"
    assert hash_images.main([str(data), "--phase", str(phase), "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {"dhash.csv", "phash.csv"}
    for name in hash_images.HASHES:
        with (output / f"{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["query_id", "reference_id", "score"]
        assert len(rows) == 10 * len(sources)
        for i, source in enumerate(sources):
            query_id, reference_id, score = rows[10 * i]
            assert query_id == f"Q{i:05}"
            assert reference_id == f"R{source:06}"
            assert -100 <= int(score) <= 0


def test_images_are_read_upright_and_hidden_files_are_not_read(data):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = make_image(5).transpose(Image.Transpose.ROTATE_90)
    turned.save(data / "query_images" / "Q00007.png", exif=exif)
    (data / "query_images" / "._Q00007.png").write_bytes(b"of macOS")
    assert hash_images.main([str(data), "--output", str(data / "hashes")]) == 0
    with (data / "hashes" / "phash.csv").open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[0] == "Q00007"]
    assert rows[0] == ["Q00007", "R000005", "0"]


def test_match_hashes_ranks_by_differing_bits():
    reference = np.random.default_rng(0).random((40, 256)) < 0.5
    query = reference[[7, 30]]
    query[1, :3] ^= True
    matches = hash_images.match_hashes(query, reference, k=10)
    assert len(matches) == 20
    assert matches[0] == (0, 7, 0) and matches[10] == (1, 30, -3)
    for q, r, score in matches:
        assert score == -(query[q] != reference[r]).sum()
    scores = [score for _, _, score in matches]
    assert scores[:10] == sorted(scores[:10], reverse=True)
    assert scores[10:] == sorted(scores[10:], reverse=True)


def test_refuses_two_images_of_one_id(data, capsys):
    make_image(3).save(data / "query_images" / "Q00000.png")
    assert hash_images.main([str(data), "--output", str(data / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert str(data / "query_images") in line and "suffix" in line


def test_says_what_to_install(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert hash_images.main([str(data), "--output", str(data / "out")]) == 2
    assert "hash_images.py: error: imagehash: is not installed" in capsys.readouterr().err


def test_refuses_unreadable_images(data):
    assert_refused(run(SCRIPT, data / "none", "--output", data), data / "none" / "query_images")
    (data / "query_images" / "Q00009.jpg").write_text("no image")
    assert_refused(
        run(SCRIPT, data, "--output", data / "out"), data / "query_images" / "Q00009.jpg"
    )
    assert not (data / "out").exists()
    (data / "out").touch()
    assert_refused(run(SCRIPT, data, "--output", data / "out"), data / "out", "--output")
