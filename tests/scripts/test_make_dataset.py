"""scripts/make_dataset.py: layout, disjoint splits, correct ground truth, byte-identical files,
interruptions, wrong input.
"""

import hashlib
import importlib.util
import io
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageOps

from common import images
from conftest import ROOT, assert_refused, children, run
from make_dataset import (
    EDITS,
    EXAMPLES,
    GAP,
    HEADING,
    ROW,
    THUMBNAIL,
    InputError,
    Job,
    SourceImage,
    apply_edits,
    dead_leaves,
    embedded_tiles,
    fingerprint,
    generator,
    label,
    list_photographs,
    main,
    open_embedded,
    open_photograph,
    read_journal,
)

SCRIPT = "scripts/make_dataset.py"
CSVS = "b93645bedecab35f8771c817b6ed1d4076f43b4c2346c46f2504157e47e39e9e"
QUERIES = "dd37b77e6ffaf9ccafefba3750d74e555b848635a5db3e2dad380832a6e15f49"
SMALL = "--queries", 30, "--references", 40, "--training", 12, "--size", 128


def contents(folder):
    """{relative path: bytes} of every file below the folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def thumbnail(path):
    """An image as 768 floats, enough to recognize it after scaling and JPEG."""
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
    assert [p.name for p in sorted((dataset / "training_images").iterdir())] == [
        f"T{i:06}.jpg" for i in range(12)
    ]
    assert [p.name for p in sorted((dataset / "reference_images").iterdir())] == [
        f"R{i:06}.jpg" for i in range(40)
    ]
    for folder, start, truth in (
        ("query_images", 0, tables[0]),
        ("query_images_phase2", 50_000, tables[1]),
    ):
        ids = [f"Q{i:05}" for i in range(start, start + 30)]
        assert (
            [p.stem for p in sorted((dataset / folder).iterdir())] == ids == truth.query_id.tolist()
        )
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
        apply_edits(open_embedded(tile.path, 128).crop(tile.box), edits).save(
            buffer, "JPEG", **edits[-1][1]
        )
        folder = "query_images" if row.phase == 1 else "query_images_phase2"
        assert (dataset / folder / f"{row.query_id}.jpg").read_bytes() == buffer.getvalue()
        seen |= {name for name, _ in edits}
    assert seen == {*EDITS, "jpeg"}


def test_copies_are_of_the_reference_in_the_ground_truth(dataset, tables):
    edits = tables[2].set_index("query_id")
    tiles = {tile.name: tile for tile in embedded_tiles(128)}
    for row in tables[0][tables[0].reference_id != ""].itertuples():
        tile = tiles[edits.source[row.query_id]]
        reference = np.asarray(
            Image.open(dataset / "reference_images" / f"{row.reference_id}.jpg"), float
        )
        source = np.asarray(open_embedded(tile.path, 128).crop(tile.box), float)
        assert np.abs(reference - source).mean() < 5  # JPEG artifacts only


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


def test_the_embedded_data_set_is_the_one_that_the_published_figures_are_of(dataset, tables):
    """Generated images depend on the machine's linear algebra, edited ones on the architecture's
    rounding.
    """
    csvs = b"".join(file.read_bytes() for file in sorted(dataset.glob("*.csv")))
    assert hashlib.sha256(csvs).hexdigest() == CSVS
    if platform.machine() == "x86_64":
        queries = b"".join(
            file.read_bytes() for file in sorted(dataset.glob("query_images*/*.jpg"))
        )
        assert hashlib.sha256(queries).hexdigest() == QUERIES


def test_another_seed_another_data_set(dataset, tmp_path):
    result = run(SCRIPT, tmp_path / "other", *SMALL, "--seed", 1)
    assert result.returncode == 0, result.stderr
    other, first = contents(tmp_path / "other"), contents(dataset)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


# ---- statistics and contact sheet ----


def test_statistics_count_what_is_there(dataset, tables):
    numbers = json.loads((dataset / "statistics.json").read_text())
    assert numbers["arguments"]["--queries"] == 30 and numbers["arguments"]["--photos"] is None
    for folder, part in numbers["pictures"].items():
        files = list((dataset / folder).iterdir())
        widths = [Image.open(file).width for file in files]
        assert part["number"] == len(files) == part["of photographs"] + part["generated"]
        assert part["width"] == {
            "min": min(widths),
            "median": int(np.median(widths)),
            "max": max(widths),
        }
        assert part["bytes"] == sum(file.stat().st_size for file in files)
    assert [part["generated"] for part in numbers["pictures"].values()] == [12, 0, 0, 0]
    assert numbers["pictures"]["query_images"]["copies"] == (tables[0].reference_id != "").sum()
    chains = [[name for name, _ in json.loads(edits)] for edits in tables[2].edits]
    assert numbers["queries by edit"] == Counter(name for chain in chains for name in chain)
    lengths = numbers["queries by number of edits before jpeg"]
    assert lengths == {
        str(number): count for number, count in Counter(len(chain) - 1 for chain in chains).items()
    }
    assert numbers["sources"]["usable"] == len(embedded_tiles(128))
    assert (
        numbers["sources"]["used"] == pd.concat([tables[2].source]).nunique() + 20
    )  # 40 references, 20 of them copied


def test_contact_sheet_shows_originals_beside_queries(dataset, tables):
    sheet = Image.open(dataset / "contact_sheet.jpg")
    assert sheet.height == len(EDITS) * ROW + GAP
    tiles = {tile.name: tile for tile in embedded_tiles(128)}
    rows = [row for row in tables[2].itertuples() if "overlay_stripes" in row.edits]
    rows.sort(key=lambda row: len(json.loads(row.edits)))
    y = list(EDITS).index("overlay_stripes") * ROW + HEADING
    for column, row in enumerate(rows[:EXAMPLES]):
        folder = "query_images" if row.phase == 1 else "query_images_phase2"
        tile = tiles[row.source]
        pair = (
            open_embedded(tile.path, 128).crop(tile.box),
            Image.open(dataset / folder / f"{row.query_id}.jpg"),
        )
        for number, image in enumerate(pair):
            x = GAP + column * (2 * THUMBNAIL + 3 * GAP) + number * (THUMBNAIL + GAP)
            shown = np.asarray(sheet.crop((x, y, x + THUMBNAIL, y + THUMBNAIL)), float)
            expected = np.asarray(
                ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), color="gainsboro"), float
            )
            assert np.abs(shown - expected).mean() < 5, (row.query_id, number)


def test_labels_hold_every_parameter():
    edits = [["crop", {"x1": 0.1, "y1": 0.25}], ["jpeg", {"quality": 40}]]
    job = Job(Path("query_images/Q00007.jpg"), SourceImage("a.png"), "query", 7, edits)
    assert label(job).replace("\n", " ") == "Q00007: crop x1=0.1 y1=0.25, jpeg quality=40"


# ---- interruptions ----


def start(*command):
    """A running make_dataset.py."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def count_images(folder):
    return len(list(folder.glob("**/*.jpg")))


