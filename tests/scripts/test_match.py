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
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import match
import v107
from common import images
from common.descriptor_cache import DescriptorCache
from common.descriptors import database_augmentation, negative_embedding_subtraction
from common.extraction import PixelBudget, extract_descriptors, map_ahead
from common.networks import DEFAULT_ONNX, Network, Thresholds, onnx_network, torch_network
from common.sample_images import dead_leaves
from common.views import ALL_VIEWS
from conftest import ROOT, assert_refused, called, run
from export import SMALL_ARCH, SMALL_SIZE, SMALL_THRESHOLDS

COMMAND = ROOT / "scripts" / "match.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, GRID = 32, 8
THRESHOLD = "0.95"  # of the thumbnails below


def write_onnx(path, size=SIZE, seed=0, metadata=True, threshold=None, thresholds=None):
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
        config |= thresholds or {}
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
        options = ["--onnx", network, "--cache", tmp_path / "cache.sqlite", "--workers", "2"]
        if threshold is not None:
            options += ["--threshold", threshold]
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
    found = extract_descriptors(paths, network, cache, 8, workers, quiet=True)
    assert found.unreadable == {}
    return found.rows[:, 0]


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
    line = "13 images, 11 of them new; 5 matches in 2 groups, by cosine of at least 0.95"
    assert line in err


def test_overlapping_sets_do_not_match_a_file_with_itself(folder, do):
    code, rows, _ = do(folder, folder / "below")
    assert code == 0 and all(row["query"] != row["reference"] for row in rows)
    assert len(rows) == 4
    _, rows, _ = do(folder, folder)
    assert len(rows) == 20  # each pair from both sides
    code, rows, _ = do(folder / "1.png", folder / ".." / "images" / "1.png")
    assert code == 1 and rows == []


def test_a_dangling_link_is_named(folder, do):
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    code, rows, err = do(folder)
    assert code == 0 and len(rows) == 10 and "13 images" in err
    assert err.rstrip().endswith("dangling.png: no such file")


def test_other_files_are_counted_in_a_line(folder, do):
    shutil.copy(folder / "2.png", folder / "notes.txt")
    shutil.copy(folder / "2.png", folder / "film.mp4")
    line = "match.py: 2 other files left out: .mp4 1, .txt 1\n"
    assert line in do(folder)[2] and line not in do(folder, "--quiet")[2]


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
        line.split(": ", 1) for line in err.split("unreadable files (7):\n")[1].splitlines()
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
    assert code == 2 and rows == [] and "text.jpg: no image of 1 can be compared" in err


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
        numbers = {"score": float(row["score"]), "cosine": float(row["cosine"])}
        expected = row | numbers | {"group": int(row["group"]), "normalized": None}
        assert expected == json.loads(line)
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
        b"carriage\rreturn.png",
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
        "(AVIF, BMP, DIB, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP, HEIF)"
    )


