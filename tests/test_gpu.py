"""What must hold on a GPU. Tests that make sense on a CPU run there too, so that they are known
to work.

`make gpu` runs those that need CUDA and writes the table of memory and speed into gpu-report.md.
"""

import functools
import gc
import json
import sys
import time

import faiss
import h5py
import hubconf
import numpy as np
import pandas as pd
import pytest
import torch

import v83
import v98
import v107
from common import search
from conftest import ROOT, run
from export import SMALL_ARCH, SMALL_SIZE
from stage_process import Run, free_port, load, losses, start_server

ARCH = "tf_efficientnetv2_m"  # of the recipe, with random weights
SMALL = ["-a", "test_efficientnet", "--input-size", 64]
STAGES = {
    "v83": ["--batch-size", 4, "--sample-size", 12],
    "v86": ["--batch-size", 4, "--sample-size", 12],
    "v98": ["--batch-size", 4, "--sample-size", 12],
    "v107": ["--batch-size", 2, "--num-negatives", 4, "--sample-size", 6],
}
no_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device: `make gpu` on one that has"
)
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])
on_cuda = pytest.mark.parametrize("device", [CUDA])
on_both = pytest.mark.parametrize("device", ["cpu", CUDA])


def run_on_gpu(script, *argv, **env):
    """Run a script as a user does, on the first GPU; it must succeed."""
    result = run(ROOT / script, *argv, timeout=900, **{"CUDA_VISIBLE_DEVICES": "0"} | env)
    assert result.returncode == 0, result.stderr


def run_on(device, stage, output, *argv, **env):
    """Run a stage into a folder; on the CPU in a process that has imported it already."""
    argv = ["--output", output, *argv]
    if device == "cpu":
        assert not env
        process = Run(start_server(), stage, *argv, folder=output / "process")
        assert process.wait() == [0], process.errors()
    else:
        run_on_gpu(f"exp/{stage}.py", *argv, **env)


def train(device, stage, data, output, *flags, **env):
    """Train a small network on the device; returns the losses of the log."""
    run_flags = ["--no-pretrained", "--memory-size", 64, "--log-every", 1, "--lr", 0.01, "-j", 1]
    argv = [*SMALL, *run_flags, "--epochs", 1, *STAGES[stage], *flags]
    run_on(device, stage, output, *argv, data / "training_images", **env)
    return [line["loss"] for line in losses(output)]


def extract(device, stage, data, output, weight, *flags):
    """The descriptors of queries and references."""
    argv = [*SMALL, "-j", 1, "--mode", "extract", "--weight", weight, *flags]
    run_on(device, stage, output, *argv, data)
    with h5py.File(output / "extract" / "fb-isc-submission.h5") as file:
        return np.concatenate([file["query"][()], file["reference"][()]])


def cosines(first, second):
    return (first * second).sum(axis=1)


