"""The plan on the console, and report.md at the end."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.files import atomic
from common.reproduction.checks import WARNING
from common.reproduction.disk import needed_gigabytes
from common.reproduction.plan import typed
from common.reproduction.running import clock

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = (
    *("torch", "torchvision", "timm", "augly", "pillow", "opencv-python-headless", "simplejpeg"),
    *("numpy", "faiss-cpu", "faiss-gpu"),
)


def in_hours(hours):
    """Hours in words."""
    if hours is None:
        return "hours unknown"
    if hours < 0.1:
        return "minutes"
    return f"about {hours:.1f} h"


# ---- plan ----


def print_plan(setup, steps, counts, finished, disks, obstacles, commands):
    """Say what will be done and what is missing. counts: of count_all(); finished: names of steps;
    disks: Filesystems; commands: whether to print that of each step.
    """
    assumed = " assumed" if setup.machine.assumed else ""
    print(f"Machine: {setup.machine}{assumed}")
    if not setup.machine.assumed:
        print(f"Images in {setup.input}: {images_there(setup, counts)}")
    print()
    for number, step in enumerate(steps, 1):
        print(f"{number:02}-{step.name}{describe(step, step.name in finished)}")
    print(f"\n{total(setup, steps, finished, disks)}")
    if commands:
        print(f"\nCommands, in {ROOT.name}/:")
        for step in steps:
            if step.prepared:
                print(f"    {step.prepared}")
            print(f"    {typed(step.command)}")
    if obstacles:
        print("\nIt cannot start before these are settled:")
        for line in obstacles:
            print(f"- {line}")


def images_there(setup, counts):
    """How many images of how many are there, of each folder that is needed."""
    parts = []
    for name, count in counts.items():
        of_all = f" of {setup.expected.images[name]:,}" if name in setup.expected.images else ""
        parts.append(f"{count:,}{of_all} {name}")
    return ", ".join(parts)


def describe(step, finished):
    """What a line of the plan says about a step, beside its name."""
    if finished:
        return ": done before"
    notes = []
    if step.hours != 0:
        notes.append(in_hours(step.hours))
    if step.fits:
        notes.append(step.fits)
    if step.gigabytes >= 0.05:
        notes.append(f"{step.gigabytes:.1f} GB of disk")
    if step.note:
        notes.append(step.note)
    return f": {'; '.join(notes)}" if notes else ""


def total(setup, steps, finished, disks):
    """Hours and disk in all."""
    to_do = [step for step in steps if step.name not in finished]
    if not to_do:
        return "In all: nothing is left to do"
    known = [step.hours for step in to_do if step.hours is not None]
    unknown = [step.name for step in to_do if step.hours is None]
    hours = sum(known)
    if unknown and hours == 0:
        hours = None
    text = f"In all: {in_hours(hours)}"
    if unknown:
        text += f"; unknown: {len(unknown)} of {len(to_do)} steps"
    if setup.machine.assumed:
        return f"{text}; {needed_gigabytes(steps, finished):.1f} GB of disk"
    for disk in disks:
        text += f"; {disk.needed:.1f} GB of disk for {disk.names}, {disk.free:.1f} GB are free"
    return text


# ---- report ----


def versions():
    """{library: version} of those that decide values."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit():
    """The commit of this repository, with "modified" where files differ from it; or unknown."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=, modified"]
    try:
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def circumstances(machine):
    """{"machine", "commit", "versions"} of this run, each in words."""
    parts = [str(machine)]
    if machine.driver:
        parts.append(f"driver {machine.driver}")
    if machine.cuda:
        parts.append(f"CUDA {machine.cuda}")
    parts.append(f"{platform.system()} {platform.machine()}")
    return {
        "machine": "; ".join(parts),
        "commit": commit(),
        "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
    }


def lines_of_circumstances(records):
    """Machine, commit and versions: a line of each where all steps had the same, else a line of
    each that one had, with their names. records: pairs of Step and dict.
    """
    lines = []
    for name in ("machine", "commit", "versions"):
        steps_of = {}
        for step, record in records:
            for attempt in record["attempts"]:
                steps = steps_of.setdefault(attempt[name], [])
                if step.name not in steps:
                    steps.append(step.name)
        for words, steps in steps_of.items():
            which = f" ({', '.join(steps)})" if len(steps_of) > 1 else ""
            lines.append(f"- {name}: {words}{which}")
    return lines


def number(value):
    """A score with seven digits, or a dash."""
    return "-" if value is None else f"{value:.7f}"


def difference(own, theirs):
    """The difference to an expected value, signed, or a dash where there is none."""
    return "-" if theirs is None else f"{own - theirs:+.7f}"


def headline(setup):
    """The title of a report."""
    if setup.train:
        start = "training"
    elif setup.expected.disc21:
        start = "the published weights"
    else:
        start = "given weights"
    kind = "Reproduction" if setup.expected.disc21 else "Rehearsal, not DISC21:"
    title = f"# {kind} from {start}"
    if setup.phase == 2:
        title += ", phase 2"
    if setup.references is not None:
        title += f", a first look at {setup.references:,} references"
    return title


def lines_of_scores(setup, scores):
    """A table of the scores, what has to be said beside them, and likely causes."""
    word = setup.expected.word
    lines = [
        f"| score | µAP | R@P90 | {word} µAP | R@P90 | difference µAP | R@P90 | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        own = [score["average_precision"], score["recall_p90"]]
        theirs = score["expected"] or [None, None]
        cells = [number(value) for value in (*own, *theirs)]
        cells += [difference(*pair) for pair in zip(own, theirs, strict=True)]
        lines.append(f"| {score['title']} | {' | '.join(cells)} | {score['verdict']} |")
    lines.append("")
    for score in scores:
        if score["note"]:
            lines.append(f"{score['title']}: {score['note']}.")
    if any(score["expected"] for score in scores):
        lines.append(f"Reproduced: within {setup.tolerance} of the {word} score.")
    lines.append("")
    for score in scores:
        if score["causes"]:
            lines.append(f"Likeliest causes for {score['title']}:")
            lines += [f"{i}. {cause}" for i, cause in enumerate(score["causes"], 1)]
            lines.append("")
    return lines


def lines_of_warnings(records):
    """The warnings of the checks. records: pairs of Step and dict."""
    lines = []
    for step, record in records:
        for fact in record["facts"]:
            if fact.startswith(WARNING):
                lines.append(f"- {step.name}: {fact}")
    return [*lines, ""] if lines else []


def lines_of_steps(records):
    """A table of the steps, the curves of the trainings. records: pairs of Step and dict."""
    lines = ["| step | time | found |", "|---|---|---|"]
    for step, record in records:
        facts = "; ".join(record["facts"]).replace("|", "/")
        lines.append(f"| {step.name} | {clock(record['seconds'])} | {facts} |")
    for step, record in records:
        if record["curve"]:
            points = ", ".join(f"{at:,}: {loss}" for at, loss in record["curve"])
            lines += ["", f"Loss of {step.name} by step: {points}"]
    return lines


def write_report(path, setup, steps, state):
    """Write report.md; returns its scores."""
    records = [(step, state.records[step.name]) for step in steps]
    scores = [record["score"] for _, record in records if record["score"]]
    lines = [headline(setup), "", *lines_of_circumstances(records)]
    lines.append(f"- network: {setup.arch}, input size {setup.input_size or 'as published'}")
    if setup.expected.source:
        lines.append(f"- expected: what {setup.expected.source} says")
    lines += ["", *lines_of_scores(setup, scores)]
    lines += [*lines_of_warnings(records), *lines_of_steps(records), "", "```"]
    for _, record in records:
        lines += record["typed"]
    lines += ["```", ""]
    with atomic(path) as file:
        file.write_text("\n".join(lines))
    return scores
