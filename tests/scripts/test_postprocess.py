"""Database augmentation, negative embedding subtraction, nearest neighbors, and the whole
command.
"""

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import postprocess
from common import search
from conftest import GOLDEN, ROOT, assert_refused, run

CASES = ("float32", "float16", "duplicates")
COMMAND = ROOT / "scripts" / "postprocess.py"


def unit_rows(count, dim, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


def write_stage(exp, stage, case, submission="fb-isc-submission.h5", **changes):
    """Lays out what a stage's extraction leaves, from a golden case; a change of None leaves the
    dataset out.
    """
    folder = exp / stage / "extract"
    folder.mkdir(parents=True, exist_ok=True)
    data = {name: case[name] for name in ("query", "reference")}
    data |= {name: case[name].astype("S") for name in ("query_ids", "reference_ids")} | changes
    with h5py.File(folder / submission, "w") as file:
        for name, value in data.items():
            if value is not None:
                file.create_dataset(name, data=value)
    np.save(folder / "train_feats.npy", case["train"])
    return folder


@pytest.fixture
def case():
    return dict(np.load(GOLDEN / "postprocess_float32.npz"))


# ---- functions ----


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    case = np.load(GOLDEN / f"postprocess_{name}.npz")
    train = postprocess.database_augmentation(case["train"])
    query = postprocess.negative_embedding_subtraction(case["query"], train)
    reference = postprocess.negative_embedding_subtraction(case["reference"], train)
    close(train, case["train_augmented"])
    close(query, case["query_subtracted"])
    close(reference, case["reference_subtracted"])
    close(
        postprocess.negative_embedding_subtraction(case["query"], train, num_iter=3, k=7, beta=0.2),
        case["query_subtracted_iter3_k7_beta02"],
    )
    distance, index = postprocess.nearest(query, reference, 10, "l2")
    np.testing.assert_array_equal(index, case["match_reference_index"])
    close(-distance, case["match_score"])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_nearest_is_brute_force(metric):
    query, base = unit_rows(50, 24), 1.5 * unit_rows(700, 24, seed=1)
    base[300:400] = base[:100]  # exact copies: the earlier one comes first
    if metric == "ip":
        exact = query.astype(np.float64) @ base.T.astype(np.float64)
        distance = -exact
    else:
        difference = query[:, None].astype(np.float64) - base
        exact = distance = (difference**2).sum(-1)
    order = np.argsort(distance.astype(np.float32), axis=1, kind="stable")[:, :9]
    scores, indices = postprocess.nearest(query, base, 9, metric)
    assert scores.dtype == np.float32 and indices.dtype == np.int64
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, 1), rtol=2e-7)


def test_block_sizes_give_the_same_answer(monkeypatch, case):
    def everything():
        train = postprocess.database_augmentation(case["train"])
        query = postprocess.negative_embedding_subtraction(case["query"], train)
        return train, query, *postprocess.nearest(query, train, 10, "l2")

    whole = everything()
    monkeypatch.setattr(search, "BLOCK", 17)  # faiss takes another route below 20 queries
    monkeypatch.setattr(search, "CHUNK", 5)
    for expected, actual in zip(whole, everything(), strict=True):
        np.testing.assert_array_equal(actual, expected)


class OneGpu:
    """Stands in for faiss's GPU build: another order of summation, and neighbors in no particular
    order.
    """

    def __init__(self, index):
        self.index = index

    def add(self, base):
        self.base = base

    def search(self, queries, k):
        assert k <= search.GPU_MAX_K
        backwards = slice(None, None, -1)
        similarity = queries[:, backwards] @ self.base[:, backwards].T
        index = np.argpartition(-similarity, k - 1)[:, :k]
        return np.take_along_axis(similarity, index, 1), index


