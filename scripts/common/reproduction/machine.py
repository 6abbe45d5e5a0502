"""The machine: its GPUs, whether a stage fits them, how long it takes."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common.cli import usable_cores
from common.errors import InputError
from common.reproduction import published

MEMORY_OF = {"H100": 80, "H200": 141, "V100": 32, "L40S": 48}  # GB, where the name alone says it
# "8 x A100-80", "8 x A100 80GB", "8 x NVIDIA A100-SXM4-80GB", "1 x H200"
GPUS = re.compile(
    r"(?P<number>\d+)\s*x\s*(NVIDIA )?(?P<name>[A-Z][\w -]*?)"
    r"(-(?P<memory>\d+)( ?GB)?| (?P<gigabytes>\d+) ?GB)?",
    re.IGNORECASE,
)
ASK_TORCH = """
import json, sys
try:
    import torch
except ImportError as error:
    sys.exit(f"torch: cannot be imported ({error}); install requirements.txt")
gpus = []
for number in range(torch.cuda.device_count()):
    gpu = torch.cuda.get_device_properties(number)
    gpus.append([gpu.name, gpu.total_memory])
print(json.dumps([torch.version.cuda, gpus]))
"""


@dataclass(frozen=True)
class Machine:
    """The GPUs that a run would use, all alike: how many, name, memory in GB each; CPU cores."""

    gpus: int
    name: str
    memory: float
    cores: int
    assumed: bool = False  # named by a flag: not this machine
    cuda: str = ""  # version that torch was built for
    driver: str = ""  # version of NVIDIA's

    def __str__(self):
        if not self.gpus:
            return f"no GPU, {self.cores} CPU cores"
        return f"{self.gpus} x {self.name}, {self.memory:.0f} GB each, {self.cores} CPU cores"


def find_machine(cpu):
    """This machine as torch sees it, in a process of its own, which leaves the GPUs alone after it;
    cpu: leave out its GPUs.

    Raises InputError where the GPUs differ.
    """
    cores = usable_cores()
    if cpu:
        return Machine(0, "CPU", 0, cores)
    asked = subprocess.run([sys.executable, "-c", ASK_TORCH], stdout=subprocess.PIPE, text=True)
    if asked.returncode:
        raise InputError(
            f"torch: cannot say which GPUs there are (exit code {asked.returncode}, its message is "
            f"above); mend that, or give --cpu"
        )
    cuda, gpus = json.loads(asked.stdout)
    if not gpus:
        return Machine(0, "CPU", 0, cores)
    names = {name for name, _ in gpus}
    if len(names) > 1:
        raise InputError(
            f"GPUs of different kinds: {', '.join(sorted(names))}; choose with CUDA_VISIBLE_DEVICES"
        )
    least = min(memory for _, memory in gpus)
    driver = driver_version()
    return Machine(len(gpus), gpus[0][0], least / 1e9, cores, cuda=cuda, driver=driver)


def driver_version():
    """The version of NVIDIA's driver, or "" where nvidia-smi does not say it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    lines = asked.stdout.splitlines()
    if asked.returncode or not lines:
        return ""
    return lines[0].strip()


def parse_machine(text):
    """The Machine of a text such as "8 x A100-80": number, name, GB each. 96 CPU cores are assumed,
    as in docs/PERFORMANCE.md.

    Raises InputError where the text says no memory.
    """
    wrong = InputError(f"--gpus {text}: must be like '8 x A100-80': number, name, GB of each")
    match = GPUS.fullmatch(text.strip())
    if not match:
        raise wrong
    number = int(match["number"])
    name = match["name"]
    memory = match["memory"] or match["gigabytes"] or MEMORY_OF.get(name.upper())
    if memory is None or number < 1:
        raise wrong
    return Machine(number, name, float(memory), published.CORES_OF_THE_TABLE, assumed=True)


