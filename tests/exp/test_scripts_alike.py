"""The four experiments stand alone, have the same infrastructure, and differ by what they try."""

import ast
import difflib
import importlib
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, assert_refused, run
from test_repository import imported_modules

STAGES = ["v83", "v86", "v98", "v107"]
SYNC = ROOT / "scripts" / "dev" / "sync_infrastructure.py"
BANNER = "# ======== infrastructure"

# What all stages have in common, and what each changes: the table of published runs.
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

# What others call: names and parameters stay.
SIGNATURES = {
    "gem": "(x, p, eps=1e-06)",
    "ISCNet": "(backbone, fc_dim=256, p=1.0, eval_p=1.0)",
    "MemoryBankContrastiveLoss": (
        "(memory_size, embedding_size=256, pos_margin=0.0, neg_margin=1.0)"
    ),
    "parse_args": "(argv=None)",
    "train": "(args)",
    "extract": "(args)",
    "main": "(argv=None)",
}
AUGMENTATIONS = {
    "moderate_augmentation": "(input_size, mean, std)",
    "hard_augmentation": "(input_size, mean, std, overlay_paths)",
}


def text(stage):
    return (ROOT / "exp" / f"{stage}.py").read_text()


def without_docstring(source):
    """The lines of a script below its module docstring."""
    docstring = ast.parse(source).body[0]
    return source.splitlines()[docstring.end_lineno :]


def experiment(source):
    """{name: numbers of its lines} of what stands above the banner of the infrastructure, without
    docstrings and empty lines.

    A function or class has its own entry; all else, but for imports, is the entry "".
    """
    lines = source.splitlines()
    banner = next(number for number, line in enumerate(lines, 1) if line.startswith(BANNER))
    left_out = {number for number, line in enumerate(lines, 1) if not line}
    for node in ast.walk(ast.parse(source)):
        may_have = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if may_have and ast.get_docstring(node) is not None:
            left_out |= span(node.body[0])
    owner = dict.fromkeys(range(1, banner), "")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= span(node)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef) and node.lineno < banner:
            owner |= dict.fromkeys(span(node), node.name)
    parts = {}
    for number in sorted(owner.keys() - left_out):
        parts.setdefault(owner[number], []).append(number)
    return parts


def span(node):
    return set(range(node.lineno, node.end_lineno + 1))


def tags(source):
    """The stages that lines name as the origin of a change: `# v86`, with a colon where words
    follow.
    """
    return re.findall(r"# (v\d+)(?:: .*)?$", source, re.MULTILINE)


def tagged_lines(source, stage):
    """Numbers of the lines with a stage's tag, and of those in a statement with one at its
    beginning or end.

    The tag of a method means its first line alone, unless it is of a whole class or function.
    """
    tree, lines = ast.parse(source), source.splitlines()
    tagged = {number for number, line in enumerate(lines, 1) if stage in tags(line)}
    covered = set(tagged)
    for node in ast.walk(tree):
        is_method = isinstance(node, ast.FunctionDef) and node not in tree.body
        if isinstance(node, ast.stmt) and not is_method and tagged & {node.lineno, node.end_lineno}:
            covered |= span(node)
    return covered


def untagged_changes(old, new, old_source, new_source):
    """The changed passages of the experiment, by function, in which no line is marked as the new
    stage's.

    Tags of the old stage may go, and lines that it had added under them. v107, which is the odd one
    out, may also return to what was there before.
    """
    before, after = experiment(old_source), experiment(new_source)
    all_old_lines, all_new_lines = old_source.splitlines(), new_source.splitlines()
    given_up, added = tagged_lines(old_source, old), tagged_lines(new_source, new)
    untagged = []
    for name, new_numbers in after.items():
        old_numbers = before.get(name, [])
        old_lines = [all_old_lines[number - 1] for number in old_numbers]
        new_lines = [all_new_lines[number - 1] for number in new_numbers]
        without_tags = [re.sub(rf"  # {old}(: .*)?$", "", line) for line in old_lines]
        matcher = difflib.SequenceMatcher(None, without_tags, new_lines, autojunk=False)
        for kind, a, b, c, d in matcher.get_opcodes():
            is_given_up = given_up & set(old_numbers[a:b]) and (c == d or new == "v107")
            if kind != "equal" and not added & set(new_numbers[c:d]) and not is_given_up:
                untagged.append((name, old_lines[a:b], new_lines[c:d]))
    return untagged


def changed_lines(old, new, folder):
    """The number of lines that `diff` marks with < or >."""
    for name, lines in (("old", old), ("new", new)):
        (folder / name).write_text("\n".join(lines) + "\n")
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


# ---- each script alone ----


