"""Micro average precision, recall at 90% precision, the globally nearest pairs, and the whole
command.
"""

import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_metrics
from common import errors, evaluation, search
from conftest import GOLDEN, ROOT, assert_refused, run

COMMAND = ROOT / "scripts" / "eval_metrics.py"
EXPECTED = json.loads((GOLDEN / "eval_expected.json").read_text())
DESCRIPTORS = [name for name in EXPECTED if name.endswith(".h5")]
ONES = np.ones((9, 16), np.float32)


def write_h5(path, query, reference, suffix="", reference_ids=None):
    """Write a submission; `suffix` is appended to the ids."""
    if reference_ids is None:
        reference_ids = [f"R{i:06}{suffix}" for i in range(len(reference))]
    with h5py.File(path, "w") as file:
        file["query"] = query
        file["reference"] = reference
        file["query_ids"] = np.array([f"Q{i:05}{suffix}" for i in range(len(query))], "S")
        file["reference_ids"] = np.array(reference_ids, "S")
    return path


def write_text(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def points(count, dim=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def brute_force(query, reference, count):
    difference = query[:, None].astype(np.float64) - reference
    distance = (difference**2).sum(-1).astype(np.float32).ravel()
    best = np.sort(np.argsort(distance, kind="stable")[:count])
    queries, references = np.divmod(best, len(reference))
    return queries, references, -distance[best]


def assert_brute_force(query, reference, count):
    query_ids = np.arange(len(query))
    reference_ids = np.arange(len(reference))
    table = evaluation.match(query, reference, query_ids, reference_ids, count)
    rows, columns, scores = brute_force(query, reference, count)
    np.testing.assert_array_equal(table["query_id"].astype(int), rows)
    np.testing.assert_array_equal(table["reference_id"].astype(int), columns)
    assert table["score"].dtype == np.float32
    np.testing.assert_allclose(table["score"], scores, rtol=2e-7, atol=0)


# ---- golden values ----


def assert_golden(metrics, expected):
    assert list(metrics) == ["average_precision", "recall_p90"]
    for name, value in metrics.items():
        assert value == pytest.approx(expected[name], abs=1e-9, rel=0)


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_metrics(name):
    expected = EXPECTED[name]
    result = eval_metrics.evaluate(GOLDEN / name, GOLDEN / expected["ground_truth"])
    assert_golden(result, expected)


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_command_on_golden_descriptors(tmp_path, name):
    expected = EXPECTED[name]
    submission = shutil.copy(GOLDEN / name, tmp_path)
    matches = write_text(tmp_path / name.replace(".h5", ".csv"), "the matching-track submission")
    result = run(COMMAND, submission, GOLDEN / expected["ground_truth"])
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    assert_golden(scores, expected)
    actual = pd.read_csv(tmp_path / expected["candidates"])
    reference = pd.read_csv(GOLDEN / expected["candidates"])
    assert len(actual) == expected["num_candidates"]
    pd.testing.assert_frame_equal(actual, reference, rtol=0, atol=5e-6)
    assert matches.read_text() == "the matching-track submission\n"
    assert len(list(tmp_path.iterdir())) == 3
    again = run(COMMAND, tmp_path / expected["candidates"], GOLDEN / expected["ground_truth"])
    assert json.loads(again.stdout) == scores


def test_command_on_matches(tmp_path, capsys):
    name = "eval_repeated_pairs.csv"
    submission, truth = str(GOLDEN / name), str(GOLDEN / EXPECTED[name]["ground_truth"])
    result = run(COMMAND, submission, truth, "--matching", "--ngpu", 0)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["average_precision"] == pytest.approx(
        1.0179582499912272, abs=1e-9
    )
    assert "warning" in result.stderr and "7 rows repeat a pair" in result.stderr
    for flags in ((), ("-m",), ("--ngpu", "-1"), ("--ngpu", "8")):
        assert eval_metrics.main([submission, truth, *flags]) == 0
        assert capsys.readouterr().out == result.stdout


def test_flags_say_the_track(tmp_path, capsys):
    name = "eval_repeated_pairs.csv"
    matches, truth = GOLDEN / name, GOLDEN / EXPECTED[name]["ground_truth"]
    descriptors = write_h5(tmp_path / "x.h5", points(9), points(9))
    other = shutil.copy(matches, tmp_path / "matches.txt")
    refuse(capsys, matches, truth, "-d", words=[matches, "--matching"])
    refuse(capsys, matches, truth, "--descriptor", words=[matches, "--matching"])
    refuse(capsys, descriptors, truth, "-m", words=["x.h5", "--descriptor"])
    refuse(capsys, other, truth, words=["matches.txt", "--matching"])
    assert eval_metrics.main([str(other), str(truth), "-m"]) == 0
    assert eval_metrics.main([str(descriptors), str(truth), "-d"]) == 0
    assert_refused(run(COMMAND, matches, truth, "-m", "-d"), "not allowed")
    assert_refused(run(COMMAND, matches, truth, "--ngpu", "all"), "--ngpu")


# ---- the globally nearest pairs ----


@pytest.mark.parametrize("count", [1, 37, 600, 60 * 300, 10**6])
def test_match_is_brute_force(count):
    assert_brute_force(points(60), points(300, seed=1), count)


def test_match_where_one_query_owns_most_pairs():
    reference = points(900, seed=1)
    query = 3 * points(40)
    query[17] = 0
    assert_brute_force(query, reference, 400)
    _, queries, _ = evaluation.nearest_pairs(query, reference, 400)
    assert np.count_nonzero(queries == 17) > 350


def test_match_where_distances_tie():
    reference = points(400, seed=1)
    reference[100:300] = reference[5]
    query = points(30)
    query[20:] = reference[5]
    assert_brute_force(query, reference, 300)  # 2,000 pairs at distance 0: the first queries win
    assert_brute_force(query, reference, 2500)


def test_match_where_all_distances_tie():
    ones = np.ones((50, 4), np.float32)
    assert_brute_force(ones[:7], ones, 70)


def test_match_where_lengths_differ_widely():
    query = points(30)
    reference = points(500, seed=1)
    query *= np.logspace(-2, 2, 30, dtype=np.float32)[:, None]
    reference *= np.logspace(-3, 4, 500, dtype=np.float32)[:, None]
    assert_brute_force(query, reference, 300)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 60)),
    count=st.integers(1, 200),
    levels=st.sampled_from([2, 5, 1000]),
)
def test_match_is_brute_force_on_grids_full_of_ties(seed, shape, count, levels):
    rng = np.random.default_rng(seed)
    query = rng.integers(0, levels, (shape[0], 3)).astype(np.float32)
    reference = rng.integers(0, levels, (shape[1], 3)).astype(np.float32)
    assert_brute_force(query, reference, count)


