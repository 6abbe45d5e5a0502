"""Whole commands of the four stages on 64 small images: training, checkpoints, resuming,
extraction, wrong input.
"""

import argparse
import csv
import importlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from stage_process import assert_same, free_port, load, log_lines

import v83
import v98
import v107
from conftest import ROOT, assert_refused, called, readme_block, run, run_as_written
from frozen_batchnorm import stay_in_evaluation_mode

STAGES = ["v83", "v86", "v98", "v107"]
SETS = {"training_images": ("T{:06d}.jpg", 40), "reference_images": ("R{:06d}.jpg", 12),
        "query_images": ("Q{:05d}.jpg", 8), "query_images_phase2": ("Q{:05d}.jpg", 4)}  # fmt: skip
PAIRS = [("Q00001", "R000003"), ("Q00004", "R000000"), ("Q00005", "R000007"), ("Q00007", "R000009")]

TINY = ["-a", "test_efficientnet", "--input-size", "32", "-j", "0"]
SMALL = [
    *TINY,
    "--batch-size",
    "4",
    "--sample-size",
    "8",
    "--memory-size",
    "64",
    "--log-every",
    "1",
]
SCALED = {  # what makes a stage small: 2 steps per epoch
    "v83": [*SMALL, "--no-pretrained"],
    "v86": SMALL,
    "v98": SMALL,
    "v107": [*TINY, "--batch-size", "2", "--num-negatives", "6", "--log-every", "1"],
}
EPOCHS = {"v83": 10, "v86": 7, "v98": 3, "v107": 10}  # of the published commands


def write_ground_truth(path, pairs=PAIRS, header=("query_id", "reference_id")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *pairs])


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with exp/ (copies of the four scripts alone) and input/ (64 images in DISC21's
    layout).
    """
    house, rng = tmp_path_factory.mktemp("house"), np.random.default_rng(0)
    shutil.copytree(
        ROOT / "exp",
        house / "exp",
        ignore=lambda folder, names: [n for n in names if n[-3:] != ".py"],
    )
    for folder, (name, count) in SETS.items():
        (house / "input" / folder).mkdir(parents=True)
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((64, 48)).save(house / "input" / folder / name.format(i))
    distractors = [(f"Q{i:05d}", "") for i in range(8) if f"Q{i:05d}" not in dict(PAIRS)]
    write_ground_truth(house / "input" / "public_ground_truth.csv", sorted(PAIRS + distractors))
    return house


@pytest.fixture(scope="module")
def published(house):
    """The commands of the README's Train and Extract, the published ones, as they are written: what
    they printed.
    """
    shutil.copytree(ROOT / "scripts", house / "scripts")
    scaled = {f"{stage}.py": flags for stage, flags in SCALED.items()}
    train, extract = readme_block("Train"), readme_block("Extract, post-process, submit")
    run_as_written(train, house / "exp", scaled)
    return run_as_written(extract, house, {"v107.py": TINY}).stdout


@pytest.fixture(scope="module")
def checkpoint(house, published):
    """v83's published starting point of v86."""
    return house / "exp" / "v83" / "train" / "checkpoint_0005.pth.tar"


# ---- the published commands ----


def test_published_commands_leave_the_checkpoints_of_every_epoch(house, published):
    epochs = {
        stage: sorted(path.name for path in (house / "exp" / stage / "train").iterdir())
        for stage in STAGES
    }
    for stage, number in EPOCHS.items():
        assert epochs[stage] == [f"checkpoint_{epoch:04d}.pth.tar" for epoch in range(number)] + [
            "last.pth.tar",
            "log.jsonl",
        ]


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoint_layout(house, published, stage):
    last = sorted((house / "exp" / stage / "train").glob("checkpoint_*.tar"))[-1]
    checkpoint = load(last)
    assert {"epoch", "arch", "state_dict", "optimizer", "args"} <= checkpoint.keys()
    assert {
        "step",
        "memory_bank",
        "seed",
        "world_size",
        "files",
        "versions",
        "source",
        "log",
    } <= checkpoint.keys()
    assert checkpoint["memory_bank"].keys() == {"bank", "bank_labels", "cursor", "filled"}
    assert_same(load(last.with_name("last.pth.tar")), checkpoint)
    assert (
        checkpoint["epoch"] == int(last.name[11:15]) + 1
    )  # the epoch at which to continue, as published
    assert checkpoint["arch"] == "test_efficientnet"
    model = v83.ISCNet(timm.create_model("test_efficientnet", features_only=True))
    expected = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    assert list(checkpoint["state_dict"]) == list(expected)
    for name, tensor in checkpoint["state_dict"].items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
        assert tensor.device.type == "cpu"
        assert tensor.isfinite().all()
    no_decay, decay = checkpoint["optimizer"]["param_groups"]
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0, 1e-6)
    assert len(checkpoint["optimizer"]["state"]) == len(list(model.parameters()))
    assert isinstance(checkpoint["args"], argparse.Namespace)
    assert checkpoint["args"].arch == "test_efficientnet"


