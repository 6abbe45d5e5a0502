"""A run never overwrites one that is further on, and two never train in one folder at once."""

import os
import shutil
import socket

import pytest
import torch

import stage_process
import v83
from conftest import children
from stage_process import (
    assert_same_run,
    digests,
    error_line,
    load,
    log_lines,
    refuse_locks,
    restart,
)

EPOCH = 16  # images that the network sees in two steps


def train(start, data, output, *flags, **options):
    """Start v83 for epochs of two steps."""
    return stage_process.train(start, data, output, "--sample-size", 8, *flags, **options)


@pytest.fixture(scope="module")
def finished(start, data, tmp_path_factory):
    """The output folder of a run of one epoch."""
    output = tmp_path_factory.mktemp("finished")
    run = train(start, data, output, "--epochs", 1)
    assert run.wait() == [0], run.errors()
    return output


@pytest.fixture
def output(finished, tmp_path):
    """A copy of it, to train in."""
    shutil.copytree(finished / "train", tmp_path / "train")
    return tmp_path


# ---- a run that is further on ----


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_start_again_is_refused(start, data, output, world_size):
    before = digests(output)
    run = train(start, data, output, "--epochs", 1, world_size=world_size)
    line = error_line(run)
    for words in (output / "train", "--output", "--resume auto", "--start-over"):
        assert str(words) in line
    shutil.rmtree(output / "ranks")
    assert digests(output) == before


def test_the_published_runs(start, data, tmp_path):
    """Both in one folder. The second, typed again after a crash in epoch 8, would destroy epochs 5
    to 7: it is refused, and --resume auto ends bit-identical.
    """
    output, undisturbed = tmp_path / "v83", tmp_path / "undisturbed"
    run = train(start, data, output, "--epochs", 5, "--seed", 9)
    assert run.wait() == [0], run.errors()
    shutil.copytree(output, undisturbed)
    second = ["--epochs", 10, "--seed", 90]
    resume = ["--resume", output / "train" / "checkpoint_0004.pth.tar"]
    train(start, data, output, *second, *resume, hold=3 * EPOCH + 1).kill_when_held()
    before = digests(output / "train")
    assert "checkpoint_0007.pth.tar" in before and "checkpoint_0008.pth.tar" not in before
    assert "--resume auto" in error_line(train(start, data, output, *second, *resume))
    assert digests(output / "train") == before
    run = train(start, data, output, *second, "--resume", "auto")
    assert run.wait() == [0], run.errors()
    resume = ["--resume", undisturbed / "train" / "checkpoint_0004.pth.tar"]
    run = train(start, data, undisturbed, *second, *resume)
    assert run.wait() == [0], run.errors()
    assert_same_run(output, undisturbed, epochs=10)


@pytest.mark.parametrize("resume", [False, True])
def test_a_crash_in_the_first_step(start, data, finished, output, tmp_path, resume):
    """The same command again works, for a first run as for a second."""
    flags = ["--epochs", 1]
    if resume:
        flags = ["--epochs", 2, "--resume", output / "train" / "checkpoint_0000.pth.tar"]
    else:
        shutil.rmtree(output / "train")
    train(start, data, output, *flags, hold=1).kill_when_held()
    run = train(start, data, output, *flags)
    assert run.wait() == [0], run.errors()
    assert len(list((output / "train").glob("checkpoint_*"))) == (2 if resume else 1)
    if not resume:
        assert_same_run(output, finished, epochs=1)


def unreadable(path):
    path.write_bytes(path.read_bytes()[:-1000])


def of_another_network(path):
    torch.save(load(path) | {"arch": "test_vit", "epoch": 0}, path)


def bare_weights(path):
    torch.save(load(path)["state_dict"], path)


@pytest.mark.parametrize("change", [unreadable, of_another_network, bare_weights])
def test_what_counts_as_further(start, data, output, change):
    for name in ("checkpoint_0000.pth.tar", "log.jsonl", "source.py"):
        (output / "train" / name).unlink()
    change(output / "train" / "last.pth.tar")
    before = digests(output / "train")
    line = error_line(train(start, data, output))
    assert str(output / "train" / "last.pth.tar") in line and "--start-over" in line
    assert digests(output / "train") == before


@pytest.mark.parametrize("flags", [[], ["--resume", "FILE"]])
def test_a_restart_by_torchrun_continues(start, data, output, flags):
    """Whether or not its arguments, which stay the same, say so; never from FILE again."""
    if flags:
        flags = ["--resume", output / "train" / "checkpoint_0000.pth.tar"]
    else:
        shutil.rmtree(output / "train")
    train(start, data, output, *flags, hold=EPOCH + 1).kill_when_held()
    done = len(list((output / "train").glob("checkpoint_*")))
    run = train(start, data, output, *flags, inject=restart)
    assert run.wait() == [0], run.errors()
    assert run.images() - run.images_before == (3 - done) * EPOCH


# ---- --start-over ----


def test_start_over_moves_what_is_there(start, data, output, tmp_path):
    """It deletes nothing."""
    train_folder = output / "train"
    for number in (1, 2):
        moved = {path: digest for path, digest in digests(train_folder).items() if "/" not in path}
        run = train(start, data, output, "--epochs", number, "--start-over")
        assert run.wait() == [0], run.errors()
        assert digests(train_folder / f"replaced-{number}") == moved
    assert not (train_folder / "replaced-3").exists()
    assert [line["step"] for line in log_lines(output)] == [0, 2, 4]  # in one piece
    empty = tmp_path / "empty"
    assert train(start, data, empty, "--epochs", 1, "--start-over").wait() == [0]
    assert not list((empty / "train").glob("replaced-*"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--weight", "nothing.pth.tar"],
        ["--batch-size", 9],
        ["-a", "nonsense"],
        ["--resume", "nothing.pth.tar"],
    ],
    ids=str,
)
def test_start_over_with_bad_input_moves_nothing(start, data, output, flags):
    before = digests(output / "train")
    error_line(train(start, data, output, "--start-over", *flags))
    assert digests(output / "train") == before


def test_start_over_does_not_go_with_auto(capsys):
    with pytest.raises(SystemExit, match="2"):
        v83.parse_args(["--start-over", "--resume", "auto", "data"])
    assert "--start-over: does not go with --resume auto" in capsys.readouterr().err


# ---- two at once ----


def test_a_second_run_at_once(start, data, output):
    """It is refused while the first lives, not while its data loader workers outlive it."""
    first = train(start, data, output, "--resume", "auto", "-j", 1, hold=1)
    assert first.wait_for_images(1)
    (worker,) = children(first.processes[0].pid)
    before = digests(output / "train")
    for world_size in (1, 2):
        other = train(start, data, output, "--resume", "auto", world_size=world_size, name="other")
        line = error_line(other)
        assert str(output / "train") in line
        assert f"{socket.gethostname()}, process {first.processes[0].pid}" in line
    assert digests(output / "train") == before
    first.kill()
    run = train(start, data, output, "--resume", "auto", name="other")
    os.kill(worker, 0)  # it is still there
    assert run.wait() == [0], run.errors()


def test_a_file_system_without_locks(start, data, tmp_path):
    """One warning, and the run goes on."""
    run = train(start, data, tmp_path, "--epochs", 1, inject=refuse_locks)
    assert run.wait() == [0], run.errors()
    (line,) = [line for line in run.errors().splitlines() if "warning:" in line]
    assert str(tmp_path / "train") in line and "No locks available" in line
