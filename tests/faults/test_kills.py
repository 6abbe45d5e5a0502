"""Processes that are killed, or told to stop, at random points: the result is that of a run that
was left alone.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

import v83
from conftest import children
from stage_process import (
    ROOT,
    SETS,
    TRAINING,
    assert_same_run,
    extract,
    hang_workers,
    load,
    log_lines,
    losses,
    save_forever,
    train,
)

STEP = 8  # images that the network sees in a step of all processes


@pytest.fixture
def kills(pytestconfig):
    """How many times to kill."""
    return 10 if pytestconfig.getoption("--long") else 2


# ---- saving ----


def test_kills_while_saving(start, tmp_path, pytestconfig, figure):
    """A checkpoint can be read whenever the process that saves it is killed, and the next save
    leaves no stray file.
    """
    count = 50 if pytestconfig.getoption("--long") else 10
    path = tmp_path / "last.pth.tar"
    unfinished = tmp_path / "unfinished.tar"
    random_ = random.Random(0)
    found = [0]
    stray = 0
    for number in range(count):
        unfinished.unlink(missing_ok=True)
        process = start.args[0].Process(target=save_forever, args=(path, found[-1]))
        process.start()
        end = time.monotonic() + 60
        while not (path.exists() and unfinished.exists()):
            assert time.monotonic() < end
            time.sleep(0.0005)
        # Of every other process, the first save may be the killed one.
        whole_saves = 3 if number % 2 == 0 else 0
        for _ in range(whole_saves):
            before = path.stat().st_mtime_ns
            while path.stat().st_mtime_ns == before:
                assert time.monotonic() < end
                time.sleep(0.0005)
        time.sleep(random_.uniform(0, 0.1))
        process.kill()
        process.join()
        stray += unfinished.exists()
        found.append(v83.read_checkpoint(path)["state_dict"]["number"].item())
        assert set(tmp_path.iterdir()) <= {path, unfinished}
    assert found == sorted(found) and found[-1] > count
    v83.write_checkpoint({}, [path])
    assert list(tmp_path.iterdir()) == [path]
    figure(
        f"kills while saving: {count}, of which {stray} left a part behind; 0 unreadable, 0 stray "
        f"after the next"
    )


# ---- training ----


@pytest.mark.parametrize("world_size", [1, 2])
def test_kills_while_training(start, data, undisturbed, tmp_path, kills, figure, world_size):
    random_, killed = random.Random(world_size), 0
    total = needed = 3 * 10 * STEP
    while killed < kills:
        run = train(start, data, tmp_path, "--resume", "auto", world_size=world_size)
        if run.wait_for_images(run.images() + random_.randrange(1, 200 // kills)):
            time.sleep(random_.uniform(0, 0.05))
        run.send(signal.SIGKILL, rank=random_.randrange(world_size))
        codes = run.wait(60)  # who has lost the other ends too
        if set(codes) == {0}:  # too late: all was done, and is to be done once more
            shutil.rmtree(tmp_path / "train")
            needed += total
        else:
            assert -signal.SIGKILL in codes, codes
            killed += 1
    run = train(start, data, tmp_path, "--resume", "auto", world_size=world_size)
    assert set(run.wait()) == {0}, run.errors()
    assert_same_run(tmp_path, undisturbed[world_size])
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        *(f"checkpoint_{epoch:04d}.pth.tar" for epoch in range(3)),
        "last.pth.tar",
        "lock",
        "log.jsonl",
        "source.py",
    ]
    again = run.images() - needed
    figure(
        f"training, world size {world_size}, kills: {kills}, bit-identical in the end; {again} "
        f"images computed again"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_to_stop(start, data, undisturbed, tmp_path, figure, number, world_size):
    """Sent to one process and its data loader workers, it ends all after the same step, with a
    checkpoint of that step.
    """
    flags = ["-j", world_size, "--resume", "auto", "--checkpoint-every", 1000]
    run = train(start, data, tmp_path, *flags, world_size=world_size)
    run.wait_for_images(60)
    begin = time.monotonic()
    run.send(number, rank=world_size - 1)
    assert run.wait(30) == [os.EX_TEMPFAIL] * world_size, run.errors()
    seconds = time.monotonic() - begin
    checkpoint = load(tmp_path / "train" / "last.pth.tar")
    assert STEP * (10 * checkpoint["epoch"] + checkpoint["step"]) == run.images() >= 60
    run = train(start, data, tmp_path, *flags, world_size=world_size)
    assert set(run.wait()) == {0}, run.errors()
    assert run.images() == 3 * 10 * STEP
    assert_same_run(tmp_path, undisturbed[world_size])
    figure(
        f"{number.name}, world size {world_size}: ended after {seconds:.1f} s with code "
        f"{os.EX_TEMPFAIL}, bit-identical"
    )


@pytest.mark.parametrize("stage", ["v98", "v107"])
def test_a_kill_in_the_middle_of_an_epoch(start, data, tmp_path, stage):
    """The later stages, whose samples have rows of references too, resume bit-identically as
    well.
    """
    own = {"v98": ["--memory-size", 64], "v107": ["--batch-size", 2, "--num-negatives", 2]}[stage]
    argv = [
        *TRAINING,
        *own,
        "--epochs",
        2,
        "--checkpoint-every",
        1,
        "--resume",
        "auto",
        data / "training_images",
    ]
    run = start(stage, *argv, "--output", tmp_path / "one", folder=tmp_path / "one")
    assert run.wait() == [0], run.errors()
    images = run.images()
    run = start(
        stage, *argv, "--output", tmp_path / "two", folder=tmp_path / "two", hold=images // 4 + 1
    )
    assert run.wait_for_images(images // 4 + 1)
    run.kill()
    step = load(tmp_path / "two" / "train" / "last.pth.tar")["step"]
    run = start(stage, *argv, "--output", tmp_path / "two", folder=tmp_path / "two")
    assert run.wait() == [0], run.errors()
    assert step > 0 and images <= run.images() < 1.5 * images
    assert_same_run(tmp_path / "two", tmp_path / "one", epochs=2)


def kill_worker(run):
    """Kill the first process's first data loader worker."""
    os.kill(children(run.processes[0].pid)[0], signal.SIGKILL)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_worker(start, data, undisturbed, tmp_path, figure, world_size):
    """Every rank ends soon and not with 0; --resume auto goes on."""
    flags = ["-j", 2 * world_size, "--resume", "auto"]
    run = train(start, data, tmp_path, *flags, world_size=world_size)
    run.wait_for_images(16)
    begin = time.monotonic()
    kill_worker(run)
    assert run.wait(60) == [1] * world_size, run.errors()
    seconds = time.monotonic() - begin
    assert "DataLoader worker" in run.errors()
    run = train(start, data, tmp_path, *flags, world_size=world_size)
    assert set(run.wait()) == {0}, run.errors()
    assert_same_run(tmp_path, undisturbed[world_size])
    figure(
        f"killed data loader worker, world size {world_size}: the run ended after {seconds:.1f} s"
    )


