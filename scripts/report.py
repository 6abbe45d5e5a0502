"""One HTML page to look at: what a submission finds, mistakes and misses, or the groups of copies
that match.py found.

    # descriptor track
    python scripts/report.py exp/v107/extract/v107_iso.h5 input/public_ground_truth.csv
    # matching track
    python scripts/report.py exp/v107/extract/v107_iso.csv input/public_ground_truth.csv
    # the thresholds that reach these precisions
    python scripts/report.py SUBMISSION GROUND_TRUTH --precision 0.999 0.99
    # precision and recall at this cosine
    python scripts/report.py SUBMISSION GROUND_TRUTH --threshold 0.604169
    # the csv that match.py wrote
    python scripts/report.py matches.csv

Prints the scores and the operating points, each with its threshold, precision and recall. Writes
the page: one file that needs no network, with charts, scores by kind of edit, and the images of
pairs. The page of matches.csv also tells which file of a group is worth keeping, and saves the
pairs that you tick as not copies, for match.py's --ignore.

Needs   a submission and its ground truth, as eval_metrics.py does. Images are looked for in
        --images: query_images/, query_images_phase2/ and reference_images/; edits in its
        query_edits.csv, which make_dataset.py writes. The page leaves out what is not there.
Writes  SUBMISSION.html (such as v107_iso.h5.html), or --output.

A score is minus the squared distance. Where the descriptors of an .h5 have length 1, the page shows
cosines, 1 + score / 2, the unit of match.py's --threshold. Scores of a .csv are shown unchanged.
"""

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import InputError, one_line_errors
from common.evaluation import (
    PAIR_COLUMNS,
    as_text,
    load_candidates,
    rank,
    read_edits,
    read_ground_truth,
    scores_by_edit,
)
from common.files import as_path, shown
from common.images import SUFFIXES
from common.page import (
    MATCH_COLUMNS,
    MAX_GROUPS,
    MAX_PAIRS,
    Chart,
    score_chart,
    thumbnail,
    write_match_page,
    write_page,
)
from common.search import pair_scores
from common.submissions import add_submission_arguments, read_submission, track_of

FOLDERS = {"query": ("query_images", "query_images_phase2"), "reference": ("reference_images",)}
PRECISIONS = (0.99, 0.95, 0.9, 0.8)
CURVE_STEPS = 400  # per axis: the curve is thinned to one point for each


# ---- scores ----


def as_cosine(score):
    """Cosine of unit vectors from minus their squared distance."""
    return 1 + score / 2


def score_text(score, cosine):
    """A score as the page shows it, as a cosine where `cosine` is true."""
    if cosine:
        return f"{as_cosine(score):.4f}"
    return f"{score:.6g}"


def is_unit(submission):
    """Whether all descriptors of a submission have length 1; rows of zeros do not count."""
    for kind in FOLDERS:
        squares = np.einsum("nd,nd->n", submission[kind], submission[kind])
        squares = squares[squares > 0]
        if (np.abs(squares - 1) >= 0.01).any():
            return False
    return True


def scores_of(pairs, submission):
    """Scores of any pairs, (n,) float32, from a submission's descriptors; NaN where a descriptor is
    absent or a row of zeros.
    """
    query_rows = rows_of(pairs["query_id"], submission["query_ids"])
    reference_rows = rows_of(pairs["reference_id"], submission["reference_ids"])
    queries = submission["query"][query_rows]
    references = submission["reference"][reference_rows]
    scores = -pair_scores(queries, references, "l2")
    scores[(query_rows < 0) | (reference_rows < 0)] = np.nan
    scores[~queries.any(axis=1) | ~references.any(axis=1)] = np.nan
    return scores


def rows_of(wanted, ids):
    """The row of each wanted id among `ids`, (n,) int64; -1 where it is absent."""
    return pd.Index(as_text(ids)).get_indexer(wanted)


# ---- operating points ----


def operating_points(ranking, precisions=PRECISIONS, thresholds=(), cosine=False):
    """What a threshold achieves: a dict for each precision, for the best F1, and for each of
    `thresholds`.

    `name`; `pairs`, the number accepted; and, unless that is 0, `score` (the least that is
    accepted), `precision`, `recall` and `F1`. `pairs` is None for a threshold below all candidates:
    others may lie above it. `cosine`: thresholds are cosines, not scores.
    """
    scores = ranking.pairs["score"].to_numpy()
    correct = ranking.pairs["correct"].to_numpy()
    precision, recall = ranking.curve()
    accepted = np.arange(1, len(scores) + 1)
    f1 = 2 * correct.cumsum() / (accepted + ranking.positives)

    depths = {}  # of each point: how many pairs it accepts
    for value in precisions:
        depths[f"precision {value}"] = ranking.depth(value)
    depths["best F1"] = int(f1.argmax()) + 1 if f1.any() else 0
    values = scores.astype(float)
    if cosine:
        values = as_cosine(values)
    for value in thresholds:
        below_all = value < values[-1]
        depths[f"threshold {value}"] = None if below_all else int((values >= value).sum())

    points = []
    for name, depth in depths.items():
        point = {"name": name, "pairs": depth}
        if depth:
            last = depth - 1
            point["score"] = scores[last]
            point["precision"] = precision[last]
            point["recall"] = recall[last]
            point["F1"] = f1[last]
        points.append(point)
    return points


