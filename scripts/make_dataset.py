"""Build a copy-detection data set in DISC21's layout from a folder of photographs, or from the
embedded ones.

    python scripts/make_dataset.py demo/input  # embedded photographs, generated images
    # your own photographs, any number of them
    python scripts/make_dataset.py input --photos ~/Pictures

Writes OUT/
    training_images/T000000.jpg ...      what the network learns from, no query or reference among
                                         them
    reference_images/R000000.jpg ...     photographs, and generated images that nothing is a copy of
    query_images/Q00000.jpg ...          phase 1; one in three is an edited copy of a reference
    query_images_phase2/Q50000.jpg ...   phase 2: other references, other distractors
    public_ground_truth.csv              query_id,reference_id for all of phase 1 (no reference_id:
                                         a distractor)
    private_ground_truth.csv             the same for phase 2
    query_edits.csv                      query_id,source,edits,phase: what was done to which image
    statistics.json                      numbers of images and edits, sizes, what was skipped and
                                         why
    contact_sheet.jpg                    a row of examples, original beside edited, for each kind of
                                         edit

The same command writes byte-identical files, for any number of workers. Killed or interrupted, it
resumes from `.OUT.unfinished`, a folder beside OUT. Hidden files and folders are not looked at. An
unreadable file is named and left out; so is an image with the same pixels as another (transparent
ones on white). Copies that differ in a pixel are not noticed and make the ground truth wrong: sort
them out first. HEIC needs the package pillow-heif. Exit codes: 0, 2 for input that cannot be used
(one line says what), 1 if a worker process died, 130 after Ctrl-C.

The embedded photographs are those inside the wheels of scikit-image and scikit-learn, cut into
disjoint tiles: each tile is either a reference or the source of distractor queries. Generated
images are dead leaves over 1/f textures (Baradad et al. 2021, "Learning to see by looking at
noise"). Queries are edited with AugLy, by other operations and strengths than training augments
with.
"""

import argparse
import csv
import functools
import hashlib
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pylibmagic  # noqa: F401  (libmagic for AugLy, where the system has none)
from augly import image as imaugs
from augly.utils import SCREENSHOT_TEMPLATES_DIR
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import sample_images
from common.cli import between, usable_cores
from common.errors import InputError, one_line_errors, warn
from common.files import atomic, sha256_of
from common.listing import is_image_name, is_visible
from common.parallel import parallel
from common.sample_images import (
    STREAMS,
    SourceImage,
    color,
    dead_leaves,
    embedded_tiles,
    generator,
    open_embedded,
    open_photograph,
)

# How the photographs are split, and how many images a folder has at least: more where its share of
# the photographs is larger. With --photos, 100 generated references are enough for negatives.
EMBEDDED_SHARES = {"training": 0, "references": 0.7, "distractors": 0.3}
PHOTOS_SHARES = {"training": 0.5, "references": 0.3, "distractors": 0.2}
EMBEDDED_NUMBERS = {"training": 1000, "reference": 600}
PHOTOS_NUMBERS = {"training": 100, "reference": 100}

PHASE_2_START = 50_000  # DISC21's phase 2 begins at Q50000
PHASES = (
    ("query_images", 0, "public_ground_truth.csv"),
    ("query_images_phase2", PHASE_2_START, "private_ground_truth.csv"),
)

# Smaller or thinner photographs vanish under the edits.
MIN_SIDE = 16  # pixels
MAX_ASPECT = 20

# The largest numbers that the command line takes.
MAX_IMAGES = 1_000_000  # of a folder, as DISC21 has
MAX_SIDE = 4096  # pixels
MAX_WORKERS = 1024

JPEG_QUALITY = 92

# Contact sheet, in pixels but for LINES and EXAMPLES.
THUMBNAIL = 160
GAP = 8
HEADING = 28
LINES = 4  # of a label
EXAMPLES = 4  # pairs in a row
PAIR_WIDTH = 2 * THUMBNAIL + 3 * GAP
ROW = HEADING + THUMBNAIL + 17 * LINES + GAP

