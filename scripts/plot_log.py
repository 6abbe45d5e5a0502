"""Draw the log.jsonl of training runs, or show it in TensorBoard.

    python scripts/plot_log.py exp/v83/train/log.jsonl  # writes log.png beside it
    python scripts/plot_log.py exp/v86/train/log.jsonl exp/v98/train/log.jsonl -o stages.svg
    python scripts/plot_log.py exp/v83/train/log.jsonl --tensorboard board --follow
    tensorboard --logdir board  # in another terminal

The image shows losses, active pairs, learning rate, speed, and the steps without an update. Several
runs share the axes, in colors of their own. The suffix of --output chooses the format (png, svg,
pdf).

--tensorboard writes event files in place of the image, each log into a folder of its own: the
folder that holds train/log.jsonl, such as exp/v83, names the run. Run again, it replaces what it
has written before. A log has no times, so look at its curves by step. With --follow the command
goes on as lines are added, until Ctrl-C. Needs `pip install tensorboard`.
"""

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from common.cli import FORMATS
from common.errors import InputError, one_line_errors
from common.files import atomic

PANELS = {  # of each value in the log: its title
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
EVENT_SUFFIX = ".plot_log"  # of the event files that are this command's to replace
SECONDS = 1  # between two looks at a log that is followed


# ---- logs ----
def read_steps(path):
    """The lines of a log that tell of steps: dicts with "step", "loss" and others.

    Of a step that was logged again after a resume, the last line counts. A last line that is
    unfinished is left out. Raises InputError where a line is not JSON.
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
    """Raise InputError where a log tells of no step."""
    if not steps:
        raise InputError(
            f"{path}: tells of no step yet; give the log.jsonl of a training run past --log-every "
            f"steps"
        )


# ---- image ----
def read_log(path):
    """The steps of a log as a table, float64 (n, epoch and PANELS), indexed by step.

    Values that the log lacks, as former versions' do overflows, are NaN. Raises InputError where
    `path` is no log, or tells of no step.
    """
    steps = read_steps(path)
    check_has_steps(path, steps)
    table = pd.DataFrame(steps).set_index("step")
    return table.reindex(columns=["epoch", *PANELS]).astype(float)


def draw(logs):
    """A Figure of the logs, {title: table of read_log}.

    Where one run is drawn, the borders of its epochs are too.
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
            for step in log.index[1:][log["epoch"].diff().iloc[1:] > 0]:
                axis.axvline(step, color="0.8", linewidth=0.8, zorder=0)
    for axis in axes[-3:]:
        axis.set_xlabel("step")
    axes[0].legend(fontsize=8)
    return figure


# ---- TensorBoard ----
class Board:
    """The event file of a log in `folder`, for TensorBoard, in place of a former one of this class.

    Raises InputError where TensorBoard is not installed.
    """

    def __init__(self, log, folder):
        try:  # what torch's SummaryWriter takes, without torch
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise InputError("--tensorboard: is not installed; pip install tensorboard") from error
        self.Event = event_pb2.Event
        self.SessionLog = event_pb2.SessionLog
        self.Summary = summary_pb2.Summary
        self.log = log
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{EVENT_SUFFIX}"):
            path.unlink()
        # A TensorBoard that is running looks for files whose names come later.
        name = f"events.out.tfevents.{time.time():.6f}{EVENT_SUFFIX}"
        self.file = (folder / name).open("wb")
        self.writer = RecordWriter(self.file)
        self.write(file_version="brain.Event:2")
        self.start()

    def start(self):
        """Have TensorBoard forget what it has read of this run."""
        self.write(step=0, session_log=self.SessionLog(status=self.SessionLog.START))
        self.written = []  # steps

    def update(self):
        """Write the steps that the log has since the last time.

        A run that was resumed from a checkpoint has taken back what came after it: then all steps
        are written anew.
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

    Below the current folder it is relative to that, elsewhere absolute but for the first slash.
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

    Raises InputError where a log cannot be used, or two have the same name of a run.
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
            time.sleep(SECONDS)
            for board in boards:
                with suppress(FileNotFoundError):  # moved away, by --start-over, say
                    board.update()


# ---- main ----
def parse_args(argv=None):
    """The command line. Exits with one line and code 2 where flags make no sense."""
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
        parser.error("--output: does not go with --tensorboard, which draws no image")
    if args.follow and not args.tensorboard:
        parser.error("--follow: goes with --tensorboard FOLDER only")
    args.output = args.output or args.logs[0].with_suffix(".png")
    if args.output.suffix not in FORMATS:
        parser.error(f"--output {args.output}: must end in one of {', '.join(FORMATS)}")
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
