"""Micro average precision, recall at 90% precision, the globally nearest pairs, and the whole
command.
"""

import csv
import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_metrics
import postprocess
from common import evaluation, search
from conftest import GOLDEN, ROOT, assert_refused, run

COMMAND = ROOT / "scripts" / "eval_metrics.py"
EXPECTED = json.loads((GOLDEN / "eval_expected.json").read_text())
DESCRIPTORS = [name for name in EXPECTED if name.endswith(".h5")]


def write_h5(path, query, reference, query_ids=None, reference_ids=None):
    with h5py.File(path, "w") as file:
        file["query"], file["reference"] = query, reference
        file["query_ids"] = (
            np.array([b"Q%05d" % i for i in range(len(query))]) if query_ids is None else query_ids
        )
        file["reference_ids"] = (
            np.array([b"R%06d" % i for i in range(len(reference))])
            if reference_ids is None
            else reference_ids
        )
    return path


def write_text(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def points(count, dim=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def brute_force(query, reference, count):
    distance = (
        ((query[:, None].astype(np.float64) - reference) ** 2).sum(-1).astype(np.float32).ravel()
    )
    best = np.sort(np.argsort(distance, kind="stable")[:count])
    return best // len(reference), best % len(reference), -distance[best]


def assert_brute_force(query, reference, count):
    table = evaluation.match(
        query, reference, np.arange(len(query)), np.arange(len(reference)), count
    )
    rows, columns, scores = brute_force(query, reference, count)
    np.testing.assert_array_equal(table["query_id"].astype(int), rows)
    np.testing.assert_array_equal(table["reference_id"].astype(int), columns)
    assert table["score"].dtype == np.float32
    np.testing.assert_allclose(table["score"], scores, rtol=2e-7, atol=0)


# ---- golden values ----


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_metrics(name):
    expected = EXPECTED[name]
    result = eval_metrics.evaluate(GOLDEN / name, GOLDEN / expected["ground_truth"])
    assert list(result) == ["average_precision", "recall_p90"]
    assert result == pytest.approx({key: expected[key] for key in result}, abs=1e-9, rel=0)


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_command_on_golden_descriptors(tmp_path, name):
    expected = EXPECTED[name]
    submission = shutil.copy(GOLDEN / name, tmp_path)
    matches = write_text(tmp_path / name.replace(".h5", ".csv"), "the matching-track submission")
    result = run(COMMAND, submission, GOLDEN / expected["ground_truth"])
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    assert scores == pytest.approx({key: expected[key] for key in scores}, abs=1e-9, rel=0)
    with (
        (tmp_path / expected["candidates"]).open() as actual,
        (GOLDEN / expected["candidates"]).open() as reference,
    ):
        actual, reference = list(csv.reader(actual)), list(csv.reader(reference))
    assert len(actual) == expected["num_candidates"] + 1
    assert [row[:2] for row in actual] == [row[:2] for row in reference]
    np.testing.assert_allclose(
        [float(row[2]) for row in actual[1:]],
        [float(row[2]) for row in reference[1:]],
        rtol=0,
        atol=5e-6,
    )
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
    assert np.bincount(evaluation.nearest_pairs(query, reference, 400)[1], minlength=40)[17] > 350


def test_match_where_distances_tie():
    reference = points(400, seed=1)
    reference[100:300] = reference[5]
    query = np.concatenate([points(20), np.repeat(reference[5:6], 10, axis=0)])
    assert_brute_force(query, reference, 300)  # 2,000 pairs at distance 0: the first queries win
    assert_brute_force(query, reference, 2500)
    assert_brute_force(np.ones((7, 4), np.float32), np.ones((50, 4), np.float32), 70)


def test_match_where_lengths_differ_widely():
    reference = points(500, seed=1) * np.logspace(-3, 4, 500, dtype=np.float32)[:, None]
    assert_brute_force(
        points(30) * np.logspace(-2, 2, 30, dtype=np.float32)[:, None], reference, 300
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 60)),
    count=st.integers(1, 200),
    levels=st.sampled_from([2, 5, 1000]),
)
def test_match_is_brute_force_on_grids_full_of_ties(seed, shape, count, levels):
    rng = np.random.default_rng(seed)
    query, reference = (rng.integers(0, levels, (rows, 3)).astype(np.float32) for rows in shape)
    assert_brute_force(query, reference, count)


