"""Training steps on a GPU against the published loop."""

import statistics
import tempfile
from pathlib import Path

import timm
import torch

import v83
from benchmarks.comparison import Comparison, Skipped
from benchmarks.inputs import ARCH, MEAN, STD
from benchmarks.loss import published_loss
from benchmarks.traces import covered

STEPS = 8  # in a call
MEMORY_SIZE = 20_000
LR = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-6
LOSS_SCALE = 1 / 4  # as on the published number of GPUs


class TrainingStep(Comparison):
    """A case is (architecture, pixels, images in a step)."""

    description = (
        "Eight steps in float16, of a batch of noise that is in pinned memory. A case is the "
        "architecture, pixels, images in a step. The device is busy, by a profile of another call, "
        "while it computes or copies."
    )
    published = (
        "floats, NCHW, eager, autocast, pytorch-metric-learning's loss, SGD, the loss read at "
        "every step"
    )
    own = "uint8, v83.Preprocess, v83.train_step, SGD fused, the losses read after the last step"
    unit = "images"
    cases = {"256 x 256 px": (ARCH, 256, 256)}

    def __init__(self, case, _photos, _folder, device="cuda"):
        """device: tests give "cpu", where memory is not pinned and v83 trains in float32."""
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise Skipped("needs a CUDA device")
        torch.backends.cudnn.benchmark = True
        arch, size, images = case
        self.amount = STEPS * images
        batch = make_batch(images, size, device)
        self.own_training = OwnTraining(batch, arch, device)
        self.published_training = PublishedTraining(batch, arch, device)
        self.published_training.model.load_state_dict(self.own_training.model.state_dict())

    def baseline(self, _number):
        return self.published_training.train()

    def ours(self, _number):
        return self.own_training.train()

    def agreement(self, a, b):
        shares = [busy_share(self.published_training.train), busy_share(self.own_training.train)]
        return {"mean loss A, B": [a, b], "device busy % A, B": shares}


def make_batch(images, size, device):
    """A v83.Batch of noise, two views an image, with a box to erase; pinned for a GPU."""
    pixels = torch.randint(256, (images, size, size, 3), dtype=torch.uint8)
    erasing = v83.Erasing(top=0, left=0, height=size // 2, width=size // 2, seed=0)
    labels = torch.arange(images) // 2
    if device.type == "cuda":
        pixels = pixels.pin_memory()
        labels = labels.pin_memory()
    return v83.Batch(pixels, [(1, erasing)], labels)


class PublishedTraining:
    """A: the published loop."""

    def __init__(self, batch, arch, device):
        images = v83.Preprocess(MEAN, STD)(batch.pixels, batch.erasings).contiguous()
        self.images = images.pin_memory() if device.type == "cuda" else images
        self.labels = batch.labels
        self.device = device
        self.model = v83.ISCNet(timm.create_model(arch, features_only=True)).to(device)
        self.loss_function = published_loss(MEMORY_SIZE).to(device)
        groups = v83.parameter_groups(self.model, WEIGHT_DECAY)
        self.optimizer = torch.optim.SGD(groups, LR, MOMENTUM)
        self.scaler = torch.amp.GradScaler(device.type)

    def train(self):
        """Eight steps; returns their mean loss."""
        self.model.train()
        losses = []
        for _ in range(STEPS):
            with torch.autocast(self.device.type):
                embeddings = self.model(self.images.to(self.device))
            loss = self.loss_function(embeddings.float(), self.labels.to(self.device))
            self.scaler.scale(loss * LOSS_SCALE).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return statistics.mean(losses)


class OwnTraining:
    """B: the loop of v83."""

    def __init__(self, batch, arch, device):
        on_gpu = device.type == "cuda"
        self.batch = batch
        self.device = device
        self.model = v83.create_model(arch, 1.0, 1.0, device)
        self.preprocess = v83.Preprocess(MEAN, STD, device)
        self.loss_function = v83.MemoryBankContrastiveLoss(MEMORY_SIZE).to(device)
        groups = v83.parameter_groups(self.model, WEIGHT_DECAY)
        self.optimizer = torch.optim.SGD(groups, LR, MOMENTUM, fused=on_gpu)
        v83.initialize_momentum(self.optimizer, self.model)
        self.scaler = v83.create_scaler(on_gpu, device)
        self.batchnorm = v83.BatchNormSnapshot(self.model)

    def train(self):
        """Eight steps; returns their mean loss."""
        self.model.train()
        losses = []
        for _ in range(STEPS):
            values = v83.train_step(
                self.model,
                self.preprocess(self.batch.pixels, self.batch.erasings),
                self.batch.labels.to(self.device, non_blocking=True),
                self.loss_function,
                self.optimizer,
                self.scaler,
                self.batchnorm,
                loss_scale=LOSS_SCALE,
                amp="fp16",
            )
            losses.append(values["loss"])
        return torch.stack(losses).mean().item()


def busy_share(function):
    """Percentage of the time of a call during which the device computes or copies."""
    with torch.profiler.profile() as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return covered(trace, is_on_device)


def is_on_device(event):
    """Whether an event of a profile is the device computing or copying."""
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
