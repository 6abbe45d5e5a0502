"""weights/: each file loads, is small, and came from the commands in make.sh; each command starts
from what the one before wrote.
"""

import argparse
import importlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import export
import finish
import pretrain
import v98
from conftest import ROOT

WEIGHTS = ROOT / "weights"
NAMES = ["start", "v98", "v107"]
STAGES = ("v83", "v86", "v98", "v107")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The commands of make.sh as [(module, its arguments)]. A stand-in for `python` notes them and
    runs none.
    """
    folder = tmp_path_factory.mktemp("weights")
    python = folder / "python"
    noted = folder / "noted"
    python.write_text(f'#!/bin/sh\n(IFS="\t"; echo "$*") >> {noted}\n')
    python.chmod(0o755)
    (folder / "git").symlink_to("/bin/true")  # make.sh takes earlier weights from the history
    (folder / "weights").mkdir()
    shutil.copy(WEIGHTS / "make.sh", folder / "weights")
    for run in "pretrain-0", "pretrain-1", *(f"{stage}/train" for stage in STAGES):
        (folder / "small" / run).mkdir(parents=True)
        (folder / "small" / run / "log.jsonl").touch()
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    command = ["bash", "weights/make.sh", "small"]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=60)
    assert (folder / "small" / "before.pth.tar").exists()
    result = []
    for line in noted.read_text().splitlines():
        script, *flags = line.split("\t")
        module = importlib.import_module(Path(script).stem)
        result.append((module, module.parse_args(flags)))
    return result


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


def test_the_files_are_small_together():
    sizes = [path.stat().st_size for path in WEIGHTS.iterdir() if path.suffix in (".tar", ".onnx")]
    assert len(sizes) == 4
    assert max(sizes) <= 8e6
    assert sum(sizes) <= 25e6


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


def inputs_and_output(module, args):
    """The weights that a command of make.sh reads, and the file that it writes."""
    if module is pretrain:
        return [args.weight] if args.weight else [], f"{args.out}/last.pth.tar"
    if module is finish:
        inputs = args.checkpoints + ([args.statistics] if args.statistics else [])
        return inputs, str(args.out)
    return [args.weight], f"{args.output}/train/checkpoint_{args.epochs - 1:04}.pth.tar"


def trains_or_finishes(module):
    return module in (pretrain, finish) or module.__name__ in STAGES


def test_make_starts_each_command_from_what_one_before_wrote(commands):
    names = [module.__name__ for module, _ in commands]
    pretraining = ["make_dataset", "pretrain", "pretrain", "finish"]
    assert names == [*pretraining, *STAGES, "finish", "finish"]
    leaves = Path(commands[0][1].out, "training_images")
    written = ["small/before.pth.tar"]
    for module, args in commands:
        if not trains_or_finishes(module):
            continue
        inputs, output = inputs_and_output(module, args)
        assert set(inputs) <= set(written)
        assert Path(args.data if module.__name__ in STAGES else args.images) == leaves
        if module.__name__ in STAGES:
            assert inputs == written[-1:]
        written.append(output)
    assert {f"small/{name}.pth.tar" for name in NAMES} <= set(written)


# Flags that may differ from the log's: they do not change the weights.
FREE = {"resume", "workers", "log_every"}
PATHS = ("out", "data", "images")


def run_name(args):
    """The last part of a run's folder, from the dict of its arguments."""
    return Path(args.get("out") or args["output"]).name


def logged_runs():
    """{name: the arguments in the logs}; of a run that was resumed, the last."""
    runs = {}
    for name in NAMES:
        for line in map(json.loads, (WEIGHTS / f"{name}.jsonl").read_text().splitlines()):
            if "args" in line:
                runs[run_name(line["args"])] = line["args"]
    return runs


def test_the_logs_are_of_these_commands(commands):
    trained = [dict(vars(args)) for module, args in commands if hasattr(args, "lr")]
    logged = logged_runs()
    assert {run_name(args) for args in trained} == logged.keys()
    for args in trained:
        known = logged[run_name(args)]
        for values in args, known:
            values |= {name: Path(values[name]) for name in PATHS if name in values}
        names = (args.keys() | known.keys()) - FREE
        values = {name: (args.get(name), known.get(name)) for name in names}
        assert {name: pair for name, pair in values.items() if pair[0] != pair[1]} == {}


def test_the_files_record_how_make_finishes_them(commands):
    finishing = [vars(args) for module, args in commands if module is finish]
    for name, args in zip(NAMES, finishing, strict=True):
        recorded = vars(v98.read_checkpoint(WEIGHTS / f"{name}.pth.tar")["finish"])
        assert recorded == args


def test_shipped_weights_have_the_statistics_of_the_start():
    start = v98.read_checkpoint(WEIGHTS / "start.pth.tar")["state_dict"]
    for name in "v98", "v107":
        state = v98.read_checkpoint(WEIGHTS / f"{name}.pth.tar")["state_dict"]
        kept = {key for key in state if "running_" in key and torch.equal(state[key], start[key])}
        backbone = {key for key in state if "running_" in key and "backbone" in key}
        assert kept == backbone


def test_make_needs_a_folder():
    result = subprocess.run(
        ["bash", WEIGHTS / "make.sh"], capture_output=True, text=True, timeout=60
    )
    assert (
        result.returncode == 2
        and result.stderr == "make.sh: error: give a folder to make the weights in\n"
    )