def test_block_sizes_give_the_same_answer(monkeypatch):
    query, reference = points(150), points(800, seed=1)
    query[:50] *= 0.2
    whole = evaluation.nearest_pairs(query, reference, 1500)
    for block, pairs in ((7, 2**20), (4096, 1), (64, 500)):
        monkeypatch.setattr(evaluation, "BLOCK", block)
        monkeypatch.setattr(evaluation, "PAIRS", pairs)
        for expected, actual in zip(
            whole, evaluation.nearest_pairs(query, reference, 1500), strict=True
        ):
            np.testing.assert_array_equal(actual, expected)


def test_search_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(evaluation, "PAIRS", 1000)
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
    text = evaluation.match(query, reference, list("abcde"), list("stuvwxyz"), 12)
    raw = evaluation.match(
        query, reference, np.array([*"abcde"], "S9"), np.array([*"stuvwxyz"], "S9"), 12
    )
    pd.testing.assert_frame_equal(text, raw)
    assert list(text) == ["query_id", "reference_id", "score"] and isinstance(
        text["query_id"][0], str
    )
    for bad in ((query, reference, 0), (query[:0], reference, 3), (query, reference[:, 1:], 3)):
        with pytest.raises(postprocess.InputError):
            evaluation.match(*bad[:2], [], [], bad[2])


# ---- properties of the metrics ----


def table(rows):
    return pd.DataFrame(rows, columns=["query_id", "reference_id", "score"])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 60))
def test_metric_properties(seed, rows):
    rng = np.random.default_rng(seed)
    truth = pd.DataFrame(
        {
            "query_id": [f"q{i}" for i in range(20)],
            "reference_id": [f"r{i}" for i in range(12)] + [""] * 8,
        }
    )
    pairs = rng.choice(400, rows, replace=False)
    score = rng.permutation(rows) / 7.0
    candidates = table(
        {"query_id": [f"q{p // 20}" for p in pairs], "reference_id": [f"r{p % 20}" for p in pairs]}
    )
    candidates["score"] = score
    metrics = eval_metrics.micro_metrics(candidates, truth)
    assert 0 <= metrics["average_precision"] <= 1 and 0 <= metrics["recall_p90"] <= 1
    assert metrics == eval_metrics.micro_metrics(
        candidates.sample(frac=1, random_state=seed), truth
    )
    assert metrics == eval_metrics.micro_metrics(candidates.assign(score=np.exp(score)), truth)
    tied = eval_metrics.micro_metrics(candidates.assign(score=0.0), truth)
    assert tied["average_precision"] <= metrics["average_precision"] + 1e-12
    worse = pd.concat([candidates, table([("q19", "r0", -1.0)])])
    assert eval_metrics.micro_metrics(worse, truth)["average_precision"] == pytest.approx(
        metrics["average_precision"]
    )
    perfect = truth[truth["reference_id"] != ""].assign(score=1.0)
    assert eval_metrics.micro_metrics(perfect, truth) == pytest.approx(
        {"average_precision": 1.0, "recall_p90": 1.0}
    )


def test_metrics_against_a_plain_loop():
    rng = np.random.default_rng(3)
    truth = pd.DataFrame(
        {"query_id": [f"q{i}" for i in range(30)], "reference_id": [f"r{i % 9}" for i in range(30)]}
    )
    for _ in range(20):
        query, reference = rng.integers(0, 30, 200), rng.integers(0, 12, 200)
        rows = [
            (f"q{q}", f"r{r}", float(s))
            for q, r, s in zip(query, reference, rng.integers(0, 40, 200), strict=True)
        ]
        positives = set(truth.itertuples(index=False, name=None))
        found, precision_sum, recall = 0, 0.0, 0.0
        ranked = sorted(rows, key=lambda row: (-row[2], (row[0], row[1]) in positives))
        for rank, (q, r, _score) in enumerate(ranked, start=1):
            if (q, r) in positives:
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
    errors = [line for line in captured.err.splitlines() if "error:" in line]
    assert (
        captured.out == "" and len(errors) == 1 and errors[0].startswith("eval_metrics.py: error: ")
    ), captured
    for word in words:
        assert str(word) in errors[0], errors[0]
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
    refuse(
        capsys, write_text(tmp_path / "s.csv", *lines), truth, words=[tmp_path / "s.csv", *words]
    )


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
    refuse(
        capsys,
        submission,
        write_text(tmp_path / "gt.csv", *lines),
        words=[tmp_path / "gt.csv", *words],
    )


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"query": np.ones((5, 16), np.float32), "reference": np.ones((9, 16), np.float32)},
            ["all 14", "collapsed"],
        ),
        (
            {"query": np.zeros((5, 16), np.float32), "reference": np.zeros((9, 16), np.float32)},
            ["all 14", "collapsed"],
        ),
        ({"query": points(5)[:, 1:]}, ["dimensions", "15 and 16"]),
        ({"query": points(5) * np.nan}, ["'query'", "NaN", "row 0"]),
        ({"reference": points(9) + np.inf}, ["'reference'", "infinity"]),
        ({"query": points(0)}, ["'query'", "empty"]),
        ({"reference_ids": np.full(9, b"R000001")}, ["R000001", "more than once"]),
    ],
)
def test_refuses_wrong_descriptors(tmp_path, truth, capsys, arrays, words):
    submission = write_h5(
        tmp_path / "s.h5", **({"query": points(5), "reference": points(9)} | arrays)
    )
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
    background = np.sort(query.astype(float) @ train.T.astype(float), axis=1)[:, ::-1][
        :, first : last + 1
    ]
    return query.astype(float) @ reference.T.astype(float) - beta * background.mean(
        axis=1, keepdims=True
    )


