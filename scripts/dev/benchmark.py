"""How fast each part is, against the published way of doing it, in the same run: what `make
benchmark` runs.

    python scripts/dev/benchmark.py  # everything, at most 10 minutes on two cores
    python scripts/dev/benchmark.py loss search --rounds 9  # some parts, more often
    python scripts/dev/benchmark.py augmentation --photos ~/Pictures --json figures.json

A is the published way, written plainly, B is what this project's scripts do: see each part's
description. After a warm-up both run by turns: `ratio` is the median over the rounds of A's
time divided by B's, beside its minimum and maximum; A/s and B/s are units per second in the median
round. Peak memory is what A or B alone adds, in a process of its own, to what the process has
before. All on one CPU thread; a GPU is used where there is one (by training-step, whose peak is the
GPU's, the searches, and ranks). The photographs are mosaics of those inside scikit-image and
scikit-learn, 1024 x 768, JPEG of quality 90.
"""

import argparse
import ctypes
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / name) for name in ("exp", "scripts")]

# Looking for a GPU must not spoil CUDA for the processes that are forked later.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler says that there is no GPU, and more

import faiss
import numpy as np
import onnxruntime
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from faiss.contrib import exhaustive_search
from PIL import Image
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torchvision import transforms

import export
import published_augmentation
import v83
from common import descriptors as common_descriptors
from common import evaluation as common_evaluation
from common import sample_images
from common import search as common_search
from common.errors import InputError

MEAN = (0.5, 0.5, 0.5)  # as timm gives them for the recipe's backbone
STD = (0.5, 0.5, 0.5)
PHOTOS = 16  # photographs, at most: as many pairs or images are made in a round
ARCH = "tf_efficientnetv2_m"
SMALL_ARCH = "test_resnet"  # what `ranks` trains, of 0.4 million weights
BATCH = 16  # images in a step of `ranks`


class Skipped(Exception):
    """Why a part cannot be measured here."""


class Pair(NamedTuple):
    """A and B, ready to run on the same input.

    amount: units that one call does; baseline, ours: A and B, which take the number of the round
    and return a result; agreement: (A's last result, B's) -> {what: number, numbers or yes/no};
    measured: result -> (seconds, bytes at the peak), where those of the call say nothing.
    """

    amount: int
    baseline: Callable
    ours: Callable
    agreement: Callable
    measured: Callable | None = None


@dataclass(frozen=True)
class Part:
    """One comparison, at several sizes; the docstring of `setup` says what A and B are."""

    setup: Callable  # (case, photos) -> Pair
    unit: str
    cases: dict  # {how the table calls it: case}
    derived: Callable | None = None  # (row of the table, case) -> more agreement

    @property
    def name(self):
        return self.setup.__name__.replace("_", "-")


# ---- agreement ----


def compare(a, b):
    """How far two arrays of numbers are apart: {"identical": True}, or their largest difference."""
    a = np.asarray(a)
    b = np.asarray(b)
    if np.array_equal(a, b):
        return {"identical": True}
    return {"max difference": float(np.abs(a - b).max())}


def compare_images(a, b):
    """The same of lists of normalized images, where 1 is white; with the share of identical images
    and the least peak signal-to-noise ratio.
    """
    a = np.stack(a) * STD[0]
    b = np.stack(b) * STD[0]
    error = np.square(a - b).mean(axis=(1, 2, 3))
    if not error.any():
        return {"identical": True}
    return {
        "identical %": 100 * float((error == 0).mean()),
        **compare(a, b),
        "PSNR dB": -10 * math.log10(error.max()),
    }


def preprocess_here(pixels, erasings, amount):
    """What B leaves to the device, done by this CPU: (images, {"left to the device, ms here": for
    each of `amount` units}).
    """
    preprocess = v83.Preprocess(MEAN, STD)
    start = time.perf_counter()
    images = preprocess(pixels, erasings)
    seconds = time.perf_counter() - start
    return images, {"left to the device, ms here": 1e3 * seconds / amount}


def descriptors(n):
    """Unit rows (n, 256) float32 with a direction in common: cosine 0.38 on average, above 0.5 for
    0.1% of pairs.
    """
    common = F.normalize(torch.randn(1, 256))
    own = F.normalize(torch.randn(n, 256))
    return F.normalize(0.38**0.5 * common + 0.62**0.5 * own)


# ---- augmentation ----


