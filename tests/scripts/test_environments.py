"""match.py and report.py where the user has no home, or no UTF-8: the same bytes everywhere."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

MATCH = ROOT / "scripts" / "match.py"
REPORT = ROOT / "scripts" / "report.py"
NAMES = [b"plain.png", "ünïcode 図.png".encode(), b"latin \xe9.png", b"bytes \xff\xfe.png"]
UNREADABLE = ["bad 図 ü.png".encode(), b"bad \xe9\x80.png"]


def start(script, *arguments, cwd, prefix=(), **environment):
    """Run a script in an environment that has PATH and nothing else of this one's; stdout and
    stderr are bytes.
    """
    variables = {"PATH": os.environ["PATH"], **environment}
    command = [*prefix, sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with `images` in it: copies of one image, and two files that are no images, with
    names of any bytes.
    """
    workplace = tmp_path_factory.mktemp("workplace")
    root = workplace / "images"
    root.mkdir()
    colors = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((90, 60), Image.Resampling.BICUBIC)
    for name in NAMES:
        with open(os.path.join(os.fsencode(root), name), "wb") as file:  # noqa: PTH118, PTH123
            image.save(file, "PNG")
    for name in UNREADABLE:
        with open(os.path.join(os.fsencode(root), name), "wb") as file:  # noqa: PTH118, PTH123
            file.write(b"no image")
    return workplace


# ---- no home ----

NO_PASSWD_ENTRY = ["unshare", "-U", "--map-user=54321"]
can_unshare = (
    shutil.which("unshare")
    and subprocess.run([*NO_PASSWD_ENTRY, "true"], capture_output=True).returncode == 0
)
needs_unshare = pytest.mark.skipif(not can_unshare, reason="needs user namespaces")


@pytest.mark.parametrize("user", ["known", pytest.param("unknown", marks=needs_unshare)])
@pytest.mark.parametrize("options", [["--no-cache"], []])
def test_without_a_home(workplace, tmp_path, user, options):
    prefix = NO_PASSWD_ENTRY if user == "unknown" else []
    cache = {} if user == "unknown" else {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = start(MATCH, "images", *options, cwd=workplace, prefix=prefix, **cache)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b"1.000000") >= 6
    result = start(MATCH, "--help", cwd=workplace, prefix=prefix, **cache)
    assert result.returncode == 0 and b"--cache FILE" in result.stdout


# ---- locales ----


@pytest.fixture(scope="module")
def latin(tmp_path_factory):
    """The variables of an ISO-8859-1 locale, made here."""
    if not shutil.which("localedef"):
        pytest.skip("needs localedef")
    folder = tmp_path_factory.mktemp("locales")
    name = "en_US.ISO-8859-1"
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / name)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the sources of locales")
    return {"LOCPATH": str(folder), "LC_ALL": name}


UTF_8 = {"LC_ALL": "C.UTF-8"}
LOCALES = {
    "C": {"LC_ALL": "C"},
    "POSIX": {"LC_ALL": "POSIX"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def outputs(workplace, locale):
    """What the commands write in a locale: {name of a file: its bytes}, and match.py's stderr."""
    out = workplace / "out"
    out.mkdir()
    options = ["--no-cache", "--quiet", "--output", out / "a.csv", "--output", out / "a.jsonl"]
    options += ["--groups", out / "groups.jsonl", "--report", out / "page.html"]
    result = start(MATCH, "images", *options, cwd=workplace, **locale)
    assert result.returncode == 0, result.stderr
    report = start(REPORT, out / "a.csv", "--output", out / "b.html", cwd=workplace, **locale)
    assert report.returncode == 0, report.stderr
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    return contents, result.stderr


@pytest.fixture(scope="module")
def expected(workplace):
    """What the commands write in a UTF-8 locale."""
    return outputs(workplace, UTF_8)[0]


@pytest.mark.parametrize("name", ["C", "POSIX", "ASCII", "ISO-8859-1"])
def test_names_keep_their_bytes_in_every_locale(workplace, expected, request, name):
    locale = LOCALES.get(name) or request.getfixturevalue("latin")
    actual, stderr = outputs(workplace, locale)
    assert actual == expected
    for name in NAMES:
        assert b"images/" + name in actual["a.csv"]
    rows = [json.loads(line) for line in actual["a.jsonl"].splitlines()]
    names = {os.fsencode(row[side]) for row in rows for side in ("query", "reference")}
    assert names == {b"images/" + name for name in NAMES}
    assert b"bad \\xe9\\x80.png: no image" in stderr  # an escape, as the bytes are no UTF-8
    assert len(stderr.splitlines()) == 1 + len(UNREADABLE)
