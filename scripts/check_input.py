"""Is the data complete and consistent? A line for each thing that is not, then a summary.

    python scripts/check_input.py  # input/, as DISC21 has it
    python scripts/check_input.py --decode  # and decode every image, in parallel
    python scripts/check_input.py my_input --partial  # a data set of one's own, or a part of DISC21
    python scripts/check_input.py --make-subset 50000  # write rids_subset.txt for --eval-subset

Needs   INPUT with the folders and ground truths of input/README.md, `train_images` or
        `training_images`.
Finds   missing folders and images (Q00000 to Q99999, R000000 to R999999, T000000 to T999999, gaps
        named), other names, names that differ in their suffix alone, files that are no images,
        ground truth that cannot be read, names images that do not exist, repeats or contradicts
        itself, and with --decode each unreadable image, and why. --partial leaves out what is about
        DISC21's numbers and names.
Writes  nothing, but with --make-subset INPUT/rids_subset.txt: every reference of the ground truths
        and random others.

Exit codes: 0 without findings, 1 with some, 2 where nothing could be checked, 130 after Ctrl-C.
"""

import argparse
import functools
import os
import re
import sys
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import at_least, usable_cores
from common.errors import InputError, one_line_errors
from common.files import atomic
from common.images import STAGE_SUFFIXES
from common.parallel import parallel
from common.submissions import read_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exp"))

INPUT = Path(__file__).resolve().parents[1] / "input"
DISC21 = {  # folder: letter, digits, numbers
    "training_images": ("T", 6, range(1_000_000)),
    "reference_images": ("R", 6, range(1_000_000)),
    "query_images": ("Q", 5, range(50_000)),
    "query_images_phase2": ("Q", 5, range(50_000, 100_000)),
}
PUBLIC_ROWS = 25_000
PUBLIC_PAIRS = 4_991  # rows with a reference
TRUTHS = {  # file: folders of its queries
    "public_ground_truth.csv": ["query_images"],
    "private_ground_truth.csv": ["query_images_phase2", "query_images"],
}
SUBSET = "rids_subset.txt"  # the name that exp/ looks for
MAX_NAMES = 10  # in a line


@dataclass(frozen=True)
class Listing:
    """What is in a folder: sorted file names of images, and names of everything else."""

    folder: Path
    images: list
    strays: list

    @property
    def ids(self):
        """Names without suffix, in the order of the images."""
        return [name.rpartition(".")[0] for name in self.images]


def list_folder(root, name):
    """The Listing of a folder of images, or None where there is none.

    DISC21's own name for training_images, train_images, is accepted too.
    """
    folder = root / name
    if name == "training_images" and not folder.exists():
        folder = root / "train_images"
    if not folder.is_dir():
        return None
    images = []
    strays = []
    with os.scandir(folder) as entries:
        for entry in entries:
            has_suffix = entry.name.lower().endswith(STAGE_SUFFIXES)
            hidden = entry.name.startswith(".")  # such as macOS's ._Q00000.jpg
            if has_suffix and not hidden and not entry.is_dir():
                images.append(entry.name)
            else:
                strays.append(entry.name)
    return Listing(folder, sorted(images), sorted(strays))


def first_names(names):
    """The first of some names, and how many more there are."""
    text = ", ".join(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        text += f" and {len(names) - MAX_NAMES:,} more"
    return text


# ---- findings, each a line ----


def check_names(listing, letter, digits, numbers):
    """Whether the ids are exactly DISC21's: a letter and so many digits, of a range of numbers."""
    pattern = re.compile(f"{letter}([0-9]{{{digits}}})")
    present = np.zeros(numbers.stop, bool)
    others = []
    for name in listing.ids:
        match = pattern.fullmatch(name)
        if match and int(match[1]) in numbers:
            present[int(match[1])] = True
        else:
            others.append(name)

    def image_id(number):
        return f"{letter}{number:0{digits}}"

    if others:
        yield (
            f"{listing.folder}: {len(others):,} names are none of {image_id(numbers[0])} to "
            f"{image_id(numbers[-1])}: {first_names(others)}"
        )
    missing = np.flatnonzero(~present[numbers.start :]) + numbers.start
    if len(missing):
        gaps = []
        for run in np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1):
            first, last = image_id(run[0]), image_id(run[-1])
            gaps.append(first if first == last else f"{first} to {last}")
        yield (
            f"{listing.folder}: {len(missing):,} of DISC21's {len(numbers):,} images are missing: "
            f"{first_names(gaps)}; download them, or give --partial"
        )