@pytest.mark.parametrize("stage", STAGES)
def test_log(house, published, stage):
    first, *lines = log_lines(house / "exp" / stage)
    assert {"args", "versions", "device", "world_size", "seed", "files"} <= first.keys()
    assert first["source"] == (ROOT / "exp" / f"{stage}.py").read_text()
    assert first["args"]["arch"] == "test_efficientnet"
    assert torch.__version__.startswith(first["versions"]["torch"])
    assert {"torchvision", "timm", "pillow"} <= first["versions"].keys()
    lines = [line for line in lines if "args" not in line]  # a resumed run adds its own
    epochs = EPOCHS[stage]
    assert [line["step"] for line in lines] == list(range(1, 2 * epochs + 1))
    assert [line["epoch"] for line in lines] == [epoch for epoch in range(epochs) for _ in range(2)]
    for line in lines:
        assert line["loss"] == pytest.approx(line["pos_loss"] + line["neg_loss"], abs=1e-5)
        assert line["pos_pairs"] > 0
        assert line["neg_pairs"] >= 0
        assert line["images_per_second"] > 0
        rates = {"v98": 0.1 * (1 - line["epoch"] / 3), "v107": 0.5 * (1 - line["epoch"] / 10)}
        assert line["lr"] == pytest.approx(rates.get(stage, 0.1))


def test_resuming_continues_the_run(house, published):
    """Epoch, momentum and memory bank go on: each epoch writes 16 rows into a bank of 64."""
    folder = house / "exp" / "v83" / "train"
    before, after = (
        load(folder / "checkpoint_0004.pth.tar"),
        load(folder / "checkpoint_0005.pth.tar"),
    )
    assert (before["epoch"], after["epoch"]) == (5, 6)
    assert (before["args"].seed, after["args"].seed) == (9, 90)
    assert before["memory_bank"]["cursor"].item() == 5 * 16 % 64
    assert after["memory_bank"]["cursor"].item() == 6 * 16 % 64
    kept = torch.ones(64, dtype=torch.bool)
    kept[16:32] = False
    assert torch.equal(before["memory_bank"]["bank"][kept], after["memory_bank"]["bank"][kept])
    assert not torch.equal(before["memory_bank"]["bank"], after["memory_bank"]["bank"])


def test_resuming_is_exact(house, tmp_path, call):
    """Two epochs in one run, and one and another in two: the same weights, momenta, bank and log,
    bit for bit.
    """
    flags, training = [*SMALL, "--lr", 0.01, "--output"], house / "input" / "training_images"
    assert (
        call("v83", *flags, tmp_path / "one", "--no-pretrained", "--epochs", 2, training).returncode
        == 0
    )
    assert (
        call("v83", *flags, tmp_path / "two", "--no-pretrained", "--epochs", 1, training).returncode
        == 0
    )
    first = tmp_path / "two" / "train" / "checkpoint_0000.pth.tar"
    assert (
        call("v83", *flags, tmp_path / "two", "--resume", first, "--epochs", 2, training).returncode
        == 0
    )
    one, two = (
        load(tmp_path / name / "train" / "checkpoint_0001.pth.tar") for name in ("one", "two")
    )
    for part in ("state_dict", "optimizer", "memory_bank"):
        assert_same(two[part], one[part])
    one, two = (
        [line["loss"] for line in log_lines(tmp_path / name) if "loss" in line]
        for name in ("one", "two")
    )
    assert two == one


@pytest.mark.parametrize("fused", [False, True])  # as on CUDA
@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_is_not_finite_is_left_out(house, tmp_path, call, monkeypatch, step, fused):
    """It reaches neither weights, momenta, BatchNorm's statistics nor the bank, and the log counts
    it.
    """
    calls, gem, sgd = [], v83.gem, torch.optim.SGD
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **options: torch.zeros_like(x, **options) / 0
    )  # any memory
    monkeypatch.setattr(
        torch.optim, "SGD", lambda *args, **options: sgd(*args, **options | {"fused": fused})
    )

    def overflow_once(x, p):
        calls.append(p)
        return gem(x, p) * (torch.inf if len(calls) == step else 1)

    monkeypatch.setattr(v83, "gem", overflow_once)
    flags = [
        *SMALL,
        "--no-pretrained",
        "--sample-size",
        16,
        "--epochs",
        1,
        "--log-every",
        2,
        "--output",
        tmp_path,
    ]
    assert call("v83", *flags, house / "input" / "training_images").returncode == 0
    checkpoint = load(tmp_path / "train" / "checkpoint_0000.pth.tar")
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    momenta = [state["momentum_buffer"] for state in checkpoint["optimizer"]["state"].values()]
    assert all(momentum.isfinite().all() for momentum in momenta)
    assert checkpoint["memory_bank"]["filled"].item() == 3 * 8
    assert [line["skipped"] for line in log_lines(tmp_path)[1:]] == [1, 0]


