"""Thresholds of match.py for a network, measured on a data set of make_dataset.py.

    python scripts/make_dataset.py DIR --photos PHOTOS --training 10 --references 600 --queries 450
    python scripts/dev/match_thresholds.py DIR  # the small network
    python scripts/dev/match_thresholds.py DIR --onnx isc.onnx --sizes 100 1000 10000

Prints two tables in Markdown. The first: quality of cosines and of normalized scores, by the
queries' views, and the least scores at a precision of 0.99, 0.95 and 0.9; export.py writes those of
0.99 into an ONNX file. The second: precision and recall at match.py's defaults for the network, by
the size of the collection: a part of the references, or all of them and generated images.

Choose thresholds by a development split: phase 1 here, never by the images that they are tested on.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

from common.background import collection_background, sure_cosine, threshold_for
from common.cli import at_least
from common.descriptor_cache import DescriptorCache
from common.errors import InputError, one_line_errors
from common.evaluation import rank, read_ground_truth
from common.extraction import extract_descriptors
from common.listing import is_image_name
from common.networks import DEFAULT_ONNX, onnx_network
from common.pairs import find_pairs
from common.sample_images import dead_leaves, generator
from common.search import nonzero_rows, normalize
from common.views import ALL_VIEWS, choose_views

PRECISIONS = (0.99, 0.95, 0.9)
KINDS_SHOWN = ([], ["parts"], ["mirrored", "turned"], ["all"])
CANDIDATES = 10  # of a query
NO_THRESHOLD = -2.0
FILLER_SIZE = 128  # pixels of a generated image
FILLER_SEED = 1
DRAWS = 10  # of the references of a collection that is smaller than the data set
BATCH = 64


# ---- descriptors ----


def read_descriptors(folder, extract, views):
    """Ids (n,) and descriptors (n, views, dim) of the images in a folder.

    Images of one color, which have nothing to compare, are left out, as match.py does. Raises
    InputError where an image is unreadable or there is none.
    """
    paths = sorted(path for path in folder.glob("*") if is_image_name(path.name))
    if not paths:
        raise InputError(f"{folder}: no images; give a folder that make_dataset.py has made")
    extracted = extract([str(path) for path in paths], views=views)
    for path, problem in extracted.unreadable.items():
        raise InputError(f"{path}: {problem}; make the data set again")
    ids = np.array([path.stem for path in paths])
    kept = nonzero_rows(extracted.rows[:, 0])
    return ids[kept], extracted.rows[kept]


def generated_descriptors(network, count):
    """Descriptors (count, dim) float32 of generated images."""
    rows = np.empty((count, network.dimensions), np.float32)
    for start in range(0, count, BATCH):
        inputs = []
        for number in range(start, min(start + BATCH, count)):
            image = dead_leaves(generator(FILLER_SEED, "reference", number), FILLER_SIZE)
            inputs.append(network.preprocess(image))
        rows[start : start + len(inputs)] = normalize(network.run(np.stack(inputs)))
    return rows


# ---- scores ----


class Collection:
    """Queries and the references in which their copies are searched.

    query_ids, reference_ids (n,); views (queries, views, dim), references (n, dim) float32.
    """

    def __init__(self, query_ids, views, reference_ids, references):
        self.query_ids = query_ids
        self.views = views
        self.reference_ids = reference_ids
        self.references = references

    def background(self, copy_cosine):
        """What normalization subtracts from each query's cosines, (queries,)."""
        nothing = np.full(len(self.views), -1)  # no query is among the references
        return collection_background(self.views, nothing, self.references, copy_cosine, neutral=0.5)

    def candidates(self, background, threshold=NO_THRESHOLD, sure=None):
        """DataFrame query_id, reference_id, score of the best pairs of each query."""
        query_count = len(self.query_ids)
        rows = np.concatenate([self.views[:, 0], self.references])
        queries = np.arange(query_count)
        references = np.arange(query_count, len(rows))
        pairs = find_pairs(
            rows,
            queries,
            references,
            threshold,
            CANDIDATES,
            views=self.views,
            background=background,
            sure_cosine=sure,
        )
        return pd.DataFrame(
            {
                "query_id": self.query_ids[pairs.query],
                "reference_id": self.reference_ids[pairs.reference - query_count],
                "score": pairs.score,
            }
        )


# ---- tables ----


def quality_row(name, ranking):
    """A row of the first table: name, µAP, and recall and least score at each of PRECISIONS."""
    row = {"scores": name, "µAP": f"{ranking.average_precision():.3f}"}
    scores = ranking.pairs["score"].to_numpy()
    for precision in PRECISIONS:
        depth = ranking.depth(precision)
        row[f"recall at P{100 * precision:.0f}"] = f"{ranking.recall_at(precision):.3f}"
        row[f"score ≥ (P{100 * precision:.0f})"] = f"{scores[depth - 1]:.4f}" if depth else "none"
    return row


