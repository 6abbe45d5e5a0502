"""The command lines of the stages: types of the flags, removed flags, --help, and a GPU that torch
cannot use.
"""

import importlib
import re
from pathlib import Path

import pytest
import torch
from test_scripts_alike import COMMON, RECIPES, STAGES

from conftest import ROOT, assert_refused, called, run

KINDS = {  # values to refuse and values to take
    "positive int": (["0", "-1", "1.5", "x", ""], {"1": 1, "4096": 4096}),
    "int": (["-1", "0.5", "x", ""], {"0": 0, "12": 12}),
    "float": (["-1", "-1e-9", "nan", "inf", "-inf", "x", ""], {"0": 0.0, "1e-6": 1e-6, "2": 2.0}),
    "positive float": (["0", "-1", "nan", "inf", "x", ""], {"1e-6": 1e-6, "3": 3.0}),
    "mode": (["test", ""], {"train": "train"}),
    "bad images": (["ignore", ""], {"skip": "skip", "error": "error"}),
    "amp": (["fp32", "on", ""], {"fp16": "fp16", "bf16": "bf16", "off": "off"}),
    "phase": (["0", "3", "one"], {"1": 1, "2": 2}),
}
FLAGS = {
    "--input-size": "positive int",
    "--batch-size": "positive int",
    "-b": "positive int",
    "--epochs": "positive int",
    "--memory-size": "positive int",
    "--sample-size": "positive int",
    "--reference-world-size": "positive int",
    "--log-every": "positive int",
    "--checkpoint-every": "positive int",
    "--max-skipped": "positive int",
    "--world-size": "positive int",
    "--timeout": "positive int",
    "--start-epoch": "int",
    "--seed": "int",
    "--workers": "int",
    "-j": "int",
    "--rank": "int",
    "--gpu": "int",
    "--lr": "float",
    "--learning-rate": "float",
    "--momentum": "float",
    "--wd": "float",
    "--weight-decay": "float",
    "--pos-margin": "float",
    "--neg-margin": "float",
    "--max-bad": "float",
    "--gem-p": "positive float",
    "--gem-eval-p": "positive float",
    "--mode": "mode",
    "--bad-images": "bad images",
    "--amp": "amp",
    "--phase": "phase",
}
OF_ONE_STAGE = [("v83", "--ncrops", "positive int"), ("v107", "--num-negatives", "int")]
CASES = [(stage, *case) for case in FLAGS.items() for stage in ("v83", "v107")] + OF_ONE_STAGE
SHORT = {"b": "batch_size", "j": "workers", "learning_rate": "lr", "weight_decay": "wd"}


@pytest.fixture
def refuse(capsys):
    """refuse(stage, argv, *words): main() must end with one line that holds the words."""

    def refuse(stage, argv, *words):
        assert_refused(called(importlib.import_module(stage).main, argv, capsys), *words)

    return refuse


def parse(stage, *argv):
    return importlib.import_module(stage).parse_args([*argv, "DATA"])


# ---- types ----


@pytest.mark.parametrize(("stage", "flag", "kind"), CASES)
def test_wrong_values_are_refused(refuse, stage, flag, kind):
    for value in KINDS[kind][0]:
        refuse(stage, [flag, value, "DATA"], flag)


@pytest.mark.parametrize(("stage", "flag", "kind"), CASES)
def test_right_values_pass(stage, flag, kind):
    dest = flag.lstrip("-").replace("-", "_")
    for value, expected in KINDS[kind][1].items():
        nodes = ["--world-size", "1000"] if flag == "--rank" else []
        found = getattr(parse(stage, *nodes, flag, value), SHORT.get(dest, dest))
        assert (found, type(found)) == (expected, type(expected))


def test_refusal_by_a_whole_command(tmp_path):
    result = run(ROOT / "exp" / "v98.py", "--lr", "-1", tmp_path)
    assert_refused(result, "v98.py: error: ", "--lr", "-1")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bad-images", "zero"], ["--bad-images zero", "--mode train"]),
        (["--mode", "extract", "--weight", "w", "--bad-images", "skip"], ["--bad-images skip"]),
        (["--mode", "extract"], ["--weight"]),
        (["--start-over", "--resume", "auto"], ["--start-over", "--resume auto"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--world-size", "2", "--rank", "2"], ["--rank 2", "--world-size 2"]),
        (["--dist-url", "node0"], ["--dist-url node0", "tcp://HOST:PORT"]),
    ],
)
def test_flags_that_contradict_each_other(refuse, argv, words):
    refuse("v86", [*argv, "DATA"], *words)


def test_a_command_without_data(refuse):
    refuse("v83", [], "DATA")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("flag", "replacement"),
    [
        ("--exact", "scripts/dev/published_augmentation.py"),
        ("--tensorboard", "scripts/plot_log.py --tensorboard FOLDER"),
    ],
)
def test_removed_flags_say_what_replaces_them(refuse, stage, flag, replacement):
    refuse(stage, [flag, "DATA"], f"{flag}: was removed", replacement)
    assert (ROOT / replacement.split()[0]).exists()