@pytest.mark.parametrize("stage", STAGES)
def test_imports_nothing_of_the_project(stage):
    folders = (".", "exp", "scripts", "scripts/*", "tests", "tests/*", "weights", "weights/*")
    own = {path.stem for folder in folders for path in ROOT.glob(f"{folder}/*.py")}
    own |= {"exp", "scripts", "tests", "weights", "common"}
    assert not imported_modules(ROOT / "exp" / f"{stage}.py") & own
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
def test_has_the_stable_names(stage):
    module = importlib.import_module(stage)
    expected = SIGNATURES if stage == "v107" else SIGNATURES | AUGMENTATIONS
    found = {name: str(inspect.signature(getattr(module, name))) for name in expected}
    assert found == expected


# ---- the recipe ----


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


# ---- the common infrastructure ----


def synchronize(folder, *flags):
    return run(SYNC, "--exp", folder, *flags)


@pytest.fixture
def copies(tmp_path):
    """A folder with copies of the four scripts."""
    for stage in STAGES:
        shutil.copy(ROOT / "exp" / f"{stage}.py", tmp_path)
    return tmp_path


def scripts(folder):
    return {stage: (folder / f"{stage}.py").read_text() for stage in STAGES}


def plant(folder, stage, old, new):
    """Replace a line's text, which the script has once, below the banner."""
    path = folder / f"{stage}.py"
    source = path.read_text()
    assert source.partition(BANNER)[2].count(old) == source.count(old) == 1
    path.write_text(source.replace(old, new))


def test_the_infrastructure_is_the_same_text():
    result = run(SYNC, "--check")
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_planted_difference_is_found_and_removed(copies, stage):
    before = scripts(copies)
    plant(copies, stage, "def check_gpu(args):", "def check_gpu(args, hidden=None):")
    planted = scripts(copies)
    result = synchronize(copies, "--check")
    assert result.returncode == 1
    assert result.stdout.splitlines() == [f"{copies / stage}.py: differs"]
    assert scripts(copies) == planted
    result = synchronize(copies)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [f"{copies / stage}.py: updated"]
    assert scripts(copies) == before
    assert synchronize(copies, "--check").returncode == 0


def test_a_change_of_v83_reaches_the_other_stages(copies):
    before = scripts(copies)
    old, new = "STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)", "STOP_SIGNALS = ()"
    plant(copies, "v83", old, new)
    assert synchronize(copies).returncode == 0
    assert scripts(copies) == {stage: source.replace(old, new) for stage, source in before.items()}


def test_only_tagged_lines_may_differ(copies):
    """v107 keeps its own lines of the infrastructure, but for one without the tag."""
    before = scripts(copies)["v107"]
    own = '        "--tta": args.tta,  # v107\n'
    plant(copies, "v107", own, own + '        "--gem-p": args.gem_p,\n')
    assert synchronize(copies, "--check").returncode == 1
    assert synchronize(copies).returncode == 0
    assert scripts(copies)["v107"] == before
    assert own in before


def test_a_tagged_line_without_a_place(copies):
    """v83 no longer has the line that v107's own line follows: its place is unknown."""
    plant(copies, "v83", '        "--amp": args.amp,\n', "")
    before = scripts(copies)["v107"]
    assert_refused(synchronize(copies), "v107.py", "--tta")
    assert scripts(copies)["v107"] == before


def test_a_script_without_the_banner(copies):
    path = copies / "v98.py"
    path.write_text(path.read_text().replace(BANNER, "# infrastructure"))
    assert_refused(synchronize(copies, "--check"), "v98.py", BANNER)


# ---- the differences ----


@pytest.mark.parametrize(("old", "new", "bound"), [("v83", "v86", 30), ("v86", "v98", 60)])
def test_stages_differ_by_little(old, new, bound, tmp_path):
    before, after = without_docstring(text(old)), without_docstring(text(new))
    assert changed_lines(before, after, tmp_path) <= bound


@pytest.mark.parametrize(("old", "new"), list(itertools.pairwise(STAGES)))
def test_changes_carry_the_tag_of_their_stage(old, new):
    """What differs from the stage before is marked by `# v86`, `# v98`, `# v107`; a function or
    class that is new, on its first line.
    """
    untagged = untagged_changes(old, new, text(old), text(new))
    assert not untagged, f"mark what differs from {old}.py by # {new}"
    if new != "v107":  # it has no augmentation
        assert experiment(text(old)).keys() <= experiment(text(new)).keys()


@pytest.mark.parametrize("stage", STAGES)
def test_tags_name_no_other_stage(stage):
    """`grep '# v86' exp/v86.py` lists the experiment; v83 is where the stages start."""
    assert set(tags(text(stage))) == ({stage} if stage != "v83" else set())
