"""weights/: each file loads, is small, and came from the commands in make.sh; each command starts
from what the one before wrote.
"""

import argparse
import importlib
import json
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import export
import v98
from conftest import ROOT

WEIGHTS = ROOT / "weights"
NAMES = ["start", "v98", "v107"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """[(script, its module, its arguments)] of make.sh, and its last command. A stand-in for
    `python` notes the commands and runs none.
    """
    folder = tmp_path_factory.mktemp("weights")
    python, noted = folder / "python", folder / "noted"
    python.write_text(
        f'#!/bin/sh\nfor word; do printf "%s\\t" "$word"; done >> {noted}\necho >> {noted}\n'
    )
    python.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    subprocess.run(
        ["bash", WEIGHTS / "make.sh", folder / "mini"], env=environment, check=True, timeout=60
    )
    lines = [
        line.split("\t")[:-1] for line in noted.read_text().replace(f"{folder}/", "").splitlines()
    ]
    return [
        (script, importlib.import_module(Path(script).stem), flags) for script, *flags in lines[:-1]
    ], lines[-1]


@pytest.mark.parametrize("name", NAMES)
def test_weights_load_and_are_small(name):
    model = v98.create_model(export.SMALL_ARCH, 1.0, 1.0, torch.device("cpu"))
    path = WEIGHTS / f"{name}.pth.tar"
    checkpoint = v98.read_checkpoint(path)
    v98.load_weights(model, checkpoint, path)
    assert checkpoint["arch"] == export.SMALL_ARCH and isinstance(
        checkpoint["args"], argparse.Namespace
    )
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert path.stat().st_size <= 8e6


def test_each_leg_of_the_larger_network_loads_and_is_small():
    paths = sorted((WEIGHTS / "lite0").glob("*.pth.tar"))
    assert paths
    for path in paths:
        checkpoint = v98.read_checkpoint(path)
        model = v98.create_model(checkpoint["arch"], 1.0, 1.0, torch.device("cpu"))
        v98.load_weights(model, checkpoint, path)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert path.stat().st_size <= 8e6


@pytest.fixture(scope="module")
def exported_again(tmp_path_factory):
    """v98.pth.tar, exported as weights/README.md says."""
    path = tmp_path_factory.mktemp("export") / "v98.onnx"
    assert export.main([str(path)]) == 0
    return path


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_the_onnx_file_has_the_descriptors_of_the_checkpoint(exported_again):
    model = v98.create_model(export.SMALL_ARCH, 1.0, 1.0, torch.device("cpu")).eval()
    path = WEIGHTS / "v98.pth.tar"
    v98.load_weights(model, v98.read_checkpoint(path), path)
    images = torch.randn(
        32, 3, export.SMALL_SIZE, export.SMALL_SIZE, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected = model(images).numpy()
    for file in WEIGHTS / "v98.onnx", exported_again:
        (actual,) = session(file).run(None, {"images": images.numpy()})
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_the_onnx_file_is_that_of_export(exported_again):
    """Byte-identical where the same versions export it."""
    committed = WEIGHTS / "v98.onnx"
    configs = [
        json.loads(session(path).get_modelmeta().custom_metadata_map["config"])
        for path in (committed, exported_again)
    ]
    versions = [config.pop("versions") for config in configs]
    assert configs[0] == configs[1]
    assert configs[0] | export.SMALL_THRESHOLDS == configs[0]
    if versions[0] == versions[1]:
        assert committed.read_bytes() == exported_again.read_bytes()


def test_make_starts_each_stage_from_the_one_before(commands):
    runs, (dash, *files) = commands
    assert [script for script, *_ in runs] == [
        "weights/pretraining/pretrain_mini.py",
        *(f"exp/{stage}.py" for stage in ("v83", "v86", "v98")),
        "scripts/make_dataset.py",
        "exp/v107.py",
    ]
    written = "mini/start.pth.tar"
    for script, module, flags in runs:
        args = module.parse_args(flags)
        if script.startswith("exp/"):
            assert args.weight == written
            written = f"{args.output}/train/checkpoint_{args.epochs - 1:04}.pth.tar"
    assert dash == "-"
    assert files[1::2] == ["mini/v98.pth.tar", "mini/v107.pth.tar"]
    assert files[2] == written and files[0].startswith("mini/v98/train/")


def test_the_logs_are_of_these_commands(commands):
    logged = {}
    for name in NAMES:
        for line in map(json.loads, (WEIGHTS / f"{name}.jsonl").read_text().splitlines()):
            if "args" in line:
                logged[line.get("stage", "pretrain_mini")] = line[
                    "args"
                ]  # of a run that was resumed, the last
    for _, module, flags in commands[0]:
        if module.__name__ == "make_dataset":
            continue
        args = vars(module.parse_args(flags))
        known = (
            vars(module.parse_args(["DATA"])) | logged[module.__name__]
        )  # flags added since had their defaults
        for values in args, known:
            values |= {name: Path(values[name]) for name in ("out", "data") if name in values}
        removed = {"exact", "tensorboard"}  # flags that the stages no longer have
        assert not any(known.get(name) for name in removed)
        different = {
            name
            for name in (args.keys() | known.keys()) - removed
            if args.get(name) != known.get(name)
        }
        assert different <= {"resume", "workers"}, {
            name: (args.get(name), known.get(name)) for name in different
        }


def test_make_needs_a_folder():
    result = subprocess.run(
        ["bash", WEIGHTS / "make.sh"], capture_output=True, text=True, timeout=60
    )
    assert (
        result.returncode == 2
        and result.stderr == "make.sh: error: give a folder to make the weights in\n"
    )
