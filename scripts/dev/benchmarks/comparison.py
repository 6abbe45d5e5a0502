"""What every part of the benchmark has in common: two ways of doing the same work, and how far
their results agree.
"""

import math
import time

import numpy as np

import v83
from benchmarks.inputs import MEAN, STD


class Skipped(Exception):
    """Why a part cannot be measured here."""


class Comparison:
    """A, the published way, and B, this project's, ready to do the same work on the same input.

    Each part of the benchmark is a subclass, in a file of its own.
    """

    # benchmark.py prints these three above the table.
    description: str  # what is compared, on what data, what a case is
    published: str  # what A is
    own: str  # what B is

    unit: str  # what `amount` counts
    cases: dict  # {case's name in the table: the case}
    amount: int  # units of work in one call of A or of B

    def __init__(self, case, photos, folder):
        """Make the input of both ways. photos: paths of JPEGs; folder: a Path for files, which the
        benchmark removes.

        Raises Skipped where this machine cannot run the case.
        """
        raise NotImplementedError

    @classmethod
    def cases_for(cls, process_counts):
        """The cases to measure, as `cases`; process_counts: the numbers of processes of --ranks."""
        return cls.cases

    def baseline(self, number):
        """Do the work in way A, in round `number`; returns a result for `agreement`."""
        raise NotImplementedError

    def ours(self, number):
        """Do the work in way B, in round `number`; returns a result for `agreement`."""
        raise NotImplementedError

    def agreement(self, a, b):
        """How far the last results of A and B agree: {what: a number, numbers, or yes or no}."""
        raise NotImplementedError

    def own_measurement(self, result):
        """(seconds, bytes of memory at the peak) where a result tells them itself, else None: then
        the benchmark measures the call.
        """
        return None

    @staticmethod
    def agreement_of_figures(case, baseline, ours):
        """What else the column "agreement" shows, computed from the Figures of A and B."""
        return {}


def compare(a, b):
    """How far two arrays of numbers are apart: {"identical": True}, or their largest difference."""
    a = np.asarray(a)
    b = np.asarray(b)
    if np.array_equal(a, b):
        return {"identical": True}
    return {"max difference": float(np.abs(a - b).max())}


def compare_images(a, b):
    """How far two lists of normalized images are apart, on a scale where white minus black is 1:
    {"identical": True}, or the share of identical images, the largest difference, and the lowest
    peak signal-to-noise ratio.
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


def compare_descriptors(a, b):
    """How far two lists of descriptors are apart, as arrays and row by row."""
    return compare(a, b) | {"smallest cosine": float((a * b).sum(axis=1).min())}


def preprocess_here(pixels, erasings, amount):
    """Do on the CPU what B leaves to the device, v83.Preprocess.

    Returns the normalized images, and the milliseconds that it took for each of `amount` units.
    """
    preprocess = v83.Preprocess(MEAN, STD)
    start = time.perf_counter()
    images = preprocess(pixels, erasings)
    seconds = time.perf_counter() - start
    return images, 1e3 * seconds / amount
