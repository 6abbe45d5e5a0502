# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "faiss-cpu==1.15.1",
#     "h5py==3.16.0",
#     "jinja2==3.1.6",
#     "numpy==2.4.6",
#     "onnxruntime==1.32.0",
#     "pandas==3.1.1",
#     "pillow==13.0.0",
#     "tqdm==4.70.1",
# ]
# ///
r"""Find copies among your images: cropped, recompressed, renamed, edited.

    python scripts/match.py FOLDER  # copies inside one folder
    # which of these are copies of those?
    python scripts/match.py uploads/ archive/ --output matches.csv
    python scripts/match.py photo.jpg archive/ --weight checkpoint_0009.pth.tar
    python scripts/match.py uploads.txt archive/ --onnx isc.onnx --device cpu
    python scripts/match.py FOLDER --groups groups.jsonl --report page.html
    python scripts/match.py FOLDER --views all  # mirrored, turned, a part of another image, too
    uv run scripts/match.py FOLDER  # also installs what it needs, as in requirements-match.txt

QUERIES, REFERENCES and FOLDER are each a folder, with all folders below it; or one image; or a text
file of paths, one a line (or each ended by a NUL byte, as by `find -print0`), relative to where the
command runs. In folders, hidden files are skipped, symbolic links are followed, and each folder is
read once. A file that two paths lead to is one file, and no copy of itself.

Reads   JPEG, JPEG 2000, PNG, WEBP, BMP, GIF, TIFF, PPM, AVIF, and HEIC where pillow-heif is
        installed; the first frame of an animation; as viewers show it: upright as EXIF says,
        transparent pixels on white; at most 100 million pixels. In a folder, files are chosen by
        suffix, then read by content. Unreadable files are named at the end, on stderr, and so are
        images without content (one color, but for slight noise or a slight gradient), which are
        left out of the comparison.
Needs   requirements-match.txt only, not torch: descriptors are those of the small network
        weights/v98.onnx, by ONNX Runtime. --onnx takes another file of export.py. --weight takes
        the published network, which is fetched once, or a checkpoint; it needs requirements.txt.
Writes  query,reference,score,group,view,cosine,normalized,query_sha256,reference_sha256. The cosine
        is that of two descriptors, 1 for the same image. The normalized score is the cosine less
        the query's background, the mean of its next best cosines with the collection; `score` is
        this where it decides, else the cosine. By default either may suffice; the last line on
        stderr says what decided. `view` is the view of the query that matched. A group is all
        images that copies, and copies of copies, connect: over every match, reported or not. Paths
        keep their bytes: csv has them as they are, in quotes where they hold commas, quotes or line
        ends; JSON has \udc80 to \udcff for bytes that are not UTF-8, and Python's os.fsencode()
        turns these back.
Keeps   finished descriptors in --cache, by content, view and network. After an interruption of any
        kind the same command does only the rest, and several commands may run at once. To clear the
        cache, delete the file.

Exit code: 0 with matches, 1 without, 2 after an error, 130 after Ctrl-C. Unreadable files change it
only where they are all of QUERIES or of REFERENCES, or with --bad-images error: then it is 2.
"""

import argparse
import csv
import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.background import (
    LEAST_COLLECTION,
    collection_background,
    given_background,
    sure_cosine,
    threshold_for,
)
from common.cli import at_least, hidden_stderr, usable_cores
from common.descriptor_cache import DescriptorCache
from common.descriptors import database_augmentation, negative_embedding_subtraction
from common.errors import InputError, one_line_errors
from common.exclusions import excluded_files, read_pairs
from common.extraction import extract_descriptors, read_background
from common.files import atomic, names_as_utf8, shown
from common.keeping import group_record
from common.listing import describe_left_out, list_files
from common.networks import (
    DEFAULT_ONNX,
    PUBLISHED,
    PUBLISHED_INPUT_SIZE,
    PUBLISHED_THRESHOLD,
    ROOT,
    onnx_network,
    torch_network,
)
from common.pairs import (
    SCORE_DECIMALS,
    distinct_rows,
    find_pairs,
    group_by_label,
    label_distinct,
)
from common.search import nonzero_rows
from common.views import KINDS, WHOLE, choose_views

INTERRUPTED = 130  # exit code after Ctrl-C


@dataclass
class Problems:
    """What is wrong with files: {path: why it is unreadable}, {path: what a readable one lacks},
    {path: what is said of an image that has nothing to compare}.
    """

    unreadable: dict = field(default_factory=dict)
    warnings: dict = field(default_factory=dict)
    without_content: dict = field(default_factory=dict)


