"""scripts/dev/benchmark.py: A and B agree where they must, its table and JSON are well-formed.

Nothing here is timed.
"""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
from benchmarks.augmentation import Augmentation
from benchmarks.comparison import compare_images
from benchmarks.database_augmentation import DatabaseAugmentation
from benchmarks.evaluation import Evaluation
from benchmarks.evaluation_search import EvaluationSearch
from benchmarks.extraction_input import ExtractionInput
from benchmarks.extraction_model import ExtractionModel
from benchmarks.extraction_onnx import ExtractionOnnx
from benchmarks.loss import Loss
from benchmarks.measuring import PartFailed, in_a_process, with_peak
from benchmarks.ranks import is_communication
from benchmarks.search import Search
from benchmarks.traces import covered
from benchmarks.training_step import TrainingStep
from conftest import assert_refused, called, run


@pytest.fixture
def photos(tmp_path):
    """Paths of two small JPEGs."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(2):
        path = tmp_path / f"{number}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((128, 96)).save(path, quality=90)
        paths.append(str(path))
    return paths


def agreement(part, case, photos=()):
    """What a part says of A and B after a call of each. These parts write no files."""
    comparison = part(case, list(photos), None)
    assert comparison.amount > 0
    return comparison.agreement(comparison.baseline(0), comparison.ours(0))


def test_loss_agrees():
    found = agreement(Loss, (32, 600))
    assert found["loss difference"] < 2e-6
    assert found["gradient difference"] < 1e-7
    assert 0.01 < found["active negatives %"] < 1


def test_evaluation_agrees():
    found = agreement(Evaluation, 300)
    assert found["csv identical"] is True
    assert found["score difference"] < 1e-12


def test_evaluation_finds_some_but_not_all():
    _, average_precision, recall_p90 = Evaluation(300, [], None).baseline(0)
    assert 0.2 < recall_p90 < average_precision < 1


def test_search_agrees():
    found = agreement(Search, 500)
    assert found["equal indices %"] > 99
    assert found.get("max difference", 0) < 1e-5


def test_evaluation_search_agrees():
    found = agreement(EvaluationSearch, 500)
    assert found["pairs in common %"] > 99.9
    assert found.get("max difference", 0) < 1e-5


def test_database_augmentation_agrees():
    found = agreement(DatabaseAugmentation, 300)
    assert found["sums identical"] is True
    assert found.get("max difference", 0) < 1e-6


def test_extraction_input_is_identical(photos):
    assert agreement(ExtractionInput, (64, False), photos)["identical"] is True


def test_fast_extraction_input_is_within_one(photos):
    found = agreement(ExtractionInput, (100, True), photos)
    assert 0 < found["max difference"] < 1.01 / 255
    assert found["PSNR dB"] > 50


@pytest.mark.parametrize("part", [ExtractionModel, ExtractionOnnx])
def test_extraction_agrees(part):
    found = agreement(part, ("test_efficientnet", 64))
    assert found["smallest cosine"] > 0.9999
    assert found.get("max difference", 0) < 1e-4


def test_training_steps_agree():
    """On a CPU, the published loop in bfloat16, v83's in float32: losses of three times eight
    steps.
    """
    torch.manual_seed(0)
    comparison = TrainingStep(("test_efficientnet", 32, 8), [], None, device="cpu")
    for number in range(3):
        expected = comparison.baseline(number)
        found = comparison.ours(number)
        assert found == pytest.approx(expected, rel=0.05)
    assert comparison.agreement(expected, found)["device busy % A, B"] == [0, 0]


def test_augmentation_draws_the_same_distribution(photos):
    found = agreement(Augmentation, 64, photos)
    assert {name.partition(" ")[0] for name in found} == {"moderate", "hard", "each", "left"}
    for name in ("hard mean A, B", "hard deviation A, B"):
        assert len(found[name]) == 2
        assert all(0 < value < 1 for value in found[name])
    assert found["moderate max difference"] < 1.01 / 255
    quarter, median = found["hard PSNR dB, quarter, median"]
    assert 0 < quarter <= median


def test_compare_images():
    black = torch.zeros(3, 4, 4)
    gray = torch.full((3, 4, 4), 0.2)
    assert compare_images([black, black], [black, black]) == {"identical": True}
    assert compare_images([black, black], [black, gray]) == {
        "identical %": 50,
        "max difference": pytest.approx(0.1),
        "PSNR dB": pytest.approx(20),
    }


def test_communication_counts_overlaps_once(tmp_path):
    trace = tmp_path / "trace.json"
    events = []

    def add(name, start, duration):
        events.append({"name": name, "ts": start, "dur": duration})

    add("Optimizer.step#SGD.step", 100, 5)
    add("Optimizer.step#SGD.step", 200, 5)
    # 110 to 140 counts once, 195 to 200 to the last step; the rest is before or something else.
    add("gloo:all_reduce", 110, 20)
    add("gloo:broadcast", 120, 20)
    add("gloo:all_gather", 122, 2)
    add("gloo:all_gather", 0, 50)
    add("gloo:all_gather", 195, 50)
    add("aten::mm", 150, 10)
    events.append({"name": "gloo:no duration", "ts": 1})
    trace.write_text(json.dumps({"traceEvents": events}))
    assert covered(trace, is_communication) == pytest.approx(35)


def test_peak_memory_is_that_of_the_call():
    _, small = with_peak(lambda: np.ones(10**6))
    _, large = with_peak(lambda: np.ones(4 * 10**7))
    assert small < 1e8
    assert 3.1e8 < large < 4.2e8


@pytest.mark.parametrize("name", benchmark.PARTS)
def test_every_part_says_what_a_and_b_are(name):
    part = benchmark.PARTS[name]
    words = benchmark.describe(name, part).split()
    assert words == f"{name}: {part.description} A: {part.published} B: {part.own}".split()


def test_table_and_json(photos, tmp_path):
    """The command itself: a part that runs, one that is skipped without a GPU, and one of several
    processes.
    """
    figures = tmp_path / "figures.json"
    parts = ["ranks", "extraction-input", "training-step"]
    options = ["--rounds", 1, "--photos", tmp_path, "--json", figures]
    result = run("scripts/dev/benchmark.py", *parts, *options)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in parts:
        assert benchmark.describe(name, benchmark.PARTS[name]) in result.stdout
    header = next(number for number, line in enumerate(lines) if line.startswith("part "))
    table = lines[header + 1 :]
    assert [line.split()[0] for line in table] == [
        "training-step",
        "extraction-input",
        "extraction-input",
        "ranks",
    ]
    assert {line.rfind(" images ") for line in table} == {table[0].index(" images ")}
    content = json.loads(figures.read_text())
    rows = {row["part"]: row for row in content["rows"] if "fast" not in row["case"]}
    assert content["rounds"] == 1
    assert list(rows) == ["training-step", "extraction-input", "ranks"]
    assert "CUDA" in rows["training-step"]["skipped"]
    assert rows["extraction-input"]["agreement"]["identical"] is True
    assert {"efficiency %", "communication %"} <= rows["ranks"]["agreement"].keys()
    for row in rows["extraction-input"], rows["ranks"]:
        assert 0 < row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        for side in "baseline", "ours":
            assert len(row["seconds"][side]) == 1
            assert row[f"{side}_per_second"] > 0
            assert row[f"{side}_peak_mb"] >= 0


def test_a_process_that_ends_without_a_result_is_a_failure():
    with pytest.raises(PartFailed, match="exit code 3"):
        in_a_process(os._exit, 3)


def test_bad_input_is_refused(tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    for arguments, words in {
        ("los",): ("los", "augmentation"),
        ("loss", "--rounds", "0"): ("--rounds", "'0'"),
        ("loss", "--ranks", "2"): ("--ranks", "2"),
        ("loss", "--ranks", "1,x"): ("--ranks", "1,x"),
        ("loss", "--ranks", "1,3"): ("--ranks", "1,3"),
        ("loss", "--json", f"{tmp_path}/none/figures.json"): ("--json", "none"),
        ("loss", "--photos", f"{tmp_path}/none"): (f"{tmp_path}/none",),
        ("loss", "--photos", f"{tmp_path}"): ("text.jpg",),
    }.items():
        assert_refused(called(benchmark.main, arguments, capsys), *words)
