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
import base64
import html
import io
import json
import math
import os
import re
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from eval_metrics import as_text, load_candidates, micro_metrics, read_ground_truth
from pictures import in_eight_bits, pixels_to_decode
from postprocess import atomic, pair_scores
from validate_submission import InputError, add_track_flags, read_csv, read_submission, track_of

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:  # HEIC pictures then cannot be shown
    pillow_heif = None

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", *(["HEIF"] if pillow_heif else [])]
SUFFIXES = [
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
]
FOLDERS = {"query": ("query_images", "query_images_phase2"), "reference": ("reference_images",)}
SIDE, QUALITY = 256, 70  # of pictures in the page: longer side in pixels, JPEG
PRECISIONS = (0.99, 0.95, 0.9, 0.8)
PAIRS, GROUPS, BAD = (
    12,
    50,
    200,
)  # shown: pairs of each kind, groups (--gallery changes both), unreadable files
GROUP = 12  # pictures, and scores, shown of a group
GRID = 400  # steps per axis that a curve is thinned to
PAIR = ["query_id", "reference_id"]
MATCHES = ["query", "reference", "score", "group"]  # match.py's columns
COLOURS = {  # stand-ins in the figures for what the page's style sets, by day and by night
    "#010101": "currentColor",
    "#020202": "var(--true)",
    "#030303": "var(--false)",
    "#040404": "var(--muted)",
    "#050505": "var(--line)",
}
INK, TRUE, FALSE, MUTED, LINE = COLOURS
DASHED = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "the same each time",
    "text.color": INK,
    "legend.frameon": False,
}
STYLE |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED)


# ---- ranking ----


@dataclass(frozen=True)
class Ranking:
    """Scored pairs, best first, wrong ones first among equals, as eval_metrics.py ranks them.

    pairs: `query_id`, `reference_id`, `score`, `correct` (bool); positives: number of pairs in the
    ground truth.
    """

    pairs: pd.DataFrame
    positives: int

    def curve(self):
        """Precision and recall after each pair, (n,) float64 each."""
        found = self.pairs["correct"].to_numpy().cumsum()
        return found / np.arange(1, len(found) + 1), found / self.positives

    def depth(self, precision):
        """How many pairs to accept for the largest recall at this precision or more; 0: it is never
        reached.
        """
        reached = (self.curve()[0] >= precision) & self.pairs["correct"].to_numpy()
        return int(np.flatnonzero(reached).max(initial=-1)) + 1

    def average_precision(self):
        """Micro average precision."""
        return float(self.curve()[0][self.pairs["correct"].to_numpy()].sum() / self.positives)


def rank(candidates, truth):
    """The Ranking of candidates (`query_id`, `reference_id`, `score`) by a ground truth (the former
    two).
    """
    positives = pd.MultiIndex.from_frame(truth[truth["reference_id"] != ""])
    correct = pd.MultiIndex.from_frame(candidates[PAIR]).isin(positives)
    order = np.lexsort((correct, -candidates["score"].to_numpy()))
    return Ranking(
        candidates.assign(correct=correct).iloc[order].reset_index(drop=True), len(positives)
    )


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


def read_edits(path):
    """{query_id: [(name, parameters as JSON), ...]} of a query_edits.csv. Raises InputError with
    what is wrong.
    """
    edits = {}
    for line, (query, text) in enumerate(
        read_csv(path, ("query_id", "edits")).itertuples(index=False), 2
    ):
        try:
            edits[query] = [
                (str(name).replace("_", " "), json.dumps(details))
                for name, details in json.loads(text)
            ]
        except (TypeError, ValueError, RecursionError):
            raise InputError(
                f"{path}: edits in line {line} are no JSON list of [name, parameters]; mend it"
            ) from None
    return edits


