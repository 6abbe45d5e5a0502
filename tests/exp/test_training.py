"""Whole commands of the four stages on 64 small images: training, checkpoints, resuming,
extraction, wrong input.
"""

import argparse
import csv
import importlib
import json
import shutil

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import v83
import v98
import v107
from conftest import ROOT, assert_refused, called, readme_block, run, run_as_written
from stage_process import (
    assert_same,
    error_line,
    free_port,
    freeze_batchnorm,
    load,
    log_lines,
)

STAGES = ["v83", "v86", "v98", "v107"]
SETS = {"training_images": ("T{:06d}.jpg", 40), "reference_images": ("R{:06d}.jpg", 12),
        "query_images": ("Q{:05d}.jpg", 8), "query_images_phase2": ("Q{:05d}.jpg", 4)}  # fmt: skip
PAIRS = [("Q00001", "R000003"), ("Q00004", "R000000"), ("Q00005", "R000007"), ("Q00007", "R000009")]

TINY = ["-a", "test_efficientnet", "--input-size", "32", "-j", "0", "--log-every", "1"]
SMALL = [*TINY, "--batch-size", "4", "--sample-size", "8", "--memory-size", "64"]
SCALED = {  # what makes a stage small: 2 steps per epoch
    "v83": [*SMALL, "--no-pretrained"],
    "v86": SMALL,
    "v98": SMALL,
    "v107": [*TINY, "--batch-size", "2", "--num-negatives", "6"],
}
EPOCHS = {"v83": 10, "v86": 7, "v98": 3, "v107": 10}  # of the published commands


def write_ground_truth(path, pairs=PAIRS, header=("query_id", "reference_id")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *pairs])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with exp/ (copies of the four scripts alone) and input/ (64 images in DISC21's
    layout).
    """
    project, rng = tmp_path_factory.mktemp("project"), np.random.default_rng(0)
    shutil.copytree(
        ROOT / "exp",
        project / "exp",
        ignore=lambda folder, names: [n for n in names if n[-3:] != ".py"],
    )
    for folder, (name, count) in SETS.items():
        (project / "input" / folder).mkdir(parents=True)
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((64, 48)).save(project / "input" / folder / name.format(i))
    distractors = [(f"Q{i:05d}", "") for i in range(8) if f"Q{i:05d}" not in dict(PAIRS)]
    write_ground_truth(project / "input" / "public_ground_truth.csv", sorted(PAIRS + distractors))
    return project


@pytest.fixture(scope="module")
def training_images(project):
    return project / "input" / "training_images"


@pytest.fixture(scope="module")
def published(project):
    """The commands of the README's Train and Extract, the published ones, as they are written: the
    CompletedProcess of each block.
    """
    shutil.copytree(ROOT / "scripts", project / "scripts")
    scaled = {f"{stage}.py": flags for stage, flags in SCALED.items()}
    train, extract = readme_block("Train"), readme_block("Extract, post-process, submit")
    trained = run_as_written(train, project / "exp", scaled)
    return trained, run_as_written(extract, project, {"v107.py": TINY})


@pytest.fixture(scope="module")
def checkpoint(project, published):
    """v83's published starting point of v86."""
    return project / "exp" / "v83" / "train" / "checkpoint_0005.pth.tar"


# ---- the published commands ----


def test_published_commands_leave_the_checkpoints_of_every_epoch(project, published):
    for stage, epochs in EPOCHS.items():
        found = {path.name for path in (project / "exp" / stage / "train").glob("*.pth.tar")}
        expected = {f"checkpoint_{epoch:04d}.pth.tar" for epoch in range(epochs)}
        assert found == expected | {"last.pth.tar"}


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoint_layout(project, published, stage):
    last = sorted((project / "exp" / stage / "train").glob("checkpoint_*.tar"))[-1]
    checkpoint = load(last)
    assert {"epoch", "arch", "state_dict", "optimizer", "args"} <= checkpoint.keys()  # published
    assert {"step", "memory_bank", "scaler", "seed", "batch_size"} <= checkpoint.keys()
    assert {"world_size", "files", "versions", "log"} <= checkpoint.keys()
    assert checkpoint["memory_bank"].keys() == {"bank", "bank_labels", "cursor", "filled"}
    assert_same(load(last.with_name("last.pth.tar")), checkpoint)
    epoch = int(last.name[11:15]) + 1  # the epoch at which to continue, as published
    assert (checkpoint["epoch"], checkpoint["step"]) == (epoch, 0)
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
def test_log(project, published, stage):
    first, *lines = log_lines(project / "exp" / stage)
    assert {"args", "versions", "world_size", "seed", "batch_size", "files"} <= first.keys()
    assert first["device"] == "cpu"
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
        assert (line["skipped"], line["overflows"]) == (0, 0)


