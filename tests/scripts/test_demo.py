"""scripts/demo.py: its commands parse and chain, its table is right, other folders stay."""

import importlib

import pytest

import demo
import hash_images
import report
from conftest import ROOT, assert_refused, run


@pytest.mark.parametrize("stage", demo.STAGES)
def test_commands_parse_and_chain(stage):
    commands = [demo.extract_command(stage, "demo")]
    if stage != "start":
        commands.append(demo.train_command(stage, "demo"))
        _, *flags = demo.train_command(stage, "demo", seed=2)
        assert flags[flags.index("--seed") + 1] == "2"
    for script, *flags in commands:
        assert (ROOT / script).is_file()
        args = importlib.import_module(script.removeprefix("exp/").removesuffix(".py")).parse_args(
            flags
        )
        assert args.arch == demo.ARCH
        assert args.output == f"demo/exp/{stage}"
    if stage == "start":
        assert args.weight == demo.START and (ROOT / demo.START).is_file()
        return
    # An extraction loads the last checkpoint of the training before it.
    assert (
        demo.checkpoint(stage, "demo")
        == f"demo/exp/{stage}/train/checkpoint_{args.epochs - 1:04}.pth.tar"
    )
    previous = {"v83": "start", "v86": "v83", "v98": "v86", "v107": "v98"}.get(stage)
    assert args.weight == (demo.checkpoint(previous, "demo") if previous else None)
    assert args.no_pretrained == (previous is None)


def test_table():
    lines = demo.table(
        [demo.Score("v83", 0.51234, 0.3, 61.7), demo.Score("dHash, 256 bits", 1, 0, 2)]
    ).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| v83 | 0.5123 | 0.3000 | 62 |",
        "| dHash, 256 bits | 1.0000 | 0.0000 | 2 |",
    ]


def test_means_of_several_seeds():
    seeds = [[demo.Score("v83", 0.5, 0.3, 60)], [demo.Score("v83", 0.7, 0.4, 62)]]
    for scores in seeds:
        scores.append(demo.Score("dHash, 256 bits", 0.414, 0.393, 2))
    assert demo.table_of_means(seeds).splitlines()[2:] == [
        "| v83 | 0.600 (0.500-0.700) | 0.350 |",
        "| dHash, 256 bits | 0.414 | 0.393 |",
    ]


@pytest.fixture
def commands(monkeypatch):
    """The commands that the demo would run, in a list: running them takes minutes."""
    commands = []

    def record(command):
        commands.append(command)
        return '{"average_precision": 0, "recall_p90": 0}'

    monkeypatch.setattr(demo, "run_command", record)
    return commands


def test_every_seed_trains_every_stage_and_the_published_seeds_come_last(tmp_path, commands):
    assert demo.main(["--folder", f"{tmp_path}/demo", "--seeds", "3"]) == 0
    trained = [
        command for command in commands if f"{tmp_path}/demo/input/training_images/" in command
    ]
    seeds = []
    for command in trained:
        seeds.append(command[command.index("--seed") + 1] if "--seed" in command else "published")
    stages = len(demo.STAGES) - 1  # "start" is not trained
    assert seeds == ["2"] * stages + ["1"] * stages + ["published"] * stages


def test_ends_with_a_page(tmp_path, commands, capsys):
    folder = f"{tmp_path}/demo"
    assert demo.main(["--folder", folder]) == 0
    script, *flags = commands[-1]
    args = report.parse_args(flags)
    assert script == "scripts/report.py"
    assert ["scripts/eval_metrics.py", str(args.submission), str(args.ground_truth)] in commands
    assert args.submission.name == "v98_iso_phase2.h5"
    hashes = next(command for command in commands if command[0] == "scripts/dev/hash_images.py")
    hashes = hash_images.parse_args(hashes[1:])
    assert hashes.phase == 2 and demo.HASHES.keys() == set(hash_images.HASHES)
    scored = [command[1] for command in commands if command[0] == "scripts/eval_metrics.py"]
    assert scored[-2:] == [f"{hashes.output}/{name}.csv" for name in demo.HASHES]
    assert capsys.readouterr().out.endswith(f"To look at: {args.output.as_uri()}\n")


def test_replaces_its_own_files_and_no_others(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    demo.prepare(mine)
    (mine / "exp" / "v83").mkdir(parents=True)
    demo.prepare(mine)
    assert not (mine / "exp").exists()
    (theirs / "input").mkdir(parents=True)
    (theirs / "input" / "photo.jpg").touch()
    assert_refused(run("scripts/demo.py", "--folder", theirs), theirs, "--folder")
    assert (theirs / "input" / "photo.jpg").exists()


def test_stops_at_the_first_failure(tmp_path):
    """A file where the data set goes, in a folder that a demo made: make_dataset.py refuses it."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / demo.MARKER).touch()
    (folder / "input").touch()
    result = run("scripts/demo.py", "--folder", folder)
    assert result.returncode == 2
    assert f"$ python scripts/make_dataset.py {folder}/input" in result.stdout
    assert result.stdout.count("$ python") == 1  # nothing ran after it
    first, second = [line for line in result.stderr.splitlines() if "error:" in line]
    assert "make_dataset.py: error:" in first
    assert "demo.py: error: scripts/make_dataset.py ended with code 2" in second
