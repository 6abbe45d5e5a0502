"""Training with several processes against one."""

import json
import os
import re
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import v83
from benchmarks.comparison import Comparison, Skipped
from benchmarks.measuring import speed_ratios, with_peak
from benchmarks.traces import covered
from common import sample_images

ARCH = "test_resnet"  # of 0.4 million weights
BATCH_SIZE = 16  # of all processes together
IMAGES = 96
VIEWS = 2 * IMAGES  # of an epoch


class Ranks(Comparison):
    """A case is (processes of A, processes of B)."""

    description = (
        "v83's training of a small network on 96 generated images, in batches of 16 of all "
        "processes together. Through torchrun's launcher, one thread a process, by gloo on the "
        "CPU, by nccl where there are GPUs. Times are those of the steps after the first two, by "
        "the log. Communication is the share of time, by a profile of rank 0 in a run of its own, "
        "in which a collective operation was under way, or waited for the others. The losses "
        "differ by BatchNorm, whose statistics are each process's own on a CPU."
    )
    published = "the first number of processes of --ranks"
    own = "another one of --ranks"
    unit = "images"

    @classmethod
    def cases_for(cls, process_counts):
        first, *others = process_counts
        return {f"{first} -> {count}": (first, count) for count in others}

    def __init__(self, case, _photos, folder):
        if torch.cuda.is_available() and torch.cuda.device_count() < max(case):
            raise Skipped(f"needs {max(case)} GPUs, or none: CUDA_VISIBLE_DEVICES=")
        self.amount = VIEWS
        self.processes_a, self.processes_b = case
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        data = self.folder / "training_images"
        data.mkdir()
        for number in range(IMAGES):
            rng = sample_images.generator(0, "training", number)
            sample_images.dead_leaves(rng, 96).save(data / f"T{number:06}.jpg")
        flags = (
            f"-a {ARCH} --input-size 64 --batch-size {BATCH_SIZE} --memory-size 1000 -j 0 "
            f"--no-pretrained --epochs 1 --log-every 2"
        )
        self.argv = [*flags.split(), "--output", str(self.folder), str(data)]

    def baseline(self, _number):
        return self.train(self.processes_a)

    def ours(self, _number):
        return self.train(self.processes_b)

    def train(self, processes, trace=None):
        """Train for an epoch: {"seconds": of an epoch at the speed in the log, "peak": bytes of all
        processes, "loss": the last}. trace: where to write a profile of rank 0, if given.
        """
        # v83 does not overwrite the last run.
        shutil.rmtree(self.folder / "train", ignore_errors=True)
        results = launch(processes, self.folder / "logs", train_rank, self.argv, trace)
        codes = [code for code, _ in results]
        if any(codes):
            raise RuntimeError(f"training ended with {codes}")

        lines = []
        for text in (self.folder / "train" / "log.jsonl").read_text().splitlines():
            line = json.loads(text)
            if "loss" in line:
                lines.append(line)
        seconds = [VIEWS / line["images_per_second"] for line in lines[1:]]
        return {
            "seconds": statistics.mean(seconds),
            "peak": sum(peak for _, peak in results),
            "loss": lines[-1]["loss"],
        }

    def own_measurement(self, result):
        return result["seconds"], result["peak"]

    def agreement(self, a, b):
        trace = self.folder / "trace.json"
        self.train(self.processes_b, trace)
        return {
            "communication %": covered(trace, is_communication),
            "loss difference": abs(a["loss"] - b["loss"]),
        }

    @staticmethod
    def agreement_of_figures(case, baseline, ours):
        """The ratio as a share of that of the numbers of processes."""
        processes_a, processes_b = case
        ideal = processes_b / processes_a
        ratio = statistics.median(speed_ratios(baseline, ours))
        return {"efficiency %": 100 * ratio / ideal}


def launch(processes, logs, function, *args):
    """function(*args) in several processes, as torchrun starts them: a list of their results.

    logs: folder for what they print.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="benchmark",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )
    results = elastic_launch(config, function)(*args)  # {rank: result}
    return list(results.values())


def train_rank(argv, trace):
    """One process of v83's training, on one thread: (exit code, bytes of memory at the peak). Rank
    0 writes a profile of it to `trace`, if given.
    """
    torch.set_num_threads(1)
    train = partial(v83.main, argv)
    if trace is None:
        return with_peak(train)
    with torch.profiler.profile() as profile:
        code, peak = with_peak(train)
    if os.environ["RANK"] == "0":
        profile.export_chrome_trace(str(trace))
    return code, peak


def is_communication(event):
    """Whether an event of a profile is a collective operation."""
    return re.match("gloo:|ncclDevKernel", event["name"])
