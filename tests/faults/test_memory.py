"""Memory that putting an extraction together takes."""

from conftest import ROOT, run

PROGRAM = """
import sys
from pathlib import Path
import numpy as np, v83

def peak():
    # Not getrusage's, which begins with what the process that started this one has.
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

number, folder = int(sys.argv[1]), Path(sys.argv[2])
paths = np.array([f"../input/reference_images/R{i:07d}.jpg" for i in range(number)])
whole, rest = folder / "whole.npz", folder / "rest.npz"
rows = np.random.default_rng(0).standard_normal((128, 256), np.float32)
np.savez(whole, rows=rows)
np.savez(rest, rows=rows[: number % 128])
batches = []
for start in range(0, number, 128):  # batches of equal content may share a file
    shard = whole if start + 128 <= number else rest
    batches.append(v83.ExtractionBatch("reference", paths[start : start + 128], shard))
before = peak()
v83.write_files(folder, "", {"reference": paths}, batches, list_zero_rows=False)
print((peak() - before) / 1024, peak() / 1024)
"""


def test_assembling(tmp_path, pytestconfig, figure):
    number = 1_000_000 if pytestconfig.getoption("--long") else 100_000
    result = run("-c", PROGRAM, number, tmp_path, cwd=ROOT / "exp")
    assert result.returncode == 0, result.stderr
    more, all_ = map(float, result.stdout.split())
    rows = number * 1024 / 2**20
    assert (tmp_path / "fb-isc-submission.h5").stat().st_size > number * 1024
    assert more <= 1.25 * rows
    figure(
        f"putting {number} descriptors ({rows:.0f} MB) together: {more:.0f} MB more, {all_:.0f} "
        f"MB in all at the peak"
    )
