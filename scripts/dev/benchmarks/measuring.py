"""Times and peak memory of a comparison's A and B, each measured in a process of its own."""

import ctypes
import multiprocessing
import os
import re
import statistics
import time
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import cv2
import faiss
import torch

from benchmarks.comparison import Skipped

SIDES = ("baseline", "ours")  # A and B, in figures and as methods of a Comparison


class PartFailed(Exception):
    """The process that measured a part ended without a result."""


def measure_case(name, part, label, case, photos, rounds):
    """One row of the table as a dict of JSON values: a part, at one of its cases."""
    row = {"part": name, "case": label, "unit": part.unit}
    try:
        row |= in_a_process(compare_speed, part, case, photos, rounds)
        if "ours_peak_mb" not in row:
            for side in SIDES:
                row[f"{side}_peak_mb"] = in_a_process(peak_mb, part, case, photos, side)
    except Skipped as reason:
        row["skipped"] = str(reason)
        return row
    row["agreement"] |= part.agreement_of_row(row, case)
    return row


def compare_speed(part, case, photos, rounds):
    """Run A and B in turn, once to warm up, then `rounds` times: times, ratios, agreement."""
    comparison = set_up(part, case, photos)
    seconds = {side: [] for side in SIDES}
    results = {}
    peaks = {}
    for number in range(rounds + 1):
        for side in SIDES:
            run = getattr(comparison, side)
            start = time.perf_counter()
            results[side] = run(number)
            elapsed = time.perf_counter() - start
            own_measurement = comparison.own_measurement(results[side])
            if own_measurement is not None:
                elapsed, peak = own_measurement
                peaks[f"{side}_peak_mb"] = peak / 1e6
            warming_up = number == 0
            if not warming_up:
                seconds[side].append(elapsed)

    ratios = [a / b for a, b in zip(seconds["baseline"], seconds["ours"], strict=True)]
    return {
        "seconds": seconds,
        "baseline_per_second": comparison.amount / statistics.median(seconds["baseline"]),
        "ours_per_second": comparison.amount / statistics.median(seconds["ours"]),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "agreement": comparison.agreement(results["baseline"], results["ours"]),
        **peaks,
    }


def peak_mb(part, case, photos, side):
    """Megabytes that A or B needs at its peak for one call."""
    comparison = set_up(part, case, photos)
    run = getattr(comparison, side)
    _, peak = with_peak(partial(run, 0))
    return peak / 1e6


def set_up(part, case, photos):
    """The comparison of a case, to be run on one CPU thread."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    cv2.setNumThreads(0)
    return part(case, photos)


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