PUBLISHED_RATES = {
    "v83": [0.1] * 10,
    "v86": [0.1] * 7,
    "v98": [0.1, 0.1 * 2 / 3, 0.1 / 3],
    "v107": [0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05],
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_learning_rate_is_that_of_the_published_recipe(project, published, stage):
    """Epoch by epoch. (A change of the schedule changes this table, and no other test.)"""
    rates = {
        line["epoch"]: line["lr"] for line in log_lines(project / "exp" / stage) if "lr" in line
    }
    assert list(rates.values()) == pytest.approx(PUBLISHED_RATES[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_keeps_its_source(project, published, stage):
    script = project / "exp" / f"{stage}.py"
    assert (project / "exp" / stage / "train" / "source.py").read_bytes() == script.read_bytes()


def test_the_console_says_which_device(published):
    """Each command's first line: of v83's two runs, of the other stages', of v107's extraction."""
    lines = [line for result in published for line in result.stderr.splitlines()]
    expected = [f"{stage}.py: 1 x cpu" for stage in ("v83", "v83", "v86", "v98", "v107", "v107")]
    assert [line for line in lines if " x " in line] == expected
    assert lines[0] == expected[0]


def test_resuming_continues_the_run(project, published):
    """Epoch, momentum and memory bank go on: each epoch writes 16 rows into a bank of 64."""
    folder = project / "exp" / "v83" / "train"
    before, after = (load(folder / f"checkpoint_{epoch:04d}.pth.tar") for epoch in (4, 5))
    assert (before["epoch"], after["epoch"]) == (5, 6)
    assert (before["args"].seed, after["args"].seed) == (9, 90)
    assert before["memory_bank"]["cursor"].item() == 5 * 16 % 64
    assert after["memory_bank"]["cursor"].item() == 6 * 16 % 64
    kept = torch.ones(64, dtype=torch.bool)
    kept[16:32] = False
    assert torch.equal(before["memory_bank"]["bank"][kept], after["memory_bank"]["bank"][kept])
    assert not torch.equal(before["memory_bank"]["bank"], after["memory_bank"]["bank"])


def read(output, phase=""):
    with h5py.File(output / "extract" / f"fb-isc-submission{phase}.h5") as file:
        return {name: values[()] for name, values in file.items()}


def assert_descriptors(rows, count):
    assert rows.shape == (count, 256)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert len(np.unique(rows, axis=0)) == count


def test_published_extraction(project, published):
    submission = read(project / "exp" / "v107")
    assert submission.keys() == {"query", "reference", "query_ids", "reference_ids"}
    assert_descriptors(submission["query"], 8)
    assert_descriptors(submission["reference"], 12)
    assert_descriptors(np.load(project / "exp" / "v107" / "extract" / "train_feats.npy"), 40)
    for name, expected in (
        ("query_ids", np.array([f"Q{i:05d}" for i in range(8)], "S6")),
        ("reference_ids", np.array([f"R{i:06d}" for i in range(12)], "S7")),
    ):
        np.testing.assert_array_equal(submission[name], expected)
        assert submission[name].dtype == expected.dtype


def test_published_commands_end_in_a_score(project, published):
    *written, scores, normalized = published[1].stdout.splitlines()
    folder = project / "exp" / "v107" / "extract"
    assert written == [str(folder / name) for name in ("v107_iso.h5", "v107_iso.csv")]
    for line in (scores, normalized):
        assert json.loads(line).keys() == {"average_precision", "recall_p90"}


# ---- the same in this process ----


@pytest.fixture
def call(capfd):
    """Run a stage's main() in this process; returns what `run` would, of the subprocess."""

    def call(stage, *argv):
        result = called(importlib.import_module(stage).main, argv, capfd)
        result.args.insert(0, stage)
        return result

    return call


@pytest.fixture
def succeed(call):
    """The same, where the command must end well."""

    def succeed(stage, *argv):
        result = call(stage, *argv)
        assert result.returncode == 0, result.stderr

    return succeed


def training(output, *flags):
    """Flags of one epoch from scratch, of 2 steps."""
    return [*SMALL, "--no-pretrained", "--epochs", 1, "--output", output, *flags]


def extraction(weight, output, *flags):
    return [*TINY, "--mode", "extract", "--weight", weight, "--output", output, *flags]


def epoch_checkpoint(output, epoch=0):
    return load(output / "train" / f"checkpoint_{epoch:04d}.pth.tar")


def test_resuming_is_exact(training_images, tmp_path, succeed):
    """Two epochs in one run, and in two runs: bit-identical weights, momenta, bank and log."""
    one, two = tmp_path / "one", tmp_path / "two"
    succeed("v83", *training(one, "--lr", 0.01, "--epochs", 2), training_images)
    succeed("v83", *training(two, "--lr", 0.01), training_images)
    first = two / "train" / "checkpoint_0000.pth.tar"
    resumed = training(two, "--lr", 0.01, "--epochs", 2, "--resume", first)
    succeed("v83", *resumed, training_images)
    for part in ("state_dict", "optimizer", "memory_bank"):
        assert_same(epoch_checkpoint(two, 1)[part], epoch_checkpoint(one, 1)[part])
    losses = [
        [line["loss"] for line in log_lines(output) if "loss" in line] for output in (one, two)
    ]
    assert losses[1] == losses[0]


@pytest.mark.parametrize("stage", STAGES)
def test_extraction_of_every_stage(project, published, tmp_path, succeed, stage):
    weight = project / "exp" / stage / "train" / "last.pth.tar"
    flags = extraction(weight, tmp_path, "--batch-size", 3, "--target-set", "qrt")
    succeed(stage, *flags, project / "input")
    submission = read(tmp_path)
    assert_descriptors(submission["query"], 8)
    assert_descriptors(submission["reference"], 12)
    assert_descriptors(np.load(tmp_path / "extract" / "train_feats.npy"), 40)

    model, image = by_hand(project, weight)
    with torch.inference_mode():
        np.testing.assert_allclose(submission["query"][3], model(image[None])[0].numpy(), atol=1e-5)


def by_hand(project, weight):
    """A checkpoint's network, and query 3 as it should be given to it."""
    model = v83.ISCNet(timm.create_model("test_efficientnet", features_only=True)).eval()
    model.load_state_dict(
        {key.removeprefix("module."): value for key, value in load(weight)["state_dict"].items()}
    )
    with Image.open(project / "input" / "query_images" / "Q00003.jpg") as image:
        resized = image.resize((32, 32), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(resized).copy())
    mean, std = (
        torch.tensor(model.backbone.default_cfg[name])[:, None, None] for name in ("mean", "std")
    )
    return model, (pixels.permute(2, 0, 1) / 255 - mean) / std


def test_three_scales_and_their_mirror_images(project, published, tmp_path, succeed):
    weight = project / "exp" / "v107" / "train" / "last.pth.tar"
    succeed("v107", *extraction(weight, tmp_path, "--target-set", "q", "--tta"), project / "input")
    model, image = by_hand(project, weight)
    total = 0
    for scale in (1, 2**-0.5, 2**0.5):
        at = (np.arange(int(32 * scale)) + 0.5) / scale - 0.5  # bilinear, without antialiasing
        at = at.clip(0, 31)
        scaled = image.numpy()
        for axis in (1, 2):
            scaled = np.apply_along_axis(
                lambda line, at=at: np.interp(at, np.arange(32), line), axis, scaled
            )
        for view in (scaled, scaled[:, :, ::-1]):
            view = torch.tensor(view.copy(), dtype=torch.float32)
            with torch.inference_mode():
                total = total + model(view[None])[0].numpy()
    np.testing.assert_allclose(read(tmp_path)["query"][3], total / np.linalg.norm(total), atol=1e-5)


@pytest.mark.parametrize("target_set", ["q", "r", "t", "qt"])
def test_any_target_set(project, checkpoint, tmp_path, succeed, target_set):
    flags = extraction(checkpoint, tmp_path, "--target-set", target_set)
    succeed("v83", *flags, project / "input")
    assert (tmp_path / "extract" / "train_feats.npy").exists() == ("t" in target_set)
    if target_set == "t":
        assert [path.name for path in (tmp_path / "extract").iterdir()] == ["train_feats.npy"]
        return
    names = {name for name in ("query", "reference") if name[0] in target_set}
    assert read(tmp_path).keys() == names | {f"{name}_ids" for name in names}


def test_phase_2_and_eval_subset(project, checkpoint, tmp_path, succeed):
    subset = tmp_path / "subset.txt"
    subset.write_text("R000007\nR000002\n")
    flags = extraction(checkpoint, tmp_path, "--phase", 2, "--eval-subset", subset)
    succeed("v83", *flags, "--target-set", "qr", project / "input")
    submission = read(tmp_path, "-phase2")
    assert submission["query_ids"].tolist() == [f"Q{i:05d}".encode() for i in range(4)]
    assert submission["reference_ids"].tolist() == [b"R000002", b"R000007"]
    assert not (tmp_path / "extract" / "fb-isc-submission.h5").exists()


def test_dryrun_cuts_rows_and_ids_alike(tmp_path, checkpoint, succeed):
    (tmp_path / "query_images").mkdir()
    for i in range(103):
        Image.new("RGB", (8, 8), (i, i, 2 * i)).save(tmp_path / "query_images" / f"Q{i:05d}.png")
    succeed("v83", *extraction(checkpoint, tmp_path, "--target-set", "q", "--dryrun"), tmp_path)
    submission = read(tmp_path)
    assert submission["query"].shape == (100, 256)
    assert submission["query_ids"].tolist() == [f"Q{i:05d}".encode() for i in range(100)]


def test_long_ids_are_not_cut(tmp_path, checkpoint, succeed):
    (tmp_path / "query_images").mkdir()
    for name in ("holiday-2021", "holiday-2022"):
        Image.new("RGB", (8, 8)).save(tmp_path / "query_images" / f"{name}.png")
    succeed("v83", *extraction(checkpoint, tmp_path, "--target-set", "q"), tmp_path)
    assert read(tmp_path)["query_ids"].tolist() == [b"holiday-2021", b"holiday-2022"]


def test_either_name_of_the_training_folder(training_images, tmp_path, succeed):
    (tmp_path / "train_images").symlink_to(training_images)
    succeed("v83", *training(tmp_path / "out"), tmp_path / "training_images/")
    assert (tmp_path / "out" / "train" / "checkpoint_0000.pth.tar").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_reruns_are_bit_identical(training_images, published, tmp_path, succeed, stage):
    """The same command twice gives the same but for the speed in the log, whatever the number of
    data loader workers.
    """
    runs = []
    for workers in (0, 0, 1, 4) if stage in ("v83", "v107") else (0, 4):
        output = tmp_path / str(len(runs))
        flags = [*SCALED[stage], "--epochs", 1, "--no-pretrained", "--output", output]
        succeed(stage, *flags, "-j", workers, training_images)
        runs.append(epoch_checkpoint(output))
        runs[-1].pop("args")
        log = [json.loads(line) for line in runs[-1].pop("log")]
        runs[-1]["losses"] = [line["loss"] for line in log if "loss" in line]
    for other in runs[1:]:
        assert_same(other, runs[0])


def test_the_seed_matters(training_images, tmp_path, succeed):
    losses = []
    for seed in (1, 2):
        output = tmp_path / str(seed)
        succeed("v83", *training(output, "--seed", seed), training_images)
        losses.append(log_lines(output)[1]["loss"])
    assert losses[0] != losses[1]


def published_checkpoint(path, epoch=5):
    """Write a checkpoint like the published code's: no bank, no scaler, the options of an old SGD.
    Returns its model.
    """
    torch.manual_seed(3)
    model = v83.ISCNet(timm.create_model("test_efficientnet", features_only=True))
    groups, position = [], 0
    for group in v83.parameter_groups(model, 1e-6):
        indices = list(range(position, position + len(group["params"])))
        position += len(indices)
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False}
        options["weight_decay"] = group["weight_decay"]
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


def test_a_published_checkpoint_serves_everywhere(project, training_images, tmp_path, succeed):
    path = tmp_path / "published.pth.tar"
    model = published_checkpoint(path)
    start = {f"module.{name}": value for name, value in model.state_dict().items()}

    resumed = tmp_path / "resumed"
    flags = training(resumed, "--epochs", 6, "--lr", 0, "--resume", path)
    succeed("v83", *flags, training_images)
    checkpoint = epoch_checkpoint(resumed, 5)
    assert checkpoint["epoch"] == 6
    assert checkpoint["memory_bank"]["filled"].item() == 16  # the bank started empty
    for name, _ in model.named_parameters():  # at learning rate 0
        assert torch.equal(checkpoint["state_dict"][f"module.{name}"], start[f"module.{name}"])

    continued = tmp_path / "weight"
    flags = [*SMALL, "--epochs", 1, "--lr", 0, "--output", continued, "--weight", path]
    succeed("v86", *flags, training_images)
    checkpoint = epoch_checkpoint(continued)
    assert torch.equal(checkpoint["state_dict"]["module.fc.weight"], start["module.fc.weight"])

    succeed("v107", *extraction(path, tmp_path, "--target-set", "q"), project / "input")
    assert_descriptors(read(tmp_path)["query"], 8)


def test_any_momenta_serve_a_fused_optimizer():
    """Momenta in another memory layout, as the published code's, or missing: the optimizer gets
    them in the layout of the parameter.
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
        v83.initialize_momentum(optimizer, model)
        assert optimizer.state[model.bias]["momentum_buffer"].tolist() == [0, 0, 0, 0]
        model(torch.ones(1, 3, 5, 5)).sum().backward()
        optimizer.step()
        np.testing.assert_allclose(
            model.weight.detach(), weights - 0.1 * (0.9 * momenta + 1), atol=1e-6
        )
        assert optimizer.state[model.weight]["momentum_buffer"].stride() == model.weight.stride()


# ---- skipped steps ----


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace(
    training_images, tmp_path, succeed, monkeypatch, step
):
    """The last step of an epoch is not finite: its checkpoint is bit-identical to the one before,
    and the log counts the step.
    """
    last, before = tmp_path / "train" / "last.pth.tar", {}
    calls, gem = [], v83.gem

    def overflow_in_last_step(x, p):
        calls.append(p)
        if len(calls) == step:
            before.update(load(last))
            return gem(x, p) * torch.inf
        return gem(x, p)

    monkeypatch.setattr(v83, "gem", overflow_in_last_step)
    flags = training(tmp_path, "--sample-size", 4 * step, "--checkpoint-every", 1)
    succeed("v83", *flags, training_images)
    after = epoch_checkpoint(tmp_path)
    for part in ("state_dict", "optimizer", "memory_bank"):
        assert_same(after[part], before[part])
    assert after["memory_bank"]["filled"].item() == 8 * (step - 1)
    groups, momenta = after["optimizer"]["param_groups"], after["optimizer"]["state"].values()
    assert len(momenta) == sum(len(group["params"]) for group in groups)
    assert all(bool(state["momentum_buffer"].any()) == (step > 1) for state in momenta)
    lines = log_lines(tmp_path)[1:]
    assert [line["skipped"] for line in lines] == [0] * (step - 1) + [1]
    assert [line["overflows"] for line in lines] == [0] * step
    assert lines[-1]["loss"] is None


class Training:
    """What train_step needs, for batches of 6 random images; `fused`: SGD as on CUDA."""

    def __init__(self, fused=False, scaler=None, **margins):
        torch.manual_seed(0)
        device = torch.device("cpu")
        self.network = v83.create_model("test_efficientnet", 1.0, 1.0, device).train()
        self.loss_function = v83.MemoryBankContrastiveLoss(64, **margins)
        groups = v83.parameter_groups(self.network, 1e-6)
        self.optimizer = torch.optim.SGD(groups, 0.01, 0.9, fused=fused)
        v83.initialize_momentum(self.optimizer, self.network)
        self.scaler = scaler or v83.create_scaler(False, device)
        self.statistics = v83.BatchNormSnapshot(self.network)
        self.number = 0

    def step(self, spoil=None, labels=(0, 0, 1, 1, 2, 2), scale=1.0):
        """One step, of one image that is NaN if its number is given; returns the logged values."""
        self.number += 1
        images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(self.number))
        if spoil is not None:
            images[spoil, 1, 16, 16] = torch.nan
        values = v83.train_step(
            self.network,
            images.contiguous(memory_format=torch.channels_last),
            torch.tensor(labels),
            self.loss_function,
            self.optimizer,
            self.scaler,
            self.statistics,
            loss_scale=scale,
            amp="off",
        )
        return {name: value.item() for name, value in values.items()}

    def learned(self):
        """Copies of weights and momenta."""
        parameters = list(self.network.parameters())
        momenta = [self.optimizer.state[p]["momentum_buffer"] for p in parameters]
        return [tensor.detach().clone() for tensor in parameters + momenta]

    def kept(self):
        """Copies of BatchNorm's statistics and counters, and of the bank."""
        buffers = [*self.network.buffers(), *self.loss_function.buffers()]
        return [buffer.clone() for buffer in buffers]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("labels", "margins"),
    [((0, 0, 1, 1, 2, 2), {}), (range(10, 16), {"neg_margin": 0.0})],
    ids=["pairs", "no pair costs anything"],
)
def test_an_image_that_is_not_finite_leaves_no_trace(fused, steps_before, labels, margins):
    """In weights, momenta, BatchNorm's statistics and counters, or the bank."""
    training = Training(fused, **margins)
    for _ in range(steps_before):
        assert np.isfinite(training.step()["loss"])
    learned, kept = training.learned(), training.kept()
    values = training.step(spoil=4, labels=labels)
    assert np.isnan(values["loss"])
    assert not values["overflow"]
    assert_same(training.learned(), learned)
    assert_same(training.kept(), kept)
    assert np.isfinite(training.step()["loss"])
    assert not any(torch.equal(new, old) for new, old in zip(training.kept(), kept, strict=True))
    assert all(tensor.isfinite().all() for tensor in training.learned())


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_overflows_is_skipped(fused):
    """Weights and momenta do not change; BatchNorm and the bank do, like in the published code."""
    training = Training(fused)
    training.step()
    learned, kept = training.learned(), training.kept()
    values = training.step(scale=torch.inf)  # of the gradients; the loss is finite
    assert np.isfinite(values["loss"])
    assert training.scaler.get_scale() == 1  # without fp16
    assert_same(training.learned(), learned)
    assert not any(torch.equal(new, old) for new, old in zip(training.kept(), kept, strict=True))
    training.step()
    assert all(tensor.isfinite().all() for tensor in training.learned())
    assert not torch.equal(training.learned()[0], learned[0])


def test_overflows_of_fp16_are_counted():
    """With the scaler of fp16, whose scale falls then; a step that is not finite is no overflow."""
    training = Training(scaler=torch.amp.GradScaler("cpu"))
    assert training.step()["overflow"] == 0
    scale = training.scaler.get_scale()
    assert training.step(scale=torch.inf)["overflow"] == 1
    assert training.scaler.get_scale() == scale / 2
    assert training.step(spoil=0)["overflow"] == 0
    assert training.step()["overflow"] == 0


# ---- several processes ----


def test_one_and_two_processes_learn_the_same(start, training_images, tmp_path):
    """Batch 8 in one process and 4 + 4 in two, BatchNorm in evaluation mode: the same 5 steps."""
    outputs = [tmp_path / "one", tmp_path / "two"]
    flags = ["--no-pretrained", "--epochs", 1, "--batch-size", 8, "--memory-size", 48]
    flags = [*TINY, *flags, training_images]
    for world_size, output in enumerate(outputs, 1):
        argv = ["--output", output, *flags]
        folder = output / "ranks"
        ranks = start("v83", *argv, folder=folder, world_size=world_size, inject=freeze_batchnorm)
        assert set(ranks.wait()) == {0}, ranks.errors()
    said = [  # by each of the two
        [line for line in message.splitlines() if " x " in line] for message in ranks.messages()
    ]
    assert said == [["v83.py: 2 x cpu"], []]
    one, two = (log_lines(output)[1:] for output in outputs)
    assert len(one) == 5
    for expected, line in zip(one, two, strict=True):
        for name in ("loss", "pos_loss", "neg_loss"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5)
        for name in ("pos_pairs", "neg_pairs"):
            assert line[name] == expected[name]
    one, two = (epoch_checkpoint(output) for output in outputs)
    for name, expected in one["state_dict"].items():
        difference = (two["state_dict"][name] - expected).double().norm()
        assert difference <= 1e-5 * expected.double().norm(), name
    one, two = one["memory_bank"], two["memory_bank"]
    assert torch.equal(two["bank_labels"], one["bank_labels"])
    torch.testing.assert_close(two["bank"], one["bank"], rtol=0, atol=1e-5)


def test_extraction_on_two_nodes(start, project, checkpoint, tmp_path):
    """The published flags, with one process on each node."""
    flags = [*TINY, "--mode", "extract", "--weight", checkpoint, "--batch-size", 6]
    flags += ["--target-set", "qrt"]
    one, two = tmp_path / "one", tmp_path / "two"
    url = f"tcp://localhost:{free_port()}"
    nodes = []
    for rank in range(2):
        node = ["--multiprocessing-distributed", "--dist-url", url, "--world-size", 2]
        argv = [*flags, *node, "--rank", rank, "--output", two, project / "input"]
        nodes.append(start("v83", *argv, folder=tmp_path / f"node{rank}"))
    for node in nodes:
        assert node.wait() == [0], node.errors()
    # In a process of its own: descriptors are bit-identical only for the same number of threads.
    alone = start("v83", *flags, "--output", one, project / "input", folder=tmp_path / "alone")
    assert alone.wait() == [0], alone.errors()
    for name in ("fb-isc-submission.h5", "train_feats.npy"):
        assert (two / "extract" / name).read_bytes() == (one / "extract" / name).read_bytes()


def test_a_batch_that_does_not_divide(start, training_images, tmp_path):
    output = tmp_path / "out"
    flags = training(output, "--batch-size", 3)
    line = error_line(start("v83", *flags, training_images, folder=tmp_path, world_size=2))
    assert line.startswith("v83.py: error: --batch-size 3") and "2" in line
    assert_nothing_written(output)


# ---- wrong input ----


def assert_nothing_written(output):
    """Nothing but the file that keeps a second run out of the folder."""
    written = {path.name for path in output.rglob("*") if path.is_file()}
    assert written <= {"lock"}


def refused(result, output, *words):
    """One line that starts with the script's name, exit code 2, nothing written."""
    assert_refused(result, *words)
    start = f"{result.args[0]}.py: error: "
    assert any(line.startswith(start) for line in result.stderr.splitlines()), result.stderr
    assert_nothing_written(output)


@pytest.mark.parametrize("stage", STAGES)
def test_missing_data_folder(tmp_path, call, stage):
    data, output = tmp_path / "nowhere" / "training_images", tmp_path / "out"
    refused(call(stage, *training(output), data), output, tmp_path / "nowhere")


def test_folder_without_images(tmp_path, call):
    folder, output = tmp_path / "training_images", tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    refused(call("v83", *training(output), folder), output, folder)


def test_fewer_images_than_a_batch(training_images, tmp_path, call):
    flags = training(tmp_path, "--sample-size", 3)
    refused(call("v83", *flags, training_images), tmp_path, "3", "--batch-size")


def test_a_bank_smaller_than_a_step(training_images, tmp_path, call):
    flags = training(tmp_path, "--memory-size", 7)
    refused(call("v83", *flags, training_images), tmp_path, "--memory-size", "8 images")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image(tmp_path, training_images, call, workers):
    """The message passes from the data loader worker to stderr, past the progress bar."""
    folder = tmp_path / "training_images"
    folder.mkdir()
    for path in sorted(training_images.iterdir())[:4]:
        shutil.copy(path, folder)
    (folder / "T000002.jpg").write_text("this is no image")
    flags = training(tmp_path / "out", "-j", workers, "--bad-images", "error")
    result = call("v83", *flags, folder)
    assert_refused(result, "v83.py: error: 1 unreadable images", folder / "T000002.jpg")


def test_refusal_by_a_whole_command(tmp_path):
    command = [ROOT / "exp" / "v98.py", *training(tmp_path / "out"), tmp_path / "nowhere"]
    result = run(*command, cwd=tmp_path)
    assert_refused(result, "v98.py: error: ", tmp_path / "nowhere")
    assert result.stdout == ""
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("flag", ["--weight", "--resume"])
def test_a_checkpoint_of_another_architecture(training_images, tmp_path, checkpoint, call, flag):
    flags = training(tmp_path, "-a", "test_resnet", flag, checkpoint)
    refused(call("v83", *flags, training_images), tmp_path, checkpoint)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "text", "truncated", "malicious", "no weights", "a folder"]
)
def test_a_corrupt_checkpoint(project, training_images, tmp_path, checkpoint, call, kind):
    path, output, victim = tmp_path / "checkpoint.pth.tar", tmp_path / "out", tmp_path / "victim"
    contents = {"empty": b"", "text": b"hello", "truncated": checkpoint.read_bytes()[:5000]}
    if kind == "a folder":
        path.mkdir()
    elif kind == "malicious":
        torch.save({"state_dict": Malicious(str(victim))}, path)
    elif kind == "no weights":
        torch.save({"epoch": 3}, path)
    elif kind != "missing":
        path.write_bytes(contents[kind])
    for flag in ("--weight", "--resume"):
        refused(call("v83", *training(output, flag, path), training_images), output, path)
    refused(call("v107", *extraction(path, output), project / "input"), output, path)
    assert not victim.exists()