def print_quality(collection, truth, network):
    """Print the first table."""
    rows = []
    for kinds in KINDS_SHOWN:
        shown = in_views(collection, kinds)
        name = ", ".join(kinds) or "whole"
        no_background = np.zeros(len(shown.views))
        copy_cosine = network.thresholds.for_cosine(bool(kinds)) or 1.0
        background = shown.background(copy_cosine)
        backgrounds = {"cosine": no_background, "normalized": background}
        for scoring, subtracted in backgrounds.items():
            ranking = rank(shown.candidates(subtracted), truth)
            rows.append(quality_row(f"{name}: {scoring}", ranking))
    print(as_markdown(pd.DataFrame(rows)))


def in_views(collection, kinds):
    """The collection with its queries in some kinds of views."""
    numbers = [ALL_VIEWS.index(view) for view in choose_views(kinds)]
    views = np.ascontiguousarray(collection.views[:, numbers])
    return Collection(collection.query_ids, views, collection.reference_ids, collection.references)


def print_sizes(collection, truth, network, sizes):
    """Print the second table."""
    filler_count = max(0, max(sizes) - len(collection.references))
    filler = generated_descriptors(network, filler_count)
    rows = []
    for kinds in ([], ["all"]):
        with_views = bool(kinds)
        for size in sizes:
            drawn = drawn_collections(in_views(collection, kinds), size, filler)
            thresholds = {
                "cosine": network.thresholds.for_cosine(with_views),
                "normalized": network.thresholds.for_normalized(with_views),
            }
            row = {"views": ", ".join(kinds) or "whole", "references": f"{size:,}"}
            for scoring, threshold in thresholds.items():
                if threshold is None:
                    continue
                sure = None
                if scoring == "normalized":
                    threshold = threshold_for(threshold, size)
                    sure = sure_cosine(thresholds["cosine"], size)
                precision, recall = precision_and_recall(
                    drawn, truth, threshold, thresholds["cosine"], sure
                )
                row[f"{scoring} ≥"] = f"{threshold:g}"
                if sure is not None:
                    row["or cosine ≥"] = f"{sure:g}"
                row[f"precision ({scoring})"] = f"{precision:.3f}"
                row[f"recall ({scoring})"] = f"{recall:.3f}"
            rows.append(row)
    print(as_markdown(pd.DataFrame(rows)))


def drawn_collections(collection, size, filler):
    """Collections of `size` references: several random parts, or one with filler (n, dim)."""
    count = len(collection.references)
    if size < count:
        rng = np.random.default_rng(0)
        draws = [rng.permutation(count)[:size] for _ in range(DRAWS)]
        filler = filler[:0]
    else:
        draws = [np.arange(count)]
        filler = filler[: size - count]
    filler_ids = np.array([f"filler {number}" for number in range(len(filler))], object)
    collections = []
    for numbers in draws:
        ids = np.concatenate([collection.reference_ids[numbers].astype(object), filler_ids])
        rows = np.concatenate([collection.references[numbers], filler])
        collections.append(Collection(collection.query_ids, collection.views, ids, rows))
    return collections


def precision_and_recall(collections, truth, threshold, copy_cosine, sure):
    """Of all collections together, of the pairs at or above the threshold.

    sure: the cosine that always suffices, with normalized scores; None with cosines.
    """
    found = 0
    right = 0
    wanted = 0
    for collection in collections:
        background = np.zeros(len(collection.views))
        if sure is not None:
            background = collection.background(copy_cosine)
        pairs = collection.candidates(background, threshold, sure)
        there = truth[truth["reference_id"].isin(collection.reference_ids)]
        found += len(pairs)
        right += len(pairs.merge(there))
        wanted += len(there)
    return right / max(1, found), right / max(1, wanted)


def as_markdown(table):
    """A DataFrame of text as a table in Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# ---- main ----


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="data set of make_dataset.py")
    add("--phase", type=int, choices=(1, 2), default=1, help="whose queries (default: 1)")
    add(
        "--onnx", default=str(DEFAULT_ONNX), metavar="FILE", help="network (default: the small one)"
    )
    add(
        "--sizes",
        type=at_least(int, 50),
        nargs="*",
        default=[],
        metavar="N",
        help="print the second table, for collections of N references; a hundred thousand "
        "generated images take ten minutes on a core",
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code."""
    args = parse_args(argv)
    suffix, kind = ("", "public") if args.phase == 1 else ("_phase2", "private")
    truth = read_ground_truth(args.folder / f"{kind}_ground_truth.csv")
    network = onnx_network(args.onnx)
    extract = partial(
        extract_descriptors,
        network=network,
        cache=DescriptorCache(None, network),
        batch_size=8,
        workers=2,
    )
    query_ids, views = read_descriptors(args.folder / f"query_images{suffix}", extract, ALL_VIEWS)
    whole = choose_views([])
    reference_ids, references = read_descriptors(args.folder / "reference_images", extract, whole)
    collection = Collection(query_ids, views, reference_ids, references[:, 0])
    copies = int((truth["reference_id"] != "").sum())
    print(f"{len(query_ids)} queries, {copies} copies, {len(reference_ids)} references\n")
    print_quality(collection, truth, network)
    if args.sizes:
        print_sizes(collection, truth, network, args.sizes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
