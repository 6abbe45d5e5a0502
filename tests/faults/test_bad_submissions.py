"""Submissions that must be refused, in one line, soon, and with little memory; and the few odd ones
that must not.
"""

import sys
import time
import zlib
from functools import cache

import h5py
import numpy as np
import pytest

import eval_metrics
import postprocess
import validate_submission
from common import errors, submissions
from conftest import ROOT, assert_refused, run

COMMAND = ROOT / "scripts" / "validate_submission.py"
QUERIES, REFERENCES, DIM = 20, 30, 8
HEADER = "query_id,reference_id,score\n"


def rows(count, dim=DIM, seed=0):
    values = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def ids(letter, count, digits):
    return np.array([f"{letter}{i:0{digits}}".encode() for i in range(count)])


def good(**changes):
    data = {
        "query": rows(QUERIES),
        "reference": rows(REFERENCES, seed=1),
        "query_ids": ids("Q", QUERIES, 5),
        "reference_ids": ids("R", REFERENCES, 6),
    }
    return {name: value for name, value in (data | changes).items() if value is not None}


def write(path, **changes):
    """A submission of 20 queries and 30 references with some datasets changed; None leaves one
    out.
    """
    with h5py.File(path, "w") as file:
        for name, value in good(**changes).items():
            file.create_dataset(name, data=value)
    return path


def with_values(name, *values):
    """The good descriptors, with `values` in their last rows."""
    array = good()[name]
    array[-len(values) :, 3] = values
    return {name: array}


def numbered_from(name, *first):
    """The good ids, beginning with these."""
    array = good()[name].tolist()
    return {name: np.array([*first, *array[len(first) :]])}


# ---- files whose structure lies: (write, words of the message) ----


def soft_link(path):
    with h5py.File(write(path, query=None), "a") as file:
        file["query"] = h5py.SoftLink("/reference")


def external_link(path):
    other = write(path.with_name("other.h5"))
    with h5py.File(write(path, query=None), "a") as file:
        file["query"] = h5py.ExternalLink(str(other), "query")


def dangling_link(path):
    with h5py.File(write(path, reference_ids=None), "a") as file:
        file["reference_ids"] = h5py.ExternalLink("/no/such/file.h5", "reference_ids")


def external_storage(path):
    secret = path.with_name("secret")
    secret.write_bytes(b"not yours" * 1000)
    with h5py.File(write(path, query=None), "a") as file:
        file.create_dataset(
            "query", (QUERIES, DIM), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
        )


def virtual(path):
    other = write(path.with_name("other.h5"))
    layout = h5py.VirtualLayout((REFERENCES, DIM), "f4")
    layout[:] = h5py.VirtualSource(str(other), "reference", (REFERENCES, DIM))
    with h5py.File(write(path, reference=None), "a") as file:
        file.create_virtual_dataset("reference", layout)


def group(path):
    with h5py.File(write(path, query=None), "a") as file:
        file.create_group("query")


def named_type(path):
    with h5py.File(write(path, query=None), "a") as file:
        file["query"] = np.dtype("f4")


def created(**options):
    """The good queries, stored in some other way."""

    def make(path):
        with h5py.File(write(path, query=None), "a") as file:
            file.create_dataset("query", data=rows(QUERIES), **options)

    return make


def gzip_twice(path):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((QUERIES, DIM))
    creation.set_deflate(9)
    creation.set_deflate(9)
    with h5py.File(write(path, query=None), "a") as file:
        space = h5py.h5s.create_simple((QUERIES, DIM))
        h5py.h5d.create(file.id, b"query", h5py.h5t.IEEE_F32LE, space, creation)
        file["query"][...] = rows(QUERIES)


def empty_shape(**options):
    """A dataset that claims rows that were never written."""

    def make(path):
        with h5py.File(write(path, reference=None), "a") as file:
            file.create_dataset("reference", dtype="f4", **options)

    return make


def wide_ids(path):
    with h5py.File(write(path, query_ids=None), "a") as file:
        file.create_dataset("query_ids", (QUERIES,), "S1000000000", chunks=(1,))


@cache
def zeros(count):
    return zlib.compress(bytes(count), 9)


