"""The HTML page of report.py and match.py: charts, embedded images, groups of copies."""

import base64
import csv
import hashlib
import io
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import atomic, printable, shown
from common.images import open_checked, upright_rgb
from common.keeping import file_details, kept_and_reason
from common.views import VIEW_OF_NAME, WHOLE

THUMBNAIL_SIDE = 256  # pixels of the longer side
JPEG_QUALITY = 70

MAX_PAIRS = 12  # shown of each kind; --gallery changes it
MAX_GROUPS = 200  # shown; --gallery changes it
MAX_IMAGES = 1000  # of all groups together: 12 kB each, and their pairs; --gallery lifts this limit
MAX_GROUP_IMAGES = 12  # shown of a group; the others are listed
MAX_GROUP_PAIRS = MAX_GROUP_IMAGES**2  # at least all pairs of these images
OPEN_PAIRS = 12  # of a group: the others are listed below a line that opens
MAX_UNREADABLE = 200  # names of unreadable files

MATCH_COLUMNS = ["query", "reference", "score", "group"]  # that match.py's csv has always had
NOT_COPY_COLUMNS = ["query", "reference", "query_sha256", "reference_sha256"]  # of --ignore's csv
MEANING = {  # of the score that decided
    "cosine": "Cosine of the descriptors of each pair.",
    "normalized score": "Normalized score of each pair: the cosine of its descriptors, less the "
    "mean cosine of the query with the images that resemble it most without being copies.",
}

BINS = 40  # of a histogram


# ---- charts ----


class Chart:
    """Lines between two axes. The template draws them as SVG, in the page's colors.

    Each line has a style, a class of the template's CSS: "true", "false" or "dashed". `legend`
    holds (style, text) of every line that has a label.
    """

    width = 300  # of the area between the axes, in units of the SVG
    height = 155

    def __init__(self, title, x_label, y_label, x_range, y_range, least_y_step=0):
        self.title = title  # screen readers read it aloud
        self.x_label = x_label
        self.y_label = y_label
        self.x_range = x_range
        self.y_range = y_range
        self.x_ticks = [(self.x(number), text) for number, text in ticks(*x_range)]
        self.y_ticks = [(self.y(number), text) for number, text in ticks(*y_range, least_y_step)]
        self.lines = []
        self.markers = []
        self.legend = []

    def x(self, values):
        """Positions of values on the horizontal axis, from the left."""
        low, high = self.x_range
        return np.round((values - low) / (high - low) * self.width, 1)

    def y(self, values):
        """Positions of values on the vertical axis, from the top, as SVG counts."""
        low, high = self.y_range
        return np.round((high - values) / (high - low) * self.height, 1)

    def add_line(self, x, y, style, label=None, filled=False):
        """Add a line through the points (x, y), (n,) each; `filled`: with the area below it."""
        positions = zip(self.x(np.asarray(x)), self.y(np.asarray(y)), strict=True)
        points = " ".join(f"{x:g},{y:g}" for x, y in positions)
        self.lines.append({"points": points, "style": style, "filled": filled})
        if label:
            self.legend.append((style, label))

    def add_marker(self, x, y, style):
        """Add a dot."""
        self.markers.append((self.x(x), self.y(y), style))


def ticks(low, high, least_step=0):
    """Round numbers between low and high, about six, with their texts: [(number, text), ...]."""
    rough_step = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough_step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough_step)
    step = max(step, least_step)
    numbers = step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)
    decimals = max(0, -math.floor(math.log10(step)))
    readable = decimals <= 5 and max(abs(low), abs(high)) < 1e7
    number_format = f",.{decimals}f" if readable else ".12g"
    texts = [format(number, number_format).replace("-", "−") for number in numbers]  # noqa: RUF001
    return list(zip(numbers, texts, strict=True))


