"""scripts/dev/simulate_ivfpq.py, by its command line: what holds of any such index holds of its
table.
"""

import pytest

import simulate_ivfpq
from conftest import ROOT, assert_refused, called, run

SMALL = ["--size", 5000, "--queries", 200, "--train-rows", 2000]
NOISE = 0.03  # of a share over 200 queries that the approximation of distances may move


def simulate(*flags):
    return run(ROOT / "scripts" / "dev" / "simulate_ivfpq.py", *SMALL, *flags)


def table(result):
    """{(index, probes): its row as {column: float}}."""
    assert result.returncode == 0, result.stderr
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in result.stdout.splitlines()
        if "|" in line
    ]
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    return {
        (row.pop("index"), row.pop("nprobe")): {
            column: float(value) for column, value in row.items()
        }
        for row in cells
    }


@pytest.fixture(scope="module")
def rows():
    return table(
        simulate("--index", "IVF32,Flat", "IVF32,PQ4np", "IVF32,PQ32np", "--probes", 1, 4, 32)
    )


def test_exact_search_finds_every_copy(rows):
    shares = ("recall@10", "copy@1", "copy@10", "copy@100", "hard@10")
    assert [rows["exact", ""][share] for share in shares] == [1] * 5
    # All lists visited, nothing compressed.
    assert [rows["IVF32,Flat", "32"][share] for share in shares] == [1] * 5


def test_more_probes_and_bytes_find_more(rows):
    for share in ("recall@10", "copy@10"):
        for index in ("IVF32,Flat", "IVF32,PQ4np", "IVF32,PQ32np"):
            few, some, all_ = (rows[index, probes][share] for probes in ("1", "4", "32"))
            assert few <= some + NOISE and some <= all_ + NOISE
        for probes in ("1", "4", "32"):
            small, large, whole = (
                rows[f"IVF32,{code}", probes][share] for code in ("PQ4np", "PQ32np", "Flat")
            )
            assert small <= large + NOISE and large <= whole + NOISE
    assert rows["IVF32,Flat", "1"]["copy@10"] < 0.9 * rows["IVF32,Flat", "32"]["copy@10"]
    assert rows["IVF32,PQ4np", "32"]["recall@10"] < 0.9 * rows["IVF32,PQ32np", "32"]["recall@10"]


def test_bytes_are_the_codes_and_an_id(rows):
    sizes = [
        rows[index, probes]["bytes"]
        for index, probes in [("exact", ""), ("IVF32,Flat", "1"), ("IVF32,PQ4np", "1")]
    ]
    assert sizes == [1024, 1024 + 8, 4 + 8]


def test_nearer_copies_are_found_sooner():
    """--cosines has its effect: near copies are found where far ones are missed."""
    near, far = (
        table(simulate("--index", "IVF32,Flat", "--probes", 1, "--cosines", cosine, cosine))[
            "IVF32,Flat", "1"
        ]
        for cosine in (0.95, 0.6)
    )
    assert near["copy@1"] > far["copy@1"] + 0.2


@pytest.mark.parametrize(
    "flags",
    [
        ["--index", "HNSW32"],  # has no lists
        ["--index", "no-such-index"],
        ["--index", "IVF32,PQ7np"],  # 256 is no multiple of 7
        ["--index", "IVF2001,Flat"],  # more lists than descriptors to learn from
        ["--queries", 5001],
        ["--cosines", 0.9, 0.6],
        ["--probes", 0],
    ],
)
def test_refuses(flags, capsys):
    assert_refused(called(simulate_ivfpq.main, (*SMALL, *flags), capsys), flags[0])
