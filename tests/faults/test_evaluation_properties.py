"""What must hold of micro average precision and recall at 90% precision, whatever the
candidates.
"""

import tempfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_metrics

MONOTONE = {
    "affine": lambda score: 0.25 * score - 7,
    "cubed": lambda score: score**3,
    "exponential": lambda score: np.exp(score / 50),
    "arctangent": lambda score: np.arctan(score / 50),
    "rank": lambda score: np.argsort(np.argsort(score)),
}
pairs = st.tuples(st.integers(0, 11), st.integers(0, 11))


def table(found, **columns):
    """Pairs of numbers as a table of ids."""
    frame = {
        "query_id": [f"Q{q:05}" for q, _ in found],
        "reference_id": [f"R{r:06}" for _, r in found],
    }
    return pd.DataFrame(frame | columns)


@st.composite
def cases(draw):
    """(candidates, truth): distinct pairs whose scores all differ, and the pairs that are right, at
    least one.
    """
    found = draw(st.lists(pairs, min_size=1, max_size=40, unique=True))
    count = len(found)
    scores = st.lists(st.integers(-300, 300), min_size=count, max_size=count, unique=True)
    candidates = table(found, score=np.array(draw(scores), float))
    lucky = draw(st.lists(st.sampled_from(found), max_size=20))
    missed = draw(st.lists(pairs, min_size=0 if lucky else 1, max_size=10))
    right = dict.fromkeys(lucky + missed)
    return candidates, table(list(right))


def is_right(candidates, truth):
    columns = ["query_id", "reference_id"]
    pairs = pd.MultiIndex.from_frame(candidates[columns])
    return pairs.isin(pd.MultiIndex.from_frame(truth[columns]))


@settings(max_examples=100, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_rows_does_not_matter_when_scores_differ(case, seed):
    candidates, truth = case
    metrics = eval_metrics.micro_metrics(candidates, truth)
    assert 0 <= metrics["average_precision"] <= 1 + 1e-12
    assert 0 <= metrics["recall_p90"] <= 1
    candidates = candidates.sample(frac=1, random_state=seed)
    truth = truth.sample(frac=1, random_state=seed)
    assert eval_metrics.micro_metrics(candidates, truth) == metrics


@settings(max_examples=100, deadline=None)
@given(case=cases(), name=st.sampled_from(list(MONOTONE)))
def test_monotone_transforms_change_nothing(case, name):
    candidates, truth = case
    score = MONOTONE[name](candidates["score"].to_numpy())
    metrics = eval_metrics.micro_metrics(candidates, truth)
    assert eval_metrics.micro_metrics(candidates.assign(score=score), truth) == metrics


@settings(max_examples=100, deadline=None)
@given(case=cases(), below=st.integers(0, 500), rank=st.integers(-400, 400))
def test_a_false_pair_never_helps(case, below, rank):
    candidates, truth = case
    metrics = eval_metrics.micro_metrics(candidates, truth)
    right = candidates["score"][is_right(candidates, truth)]
    lowest = min(right, default=0) - below  # a tie counts against the right pair
    for score in (lowest, rank + 0.5):
        false_pair = table([(99, 99)], score=[float(score)])
        worse = eval_metrics.micro_metrics(pd.concat([candidates, false_pair]), truth)
        for name, value in metrics.items():
            assert worse[name] <= value
        if score < min(right, default=np.inf):
            assert worse["average_precision"] == metrics["average_precision"]


@settings(max_examples=100, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_a_perfect_ranking_gives_one(case, seed):
    candidates, truth = case
    wrong = candidates[~is_right(candidates, truth)]
    right = truth.assign(score=301 + np.random.default_rng(seed).random(len(truth)))
    perfect = pd.concat([wrong, right]).sample(frac=1, random_state=seed)
    metrics = eval_metrics.micro_metrics(perfect, truth)
    assert metrics == {"average_precision": pytest.approx(1, abs=1e-12), "recall_p90": 1}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_descriptors_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((12, 5), np.float32)
    reference = rng.standard_normal((40, 5), np.float32)
    noise = rng.standard_normal((6, 5), np.float32)
    reference[:6] = query[:6] + 0.3 * noise
    query_ids = np.array([b"Q%05d" % i for i in range(12)])
    reference_ids = np.array([b"R%06d" % i for i in range(40)])
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder, "gt.csv")
        path = Path(folder, "s.h5")
        table([(i, i) for i in range(8)]).to_csv(truth, index=False)
        results = []
        for shuffle in (np.arange, rng.permutation):
            query_rows = shuffle(12)
            reference_rows = shuffle(40)
            with h5py.File(path, "w") as file:
                file["query"] = query[query_rows]
                file["query_ids"] = query_ids[query_rows]
                file["reference"] = reference[reference_rows]
                file["reference_ids"] = reference_ids[reference_rows]
            results.append(eval_metrics.evaluate(path, truth))
    assert results[0] == results[1]
