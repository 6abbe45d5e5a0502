"""scripts/make_dataset.py: layout, disjointness, honest ground truth, reproducible bytes, refusals."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import assert_refused, run
from make_dataset import EDITS, apply_edits, dead_leaves, embedded_tiles, generator, open_embedded

SCRIPT = "scripts/make_dataset.py"
SMALL = "--queries", 30, "--references", 40, "--training", 12, "--size", 128


def contents(folder):
    """{relative path: bytes} of every file below the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def thumbnail(path):
    """A picture as 768 floats, enough to recognise it after scaling and JPEG."""
    return np.asarray(Image.open(path).convert("RGB").resize((16, 16)), float).ravel()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "input"
    result = run(SCRIPT, out, *SMALL, "--workers", 2)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def tables(dataset):
    """Ground truth of both phases and the edits, as data frames."""
    files = "public_ground_truth.csv", "private_ground_truth.csv", "query_edits.csv"
    return [pd.read_csv(dataset / file, keep_default_na=False) for file in files]


def test_layout(dataset, tables):
    assert [p.name for p in sorted((dataset / "training_images").iterdir())] == [f"T{i:06}.jpg" for i in range(12)]
    assert [p.name for p in sorted((dataset / "reference_images").iterdir())] == [f"R{i:06}.jpg" for i in range(40)]
    for folder, start, truth in ("query_images", 0, tables[0]), ("query_images_phase2", 50_000, tables[1]):
        ids = [f"Q{i:05}" for i in range(start, start + 30)]
        assert [p.stem for p in sorted((dataset / folder).iterdir())] == ids == truth.query_id.tolist()
    for file in dataset.rglob("*.jpg"):
        assert Image.open(file).mode == "RGB"


def test_one_query_in_three_copies_a_reference_of_its_own(dataset, tables):
    public, private = (set(t.reference_id) - {""} for t in tables[:2])
    assert len(public) == len(private) == 10
    assert [(t.reference_id != "").sum() for t in tables[:2]] == [10, 10]
    assert not public & private
    assert public | private <= {p.stem for p in (dataset / "reference_images").iterdir()}


def test_no_distractor_shares_its_source_with_a_reference_or_the_other_phase(tables):
    truth = pd.concat(tables[:2])
    edits = tables[2].merge(truth, on="query_id", validate="one_to_one")
    copies, distractors = edits[edits.reference_id != ""], edits[edits.reference_id == ""]
    assert copies.source.is_unique
    assert not set(copies.source) & set(distractors.source)
    phases = [set(edits[edits.phase == phase].source) for phase in (1, 2)]
    assert not phases[0] & phases[1]


def test_recorded_edits_replayed_on_the_source_give_the_query(dataset, tables):
    tiles = {tile.name: tile for tile in embedded_tiles(128)}
    seen = set()
    for row in tables[2].itertuples():
        tile, edits = tiles[row.source], json.loads(row.edits)
        buffer = io.BytesIO()
        apply_edits(open_embedded(tile.path, 128).crop(tile.box), edits).save(buffer, "JPEG", **edits[-1][1])
        folder = "query_images" if row.phase == 1 else "query_images_phase2"
        assert (dataset / folder / f"{row.query_id}.jpg").read_bytes() == buffer.getvalue()
        seen |= {name for name, _ in edits}
    assert seen == {*EDITS, "jpeg"}


def test_copies_are_of_the_reference_in_the_ground_truth(dataset, tables):
    edits = tables[2].set_index("query_id")
    tiles = {tile.name: tile for tile in embedded_tiles(128)}
    for row in tables[0][tables[0].reference_id != ""].itertuples():
        tile = tiles[edits.source[row.query_id]]
        reference = np.asarray(Image.open(dataset / "reference_images" / f"{row.reference_id}.jpg"), float)
        source = np.asarray(open_embedded(tile.path, 128).crop(tile.box), float)
        assert np.abs(reference - source).mean() < 5  # JPEG artefacts only


