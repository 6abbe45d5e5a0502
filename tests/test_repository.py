"""The frame: pinned requirements, their conda and GPU variants, Makefile, and what no source
file may contain.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from packaging.requirements import Requirement

from conftest import ROOT

FOLDERS = ("exp", "scripts", "weights")
PRODUCT = sorted(
    [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))]
)


def requirements(name):
    """{distribution: specifier} of a requirements file, with the files it includes."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found |= requirements(line.removeprefix("-r ").strip())
        elif line:
            requirement = Requirement(line)
            found[requirement.name.lower()] = str(requirement.specifier)
    return found


def imported_modules(path):
    """The top-level names of all absolute imports of a Python file, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def make(*arguments, cwd=ROOT):
    """`make` as a user types it, also where `make test` runs this: without the outer make's
    variables.
    """
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


def make_targets():
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "name",
    [
        "requirements.txt",
        "requirements-gpu.txt",
        "requirements-match.txt",
        "requirements-dev.txt",
    ],
)
def test_every_requirement_is_pinned(name):
    for distribution, specifier in requirements(name).items():
        assert re.fullmatch(r"==[\w.]+", specifier), f"{distribution}{specifier}"


def test_the_gpu_variant_differs_by_faiss_only():
    cpu, gpu = requirements("requirements.txt"), requirements("requirements-gpu.txt")
    assert cpu.pop("faiss-cpu") == gpu.pop("faiss-gpu")
    assert cpu == gpu


def test_demo_and_test_requirements_are_not_needed_at_run_time():
    assert not requirements("requirements-dev.txt").keys() & requirements("requirements.txt").keys()


def test_conda_installs_the_same_requirements():
    python, pip, from_pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert tuple(map(int, re.fullmatch(r"python=(\d+)\.(\d+)", python).groups())) >= (3, 11)
    assert pip == "pip"
    assert from_pip == {"pip": ["-r requirements-gpu.txt"]}


@pytest.fixture(scope="module")
def distributions():
    """{module: the names of the distributions that have it}; takes a quarter of a second."""
    return importlib.metadata.packages_distributions()


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_imports_are_required(path, distributions):
    """Experiments import what requirements.txt names; scripts also their siblings and the demo's
    extras.
    """
    pinned = requirements("requirements.txt")
    own = set()
    if path.parent.name != "exp":
        pinned |= requirements("requirements-dev.txt")
        own = {"common", "benchmarks", *(sibling.stem for sibling in PRODUCT)}
    for module in imported_modules(path) - sys.stdlib_module_names - own:
        names = {name.lower() for name in distributions.get(module, [module])}
        assert names & pinned.keys(), (
            f"{path.name} imports {module}, which no requirements file names"
        )


def is_command(path):
    """Whether a Python file defines main()."""
    definitions = ast.parse(path.read_text()).body
    names = {node.name for node in definitions if isinstance(node, ast.FunctionDef)}
    return "main" in names


SCRIPTS = sorted((ROOT / "scripts").glob("**/*.py"))
COMMANDS = {path.stem for path in SCRIPTS if is_command(path)}


def test_the_commands_are_found():
    assert {"match", "demo", "export", "draw_figures", "benchmark"} <= COMMANDS
    assert not {"errors", "published_augmentation", "measuring"} & COMMANDS


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_nothing_in_scripts_imports_a_command(path):
    """What several commands need is in scripts/common; a command may run another as a process."""
    assert not imported_modules(path) & COMMANDS


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_libmagic_comes_before_augly(path):
    """Where the system has no libmagic, AugLy can be imported after pylibmagic only."""
    first = {}
    for number, line in enumerate(path.read_text().splitlines()):
        if module := re.match(r"\s*(?:import|from) (augly|pylibmagic)\b", line):
            first.setdefault(module[1], number)
    if "augly" in first:
        assert first.get("pylibmagic", float("inf")) < first["augly"]


def test_only_the_benchmark_and_tests_import_the_loss_oracle():
    users = [path for path in PRODUCT if "pytorch_metric_learning" in imported_modules(path)]
    assert users == [ROOT / "scripts/dev/benchmarks/loss.py"]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_nothing_runs_text_as_code(path):
    """No shell, no eval or exec, no unpickling of more than tensors."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            assert not (
                isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec", "__import__"}
            ), where
            flags = {
                word.arg: word.value.value
                for word in node.keywords
                if isinstance(word.value, ast.Constant)
            }
            assert flags.get("shell", False) is False, where
            assert flags.get("allow_pickle", False) is False, where
            assert flags.get("weights_only", True) is True, where
        elif isinstance(node, ast.ImportFrom) and node.module == "pickle":
            # The exception that a refused checkpoint raises loads nothing.
            assert [alias.name for alias in node.names] == ["UnpicklingError"], where
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
            )
            assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & set(
                names
            ), where


def test_make_alone_lists_the_targets():
    result = make()
    assert result.returncode == 0, result.stderr
    assert set(re.findall(r"^make (\w+)", result.stdout, re.MULTILINE)) == make_targets()


@pytest.mark.parametrize("target", ["demo", "test", "faults", "benchmark", "figures", "lint"])
def test_targets_install_once_and_again_after_a_change(target, tmp_path):
    for name in ["Makefile", "requirements-base.txt", "requirements.txt", "requirements-dev.txt"]:
        shutil.copy(ROOT / name, tmp_path)
    assert "pip install" in make("--dry-run", target, cwd=tmp_path).stdout
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "ready").touch()
    assert "pip install" not in make("--dry-run", target, cwd=tmp_path).stdout
    os.utime(tmp_path / "requirements-base.txt", (2**31, 2**31))
    assert "pip install" in make("--dry-run", target, cwd=tmp_path).stdout


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3.9"
    pretend = "import sys; sys.version_info = (3, 9); exec(sys.argv[2])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{pretend}' \"$@\"\n")
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ["requirements-base.txt", "requirements.txt", "requirements-dev.txt"]:
        (tmp_path / name).touch()
    result = make("test", f"PYTHON={old}", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[0].startswith(
        f"make: error: {old}: Python 3.11 or newer is needed, this is 3.9"
    )
    assert not (tmp_path / ".venv").exists()


def test_the_paper_is_the_preferred_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert (paper["authors"], paper["year"]) == (
        [{"family-names": "Yokoo", "given-names": "Shuhei"}],
        2021,
    )
    assert paper["url"].endswith("2112.04323")
    assert citation["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")
