"""Memory that putting an extraction together takes."""

from conftest import ROOT, run

PROGRAM = """
import resource, sys
from pathlib import Path
import numpy as np, torch, v83
number, output = int(sys.argv[1]), Path(sys.argv[2])
paths = np.array([f"../input/reference_images/R{i:07d}.jpg" for i in range(number)])
v83.extraction_sets = lambda args: {"reference": paths}
v83.create_model = lambda args, device: torch.nn.Identity()
v83.load_checkpoint = lambda paths, model: None

def describe(args, paths, shards, model, device):
    rows = np.random.default_rng(0).standard_normal((args.batch_size, 256)).astype(np.float32)
    for batch, shard in shards.items():
        np.savez(shard, rows=rows[: len(batch)])
    return []

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

v83.describe, before = describe, peak()
(output / "weight").touch()
flags = ["--mode", "extract", "--batch-size", "128", "--weight", str(output / "weight"), "--output", str(output)]
assert v83.main([*flags, "data"]) == 0
print((peak() - before) / 1024, peak() / 1024)
"""


def test_assembling(tmp_path, pytestconfig, figure):
    number = 1_000_000 if pytestconfig.getoption("--long") else 200_000
    result = run("-c", PROGRAM, number, tmp_path, cwd=ROOT / "exp")
    assert result.returncode == 0, result.stderr
    more, all_ = map(float, result.stdout.split())
    rows = number * 1024 / 2**20
    assert more <= 0.5 * rows
    figure(
        f"putting {number} descriptors ({rows:.0f} MB) together: {more:.0f} MB more, {all_:.0f} MB in all at the peak"
    )
