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

EXP = Path(__file__).resolve().parents[2] / "exp"
SOURCE = "v83"
TARGETS = ("v86", "v98", "v107")
BANNER = "# ======== infrastructure"


def split_at_banner(text):
    """The lines of a script: (those of the experiment, those from the banner on).

    Raises ValueError where it has no banner.
    """
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(BANNER):
            return lines[:number], lines[number:]
    raise ValueError(f"has no line {BANNER!r}")


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


def insert_own_lines(lines, former, stage):
    """The lines of v83's section, with the tagged lines of the stage's former section.

    Raises ValueError where the line that a tagged one followed is no longer there, or there twice.
    """
    result = list(lines)
    tag = re.compile(rf"  # {stage}(: .*)?$")
    previous = None
    for line in former:
        if tag.search(line):
            if result.count(previous) != 1:
                raise ValueError(f"no single place for the line {line.strip()!r}")
            result.insert(result.index(previous) + 1, line)
        previous = line
    return result


def synchronized(text, source, stage):
    """The text of a stage's script with the infrastructure of `source`, the text of v83.py."""
    experiment, infrastructure = split_at_banner(text)
    former = split_sections(infrastructure)
    lines = list(experiment)
    for name, section in split_sections(split_at_banner(source)[1]).items():
        if name in former:
            lines += insert_own_lines(section, former[name], stage)
    return "\n".join(lines) + "\n"


def main(argv=None):
    """Copy or check; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say which stages differ")
    parser.add_argument("--exp", type=Path, default=EXP, help="folder of the stages")
    args = parser.parse_args(argv)
    source = (args.exp / f"{SOURCE}.py").read_text()
    differing = 0
    for stage in TARGETS:
        path = args.exp / f"{stage}.py"
        former = path.read_text()
        try:
            text = synchronized(former, source, stage)
        except ValueError as error:
            print(f"sync_infrastructure.py: error: {path}: {error}", file=sys.stderr)
            return 2
        if text != former:
            differing += 1
            print(f"{path}: {'differs' if args.check else 'updated'}")
            if not args.check:
                path.write_text(text)
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
