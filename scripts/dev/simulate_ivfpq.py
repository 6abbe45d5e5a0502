"""How much of the exact search a compressed index keeps: the recall of faiss's inverted lists on
synthetic descriptors.

    # the table of docs/SCALE.md: minutes, 3 GB of memory
    OMP_NUM_THREADS=1 python scripts/dev/simulate_ivfpq.py

A descriptor is normalize(R D (sqrt(0.3) t + sqrt(0.7) g)): g its own Gaussian vector and t its
topic's, of 256 numbers; D scales axis i = 1, 2, ... by i^(-decay/2); R is one random rotation. Of
size / 50 topics, each takes number floor(topics u^2), u uniform, so that few are large. A query is
a copy of one descriptor x: c x + sqrt(1 - c^2) n, its cosine c uniform in `--cosines`, n a random
direction of the same spectrum orthogonal to x. None of them comes from a network.

Prints a table in Markdown. `recall@10`: the share of the 10 exact nearest among the first 10 found.
`copy@k`: the share of queries whose original is among the first k. `hard@10`: copy@10 of the third
of the queries with the lowest cosines.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

import faiss
import numpy as np

from common.cli import at_least, between
from common.errors import InputError, one_line_errors
from common.search import nearest, normalize

DIMENSIONS = 256
BLOCK = 65536  # descriptors made at once
PER_TOPIC = 50  # descriptors of a topic, on average
TOPIC_SHARE = 0.3  # of a descriptor's variance
SHORTLIST = 100  # neighbors asked for
# "np": no polysemous training, since it is slow.
INDEXES = ("IVF1024,Flat", "IVF1024,PQ16np", "IVF1024,PQ32np", "IVF1024,PQ64np")


class Generator:
    """Draws random vectors (n, 256) float32 with the spectrum of --decay."""

    def __init__(self, seed, decay):
        self.rng = np.random.default_rng(seed)
        rotation = np.linalg.qr(self.rng.standard_normal((DIMENSIONS, DIMENSIONS)))[0]
        scale = np.arange(1, DIMENSIONS + 1)[:, None] ** (-decay / 2)
        self.spectrum = (scale * rotation).astype(np.float32)

    def vectors(self, count):
        return self.rng.standard_normal((count, DIMENSIONS), np.float32) @ self.spectrum


def make_base(generator, size):
    """Descriptors (size, 256) float32 of length 1, in topics of different sizes."""
    topics = generator.vectors(math.ceil(size / PER_TOPIC))
    base = np.empty((size, DIMENSIONS), np.float32)
    for start in range(0, size, BLOCK):
        rows = base[start : start + BLOCK]
        choices = (len(topics) * generator.rng.random(len(rows)) ** 2).astype(int)
        common = np.float32(TOPIC_SHARE**0.5) * topics[choices]
        own = np.float32((1 - TOPIC_SHARE) ** 0.5) * generator.vectors(len(rows))
        rows[:] = normalize(common + own)
    return base


def make_queries(generator, base, number, cosines):
    """Copies of random descriptors: queries (q, 256), positions of their originals in `base` and
    the cosines to them, both (q,).
    """
    original = generator.rng.choice(len(base), number, replace=False)
    cosine = generator.rng.uniform(*cosines, (number, 1)).astype(np.float32)
    x = base[original]
    noise = generator.vectors(number)
    noise = normalize(noise - np.einsum("nd,nd->n", noise, x)[:, None] * x)
    queries = cosine * x + np.sqrt(1 - cosine**2) * noise
    return queries, original, cosine[:, 0]


def build(name, base, train_rows):
    """The faiss index of this factory name, trained on the first rows, with all of them in; and its
    inverted lists.

    Raises InputError where faiss cannot build it.
    """
    try:
        index = faiss.index_factory(DIMENSIONS, name)
        lists = faiss.extract_index_ivf(index)
        index.train(base[:train_rows])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"--index {name}: faiss cannot build it ({reason})") from None
    index.add(base)
    return index, lists


def shares(found, exact, original, cosine):
    """The measured columns of the table: recall@10, copy@1, copy@10, copy@100, hard@10.

    found and exact: positions of the neighbors of each query, (q, SHORTLIST); original and cosine
    as make_queries returns them.
    """
    recalled = (found[:, :10, None] == exact[:, None, :10]).any(axis=1)
    hit = found == original[:, None]
    hard = cosine <= np.quantile(cosine, 1 / 3)
    return [
        recalled.mean(),
        hit[:, :1].any(axis=1).mean(),
        hit[:, :10].any(axis=1).mean(),
        hit[:, :SHORTLIST].any(axis=1).mean(),
        hit[hard, :10].any(axis=1).mean(),
    ]


def table_row(name, size, probes, seconds, values):
    """A line of the table; `seconds` for one query."""
    cells = [name, size, probes, *(f"{value:.3f}" for value in values), f"{1000 * seconds:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def simulate(args):
    """Yields the lines of the table: the exact search, then each index with each number of
    probes.
    """
    generator = Generator(args.seed, args.decay)
    base = make_base(generator, args.size)
    queries, original, cosine = make_queries(generator, base, args.queries, args.cosines)

    start = time.perf_counter()
    distance, exact = nearest(queries, base, SHORTLIST, "l2")
    seconds = (time.perf_counter() - start) / len(queries)
    yield (
        "| index | bytes | nprobe | recall@10 | copy@1 | copy@10 | copy@100 | hard@10 | ms/query |"
    )
    yield "|---" * 9 + "|"
    values = shares(exact, exact, original, cosine)
    yield table_row("exact", 4 * DIMENSIONS, "", seconds, values)

    for name in args.index:
        index, lists = build(name, base, args.train_rows)
        for lists.nprobe in args.probes:
            start = time.perf_counter()
            _, found = index.search(queries, SHORTLIST)
            seconds = (time.perf_counter() - start) / len(queries)
            values = shares(found, exact, original, cosine)
            yield table_row(name, lists.code_size + 8, lists.nprobe, seconds, values)

    others = np.where(exact == original[:, None], 4, distance)  # 4: farther than all
    best_other = 1 - others.min(axis=1) / 2  # the cosine of a squared distance
    yield (
        f"\nCosine of a query to the best but its original: mean {best_other.mean():.2f}, largest "
        f"{best_other.max():.2f}"
    )


def parse_args(argv=None):
    """The command line; the defaults are those of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    count = at_least(int, 1)
    add(
        "--size",
        type=at_least(int, SHORTLIST),
        default=1_000_000,
        help="descriptors (default: %(default)s)",
    )
    add("--queries", type=count, default=1000, help="copies to look for (default: %(default)s)")
    add(
        "--decay",
        type=at_least(float, 0),
        default=0.75,
        help="of the spectrum; 0: none (default: %(default)s)",
    )
    add(
        "--cosines",
        type=between(float, -1, 1),
        nargs=2,
        default=(0.6, 0.95),
        metavar=("LOW", "HIGH"),
        help="(default: 0.6 0.95)",
    )
    add(
        "--index",
        nargs="+",
        default=INDEXES,
        metavar="NAME",
        help=f"faiss's (default: {' '.join(INDEXES)})",
    )
    add(
        "--probes",
        type=count,
        nargs="+",
        default=(1, 8, 32, 128),
        help="lists visited (default: 1 8 32 128)",
    )
    add(
        "--train-rows",
        type=count,
        default=50_000,
        help="descriptors an index learns from (default: %(default)s)",
    )
    add("--seed", type=at_least(int, 0), default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.queries > args.size:
        parser.error(f"--queries {args.queries}: must not be greater than --size {args.size}")
    if args.cosines[0] > args.cosines[1]:
        parser.error("--cosines: LOW must not be greater than HIGH")
    return args


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code: 0, or 2 with one line on stderr."""
    for line in simulate(parse_args(argv)):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