# The files depend on these versions.
VERSIONS = {name: version(name) for name in ("augly", "numpy", "pillow")}


# ---- photographs ----


@dataclass(frozen=True)
class Skipped:
    """Why a photograph is left out: the kind of reason, and a line that names the file."""

    kind: str
    reason: str


def fingerprint(path):
    """(SHA-256 of the decoded pixels, None) of a photograph, or (None, Skipped)."""
    try:
        image = open_photograph(path)
    except InputError as error:
        return None, Skipped("unreadable", str(error))
    if min(image.size) < MIN_SIDE or max(image.size) > MAX_ASPECT * min(image.size):
        size = f"{image.width} x {image.height} pixels"
        reason = f"{path}: {size}, too small or too thin to be edited"
        return None, Skipped("too small or thin", reason)
    digest = hashlib.sha256(str(image.size).encode())
    for top in range(0, image.height, 256):  # not all at once: a photograph may take 300 MB
        strip = image.crop((0, top, image.width, min(top + 256, image.height)))
        digest.update(strip.tobytes())
    return digest.hexdigest(), None


def list_photographs(folder):
    """[(path, state)] of all visible files below `folder` that are named like images, in order of
    paths.

    Hidden files and folders are left out: macOS writes `._1.jpg` beside `1.jpg`. The state tells
    whether a file has changed: absolute path, size in bytes, time of the last change. Folders that
    cannot be listed are named on stderr. Raises InputError where there is no such folder, or no
    file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --photos takes a folder of photographs")

    def name_unlisted(error):
        warn(f"{error.filename}: {error.strerror}; left out")

    paths = []
    for place, folders, names in os.walk(folder, onerror=name_unlisted):
        folders[:] = filter(is_visible, folders)
        paths += [Path(place, name) for name in names if is_visible(name) and is_image_name(name)]
    files = []
    for path in sorted(paths):
        if path.is_file():
            status = path.stat()
            files.append((path, (str(path.absolute()), status.st_size, status.st_mtime_ns)))
    if not files:
        raise InputError(f"{folder}: there is no photograph below it; give more photographs")
    return files


def read_journal(path):
    """{state: SHA-256} of the photographs that an interrupted reading found to be readable."""
    known = {}
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # the last line may be a part of one
            *state, digest = json.loads(line)
            known[tuple(state)] = digest
    return known


def read_photographs(folder, workers, journal):
    """Read every photograph below `folder`.

    Returns {SourceImage: SHA-256 of its pixels} without duplicates, in order of paths, and a list
    of Skipped, which go to stderr as well. `journal` is a file that remembers the readable
    photographs, so that an interrupted reading resumes.
    """
    files = list_photographs(folder)
    known = read_journal(journal) if journal.exists() else {}
    to_read = [path for path, state in files if state not in known]
    path_of = {}  # by SHA-256
    all_skipped = []
    with (
        closing(parallel(fingerprint, to_read, workers, "reading")) as fingerprints,
        journal.open("a") as journal_file,
    ):
        for path, state in files:
            skipped = None
            if state in known:
                digest = known[state]
            else:
                digest, skipped = next(fingerprints)
                if digest:
                    print(json.dumps([*state, digest]), file=journal_file, flush=True)
            if digest in path_of:
                skipped = Skipped("duplicate", f"{path}: the same image as {path_of[digest]}")
            if skipped:
                all_skipped.append(skipped)
                warn(f"{skipped.reason}; skipped")
            else:
                path_of[digest] = path
    photographs = {}
    for digest, path in path_of.items():
        photographs[SourceImage(str(path.relative_to(folder)), path)] = digest
    return photographs, all_skipped


# ---- query edits ----


def uniform(rng, low, high):
    """A float with three decimals, so that the csv records exactly what was applied."""
    return round(float(rng.uniform(low, high)), 3)


def draw_crop(rng):
    """Corners of a crop that keeps 55% to 90% of each side."""
    width = uniform(rng, 0.55, 0.9)
    height = uniform(rng, 0.55, 0.9)
    x1 = uniform(rng, 0, 1 - width)
    y1 = uniform(rng, 0, 1 - height)
    x2 = min(1.0, round(x1 + width, 3))
    y2 = min(1.0, round(y1 + height, 3))
    return {"x1": x1, "y1": y1, "x2": x2, "y2": y2}


def draw_screenshot(rng):
    return {"template_filepath": str(rng.choice(["web.png", "mobile.png"]))}


def draw_stripes(rng):
    return {
        "line_width": uniform(rng, 0.1, 0.5),
        "line_color": color(rng),
        "line_angle": uniform(rng, -90, 90),
        "line_density": uniform(rng, 0.2, 0.6),
        "line_type": str(rng.choice(["solid", "dotted", "dashed"])),
        "line_opacity": uniform(rng, 0.4, 1),
    }


def draw_pad(rng):
    return {
        "w_factor": uniform(rng, 0.05, 0.25),
        "h_factor": uniform(rng, 0.05, 0.25),
        "color": color(rng),
    }


def draw_skew(rng):
    return {"skew_factor": uniform(rng, -0.4, 0.4), "axis": int(rng.integers(2))}


def draw_saturation(rng):
    return {"factor": uniform(rng, 2, 3)}


def draw_aspect_ratio(rng):
    """A ratio from 0.41 to 2.46, of which the logarithm is uniform."""
    return {"ratio": round(2 ** uniform(rng, -1.3, 1.3), 3)}


def draw_pad_square(rng):
    return {"color": color(rng)}


def draw_opacity(rng):
    return {"level": uniform(rng, 0.5, 0.8)}


# {operation of AugLy: draws its parameters, a dict}
EDITS = {
    "overlay_onto_screenshot": draw_screenshot,
    "overlay_stripes": draw_stripes,
    "pad": draw_pad,
    "crop": draw_crop,
    "skew": draw_skew,
    "saturation": draw_saturation,
    "change_aspect_ratio": draw_aspect_ratio,
    "pad_square": draw_pad_square,
    "opacity": draw_opacity,
}


def draw_edits(rng):
    """One to three different edits in random order, then the JPEG encoding: a list of [operation,
    parameters].
    """
    number = rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])
    names = rng.choice(list(EDITS), size=number, replace=False).tolist()
    edits = [[name, EDITS[name](rng)] for name in names]
    edits.append(["jpeg", {"quality": int(rng.integers(40, 91))}])
    return edits


def apply_edits(image, edits):
    """The image after every edit but the closing `jpeg`, never larger than three times the
    original.
    """
    bound = 3 * max(image.size)
    for name, parameters in edits[:-1]:
        keywords = dict(parameters)
        for key, value in parameters.items():
            if isinstance(value, list):  # a color, as JSON has it
                keywords[key] = tuple(value)
        if name == "overlay_onto_screenshot":
            template = Path(SCREENSHOT_TEMPLATES_DIR) / parameters["template_filepath"]
            keywords["template_filepath"] = str(template)
        operation = getattr(imaugs, name)
        image = operation(image, **keywords).convert("RGB")
        image.thumbnail((bound, bound))
    return image


# ---- plan of the data set ----


@dataclass(frozen=True)
class Job:
    """One file of the data set: `source` as image `index` of its `kind`, edited when `edits` are
    given.
    """

    file: Path
    source: SourceImage
    kind: str
    index: int
    edits: list | None = None


def split(images, shares, seed):
    """Split the shuffled images into disjoint pools, {name: list}, by the shares of each (they sum
    to 1).
    """
    order = generator(seed, "split").permutation(len(images))
    ends = (np.cumsum(list(shares.values())) * len(images)).round().astype(int)
    parts = np.split(order, ends[:-1])
    pools = {}
    for name, part in zip(shares, parts, strict=True):
        pools[name] = [images[position] for position in part]
    return pools


def plan_folder(kind, photographs, number, seed):
    """Jobs for a folder of `number` images in random order: photographs, made up to the number by
    generated images.
    """
    letter = kind[0].upper()
    generated = [SourceImage("generated")] * (number - len(photographs))
    sources = photographs[:number] + generated
    order = generator(seed, "order", STREAMS[kind]).permutation(number)
    jobs = []
    for index, position in enumerate(order):
        file = Path(f"{kind}_images", f"{letter}{index:06}.jpg")
        jobs.append(Job(file, sources[position], kind, index))
    return jobs


def plan_queries(folder, start, number, copied, distractors, seed):
    """Jobs for the queries of one phase, named from `start`, and the rows of its ground truth.

    `copied` are the reference jobs to copy, each once; the other queries edit the `distractors` in
    turn.
    """
    sources = [(job.source, job.file.stem) for job in copied]
    for turn in range(number - len(copied)):
        sources.append((distractors[turn % len(distractors)], ""))
    order = generator(seed, "order", start).permutation(number)
    jobs = []
    truth = []
    for index, position in enumerate(order, start):
        source, reference_id = sources[position]
        query_id = f"Q{index:05}"
        edits = draw_edits(generator(seed, "query", index))
        jobs.append(Job(Path(folder, f"{query_id}.jpg"), source, "query", index, edits))
        truth.append((query_id, reference_id))
    return jobs, truth


def number_of_queries(photographed, distractors, args):
    """How many queries a phase has: --queries, or as many as the photographs allow.

    `photographed` are the reference jobs that are photographs. A third of the queries are copies of
    these, half of them in each phase. Raises InputError where there are too few.
    """
    most = min(3 * (len(photographed) // 2), PHASE_2_START)
    if len(distractors) < 2:  # each phase needs one
        most = 0
    number = most if args.queries is None else args.queries
    if not 3 <= number <= most:
        raise InputError(
            f"{args.photos or 'embedded photographs'}: {len(photographed)} photographs as "
            f"references and {len(distractors)} for distractors allow {most} queries a phase; "
            "give more photographs or a smaller --queries"
        )
    return number


def plan(pools, args):
    """All jobs, and the tables {file name: (header, rows)}, for the photographs in `pools`, lists
    by name.

    Raises InputError where they are too few.
    """
    least = PHOTOS_NUMBERS if args.photos else EMBEDDED_NUMBERS
    training_number = args.training
    if training_number is None:
        training_number = max(least["training"], len(pools["training"]))
    reference_number = args.references
    if reference_number is None:
        reference_number = max(least["reference"], len(pools["references"]))
    jobs = plan_folder("training", pools["training"], training_number, args.seed)
    references = plan_folder("reference", pools["references"], reference_number, args.seed)
    jobs += references

    photographed = [job for job in references if job.source.path]
    queries = number_of_queries(photographed, pools["distractors"], args)
    copies = round(queries / 3)
    tables = {}
    edits = []
    for phase, (folder, start, truth_file) in enumerate(PHASES):
        half = slice(phase, None, 2)  # phases share neither a reference nor a distractor's source
        copied = photographed[half][:copies]
        distractors = pools["distractors"][half]
        query_jobs, truth = plan_queries(folder, start, queries, copied, distractors, args.seed)
        jobs += query_jobs
        tables[truth_file] = (("query_id", "reference_id"), truth)
        for job in query_jobs:
            edits.append((job.file.stem, job.source.name, json.dumps(job.edits), phase + 1))
    tables["query_edits.csv"] = (("query_id", "source", "edits", "phase"), edits)
    return jobs, tables


def check_same_plan(unfinished, planned):
    """Raise InputError where the unfinished data set was begun with another plan; write down the
    plan of one that begins now.

    planned: a dict of everything that the files depend on.
    """
    file = unfinished / "plan.json"
    begun = json.loads(file.read_text()) if file.exists() else planned
    changed = [name for name in planned if planned[name] != begun.get(name)]
    if changed:
        raise InputError(
            f"{unfinished}: was begun with other {', '.join(changed)}; continue with those, or "
            f"discard it: --start-over"
        )
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(begun))


# ---- images of the data set ----


def original(job, seed, size):
    """The image of a job before its edits."""
    source = job.source
    if source.path is None:
        return dead_leaves(generator(seed, job.kind, job.index), size)
    if source.box is None:
        return open_photograph(source.path, size)
    return open_embedded(source.path, size).crop(source.box)


def write(job, out, seed, size):
    """Write one image below `out` as a JPEG, unless it is there; returns (width, height, bytes)."""
    file = out / job.file
    with suppress(OSError), Image.open(file, formats=["JPEG"]) as image:
        return *image.size, file.stat().st_size
    image = original(job, seed, size)
    quality = JPEG_QUALITY
    if job.edits is not None:
        image = apply_edits(image, job.edits)
        quality = job.edits[-1][1]["quality"]
    # Not beside the file: what a kill leaves there would become part of the data set.
    temporary = out.with_name(f"{os.getpid()}.jpg")
    image.save(temporary, quality=quality)
    temporary.replace(file)
    return *image.size, file.stat().st_size


# ---- statistics and contact sheet ----


def spread(values):
    """Least, median and greatest of an array of integers; nothing of an empty one."""
    if len(values) == 0:
        return {}
    return {
        "min": int(values.min()),
        "median": int(np.median(values)),
        "max": int(values.max()),
    }


def folder_statistics(jobs, sizes):
    """Numbers and sizes of the images of one folder; `sizes` are (width, height, bytes) of each."""
    photographed = sum(job.source.path is not None for job in jobs)
    widths, heights, file_sizes = np.array(sizes, int).reshape(-1, 3).T
    return {
        "number": len(jobs),
        "of photographs": photographed,
        "generated": len(jobs) - photographed,
        "width": spread(widths),
        "height": spread(heights),
        "bytes": int(file_sizes.sum()),
    }


def edit_statistics(jobs):
    """How many queries have each edit, and how many have one, two or three of them."""
    chains = [[name for name, _ in job.edits] for job in jobs if job.edits]
    counts = Counter()
    lengths = Counter()
    for names in chains:
        counts.update(names)
        lengths[len(names) - 1] += 1
    return {
        "queries by edit": {name: counts[name] for name in (*EDITS, "jpeg")},
        "queries by number of edits before jpeg": dict(sorted(lengths.items())),
    }


def statistics(jobs, sizes, tables, found, skipped):
    """What is in the data set, as a dict of plain values: sources, images by folder, edits, and
    what was left out.

    `sizes` holds each job's (width, height, bytes), `found` is the number of photographs or tiles
    to choose from.
    """
    used = {job.source.name for job in jobs if job.source.path}
    skipped_by_kind = Counter(entry.kind for entry in skipped)
    members = {"training_images": [], "reference_images": []}
    for job, size in zip(jobs, sizes, strict=True):
        members.setdefault(str(job.file.parent), []).append((job, size))
    folders = {}
    for folder, pairs in members.items():
        folder_jobs = [job for job, _ in pairs]
        folders[folder] = folder_statistics(folder_jobs, [size for _, size in pairs])
    for folder, _, truth_file in PHASES:
        _, truth = tables[truth_file]
        copies = sum(reference_id != "" for _, reference_id in truth)
        folders[folder]["copies"] = copies
        folders[folder]["distractors"] = len(truth) - copies
    return {
        "sources": {"usable": found, "used": len(used), **skipped_by_kind},
        "pictures": folders,  # the key is part of the file format
        **edit_statistics(jobs),
        "skipped": [entry.reason for entry in skipped],
    }


def label(job):
    """The name of a query and its edits with all parameters, in lines that fit below its images."""
    edits = []
    for name, parameters in job.edits:
        words = [f"{key}={value}" for key, value in parameters.items()]
        edits.append(" ".join([name, *words]))
    text = f"{job.file.stem}: {', '.join(edits)}"
    return "\n".join(textwrap.wrap(text, 50, max_lines=LINES, placeholder=" ..."))


def contact_sheet(jobs, out, seed, size):
    """An RGB image with a row for each kind of edit: queries with it and few other edits, original
    and edited.
    """
    queries = [job for job in jobs if job.edits]
    sheet = Image.new("RGB", (EXAMPLES * PAIR_WIDTH, len(EDITS) * ROW + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, kind in enumerate(EDITS):
        edited = [job for job in queries if any(name == kind for name, _ in job.edits)]
        heading = f"{kind}: {len(edited)} of {len(queries)} queries"
        draw.text((GAP, row * ROW + GAP), heading, "black", font)
        examples = sorted(edited, key=lambda job: len(job.edits))[:EXAMPLES]
        for column, job in enumerate(examples):
            x = GAP + column * PAIR_WIDTH
            y = row * ROW + HEADING
            with Image.open(out / job.file, formats=["JPEG"]) as query:
                sheet.paste(thumbnail(original(job, seed, size)), (x, y))
                sheet.paste(thumbnail(query), (x + THUMBNAIL + GAP, y))
            draw.multiline_text((x, y + THUMBNAIL + 2), label(job), "black", font)
    return sheet


def thumbnail(image):
    """The image on a gray square of THUMBNAIL pixels."""
    return ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), color="gainsboro")


def summary(out, numbers):
    """The statistics in a few lines for the user."""
    images = {name: part["number"] for name, part in numbers["pictures"].items()}
    sources = ", ".join(f"{count} {kind}" for kind, count in numbers["sources"].items())
    edits = ", ".join(f"{count} {kind}" for kind, count in numbers["queries by edit"].items())
    return (
        f"{out}: {images['training_images']} training images, {images['reference_images']} "
        f"references, 2 x {images['query_images']} queries\n"
        f"photographs: {sources}\nqueries: {edits}"
    )


# ---- build ----


def find_photographs(unfinished, args):
    """({SourceImage: SHA-256 or, of an embedded tile, None}, list of Skipped)."""
    if args.photos:
        return read_photographs(args.photos, args.workers, unfinished / "photographs.jsonl")
    return dict.fromkeys(embedded_tiles(args.size)), []


def write_table(path, header, rows):
    """Write a csv; names that are no Unicode are escaped."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def build(unfinished, args):
    """Make the data set in the folder `unfinished`/data, or what is missing there; returns that
    folder and its statistics.

    Raises InputError for too few photographs, or when an unfinished data set of another kind is
    there.
    """
    photographs, skipped = find_photographs(unfinished, args)
    shares = PHOTOS_SHARES if args.photos else EMBEDDED_SHARES
    jobs, tables = plan(split(list(photographs), shares, args.seed), args)

    settings = {
        "--seed": args.seed,
        "--queries": args.queries,
        "--references": args.references,
        "--training": args.training,
        "--size": args.size,
    }
    contents = repr([(source.name, digest) for source, digest in photographs.items()])
    contents_digest = hashlib.sha256(contents.encode(errors="backslashreplace")).hexdigest()
    versions = dict(VERSIONS)
    for source_file in (Path(__file__), Path(sample_images.__file__)):
        versions[source_file.name] = sha256_of(source_file)
    check_same_plan(unfinished, settings | {"photographs": contents_digest, "versions": versions})

    out = unfinished / "data"
    for folder in {job.file.parent for job in jobs}:
        (out / folder).mkdir(parents=True, exist_ok=True)
    task = functools.partial(write, out=out, seed=args.seed, size=args.size)
    sizes = list(parallel(task, jobs, args.workers, "writing"))
    for name, (header, rows) in tables.items():
        write_table(out / name, header, rows)
    arguments = settings | {"--photos": args.photos and str(args.photos)}
    numbers = {"arguments": arguments}
    numbers |= statistics(jobs, sizes, tables, len(photographs), skipped)
    (out / "statistics.json").write_text(json.dumps(numbers, indent=1) + "\n")
    sheet = contact_sheet(jobs, out, args.seed, args.size)
    sheet.save(out / "contact_sheet.jpg", quality=JPEG_QUALITY)
    return out, numbers