# ---- --help ----


@pytest.fixture
def help_text(capsys, monkeypatch):
    """help_text(stage): what --help prints on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "1000")

    def help_text(stage):
        result = called(importlib.import_module(stage).main, ["--help"], capsys)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    return help_text


def groups(text):
    """{title of a group: {first long name of a flag, as an attribute: its line}} of a help text."""
    found, title = {}, None
    for line in re.sub(r"\n {8,}", " ", text).splitlines():  # each flag on one line
        heading = re.fullmatch(r"(\w+):", line)
        name = re.match(r"  (?:-\w \w+, )?--([\w-]+)|  (DATA) ", line)
        if heading:
            title = heading[1]
            found[title] = {}
        elif title and name:
            found[title][(name[1] or name[2].lower()).replace("-", "_")] = line
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_all_flags_in_groups(help_text, stage):
    text = help_text(stage)
    assert importlib.import_module(stage).__doc__ in text
    shown = groups(text)
    shown.pop("options")  # -h
    assert list(shown) == ["recipe", "data", "run", "distributed", "extraction"]
    names = [name for group in shown.values() for name in group]
    assert sorted(names) == sorted(vars(parse(stage)))
    recipe = (COMMON | RECIPES[stage]).keys() - {"weight"}
    assert recipe <= shown["recipe"].keys()


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_every_default(help_text, stage):
    lines = {}
    for group in groups(help_text(stage)).values():
        lines |= group
    for name, value in vars(parse(stage)).items():
        if name in ("weight", "bad_images"):  # depend on other flags: in words
            assert "default" in lines[name]
        elif name != "data" and value is not None and value is not False:
            assert f"(default: {value})" in lines[name]


# ---- a GPU that torch cannot use ----

ASKING = [["--gpu", "0"], ["--multiprocessing-distributed"]]
WITH_GPU = any(Path("/dev").glob("nvidia[0-9]*"))


@pytest.fixture
def nvidia_smi(tmp_path):
    """A folder with a stand-in for the driver's command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\n")
    (folder / "nvidia-smi").chmod(0o755)
    return folder


@pytest.fixture
def without_cuda(monkeypatch, tmp_path):
    """torch sees no GPU, the environment hides none, and there is no nvidia-smi."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def command(tmp_path, *flags):
    """One that ends soon: there are no images."""
    argv = ["-a", "test_efficientnet", "--no-pretrained", "--output", tmp_path / "out", *flags]
    return [*argv, tmp_path / "no-images"]


@pytest.mark.parametrize("asking", ASKING)
def test_a_gpu_that_torch_cannot_use(
    without_cuda, nvidia_smi, monkeypatch, tmp_path, refuse, asking
):
    """For instance with a driver that is too old: nobody wants to train on the CPU then."""
    monkeypatch.setenv("PATH", str(nvidia_smi))
    for mode in ([], ["--mode", "extract", "--weight", "some.pth.tar"]):
        refuse("v83", command(tmp_path, *asking, *mode), "cannot use this machine's GPU", "driver")
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_torch_cannot_use_under_torchrun(
    without_cuda, nvidia_smi, monkeypatch, tmp_path, refuse
):
    monkeypatch.setenv("PATH", str(nvidia_smi))
    monkeypatch.setenv("RANK", "0")
    refuse("v83", command(tmp_path), "cannot use this machine's GPU", "driver")


def test_a_gpu_that_torch_cannot_use_by_a_whole_command(nvidia_smi, tmp_path):
    """Without a GPU, or with a number in CUDA_VISIBLE_DEVICES that no GPU has."""
    result = run(
        ROOT / "exp" / "v83.py",
        *command(tmp_path, "--gpu", 0),
        PATH=str(nvidia_smi),
        CUDA_VISIBLE_DEVICES="99",
    )
    assert_refused(result, "v83.py: error: ", "cannot use this machine's GPU")


@pytest.mark.parametrize("asking", ASKING)
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_asking_for_the_cpu(
    without_cuda, nvidia_smi, monkeypatch, tmp_path, refuse, asking, hidden
):
    monkeypatch.setenv("PATH", str(nvidia_smi))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    refuse("v83", command(tmp_path, *asking), "no-images")


def test_nobody_asks_for_the_gpu(without_cuda, nvidia_smi, monkeypatch, tmp_path, refuse):
    monkeypatch.setenv("PATH", str(nvidia_smi))
    refuse("v83", command(tmp_path), "no-images")


@pytest.mark.skipif(WITH_GPU, reason="there is a GPU")
@pytest.mark.parametrize("asking", ASKING)
def test_a_machine_without_a_gpu(without_cuda, tmp_path, refuse, asking):
    """The published commands ask for GPUs, and run there too."""
    refuse("v83", command(tmp_path, *asking), "no-images")
