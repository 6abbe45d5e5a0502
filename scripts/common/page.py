"""The HTML page of report.py and match.py: its figures, embedded images, and groups of copies."""

import base64
import html
import io
import os
import re
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from common.files import atomic
from common.images import open_checked, upright_rgb

SIDE, QUALITY = 256, 70  # of pictures in the page: longer side in pixels, JPEG


PAIRS, GROUPS, BAD = (
    12,
    50,
    200,
)  # shown: pairs of each kind, groups (--gallery changes both), unreadable files


GROUP = 12  # pictures, and scores, shown of a group


MATCHES = ["query", "reference", "score", "group"]  # match.py's columns


COLORS = {  # stand-ins in the figures for what the page's style sets, by day and by night
    "#010101": "currentColor",
    "#020202": "var(--true)",
    "#030303": "var(--false)",
    "#040404": "var(--muted)",
    "#050505": "var(--line)",
}


INK, TRUE, FALSE, MUTED, LINE = COLORS


DASHED = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}


STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "the same each time",
    "text.color": INK,
    "legend.frameon": False,
}


STYLE |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED)


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
    with open_checked(path) as image:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        image = upright_rgb(image)
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


def draw_axes(xlabel, ylabel):
    """A Figure of a size that a phone can show, and its axes."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure, name, label):
    """The figure as an SVG element in the page's font, width and colors; `name` is its own,
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
    for stand_in, color in COLORS.items():
        text = text.replace(stand_in, color)
    width, height = figure.get_size_inches() * 72
    head = f'<svg role="img" aria-label="{html.escape(label)}"'
    return f'{head} viewBox="0 0 {width:.1f} {height:.1f}">{text}'


@mpl.rc_context(STYLE)
def draw_scores(scores, unit, threshold=None):
    """Histograms of {label: scores (n,)} over one axis: the share of each where there are two, else
    the number.
    """
    alone = len(scores) == 1
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), 40)
    figure, axes = draw_axes(unit, "pairs" if alone else "share of these pairs")
    for (label, values), color in zip(scores.items(), (TRUE, FALSE), strict=False):
        heights = np.histogram(values, edges)[0] / (1 if alone else max(1, len(values)))
        axes.stairs(heights, edges, fill=True, color=color, alpha=0.2)
        axes.stairs(heights, edges, color=color, linewidth=1.6, label=f"{label} ({len(values):,})")
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
    page = environment.get_template("page.html.jinja").render(values, show=show).encode()
    with atomic(Path(output)) as file:
        file.write_bytes(page)
    pictures = ", ".join(f"{count} {reason or 'pictures'}" for reason, count in counts.items())
    return f"{shown(output)}: {len(page) / 1e6:.1f} MB, {pictures or 'no pictures'}"


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
