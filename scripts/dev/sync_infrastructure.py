"""Copy the infrastructure of exp/v83.py to the other stages: what `make sync` runs.

    python scripts/dev/sync_infrastructure.py            # write the stages that differ
    python scripts/dev/sync_infrastructure.py --check    # write nothing; exit code 1 if one differs

The infrastructure is everything below the line `# ======== infrastructure`, in sections that begin
with `# ---- name ----`. A stage keeps its own set of sections: v107 has no augmentation operations.
Lines that end in the stage's own tag, such as `# v107`, stay where they are: after the line of v83
that they follow now.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

from common.errors import InputError, one_line_errors
from common.files import atomic

EXP = Path(__file__).resolve().parents[2] / "exp"
SOURCE = "v83"
TARGETS = ("v86", "v98", "v107")
BANNER = "# ======== infrastructure"


def split_at_banner(text, path):
    """The lines of a script: (those of the experiment, those from the banner on).

    Raises InputError, naming its path, where it has no banner.
    """
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(BANNER):
            return lines[:number], lines[number:]
    raise InputError(f"{path}: has no line {BANNER!r}; add it above the infrastructure")


def split_sections(lines):
    """{name of the section: its lines} of the infrastructure; the lines before the first section
    have the name "".
    """
    sections = {"": []}
    name = ""
    for line in lines:
        match = re.fullmatch(r"# ---- (.+) ----", line)
        if match:
            name = match[1]
            sections[name] = []
        sections[name].append(line)
    return sections


def insert_own_lines(lines, former, path):
    """The lines of v83's section, with the tagged lines of the stage's former section.

    Raises InputError, naming the stage's path, where the line that a tagged one followed is no
    longer there, or there twice.
    """
    result = list(lines)
    tag = re.compile(rf"  # {path.stem}(: .*)?$")
    previous = None
    for line in former:
        if tag.search(line):
            if result.count(previous) != 1:
                raise InputError(
                    f"{path}: no single place for the line {line.strip()!r}; move it below a line "
                    f"that {SOURCE}.py has once"
                )
            result.insert(result.index(previous) + 1, line)
        previous = line
    return result


def synchronized(path, source):
    """The text of the stage's script at `path` with the infrastructure of the one at `source`."""
    experiment, infrastructure = split_at_banner(path.read_text(), path)
    _, source_infrastructure = split_at_banner(source.read_text(), source)
    former = split_sections(infrastructure)
    lines = list(experiment)
    for name, section in split_sections(source_infrastructure).items():
        if name in former:
            lines += insert_own_lines(section, former[name], path)
    return "\n".join(lines) + "\n"


@one_line_errors
def main(argv=None):
    """Copy or check; returns the exit code: 0, 1 where --check finds a difference, or 2 with one
    line on stderr.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say which stages differ")
    parser.add_argument("--exp", type=Path, default=EXP, help="folder of the stages")
    args = parser.parse_args(argv)
    differing = 0
    for stage in TARGETS:
        path = args.exp / f"{stage}.py"
        text = synchronized(path, args.exp / f"{SOURCE}.py")
        if text != path.read_text():
            differing += 1
            print(f"{path}: {'differs' if args.check else 'updated'}")
            if not args.check:
                with atomic(path) as temporary:
                    temporary.write_text(text)
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