def test_report(folder, do, tmp_path, monkeypatch):
    (folder / "bad.jpg").write_bytes(b"")
    do(folder, "--report", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    for word in ("turned.jpg", "cropped.webp", "bad.jpg", "data:image/jpeg", THRESHOLD):
        assert word in text
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
    found = extract_descriptors(paths, network, cache, batch_size=4, workers=2)
    with torch.inference_mode():
        expected = model(torch.stack([preprocess(Image.open(path)) for path in paths]))
    # All are from the first command's cache.
    assert found.unreadable == {} and not cache.new_images
    np.testing.assert_allclose(found.rows[:, 0], expected.numpy(), rtol=0, atol=2e-6)


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
    assert "match.py: using the small network weights/v98.onnx; --weight isc_ft_v107" in err
    assert match.main([str(tmp_path), "--no-cache", "--quiet"]) == 0
    assert capfd.readouterr().err == ""


def test_the_default_is_as_good_as_its_checkpoint(tmp_path):
    """The same descriptors as by torch, and the threshold that was measured with those."""
    for i in range(20):
        dead_leaves(np.random.default_rng(i), 130).save(tmp_path / f"{i}.png")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    default = onnx_network(str(DEFAULT_ONNX))
    checkpoint = ROOT / "weights" / "v98.pth.tar"
    by_torch = torch_network(str(checkpoint), SMALL_ARCH, SMALL_SIZE, "cpu")
    assert default.thresholds.cosine == SMALL_THRESHOLDS["threshold"]
    assert by_torch.thresholds.cosine == 0.604169
    np.testing.assert_allclose(
        extracted(paths, default), extracted(paths, by_torch), rtol=0, atol=1e-5
    )


# ---- views ----


@pytest.fixture
def edited(tmp_path):
    """Six images; a mirrored, a turned and a recompressed copy; one with a copy in a corner."""
    root = tmp_path / "edited"
    root.mkdir()
    for seed in range(6):
        draw(seed).save(root / f"{seed}.png")
    draw(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "mirrored.jpg", quality=95)
    draw(1).transpose(Image.Transpose.ROTATE_90).save(root / "turned.jpg", quality=95)
    draw(2).save(root / "recompressed.jpg", quality=90)
    larger = draw(99, (135, 90))
    larger.paste(draw(3), (45, 30))
    larger.save(root / "inside.png")
    return root


IN_A_CORNER = ("3.png", "inside.png", "bottom right")
MIRRORED = ("0.png", "mirrored.jpg", "mirrored")
TURNED = ("1.png", "turned.jpg", "turned 90")


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        (None, set()),
        ("parts", {IN_A_CORNER}),
        ("mirrored", {MIRRORED}),
        ("turned", {TURNED}),
        ("mirrored,turned", {MIRRORED, TURNED}),
        ("all", {IN_A_CORNER, MIRRORED, TURNED}),
    ],
)
def test_views_find_what_the_whole_does_not(edited, do, kinds, found):
    """In one folder a pair is found if a view of either image resembles the other's whole; `query`
    is the image whose view that is.
    """
    options = ["--views", kinds] if kinds else []
    code, rows, _ = do(edited, *options)
    assert code == 0
    by_view = set()
    for row in rows:
        view = row["view"]
        query, reference = Path(row["query"]).name, Path(row["reference"]).name
        if view == "turned 270":  # from the copy's side
            query, reference, view = reference, query, "turned 90"
        by_view.add((*sorted((query, reference)), view))
    assert by_view == found | {("2.png", "recompressed.jpg", "whole")}


def test_views_are_of_queries_only(edited, do, tmp_path):
    """With two folders: a part of a reference is not looked for, a part of a query is."""
    small = tmp_path / "small"
    small.mkdir()
    (edited / "3.png").rename(small / "3.png")
    assert do(small, edited, "--views", "parts")[0] == 1
    code, rows, _ = do(edited, small, "--views", "parts")
    assert code == 0 and names(rows) == {("3.png", "inside.png")}


def test_views_asked_for_later_are_added(edited, do, monkeypatch):
    """The cache holds each view, and what is there is not extracted again; the whole image's
    descriptor does not depend on the views.
    """
    calls = []
    count_calls(monkeypatch, calls)
    alone = do(edited)
    assert sum(calls) == 10
    do(edited, "--views", "turned")
    assert sum(calls) == 10 + 3 * 10
    do(edited, "--views", "all")
    assert sum(calls) == 13 * 10
    together = do(edited, "--no-cache", "--views", "all")
    scores = {row["view"]: row["score"] for row in together[1]}
    assert scores["whole"] == alone[1][0]["score"]


def test_an_unknown_view(edited, capfd):
    result = called(match.main, [edited, "--views", "parts,upside-down"], capfd)
    assert_refused(result, "--views", "upside-down", "parts, mirrored, turned")


# ---- normalization ----


def with_thresholds(tmp_path, **thresholds):
    return write_onnx(tmp_path / "normalized.onnx", threshold=0.95, thresholds=thresholds)


@pytest.fixture
def many(folder):
    """The folder with fifty more images."""
    for seed in range(100, 150):
        draw(seed).save(folder / f"{seed}.png")
    return folder


def test_the_networks_normalized_threshold_decides(many, do, tmp_path):
    network = with_thresholds(tmp_path, normalized_threshold=0.23)
    code, rows, err = do(many, network=network, threshold=None)
    # 0.23 for 600 images, more for 62
    assert code == 0 and "by normalized score of at least 0.5" in err
    copies = ["0.png", "renamed.png", "recompressed.jpg", "cropped.webp", "turned.jpg"]
    assert names(rows) == {tuple(sorted((a, b))) for a in copies for b in copies if a < b}
    for row in rows:
        assert row["score"] == row["normalized"] != row["cosine"]
        assert 0.5 <= float(row["score"]) < float(row["cosine"])


@pytest.mark.parametrize("flag", ["--threshold", "--no-normalization"])
def test_normalization_can_be_turned_off(many, do, tmp_path, flag):
    network = with_thresholds(tmp_path, normalized_threshold=0.23)
    options = [flag, 0.95] if flag == "--threshold" else [flag]
    code, rows, err = do(many, *options, network=network, threshold=None)
    assert code == 0 and "by cosine of at least 0.95" in err
    assert all(row["score"] == row["cosine"] and row["normalized"] == "" for row in rows)
    assert rows == do(many)[1]  # as a network without a normalized threshold