# ---- network and descriptors ----


def load_network(args):
    """The Network that the command line asks for; says in a line where it is the default."""
    if args.weight:
        return torch_network(
            args.weight, args.arch, args.input_size, args.device, args.amp, args.quiet
        )
    if not args.onnx:
        say(
            args,
            f"using the small network {DEFAULT_ONNX.relative_to(ROOT)}; --weight {PUBLISHED[0]} "
            f"takes the author's, 200 times larger, which needs PyTorch",
        )
    return onnx_network(args.onnx or str(DEFAULT_ONNX), args.input_size, args.device)


@dataclass(frozen=True)
class Scoring:
    """What decides whether a pair is a match: its cosine, or its normalized score.

    threshold: the least score of a match; normalized: whether the query's background is subtracted
    from the cosine; cosine_threshold: what decides where there is too little background;
    sure_cosine: what is a match whatever the background, or None.
    """

    threshold: float
    normalized: bool
    cosine_threshold: float
    sure_cosine: float | None = None

    @property
    def name(self):
        """What a score is, in words."""
        return "normalized score" if self.normalized else "cosine"

    @property
    def rule(self):
        """What decides, in words."""
        rule = f"by {self.name} of at least {self.threshold:g}"
        if self.sure_cosine is not None:
            rule += f" or cosine of at least {self.sure_cosine:g}"
        return rule


def choose_scoring(args, network, reference_count):
    """The Scoring that the command line, the network and the size of the collection ask for.

    Raises InputError where no threshold is known.
    """
    with_views = len(args.views) > 1
    enough_background = reference_count >= LEAST_COLLECTION or bool(args.negatives)
    cosine_threshold = args.threshold
    if cosine_threshold is None:
        cosine_threshold = network.thresholds.for_cosine(with_views)
    if cosine_threshold is None and args.normalized_threshold is not None and enough_background:
        cosine_threshold = 1.0
    if cosine_threshold is None:
        raise no_threshold(args)
    if args.threshold is None and args.weight not in (None, PUBLISHED[0]):
        say(args, f"the threshold {cosine_threshold} is {PUBLISHED[0]}'s; choose your own")
    by_cosine = Scoring(cosine_threshold, False, cosine_threshold)
    if args.threshold is not None or args.no_normalization:
        return by_cosine
    threshold = args.normalized_threshold
    if threshold is None and not args.negatives:  # NES needs a threshold of its own
        threshold = network.thresholds.for_normalized(with_views)
    if threshold is None:
        return by_cosine
    if not enough_background:
        say(
            args,
            f"scores are cosines: background normalization needs a collection of "
            f"{LEAST_COLLECTION} images, and here are {reference_count}",
        )
        return by_cosine
    if args.normalized_threshold is not None:
        return Scoring(threshold, True, cosine_threshold)
    threshold = threshold_for(threshold, reference_count)
    sure = sure_cosine(cosine_threshold, reference_count)
    return Scoring(threshold, True, cosine_threshold, sure)


def no_threshold(args):
    """The InputError of a network whose file carries no threshold."""
    return InputError(
        f"{args.onnx}: has no threshold in its metadata; give --threshold "
        f"({PUBLISHED_THRESHOLD} for {PUBLISHED[0]})"
    )


def say(args, message):
    """Print a line on stderr, unless --quiet."""
    if not args.quiet:
        print(f"match.py: {message}", file=sys.stderr)


def default_batch_size(network):
    """Images a batch where --batch-size does not say."""
    return 32 if network.on_gpu else 8


def background_descriptors(place, network, extract):
    """The background descriptors that --negatives names: (n, dimensions) float32, none of them
    zero, and {path: problem} of unreadable files.

    extract(paths, title=...) is extract_descriptors for this network. Raises InputError where there
    is no descriptor.
    """
    if place.endswith(".npy"):
        rows = read_background(place, network)
        unreadable = {}
    else:
        paths, _, unreadable = list_files([place])[:3]
        extracted = extract(paths, title="background")
        rows = extracted.rows[:, 0]
        unreadable |= extracted.unreadable
    rows = rows[nonzero_rows(rows)]
    if len(rows) == 0:
        raise InputError(f"{shown(place)}: has no descriptor; give images that can be read")
    return rows, unreadable


