"""One HTML page to look at: what a submission finds, mistakes and misses, or the groups of copies
that match.py found.

    # descriptor track
    python scripts/report.py exp/v107/extract/v107_iso.h5 input/public_ground_truth.csv
    # matching track
    python scripts/report.py exp/v107/extract/v107_iso.csv input/public_ground_truth.csv
    python scripts/report.py SUBMISSION GROUND_TRUTH --precision 0.999 0.99  # thresholds for these
    # what this cosine is worth
    python scripts/report.py SUBMISSION GROUND_TRUTH --threshold 0.604169
    python scripts/report.py matches.csv  # written by match.py

Prints the scores and the operating points, each with its threshold, precision and recall, and
writes the page: one file that needs no network, with curves, scores by kind of edit, and pairs as
pictures.

Needs   a submission and its ground truth, as eval_metrics.py does. Pictures are looked for in
        --images: query_images/, query_images_phase2/ and reference_images/; edits in its
        query_edits.csv, which make_dataset.py writes. What is not there is not shown.
Writes  SUBMISSION.html (such as v107_iso.h5.html), or --output.

Scores are minus the squared distance. Those of an .h5 whose descriptors have length 1 are shown as
cosines, 1 + score / 2, which is what match.py's --threshold takes; those of a .csv as they are.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

from common.errors import InputError, one_line_errors
from common.evaluation import (
    PAIR,
    as_text,
    load_candidates,
    micro_metrics,
    rank,
    read_edits,
    read_ground_truth,
    scores_by_edit,
)
from common.images import SUFFIXES
from common.page import (
    DASHED,
    GROUPS,
    MATCHES,
    PAIRS,
    STYLE,
    TRUE,
    draw_axes,
    draw_scores,
    embed,
    svg,
    write_match_page,
    write_page,
)
from common.search import pair_scores
from common.submissions import add_track_flags, read_submission, track_of

FOLDERS = {"query": ("query_images", "query_images_phase2"), "reference": ("reference_images",)}
PRECISIONS = (0.99, 0.95, 0.9, 0.8)
GRID = 400  # steps per axis that a curve is thinned to


# ---- ranking ----


def as_cosine(score):
    """Cosine of unit vectors from minus their squared distance."""
    return 1 + score / 2


def operating_points(ranking, precisions=PRECISIONS, thresholds=(), cosine=False):
    """Where a threshold could lie: a dict for each precision, for the best F1, and for each of
    `thresholds`.

    `name`; `pairs`, the number accepted; and, unless that is 0, `score` (the least that is
    accepted), `precision`, `recall` and `F1`. `pairs` is None for a threshold below all candidates:
    others may lie above it. `cosine`: thresholds are cosines, not scores.
    """
    score, correct, (precision, recall) = (
        *(ranking.pairs[key].to_numpy() for key in ("score", "correct")),
        ranking.curve(),
    )
    values = as_cosine(score.astype(float)) if cosine else score.astype(float)
    f1 = 2 * correct.cumsum() / (np.arange(1, len(score) + 1) + ranking.positives)
    depths = {f"precision {value}": ranking.depth(value) for value in precisions}
    depths["best F1"] = int(f1.argmax()) + 1 if f1.any() else 0
    for value in thresholds:
        depths[f"threshold {value}"] = None if value < values[-1] else int((values >= value).sum())
    columns = {"score": score, "precision": precision, "recall": recall, "F1": f1}
    return [
        {"name": name, "pairs": depth}
        | {key: column[depth - 1] for key, column in columns.items() if depth}
        for name, depth in depths.items()
    ]


def points_table(points, cosine):
    """(header, rows) of operating points as text; cosines are rounded down, so that they accept the
    same pairs.
    """
    header = [
        "accept for",
        *(["cosine ≥"] if cosine else []),
        "precision",
        "recall",
        "F1",
        "pairs",
        "score ≥",
    ]
    rows = []
    for point in points:
        cells = ["unknown" if point["pairs"] is None else "none"] + [""] * (len(header) - 2)
        if point["pairs"]:
            cells = (
                [f"{math.floor(as_cosine(float(point['score'])) * 1e6) / 1e6:.6f}"]
                if cosine
                else []
            )
            cells += [f"{point[key]:.4f}" for key in ("precision", "recall", "F1")]
            cells += [f"{point['pairs']:,}", str(point["score"])]
        rows.append([point["name"], *cells])
    return header, rows


def missed_copies(ranking, truth, submission=None):
    """Pairs of the ground truth that 90% precision leaves out: `query_id`, `reference_id`, `rank`,
    `score`.

    `rank` is 0 for what is not among the candidates. These come first and have no score (NaN),
    unless `submission` holds their descriptors; then the lowest rank.
    """
    ranked = ranking.pairs.assign(rank=np.arange(1, len(ranking.pairs) + 1)).drop_duplicates(PAIR)
    missed = truth[truth["reference_id"] != ""].merge(
        ranked[[*PAIR, "rank", "score"]], "left", PAIR
    )
    missed = missed.assign(rank=missed["rank"].fillna(0).astype(int))
    missed = missed[(missed["rank"] == 0) | (missed["rank"] > ranking.depth(0.9))]
    if submission:
        missed = missed.assign(score=scores_of(missed, submission))
    order = np.lexsort((missed["score"].fillna(-np.inf), -missed["rank"], missed["rank"] > 0))
    return missed.iloc[order]


def scores_of(pairs, submission):
    """Scores of any pairs, (n,) float32, from a submission's descriptors; NaN where one is absent
    or a row of zeros.
    """
    rows = [
        pd.Index(as_text(submission[f"{kind}_ids"])).get_indexer(pairs[f"{kind}_id"])
        for kind in FOLDERS
    ]
    query, reference = (submission[kind][index] for kind, index in zip(FOLDERS, rows, strict=True))
    known = (np.min(rows, axis=0) >= 0) & query.any(axis=1) & reference.any(axis=1)
    return np.where(known, -pair_scores(query, reference, "l2"), np.float32(np.nan))


def is_unit(submission):
    """Whether a submission's descriptors have length 1, those of zeros aside."""
    squares = np.concatenate(
        [np.einsum("nd,nd->n", submission[kind], submission[kind]) for kind in FOLDERS]
    )
    return bool((np.abs(squares[squares > 0] - 1) < 0.01).all())