def test_a_small_collection_takes_cosines(folder, do, tmp_path):
    network = with_thresholds(tmp_path, normalized_threshold=0.23)
    _, rows, err = do(folder, network=network, threshold=None)
    assert "needs a collection of 50 images, and here are 12" in err
    assert rows == do(folder)[1]


def test_views_have_thresholds_of_their_own(many, do, tmp_path):
    thresholds = {
        "normalized_threshold": 0.23,
        "normalized_threshold_of_views": 0.33,
        "threshold_of_views": 0.97,
    }
    network = with_thresholds(tmp_path, **thresholds)
    flags = ["--views", "mirrored"]
    assert "score of at least 0.6" in do(many, *flags, network=network, threshold=None)[2]
    flags.append("--no-normalization")
    assert "cosine of at least 0.97" in do(many, *flags, network=network, threshold=None)[2]


def test_a_normalized_threshold_for_a_network_without_one(many, do, tmp_path):
    flags = ["--normalized-threshold", 0.5]
    network = with_thresholds(tmp_path)
    code, rows, err = do(many, *flags, threshold=None, network=network)
    assert code == 0 and len(rows) == 10 and "by normalized score of at least 0.5" in err


def test_copies_in_numbers_are_one_group(many, do, tmp_path):
    """Thirty recompressed copies do not lower each other's normalized scores."""
    for quality in range(60, 90):
        draw(5).save(many / f"copy{quality}.jpg", quality=quality)
    network = with_thresholds(tmp_path, normalized_threshold=0.23)
    _, _, _ = do(many, "--groups", tmp_path / "groups.jsonl", network=network, threshold=None)
    sizes = [
        len(json.loads(line)["files"])
        for line in (tmp_path / "groups.jsonl").open(encoding="utf-8")
    ]
    assert sorted(sizes) == [5, 31]


def test_a_copy_among_many_similar_images_is_found(tmp_path, do):
    """Whose background is as high as its cosine is sure to be enough."""
    alike = tmp_path / "alike"
    alike.mkdir()
    for seed in range(60):
        Image.blend(draw(1000), draw(seed), 0.5).save(alike / f"{seed}.png")
    shutil.copy(alike / "7.png", alike / "copy.png")
    Image.open(alike / "8.png").save(alike / "recompressed.jpg", quality=90)
    network = with_thresholds(tmp_path, normalized_threshold=0.4)
    _, rows, _ = do(alike, network=network, threshold=None)
    assert names(rows) == {("7.png", "copy.png"), ("8.png", "recompressed.jpg")}
    _, rows, _ = do(alike, "--normalized-threshold", 0.67, network=network, threshold=None)
    assert rows == []  # alone, the normalized score does not suffice


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--normalized-threshold", "0.3", "--threshold", "0.9"], "--normalized-threshold"),
        (["--normalized-threshold", "0.3", "--no-normalization"], "--no-normalization"),
        (["--normalized-threshold", "1.5"], "no score is above 1"),
        (["--not-within", "0"], "--not-within"),
    ],
)
def test_options_that_contradict_each_other(folder, capfd, options, words):
    assert_refused(called(match.main, [folder, *options], capfd), words)


# ---- pairs that are left out ----


def test_ignored_pairs_do_not_come_back(folder, do, tmp_path):
    """Also after renaming; and not over others: the group falls apart."""
    judged = tmp_path / "judged.csv"
    _, rows, _ = do(folder, "--output", judged, "--output", "-")
    header, *lines = judged.read_text().splitlines()
    cropped = [line for line in lines if "cropped" in line]
    judged.write_text("\n".join([header, *cropped]))
    (folder / "cropped.webp").rename(folder / "other.webp")
    code, left, _ = do(folder, "--ignore", judged)
    assert code == 0 and len(left) == len(rows) - len(cropped)
    assert not any("other.webp" in row["query"] + row["reference"] for row in left)


def test_ignored_pairs_by_path(folder, do, tmp_path):
    judged = tmp_path / "judged.csv"
    pair = f"query,reference\n{folder}/0.png,{folder}/recompressed.jpg\n"
    judged.write_bytes(b"\xef\xbb\xbf" + pair.encode())
    _, before, _ = do(folder)
    _, after, _ = do(folder, "--ignore", judged)
    gone = names(before) - names(after)
    # 0.png and renamed.png have the same content, so that both are judged.
    assert gone == {("0.png", "recompressed.jpg"), ("recompressed.jpg", "renamed.png")}