# ---- whole commands ----


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A small network trained on the CPU: its last checkpoint."""
    output = tmp_path_factory.mktemp("trained")
    train("cpu", "v83", data, output)
    return output / "train" / "last.pth.tar"


@pytest.mark.parametrize("amp", ["fp16", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
@on_both
def test_every_stage_trains_three_steps(device, stage, amp, data, tmp_path):
    if device == "cpu" and (amp == "bf16" or stage in ("v86", "v98")):
        pytest.skip("on a CPU --amp changes nothing; other tests train these stages there")
    values = train(device, stage, data, tmp_path, "--amp", amp)
    assert len(values) == 3 and np.isfinite(values).all()
    first = json.loads((tmp_path / "train" / "log.jsonl").read_text().splitlines()[0])
    assert (first["device"] == "cpu") == (device == "cpu")


@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-3), ("fp16", 1e-2), ("bf16", 5e-2)])
@on_cuda
def test_precisions_agree_with_the_cpu(device, amp, tolerance, data, trained, tmp_path):
    """The first loss from the same weights, up to the noise of erasing, and descriptors."""
    weight = ["--weight", trained]
    expected = train("cpu", "v107", data, tmp_path / "cpu", *weight)
    values = train(device, "v107", data, tmp_path / amp, *weight, "--amp", amp)
    assert values[0] == pytest.approx(expected[0], rel=tolerance)
    cpu = extract("cpu", "v83", data, tmp_path / "cpu", trained)
    gpu = extract(device, "v83", data, tmp_path / amp, trained, "--amp", amp)
    assert cosines(cpu, gpu).min() > 1 - tolerance


@on_cuda
def test_resuming_stays_close(device, data, tmp_path):
    """100 steps in one run, and 50 and 50 in two: losses within 1e-3."""
    flags = ["--batch-size", 4, "--sample-size", 40, "--resume", "auto"]
    train(device, "v83", data, tmp_path / "one", *flags, "--epochs", 10)
    for epochs in (5, 10):
        train(device, "v83", data, tmp_path / "two", *flags, "--epochs", epochs)
    one, two = ([line["loss"] for line in losses(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 100 and two == pytest.approx(one, abs=1e-3)


@pytest.mark.parametrize("flags", [[], ["--grad-checkpointing"]], ids=["plain", "checkpointing"])
@on_cuda
def test_no_step_waits_for_the_gpu(device, flags, data, tmp_path):
    """More steps between two lines of the log give no more of torch's warnings about waiting."""
    program = (
        "import sys, torch, v83; torch.cuda.set_sync_debug_mode('warn'); "
        "sys.exit(v83.main(sys.argv[1:]))"
    )
    counts = []
    for number in (16, 32):
        argv = [*SMALL, "--no-pretrained", "--epochs", 1, "--memory-size", 64, "--log-every", 100]
        argv += ["--batch-size", 4, "--sample-size", number, "--output", tmp_path / str(number)]
        environment = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONWARNINGS": "always"}
        argv += [*flags, data / "training_images"]
        result = run("-c", program, *argv, cwd=ROOT / "exp", **environment)
        assert result.returncode == 0, result.stderr
        counts.append(result.stderr.count("synchronizing CUDA operation"))
    assert counts[0] == counts[1] > 0


@on_cuda
def test_gradient_checkpointing_gives_the_same_losses(device, data, tmp_path):
    plain = train(device, "v83", data, tmp_path / "plain", "--amp", "off")
    saved = train(device, "v83", data, tmp_path / "saved", "--amp", "off", "--grad-checkpointing")
    assert saved == pytest.approx(plain, rel=1e-3)
    one, two = (load(tmp_path / name / "train" / "last.pth.tar") for name in ("plain", "saved"))
    for name, counter in one["state_dict"].items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(two["state_dict"][name], counter), name


@on_both
def test_three_scales(device, data, trained, tmp_path):
    """--tta: rows of length 1 that resemble those of one scale."""
    plain = extract(device, "v107", data, tmp_path / "plain", trained)
    scales = extract(device, "v107", data, tmp_path / "scales", trained, "--tta")
    assert np.linalg.norm(scales, axis=1) == pytest.approx(1, abs=1e-3)
    assert np.median(cosines(plain, scales)) > 0.5
    assert not np.allclose(plain, scales)


@on_cuda
def test_two_gpus_learn_as_one(device, data, tmp_path):
    """NCCL and SyncBN: the losses of one process with the whole batch."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    flags = ["--amp", "off", "--batch-size", 8, "--sample-size", 24]
    one = train(device, "v83", data, tmp_path / "one", *flags)
    both = {"CUDA_VISIBLE_DEVICES": "0,1"}
    launched = ["--multiprocessing-distributed", "--dist-url", f"tcp://localhost:{free_port()}"]
    two = train(device, "v83", data, tmp_path / "two", *flags, *launched, **both)
    assert two == pytest.approx(one, rel=1e-3)


# ---- one step ----


class Step:
    """A small network and all that train_step takes, on a device."""

    def __init__(self, device, amp="off", grad_checkpointing=False, scaler=None):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.amp = amp
        self.model = v83.create_model("test_efficientnet", 1.0, 1.0, self.device).train()
        if grad_checkpointing:
            v83.enable_grad_checkpointing(self.model.backbone, "test_efficientnet")
        self.loss_function = v83.MemoryBankContrastiveLoss(64).to(self.device)
        groups = v83.parameter_groups(self.model, 1e-6)
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.SGD(groups, 0.1, 0.9, fused=fused)
        v83.initialize_momentum(self.optimizer, self.model)
        fp16 = amp == "fp16" and device == "cuda"
        self.scaler = scaler or v83.create_scaler(fp16, self.device)
        self.statistics = v83.BatchNormSnapshot(self.model)

    def __call__(self, images, scale=1.0):
        """One update with images (8, 3, 32, 32), two of each label."""
        labels = torch.arange(8, device=self.device) // 2
        images = images.to(self.device, memory_format=torch.channels_last)
        return v83.train_step(
            self.model,
            images,
            labels,
            self.loss_function,
            self.optimizer,
            self.scaler,
            self.statistics,
            loss_scale=scale,
            amp=self.amp,
        )

    def parameters(self):
        """Weights and momenta, one vector."""
        states = self.optimizer.state.values()
        tensors = [*self.model.parameters(), *(state["momentum_buffer"] for state in states)]
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    def others(self):
        """BatchNorm's statistics and the bank, one vector."""
        tensors = [*self.model.buffers(), *self.loss_function.buffers()]
        return torch.cat([tensor.flatten().double() for tensor in tensors])


