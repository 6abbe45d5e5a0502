"""The four experiments stand alone, read alike, and differ by the experiment only."""

import ast
import difflib
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from test_frame import imported_modules

STAGES = ["v83", "v86", "v98", "v107"]
SECTIONS = [
    "recipe",
    "model",
    "loss",
    "augmentation",
    "data",
    "distributed",
    "checkpoint",
    "train",
    "extract",
    "main",
]

# What every stage shares, and what sets it apart: the table of published runs.
COMMON = {
    "arch": "tf_efficientnetv2_m_in21ft1k",
    "wd": 1e-6,
    "gem_p": 1.0,
    "pos_margin": 0.0,
    "sample_size": 1000000,
}
RECIPES = {
    "v83": {
        "input_size": 256,
        "epochs": 10,
        "lr": 0.1,
        "batch_size": 128,
        "neg_margin": 1.0,
        "memory_size": 20000,
        "seed": 9,
        "ncrops": 2,
        "reference_world_size": 4,
        "weight": None,
    },
    "v86": {
        "input_size": 384,
        "epochs": 7,
        "lr": 0.1,
        "batch_size": 128,
        "neg_margin": 1.0,
        "memory_size": 20000,
        "seed": 99,
        "ncrops": 2,
        "reference_world_size": 8,
        "weight": "v83/train/checkpoint_0005.pth.tar",
    },
    "v98": {
        "input_size": 512,
        "epochs": 3,
        "lr": 0.1,
        "batch_size": 64,
        "neg_margin": 1.0,
        "memory_size": 20000,
        "seed": 999,
        "ncrops": 2,
        "reference_world_size": 16,
        "weight": "v86/train/checkpoint_0005.pth.tar",
    },
    "v107": {
        "input_size": 512,
        "epochs": 10,
        "lr": 0.5,
        "batch_size": 16,
        "neg_margin": 1.1,
        "memory_size": 1000,
        "seed": 99999,
        "num_negatives": 30,
        "reference_world_size": 16,
        "weight": "v98/train/checkpoint_0001.pth.tar",
    },
}

# The published command lines: what is common to them, and the rest of each run.
PUBLISHED = (
    "-a tf_efficientnetv2_m_in21ft1k --dist-url 'tcp://localhost:10001' "
    "--multiprocessing-distributed --world-size 1"
    " --rank 0 --wd 1e-6 --gem-p 1.0 --pos-margin 0.0 --sample-size 1000000"
)
RUNS = [
    "v83.py --seed 9 --epochs 5 --lr 0.1 --batch-size 128 --ncrops 2 --neg-margin 1.0 "
    "--input-size 256"
    " --memory-size 20000",
    "v83.py --seed 90 --epochs 10 --lr 0.1 --batch-size 128 --ncrops 2 --neg-margin 1.0 "
    "--input-size 256"
    " --memory-size 20000 --resume ./v83/train/checkpoint_0004.pth.tar",
    "v86.py --seed 99 --epochs 7 --lr 0.1 --batch-size 128 --ncrops 2 --neg-margin 1.0 "
    "--input-size 384"
    " --memory-size 20000 --weight ./v83/train/checkpoint_0005.pth.tar",
    "v98.py --seed 999 --epochs 3 --lr 0.1 --batch-size 64 --ncrops 2 --neg-margin 1.0 "
    "--input-size 512"
    " --memory-size 20000 --weight ./v86/train/checkpoint_0005.pth.tar",
    "v107.py --seed 99999 --epochs 10 --lr 0.5 --batch-size 16 --neg-margin 1.1 --input-size 512"
    " --memory-size 1000 --weight ./v98/train/checkpoint_0001.pth.tar",
]


def text(stage):
    return (ROOT / "exp" / f"{stage}.py").read_text()


