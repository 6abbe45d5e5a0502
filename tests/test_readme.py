"""The documents: their blocks of commands run as they are written, and what they name exists."""

import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import v107
from conftest import ON_ONE_CORE, ROOT, copy_repository, readme_block, run_as_written
from export import SMALL_ARCH, SMALL_SIZE
from make_dataset import dead_leaves, generator

README = "README.md"
MATCHING = "docs/MATCHING.md"
FAULTS = "docs/FAULTS.md"
SCALE = "docs/SCALE.md"
REPRODUCE = "docs/REPRODUCE.md"
DOCUMENTS = [
    README,
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md"))),
    "weights/README.md",
    "weights/EXPERIMENTS.md",
    "input/README.md",
    "CHANGELOG.md",
]
SMALL = ["-a", SMALL_ARCH, "--input-size", str(SMALL_SIZE)]
BLOCKS = {  # (document, heading): what runs the blocks below it
    (README, "Install"): "nothing: they need a package index",
    (README, "Find copies"): "here",
    (README, "Train"): "test_training.py",
    (README, "Extract, post-process, submit"): "test_training.py",
    (MATCHING, "Commands"): "here",
    (MATCHING, "Clean up a folder"): "here",
    (MATCHING, "Your own threshold"): "here",
    (MATCHING, "Other runtimes"): "here",
    ("docs/FINE_TUNING.md", "Commands"): "test_fine_tuning.py",
    (
        FAULTS,
        "v98 from scratch on 8 GPUs",
    ): "nothing: here they are compared with the published ones",
    (FAULTS, "SLURM"): "here, with stand-ins for SLURM's commands",
    (FAULTS, "Score v98"): "nothing: here they are parsed; test_training.py runs the like",
    (MATCHING, "In Python"): "test_hubconf.py, with a file",
    (SCALE, "Feed an index"): "here",
    (REPRODUCE, "Plans for four machines"): "test_reproduce.py",
    (REPRODUCE, "Rehearse on a small machine"): "test_reproduce.py, in another folder",
    ("input/README.md", "DISC21"): "nothing: they fetch 350 GB; test_check_input.py",
    ("input/README.md", "The published weights"): "nothing: they fetch; test_check_input.py",
    ("input/README.md", "A small data set of your own"): "test_fine_tuning.py, with other flags",
}
FLAGS_NOT_IN_A_SOURCE = {
    *("--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port"),  # torchrun
    *("--max-restarts", "--signals-to-handle"),  # torchrun
    *("--nodes", "--ntasks", "--gpus-per-node", "--cpus-per-task"),  # SLURM
    *("--signal", "--requeue", "--time", "--mem"),  # SLURM
    *("--extra-index-url", "--help", "--with", "--recursive"),  # pip, any, uv, aws
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


def run_block(home, heading, document, scaled):
    commands = readme_block(heading, document)
    return run_as_written(commands, home / "clone", scaled, HOME=str(home), XDG_CACHE_HOME="")


def run_python(code, cwd, **env):
    """Run a block of Python as it is written; returns what it prints."""
    command = [sys.executable, "-c", code]
    env = os.environ | ON_ONE_CORE | env
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def python_commands(block):
    """The arguments of each `python` in a block of commands, as bash expands them."""
    echo = 'python() { printf "%s\\n" "$*"; }'
    script = ["bash", "-euc", f"{echo}\n{block}"]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    return [shlex.split(line) for line in printed.splitlines()]


def parse_stage(script, *argv):
    """The arguments of a stage's command line, such as v98.py --resume auto DATA."""
    stage = importlib.import_module(script.removesuffix(".py"))
    return stage.parse_args(argv)


def read_matches(path):
    """{(name, name): score} of a csv of match.py, the names in order."""
    matches = pd.read_csv(path)
    queries = matches["query"].map(os.path.basename)
    references = matches["reference"].map(os.path.basename)
    pairs = [tuple(sorted(pair)) for pair in zip(queries, references, strict=True)]
    return dict(zip(pairs, matches["score"], strict=True))


# ---- blocks ----


@pytest.mark.parametrize(("document", "heading"), [(README, "Find copies"), (MATCHING, "Commands")])
def test_find_copies(home, document, heading):
    run_block(home, heading, document, {})
    clone = home / "clone"
    found = read_matches(clone / "copies.csv")
    assert found["1.jpg", "renamed.jpg"] == 1
    assert found["3.jpg", "compressed.jpg"] > 0.8
    page = (clone / "copies.html").read_text()
    assert "renamed.jpg" in page and "broken.jpg" in page and "data:image/jpeg" in page
    groups = (clone / "groups.jsonl").read_text().splitlines()
    assert any("renamed.jpg" in group and "1.jpg" in group for group in groups)
    assert (home / ".cache" / "isc21" / "descriptors.sqlite").exists()


def test_the_csv_that_the_readme_shows(home):
    """Its first line; the rest is of photographs."""
    shown = readme_block("Find copies", README, 1)
    run_block(home, "Find copies", README, {})
    written = (home / "clone" / "copies.csv").read_text()
    assert shown.partition("\n")[0] == written.partition("\n")[0]


def test_clean_up_a_folder(tmp_path):
    """One file of each group stays; files of equal names do not replace each other."""
    photos = [tmp_path / folder / "1.jpg" for folder in "abcd"]
    for photo in photos:
        photo.parent.mkdir()
        photo.write_text(photo.parent.name)
    groups = [
        {"group": 1, "files": list(map(str, photos[:3])), "keep": str(photos[1])},
        {"group": 2, "files": [str(photos[3])], "keep": str(photos[3])},
    ]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    code = readme_block("Clean up a folder", MATCHING)
    run_python(code, tmp_path)
    assert [photo.exists() for photo in photos] == [False, True, False, True]
    moved = sorted((tmp_path / "to_check").rglob("*.jpg"))
    assert [path.read_text() for path in moved] == ["a", "c"]
    again = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert again.returncode == 1  # and nothing that was moved before is replaced
    assert [path.read_text() for path in moved] == ["a", "c"]


def test_python(home):
    """With random weights in place of the author's."""
    clone = home / "clone"
    for name, source in ("a.jpg", "renamed.jpg"), ("b.jpg", "compressed.jpg"):
        shutil.copy(home / "Pictures" / "new" / source, clone / name)
    torch.manual_seed(0)
    arch = "tf_efficientnetv2_m_in21ft1k"
    network = v107.create_model(arch, 1.0, 1.0, torch.device("cpu"))
    fetched = home / "torch" / "hub" / "checkpoints" / "isc_ft_v107.pth.tar"
    fetched.parent.mkdir(parents=True)
    torch.save({"state_dict": network.state_dict(prefix="module."), "arch": arch}, fetched)
    code = readme_block("Find copies", README, 2)
    printed = run_python(code, clone, TORCH_HOME=str(home / "torch"))
    fetched.unlink()
    assert -1 <= float(printed) <= 1


def test_thresholds(home):
    clone, rng = home / "clone", np.random.default_rng(0)
    reference = rng.standard_normal((40, 256)).astype(np.float32)
    query = reference[:20] + 0.5 * rng.standard_normal((20, 256)).astype(np.float32)
    (clone / "exp/v107/extract").mkdir()
    with h5py.File(clone / "exp/v107/extract/fb-isc-submission.h5", "w") as file:
        for name, rows in (("query", query), ("reference", reference)):
            file[name] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            width = {"query": 5, "reference": 6}[name]
            ids = [f"{name[0].upper()}{i:0{width}}".encode() for i in range(len(rows))]
            file[f"{name}_ids"] = np.array(ids)
    (clone / "input").mkdir()
    pairs = "".join(f"Q{i:05},R{i:06}\n" for i in range(20))
    (clone / "input/public_ground_truth.csv").write_text(f"query_id,reference_id\n{pairs}")
    printed = run_block(home, "Your own threshold", MATCHING, {}).stdout
    assert "precision 0.99" in printed and "0.604169" in printed
    assert (clone / "exp/v107/extract/fb-isc-submission.h5.html").exists()


def test_other_runtimes(home):
    run_block(home, "Other runtimes", MATCHING, {"export.py": SMALL})
    clone = home / "clone"
    assert read_matches(clone / "copies.csv")["1.jpg", "renamed.jpg"] == 1
    assert [path.name for path in clone.glob("isc*")] == ["isc.onnx"]


def test_feed_an_index(home):
    """With fewer lists, for fewer descriptors."""
    folder = home / "clone" / "scripts"
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((800, 256)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for part in "PART", "vNN":
        (folder / part / "extract").mkdir(parents=True)
    with h5py.File(folder / "PART" / "extract" / "fb-isc-submission.h5", "w") as file:
        file["reference"] = rows
    np.save(folder / "vNN" / "extract" / "train_feats.npy", rows[:100])
    code = readme_block("Feed an index", SCALE)
    assert code.count("IVF65536_HNSW32,PQ32np") == 1
    code = code.replace("IVF65536_HNSW32,PQ32np", "IVF4_HNSW32,PQ32x4np")
    run_python(code, folder)
    assert (folder / "references.index").stat().st_size > 0


def test_v98_from_scratch_is_the_published_recipe():
    """Apart from how it resumes, and with a folder for --weight that is not relative."""
    recipe = ("arch", "input_size", "gem_p", "batch_size", "epochs", "lr", "momentum", "wd", "seed")
    loss = ("pos_margin", "neg_margin", "memory_size", "ncrops", "sample_size")
    recipes = []
    for block in readme_block("Train"), readme_block("v98 from scratch on 8 GPUs", FAULTS):
        found = []
        for words in python_commands(block)[:4]:
            args = parse_stage(*words)
            assert args.multiprocessing_distributed
            weight = Path(args.weight).parts[-3:] if args.weight else None
            found.append([words[0], weight, *(getattr(args, name) for name in recipe + loss)])
        recipes.append(found)
    assert [row[0] for row in recipes[0]] == ["v83.py", "v83.py", "v86.py", "v98.py"]
    assert recipes[1] == recipes[0]


def test_score_v98():
    extract, evaluate = python_commands(readme_block("Score v98", FAULTS))
    args = parse_stage(*extract)
    assert (args.mode, args.target_set, args.phase) == ("extract", "qr", 1)
    assert evaluate[0] == "../scripts/eval_metrics.py"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_a_slurm_job_is_requeued_if_it_was_stopped(tmp_path, code, requeued):
    (tmp_path / "exp").mkdir()
    for name, exit_code in ("srun", code), ("scontrol", 0):
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/{name}.called\nexit {exit_code}\n')
        stand_in.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = ["bash", "-c", readme_block("SLURM", FAULTS)]
    subprocess.run(job, cwd=tmp_path, env=os.environ | env | {"SLURM_CPUS_PER_TASK": "96"})
    called = (tmp_path / "srun.called").read_text().split()
    args = parse_stage(*called[called.index("python") + 1 :])
    assert args.multiprocessing_distributed
    assert (args.resume, args.workers) == ("auto", 96)
    assert (tmp_path / "scontrol.called").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.called").read_text() == "requeue 7\n"


def test_every_block_of_commands_is_run():
    found = set()
    for document in DOCUMENTS:
        for section in (ROOT / document).read_text().split("\n## ")[1:]:
            if "\n```" in section:
                found.add((document, section.partition("\n")[0]))
    assert found == BLOCKS.keys()


def torchrun_commands():
    """The commands within the text, of which most need several GPUs or machines."""
    texts = [(ROOT / document).read_text() for document in DOCUMENTS]
    return sorted(set(re.findall(r"`(torchrun [^`]+\.py[^`]*)`", "\n".join(texts))))


@pytest.mark.parametrize("command", torchrun_commands())
def test_commands_in_the_text_parse(command):
    words = shlex.split(command)
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    args = parse_stage(*words[script:])
    assert args.data == "../input/training_images/"


# ---- names ----


def anchors(text):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{document} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{document} links to {link}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    """Not those in the folders that runs make, such as exp/v107/train/."""
    text = (ROOT / document).read_text()
    names = re.findall(r"(?<![\w/.-])(?:scripts|exp|weights|tests|docs)/[\w./-]+\.\w+", text)
    names += re.findall(r"requirements[\w-]*\.txt|environment\.yml", text)
    for name in names:
        if not re.match(r"exp/v\d+/", name):
            assert (ROOT / name).exists(), f"{document} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", (ROOT / document).read_text())) <= targets


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_named_flags_exist(document):
    """The changelog also names removed ones."""
    sources = [
        *ROOT.glob("exp/v*.py"),
        *ROOT.glob("scripts/**/*.py"),
        *ROOT.glob("weights/**/*.py"),
    ]
    text = "\n".join(path.read_text() for path in sources)
    known = set(re.findall(r'"(--[a-z][a-z0-9-]*)"', text)) | FLAGS_NOT_IN_A_SOURCE
    text = re.sub(r"^(aws|git) .*$", "", (ROOT / document).read_text(), flags=re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    assert named - known == set()


def test_the_model_card_has_the_checksums():
    card = (ROOT / "weights" / "README.md").read_text()
    listed = dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    folder = ROOT / "weights"
    expected = {}
    for path in folder.rglob("*"):
        if path.suffix in {".tar", ".onnx", ".jsonl"}:
            name = path.relative_to(folder).as_posix()
            expected[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert listed == expected
