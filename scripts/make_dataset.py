"""Build a copy-detection data set in DISC21's layout from a folder of photographs, or from the
embedded ones.

    python scripts/make_dataset.py demo/input  # embedded photographs, generated pictures
    # your own photographs, any number of them
    python scripts/make_dataset.py input --photos ~/Pictures

Writes OUT/
    training_images/T000000.jpg ...      what the network learns from, no query or reference among
                                         them
    reference_images/R000000.jpg ...     photographs, and generated pictures that nothing is a copy
                                         of
    query_images/Q00000.jpg ...          phase 1; one in three is an edited copy of a reference
    query_images_phase2/Q50000.jpg ...   phase 2: other references, other distractors
    public_ground_truth.csv              query_id,reference_id for all of phase 1 (no reference_id:
                                         a distractor)
    private_ground_truth.csv             the same for phase 2
    query_edits.csv                      query_id,source,edits,phase: what was done to which picture
    statistics.json                      numbers of pictures and edits, sizes, what was skipped and
                                         why
    contact_sheet.jpg                    a row of examples, original beside edited, for each kind of
                                         edit

Killed or interrupted, the same command goes on from what OUT's neighbour `.OUT.unfinished` holds,
to the same bytes. A file that is no photograph is named and left out; so is one with the same
pixels as another. Copies that differ in a pixel are not noticed, and would make the ground truth
wrong: sort them out first. HEIC needs the package pillow-heif. Exit code: 0, 2 for what cannot be
used (one line says what), 1 for a lost process, 130 after Ctrl-C.

The embedded photographs are those inside the wheels of scikit-image and scikit-learn, cut into
disjoint tiles: each tile is either a reference or the source of distractor queries. Generated
pictures are dead leaves over 1/f textures (Baradad et al. 2021, "Learning to see by looking at
noise"). Queries are edited with AugLy by other operations and strengths than those the training
augments with. The same command writes the same bytes, for any number of workers.
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pylibmagic  # noqa: F401  (libmagic for AugLy, where the system has none)
from augly import image as imaugs
from augly.utils import SCREENSHOT_TEMPLATES_DIR
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from pictures import in_eight_bits, pixels_to_decode

try:
    from pillow_heif import register_heif_opener
except ImportError:
    register_heif_opener = None

# Photographs of things: no text pages, masks, logos or test patterns, no even textures (brick,
# grass, gravel), whose tiles all look alike, and one half of the stereo pair.
EMBEDDED = {
    "skimage/data": "astronaut.png camera.png chelsea.png coffee.png coins.png "
    "hubble_deep_field.jpg ihc.png moon.png "
    "motorcycle_left.png retina.jpg rocket.jpg",
    "sklearn/datasets/images": "china.jpg flower.jpg",
}
HEIC = {".heic", ".heif", ".hif"}
SUFFIXES = {
    ".avif",
    ".bmp",
    ".gif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
} | HEIC
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
EMBEDDED_SHARES = {"references": 0.7, "distractors": 0.3}
PHOTOS_SHARES = {"training": 0.5, "references": 0.3, "distractors": 0.2}
KINDS = {
    "split": 0,
    "order": 1,
    "training": 2,
    "reference": 3,
    "query": 4,
}  # one random stream each, see `generator`
PHASE_2_START = 50_000  # DISC21's phase 2 begins at Q50000
PHASES = (
    ("query_images", 0, "public_ground_truth.csv"),
    ("query_images_phase2", PHASE_2_START, "private_ground_truth.csv"),
)
EMBEDDED_NUMBERS = {
    "training": 1000,
    "reference": 600,
}  # at least; more where there are more photographs
PHOTOS_NUMBERS = {"training": 100, "reference": 100}  # enough of them for negatives
MAX_TILES = 6  # along a photograph's shorter side: one large photograph shall not fill the data set
MIN_SIDE, MAX_ASPECT = 16, 20  # smaller or thinner photographs vanish under the edits
MIN_ENTROPY = 4.5  # bits per pixel: tiles of plain sky or black border all look the same
JPEG_QUALITY = 92
THUMBNAIL, GAP, HEADING, LINES, EXAMPLES = (
    160,
    8,
    28,
    4,
    4,
)  # of the contact sheet; pixels but the last two
ROW = HEADING + THUMBNAIL + 17 * LINES + GAP
WINDOW = 8192  # pictures that wait for a worker at once
VERSIONS = {
    name: version(name) for name in ("augly", "numpy", "pillow")
}  # that the bytes depend on

if register_heif_opener:
    register_heif_opener()
    FORMATS.append("HEIF")
warnings.filterwarnings(
    "ignore", module="PIL"
)  # remarks on files that it reads all the same; pixels are counted here


class InputError(ValueError):
    """Wrong input; the message says what is wrong and what to do, in one line."""


def say(message):
    """One line on stderr, above the progress bar."""
    tqdm.write(f"make_dataset.py: {message}".replace("\n", " "), file=sys.stderr)


@dataclass(frozen=True)
class Picture:
    """Where a picture comes from: a photograph (`path`), a tile of one (`box` too), or a generated
    one (neither).
    """

    name: str
    path: Path | None = None
    box: tuple[int, int, int, int] | None = None


def generator(seed, kind, index=0):
    """The random generator of picture `index` of a kind: what it draws depends on nothing else."""
    return np.random.default_rng([seed, KINDS[kind], index])


def start_worker():
    """In a worker process: leave Ctrl-C to the parent, and end as soon as that is gone, killed or
    not.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def parallel(function, items, workers, title):
    """Yields the function's value for each item, in order, computed by `workers` processes below a
    progress bar.
    """
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        with tqdm(total=len(items), desc=title, unit="picture") as bar:
            for start in range(0, len(items), WINDOW):
                for value in pool.map(function, items[start : start + WINDOW], chunksize=4):
                    bar.update()
                    yield value
    finally:
        pool.shutdown(cancel_futures=True)


