"""What only a GPU can show: mixed precision, channels-last, extraction in half precision. Skipped
without one.
"""

import json

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
FLAGS = ["-a", "test_efficientnet", "--input-size", 64, "--batch-size", 8, "-j", 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """32 training, 8 query and 8 reference images."""
    root, rng = tmp_path_factory.mktemp("input"), np.random.default_rng(0)
    for folder, count in {"training_images": 32, "query_images": 8, "reference_images": 8}.items():
        (root / folder).mkdir()
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((96, 72)).save(root / folder / f"{folder[0].upper()}{i:05d}.jpg")
    return root


def train(data, output, amp, device):
    """The losses of 4 steps."""
    flags = [
        *FLAGS,
        "--no-pretrained",
        "--epochs",
        1,
        "--memory-size",
        64,
        "--log-every",
        1,
        "--lr",
        0.01,
    ]
    script, training = ROOT / "exp" / "v83.py", data / "training_images"
    result = run(
        script, *flags, "--amp", amp, "--output", output, training, CUDA_VISIBLE_DEVICES=device
    )
    assert result.returncode == 0, result.stderr
    return [
        json.loads(line)["loss"]
        for line in (output / "train" / "log.jsonl").read_text().splitlines()[1:]
    ]


def extract(data, output, checkpoint, amp, device):
    """The descriptors of queries and references."""
    flags = [*FLAGS, "--mode", "extract", "--weight", checkpoint, "--amp", amp, "--output", output]
    result = run(ROOT / "exp" / "v83.py", *flags, data, CUDA_VISIBLE_DEVICES=device)
    assert result.returncode == 0, result.stderr
    with h5py.File(output / "extract" / "fb-isc-submission.h5") as file:
        return np.concatenate([file["query"][()], file["reference"][()]])


@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-3), ("fp16", 1e-2), ("bf16", 5e-2)])
def test_precisions_agree_with_the_cpu(data, tmp_path, amp, tolerance):
    expected = train(data, tmp_path / "cpu", "off", "")
    losses = train(data, tmp_path / amp, amp, "0")
    assert losses[0] == pytest.approx(expected[0], rel=tolerance)
    assert np.isfinite(losses).all()
    checkpoint = tmp_path / "cpu" / "train" / "checkpoint_0000.pth.tar"
    cpu = extract(data, tmp_path / "cpu", checkpoint, "off", "")
    gpu = extract(data, tmp_path / amp, checkpoint, amp, "0")
    assert (cpu * gpu).sum(axis=1).min() > 1 - tolerance


def test_resuming_stays_close(data, tmp_path):
    """Two epochs in one run, and one and another in two: losses within 1e-3."""
    flags = [
        *FLAGS,
        "--no-pretrained",
        "--memory-size",
        64,
        "--log-every",
        1,
        "--lr",
        0.01,
        "--resume",
        "auto",
    ]
    for output, epochs in (("one", [2]), ("two", [1, 2])):
        for number in epochs:
            command = [
                ROOT / "exp" / "v83.py",
                *flags,
                "--epochs",
                number,
                "--output",
                tmp_path / output,
            ]
            result = run(*command, data / "training_images", CUDA_VISIBLE_DEVICES="0")
            assert result.returncode == 0, result.stderr
    one, two = (
        [
            line["loss"]
            for line in map(json.loads, (tmp_path / output / "train" / "log.jsonl").open())
            if "loss" in line
        ]
        for output in ("one", "two")
    )
    assert len(one) == 8 and two == pytest.approx(one, abs=1e-3)


def test_no_step_waits_for_the_device(data, tmp_path):
    """By torch's own warnings: twice as many steps, between two lines of the log, give no more of
    them.
    """
    program = (
        "import sys, torch, v83; torch.cuda.set_sync_debug_mode('warn'); "
        "sys.exit(v83.main(sys.argv[1:]))"
    )
    flags, counts = (
        [*FLAGS, "--no-pretrained", "--epochs", 1, "--memory-size", 64, "--log-every", 100],
        [],
    )
    for number in (16, 32):
        command = [
            "-c",
            program,
            *flags,
            "--sample-size",
            number,
            "--output",
            tmp_path / str(number),
        ]
        environment = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONWARNINGS": "always"}
        result = run(*command, data / "training_images", cwd=ROOT / "exp", **environment)
        assert result.returncode == 0, result.stderr
        counts.append(result.stderr.count("synchronizing CUDA operation"))
    assert counts[0] == counts[1] > 0
