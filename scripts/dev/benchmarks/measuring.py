"""Times and peak memory of a comparison's A and B, each measured in a process of its own."""

import ctypes
import multiprocessing
import os
import re
import statistics
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import faiss
import torch

from benchmarks.comparison import Skipped


class PartFailed(Exception):
    """The process that measured a part ended without a result."""


@dataclass
class Figures:
    """What was measured of A or of B."""

    amount: int  # units of work in a call
    seconds: list = field(default_factory=list)  # of each round after the warm-up
    peak: float | None = None  # bytes of memory that a call needs

    @property
    def per_second(self):
        """Units of work in a second, in the median round."""
        return self.amount / statistics.median(self.seconds)


def speed_ratios(baseline, ours):
    """How many times as fast B was as A in each round, from the Figures of both."""
    return [a / b for a, b in zip(baseline.seconds, ours.seconds, strict=True)]


def measure_case(name, part, label, case, photos, folder, rounds):
    """One row of the table as a dict of JSON values: a part, at one of its cases."""
    inputs = (part, case, photos, folder)
    try:
        baseline, ours, agreement = in_a_process(compare_speed, *inputs, rounds)
        if ours.peak is None:  # the part does not measure it itself
            baseline.peak = in_a_process(peak_of, "baseline", *inputs)
            ours.peak = in_a_process(peak_of, "ours", *inputs)
    except Skipped as reason:
        return {"part": name, "case": label, "unit": part.unit, "skipped": str(reason)}

    ratios = speed_ratios(baseline, ours)
    return {
        "part": name,
        "case": label,
        "unit": part.unit,
        "seconds": {"baseline": baseline.seconds, "ours": ours.seconds},
        "baseline_per_second": baseline.per_second,
        "ours_per_second": ours.per_second,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "agreement": {**agreement, **part.agreement_of_figures(case, baseline, ours)},
        "baseline_peak_mb": baseline.peak / 1e6,
        "ours_peak_mb": ours.peak / 1e6,
    }


def compare_speed(part, case, photos, folder, rounds):
    """Run A and B in turn, once to warm up, then `rounds` times.

    Returns the Figures of A, those of B, and how far their results agree.
    """
    comparison = set_up(part, case, photos, folder)
    baseline = Figures(comparison.amount)
    ours = Figures(comparison.amount)
    # The warm-up is round 0; what is measured in it is thrown away.
    run_timed(comparison, comparison.baseline, 0, Figures(comparison.amount))
    run_timed(comparison, comparison.ours, 0, Figures(comparison.amount))
    for number in range(1, rounds + 1):
        result_a = run_timed(comparison, comparison.baseline, number, baseline)
        result_b = run_timed(comparison, comparison.ours, number, ours)
    return baseline, ours, comparison.agreement(result_a, result_b)


def run_timed(comparison, way, number, figures):
    """Run one way, a method of the comparison, in round `number`; add its time to its Figures, and
    the peak of memory where its result tells it. Returns the result.
    """
    start = time.perf_counter()
    result = way(number)
    seconds = time.perf_counter() - start
    own_measurement = comparison.own_measurement(result)
    if own_measurement is not None:
        seconds, figures.peak = own_measurement
    figures.seconds.append(seconds)
    return result


def peak_of(side, part, case, photos, folder):
    """Bytes that A ("baseline") or B ("ours") needs at its peak for one call."""
    comparison = set_up(part, case, photos, folder)
    way = getattr(comparison, side)
    _, peak = with_peak(partial(way, 0))
    return peak


def set_up(part, case, photos, folder):
    """The comparison of a case, to be run on one CPU thread."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    cv2.setNumThreads(0)
    return part(case, photos, folder)


# ---- peak memory ----


def with_peak(function):
    """(function(), bytes that it needed at its peak beyond those in use before): of the GPU's
    memory if this process uses one.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return result, torch.cuda.max_memory_allocated() - before

    # Give memory that was freed back to the system: the function could use it again unnoticed.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use now
    before = process_memory("VmRSS")
    result = function()
    return result, process_memory("VmHWM") - before


def process_memory(name):
    """A line of /proc/self/status in bytes: VmRSS, what is in use, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    kilobytes = re.search(rf"{name}:\s+(\d+)", status)[1]
    return 1024 * int(kilobytes)


# ---- processes ----


def in_a_process(function, *args):
    """function(*args), computed in a process of its own. Raises Skipped as the function does, and
    PartFailed where the process ends in another way.
    """
    # Forking is safe here: this process has only imported, it has no threads and uses no GPU.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise PartFailed(
            f"a process ended with exit code {process.exitcode}; its message is above"
        ) from None
    process.join()
    if isinstance(result, Skipped):
        raise result
    return result


def send_result(sender, function, args):
    """Send function(*args), or the Skipped that it raises; its progress bars are not shown."""
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            result = function(*args)
    except Skipped as reason:
        result = reason
    except torch.OutOfMemoryError:
        result = Skipped("needs a GPU of more memory")
    sender.send(result)