def read(output, phase=""):
    with h5py.File(output / "extract" / f"fb-isc-submission{phase}.h5") as file:
        return {name: values[()] for name, values in file.items()}


def assert_descriptors(rows, count):
    assert rows.shape == (count, 256)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert len(np.unique(rows, axis=0)) == count


def test_published_extraction(house, published):
    submission = read(house / "exp" / "v107")
    assert submission.keys() == {"query", "reference", "query_ids", "reference_ids"}
    assert_descriptors(submission["query"], 8)
    assert_descriptors(submission["reference"], 12)
    assert_descriptors(np.load(house / "exp" / "v107" / "extract" / "train_feats.npy"), 40)
    np.testing.assert_array_equal(
        submission["query_ids"], np.array([f"Q{i:05d}" for i in range(8)], "S6")
    )
    np.testing.assert_array_equal(
        submission["reference_ids"], np.array([f"R{i:06d}" for i in range(12)], "S7")
    )
    assert (submission["query_ids"].dtype, submission["reference_ids"].dtype) == ("S6", "S7")


def test_published_commands_end_in_a_score(house, published):
    *written, scores, normalized = published.splitlines()
    assert written == [
        str(house / "exp/v107/extract" / name) for name in ("v107_iso.h5", "v107_iso.csv")
    ]
    assert (
        json.loads(scores).keys()
        == json.loads(normalized).keys()
        == {"average_precision", "recall_p90"}
    )


# ---- the same in this process ----


@pytest.fixture
def call(capfd):
    """Run a stage's main() in this process; returns what `run` would, of the subprocess."""

    def call(stage, *argv):
        result = called(importlib.import_module(stage).main, argv, capfd)
        result.args.insert(0, stage)
        return result

    return call


@pytest.mark.parametrize("stage", STAGES)
def test_extraction_of_every_stage(house, published, tmp_path, call, stage):
    weight = house / "exp" / stage / "train" / "last.pth.tar"
    flags = [
        *TINY,
        "--mode",
        "extract",
        "--weight",
        weight,
        "--batch-size",
        3,
        "--output",
        tmp_path,
    ]
    assert call(stage, *flags, "--target-set", "qrt", house / "input").returncode == 0
    submission = read(tmp_path)
    assert_descriptors(submission["query"], 8)
    assert_descriptors(submission["reference"], 12)
    assert_descriptors(np.load(tmp_path / "extract" / "train_feats.npy"), 40)

    model, image = by_hand(house, weight)
    with torch.inference_mode():
        np.testing.assert_allclose(submission["query"][3], model(image[None])[0].numpy(), atol=1e-5)


def by_hand(house, weight):
    """A checkpoint's network, and query 3 as it should be given to it."""
    model = v83.ISCNet(timm.create_model("test_efficientnet", features_only=True)).eval()
    model.load_state_dict(
        {key.removeprefix("module."): value for key, value in load(weight)["state_dict"].items()}
    )
    with Image.open(house / "input" / "query_images" / "Q00003.jpg") as image:
        pixels = torch.from_numpy(
            np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).copy()
        )
    mean, std = (
        torch.tensor(model.backbone.default_cfg[name])[:, None, None] for name in ("mean", "std")
    )
    return model, (pixels.permute(2, 0, 1) / 255 - mean) / std


def test_three_scales_and_their_mirror_images(house, published, tmp_path, call):
    weight = house / "exp" / "v107" / "train" / "last.pth.tar"
    flags = [
        *TINY,
        "--mode",
        "extract",
        "--weight",
        weight,
        "--output",
        tmp_path,
        "--target-set",
        "q",
        "--tta",
    ]
    assert call("v107", *flags, house / "input").returncode == 0
    model, image = by_hand(house, weight)
    total = 0
    for scale in (1, 2**-0.5, 2**0.5):
        at = ((np.arange(int(32 * scale)) + 0.5) / scale - 0.5).clip(
            0, 31
        )  # bilinear, without antialiasing
        scaled = image.numpy()
        for axis in (1, 2):
            scaled = np.apply_along_axis(
                lambda line, at=at: np.interp(at, np.arange(32), line), axis, scaled
            )
        for view in (scaled, scaled[:, :, ::-1]):
            with torch.inference_mode():
                total = (
                    total + model(torch.tensor(view.copy(), dtype=torch.float32)[None])[0].numpy()
                )
    np.testing.assert_allclose(read(tmp_path)["query"][3], total / np.linalg.norm(total), atol=1e-5)


