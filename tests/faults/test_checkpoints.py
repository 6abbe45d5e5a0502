"""Checkpoints: what they hold, full disks, damaged and foreign files, files that would run code,
diverging runs.
"""

import argparse
import contextlib
import hashlib
import os
import pickle
import shutil

import h5py
import pytest
import torch

import v83
from stage_process import (
    NETWORK,
    assert_same,
    assert_same_run,
    digests,
    error_line,
    load,
    log_lines,
    train,
)


@pytest.fixture
def trained(undisturbed, tmp_path):
    """A copy of a finished run, to spoil."""
    shutil.copytree(undisturbed[1] / "train", tmp_path / "train")
    return tmp_path


@pytest.fixture
def halfway(start, data, tmp_path):
    """A run that was killed in the middle of its second epoch."""
    run = train(start, data, tmp_path, hold=15 * 8)
    run.wait_for_images(15 * 8)
    run.kill()
    assert 0 < load(tmp_path / "train" / "last.pth.tar")["step"] < 10
    return tmp_path


# ---- contents ----


def test_contents_in_the_middle_of_an_epoch(halfway):
    checkpoint = load(halfway / "train" / "last.pth.tar")
    assert (checkpoint["epoch"], checkpoint["seed"], checkpoint["world_size"]) == (1, 9, 1)
    assert checkpoint["step"] % 3 == 0
    assert checkpoint["memory_bank"]["filled"] == 64
    assert checkpoint["memory_bank"]["cursor"] == (10 + checkpoint["step"]) * 8 % 64
    assert checkpoint["versions"]["torch"] in torch.__version__
    assert (
        isinstance(checkpoint["args"], argparse.Namespace)
        and checkpoint["args"].arch == "test_efficientnet"
    )
    names = "\n".join(f"T{i:06d}.jpg" for i in range(40))
    assert checkpoint["files"] == hashlib.sha256(names.encode()).hexdigest()


# ---- a full disk ----


def test_a_full_disk_leaves_the_checkpoint(start, data, trained):
    before = digests(trained / "train")
    flags = ["--resume", "auto", "--epochs", 4]
    line = error_line(train(start, data, trained, *flags, RLIMIT_FSIZE=500_000))
    assert str(trained / "train" / "last.pth.tar") in line and "File too large" in line
    size = int(line.partition("its ")[2].split()[0])
    assert 0.9 < size / (trained / "train" / "last.pth.tar").stat().st_size < 1.1
    assert digests(trained / "train") == before
    assert not list((trained / "train").glob("unfinished*"))
    assert train(start, data, trained, *flags).wait() == [0]


def test_a_full_disk_leaves_what_is_extracted(start, data, trained):
    argv = [
        *NETWORK,
        "--mode",
        "extract",
        "--weight",
        trained / "train" / "last.pth.tar",
        "--batch-size",
        3,
    ]
    argv += ["--target-set", "qrt", "--output", trained, data]
    line = error_line(start("v83", *argv, folder=trained / "ranks", RLIMIT_FSIZE=2_000))
    assert str(trained) in line and "File too large" in line
    run = start("v83", *argv, folder=trained / "ranks", RLIMIT_FSIZE=40_000)
    line = error_line(run)
    assert str(trained / "extract" / "train_feats.npy") in line and str(40 * 1024 + 128) in line
    assert [path.name for path in (trained / "extract").glob("*.*")] == ["fb-isc-submission.h5"]
    images = run.images()
    again = start("v83", *argv, folder=trained / "ranks")
    assert again.wait() == [0]
    assert again.images() == images  # not one was computed again
    with h5py.File(trained / "extract" / "fb-isc-submission.h5") as file:
        assert file["query"].shape == (9, 256)


def test_a_full_disk_is_noticed_before_writing(tmp_path):
    """HDF5 ends the process by a segmentation fault where it meets a full disk."""
    (tmp_path / "old.h5").write_bytes(b"old")
    size = 10**18  # more than any disk has
    with pytest.raises(v83.InputError, match=rf"old\.h5: its {size} bytes cannot be written"):
        v83.save_atomically(tmp_path / "old.h5", None, size)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