def gzip_bomb(path):
    """1 GB of zeros, honestly compressed: 1 MB."""
    chunk = (1000, 256)
    with h5py.File(write(path, reference=None), "a") as file:
        bomb = file.create_dataset(
            "reference", (10**6, 256), "f4", chunks=chunk, compression="gzip"
        )
        for start in range(0, 10**6, 1000):
            bomb.id.write_direct_chunk((start, 0), zeros(4 * 1000 * 256))


def inflating_chunk(path):
    """A chunk of 1 MB that inflates to 500 MB."""
    with h5py.File(write(path, query=None, query_ids=ids("Q", 1000, 5)), "a") as file:
        bomb = file.create_dataset(
            "query", (1000, 256), "f4", chunks=(1000, 256), compression="gzip"
        )
        bomb.id.write_direct_chunk((0, 0), zeros(500 * 2**20))


def chunk_of_rubbish(path):
    with h5py.File(write(path, query=None), "a") as file:
        broken = file.create_dataset(
            "query", (QUERIES, DIM), "f4", chunks=(QUERIES, DIM), compression="gzip"
        )
        broken.id.write_direct_chunk((0, 0), b"rubbish" * 20)


def padded_chunk(path):
    """20 rows in a chunk that holds 2 GB of zeros."""
    with h5py.File(write(path, query=None), "a") as file:
        options = {"chunks": (2**26, DIM), "maxshape": (None, DIM), "compression": "gzip"}
        file.create_dataset("query", (QUERIES, DIM), "f4", **options).id.write_direct_chunk(
            (0, 0), b"x" * 100
        )


def shared_id(path):
    """Every id points to the same text of 20 MB."""
    write(path, reference_ids=np.array(["R" * 20_000_000] + ["R"] * (REFERENCES - 1), dtype=object))
    with h5py.File(path) as file:
        start = file["reference_ids"].id.get_offset()
    with path.open("r+b") as file:
        file.seek(start)
        first = file.read(16)
        file.seek(start)
        file.write(first * REFERENCES)


def chunked_text(path):
    with h5py.File(write(path, query_ids=None), "a") as file:
        text = good()["query_ids"].astype(object)
        file.create_dataset("query_ids", data=text, dtype=h5py.string_dtype(), compression="gzip")


LIES = {
    "soft link": (soft_link, "not a plain dataset"),
    "external link": (external_link, "not a plain dataset"),
    "dangling external link": (dangling_link, "not a plain dataset"),
    "external storage": (external_storage, "not a plain dataset"),
    "virtual dataset": (virtual, "not a plain dataset"),
    "group": (group, "not a plain dataset"),
    "named type": (named_type, "not a plain dataset"),
    "checksum filter": (created(chunks=True, fletcher32=True), "filters"),
    "scale-offset filter": (created(chunks=True, scaleoffset=2), "filters"),
    "gzip in gzip": (gzip_twice, "filters"),
    "lzf filter": (created(chunks=True, compression="lzf"), "filters"),
    "1e15 rows in chunks": (
        empty_shape(shape=(10**15, DIM), chunks=(1000, DIM)),
        "more than the file can hold",
    ),
    "1e15 rows in one piece": (empty_shape(shape=(10**15, DIM)), "more than the file can hold"),
    "1e18 dimensions": (
        empty_shape(shape=(2**31, 2**60), chunks=(1, 1)),
        "more than the file can hold",
    ),
    "1 GB never written": (empty_shape(shape=(10**6, 256)), "more than the file can hold"),
    "rows never written": (
        empty_shape(shape=(REFERENCES, DIM), chunks=(1, DIM), compression="gzip"),
        "more than the file can hold",
    ),
    "ids of 1 GB each": (wide_ids, "more than the file can hold"),
    "gzip bomb": (gzip_bomb, "more than the file can hold"),
    "inflating chunk": (inflating_chunk, "has a chunk that is not of 1024000 bytes"),
    "chunk of rubbish": (chunk_of_rubbish, "not a readable HDF5"),
    "padded chunk": (padded_chunk, "more than the file can hold"),
    "one huge id for all": (shared_id, "wider than 255"),
    "compressed text": (chunked_text, "variable length in chunks"),
}

