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

Killed or interrupted, the same command goes on from what OUT's neighbor `.OUT.unfinished` holds,
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
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
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

from common.errors import InputError
from common.images import SUFFIXES
from common.parallel import parallel
from common.sample_images import (
    KINDS,
    Picture,
    color,
    dead_leaves,
    embedded_tiles,
    generator,
    open_embedded,
    open_photograph,
)

EMBEDDED_SHARES = {"references": 0.7, "distractors": 0.3}
PHOTOS_SHARES = {"training": 0.5, "references": 0.3, "distractors": 0.2}
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
MIN_SIDE, MAX_ASPECT = 16, 20  # smaller or thinner photographs vanish under the edits
JPEG_QUALITY = 92
THUMBNAIL, GAP, HEADING, LINES, EXAMPLES = (
    160,
    8,
    28,
    4,
    4,
)  # of the contact sheet; pixels but the last two
ROW = HEADING + THUMBNAIL + 17 * LINES + GAP
VERSIONS = {
    name: version(name) for name in ("augly", "numpy", "pillow")
}  # that the bytes depend on


def say(message):
    """One line on stderr, above the progress bar."""
    tqdm.write(f"make_dataset.py: {message}".replace("\n", " "), file=sys.stderr)


# ---- photographs ----


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


# ---- query edits ----


def uniform(rng, low, high):
    """A float with three decimals, so that the csv records exactly what was applied."""
    return round(float(rng.uniform(low, high)), 3)


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
        "line_color": color(rng),
        "line_angle": uniform(rng, -90, 90),
        "line_density": uniform(rng, 0.2, 0.6),
        "line_type": str(rng.choice(["solid", "dotted", "dashed"])),
        "line_opacity": uniform(rng, 0.4, 1),
    },
    "pad": lambda rng: {
        "w_factor": uniform(rng, 0.05, 0.25),
        "h_factor": uniform(rng, 0.05, 0.25),
        "color": color(rng),
    },
    "crop": draw_crop,
    "skew": lambda rng: {"skew_factor": uniform(rng, -0.4, 0.4), "axis": int(rng.integers(2))},
    "saturation": lambda rng: {"factor": uniform(rng, 2, 3)},
    "change_aspect_ratio": lambda rng: {"ratio": round(2 ** uniform(rng, -1.3, 1.3), 3)},
    "pad_square": lambda rng: {"color": color(rng)},
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