def test_a_worker_that_hangs(start, data, tmp_path, figure):
    """The run ends after --timeout, here of a second."""
    begin = time.monotonic()
    run = train(start, data, tmp_path, "-j", 1, "--timeout", 1, inject=hang_workers)
    assert run.wait(60) == [1], run.errors()
    assert "DataLoader timed out" in run.errors()
    figure(f"a data loader worker that hangs: the run ended after {time.monotonic() - begin:.1f} s")


def test_ctrl_c(start, data, tmp_path):
    """Sent to one process alone, or also to its data loader workers, it ends all."""
    for name in ("one", "group"):
        run = train(start, data, tmp_path / name, "-j", 2)
        run.wait_for_images(16)
        if name == "one":
            os.kill(run.processes[0].pid, signal.SIGINT)
        else:
            run.send(signal.SIGINT)
        assert run.wait(30) == [1], run.errors()


def test_a_lost_rank_whose_workers_live_on(start, data, tmp_path, pytestconfig, figure):
    """They hold its connections until they notice, after five seconds, that it is gone."""
    if not pytestconfig.getoption("--long"):
        pytest.skip("waits for five seconds: make faults")
    run = train(start, data, tmp_path, "-j", 2, world_size=2)
    run.wait_for_images(16)
    begin = time.monotonic()
    run.processes[0].kill()
    assert run.wait(60) == [-signal.SIGKILL, 1], run.errors()
    figure(
        f"a killed rank, not its workers: the other ended after {time.monotonic() - begin:.1f} s"
    )


