"""hash_images.py: perceptual hashes of small folders, and what it refuses."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

import hash_images
from conftest import ROOT, assert_refused, run

SCRIPT = ROOT / "scripts" / "dev" / "hash_images.py"


def picture(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path):
    """Twelve references; two queries of phase 1, three of phase 2, each a smaller reference."""
    for folder, name, seeds in (
        ("reference_images", "R{:06}.png", range(12)),
        ("query_images", "Q{:05}.jpg", (7, 2)),
        ("query_images_phase2", "Q{:05}.jpg", (3, 0, 11)),
    ):
        (tmp_path / folder).mkdir()
        for i, seed in enumerate(seeds):
            image = (
                picture(seed) if folder == "reference_images" else picture(seed).resize((100, 90))
            )
            image.save(tmp_path / folder / name.format(i))
    return tmp_path


@pytest.mark.parametrize(("phase", "sources"), [(1, (7, 2)), (2, (3, 0, 11))])
def test_finds_what_was_made_smaller(data, phase, sources):
    assert (
        hash_images.main(
            [str(data), "--phase", str(phase), "--output", str(data / "new" / "hashes")]
        )
        == 0
    )
    assert sorted(path.name for path in (data / "new" / "hashes").iterdir()) == [
        "dhash.csv",
        "phash.csv",
    ]
    for name in hash_images.HASHES:
        with (data / "new" / "hashes" / f"{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["query_id", "reference_id", "score"]
        assert len(rows) == 10 * len(sources)
        first = dict(reversed([(query, reference) for query, reference, _ in rows]))
        assert first == {f"Q{i:05}": f"R{source:06}" for i, source in enumerate(sources)}
        assert all(-100 <= int(rows[10 * i][2]) <= 0 for i in range(len(sources)))


def test_match_hashes_ranks_by_differing_bits():
    reference = np.random.default_rng(0).random((40, 256)) < 0.5
    query = reference[[7, 30]]
    query[1, :3] ^= True
    matches = hash_images.match_hashes(query, reference, k=10)
    assert len(matches) == 20
    assert matches[0] == (0, 7, 0) and matches[10] == (1, 30, -3)
    for rows in matches[:10], matches[10:]:
        scores = [score for _, _, score in rows]
        assert scores == sorted(scores, reverse=True)
        assert scores == [-int((query[q] != reference[r]).sum()) for q, r, _ in rows]


def test_refuses_two_images_of_one_id(data, capsys):
    picture(3).save(data / "query_images" / "Q00000.png")
    assert hash_images.main([str(data), "--output", str(data / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert str(data / "query_images") in line and "suffix" in line


def test_says_what_to_install(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert hash_images.main([str(data), "--output", str(data / "out")]) == 2
    assert "hash_images.py: error: imagehash: is not installed" in capsys.readouterr().err


def test_refuses_what_it_cannot_read(data):
    assert_refused(run(SCRIPT, data / "none", "--output", data), data / "none" / "query_images")
    (data / "query_images" / "Q00009.jpg").write_text("no image")
    assert_refused(
        run(SCRIPT, data, "--output", data / "out"), data / "query_images" / "Q00009.jpg"
    )
    assert not (data / "out").exists()
    (data / "out").touch()
    assert_refused(run(SCRIPT, data, "--output", data / "out"), data / "out", "--output")
