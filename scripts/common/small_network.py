"""The small network in weights/, which match.py and export.py use by default."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL, SMALL_ARCH, SMALL_SIZE = ROOT / "weights" / "v98.pth.tar", "test_byobnet", 96
