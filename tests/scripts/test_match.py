"""match.py as its users run it: folders of images made here, a small network in ONNX or torch."""

import ast
import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pillow_heif
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import match
import v107
from common import images, page
from common.descriptor_cache import DescriptorCache
from common.descriptors import database_augmentation, negative_embedding_subtraction
from common.extraction import PixelBudget, extract_descriptors, map_ahead
from common.networks import DEFAULT_ONNX, Network, onnx_network, torch_network
from common.pairs import cosine, find_pairs
from common.sample_images import dead_leaves
from common.search import normalize
from conftest import ROOT, assert_refused, called, run

COMMAND = ROOT / "scripts" / "match.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, GRID = 32, 8
THRESHOLD = "0.95"  # of the thumbnails below


def write_onnx(path, size=SIZE, seed=0, metadata=True, threshold=None):
    """A network whose descriptors are random projections of an image's thumbnail without its
    mean.
    """
    weights = np.random.default_rng(seed).standard_normal((3 * GRID**2, 256)).astype(np.float32)
    step = [size // GRID] * 2
    nodes = [
        helper.make_node("AveragePool", ["images"], ["pooled"], kernel_shape=step, strides=step),
        helper.make_node("ReduceMean", ["pooled"], ["mean"], axes=[1, 2, 3]),
        helper.make_node("Sub", ["pooled", "mean"], ["centered"]),
        helper.make_node("Flatten", ["centered"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["descriptors"], axis=1, p=2),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, size, size])
    output = helper.make_tensor_value_info("descriptors", TensorProto.FLOAT, ["n", 256])
    graph = helper.make_graph(
        nodes, "small", [images], [output], [numpy_helper.from_array(weights, "weights")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if metadata:
        config = {"input_size": size, "mean": MEAN, "std": STD, "threshold": threshold}
        helper.set_model_props(model, {"config": json.dumps(config)})
    onnx.save(model, path)
    return str(path)


def draw(seed, size=(90, 60)):
    """An image like no other: a few random colors, enlarged."""
    colors = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    return write_onnx(tmp_path_factory.mktemp("network") / "small.onnx")


@pytest.fixture
def folder(tmp_path):
    """Eight images; a copy, a recompressed, a cropped and a turned one of the first; and no other
    file.
    """
    root = tmp_path / "images"
    (root / "below").mkdir(parents=True)
    for seed in range(8):
        draw(seed).save(root / f"{seed}.png")
    shutil.copy(root / "0.png", root / "below" / "renamed.png")
    draw(0).save(root / "recompressed.jpg", quality=40)
    draw(0).crop((2, 2, 88, 58)).save(root / "cropped.webp")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    draw(0).transpose(Image.Transpose.ROTATE_90).save(root / "turned.jpg", exif=exif, quality=95)
    return root


@pytest.fixture
def do(tmp_path, network_file, capfdbinary):
    """Run main() in this process; returns exit code, matches as dicts from stdout, and stderr."""

    def do(*arguments, threshold=THRESHOLD, network=network_file):
        options = [
            "--onnx",
            network,
            "--cache",
            tmp_path / "cache.sqlite",
            "--threshold",
            threshold,
            "--workers",
            "2",
        ]
        code = match.main([*map(str, options), *map(str, arguments)])
        out, err = capfdbinary.readouterr()
        rows = list(csv.DictReader(io.StringIO(out.decode("utf-8", "surrogateescape"), newline="")))
        return code, rows, err.decode(errors="replace")

    return do


def names(rows):
    return {tuple(sorted((Path(row["query"]).name, Path(row["reference"]).name))) for row in rows}


def fake(monkeypatch, wrap):
    """Have the network's run replaced by wrap(run)."""
    load = match.load_network

    def load_wrapped(args):
        network = load(args)
        return dataclasses.replace(network, run=wrap(network.run))

    monkeypatch.setattr(match, "load_network", load_wrapped)


def extracted(paths, network, workers=2):
    """The descriptors of readable image files, without a cache file."""
    cache = DescriptorCache(None, network)
    rows, unreadable = extract_descriptors(paths, network, cache, 8, workers, quiet=True)
    assert unreadable == {}
    return rows


def rows_of(*lists):
    rows = np.array(lists, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ---- whole commands ----


def test_finds_the_copies_in_a_folder(folder, do):
    code, rows, _ = do(folder)
    copies = ["0.png", "renamed.png", "recompressed.jpg", "cropped.webp", "turned.jpg"]
    assert code == 0
    assert names(rows) == {tuple(sorted((a, b))) for a in copies for b in copies if a < b}
    assert len(rows) == 10 and {row["group"] for row in rows} == {"1"}
    exact = [
        row["score"]
        for row in rows
        if "0.png" in row["query"] and "renamed.png" in row["reference"]
    ]
    assert exact == ["1.000000"]


def test_finds_the_copies_between_two_folders(folder, do, tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    for name in ("recompressed.jpg", "3.png", "4.png"):
        shutil.move(folder / name, archive / name)
    shutil.copy(archive / "3.png", folder / "three.png")
    code, rows, err = do(folder, archive)
    assert code == 0
    assert names(rows) == {("3.png", "three.png")} | {
        tuple(sorted((name, "recompressed.jpg")))
        for name in ("0.png", "renamed.png", "cropped.webp", "turned.jpg")
    }
    assert all(Path(row["query"]).is_relative_to(folder) for row in rows)
    assert len({row["group"] for row in rows}) == 2
    assert "13 images, 11 of them new; 5 matches in 2 groups" in err


def test_an_image_and_lists_of_paths(folder, do, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for separator in ("\n", "\r\n", "\0"):
        Path("list.txt").write_text(
            separator.join(["images/1.png", "", "images/recompressed.jpg", ""])
        )
        code, rows, _ = do("images/0.png", "list.txt")
        assert code == 0 and [row["reference"] for row in rows] == ["images/recompressed.jpg"]
    code, rows, _ = do("images/0.png", "images/1.png")
    assert code == 1 and rows == []


def test_overlapping_sets_do_not_match_a_file_with_itself(folder, do):
    code, rows, _ = do(folder, folder / "below")
    assert code == 0 and all(row["query"] != row["reference"] for row in rows)
    assert len(rows) == 4
    _, rows, _ = do(folder, folder)
    assert len(rows) == 20  # each pair from both sides
    code, rows, _ = do(folder / "1.png", folder / ".." / "images" / "1.png")
    assert code == 1 and rows == []


def test_links_and_hidden_files(folder, do):
    (folder / "below" / "loop").symlink_to(folder)
    (folder / "link.png").symlink_to(folder / "1.png")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    shutil.copy(folder / "2.png", folder / ".hidden.png")
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "2.png", folder / ".thumbnails" / "2.png")
    shutil.copy(folder / "2.png", folder / "notes.txt")
    code, rows, err = do(folder)
    assert code == 0 and len(rows) == 10
    assert "13 images" in err  # 12 and the dangling link
    assert err.rstrip().endswith("dangling.png: no such file")


def test_suffixes_of_any_case(folder, do, tmp_path):
    pillow_heif.register_heif_opener()
    copies = tmp_path / "copies"
    copies.mkdir()
    for suffix in ("JPG", "jfif", "Heic"):
        draw(0).save(copies / f"copy.{suffix}", format="JPEG" if suffix == "jfif" else None)
    code, rows, err = do(copies, folder / "0.png")
    assert code == 0 and len(rows) == 3 and "unreadable files" not in err


def test_unreadable_files_are_named_and_do_not_end_the_job(folder, do):
    whole = (folder / "1.png").read_bytes()
    unreadable = {
        "empty.jpg": b"",
        "text.jpg": b"no image",
        "vector.gif": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    }
    for name, data in unreadable.items():
        (folder / name).write_bytes(data)
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (10_001, 10_000)).save(folder / "huge.png")
    Image.new("1", (20_000, 10_000)).save(folder / "huger.png")
    os.mkfifo(folder / "pipe.jpg")
    code, rows, err = do(folder)
    assert code == 0 and len(rows) == 10
    report = dict(
        line.rsplit(": ", 1) for line in err.split("unreadable files (7):\n")[1].splitlines()
    )
    reasons = {Path(path).name: reason for path, reason in report.items()}
    assert reasons.keys() == {*unreadable, "truncated.png", "huge.png", "huger.png", "pipe.jpg"}
    assert reasons["huge.png"] == "10001 x 10000 pixels, more than 100000000 to decode"
    assert "200000000 pixels" in reasons["huger.png"]
    assert (
        reasons["text.jpg"] == reasons["vector.gif"]
        and "no image in a known format (AVIF" in reasons["text.jpg"]
    )
    assert reasons["pipe.jpg"] == "not a regular file"
    code, rows, err = do(folder, "--bad-images", "error")
    assert code == 2 and len(rows) == 10 and "--bad-images error: 7 unreadable files" in err
    code, rows, err = do(folder / "text.jpg", folder)
    assert code == 2 and rows == [] and "text.jpg: no image of 1 can be read" in err


def test_the_threshold_of_the_file(folder, tmp_path, capfd):
    found = {}
    for own in (THRESHOLD, 1):
        file = write_onnx(tmp_path / "own.onnx", threshold=float(own))
        for flags in ([], ["--threshold", "-1"]):
            assert match.main([str(folder), "--onnx", file, "--no-cache", "-q", *flags]) == 0
            found[own, bool(flags)] = len(capfd.readouterr().out.splitlines()) - 1
    assert found[THRESHOLD, False] == 10 and found[1, False] == 1
    assert found[THRESHOLD, True] == found[1, True] > 10


def test_outputs(folder, do, tmp_path):
    code, rows, _ = do(folder)
    table, lines, groups = (tmp_path / name for name in ("out.csv", "out.jsonl", "groups.jsonl"))
    code, nothing, _ = do(folder, "--output", table, "--output", lines, "--groups", groups)
    assert code == 0 and nothing == []
    with table.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    for line, row in zip(lines.read_text().splitlines(), rows, strict=True):
        assert {**row, "score": float(row["score"]), "group": int(row["group"])} == json.loads(line)
    (group,) = map(json.loads, groups.read_text().splitlines())
    assert group["group"] == 1 and {Path(path).name for path in group["files"]} >= {
        "0.png",
        "turned.jpg",
    }
    assert len(group["files"]) == 5
    do(folder, "--output", table, "--groups", groups, threshold=1)
    assert [json.loads(line)["group"] for line in groups.read_text().splitlines()] == [1]
    assert len(table.read_text().splitlines()) == 2


def test_paths_keep_their_bytes(folder, do, tmp_path):
    odd = [
        b"a, \" and 'b'.png",
        b"line\nbreak.png",
        b"latin \xe9.png",
        "ünïcode 図.png".encode(),
        b" =1.png",
    ]
    for name in odd:
        shutil.copy(folder / "5.png", os.fsencode(folder) + b"/" + name)
    (folder / os.fsdecode(b"bad\n\xff.png")).write_bytes(b"")
    out = tmp_path / "out.jsonl"
    _, rows, err = do(folder, "--output", out, "--output", "-", threshold=1)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    for table in (rows, found):
        files = {
            os.fsencode(row[side]).rpartition(b"/")[2]
            for row in table
            for side in ("query", "reference")
        }
        assert files >= {*odd, b"5.png"}
    assert err.splitlines()[-1].endswith(
        r"bad\n\xff.png: no image in a known format "
        "(AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP, HEIF)"
    )


def test_report(folder, do, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(page, "write_match_page", lambda *arguments: given.append(arguments))
    (folder / "bad.jpg").write_bytes(b"")
    _, rows, _ = do(folder, "--report", tmp_path / "page.html")
    ((output, matches, unreadable, threshold),) = given
    assert output == tmp_path / "page.html" and threshold == float(THRESHOLD)
    assert isinstance(matches, pd.DataFrame) and list(matches) == [
        "query",
        "reference",
        "score",
        "group",
    ]
    assert (
        matches["query"].tolist() == [row["query"] for row in rows]
        and matches["score"].dtype == float
    )
    assert [(Path(path).name, reason[:10]) for path, reason in unreadable] == [
        ("bad.jpg", "no image i")
    ]
    monkeypatch.setitem(sys.modules, "common.page", None)
    monkeypatch.delattr(sys.modules["common"], "page")
    code, _, err = do(folder, "--report", tmp_path / "page.html")
    assert (
        code == 2
        and err.startswith("match.py: error: ")
        and "page" in err
        and "extracting" not in err
    )


def test_quiet_says_nothing_but_what_is_wrong(folder, do, tmp_path):
    background = tmp_path / "background"
    background.mkdir()
    for seed in range(100, 112):
        draw(seed).save(background / f"{seed}.png")
    _, _, err = do(folder, "--quiet", "--negatives", background)
    assert err == ""
    (folder / "bad.jpg").write_bytes(b"")
    _, _, err = do(folder, "--quiet")
    title, line = err.splitlines()
    assert title == "match.py: unreadable files (1):" and line.startswith(f"{folder}/bad.jpg: ")
    _, _, err = do(folder)
    assert "extracting descriptors" in err and "comparing" in err


def test_a_reader_that_has_had_enough(folder, network_file):
    command = (
        f"{sys.executable} {COMMAND} {folder} {folder} --onnx {network_file} --no-cache -q "
        f"--threshold -1 | true"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stderr == ""


# What a light installation lacks, and what Windows lacks.
NOT_NEEDED = ["torch", "torchvision", "timm", "cv2", "augly", "hubconf"]
POSIX_ONLY = ["fcntl", "grp", "pwd", "resource", "termios"]


def test_imports_neither_torch_nor_what_is_posix_only():
    """Neither by `import match` nor by a match with the default network."""
    code = f"import sys; import match; print(sorted({set(NOT_NEEDED)} & set(sys.modules)))"
    result = run("-c", code, PYTHONPATH=str(COMMAND.parent))
    assert result.stdout == "[]\n", result.stderr


def test_runs_in_a_light_installation(folder, tmp_path):
    """The default network needs no torch and no POSIX, and a HEIC then says what it needs."""
    draw(0).save(folder / "phone.heic")
    blocked = [*NOT_NEEDED, *POSIX_ONLY, "pillow_heif"]
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked}))"
    output = tmp_path / "copies.csv"
    arguments = [str(folder), "--no-cache", "--output", str(output), "--threshold", THRESHOLD]
    code = f"{block}; import match; sys.exit(match.main({arguments!r}))"
    result = run("-c", code, cwd=tmp_path, PYTHONPATH=str(COMMAND.parent))
    assert result.returncode == 0, result.stderr
    assert len(output.read_text().splitlines()) > 1
    assert "phone.heic: HEIC needs pillow-heif: pip install pillow-heif" in result.stderr
    arguments += ["--weight", "isc_ft_v107"]
    code = f"{block}; import match; sys.exit(match.main({arguments!r}))"
    result = run("-c", code, cwd=tmp_path, PYTHONPATH=str(COMMAND.parent))
    assert result.returncode == 2
    assert "is not installed, and --weight needs it; install requirements.txt" in result.stderr


def test_nothing_of_the_project_that_it_imports_is_posix_only():
    for path in local_imports(COMMAND):
        modules = {module.partition(".")[0] for module in imported_modules(path)}
        assert not modules & set(POSIX_ONLY), path.name
        text = path.read_text()
        for name in ("os.fork", "os.sync", "os.getuid", "O_DIRECTORY", "SIGKILL", "SIGALRM"):
            assert name not in text, f"{path.name}: {name}"


def test_the_light_requirements_are_what_it_imports():
    """Every package that match.py and its page import, and no other."""
    pinned = {line.partition("==")[0] for line in pins(ROOT / "requirements-match.txt")}
    optional = {"torch", "hubconf", "pillow_heif"}
    own = {path.stem for path in (ROOT / "scripts").glob("**/*.py")} | {"common"}
    distributions = importlib.metadata.packages_distributions()
    used = set()
    for path in local_imports(COMMAND):
        modules = {module.partition(".")[0] for module in imported_modules(path)}
        for module in modules - sys.stdlib_module_names - own - optional:
            used |= {name.lower() for name in distributions[module]}
    assert used == pinned


def test_the_three_lists_of_pins_are_equal():
    text = COMMAND.read_text()
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    content = "".join(
        line.removeprefix("#").removeprefix(" ")
        for line in block["content"].splitlines(keepends=True)
    )
    inline = tomllib.loads(content)
    light = pins(ROOT / "requirements-match.txt")
    full = pins(ROOT / "requirements-base.txt") | pins(ROOT / "requirements.txt")
    assert inline["requires-python"] == ">=3.11"
    assert set(inline["dependencies"]) == light
    assert light <= full


def pins(path):
    """The lines of a requirements file that name a package: {"numpy==1.2.3"}."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("-r ")}


def imported_modules(path):
    """Names of the modules that a file imports, at any depth: {"common.files", "numpy"}."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def local_imports(path):
    """The files of scripts/ that a file imports, and those that they import, and itself."""
    found, todo = set(), [path]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for module in imported_modules(path):
            file = ROOT / "scripts" / (module.replace(".", "/") + ".py")
            if file.is_file():
                todo.append(file)
    return found


# ---- torch ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = v107.ISCNet(timm.create_model("test_efficientnet", features_only=True)).eval()
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth.tar"
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path
    )
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1"])
@pytest.mark.parametrize("size", [(90, 60), (64, 64), (1, 700), (300, 2)])
def test_preprocesses_as_the_stages_extraction_does(mode, size, tmp_path):
    """Bit-identical, for every image that EXIF does not turn."""
    draw(3, size).convert(mode).save(tmp_path / "image.tiff")
    network = Network(None, "", "", 64, MEAN, STD, 256)
    actual = network.preprocess(images.open_image(tmp_path / "image.tiff"))
    expected = v107.evaluation_transform(64, MEAN, STD)(v107.open_image(tmp_path / "image.tiff"))
    assert actual.dtype == np.float32 and actual.flags.c_contiguous
    np.testing.assert_array_equal(actual, expected.numpy())


def test_preprocesses_every_value_as_the_stages_extraction_does():
    values = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    network = Network(None, "", "", 16, MEAN, STD, 256)
    expected = v107.evaluation_transform(16, MEAN, STD)(values)
    np.testing.assert_array_equal(network.preprocess(values), expected.numpy())


def test_extracts_what_torch_hub_does(folder, checkpoint, tmp_path, capfd):
    network_options = ["--weight", checkpoint, "-a", "test_efficientnet", "--input-size", 64]
    options = [*network_options, "--device", "cpu", "--batch-size", 5]
    path = tmp_path / "cache.sqlite"
    assert match.main([str(option) for option in (folder, *options, "--cache", path)]) == 0
    out, _ = capfd.readouterr()
    assert f"{folder}/0.png,{folder}/below/renamed.png,1.000000" in out
    model, preprocess = torch.hub.load(
        str(ROOT),
        "isc_ft_v107",
        source="local",
        weights=str(checkpoint),
        arch="test_efficientnet",
        input_size=64,
    )
    network = torch_network(str(checkpoint), "test_efficientnet", 64, "cpu")
    cache = DescriptorCache(path, network)
    paths = sorted(str(path) for path in folder.glob("*.png"))
    rows, unreadable = extract_descriptors(paths, network, cache, batch_size=4, workers=2)
    with torch.inference_mode():
        expected = model(torch.stack([preprocess(Image.open(path)) for path in paths]))
    assert unreadable == {} and cache.added == 0  # all from the first command's cache
    np.testing.assert_allclose(rows, expected.numpy(), rtol=0, atol=2e-6)


def test_fp16_is_for_cuda(folder, checkpoint, capfd):
    options = ["--weight", str(checkpoint), "--device", "cpu", "--amp", "fp16", "--no-cache"]
    assert_refused(called(match.main, [folder, *options], capfd), "--amp fp16", "CUDA", "cpu")
    options = ["--onnx", "isc.onnx", "--amp", "fp16"]
    assert_refused(called(match.main, [folder, *options], capfd), "--amp fp16", "--onnx")


def test_weights_that_cannot_be_had(folder, checkpoint, tmp_path, capfd, monkeypatch):
    def refused(*options, words):
        assert match.main([str(folder), "--no-cache", *map(str, options)]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("match.py: error: ")
        assert all(word in err for word in words), err

    def fail(*_):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(urllib.request, "urlretrieve", fail)
    for name in (
        "isc_ft_v107",
        "isc_selfsup_v98",
    ):  # quiet, or the line of what is fetched comes first
        words = [
            f"{name}: cannot be fetched",
            "no network",
            "--weight",
            "--onnx",
            "scripts/download_weights.py",
        ]
        refused("--weight", name, "--quiet", words=words)
    small = "-a", "test_efficientnet"
    refused(
        "--weight",
        tmp_path / "missing.pth.tar",
        *small,
        words=["missing.pth.tar: no such checkpoint"],
    )
    refused(
        "--weight",
        checkpoint,
        "-a",
        "test_resnet",
        words=["small.pth.tar: holds other weights than --arch has"],
    )
    refused("--weight", checkpoint, "-a", "nothing", words=["nothing: timm has no such backbone"])
    refused("--weight", checkpoint, *small, "--device", "nothing", words=["--device nothing: "])
    if not torch.cuda.is_available():
        refused("--weight", checkpoint, *small, "--device", "cuda", words=["--device cuda: "])


def test_the_small_network_is_the_default(tmp_path, capfd):
    """It finds edited copies of images that it has not seen, and says in a line that it is the
    small one.
    """
    for i in range(8):
        image = dead_leaves(np.random.default_rng(i), 160)
        image.save(tmp_path / f"{i}.png")
        image.crop((6, 6, 154, 146)).save(tmp_path / f"{i}-copy.jpg", quality=50)
    assert match.main([str(tmp_path), "--no-cache"]) == 0
    out, err = capfd.readouterr()
    found = {
        tuple(sorted(Path(path).stem for path in line.split(",")[:2]))
        for line in out.splitlines()[1:]
    }
    assert found == {(f"{i}", f"{i}-copy") for i in range(8)}
    assert "match.py: using the small network weights/v98.onnx; for the published one" in err
    assert match.main([str(tmp_path), "--no-cache", "--quiet"]) == 0
    assert capfd.readouterr().err == ""


def test_the_default_is_as_good_as_its_checkpoint(tmp_path):
    """The same descriptors as by torch, and the threshold that was measured with those."""
    for i in range(20):
        dead_leaves(np.random.default_rng(i), 130).save(tmp_path / f"{i}.png")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    default = onnx_network(str(DEFAULT_ONNX))
    checkpoint = ROOT / "weights" / "v98.pth.tar"
    by_torch = torch_network(str(checkpoint), "test_byobnet", 96, "cpu")
    assert [default.threshold, by_torch.threshold] == [0.75, 0.604169]
    np.testing.assert_allclose(
        extracted(paths, default), extracted(paths, by_torch), rtol=0, atol=1e-5
    )


# ---- cache ----


def test_keys_stay_as_they_were():
    """Of the caches that users have: a change here makes all their descriptors invalid."""
    network = Network(None, "0" * 64, "torch cpu", 512, MEAN, STD, 256, threshold=0.5)
    assert network.key.hex() == "f158ba907827a6823ddfc63fdf7518dfd852336c2391fe1881045f4f21e8a5d4"


def count_calls(monkeypatch, calls, before=lambda: None):
    def wrap(run):
        def counted(images):
            before()
            calls.append(len(images))
            return run(images)

        return counted

    fake(monkeypatch, wrap)


def test_only_missing_descriptors_are_extracted(folder, do, monkeypatch):
    calls = []
    count_calls(monkeypatch, calls)
    do(folder, "--batch-size", "4")
    assert calls == [4, 4, 3]  # 12 files, two of the same content
    shutil.copy(folder / "3.png", folder / "same.png")
    (folder / "4.png").rename(folder / "moved.png")
    draw(50).save(folder / "new.png")
    _, _, err = do(folder)
    assert calls == [4, 4, 3, 1] and "14 images, 1 of them new" in err
    do(folder, network=write_onnx(folder.parent / "other.onnx", seed=1))
    assert calls[4:] == [8, 4]  # other weights
    do(folder, "--no-cache")
    assert calls[6:] == [8, 4]


def test_goes_on_after_ctrl_c(folder, do, monkeypatch, tmp_path):
    calls = []

    def interrupt():
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        count_calls(patch, calls, interrupt)
        code, rows, err = do(folder, "--batch-size", "4", "-q")
    assert code == 130 and rows == []
    assert err == f"match.py: interrupted; 8 new descriptors are in {tmp_path}/cache.sqlite\n"
    code, rows, err = do(folder, "--batch-size", "4")
    assert code == 0 and len(rows) == 10 and "3 of them new" in err


KILLED = """
import dataclasses, os, signal, sys
sys.path[0] = sys.argv.pop(1)
import match
load, calls = match.load_network, []
def killed(run):
    def call(images):
        calls.append(images)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(images)
    return call
def load_killed(args):
    network = load(args)
    return dataclasses.replace(network, run=killed(network.run))
match.load_network = load_killed
match.main()
"""


def test_goes_on_after_kill_9(folder, do, tmp_path, network_file):
    arguments = [
        folder,
        "--onnx",
        network_file,
        "--cache",
        tmp_path / "cache.sqlite",
        "--threshold",
        THRESHOLD,
        "--batch-size",
        "3",
    ]
    result = run("-c", KILLED, COMMAND.parent, *arguments)
    assert result.returncode == -signal.SIGKILL and result.stdout == ""
    code, rows, err = do(folder)
    assert code == 0 and len(rows) == 10 and "12 images, 5 of them new" in err


def test_two_commands_at_once(folder, network_file, tmp_path):
    for seed in range(100, 160):
        draw(seed).save(folder / f"{seed}.png")
    cache = tmp_path / "cache.sqlite"
    command = [
        sys.executable,
        COMMAND,
        folder,
        "--onnx",
        network_file,
        "--cache",
        cache,
        "--threshold",
        THRESHOLD,
        "--batch-size",
        "1",
    ]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    results = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert results[0][0] == results[1][0]
    with sqlite3.connect(cache) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM descriptors").fetchall() == [(71,)]


def test_damaged_caches(folder, do, tmp_path):
    cache = tmp_path / "cache.sqlite"
    _, expected, _ = do(folder)
    whole = cache.read_bytes()
    for damaged in (
        b"no database" * 1000,
        whole[:1000],
        whole[:2000] + b"\0" * 8000 + whole[10000:],
    ):
        cache.write_bytes(damaged)
        code, rows, err = do(folder, "-q")
        assert code == 2 and rows == [] and err.count("\n") == 1
        assert f"error: {cache}: cannot be used as a cache (" in err and "delete it" in err
        assert cache.read_bytes() == damaged
    cache.write_bytes(whole)
    with sqlite3.connect(cache) as connection:
        connection.execute("UPDATE descriptors SET descriptor = zeroblob(1024) WHERE rowid = 1")
        connection.execute("UPDATE descriptors SET descriptor = zeroblob(4) WHERE rowid = 2")
    _, rows, err = do(folder)
    assert rows == expected and "2 of them new" in err


def test_a_network_that_fails_on_an_image(folder, do, monkeypatch):
    def wrap(run):
        def call(images):
            rows = run(images)
            rows[1] = np.nan
            return rows

        return call

    with monkeypatch.context() as patch:
        fake(patch, wrap)
        code, _, err = do(folder, "--batch-size", "16")
    assert (
        code == 0 and err.count("descriptor of it is not finite") == 1 and "10 of them new" in err
    )
    _, _, err = do(folder)
    assert "1 of them new" in err and "unreadable files" not in err


def test_descriptors_do_not_depend_on_workers(folder, network_file):
    paths = [str(path) for path in sorted(folder.glob("*.*"))]
    network = onnx_network(network_file)
    alone = extracted(paths, network, workers=1)
    together = extracted(paths, network, workers=3)
    np.testing.assert_array_equal(alone, together)


def test_threads_stay_near_and_keep_the_order():
    started, taken = [], []
    for item in map_ahead(lambda item: started.append(item) or item, range(50), 4, 7):
        taken.append(item)
        assert len(started) <= len(taken) + 7
        time.sleep(0.001)
    assert taken == list(range(50))


def test_large_images_wait_for_each_other():
    budget, held, most = PixelBudget(100), [], []

    def decode(pixels):
        with budget.take(pixels):
            held.append(pixels)
            most.append(sum(held))
            time.sleep(0.002)
            held.remove(pixels)

    threads = [
        threading.Thread(target=decode, args=(pixels,)) for pixels in [100, 60, 30, 60, 30, 10] * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(most) == 24 and max(most) <= 100 and budget.free == 100


# ---- pairs and groups ----


def by_brute_force(descriptors, queries, references, threshold, top_k):
    """Pairs and groups, from all pairs in plain Python."""
    found, links = {}, {file: {file} for file in range(len(descriptors))}
    for i in queries:
        others = [(k, j) for k, j in enumerate(references) if i != j]
        scores = [(-float(cosine(descriptors[i], descriptors[j])), k, j) for k, j in others]
        near = sorted(entry for entry in scores if -entry[0] >= threshold)
        for score, _, j in near[:top_k]:
            found[(min(i, j), max(i, j)) if queries is references else (i, j)] = -score
        for _, _, j in near:
            links[i].add(j)
            links[j].add(i)
    groups = set()
    for file in links:
        todo, seen = [file], {file}
        while todo:
            todo += (new := links[todo.pop()] - seen)
            seen |= new
        groups |= {tuple(sorted(seen))} if len(seen) > 1 else set()
    return found, sorted(groups)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 40),
    top_k=st.sampled_from([1, 2, 3, 100]),
    threshold=st.sampled_from([-1.0, 0.3, 0.8, 1.0]),
    same=st.booleans(),
    similarities=st.sampled_from([1, 50, 10**6]),
)
def test_pairs_and_groups_are_those_of_brute_force(
    seed, count, top_k, threshold, same, similarities
):
    rng = np.random.default_rng(seed)
    descriptors = rows_of(*rng.standard_normal((count, 3)))[
        rng.integers(0, count, count)
    ]  # with exact copies
    queries = references = np.arange(count)
    if not same:
        order = rng.permutation(count)
        queries, references = order[: 2 * count // 3 + 1], order[count // 3 :]
    *pairs, scores, group = find_pairs(
        descriptors, queries, references, threshold, top_k, max_similarities=similarities
    )
    found, groups = by_brute_force(descriptors, queries, references, threshold, top_k)
    pairs = zip(*map(np.ndarray.tolist, pairs), strict=True)
    assert dict(zip(pairs, scores.tolist(), strict=True)) == found
    assert [tuple(np.flatnonzero(group == number)) for number in range(group.max() + 1)] == groups


def test_groups_are_over_more_than_the_reported_pairs():
    """A chain: each is a copy of the next; the best match of each leaves it in pieces."""
    angles = np.cumsum([0, 1, 3, 1, 3, 1]) / 100
    descriptors = rows_of(*np.stack([np.cos(angles), np.sin(angles)], 1))
    files = np.arange(6)
    query, reference, _, group = find_pairs(descriptors, files, files, float(np.cos(0.031)), 1)
    assert list(zip(query.tolist(), reference.tolist(), strict=True)) == [(0, 1), (2, 3), (4, 5)]
    assert group.tolist() == [0] * 6


def test_the_threshold_is_met_exactly():
    """A score that is printed as the threshold is a match: both are compared as printed."""
    descriptors = np.random.default_rng(0).standard_normal((60, 256))
    descriptors = rows_of(*descriptors)
    files = np.arange(60)
    _, _, score, _ = find_pairs(descriptors, files, files, -1, 100)
    assert len(score) == 60 * 59 // 2
    for threshold in score[::97]:
        _, _, kept, _ = find_pairs(descriptors, files, files, float(threshold), 100)
        assert len(kept) == (score >= threshold).sum() and kept.min() == threshold


def test_masses_of_copies_stay_few_pairs():
    """Of the same image, and of images that are nearly the same."""
    rows = rows_of(*np.random.default_rng(0).standard_normal((1000, 256)))
    same, near = rows[:2].repeat(5000, axis=0), normalize(rows[:1] + 0.5 * rows[1:])
    files = np.arange(10_000)
    query, _, score, group = find_pairs(same, files, files, 0.9, 2)
    assert 10_000 <= len(query) <= 20_000 and (score == 1).all()
    assert group.tolist() == [0] * 5000 + [1] * 5000
    query, _, score, group = find_pairs(near, files[:999], files[:999], 0.5, 2)
    assert 500 <= len(query) <= 2000 and not group.any()


# ---- negatives ----


def test_negatives_are_subtracted(folder, do, tmp_path, network_file):
    background = tmp_path / "background"
    background.mkdir()
    for seed in range(100, 115):
        draw(seed).save(background / f"{seed}.png")
    (background / "bad.png").write_bytes(b"")
    code, rows, err = do(folder, "--negatives", background)
    assert code == 0 and "bad.png: no image" in err

    network = onnx_network(network_file)
    negatives = extracted([str(background / f"{seed}.png") for seed in range(100, 115)], network)
    files = [str(folder / "0.png"), str(folder / "cropped.webp")]
    plain = extracted(files, network)
    a, b = negative_embedding_subtraction(plain, database_augmentation(negatives))
    (row,) = [row for row in rows if [row["query"], row["reference"]] == files]
    assert float(row["score"]) == pytest.approx(float(a @ b), abs=2e-6)
    assert float(row["score"]) != pytest.approx(float(plain[0] @ plain[1]), abs=2e-4)

    np.save(
        tmp_path / "feats.npy", np.concatenate([negatives, np.zeros((1, 256), np.float32)])
    )  # one of an unreadable image
    _, again, _ = do(folder, "--negatives", tmp_path / "feats.npy")
    assert again == rows
    np.save(tmp_path / "feats.npy", negatives[:, :64])
    code, _, err = do(folder, "--negatives", tmp_path / "feats.npy", "-q")
    assert code == 2 and "feats.npy: has 64 dimensions, where the network has 256" in err
    code, _, err = do(folder, "--negatives", background / "bad.png", "-q")
    assert code == 2 and "bad.png: has no descriptor" in err


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--onnx", "x"], "nowhere: no such file or folder"),
        (["images", "nowhere.txt", "--onnx", "x"], "nowhere.txt: no such file or folder"),
        (["empty", "--onnx", "x"], "empty: a folder without images"),
        (
            ["text.txt", "--onnx", "x"],
            "text.txt: no image by its suffix, and no line of it is the path of a file",
        ),
        (
            ["binary", "--onnx", "x"],
            "binary: no image by its suffix, and no line of it is the path of a file",
        ),
        (["images", "--onnx", "missing.onnx"], "missing.onnx"),
        (["images", "--onnx", "text.txt"], "text.txt: is not an ONNX file of export.py"),
        (
            ["images", "--onnx", "plain.onnx"],
            "plain.onnx: is not an ONNX file of export.py (KeyError: 'config')",
        ),
        (
            ["images", "--onnx", "small.onnx"],
            "small.onnx: has no threshold in its metadata; give --threshold (0.604169 for isc_ft",
        ),
        (
            ["images", "--onnx", "odd.onnx"],
            "odd.onnx: is not an ONNX file of export.py (ValueError: threshold 7)",
        ),
        (["images", "--input-size", "64"], "v98.onnx: takes 96 pixels only"),
        (
            ["images", "--onnx", "small.onnx", "--input-size", "64"],
            "small.onnx: takes 32 pixels only",
        ),
        (
            ["images", "--onnx", "small.onnx", "--device", "cuda"],
            "--device cuda: this onnxruntime has",
        ),
        (
            ["images", "--onnx", "small.onnx", "--device", "tpu"],
            "--device tpu: this onnxruntime has",
        ),
        (
            ["images", "--onnx", "small.onnx", "--cache", "text.txt"],
            "text.txt: cannot be used as a cache",
        ),
        (
            ["images", "--onnx", "small.onnx", "--cache", "text.txt/c"],
            "text.txt/c: cannot be used as a cache",
        ),
        (["images", "--onnx", "small.onnx", "--negatives", "no.npy"], "no.npy: no such file"),
    ],
)
def test_refuses_in_one_line(arguments, words, folder, tmp_path, network_file, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("binary").write_bytes(np.random.default_rng(0).bytes(10_000) + b"x" * 5000)
    Path("text.txt").write_text("this is\nno list of paths\n")
    shutil.copy(network_file, "small.onnx")
    write_onnx("plain.onnx", metadata=False)
    write_onnx("odd.onnx", threshold=7)
    if "--cache" in arguments or "--negatives" in arguments:
        arguments = [*arguments, "--threshold", THRESHOLD]
    assert match.main(["--no-cache", "-q", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (
        out == "" and err.count("\n") == 1 and err.startswith("match.py: error: ") and words in err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--onnx", "x", "--weight", "y"], "--onnx"),
        (["--arch", "test_byobnet"], "--arch: goes with --weight only"),
        (["--amp", "fp16"], "--amp fp16: goes with --weight only"),
        (["--threshold", "1.5"], "--threshold 1.5"),
        (["--threshold", "nan"], "--threshold"),
        (["--top-k", "0"], "--top-k"),
        (["--output", "matches.parquet"], "--output matches.parquet"),
        (["--output", "nowhere/matches.csv"], "nowhere/matches.csv: there is no such folder"),
        (["--report", "nowhere/page.html"], "nowhere/page.html: there is no such folder"),
    ],
)
def test_refuses_what_does_not_fit(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        match.parse_args([str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_is_one_line(folder, do, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = do(folder, "--output", tmp_path / "out.csv", "-q")
    assert (
        code == 2
        and err.count("\n") == 1
        and "out.csv: cannot be written (No space left on device)" in err
    )
    assert list(tmp_path.glob("*out*")) == []


def test_help(capsys):
    with pytest.raises(SystemExit):
        match.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "Exit code: 0 with matches" in text and "0.604169" in text
    assert_refused(run(COMMAND, "images", "--weight"), "--weight: expected one argument")