def augmentation(size, photos):
    """A batch of both views of v83 of each photograph, from its file; the same seeds for A and B,
    others in each round.

    A: published_augmentation.py: AugLy and torchvision on PIL images, to a batch of floats
    B: v83.TrainDataset, v83.collate: uint8, for v83.Preprocess on the device
    """
    folder = Path(photos[0]).parent
    dataset = v83.TrainDataset(folder, size, ncrops=2, sample_size=len(photos), seed=0)
    paths = dataset.paths.tolist()
    recipe = published_augmentation.RECIPES["v83"]
    moderate = published_augmentation.moderate_augmentation(size, MEAN, STD)
    hard = published_augmentation.hard_augmentation(recipe, size, MEAN, STD, paths)
    kept_a = []  # pixels of all rounds
    kept_b = []

    def baseline(number):
        views = []
        for i, path in enumerate(paths):
            v83.seed_generators(0, number, i)
            image = published_augmentation.open_image(path)
            views += [moderate(image), hard(image)]
        batch = torch.stack(views)
        kept_a.append(sample_hard(batch))
        return batch

    def ours(number):
        dataset.epoch = number
        batch = v83.collate([dataset[i] for i in range(len(dataset))])
        kept_b.append(batch)
        return batch

    def sample_hard(images):
        """One of 64 pixels of the hard views in a batch of floats, from 0 to 1."""
        return images[1::2, :, ::8, ::8].flatten(1) / 2 + 0.5

    def agreement(a, b):
        """How near views of equal seeds are; mean and deviation of all hard views' pixels."""
        images, rest = preprocess_here(b.pixels, b.erasings, len(photos))
        found = {}
        for name, value in compare_images(a[::2], images[::2]).items():
            found[f"moderate {name}"] = value
        ratios = compare_hard(size, paths)
        found["hard PSNR dB, quarter, median"] = np.percentile(ratios, [25, 50]).tolist()

        samples_b = []
        for batch in kept_b:
            images, _ = preprocess_here(batch.pixels, batch.erasings, len(photos))
            samples_b.append(sample_hard(images))
        pixels = np.stack([torch.cat(kept_a), torch.cat(samples_b)])
        means = pixels.mean(axis=2)
        found["hard mean A, B"] = means.mean(axis=1).tolist()
        found["each +-"] = float(means.std() / means.shape[1] ** 0.5)
        found["hard deviation A, B"] = pixels.std(axis=2).mean(axis=1).tolist()
        return found | rest

    return Pair(len(photos), baseline, ours, agreement)


def compare_hard(size, paths):
    """Peak signal-to-noise ratio of v83's hard view to the published one of the same draws, before
    erasing, for each image.

    Where pixels are shuffled it is low: each has a pattern of its own.
    """
    recipe = published_augmentation.RECIPES["v83"]
    published = published_augmentation.hard_image(recipe, size, paths)
    ours = v83.hard_view(size, paths)
    ratios = []
    for number, path in enumerate(paths):
        v83.seed_generators(0, number)
        expected = np.array(published(published_augmentation.open_image(path)), float)
        v83.seed_generators(0, number)
        found = ours(v83.read_pixels(path)).pixels
        error = np.square(found - expected).mean()
        ratios.append(10 * math.log10(255**2 / max(error, 1e-3)))
    return ratios


# ---- training ----


