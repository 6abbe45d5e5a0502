"""scripts/check_input.py finds and names what is incomplete or inconsistent; subsets hold what they
must.
"""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

import check_input
import v107
from check_input import DISC21, SUBSET, list_folder, main
from common.images import SUFFIXES
from conftest import ROOT, assert_refused, run

SCRIPT = "scripts/check_input.py"
NUMBERS = {
    "training_images": 5,
    "reference_images": 12,
    "query_images": 6,
    "query_images_phase2": 6,
}


def write_truth(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("query_id", "reference_id"), *rows])


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A small data set without a fault, in DISC21's names."""
    root = tmp_path_factory.mktemp("complete") / "input"
    rng = np.random.default_rng(0)
    for name, (letter, digits, numbers) in DISC21.items():
        (root / name).mkdir(parents=True)
        for number in numbers[: NUMBERS[name]]:
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{letter}{number:0{digits}}.jpg")
    write_truth(
        root / "public_ground_truth.csv",
        [("Q00000", "R000003"), ("Q00001", ""), ("Q00002", "R000011")],
    )
    write_truth(root / "private_ground_truth.csv", [("Q50000", "R000007"), ("Q50001", "")])
    return root


@pytest.fixture
def disc21(monkeypatch):
    """DISC21 is as small as the data set."""
    small = {
        name: (letter, digits, numbers[: NUMBERS[name]])
        for name, (letter, digits, numbers) in DISC21.items()
    }
    monkeypatch.setattr(check_input, "DISC21", small)
    monkeypatch.setattr(check_input, "PUBLIC_ROWS", 3)
    monkeypatch.setattr(check_input, "PUBLIC_PAIRS", 2)


@pytest.fixture
def broken(complete, tmp_path):
    """A copy to break."""
    return shutil.copytree(complete, tmp_path / "input")


def found(capsys, *command):
    """The exit code and the lines of findings; the last line must be a summary that counts them."""
    code = main([str(part) for part in command])
    *lines, summary = capsys.readouterr().out.splitlines()
    number = re.search(r": (\S+) findings?; ", summary)[1]
    assert len(lines) == (0 if number == "no" else int(number)) and code == bool(lines)
    return lines


# ---- what is missing, and what is named wrongly ----


def test_nothing_is_found_where_all_is_well(complete, disc21, capsys):
    before = sorted(path.name for path in complete.rglob("*"))
    assert (
        found(capsys, complete)
        == []
        == found(capsys, complete, "--decode")
        == found(capsys, complete, "--partial")
    )
    assert sorted(path.name for path in complete.rglob("*")) == before


def test_missing_images_are_named_as_gaps(broken, disc21, capsys):
    for number in 2, 3, 4, 9:
        (broken / "reference_images" / f"R{number:06}.jpg").unlink()
    (broken / "query_images_phase2" / "Q50005.jpg").unlink()
    lines = found(capsys, broken)
    assert len(lines) == 3
    assert (
        f"{broken}/reference_images: 4 of DISC21's 12 images are missing: R000002 to R000004, "
        f"R000009;" in lines[0]
    )
    assert "1 of DISC21's 6 images are missing: Q50005;" in lines[1]
    assert (
        "public_ground_truth.csv: 1 of column reference_id have no image in reference_images: "
        "R000003" in lines[2]
    )
    assert len(found(capsys, broken, "--partial")) == 1  # the ground truth's


def test_names_that_are_none_of_disc21s(broken, disc21, capsys):
    folder = broken / "query_images_phase2"
    for name in "Q50006.jpg", "Q00000.jpg", "holiday.jpg", "Q050001.jpg":
        shutil.copy(folder / "Q50000.jpg", folder / name)
    [line] = found(capsys, broken)
    assert (
        f"{folder}: 4 names are none of Q50000 to Q50005: Q00000, Q050001, Q50006, holiday" in line
    )
    assert found(capsys, broken, "--partial") == []


def test_many_names_are_counted_not_listed(broken, disc21, capsys):
    for number in range(30):
        (broken / "training_images" / f"x{number:02}.jpg").touch()
    [line] = found(capsys, broken)
    assert "30 names" in line and line.count("x") < 20 and "and 20 more" in line


def test_strays_and_repeated_ids(broken, disc21, capsys):
    folder = broken / "reference_images"
    shutil.copy(folder / "R000001.jpg", folder / "R000001.PNG")
    (folder / "Thumbs.db").touch()
    (folder / "phone.heic").touch()  # no stage reads HEIC
    (folder / "nested.jpg").mkdir()
    (folder / "._R000001.jpg").touch()  # macOS leaves such hidden files: no stage reads them
    for flags in (), ("--partial",):
        lines = found(capsys, broken, *flags)
        assert len(lines) == 2
        assert "1 images differ in their suffix alone: R000001; rename" in lines[0]
        strays = "._R000001.jpg, Thumbs.db, nested.jpg, phone.heic"
        assert f"4 entries are no images: {strays}" in lines[1]