def test_block_sizes_give_the_same_answer(monkeypatch):
    query, reference = points(150), points(800, seed=1)
    query[:50] *= 0.2
    whole = evaluation.nearest_pairs(query, reference, 1500)
    for block, pairs in ((7, 2**20), (4096, 1), (64, 500)):
        monkeypatch.setattr(evaluation, "BLOCK", block)
        monkeypatch.setattr(evaluation, "MAX_SEARCH_RESULTS", pairs)
        in_blocks = evaluation.nearest_pairs(query, reference, 1500)
        for expected, actual in zip(whole, in_blocks, strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_search_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_SEARCH_RESULTS", 1000)
    sizes = []
    flat_search = search.flat_search

    def counting(*args):
        find = flat_search(*args)
        return lambda queries, k: sizes.append(len(queries) * k) or find(queries, k)

    monkeypatch.setattr(evaluation, "flat_search", counting)
    query = 3 * points(200)
    query[:20] = 0
    evaluation.nearest_pairs(query, points(900, seed=1), 2000)
    assert len(sizes) > 10 and max(sizes) <= 1000


def test_match_leaves_its_inputs_alone_and_takes_any_ids():
    query, reference = points(5), points(8, seed=1)
    query.flags.writeable = reference.flags.writeable = False
    query_ids = list("abcde")
    reference_ids = list("stuvwxyz")
    text = eval_metrics.match(query, reference, query_ids, reference_ids, 12)
    query_ids = np.array(query_ids, "S9")
    reference_ids = np.array(reference_ids, "S9")
    raw = eval_metrics.match(query, reference, query_ids, reference_ids, 12)
    pd.testing.assert_frame_equal(text, raw)
    assert list(text) == ["query_id", "reference_id", "score"]
    assert isinstance(text["query_id"][0], str)


@pytest.mark.parametrize(("queries", "dimensions", "count"), [(5, 16, 0), (0, 16, 3), (5, 15, 3)])
def test_match_refuses_shapes_that_make_no_sense(queries, dimensions, count):
    with pytest.raises(errors.InputError):
        evaluation.match(points(queries), points(8, dimensions), [], [], count)


# ---- properties of the metrics ----


def table(rows):
    return pd.DataFrame(rows, columns=["query_id", "reference_id", "score"])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 60))