def loss(sizes, _photos):
    """Forward and backward on the CPU, of two views an image, against a full bank, of which they
    take the same place.

    A: pytorch-metric-learning's CrossBatchMemory(ContrastiveLoss(0, 1))
    B: v83.MemoryBankContrastiveLoss
    """
    rows, memory = sizes
    torch.manual_seed(0)
    images = descriptors((memory + rows) // 2)
    others = F.normalize(images + 0.5 * F.normalize(torch.randn_like(images)))
    views = torch.stack([images, others], dim=1).flatten(0, 1)
    labels = torch.arange(len(views)) // 2
    published = CrossBatchMemory(ContrastiveLoss(pos_margin=0, neg_margin=1), 256, memory)
    published.embedding_memory[:], published.label_memory[:] = views[:memory], labels[:memory]
    published.has_been_filled = True
    ours = v83.MemoryBankContrastiveLoss(memory)
    ours.bank[:], ours.bank_labels[:] = views[:memory], labels[:memory]
    ours.filled.fill_(memory)

    def step(criterion, _number):
        published.queue_idx = 0
        ours.cursor.zero_()
        batch = views[memory:].clone().requires_grad_()
        value = criterion(batch, labels[memory:])
        value.backward()
        return value.item(), batch.grad

    def agreement(a, b):
        loss_a, gradient_a = a
        loss_b, gradient_b = b
        active = views[memory:] @ views[:memory].T > 0.5
        return {
            "loss difference": abs(loss_a - loss_b),
            "gradient difference": (gradient_a - gradient_b).abs().max().item(),
            "of at most": gradient_a.abs().max().item(),
            "active negatives %": 100 * active.float().mean().item(),
        }

    return Pair(rows, partial(step, published), partial(step, ours), agreement)


def training_step(case, _photos):
    """Eight steps in float16, of a batch of noise that is in pinned memory. case: architecture,
    pixels, images a step.

    The device is busy, by a profile of another call, while it computes or copies.

    A: floats, NCHW, eager, autocast, pytorch-metric-learning's loss, SGD, the loss read at every
    step
    B: uint8, v83.Preprocess, v83.train_step, SGD fused, the losses read after the last step
    """
    if not torch.cuda.is_available():
        raise Skipped("needs a CUDA device")
    torch.backends.cudnn.benchmark = True
    return training_steps(*case, torch.device("cuda"))


def training_steps(arch, size, images, device):
    """The same on any device; a CPU has no pinned memory, and v83 no float16 there."""
    steps = 8
    memory_size = 20_000
    lr, momentum, weight_decay = 0.01, 0.9, 1e-6
    scale = 1 / 4  # of the loss, by the published number of GPUs
    batch = v83.Batch(
        torch.randint(256, (images, size, size, 3), dtype=torch.uint8),
        [(1, v83.Erasing(0, 0, size // 2, size // 2, seed=0))],
        torch.arange(images) // 2,
    )
    floats = v83.Preprocess(MEAN, STD)(batch.pixels, batch.erasings).contiguous()
    if device.type == "cuda":
        batch = v83.Batch(batch.pixels.pin_memory(), batch.erasings, batch.labels.pin_memory())
        floats = floats.pin_memory()

    ours = v83.create_model(arch, 1.0, 1.0, device)
    published = v83.ISCNet(timm.create_model(arch, features_only=True)).to(device)
    published.load_state_dict(ours.state_dict())
    published_loss = CrossBatchMemory(
        ContrastiveLoss(pos_margin=0, neg_margin=1), 256, memory_size
    ).to(device)
    published_optimizer = torch.optim.SGD(
        v83.parameter_groups(published, weight_decay), lr, momentum
    )
    published_scaler = torch.amp.GradScaler(device.type)

    preprocess = v83.Preprocess(MEAN, STD, device)
    loss_function = v83.MemoryBankContrastiveLoss(memory_size).to(device)
    groups = v83.parameter_groups(ours, weight_decay)
    optimizer = torch.optim.SGD(groups, lr, momentum, fused=device.type == "cuda")
    v83.initialize_momentum(optimizer, ours)
    scaler = v83.create_scaler(device.type == "cuda", device)
    batchnorm = v83.BatchNormSnapshot(ours)

    def baseline(_number):
        published.train()
        losses = []
        for _ in range(steps):
            with torch.autocast(device.type):
                embeddings = published(floats.to(device))
            value = published_loss(embeddings.float(), batch.labels.to(device))
            published_scaler.scale(value * scale).backward()
            published_scaler.step(published_optimizer)
            published_scaler.update()
            published_optimizer.zero_grad()
            losses.append(value.item())
        return statistics.mean(losses)

    def train_steps(_number):
        ours.train()
        losses = []
        for _ in range(steps):
            inputs = preprocess(batch.pixels, batch.erasings)
            labels = batch.labels.to(device, non_blocking=True)
            values = v83.train_step(
                ours,
                inputs,
                labels,
                loss_function,
                optimizer,
                scaler,
                batchnorm,
                loss_scale=scale,
                amp="fp16",
            )
            losses.append(values["loss"])
        return torch.stack(losses).mean().item()

    def busy(function):
        with torch.profiler.profile() as profile:
            function(0)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(trace))
            return covered(trace, is_on_device)

    def agreement(a, b):
        shares = [busy(baseline), busy(train_steps)]
        return {"mean loss A, B": [a, b], "device busy % A, B": shares}

    return Pair(steps * images, baseline, train_steps, agreement)


def is_on_device(event):
    """Whether an event of a profile is the device computing or copying."""
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")


# ---- extraction ----


def extraction_input(case, photos):
    """From file to a batch of the network's input. case: size, whether as --fast-input has it.

    A: PIL open, Resize, ToTensor, Normalize, to a batch of floats
    B: v83.load_images, to a batch of uint8, for v83.Preprocess on the device
    """
    size, fast_input = case
    published = transforms.Compose(
        [
            published_augmentation.open_image,
            transforms.Resize((size, size)),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def baseline(_number):
        return torch.stack([published(path) for path in photos])

    def ours(_number):
        pixels, unreadable = v83.load_images(photos, size, fast_input)
        assert not unreadable
        return pixels

    def agreement(a, b):
        images, rest = preprocess_here(b, [], len(photos))
        return compare_images(a, images) | rest

    return Pair(len(photos), baseline, ours, agreement)


def random_network(arch, size):
    """A network of random weights, and two images of noise, whose statistics BatchNorm has: with
    others, activations of random weights explode."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size)
    model = v83.ISCNet(timm.create_model(arch, features_only=True))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1
    with torch.no_grad():
        model(images)
    return model.eval().requires_grad_(False), images


def compare_descriptors(a, b):
    """How far two lists of descriptors are apart, as arrays and row by row."""
    return compare(a, b) | {"smallest cosine": float((a * b).sum(axis=1).min())}


def extraction_model(sizes, _photos):
    """Descriptors of two images of noise by a network of random weights, float32 on the CPU.

    A: eager, NCHW
    B: v83.create_model, v83.embed
    """
    published, images = random_network(*sizes)
    model = v83.create_model(sizes[0], 1.0, 1.0, torch.device("cpu"))
    model.load_state_dict(published.state_dict())
    model.eval()

    @torch.inference_mode()
    def baseline(_number):
        return published(images).numpy()

    @torch.inference_mode()
    def ours(_number):
        channels_last = images.to(memory_format=torch.channels_last)
        return v83.embed(model, channels_last, amp="off").numpy()

    return Pair(len(images), baseline, ours, compare_descriptors)


def extraction_onnx(sizes, _photos):
    """The same descriptors by another runtime.

    A: eager, NCHW
    B: the file of export.to_onnx, by onnxruntime
    """
    published, images = random_network(*sizes)
    config = {
        "input": "images",
        "output": "descriptors",
        "dim": 256,
        "size": "fixed",
        "precision": "fp32",
    }
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of the exporter about itself
        exported = export.to_onnx(published, config, images)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])

    def baseline(_number):
        with torch.inference_mode():
            return published(images).numpy()

    def ours(_number):
        return session.run(None, {"images": images.numpy()})[0]

    return Pair(len(images), baseline, ours, compare_descriptors)


# ---- evaluation and post-processing ----


def published_evaluation(found, query_ids, reference_ids, truth):
    """Candidates row by row, and the metrics as loops over a sorted list: (csv, average precision,
    recall at 90%).
    """
    # Of Python objects: every query against every row of the truth.
    known = np.isin(query_ids, truth["query_id"])
    assert known.all()
    pairs = (
        (query_ids[q], reference_ids[r], -distance) for distance, q, r in zip(*found, strict=True)
    )
    candidates = pd.DataFrame(pairs, columns=["query_id", "reference_id", "score"])
    positives = {(q, r) for q, r in zip(truth["query_id"], truth["reference_id"], strict=True) if r}
    ranked = sorted(
        (-row.score, (row.query_id, row.reference_id) in positives)
        for row in candidates.itertuples()
    )
    right = 0
    average_precision = 0.0
    recall_p90 = 0.0
    for rank, (_, correct) in enumerate(ranked, start=1):
        right += correct
        average_precision += correct * right / rank / len(positives)
        if right / rank >= 0.9:
            recall_p90 = right / len(positives)
    return candidates.to_csv(index=False), average_precision, recall_p90


def evaluation(queries, _photos):
    """Given 10 pairs a query, a fifth of the queries being copies: the csv of candidates and the
    scores.

    A: isin of Python objects, the table row by row, loops over a sorted list
    B: common_evaluation.known_queries, match (without its search), micro_metrics
    """
    rng = np.random.default_rng(0)
    query_ids = np.char.add("Q", np.char.zfill(np.arange(queries).astype(str), 5))
    reference_ids = np.char.add("R", np.char.zfill(np.arange(20_000).astype(str), 6))
    nearest = np.sort(
        (rng.integers(20_000, size=(queries, 1)) + 997 * np.arange(10)) % 20_000, axis=1
    )
    distances = rng.uniform(0.5, 2, size=nearest.shape).astype(np.float32)
    copies = np.flatnonzero(rng.random(queries) < 0.2)
    place = rng.integers(10, size=len(copies))
    distances[copies, place] *= 0.5
    truth = pd.DataFrame({"query_id": query_ids, "reference_id": ""})
    truth.loc[copies, "reference_id"] = reference_ids[nearest[copies, place]]
    found = distances.ravel(), np.repeat(np.arange(queries), 10), nearest.ravel()
    ranked = tuple(column[np.argsort(found[0], kind="stable")] for column in found)

    def ours(_number):
        known = common_evaluation.known_queries(
            common_evaluation.as_text(query_ids.astype("S")), truth, "h5", "csv"
        )
        # In place of the search, its result.
        with mock.patch.object(common_evaluation, "nearest_pairs", lambda *_: ranked):
            candidates = common_evaluation.match(
                None, None, query_ids[known], reference_ids, len(ranked[0])
            )
        metrics = common_evaluation.micro_metrics(candidates, truth)
        return candidates.to_csv(index=False), *metrics.values()

    def baseline(_number):
        return published_evaluation(found, query_ids.tolist(), reference_ids.tolist(), truth)

    def agreement(a, b):
        return {
            "csv identical": a[0] == b[0],
            "score difference": float(np.abs(np.subtract(a[1:], b[1:])).max()),
        }

    return Pair(queries, baseline, ours, agreement)


def search(n, _photos):
    """The 10 nearest of n descriptors to some of them, by inner product.

    A: faiss.IndexFlatIP.search
    B: common_search.nearest
    """
    torch.manual_seed(0)
    base = descriptors(n).numpy()
    queries = base[: 2 * common_search.BLOCK]
    index = faiss.IndexFlatIP(base.shape[1])
    if faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(base)

    def agreement(a, b):
        return {"equal indices %": 100 * float((a[1] == b[1]).mean()), **compare(a[0], b[0])}

    def ours(_number):
        return common_search.nearest(queries, base, 10, "ip")

    return Pair(len(queries), lambda _: index.search(queries, 10), ours, agreement)


def evaluation_search(n, _photos):
    """The 10 q nearest pairs, over all queries together, of q = 4096 queries and n references.

    A: faiss's exhaustive range search, whose radius shrinks as results come in; sorted and cut
    B: common_evaluation.nearest_pairs
    """
    torch.manual_seed(0)
    rows = descriptors(n + 4096).numpy()
    queries, references = rows[:4096], rows[4096:]
    number, index = 10 * len(queries), faiss.IndexFlatL2(rows.shape[1])
    index.add(references)

    def baseline(_number):
        batches = exhaustive_search.exponential_query_iterator(queries)
        found = exhaustive_search.range_search_max_results(
            index, batches, 1e10, min_results=number, ngpu=-1
        )
        _, limits, distance, column = found
        row = np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64)))
        nearest = np.argsort(distance, kind="stable")[:number]
        return distance[nearest], row[nearest], column[nearest]

    def ours(_number):
        return common_evaluation.nearest_pairs(queries, references, number)

    def agreement(a, b):
        pairs = [set(zip(*found[1:], strict=True)) for found in (a, b)]
        return {"pairs in common %": 100 * len(pairs[0] & pairs[1]) / number, **compare(a[0], b[0])}

    return Pair(len(queries), baseline, ours, agreement)


def database_augmentation(n, _photos):
    """Given each descriptor's 10 nearest: random ones, as the sum does not care.

    A: (train[indices] * (similarity**3)[..., None]).sum(axis=1), L2-normalized, as whole arrays
    B: common_descriptors.database_augmentation (without its search)
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    train = descriptors(n).numpy()
    indices = rng.integers(n, size=(n, 10))
    similarity = rng.uniform(0.3, 1, size=(n, 10)).astype(np.float32)

    def sums():
        return (train[indices] * (similarity**3)[..., None]).sum(axis=1)

    def baseline(_number):
        augmented = sums()
        return augmented / np.linalg.norm(augmented, axis=1, keepdims=True)

    def ours(_number):
        # In place of the search, its result.
        with mock.patch.object(common_descriptors, "nearest", lambda *_: (similarity, indices)):
            return common_descriptors.database_augmentation(train)

    def agreement(a, b):
        own = common_search.neighbor_sum(train, indices, similarity**3)
        return {"sums identical": np.array_equal(sums(), own), **compare(a, b)}

    return Pair(n, baseline, ours, agreement)


# ---- ranks ----


def train_rank(argv, trace):
    """What each process does: v83's training, on one thread; rank 0 writes a profile of it to
    `trace`, if given.
    """
    torch.set_num_threads(1)
    with torch.profiler.profile() if trace else nullcontext() as profile:
        code, peak = with_peak(lambda: v83.main(argv))
    if trace and os.environ["RANK"] == "0":
        profile.export_chrome_trace(str(trace))
    return code, peak


def covered(trace, chosen):
    """Percentage of the time between the first and the last step of a trace that the chosen events
    cover.
    """
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if "dur" in event]
    steps = []
    for event in events:
        on_device = event.get("cat") == "gpu_user_annotation"  # when the device did the same
        if event["name"].startswith("Optimizer.step") and not on_device:
            steps.append(event)
    start = steps[0]["ts"]
    end = steps[-1]["ts"]
    total = 0
    reached = start
    for event in sorted(events, key=lambda event: event["ts"]):
        if chosen(event):
            last = min(event["ts"] + event["dur"], end)
            total += max(0, last - max(event["ts"], reached))
            reached = max(reached, last)
    return 100 * total / (end - start)


def is_communication(event):
    return re.match("gloo:|ncclDevKernel", event["name"])


def ranks(counts, _photos):
    """v83's training of a small network on 96 generated images, in batches of 16 of all processes
    together.

    Through torchrun's launcher, one thread a process, by gloo on the CPU, by nccl where there are
    GPUs. Communication is the share of time, by a profile of rank 0 in a run of its own, in which a
    collective operation was under way, or waited for the others. The losses differ by BatchNorm,
    whose statistics are each process's own on a CPU.

    A: the first number of processes of --ranks
    B: another one of --ranks
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < max(counts):
        raise Skipped(f"needs {max(counts)} GPUs, or none: CUDA_VISIBLE_DEVICES=")
    folder = Path(tempfile.mkdtemp())
    data = folder / "training_images"
    data.mkdir()
    for i in range(96):
        image = sample_images.dead_leaves(sample_images.generator(0, "training", i), 96)
        image.save(data / f"T{i:06}.jpg")
    flags = (
        f"-a {SMALL_ARCH} --input-size 64 --batch-size {BATCH} --memory-size 1000 -j 0 "
        f"--no-pretrained --epochs 1"
    )
    argv = [*flags.split(), "--log-every", "2", "--output", str(folder), str(data)]

    def run(count, _number, trace=None):
        """As torchrun would; the time is that of the steps after the first two, by the log."""
        shutil.rmtree(folder / "train", ignore_errors=True)  # v83 would not overwrite the last run
        logs = DefaultLogsSpecs(str(folder / "logs"), redirects=Std.ALL)
        options = {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "max_restarts": 0,
            "start_method": "fork",
        }
        config = LaunchConfig(1, 1, count, run_id="benchmark", logs_specs=logs, **options)
        results = elastic_launch(config, train_rank)(argv, trace)
        codes, peaks = zip(*results.values(), strict=True)
        if any(codes):
            raise RuntimeError(f"training ended with {codes}")
        lines = []
        for text in (folder / "train" / "log.jsonl").read_text().splitlines():
            line = json.loads(text)
            if "loss" in line:
                lines.append(line)
        seconds = statistics.mean(2 * 96 / line["images_per_second"] for line in lines[1:])
        return {"seconds": seconds, "peak": sum(peaks), "loss": lines[-1]["loss"]}

    def agreement(a, b):
        run(counts[1], 0, folder / "trace.json")
        share = covered(folder / "trace.json", is_communication)
        return {"communication %": share, "loss difference": abs(a["loss"] - b["loss"])}

    def measured(result):
        return result["seconds"], result["peak"]

    return Pair(2 * 96, partial(run, counts[0]), partial(run, counts[1]), agreement, measured)


def at_a_million(row, n):
    """Peak memory for a million rows, beyond the 1.02 GB that they are, by that for n."""
    return {
        "GB at 1,000,000 rows A, B": [
            row[f"{side}_peak_mb"] * 1e3 / n for side in ("baseline", "ours")
        ]
    }


def efficiency(row, counts):
    """The ratio as a share of that of the numbers of processes."""
    return {"efficiency %": 100 * row["ratio"]["median"] * counts[0] / counts[1]}


# ---- measuring ----


def memory(what):
    """A line of /proc/self/status, in bytes: VmRSS, or VmHWM, its peak."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def with_peak(function):
    """(function(), bytes that it needed at its peak beyond those already there): of the GPU, if it
    is in use.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return function(), torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what setting up has freed would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    return function(), memory("VmHWM") - before


def set_up(part, case, photos):
    """The pair, to be run on one thread."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if cv2 := sys.modules.get("cv2"):
        cv2.setNumThreads(0)
    return part.setup(case, photos)


def measure(part, case, photos, rounds):
    """Warm up, run A and B by turns: times, their ratios, agreement."""
    pair = set_up(part, case, photos)
    seconds = {"baseline": [], "ours": []}
    results = {}
    for number in range(rounds + 1):
        for side in seconds:
            start = time.perf_counter()
            results[side] = getattr(pair, side)(number)
            elapsed = time.perf_counter() - start
            if pair.measured:
                elapsed, _ = pair.measured(results[side])
            if number > 0:  # the first is the warm-up
                seconds[side].append(elapsed)
    ratios = [a / b for a, b in zip(seconds["baseline"], seconds["ours"], strict=True)]
    per_second = {
        f"{side}_per_second": pair.amount / statistics.median(times)
        for side, times in seconds.items()
    }
    ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    peaks = {
        f"{side}_peak_mb": pair.measured(result)[1] / 1e6
        for side, result in results.items()
        if pair.measured
    }
    return {
        "seconds": seconds,
        **per_second,
        "ratio": ratio,
        "agreement": pair.agreement(*results.values()),
        **peaks,
    }


def peak_mb(part, case, photos, side):
    """Megabytes that A or B needs at its peak for one call."""
    pair = set_up(part, case, photos)
    return with_peak(partial(getattr(pair, side), 0))[1] / 1e6


def answer(sender, function, args):
    """In a process of its own: send function(*args), or why it is skipped, without its progress
    bars.
    """
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            result = function(*args)
    except Skipped as reason:
        result = reason
    except torch.OutOfMemoryError:
        result = Skipped("needs a GPU of more memory")
    sender.send(result)


def alone(function, *args):
    """function(*args), computed in a process of its own."""
    # This process has only imported: it has no threads, nor used a GPU.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(
            f"a process ended with {process.exitcode}; its message is above"
        ) from None
    process.join()
    if isinstance(result, Skipped):
        raise result
    return result


def record(part, label, case, photos, rounds):
    """Everything about one row of the table, as JSON knows it."""
    row = {"part": part.name, "case": label, "unit": part.unit}
    try:
        row |= alone(measure, part, case, photos, rounds)
        if "ours_peak_mb" not in row:
            row |= {
                f"{side}_peak_mb": alone(peak_mb, part, case, photos, side)
                for side in ("baseline", "ours")
            }
    except Skipped as reason:
        return row | {"skipped": str(reason)}
    if part.derived:
        row["agreement"] |= part.derived(row, case)
    return row


# ---- table ----

COLUMNS = "{:21} {:13} {:8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>8} {:>8}  {}"
HEADER = COLUMNS.format(
    "part", "case", "unit", "A/s", "B/s", "ratio", "min", "max", "A MB", "B MB", "agreement"
)


def text(value):
    """A number with three digits, several of them, or yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(text(item) for item in value)
    return f"{value:.3g}"


def line(row):
    """A row of the table."""
    if "skipped" in row:
        return COLUMNS.format(
            row["part"], row["case"], row["unit"], *"-------", f"skipped: {row['skipped']}"
        )
    speed = [f"{row[f'{side}_per_second']:.1f}" for side in ("baseline", "ours")]
    ratio = [f"{row['ratio'][which]:.2f}" for which in ("median", "min", "max")]
    peaks = [f"{row[f'{side}_peak_mb']:.1f}" for side in ("baseline", "ours")]
    agreement = "; ".join(f"{key} {text(value)}" for key, value in row["agreement"].items())
    return COLUMNS.format(row["part"], row["case"], row["unit"], *speed, *ratio, *peaks, agreement)


# ---- main ----

PARTS = [
    Part(augmentation, "pairs", {"256 px": 256, "384 px": 384, "512 px": 512}),
    Part(loss, "images", {"256 x 20000": (256, 20_000), "512 x 20000": (512, 20_000)}),
    Part(training_step, "images", {"256 x 256 px": (ARCH, 256, 256)}),
    Part(extraction_input, "images", {"512 px": (512, False), "512 px, fast": (512, True)}),
    Part(extraction_model, "images", {"2 x 512 px": (ARCH, 512)}),
    Part(extraction_onnx, "images", {"2 x 512 px": (ARCH, 512)}),
    Part(evaluation, "queries", {"8000 x 10": 8_000}),
    Part(search, "queries", {"8192 x 20000": 20_000}),
    Part(evaluation_search, "queries", {"4096 x 20000": 20_000}),
    Part(database_augmentation, "rows", {"50000": 50_000}, derived=at_a_million),
    Part(ranks, "images", {}, derived=efficiency),  # its cases are those of --ranks
]


def make_photos(folder):
    """Photographs of 1024 x 768: mosaics of tiles of the embedded ones at their own resolution.
    Returns their paths.
    """
    tiles = sample_images.embedded_tiles(256)
    paths = []
    for number, rng in enumerate(np.random.default_rng(0).spawn(PHOTOS)):
        mosaic = Image.new("RGB", (1024, 768))
        for place, choice in enumerate(rng.choice(len(tiles), 12, replace=False).tolist()):
            tile = sample_images.open_embedded(tiles[choice].path, 256).crop(tiles[choice].box)
            mosaic.paste(tile, (256 * (place % 4), 256 * (place // 4)))
        paths.append(str(folder / f"{number}.jpg"))
        mosaic.save(paths[-1], quality=90)
    return paths


def divisors(words):
    """An argparse type: two or more numbers of processes, separated by commas, that the batch can
    be divided among.
    """
    numbers = [int(word) for word in words.split(",")]
    if len(numbers) < 2 or min(numbers) < 1 or any(BATCH % number for number in numbers):
        raise ValueError(words)
    return numbers


def parse_args(argv=None):
    """The command line; exits with code 2 and one line where it makes no sense."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    parts = f"which to measure, of {', '.join(names)} (default: all)"
    add("parts", nargs="*", metavar="PART", help=parts)
    rounds = "how often A and B run after the warm-up (default: %(default)s)"
    add("--rounds", type=int, default=5, help=rounds)
    photos = f"use the first {PHOTOS} images in DIR, as they are"
    add("--photos", type=Path, metavar="DIR", help=photos)
    ranks = f"numbers of processes to compare, divisors of {BATCH} (default: %(default)s)"
    add("--ranks", type=divisors, default="1,2", help=ranks)
    add("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts) - set(names))
    if unknown:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(names)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    if not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory is read from /proc, which only Linux has")
    return args


def benchmark(args, machine, folder):
    """Measure the parts that `args` names on this `machine` and print the table as it grows;
    returns its rows.
    """
    if args.photos:
        photos = v83.list_images(args.photos)[:PHOTOS].tolist()
        for path in photos:
            v83.open_image(path)  # raises InputError where that is none
    else:
        photos = make_photos(folder)
    kilobytes = statistics.mean(Path(path).stat().st_size for path in photos) / 1e3
    parts = [part for part in PARTS if part.name in args.parts or not args.parts]
    print(f"{machine}\n{len(photos)} photographs of {kilobytes:.0f} kB\n")
    for part in parts:
        print(f"{part.name}: {inspect.getdoc(part.setup)}\n".replace("\n\nA: ", "\nA: "))
    print(HEADER, flush=True)
    rows = []
    for part in parts:
        first, *others = args.ranks
        cases = part.cases or {f"{first} -> {count}": (first, count) for count in others}
        for label, case in cases.items():
            rows.append(record(part, label, case, photos, args.rounds))
            print(line(rows[-1]), flush=True)
    return rows


def main(argv=None):
    """Run the benchmark; returns the exit code: 2 for input that cannot be used, 1 where a part
    failed.
    """
    args = parse_args(argv)
    gpu = "no GPU"
    if torch.cuda.is_available():
        gpu = alone(torch.cuda.get_device_name)  # which begins to use the GPU
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, faiss, np)]
    machine = ", ".join(
        [f"{os.cpu_count()} cores", gpu, f"Python {platform.python_version()}", *versions]
    )
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(tempfile, "tempdir", folder),
        ):
            rows = benchmark(args, machine, Path(folder))
        if args.json:
            figures = {"machine": machine, "rounds": args.rounds, "rows": rows}
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
    except (v83.InputError, InputError, OSError) as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ChildProcessError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