def test_gpus_are_used_where_faiss_sees_some_with_the_same_answer(monkeypatch):
    query, base = unit_rows(40, 24), unit_rows(3000, 24, seed=1)
    expected = postprocess.nearest(query, base, 10, "ip")
    asked = []
    monkeypatch.setattr(search.faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(
        search.faiss,
        "index_cpu_to_all_gpus",
        lambda index, ngpu: asked.append(ngpu) or OneGpu(index),
        raising=False,
    )
    for one, other in zip(expected, postprocess.nearest(query, base, 10, "ip"), strict=True):
        np.testing.assert_array_equal(one, other)
    search.flat_search(base, "l2", num_gpus=1)
    search.flat_search(base, "l2", num_gpus=7)
    search.flat_search(base, "l2", num_gpus=0)
    assert asked == [2, 1, 2]
    many = search.flat_search(base, "ip")(query, 2500)[1]  # beyond what faiss does on GPUs
    assert many.shape == (40, 2500)


def test_inputs_are_left_alone(case):
    train, query = case["train"].copy(), case["query"].copy()
    train.flags.writeable = query.flags.writeable = False
    augmented = postprocess.database_augmentation(train)
    result = postprocess.negative_embedding_subtraction(query, augmented, num_iter=2)
    same = postprocess.negative_embedding_subtraction(query, augmented, num_iter=0)
    np.testing.assert_array_equal(same, query)
    assert not np.shares_memory(same, query) and not np.shares_memory(result, query)
    np.testing.assert_array_equal(train, case["train"])
    np.testing.assert_array_equal(query, case["query"])


@pytest.mark.parametrize("count", [1, 3, 10])
def test_few_training_descriptors(count):
    train, query = unit_rows(count, 8), unit_rows(30, 8, seed=1)
    similarity = train.astype(np.float64) @ train.T
    expected = similarity**3 @ train
    augmented = postprocess.database_augmentation(train, k=10)
    close(augmented, expected / np.linalg.norm(expected, axis=1, keepdims=True))
    expected = query - 0.35 * augmented.mean(axis=0)
    result = postprocess.negative_embedding_subtraction(query, augmented, k=10)
    close(result, expected / np.linalg.norm(expected, axis=1, keepdims=True))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 40),
    k=st.integers(1, 12),
    alpha=st.sampled_from([0.0, 0.5, 2.0, 3.0]),
    zeros=st.booleans(),
)
def test_rows_are_unit_length_or_zero_and_finite(seed, count, k, alpha, zeros):
    train, query = unit_rows(count, 6, seed), unit_rows(25, 6, seed + 1)
    if zeros:
        train[::3] = 0
        query[::2] = 0
    augmented = postprocess.database_augmentation(train, k, alpha)
    for rows in (augmented, postprocess.negative_embedding_subtraction(query, augmented, 2, k)):
        length = np.linalg.norm(rows, axis=1)
        assert np.isfinite(rows).all()
        assert (np.isclose(length, 1, atol=1e-6) | (length == 0)).all()
    zeros = np.zeros((4, 6))
    assert not postprocess.negative_embedding_subtraction(zeros, zeros).any()


@pytest.mark.parametrize(("shape", "k"), [((5, 7), 3), ((0, 6), 3), ((5, 6), 0), ((6,), 3)])
def test_shapes_that_make_no_sense(shape, k):
    with pytest.raises(postprocess.InputError):
        postprocess.nearest(unit_rows(5, 6), np.ones(shape, np.float32), k, "ip")


# ---- the command ----