# ---- photographs ----


def open_photograph(path, short_side=None):
    """The photograph as RGB, upright, scaled down to at most `short_side` pixels along its shorter
    side.

    Raises InputError, FILE: what is wrong, where it is none that can be decoded.
    """
    try:
        if path.suffix.lower() in HEIC and not register_heif_opener:
            raise ValueError("install pillow-heif for HEIC")
        image = Image.open(path, formats=FORMATS)
        pixels_to_decode(image)
        ImageOps.exif_transpose(image, in_place=True)
        image = in_eight_bits(image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        image.load()
    except Exception as error:  # file system, formats and decoders each fail in their own way
        raise InputError(
            f"{path}: cannot be read as a photograph ({error})".replace("\n", " ")
        ) from error
    scale = short_side / min(image.size) if short_side else 1
    if scale >= 1:
        return image
    return image.resize(
        [max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS
    )


@functools.lru_cache(maxsize=32)
def open_embedded(path, size):
    """An embedded photograph, kept for its next tile."""
    return open_photograph(path, MAX_TILES * size)


def embedded_tiles(size):
    """All tiles of `size` x `size` pixels of the embedded photographs that show something, as a
    list of Pictures.
    """
    tiles = []
    for folder, names in EMBEDDED.items():
        package = folder.split("/")[0]
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise InputError(
                f"{package}: not installed, and it holds the photographs; install it or give "
                f"--photos DIR"
            )
        for name in names.split():
            path = Path(spec.submodule_search_locations[0]).parent / folder / name
            image = open_embedded(path, size)
            for y in range(0, image.height - size + 1, size):
                for x in range(0, image.width - size + 1, size):
                    box = (x, y, x + size, y + size)
                    if image.crop(box).convert("L").entropy() >= MIN_ENTROPY:
                        tiles.append(Picture(f"{package}/{name}@{x},{y}", path, box))
    return tiles


def fingerprint(path):
    """(SHA-256 of the decoded pixels, None, None), or (None, kind of reason, line that says why it
    is of no use).
    """
    try:
        image = open_photograph(path)
    except InputError as error:
        return None, "unreadable", str(error)
    if min(image.size) < MIN_SIDE or max(image.size) > MAX_ASPECT * min(image.size):
        reason = (
            f"{path}: {image.width} x {image.height} pixels, too small or too thin to be edited"
        )
        return None, "too small or thin", reason
    digest = hashlib.sha256(str(image.size).encode())
    for top in range(0, image.height, 256):  # not all at once: a photograph may take 300 MB
        digest.update(image.crop((0, top, image.width, min(top + 256, image.height))).tobytes())
    return digest.hexdigest(), None, None


def list_photographs(folder):
    """Sorted (path, size in bytes, time of the last change) of all files below `folder` that are
    named like pictures.

    Says which folders cannot be looked into. Raises InputError when there is no such folder or
    file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --photos takes a folder of photographs")
    found = []
    for place, _, names in os.walk(
        folder, onerror=lambda error: say(f"{error.filename}: {error.strerror}; left out")
    ):
        found += [Path(place, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
    states = [(path, path.stat()) for path in sorted(found) if path.is_file()]
    if not states:
        raise InputError(f"{folder}: there is no photograph below it; give more photographs")
    return [(path, state.st_size, state.st_mtime_ns) for path, state in states]


def read_journal(path):
    """{(path, size, time): SHA-256} of the photographs that an interrupted reading found to be
    readable.
    """
    known = {}
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # the last line may be a part of one
            *state, digest = json.loads(line)
            known[tuple(state)] = digest
    return known


def read_photographs(folder, workers, journal):
    """Every readable photograph below `folder`, once: {Picture: SHA-256}, sorted, and what was left
    out, a list of (kind of reason, line), which goes to stderr as well.

    `journal` is a file that remembers the readable ones, so that an interrupted reading goes on.
    """
    files = [
        (path, (str(path.absolute()), size, time)) for path, size, time in list_photographs(folder)
    ]
    known = read_journal(journal) if journal.exists() else {}
    todo = [path for path, state in files if state not in known]
    first, skipped = {}, []
    with (
        closing(parallel(fingerprint, todo, workers, "reading")) as fresh,
        journal.open("a") as file,
    ):
        for path, state in files:
            digest, kind, reason = (known[state], None, None) if state in known else next(fresh)
            if digest and state not in known:
                print(json.dumps([*state, digest]), file=file, flush=True)
            if digest in first:
                kind, reason = "duplicate", f"{path}: the same picture as {first[digest]}"
            if reason is None:
                first[digest] = path
            else:
                skipped.append((kind, reason))
                say(f"{reason}; skipped")
    return {
        Picture(str(path.relative_to(folder)), path): digest for digest, path in first.items()
    }, skipped


# ---- generated pictures ----


def texture(rng, size):
    """A coloured 1/f noise texture, an RGB image of `size` x `size` pixels."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    spectrum = rng.normal(size=(2, 3, *frequency.shape)) / frequency ** rng.uniform(0.8, 1.6)
    field = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(size, size)).reshape(3, -1)
    field /= field.std(axis=1, keepdims=True)
    mixing = rng.normal(size=(3, 3))
    mixing *= rng.uniform(10, 60) / np.linalg.norm(mixing, axis=1, keepdims=True)
    pixels = mixing @ field + rng.uniform(40, 215, size=(3, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).T.reshape(size, size, 3))


def dead_leaves(rng, size):
    """Overlapping polygons, plain or textured, over a texture: an RGB image of `size` x `size`
    pixels.

    Radii follow the r**-3 law that makes dead leaves look alike at every scale, as natural images
    do.
    """
    canvas, bark = texture(rng, size), texture(rng, size)
    smallest, largest = size / 30, size / 2.5
    for _ in range(rng.integers(15, 120)):
        radius = (smallest**-2 + rng.uniform() * (largest**-2 - smallest**-2)) ** -0.5
        corners = int(rng.choice([3, 4, 5, 6, 24]))
        angles = rng.uniform(0, 2 * math.pi) + np.arange(corners) * 2 * math.pi / corners
        outline = radius * np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.4, 1)], axis=1)
        turn = rng.uniform(0, 2 * math.pi)
        turn = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        points = (outline @ turn + rng.uniform(0, size, size=2)).ravel().tolist()
        if rng.uniform() < 0.3:
            mask = Image.new("1", (size, size))
            ImageDraw.Draw(mask).polygon(points, fill=1)
            canvas.paste(bark, mask=mask)
        else:
            ImageDraw.Draw(canvas).polygon(points, fill=tuple(colour(rng)))
    return canvas