def check_folder(root, name, listing, partial):
    """What is wrong with a folder of images."""
    if listing is None:
        if not partial:
            yield (
                f"{root / name}: no such folder; see input/README.md for what belongs where, or "
                f"give --partial"
            )
        return
    if listing.folder.name == "training_images" and (root / "train_images").is_dir():
        yield (
            f"{root / 'train_images'}: is not looked at, since training_images is there too; "
            f"keep one of them"
        )
    if not listing.images:
        yield f"{listing.folder}: holds no image that could be read"
    elif not partial:
        yield from check_names(listing, *DISC21[name])
    repeated = [name for name, count in Counter(listing.ids).items() if count > 1]
    if repeated:
        yield (
            f"{listing.folder}: {len(repeated):,} images differ in their suffix alone: "
            f"{first_names(repeated)}; rename them"
        )
    if listing.strays:
        yield (
            f"{listing.folder}: {len(listing.strays):,} entries are no images: "
            f"{first_names(listing.strays)}"
        )


def check_truth(path, listings, partial):
    """What is wrong with a ground truth."""
    is_disc21 = path.name == "public_ground_truth.csv" and not partial
    if not path.exists():
        if is_disc21:
            yield f"{path}: no such file; see input/README.md for where it is"
        return
    try:
        truth = read_csv(path, ("query_id", "reference_id"))
    except InputError as error:
        yield str(error)
        return
    has_reference = truth["reference_id"] != ""
    pairs = truth[has_reference]
    if not len(pairs):
        yield (
            f"{path}: no query has a reference, so there is nothing to train on and nothing to find"
        )
    if is_disc21 and (len(truth), len(pairs)) != (PUBLIC_ROWS, PUBLIC_PAIRS):
        yield (
            f"{path}: {len(truth):,} rows, {len(pairs):,} with a reference; DISC21 has "
            f"{PUBLIC_ROWS:,} and {PUBLIC_PAIRS:,}; fetch it again, or give --partial"
        )
    yield from check_ids(path, truth, "query_id", TRUTHS[path.name], listings)
    yield from check_ids(path, truth, "reference_id", ["reference_images"], listings)
    repeated = truth[truth.duplicated()]["query_id"].unique()
    if len(repeated):
        yield f"{path}: {len(repeated):,} queries have a row twice: {first_names(repeated)}"
    both = sorted(set(pairs["query_id"]) & set(truth[~has_reference]["query_id"]))
    if both:
        yield (
            f"{path}: {len(both):,} queries have a reference in one row and none in another: "
            f"{first_names(both)}"
        )


def check_ids(path, truth, column, folders, listings):
    """Whether each id in a column of the ground truth has an image in one of the folders."""
    present = {""}
    for folder in folders:
        if listings[folder]:
            present.update(listings[folder].ids)
    absent = sorted(set(truth[column]) - present)
    if absent:
        yield (
            f"{path}: {len(absent):,} of column {column} have no image in "
            f"{' or '.join(folders)}: {first_names(absent)}"
        )


def why_unreadable(path, open_image, error):
    """Why extraction could not read the image, or None."""
    try:
        open_image(path)
    except error as reason:
        return str(reason).replace("\n", " ")
    return None


def check_images(listing, workers):
    """The unreadable images, judged by the reader of extraction itself.

    Raises InputError where a worker process died.
    """
    import v107  # here, since torch takes seconds to import

    task = functools.partial(why_unreadable, open_image=v107.open_image, error=v107.InputError)
    paths = [str(listing.folder / name) for name in listing.images]
    try:
        for reason in parallel(task, paths, workers, f"decoding {listing.folder.name}"):
            if reason is not None:
                yield reason
    except BrokenProcessPool as error:  # exit code 2: what was not decoded is no finding
        raise InputError(
            f"{listing.folder}: a worker process died; give fewer --workers if memory ran out"
        ) from error