def driver_complaint():
    """What is wrong where the machine has GPUs that torch cannot use, or None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if shutil.which("nvidia-smi") or any(Path("/dev").glob("nvidia[0-9]*")):
        return (
            "this machine has a GPU that torch cannot use: see docs/FAULTS.md, Before the first run"
        )
    return None


# ---- memory ----


@dataclass(frozen=True)
class Fit:
    """Whether a stage fits the GPUs: ok, the flags that it needs for that, and why in words."""

    ok: bool
    flags: tuple
    words: str


def fit(stage, machine, is_published=True):
    """The Fit of a stage's published batch on the GPUs.

    is_published: whether what it takes of each is the published network's, at the published size;
    otherwise nobody knows it.
    """
    if not machine.gpus:
        return Fit(True, (), "runs on the CPU")
    if machine.gpus not in published.NUMBERS_OF_GPUS:
        usable = max(n for n in published.NUMBERS_OF_GPUS if n <= machine.gpus)
        chosen = ",".join(visible_devices(machine)[:usable])
        words = f"batch not divisible by {machine.gpus} GPUs: set CUDA_VISIBLE_DEVICES={chosen}"
        return Fit(False, (), words)
    if not is_published:
        return Fit(True, (), "")
    column = published.NUMBERS_OF_GPUS.index(machine.gpus)
    plain, checkpointed = (row[column] for row in published.MEMORY[stage])
    for needed, flags in ((plain, ()), (checkpointed, ("--grad-checkpointing",))):
        if needed + published.CONTEXT <= machine.memory:
            tightly = " tightly" if needed > published.TIGHT * machine.memory else ""
            suffix = " with --grad-checkpointing" if flags else ""
            return Fit(True, flags, f"fits{tightly}{suffix}: {needed} of {machine.memory:.0f} GB")
    words = f"does not fit: {checkpointed} GB with --grad-checkpointing, {machine.memory:.0f} there"
    return Fit(False, (), words)


def visible_devices(machine):
    """The names of the GPUs for CUDA_VISIBLE_DEVICES, a list."""
    present = os.environ.get("CUDA_VISIBLE_DEVICES")
    if present and not machine.assumed:
        return present.split(",")
    return [str(number) for number in range(machine.gpus)]


def extraction_fit(batch_size, input_size, machine, arch):
    """The Fit of an extraction: so many images on each GPU at once; without words where nobody
    knows what the network takes.
    """
    if not machine.gpus or arch != published.ARCH:
        return Fit(True, (), "")
    of_an_image = published.EXTRACTED_IMAGE_GB * (input_size / published.INPUT_SIZE) ** 2
    needed = published.NETWORK_GB + batch_size * of_an_image
    if needed + published.CONTEXT <= machine.memory:
        return Fit(True, (), f"fits: {needed:.1f} of {machine.memory:.0f} GB")
    words = (
        f"does not fit: {needed:.1f} GB for {batch_size} images at once, {machine.memory:.0f} "
        f"there; give --stage-flags 'extract: --batch-size 32'"
    )
    return Fit(False, (), words)


# ---- hours ----


def extraction_hours(images, machine, arch):
    """Hours for the descriptors of so many images, or None where nobody knows."""
    if arch != published.ARCH:
        return None
    if not machine.gpus:
        return images * published.CPU_SECONDS_AN_IMAGE / machine.cores / 3600
    if "A100" not in machine.name:
        return None
    return images * published.A100_SECONDS_AN_IMAGE / machine.gpus / 3600


def training_hours(training, machine, arch, checkpointing):
    """Hours to plan for a training run on A100s, or None where nobody knows."""
    if arch != published.ARCH or "A100" not in machine.name:
        return None
    on_gpu, launches, loading = published.TRAINING_MINUTES[training.script]
    on_gpu *= 16 / machine.gpus
    if checkpointing:
        on_gpu *= published.CHECKPOINTING_COST
        launches *= published.CHECKPOINTING_COST
    loading *= published.CORES_OF_THE_TABLE / machine.cores
    first = published.TRAININGS[0]
    share = 1
    if training.script == first.script:  # in two runs, of half the epochs each
        share = 0.5
    return 2 * max(on_gpu, launches, loading) * share / 60