# ---- query edits ----


def uniform(rng, low, high):
    """A float with three decimals, so that the csv records exactly what was applied."""
    return round(float(rng.uniform(low, high)), 3)


def colour(rng):
    """A random RGB colour as a list of three ints."""
    return rng.integers(0, 256, size=3).tolist()


def draw_crop(rng):
    """Corners of a crop that keeps 55% to 90% of each side."""
    width, height = uniform(rng, 0.55, 0.9), uniform(rng, 0.55, 0.9)
    x1, y1 = uniform(rng, 0, 1 - width), uniform(rng, 0, 1 - height)
    return {
        "x1": x1,
        "y1": y1,
        "x2": min(1.0, round(x1 + width, 3)),
        "y2": min(1.0, round(y1 + height, 3)),
    }


EDITS = {
    "overlay_onto_screenshot": lambda rng: {
        "template_filepath": str(rng.choice(["web.png", "mobile.png"]))
    },
    "overlay_stripes": lambda rng: {
        "line_width": uniform(rng, 0.1, 0.5),
        "line_color": colour(rng),
        "line_angle": uniform(rng, -90, 90),
        "line_density": uniform(rng, 0.2, 0.6),
        "line_type": str(rng.choice(["solid", "dotted", "dashed"])),
        "line_opacity": uniform(rng, 0.4, 1),
    },
    "pad": lambda rng: {
        "w_factor": uniform(rng, 0.05, 0.25),
        "h_factor": uniform(rng, 0.05, 0.25),
        "color": colour(rng),
    },
    "crop": draw_crop,
    "skew": lambda rng: {"skew_factor": uniform(rng, -0.4, 0.4), "axis": int(rng.integers(2))},
    "saturation": lambda rng: {"factor": uniform(rng, 2, 3)},
    "change_aspect_ratio": lambda rng: {"ratio": round(2 ** uniform(rng, -1.3, 1.3), 3)},
    "pad_square": lambda rng: {"color": colour(rng)},
    "opacity": lambda rng: {"level": uniform(rng, 0.5, 0.8)},
}