@pytest.mark.parametrize("target_set", ["q", "r", "t", "qt"])
def test_any_target_set(house, checkpoint, tmp_path, call, target_set):
    flags = [
        *TINY,
        "--mode",
        "extract",
        "--weight",
        checkpoint,
        "--output",
        tmp_path,
        "--target-set",
        target_set,
    ]
    assert call("v83", *flags, house / "input").returncode == 0
    assert (tmp_path / "extract" / "train_feats.npy").exists() == ("t" in target_set)
    if target_set == "t":
        assert [path.name for path in (tmp_path / "extract").iterdir()] == ["train_feats.npy"]
        return
    names = {name for name in ("query", "reference") if name[0] in target_set}
    assert read(tmp_path).keys() == names | {f"{name}_ids" for name in names}


def test_phase_2_and_eval_subset(house, checkpoint, tmp_path, call):
    subset = tmp_path / "subset.txt"
    subset.write_text("R000007\nR000002\n")
    flags = [*TINY, "--mode", "extract", "--weight", checkpoint, "--output", tmp_path]
    result = call(
        "v83", *flags, "--phase", 2, "--eval-subset", subset, "--target-set", "qr", house / "input"
    )
    assert result.returncode == 0, result.stderr
    submission = read(tmp_path, "-phase2")
    assert submission["query_ids"].tolist() == [f"Q{i:05d}".encode() for i in range(4)]
    assert submission["reference_ids"].tolist() == [b"R000002", b"R000007"]
    assert not (tmp_path / "extract" / "fb-isc-submission.h5").exists()


def test_dryrun_cuts_rows_and_ids_alike(tmp_path, checkpoint, call):
    (tmp_path / "query_images").mkdir()
    for i in range(103):
        Image.new("RGB", (8, 8), (i, i, 2 * i)).save(tmp_path / "query_images" / f"Q{i:05d}.png")
    flags = [
        *TINY,
        "--mode",
        "extract",
        "--weight",
        checkpoint,
        "--output",
        tmp_path,
        "--target-set",
        "q",
        "--dryrun",
    ]
    assert call("v83", *flags, tmp_path).returncode == 0
    submission = read(tmp_path)
    assert submission["query"].shape == (100, 256)
    assert submission["query_ids"].tolist() == [f"Q{i:05d}".encode() for i in range(100)]


def test_long_ids_are_not_cut(tmp_path, checkpoint, call):
    (tmp_path / "query_images").mkdir()
    for name in ("holiday-2021", "holiday-2022"):
        Image.new("RGB", (8, 8)).save(tmp_path / "query_images" / f"{name}.png")
    flags = [
        *TINY,
        "--mode",
        "extract",
        "--weight",
        checkpoint,
        "--output",
        tmp_path,
        "--target-set",
        "q",
    ]
    assert call("v83", *flags, tmp_path).returncode == 0
    assert read(tmp_path)["query_ids"].tolist() == [b"holiday-2021", b"holiday-2022"]


def test_either_name_of_the_training_folder(house, tmp_path, call):
    (tmp_path / "train_images").symlink_to(house / "input" / "training_images")
    flags = [*SMALL, "--no-pretrained", "--epochs", 1, "--output", tmp_path / "out"]
    assert call("v83", *flags, tmp_path / "training_images/").returncode == 0
    assert (tmp_path / "out" / "train" / "checkpoint_0000.pth.tar").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_reruns_are_bit_identical(house, published, tmp_path, call, stage):
    """The same command twice gives the same but for the speed in the log, whatever the number of
    loader workers.
    """
    flags = [
        *SCALED[stage],
        "--epochs",
        1,
        "--no-pretrained",
        "--output",
        tmp_path,
        house / "input" / "training_images",
    ]
    path, runs = tmp_path / "train" / "checkpoint_0000.pth.tar", []
    for workers in (0, 0, 1, 4) if stage in ("v83", "v107") else (0, 4):
        assert call(stage, *flags, "-j", workers).returncode == 0
        runs.append(load(path))
        runs[-1].pop("args")
        log = [json.loads(line) for line in runs[-1].pop("log")]
        runs[-1]["losses"] = [line["loss"] for line in log if "loss" in line]
    for other in runs[1:]:
        assert_same(other, runs[0])


def test_the_seed_matters(house, published, tmp_path, call):
    path, losses = tmp_path / "train" / "log.jsonl", []
    for seed in (1, 2):
        flags = [*SMALL, "--no-pretrained", "--epochs", 1, "--seed", seed, "--output", tmp_path]
        assert call("v83", *flags, house / "input" / "training_images").returncode == 0
        losses.append(json.loads(path.read_text().splitlines()[1])["loss"])
    assert losses[0] != losses[1]


