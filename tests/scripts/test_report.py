"""scripts/report.py: right thresholds, pages that a browser shows without a fault, names and
images of any kind.
"""

import base64
import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from urllib.parse import unquote_to_bytes

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import report
from common import page
from common.files import sha256_of
from common.views import ALL_VIEWS, VIEW_OF_NAME
from conftest import ROOT, assert_refused, called, run
from eval_metrics import micro_metrics, read_ground_truth

SCRIPT = "scripts/report.py"
EVIL = """<script>alert("1")</script>'&amp;"""
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """The elements of a page, [(tag, attributes)], and its text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += f" {data}"

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def write_image(path, number, size=(60, 40)):
    """Write an image that differs for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path, path.suffix[1:].replace("jpg", "jpeg"))
    return path


def write_truth(path, rows):
    pd.DataFrame(rows, columns=report.PAIR_COLUMNS).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder, 8 references and 6 queries, whose h5 has every case of the page.

    Q0 to Q2 are copies that are found, Q2 with an id that wants escaping; Q3's reference has a row
    of zeros, Q4 is no copy and looks like R6, Q5's reference is the farthest of all. R1's image is
    broken, R3's is missing.
    """
    folder = tmp_path_factory.mktemp("input")
    query_ids = ["Q0", "Q1", EVIL, "Q3", "Q4", "Q5"]
    reference_ids = [f"R{i}" for i in range(8)]
    files = ["query_images/Q0.jpg", "query_images/Q1.jpg", "query_images/Q3.jpg"]
    files += ["query_images/Q4.PNG", "query_images_phase2/Q5.jpg"]
    files += [f"reference_images/{name}.jpg" for name in reference_ids]
    for number, name in enumerate(files):
        write_image(folder / name, number)
    (folder / "reference_images/R1.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    (folder / "reference_images/R3.jpg").unlink()

    reference = np.eye(8, dtype=np.float32)
    noise = np.array([0.02, 0.03, 0.04, 0.5, 0.3, 0], np.float32)[:, None]
    query = reference[[0, 1, 2, 4, 6, 5]] + noise * reference[[1, 2, 3, 5, 7, 7]]
    query[5] = reference[6] + reference[7] - reference[5]
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    reference[3] = 0
    with h5py.File(folder / "sub.h5", "w") as file:
        file["query"] = query
        file["reference"] = reference
        file["query_ids"] = np.array(query_ids, "S40")
        file["reference_ids"] = np.array(reference_ids, "S4")
    write_truth(
        folder / "truth.csv", zip(query_ids, ["R0", "R1", "R2", "R3", "", "R5"], strict=True)
    )
    edits = [
        ["crop", "jpeg"],
        ["crop", "over_lay", "jpeg"],
        [EVIL, "jpeg"],
        ["pad", "jpeg"],
        ["pad", "jpeg"],
        ["jpeg"],
    ]
    rows = [
        (q, "x", json.dumps([[e, {"p": 1}] for e in names]), 1)
        for q, names in zip(query_ids, edits, strict=True)
    ]
    pd.DataFrame(rows, columns=["query_id", "source", "edits", "phase"]).to_csv(
        folder / "query_edits.csv", index=False
    )
    return folder


@pytest.fixture(scope="module")
def submission_page(data, tmp_path_factory):
    """(stdout, path) of a page made by the command."""
    output = tmp_path_factory.mktemp("page") / "page.html"
    result = run(
        SCRIPT, data / "sub.h5", data / "truth.csv", "--output", output, "--threshold", 0.99, -0.999
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs as match.py gives them: three groups, names of every kind, one file gone."""
    folder = tmp_path_factory.mktemp("photos")
    names = [
        EVIL.replace("/", "-") + ".jpg",
        "a.png",
        "b.gif",
        os.fsdecode(b"caf\xe9.jpg"),
        "sub/\u202egnp.jpg",
    ]
    paths = [str(write_image(folder / name, number)) for number, name in enumerate(names)]
    paths.append(str(folder / "gone.jpg"))
    rows = [
        (paths[0], paths[1], 0.91, 7),
        (paths[0], paths[2], 0.93, 7),
        (paths[3], paths[4], 0.99, 2),
        (paths[4], paths[5], 0.7, 3),
    ]
    return pd.DataFrame(rows, columns=report.MATCH_COLUMNS)


# ---- numbers ----


@st.composite
def scored(draw):
    """(candidates, truth) with many equal scores, repeated pairs, and copies that are no
    candidates.
    """
    ids = st.integers(0, 5)
    rows = draw(st.lists(st.tuples(ids, ids, st.integers(-6, 0)), min_size=1, max_size=40))
    truth = draw(st.sets(st.tuples(ids, ids), min_size=1, max_size=12))
    rows = [(f"Q{q}", f"R{r}", np.float32(score / 5)) for q, r, score in rows]
    candidates = pd.DataFrame(rows, columns=[*report.PAIR_COLUMNS, "score"])
    copies = [(f"Q{q}", f"R{r}") for q, r in sorted(truth)]
    return candidates, pd.DataFrame([*copies, ("Q9", "")], columns=report.PAIR_COLUMNS)


def at_thresholds(candidates, truth):
    """{score: (pairs, precision, recall, F1)} of accepting all pairs of this score or more, by
    counting.
    """
    positives = {(q, r) for q, r in truth.to_numpy() if r}
    result = {}
    for score in candidates["score"].unique():
        accepted = candidates[candidates["score"] >= score]
        found = sum((q, r) in positives for q, r in accepted[report.PAIR_COLUMNS].to_numpy())
        n, p = len(accepted), len(positives)
        result[score] = n, found / n, found / p, 2 * found / (n + p)
    return result


@settings(max_examples=50)
@given(scored(), st.sampled_from([0.99, 0.9, 0.5, 0.25, 1 / 3]))
def test_operating_points_are_the_best_thresholds(data, precision):
    candidates, truth = data
    ranking = report.rank(candidates, truth)
    counted = at_thresholds(candidates, truth)
    given = candidates["score"].iloc[0]
    at, f1, threshold = report.operating_points(ranking, [precision], [float(given)])
    possible = [values for values in counted.values() if values[1] >= precision and values[2] > 0]
    if possible:
        assert at["recall"] == max(values[2] for values in possible)
    assert bool(at["pairs"]) == bool(possible)
    if f1["pairs"]:
        assert f1["F1"] == max(values[3] for values in counted.values())
    for point in at, f1, threshold:  # what is printed is what happens at that score
        if point["pairs"]:
            assert (point["pairs"], point["precision"], point["recall"], point["F1"]) == counted[
                point["score"]
            ]
    assert threshold["score"] == given