def test_a_rank_that_hangs(start, data, tmp_path, pytestconfig, figure):
    """The others give up after --timeout minutes."""
    if not pytestconfig.getoption("--long"):
        pytest.skip("takes more than a minute: make faults")
    run = train(start, data, tmp_path, "--timeout", 1, world_size=2)
    run.wait_for_images(16)
    run.send(signal.SIGSTOP, rank=1)
    begin = time.monotonic()
    run.processes[0].join(120)
    seconds, code = time.monotonic() - begin, run.processes[0].exitcode
    run.kill()
    assert code == 1, run.errors()
    figure(f"a rank that hangs, --timeout 1: the other ended after {seconds:.0f} s")


def test_another_number_of_processes(start, data, tmp_path):
    """In the middle of an epoch one process hands over to two: they go through the same samples."""
    run = train(start, data, tmp_path, "--checkpoint-every", 4, hold=4 * STEP + 1)
    run.wait_for_images(4 * STEP + 1)
    run.kill()
    before = load(tmp_path / "train" / "last.pth.tar")
    assert before["world_size"] == 1 and before["step"] % 4 == 0 < before["step"]
    run = train(start, data, tmp_path, "--resume", "auto", world_size=2)
    assert set(run.wait()) == {0}, run.errors()
    after = load(tmp_path / "train" / "last.pth.tar")
    assert after["world_size"] == 2
    labels = after["memory_bank"]["bank_labels"].tolist()
    order = np.concatenate(
        [np.random.default_rng((9, epoch)).permutation(40) for epoch in range(3)]
    )
    assert labels == np.roll(order[-32:].repeat(2), after["memory_bank"]["cursor"].item()).tolist()
    assert [line["step"] for line in losses(tmp_path)][-1] == 30


class Torchrun:
    """torchrun with two processes of v83, which has come to step 6."""

    def __init__(self, data, output, *flags):
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "--max-restarts=2",
        ]
        argv = [*TRAINING, "--epochs", 3, "--output", output, *flags, data / "training_images"]
        command += [ROOT / "exp" / "v83.py", *argv]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        log = output / "train" / "log.jsonl"
        end = time.monotonic() + 120
        self.errors = output / "stderr"
        with self.errors.open("w") as errors:
            self.agent = subprocess.Popen(
                [sys.executable, *map(str, command)], env=environment, stderr=errors
            )
        while not (log.exists() and '"step": 6' in log.read_text()):
            assert self.agent.poll() is None and time.monotonic() < end, self.errors.read_text()
            time.sleep(0.01)


@pytest.mark.parametrize("resume", [None, "auto"])
def test_torchrun_restarts(data, undisturbed, tmp_path, pytestconfig, figure, resume):
    """A killed rank, and torchrun starts both again, with the same arguments: the run goes on, with
    --resume and without.
    """
    if resume and not pytestconfig.getoption("--long"):
        pytest.skip("takes half a minute: make faults")
    flags = ["--resume", resume] if resume else []
    run = Torchrun(data, tmp_path, "--checkpoint-every", 3, *flags)
    os.kill(children(run.agent.pid)[1], signal.SIGKILL)
    assert run.agent.wait(timeout=180) == 0, run.errors.read_text()
    starts = [line["step"] for line in log_lines(tmp_path) if "args" in line]
    assert len(starts) == 2 and starts[1] > 0
    assert_same_run(tmp_path, undisturbed[2])
    figure(f"torchrun --max-restarts 2, --resume {resume}, with a killed rank: bit-identical")


def test_torchrun_is_told_to_stop(start, data, undisturbed, tmp_path, pytestconfig):
    """It passes SIGTERM on; the ranks save, and the same training goes on without it."""
    if not pytestconfig.getoption("--long"):
        pytest.skip("takes half a minute: make faults")
    run = Torchrun(data, tmp_path, "--checkpoint-every", 1000)
    run.agent.send_signal(signal.SIGTERM)
    assert run.agent.wait(timeout=60) != 0
    checkpoint = load(tmp_path / "train" / "last.pth.tar")
    assert 10 * checkpoint["epoch"] + checkpoint["step"] >= 6 and checkpoint["step"] > 0
    assert "--resume auto continues" in run.errors.read_text()
    run = train(start, data, tmp_path, "--resume", "auto", world_size=2)
    assert set(run.wait()) == {0}, run.errors()
    assert_same_run(tmp_path, undisturbed[2])