def published_checkpoint(path, epoch=5):
    """A file as the published code leaves it: no bank, no scaler, the options of an old SGD.
    Returns its model.
    """
    torch.manual_seed(3)
    model = v83.ISCNet(timm.create_model("test_efficientnet", features_only=True))
    groups, position = [], 0
    for group in v83.parameter_groups(model, 1e-6):
        indices = list(range(position, position + len(group["params"])))
        position += len(indices)
        options = {
            "lr": 0.1,
            "momentum": 0.9,
            "dampening": 0,
            "nesterov": False,
            "weight_decay": group["weight_decay"],
        }
        groups.append(options | {"params": indices})
    parameters = [
        parameter for group in v83.parameter_groups(model, 1e-6) for parameter in group["params"]
    ]
    state = {
        i: {"momentum_buffer": torch.full_like(parameter, 0.25)}
        for i, parameter in enumerate(parameters)
    }
    checkpoint = {
        "epoch": epoch,
        "arch": "test_efficientnet",
        "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": {"state": state, "param_groups": groups},
        "args": argparse.Namespace(arch="test_efficientnet", seed=9, workers=64, gpu=0),
    }
    torch.save(checkpoint, path)
    return model


def test_a_published_checkpoint_serves_everywhere(house, tmp_path, call):
    path, training = tmp_path / "published.pth.tar", house / "input" / "training_images"
    model = published_checkpoint(path)
    start = {f"module.{name}": value for name, value in model.state_dict().items()}

    resumed = [*SMALL, "--epochs", 6, "--lr", 0, "--output", tmp_path / "resumed", "--resume", path]
    assert call("v83", *resumed, training).returncode == 0
    checkpoint = load(tmp_path / "resumed" / "train" / "checkpoint_0005.pth.tar")
    assert checkpoint["epoch"] == 6
    assert checkpoint["memory_bank"]["filled"].item() == 16  # the bank started empty
    for name, _ in model.named_parameters():  # at learning rate 0
        assert torch.equal(checkpoint["state_dict"][f"module.{name}"], start[f"module.{name}"])

    weight = [*SMALL, "--epochs", 1, "--lr", 0, "--output", tmp_path / "weight", "--weight", path]
    assert call("v86", *weight, training).returncode == 0
    checkpoint = load(tmp_path / "weight" / "train" / "checkpoint_0000.pth.tar")
    assert torch.equal(checkpoint["state_dict"]["module.fc.weight"], start["module.fc.weight"])

    flags = [
        *TINY,
        "--mode",
        "extract",
        "--target-set",
        "q",
        "--output",
        tmp_path,
        "--weight",
        path,
    ]
    assert call("v107", *flags, house / "input").returncode == 0
    assert_descriptors(read(tmp_path)["query"], 8)


def test_any_momenta_serve_a_fused_optimizer():
    """Laid out otherwise, as the published code's, or not there: what it takes is laid out as the
    parameter is.
    """
    torch.manual_seed(0)
    weights, momenta = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    for fused in (False, True):
        model = torch.nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)
        torch.nn.init.zeros_(model.bias)
        model.weight.data.copy_(weights)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, fused=fused)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(
            {"state": {0: {"momentum_buffer": momenta}}, "param_groups": groups}
        )
        v83.prepare_momenta(optimizer, model)
        assert optimizer.state[model.bias]["momentum_buffer"].tolist() == [0, 0, 0, 0]
        model(torch.ones(1, 3, 5, 5)).sum().backward()
        optimizer.step()
        np.testing.assert_allclose(
            model.weight.detach(), weights - 0.1 * (0.9 * momenta + 1), atol=1e-6
        )
        assert optimizer.state[model.weight]["momentum_buffer"].stride() == model.weight.stride()


# ---- several processes ----


def in_two_processes(*command):
    """The command in two processes that a launcher's environment joins; the CompletedProcess of
    each.
    """
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    environment |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT / "exp")}
    with ThreadPoolExecutor() as pool:
        ranks = [
            pool.submit(run, *command, RANK=rank, LOCAL_RANK=rank, **environment)
            for rank in ("0", "1")
        ]
    return [result.result() for result in ranks]


def test_one_and_two_processes_learn_the_same(house, tmp_path, call, monkeypatch):
    """Batch 8 in one process and 4 + 4 in two, BatchNorm in evaluation mode: the same 5 steps."""
    flags = [
        *TINY,
        "--no-pretrained",
        "--epochs",
        1,
        "--batch-size",
        8,
        "--memory-size",
        48,
        "--log-every",
        1,
    ]
    flags, outputs = (
        [*flags, house / "input" / "training_images"],
        [tmp_path / "one", tmp_path / "two"],
    )
    for result in in_two_processes(
        ROOT / "tests" / "frozen_batchnorm.py", "v83", "--output", outputs[1], *flags
    ):
        assert result.returncode == 0, result.stderr
    monkeypatch.setattr(v83.ISCNet, "train", stay_in_evaluation_mode)
    assert call("v83", "--output", outputs[0], *flags).returncode == 0
    one, two = (log_lines(output)[1:] for output in outputs)
    assert len(one) == 5
    for expected, line in zip(one, two, strict=True):
        for name in ("loss", "pos_loss", "neg_loss"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5)
        assert (line["pos_pairs"], line["neg_pairs"]) == (
            expected["pos_pairs"],
            expected["neg_pairs"],
        )
    one, two = (load(output / "train" / "checkpoint_0000.pth.tar") for output in outputs)
    for name, expected in one["state_dict"].items():
        difference = (two["state_dict"][name] - expected).double().norm()
        assert difference <= 1e-5 * expected.double().norm(), name
    assert torch.equal(two["memory_bank"]["bank_labels"], one["memory_bank"]["bank_labels"])
    torch.testing.assert_close(
        two["memory_bank"]["bank"], one["memory_bank"]["bank"], rtol=0, atol=1e-5
    )