def points_table(points, cosine):
    """(header, rows) of operating points as text; cosines are rounded down, so that they accept the
    same pairs.
    """
    header = ["accept for", "precision", "recall", "F1", "pairs", "score ≥"]
    if cosine:
        header.insert(1, "cosine ≥")
    rows = []
    for point in points:
        if point["pairs"]:
            row = [
                point["name"],
                f"{point['precision']:.4f}",
                f"{point['recall']:.4f}",
                f"{point['F1']:.4f}",
                f"{point['pairs']:,}",
                str(point["score"]),
            ]
            if cosine:
                row.insert(1, rounded_down(as_cosine(float(point["score"]))))
        else:
            reason = "unknown" if point["pairs"] is None else "none"
            row = [point["name"], reason]
            row += [""] * (len(header) - len(row))
        rows.append(row)
    return header, rows


def rounded_down(value):
    """A number with six decimals, never more than it is."""
    return f"{math.floor(value * 1e6) / 1e6:.6f}"


# ---- pairs to show ----


def missed_copies(ranking, truth, submission=None):
    """Pairs of the ground truth that 90% precision leaves out: `query_id`, `reference_id`, `rank`,
    `score`.

    Pairs that are not among the candidates have rank 0 and come first, the worst score before the
    others. They have no score (NaN) unless `submission` holds their descriptors. The rest follows,
    the lowest rank first.
    """
    ranks = np.arange(1, len(ranking.pairs) + 1)
    ranked = ranking.pairs.assign(rank=ranks).drop_duplicates(PAIR_COLUMNS)
    ranked = ranked[[*PAIR_COLUMNS, "rank", "score"]]
    positives = truth[truth["reference_id"] != ""]
    copies = positives.merge(ranked, "left", PAIR_COLUMNS)
    copies["rank"] = copies["rank"].fillna(0).astype(int)
    no_candidate = copies["rank"] == 0
    too_late = copies["rank"] > ranking.depth(0.9)
    missed = copies[no_candidate | too_late]
    if submission:
        missed = missed.assign(score=scores_of(missed, submission))
    by_score = missed["score"].fillna(-np.inf)
    order = np.lexsort((by_score, -missed["rank"], missed["rank"] > 0))
    return missed.iloc[order]


def galleries(ranking, truth, missed, limit):
    """{"best", "mistakes", "missed"}: at most `limit` pairs each, as dicts of `query_id`,
    `reference_id`, `score`.

    Mistakes, one a query, have a `right_id` and its `right_score`, and missed pairs a `rank`; None
    where there is none.
    """
    pairs = ranking.pairs.drop_duplicates(PAIR_COLUMNS)
    best = pairs[pairs["correct"]][:limit]
    mistakes = pairs[~pairs["correct"]].drop_duplicates("query_id")[:limit]
    positives = truth[truth["reference_id"] != ""]
    right = positives.drop_duplicates("query_id")
    right = right.merge(pairs[[*PAIR_COLUMNS, "score"]], "left", PAIR_COLUMNS)
    right = right.rename(columns={"reference_id": "right_id", "score": "right_score"})
    mistakes = mistakes.merge(right, "left", "query_id")
    return {
        "best": as_records(best),
        "mistakes": as_records(mistakes),
        "missed": as_records(missed[:limit]),
    }