# ---- files whose content is wrong for everyone ----


def truncated(path):
    path.write_bytes(write(path).read_bytes()[:-500])


WRONG = {
    "no file": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "no such file"),
    "empty file": (lambda path: path.write_bytes(b""), "not a readable HDF5"),
    "text": (lambda path: path.write_text("no h5"), "not a readable HDF5"),
    "signature alone": (
        lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)),
        "not a readable HDF5",
    ),
    "truncated": (truncated, "not a readable HDF5"),
} | {
    name: (lambda path, changes=changes: write(path, **changes), *words)
    for name, (changes, *words) in {
        "missing dataset": ({"reference_ids": None}, "no dataset 'reference_ids'"),
        "nothing inside": (dict.fromkeys(good()), "no dataset 'query'"),
        "other dimensions": ({"query": rows(QUERIES, DIM - 1)}, "different dimensions, 7 and 8"),
        "NaN": (with_values("reference", np.nan), "NaN or infinity, first in row 29"),
        "infinity": (with_values("query", np.inf, 0), "NaN or infinity, first in row 18"),
        "integers": ({"query": np.ones((QUERIES, DIM), int)}, "int64"),
        "complex": ({"query": rows(QUERIES).astype(complex)}, "complex128"),
        "table": ({"query": np.zeros(QUERIES, [("a", "f4"), ("b", "f4")])}, "(rows, dimensions)"),
        "text for numbers": ({"query": np.full((QUERIES, DIM), b"1.0")}, "not floating point"),
        "no rows": ({"query": rows(0), "query_ids": ids("Q", 0, 5).astype("S6")}, "empty"),
        "no dimensions": ({"query": rows(QUERIES)[:, :0]}, "empty"),
        "one dimension": ({"query": rows(QUERIES).ravel()}, "(rows, dimensions)"),
        "null": ({"query": h5py.Empty("f4")}, "empty"),
        "fewer ids": ({"query_ids": ids("Q", QUERIES - 1, 5)}, "20 rows in 'query' but 19 ids"),
        "more ids": (
            {"reference_ids": ids("R", REFERENCES + 1, 6)},
            "30 rows in 'reference' but 31 ids",
        ),
        "repeated id": (numbered_from("query_ids", b"Q00007"), "Q00007 more than once"),
        "number ids": ({"query_ids": np.arange(QUERIES)}, "one string per row"),
        "ids in two columns": (
            {"query_ids": np.full((QUERIES, 1), b"Q00000")},
            "one string per row",
        ),
        "latin-1 ids": (numbered_from("query_ids", b"Q\xe90000"), "UTF-8"),
        "empty id": (numbered_from("query_ids", b""), "empty id"),
        "id of two lines": (numbered_from("query_ids", b"Q\n0000"), "control characters"),
        "huge id": (numbered_from("query_ids", b"Q" * 256), "wider than 255"),
    }.items()
}

# ---- what only the challenge forbids ----

RULES = {
    name: (lambda path, changes=changes: write(path, **changes), *words)
    for name, (changes, *words) in {
        "257 dimensions": (
            {"query": rows(QUERIES, 257), "reference": rows(REFERENCES, 257)},
            "257",
            "256",
        ),
        "float64": (
            {"reference": rows(REFERENCES).astype("f8")},
            "'reference' holds float64; store float32",
        ),
        "float16": ({"query": rows(QUERIES).astype("f2")}, "'query' holds float16; store float32"),
        "big-endian": ({"query": rows(QUERIES).astype(">f4")}, "store float32"),
        "text ids": ({"query_ids": good()["query_ids"].astype(object)}, "variable length", "S6"),
        "wide ids": ({"reference_ids": good()["reference_ids"].astype("S12")}, "S12", "S7"),
        "other letter": (numbered_from("query_ids", b"X00000"), "'X00000'", "id of a query"),
        "too few digits": (
            numbered_from("reference_ids", b"R00001"),
            "'R00001'",
            "id of a reference",
        ),
        "path for an id": (numbered_from("query_ids", b"../../"), "'../../'"),
        "foreign digits": (numbered_from("query_ids", "Q000٣".encode()), "'Q000٣'"),
        "queries for references": (
            {"query_ids": np.array([b"R%05d" % i for i in range(QUERIES)])},
            "'R00000'",
        ),
        "50,001 queries": (
            {"query": rows(50_001), "query_ids": ids("Q", 50_001, 5)},
            "50001 rows",
            "DISC21 has 50000",
        ),
    }.items()
}


