"""The README's commands for a folder of one's own, thresholds and other runtimes, run in bash as
they are written.
"""

import importlib
import os
import re
import shlex
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT, copy_repository, readme_block, run_as_written
from make_dataset import dead_leaves, generator

README = (ROOT / "README.md").read_text()
SMALL = ["-a", "test_byobnet", "--input-size", "96"]
TESTS = {  # heading: what runs the commands below it
    "Two commands": "test_demo.py, and the tests themselves",
    "Find copies among your own pictures": "here",
    "Thresholds": "here",
    "Other runtimes": "here",
    "Train": "test_training.py",
    "Extract, post-process, submit": "test_training.py",
    "Fine-tune on your own pictures": "test_own_data.py",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a clone and Pictures/{new,archive}, of which two are copies of others."""
    home = tmp_path_factory.mktemp("home")
    copy_repository(home / "clone")
    new, archive = home / "Pictures" / "new", home / "Pictures" / "archive"
    for i in range(12):
        folder = (new, archive)[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        dead_leaves(generator(7, "training", i), 96).save(folder / f"{i}.jpg", quality=95)
    shutil.copy(archive / "1.jpg", new / "renamed.jpg")
    Image.open(archive / "3.jpg").save(new / "compressed.jpg", quality=60)
    (archive / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    weights = home / "clone" / "exp" / "v107" / "train" / "checkpoint_0009.pth.tar"
    weights.parent.mkdir(parents=True)
    shutil.copy(ROOT / "weights" / "v98.pth.tar", weights)
    return home


def run_block(home, heading, scaled):
    return run_as_written(
        readme_block(heading), home / "clone", scaled, HOME=str(home), XDG_CACHE_HOME=""
    )


def read_matches(path):
    """{(name, name): score} of a csv of match.py, the names in order."""
    matches = pd.read_csv(path)
    names = zip(
        matches["query"].map(os.path.basename),
        matches["reference"].map(os.path.basename),
        strict=True,
    )
    return dict(zip(map(tuple, map(sorted, names)), matches["score"], strict=True))


def test_copies_among_own_pictures(home):
    run_block(home, "Find copies among your own pictures", {})
    clone = home / "clone"
    found = read_matches(clone / "copies.csv")
    assert found["1.jpg", "renamed.jpg"] == 1
    assert found["3.jpg", "compressed.jpg"] > 0.9
    page = (clone / "copies.html").read_text()
    assert "renamed.jpg" in page and "broken.jpg" in page and "data:image/jpeg" in page
    assert any(
        "renamed.jpg" in line and "1.jpg" in line
        for line in (clone / "groups.jsonl").read_text().splitlines()
    )
    assert (home / ".cache" / "isc21" / "descriptors.sqlite").exists()


def test_thresholds(home):
    clone, rng = home / "clone", np.random.default_rng(0)
    reference = rng.standard_normal((40, 256)).astype(np.float32)
    query = reference[:20] + 0.5 * rng.standard_normal((20, 256)).astype(np.float32)
    (clone / "exp/v107/extract").mkdir()
    with h5py.File(clone / "exp/v107/extract/fb-isc-submission.h5", "w") as file:
        for name, rows in (("query", query), ("reference", reference)):
            file[name] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            width = {"query": 5, "reference": 6}[name]
            file[f"{name}_ids"] = np.array(
                [f"{name[0].upper()}{i:0{width}}".encode() for i in range(len(rows))]
            )
    (clone / "input").mkdir()
    pairs = "".join(f"Q{i:05},R{i:06}\n" for i in range(20))
    (clone / "input/public_ground_truth.csv").write_text(f"query_id,reference_id\n{pairs}")
    printed = run_block(home, "Thresholds", {}).stdout
    assert "precision 0.99" in printed and "0.604169" in printed
    assert (clone / "exp/v107/extract/fb-isc-submission.h5.html").exists()


def test_other_runtimes(home):
    run_block(home, "Other runtimes", {"export.py": SMALL})
    clone = home / "clone"
    assert read_matches(clone / "copies.csv")["1.jpg", "renamed.jpg"] == 1
    assert [path.name for path in clone.glob("isc*")] == ["isc.onnx"]


def test_every_block_of_commands_is_run():
    headings = {part.partition("\n")[0] for part in README.split("\n## ")[1:] if "\n```" in part}
    assert headings == TESTS.keys()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`(torchrun [^`]+\.py[^`]*)`", README))))
def test_commands_in_the_text_parse(command):
    """Those that need several GPUs or machines."""
    words = shlex.split(command)
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    args = importlib.import_module(words[script].removesuffix(".py")).parse_args(
        words[script + 1 :]
    )
    assert args.data == "../input/training_images/"