def sections(source):
    """[(name, first line, last line)] of the banners, 1-based; what stands before the first one has
    no name.
    """
    lines = source.splitlines()
    starts = [
        (m[1], n)
        for n, line in enumerate(lines, 1)
        if (m := re.fullmatch(r"# ---- (\w+) ----", line))
    ]
    ends = [n - 1 for _, n in starts[1:]] + [len(lines)]
    return [(name, first, last) for (name, first), last in zip(starts, ends, strict=True)]


def definitions(source):
    """{name: (section, first line, last line)} of the top-level functions and classes, decorators
    included.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            section = next(name for name, start, end in sections(source) if start <= first <= end)
            found[node.name] = (section, first, node.end_lineno)
    return found


def tags(lines):
    """The stages that lines name as the origin of a change: `# v86`, with a colon where words
    follow.
    """
    return re.findall(r"# (v\d+)(?:: .*)?$", "\n".join(lines), re.MULTILINE)


def untagged_changes(old, new):
    """The changes from a stage's lines to the next one's for which the next one takes no
    responsibility.

    A changed passage begins with its stage's tag; the old stage's own tags go, and what it had
    added under them may go.
    """
    old_lines, new_lines = (
        [re.sub(rf"  # {old[0]}(: .*)?$", "", line) for line in lines] for _, lines in (old, new)
    )
    hunks = difflib.SequenceMatcher(None, old_lines, new_lines, autojunk=False).get_opcodes()
    changes = [(old[1][a:b], new[1][c:d]) for kind, a, b, c, d in hunks if kind != "equal"]
    return [
        (removed, added)
        for removed, added in changes
        if (tags(added[:1]) != [new[0]] if added else tags(removed[:1]) != [old[0]])
    ]


def without_removed(source, successor):
    """`source` less the whole sections, functions and classes that `successor` no longer has."""
    kept_sections = {name for name, _, _ in sections(successor)}
    kept_definitions = definitions(successor).keys()
    spans = [(first, last) for name, first, last in sections(source) if name not in kept_sections]
    spans += [
        (first, last)
        for name, (_, first, last) in definitions(source).items()
        if name not in kept_definitions
    ]
    lines = source.splitlines()
    removed = set()
    for first, last in spans:
        while last < len(lines) and not lines[last]:
            last += 1
        removed |= set(range(first, last + 1))
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in removed) + "\n"


def changed_lines(old, new, folder):
    """The number of lines that `diff` marks with < or >."""
    (folder / "old").write_text(old)
    (folder / "new").write_text(new)
    result = subprocess.run(
        ["diff", folder / "old", folder / "new"], capture_output=True, text=True
    )
    assert result.returncode < 2, result.stderr
    return len(re.findall("^[<>]", result.stdout, re.MULTILINE))


def values(args, names):
    """The arguments of these names; the weights as a path below exp/, where the published commands
    run.
    """
    found = {name: getattr(args, name) for name in names}
    if found["weight"]:
        found["weight"] = os.path.relpath(ROOT / "exp" / found["weight"], ROOT / "exp")
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_imports_nothing_of_the_project(stage):
    own = {
        path.stem
        for folder in ("exp", "scripts", "tests", ".")
        for path in ROOT.glob(f"{folder}/*.py")
    }
    assert not imported_modules(ROOT / "exp" / f"{stage}.py") & (own | {"exp", "scripts", "tests"})
    assert "sys.path" not in text(stage)


def test_importing_has_no_side_effects(tmp_path):
    """Alone in an empty folder, the scripts import silently and make no file."""
    for stage in STAGES:
        shutil.copy(ROOT / "exp" / f"{stage}.py", tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(STAGES)}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} == {f"{stage}.py" for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_sections_stand_in_order_and_none_is_empty(stage):
    found = sections(text(stage))
    names = [name for name, _, _ in found]
    assert names == [name for name in SECTIONS if name in names]
    assert {"recipe", "model", "loss", "data", "train", "extract", "main"} <= set(names)
    starts = [node.lineno for node in ast.parse(text(stage)).body]
    assert all(any(first <= start <= last for start in starts) for _, first, last in found)


@pytest.mark.parametrize("stage", STAGES)
def test_has_the_stable_names(stage):
    names = {"gem", "ISCNet", "MemoryBankContrastiveLoss", "parse_args", "train", "extract", "main"}
    if stage != "v107":
        names |= {"moderate_augmentation", "hard_augmentation"}
    assert names <= definitions(text(stage)).keys()


@pytest.mark.parametrize(("old", "new"), list(itertools.pairwise(STAGES)))
def test_shared_functions_are_the_same_text(old, new):
    """Outside the recipe, what two stages both define differs only where the new stage's tag
    stands.
    """
    sources = {stage: text(stage) for stage in (old, new)}
    places = {stage: definitions(source) for stage, source in sources.items()}
    for name in places[old].keys() & places[new].keys():
        section = places[new][name][0]
        assert section == places[old][name][0], f"{name} moved"
        if section == "recipe":
            continue
        lines = {}
        for stage in (old, new):
            _, first, last = places[stage][name]
            lines[stage] = sources[stage].splitlines()[first - 1 : last]
        assert not untagged_changes((old, lines[old]), (new, lines[new])), name


@pytest.mark.parametrize(
    ("old", "new", "bound"), [("v83", "v86", 60), ("v86", "v98", 120), ("v98", "v107", 300)]
)
def test_stages_differ_by_the_experiment_only(old, new, bound, tmp_path):
    before, after = text(old), text(new)
    if new == "v107":  # the one stage that drops whole parts: they do not count
        before = without_removed(before, after)
    assert changed_lines(before, after, tmp_path) <= bound


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipe_names_its_changes(stage):
    """`grep '# v86' exp/v86.py` lists the experiment; v83 is where the stages start."""
    assert set(tags(text(stage).splitlines())) == ({stage} if stage != "v83" else set())


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_the_published_recipe(stage):
    module = importlib.import_module(stage)
    args = module.parse_args(["../input/training_images/"])
    expected = COMMON | RECIPES[stage]
    assert values(args, expected) == expected
    assert {type(value) for value in vars(args).values()} <= {str, int, float, bool, type(None)}
    assert (args.mode, args.target_set, args.momentum, args.start_epoch, args.phase) == (
        "train",
        "qr",
        0.9,
        0,
        1,
    )


@pytest.mark.parametrize("run", RUNS)
def test_published_training_commands_parse_to_the_recipe(run):
    script, *argv = shlex.split(f"{run} {PUBLISHED} ../input/training_images/")
    stage = script.removesuffix(".py")
    args = importlib.import_module(stage).parse_args(argv)
    expected = COMMON | RECIPES[stage]
    if stage == "v83":  # trained in two runs
        expected |= {"epochs": 10, "seed": 90} if args.resume else {"epochs": 5, "seed": 9}
    assert values(args, expected) == expected
    assert (args.world_size, args.rank, args.dist_url) == (1, 0, "tcp://localhost:10001")
    assert args.multiprocessing_distributed
    assert args.data == "../input/training_images/"


@pytest.mark.parametrize("stage", STAGES)
def test_the_published_extraction_command_parses(stage):
    command = (
        "-a tf_efficientnetv2_m_in21ft1k --batch-size 128 --mode extract --gem-eval-p 1.0"
        f" --weight ./{stage}/train/checkpoint_0009.pth.tar --input-size 512 --target-set qrt "
        f"../input/"
    )
    args = importlib.import_module(stage).parse_args(shlex.split(command))
    assert (args.mode, args.target_set, args.batch_size, args.gem_eval_p) == (
        "extract",
        "qrt",
        128,
        1.0,
    )
    assert args.weight == f"./{stage}/train/checkpoint_0009.pth.tar"
    assert args.data == "../input/"
