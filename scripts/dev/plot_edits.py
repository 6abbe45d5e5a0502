r"""How well submissions find the copies of each kind of edit: a table, and a plot of it.

    python scripts/dev/plot_edits.py input/private_ground_truth.csv v98=v98.h5 pHash=phash.csv \
        dHash=dhash.csv -o edits.png

Prints, in Markdown, the micro average precision of each NAME=FILE over the queries of each kind of
edit alone, and over all; a query may have several edits. make_dataset.py lists them in
query_edits.csv, beside the ground truth.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from common.cli import PLOT_FORMATS
from common.errors import one_line_errors
from common.evaluation import load_candidates, rank, read_edits, read_ground_truth, scores_by_edit
from common.files import atomic


def edit_scores(submissions, ground_truth, edits):
    """{kind of edit: {name: average precision}} of {name: file}.

    The first submission's lowest comes first, "all queries" last.
    """
    truth = read_ground_truth(ground_truth)
    table = {}
    for name, path in submissions.items():
        ranking = rank(load_candidates(path, truth, ground_truth), truth)
        for kind, *_, score in scores_by_edit(ranking, truth, edits):
            if score is not None:
                table.setdefault(kind, {})[name] = score
    return table


def markdown(table):
    """The scores as a table in Markdown."""
    names = list(table["all queries"])
    rows = [["µAP", *names], ["---"] * (len(names) + 1)]
    for kind, scores in table.items():
        rows.append([kind, *(f"{scores[name]:.3f}" for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(table):
    """A Figure of the scores: a group of bars for each kind of edit."""
    names = list(table["all queries"])
    bar_height = 0.8 / len(names)
    figure_height = 0.9 + 0.16 * (len(names) + 1) * len(table)
    figure = Figure(figsize=(8, figure_height), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        rows = np.arange(len(table)) + (i - (len(names) - 1) / 2) * bar_height
        widths = [scores[name] for scores in table.values()]
        bars = axes.barh(rows, widths, bar_height, label=name, color=f"C{i}")
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set_yticks(range(len(table)), list(table))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("micro average precision over the queries with this edit")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(names), frameon=False
    )
    return figure


def named_file(text):
    """(NAME, path) of NAME=FILE."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text}: must be NAME=FILE")
    return name, Path(path)


def parse_args(argv=None):
    """The command line. Exits with one line and code 2 where it is invalid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("ground_truth", type=Path, metavar="GROUND_TRUTH", help="csv: query_id,reference_id")
    add(
        "submissions",
        nargs="+",
        type=named_file,
        metavar="NAME=FILE",
        help=".h5 or .csv, as eval_metrics.py takes it",
    )
    add(
        "--edits",
        type=Path,
        help="csv: query_id,edits (default: query_edits.csv beside the ground truth)",
    )
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="plot to write")
    args = parser.parse_args(argv)
    if len(dict(args.submissions)) < len(args.submissions):
        parser.error("two submissions have one NAME; give each its own")
    args.edits = args.edits or args.ground_truth.with_name("query_edits.csv")
    if args.output.suffix not in PLOT_FORMATS:
        parser.error(f"--output {args.output}: must end in one of {', '.join(PLOT_FORMATS)}")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: there is no such folder; make it first")
    return args


@one_line_errors
def main(argv=None):
    """Print the table and draw it; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    table = edit_scores(dict(args.submissions), args.ground_truth, read_edits(args.edits))
    print(markdown(table))
    no_formulas = {"text.parse_math": False}  # a $ in a name is a $
    with atomic(args.output) as path, rc_context(no_formulas):
        draw(table).savefig(path, format=args.output.suffix[1:], dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