def score_chart(scores, unit, threshold=None):
    """Chart of the histograms of {label: scores (n,)} over one axis.

    One histogram counts pairs. Two show what share of their own pairs each bin holds.
    """
    alone = len(scores) == 1
    edges = bin_edges(np.concatenate(list(scores.values())))
    heights = {}
    for label, values in scores.items():
        counts = np.histogram(values, edges)[0]
        heights[label] = counts if alone else counts / max(1, len(values))

    low = edges[0]
    high = edges[-1]
    if threshold is not None:
        low = min(low, threshold)
        high = max(high, threshold)
    margin = 0.03 * (high - low)
    highest = max(values.max() for values in heights.values())
    chart = Chart(
        title=f"Histogram of the {unit} of {' and '.join(scores)}",
        x_label=unit,
        y_label="pairs" if alone else "share of these pairs",
        x_range=(low - margin, high + margin),
        y_range=(0, 1.05 * highest),
        least_y_step=1 if alone else 0,
    )
    outline_x = np.repeat(edges, 2)
    for (label, values), style in zip(scores.items(), ("true", "false"), strict=False):
        outline_y = [0, *np.repeat(heights[label], 2), 0]
        chart.add_line(outline_x, outline_y, style, f"{label} ({len(values):,})", filled=True)
    if threshold is not None:
        name = "threshold" if alone else "90% precision"
        label = f"{name}: {threshold:.4g}"
        chart.add_line([threshold, threshold], chart.y_range, "dashed", label)
    return chart


def bin_edges(values):
    """Borders of BINS bins of equal width that hold all values."""
    low = values.min()
    high = values.max()
    size = max(abs(low), abs(high)) or 1
    if high - low < 1e-5 * size:  # the same score, but for rounding: no room for labels
        low -= 0.05 * size
        high += 0.05 * size
    return np.linspace(low, high, BINS + 1)


# ---- images ----


def read_thumbnail(path):
    """The image of a file: RGB, upright, no side longer than THUMBNAIL_SIDE.

    Raises whatever file system and decoder raise.
    """
    with open_checked(path) as image:
        image.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
        image = upright_rgb(image)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return image


def thumbnail(path):
    """An image for the page: `data` (a JPEG as URI), `width`, `height` and `missing` = None.

    Where there is none to show, `missing` says why, and is the only key.
    """
    if path is None or not os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises where a name is too long)
        return {"missing": "not found"}
    file = io.BytesIO()
    try:
        image = read_thumbnail(path)
        image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    except Exception:  # each decoder fails in its own way, and none may cost the page
        return {"missing": "unreadable"}
    data = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"missing": None, "data": data, "width": image.width, "height": image.height}


# ---- text ----


