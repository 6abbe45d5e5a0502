"""Whole commands in processes of their own, as a user starts them: how they end, what is left."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import v83
from conftest import ON_ONE_CORE, assert_refused, called, children
from stage_process import ROOT, TRAINING, train

SCRIPT = ROOT / "exp" / "v83.py"


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.*")}


def test_a_killed_worker_of_several_ends_the_command(data, tmp_path, figure):
    """The others block SIGTERM; the command must not wait for them.

    One that has handed over its last batch of the epoch is not missed: then the next is killed.
    """
    flags = [*TRAINING, "-j", 2, "--epochs", 1000, "--output", tmp_path, data / "training_images"]
    command = [sys.executable, SCRIPT, *flags]
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen(
            list(map(str, command)), env=os.environ | ON_ONE_CORE, stderr=errors
        )
    log, end = tmp_path / "train" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and '"loss"' in log.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    while process.poll() is None:
        assert time.monotonic() < end
        for child in children(process.pid)[:1]:  # between two epochs there is none
            os.kill(child, signal.SIGKILL)
            begin = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
    assert process.returncode == 1
    assert "Traceback" in (tmp_path / "stderr").read_text()
    figure(f"a killed worker of two: the command ended after {time.monotonic() - begin:.1f} s")


@pytest.mark.parametrize("flags", [[], ["--start-over", "--weight", "missing.pth.tar"]])
def test_a_restart_by_torchrun_does_not_undo_a_refusal(start, data, tmp_path, flags, pytestconfig):
    """The second attempt of a refused command is refused as well: the other run stays as it is."""
    if flags and not pytestconfig.getoption("--long"):
        pytest.skip("takes ten seconds; make faults runs it")
    run = train(start, data, tmp_path, "--epochs", 1)
    assert run.wait() == [0], run.errors()
    before = digests(tmp_path / "train")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    argv = [*TRAINING, "--seed", 7, "--epochs", 2, "--output", tmp_path, *flags]
    result = subprocess.run(
        list(map(str, [sys.executable, *torchrun, SCRIPT, *argv, data / "training_images"])),
        env=os.environ | ON_ONE_CORE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    word = "missing.pth.tar" if flags else "--start-over"
    errors = [line for line in result.stderr.splitlines() if "v83.py: error:" in line]
    assert len(errors) == 2 and all(word in line for line in errors), result.stderr
    assert digests(tmp_path / "train") == before


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ([], "use --grad-checkpointing, or more GPUs"),
        (["--grad-checkpointing"], "use more GPUs"),
        (["--mode", "extract", "--weight", "w"], "use a smaller --batch-size"),
    ],
)
def test_a_gpu_out_of_memory_is_one_line(monkeypatch, capfd, tmp_path, flags, remedy):
    def exhaust(args):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(v83, "train", exhaust)
    monkeypatch.setattr(v83, "extract", exhaust)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    result = called(v83.main, [*flags, tmp_path], capfd)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert_refused(result, "v83.py: error: the GPU is out of memory", remedy)