def test_metric_properties(seed, rows):
    rng = np.random.default_rng(seed)
    truth = pd.DataFrame({"query_id": [f"q{i}" for i in range(20)]})
    truth["reference_id"] = [f"r{i}" if i < 12 else "" for i in range(20)]
    pairs = rng.choice(400, rows, replace=False)
    score = rng.permutation(rows) / 7.0
    candidates = pd.DataFrame({"query_id": [f"q{pair // 20}" for pair in pairs]})
    candidates["reference_id"] = [f"r{pair % 20}" for pair in pairs]
    candidates["score"] = score
    metrics = eval_metrics.micro_metrics(candidates, truth)
    assert 0 <= metrics["average_precision"] <= 1 and 0 <= metrics["recall_p90"] <= 1
    shuffled = candidates.sample(frac=1, random_state=seed)
    assert metrics == eval_metrics.micro_metrics(shuffled, truth)
    transformed = candidates.assign(score=np.exp(score))
    assert metrics == eval_metrics.micro_metrics(transformed, truth)
    tied = eval_metrics.micro_metrics(candidates.assign(score=0.0), truth)
    assert tied["average_precision"] <= metrics["average_precision"] + 1e-12
    with_wrong_last = pd.concat([candidates, table([("q19", "r0", -1.0)])])
    same = eval_metrics.micro_metrics(with_wrong_last, truth)
    assert same["average_precision"] == pytest.approx(metrics["average_precision"])
    perfect = truth[truth["reference_id"] != ""].assign(score=1.0)
    best = eval_metrics.micro_metrics(perfect, truth)
    assert best == pytest.approx({"average_precision": 1.0, "recall_p90": 1.0})


def test_metrics_against_a_plain_loop():
    rng = np.random.default_rng(3)
    truth = pd.DataFrame({"query_id": [f"q{i}" for i in range(30)]})
    truth["reference_id"] = [f"r{i % 9}" for i in range(30)]
    positives = set(truth.itertuples(index=False, name=None))
    for _ in range(20):
        queries = rng.integers(0, 30, 200)
        references = rng.integers(0, 12, 200)
        scores = rng.integers(0, 40, 200)
        rows = []
        for query, reference, score in zip(queries, references, scores, strict=True):
            rows.append((f"q{query}", f"r{reference}", float(score)))
        found = 0
        precision_sum = 0.0
        recall = 0.0
        ranked = sorted(rows, key=lambda row: (-row[2], row[:2] in positives))
        for rank, row in enumerate(ranked, start=1):
            if row[:2] in positives:
                found += 1
                precision_sum += found / rank
            if found / rank >= 0.9:
                recall = max(recall, found / 30)
        expected = {"average_precision": precision_sum / 30, "recall_p90": recall}
        assert eval_metrics.micro_metrics(table(rows), truth) == pytest.approx(expected, abs=1e-12)


def test_close_scores_in_a_csv_stay_apart(tmp_path):
    truth = write_text(tmp_path / "gt.csv", "query_id,reference_id", "Q00000,R000000")
    rows = [
        "query_id,reference_id,score",
        "Q00000,R000001,0.30000000000000004",
        "Q00000,R000000,0.3000000000000001",
    ]
    assert (
        eval_metrics.evaluate(write_text(tmp_path / "s.csv", *rows), truth)["average_precision"]
        == 1.0
    )