def scores_by_edit(ranking, truth, edits):
    """A row for each kind of edit that not all queries have, the hardest first, then one for all
    queries.

    (name, queries, copies, recall of each query's best candidate, recall at 90% precision over all
    queries, average precision over these queries alone). Copies are pairs of the ground truth;
    without any, the rest is None.
    """
    parts = (
        ranking.pairs.drop_duplicates("query_id"),
        ranking.pairs[: ranking.depth(0.9)],
        ranking.pairs,
    )
    queries, kinds = set(truth["query_id"]), defaultdict(set)
    for query in queries & edits.keys():
        for name, _ in edits[query]:
            kinds[name].add(query)

    def row(name, members):
        here = truth[truth["query_id"].isin(members)]
        copies = int((here["reference_id"] != "").sum())
        if not copies:
            return name, len(members), 0, None, None, None
        best, accepted, pairs = (part[part["query_id"].isin(members)] for part in parts)
        recalls = [part["correct"].sum() / copies for part in (best, accepted)]
        return name, len(members), copies, *recalls, Ranking(pairs, copies).average_precision()

    rows = [row(name, members) for name, members in sorted(kinds.items()) if members != queries]
    return [
        *sorted(rows, key=lambda cells: 2 if cells[-1] is None else cells[-1]),
        row("all queries", queries),
    ]


# ---- pictures ----


def shown(name):
    """A name as text that can be printed: bytes that are no UTF-8, and characters that would not
    show, as escapes.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def open_picture(path):
    """The picture at `path`: RGB, upright, no side longer than SIDE. Raises some exception where
    there is none.
    """
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
        pixels_to_decode(image)
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        image = ImageOps.exif_transpose(in_eight_bits(image)).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return image


def embed(path):
    """A picture for the page: `data` (a JPEG as URI), `width` and `height`, or why it is
    `missing`.
    """
    if path is None or not os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises where a name is too long)
        return {"missing": "no such picture"}
    try:
        image, file = open_picture(path), io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY, optimize=True)
    except (
        Exception
    ):  # file system, formats and decoders each fail in their own way, and none may cost the page
        return {"missing": "cannot be read"}
    data = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"missing": None, "data": data, "width": image.width, "height": image.height}


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


def draw_axes(xlabel, ylabel):
    """A Figure of a size that a phone can show, and its axes."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure, name, label):
    """The figure as an SVG element in the page's font, width and colours; `name` is its own,
    `label` is read aloud.
    """
    file = io.StringIO()
    figure.savefig(
        file,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    text = file.getvalue()
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    width, height = figure.get_size_inches() * 72
    head = f'<svg role="img" aria-label="{html.escape(label)}"'
    return f'{head} viewBox="0 0 {width:.1f} {height:.1f}">{text}'


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


@mpl.rc_context(STYLE)
def draw_scores(scores, unit, threshold=None):
    """Histograms of {label: scores (n,)} over one axis: the share of each where there are two, else
    the number.
    """
    alone = len(scores) == 1
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), 40)
    figure, axes = draw_axes(unit, "pairs" if alone else "share of these pairs")
    for (label, values), colour in zip(scores.items(), (TRUE, FALSE), strict=False):
        heights = np.histogram(values, edges)[0] / (1 if alone else max(1, len(values)))
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.2)
        axes.stairs(heights, edges, color=colour, linewidth=1.6, label=f"{label} ({len(values):,})")
    if threshold is not None:
        axes.axvline(
            threshold,
            **DASHED,
            label=f"{'threshold' if alone else '90% precision'}: {threshold:.4g}",
        )
    axes.set_ylim(bottom=0)
    figure.legend(
        loc="outside upper left", ncols=2, fontsize=9, handlelength=1.4, columnspacing=1.2
    )
    return svg(figure, "scores", f"Histogram of the {unit} of {' and '.join(scores)}")


# ---- pages ----


