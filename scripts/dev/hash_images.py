"""Perceptual hashes, which need no network, as submissions to compare a descriptor with.

    python scripts/dev/hash_images.py input --phase 2 --output exp/hashes
    python scripts/eval_metrics.py exp/hashes/phash.csv input/private_ground_truth.csv

Hashes of 256 bits of every query and reference, by imagehash (pip install imagehash). Writes
dhash.csv and phash.csv: the ten nearest references of each query, with minus the number of bits
that differ as score.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / name) for name in ("exp", "scripts")]

import numpy as np
from tqdm import tqdm

import v98
from common.errors import one_line_errors
from common.files import atomic

HASHES = (
    "dhash",
    "phash",
)  # imagehash's: signs of differences of neighbors, of cosine coefficients


def hash_folder(folder):
    """(ids, {name of the hash: bool (n, 256)}) of the images in a folder, as the stages read them.

    Raises v98.InputError where there is none, one cannot be read, two have one id, or imagehash is
    not installed.
    """
    try:
        import imagehash  # which only this needs, and only the demo's requirements have
    except ImportError as error:
        message = f"{error.name}: is not installed; pip install imagehash"
        raise v98.InputError(message) from error

    paths, bits = v98.list_images(folder), {name: [] for name in HASHES}
    ids = [Path(path).stem for path in paths]
    if len(set(ids)) < len(ids):
        raise v98.InputError(
            f"{folder}: has images whose names differ in their suffix alone; rename one of each"
        )
    for path in tqdm(paths, folder.name):
        image = v98.open_image(path)
        for name in HASHES:
            bits[name].append(getattr(imagehash, name)(image, hash_size=16).hash.ravel())
    return ids, {name: np.array(rows) for name, rows in bits.items()}


def match_hashes(query, reference, k=10):
    """(query row, reference row, score) of each query's k nearest references; score is minus the
    bits that differ.
    """
    query, reference = (2 * bits.astype(np.float32) - 1 for bits in (query, reference))
    matches = []
    for q, row in enumerate(
        query
    ):  # one by one: all distances at once would take 200 GB for DISC21
        distances = (len(row) - reference @ row) / 2
        matches += [
            (q, r, -int(distances[r])) for r in distances.argsort(kind="stable")[:k].tolist()
        ]
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
        raise v98.InputError(f"{args.output}: is no folder; choose another --output")
    query_ids, queries = hash_folder(
        args.data / ("query_images" if args.phase == 1 else "query_images_phase2")
    )
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