def on_two_nodes(*command, output):
    """The published flags on two nodes with one process each; the CompletedProcess of each."""
    nodes = [
        "--multiprocessing-distributed",
        "--dist-url",
        f"tcp://localhost:{free_port()}",
        "--world-size",
        2,
    ]
    *command, data = command
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(run, *command, *nodes, "--rank", rank, "--output", output, data)
            for rank in range(2)
        ]
    return [result.result() for result in runs]


def test_extraction_in_two_processes(house, checkpoint, tmp_path):
    flags = [
        *TINY,
        "--mode",
        "extract",
        "--weight",
        checkpoint,
        "--batch-size",
        6,
        "--target-set",
        "qrt",
    ]
    for result in on_two_nodes(
        ROOT / "exp" / "v83.py", *flags, house / "input", output=tmp_path / "two"
    ):
        assert result.returncode == 0, result.stderr
    # In a process of its own: the bits of a CPU's descriptors depend on the number of its threads.
    assert (
        run(
            ROOT / "exp" / "v83.py", *flags, "--output", tmp_path / "one", house / "input"
        ).returncode
        == 0
    )
    for name in ("fb-isc-submission.h5", "train_feats.npy"):
        one, two = (tmp_path / output / "extract" / name for output in ("one", "two"))
        assert two.read_bytes() == one.read_bytes()


def test_a_batch_that_does_not_divide(house, tmp_path):
    flags = [*SMALL, "--no-pretrained", "--batch-size", 3, house / "input" / "training_images"]
    first, second = in_two_processes(ROOT / "exp" / "v83.py", "--output", tmp_path, *flags)
    assert_refused(first, "v83.py: error: --batch-size 3", "2")
    assert second.returncode == 2
    assert "Traceback" not in second.stderr
    assert not list(tmp_path.rglob("*.pth.tar"))


# ---- wrong input ----


def assert_nothing_written(output):
    written = [path.name for path in output.rglob("*") if path.is_file()]
    assert set(written) <= {"log.jsonl"}


def refused(result, output, *words):
    """One line that starts with the script's name, exit code 2, nothing half-written."""
    assert_refused(result, *words)
    assert any(
        line.startswith(f"{result.args[0]}.py: error: ") for line in result.stderr.splitlines()
    ), result.stderr
    assert_nothing_written(output)


def training_flags(output):
    return [*SMALL, "--no-pretrained", "--epochs", 1, "--output", output]


@pytest.mark.parametrize("stage", STAGES)
def test_missing_data_folder(house, tmp_path, call, stage):
    data, output = tmp_path / "nowhere" / "training_images", tmp_path / "out"
    refused(call(stage, *training_flags(output), data), output, tmp_path / "nowhere")


def test_folder_without_images(tmp_path, call):
    (tmp_path / "training_images").mkdir()
    (tmp_path / "training_images" / "notes.txt").write_text("no image")
    output = tmp_path / "out"
    refused(
        call("v83", *training_flags(output), tmp_path / "training_images"),
        output,
        tmp_path / "training_images",
    )


def test_fewer_images_than_a_batch(house, tmp_path, call):
    flags = [*training_flags(tmp_path), "--sample-size", 3, house / "input" / "training_images"]
    refused(call("v83", *flags), tmp_path, "3", "--batch-size")


def test_a_bank_smaller_than_a_step(house, tmp_path, call):
    flags = [*training_flags(tmp_path), "--memory-size", 7, house / "input" / "training_images"]
    refused(call("v83", *flags), tmp_path, "--memory-size", "8 images")