def test_either_name_of_the_training_images(broken, disc21, capsys):
    (broken / "training_images").rename(broken / "train_images")
    assert found(capsys, broken) == []
    (broken / "train_images" / "T000004.jpg").unlink()
    [line] = found(capsys, broken)
    assert f"{broken}/train_images: 1 of" in line and "T000004" in line
    (broken / "training_images").mkdir()
    lines = found(capsys, broken, "--partial")
    assert (
        "train_images: is not looked at" in lines[0]
        and "training_images: holds no image" in lines[1]
    )


def test_missing_folders_and_ground_truth(broken, disc21, capsys):
    shutil.rmtree(broken / "training_images")
    (broken / "public_ground_truth.csv").unlink()
    lines = found(capsys, broken)
    assert len(lines) == 2
    assert (
        f"{broken}/training_images: no such folder" in lines[0]
        and "public_ground_truth.csv: no such file" in lines[1]
    )
    assert found(capsys, broken, "--partial") == []


def test_images_are_those_that_the_stages_list(tmp_path):
    folder = tmp_path / "query_images"
    folder.mkdir()
    suffixes = {*SUFFIXES, *v107.IMAGE_SUFFIXES, ".txt", ".heic.jpg", ""}
    for suffix in suffixes:
        for name in f"a{suffix}", f"b{suffix.upper()}", f".hidden{suffix}", f"._a{suffix}":
            (folder / name).touch()
    listed = [v107.Path(path).name for path in v107.list_images(folder)]
    assert len(listed) > 10
    assert list_folder(tmp_path, "query_images").images == listed


# ---- ground truth ----


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [("Q00000", "R000099")],
            ["1 of column reference_id have no image in reference_images: R000099"],
        ),
        ([("Q00009", "R000001")], ["1 of column query_id have no image in query_images: Q00009"]),
        ([("Q50000", "R000001")], ["1 of column query_id have no image in query_images: Q50000"]),
        ([("Q00000", "")], ["no query has a reference"]),
        ([("Q00000", "R000001"), ("Q00000", "R000001")], ["1 queries have a row twice: Q00000"]),
        (
            [("Q00000", "R000001"), ("Q00000", "")],
            ["reference in one row and none in another: Q00000"],
        ),
        ([], ["no rows below the header"]),
        ([("", "R000001")], ["no query_id in line 2"]),
    ],
)
def test_faults_of_the_ground_truth(broken, capsys, rows, words):
    write_truth(broken / "public_ground_truth.csv", rows)
    lines = found(capsys, broken, "--partial")
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert line.startswith(f"{broken}/public_ground_truth.csv: ") and word in line


def test_an_unreadable_ground_truth_is_a_finding(broken, capsys):
    (broken / "private_ground_truth.csv").write_text("query,reference\nQ50000,R000001\n")
    (broken / "public_ground_truth.csv").write_bytes(b"\xff\xfe\x00\x00")
    lines = found(capsys, broken, "--partial")
    assert len(lines) == 2 and "no column query_id, reference_id" in lines[1]


def test_the_public_ground_truth_has_disc21s_numbers(broken, disc21, capsys):
    write_truth(broken / "public_ground_truth.csv", [("Q00000", "R000003"), ("Q00001", "")])
    [line] = found(capsys, broken)
    assert "2 rows, 1 with a reference; DISC21 has 3 and 2" in line


# ---- decoding ----