def test_tiles_are_disjoint():
    tiles = embedded_tiles(128)
    for path in {tile.path for tile in tiles}:
        size = open_embedded(path, 128).size
        covered = np.zeros(size[::-1], int)
        for x1, y1, x2, y2 in (tile.box for tile in tiles if tile.path == path):
            assert (x2 - x1, y2 - y1) == (128, 128)
            assert x2 <= size[0] and y2 <= size[1]
            covered[y1:y2, x1:x2] += 1
        assert covered.max() == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_same_command_same_bytes_for_any_number_of_workers(dataset, tmp_path, workers):
    result = run(SCRIPT, tmp_path / "again", *SMALL, "--workers", workers)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "again") == contents(dataset)


def test_another_seed_another_data_set(dataset, tmp_path):
    result = run(SCRIPT, tmp_path / "other", *SMALL, "--seed", 1)
    assert result.returncode == 0, result.stderr
    other, first = contents(tmp_path / "other"), contents(dataset)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


def test_photographs_are_split_once_and_unreadable_ones_named(tmp_path):
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    for i in range(40):
        picture = dead_leaves(generator(7, "training", i), 96)
        picture.save(photos / "below" / f"{i}.{('jpg', 'png', 'webp', 'bmp')[i % 4]}")
    picture.convert("L").save(photos / "gray.png")
    picture.convert("CMYK").resize((200, 90)).save(photos / "cmyk.jpg")
    picture.quantize(16).resize((90, 60)).save(photos / "palette.gif")
    (photos / "copy.bmp").write_bytes((photos / "below" / "3.bmp").read_bytes())
    (photos / "broken.jpg").write_bytes((photos / "below" / "0.jpg").read_bytes()[:300])
    Image.new("RGB", (900, 1)).save(photos / "thin.png")
    (photos / "notes.txt").write_text("no picture")

    result = run(SCRIPT, tmp_path / "out", "--photos", photos, "--training", 25, "--references", 20, "--size", 64)
    assert result.returncode == 0, result.stderr
    skipped = [line for line in result.stderr.splitlines() if "skipped" in line]
    assert len(skipped) == 3
    assert all(name in result.stderr for name in ("copy.bmp", "3.bmp", "broken.jpg", "thin.png"))
    assert "notes.txt" not in result.stderr

    edits = pd.read_csv(tmp_path / "out" / "query_edits.csv")
    truth = pd.concat([pd.read_csv(tmp_path / "out" / f"{name}_ground_truth.csv") for name in ("public", "private")])
    assert len(edits) == 2 * 18 and truth.reference_id.notna().sum() == 2 * 6  # 30% of 43 photographs: 13 references
    assert len({p.name for p in (tmp_path / "out" / "training_images").iterdir()}) == 25
    photographs = np.array([thumbnail(p) for p in (photos / "below").iterdir()])
    found = {}
    for folder in "training_images", "reference_images":
        files = list((tmp_path / "out" / folder).iterdir())
        distances = np.abs(np.array([thumbnail(p) for p in files])[:, None] - photographs).mean(axis=2)
        found[folder] = set(np.nonzero((distances < 12).any(axis=0))[0])
    assert len(found["training_images"]) > 12 and len(found["reference_images"]) > 6
    assert not found["training_images"] & found["reference_images"]


def test_generated_pictures_differ_and_are_coloured():
    pictures = [np.asarray(dead_leaves(generator(0, "training", i), 64), float) for i in range(8)]
    assert all(picture.shape == (64, 64, 3) and picture.std() > 20 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_refusals_leave_nothing_behind(tmp_path):
    full, empty = tmp_path / "full", tmp_path / "photos"
    full.mkdir(), empty.mkdir()
    (full / "mine.txt").write_text("keep")
    assert_refused(run(SCRIPT, full), full, "not an empty folder")
    assert_refused(run(SCRIPT, full / "mine.txt"), "mine.txt", "not an empty folder")
    assert_refused(run(SCRIPT, tmp_path / "out", "--photos", tmp_path / "none"), tmp_path / "none", "no such folder")
    assert_refused(run(SCRIPT, tmp_path / "out", "--photos", empty), empty, "more photographs")
    assert_refused(run(SCRIPT, tmp_path / "out", "--references", 40, "--queries", 90), "allow 60 queries")
    assert_refused(run(SCRIPT, tmp_path / "out", "--queries", 1), "--queries 1")
    assert_refused(run(SCRIPT, tmp_path / "out", "--workers", 0), "--workers 0")
    assert {p.name for p in tmp_path.iterdir()} == {"full", "photos"}
    assert (full / "mine.txt").read_text() == "keep"