# ---- edits ----


# ---- pictures ----


def find_picture(folder, kind, name):
    """Path of a query's or reference's picture in a data folder, or None. An id names a file, it
    leads nowhere else.
    """
    if Path(name).name != name:
        return None
    suffixes = [*SUFFIXES, *map(str.upper, SUFFIXES)]
    paths = (folder / place / (name + suffix) for place in FOLDERS[kind] for suffix in suffixes)
    return next((path for path in paths if os.path.isfile(path)), None)  # noqa: PTH113  (as above)


# ---- figures ----


@mpl.rc_context(STYLE)
def draw_curve(ranking):
    """Precision over recall, with the point of 90% precision."""
    (precision, recall), depth = ranking.curve(), ranking.depth(0.9)
    cells = (np.stack([recall, precision], axis=1) * GRID).round()
    kept = np.union1d(np.unique(cells, axis=0, return_index=True)[1], [depth - 1, len(cells) - 1])
    figure, axes = draw_axes("recall", "precision")
    axes.set(xlim=(0, max(1, recall[-1])), ylim=(0, 1.03))
    axes.axhline(0.9, **DASHED)
    axes.plot(recall[kept], precision[kept], color=TRUE, linewidth=1.8)
    x, label = 0, "90% precision is never reached"
    if depth:
        x, label = recall[depth - 1], f"90% precision: recall {recall[depth - 1]:.4f}"
        axes.plot(x, precision[depth - 1], "o", color=TRUE, markersize=7, clip_on=False, zorder=3)
    # Where the curve is not: right of the point above 90%, or, if there is no room, left of it
    # below.
    place, side = ((8, 9), "left") if x < 0.6 else ((-8, -16), "right")
    axes.annotate(label, (x, 0.9), xytext=place, textcoords="offset points", ha=side)
    return svg(figure, "curve", f"Precision over recall. {label}")


# ---- pages ----


def galleries(ranking, truth, missed, limit):
    """{"best", "mistakes", "missed"}: at most `limit` pairs each, as dicts of `query_id`,
    `reference_id`, `score`.

    Mistakes, one a query, have a `right_id` and its `right_score`, and missed pairs a `rank`; None
    where there is none.
    """
    pairs = ranking.pairs.drop_duplicates(PAIR)
    right = (
        truth[truth["reference_id"] != ""]
        .drop_duplicates("query_id")
        .merge(pairs[[*PAIR, "score"]], "left", PAIR)
    )
    right.columns = ["query_id", "right_id", "right_score"]
    wrong = (
        pairs[~pairs["correct"]]
        .drop_duplicates("query_id")[:limit]
        .merge(right, "left", "query_id")
    )
    chosen = {"best": pairs[pairs["correct"]][:limit], "mistakes": wrong, "missed": missed[:limit]}
    return {
        name: table.astype(object).where(table.notna(), None).to_dict("records")
        for name, table in chosen.items()
    }