def write_page(output, embed, **values):
    """Fills the template, whose pictures come from `embed`, and writes the page; returns its line
    for the user.
    """
    counts = Counter()

    def show(*where):
        image = embed(*where)
        counts[image["missing"]] += 1
        return image

    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, **options
    )
    environment.filters["shown"] = shown
    page = environment.get_template("report.html.jinja").render(values, show=show).encode()
    with atomic(Path(output)) as file:
        file.write_bytes(page)
    pictures = ", ".join(f"{count} {reason or 'pictures'}" for reason, count in counts.items())
    return f"{shown(output)}: {len(page) / 1e6:.1f} MB, {pictures or 'no pictures'}"


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


def write_match_page(output, matches, bad=(), threshold=None, gallery=GROUPS):
    """Writes the page of copies that match.py found; returns its line for the user.

    matches: DataFrame of `query`, `reference` (paths as str), `score` (cosine), `group`; bad:
    (path, reason) of each file that could not be read; threshold: the least cosine of a match.
    Shows at most `gallery` groups, largest first.
    """
    matches = matches.sort_values("score", ascending=False, kind="stable")
    sides = [
        matches[["group", side]].set_axis(["group", "path"], axis=1)
        for side in ("query", "reference")
    ]
    members = pd.concat(sides).drop_duplicates()
    sizes = members["group"].value_counts().reindex(matches["group"].unique())
    apart = not set(matches["query"]) & set(matches["reference"])
    counts = {
        "groups of copies": sizes,
        "pictures in these pairs": members,
        "pairs": matches,
        "unreadable files": bad,
    }
    facts = {name: f"{len(things):,}" for name, things in counts.items()}
    if threshold is not None:
        facts["threshold"] = f"{threshold:.6g}"
    return write_page(
        output,
        embed,
        title="Copies",
        subtitle="",
        facts=facts,
        unit="cosine",
        scale="Cosine of the descriptors of each pair.",
        figures=[draw_scores({"pairs": matches["score"].to_numpy(float)}, "cosine", threshold)]
        if len(matches)
        else [],
        groups=[
            group_row(matches[matches["group"] == group], size, apart)
            for group, size in sizes.sort_values(ascending=False, kind="stable")[:gallery].items()
        ],
        root=common_folder(members["path"]),
        bad=bad,
        most_bad=BAD,
    )


def group_row(pairs, size, apart):
    """What the page shows of a group: its number of pictures, some of them, and the scores between
    these, best first.

    `apart`: whether queries and references are different files; then the pictures are called so.
    """
    role = (
        dict.fromkeys(pairs["query"], "query ") | dict.fromkeys(pairs["reference"], "reference ")
        if apart
        else {}
    )
    paths = list(dict.fromkeys(pairs[["query", "reference"]].to_numpy().ravel()))[:GROUP]
    number = {path: n for n, path in enumerate(paths, 1)}
    inside = pairs[pairs["query"].isin(paths) & pairs["reference"].isin(paths)][:GROUP]
    numbers = (
        sorted((number[query], number[reference]))
        for query, reference in inside[MATCHES[:2]].to_numpy()
    )
    return {
        "size": size,
        "pairs": len(pairs),
        "best": pairs["score"].max(),
        "pictures": [(path, f"{role.get(path, '')}{n}") for path, n in number.items()],
        "scores": [(*pair, score) for pair, score in zip(numbers, inside["score"], strict=True)],
    }


def common_folder(paths):
    """The folder that all paths are in, with a closing slash, or "" where there is none."""
    try:
        return os.path.join(os.path.commonpath({os.path.dirname(path) for path in paths}), "")  # noqa: PTH118, PTH120
    except ValueError:  # no paths, or absolute and relative ones
        return ""


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


def main(argv=None):
    """Runs the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    try:
        if args.ground_truth:
            print(report_submission(args))
        else:
            gallery = GROUPS if args.gallery is None else args.gallery
            print(write_match_page(args.output, read_pairs(args.submission), gallery=gallery))
    except (InputError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
