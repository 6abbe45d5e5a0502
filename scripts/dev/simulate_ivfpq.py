"""What does a compressed index keep of the exact search? Recall of faiss's inverted lists on
synthetic descriptors.

    # the table of docs/SCALE.md: minutes, 3 GB of memory
    OMP_NUM_THREADS=1 python scripts/dev/simulate_ivfpq.py

A descriptor is normalize(R D (sqrt(0.3) t + sqrt(0.7) g)): g its own Gaussian vector and t its
topic's, of 256 numbers; D scales axis i = 1, 2, ... by i^(-decay/2); R is one random rotation. Of
size / 50 topics, each takes number floor(topics u^2), u uniform, so that few are large. A query is
a copy of one descriptor x: c x + sqrt(1 - c^2) n, its cosine c uniform in `--cosines`, n a random
direction of the same spectrum orthogonal to x. No network made any of them.

Prints a table in Markdown. `recall@10`: the share of the 10 exact nearest among the first 10 found.
`copy@k`: the share of queries whose original is among the first k. `hard@10`: copy@10 of the third
of the queries with the lowest cosines.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

import faiss
import numpy as np

from common.cli import at_least
from common.errors import InputError
from common.search import nearest, normalize

DIMENSIONS = 256
BLOCK = 65536  # descriptors made at once
PER_TOPIC, SHARE = (
    50,
    0.3,
)  # descriptors of a topic on average, and how much of their variance is the topic's
SHORTLIST = 100  # neighbors asked for
INDEXES = (
    "IVF1024,Flat",
    "IVF1024,PQ16np",
    "IVF1024,PQ32np",
    "IVF1024,PQ64np",
)  # np: polysemous training is slow


def make_data(args):
    """Descriptors (size, 256), queries (q, 256), the positions of their originals and the cosines
    to them, (q,).
    """
    rng = np.random.default_rng(args.seed)
    rotation = np.linalg.qr(rng.standard_normal((DIMENSIONS, DIMENSIONS)))[0]
    spectrum = (np.arange(1, DIMENSIONS + 1)[:, None] ** (-args.decay / 2) * rotation).astype(
        np.float32
    )

    def gauss(count):
        return rng.standard_normal((count, DIMENSIONS), np.float32) @ spectrum

    topics, base = gauss(-(-args.size // PER_TOPIC)), np.empty((args.size, DIMENSIONS), np.float32)
    for start in range(0, args.size, BLOCK):
        rows = base[start : start + BLOCK]
        topic = topics[(len(topics) * rng.random(len(rows)) ** 2).astype(int)]
        rows[:] = normalize(
            np.float32(SHARE**0.5) * topic + np.float32((1 - SHARE) ** 0.5) * gauss(len(rows))
        )
    original = rng.choice(args.size, args.queries, replace=False)
    cosine = rng.uniform(*args.cosines, (args.queries, 1)).astype(np.float32)
    x, noise = base[original], gauss(args.queries)
    noise = normalize(noise - np.einsum("nd,nd->n", noise, x)[:, None] * x)
    return base, cosine * x + np.sqrt(1 - cosine**2) * noise, original, cosine[:, 0]


def build(name, base, train_rows):
    """The faiss index of this factory name, trained on the first rows, with all of them in; and its
    inverted lists.
    """
    try:
        index = faiss.index_factory(DIMENSIONS, name)
        lists = faiss.extract_index_ivf(index)
        index.train(base[:train_rows])
    except RuntimeError as error:
        raise InputError(
            f"--index {name}: faiss cannot build it ({str(error).splitlines()[-1].strip()})"
        ) from None
    index.add(base)
    return index, lists


def simulate(args):
    """Yields the lines of the table: the exact search, then each index with each number of
    probes.
    """
    base, queries, original, cosine = make_data(args)
    start = time.perf_counter()
    distance, exact = nearest(queries, base, SHORTLIST, "l2")

    def line(name, size, probes, found):
        cost = 1000 * (time.perf_counter() - start) / len(queries)
        hit = found == original[:, None]
        shares = [(found[:, :10, None] == exact[:, None, :10]).any(axis=1).mean()]
        shares += [hit[:, :k].any(axis=1).mean() for k in (1, 10, SHORTLIST)]
        shares += [hit[cosine <= np.quantile(cosine, 1 / 3), :10].any(axis=1).mean()]
        return (
            f"| {name} | {size} | {probes} | {' | '.join(f'{share:.3f}' for share in shares)} "
            f"| {cost:.2f} |"
        )

    yield (
        "| index | bytes | nprobe | recall@10 | copy@1 | copy@10 | copy@100 | hard@10 | ms/query |"
    )
    yield "|---" * 9 + "|"
    yield line("exact", 4 * DIMENSIONS, "", exact)
    for name in args.index:
        index, lists = build(name, base, args.train_rows)
        for lists.nprobe in args.probes:
            start = time.perf_counter()
            yield line(name, lists.code_size + 8, lists.nprobe, index.search(queries, SHORTLIST)[1])
    other = (
        1 - np.where(exact == original[:, None], 4, distance).min(axis=1) / 2
    )  # from squared distances
    yield (
        f"\nCosine of a query to the best but its original: mean {other.mean():.2f}, largest "
        f"{other.max():.2f}"
    )


def parse_args(argv=None):
    """The command line; the defaults are those of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, at_least(int, 1)
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
        type=float,
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
    if args.queries > args.size or not -1 <= args.cosines[0] <= args.cosines[1] <= 1:
        parser.error("--queries is at most --size, --cosines are two rising numbers from -1 to 1")
    return args


def main(argv=None):
    """Runs the command; returns the exit code: 0, or 2 with one line on stderr."""
    try:
        for line in simulate(parse_args(argv)):
            print(line, flush=True)
    except InputError as error:
        print(f"simulate_ivfpq.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