def extract_collection(paths, members, views, extract):
    """The descriptors of all files: queries in all views, the other files whole.

    members: the numbers of the files of each place, queries first. Returns rows (files, dim),
    query_views (queries, views, dim), and an Extracted without rows.
    """
    queries = members[0]
    extracted = extract([paths[file] for file in queries], views=views)
    dimensions = extracted.rows.shape[2]
    rows = np.zeros((len(paths), dimensions), np.float32)
    rows[queries] = extracted.rows[:, 0]
    digests = np.full(len(paths), None)
    digests[queries] = extracted.digests
    others = np.setdiff1d(np.arange(len(paths)), queries)
    if len(others):
        found = extract([paths[file] for file in others], title="references")
        rows[others] = found.rows[:, 0]
        digests[others] = found.digests
        extracted.unreadable |= found.unreadable
        extracted.warnings |= found.warnings
        extracted.without_content |= found.without_content
    query_views = extracted.rows
    extracted.rows = None
    extracted.digests = digests
    return rows, query_views, extracted


def subtract_negatives(rows, query_views, negatives, quiet):
    """Negative embedding subtraction of rows (files, dim) and, in place, of query_views (queries,
    views, dim); returns both.
    """
    with hidden_stderr(quiet):  # both show progress
        negatives = database_augmentation(negatives)
        rows = negative_embedding_subtraction(rows, negatives)
        for view in range(query_views.shape[1]):
            subtracted = negative_embedding_subtraction(query_views[:, view], negatives)
            query_views[:, view] = subtracted
    return rows, query_views


def keep_rows(array, is_kept):
    """The rows of an array whose place in `is_kept` (n,) is true, moved without a copy."""
    kept = np.flatnonzero(is_kept)
    for target, source in enumerate(kept.tolist()):
        if target != source:
            array[target] = array[source]
    return array[: len(kept)]


def check_readable(places, members, rows):
    """Raise InputError where none of a place's files has a descriptor."""
    for place, files in zip(places, members, strict=True):
        if not rows[files].any():
            raise InputError(
                f"{shown(place)}: no image of {len(files)} can be compared; see the list below"
            )


def query_background(views, queries, references, rows, scoring, negatives, quiet):
    """What is subtracted from the cosines of each query, (queries,) float64; 0 for cosines.

    views (queries, views, dim); queries, references: numbers of files; rows (files, dim).
    """
    if not scoring.normalized:
        return np.zeros(len(queries))
    if negatives is not None:
        return given_background(views, negatives, quiet)
    distinct = distinct_rows(label_distinct(rows, [b""] * len(rows)), references)
    own_row = distinct.row_of_single_file(len(rows))  # of several, one is a copy of the other
    # Where nothing is left to compare with, the score is as far from its threshold as the cosine.
    neutral = scoring.cosine_threshold - scoring.threshold
    return collection_background(
        views,
        own_row[queries],
        rows[distinct.first],
        scoring.cosine_threshold,
        neutral,
        quiet,
    )


def as_table(pairs, paths, digests, views, normalized):
    """The table of matches that Pairs are, and the list of paths of each group.

    digests (files,): SHA-256 of each file, bytes; views: the View of each number in `pairs.view`;
    normalized: whether the scores are.
    """
    files = np.array(paths, object)
    sha256 = np.array([digest.hex() if digest else "" for digest in digests], object)
    view_names = np.array([view.name for view in views], object)
    table = pd.DataFrame(
        {
            "query": files[pairs.query],
            "reference": files[pairs.reference],
            "score": pairs.score,
            "group": pairs.groups[pairs.query] + 1,
            "view": view_names[pairs.view],
            "cosine": pairs.cosine,
            "normalized": pairs.score if normalized else np.nan,
            "query_sha256": sha256[pairs.query],
            "reference_sha256": sha256[pairs.reference],
        }
    )
    numbers, members_by_number = group_by_label(pairs.groups, np.arange(len(files)))
    groups = []
    for number, group_members in zip(numbers, members_by_number, strict=True):
        if number >= 0:  # -1 is of files in no group
            groups.append(files[group_members].tolist())
    return table, groups


# ---- output ----


def write_outputs(args, table, groups, unreadable, scoring, compared):
    """Write the table and the groups to all files that the command line names.

    compared: the number of images that were.
    """
    for path in args.output:
        if path.endswith(".jsonl"):
            records = table.astype(object).where(table.notna(), None).to_dict("records")
            write(path, as_jsonl(records))
        else:
            write(path, as_csv(table))
    if args.groups:
        records = [group_record(number, files) for number, files in enumerate(groups, start=1)]
        write(args.groups, as_jsonl(records))
    if args.report:
        page = import_page()
        line = page.write_match_page(
            Path(args.report),
            table,
            list(unreadable.items()),
            scoring.threshold,
            scored_by=scoring.name,
            compared=compared,
        )
        say(args, line)