def draw_edits(rng):
    """One to three different edits in random order, then the JPEG encoding: a list of [operation,
    parameters].
    """
    names = rng.choice(
        list(EDITS), size=rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]), replace=False
    ).tolist()
    return [[name, EDITS[name](rng)] for name in names] + [
        ["jpeg", {"quality": int(rng.integers(40, 91))}]
    ]


def apply_edits(image, edits):
    """The image after every edit but the closing `jpeg`, never larger than three times the
    original.
    """
    bound = 3 * max(image.size)
    for name, parameters in edits[:-1]:
        parameters = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in parameters.items()
        }
        if name == "overlay_onto_screenshot":
            parameters["template_filepath"] = str(
                Path(SCREENSHOT_TEMPLATES_DIR) / parameters["template_filepath"]
            )
        image = getattr(imaugs, name)(image, **parameters).convert("RGB")
        image.thumbnail((bound, bound))
    return image


# ---- the data set ----


@dataclass(frozen=True)
class Job:
    """One file of the data set: `picture` as number `index` of its `kind`, edited when `edits` are
    given.
    """

    file: Path
    picture: Picture
    kind: str
    index: int
    edits: list | None = None


def original(job, seed, size):
    """The picture of a job before its edits."""
    if job.picture.path is None:
        return dead_leaves(generator(seed, job.kind, job.index), size)
    if job.picture.box is None:
        return open_photograph(job.picture.path, size)
    return open_embedded(job.picture.path, size).crop(job.picture.box)


def write(job, out, seed, size):
    """Write one picture below `out` as a JPEG, unless it is there; returns (width, height,
    bytes).
    """
    file = out / job.file
    with suppress(OSError), Image.open(file, formats=["JPEG"]) as image:
        return *image.size, file.stat().st_size
    image, quality = original(job, seed, size), {"quality": JPEG_QUALITY}
    if job.edits is not None:
        image, quality = apply_edits(image, job.edits), job.edits[-1][1]
    temporary = out.with_name(f"{os.getpid()}.jpg")
    image.save(temporary, **quality)
    temporary.replace(file)
    return *image.size, file.stat().st_size


def split(pictures, shares, seed):
    """Shuffle the pictures and deal them into disjoint pools, {name: list}, by the shares of each
    (they sum to 1).
    """
    order = generator(seed, "split").permutation(len(pictures))
    ends = (np.cumsum(list(shares.values())) * len(pictures)).round().astype(int)
    parts = np.split(order, ends[:-1])
    return {name: [pictures[i] for i in part] for name, part in zip(shares, parts, strict=True)}