# ---- extraction ----


@pytest.fixture(scope="module")
def weight(undisturbed):
    return undisturbed[1] / "train" / "last.pth.tar"


@pytest.fixture(scope="module")
def extracted(start, data, weight, tmp_path_factory):
    """The output folder of an extraction in one piece."""
    output = tmp_path_factory.mktemp("extracted")
    run = extract(start, data, output, weight)
    assert run.wait() == [0], run.errors()
    assert run.images() == sum(count for _, count in SETS.values())
    assert sorted(path.name for path in (output / "extract").iterdir()) == [
        "fb-isc-submission.h5",
        "train_feats.npy",
    ]
    return output


def assert_same_files(output, expected):
    for name in ("fb-isc-submission.h5", "train_feats.npy"):
        assert (output / "extract" / name).read_bytes() == (
            expected / "extract" / name
        ).read_bytes()


@pytest.mark.parametrize("world_size", [1, 2])
def test_kills_while_extracting(
    start, data, weight, extracted, tmp_path, kills, figure, world_size
):
    random_, killed = random.Random(world_size), 0
    total = needed = sum(count for _, count in SETS.values())
    while killed < kills:
        run = extract(start, data, tmp_path, weight, world_size=world_size)
        run.wait_for_images(run.images() + random_.randrange(1, 60 // kills))
        time.sleep(random_.uniform(0, 0.01))
        run.send(signal.SIGKILL, rank=random_.randrange(world_size))
        run.kill()
        if (
            tmp_path / "extract" / "train_feats.npy"
        ).exists():  # too late: all was done, and is to be done once more
            shutil.rmtree(tmp_path / "extract")
            needed += total
        else:
            killed += 1
    run = extract(start, data, tmp_path, weight, world_size=world_size)
    assert set(run.wait()) == {0}, run.errors()
    assert_same_files(tmp_path, extracted)
    assert not list((tmp_path / "extract").glob("unfinished*"))
    again = run.images() - needed
    assert 0 <= again <= 5 * kills * world_size
    figure(
        f"extraction, world size {world_size}, kills: {kills}, byte-identical; {again} of {total} "
        f"images computed again"
    )


def interrupted(start, data, output, weight, *flags):
    """The shards that an extraction leaves that is killed after 40 images."""
    run = extract(start, data, output, weight, *flags, hold=40)
    run.wait_for_images(40)
    run.kill()
    shards = sorted((output / "extract" / "unfinished").glob("*.npz"))
    assert len(shards) >= 7
    return shards


def test_sets_of_the_same_names_never_mix(start, data, weight, tmp_path):
    root = tmp_path / "input"
    for folder in ("query_images", "reference_images"):
        (root / folder).mkdir(parents=True)
    for i in range(9):
        shutil.copy(data / "query_images" / f"Q{i:05d}.jpg", root / "query_images" / f"{i}.jpg")
        shutil.copy(
            data / "reference_images" / f"R{i:06d}.jpg", root / "reference_images" / f"{i}.jpg"
        )
    run = extract(start, root, tmp_path, weight, "--target-set", "q", hold=9)
    run.wait_for_images(9)
    run.kill()
    run = extract(start, root, tmp_path, weight, "--target-set", "r")
    assert run.wait() == [2] and "--start-over" in run.errors()
    assert "is 9 reference images, was 9 query images" in run.errors()


def test_scales_never_mix(start, data, weight, tmp_path):
    run = extract(start, data, tmp_path, weight, "--target-set", "q", stage="v107", hold=9)
    run.wait_for_images(9)
    run.kill()
    run = extract(start, data, tmp_path, weight, "--target-set", "q", "--tta", stage="v107")
    assert run.wait() == [2]
    assert "--tta is True, was False" in run.errors() and "--start-over" in run.errors()


def test_a_killed_worker_of_an_extraction(start, data, weight, extracted, tmp_path):
    run = extract(start, data, tmp_path, weight, "-j", 1, hold=40)
    run.wait_for_images(40)
    kill_worker(run)
    assert run.wait(60) == [1], run.errors()
    assert "DataLoader worker" in run.errors()
    run = extract(start, data, tmp_path, weight)
    assert run.wait() == [0], run.errors()
    assert_same_files(tmp_path, extracted)


def read_rows(shard, number=5):
    """The rows of a shard of so many images, or None where it is damaged."""
    return v83.read_shard(v83.ExtractionBatch("query", np.empty(number), shard))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_shard_is_computed_again(start, data, weight, extracted, tmp_path, damage):
    broken = tmp_path / "broken.npz"
    positions = [None, *range(0, 200, 7)] if damage == "flipped" else [None]
    for shard in interrupted(start, data, tmp_path, weight):
        rows = read_rows(shard)
        if rows is None:  # of fewer images
            continue
        for position in positions:
            content = bytearray(shard.read_bytes())
            content[len(content) // 2 if position is None else position] ^= 4
            damaged = {"truncated": content[:1000], "flipped": content, "empty": b""}[damage]
            broken.write_bytes(damaged)
            assert read_rows(broken) is None or np.array_equal(read_rows(broken), rows)
        shard.write_bytes(damaged)
    run = extract(start, data, tmp_path, weight)
    assert run.wait() == [0], run.errors()
    assert_same_files(tmp_path, extracted)


def test_a_shard_lost_before_all_are_put_together(tmp_path):
    """As with nodes that do not share a disk: nothing is written, and what is there stays."""
    paths = np.array(["Q00000.jpg", "Q00001.jpg"])
    shards = [tmp_path / "unfinished" / f"query-{start:07d}.npz" for start in (0, 1)]
    shards[0].parent.mkdir()
    np.savez(shards[0], rows=np.ones((1, 256), np.float32))
    batches = [
        v83.ExtractionBatch("query", paths[i : i + 1], shard) for i, shard in enumerate(shards)
    ]
    with pytest.raises(v83.InputError, match=r"query-0000001\.npz: is missing or damaged"):
        v83.write_files(tmp_path, "", {"query": paths}, batches, list_zero_rows=False)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["query-0000000.npz"]


def test_a_kill_while_finished_batches_are_removed(start, data, weight, extracted, tmp_path):
    """The list of inputs may be the first that is gone: the same command still goes on."""
    interrupted(start, data, tmp_path, weight)
    (tmp_path / "extract" / "unfinished" / "inputs.json").unlink()
    run = extract(start, data, tmp_path, weight)
    assert run.wait() == [0], run.errors()
    assert_same_files(tmp_path, extracted)


CHANGES = {
    "weight": "SHA-256 of --weight is ",
    "folder": "DATA is ",
    "list": "SHA-256 of their names is ",
    "size": "--input-size is 40, was 32;",
    "batch": "--batch-size is 6, was 5;",
    "fast": "--fast-input is True, was False;",
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_never_mix(start, data, weight, undisturbed, extracted, tmp_path, change):
    interrupted(start, data, tmp_path, weight)
    changed, flags, other = data, [], weight
    if change == "weight":
        other = undisturbed[1] / "train" / "checkpoint_0000.pth.tar"
    elif change == "folder":
        changed = shutil.copytree(data, tmp_path / "input")
    elif change == "list":
        changed = shutil.copytree(data, tmp_path / "input")  # in another folder, too
        (changed / "query_images" / "Q00008.jpg").rename(changed / "query_images" / "Q00009.jpg")
    else:
        flags = {
            "size": ["--input-size", 40],
            "batch": ["--batch-size", 6],
            "fast": ["--fast-input"],
        }[change]
    run = extract(start, changed, tmp_path, other, *flags)
    assert run.wait() == [2]
    (line,) = [line for line in run.errors().splitlines() if "error:" in line]
    assert str(tmp_path / "extract" / "unfinished") in line and "--start-over" in line
    assert CHANGES[change] in line
    assert line.count(", was ") == (2 if change == "list" else 1)
    run = extract(start, changed, tmp_path, other, *flags, "--start-over")
    assert run.wait() == [0], run.errors()
    with h5py.File(tmp_path / "extract" / "fb-isc-submission.h5") as file:
        new, ids = file["query"][()], file["query_ids"][()]
    with h5py.File(extracted / "extract" / "fb-isc-submission.h5") as file:
        assert (change != "list") == np.array_equal(ids, file["query_ids"][()])
        assert (change in ("list", "batch", "folder", "fast")) == np.allclose(
            new, file["query"][()], atol=1e-5
        )