def report_submission(args):
    """Scores a submission, prints its operating points and writes its page; returns its line for
    the user.
    """
    truth = read_ground_truth(args.ground_truth)
    folder = args.images or args.ground_truth.parent
    edits_file = args.edits or folder / "query_edits.csv"
    edits = read_edits(edits_file) if args.edits or edits_file.is_file() else {}
    candidates = load_candidates(args.submission, truth, args.ground_truth, args.track)
    metrics, ranking = micro_metrics(candidates, truth), rank(candidates, truth)
    submission, cosine, scale = None, False, "Scores are the submission's own."
    if track_of(args.submission, args.track) == "descriptor":
        submission = read_submission(args.submission)
        cosine, scale = (
            is_unit(submission),
            "Score is minus the squared distance of two descriptors.",
        )
        scale += " These have length 1, so that their cosine is 1 + score / 2." if cosine else ""
    missed = missed_copies(ranking, truth, submission)
    del submission

    facts = {
        "µAP": f"{metrics['average_precision']:.4f}",
        "R@P90": f"{metrics['recall_p90']:.4f}",
        "queries": f"{truth['query_id'].nunique():,}",
        "copies": f"{ranking.positives:,}",
        "candidates": f"{len(candidates):,}",
        "true candidates": f"{ranking.pairs.drop_duplicates(PAIR)['correct'].sum():,}",
    }
    points = operating_points(ranking, args.precision or PRECISIONS, args.threshold or (), cosine)
    header, rows = points_table(points, cosine)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(pd.DataFrame(rows, columns=header).to_string(index=False))

    unit, convert = ("cosine", as_cosine) if cosine else ("score", lambda score: score)
    values, correct = (
        convert(ranking.pairs["score"].to_numpy(float)),
        ranking.pairs["correct"].to_numpy(),
    )
    scores = {"true pairs": values[correct], "false pairs": values[~correct]}
    depth = ranking.depth(0.9)
    return write_page(
        args.output,
        lambda kind, name: embed(find_picture(folder, kind, name)),
        title=args.submission.name,
        subtitle=f"against {args.ground_truth.name}",
        facts=facts,
        unit=unit,
        scale=scale,
        figures=[
            draw_curve(ranking),
            draw_scores(scores, unit, values[depth - 1] if depth else None),
        ],
        header=header,
        rows=rows,
        by_edit=scores_by_edit(ranking, truth, edits) if edits else [],
        edits=edits,
        convert=convert,
        digits="%.4f" if cosine else "%.6g",
        galleries=galleries(
            ranking, truth, missed, PAIRS if args.gallery is None else args.gallery
        ),
        missed=len(missed),
    )


# ---- page of match.py ----


def read_pairs(path):
    """The csv of match.py: `query`, `reference` (str, bytes that are no UTF-8 as surrogates),
    `score`, `group`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        table = pd.read_csv(
            path, dtype=object, keep_default_na=False, encoding_errors="surrogateescape"
        )
        table = table[MATCHES].assign(score=table["score"].astype(float))
    except KeyError:
        raise InputError(
            f"{path}: its first line is not {','.join(MATCHES)}, as match.py writes it; of a "
            f"submission, "
            "give GROUND_TRUTH too"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not a readable csv ({error})".replace("\n", " ")) from None
    if not np.isfinite(table["score"]).all():
        raise InputError(f"{path}: a score is not a finite number; run match.py again")
    return table


# ---- main ----


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "submission",
        type=Path,
        metavar="SUBMISSION",
        help=".h5 with descriptors or .csv, or the csv of match.py",
    )
    add(
        "ground_truth",
        type=Path,
        nargs="?",
        metavar="GROUND_TRUTH",
        help="csv: query_id,reference_id",
    )
    add("--output", type=Path, metavar="FILE", help="the page (default: SUBMISSION.html)")
    default = f"(default: {PAIRS} pairs of each kind, or {GROUPS} groups)"
    add("--gallery", type=int, metavar="N", help=f"how much to show as pictures {default}")
    options = parser.add_argument_group("with GROUND_TRUTH")
    add = options.add_argument
    add(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder with the pictures (default: GROUND_TRUTH's)",
    )
    add(
        "--edits",
        type=Path,
        metavar="FILE",
        help="csv: query_id,edits (default: query_edits.csv there, if it is)",
    )
    default = f"(default: {' '.join(map(str, PRECISIONS))})"
    add(
        "--precision",
        type=float,
        nargs="+",
        metavar="P",
        help=f"precisions to find thresholds for {default}",
    )
    add(
        "--threshold",
        type=float,
        nargs="+",
        metavar="T",
        help="thresholds to find precision and recall of",
    )
    add_track_flags(options)
    args = parser.parse_args(argv)
    given = [
        name
        for name in ("images", "edits", "precision", "threshold", "track")
        if getattr(args, name) is not None
    ]
    if given and not args.ground_truth:
        parser.error(f"--{given[0]} needs GROUND_TRUTH; the csv of match.py has none")
    if args.images and not args.images.is_dir():
        parser.error(f"--images {args.images}: no such folder")
    if not all(0 < value <= 1 for value in args.precision or ()):
        parser.error("--precision: takes shares, such as 0.95")
    if args.gallery is not None and args.gallery < 0:
        parser.error("--gallery: must not be negative")
    args.output = args.output or Path(f"{args.submission}.html")
    if args.output in (args.submission, args.ground_truth, args.edits):
        parser.error(f"--output {args.output}: would replace what it is made from")
    return args


@one_line_errors
def main(argv=None):
    """Runs the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    if args.ground_truth:
        print(report_submission(args))
    else:
        gallery = GROUPS if args.gallery is None else args.gallery
        print(write_match_page(args.output, read_pairs(args.submission), gallery=gallery))
    return 0


if __name__ == "__main__":
    sys.exit(main())
