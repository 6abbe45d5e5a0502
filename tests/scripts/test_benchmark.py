"""scripts/dev/benchmark.py: A and B agree where they must, its table and JSON are well-formed.

Nothing here is timed.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
from conftest import assert_refused, called, run


@pytest.fixture
def photos(tmp_path):
    """Two small JPEGs."""
    rng, paths = np.random.default_rng(0), []
    for number in range(2):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        paths.append(str(tmp_path / f"{number}.jpg"))
        coarse.resize((128, 96)).save(paths[-1], quality=90)
    return paths


def agreement(setup, case, photos=()):
    """What a part says of A and B after a call of each."""
    pair = setup(case, list(photos))
    assert pair.amount > 0
    return pair.agreement(pair.baseline(0), pair.ours(0))


def test_loss_agrees():
    found = agreement(benchmark.loss, (32, 600))
    assert found["loss difference"] < 2e-6 and found["gradient difference"] < 1e-7
    assert 0.01 < found["active negatives %"] < 1


def test_evaluation_agrees():
    found = agreement(benchmark.evaluation, 300)
    assert found["csv identical"] and found["score difference"] < 1e-12


def test_evaluation_finds_some_but_not_all():
    _, average_precision, recall_p90 = benchmark.evaluation(300, []).baseline(0)
    assert 0.2 < recall_p90 < average_precision < 1


def test_search_agrees():
    found = agreement(benchmark.search, 500)
    assert found["equal indices %"] > 99 and found.get("max difference", 0) < 1e-5


def test_evaluation_search_agrees():
    found = agreement(benchmark.evaluation_search, 500)
    assert found["pairs in common %"] > 99.9 and found.get("max difference", 0) < 1e-5


def test_database_augmentation_agrees():
    found = agreement(benchmark.database_augmentation, 300)
    assert found["sums identical"] and found.get("max difference", 0) < 1e-6


def test_extraction_input_is_identical(photos):
    assert agreement(benchmark.extraction_input, (64, False), photos)["identical"] is True


def test_fast_extraction_input_is_within_one(photos):
    found = agreement(benchmark.extraction_input, (100, True), photos)
    assert 0 < found["max difference"] < 1.01 / 255 and found["PSNR dB"] > 50


@pytest.mark.parametrize("part", [benchmark.extraction_model, benchmark.extraction_onnx])
def test_extraction_agrees(part):
    found = agreement(part, ("test_efficientnet", 64))
    assert found["smallest cosine"] > 0.9999 and found.get("max difference", 0) < 1e-4


def test_training_steps_agree():
    """On a CPU, the published loop in bfloat16, v83.train_step in float32: losses of three times
    eight steps.
    """
    torch.manual_seed(0)
    pair = benchmark.training_steps("test_efficientnet", 32, 8, torch.device("cpu"))
    for number in range(3):
        expected, found = pair.baseline(number), pair.ours(number)
        assert found == pytest.approx(expected, rel=0.05)
    assert pair.agreement(expected, found)["device busy % A, B"] == [0, 0]


def test_augmentation_draws_the_same_distribution(photos):
    found = agreement(benchmark.augmentation, 64, photos)
    assert {name.partition(" ")[0] for name in found} == {"moderate", "hard", "each", "left"}
    for values in found["hard mean A, B"], found["hard deviation A, B"]:
        assert len(values) == 2 and all(0 < value < 1 for value in values)
    assert found["moderate max difference"] < 1.01 / 255
    quarter, median = found["hard PSNR dB, quarter, median"]
    assert 0 < quarter <= median


def test_compare_images():
    a, b = [torch.zeros(3, 4, 4)] * 2, [torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.2)]
    assert benchmark.compare_images(a, a) == {"identical": True}
    assert benchmark.compare_images(a, b) == {
        "identical %": 50,
        "max difference": pytest.approx(0.1),
        "PSNR dB": pytest.approx(20),
    }


def test_communication_counts_overlaps_once(tmp_path):
    def event(name, start, duration):
        return {"name": name, "ts": start, "dur": duration}

    events = [event("Optimizer.step#SGD.step", start, 5) for start in (100, 200)]
    events += [
        event("gloo:all_reduce", 110, 20),
        event("gloo:broadcast", 120, 20),
        event("gloo:all_gather", 122, 2),
    ]
    events += [
        event("gloo:all_gather", 0, 50),
        event("gloo:all_gather", 195, 50),
        event("aten::mm", 150, 10),
    ]
    (tmp_path / "trace.json").write_text(
        json.dumps({"traceEvents": [*events, {"name": "gloo:no duration", "ts": 1}]})
    )
    assert benchmark.covered(tmp_path / "trace.json", benchmark.is_communication) == pytest.approx(
        35
    )


def test_peak_memory_is_that_of_the_call():
    _, small = benchmark.with_peak(lambda: np.ones(10**6))
    _, large = benchmark.with_peak(lambda: np.ones(4 * 10**7))
    assert small < 1e8 and 3.1e8 < large < 4.2e8


def test_every_part_says_what_a_and_b_are():
    for part in benchmark.PARTS:
        assert "\n    A: " in part.setup.__doc__ and "\n    B: " in part.setup.__doc__, part.name


def test_table_and_json(photos, tmp_path):
    """The command itself: a part that runs, one that is skipped without a GPU, and one of several
    processes.
    """
    figures = tmp_path / "figures.json"
    arguments = [
        "ranks",
        "extraction-input",
        "training-step",
        "--rounds",
        1,
        "--photos",
        tmp_path,
        "--json",
        figures,
    ]
    result = run("scripts/dev/benchmark.py", *arguments)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
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
    assert content["rounds"] == 1 and list(rows) == ["training-step", "extraction-input", "ranks"]
    assert "CUDA" in rows["training-step"]["skipped"]
    assert rows["extraction-input"]["agreement"]["identical"] is True
    assert {"efficiency %", "communication %"} <= rows["ranks"]["agreement"].keys()
    for row in rows["extraction-input"], rows["ranks"]:
        assert 0 < row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        for side in "baseline", "ours":
            assert len(row["seconds"][side]) == 1
            assert row[f"{side}_per_second"] > 0 and row[f"{side}_peak_mb"] >= 0


def test_bad_input_is_refused(tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    for arguments, words in {
        ("los",): ("los", "augmentation"),
        ("loss", "--rounds", "0"): ("--rounds 0",),
        ("loss", "--ranks", "2"): ("--ranks", "2"),
        ("loss", "--ranks", "1,x"): ("--ranks", "1,x"),
        ("loss", "--ranks", "1,3"): ("--ranks", "1,3"),
        ("loss", "--json", f"{tmp_path}/none/figures.json"): ("--json", "none"),
        ("loss", "--photos", f"{tmp_path}/none"): (f"{tmp_path}/none",),
        ("loss", "--photos", f"{tmp_path}"): ("text.jpg",),
    }.items():
        assert_refused(called(benchmark.main, arguments, capsys), *words)


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["everything"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "everything" in line and "loss" in line
