"""Submissions by perceptual hashes, a baseline without a network.

    python scripts/dev/hash_images.py input --phase 2 --output exp/hashes
    python scripts/eval_metrics.py exp/hashes/phash.csv input/private_ground_truth.csv

Hashes of 256 bits of every query and reference, by imagehash (pip install imagehash). Writes
dhash.csv and phash.csv: the ten nearest references of each query; the score is minus the number of
bits that differ.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

import numpy as np
from tqdm import tqdm

from common.errors import InputError, one_line_errors
from common.files import atomic
from common.images import open_image
from common.listing import is_image_name, is_visible

# imagehash's: the signs of differences of neighboring pixels, and of cosine coefficients.
HASHES = ("dhash", "phash")


def list_images(folder):
    """Sorted paths of the images in a folder, hidden files aside.

    Raises InputError where there is none, or two have one id.
    """
    paths = []
    if folder.is_dir():
        for path in folder.iterdir():
            if is_visible(path.name) and is_image_name(path.name):
                paths.append(path)
    if not paths:
        raise InputError(
            f"{folder}: is no folder of images; see input/README.md for what belongs where"
        )
    if len({path.stem for path in paths}) < len(paths):
        raise InputError(
            f"{folder}: has images whose names differ in their suffix alone; rename one of each"
        )
    return sorted(paths)


def hash_folder(folder):
    """(ids, {name of the hash: bool (n, 256)}) of the images in a folder.

    Raises InputError where there is none, one is unreadable, two have one id, or imagehash is not
    installed.
    """
    try:
        import imagehash  # here, since only requirements-dev.txt has it
    except ImportError as error:
        message = f"{error.name}: is not installed; pip install imagehash"
        raise InputError(message) from error

    paths = list_images(folder)
    bits = {name: [] for name in HASHES}
    for path in tqdm(paths, folder.name, unit="image"):
        image = open_image(path)
        for name in HASHES:
            hash_function = getattr(imagehash, name)
            bits[name].append(hash_function(image, hash_size=16).hash.ravel())
    ids = [path.stem for path in paths]
    return ids, {name: np.array(rows) for name, rows in bits.items()}


def match_hashes(query, reference, k=10):
    """(query row, reference row, score) of each query's k nearest references.

    query, reference: bool (n, 256). The score is minus the number of bits that differ.
    """
    query_signs = 2 * query.astype(np.float32) - 1
    reference_signs = 2 * reference.astype(np.float32) - 1
    matches = []
    # One by one: all distances at once would take 200 GB for DISC21.
    for q, signs in enumerate(query_signs):
        distances = (len(signs) - reference_signs @ signs) / 2
        for r in distances.argsort(kind="stable")[:k].tolist():
            matches.append((q, r, -int(distances[r])))
    return matches


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "data",
        type=Path,
        metavar="DATA",
        help="folder of reference_images/ and query_images/ (or ..._phase2/)",
    )
    add(
        "--phase",
        type=int,
        choices=[1, 2],
        default=1,
        help="take query_images or query_images_phase2",
    )
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where dhash.csv and phash.csv go",
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the submissions; returns the exit code."""
    args = parse_args(argv)
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"{args.output}: is no folder; choose another --output")
    query_folder = "query_images" if args.phase == 1 else "query_images_phase2"
    query_ids, queries = hash_folder(args.data / query_folder)
    reference_ids, references = hash_folder(args.data / "reference_images")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in HASHES:
        pairs = match_hashes(queries[name], references[name])
        with atomic(args.output / f"{name}.csv") as path, path.open("w", newline="") as file:
            rows = [(query_ids[q], reference_ids[r], score) for q, r, score in pairs]
            csv.writer(file).writerows([("query_id", "reference_id", "score"), *rows])
        print(args.output / f"{name}.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