def plan_folder(folder, photographs, number, seed):
    """Jobs for a folder of `number` pictures in random order: photographs, made up to the number by
    generated ones.
    """
    kind = folder.removesuffix("_images")
    pictures = photographs[:number] + [Picture("generated")] * (number - len(photographs))
    order = generator(seed, "order", KINDS[kind]).permutation(len(pictures))
    return [
        Job(Path(folder, f"{kind[0].upper()}{i:06}.jpg"), pictures[k], kind, i)
        for i, k in enumerate(order)
    ]


def plan_queries(folder, start, number, copied, distractors, seed):
    """Jobs for the queries of one phase, named from `start`, and the rows of its ground truth.

    `copied` are the reference jobs to copy, each once; the other queries edit the `distractors` in
    turn.
    """
    others = [(distractors[i % len(distractors)], "") for i in range(number - len(copied))]
    sources = [(job.picture, job.file.stem) for job in copied] + others
    jobs, truth = [], []
    for i, k in enumerate(generator(seed, "order", start).permutation(number), start):
        picture, reference_id = sources[k]
        jobs.append(
            Job(
                Path(folder, f"Q{i:05}.jpg"),
                picture,
                "query",
                i,
                draw_edits(generator(seed, "query", i)),
            )
        )
        truth.append((f"Q{i:05}", reference_id))
    return jobs, truth