@pytest.mark.parametrize(
    ("content", "words"), [(None, "judged.csv"), (b"a,b\n1,2\n", "no column query")]
)
def test_an_unusable_ignore_file(folder, network_file, tmp_path, capfd, content, words):
    if content:
        (tmp_path / "judged.csv").write_bytes(content)
    argv = [folder, "--no-cache", "--onnx", network_file, "--threshold", "0.95"]
    result = called(match.main, [*argv, "--ignore", tmp_path / "judged.csv", "-q"], capfd)
    assert_refused(result, "judged.csv", words)


def test_files_of_one_folder_are_not_paired(do, tmp_path):
    for name in ("a/1/x.png", "a/2/y.png", "b/1/z.png", "top.png"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(0).save(path.with_suffix(".bmp" if name == "top.png" else ".png"))
    everything = {("x.png", "y.png"), ("x.png", "z.png"), ("y.png", "z.png")}
    with_top = {("top.bmp", name) for name in ("x.png", "y.png", "z.png")}
    tree = tmp_path / "tree"
    assert names(do(tree)[1]) == everything | with_top
    assert names(do(tree, "--not-within", 1)[1]) == everything - {("x.png", "y.png")} | with_top
    assert names(do(tree, "--not-within", 2)[1]) == everything | with_top


def test_not_within_is_for_folders(folder, capfd, tmp_path, network_file):
    (tmp_path / "list.txt").write_text(f"{folder}/0.png\n")
    argv = [tmp_path / "list.txt", "--onnx", network_file, "--threshold", "0.95", "-q"]
    result = called(match.main, [*argv, "--not-within", "1", "--no-cache"], capfd)
    assert_refused(result, "list.txt", "--not-within goes with folders")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ignore", "none.csv"], "none.csv"),
        (["--negatives", "none"], "check --negatives"),
        ([], "has no threshold in its metadata"),
    ],
)
def test_what_is_missing_shows_before_the_work(
    folder, capfd, tmp_path, network_file, monkeypatch, options, words
):
    def fail(*_, **__):
        raise AssertionError("work has begun")

    monkeypatch.setattr(match, "extract_descriptors", fail)
    flags = ["--threshold", "0.95"] if options else []
    argv = [folder, "--onnx", network_file, "--no-cache", "-q", *flags, *options]
    assert_refused(called(match.main, argv, capfd), words)


def test_an_image_without_content_is_no_unreadable_file(folder, do):
    Image.new("RGB", (60, 40), (0, 90, 0)).save(folder / "plain.png")
    code, rows, err = do(folder, "--bad-images", "error")
    assert code == 0 and len(rows) == 10
    assert (
        "images without content, left out (1):" in err and "plain.png: is nearly one color" in err
    )


def test_a_default_cache_that_cannot_be_written(folder, network_file, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    argv = [str(folder), "--onnx", network_file, "--threshold", THRESHOLD]
    assert match.main(argv) == 0
    assert "nothing is kept" in capfd.readouterr().err


# ---- files to keep ----


def test_groups_say_which_file_to_keep(folder, do, tmp_path):
    draw(0, (180, 120)).save(folder / "large.jpg", quality=60)
    do(folder, "--groups", tmp_path / "groups.jsonl", threshold=0.9)
    (group,) = map(json.loads, (tmp_path / "groups.jsonl").read_text().splitlines())
    assert Path(group["keep"]).name == "large.jpg"
    details = {Path(entry["path"]).name: entry for entry in group["details"]}
    assert (details["large.jpg"]["width"], details["large.jpg"]["height"]) == (180, 120)
    assert details["turned.jpg"]["bytes"] == (folder / "turned.jpg").stat().st_size


# ---- cache ----


def test_keys_stay_as_they_were():
    """Of the caches that users have: a change here makes all their descriptors invalid."""
    network = Network(None, "0" * 64, "torch cpu", 512, MEAN, STD, 256, Thresholds(cosine=0.5))
    assert network.key().hex() == "bae5214a865d8bb4219a0fb8153bcab4761d6ef4243a4d8cd923ad872cfb6dc0"
    keys = {network.key(view) for view in ALL_VIEWS}
    assert len(keys) == len(ALL_VIEWS) and network.key() in keys


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
    assert (
        err
        == f"match.py: interrupted; descriptors of 8 new images are in {tmp_path}/cache.sqlite\n"
    )
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
            "odd.onnx: is not an ONNX file of export.py (ValueError: cosine threshold 7)",
        ),
        (["images", "--input-size", "64"], "v98.onnx: takes 160 pixels only"),
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