@pytest.mark.parametrize(
    "flag", ["--epochs", "--log-every", "--ncrops", "--input-size", "--reference-world-size"]
)
def test_a_number_too_small(house, tmp_path, flag):
    flags = [*training_flags(tmp_path), flag, 0, house / "input" / "training_images"]
    with pytest.raises(SystemExit, match="2"):
        v83.main(list(map(str, flags)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_not_one(tmp_path, house, call, workers):
    """The message has to come out of a loader process and past the progress bar."""
    folder = tmp_path / "training_images"
    folder.mkdir()
    for path in sorted((house / "input" / "training_images").iterdir())[:4]:
        shutil.copy(path, folder)
    (folder / "T000002.jpg").write_text("this is no picture")
    flags = [*training_flags(tmp_path / "out"), "-j", workers, "--bad-images", "error", folder]
    assert_refused(call("v83", *flags), "v83.py: error: 1 bad images", folder / "T000002.jpg")


def test_refusal_by_a_whole_command(tmp_path):
    result = run(
        ROOT / "exp" / "v98.py",
        *training_flags(tmp_path / "out"),
        tmp_path / "nowhere",
        cwd=tmp_path,
    )
    assert_refused(result, "v98.py: error: ", tmp_path / "nowhere")
    assert result.stdout == ""
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("flag", ["--weight", "--resume"])
def test_a_checkpoint_of_another_architecture(house, tmp_path, checkpoint, call, flag):
    flags = [
        *training_flags(tmp_path),
        "-a",
        "test_resnet",
        flag,
        checkpoint,
        house / "input" / "training_images",
    ]
    refused(call("v83", *flags), tmp_path, checkpoint)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "text", "truncated", "malicious", "no weights", "a folder"]
)
def test_a_corrupt_checkpoint(house, tmp_path, checkpoint, call, kind):
    path, output, victim = tmp_path / "checkpoint.pth.tar", tmp_path / "out", tmp_path / "victim"
    if kind == "a folder":
        path.mkdir()
    elif kind == "malicious":
        torch.save({"state_dict": Malicious(str(victim))}, path)
    elif kind == "no weights":
        torch.save({"epoch": 3}, path)
    elif kind != "missing":
        path.write_bytes(
            {"empty": b"", "text": b"hello", "truncated": checkpoint.read_bytes()[:5000]}[kind]
        )
    for stage, mode in (("v83", ["--weight", path]), ("v83", ["--resume", path])):
        flags = [*training_flags(output), *mode, house / "input" / "training_images"]
        refused(call(stage, *flags), output, path)
    flags = [*TINY, "--mode", "extract", "--weight", path, "--output", output, house / "input"]
    refused(call("v107", *flags), output, path)
    assert not victim.exists()


def test_an_unknown_backbone(house, tmp_path, call):
    flags = [
        *training_flags(tmp_path),
        "-a",
        "efficientnet_of_tomorrow",
        house / "input" / "training_images",
    ]
    refused(call("v83", *flags), tmp_path, "efficientnet_of_tomorrow")


