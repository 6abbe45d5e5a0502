"""The published scores by one command: from the data to a verdict.

    python scripts/reproduce.py --plan   # say what would be done, and what is missing
    python scripts/reproduce.py          # the author's weights -> 0.6519 (v98), 0.9479 (v107)
    python scripts/reproduce.py --train  # all four stages first, on all GPUs
    python scripts/reproduce.py --references 50000  # a first look at v98: part of them
    python scripts/reproduce.py --plan --train --gpus "8 x A100-80"  # for another machine

0.9479 is contaminated: v107 trains on these very pairs.
Runs the published commands one after the other, checks what each left, and compares the scores.
Killed anywhere, the same command goes on. docs/REPRODUCE.md says how to read the result.

Needs   INPUT as in input/README.md. The weights are fetched.
Writes  OUTPUT/report.md, fit to paste into an issue (report-trained.md with --train, and so on);
        OUTPUT/NN-step.log, OUTPUT/state.json; OUTPUT/published/vNN of the author's weights,
        OUTPUT/exp/vNN of the own ones.

Exit codes: 0 all scores reproduced, 1 one was not, 2 something is missing or a check failed (one
line says what), 75 after SIGTERM, 130 after Ctrl-C.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

from common.cli import at_least
from common.errors import InputError, one_line_errors
from common.reproduction import published
from common.reproduction.checks import score_in_words
from common.reproduction.disk import filesystems
from common.reproduction.machine import driver_complaint, find_machine, parse_machine
from common.reproduction.plan import (
    Expected,
    Setup,
    count_all,
    make_plan,
    obstacles,
    parse_stage_flags,
)
from common.reproduction.report import circumstances, print_plan, write_report
from common.reproduction.running import Runner, Stopped, stop_before_steps
from common.reproduction.state import State, lock

ROOT = Path(__file__).resolve().parents[1]
MOST_CPU_HOURS = 6  # without --cpu


def from_root(path):
    """A path of the command line, relative to the repository where it lies in it."""
    # Path.resolve() would follow links: a command is the same wherever they point to.
    path = Path(os.path.abspath(path))  # noqa: PTH100
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def read_expected(path):
    """The Expected of a JSON file: {"scores": {title: [µAP, R@P90]}, "sha256": {stage: digest},
    "images": {folder: number}}, each optional. With scores or images the data are not DISC21, and
    nothing published is expected of them. Raises InputError.
    """
    try:
        content = json.loads(path.read_text())
        refuse_unknown(content, ("scores", "sha256", "images"))
        scores = read_scores(content.get("scores", {}))
        images = read_numbers(content.get("images", {}))
        digests = read_digests(content.get("sha256", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is not as --help says ({error}); correct it") from None
    if "scores" not in content and "images" not in content:
        return Expected(sha256=digests, source=path)
    return Expected(scores, digests, images, disc21=False, source=path)


def read_scores(content):
    """{title: Score} of {title: [µAP, R@P90]}. Raises ValueError or TypeError."""
    refuse_unknown(content, published.SCORES)
    scores = {}
    for title, (average_precision, recall_p90) in content.items():
        recall = None if recall_p90 is None else float(recall_p90)
        scores[title] = published.Score(float(average_precision), recall)
    return scores


def read_numbers(content):
    """{folder: int} of numbers of images. Raises ValueError or TypeError."""
    refuse_unknown(content, published.IMAGES)
    return {folder: int(number) for folder, number in content.items()}


def read_digests(content):
    """{stage: SHA-256 in lower case}. Raises ValueError or TypeError."""
    refuse_unknown(content, ("v98", "v107"))
    for digest in content.values():
        if not re.fullmatch("[0-9a-fA-F]{64}", digest):
            raise ValueError(f"{digest}: must be 64 hexadecimal digits")
    return {stage: digest.lower() for stage, digest in content.items()}


def refuse_unknown(content, names):
    """Raise ValueError where a dict has a key that is none of the names."""
    for key in content.keys() - set(names):
        raise ValueError(f"{key!r} is none of {', '.join(names)}")


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--plan", action="store_true", help="only say what would be done")
    add("--train", action="store_true", help="train all stages, in place of the author's weights")
    add(
        "--stages",
        choices=["v98", "v107"],
        nargs="+",
        help="which to score (default: both, with --references v98)",
    )
    add("--phase", type=int, choices=[1, 2], default=1, help="2: the unseen queries, of v107 alone")
    add(
        "--references",
        type=at_least(int, 1),
        metavar="N",
        help="a first look: the ground truth's references and random others, N in all; its score "
        "compares with no published one",
    )
    add("--download", action="store_true", help="fetch missing images with aws")
    add("--cpu", action="store_true", help="use no GPU, however long it takes")
    add("--gpus", metavar="'8 x A100-80'", help="with --plan: of another machine")
    add("--input", type=Path, default=ROOT / "input", help="the data (default: %(default)s)")
    add("--output", type=Path, default=ROOT / "reproduce", help="default: %(default)s")
    add = parser.add_argument_group("another network or data set").add_argument
    add("-a", "--arch", default=published.ARCH, help="backbone (default: %(default)s)")
    add("--input-size", type=at_least(int, 1), help="pixels, in every step (default: published)")
    add(
        "--expect",
        type=Path,
        metavar="FILE",
        help='JSON with what to expect, {"scores": {"v98": [0.65, 0.57]}, "images": '
        '{"query_images": 30}, "sha256": {"v98": "1198..."}}, each part optional; with scores or '
        "images (even {}) the data are not DISC21, and no published score is expected",
    )
    add(
        "--stage-flags",
        action="append",
        default=[],
        metavar="'STAGE: FLAGS'",
        help="more flags for the training of a stage (v83, v86, v98, v107, all) or for every "
        "extraction (extract), such as 'v98: --lr 0.01'; repeatable",
    )
    args = parser.parse_args(argv)
    if args.gpus and not args.plan:
        parser.error("--gpus: is for --plan; a run uses the GPUs that are there")
    if args.gpus and args.cpu:
        parser.error("--gpus: does not go with --cpu")
    if args.stages is None:
        args.stages = ["v98", "v107"] if args.references is None else ["v98"]
        if args.phase == 2:
            args.stages = ["v107"]
    if args.phase == 2:
        if args.stages == ["v98"]:
            parser.error("--phase 2: a score was published of v107 alone")
        args.stages = ["v107"]
    return args


def make_setup(args):
    """The Setup of a command line. Raises InputError."""
    expected = read_expected(args.expect) if args.expect else Expected()
    if args.download and not expected.disc21:
        raise InputError(f"--download: fetches DISC21, and {args.expect} is of other data; omit it")
    return Setup(
        input=from_root(args.input),
        output=from_root(args.output),
        machine=parse_machine(args.gpus) if args.gpus else find_machine(args.cpu),
        expected=expected,
        train=args.train,
        stages=tuple(sorted(set(args.stages), key=["v98", "v107"].index)),
        phase=args.phase,
        references=args.references,
        arch=published.ARCH if args.arch == published.SAME_ARCH else args.arch,
        input_size=args.input_size,
        stage_flags=parse_stage_flags(args.stage_flags),
        download=args.download,
    )


def more_obstacles(setup, steps, finished, disks, cpu):
    """What the machine lacks, a line each."""
    found = []
    if setup.machine.assumed:
        return found
    if setup.download and not shutil.which("aws"):
        found.append("--download: aws is not installed; pip install awscli")
    if not setup.machine.gpus and not cpu:
        found += no_gpu(setup, [step for step in steps if step.name not in finished])
    for disk in disks:
        if disk.needed > disk.free:
            found.append(f"{disk.names}: {disk.needed:.1f} GB are needed, {disk.free:.1f} are free")
    return found


def no_gpu(setup, to_do):
    """What is to be said where there is no GPU, a line each: a broken driver, and what a CPU would
    take. to_do: the steps to come.
    """
    found = []
    complaint = driver_complaint()
    if complaint:
        found.append(f"{complaint}; or give --cpu")
    hours = sum(step.hours or 0 for step in to_do)
    trains = any(step.trains for step in to_do)
    if setup.arch == published.ARCH and (trains or hours > MOST_CPU_HOURS):
        words = f"extraction takes about {hours:,.0f} hours on {setup.machine.cores} CPU cores"
        words += f" ({published.CPU_SECONDS_AN_IMAGE} CPU seconds an image)"
        if trains:
            words += ", and training months"
        found.append(f"no GPU: {words}; give --cpu if you mean it")
    return found


def reproduce(args):
    """Plan and run; returns the exit code."""
    setup = make_setup(args)
    output = ROOT / setup.output
    steps = make_plan(setup)
    state = State(output / "state.json")
    finished = {step.name for step in steps if state.is_finished(step)}
    counts = count_all(setup)
    missing = obstacles(setup, steps, counts, finished)
    # The disks of this machine say nothing about another.
    disks = [] if setup.machine.assumed else filesystems(setup, steps, finished)
    missing += more_obstacles(setup, steps, finished, disks, args.cpu)
    commands = args.plan or not missing
    print_plan(setup, steps, counts, finished, disks, missing, commands)
    if args.plan:
        return 0
    if missing:
        which = f"; first of the {len(missing)} reasons above" if len(missing) > 1 else ""
        raise InputError(f"nothing was started{which}: {missing[0]}")  # may end with a command
    with lock(output) as held:
        state = State(output / "state.json")
        runner = Runner(state, circumstances(setup.machine), output, held, args.cpu)
        print(flush=True)
        runner.run(steps)
        report = output / f"report{setup.variant}.md"
        scores = write_report(report, setup, steps, runner.state)
    for score in scores:
        print(score_in_words(score))
        for cause in score["causes"]:
            print(f"  perhaps {cause}")
    print(f"To look at: {report}")
    return 1 if any(score["verdict"].startswith("not reproduced") for score in scores) else 0


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code."""
    try:
        return reproduce(parse_args(argv))
    except Stopped as stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return stopped.code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_before_steps)  # until Runner takes it over
    sys.exit(main())
