"""A stage's command in a process of its own that starts in no time, tells how far it is, and can be
killed anywhere.

The processes are forked from a server that has imported the stages, which saves each start some
seconds.
"""

import argparse
import atexit
import contextlib
import errno
import faulthandler
import hashlib
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ["-a", "test_efficientnet", "--input-size", 32, "-j", 0]
TRAINING = [
    *NETWORK,
    "--batch-size",
    4,
    "--memory-size",
    64,
    "--log-every",
    3,
    "--no-pretrained",
    "--lr",
    0.01,
]
SETS = {"training_images": ("T{:06d}.jpg", 40), "reference_images": ("R{:06d}.jpg", 22),
        "query_images": ("Q{:05d}.jpg", 9)}  # fmt: skip


def make_images(root):
    """Write small images in DISC21's layout, eight of the queries with a reference; returns
    `root`.
    """
    rng = np.random.default_rng(0)
    for folder, (name, count) in SETS.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((64, 48)).save(root / folder / name.format(i))
    pairs = "".join(f"Q{i:05d},R{i:06d}\n" for i in range(8))
    (root / "public_ground_truth.csv").write_text(f"query_id,reference_id\n{pairs}")
    return root


def start_server():
    """The context whose processes are forked from the server; it sees no GPU, so that all bits are
    the CPU's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["v83", "v107", "stage_process"])
    folders = (ROOT / "exp", ROOT / "tests" / "faults")
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    with mock.patch.dict(os.environ, environment):
        multiprocessing.forkserver.ensure_running()
    return context


# ---- in the process ----


def count_images(module, path, hold):
    """Have the module's network note in the file at `path` how many images it is given, and stay
    there after `hold`.
    """
    embed = module.embed
    seen = 0

    def counted(network, images, amp):
        nonlocal seen
        result = embed(network, images, amp)
        with path.open("a") as file:
            file.write(f"{len(images)}\n")
        seen += len(images)
        while hold is not None and seen >= hold:
            time.sleep(1)
        return result

    module.embed = counted


def hang_workers(module):
    """Have reading an image take two minutes, and --timeout count seconds for the workers."""

    def start_loader(items, load, args, device):
        args = argparse.Namespace(workers=args.workers, timeout=args.timeout / 60)
        return original(items, load, args, device)

    original = module.start_loader
    module.start_loader = start_loader
    module.read_pixels = lambda path: time.sleep(120)


def restart(module):
    """Be the second attempt of torchrun."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"