def test_an_unknown_backbone(training_images, tmp_path, call):
    flags = training(tmp_path, "-a", "efficientnet_of_tomorrow")
    refused(call("v83", *flags, training_images), tmp_path, "efficientnet_of_tomorrow")


def test_imagenet_weights_out_of_reach(training_images, tmp_path, call, monkeypatch):
    create_model = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no route to host")
        return create_model(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    result = call("v83", *SMALL, "--output", tmp_path, training_images)
    refused(result, tmp_path, "test_efficientnet", "--no-pretrained", "--weight")


@pytest.mark.parametrize("target_set", ["", "x", "qx"])
def test_an_unknown_target_set(project, tmp_path, checkpoint, call, target_set):
    flags = extraction(checkpoint, tmp_path, "--target-set", target_set)
    refused(call("v83", *flags, project / "input"), tmp_path, "--target-set")


def test_extraction_without_weights(project, tmp_path, call):
    result = call("v83", *TINY, "--mode", "extract", "--output", tmp_path, project / "input")
    assert_refused(result, "--weight")


def test_duplicate_ids_in_extraction(tmp_path, checkpoint, call):
    folder, output = tmp_path / "query_images", tmp_path / "out"
    folder.mkdir()
    for name in ("Q00000.jpg", "Q00001.jpg", "Q00001.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    result = call("v83", *extraction(checkpoint, output, "--target-set", "q"), tmp_path)
    refused(result, output, tmp_path, "suffix")


@pytest.mark.parametrize("subset", [None, "", "R000001\nR999999\n"])
def test_a_wrong_eval_subset(project, tmp_path, checkpoint, call, subset):
    path, output = tmp_path / "subset.txt", tmp_path / "out"
    if subset is not None:
        path.write_text(subset)
    flags = extraction(checkpoint, output, "--eval-subset", path)
    refused(call("v83", *flags, project / "input"), output, path)


# ---- v107: pairs ----


@pytest.fixture
def pairs_root(project, tmp_path):
    """A copy of the input whose ground truth a test may damage."""
    root = tmp_path / "input"
    root.mkdir()
    for folder in SETS:
        (root / folder).symlink_to(project / "input" / folder)
    write_ground_truth(root / "public_ground_truth.csv")
    return root


def call_v107(call, root, output):
    flags = ["--batch-size", 2, "--num-negatives", 2, "--memory-size", 64, "--epochs", 1]
    flags = [*TINY, *flags, "--no-pretrained", "--output", output]
    return call("v107", *flags, root / "training_images")


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
    path, output = pairs_root / "public_ground_truth.csv", tmp_path / "out"
    path.write_text(WRONG_GROUND_TRUTHS[kind])
    words = {"unknown query": ["Q99999"], "unknown reference": ["R999999"]}.get(kind, [])
    refused(call_v107(call, pairs_root, output), output, path.name, *words)


def test_a_missing_ground_truth(pairs_root, tmp_path, call):
    path, output = pairs_root / "public_ground_truth.csv", tmp_path / "out"
    path.unlink()
    refused(call_v107(call, pairs_root, output), output, path.name)


# ---- samples ----

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def plain_images(project, stage):
    """{the float tensor of an image, as bytes: the image's name} of queries and references,
    preprocessed for extraction.
    """
    plain = stage.evaluation_transform(32, MEAN, STD)
    paths = (project / "input").glob("*_images/[QR]*.jpg")
    return {plain(Image.open(path)).numpy().tobytes(): path.stem for path in paths}


def test_pairs_and_their_negatives(project, training_images):
    """Query and reference have their pair's label; each reference of no pair has a label of its
    own, above those of the pairs.
    """
    dataset = v107.TrainDataset(training_images, 32, 6, 1000000, 0, False)
    preprocess, names = v107.Preprocess(MEAN, STD), plain_images(project, v107)
    paired = {reference for _, reference in PAIRS}
    unpaired = [f"R{i:06d}" for i in range(12) if f"R{i:06d}" not in paired]
    expected = {name: len(PAIRS) + position for position, name in enumerate(unpaired)}
    negatives = {}
    assert len(dataset) == len(PAIRS)
    for epoch in range(10):
        dataset.epoch = epoch
        for i, pair in enumerate(sorted(PAIRS)):
            views, labels = dataset[i]
            assert len(views) == dataset.views_per_sample == 8
            query, reference, *others = (
                names[preprocess.one(view).numpy().tobytes()] for view in views
            )
            assert (query, reference) == pair
            assert labels[:2] == [i, i]
            assert len(set(others)) == 6
            negatives.update(zip(others, labels[2:], strict=True))
    assert negatives == expected


def test_references_as_negatives_of_v98(project, training_images):
    """Two plain references with every sample; labels above those of the images, of which there are
    fewer than references.
    """
    dataset = v98.TrainDataset(training_images, 32, 2, 8, 0, False)
    preprocess, names = v98.Preprocess(MEAN, STD), plain_images(project, v98)
    references = {}
    assert len(dataset) == 8
    for epoch in range(30):
        dataset.epoch = epoch
        views, labels = dataset[3]
        assert len(views) == dataset.views_per_sample == 4
        assert labels[:2] == [3, 3]
        others = [names[preprocess.one(view).numpy().tobytes()] for view in views[2:]]
        assert len(set(others)) == 2
        references.update(zip(others, labels[2:], strict=True))
    assert references == {f"R{i:06d}": 8 + i for i in range(12)}


@pytest.mark.parametrize("stage", [v98, v107], ids=["v98", "v107"])
def test_fast_input_in_training(training_images, stage):
    """Images that are only resized differ from Pillow's by one at most; views of v98's training
    image are identical.
    """
    number = 2 if stage is v98 else 6  # of crops, or negatives
    exact, fast = (  # at 32 pixels, halved, they would be equal
        stage.collate([stage.TrainDataset(training_images, 37, number, 8, 0, fast_input)[3]])
        for fast_input in (False, True)
    )
    assert torch.equal(exact.labels, fast.labels)
    difference = (exact.pixels.int() - fast.pixels.int()).abs().amax(dim=(1, 2, 3))
    resized = exact.labels >= (8 if stage is v98 else 0)
    assert (difference[~resized] == 0).all()
    assert difference[resized].max() == 1