@pytest.mark.parametrize("name", CASES)
def test_command_reproduces_golden(tmp_path, name):
    case = np.load(GOLDEN / f"postprocess_{name}.npz")
    folder = write_stage(tmp_path, "v107", case)
    result = run(COMMAND, "--exp", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "query/s" in result.stderr  # a progress bar
    assert result.stdout.split() == [str(folder / "v107_iso.h5"), str(folder / "v107_iso.csv")]
    with h5py.File(folder / "v107_iso.h5") as file:
        assert sorted(file) == ["query", "query_ids", "reference", "reference_ids"]
        assert file["query_ids"].dtype == np.dtype("S6")
        assert file["reference_ids"].dtype == np.dtype("S7")
        assert file["query"].dtype == file["reference"].dtype == np.float32
        close(file["query"], case["query_subtracted"])
        close(file["reference"], case["reference_subtracted"])
        for ids in ("query_ids", "reference_ids"):
            np.testing.assert_array_equal(np.char.decode(file[ids][()]), case[ids])
    actual = pd.read_csv(folder / "v107_iso.csv")
    expected = pd.read_csv(GOLDEN / f"postprocess_{name}.csv")
    pd.testing.assert_frame_equal(actual, expected, rtol=0, atol=2e-6)
    written = ["fb-isc-submission.h5", "train_feats.npy", "v107_iso.csv", "v107_iso.h5"]
    assert sorted(path.name for path in folder.iterdir()) == written


def test_phase_2_has_its_own_names(tmp_path, case):
    folder = write_stage(tmp_path, "v98", case, "fb-isc-submission-phase2.h5")
    assert_refused(run(COMMAND, "v98", "--exp", tmp_path), "fb-isc-submission.h5", "no such file")
    result = run(COMMAND, "v98", "--exp", tmp_path, "--phase", 2)
    assert result.returncode == 0, result.stderr
    names = {path.name for path in folder.glob("v98_iso*")}
    assert names == {"v98_iso_phase2.h5", "v98_iso_phase2.csv"}


def test_parameters_reach_the_steps(tmp_path, case):
    folder = write_stage(tmp_path, "v107", case)
    flags = ("--k", 7, "--alpha", 2, "--beta", 0.2, "--num-iter", 3)
    assert run(COMMAND, "--exp", tmp_path, *flags).returncode == 0
    train = postprocess.database_augmentation(case["train"], 7, 2)
    query = postprocess.negative_embedding_subtraction(case["query"], train, 3, 7, 0.2)
    with h5py.File(folder / "v107_iso.h5") as file:
        close(file["query"], query)


def test_several_stages_are_concatenated(tmp_path, case):
    write_stage(tmp_path, "v98", case)
    mirrored = dict(case)
    for name in ("train", "query", "reference"):
        mirrored[name] = -case[name][:, ::-1]
    folder = write_stage(tmp_path, "v107", mirrored)
    result = run(COMMAND, "v98", "v107", "--exp", tmp_path)
    assert result.returncode == 0, result.stderr
    both = {}
    for name in ("train", "query", "reference"):
        both[name] = np.hstack([case[name], mirrored[name]]) / np.sqrt(np.float32(2))
    train = postprocess.database_augmentation(both["train"])
    with h5py.File(folder / "v98_v107_iso.h5") as file:
        assert file["query"].shape == (60, 128)
        for name in ("query", "reference"):
            close(file[name], postprocess.negative_embedding_subtraction(both[name], train))


@pytest.mark.parametrize("change", ["ids", "rows of train"])
def test_stages_of_other_images_are_refused(tmp_path, case, change):
    write_stage(tmp_path, "v98", case)
    if change == "ids":
        write_stage(tmp_path, "v107", case, query_ids=case["query_ids"][::-1].astype("S"))
    else:
        write_stage(tmp_path, "v107", case | {"train": case["train"][1:]})
    assert_refused(run(COMMAND, "v98", "v107", "--exp", tmp_path), "v107", "not those of")


def test_wide_and_variable_length_ids_survive(tmp_path, case):
    wide = [f"reference-{i:05}-é".encode() for i in range(len(case["reference_ids"]))]
    text = case["query_ids"].astype(object)
    folder = write_stage(tmp_path, "v107", case, reference_ids=np.array(wide), query_ids=text)
    result = run(COMMAND, "--exp", tmp_path)
    assert result.returncode == 0, result.stderr
    with h5py.File(folder / "v107_iso.h5") as file:
        assert file["reference_ids"][()].tolist() == wide
        assert file["query_ids"].dtype == np.dtype("S6")
    first = f"{case['query_ids'][0]},{wide[case['match_reference_index'][0, 0]].decode()},"
    assert first in (folder / "v107_iso.csv").read_text(encoding="utf-8")


def test_default_folder_is_the_repositorys_exp(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = postprocess.parse_args([])
    published = {"phase": 1, "k": 10, "alpha": 3.0, "beta": 0.35, "num_iter": 1}
    assert vars(args) == {"exp": ROOT / "exp", "versions": ["v107"], **published}


# ---- wrong input ----


def nan_in(rows):
    rows = rows.copy()
    rows[4, 2] = np.nan
    return rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": None}, ["no dataset 'query'"]),
        ({"reference_ids": None}, ["no dataset 'reference_ids'"]),
        ({"query": lambda case: nan_in(case["query"])}, ["'query'", "NaN", "row 4"]),
        ({"reference": lambda case: case["reference"] + np.inf}, ["'reference'", "infinity"]),
        (
            {"reference": lambda case: case["reference"] * np.float64(1e200)},
            ["'reference'", "infinity"],
        ),
        ({"query": lambda case: case["query"][:, 1:]}, ["dimensions", "63 and 64"]),
        ({"query": lambda case: case["query"][1:]}, ["59 rows", "60 ids"]),
        ({"query": lambda case: case["query"][:0]}, ["'query'", "empty"]),
        ({"query": lambda case: case["query"].ravel()}, ["'query'", "(rows, dimensions)"]),
        ({"query": lambda case: case["query"].astype(int)}, ["'query'", "int64"]),
        ({"query_ids": lambda case: np.full(60, b"Q00007")}, ["Q00007", "more than once"]),
        ({"query_ids": lambda case: np.arange(60)}, ["'query_ids'", "string"]),
        (
            {"query_ids": lambda case: np.array([b"\xff%d" % i for i in range(60)])},
            ["'query_ids'", "UTF-8"],
        ),
    ],
)
def test_refuses_wrong_submission(tmp_path, case, capsys, changes, words):
    changes = {name: value(case) if callable(value) else value for name, value in changes.items()}
    folder = write_stage(tmp_path, "v107", case, **changes)
    before = sorted(folder.iterdir())
    assert postprocess.main(["--exp", str(tmp_path)]) == 2
    assert_one_line(capsys, folder / "fb-isc-submission.h5", *words)
    assert sorted(folder.iterdir()) == before