def refuse_locks(module):
    """Have the file system know no locks."""

    def lockf(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    module.fcntl.lockf = lockf


def freeze_batchnorm(module):
    """Keep BatchNorm in evaluation mode, so that one process with a whole batch and several with
    its parts compute the same thing.
    """
    module.ISCNet.train = lambda model, mode=True: torch.nn.Module.train(model, False)


def run_stage(stage, argv, environment, limits, output, hold, inject):
    """What the process does: the command, its messages into files in `output`, and at last its peak
    memory.
    """
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a command of its own
    os.environ |= environment
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    faulthandler.register(signal.SIGUSR2)  # where it is, when it does not end
    for name, value in limits.items():
        resource.setrlimit(
            getattr(resource, name), (value, resource.getrlimit(getattr(resource, name))[1])
        )
    module = importlib.import_module(stage)
    count_images(module, output / "images", hold)
    if inject is not None:
        inject(module)
    try:
        code = module.main(argv)
    except (Exception, KeyboardInterrupt) as error:
        uncaught = error  # noqa: F841  as in a command, what the traceback refers to lives on
        code = 1
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
    (output / "memory").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
    sys.exit(code)


def save_forever(path, number):
    """Save larger and larger numbers in a file of two megabytes, as training does."""
    import v83

    for value in range(number, 10**6):
        content = {
            "state_dict": {"number": torch.tensor(value)},
            "filling": torch.full((2**19,), value),
        }
        v83.write_checkpoint(content, [path])


# ---- around it ----


class Run:
    """A started command of `world_size` processes, which wait to be killed after `hold` images
    each. inject: a function of this file that first changes the stage's module.
    """

    def __init__(
        self, context, stage, *argv, folder, world_size=1, hold=None, inject=None, **limits
    ):
        self.outputs = [Path(folder, f"rank{rank}") for rank in range(world_size)]
        argv, environment = [str(argument) for argument in argv], {}
        if world_size > 1:
            environment = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        self.hold = hold
        self.images_before = self.images()
        self.processes = []
        for rank, output in enumerate(self.outputs):
            output.mkdir(parents=True, exist_ok=True)
            own = environment | (
                {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            )
            process = context.Process(
                target=run_stage, args=(stage, argv, own, limits, output, hold, inject)
            )
            process.start()
            self.processes.append(process)

    def images(self):
        """How many images the networks of all processes have had, in this and all earlier runs in
        the folder.
        """
        files = [output / "images" for output in self.outputs]
        return sum(
            int(number)
            for file in files
            if file.exists()
            for number in file.read_text().split("\n")[:-1]
        )

    def wait(self, timeout=120):
        """The exit codes of all processes, which must end by themselves."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            for process in self.processes:
                if process.exitcode is None:
                    os.kill(process.pid, signal.SIGUSR2)
                    time.sleep(1)
            self.kill()
            raise AssertionError(f"still running after {timeout} s: {codes}\n{self.errors()}")
        return codes

    def wait_for_images(self, number):
        """Wait until `number` images are computed; whether that happened before the end."""
        while self.images() < number:
            if all(process.exitcode is not None for process in self.processes):
                return False
            time.sleep(0.002)
        return True

    def kill_when_held(self):
        """Kill the one process when its network has had `hold` images."""
        assert self.wait_for_images(self.images_before + self.hold), self.errors()
        self.kill()

    def send(self, number, rank=0):
        """Send a signal to the process group of a rank: to its data loader workers too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[rank].pid, number)

    def kill(self):
        """Kill all processes that are still there."""
        for process in self.processes:
            process.kill()
            process.join()

    def messages(self):
        """What each process has written on stderr."""
        return [(output / "stderr").read_text(errors="replace") for output in self.outputs]

    def errors(self):
        """All that was written on stderr."""
        return "".join(self.messages())

    def memory(self):
        """Peak memory of the first process in MB."""
        return int((self.outputs[0] / "memory").read_text())


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def train(start, data, output, *flags, name="ranks", **options):
    """Start v83 for three epochs of ten steps of four images in two views, with a checkpoint every
    three steps. name: of the folder in `output` for what its processes say.
    """
    argv = [
        *TRAINING,
        "--epochs",
        3,
        "--checkpoint-every",
        3,
        "--output",
        output,
        *flags,
        data / "training_images",
    ]
    return start("v83", *argv, folder=output / name, **options)


def extract(start, data, output, weight, *flags, stage="v83", **options):
    """Start a stage's extraction of all sets in batches of five."""
    argv = [
        *NETWORK,
        "--mode",
        "extract",
        "--weight",
        weight,
        "--batch-size",
        5,
        "--target-set",
        "qrt",
    ]
    return start(stage, *argv, "--output", output, *flags, data, folder=output / "ranks", **options)


def load(path):
    """A checkpoint, safely."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def log_lines(output):
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (output / "train" / "log.jsonl").read_text().splitlines()]


def digests(folder):
    """SHA-256 by path of all files in a folder but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def error_line(run):
    """The one line that each rank ends with, and exit code 2."""
    assert set(run.wait()) == {2}, run.errors()
    assert "Traceback" not in run.errors()
    lines = []
    for message in run.messages():
        [line] = [line for line in message.splitlines() if "error:" in line]
        lines.append(line)
    assert len(set(lines)) == 1, lines
    return lines[0]


def losses(output):
    """What a run has logged of its loss, without the speed."""
    lines = [line for line in log_lines(output) if "loss" in line]
    return [
        {name: value for name, value in line.items() if name != "images_per_second"}
        for line in lines
    ]


def assert_same_run(output, expected, epochs=3):
    """The same weights, momenta, bank and logged losses, bit for bit."""
    assert losses(output) == losses(expected)
    for name in (*(f"checkpoint_{epoch:04d}" for epoch in range(epochs)), "last"):
        one, other = (load(folder / "train" / f"{name}.pth.tar") for folder in (output, expected))
        for part in ("state_dict", "optimizer", "memory_bank"):
            assert_same(one[part], other[part])


def assert_same(one, other):
    """Bit for bit, all the way down."""
    assert type(one) is type(other)
    if torch.is_tensor(one):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other
