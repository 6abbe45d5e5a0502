"""Draw the log.jsonl of training runs, or show it in TensorBoard.

    python scripts/plot_log.py exp/v83/train/log.jsonl  # writes log.png beside it
    python scripts/plot_log.py exp/v86/train/log.jsonl exp/v98/train/log.jsonl -o stages.svg
    python scripts/plot_log.py exp/v83/train/log.jsonl --tensorboard board --follow
    tensorboard --logdir board  # in another terminal

The image shows losses, active pairs, learning rate, speed, and skipped steps. Several runs share
the axes, each in its own color. The suffix of --output chooses the format (png, svg, pdf).

--tensorboard writes event files instead of the image, one folder for each log. The folder that
holds train/log.jsonl, such as exp/v83, names the run. A second run of this command replaces the
files of the first. A log has no times, so choose "step" as the horizontal axis. With --follow the
command continues as lines are added, until Ctrl-C. Needs `pip install tensorboard`.
"""

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from common.cli import PLOT_FORMATS
from common.errors import InputError, one_line_errors
from common.files import atomic

PANELS = {  # value in the log: its title
    "loss": "loss",
    "pos_loss": "positive term",
    "neg_loss": "negative term",
    "pos_pairs": "active positive pairs per step",
    "neg_pairs": "active negative pairs per step",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "skipped": "skipped steps since the line before",
    "overflows": "fp16 overflows since the line before",
}
COUNTS = ("skipped", "overflows")
EVENT_SUFFIX = ".plot_log"  # this command replaces event files of this name and no others
FOLLOW_INTERVAL = 1  # seconds between two readings of a log that --follow watches


# ---- logs ----


def read_steps(path):
    """The lines of a log that report a step: dicts with "step", "loss" and others.

    Where a step was logged again after a resume, its last line counts. An unfinished last line is
    left out. Raises InputError where a line is not JSON.
    """
    lines = path.read_text(errors="replace").splitlines()
    steps = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line, parse_constant=lambda _: None)  # NaN leaves a gap, as null
        except ValueError:
            if number == len(lines):
                break
            raise InputError(
                f"{path}: line {number} is not JSON; give the log.jsonl of a training run"
            ) from None
        if isinstance(record, dict) and {"step", "loss"} <= record.keys():
            steps[record["step"]] = record
    return list(steps.values())


def check_has_steps(path, steps):
    """Raise InputError where a log reports no step."""
    if not steps:
        raise InputError(
            f"{path}: reports no step yet; give the log.jsonl of a training run past its first "
            f"--log-every steps"
        )


# ---- image ----


def read_log(path):
    """The steps of a log as a table, float64 (n, epoch and PANELS), indexed by step.

    Values that the log lacks are NaN: former versions did not write overflows. Raises InputError
    where `path` is not a log, or reports no step.
    """
    steps = read_steps(path)
    check_has_steps(path, steps)
    table = pd.DataFrame(steps).set_index("step")
    return table.reindex(columns=["epoch", *PANELS]).astype(float)


def draw(logs):
    """A Figure of the logs, {title: table of read_log}.

    A single run gets vertical lines where its epochs begin.
    """
    figure = Figure(figsize=(13, 11), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True).ravel()
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for label, log in logs.items():
            marker = "." if len(log) < 50 else ""
            axis.plot(log.index, log[name], label=label, linewidth=1.2, marker=marker)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if name in COUNTS:
            axis.set_ylim(0, max(1, *axis.get_ylim()))
    if len(logs) == 1:
        (log,) = logs.values()
        begins_epoch = log["epoch"].diff() > 0
        for axis in axes:
            for step in log.index[begins_epoch]:
                axis.axvline(step, color="0.8", linewidth=0.8, zorder=0)
    for axis in axes[-3:]:
        axis.set_xlabel("step")
    axes[0].legend(fontsize=8)
    return figure


# ---- TensorBoard ----