def plan(pools, args):
    """All jobs, and the tables {file name: (header, rows)}, for the photographs in `pools`, lists
    by name.

    Raises InputError where they are too few.
    """
    least, jobs = PHOTOS_NUMBERS if args.photos else EMBEDDED_NUMBERS, {}
    for kind, pool, number in (
        ("training", pools["training"], args.training),
        ("reference", pools["references"], args.references),
    ):
        number = max(least[kind], len(pool)) if number is None else number
        jobs[kind] = plan_folder(f"{kind}_images", pool, number, args.seed)
    photographed = [job for job in jobs["reference"] if job.picture.path]
    most = min(3 * (len(photographed) // 2), PHASE_2_START) if len(pools["distractors"]) > 1 else 0
    queries = most if args.queries is None else args.queries
    if queries < 3 or queries > most:
        raise InputError(
            f"{args.photos or 'embedded photographs'}: {len(photographed)} photographs as "
            f"references and "
            f"{len(pools['distractors'])} for distractors allow {most} queries a phase; "
            "give more photographs or a smaller --queries"
        )
    tables, edits, copies = {}, [], round(queries / 3)
    for phase, (folder, start, truth_file) in enumerate(PHASES):
        half = slice(phase, None, 2)  # phases share neither a reference nor a distractor's source
        copied, distractors = photographed[half][:copies], pools["distractors"][half]
        jobs[folder], truth = plan_queries(folder, start, queries, copied, distractors, args.seed)
        tables[truth_file] = ("query_id", "reference_id"), truth
        edits += [
            (job.file.stem, job.picture.name, json.dumps(job.edits), phase + 1)
            for job in jobs[folder]
        ]
    tables["query_edits.csv"] = ("query_id", "source", "edits", "phase"), edits
    return [job for part in jobs.values() for job in part], tables


def settle(unfinished, plan):
    """Remember the `plan`, a dict of what decides the bytes. Raises InputError when another one was
    begun here.
    """
    file = unfinished / "plan.json"
    begun = json.loads(file.read_text()) if file.exists() else plan
    if changed := [name for name in plan if plan[name] != begun.get(name)]:
        raise InputError(
            f"{unfinished}: was begun with other {', '.join(changed)}; go on with those, or "
            f"discard it: --start-over"
        )
    (temporary := unfinished / "plan").write_text(json.dumps(begun))
    temporary.replace(file)


# ---- what came out ----


def spread(values):
    """Least, median and greatest of an array of integers; nothing of an empty one."""
    return {
        name: int(getattr(np, name)(values)) for name in ("min", "median", "max") if len(values)
    }


def statistics(jobs, sizes, tables, found, skipped):
    """What is in the data set, as a dict of plain values: sources, pictures by folder, edits, and
    what was left out.

    `sizes` holds each job's (width, height, bytes), `found` is the number of photographs or tiles
    to choose from.
    """
    used = {job.picture.name for job in jobs if job.picture.path}
    numbers = {
        "sources": {"usable": found, "used": len(used), **Counter(kind for kind, _ in skipped)},
        "pictures": {},
    }
    folders = {"training_images": [], "reference_images": []}
    for job, size in zip(jobs, sizes, strict=True):
        folders.setdefault(str(job.file.parent), []).append((job.picture.path is not None, *size))
    for folder, members in folders.items():
        photographed, width, height, size = np.array(members, int).reshape(-1, 4).T
        numbers["pictures"][folder] = {
            "number": len(members),
            "of photographs": int(photographed.sum()),
            "generated": int((photographed == 0).sum()),
            "width": spread(width),
            "height": spread(height),
            "bytes": int(size.sum()),
        }
    for folder, _, truth_file in PHASES:
        copies = sum(reference != "" for _, reference in tables[truth_file][1])
        numbers["pictures"][folder] |= {
            "copies": copies,
            "distractors": len(folders[folder]) - copies,
        }
    chains = [[name for name, _ in job.edits] for job in jobs if job.edits]
    counts = Counter(name for chain in chains for name in chain)
    numbers["queries by edit"] = {name: counts[name] for name in (*EDITS, "jpeg")}
    lengths = Counter(len(chain) - 1 for chain in chains)
    numbers["queries by number of edits before jpeg"] = dict(sorted(lengths.items()))
    return numbers | {"skipped": [reason for _, reason in skipped]}


def label(job):
    """The name of a query and its edits with all parameters, in lines that fit below its
    pictures.
    """
    edits = [
        " ".join([name, *(f"{key}={value}" for key, value in values.items())])
        for name, values in job.edits
    ]
    lines = textwrap.wrap(
        f"{job.file.stem}: {', '.join(edits)}", 50, max_lines=LINES, placeholder=" ..."
    )
    return "\n".join(lines)


def contact_sheet(jobs, out, seed, size):
    """An RGB image with a row for each kind of edit: the first queries with it and few others,
    original and edited.
    """
    queries = [job for job in jobs if job.edits]
    sheet = Image.new(
        "RGB", (EXAMPLES * (2 * THUMBNAIL + 3 * GAP), len(EDITS) * ROW + GAP), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, kind in enumerate(EDITS):
        having = [job for job in queries if any(name == kind for name, _ in job.edits)]
        draw.text(
            (GAP, row * ROW + GAP),
            f"{kind}: {len(having)} of {len(queries)} queries",
            "black",
            font,
        )
        for column, job in enumerate(sorted(having, key=lambda job: len(job.edits))[:EXAMPLES]):
            x, y = GAP + column * (2 * THUMBNAIL + 3 * GAP), row * ROW + HEADING
            with Image.open(out / job.file, formats=["JPEG"]) as edited:
                for number, image in enumerate((original(job, seed, size), edited)):
                    place = (x + number * (THUMBNAIL + GAP), y)
                    image = ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), color="gainsboro")
                    sheet.paste(image, place)
            draw.multiline_text((x, y + THUMBNAIL + 2), label(job), "black", font)
    return sheet


def summary(out, numbers):
    """The statistics in a few lines for the user."""
    pictures = {name: part["number"] for name, part in numbers["pictures"].items()}
    sources = ", ".join(f"{count} {kind}" for kind, count in numbers["sources"].items())
    edits = ", ".join(f"{count} {kind}" for kind, count in numbers["queries by edit"].items())
    return (
        f"{out}: {pictures['training_images']} training pictures, {pictures['reference_images']} "
        f"references, "
        f"2 x {pictures['query_images']} queries\nphotographs: {sources}\nqueries: {edits}"
    )


def build(unfinished, args):
    """Make the whole data set in the folder `unfinished`/data, or what is missing there; returns
    that folder and its statistics.

    Raises InputError for too few photographs, or when an unfinished data set of another kind is
    there.
    """
    if args.photos:
        photographs, skipped = read_photographs(
            args.photos, args.workers, unfinished / "photographs.jsonl"
        )
    else:
        photographs, skipped = dict.fromkeys(embedded_tiles(args.size)), []
    shares = PHOTOS_SHARES if args.photos else EMBEDDED_SHARES
    pools = {"training": []} | split([*photographs], shares, args.seed)
    jobs, tables = plan(pools, args)
    settings = {
        f"--{name}": getattr(args, name)
        for name in ("seed", "queries", "references", "training", "size")
    }
    contents = repr([(picture.name, digest) for picture, digest in photographs.items()])
    digest = hashlib.sha256(contents.encode(errors="backslashreplace")).hexdigest()
    versions = VERSIONS | {
        "make_dataset.py": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    }
    settle(unfinished, settings | {"photographs": digest, "versions": versions})

    out = unfinished / "data"
    for folder in {job.file.parent for job in jobs}:
        (out / folder).mkdir(parents=True, exist_ok=True)
    task = functools.partial(write, out=out, seed=args.seed, size=args.size)
    sizes = list(parallel(task, jobs, args.workers, "writing"))
    for name, (header, rows) in tables.items():
        with (out / name).open(
            "w", newline="", encoding="utf-8", errors="backslashreplace"
        ) as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    numbers = {"arguments": settings | {"--photos": args.photos and str(args.photos)}}
    numbers |= statistics(jobs, sizes, tables, len(photographs), skipped)
    (out / "statistics.json").write_text(json.dumps(numbers, indent=1) + "\n")
    contact_sheet(jobs, out, args.seed, args.size).save(
        out / "contact_sheet.jpg", quality=JPEG_QUALITY
    )
    return out, numbers


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
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add(
        "--queries",
        type=int,
        help="a phase, a third of them copies (default: as many as the photographs allow)",
    )
    for name, kind in (("references", "reference"), ("training", "training")):
        least = f"{EMBEDDED_NUMBERS[kind]}, with --photos {PHOTOS_NUMBERS[kind]}"
        what = f"{kind} pictures: photographs, then generated ones up to this number"
        add(
            f"--{name}",
            type=int,
            help=f"{what} (default: all photographs dealt to them, at least {least})",
        )
    default = "(default: 100, with --photos 512)"
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help=f"shorter side; photographs are scaled down to it {default}",
    )
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    add(
        "--start-over",
        action="store_true",
        help="discard the pictures of an unfinished run with other arguments",
    )
    args = parser.parse_args(argv)
    if args.size is None:
        args.size = 512 if args.photos else 100
    bounds = {
        "seed": (0, 2**63),
        "queries": (3, PHASE_2_START),
        "references": (0, 10**6),
        "training": (0, 10**6),
        "size": (MIN_SIDE, 4096),
        "workers": (1, 1024),
    }
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} {value}: must lie between {low} and {high}")
    return args