@settings(max_examples=50)
@given(scored())
def test_recall_at_90_is_the_largest_of_all_ranks(data):
    candidates, truth = data
    ranking = report.rank(candidates, truth)
    precision, recall = ranking.curve()
    assert ranking.recall_at(0.9) == recall[precision >= 0.9].max(initial=0)
    assert micro_metrics(candidates, truth) == {
        "average_precision": ranking.average_precision(),
        "recall_p90": ranking.recall_at(0.9),
    }


@settings(max_examples=50)
@given(st.lists(st.floats(-4, 0, width=32), min_size=1, max_size=20))
def test_printed_cosine_accepts_the_same_pairs(scores):
    table = pd.DataFrame(
        {"query_id": "Q", "reference_id": [f"R{i}" for i in range(len(scores))], "score": scores}
    )
    table["score"] = table["score"].astype(np.float32)
    truth = table[report.PAIR_COLUMNS].iloc[:1]
    points = report.operating_points(report.rank(table, truth), (0.01,))
    header, rows = report.points_table(points, cosine=True)
    cells = dict(zip(header, rows[0], strict=True))
    cosines = 1 + table["score"].to_numpy(float) / 2
    accepted = table["score"] >= np.float32(cells["score ≥"])
    assert (cosines[accepted] >= float(cells["cosine ≥"])).all()
    assert int(cells["pairs"]) == accepted.sum()
    assert (cosines[~accepted] < float(cells["cosine ≥"]) + 1e-6).all()


def test_missed_copies_worst_first_with_scores(data):
    truth = read_ground_truth(data / "truth.csv")
    candidates = pd.DataFrame(
        [("Q1", "R1", -0.5), ("Q0", "R7", -0.1), ("Q0", "R0", -0.2)],
        columns=[*report.PAIR_COLUMNS, "score"],
    )
    missed = report.missed_copies(report.rank(candidates, truth), truth)
    assert missed["query_id"].tolist()[3:] == ["Q1", "Q0"]
    assert missed["rank"].tolist() == [0, 0, 0, 3, 2]
    assert missed["score"].isna().tolist() == [True] * 3 + [False] * 2
    submission = report.read_submission(data / "sub.h5")
    missed = report.missed_copies(report.rank(candidates, truth), truth, submission)
    # Q3's reference, R3, is a row of zeros: it has no score
    assert missed["query_id"].tolist() == ["Q3", "Q5", EVIL, "Q1", "Q0"]
    rows = [5, 2, 1, 0]
    expected = -np.square(submission["query"][rows] - submission["reference"][rows]).sum(axis=1)
    np.testing.assert_allclose(missed["score"].tolist()[1:], expected, rtol=1e-5)
    assert np.isnan(missed["score"].iloc[0])


def test_scores_by_edit(data):
    truth = read_ground_truth(data / "truth.csv")
    edits = report.read_edits(data / "query_edits.csv")
    rows = [
        ("Q0", "R0", -0.1),
        ("Q1", "R7", -0.2),
        ("Q1", "R1", -0.3),
        ("Q4", "R6", -0.4),
        (EVIL, "R2", -0.5),
    ]
    ranking = report.rank(pd.DataFrame(rows, columns=[*report.PAIR_COLUMNS, "score"]), truth)
    assert report.scores_by_edit(ranking, truth, edits) == [
        ("pad", 2, 1, 0, 0, 0),
        ("over lay", 1, 1, 0, 0, 0.5),
        ("crop", 2, 2, 0.5, 0.5, (1 + 2 / 3) / 2),
        (EVIL, 1, 1, 1, 0, 1),
        ("all queries", 6, 5, 0.4, 0.2, pytest.approx((1 + 2 / 3 + 3 / 5) / 5)),
    ]  # without jpeg, which every query has


# ---- pages ----


def test_command_prints_and_shows_the_same(submission_page, data):
    stdout, path = submission_page
    first, *table, last = stdout.splitlines()
    assert first.startswith(
        "µAP 0.6190, R@P90 0.6000, queries 6, copies 5, candidates 42, true candidates 4"
    )
    assert last == f"{path}: {path.stat().st_size / 1e6:.1f} MB, " + last.partition("MB, ")[2]
    text = " ".join(Page(path).text.split())
    for line in table:
        assert " ".join(line.split()) in text
    assert re.search(r"threshold 0\.99 +0\.999200 +1\.0000 +0\.6000 +0\.7500 +3 +-0\.00", stdout)
    assert re.search(r"threshold -0\.999 +unknown", stdout)
    for sentence in (
        "against truth.csv",
        "cosine is 1 + score / 2",
        "Confident mistakes",
        "none: this query is not a copy",
    ):
        assert sentence in text
    missed = text[text.index("Missed copies") :]
    assert (
        "2 of the 5 pairs" in missed
        and "no cosine not a candidate query Q3 not found reference R3" in missed
    )
    assert "crop · over lay · jpeg" in text


def test_page_is_whole_and_escaped(submission_page):
    page = Page(submission_page[1])
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "form", "base"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in {"src", "href", "xlink:href"} & attributes.keys():
            assert attributes[name].startswith(("data:", "#")), (tag, attributes)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert EVIL in page.text and html.escape(EVIL, quote=False) not in page.text
    for tag, count in (("h1", 1), ("title", 1), ("svg", 2)):
        assert len(page.all(tag)) == count
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["aria-label"] for svg in page.all("svg"))
    # and there is a page all the same
    assert page.text.count("not found") >= 2 and "unreadable" in page.text


def test_matching_track_and_explicit_files(data, tmp_path, capsys):
    rows = [("Q0", "R0", -3), ("Q1", "R6", -7.5), ("Q5", "R5", -9)]
    pd.DataFrame(rows, columns=[*report.PAIR_COLUMNS, "score"]).to_csv(
        tmp_path / "s.csv", index=False
    )
    truth = shutil.copy(data / "truth.csv", tmp_path)
    assert report.main([str(tmp_path / "s.csv"), str(truth)]) == 0
    page = Page(tmp_path / "s.csv.html")
    assert "cosine" not in page.text and "score -7.5" in page.text
    assert (
        not page.all("img") and "Kinds of edit" not in page.text
    )  # neither is beside the ground truth
    flags = ["--images", data, "--edits", data / "query_edits.csv", "--gallery", 1]
    flags += ["--precision", 0.3, "--output", tmp_path / "p"]
    argv = [tmp_path / "s.csv", truth, *flags]
    assert report.main([str(argument) for argument in argv]) == 0
    page = Page(tmp_path / "p")
    assert "Kinds of edit" in page.text and len(page.all("article")) == 3
    assert [image["alt"] for image in page.all("img")][:2] == ["query Q0", "reference R0"]
    assert "precision 0.3" in page.text and "precision 0.99" not in page.text
    capsys.readouterr()