def line(*fields):
    return ",".join(map(str, fields)) + "\n"


def text(content):
    return lambda path: path.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def too_many_rows(path):
    pairs = "".join(line(f"Q{i % 50_000:05}", f"R{i:06}", 0.5) for i in range(500_001))
    path.write_text(HEADER + pairs)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(10**12)


PAIR = line("Q00000", "R000000", 0.5)
WRONG_CSV = {
    "no csv": (lambda path: None, "no such file"),
    "header alone": (text(HEADER), "no rows"),
    "NaN score": (text(HEADER + line("Q00000", "R000000", "nan")), "'nan' in line 2"),
    "infinite score": (text(HEADER + PAIR + line("Q00001", "R000000", "-inf")), "'-inf' in line 3"),
    "no score": (text(HEADER + line("Q00000", "R000000", "")), "'' in line 2"),
    "score in words": (text(HEADER + line("Q00000", "R000000", "high")), "'high' in line 2"),
    "no query": (text(HEADER + line("", "R000000", 1)), "no query_id in line 2"),
    "control characters": (text(HEADER + line("Q00000", "R\x1b[2J", 1)), "control characters"),
    "1 TB without a line": (sparse, "1000000000000 bytes"),
    "latin-1 csv": (
        text((HEADER + line("Q0000é", "R000000", 1)).encode("latin-1")),
        "not a readable csv",
    ),
}
RULES_CSV = {
    "empty csv": (text(""), "columns"),
    "h5 named csv": (write, "s.csv"),
    "missing column": (text("query_id,score\nQ00000,1\n"), "columns", HEADER.strip()),
    "columns in another order": (
        text("score,query_id,reference_id\n1,Q00000,R000000\n"),
        "columns",
    ),
    "one column more": (text("query_id,reference_id,score,note\nQ00000,R000000,1,x\n"), "columns"),
    "no header": (text(PAIR), "columns"),
    "one field more": (text(HEADER + PAIR + line("Q00001", "R000000", 1, 2)), "not 3 fields"),
    "one field less": (text(HEADER + PAIR + line("Q00001", "R000000")), "not 3 fields"),
    "blank line": (text(HEADER + PAIR + "\n" + line("Q00001", "R000000", 1)), "not 3 fields"),
    "semicolons": (text((HEADER + PAIR).replace(",", ";")), "columns"),
    "BOM": (text("\ufeff" + HEADER + PAIR), "byte order mark"),
    "UTF-16": (text((HEADER + PAIR).encode("utf-16")), "columns"),
    "CRLF": (text((HEADER + PAIR).replace("\n", "\r\n")), "CR LF"),
    "repeated pair": (
        text(HEADER + PAIR + line("Q00000", "R000000", 0.7)),
        "line 3",
        "Q00000,R000000",
    ),
    "malformed query": (text(HEADER + line("Q0", "R000000", 1)), "'Q0' is not the id of a query"),
    "id with a file suffix": (
        text(HEADER + line("Q00000.jpg", "R000000.jpg", 1)),
        "'Q00000.jpg'",
        "without a file suffix",
    ),
    "no reference": (text(HEADER + line("Q00000", "", 1)), "'' is not the id of a reference"),
    "swapped columns": (
        text(HEADER + line("R000000", "Q00000", 1)),
        "'R000000' is not the id of a query",
    ),
    "formula": (text(HEADER + line("=1+1", "R000000", 1)), "'=1+1'"),
    "500,001 rows": (too_many_rows, "500001 rows", "10 per query overall"),
}
H5 = LIES | WRONG | RULES
CSV = WRONG_CSV | RULES_CSV
ALL = H5 | CSV


def place(folder, name):
    """Write the named wrong file into `folder`; returns its path and the words that its refusal
    must hold.
    """
    make, *words = ALL[name]
    path = folder / ("s.h5" if name in H5 else "s.csv")
    make(path)
    return path, words