@pytest.mark.parametrize(
    ("beta", "first", "last", "trains"),
    [(1, 0, 2, 30), (0.5, 1, 1, 30), (1, 0, 9, 4), (0, 0, 0, 1)],
)
def test_normalized_candidates_are_the_best_of_all_pairs(beta, first, last, trains):
    query, reference, train = (unit(points(n, seed=n)) for n in (23, 57, trains))
    offset = eval_metrics.normalization_offset(query, train, beta, (first, last))
    table = evaluation.match(query, reference, np.arange(23), np.arange(57), 100, offset=offset)
    expected = normalized_cosines(query, reference, train, beta, first, last)
    best = np.sort(np.argsort(-expected, axis=None)[:100])
    found = table["query_id"].astype(int) * 57 + table["reference_id"].astype(int)
    np.testing.assert_array_equal(found, best)
    np.testing.assert_allclose(1 + table["score"] / 2, expected.ravel()[best], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0, 100), count=st.integers(1, 80))
def test_any_offset_is_exact_with_ties(seed, size, count):
    rng = np.random.default_rng(seed)
    query, reference = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (7, 11))
    offset = (size * rng.standard_normal(7)).astype(np.float32)
    distance, rows, columns = evaluation.nearest_pairs(query, reference, count, offset=offset)
    every = ((query[:, None] - reference) ** 2).sum(-1) + offset[:, None]
    best = np.argsort(every, axis=None, kind="stable")[:count]
    np.testing.assert_array_equal(distance, every.ravel()[best])
    np.testing.assert_array_equal(rows * 11 + columns, best)


def test_command_with_score_normalization(tmp_path):
    """Descriptors count at unit length, and rows of zeros not at all; what was written without it
    stays.
    """
    query, reference, train = (points(n, dim=8, seed=n) for n in (5, 9, 6))
    query[4] = reference[7] = train[0] = 0
    path = write_h5(tmp_path / "a.h5", 3 * query, reference)
    np.save(tmp_path / "train.npy", train)
    truth = write_text(
        tmp_path / "truth.csv", "query_id,reference_id", *(f"Q{i:05},R{i:06}" for i in range(5))
    )
    assert run(COMMAND, path, truth).returncode == 0
    before = (tmp_path / "a_candidates.csv").read_bytes()
    result = run(COMMAND, "--score-normalization", tmp_path / "train.npy", path, truth)
    assert result.returncode == 0, result.stderr
    expected = normalized_cosines(
        unit(query[:4]), unit(np.delete(reference, 7, 0)), unit(train[1:]), 1, 0, 2
    )
    written = pd.read_csv(tmp_path / "a_normalized_candidates.csv")
    np.testing.assert_allclose(1 + written["score"] / 2, expected.ravel(), atol=1e-6)
    assert (tmp_path / "a_candidates.csv").read_bytes() == before
    order = np.argsort(-expected.ravel())
    right = np.array([[r == q for r in (0, 1, 2, 3, 4, 5, 6, 8)] for q in range(4)]).ravel()[order]
    precision = (np.cumsum(right) / np.arange(1, 33))[right].sum() / 5
    assert json.loads(result.stdout)["average_precision"] == pytest.approx(precision)


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