def assert_one_line(capsys, *words):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("postprocess.py: error: "), lines
    for word in words:
        assert str(word) in lines[0], lines[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file"]),
        (b"not an array", ["not a readable .npy"]),
        (np.zeros((4, 64), dtype=int), ["int64"]),
        (np.zeros((0, 64), dtype=np.float32), ["empty"]),
        (np.full((4, 64), np.nan), ["NaN"]),
        (np.zeros((4, 32), dtype=np.float32), ["dimensions", "32", "64"]),
        (np.array([{}]), ["not a readable .npy"]),
    ],
)
def test_refuses_wrong_training_descriptors(tmp_path, case, capsys, content, words):
    folder = write_stage(tmp_path, "v107", case)
    path = folder / "train_feats.npy"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    assert postprocess.main(["--exp", str(tmp_path)]) == 2
    assert_one_line(capsys, path, *words)
    assert not list(folder.glob("*iso*"))


def test_refuses_a_train_file_whose_header_lies(tmp_path, case, capsys):
    folder = write_stage(tmp_path, "v107", case)
    np.save(folder / "train_feats.npy", case["train"])
    (folder / "train_feats.npy").write_bytes((folder / "train_feats.npy").read_bytes()[:-40])
    assert postprocess.main(["--exp", str(tmp_path)]) == 2
    assert_one_line(capsys, "train_feats.npy", "not a readable .npy")


def test_refuses_files_that_are_not_hdf5(tmp_path, case):
    path = write_stage(tmp_path, "v107", case) / "fb-isc-submission.h5"
    content = path.read_bytes()
    for broken in (b"no h5", b"", content[: len(content) // 2]):
        path.write_bytes(broken)
        assert_refused(run(COMMAND, "--exp", tmp_path), path, "not a readable HDF5")


def test_refuses_links_and_shape_bombs(tmp_path, case, capsys):
    path = write_stage(tmp_path, "v107", case, query=None) / "fb-isc-submission.h5"
    with h5py.File(path, "a") as file:
        file["query"] = h5py.SoftLink("/reference")
    assert postprocess.main(["--exp", str(tmp_path)]) == 2
    assert_one_line(capsys, path, "'query'", "not a plain dataset")
    with h5py.File(path, "a") as file:
        del file["query"]
        file.create_dataset("query", shape=(10**13, 64), dtype="f4", chunks=(1000, 64))
    assert postprocess.main(["--exp", str(tmp_path)]) == 2
    assert_one_line(capsys, path, "'query'", "more than the file can hold")


@pytest.mark.parametrize(
    "flags",
    [
        ("--k", 0),
        ("--num-iter", -1),
        ("--beta", "nan"),
        ("--alpha", "x"),
        ("--phase", 3),
        ("--exp",),
    ],
)
def test_refuses_wrong_flags(tmp_path, flags):
    assert_refused(run(COMMAND, *flags), flags[0])


def test_a_failed_write_leaves_the_old_files(tmp_path, case, monkeypatch, capsys):
    folder = write_stage(tmp_path, "v107", case)
    for name in ("v107_iso.h5", "v107_iso.csv"):
        (folder / name).write_text("old")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full_disk)
    assert postprocess.main(["--exp", str(tmp_path)]) == 2
    assert "postprocess.py: error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert {path.read_text() for path in folder.glob("v107_iso*")} == {"old"}
    assert not list(folder.glob(".*"))