def test_csv_with_bom_crlf_and_more_columns(tmp_path):
    truth, matches = tmp_path / "gt.csv", tmp_path / "s.csv"
    truth.write_bytes(b"\xef\xbb\xbfquery_id,note,reference_id\r\nNA,x,R000000\r\nQ00001,x\r\n")
    matches.write_bytes(b"\xef\xbb\xbfscore,reference_id,query_id\r\n0.5,R000000,NA\r\n")
    assert eval_metrics.evaluate(matches, truth) == {"average_precision": 1.0, "recall_p90": 1.0}


# ---- wrong input ----


@pytest.fixture
def truth(tmp_path):
    return write_text(
        tmp_path / "gt.csv", "query_id,reference_id", "Q00000,R000000", "Q00001,R000003", "Q00002,"
    )


def refuse(capsys, submission, truth, *flags, words):
    before = {path: path.stat().st_mtime_ns for path in submission.parent.iterdir()}
    assert eval_metrics.main([str(submission), str(truth), *flags]) == 2
    captured = capsys.readouterr()
    (error,) = (line for line in captured.err.splitlines() if "error:" in line)
    assert captured.out == "" and error.startswith("eval_metrics.py: error: ")
    for word in words:
        assert str(word) in error, error
    assert {path: path.stat().st_mtime_ns for path in submission.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([""], ["not a readable csv"]),
        (["query_id,reference_id,score"], ["no rows"]),
        (["query_id,reference,score", "Q00000,R000000,1"], ["no column reference_id"]),
        (
            ["query_id,reference_id,score", "Q00000,R000000,1", "Q00001,R000000,high"],
            ["'high'", "line 3"],
        ),
        (["query_id,reference_id,score", "Q00000,R000000,nan"], ["'nan'", "line 2"]),
        (["query_id,reference_id,score", "Q00000,R000000,inf"], ["'inf'", "line 2"]),
        (["query_id,reference_id,score", "Q00000,R000000"], ["''", "line 2"]),
        (["query_id,reference_id,score", ",R000000,1"], ["no query_id", "line 2"]),
        (["query_id,reference_id,score", "Q77777,R000000,1"], ["none of its queries", "Q77777"]),
    ],
)
def test_refuses_wrong_matches(tmp_path, truth, capsys, lines, words):
    submission = write_text(tmp_path / "s.csv", *lines)
    refuse(capsys, submission, truth, words=[submission, *words])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([""], ["not a readable csv"]),
        (["query_id,reference_id"], ["no rows"]),
        (["id,reference_id", "Q00000,R000000"], ["no column query_id"]),
        (["query_id,reference_id", "Q00000,", "Q00001,"], ["no query has a reference"]),
        (["query_id,reference_id", "Q00000,R000000", ",R000000"], ["no query_id", "line 3"]),
        (["query_id,reference_id", "Q77777,R000000"], ["none of its queries"]),
    ],
)
def test_refuses_wrong_ground_truth(tmp_path, capsys, lines, words):
    submission = write_h5(tmp_path / "s.h5", points(5), points(9))
    truth = write_text(tmp_path / "gt.csv", *lines)
    refuse(capsys, submission, truth, words=[truth, *words])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"query": ONES[:5], "reference": ONES}, ["all 14", "collapsed"]),
        ({"query": 0 * ONES[:5], "reference": 0 * ONES}, ["all 14", "collapsed"]),
        ({"query": points(5)[:, 1:]}, ["dimensions", "15 and 16"]),
        ({"query": points(5) * np.nan}, ["'query'", "NaN", "row 0"]),
        ({"reference": points(9) + np.inf}, ["'reference'", "infinity"]),
        ({"query": points(0)}, ["'query'", "empty"]),
        ({"reference_ids": np.full(9, b"R000001")}, ["R000001", "more than once"]),
    ],
)
def test_refuses_wrong_descriptors(tmp_path, truth, capsys, arrays, words):
    arrays = {"query": points(5), "reference": points(9)} | arrays
    submission = write_h5(tmp_path / "s.h5", **arrays)
    refuse(capsys, submission, truth, words=[submission, *words])