def escaped(text):
    """Text that is no file name, for one line: bytes that are not UTF-8 (surrogates), and
    unprintable characters, as escapes.
    """
    return printable(text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def file_uri(path):
    """A file's address for a link from a page on this machine; "" for a name that has none."""
    try:
        return Path(path).absolute().as_uri()
    except ValueError:  # Windows: half of a character of UTF-16
        return ""


def sha256_base64(text):
    """SHA-256 of a script as a page's Content-Security-Policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- page ----


def write_page(output, thumbnail_of, contents=(), **values):
    """Fill the template with `values` and write the page; returns its line for the user.

    thumbnail_of: function of what the template shows, a `thumbnail`. contents: texts for the line.
    """
    counts = Counter()

    def show(*image):
        result = thumbnail_of(*image)
        counts[result["missing"]] += 1
        return result

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.filters["file_uri"] = file_uri
    environment.filters["escaped"] = escaped
    environment.filters["sha256_base64"] = sha256_base64
    template = environment.get_template("page.html.jinja")
    page = template.render(values, show=show).encode("utf-8", "backslashreplace")
    with atomic(Path(output)) as file:
        file.write_bytes(page)

    line = [f"{len(page) / 1e6:.1f} MB", *contents, f"{counts.pop(None, 0)} images"]
    line += [f"{count} {reason}" for reason, count in counts.items()]
    return f"{shown(output)}: {', '.join(line)}"


# ---- page of match.py ----


def write_match_page(
    output,
    matches,
    unreadable=(),
    threshold=None,
    gallery=None,
    scored_by="cosine",
    compared=None,
):
    """Write the page of copies that match.py found; returns its line for the user.

    matches: DataFrame of `query`, `reference` (paths as str), `score`, `group` and, where known,
    `view`, `cosine`, `normalized`, `query_sha256`, `reference_sha256`; unreadable: (path, reason)
    of each file that could not be read; threshold: the least score of a match. gallery: how many
    groups to show, or None for default_gallery. scored_by: which number the score is, a key of
    MEANING. compared: how many images were compared, where known. Groups, and the pairs of each,
    are shown lowest score first, identical files last.
    """
    matches = lowest_first(with_all_columns(matches))
    members = group_members(matches)
    groups_by_score = matches["group"].unique()
    sizes = members["group"].value_counts().reindex(groups_by_score)
    if gallery is None:
        gallery = default_gallery(sizes)
    chosen = matches[matches["group"].isin(groups_by_score[:gallery])]
    two_sets = set(matches["query"]).isdisjoint(matches["reference"])
    groups = []
    for number, pairs in chosen.groupby("group", sort=False):
        groups.append(group_card(number, pairs, two_sets))

    shown_groups = f"{len(groups):,} of {len(sizes):,} groups"
    return write_page(
        output,
        thumbnail,
        contents=[shown_groups],
        title="Copies",
        subtitle="",
        facts=match_facts(matches, members, unreadable, threshold, scored_by, compared),
        score_meaning=MEANING[scored_by],
        charts=match_charts(matches, scored_by, threshold),
        groups=groups,
        shown_groups=shown_groups,
        all_groups=len(sizes),
        open_pairs=OPEN_PAIRS,
        not_copy_columns=NOT_COPY_COLUMNS,
        root=common_folder(members["path"]),
        unreadable=unreadable,
        max_unreadable=MAX_UNREADABLE,
    )


def default_gallery(sizes):
    """How many of the groups to show, given their numbers of images in the order of the page: at
    most MAX_GROUPS, and at most MAX_IMAGES images, so that the page stays below 20 MB.
    """
    images = sizes.clip(upper=MAX_GROUP_IMAGES).cumsum()
    return min(MAX_GROUPS, int((images <= MAX_IMAGES).sum()))


def match_facts(matches, members, unreadable, threshold, scored_by, compared):
    """Name and value, as text, of what write_match_page's page shows first."""
    facts = {}
    if compared is not None:
        facts["images compared"] = f"{compared:,}"
    facts["groups of copies"] = f"{members['group'].nunique():,}"
    facts["images in these pairs"] = f"{len(members):,}"
    facts["pairs"] = f"{len(matches):,}"
    facts["unreadable files"] = f"{len(unreadable):,}"
    if threshold is not None:
        name = "threshold" if scored_by == "cosine" else "normalized threshold"
        facts[name] = f"{threshold:.6g}"
    return facts


def match_charts(matches, scored_by, threshold):
    """The histogram of all scores, as a list; none where there are no pairs."""
    if not len(matches):
        return []
    scores = {"pairs": matches["score"].to_numpy(float)}
    return [score_chart(scores, scored_by, threshold)]


def with_all_columns(matches):
    """A table of matches with every column of today's csv, whichever it has.

    `normalized` is NaN where scores are not normalized, a SHA-256 is "" where it is not known.
    """
    defaults = {
        "view": WHOLE.name,
        "cosine": matches["score"],
        "normalized": np.nan,
        "query_sha256": "",
        "reference_sha256": "",
    }
    missing = {name: value for name, value in defaults.items() if name not in matches}
    matches = matches.assign(**missing)
    normalized = pd.to_numeric(matches["normalized"], errors="coerce")  # empty text as well
    digests = matches[["query_sha256", "reference_sha256"]].fillna("")
    return matches.assign(normalized=normalized, **digests)


def lowest_first(matches):
    """A table of matches as the page judges them: with `identical`, whether the two files have the
    same bytes; lowest score first, identical files last.
    """
    digests = matches["query_sha256"]
    identical = (digests != "") & (digests == matches["reference_sha256"])
    ranked = matches["score"].where(~identical, np.inf)
    order = ranked.argsort(kind="stable")
    return matches.assign(identical=identical).iloc[order]


def group_members(matches):
    """Each file of each group once: `group`, `path`."""
    sides = []
    for side in ("query", "reference"):
        sides.append(matches[["group", side]].rename(columns={side: "path"}))
    return pd.concat(sides).drop_duplicates()


def group_card(number, pairs, two_sets):
    """What the page shows of a group: some of its images, and the pairs between these.

    number: the group's in the csv. pairs: its rows of `matches`, lowest_first. two_sets: queries
    and references are different files; then the images are called so.
    """
    paths = pairs[["query", "reference"]].to_numpy().ravel()
    members = list(dict.fromkeys(paths))
    details = {path: file_details(path) for path in members}
    kept, reason = kept_and_reason(members, details)
    chosen = members[:MAX_GROUP_IMAGES]
    if kept not in chosen:
        chosen[-1] = kept

    queries = set(pairs["query"])
    images = {}
    for place, path in enumerate(chosen, start=1):
        role = ""
        if two_sets:
            role = "query " if path in queries else "reference "
        images[path] = {
            "path": path,
            "number": place,
            "role": f"{role}{place}",
            "details": details[path],
            "keep": reason if path == kept and details[path] else "",
            "pairs": [],  # that it is in, by their place in the list
            "parts": [],  # of it that match: (place of the pair, View)
        }

    inside = pairs["query"].isin(chosen) & pairs["reference"].isin(chosen)
    lines = []
    for place, pair in enumerate(pairs[inside][:MAX_GROUP_PAIRS].itertuples()):
        query = images[pair.query]
        reference = images[pair.reference]
        line = pair_line(pair, query["number"], reference["number"])
        query["pairs"].append(place)
        reference["pairs"].append(place)
        if line["part"]:
            query["parts"].append((place, line["part"]))
        lines.append(line)
    return {
        "number": str(number),
        "size": len(members),
        "pairs": len(pairs),
        "scores": scores_text(pairs),
        "images": list(images.values()),
        "others": [path for path in members if path not in images],
        "lines": lines,
    }


def scores_text(pairs):
    """The lowest and the best score of a group, such as "lowest 0.7012, best 0.9300".

    The score of identical files is not a number: re-saved files may reach 1.0000 by rounding.
    """
    scores = pairs["score"][~pairs["identical"]]
    if not len(scores):
        return "identical files"
    if len(pairs) == 1:
        return f"score {scores.iloc[0]:.4f}"
    best = f"best {scores.max():.4f}"
    if pairs["identical"].any():
        best = "best: identical files"
    return f"lowest {scores.min():.4f}, {best}"


def pair_line(pair, query, reference):
    """What the page says of a pair; query, reference: the numbers of its images in the group."""
    first, second = sorted((query, reference))
    line = {
        "first": first,
        "second": second,
        "identical": pair.identical,
        "cosine": pair.cosine,
        "normalized": None,
        "view": "",
        "part": None,
        "row": not_copy_row(pair),
    }
    if pair.identical:  # nothing else needs to be said
        return line
    view = VIEW_OF_NAME.get(pair.view)
    line["view"] = view_text(pair.view, query)
    if view and view.size < 1:
        line["part"] = view
    if not np.isnan(pair.normalized):
        line["normalized"] = pair.normalized
    return line


def view_text(name, number):
    """Which view of image `number` matches, such as "top left part of 1, mirrored"; "" for the
    whole.
    """
    if name == WHOLE.name:
        return ""
    view = VIEW_OF_NAME.get(name)
    if view is None:  # a view of a later version
        return f"{name} of {number}"
    changes = []
    if view.mirrored:
        changes.append("mirrored")
    if view.turned == 180:
        changes.append("turned 180°")
    elif view.turned:
        changes.append(f"turned {view.turned}° counterclockwise")
    if view.size == 1:
        return f"{number} {', '.join(changes)}"
    place = view.name.removesuffix(" mirrored")
    return ", ".join([f"{place} part of {number}", *changes])


def not_copy_row(pair):
    """The pair's row of the csv that --ignore reads, in base64: paths keep bytes that no HTML can
    hold.
    """
    values = [getattr(pair, column) for column in NOT_COPY_COLUMNS]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(values)
    return base64.b64encode(os.fsencode(text.getvalue())).decode()


def common_folder(paths):
    """The folder that all paths are in, with a closing slash, or "" where there is none."""
    folders = {os.path.dirname(path) for path in paths}  # noqa: PTH120
    try:
        return os.path.join(os.path.commonpath(folders), "")  # noqa: PTH118
    except ValueError:  # no paths, or absolute and relative ones
        return ""
