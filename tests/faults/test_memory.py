"""Memory that putting an extraction together takes."""

from conftest import ROOT, run

PROGRAM = """
import argparse, sys
from pathlib import Path
import numpy as np, torch, v83
number, output = int(sys.argv[1]), Path(sys.argv[2])
paths = np.array([f"../input/reference_images/R{i:07d}.jpg" for i in range(number)])
v83.extraction_sets = lambda args: {"reference": paths}
v83.load_checkpoint = lambda paths, model: None
pixels = torch.zeros(128, 1, 1, 3, dtype=torch.uint8)
v83.load = lambda get, paths, blank, collate, batch: (pixels[: len(batch)], {})
rows = torch.randn(128, 256)
v83.embed = lambda args, model, images: rows[: len(images)]

def create_model(args, device):
    model = torch.nn.Identity()
    model.backbone = argparse.Namespace(default_cfg={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    return model

def peak():
    # Not getrusage's, which begins with what the process that started this one has.
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

v83.create_model, before = create_model, peak()
(output / "weight").touch()
flags = ["--mode", "extract", "--batch-size", "128", "-j", "0", "--output", f"{output}"]
flags += ["--weight", f"{output}/weight"]
assert v83.main([*flags, "data"]) == 0
print((peak() - before) / 1024, peak() / 1024)
"""


def test_assembling(tmp_path, pytestconfig, figure):
    number = 1_000_000 if pytestconfig.getoption("--long") else 200_000
    result = run("-c", PROGRAM, number, tmp_path, cwd=ROOT / "exp")
    assert result.returncode == 0, result.stderr
    more, all_ = map(float, result.stdout.split())
    rows = number * 1024 / 2**20
    assert more <= 1.25 * rows
    figure(
        f"putting {number} descriptors ({rows:.0f} MB) together: {more:.0f} MB more, {all_:.0f} "
        f"MB in all at the peak"
    )