def test_decode_names_what_extraction_cannot_read(broken, capsys):
    """Exactly the unreadable images of v107's extraction, in its own words."""
    (broken / "reference_images" / "R000002.jpg").write_bytes(b"no image")
    content = (broken / "query_images" / "Q00004.jpg").read_bytes()
    (broken / "query_images" / "Q00004.jpg").write_bytes(content[: len(content) // 2])
    (broken / "training_images" / "T000001.jpg").write_bytes(b"")
    code = main([str(broken), "--partial", "--decode", "--workers", "2"])
    printed = capsys.readouterr()
    expected = []
    for folder in DISC21:
        for path in v107.list_images(broken / folder):
            try:
                v107.open_image(path)
            except v107.InputError as error:
                expected.append(str(error))
    *lines, summary = printed.out.splitlines()
    assert code == 1 and lines == expected and len(lines) == 3
    assert summary.endswith("all decoded") and "3 findings" in summary
    assert "decoding reference_images" in printed.err


def test_a_worker_process_that_died_is_no_finding(broken, monkeypatch, capsys):
    def lose_a_worker(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(check_input, "parallel", lose_a_worker)
    assert main([str(broken), "--partial", "--decode"]) == 2
    assert "a worker process died; give fewer --workers" in capsys.readouterr().err


def test_ctrl_c_ends_decoding_in_one_line(broken, tmp_path):
    (broken / "reference_images" / "R000001.png").write_bytes(b"no image")
    for number in range(5_000):
        os.link(
            broken / "reference_images" / "R000001.jpg",
            broken / "reference_images" / f"x{number}.jpg",
        )
    command = [sys.executable, SCRIPT, broken, "--partial", "--decode", "--workers", "1"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        while (
            "R000001.png: cannot be read" not in (tmp_path / "out").read_text()
        ):  # found is printed at once
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert "Traceback" not in (message := (tmp_path / "err").read_text())
    assert message.splitlines()[-1] == "check_input.py: interrupted"


def test_refusals(tmp_path, capsys):
    assert_refused(run(SCRIPT, tmp_path / "none"), tmp_path / "none", "has none of training_images")
    assert main([str(tmp_path), "--make-subset", "9"]) == 2
    assert "nor private_ground_truth.csv" in capsys.readouterr().err
    for flags, words in (
        (["--workers", "0"], "--workers: invalid int >= 1 value: '0'"),
        (["--make-subset", "9", "--decode"], "checks nothing"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path), *flags])
        assert words in capsys.readouterr().err


# ---- subset ----


def test_a_subset_holds_the_ground_truths_and_random_others(broken):
    for seed in 0, 1:
        assert main([str(broken), "--make-subset", "8", "--seed", str(seed)]) == 0
        text = (broken / SUBSET).read_text()
        ids = text.split()
        assert text == "".join(f"{name}\n" for name in sorted(ids)) and len(set(ids)) == 8
        assert {"R000003", "R000007", "R000011"} <= set(ids)  # of both ground truths
        (broken / SUBSET).rename(broken / f"{seed}.txt")
    assert (broken / "0.txt").read_text() != (broken / "1.txt").read_text()
    assert main([str(broken), "--make-subset", "8"]) == 0
    assert (broken / SUBSET).read_text() == (broken / "0.txt").read_text()


def test_every_other_reference_is_as_likely(broken):
    counts = np.zeros(12, int)
    for seed in range(100):
        check_input.make_subset(broken, 6, seed)
        counts[[int(name[1:]) for name in (broken / SUBSET).read_text().split()]] += 1
    assert (counts[[3, 7, 11]] == 100).all()
    others = np.delete(counts, [3, 7, 11])
    assert (
        others.sum() == 300 and others.min() >= 14 and others.max() <= 53
    )  # 33 each, standard deviation 5


def test_extraction_takes_the_subset(broken):
    assert main([str(broken), "--make-subset", "5"]) == 0
    command = [
        "--mode",
        "extract",
        "--weight",
        "none",
        "--eval-subset",
        "--target-set",
        "qr",
        str(broken),
    ]
    args = v107.parse_args(command)
    sets = v107.find_sets(args.data, args.target_set, args.phase, args.eval_subset, args.dryrun)
    assert [v107.Path(path).stem for path in sets["reference"]] == (
        broken / SUBSET
    ).read_text().split()
    assert len(sets["query"]) == 6


@pytest.mark.parametrize("number", [2, 13])
def test_a_subset_of_an_impossible_size_is_refused_and_the_old_one_stays(broken, number, capsys):
    (broken / SUBSET).write_text("R000000\n")
    assert main([str(broken), "--make-subset", str(number)]) == 2
    message = capsys.readouterr().err
    assert (
        f"--make-subset {number}: must lie between 3," in message
        and "and 12," in message
        and message.count("\n") == 1
    )
    assert (broken / SUBSET).read_text() == "R000000\n"
    assert not list(broken.glob(".*"))


def test_a_subset_needs_every_reference_of_the_ground_truth(broken, capsys):
    (broken / "reference_images" / "R000007.jpg").unlink()
    assert main([str(broken), "--make-subset", "8"]) == 2
    assert "private_ground_truth.csv: R000007 has no image" in capsys.readouterr().err
    assert not (broken / SUBSET).exists()


def test_ids_that_cannot_stand_in_a_list_are_refused(broken, capsys):
    (broken / "reference_images" / "R000001.jpg").rename(broken / "reference_images" / "my dog.jpg")
    assert main([str(broken), "--make-subset", "12"]) == 2
    assert "'my dog' cannot stand in a list of ids" in capsys.readouterr().err


# ---- scale ----


def test_a_million_names_take_seconds(monkeypatch, complete):
    """A fifth of them here, and without what the file system takes."""

    class Entry:
        def __init__(self, name):
            self.name = name

        def is_dir(self):
            return False

    names = [Entry(f"R{number:06}.jpg") for number in range(200_000) if number not in (7, 8)]
    monkeypatch.setattr(check_input.os, "scandir", lambda folder: nullcontext(names))
    start = time.process_time()
    listing = list_folder(complete, "reference_images")
    [line] = check_input.check_folder(complete, "reference_images", listing, False)
    assert (
        "800,002 of DISC21's 1,000,000 images are missing: R000007 to R000008, R200000 to R999999;"
        in line
    )
    assert time.process_time() - start < 4