def assert_one_line(command, capsys, *words):
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if "error:" in line]
    assert output.out == "" and len(lines) == 1 and lines[0].startswith(f"{command}.py: error: "), (
        output
    )
    for word in words:
        assert str(word) in lines[0], lines[0]


def each_of(names):
    return pytest.mark.parametrize("name", list(names))


# ---- refused ----


def test_there_are_many_kinds():
    assert len(ALL) == sum(map(len, (LIES, WRONG, RULES, WRONG_CSV, RULES_CSV))) >= 80


@each_of(ALL)
def test_validator_refuses(tmp_path, capsys, name):
    path, words = place(tmp_path, name)
    start = time.process_time()
    assert validate_submission.main([str(path), "--partial"]) == 2
    assert time.process_time() - start < 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert (
        output.out == ""
        and len(lines) == 1
        and lines[0].startswith(f"validate_submission.py: error: {path}: ")
    )
    for word in words:
        assert word in lines[0], lines[0]


@each_of([*LIES, *WRONG, *WRONG_CSV])
def test_evaluation_refuses(tmp_path, capsys, name):
    path, words = place(tmp_path, name)
    truth = tmp_path / "gt.csv"
    truth.write_text("query_id,reference_id\nQ00000,R000000\n")
    before = sorted(tmp_path.iterdir())
    assert eval_metrics.main([str(path), str(truth)]) == 2
    assert_one_line("eval_metrics", capsys, path, *words)
    assert sorted(tmp_path.iterdir()) == before


@each_of([*LIES, *WRONG])
def test_postprocessing_refuses(tmp_path, capsys, name):
    folder = tmp_path / "v107" / "extract"
    folder.mkdir(parents=True)
    path, words = place(folder, name)
    if path.exists():
        path = path.rename(folder / "fb-isc-submission.h5")
    np.save(folder / "train_feats.npy", rows(40, seed=2))
    assert postprocess.main(["--exp", str(tmp_path)]) == 2
    assert_one_line("postprocess", capsys, "fb-isc-submission.h5", *words)
    assert not list(folder.glob("*iso*"))


@each_of(LIES)
def test_lies_are_refused_before_anything_is_read(tmp_path, monkeypatch, name):
    path, _ = place(tmp_path, name)

    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", read)
    for check in (submissions.read_submission, validate_submission.check_submission):
        with pytest.raises(errors.InputError):
            check(path)


@pytest.mark.parametrize("name", ["gzip bomb", "NaN", "float64", "500,001 rows"])
def test_whole_command_refuses(tmp_path, name):
    path, words = place(tmp_path, name)
    start = time.monotonic()
    assert_refused(run(COMMAND, path, "--partial"), path, *words)
    assert time.monotonic() - start < 30  # 2 s where nothing else runs


def test_refuses_fewer_rows_unless_partial(tmp_path, capsys):
    path = write(tmp_path / "s.h5")
    assert validate_submission.main([str(path)]) == 2
    assert_one_line("validate_submission", capsys, path, "20 rows in 'query'", "50000", "--partial")
    assert validate_submission.main([str(path), "--partial"]) == 0
    assert capsys.readouterr().out == f"{path}: 20 queries, 30 references, 8 dimensions\n"


def test_refuses_the_wrong_track(tmp_path, capsys):
    path = write(tmp_path / "s.h5")
    for flags in ((path, "--matching"), (path.rename(tmp_path / "s.bin"),)):
        assert validate_submission.main(list(map(str, flags))) == 2
        assert_one_line("validate_submission", capsys, flags[0], "--descriptor")
    assert validate_submission.main([str(tmp_path / "s.bin"), "--descriptor", "--partial"]) == 0