def findings(args, listings):
    """All findings, in the order in which they are found."""
    for name, listing in listings.items():
        yield from check_folder(args.input, name, listing, args.partial)
    for name in TRUTHS:
        yield from check_truth(args.input / name, listings, args.partial)
    if args.decode:
        for listing in listings.values():
            if listing:
                yield from check_images(listing, args.workers)


# ---- subset ----


def make_subset(root, number, seed):
    """Write the ids of `number` references to rids_subset.txt: all of the ground truths, and random
    others.

    Returns its path and how many ids are the ground truths'. Raises InputError; then the old file
    is as it was.
    """
    listing = list_folder(root, "reference_images")
    ids = list(dict.fromkeys(listing.ids)) if listing else []
    wanted = references_of_truths(root, set(ids))
    if not len(wanted) <= number <= len(ids):
        raise InputError(
            f"--make-subset {number}: must lie between {len(wanted)}, the references of the "
            f"ground truth, and {len(ids)}, all in {root / 'reference_images'}"
        )
    others = [name for name in ids if name not in wanted]
    drawn = np.random.default_rng(seed).choice(len(others), number - len(wanted), replace=False)
    subset = sorted([*wanted, *(others[i] for i in drawn)])
    for name in subset:
        if len(name.split()) != 1 or not name.isprintable():
            raise InputError(
                f"{root / 'reference_images'}: {name!r} cannot stand in a list of ids; rename it"
            )
    with atomic(root / SUBSET) as file:
        file.write_text("".join(f"{name}\n" for name in subset))
    return root / SUBSET, len(wanted)


def references_of_truths(root, ids):
    """The references that the ground truths name, a set.

    Raises InputError where there is no ground truth, or one names a reference that is not in `ids`.
    """
    paths = [root / name for name in TRUTHS if (root / name).exists()]
    if not paths:
        raise InputError(
            f"{root}: has no {' nor '.join(TRUTHS)}, whose references a subset must hold"
        )
    wanted = set()
    for path in paths:
        references = set(read_csv(path, ("query_id", "reference_id"))["reference_id"]) - {""}
        missing = sorted(references - ids)
        if missing:
            raise InputError(
                f"{path}: {missing[0]} has no image in {root / 'reference_images'}; complete it "
                f"first"
            )
        wanted |= references
    return wanted


# ---- main ----


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "input",
        type=Path,
        nargs="?",
        default=INPUT,
        metavar="INPUT",
        help="default: %(default)s",
    )
    add(
        "--partial",
        action="store_true",
        help="do not ask for DISC21's numbers and names: consistency only",
    )
    add("--decode", action="store_true", help="decode every image")
    add(
        "--workers",
        type=at_least(int, 1),
        default=usable_cores(),
        help="processes of --decode (default: all cores)",
    )
    add(
        "--make-subset",
        type=at_least(int, 1),
        metavar="N",
        help=f"check nothing, write N reference ids to INPUT/{SUBSET}",
    )
    add(
        "--seed",
        type=at_least(int, 0),
        default=0,
        help="seed of the random references of --make-subset (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.make_subset and (args.decode or args.partial):
        parser.error("--make-subset: checks nothing, so it does not go with --decode and --partial")
    return args


def check(args):
    """Print all findings and the summary; returns the exit code."""
    listings = {name: list_folder(args.input, name) for name in DISC21}
    if not any(listings.values()):
        raise InputError(f"{args.input}: has none of {', '.join(DISC21)}; see input/README.md")
    count = 0
    for line in findings(args, listings):
        count += 1
        tqdm.write(line)
        sys.stdout.flush()
    found = f"{count or 'no'} finding{'' if count == 1 else 's'}"
    numbers = [f"{len(listing.images):,} {name}" for name, listing in listings.items() if listing]
    decoded = ", all decoded" if args.decode else ""
    print(f"{args.input}: {found}; {', '.join(numbers)}{decoded}")
    return 1 if count else 0


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code."""
    args = parse_args(argv)
    if not args.make_subset:
        return check(args)
    path, wanted = make_subset(args.input, args.make_subset, args.seed)
    print(
        f"{path}: {args.make_subset:,} references, {wanted:,} of them the ground truth's; for "
        f"--eval-subset"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