def test_refuses_files_that_are_not_there_or_not_what_they_say(tmp_path, truth):
    assert_refused(run(COMMAND, tmp_path / "none.h5", truth), "none.h5", "no such file")
    assert_refused(run(COMMAND, tmp_path / "none.csv", truth), "none.csv", "no such file")
    submission = write_h5(tmp_path / "s.h5", points(5), points(9))
    assert_refused(run(COMMAND, submission, tmp_path / "none.csv"), "none.csv", "no such file")
    assert_refused(run(COMMAND, submission, submission), "s.h5", "not a readable csv")
    assert_refused(
        run(COMMAND, shutil.copy(truth, tmp_path / "text.h5"), truth),
        "text.h5",
        "not a readable HDF5",
    )
    assert_refused(run(COMMAND, submission), "GROUND_TRUTH")


@pytest.mark.parametrize("track", ["descriptor", "matching"])
@pytest.mark.parametrize("wrong", ["submission", "ground truth"])
def test_ids_with_a_file_suffix_are_named(tmp_path, capsys, track, wrong):
    submission_suffix, truth_suffix = (".jpg", "") if wrong == "submission" else ("", ".jpg")
    row = f"Q00000{truth_suffix},R000000{truth_suffix}"
    truth = write_text(tmp_path / "gt.csv", "query_id,reference_id", row)
    if track == "descriptor":
        submission = write_h5(tmp_path / "s.h5", points(5), points(9), submission_suffix)
    else:
        row = f"Q00000{submission_suffix},R000000{submission_suffix},1"
        submission = write_text(tmp_path / "s.csv", "query_id,reference_id,score", row)
    remedy_in = submission if wrong == "submission" else truth
    remedy = f"ids must not have a file suffix: remove it in {remedy_in}"
    refuse(capsys, submission, truth, words=[f"Q00000{submission_suffix}", remedy])


def test_a_suffix_is_blamed_only_where_ids_agree_without_it(tmp_path, capsys):
    truth = write_text(tmp_path / "gt.csv", "query_id,reference_id", "Q77777,R000000")
    submission = write_h5(tmp_path / "s.h5", points(5), points(9), ".jpg")
    refuse(capsys, submission, truth, words=["Q00000.jpg", "same phase"])


def test_missing_references_and_unlisted_queries_are_told(tmp_path, capsys):
    query, reference = points(5), points(9, seed=1)
    reference[0] = query[0]
    truth = write_text(
        tmp_path / "gt.csv", "query_id,reference_id", "Q00000,R000000", "Q00001,R000099"
    )
    submission = write_h5(tmp_path / "s.h5", query, reference)
    assert eval_metrics.main([str(submission), str(truth)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"average_precision": 0.5, "recall_p90": 0.5}
    assert "3 queries are left out" in captured.err and "R000099" in captured.err


def test_one_query_and_its_only_copy_is_no_collapse(tmp_path, truth):
    same = points(1)
    submission = write_h5(tmp_path / "s.h5", same, same)
    assert eval_metrics.evaluate(submission, truth) == {"average_precision": 0.5, "recall_p90": 0.5}


# ---- score normalization ----


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def normalized_cosines(query, reference, train, beta, first, last):
    """By the definition: s(q, r) - beta x mean of s(q, b_n) over the n-th nearest backgrounds, n =
    first..last.
    """
    query = query.astype(float)
    cosines = query @ reference.T.astype(float)
    background = np.sort(query @ train.T.astype(float), axis=1)[:, ::-1]
    nearest = background[:, first : last + 1]
    return cosines - beta * nearest.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("beta", "first", "last", "trains"),
    [(1, 0, 2, 30), (0.5, 1, 1, 30), (1, 0, 9, 4), (0, 0, 0, 1)],
)
def test_normalized_candidates_are_the_best_of_all_pairs(beta, first, last, trains):
    query = unit(points(23, seed=23))
    reference = unit(points(57, seed=57))
    train = unit(points(trains, seed=trains))
    offset = eval_metrics.normalization_offset(query, train, beta, (first, last))
    query_ids = np.arange(23)
    reference_ids = np.arange(57)
    table = evaluation.match(query, reference, query_ids, reference_ids, 100, offset=offset)
    expected = normalized_cosines(query, reference, train, beta, first, last)
    best = np.sort(np.argsort(-expected, axis=None)[:100])
    found = table["query_id"].astype(int) * 57 + table["reference_id"].astype(int)
    np.testing.assert_array_equal(found, best)
    np.testing.assert_allclose(1 + table["score"] / 2, expected.ravel()[best], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0, 100), count=st.integers(1, 80))
