"""Build a copy-detection data set in DISC21's layout from a folder of photographs, or from the embedded ones.

    python scripts/make_dataset.py demo/input                  # embedded photographs, generated pictures
    python scripts/make_dataset.py input --photos ~/Pictures   # your own photographs

Writes OUT/
    training_images/T000000.jpg ...      what the network learns from, no query or reference among them
    reference_images/R000000.jpg ...     photographs, and generated pictures that nothing is a copy of
    query_images/Q00000.jpg ...          phase 1; one in three is an edited copy of a reference
    query_images_phase2/Q50000.jpg ...   phase 2: other references, other distractors
    public_ground_truth.csv              query_id,reference_id for all of phase 1 (no reference_id: a distractor)
    private_ground_truth.csv             the same for phase 2
    query_edits.csv                      query_id,source,edits,phase: what was done to which picture

The embedded photographs are those inside the wheels of scikit-image and scikit-learn, cut into disjoint tiles: each
tile is either a reference or the source of distractor queries. Generated pictures are dead leaves over 1/f textures
(Baradad et al. 2021, "Learning to see by looking at noise"). Queries are edited with AugLy by other operations and
strengths than those the training augments with. The same command writes the same bytes, for any number of workers.
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pylibmagic  # noqa: F401  (libmagic for AugLy, where the system has none)
from augly import image as imaugs
from augly.utils import SCREENSHOT_TEMPLATES_DIR
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

# Photographs of things: no text pages, masks, logos or test patterns, no even textures (brick, grass, gravel), whose
# tiles all look alike, and one half of the stereo pair.
EMBEDDED = {
    "skimage/data": "astronaut.png camera.png chelsea.png coffee.png coins.png hubble_deep_field.jpg ihc.png moon.png "
    "motorcycle_left.png retina.jpg rocket.jpg",
    "sklearn/datasets/images": "china.jpg flower.jpg",
}
SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
EMBEDDED_SHARES = {"references": 0.7, "distractors": 0.3}
PHOTOS_SHARES = {"training": 0.5, "references": 0.3, "distractors": 0.2}
KINDS = {"split": 0, "order": 1, "training": 2, "reference": 3, "query": 4}  # one random stream each, see `generator`
PHASE_2_START = 50_000  # DISC21's phase 2 begins at Q50000
PHASES = (
    ("query_images", 0, "public_ground_truth.csv"),
    ("query_images_phase2", PHASE_2_START, "private_ground_truth.csv"),
)
DEFAULT_NUMBERS = {"training": 1000, "reference": 600}  # at least; more where there are more photographs
MAX_TILES = 6  # along a photograph's shorter side: one large photograph shall not fill the data set
MIN_SIDE, MAX_ASPECT = 16, 20  # smaller or thinner photographs vanish under the edits
MIN_ENTROPY = 4.5  # bits per pixel: tiles of plain sky or black border all look the same
JPEG_QUALITY = 92


class InputError(ValueError):
    """Wrong input; the message says what is wrong and what to do, in one line."""


@dataclass(frozen=True)
class Picture:
    """Where a picture comes from: a photograph (`path`), a tile of one (`box` too), or a generated one (neither)."""

    name: str
    path: Path | None = None
    box: tuple[int, int, int, int] | None = None


def generator(seed, kind, index=0):
    """The random generator of picture `index` of a kind: what it draws depends on nothing else."""
    return np.random.default_rng([seed, KINDS[kind], index])


def parallel(function, items, workers, title):
    """The function's value for each item, in order, computed by `workers` processes below a progress bar."""
    with ProcessPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(function, items, chunksize=16), title, len(items), unit="picture"))


# ---- photographs ----