LIMITED = """
import importlib, resource, sys
command = importlib.import_module(sys.argv[1])
extra, good, wrong = sys.argv[2].split(), sys.argv[3], sys.argv[4:]
command.main([good, *extra])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(sum(command.main([path, *extra]) != 2 for path in wrong))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells how much memory a process has")
@pytest.mark.parametrize("module", ["validate_submission", "eval_metrics"])
def test_refused_within_100_mb(tmp_path, module):
    truth = tmp_path / "gt.csv"
    truth.write_text("query_id,reference_id\nQ00000,R000000\n")
    kinds, extra = (
        (ALL, "--partial") if module == "validate_submission" else (LIES | WRONG, str(truth))
    )
    wrong = []
    for index, name in enumerate(kinds):
        folder = tmp_path / str(index)
        folder.mkdir()
        wrong.append(place(folder, name))
    paths = [path for path, _ in wrong]
    fine = write(tmp_path / "fine.h5")
    result = run("-c", LIMITED, module, extra, fine, *paths, cwd=ROOT / "scripts")
    errors = [line for line in result.stderr.splitlines() if f"{module}.py: error: " in line]
    assert result.returncode == 0, result.stderr
    # The same messages as without the limit: none is about memory.
    for error, (path, words) in zip(errors, wrong, strict=True):
        assert str(path) in error and all(word in error for word in words), error


# ---- accepted ----


def test_accepts_a_full_submission(tmp_path, capsys):
    order = np.random.default_rng(0).permutation(10**6)  # rows may come in any order
    changes = {"query": rows(50_000, 2), "reference": rows(10**6, 2)}
    changes |= {"query_ids": ids("Q", 50_000, 5), "reference_ids": ids("R", 10**6, 6)[order]}
    path = write(tmp_path / "s.h5", **changes)
    assert validate_submission.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 50000 queries, 1000000 references, 2 dimensions\n"


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (7, 3)},
        {"compression": "gzip", "shuffle": True},
        {"compression": "gzip", "chunks": (7, 3)},
        {"shuffle": True, "chunks": (20, 8)},
    ],
)
def test_accepts_chunks_and_compression(tmp_path, options):
    path = tmp_path / "s.h5"
    created(**options)(path)
    assert validate_submission.main([str(path), "--partial"]) == 0
    np.testing.assert_array_equal(submissions.read_submission(path)["query"], rows(QUERIES))


def test_accepts_compressed_ids(tmp_path):
    path = write(
        tmp_path / "s.h5", reference=rows(10**5, 2), query=rows(QUERIES, 2), reference_ids=None
    )
    with h5py.File(path, "a") as file:
        file.create_dataset(
            "reference_ids", data=ids("R", 10**5, 6), compression="gzip", shuffle=True
        )
    assert validate_submission.main([str(path), "--partial"]) == 0


def test_accepts_a_user_block_and_reads_texts_behind_it(tmp_path):
    path = tmp_path / "s.h5"
    with h5py.File(path, "w", userblock_size=4096) as file:
        for name, value in good(query_ids=good()["query_ids"].astype(object)).items():
            file.create_dataset(name, data=value)
    np.testing.assert_array_equal(
        submissions.read_submission(path)["query_ids"], good()["query_ids"]
    )


def test_blocks_are_put_together(tmp_path, monkeypatch):
    path = write(tmp_path / "s.h5")
    monkeypatch.setattr(submissions, "BLOCK", 7)
    np.testing.assert_array_equal(
        submissions.read_submission(path)["reference"], rows(REFERENCES, seed=1)
    )
    with pytest.raises(errors.InputError, match="first in row 28"):
        submissions.read_submission(write(path, **with_values("reference", np.nan, 0)))


def test_accepts_matches_and_what_evaluation_warns_of(tmp_path, capsys):
    path, truth = tmp_path / "s.csv", tmp_path / "gt.csv"
    truth.write_text("query_id,reference_id\nQ00000,R000000\n")
    path.write_text((HEADER + PAIR + line("Q00000", "R000001", -1e-3)).rstrip("\n"))
    assert validate_submission.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 2 pairs of 1 queries\n"
    path.write_bytes(("\ufeff" + HEADER + PAIR + PAIR).replace("\n", "\r\n").encode())
    assert eval_metrics.main([str(path), str(truth)]) == 0
    assert "repeat a pair" in capsys.readouterr().err


def test_too_many_dimensions_only_warn_outside_the_challenge(tmp_path, capsys):
    folder, truth = tmp_path / "v107" / "extract", tmp_path / "gt.csv"
    folder.mkdir(parents=True)
    truth.write_text("query_id,reference_id\nQ00000,R000000\n")
    write(
        folder / "fb-isc-submission.h5", query=rows(QUERIES, 300), reference=rows(REFERENCES, 300)
    )
    np.save(folder / "train_feats.npy", rows(40, 300))
    assert postprocess.main(["--exp", str(tmp_path)]) == 0
    message = capsys.readouterr().err
    assert "warning: " in message
    assert f"{folder / 'v107_iso.h5'}: 300 dimensions" in message
    assert eval_metrics.main([str(folder / "v107_iso.h5"), str(truth)]) == 0
    assert "300 dimensions" in capsys.readouterr().err


# ---- unreadable images: rows of zeros ----


def zero(array, *places):
    array = array.copy()
    array[list(places)] = 0
    return array


def test_zero_rows_stay_zero_and_match_nothing(tmp_path, capsys):
    folder, truth = tmp_path / "v107" / "extract", tmp_path / "gt.csv"
    folder.mkdir(parents=True)
    query = zero(rows(QUERIES), 0, 7)
    reference = zero(rows(REFERENCES, seed=1), 29)
    train = zero(rows(40, seed=2), 5)
    reference[3] = query[3]
    truth.write_text("query_id,reference_id\nQ00003,R000003\nQ00007,\nQ00019,\n")
    path = write(folder / "fb-isc-submission.h5", query=query, reference=reference)
    np.save(folder / "train_feats.npy", train)
    assert validate_submission.main([str(path), "--partial"]) == 0
    assert postprocess.main(["--exp", str(tmp_path), "--num-iter", "2", "--alpha", "0"]) == 0
    for submission in (path, folder / "v107_iso.h5"):
        data = submissions.read_submission(submission)
        assert np.flatnonzero(~data["query"].any(axis=1)).tolist() == [0, 7]
        assert np.flatnonzero(~data["reference"].any(axis=1)).tolist() == [29]
        candidates = eval_metrics.load_candidates(
            submission, eval_metrics.read_ground_truth(truth), truth
        )
        assert not {"Q00007", "R000029"} & {*candidates["query_id"], *candidates["reference_id"]}
        assert len(candidates) == 30  # the allowance of three queries, though one has no descriptor
        assert candidates.nlargest(1, "score")["reference_id"].item() == "R000003"
    matches = submissions.read_matches(folder / "v107_iso.csv")
    assert matches["query_id"].value_counts().tolist() == [10] * 18
    assert not {"Q00000", "Q00007", "R000029"} & {*matches["query_id"], *matches["reference_id"]}
    augmented = postprocess.database_augmentation(train, alpha=0)
    assert np.flatnonzero(~augmented.any(axis=1)).tolist() == [5]
    others = np.delete(np.arange(QUERIES), [0, 7])
    np.testing.assert_array_equal(
        postprocess.negative_embedding_subtraction(query, augmented)[others],
        postprocess.negative_embedding_subtraction(rows(QUERIES), augmented)[others],
    )


# ---- what post-processing writes ----


def test_what_postprocessing_writes_is_checked_before_it_appears(tmp_path, capsys):
    folder = tmp_path / "v107" / "extract"
    folder.mkdir(parents=True)
    write(folder / "fb-isc-submission.h5")
    np.save(folder / "train_feats.npy", rows(40, seed=2))
    assert postprocess.main(["--exp", str(tmp_path)]) == 0
    assert validate_submission.main([str(folder / "v107_iso.h5"), "--partial"]) == 0
    assert validate_submission.main([str(folder / "v107_iso.csv")]) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    # This beta is infinite in float32, so the descriptors and the scores become NaN.
    with np.errstate(all="ignore"):
        assert postprocess.main(["--exp", str(tmp_path), "--beta", "1e39"]) == 2
    assert_one_line("postprocess", capsys, "v107_iso.csv", "not a finite number")
    data = submissions.read_submission(folder / "v107_iso.h5")
    matches = postprocess.find_matches(data)
    data["query"][7] = np.nan
    with pytest.raises(errors.InputError, match=r"v107_iso.h5.*'query' has NaN.*row 7"):
        postprocess.write_submission(folder / "v107_iso.h5", folder / "v107_iso.csv", data, matches)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