class Board:
    """The event file of a log in `folder`, for TensorBoard. It replaces an earlier one.

    Raises InputError where TensorBoard is not installed.
    """

    def __init__(self, log, folder):
        try:  # the parts that torch's SummaryWriter uses, imported without torch
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise InputError("--tensorboard: not installed; pip install tensorboard") from error
        self.Event = event_pb2.Event
        self.SessionLog = event_pb2.SessionLog
        self.Summary = summary_pb2.Summary
        self.log = log
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{EVENT_SUFFIX}"):
            path.unlink()
        # A running TensorBoard reads a new file only if its name sorts after the old ones.
        name = f"events.out.tfevents.{time.time():.6f}{EVENT_SUFFIX}"
        self.file = (folder / name).open("wb")
        self.writer = RecordWriter(self.file)
        self.write(file_version="brain.Event:2")
        self.start()

    def start(self):
        """Make TensorBoard forget what it has read of this run."""
        self.write(step=0, session_log=self.SessionLog(status=self.SessionLog.START))
        self.written = []  # steps

    def update(self):
        """Write the steps that the log has since the last time.

        A run that was resumed from a checkpoint repeats the steps after it. Then all steps are
        written again.
        """
        steps = read_steps(self.log)
        if steps[: len(self.written)] != self.written:
            self.start()
        for record in steps[len(self.written) :]:
            self.write_step(record)
        self.file.flush()
        self.written = steps

    def write_step(self, record):
        """Write the numbers of a line of the log, each under its name."""
        values = []
        for name, value in record.items():
            if name not in ("epoch", "step") and isinstance(value, int | float):
                values.append(self.Summary.Value(tag=name, simple_value=value))
        self.write(step=record["step"], summary=self.Summary(value=values))

    def write(self, **fields):
        """Write an event."""
        event = self.Event(wall_time=time.time(), **fields)
        self.writer.write(event.SerializeToString())


def run_name(log):
    """What TensorBoard calls a run: the folder that holds train/log.jsonl, or the log's own path.

    It is relative to the current folder or, where the log is elsewhere, to the root folder.
    """
    path = log.resolve()
    run = path.with_suffix("")
    if path.parts[-2:] == ("train", "log.jsonl"):
        run = path.parent.parent
    if Path.cwd() in run.parents:
        return run.relative_to(Path.cwd())
    return run.relative_to(run.anchor)


def write_boards(logs, folder, follow):
    """Write the event files of logs below a folder; with `follow`, go on until Ctrl-C.

    Raises InputError where a log cannot be read, or two logs have the same run name.
    """
    folders = {}
    for log in logs:
        steps = read_steps(log)
        if not follow:
            check_has_steps(log, steps)
        run = folder / run_name(log)
        if run in folders:
            raise InputError(f"{log}: is the same run as {folders[run]}; give one of them")
        folders[run] = log
    boards = [Board(log, run) for run, log in folders.items()]
    for board in boards:
        board.update()
        print(board.folder, flush=True)
    with suppress(KeyboardInterrupt):
        while follow:
            time.sleep(FOLLOW_INTERVAL)
            for board in boards:
                with suppress(FileNotFoundError):  # --start-over may have moved it away
                    board.update()


# ---- main ----


def parse_args(argv=None):
    """The command line. Exits with one line and code 2 where flags do not fit together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="log.jsonl of a training run")
    add("-o", "--output", type=Path, help="image to write (default: log.png beside the first log)")
    add("--tensorboard", type=Path, metavar="FOLDER", help="write event files here instead")
    add("--follow", action="store_true", help="with --tensorboard: go on until Ctrl-C")
    args = parser.parse_args(argv)
    if args.tensorboard and args.output:
        parser.error("--output: not with --tensorboard, which draws no image; give one of them")
    if args.follow and not args.tensorboard:
        parser.error("--follow: only with --tensorboard FOLDER; add it")
    args.output = args.output or args.logs[0].with_suffix(".png")
    if args.output.suffix not in PLOT_FORMATS:
        parser.error(f"--output {args.output}: must end in one of {', '.join(PLOT_FORMATS)}")
    return args


@one_line_errors
def main(argv=None):
    """Draw the image or write event files; returns the exit code: 0, or 2 with one line on
    stderr.
    """
    args = parse_args(argv)
    if args.tensorboard:
        write_boards(args.logs, args.tensorboard, args.follow)
    else:
        logs = {str(path): read_log(path) for path in args.logs}
        with atomic(args.output) as path:
            draw(logs).savefig(path, format=args.output.suffix[1:], dpi=120)
        print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
