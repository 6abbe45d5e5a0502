"""scripts/dev/draw_figures.py: the excerpt of a report page, and the commands behind edits.png."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

import draw_figures
import report
from common.errors import InputError
from conftest import assert_refused, called, run

needs_chromium = pytest.mark.skipif(
    not any(map(shutil.which, draw_figures.CHROMIUM_NAMES)), reason="no Chromium on this machine"
)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report page with more than the excerpt shows: 5 matches, 3 mistakes, 3 missed copies."""
    folder = tmp_path_factory.mktemp("page")
    truth = [f"Q{i:05},R{i:06}" for i in range(8)]
    found = [f"Q{i:05},R{i if i < 5 else 9:06},{10 - i}" for i in range(8)]
    (folder / "truth.csv").write_text("\n".join(["query_id,reference_id", *truth, ""]))
    (folder / "found.csv").write_text("\n".join(["query_id,reference_id,score", *found, ""]))
    page = folder / "report.html"
    argv = [folder / "found.csv", folder / "truth.csv", "--output", page]
    assert report.main([str(argument) for argument in argv]) == 0
    return page


@pytest.fixture
def page(page_file):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=draw_figures.find_chromium())
        page = browser.new_page()
        page.goto(page_file.as_uri())
        yield page
        browser.close()


@needs_chromium
def test_the_excerpt_has_some_sections_and_few_cards(page):
    assert page.locator("section").count() > 3
    draw_figures.cut_excerpt(page)
    assert page.locator("h2").all_text_contents() == list(draw_figures.EXCERPT)
    sections = page.locator("section").all()
    assert [section.locator(".card").count() for section in sections] == [0, 3, 2]


@needs_chromium
def test_a_page_without_the_sections_is_refused(page):
    page.set_content("<section><h2>Scores</h2></section><footer></footer>")
    with pytest.raises(InputError, match="has no section 'Best true matches'"):
        draw_figures.cut_excerpt(page)


@needs_chromium
def test_draws_the_page_of_the_demo(page_file, tmp_path, monkeypatch, capsys):
    """The demo takes half an hour with three seeds, so its page is put where it writes it."""
    output = tmp_path / "report.png"

    def write_page(command):
        assert command[0] == "scripts/demo.py"
        args = importlib.import_module("demo").parse_args(command[1:])
        assert args.seeds == 3
        (tmp_path / args.folder).mkdir()
        shutil.copy(page_file, tmp_path / args.folder / "report.html")

    monkeypatch.setattr(draw_figures, "run_command", write_page)
    monkeypatch.setattr(draw_figures, "ROOT", tmp_path)
    assert draw_figures.main(["report", "--output", str(output)]) == 0
    image = Image.open(output)
    assert image.format == "PNG" and image.width == 1200
    assert np.asarray(image.convert("L")).mean() > 200  # light
    assert capsys.readouterr().out == f"{output}\n"
    assert list(tmp_path.glob(".*")) == []


def test_without_chromium_nothing_runs(tmp_path):
    output = tmp_path / "report.png"
    result = run("scripts/dev/draw_figures.py", "report", "--output", output, PATH=str(tmp_path))
    assert_refused(result, "report.png", "Chromium")
    assert result.stdout == ""  # commands are printed before they run
    assert list(tmp_path.iterdir()) == []


@needs_chromium
def test_a_missing_page_is_refused(tmp_path, capsys):
    argv = ["report", "--page", tmp_path / "none.html", "--output", tmp_path / "report.png"]
    assert_refused(called(draw_figures.main, argv, capsys), "none.html", "make demo")


def test_the_commands_behind_edits_parse_and_chain(tmp_path, monkeypatch):
    """They take minutes and a thousand photographs, so their arguments are parsed instead."""
    parsed = {}

    def parse(command):
        script, *argv = command
        name = Path(script).stem
        parsed.setdefault(name, []).append(importlib.import_module(name).parse_args(argv))

    monkeypatch.setattr(draw_figures, "run_command", parse)
    output = tmp_path / "edits.png"
    assert draw_figures.main(["edits", str(tmp_path), "--output", str(output)]) == 0
    (dataset,) = parsed["make_dataset"]
    (extraction,) = parsed["v98"]
    (hashing,) = parsed["hash_images"]
    (plot,) = parsed["plot_edits"]
    assert dataset.photos == tmp_path and plot.output == output
    assert Path(extraction.data) == hashing.data == dataset.out == plot.ground_truth.parent
    assert extraction.phase == hashing.phase == 2
    submissions = [
        Path(extraction.output, "extract", "fb-isc-submission-phase2.h5"),
        hashing.output / "phash.csv",
        hashing.output / "dhash.csv",
    ]
    assert [path for _, path in plot.submissions] == submissions
    assert len(parsed["eval_metrics"]) == 3