# ---- damage ----


def damage(path, kind):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}[kind]
    )


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty"])
def test_a_damaged_latest_checkpoint(start, data, undisturbed, halfway, kind):
    """It is named in a warning; the one before it is continued."""
    last = halfway / "train" / "last.pth.tar"
    damage(last, kind)
    run = train(start, data, halfway, "--resume", "auto")
    assert run.wait() == [0]
    (line,) = [line for line in run.errors().splitlines() if "warning:" in line]
    assert str(last) in line
    assert log_lines(halfway)[0]["epoch"] == 0 and [
        line["epoch"] for line in log_lines(halfway) if "args" in line
    ] == [
        0,
        1,
    ]
    assert_same_run(halfway, undisturbed[1])


def test_nothing_but_damaged_checkpoints(start, data, halfway):
    """Never a silent start from zero."""
    for path in (halfway / "train").glob("*.tar"):
        damage(path, "flipped")
    before = digests(halfway / "train")
    line = error_line(train(start, data, halfway, "--resume", "auto"))
    assert "checkpoint_0000.pth.tar" in line
    assert digests(halfway / "train") == before


def test_auto_starts_where_there_is_nothing(start, data, undisturbed, tmp_path):
    assert train(start, data, tmp_path, "--resume", "auto").wait() == [0]
    assert_same_run(tmp_path, undisturbed[1])


def test_auto_at_the_end_has_nothing_to_do(start, data, trained):
    """It says so, and leaves every file as it is, but for the lock."""
    before = digests(trained / "train")
    run = train(start, data, trained, "--resume", "auto")
    assert run.wait() == [0]
    assert run.images() == 0
    assert f"{trained / 'train'}: nothing is left to train, --epochs is 3" in run.errors()
    assert digests(trained / "train") == before


@pytest.mark.parametrize(
    ("flags", "word"), [(["--seed", 10], "seed"), (["--batch-size", 5], "batch_size")]
)
def test_a_changed_run_in_the_middle_of_an_epoch(start, data, halfway, flags, word):
    assert word in error_line(train(start, data, halfway, "--resume", "auto", *flags))


def test_another_memory_size(start, data, trained):
    line = error_line(
        train(start, data, trained, "--resume", "auto", "--epochs", 4, "--memory-size", 32)
    )
    assert "was written with --memory-size 64, not 32" in line


def test_another_network(start, data, trained):
    flags = ["--resume", "auto", "--epochs", 4, "-a", "test_vit"]
    line = error_line(train(start, data, trained, *flags))
    assert "--arch" in line and "last.pth.tar" in line


def test_bare_weights(start, data, trained, tmp_path):
    """Of a checkpoint without anything else: they serve as such, and do not continue a run."""
    path = tmp_path / "weights.pth"
    torch.save(load(trained / "train" / "last.pth.tar")["state_dict"], path)
    line = error_line(train(start, data, tmp_path / "out", "--resume", path))
    assert f"start from them with --weight {path}" in line
    run = train(start, data, tmp_path / "out", "--weight", path, "--lr", 0, "--epochs", 1)
    assert run.wait() == [0], run.errors()
    weights = load(tmp_path / "out" / "train" / "last.pth.tar")["state_dict"]
    assert torch.equal(weights["module.fc.weight"], load(path)["module.fc.weight"])


