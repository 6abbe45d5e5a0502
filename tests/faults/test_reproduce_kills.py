"""Random kills of scripts/reproduce.py: the same command ends with the same report."""

import random
import signal
import time

import pytest

from reproduction_runs import SMALL_TRAINING, expect_own_score, make_input, start_run, without_times

LONGEST_PAUSE = 12  # seconds until a kill: a step takes four to eight


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = make_input(tmp_path_factory.mktemp("reproduce") / "rehearsal")
    expect_own_score(path)
    return path


def finish(data, output):
    """Run to the end; returns the report."""
    process = start_run(data, output, *SMALL_TRAINING)
    _, errors = process.communicate(timeout=600)
    assert process.returncode in (0, 1), errors
    return without_times((output / "report-trained.md").read_text(), output)


def test_random_kills_of_a_training(tmp_path, request, figure):
    """All four stages, from the start to the report."""
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: make faults")
    data = request.getfixturevalue("data")
    expected = finish(data, tmp_path / "undisturbed")
    assert expected.count("| no expected score |") == 2  # v107, before and after NES
    output = tmp_path / "killed"
    random_ = random.Random(20)
    kills = 10
    for number in range(kills):
        process = start_run(data, output, *SMALL_TRAINING)
        time.sleep(random_.uniform(1, LONGEST_PAUSE))
        assert process.poll() is None, process.stderr.read()
        process.send_signal(random_.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        process.wait(60)
        assert process.returncode in (-signal.SIGKILL, 75), (number, process.stderr.read())
    assert finish(data, output) == expected
    figure(f"reproduce.py, kills: {kills}, the same report")
