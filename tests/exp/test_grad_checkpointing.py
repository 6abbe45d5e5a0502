"""--grad-checkpointing: less memory, bit-identical training."""

import math

import pytest
import torch

import v83
from conftest import assert_refused, called
from stage_process import assert_same, load, log_lines

# In both, the backward pass runs some BatchNorm layers again, and others not.
ARCHS = ["test_byobnet", "tf_efficientnetv2_b0"]


def training(data, output, arch, *flags):
    """The command line of one epoch: ten steps of four images in two views."""
    argv = ["-a", arch, "--input-size", 64, "--batch-size", 4, "--memory-size", 64, "-j", 0]
    argv += ["--no-pretrained", "--epochs", 1, "--log-every", 1, "--output", output]
    return [*argv, *flags, data / "training_images"]


def assert_same_training(outputs):
    """The same weights, BatchNorm statistics and counters, momenta, bank and logged losses; returns
    the losses of the steps.
    """
    expected, found = (load(output / "train" / "last.pth.tar") for output in outputs)
    assert any(name.endswith("running_var") for name in expected["state_dict"])
    assert any(name.endswith("num_batches_tracked") for name in expected["state_dict"])
    for part in ("state_dict", "optimizer", "memory_bank"):
        assert_same(found[part], expected[part])
    losses = []
    for output in outputs:
        losses.append([line["loss"] for line in log_lines(output) if "loss" in line])
    assert losses[1] == losses[0]
    assert len(losses[0]) == 10
    return losses[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_fewer_activations_are_kept(arch):
    kept = []
    for checkpointing in (False, True):
        model = v83.create_model(arch, 1.0, 1.0, torch.device("cpu")).train()
        if checkpointing:
            v83.enable_grad_checkpointing(model.backbone, arch)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randn(4, 3, 64, 64))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("bad_step", [None, 5])
@pytest.mark.parametrize("arch", ARCHS)
def test_ten_steps_are_bit_identical(data, tmp_path, capfd, monkeypatch, arch, bad_step):
    """Also where one of them is not finite and so is skipped."""
    gem = v83.gem
    outputs = [tmp_path / "without", tmp_path / "with"]
    for output, flags in zip(outputs, ([], ["--grad-checkpointing"]), strict=True):
        steps = []

        def spoiled_once(x, p, steps=steps):
            steps.append(p)
            return gem(x, p) * (math.nan if len(steps) == bad_step else 1)

        monkeypatch.setattr(v83, "gem", spoiled_once)
        result = called(v83.main, training(data, output, arch, *flags), capfd)
        assert result.returncode == 0, result.stderr
        assert len(steps) == 10
    losses = assert_same_training(outputs)
    left_out = [step for step, loss in enumerate(losses, 1) if loss is None]
    assert left_out == ([] if bad_step is None else [bad_step])


def test_two_processes_are_bit_identical(start, data, tmp_path):
    outputs = [tmp_path / "without", tmp_path / "with"]
    for output, flags in zip(outputs, ([], ["--grad-checkpointing"]), strict=True):
        argv = training(data, output, "test_byobnet", *flags)
        run = start("v83", *argv, folder=output / "ranks", world_size=2)
        assert run.wait() == [0, 0], run.errors()
    assert_same_training(outputs)


def test_a_backbone_that_cannot(data, tmp_path, capfd):
    argv = training(data, tmp_path, "test_vit", "--input-size", 160, "--grad-checkpointing")
    result = called(v83.main, argv, capfd)
    assert_refused(result, "v83.py: error: --grad-checkpointing", "test_vit")
    assert not list(tmp_path.rglob("*.pth.tar"))