def test_a_checkpoint_of_the_former_code(start, data, trained, tmp_path):
    """Between two epochs it is continued as one of today's, and its weights are taken."""
    content = load(trained / "train" / "last.pth.tar")
    for name in ("scaler", "skipped_in_a_row", "unlogged", "bad_images"):
        del content[name]
    former = {"source": "import torch", "skipped": 0, "history": torch.zeros(0, 5), "bad": []}
    path = tmp_path / "former.pth.tar"
    torch.save(content | former, path)
    results = []
    for name, checkpoint in (("today", trained / "train" / "last.pth.tar"), ("former", path)):
        output = tmp_path / name
        run = train(start, data, output, "--resume", checkpoint, "--epochs", 4)
        assert run.wait() == [0], run.errors()
        results.append(load(output / "train" / "checkpoint_0003.pth.tar"))
    for part in ("state_dict", "optimizer", "memory_bank"):
        assert_same(results[1][part], results[0][part])
    run = train(start, data, tmp_path / "weight", "--weight", path, "--lr", 0, "--epochs", 1)
    assert run.wait() == [0], run.errors()
    weights = load(tmp_path / "weight" / "train" / "last.pth.tar")["state_dict"]
    assert torch.equal(weights["module.fc.weight"], content["state_dict"]["module.fc.weight"])


def test_changed_images(start, data, trained, tmp_path):
    """Labels in the bank are positions in the list of files."""
    shutil.copytree(data, tmp_path / "input")
    (tmp_path / "input" / "training_images" / "T000003.jpg").unlink()
    line = error_line(train(start, tmp_path / "input", trained, "--resume", "auto", "--epochs", 4))
    assert "files" in line


def test_another_seed_between_two_epochs(start, data, trained):
    """As the published second run of v83 has it."""
    run = train(start, data, trained, "--epochs", 4, "--seed", 90, "--resume", "auto")
    assert run.wait() == [0], run.errors()
    assert load(trained / "train" / "last.pth.tar")["seed"] == 90


# ---- files that would run code ----


class Malicious:
    """Calls os.system when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", ["state_dict", "args", "optimizer"])
def test_a_file_cannot_run_code(start, data, trained, tmp_path, form, place):
    path, canary = tmp_path / "untrusted.pth.tar", tmp_path / "canary"
    content = load(trained / "train" / "last.pth.tar")
    content[place] = (
        {"bait": Malicious(canary)}
        if place != "args"
        else argparse.Namespace(bait=Malicious(canary))
    )
    if form == "pickle":
        path.write_bytes(
            pickle.dumps(content["args"] if place == "args" else {place: content[place]})
        )
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(v83.InputError) as caught:
        v83.read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    for flag in ("--resume", "--weight") if form != "pickle" else ():
        assert str(path) in error_line(train(start, data, tmp_path / "out", flag, path))
    assert not canary.exists()
    with contextlib.suppress(RuntimeError):  # a plain pickle has no tensors to go on with
        torch.load(path, weights_only=False)
    assert canary.exists()  # so the bait was real


def test_the_loader_is_one_without_known_holes():
    """CVE-2026-24747, code execution through the weights-only loader, is mended in 2.10."""
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


# ---- a run that diverges ----


def overflow(module, steps):
    """Have the pooled features of these steps overflow."""
    calls, gem = [], module.gem

    def overflowing(x, p):
        calls.append(p)
        return gem(x, p) * (torch.inf if len(calls) in steps else 1)

    return overflowing


@pytest.mark.parametrize(
    ("steps", "code"), [(range(4, 7), 0), (range(4, 8), 2), ((2, 3, 4, 6, 7, 8), 0)]
)
def test_too_many_skipped_steps_in_a_row(data, tmp_path, monkeypatch, capfd, steps, code):
    """Three are allowed, whatever the logging interval; what was saved last is good."""
    monkeypatch.setattr(v83, "gem", overflow(v83, steps))
    flags = [
        *NETWORK,
        "--batch-size",
        4,
        "--memory-size",
        64,
        "--no-pretrained",
        "--epochs",
        1,
        "--log-every",
        2,
    ]
    flags += [
        "--max-skipped",
        3,
        "--checkpoint-every",
        1,
        "--output",
        tmp_path,
        data / "training_images",
    ]
    assert v83.main([str(flag) for flag in flags]) == code
    assert ("--max-skipped 3" in capfd.readouterr().err) == (code == 2)
    checkpoint = load(tmp_path / "train" / "last.pth.tar")
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    assert checkpoint["memory_bank"]["bank"].isfinite().all()
    if not code:
        assert sum(line["skipped"] for line in log_lines(tmp_path) if "loss" in line) == len(steps)