@pytest.mark.parametrize(
    "rows", [[("Q1", "R6", -7)], [("Q1", "R6", -7), ("Q2", "R2", -7)], [("Q0", "R0", 0)]]
)
def test_few_candidates(rows, tmp_path, capsys):
    pd.DataFrame(rows, columns=[*report.PAIR_COLUMNS, "score"]).to_csv(
        tmp_path / "s.csv", index=False
    )
    truth = write_truth(tmp_path / "t.csv", [("Q0", "R0"), ("Q1", "R1"), ("Q2", "")])
    assert report.main([str(tmp_path / "s.csv"), str(truth)]) == 0
    text = Page(tmp_path / "s.csv.html").text
    found = rows[0][0] == "Q0"
    assert ("No pair of the ground truth is shown." in text) != found
    assert ("No wrong pair is shown." in text) == found
    assert re.search(r"precision 0\.9 +" + ("1.0000" if found else "none"), capsys.readouterr().out)
    assert f"{1 if found else 2} of the 2 pairs of the ground truth are not found" in text


def test_descriptors_of_other_lengths_have_no_cosine(data, tmp_path, capsys):
    shutil.copy(data / "sub.h5", tmp_path)
    with h5py.File(tmp_path / "sub.h5", "r+") as file:
        file["query"][0] *= 3
    assert report.main([str(tmp_path / "sub.h5"), str(data / "truth.csv")]) == 0
    assert "cosine" not in capsys.readouterr().out + Page(tmp_path / "sub.h5.html").text


@pytest.mark.parametrize("scores", [(0.3, 0.3), (0.30000000000000004, 0.3), (0, 0), (-1e9, 2e-9)])
def test_scores_of_any_spread_are_drawn(scores, tmp_path, capsys):
    rows = [("Q0", "R0", scores[0]), ("Q1", "R6", scores[1])]
    pd.DataFrame(rows, columns=[*report.PAIR_COLUMNS, "score"]).to_csv(
        tmp_path / "s.csv", index=False
    )
    truth = write_truth(tmp_path / "t.csv", [("Q0", "R0"), ("Q1", "R1")])
    assert report.main([str(tmp_path / "s.csv"), str(truth)]) == 0
    assert len(Page(tmp_path / "s.csv.html").all("svg")) == 2
    capsys.readouterr()


def test_many_queries(tmp_path, capsys):
    n = 3000
    queries = pd.DataFrame({"query_id": np.repeat([f"Q{i}" for i in range(n)], 10)})
    queries["reference_id"] = [f"R{i}" for i in range(10 * n)]
    queries["score"] = -np.random.default_rng(0).random(10 * n)
    queries.to_csv(tmp_path / "s.csv", index=False)
    write_truth(tmp_path / "t.csv", queries[report.PAIR_COLUMNS].to_numpy()[::10])
    assert report.main([str(tmp_path / "s.csv"), str(tmp_path / "t.csv")]) == 0
    assert len(Page(tmp_path / "s.csv.html").all("article")) == 3 * report.MAX_PAIRS
    assert (tmp_path / "s.csv.html").stat().st_size < 300_000
    capsys.readouterr()


# ---- pages of match.py ----


def test_match_page(pairs, tmp_path):
    unreadable = [(os.fsdecode(b"/x/\xff.heic"), 'no "image"'), (f"/x/{EVIL}", "empty")]
    line = report.write_match_page(tmp_path / "m.html", pairs, unreadable, 0.604169)
    assert line == f"{tmp_path}/m.html: 0.0 MB, 3 of 3 groups, 6 images, 1 not found"
    page = Page(tmp_path / "m.html")
    text = " ".join(page.text.split())
    for part in (
        "groups of copies 3",
        "pairs 4",
        "unreadable files 2",
        "threshold 0.604169",
        r"caf\xe9.jpg",
        r"sub/\u202egnp.jpg",
        EVIL.replace("/", "-"),
        r'/x/\xff.heic no "image"',
        f"/x/{EVIL} empty",
    ):
        assert part in text, part
    assert headings(text) == [
        "Group 3 2 images · score 0.7000",
        "Group 7 3 images · lowest 0.9100, best 0.9300",
        "Group 2 2 images · score 0.9900",
    ]
    assert re.search(r"1 . 2 0\.9100 not a copy 1 . 3 0\.9300", text)
    assert "3 of 3 groups are shown" in text and "--gallery" not in text
    assert "images compared" not in text


def headings(text):
    """The titles of a page's groups."""
    scores = r"identical files|score \S+|lowest [\d.-]+, best(?: \S+|: identical files)"
    return re.findall(rf"Group \S+ \d+ images · (?:{scores})", text)


def test_page_from_the_csv_of_match(pairs, tmp_path):
    pairs.to_csv(tmp_path / "matches.csv", index=False, errors="surrogateescape")
    result = run(SCRIPT, tmp_path / "matches.csv")
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout
        == f"{tmp_path}/matches.csv.html: 0.0 MB, 3 of 3 groups, 6 images, 1 not found\n"
    )
    report.write_match_page(tmp_path / "same.html", pairs)
    assert (tmp_path / "matches.csv.html").read_bytes() == (tmp_path / "same.html").read_bytes()