def images(number):
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
@pytest.mark.parametrize("grad_checkpointing", [False, True])
@on_both
def test_a_row_that_is_not_finite_leaves_no_trace(device, grad_checkpointing, amp):
    if device == "cpu" and amp != "off":
        pytest.skip("on a CPU --amp changes nothing")
    step = Step(device, amp, grad_checkpointing)
    step(images(0))
    before = step.parameters(), step.others()
    poisoned = images(1)
    poisoned[3, 0, 0, 0] = torch.nan
    values = step(poisoned)
    assert not values["loss"].isfinite() and not values["overflow"]
    assert torch.equal(step.parameters(), before[0]) and torch.equal(step.others(), before[1])
    assert step(images(2))["loss"].isfinite()


@on_both
def test_an_overflow_skips_the_update_only(device):
    """Weights and momenta do not change, the scale falls; bank and BatchNorm do change."""
    step = Step(device, scaler=torch.amp.GradScaler(device, init_scale=1e30))
    before = step.parameters(), step.others()
    values = step(images(0), scale=1e30)  # the gradient exceeds float32
    assert values["loss"].isfinite() and values["overflow"]
    assert torch.equal(step.parameters(), before[0])
    assert not torch.equal(step.others(), before[1])
    assert step.loss_function.filled.item() == 8
    assert step.scaler.get_scale() < 1e30