def make(args, out, unfinished):
    """Build the data set in `unfinished` and rename it to `out` when it is complete."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        if (unfinished / "plan.json").exists() and not (
            unfinished / "data"
        ).exists():  # killed after the renaming
            shutil.rmtree(unfinished)
        raise InputError(
            f"{args.out}: exists and is not an empty folder; remove it or choose another"
        )
    if args.photos and out.is_relative_to(args.photos.resolve()):
        raise InputError(
            f"{args.out}: lies in --photos {args.photos}, whose pictures it would join; choose "
            f"another"
        )
    if args.start_over:  # what was read of the photographs is true of them still
        (unfinished / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(unfinished / "data", ignore_errors=True)
    unfinished.mkdir(parents=True, exist_ok=True)
    data, numbers = build(unfinished, args)
    data.replace(out)
    shutil.rmtree(unfinished)
    print(summary(args.out, numbers))


def main(argv=None):
    """Make the data set; returns the exit code: 0, 2 for wrong input, 1 for a lost process, 130
    after Ctrl-C.
    """
    args = parse_args(argv)
    out = args.out.resolve()
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        make(args, out, unfinished)
    except (InputError, OSError) as error:
        place = (
            f"{args.out}: " if isinstance(error, OSError) and not error.filename else ""
        )  # as of a full disk
        print(f"make_dataset.py: error: {place}{error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        remedy = "the same command goes on, with fewer --workers where memory ran out"
        print(f"make_dataset.py: error: {args.out}: lost a process; {remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"make_dataset.py: {args.out}: interrupted; the same command goes on", file=sys.stderr
        )
        return 130
    finally:
        with suppress(OSError):
            unfinished.rmdir()  # if nothing is in it
    return 0


if __name__ == "__main__":
    sys.exit(main())