def make(args, out, unfinished):
    """Build the data set in `unfinished` and rename it to `out` when it is complete."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        begun = (unfinished / "plan.json").exists()
        if begun and not (unfinished / "data").exists():  # killed after the renaming
            shutil.rmtree(unfinished)
        raise InputError(
            f"{args.out}: exists and is not an empty folder; remove it or choose another"
        )
    if args.photos and out.is_relative_to(args.photos.resolve()):
        raise InputError(
            f"{args.out}: lies in --photos {args.photos}, whose images it would join; choose "
            f"another"
        )
    if args.start_over:  # the journal stays: what it says of the photographs still holds
        (unfinished / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(unfinished / "data", ignore_errors=True)
    unfinished.mkdir(parents=True, exist_ok=True)
    data, numbers = build(unfinished, args)
    data.replace(out)
    shutil.rmtree(unfinished)
    print(summary(args.out, numbers))


# ---- main ----


def parse_args(argv=None):
    """The command line as a namespace. Exits with one line and code 2 on numbers out of range."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to make; must not exist, or be empty")
    add(
        "--photos",
        type=Path,
        metavar="DIR",
        help="use the photographs below DIR, not the embedded ones",
    )
    add(
        "--seed",
        type=between(int, 0, 2**63),
        default=0,
        help="seed of every random draw (default: %(default)s)",
    )
    add(
        "--queries",
        type=between(int, 3, PHASE_2_START),
        help="a phase, a third of them copies (default: as many as the photographs allow)",
    )
    default = "(default: all photographs of its share, at least {}, with --photos {})"
    embedded, photos = EMBEDDED_NUMBERS, PHOTOS_NUMBERS
    add(
        "--references",
        type=between(int, 0, MAX_IMAGES),
        help="reference images: photographs, then generated images up to this number "
        + default.format(embedded["reference"], photos["reference"]),
    )
    add(
        "--training",
        type=between(int, 0, MAX_IMAGES),
        help="training images: photographs, then generated images up to this number "
        + default.format(embedded["training"], photos["training"]),
    )
    add(
        "--size",
        type=between(int, MIN_SIDE, MAX_SIDE),
        metavar="PIXELS",
        help="shorter side; photographs are scaled down to it (default: 100, with --photos 512)",
    )
    add(
        "--workers",
        type=between(int, 1, MAX_WORKERS),
        default=usable_cores(),
        help="processes (default: all cores)",
    )
    add(
        "--start-over",
        action="store_true",
        help="discard the images of an unfinished run with other arguments",
    )
    args = parser.parse_args(argv)
    if args.size is None:
        args.size = 512 if args.photos else 100
    return args


@one_line_errors
def main(argv=None):
    """Make the data set; returns the exit code: 0, 2 for wrong input, 1 if a worker process died,
    130 after Ctrl-C.
    """
    args = parse_args(argv)
    out = args.out.resolve()
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        make(args, out, unfinished)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command resumes it") from None
    except OSError as error:
        if error.filename:
            raise
        raise InputError(f"{args.out}: {error}") from error  # a full disk does not say where
    finally:
        with suppress(OSError):
            unfinished.rmdir()  # if nothing is in it
    return 0


if __name__ == "__main__":
    sys.exit(main())