def test_match_page_without_matches_and_with_large_groups(pairs, tmp_path):
    report.write_match_page(tmp_path / "m.html", pairs[:0], [], 0.9)
    assert "No two images are similar enough." in Page(tmp_path / "m.html").text
    many = [(f"/a/{i}.jpg", f"/b/{i + 1}.jpg", 0.5 + i / 1000, i // 40) for i in range(400)]
    report.write_match_page(
        tmp_path / "m.html",
        pd.DataFrame(many, columns=report.MATCH_COLUMNS),
        [("x", "y")] * 900,
        gallery=2,
    )
    shown = Page(tmp_path / "m.html")
    text = " ".join(shown.text.split())
    assert len(shown.all("article")) == 2
    assert text.count("not found") == 2 * page.MAX_GROUP_IMAGES
    assert headings(text) == [
        "Group 0 80 images · lowest 0.5000, best 0.5390",
        "Group 1 80 images · lowest 0.5400, best 0.5790",
    ]
    for part in (
        "2 of 10 groups are shown",
        "--gallery 10 shows all",
        "68 more images",
        "and 700 more",
        "query 1",
        "reference 2",
        "more pairs of 80 images",
    ):
        assert part in text, part


# ---- pages of match.py: files, views, scores ----


MATCHES = [*report.MATCH_COLUMNS, "view", "cosine", "normalized", *page.NOT_COPY_COLUMNS[2:]]
# A name that csv, HTML and UTF-8 each have trouble with.
HARD_NAMES = [
    'a,b "c".jpg',
    "line\nend.jpg",
    "carriage\rreturn.jpg",
    os.fsdecode(b"caf\xe9, \xff.jpg"),
    "ümläut 😀.jpg",
    EVIL.replace("/", "-"),
    " blank .jpg",
    "=1+1.jpg",
]


def row(query, reference, score, group=1, view="whole", normalized=""):
    """A row of match.py's csv, with the digests of files that exist."""
    decided = score if normalized == "" else normalized
    digests = []
    for path in map(Path, (query, reference)):
        digests.append(sha256_of(path) if path.exists() else "")
    return (query, reference, decided, group, view, score, normalized, *digests)


def table(*rows):
    return pd.DataFrame(rows, columns=MATCHES)


def written(tmp_path, *rows, **options):
    """The Page of these matches."""
    report.write_match_page(tmp_path / "m.html", table(*rows), **options)
    return Page(tmp_path / "m.html")


def test_details_of_each_file_and_the_one_to_keep(tmp_path):
    small = write_image(tmp_path / "small.png", 0, (60, 40))
    wide = write_image(tmp_path / "wide.png", 0, (80, 40))
    tall = tmp_path / "tall.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(wide).save(tall, exif=exif, quality=95)
    with tall.open("ab") as file:  # as many pixels as `wide`, more bytes
        file.write(b"\0" * 1_234_567)
    os.utime(small, (1_000_000_000, 1_000_000_000))
    rows = [row(str(small), str(wide), 0.9), row(str(wide), str(tall), 0.8)]
    rows.append(row("/gone/a.jpg", "/gone/b.jpg", 0.7, 2))
    text = " ".join(written(tmp_path, *rows).text.split())
    assert re.search(r"small.png 60 × 40 · \d+ (bytes|kB) 2001-09-0[89] \d\d:\d\d", text)  # noqa: RUF001
    assert re.search(r"wide.png 80 × 40 · \d+ (bytes|kB) 20", text)  # noqa: RUF001
    assert re.search(
        r"tall.jpg 40 × 80 · 1.2 MB 20\S+ \S+ keep: most pixels, then most bytes",  # noqa: RUF001
        text,
    )
    assert text.count("keep:") == 1  # nothing is known of files that are gone


def test_the_one_to_keep_is_shown_of_a_large_group(tmp_path):
    many = page.MAX_GROUP_IMAGES + 6
    paths = [str(write_image(tmp_path / f"{n}.png", n, (20 + n, 20))) for n in range(many)]
    rows = [row(paths[0], other, 0.9 - n / 100) for n, other in enumerate(paths[1:])]
    shown = written(tmp_path, *rows)
    assert len(shown.all("img")) == page.MAX_GROUP_IMAGES
    text = " ".join(shown.text.split())
    assert re.search(rf"{many - 1}\.png {19 + many} × 20 \S+ [^k]*kB?[^k]*keep: most pixels", text)  # noqa: RUF001
    assert text.count("keep:") == 1


def test_all_pairs_of_the_shown_images_can_be_ticked(tmp_path):
    paths = [f"/gone/{number}.jpg" for number in range(page.MAX_GROUP_IMAGES + 3)]
    rows = [row(one, other, 0.9) for one, other in combinations(paths, 2)]
    shown = written(tmp_path, *rows)
    ticks = {frozenset(decoded(box)[:2]) for box in shown.all("input")}
    chosen = set().union(*ticks)
    assert len(chosen) == page.MAX_GROUP_IMAGES
    assert ticks == set(map(frozenset, combinations(chosen, 2)))
    assert f"and {len(rows) - 66} more pairs of 15 images" in " ".join(shown.text.split())


def decoded(box):
    """The cells of a tick box's row of csv."""
    content = os.fsdecode(base64.b64decode(box["data-row"]))
    (cells,) = csv.reader(io.StringIO(content, newline=""))
    return cells


@pytest.mark.parametrize("view", ALL_VIEWS, ids=lambda view: view.name)
def test_the_view_that_matched_is_named_and_its_part_outlined(view, tmp_path):
    query = str(write_image(tmp_path / "query.png", 0, (90, 60)))
    reference = str(write_image(tmp_path / "reference.png", 1, (60, 60)))
    shown = written(tmp_path, row(query, reference, 0.9, view=view.name))
    text = " ".join(shown.text.split())
    assert ("mirrored" in text) == view.mirrored
    assert ("turned" in text) == bool(view.turned)
    assert f"turned {view.turned}°" in text or not view.turned
    overlays = [svg for svg in shown.all("svg") if svg.get("class", "").startswith("part")]
    if view.size == 1:
        assert not overlays and "part of 1" not in text
        return
    assert f"{view.name.removesuffix(' mirrored')} part of 1" in text
    (overlay,) = overlays
    _, _, width, height = map(float, overlay["viewbox"].split())
    box = next(element for element in shown.all("rect") if "rx" not in element)
    assert float(box["x"]) / width == pytest.approx(view.left, abs=0.01)
    assert float(box["y"]) / height == pytest.approx(view.top, abs=0.01)
    assert float(box["width"]) / width == pytest.approx(view.size, abs=0.01)
    assert float(box["height"]) / height == pytest.approx(view.size, abs=0.01)


def test_a_view_of_a_later_version_is_named(tmp_path):
    shown = written(tmp_path, row("/gone/a", "/gone/b", 0.9, view="<b>center"))
    assert "<b>center of 1" in shown.text


def test_views_of_a_larger_group_name_their_image(tmp_path):
    rows = [
        row("/gone/a", "/gone/b", 0.9, view="mirrored"),
        row("/gone/c", "/gone/b", 0.8, view="top left mirrored"),
        row("/gone/c", "/gone/a", 0.7, view="turned 90"),
    ]
    text = " ".join(written(tmp_path, *rows).text.split())
    assert re.search(r"1 . 2 0\.7000 1 turned 90°", text)
    assert re.search(r"1 . 3 0\.8000 top left part of 1, mirrored", text)
    assert re.search(r"2 . 3 0\.9000 2 mirrored", text)


def test_scores_are_cosines_or_normalized(tmp_path):
    rows = [
        row("/gone/a", "/gone/b", 0.9123, 1, normalized=0.4321),
        row("/gone/a", "/gone/c", 0.8123, 1, normalized=-0.0321),
        row("/gone/d", "/gone/e", 0.7123, 2, normalized=0.2221),
    ]
    shown = written(tmp_path, *rows, threshold=-0.1, scored_by="normalized score")
    text = " ".join(shown.text.split())
    for part in (
        "normalized threshold -0.1",
        "Normalized score of each pair",
        "normalized 0.4321 cosine 0.9123",
        "normalized -0.0321 cosine 0.8123",
        "normalized 0.2221 cosine 0.7123",
        "Group 1 3 images · lowest -0.0321, best 0.4321",
        "Group 2 2 images · score 0.2221",
    ):
        assert part in text, part
    assert "normalized score" in shown.all("svg")[0]["aria-label"]
    plain = written(tmp_path, row("/gone/a", "/gone/b", 0.9), threshold=0.5)
    text = " ".join(plain.text.split())
    assert "normalized" not in text and "Cosine of the descriptors" in text
    assert "cosine" in plain.all("svg")[0]["aria-label"]


def test_page_from_todays_csv_is_the_same(tmp_path, capsys):
    paths = [str(write_image(tmp_path / f"{n}.png", n)) for n in range(3)]
    rows = [
        row(paths[0], paths[1], 0.9, 1, "bottom left", 0.5),
        row(paths[1], paths[2], 0.8, 1, "turned 180", 0.4),
    ]
    matches = table(*rows)
    matches.to_csv(tmp_path / "m.csv", index=False, float_format="%.6f")
    report.write_match_page(tmp_path / "direct.html", matches, scored_by="normalized score")
    assert report.main([str(tmp_path / "m.csv")]) == 0
    assert (tmp_path / "m.csv.html").read_bytes() == (tmp_path / "direct.html").read_bytes()
    matches["normalized"] = np.nan
    matches["score"] = matches["cosine"]
    matches.to_csv(tmp_path / "m.csv", index=False, float_format="%.6f")
    assert report.main([str(tmp_path / "m.csv")]) == 0
    assert "normalized" not in Page(tmp_path / "m.csv.html").text
    capsys.readouterr()


def test_rows_of_an_old_csv_have_paths_only(pairs, tmp_path):
    report.write_match_page(tmp_path / "m.html", pairs)
    rows = [decoded(box) for box in Page(tmp_path / "m.html").all("input")]
    assert {tuple(cells[:2]) for cells in rows} == set(
        pairs[["query", "reference"]].itertuples(index=False, name=None)
    )
    assert all(cells[2:] == ["", ""] for cells in rows)


def test_only_its_own_script_may_run(pairs, tmp_path):
    report.write_match_page(tmp_path / "m.html", pairs)
    text = (tmp_path / "m.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (policy,) = re.findall(r'"Content-Security-Policy" content="(.*?)"', text)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["script-src"] == f"'sha256-{digest}'"
    # and there is none where nothing can be ticked
    report.write_match_page(tmp_path / "none.html", pairs[:0])
    empty = (tmp_path / "none.html").read_text()
    assert "<script" not in empty and "script-src" not in empty


# ---- pages of match.py: what needs judging ----


def groups_of(text):
    """The numbers of a page's groups, in order."""
    return re.findall(r"Group (\d+) \d+ images", text)


def test_groups_that_need_judging_come_first(tmp_path):
    """By the lowest of all pairs, also where a group's best pair is the best of all."""
    rows = [
        row("/gone/a", "/gone/b", 0.8, 41),
        row("/gone/c", "/gone/d", 0.99, 5),
        row("/gone/e", "/gone/d", 0.61, 5),
        row("/gone/f", "/gone/g", 0.7, 12),
        row("/gone/f", "/gone/h", 0.95, 12),
    ]
    shown = written(tmp_path, *rows)
    text = " ".join(shown.text.split())
    assert groups_of(text) == ["5", "12", "41"]
    assert "lowest score first" in text
    few = " ".join(written(tmp_path, *rows, gallery=2).text.split())
    assert groups_of(few) == ["5", "12"] and "2 of 3 groups are shown" in few
    none = " ".join(written(tmp_path, *rows, gallery=0).text.split())
    assert groups_of(none) == [] and "No group is shown." in none


def test_the_lowest_pair_of_a_large_group_is_shown(tmp_path):
    names = [f"/gone/{number}.jpg" for number in range(40)]
    rows = [row(one, other, 0.95 - n / 100) for n, (one, other) in enumerate(pairwise(names))]
    shown = written(tmp_path, *rows)
    assert decoded(shown.all("input")[0])[:2] == names[-2:]


@pytest.mark.parametrize("size", [2, 8, 30])
def test_many_groups_are_shown_but_not_too_many_images(size, tmp_path):
    rows = []
    for group in range(260):
        first, *others = [f"/gone/{group}/{n}" for n in range(size)]
        rows += [row(first, other, 0.5 + group / 1000, group) for other in others]
    line = report.write_match_page(tmp_path / "m.html", table(*rows))
    text = " ".join(Page(tmp_path / "m.html").text.split())
    groups = groups_of(text)
    tiles = len(Page(tmp_path / "m.html").all("figure")) - 1  # the chart is one
    assert tiles == len(groups) * min(size, page.MAX_GROUP_IMAGES)
    assert groups == [str(group) for group in range(len(groups))]
    assert f" {len(groups)} of 260 groups, " in line
    assert f"{len(groups)} of 260 groups are shown" in text
    if size == 2:
        assert len(groups) == 200
    else:
        assert 900 < tiles <= 1000
    everything = " ".join(written(tmp_path, *rows, gallery=300).text.split())
    assert len(groups_of(everything)) == 260


def test_images_without_room_are_listed(tmp_path):
    names = [f"/photos/n{number} & {EVIL.replace('/', '-')}.jpg" for number in range(26)]
    names[20] = os.fsdecode(b"/photos/caf\xe9\n.jpg")
    rows = [row(names[0], other, 0.9) for other in names[1:]]
    shown = written(tmp_path, *rows)
    text = " ".join(shown.text.split())
    assert "Group 1 26 images" in text and "14 more images" in text
    for name in names:
        assert text.count(page.shown(name).removeprefix("/photos/")) == 1, name
    assert "more images" not in written(tmp_path, *rows[: page.MAX_GROUP_IMAGES - 1]).text


def test_identical_files_are_told_from_resaved_ones(tmp_path):
    first = write_image(tmp_path / "first.png", 0)
    same = str(shutil.copy(first, tmp_path / "same.png"))
    resaved = str(write_image(tmp_path / "resaved.png", 1))
    first = str(first)
    rows = [row(first, same, 1.0, 1), row(first, resaved, 0.99999999, 2)]
    text = " ".join(written(tmp_path, *rows).text.split())
    assert headings(text) == [
        "Group 2 2 images · score 1.0000",
        "Group 1 2 images · identical files",
    ]
    rows = [row(first, same, 0.9999999, 1), row(first, resaved, 1.0, 1)]
    text = " ".join(written(tmp_path, *rows).text.split())
    assert headings(text) == ["Group 1 3 images · lowest 1.0000, best: identical files"]
    assert re.search(r"1 . 2 1\.0000 not a copy 1 . 3 identical files not a copy", text)


def test_identical_files_come_last_whatever_their_normalized_score(tmp_path):
    first = write_image(tmp_path / "first.png", 0)
    same = str(shutil.copy(first, tmp_path / "same.png"))
    rows = [row(str(first), same, 1.0, 1, "mirrored", 0.2), row("/a", "/b", 0.9, 2, "whole", 0.3)]
    text = " ".join(written(tmp_path, *rows, scored_by="normalized score").text.split())
    assert headings(text) == [
        "Group 2 2 images · score 0.3000",
        "Group 1 2 images · identical files",
    ]
    assert "mirrored" not in text and "normalized 0.2000" not in text


def test_unknown_digests_are_not_identical(tmp_path):
    text = written(tmp_path, row("/gone/a", "/gone/b", 1.0)).text
    assert "score 1.0000" in text and "best: identical" not in text


def test_how_many_images_were_compared(tmp_path):
    text = " ".join(written(tmp_path, row("/a", "/b", 0.9), compared=20_000).text.split())
    assert "images compared 20,000" in text
    assert text.index("Group 1") < text.index("Cosine of the descriptors")  # the chart comes last
    none = " ".join(written(tmp_path, compared=0).text.split())
    assert "images compared 0" in none


def test_images_link_to_their_files(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    paths = [str(folder / name) for name in [*HARD_NAMES, "50% #1?.jpg", "javascript:alert(1).jpg"]]
    for number, path in enumerate(paths):
        write_image(folder / "image.png", number).rename(path)
    rows = [row(one, other, 0.9) for one, other in pairwise(paths)]
    links = written(tmp_path, *rows, row("/gone/a", "/gone/b", 0.8, 2)).all("a")
    found = {os.fsdecode(unquote_to_bytes(link["href"].removeprefix("file://"))) for link in links}
    assert found == set(paths)
    for link in links:
        assert re.fullmatch(r"file:///[\w/.%~-]+", link["href"], re.ASCII)
        assert link["rel"] == "noopener"
    monkeypatch.chdir(folder)  # paths in the csv are relative to where match.py ran
    names = [os.path.basename(path) for path in paths[:2]]  # noqa: PTH119
    relative = written(tmp_path, row(*names, 0.9)).all("a")
    assert {link["href"] for link in relative} <= {link["href"] for link in links}


# ---- locales ----


@pytest.fixture(scope="module", params=["C", "latin1", "utf8"])
def locale(request, tmp_path_factory):
    """Variables of the environment that make Python use a locale's encoding."""
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if request.param == "C":
        return plain | {"LC_ALL": "C"}
    if request.param == "utf8":
        return {"LC_ALL": "C.UTF-8"}
    if shutil.which("localedef") is None:
        pytest.skip("no localedef on this machine")
    folder = tmp_path_factory.mktemp("locales")
    name = "en_US.ISO-8859-1"
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / name]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no source of locales on this machine")
    return plain | {"LC_ALL": name, "LOCPATH": str(folder)}


def run_in(locale, *argv):
    """Run report.py in a locale; returns the CompletedProcess, its text as Latin-1."""
    return subprocess.run(
        [sys.executable, ROOT / SCRIPT, *argv],
        env=os.environ | locale,
        capture_output=True,
        encoding="latin-1",
        timeout=300,
    )


def test_names_survive_in_any_locale(locale, tmp_path):
    folder = tmp_path / "Ordner ü"
    paths = [folder / name for name in HARD_NAMES]
    for number, path in enumerate(paths):
        write_image(folder / "image.png", number).rename(path)
    lines = ["query,reference,score,group"]
    for query, reference in pairwise(paths):
        cells = ['"{}"'.format(str(path).replace('"', '""')) for path in (query, reference)]
        lines.append(",".join([*cells, "0.9", "1"]))
    matches = folder / os.fsdecode(b"m\xe9.csv")
    matches.write_bytes(os.fsencode("\n".join(lines)))
    result = run_in(locale, matches)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"{len(paths)} images" in result.stdout and "not found" not in result.stdout
    shown = Page(Path(f"{matches}.html"))
    saved = set()
    for box in shown.all("input"):
        saved.update(decoded(box)[:2])
    assert saved == set(map(str, paths))
    for text in ("ümläut 😀.jpg", r"caf\xe9, \xff.jpg", "Ordner ü"):
        assert text in shown.text, text


def test_ids_of_a_submission_survive_in_any_locale(locale, tmp_path):
    write_image(tmp_path / "query_images/é 😀.jpg", 0)
    write_image(tmp_path / "reference_images/R0.jpg", 1)
    truth = write_truth(tmp_path / "truth.csv", [("é 😀", "R0")])
    (tmp_path / "s.csv").write_text("query_id,reference_id,score\né 😀,R0,-1\n", encoding="utf-8")
    result = run_in(locale, tmp_path / "s.csv", truth)
    assert result.returncode == 0, result.stderr
    assert "AP 1.0000" in result.stdout and "2 images" in result.stdout
    assert "not found" not in result.stdout
    shown = Page(tmp_path / "s.csv.html")
    assert "query é 😀" in [image["alt"] for image in shown.all("img")]


def test_refusals_and_help_in_any_locale(locale, tmp_path):
    result = run_in(locale, tmp_path / "gibt es nicht ü.csv")
    assert_refused(result, "no such file")
    assert run_in(locale, "--help").returncode == 0


# ---- charts ----


def test_a_histogram_shows_every_pair_and_the_threshold():
    chart = page.score_chart({"pairs": np.array([0.7, 0.7, 0.9])}, "cosine", 0.6)
    outline, line = (
        np.array([point.split(",") for point in part["points"].split()], float)
        for part in chart.lines
    )
    bars = outline[outline[:, 1] < chart.height]
    two_pairs, one_pair = sorted(set(bars[:, 1]))
    assert chart.height - two_pairs == pytest.approx(2 * (chart.height - one_pair), abs=0.2)
    assert set(bars[bars[:, 1] == two_pairs, 0]) < set(outline[: len(outline) // 2, 0])
    # the threshold lies left of all bars, as far from the first as this is from the last two thirds
    assert len(set(line[:, 0])) == 1
    first, last = outline[0, 0], outline[-1, 0]
    assert (first - line[0, 0]) * 2 == pytest.approx(last - first, abs=0.5)
    assert 0 < line[0, 0] < first < last < chart.width
    assert [text for _, text in chart.legend] == ["pairs (3)", "threshold: 0.6"]
    assert [text for _, text in chart.y_ticks] == ["0", "1", "2"]


@settings(max_examples=200)
@given(st.floats(-1e3, 1e3), st.floats(1e-5, 1e9))
def test_ticks_are_few_and_differ(low, width):
    high = low + width
    numbers, texts = zip(*page.ticks(low, high), strict=True)
    assert 2 <= len(numbers) <= 7 and len(set(texts)) == len(texts)
    rounding = 1e-12 * (abs(low) + width)
    assert low - rounding <= numbers[0] < numbers[-1] <= high + rounding
    for number, text in zip(numbers, texts, strict=True):
        assert float(text.replace(",", "").replace("−", "-")) == pytest.approx(number, abs=rounding)  # noqa: RUF001


# ---- images ----


@pytest.mark.parametrize(
    "mode, suffix",
    [("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"), ("I;16", "png"), ("1", "bmp"), ("L", "webp")],
)
def test_images_of_every_kind(mode, suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    Image.new(mode, (300, 1000)).save(path)
    shown = report.thumbnail(path)
    assert (shown["width"], shown["height"]) == (77, 256)
    assert shown["data"].startswith("data:image/jpeg;base64,")


def test_images_are_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert (
        report.thumbnail(tmp_path / "turned.jpg")["height"] == 80
    )  # as any other program shows it


def test_files_that_are_no_images(tmp_path):
    Image.new("1", (10001, 10000)).save(tmp_path / "bomb.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "figure.svg").write_text("<svg/>")
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {path.name: report.thumbnail(path)["missing"] for path in tmp_path.iterdir()}
    assert reasons == {
        "bomb.png": "unreadable",
        "empty.jpg": "unreadable",
        "figure.svg": "unreadable",
        "pipe.jpg": "not found",
    }
    for name in None, tmp_path, tmp_path / ("x" * 5000), "a\0b":
        assert report.thumbnail(name)["missing"] == "not found"


def test_an_id_leads_to_no_other_folder(tmp_path):
    secret = write_image(tmp_path / "secret.jpg", 0)
    inside = write_image(tmp_path / "input/reference_images/in.JPEG", 1)
    find = [
        report.find_image(tmp_path / "input", "reference", name)
        for name in ("in", "../../secret", str(secret)[:-4], "..", "", "é" * 200)
    ]
    assert find == [inside, None, None, None, None, None]


@pytest.mark.parametrize("library", ["torch", "matplotlib"])
def test_needs_neither_torch_nor_matplotlib(library):
    """The light installation has neither."""
    code = f"import sys; sys.modules[{library!r}] = None; import report"
    result = run("-c", code, PYTHONPATH=ROOT / "scripts")
    assert result.returncode == 0, result.stderr


# ---- refusals ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["truth.csv"], ["query,reference,score,group", "GROUND_TRUTH"]),
        (["text.csv"], ["text.csv", "normalized"]),
        (["infinite.csv"], ["infinite.csv", "cosine"]),
        (["none.csv"], ["none.csv", "no such file"]),
        (["sub.h5"], ["sub.h5"]),
        (["sub.h5", "none.csv"], ["none.csv", "no such file"]),
        (["sub.h5", "truth.csv", "--edits", "truth.csv"], ["truth.csv", "edits"]),
        (["sub.h5", "truth.csv", "--edits", "broken_edits.csv"], ["broken_edits.csv", "line 3"]),
        (["sub.h5", "truth.csv", "--images", "none"], ["none", "folder"]),
        (["sub.h5", "truth.csv", "--precision", "95"], ["--precision", "0.95"]),
        (["sub.h5", "truth.csv", "--output", "sub.h5"], ["--output", "sub.h5"]),
        (["sub.h5", "truth.csv", "--output", "photo.JPG"], ["--output", "photo.JPG", ".html"]),
        (["sub.h5", "truth.csv", "--output", "none/p.html"], ["none"]),
        (["matches.csv", "--threshold", "0.9"], ["--threshold", "GROUND_TRUTH"]),
        (["matches.csv", "--matching"], ["--matching", "GROUND_TRUTH"]),
        (["nan.csv"], ["nan.csv", "finite"]),
    ],
)
def test_refusals(flags, words, data, tmp_path, monkeypatch, capsys):
    for name in "sub.h5", "truth.csv":
        shutil.copy(data / name, tmp_path)
    (tmp_path / "broken_edits.csv").write_text(
        'query_id,edits\nQ0,"[[""crop"", {}]]"\nQ1,"{""a"": 1}"\n'
    )
    (tmp_path / "nan.csv").write_text("query,reference,score,group\na,b,nan,0\n")
    header = "query,reference,score,group,cosine,normalized\n"
    (tmp_path / "text.csv").write_text(f"{header}a,b,0.5,0,0.9,high\n")
    (tmp_path / "infinite.csv").write_text(f"{header}a,b,0.5,0,inf,\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert_refused(called(report.main, flags, capsys), *words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["sub.h5", "truth.csv", "query_edits.csv", "own_edits.csv"])
@pytest.mark.parametrize("spelling", ["absolute", "dots", "symbolic link", "hard link"])
def test_no_spelling_of_output_replaces_what_it_reads(
    name, spelling, data, tmp_path, monkeypatch, capsys
):
    for file in "sub.h5", "truth.csv", "query_edits.csv":
        shutil.copy(data / file, tmp_path)
    shutil.copy(data / "query_edits.csv", tmp_path / "own_edits.csv")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(name)
    (tmp_path / "hard").hardlink_to(tmp_path / name)
    output = {
        "absolute": tmp_path / name,
        "dots": f"folder/../{name}",
        "symbolic link": "link",
        "hard link": "hard",
    }[spelling]
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    flags = ["sub.h5", "truth.csv", "--output", output]
    if name == "own_edits.csv":
        flags += ["--edits", "own_edits.csv"]
    assert_refused(called(report.main, flags, capsys), "--output", "replace")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_output_may_replace_an_earlier_page_but_not_the_matches(pairs, tmp_path, capsys):
    pairs.to_csv(tmp_path / "m.csv", index=False, errors="surrogateescape")
    before = (tmp_path / "m.csv").read_bytes()
    dots = f"{tmp_path}/../{tmp_path.name}/m.csv"
    assert_refused(called(report.main, [tmp_path / "m.csv", "--output", dots], capsys), "replace")
    assert (tmp_path / "m.csv").read_bytes() == before
    for _ in range(2):
        assert report.main([str(tmp_path / "m.csv"), "--output", str(tmp_path / "p.html")]) == 0
    capsys.readouterr()


def test_refusal_as_a_user_sees_it(data):
    assert_refused(run(SCRIPT, data / "sub.h5"), "sub.h5", "GROUND_TRUTH")


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.mark.parametrize("kind", ["submission", "matches", "views", "hard names"])
def test_browser(kind, browser, submission_page, pairs, hard, tmp_path):
    path = tmp_path / "m.html"
    if kind == "submission":
        path = submission_page[1]
    elif kind == "matches":
        report.write_match_page(path, pairs, [("/x/" + "long" * 100, "empty")], 0.604169)
    elif kind == "views":
        image = str(write_image(tmp_path / "image.png", 0))
        names = [view.name for view in ALL_VIEWS]
        rows = [row(image, f"/{'long' * 30}/{name}", 0.9, 1, name, -0.1234) for name in names]
        rows.append(row(image, "/gone/b", 0.8, 2, "bottom right mirrored", -0.2))
        report.write_match_page(path, table(*rows), scored_by="normalized score")
    else:
        path = hard[0]
    page, faults, requests, brightness = browser.new_page(), [], [], {}
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert widths and all(widths)
    for scheme, width in ("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        texts = page.evaluate(
            "[...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill)"
        )
        assert texts and paper not in texts
        page.screenshot(path=tmp_path / "shot.png", full_page=True)
        brightness[scheme, width] = np.asarray(
            Image.open(tmp_path / "shot.png").convert("L")
        ).mean()
    page.close()
    assert faults == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert all(
        brightness["light", width] > 150 > 100 > brightness["dark", width] for width in (1280, 400)
    )


@pytest.fixture
def hard(tmp_path):
    """The page of a group with names that are hard to keep, and of a part, and its table."""
    folder = tmp_path / "images"
    paths = [str(folder / name) for name in HARD_NAMES]
    for number, path in enumerate(paths):
        write_image(folder / "image.png", number).rename(path)
    query = str(write_image(folder / "query.png", 20, (200, 100)))
    reference = str(write_image(folder / "reference.png", 21))
    rows = [row(one, other, 0.9 - n / 100) for n, (one, other) in enumerate(pairwise(paths))]
    rows.append(row(query, reference, 0.7, 2, "bottom right"))
    matches = table(*rows)
    report.write_match_page(tmp_path / "hard.html", matches)
    return tmp_path / "hard.html", matches


def test_ticked_pairs_are_saved_byte_for_byte(hard, browser, tmp_path):
    path, matches = hard
    page = browser.new_page()
    faults, requests = [], []
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    button = page.get_by_role("button", name="Save the pairs ticked as not copies")
    assert not button.is_visible()
    boxes = page.get_by_role("checkbox").all()
    assert len(boxes) == len(matches)
    for box in boxes:
        box.check()
    boxes[1].uncheck()
    assert "7 pairs ticked" in page.locator("main").inner_text()
    assert "--ignore not_copies.csv" in page.locator("main").inner_text()
    with page.expect_download() as download:
        button.click()
    assert download.value.suggested_filename == "not_copies.csv"
    download.value.save_as(tmp_path / "saved.csv")
    page.close()
    content = os.fsdecode((tmp_path / "saved.csv").read_bytes())
    header, *rows = csv.reader(io.StringIO(content, newline=""))
    assert header == ["query", "reference", "query_sha256", "reference_sha256"]
    lowest_first = matches[::-1]
    unticked = lowest_first.index[1]
    expected = lowest_first.drop(index=unticked)[header].to_numpy().tolist()
    assert rows == expected
    assert all(len(digest) == 64 for cells in rows for digest in cells[2:])
    read = pd.read_csv(tmp_path / "saved.csv", encoding_errors="surrogateescape")
    assert read.to_numpy().tolist() == expected
    assert faults == []
    assert {url.partition(":")[0] for url in requests} <= {"file", "data", "blob"}


def test_no_other_script_runs(hard, browser):
    page = browser.new_page()
    page.goto(hard[0].as_uri())
    page.evaluate(
        """() => {
        const script = document.createElement("script");
        script.textContent = "window.foreign = true";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", '<img src="x" onerror="window.foreign=1">');
        }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.foreign === undefined")
    page.close()


def test_without_javascript_there_is_nothing_to_tick(hard, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(hard[0].as_uri())
    text = page.locator("main").inner_text()
    assert "keep:" in text and "bottom right part of 1" in text and "0.9000" in text
    assert "not a copy" not in text and "Tick" not in text and "Save" not in text
    assert page.locator("input:visible, button:visible").count() == 0
    context.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_outline_lies_over_the_part(hard, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(hard[0].as_uri())
    assert page.locator(".part:visible").count() == 1
    image = page.get_by_alt_text("query.png").bounding_box()
    outline = page.locator(".part:visible rect").bounding_box()
    page.close()
    side = image["width"]  # of a square, in whose middle the image of 200 x 100 lies
    part = VIEW_OF_NAME["bottom right"]
    expected = {
        "x": image["x"] + side * part.left,
        "y": image["y"] + side / 4 + side / 2 * part.top,
        "width": side * part.size,
        "height": side / 2 * part.size,
    }
    assert outline == pytest.approx(expected, abs=3)


def test_a_pair_of_a_large_group_shows_its_images(browser, tmp_path):
    paths = [str(write_image(tmp_path / f"{n}.png", n)) for n in range(3)]
    rows = [row(paths[0], paths[1], 0.9), row(paths[2], paths[1], 0.8, view="top left")]
    report.write_match_page(tmp_path / "m.html", table(*rows))
    page = browser.new_page()
    page.goto((tmp_path / "m.html").as_uri())
    assert page.locator(".part:visible").count() == 0
    page.get_by_role("checkbox", name="1 and 2").focus()
    assert page.locator("figure", has_text="2.png").locator(".part").is_visible()
    page.get_by_role("checkbox", name="2 and 3").focus()
    assert page.locator(".part:visible").count() == 0
    page.close()