def test_imagenet_weights_out_of_reach(house, tmp_path, call, monkeypatch):
    create_model = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no route to host")
        return create_model(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    flags = [*SMALL, "--output", tmp_path, house / "input" / "training_images"]
    refused(call("v83", *flags), tmp_path, "test_efficientnet", "--no-pretrained", "--weight")


@pytest.mark.parametrize("target_set", ["", "x", "qx"])
def test_an_unknown_target_set(house, tmp_path, checkpoint, call, target_set):
    flags = [
        *TINY,
        "--mode",
        "extract",
        "--weight",
        checkpoint,
        "--output",
        tmp_path,
        "--target-set",
        target_set,
    ]
    refused(call("v83", *flags, house / "input"), tmp_path, "--target-set")


def test_extraction_without_weights(house, tmp_path, call):
    result = call("v83", *TINY, "--mode", "extract", "--output", tmp_path, house / "input")
    assert_refused(result, "--weight")


def test_duplicate_ids_in_extraction(house, tmp_path, checkpoint, call):
    folder = tmp_path / "query_images"
    folder.mkdir()
    for name in ("Q00000.jpg", "Q00001.jpg", "Q00001.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    flags = [
        *TINY,
        "--mode",
        "extract",
        "--weight",
        checkpoint,
        "--target-set",
        "q",
        "--output",
        tmp_path / "out",
    ]
    refused(call("v83", *flags, tmp_path), tmp_path / "out", tmp_path, "suffix")


@pytest.mark.parametrize("subset", [None, "", "R000001\nR999999\n"])
def test_a_wrong_eval_subset(house, tmp_path, checkpoint, call, subset):
    path = tmp_path / "subset.txt"
    if subset is not None:
        path.write_text(subset)
    flags = [
        *TINY,
        "--mode",
        "extract",
        "--weight",
        checkpoint,
        "--eval-subset",
        path,
        "--output",
        tmp_path / "out",
    ]
    refused(call("v83", *flags, house / "input"), tmp_path / "out", path)


# ---- v107: pairs ----


@pytest.fixture
def pairs_root(house, tmp_path):
    """A root whose ground truth a test may spoil."""
    root = tmp_path / "input"
    root.mkdir()
    for folder in SETS:
        (root / folder).symlink_to(house / "input" / folder)
    write_ground_truth(root / "public_ground_truth.csv")
    return root


def call_v107(call, root, output, *flags):
    small = [
        *TINY,
        "--batch-size",
        2,
        "--num-negatives",
        2,
        "--memory-size",
        64,
        "--epochs",
        1,
        "--log-every",
        1,
    ]
    return call(
        "v107", *small, "--no-pretrained", "--output", output, *flags, root / "training_images"
    )


WRONG_GROUND_TRUTHS = {
    "no columns": "a,b\nQ00001,R000003\n",
    "unknown query": "query_id,reference_id\nQ00001,R000003\nQ99999,R000004\n",
    "unknown reference": "query_id,reference_id\nQ00001,R000003\nQ00002,R999999\n",
    "no pairs": "query_id,reference_id\nQ00001,\n",
    "empty": "",
    "not text": "\x00\ufffd\x01",
}


@pytest.mark.parametrize("kind", WRONG_GROUND_TRUTHS)
def test_a_wrong_ground_truth(pairs_root, tmp_path, call, kind):
    path = pairs_root / "public_ground_truth.csv"
    path.write_text(WRONG_GROUND_TRUTHS[kind])
    words = {"unknown query": ["Q99999"], "unknown reference": ["R999999"]}.get(kind, [])
    refused(
        call_v107(call, pairs_root, tmp_path / "out"),
        tmp_path / "out",
        "public_ground_truth.csv",
        *words,
    )


def test_a_missing_ground_truth(pairs_root, tmp_path, call):
    (pairs_root / "public_ground_truth.csv").unlink()
    refused(
        call_v107(call, pairs_root, tmp_path / "out"), tmp_path / "out", "public_ground_truth.csv"
    )


def test_pairs_and_their_negatives(house):
    """Query and reference share their pair's label; each reference of no pair has a label of its
    own.
    """
    args = v107.parse_args([*SCALED["v107"], str(house / "input" / "training_images")])
    dataset = v107.TrainDataset(args, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    plain, finish = (
        v107.evaluation_transform(32, dataset.mean, dataset.std),
        v107.Finish(dataset.mean, dataset.std),
    )
    images = {
        path.stem: plain(Image.open(path)) for path in (house / "input").glob("*_images/[QR]*.jpg")
    }
    names, negatives = {image.numpy().tobytes(): name for name, image in images.items()}, {}
    assert len(dataset) == len(PAIRS)
    for epoch in range(10):
        dataset.epoch = epoch
        for i, pair in enumerate(sorted(PAIRS)):
            views, labels = dataset[i]
            assert len(views) == 8
            query, reference, *others = (
                names[finish.one(view).numpy().tobytes()] for view in views
            )
            assert (query, reference) == pair
            assert labels[:2] == [i, i]
            assert len(set(others)) == 6
            for name, label in zip(others, labels[2:], strict=True):
                assert label >= 1_000_000
                assert negatives.setdefault(name, label) == label
    assert negatives.keys() == {f"R{i:06d}" for i in range(12)} - {
        reference for _, reference in PAIRS
    }
    assert len(set(negatives.values())) == len(negatives)


@pytest.mark.parametrize("stage", [v98, v107], ids=["v98", "v107"])
def test_fast_input_in_training(house, stage):
    """What is only resized differs, by one at most of Pillow's values; views of v98's training
    image do not.
    """
    samples, size = [], ["--input-size", "37"]  # at 32, halved, they are equal
    for flags in ([], ["--fast-input"]):
        args = stage.parse_args(
            [*SCALED[stage.__name__], *size, *flags, str(house / "input" / "training_images")]
        )
        samples.append(stage.collate([stage.TrainDataset(args, (0.5,) * 3, (0.5,) * 3)[3]])[::3])
    (exact, labels), (fast, same_labels) = samples
    assert torch.equal(labels, same_labels)
    difference = (exact.int() - fast.int()).abs().amax(dim=(1, 2, 3))
    resized = labels >= 1_000_000 if stage is v98 else labels >= 0
    assert (difference[~resized] == 0).all()
    assert difference[resized].max() == 1


def test_references_as_negatives_of_v98(house):
    """Two plain references with every sample, labelled by a million and their position."""
    args = v98.parse_args([*SCALED["v98"], str(house / "input" / "training_images")])
    dataset = v98.TrainDataset(args, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    plain, finish = (
        v98.evaluation_transform(32, dataset.mean, dataset.std),
        v98.Finish(dataset.mean, dataset.std),
    )
    seen = set()
    for epoch in range(10):
        dataset.epoch = epoch
        views, labels = dataset[3]
        assert len(views) == 4
        assert labels[:2] == [3, 3]
        for view, label in zip(views[2:], labels[2:], strict=True):
            path = house / "input" / "reference_images" / f"R{label - 1_000_000:06d}.jpg"
            assert torch.equal(finish.one(view), plain(Image.open(path)))
            seen.add(label)
    assert len(seen) > 5