def test_any_offset_is_exact_with_ties(seed, size, count):
    rng = np.random.default_rng(seed)
    query = rng.integers(-1, 2, (7, 3)).astype(np.float32)
    reference = rng.integers(-1, 2, (11, 3)).astype(np.float32)
    offset = (size * rng.standard_normal(7)).astype(np.float32)
    distance, rows, columns = evaluation.nearest_pairs(query, reference, count, offset=offset)
    difference = query[:, None] - reference
    every = (difference**2).sum(-1) + offset[:, None]
    best = np.argsort(every, axis=None, kind="stable")[:count]
    np.testing.assert_array_equal(distance, every.ravel()[best])
    np.testing.assert_array_equal(rows * 11 + columns, best)


def test_command_with_score_normalization(tmp_path):
    """Descriptors count at unit length, and rows of zeros not at all; what was written without it
    stays.
    """
    query = points(5, dim=8, seed=5)
    reference = points(9, dim=8, seed=9)
    train = points(6, dim=8, seed=6)
    query[4] = reference[7] = train[0] = 0
    path = write_h5(tmp_path / "a.h5", 3 * query, reference)
    np.save(tmp_path / "train.npy", train)
    pairs = [f"Q{i:05},R{i:06}" for i in range(5)]
    truth = write_text(tmp_path / "truth.csv", "query_id,reference_id", *pairs)
    assert run(COMMAND, path, truth).returncode == 0
    before = (tmp_path / "a_candidates.csv").read_bytes()
    result = run(COMMAND, "--score-normalization", tmp_path / "train.npy", path, truth)
    assert result.returncode == 0, result.stderr
    queries = unit(query[:4])
    references = unit(np.delete(reference, 7, axis=0))
    expected = normalized_cosines(queries, references, unit(train[1:]), 1, 0, 2)
    written = pd.read_csv(tmp_path / "a_normalized_candidates.csv")
    np.testing.assert_allclose(1 + written["score"] / 2, expected.ravel(), atol=1e-6)
    assert (tmp_path / "a_candidates.csv").read_bytes() == before
    order = np.argsort(-expected.ravel())
    right = np.eye(4, 8, dtype=bool).ravel()[order]
    precision = np.cumsum(right) / np.arange(1, 33)
    average_precision = precision[right].sum() / 5
    assert json.loads(result.stdout)["average_precision"] == pytest.approx(average_precision)


def test_wrong_score_normalization(tmp_path):
    path = write_h5(tmp_path / "a.h5", points(3), points(4))
    truth = write_text(tmp_path / "truth.csv", "query_id,reference_id", "Q00000,R000001")
    np.save(tmp_path / "train.npy", points(3))
    np.save(tmp_path / "other.npy", points(3, dim=8))
    matches = write_text(tmp_path / "a.csv", "query_id,reference_id,score", "Q00000,R000001,1")
    flag, train = "--score-normalization", tmp_path / "train.npy"
    assert_refused(run(COMMAND, flag, train, matches, truth), "a.csv", flag)
    assert_refused(run(COMMAND, flag, tmp_path / "none.npy", path, truth), "none.npy")
    assert_refused(run(COMMAND, flag, tmp_path / "other.npy", path, truth), "other.npy", "8", "16")
    assert_refused(
        run(COMMAND, flag, train, "--normalization-neighbors", 3, 4, path, truth),
        "3 4",
        "3 training",
    )
    assert_refused(
        run(COMMAND, flag, train, "--normalization-neighbors", 2, 1, path, truth), "FIRST"
    )
    assert not list(tmp_path.glob("*candidates.csv"))
