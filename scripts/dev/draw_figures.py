r"""Redraw the images in docs/ and print the tables that belong to them: what `make figures` runs.

    python scripts/dev/draw_figures.py report  # runs the demo, then draws docs/report.png
    python scripts/dev/draw_figures.py report --page demo/report.html  # of a demo that has run
    python scripts/dev/draw_figures.py edits PHOTOS  # docs/edits.png, from 1,000 photographs

`report` draws an excerpt of the demo's report page as Chromium shows it, in light colors and 1,200
pixels wide. The demo trains with three seeds and prints their means, in the form of the table in
docs/EVIDENCE.md.

`edits` makes the development split of weights/README.md, extracts descriptors of the small v98 and
perceptual hashes, and plots their scores by kind of edit. It prints the table of docs/MATCHING.md,
and the scores of its last two rows.

The pages are edited by hand. Photographs that report.png shows are credited in docs/MATCHING.md.
"""

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

from PIL import Image
from playwright.sync_api import sync_playwright

from common.commands import run_command
from common.errors import InputError, one_line_errors
from common.files import atomic

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1200  # pixels
EXCERPT = {"Scores": 0, "Best true matches": 3, "Confident mistakes": 2}  # section: its cards
CUT = """excerpt => {
    const titles = [];
    for (const section of document.querySelectorAll("section")) {
        const title = section.querySelector("h2").textContent;
        if (!(title in excerpt)) {
            section.remove();
            continue;
        }
        titles.push(title);
        const cards = [...section.querySelectorAll(".card")];
        for (const card of cards.slice(excerpt[title])) card.remove();
    }
    document.querySelector("footer").remove();
    return titles;
}"""


# ---- report.png ----


def find_chromium():
    """The path of the system's Chromium. Raises InputError where there is none."""
    for name in CHROMIUM_NAMES:
        path = shutil.which(name)
        if path:
            return path
    raise InputError(
        f"report.png: needs Chromium, and there is none of {', '.join(CHROMIUM_NAMES)}; install one"
    )


def cut_excerpt(page):
    """Remove everything but EXCERPT from a report page that a browser has opened.

    Raises InputError where a section is missing.
    """
    titles = page.evaluate(CUT, EXCERPT)
    missing = [title for title in EXCERPT if title not in titles]
    if missing:
        raise InputError(f"{page.url}: has no section {missing[0]!r}; give a page of report.py")


def draw_report(page_file, output):
    """Draw the excerpt of a report page into a PNG."""
    if not page_file.is_file():
        raise InputError(f"{page_file}: no such file; run `make demo` first")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium())
        page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
        page.goto(page_file.resolve().as_uri())
        cut_excerpt(page)
        png = page.screenshot(type="png", full_page=True)
        browser.close()
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(256)  # a third of the size
    with atomic(output) as path:
        image.save(path, "PNG", optimize=True)


# ---- edits.png ----


def draw_edits(photos, folder, output):
    """Plot the scores by kind of edit on phase 2 of the development split, made in `folder`."""
    data = f"{folder}/input"
    truth = f"{data}/private_ground_truth.csv"
    split = ["--training", "10", "--references", "600", "--queries", "450"]
    run_command(["scripts/make_dataset.py", data, "--photos", str(photos), *split])

    network = ["-a", "tf_efficientnet_lite0", "--input-size", "160"]
    network += ["--weight", "weights/v98.pth.tar"]
    extract = ["--mode", "extract", "--target-set", "qr", "--phase", "2", "--batch-size", "100"]
    run_command(["exp/v98.py", *network, *extract, "--output", f"{folder}/v98", f"{data}/"])
    hashes = f"{folder}/hashes"
    run_command(["scripts/dev/hash_images.py", data, "--phase", "2", "--output", hashes])

    submissions = {
        "v98 (small)": f"{folder}/v98/extract/fb-isc-submission-phase2.h5",
        "pHash": f"{hashes}/phash.csv",
        "dHash": f"{hashes}/dhash.csv",
    }
    named = [f"{name}={file}" for name, file in submissions.items()]
    run_command(["scripts/dev/plot_edits.py", truth, *named, "--output", str(output)])
    for file in submissions.values():
        run_command(["scripts/eval_metrics.py", file, truth])


# ---- main ----


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    report = figures.add_parser("report", help="an excerpt of the demo's report page")
    report.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="report page to draw (default: run the demo in demo/, and draw its page)",
    )
    edits = figures.add_parser("edits", help="scores by kind of edit")
    edits.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photographs")
    for figure, name in (report, "report.png"), (edits, "edits.png"):
        figure.add_argument(
            "--output",
            type=Path,
            default=ROOT / "docs" / name,
            metavar="FILE",
            help=f"image to write (default: docs/{name})",
        )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Draw the figure; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    output = args.output.resolve()
    if args.figure == "edits":
        with tempfile.TemporaryDirectory() as folder:
            draw_edits(args.photos.resolve(), folder, output)
    else:
        find_chromium()  # before the half hour that the demo takes
        page_file = args.page
        if page_file is None:
            run_command(["scripts/demo.py", "--folder", "demo", "--seeds", "3"])
            page_file = ROOT / "demo" / "report.html"
        draw_report(page_file, output)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