def import_page():
    """The module that writes --report. Raises InputError where a library is missing."""
    try:
        from common import page
    except ImportError as error:
        raise InputError(f"--report: {error}; pip install -r requirements-match.txt") from None
    return page


def as_csv(table):
    """A table of matches as the bytes of a csv."""
    quoting = csv.QUOTE_MINIMAL
    if (table["query"] + table["reference"]).str.contains("\r").any():
        quoting = csv.QUOTE_ALL  # Python up to 3.12 does not quote a carriage return alone
    text = table.to_csv(
        index=False,
        float_format=f"%.{SCORE_DECIMALS}f",
        lineterminator="\n",
        quoting=quoting,
    )
    return os.fsencode(text)  # whatever the locale, file names keep their bytes


def as_jsonl(records):
    """Dicts as bytes, JSON one a line."""
    lines = [json.dumps(names_as_utf8(record)) + "\n" for record in records]
    return "".join(lines).encode()


def write(path, content):
    """Write bytes to a file, which appears whole or not at all, or to stdout, where `path` is "-".

    Raises InputError where the file cannot be written.
    """
    if path == "-":
        write_stdout(content)
        return
    try:
        with atomic(Path(path)) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); make room, and run again"
        ) from None


def write_stdout(content):
    """Write bytes to stdout. It is no error where its reader stops early, such as `head`."""
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
    except BrokenPipeError:  # Python would write again at its end, and report an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_problems(title, problems):
    """Print {path: problem} on stderr, one a line below a title."""
    if problems:
        print(f"match.py: {title} ({len(problems)}):", file=sys.stderr)
    for path, problem in problems.items():
        print(f"{shown(path)}: {problem}", file=sys.stderr)


# ---- main ----