def as_records(table):
    """Rows of a table as dicts, with None for what is missing."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def find_image(folder, kind, name):
    """Path of a query's or reference's image in a data folder, or None.

    An id is the name of a file. One that leads to another folder is not looked for.
    """
    if Path(name).name != name:
        return None
    name = as_path(name)
    suffixes = [*SUFFIXES, *map(str.upper, SUFFIXES)]
    for subfolder in FOLDERS[kind]:
        for suffix in suffixes:
            path = folder / subfolder / (name + suffix)
            if os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises where a name is too long)
                return path
    return None


# ---- page of a submission ----


def curve_chart(ranking):
    """Chart of precision over recall, with the point of 90% precision."""
    precision, recall = ranking.curve()
    depth = ranking.depth(0.9)
    label = "90% precision is never reached"
    if depth:
        label = f"90% precision: recall {recall[depth - 1]:.4f}"
    farthest = max(1, recall[-1])
    chart = Chart(
        title=f"Precision over recall. {label}",
        x_label="recall",
        y_label="precision",
        x_range=(0, farthest),
        y_range=(0, 1.03),
    )
    chart.add_line([0, farthest], [0.9, 0.9], "dashed", label)
    cells = np.round(np.stack([recall, precision], axis=1) * CURVE_STEPS)
    _, first_in_cell = np.unique(cells, axis=0, return_index=True)
    kept = np.union1d(first_in_cell, len(cells) - 1)
    if depth:
        kept = np.union1d(kept, depth - 1)
        chart.add_marker(recall[depth - 1], precision[depth - 1], "true")
    chart.add_line(recall[kept], precision[kept], "true")
    return chart


def histogram_chart(ranking, cosine):
    """Chart of the scores of true and false pairs, with the threshold of 90% precision."""
    scores = ranking.pairs["score"].to_numpy(float)
    if cosine:
        scores = as_cosine(scores)
    correct = ranking.pairs["correct"].to_numpy()
    depth = ranking.depth(0.9)
    threshold = scores[depth - 1] if depth else None
    kinds = {"true pairs": scores[correct], "false pairs": scores[~correct]}
    return score_chart(kinds, "cosine" if cosine else "score", threshold)


def data_folder(args):
    """The folder that holds the images, and maybe their edits."""
    return args.images or args.ground_truth.parent


def edits_file(args):
    """The csv of edits, which need not exist unless --edits names it."""
    return args.edits or data_folder(args) / "query_edits.csv"


def load_edits(args):
    """The edits of --edits, or of the data folder; none where it has no query_edits.csv."""
    path = edits_file(args)
    if args.edits or path.is_file():
        return read_edits(path)
    return {}


def summary(ranking, truth):
    """Name and value, as text, of what the page shows first."""
    true_candidates = ranking.pairs.drop_duplicates(PAIR_COLUMNS)["correct"].sum()
    return {
        "µAP": f"{ranking.average_precision():.4f}",
        "R@P90": f"{ranking.recall_at(0.9):.4f}",
        "queries": f"{truth['query_id'].nunique():,}",
        "copies": f"{ranking.positives:,}",
        "candidates": f"{len(ranking.pairs):,}",
        "true candidates": f"{true_candidates:,}",
    }


def report_submission(args):
    """Score a submission, print its operating points and write its page; returns its line for the
    user.
    """
    folder = data_folder(args)
    truth = read_ground_truth(args.ground_truth)
    edits = load_edits(args)
    candidates = load_candidates(args.submission, truth, args.ground_truth, args.track)
    ranking = rank(candidates, truth)

    if track_of(args.submission, args.track) == "descriptor":
        submission = read_submission(args.submission)
        cosine = is_unit(submission)
        score_meaning = "Score is minus the squared distance of two descriptors."
        if cosine:
            score_meaning += " These have length 1, so that their cosine is 1 + score / 2."
        missed = missed_copies(ranking, truth, submission)
        del submission  # gigabytes, while the page is made
    else:
        cosine = False
        score_meaning = "Scores are the submission's own."
        missed = missed_copies(ranking, truth)

    facts = summary(ranking, truth)
    precisions = args.precision or PRECISIONS
    points = operating_points(ranking, precisions, args.threshold or (), cosine)
    header, rows = points_table(points, cosine)
    print_escaped(", ".join(f"{name} {value}" for name, value in facts.items()))
    print_escaped(pd.DataFrame(rows, columns=header).to_string(index=False))

    limit = MAX_PAIRS if args.gallery is None else args.gallery
    return write_page(
        args.output,
        lambda kind, name: thumbnail(find_image(folder, kind, name)),
        title=args.submission.name,
        subtitle=f"against {args.ground_truth.name}",
        facts=facts,
        unit="cosine" if cosine else "score",
        score_meaning=score_meaning,
        score_text=partial(score_text, cosine=cosine),
        charts=[curve_chart(ranking), histogram_chart(ranking, cosine)],
        header=header,
        rows=rows,
        by_edit=scores_by_edit(ranking, truth, edits) if edits else [],
        edits=edits,
        galleries=galleries(ranking, truth, missed, limit),
        missed=len(missed),
    )


# ---- page of match.py ----


def read_pairs(path):
    """The csv of match.py, of any version: its columns, where it has them; paths (str) as
    os.fsdecode() gives them, `score`, `cosine` and `normalized` as numbers, the last NaN where it
    is empty. Raises InputError where it is no such csv.
    """
    if not path.is_file():
        raise InputError(f"{shown(path)}: no such file; check the path")
    try:
        table = pd.read_csv(
            path, dtype=object, keep_default_na=False, encoding_errors="surrogateescape"
        )
    except ValueError as error:
        raise InputError(f"{shown(path)}: not a readable csv ({error})") from None
    missing = [column for column in MATCH_COLUMNS if column not in table]
    if missing:
        raise InputError(
            f"{shown(path)}: its first line is not {','.join(MATCH_COLUMNS)}, with or without more "
            f"columns, as match.py writes it; for a submission, give GROUND_TRUTH too"
        )
    for column in ("score", "cosine", "normalized"):
        if column in table:
            table[column] = as_numbers(table[column], shown(path))
    for column in ("query", "reference"):
        table[column] = table[column].map(as_path)
    return table


def as_numbers(texts, place):
    """A column of a csv as numbers, float64. Raises InputError for one that is not finite.

    place: where it stands, for the message. Only `normalized` may be empty, which is NaN.
    """
    values = pd.to_numeric(texts, errors="coerce").astype(float)
    bad = ~np.isfinite(values)
    if texts.name == "normalized":
        bad &= texts != ""
    if bad.any():
        text = texts[bad].iloc[0]
        raise InputError(
            f"{place}: {texts.name} {text!r} is not a finite number; run match.py again"
        )
    return values


def report_matches(args):
    """Write the page of match.py's csv; returns its line for the user."""
    matches = read_pairs(args.submission)
    normalized = "normalized" in matches and matches["normalized"].notna().any()
    scored_by = "normalized score" if normalized else "cosine"
    return write_match_page(args.output, matches, gallery=args.gallery, scored_by=scored_by)


