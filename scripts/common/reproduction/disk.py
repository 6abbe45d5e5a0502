"""Disk that the steps to come need, and what is free, by filesystem."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Filesystem:
    """What is written to one filesystem: GB that are needed and that are free.

    folders: of those that the user named, which lie there.
    """

    free: float
    needed: float = 0
    folders: list = field(default_factory=list)

    @property
    def names(self):
        """The folders in words."""
        return " and ".join(str(folder) for folder in self.folders)


def needed_gigabytes(steps, finished):
    """GB that the steps to come write. finished: names of steps."""
    return sum(step.gigabytes for step in steps if step.name not in finished)


def filesystems(setup, steps, finished):
    """The list of Filesystems that the steps to come write to: images to the input, all else to the
    output, which may be other disks.
    """
    found = {}
    counted = set()  # two extractions keep what they have in the same folder
    for step in steps:
        if step.name in finished or not step.gigabytes:
            continue
        present = existing(ROOT / step.writes[0])
        device = present.stat().st_dev
        if device not in found:
            found[device] = Filesystem(shutil.disk_usage(present).free / 1e9)
        filesystem = found[device]
        there = written_before(step) - counted
        counted |= there
        sizes = sum(path.stat().st_size for path in there)
        filesystem.needed += max(0, step.gigabytes - sizes / 1e9)
        folder = setup.input if step.downloads else setup.output
        if folder not in filesystem.folders:
            filesystem.folders.append(folder)
    return list(found.values())


def written_before(step):
    """The files, a set of paths, that an unfinished training or extraction has written already."""
    found = set()
    if step.trains:
        folder = ROOT / step.writes[0].parent
        found.update(folder.glob("*.pth.tar"))
    if step.unfinished:
        found.update(path for path in (ROOT / step.unfinished).rglob("*") if path.is_file())
        found.update(ROOT / path for path in step.writes if (ROOT / path).is_file())
    return found


def existing(path):
    """A path, or the nearest folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path