def parse_args(argv=None):
    """The command line. Exits with one line and code 2 where options do not fit together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    count = at_least(int, 1)
    add(
        "queries",
        metavar="QUERIES",
        help="folder, image, or text file of paths; alone: FOLDER, matched with itself",
    )
    add("references", metavar="REFERENCES", nargs="?", help="folder, image, or text file of paths")
    add(
        "--weight",
        metavar="FILE",
        help=f"{' or '.join(PUBLISHED)}, or a checkpoint; by torch, which requirements.txt "
        f"installs",
    )
    add(
        "-a",
        "--arch",
        help=f"backbone of --weight, any name timm knows (default: {PUBLISHED[0]}'s)",
    )
    add(
        "--input-size",
        type=count,
        metavar="PIXELS",
        help=f"side of the input (default: the ONNX file's own; with --weight "
        f"{PUBLISHED_INPUT_SIZE})",
    )
    add(
        "--onnx",
        metavar="FILE",
        help=f"network that export.py has written (default: {DEFAULT_ONNX.relative_to(ROOT)})",
    )
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add(
        "--amp",
        choices=("off", "fp16"),
        default="off",
        help="precision of the network; fp16 on CUDA only, its error is not measured yet "
        "(default: %(default)s)",
    )
    add("--batch-size", type=count, help="images in a batch (default: 8, on CUDA 32)")
    add(
        "--workers",
        type=count,
        default=usable_cores(),
        help="threads that read files (default: one a core)",
    )
    add(
        "--views",
        type=view_kinds,
        default=(WHOLE,),
        metavar="KIND,...",
        help=f"compare queries in more views than the whole image: {', '.join(KINDS)}, or all. "
        f"Descriptors of a query: parts 5 (the whole, and four overlapping parts of 2/3 of a "
        f"side), mirrored 2, turned 4 (by 90, 180, 270 degrees), all 13 (parts mirrored as well). "
        f"To find what was cut out of references, give these as QUERIES, or all in one FOLDER",
    )
    add(
        "--threshold",
        type=at_least(float, -1),
        help=f"least cosine of a match, without background normalization (default: the one in "
        f"the ONNX file's metadata; with --weight {PUBLISHED_THRESHOLD}, DataComp's for "
        f"{PUBLISHED[0]}: other networks have others)",
    )
    add(
        "--normalized-threshold",
        type=at_least(float, -2),
        help="least normalized score of a match: the cosine less the query's background, the mean "
        "of its next best cosines with the collection (default: the one in the ONNX file's "
        "metadata, higher for small collections, or a high cosine; networks without one, and "
        f"collections of fewer than {LEAST_COLLECTION} images, take --threshold)",
    )
    add("--no-normalization", action="store_true", help="cosines decide, whatever the network")
    add(
        "--top-k",
        type=count,
        default=10,
        help="most matches of a query, the best ones (default: %(default)s)",
    )
    add(
        "--negatives",
        metavar="FILE.npy|FOLDER",
        help="background images, of which nothing is a copy, for negative embedding subtraction: "
        "a folder, or a file of descriptors such as extraction's train_feats.npy; it lowers "
        "scores, so choose another threshold. With --normalized-threshold they are the "
        "background, too",
    )
    add(
        "--ignore",
        action="append",
        metavar="FILE.csv",
        help="pairs judged not to be copies, as the page of --report saves them: csv with "
        "query_sha256,reference_sha256 or query,reference; may be given several times",
    )
    add(
        "--not-within",
        type=count,
        metavar="N",
        help="do not pair files of the same folder at depth N below the argument",
    )
    add(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="FILE",
        help="finished descriptors (default: %(default)s; without a home folder none are kept)",
    )
    add(
        "--no-cache",
        dest="cache",
        action="store_const",
        const=None,
        help="neither use nor keep descriptors",
    )
    add(
        "--output",
        action="append",
        metavar="FILE",
        help="matches: .csv, .jsonl, or - for csv on stdout, the default; may be given several "
        "times",
    )
    add(
        "--groups",
        metavar="FILE.jsonl",
        help="groups of copies, JSON one a line: files, which one to keep, pixels, bytes, dates",
    )
    add("--report", metavar="FILE.html", help="page that shows the matches as images")
    add(
        "--bad-images",
        choices=("skip", "error"),
        default="skip",
        help="error: end with code 2 if a file is unreadable, after all the rest is done",
    )
    add(
        "-q",
        "--quiet",
        action="store_true",
        help="no progress or summary; unreadable files and errors are still named",
    )
    args = parser.parse_args(argv)
    args.output = args.output or ["-"]
    args.ignore = args.ignore or []
    check_options(args, parser.error)
    return args


def view_kinds(text):
    """An argparse type: kinds of views, as "parts,mirrored" or "all"; a tuple of Views."""
    kinds = text.split(",")
    for kind in kinds:
        if kind not in (*KINDS, "all"):
            known = ", ".join((*KINDS, "all"))
            raise argparse.ArgumentTypeError(f"{kind}: no such view; take some of {known}")
    return choose_views(kinds)


def default_cache():
    """The file of --cache: in the user's cache folder; None where the user has no home."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return None
    return folder / "isc21" / "descriptors.sqlite"


def check_options(args, refuse):
    """Call refuse(message) where options do not fit together."""
    if args.onnx and args.weight:
        refuse("--onnx: not with --weight; give one of them")
    if args.arch and not args.weight:
        refuse("--arch: goes with --weight only; an ONNX file has its own")
    if args.amp != "off" and not args.weight:
        remedy = "for --onnx, use export.py --precision fp16"
        refuse(f"--amp {args.amp}: goes with --weight only; {remedy}")
    if args.threshold is not None and args.threshold > 1:
        refuse(f"--threshold {args.threshold}: no cosine is above 1")
    if args.normalized_threshold is not None:
        if args.normalized_threshold > 1:
            refuse(f"--normalized-threshold {args.normalized_threshold}: no score is above 1")
        if args.threshold is not None or args.no_normalization:
            refuse("--normalized-threshold: not with --threshold or --no-normalization")
    for path in args.output:
        if path != "-" and not path.endswith((".csv", ".jsonl")):
            refuse(f"--output {path}: must end in .csv or .jsonl, or be -")
    for path in (*args.output, args.groups, args.report):
        if path and not Path(path).absolute().parent.is_dir():
            refuse(f"{path}: there is no such folder; make it first")


def main(argv=None):
    """Run the command; returns the exit code: 0 with matches, 1 without, 2 after an error, 130
    after Ctrl-C.
    """
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # libraries' warnings; users are told what they should know
    problems = Problems()
    exit_code = run(args, problems)
    if exit_code != INTERRUPTED:
        print_problems("damaged files, read all the same", problems.warnings)
        print_problems("images without content, left out", problems.without_content)
        print_problems("unreadable files", problems.unreadable)
    return exit_code