# ---- main ----


def print_escaped(text):
    """Print text; characters that the terminal's encoding lacks are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def parse_args(argv=None):
    """The command line. Exits with one line and code 2 where options do not fit together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_submission_arguments(parser)
    parser.add_argument(
        "ground_truth",
        type=Path,
        nargs="?",
        metavar="GROUND_TRUTH",
        help="csv: query_id,reference_id; none where SUBMISSION is the csv of match.py",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: SUBMISSION.html)"
    )
    parser.add_argument(
        "--gallery",
        type=int,
        metavar="N",
        help="how many to show as images "
        f"(default: {MAX_PAIRS} pairs of each kind, or up to {MAX_GROUPS} groups)",
    )
    options = parser.add_argument_group("with GROUND_TRUTH")
    options.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder with the images (default: GROUND_TRUTH's)",
    )
    options.add_argument(
        "--edits",
        type=Path,
        metavar="FILE",
        help="csv: query_id,edits (default: query_edits.csv in that folder, if there is one)",
    )
    options.add_argument(
        "--precision",
        type=float,
        nargs="+",
        metavar="P",
        help=f"precisions to find thresholds for (default: {' '.join(map(str, PRECISIONS))})",
    )
    options.add_argument(
        "--threshold",
        type=float,
        nargs="+",
        metavar="T",
        help="thresholds to find precision and recall of",
    )
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """End the command where options do not fit together; fill in --output."""
    if not args.ground_truth:
        for name in ("images", "edits", "precision", "threshold"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} needs GROUND_TRUTH; the csv of match.py has none")
        if args.track:
            parser.error(f"--{args.track} needs GROUND_TRUTH; the csv of match.py has none")
    if args.images and not args.images.is_dir():
        parser.error(f"--images {args.images}: no such folder")
    if not all(0 < value <= 1 for value in args.precision or ()):
        parser.error("--precision: takes shares, such as 0.95")
    if args.gallery is not None and args.gallery < 0:
        parser.error("--gallery: must not be negative")
    args.output = args.output or Path(f"{args.submission}.html")
    if args.output.suffix.lower() in SUFFIXES:
        parser.error(f"--output {args.output}: names an image; give a name that ends in .html")
    if args.output.exists() and any(map(args.output.samefile, files_read(args))):
        parser.error(f"--output {args.output}: would replace one of the files that it reads")


def files_read(args):
    """The files that exist of those that the command line leads to, but for images."""
    files = [args.submission]
    if args.ground_truth:
        files += [args.ground_truth, edits_file(args)]
    return [path for path in files if path.exists()]


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    if args.ground_truth:
        print_escaped(report_submission(args))
    else:
        print_escaped(report_matches(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
