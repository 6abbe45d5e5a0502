"""scripts/dev/sync_infrastructure.py refuses scripts that it cannot read, in one line.

tests/exp/test_scripts_alike.py tests what it copies.
"""

import shutil

import sync_infrastructure
from conftest import ROOT, assert_refused, called


def test_a_folder_without_stages_is_refused(tmp_path, capsys):
    for flags in (), ("--check",):
        result = called(sync_infrastructure.main, ["--exp", tmp_path / "none", *flags], capsys)
        assert_refused(result, tmp_path / "none")


def test_a_script_without_the_banner_is_refused_and_stays(tmp_path, capsys):
    for stage in ("v83", "v86", "v98", "v107"):
        shutil.copy(ROOT / "exp" / f"{stage}.py", tmp_path)
    path = tmp_path / "v98.py"
    path.write_text("no banner\n")
    result = called(sync_infrastructure.main, ["--exp", tmp_path], capsys)
    assert_refused(result, path, "# ======== infrastructure")
    assert path.read_text() == "no banner\n"
    assert not list(tmp_path.glob(".*"))
