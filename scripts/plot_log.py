"""A training run's log.jsonl as a picture: losses, active pairs, learning rate, speed and skipped
steps.

    python scripts/plot_log.py exp/v83/train/log.jsonl  # writes log.png beside it
    python scripts/plot_log.py exp/v86/train/log.jsonl exp/v98/train/log.jsonl -o stages.svg

Several runs share the axes, in colours of their own. The suffix of --output chooses the format
(png, svg, pdf).
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from postprocess import atomic
from validate_submission import InputError

FORMATS = (".png", ".svg", ".pdf")
PANELS = {  # of each value in the log: its title
    "loss": "loss",
    "pos_loss": "positive term",
    "neg_loss": "negative term",
    "pos_pairs": "active positive pairs per step",
    "neg_pairs": "active negative pairs per step",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "skipped": "skipped steps since the line before",
}


def read_log(path):
    """The lines of a log that tell of steps, (n, columns of PANELS and epoch), indexed by step; in
    order.

    A last line that a killed run left unfinished is left out. Raises InputError where `path` is no
    such log.
    """
    lines = path.read_text(errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(
                    f"{path}: line {number} is not JSON; give the log.jsonl of a training run"
                ) from None
    steps = [
        record for record in records if isinstance(record, dict) and PANELS.keys() <= record.keys()
    ]
    if not steps:
        raise InputError(
            f"{path}: tells of no step yet; give the log.jsonl of a training run past --log-every "
            f"steps"
        )
    return pd.DataFrame(steps).set_index("step")[["epoch", *PANELS]].astype(float)


def draw(logs):
    """A Figure of the logs, {title: table of read_log}; where one run is drawn, its epochs' borders
    too.
    """
    figure = Figure(figsize=(11, 11), layout="constrained")
    axes = figure.subplots(4, 2, sharex=True).ravel()
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for label, log in logs.items():
            axis.plot(
                log.index,
                log[name],
                label=label,
                linewidth=1.2,
                marker="." if len(log) < 50 else "",
            )
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(logs) == 1:
            for step in log.index[1:][log["epoch"].diff().iloc[1:] > 0]:
                axis.axvline(step, color="0.8", linewidth=0.8, zorder=0)
    axes[-1].set_ylim(0, max(1, *axes[-1].get_ylim()))
    axes[-1].set_xlabel("step")
    axes[-2].set_xlabel("step")
    axes[0].legend(fontsize=8)
    return figure


def parse_args(argv=None):
    """The command line. Exits with one line and code 2 on a format that is not in FORMATS."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "logs", nargs="+", type=Path, metavar="LOG", help="log.jsonl of a training run"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="picture to write (default: log.png beside the first log)"
    )
    args = parser.parse_args(argv)
    args.output = args.output or args.logs[0].with_suffix(".png")
    if args.output.suffix not in FORMATS:
        parser.error(f"--output {args.output}: must end in one of {', '.join(FORMATS)}")
    return args


def main(argv=None):
    """Draw the picture; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    try:
        logs = {str(path): read_log(path) for path in args.logs}
        with atomic(args.output) as path:
            draw(logs).savefig(path, format=args.output.suffix[1:], dpi=120)
    except (InputError, OSError) as error:
        print(f"plot_log.py: error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
