"""common/cli.py: the argument types, the number of cores."""

import argparse
import os

import pytest

from common.cli import at_least, between, usable_cores
from conftest import assert_refused, called


@pytest.mark.parametrize(
    ("argument_type", "accepted", "refused"),
    [
        (at_least(int, 1), ["1", "12345678901234567890"], ["0", "-1", "1.5", "x", ""]),
        (at_least(float, 0), ["0", "0.5", "1e300"], ["-0.1", "inf", "nan"]),
        (between(int, 3, 5), ["3", "5"], ["2", "6", "4.5"]),
        (between(float, -1, 1), ["-1", "0.604169", "1"], ["1.001", "-2", "nan", "inf"]),
    ],
)
def test_numbers_in_range_are_accepted_and_others_refused(argument_type, accepted, refused, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=argument_type)

    def parse(argv):
        parser.parse_args(argv)
        return 0

    for text in accepted:
        assert called(parse, [f"--number={text}"], capsys).returncode == 0
    for text in refused:
        result = called(parse, [f"--number={text}"], capsys)
        assert_refused(result, "--number", argument_type.__name__, repr(text))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_that_the_process_may_not_use_do_not_count():
    allowed = os.sched_getaffinity(0)
    assert usable_cores() == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
