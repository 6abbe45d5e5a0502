"""plot_edits.py on small submissions: the scores it prints and draws, and what it refuses."""

import json

import pytest
from PIL import Image

import plot_edits
from conftest import ROOT, assert_refused, called, run

SCRIPT = ROOT / "scripts" / "dev" / "plot_edits.py"
# {query: (its reference, its edits)}. The first submission finds crops, the second the others.
QUERIES = {
    "Q00000": ("R000000", ["crop"]),
    "Q00001": ("R000001", ["crop", "pad_square"]),
    "Q00002": ("R000002", ["pad_square"]),
    "Q00003": ("", ["blur"]),
}


@pytest.fixture
def data(tmp_path):
    """Ground truth, edits and two submissions of the matching track."""
    pairs = "".join(f"{query},{reference}\n" for query, (reference, _) in QUERIES.items())
    (tmp_path / "truth.csv").write_text(f"query_id,reference_id\n{pairs}")
    lines = ["query_id,edits"]
    for query, (_, names) in QUERIES.items():
        edits = json.dumps([[name, {}] for name in [*names, "encoding_quality"]]).replace('"', '""')
        lines.append(f'{query},"{edits}"')
    (tmp_path / "query_edits.csv").write_text("\n".join(lines) + "\n")
    for name, found in (("one", "01"), ("two", "2")):
        rows = "".join(f"Q0000{i},R00000{i if i in found else 9},{10 - int(i)}\n" for i in "012")
        (tmp_path / f"{name}.csv").write_text(f"query_id,reference_id,score\n{rows}")
    return tmp_path


def test_whole_command(data):
    submissions = [
        f"{title}={data}/{file}.csv" for title, file in (("one", "one"), (r"$\x$", "two"))
    ]
    result = run(SCRIPT, data / "truth.csv", *submissions, "-o", data / "edits.png")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        r"| µAP | one | $\x$ |",
        "| --- | --- | --- |",
        "| pad square | 0.500 | 0.250 |",
        "| crop | 1.000 | 0.000 |",
        "| all queries | 0.667 | 0.111 |",
    ]
    with Image.open(data / "edits.png") as image:
        assert image.format == "PNG" and image.width == 960


def test_draws_the_scores_of_the_table():
    table = {"crop": {"a": 0.25, "b": 0.5}, "all queries": {"a": 1.0, "b": 0.0}}
    (axes,) = plot_edits.draw(table).axes
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [
        [0.25, 1.0],
        [0.5, 0.0],
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["crop", "all queries"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_wrong_input_is_refused(data, capsys):
    truth, output = str(data / "truth.csv"), str(data / "edits.png")
    for arguments, words in (
        ((truth, "one.csv", "-o", output), ["one.csv: must be NAME=FILE"]),
        ((truth, f"a={data}/one.csv", f"a={data}/two.csv", "-o", output), ["NAME"]),
        ((truth, f"a={data}/one.csv", "-o", "edits.txt"), ["--output edits.txt", "png"]),
        ((truth, f"a={data}/one.csv", "-o", f"{data}/none/edits.png"), [f"{data}/none/edits.png"]),
        ((truth, f"a={data}/none.csv", "-o", output), [f"{data}/none.csv"]),
        (
            (truth, f"a={data}/one.csv", "--edits", f"{data}/none.csv", "-o", output),
            [f"{data}/none.csv"],
        ),
    ):
        assert_refused(called(plot_edits.main, arguments, capsys), *words)
    assert_refused(run(SCRIPT, truth, f"a={data}/none.csv", "-o", output), data / "none.csv")
    assert not (data / "edits.png").exists()
