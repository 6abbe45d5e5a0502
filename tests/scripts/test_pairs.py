"""common/pairs.py and common/background.py: pairs, groups and scores are those of plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.background import ALIKE, RANKS, collection_background, given_background
from common.pairs import Excluded, cosine, find_pairs
from common.search import normalize


def unit_rows(rows):
    """Rows (..., dim) of numbers as unit rows, float32."""
    rows = np.array(rows, np.float32)
    flat = rows.reshape(-1, rows.shape[-1])
    return normalize(flat).reshape(rows.shape)


# ---- by brute force ----


def is_excluded(excluded, i, j):
    if i == j:
        return True
    if excluded is None:
        return False
    a, b = excluded.contents[i], excluded.contents[j]
    if (a, b) in excluded.ignored or (b, a) in excluded.ignored:
        return True
    return excluded.folders[i] >= 0 and excluded.folders[i] == excluded.folders[j]


def by_brute_force(
    rows, queries, references, threshold, top_k, views, background, sure_cosine, excluded
):
    """{(query, reference): (score, cosine, view)} and sorted groups, from all pairs."""
    number_of = {int(file): number for number, file in enumerate(queries)}
    both = queries is references

    def directed(i, j):
        cosines = cosine(views[number_of[i]], rows[j][None])
        best = int(cosines.argmax())
        score = round(float(cosines[best]) - float(background[number_of[i]]), 6)
        return score, float(cosines[best]), best

    found = {}
    links = {file: {file} for file in range(len(rows))}
    for i in queries.tolist():
        near = []
        for place, j in enumerate(references.tolist()):
            if is_excluded(excluded, i, j):
                continue
            score, cosine_of_pair, _ = directed(i, j)
            if score >= threshold or (sure_cosine and cosine_of_pair >= sure_cosine):
                near.append((-score, place, j))
                links[i].add(j)
                links[j].add(i)
        for _, _, j in sorted(near)[:top_k]:
            pair = (i, j)
            if both:
                pair = (min(i, j), max(i, j))
                if directed(*pair[::-1])[0] > directed(*pair)[0]:
                    pair = pair[::-1]
            found[pair] = directed(*pair)
    groups = set()
    for file in links:
        todo, seen = [file], {file}
        while todo:
            new = links[todo.pop()] - seen
            todo += new
            seen |= new
        if len(seen) > 1:
            groups.add(tuple(sorted(seen)))
    return found, sorted(groups)


def found_by(pairs):
    """What find_pairs found, as by_brute_force says it."""
    keys = zip(pairs.query.tolist(), pairs.reference.tolist(), strict=True)
    values = zip(pairs.score.tolist(), pairs.cosine.tolist(), pairs.view.tolist(), strict=True)
    groups = [
        tuple(np.flatnonzero(pairs.groups == number)) for number in range(pairs.groups.max() + 1)
    ]
    return dict(zip(keys, values, strict=True)), groups


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 30),
    view_count=st.sampled_from([1, 1, 3]),
    top_k=st.sampled_from([1, 2, 3, 100]),
    threshold=st.sampled_from([-1.0, 0.3, 0.8, 1.0]),
    has_background=st.booleans(),
    sure_cosine=st.sampled_from([None, 0.7]),
    excludes=st.booleans(),
    same=st.booleans(),
    similarities=st.sampled_from([1, 50, 10**6]),
)
def test_pairs_and_groups_are_those_of_brute_force(
    seed,
    count,
    view_count,
    top_k,
    threshold,
    has_background,
    sure_cosine,
    excludes,
    same,
    similarities,
):
    rng = np.random.default_rng(seed)
    contents = rng.integers(0, count, count)  # some files have the same
    all_views = unit_rows(rng.standard_normal((count, view_count, 3)))[contents]
    rows = np.ascontiguousarray(all_views[:, 0])
    queries = references = np.arange(count)
    if not same:
        order = rng.permutation(count)
        queries, references = order[: 2 * count // 3 + 1], order[count // 3 :]
    background = np.zeros(len(queries))
    if has_background:
        background = rng.uniform(0, 0.5, count)[contents][queries]
    excluded = None
    if excludes:
        ignored = {tuple(pair) for pair in rng.integers(0, count, (count, 2)).tolist()}
        excluded = Excluded(contents, rng.integers(-1, 3, count), ignored)
    options = {
        "views": all_views[queries],
        "background": background,
        "sure_cosine": sure_cosine,
        "excluded": excluded,
    }
    pairs = find_pairs(
        rows, queries, references, threshold, top_k, max_similarities=similarities, **options
    )
    expected = by_brute_force(rows, queries, references, threshold, top_k, **options)
    assert found_by(pairs) == expected


# ---- pairs and groups ----


def test_groups_are_over_more_than_the_reported_pairs():
    """A chain: each is a copy of the next; the best match of each leaves it in pieces."""
    angles = np.cumsum([0, 1, 3, 1, 3, 1]) / 100
    rows = unit_rows(np.stack([np.cos(angles), np.sin(angles)], 1))
    files = np.arange(6)
    pairs = find_pairs(rows, files, files, float(np.cos(0.031)), 1)
    found = list(zip(pairs.query.tolist(), pairs.reference.tolist(), strict=True))
    assert found == [(0, 1), (2, 3), (4, 5)]
    assert pairs.groups.tolist() == [0] * 6


def test_the_threshold_is_met_exactly():
    """A score that is printed as the threshold is a match: both are compared as printed."""
    rows = unit_rows(np.random.default_rng(0).standard_normal((60, 256)))
    files = np.arange(60)
    score = find_pairs(rows, files, files, -1, 100).score
    assert len(score) == 60 * 59 // 2
    for threshold in score[::97]:
        kept = find_pairs(rows, files, files, float(threshold), 100).score
        assert len(kept) == (score >= threshold).sum() and kept.min() == threshold


def test_masses_of_copies_stay_few_pairs():
    """Of the same image, and of images that are nearly the same."""
    rows = unit_rows(np.random.default_rng(0).standard_normal((1000, 256)))
    files = np.arange(10_000)
    pairs = find_pairs(rows[:2].repeat(5000, axis=0), files, files, 0.9, 2)
    assert 10_000 <= len(pairs.query) <= 20_000 and (pairs.score == 1).all()
    assert pairs.groups.tolist() == [0] * 5000 + [1] * 5000
    near = unit_rows(rows[:1] + 0.5 * rows[1:])
    pairs = find_pairs(near, files[:999], files[:999], 0.5, 2)
    assert 500 <= len(pairs.query) <= 2000 and not pairs.groups.any()


# ---- background ----


def background_by_brute_force(views, own, collection, copy_cosine, neutral):
    means = []
    for view in views:
        cosines = collection @ view
        others = [row for row in np.argsort(-cosines, kind="stable") if row != own]
        if not others:
            means.append(neutral)
            continue
        likeness = collection @ collection[others[0]]
        counted = []
        for row in others[1:]:
            if likeness[row] < ALIKE and cosines[row] < copy_cosine:
                counted.append(cosines[row])
        counted = counted[:RANKS]
        means.append((sum(counted) + (RANKS - len(counted)) * neutral) / RANKS)
    return max(means)


@pytest.mark.parametrize("copies", [0, 3, 30, 300])
def test_background_is_that_of_brute_force(copies):
    """Also where the best match has many copies, of which none counts."""
    rng = np.random.default_rng(copies)
    collection = rng.standard_normal((150, 16))
    collection = np.concatenate(
        [collection, collection[:1] + 0.1 * rng.standard_normal((copies, 16))]
    )
    collection = unit_rows(collection)
    views = unit_rows(rng.standard_normal((40, 3, 16)))
    views[:20, 0] = collection[:20]
    own = np.full(40, -1)
    own[:10] = np.arange(10)
    expected = [
        background_by_brute_force(views[query], own[query], collection, 0.6, 0.5)
        for query in range(40)
    ]
    actual = collection_background(views, own, collection, 0.6, 0.5)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_copies_in_numbers_do_not_cancel_each_other():
    """Thirty copies of one image are one group, whose scores are as high as a single copy's."""
    rng = np.random.default_rng(0)
    others = unit_rows(rng.standard_normal((60, 64)))
    source = unit_rows(rng.standard_normal((1, 64)))
    copies = unit_rows(source + 0.03 * rng.standard_normal((30, 64)))
    rows = np.concatenate([copies, others])
    files = np.arange(len(rows))
    background = collection_background(rows[:, None], files, rows, 0.9, 0.5)
    alone = np.concatenate([copies[:2], others])
    background_alone = collection_background(alone[:, None], np.arange(62), alone, 0.9, 0.5)
    np.testing.assert_allclose(background[:2], background_alone[:2], atol=0.05)
    pairs = find_pairs(rows, files, files, 0.4, 100, background=background)
    assert pairs.groups.tolist() == [0] * 30 + [-1] * 60


def test_where_all_images_resemble_the_best_match_cosines_decide():
    """A query unlike a collection of one image's copies is not a match of these."""
    rng = np.random.default_rng(1)
    source = unit_rows(rng.standard_normal((1, 64)))
    copies = unit_rows(source + 0.02 * rng.standard_normal((80, 64)))
    query = unit_rows(0.4 * source + 0.9 * unit_rows(rng.standard_normal((1, 64))))
    background = collection_background(query[:, None], np.array([-1]), copies, 0.9, neutral=0.5)
    assert background == pytest.approx(0.5)


def test_the_background_of_given_images():
    rng = np.random.default_rng(0)
    views = unit_rows(rng.standard_normal((5, 4, 32)))
    negatives = unit_rows(rng.standard_normal((70, 32)))
    cosines = np.sort(views @ negatives.T, axis=2)[:, :, ::-1]
    expected = cosines[:, :, :RANKS].mean(axis=2).max(axis=1)
    np.testing.assert_allclose(given_background(views, negatives), expected, atol=1e-6)