@on_cuda
def test_the_loss_agrees_with_the_cpu(device):
    """On one full bank, to 1e-5, with its gradient."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2256, 64, generator=generator) + 0.5)
    labels = torch.randint(500, (len(rows),), generator=generator)
    results = []
    for place in ("cpu", device):
        criterion = v83.MemoryBankContrastiveLoss(2000, 64).to(place)
        criterion(rows[:2000].to(place), labels[:2000].to(place))
        batch = rows[2000:].to(place).requires_grad_()
        loss = criterion(batch, labels[2000:].to(place))
        loss.backward()
        results.append((loss.item(), batch.grad.cpu()))
    (expected, gradient), (loss, other) = results
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(other, gradient, rtol=0, atol=1e-5)


@on_cuda
def test_preprocessing_agrees_with_the_cpu(device):
    """Up to the noise of erasing: each device draws it from a generator of its own."""
    pixels = torch.randint(256, (4, 9, 7, 3), dtype=torch.uint8)
    box = v83.Erasing(2, 1, 3, 4, seed=5)
    results = []
    for place in ("cpu", device):
        result = v83.Preprocess((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), place)(pixels, [(1, box)])
        assert result.is_contiguous(memory_format=torch.channels_last)
        result[1, :, 2:5, 1:5] = 0
        results.append(result.cpu())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


# ---- search, hub model, match.py ----


@on_cuda
def test_search_on_gpus_agrees_with_the_cpu(device):
    if not getattr(faiss, "get_num_gpus", int)():
        pytest.skip("this faiss has no GPUs: install requirements-gpu.txt")
    rng = np.random.default_rng(0)
    base, queries = (rng.normal(size=(n, 256)).astype(np.float32) for n in (20_000, 500))
    for metric in ("l2", "ip"):
        found = search.flat_search(base, metric, num_gpus=-1)(queries, 10)
        expected = search.flat_search(base, metric, num_gpus=0)(queries, 10)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


@on_cuda
def test_hub_model_in_half_precision(device, figure):
    """Compared with float32; the error is printed, because it has not been measured yet."""
    batch = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    torch.manual_seed(0)
    single, _ = hubconf.isc_ft_v107(pretrained=False, arch=ARCH, input_size=64, device=device)
    torch.manual_seed(0)
    half, _ = hubconf.isc_ft_v107(
        pretrained=False, arch=ARCH, input_size=64, device=device, half=True
    )
    with torch.inference_mode():
        for model in (single, half):
            rows.append(model(batch).float().cpu().numpy())
    figure(f"hubconf in fp16: smallest cosine to fp32 {cosines(*rows).min():.6f}")
    assert cosines(*rows).min() > 0.999


@on_cuda
def test_match_in_half_precision(device, data, tmp_path, figure):
    """Compared with float32; the largest difference of a score is printed."""
    scores = []
    for amp in ("off", "fp16"):
        argv = [data / "query_images", data / "reference_images", "--threshold", -1, "--top-k", 3]
        argv += ["--weight", ROOT / "weights" / "v98.pth.tar", "-a", SMALL_ARCH]
        argv += ["--input-size", SMALL_SIZE, "--amp", amp, "--output", tmp_path / f"{amp}.csv"]
        run_on_gpu("scripts/match.py", *argv, "--cache", tmp_path / f"{amp}.cache")
        rows = pd.read_csv(tmp_path / f"{amp}.csv")
        scores.append(rows.set_index(["query", "reference"])["score"])
    error = (scores[0] - scores[1]).abs().max()  # of the pairs in both
    figure(f"match.py --amp fp16: largest difference of a score {error:.6f}")
    assert error < 0.01


# ---- memory and speed, for docs/PERFORMANCE.md ----


@functools.cache
def measured_step(stage, amp, grad_checkpointing):
    """(GB allocated at the peak, images per second) of a stage's whole batch on this GPU."""
    module = {"v83": v83, "v86": v83, "v98": v98, "v107": v107}[stage]
    images_per_step = 512 if stage == "v107" else 256
    size = {"v83": 256, "v86": 384, "v98": 512, "v107": 512}[stage]
    device = torch.device("cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.backends.cudnn.benchmark = True
    model = module.create_model(ARCH, 1.0, 1.0, device).train()
    if grad_checkpointing:
        module.enable_grad_checkpointing(model.backbone, ARCH)
    memory_size = 1000 if stage == "v107" else 20_000
    loss_function = module.MemoryBankContrastiveLoss(memory_size).to(device)
    optimizer = torch.optim.SGD(module.parameter_groups(model, 1e-6), 0.1, 0.9, fused=True)
    module.initialize_momentum(optimizer, model)
    scaler = module.create_scaler(amp == "fp16", device)
    statistics = module.BatchNormSnapshot(model)
    preprocess = module.Preprocess((0.5,) * 3, (0.5,) * 3, device)
    pixels = torch.randint(256, (images_per_step, size, size, 3), dtype=torch.uint8).pin_memory()
    labels = torch.arange(images_per_step, device=device) // 2

    def step():
        module.train_step(
            model,
            preprocess(pixels),
            labels,
            loss_function,
            optimizer,
            scaler,
            statistics,
            loss_scale=1.0,
            amp=amp,
        )

    for _ in range(3):  # while cuDNN tries its algorithms
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 5
    return torch.cuda.max_memory_allocated() / 1e9, images_per_step / seconds


@on_cuda
def test_memory_and_speed_of_every_stage(device, figure, pytestconfig):
    """The table of docs/PERFORMANCE.md; written to --gpu-report as well. A stage may not fit."""
    name = torch.cuda.get_device_name()
    lines = [f"# {name}, torch {torch.__version__}, Python {sys.version.split()[0]}", ""]
    lines += ["| stage | amp | peak GB | images/s | peak GB, --grad-checkpointing | images/s |"]
    lines += ["|---|---|---|---|---|---|"]
    for stage in STAGES:
        for amp in ("fp16", "bf16"):
            cells = []
            for grad_checkpointing in (False, True):
                try:
                    memory, speed = measured_step(stage, amp, grad_checkpointing)
                    cells += [f"{memory:.1f}", f"{speed:.0f}"]
                except torch.OutOfMemoryError:
                    cells += ["does not fit", "-"]
            lines.append(f"| {stage} | {amp} | {' | '.join(cells)} |")
    for line in lines:
        figure(line)
    report = pytestconfig.getoption("--gpu-report")
    if report:
        with open(report, "a") as file:  # noqa: PTH123
            file.write("\n".join(lines) + "\n\n")