def test_a_killed_run_resumes_to_byte_identical_files_and_leaves_nothing(dataset, tmp_path):
    unfinished = tmp_path / ".out.unfinished"
    for _ in range(2):
        already = count_images(unfinished)
        process = start(tmp_path / "out", *SMALL, "--workers", 2)
        wait_for(lambda already=already: count_images(unfinished) > already + 12)
        workers = children(process.pid)
        process.kill()
        process.communicate()
        wait_for(lambda workers=workers: not any(map(alive, workers)))
        assert len(workers) == 2 and count_images(unfinished) < 112
    assert not (tmp_path / "out").exists()
    # A power failure may leave an empty file.
    (unfinished / "data" / "query_images" / "Q00003.jpg").write_bytes(b"")

    other = run(SCRIPT, tmp_path / "out", *SMALL, "--seed", 3, "--references", 41)
    assert_refused(other, unfinished, "--seed, --references", "--start-over")
    written = {file: file.stat().st_mtime_ns for file in unfinished.glob("data/*/T*.jpg")}
    result = run(SCRIPT, tmp_path / "out", *SMALL, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(dataset)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for file, when in written.items():  # those were not made again
        assert (tmp_path / "out" / file.relative_to(unfinished / "data")).stat().st_mtime_ns == when


def test_ctrl_c_ends_all_in_one_line_and_start_over_discards(tmp_path):
    process = start(tmp_path / "out", *SMALL, "--workers", 2)
    wait_for(lambda: count_images(tmp_path) > 10)
    workers = children(process.pid)
    for pid in (process.pid, *workers):  # a terminal signals them all
        os.kill(pid, signal.SIGINT)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command resumes it" in messages.splitlines()[-1]
    assert "Traceback" not in messages
    assert not any(map(alive, workers))
    tiny = "--queries", 3, "--references", 3, "--training", 2, "--size", 128
    result = run(SCRIPT, tmp_path / "out", *tiny, "--start-over")
    assert result.returncode == 0, result.stderr
    assert len(contents(tmp_path / "out")) == 11 + 5 and [
        path.name for path in tmp_path.iterdir()
    ] == ["out"]


def test_a_killed_worker_is_one_line(tmp_path):
    process = start(tmp_path / "out", *SMALL, "--workers", 2)
    wait_for(lambda: count_images(tmp_path) > 10)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a worker process died" in messages.splitlines()[-1] and "Traceback" not in messages


def test_a_killed_reading_resumes_and_other_photographs_are_refused(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(14):
        dead_leaves(generator(7, "training", i), 48).save(photos / f"{i:02}.png")
    command = (
        SCRIPT,
        tmp_path / "out",
        "--photos",
        photos,
        "--size",
        32,
        "--training",
        4,
        "--references",
        4,
    )
    assert_refused(run(*command, "--queries", 90), "allow 6 queries")
    journal = tmp_path / ".out.unfinished" / "photographs.jsonl"
    assert [path for path, *_ in read_journal(journal)] == [
        str(photos / f"{i:02}.png") for i in range(14)
    ]
    with journal.open("r+") as file:  # after a kill, the last line may be a part of one
        file.truncate(journal.stat().st_size - 9)
    process = start(*command[1:], "--workers", 1)
    wait_for(lambda: (tmp_path / ".out.unfinished" / "plan.json").exists())
    process.kill()
    _, messages = process.communicate()
    assert "1/1 " in messages  # one was read again
    dead_leaves(generator(7, "training", 99), 48).save(photos / "new.png")
    assert_refused(run(*command), "other photographs", "--start-over")
    assert run(*command, "--start-over").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "out"}


def test_the_next_run_removes_what_a_kill_after_the_last_step_left(tmp_path, capsys):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "plan.json").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "statistics.json").touch()
    assert main([str(tmp_path / "out")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- photographs ----


def test_transparent_photographs_are_as_viewers_show_them(tmp_path):
    """Different drawings in black on transparent black are different photographs."""
    digests = set()
    for name, box in {"wide": (5, 20, 60, 30), "tall": (20, 5, 30, 60)}.items():
        drawing = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(drawing).rectangle(box, fill="black")
        drawing.save(tmp_path / f"{name}.png")
        seen = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(seen).rectangle(box, fill="black")
        seen.save(tmp_path / f"{name}.bmp")
        digest, _ = fingerprint(tmp_path / f"{name}.png")
        assert digest == fingerprint(tmp_path / f"{name}.bmp")[0]
        digests.add(digest)
    assert len(digests) == 2


def test_hidden_files_are_no_photographs(tmp_path):
    dead_leaves(generator(7, "training", 0), 48).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")  # macOS leaves such
    (tmp_path / ".trash").mkdir()
    dead_leaves(generator(7, "training", 1), 48).save(tmp_path / ".trash" / "b.png")
    assert [path.name for path, _ in list_photographs(tmp_path)] == ["a.png"]


def test_photographs_are_split_without_overlap_and_unreadable_ones_named(tmp_path):
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    for i in range(40):
        image = dead_leaves(generator(7, "training", i), 96)
        image.save(photos / "below" / f"{i}.{('jpg', 'png', 'webp', 'bmp')[i % 4]}")
    image.convert("L").save(photos / "gray.png")
    image.convert("CMYK").resize((200, 90)).save(photos / "cmyk.jpg")
    image.quantize(16).resize((90, 60)).save(photos / "palette.gif")
    (photos / "copy.bmp").write_bytes((photos / "below" / "3.bmp").read_bytes())
    (photos / "broken.jpg").write_bytes((photos / "below" / "0.jpg").read_bytes()[:300])
    Image.new("RGB", (900, 1)).save(photos / "thin.png")
    (photos / "notes.txt").write_text("no image")

    result = run(
        SCRIPT,
        tmp_path / "out",
        "--photos",
        photos,
        "--training",
        25,
        "--references",
        20,
        "--size",
        64,
    )
    assert result.returncode == 0, result.stderr
    skipped = [line for line in result.stderr.splitlines() if "skipped" in line]
    assert len(skipped) == 3
    assert all(name in result.stderr for name in ("copy.bmp", "3.bmp", "broken.jpg", "thin.png"))
    assert "notes.txt" not in result.stderr

    edits = pd.read_csv(tmp_path / "out" / "query_edits.csv")
    truth = pd.concat(
        [
            pd.read_csv(tmp_path / "out" / f"{name}_ground_truth.csv")
            for name in ("public", "private")
        ]
    )
    assert (
        len(edits) == 2 * 18 and truth.reference_id.notna().sum() == 2 * 6
    )  # 30% of 43 photographs: 13 references
    assert len({p.name for p in (tmp_path / "out" / "training_images").iterdir()}) == 25
    photographs = np.array([thumbnail(p) for p in (photos / "below").iterdir()])
    found = {}
    for folder in "training_images", "reference_images":
        files = list((tmp_path / "out" / folder).iterdir())
        distances = np.abs(np.array([thumbnail(p) for p in files])[:, None] - photographs).mean(
            axis=2
        )
        found[folder] = set(np.nonzero((distances < 12).any(axis=0))[0])
    assert len(found["training_images"]) > 12 and len(found["reference_images"]) > 6
    assert not found["training_images"] & found["reference_images"]


def test_hidden_files_and_folders_are_no_photographs(tmp_path):
    (tmp_path / ".thumbnails").mkdir()
    for name in "1.jpg", "._1.jpg", ".hidden.png", ".thumbnails/1.jpg", "notes.txt":
        (tmp_path / name).touch()
    assert [path for path, _ in list_photographs(tmp_path)] == [tmp_path / "1.jpg"]


def png_of(width, height):
    """The first bytes of a PNG that claims so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">II", zlib.crc32(header), 9)
        + b"IDAT"
    )


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # as make_dataset itself does
def test_what_cannot_be_opened_is_named_in_one_line(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_of(100_001, 1000))
    (tmp_path / "text.jpg").write_text("no\nimage")
    # Pillow alone would start Ghostscript
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n"
    (tmp_path / "script.png").write_bytes(script)
    (tmp_path / "empty.webp").touch()
    reasons = {
        "bomb": "100001 x 1000 pixels",
        "text": "no image in a known format",
        "script": "no image in a known format",
        "empty": "",
    }
    for name, reason in reasons.items():
        path = next(tmp_path.glob(f"{name}.*"))
        with pytest.raises(InputError) as caught:
            open_photograph(path)
        assert str(caught.value).startswith(f"{path}: cannot be read") and reason in str(
            caught.value
        )
        assert "\n" not in str(caught.value)


def test_photographs_are_upright_and_of_8_bits(tmp_path):
    image = dead_leaves(generator(7, "training", 0), 48).crop((0, 0, 48, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_photograph(tmp_path / "turned.png"), np.rot90(np.asarray(image), -1))
    gray = np.linspace(0, 65535, 48 * 30).astype(np.uint16).reshape(30, 48)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_photograph(tmp_path / "deep.png"))[..., 0], gray >> 8)


@pytest.mark.skipif(not importlib.util.find_spec("pillow_heif"), reason="needs pillow-heif")
def test_heic_is_read(tmp_path):
    small = dead_leaves(generator(7, "training", 0), 64)
    image = small.resize((256, 256))  # smooth: HEIC halves the colors
    image.save(tmp_path / "phone.HEIC", format="HEIF", quality=95)
    opened = np.asarray(open_photograph(tmp_path / "phone.HEIC"), float)
    assert np.abs(opened - np.asarray(image, float)).mean() < 8


def test_without_pillow_heif_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images.formats.cache_clear()
    (tmp_path / "phone.heic").touch()
    with pytest.raises(InputError, match="install pillow-heif"):
        open_photograph(tmp_path / "phone.heic")
    images.formats.cache_clear()


def test_generated_images_differ_and_are_colored():
    pixels = [np.asarray(dead_leaves(generator(0, "training", i), 64), float) for i in range(8)]
    assert all(image.shape == (64, 64, 3) and image.std() > 20 for image in pixels)
    assert len({image.tobytes() for image in pixels}) == 8


def test_refusals_leave_nothing_behind(tmp_path):
    full, empty = tmp_path / "full", tmp_path / "photos"
    full.mkdir(), empty.mkdir()
    (full / "mine.txt").write_text("keep")
    assert_refused(run(SCRIPT, full), full, "not an empty folder")
    assert_refused(run(SCRIPT, full / "mine.txt"), "mine.txt", "not an empty folder")
    assert_refused(
        run(SCRIPT, tmp_path / "out", "--photos", tmp_path / "none"),
        tmp_path / "none",
        "no such folder",
    )
    assert_refused(run(SCRIPT, tmp_path / "out", "--photos", empty), empty, "more photographs")
    assert_refused(run(SCRIPT, empty / "out", "--photos", empty), "lies in --photos")
    assert_refused(
        run(SCRIPT, tmp_path / "out", "--references", 40, "--queries", 90), "allow 60 queries"
    )
    assert_refused(run(SCRIPT, tmp_path / "out", "--queries", 1), "--queries", "'1'")
    assert_refused(run(SCRIPT, tmp_path / "out", "--workers", 0), "--workers", "'0'")
    assert {p.name for p in tmp_path.iterdir()} == {"full", "photos"}
    assert (full / "mine.txt").read_text() == "keep"