def open_photograph(path, short_side):
    """The photograph as RGB, upright, scaled down to at most `short_side` pixels along its shorter side."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


@functools.lru_cache(maxsize=32)
def open_embedded(path, size):
    """An embedded photograph, kept for its next tile."""
    return open_photograph(path, MAX_TILES * size)


def embedded_tiles(size):
    """All tiles of `size` x `size` pixels of the embedded photographs that show something, as a list of Pictures."""
    tiles = []
    for folder, names in EMBEDDED.items():
        package = folder.split("/")[0]
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise InputError(f"{package}: not installed, and it holds the photographs; install it or give --photos DIR")
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
    """(SHA-256 of the decoded pixels, None), or (None, reason) for a file that is no picture."""
    try:
        with Image.open(path) as image:
            if min(image.size) < MIN_SIDE or max(image.size) > MAX_ASPECT * min(image.size):
                return None, f"{image.width} x {image.height} pixels: too small or too thin to be edited"
            return hashlib.sha256(image.convert("RGB").tobytes() + str(image.size).encode()).hexdigest(), None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return None, str(error)


def find_photographs(folder, workers):
    """Every readable photograph below `folder`, once, as a sorted list of Pictures; says on stderr what it skips.

    Raises InputError when there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --photos takes a folder of photographs")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found = parallel(fingerprint, paths, workers, "reading")
    first = {}
    for path, (digest, reason) in zip(paths, found, strict=True):
        if reason is not None:
            print(f"make_dataset.py: {path}: skipped, {reason}", file=sys.stderr)
        elif digest in first:
            print(f"make_dataset.py: {path}: skipped, the same picture as {first[digest]}", file=sys.stderr)
        else:
            first[digest] = path
    return [Picture(str(path.relative_to(folder)), path) for path in first.values()]


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
    """Overlapping polygons, plain or textured, over a texture: an RGB image of `size` x `size` pixels.

    Radii follow the r**-3 law that makes dead leaves look alike at every scale, as natural images do.
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
    return {"x1": x1, "y1": y1, "x2": min(1.0, round(x1 + width, 3)), "y2": min(1.0, round(y1 + height, 3))}


EDITS = {
    "overlay_onto_screenshot": lambda rng: {"template_filepath": str(rng.choice(["web.png", "mobile.png"]))},
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
    """One to three different edits in random order, then the JPEG encoding: a list of [operation, parameters]."""
    names = rng.choice(list(EDITS), size=rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]), replace=False).tolist()
    return [[name, EDITS[name](rng)] for name in names] + [["jpeg", {"quality": int(rng.integers(40, 91))}]]


def apply_edits(image, edits):
    """The image after every edit but the closing `jpeg`, never larger than three times the original."""
    bound = 3 * max(image.size)
    for name, parameters in edits[:-1]:
        parameters = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
        if name == "overlay_onto_screenshot":
            parameters["template_filepath"] = str(Path(SCREENSHOT_TEMPLATES_DIR) / parameters["template_filepath"])
        image = getattr(imaugs, name)(image, **parameters).convert("RGB")
        image.thumbnail((bound, bound))
    return image


# ---- the data set ----


@dataclass(frozen=True)
class Job:
    """One file to write: `picture` as number `index` of its `kind`, edited when `edits` are given."""

    file: Path
    picture: Picture
    kind: str
    index: int
    edits: list | None = None


def write(job, seed, size):
    """Write one picture as a JPEG."""
    if job.picture.path is None:
        image = dead_leaves(generator(seed, job.kind, job.index), size)
    elif job.picture.box is None:
        image = open_photograph(job.picture.path, size)
    else:
        image = open_embedded(job.picture.path, size).crop(job.picture.box)
    if job.edits is None:
        return image.save(job.file, quality=JPEG_QUALITY)
    return apply_edits(image, job.edits).save(job.file, **job.edits[-1][1])


def split(pictures, shares, seed):
    """Shuffle the pictures and deal them into disjoint pools, {name: list}, by the shares of each (they sum to 1)."""
    order = generator(seed, "split").permutation(len(pictures))
    ends = (np.cumsum(list(shares.values())) * len(pictures)).round().astype(int)
    parts = np.split(order, ends[:-1])
    return {name: [pictures[i] for i in part] for name, part in zip(shares, parts, strict=True)}


def plan_folder(out, folder, photographs, number, seed):
    """Jobs for a folder of `number` pictures in random order: photographs, made up to the number by generated ones."""
    kind = folder.removesuffix("_images")
    if number is None:
        number = max(DEFAULT_NUMBERS[kind], len(photographs))
    pictures = photographs[:number] + [Picture("generated")] * (number - len(photographs))
    order = generator(seed, "order", KINDS[kind]).permutation(len(pictures))
    return [Job(out / folder / f"{kind[0].upper()}{i:06}.jpg", pictures[k], kind, i) for i, k in enumerate(order)]


def plan_queries(folder, start, number, copied, distractors, seed):
    """Jobs for the queries of one phase, named from `start`, and the rows of its ground truth.

    `copied` are the reference jobs to copy, each once; the other queries edit the `distractors` in turn.
    """
    others = [(distractors[i % len(distractors)], "") for i in range(number - len(copied))]
    sources = [(job.picture, job.file.stem) for job in copied] + others
    jobs, truth = [], []
    for i, k in enumerate(generator(seed, "order", start).permutation(number), start):
        picture, reference_id = sources[k]
        jobs.append(Job(folder / f"Q{i:05}.jpg", picture, "query", i, draw_edits(generator(seed, "query", i))))
        truth.append((f"Q{i:05}", reference_id))
    return jobs, truth


def write_csv(path, header, rows):
    """Write the rows below the header."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def build(out, args):
    """Write the whole data set into the existing, empty folder `out`. Raises InputError for too few photographs."""
    if args.photos:
        pools = split(find_photographs(args.photos, args.workers), PHOTOS_SHARES, args.seed)
    else:
        pools = {"training": [], **split(embedded_tiles(args.size), EMBEDDED_SHARES, args.seed)}
    references = plan_folder(out, "reference_images", pools["references"], args.references, args.seed)
    training = plan_folder(out, "training_images", pools["training"], args.training, args.seed)

    photographed = [job for job in references if job.picture.path]
    most = min(3 * (len(photographed) // 2), PHASE_2_START) if len(pools["distractors"]) > 1 else 0
    queries = most if args.queries is None else args.queries
    if queries < 3 or queries > most:
        raise InputError(
            f"{args.photos or 'embedded photographs'}: {len(photographed)} photographs as references and "
            f"{len(pools['distractors'])} for distractors allow {most} queries a phase; "
            "give more photographs or a smaller --queries"
        )
    copies = round(queries / 3)
    jobs, edits = training + references, []
    for phase, (folder, start, truth_file) in enumerate(PHASES):
        half = slice(phase, None, 2)  # phases share neither a reference nor a distractor's source
        copied, distractors = photographed[half][:copies], pools["distractors"][half]
        phase_jobs, truth = plan_queries(out / folder, start, queries, copied, distractors, args.seed)
        write_csv(out / truth_file, ("query_id", "reference_id"), truth)
        edits += [(job.file.stem, job.picture.name, json.dumps(job.edits), phase + 1) for job in phase_jobs]
        jobs += phase_jobs
    write_csv(out / "query_edits.csv", ("query_id", "source", "edits", "phase"), edits)

    for folder in {job.file.parent for job in jobs}:
        folder.mkdir()
    parallel(functools.partial(write, seed=args.seed, size=args.size), jobs, args.workers, "writing")
    print(f"{args.out}: {len(training)} training pictures, {len(references)} references, 2 x {queries} queries")


# ---- main ----


def parse_args(argv=None):
    """The command line as a namespace. Exits with one line and code 2 on numbers out of range."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to make; must not exist, or be empty")
    add("--photos", type=Path, metavar="DIR", help="use the photographs below DIR, not the embedded ones")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--queries", type=int, help="a phase, a third of them copies (default: as many as the photographs allow)")
    default = f"(default: all photographs, at least {DEFAULT_NUMBERS['reference']})"
    add("--references", type=int, help=f"photographs, then generated pictures up to this number {default}")
    default = f"(default: all photographs, at least {DEFAULT_NUMBERS['training']})"
    add("--training", type=int, help=f"the same for the training pictures {default}")
    default = "(default: 100, with --photos 512)"
    add("--size", type=int, metavar="PIXELS", help=f"shorter side; photographs are scaled down to it {default}")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
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


def main(argv=None):
    """Build the data set beside OUT and rename it when it is complete; returns the exit code."""
    args = parse_args(argv)
    temporary = None
    try:
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise InputError(f"{args.out}: exists and is not an empty folder; remove it or choose another")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{args.out.name}-", dir=args.out.parent))
        build(temporary, args)
        temporary.chmod(0o755)
        temporary.replace(args.out)
    except (InputError, OSError) as error:
        print(f"make_dataset.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