def check_early(args, network):
    """Raise InputError, before hours of work, where a file or a threshold is missing."""
    given = args.threshold is not None or args.normalized_threshold is not None
    if not given and network.thresholds.cosine is None:
        raise no_threshold(args)
    for file in args.ignore:
        read_pairs(file)
    if args.negatives and not Path(args.negatives).exists():
        raise InputError(f"{args.negatives}: no such file or folder; check --negatives")
    for place in (args.queries, args.references):
        if args.not_within and place and not Path(place).is_dir():
            raise InputError(f"{shown(place)}: is no folder; --not-within goes with folders")


def open_cache(args, network):
    """The DescriptorCache of --cache; none is kept where the default one cannot be written.

    Raises InputError where the user named one that cannot be used.
    """
    try:
        return DescriptorCache(args.cache, network)
    except InputError as error:
        if args.cache != default_cache() or args.cache.exists():
            raise
        say(args, f"{error}; nothing is kept")
        return DescriptorCache(None, network)


@one_line_errors
def run(args, problems):
    """Find and write copies as the command line asks; returns the exit code.

    Adds what is wrong with files to `problems`, also where it raises.
    """
    if args.report:
        import_page()  # now, so that a missing library shows before hours of work
    places = [args.queries]
    if args.references:
        places.append(args.references)
    paths, members, unreadable_folders, left_out = list_files(places)
    problems.unreadable.update(unreadable_folders)
    if left_out:
        say(args, describe_left_out(left_out))
    if args.references and any(view.size < 1 for view in args.views):
        say(args, "the parts are of QUERIES; to find what was cut out of REFERENCES, swap the two")
    network = load_network(args)
    check_early(args, network)
    cache = open_cache(args, network)
    extract = partial(
        extract_descriptors,
        network=network,
        cache=cache,
        batch_size=args.batch_size or default_batch_size(network),
        workers=args.workers,
        quiet=args.quiet,
    )
    try:
        table, groups, scoring = compare(args, network, extract, places, paths, members, problems)
    except KeyboardInterrupt:
        kept = "nothing is kept"
        if args.cache:
            kept = f"descriptors of {len(cache.new_images)} new images are in {args.cache}"
        raise KeyboardInterrupt(kept) from None
    counts = f"{len(paths)} images, {len(cache.new_images)} of them new"
    matches = f"{len(table)} matches in {len(groups)} groups"
    say(args, f"{counts}; {matches}, {scoring.rule}")
    if problems.unreadable and args.bad_images == "error":
        count = len(problems.unreadable)
        raise InputError(
            f"--bad-images error: {count} unreadable files; what the others match is written"
        )
    return 0 if len(table) else 1


def compare(args, network, extract, places, paths, members, problems):
    """Extract descriptors, find copies, write them; returns the table of matches, the groups, and
    the Scoring that decided.

    extract(paths, views=...) is extract_descriptors for the network; places, paths, members: the
    arguments and their files, as list_files gives them. Adds to `problems`.
    """
    rows, query_views, extracted = extract_collection(paths, members, args.views, extract)
    problems.unreadable.update(extracted.unreadable)
    problems.warnings.update(extracted.warnings)
    problems.without_content.update(extracted.without_content)
    check_readable(places, members, rows)
    is_readable = rows.any(axis=1)
    query_views = keep_rows(query_views, is_readable[members[0]])
    readable = [files[is_readable[files]] for files in members]
    queries = readable[0]
    references = readable[-1]  # the same array where there is one place

    negatives = None
    if args.negatives:
        negatives, unreadable_images = background_descriptors(args.negatives, network, extract)
        problems.unreadable.update(unreadable_images)
        rows, query_views = subtract_negatives(rows, query_views, negatives, args.quiet)
    scoring = choose_scoring(args, network, len(references))
    background = query_background(
        query_views, queries, references, rows, scoring, negatives, args.quiet
    )
    pairs = find_pairs(
        rows,
        queries,
        references,
        scoring.threshold,
        args.top_k,
        views=query_views,
        background=background,
        sure_cosine=scoring.sure_cosine,
        excluded=excluded_files(paths, extracted.digests, args.ignore, args.not_within, places),
        quiet=args.quiet,
    )
    table, groups = as_table(pairs, paths, extracted.digests, args.views, scoring.normalized)
    write_outputs(args, table, groups, problems.unreadable, scoring, int(is_readable.sum()))
    return table, groups, scoring


if __name__ == "__main__":
    sys.exit(main())
