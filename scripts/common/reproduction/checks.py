"""The checks between the steps: each returns Findings for the report, or raises InputError with
what is wrong and the likely cause.
"""

import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np

from common.descriptors import read_train
from common.errors import InputError
from common.files import atomic, sha256_of
from common.images import STAGE_SUFFIXES
from common.parallel import start_worker
from common.reproduction import published
from common.submissions import read_submission

ROOT = Path(__file__).resolve().parents[3]
KNOWN_ANSWERS = ROOT / "docs" / "known_answers.json"
ANSWER_KEYS = {"weights", "stage", "arch", "sha256", "input_size", "descriptors"}
PROBE_IMAGES = 12
PUBLIC_QUERIES = 25_000  # of phase 1, in the ground truth
# Least cosine of a descriptor with the recorded one. Measured with weights/v98.pth.tar: fp16 gives
# 0.99999, bfloat16 0.9978, GeM's exponent 1.1 0.9988, 150 pixels for 160 give 0.84.
KNOWN_COSINE = 0.999
# Largest mean cosine of different images; a collapsed network has 1. Measured: 0.27 with the
# networks of weights/; without any training 0.94 (test_byobnet), 0.59 (EfficientNetV2-M). So a
# network that has not learned may pass here; its loss shows it.
COLLAPSED = 0.9
# What is said of an extraction, whose weights passed with the generated images.
ALIKE = "the network has collapsed, or the images are alike: look at some of them"
NORM_ERROR = 0.01  # fp16 rounds
MAX_SKIPPED = 0.001  # share of the steps
SAMPLE = 1000  # rows whose cosines are looked at
WARNING = "warning: "  # begins a fact that the report repeats
OWN_TRAINING = "the own training: compare its loss curve, machine and flags with another report's"
CAUSES_ELSEWHERE = [  # of a score on data that are not DISC21
    "another --input-size than that of the expected score",
    "other weights: compare their SHA-256",
    "other images, or another ground truth",
]


@dataclass
class Findings:
    """What a check found: lines for the report, the score, the curve of the loss."""

    facts: list = field(default_factory=list)
    score: dict | None = None
    curve: list = field(default_factory=list)


# ---- data ----


def folder_of_images(root, name):
    """The folder of some images, under DISC21's own name too, or None where there is none."""
    names = [name, published.IN_BUCKET.get(name, name)]
    for path in (Path(root, other) for other in names):
        if path.is_dir():
            return path
    return None


def image_entries(root, name):
    """Iterate over the os.DirEntry of each image of a folder, none where there is no folder."""
    folder = folder_of_images(ROOT / root, name)
    if folder is None:
        return
    for entry in os.scandir(folder):
        if entry.name.lower().endswith(STAGE_SUFFIXES) and not entry.name.startswith("."):
            yield entry


def images_by_id(root, name):
    """{id: path} of the images of a folder."""
    images = {}
    for entry in image_entries(root, name):
        images[entry.name.rpartition(".")[0]] = Path(entry.path)
    return images


def count_images(root, name):
    """How many images a folder has. A million of them take a second, by id some more."""
    return sum(1 for _ in image_entries(root, name))


def wrong_count(path, name, count, expected, remedy):
    """What is wrong with the number of images in a folder, or None. remedy: against an incomplete
    download of DISC21.
    """
    wanted = expected.images.get(name)
    if wanted is None:
        return None if count else f"{path}: holds no image; put them there"
    if count == wanted:
        return None
    if not expected.disc21:
        return f"{path}: {count:,} images, expected {wanted:,} ({expected.source}); correct one"
    if count > wanted:
        return f"{path}: {count:,} images, DISC21 has {wanted:,}; move the others away"
    if not count:
        return f"{path}: is missing; {remedy}"
    return f"{path}: {count:,} of {wanted:,} images; {remedy}"


def check_count(root, name, expected, log):
    """Whether a folder has as many images as expected."""
    count = count_images(root, name)
    remedy = "run this again with --download, which fetches only what is missing"
    wrong = wrong_count(root / name, name, count, expected, remedy)
    if wrong:
        raise InputError(wrong)
    return Findings([f"{name}: {count:,} images"])


def source_of_truth(path, expected):
    """Where a ground truth comes from: a command, or words."""
    if not expected.disc21:
        return "that of these data, with the columns query_id,reference_id"
    if path.name == "public_ground_truth.csv":
        return f"{published.GROUND_TRUTH} {path.parent}/"
    return published.PRIVATE_GROUND_TRUTH


def remedy_of(finding, truths, expected):
    """What helps against a finding of check_input.py, with a semicolon before it, or ""."""
    if not expected.disc21:
        return ""
    if any(words in finding for words in ("are missing", "no such folder", "holds no image")):
        return (
            "; likely a download that was interrupted: --download fetches what is missing, as "
            "`aws s3 sync` does"
        )
    for truth in truths:
        if not finding.startswith(f"{truth}: "):
            continue
        if "have no image" in finding:
            return (
                "; the images are of the other phase, or incomplete: --download fetches what is "
                "missing"
            )
        return f"; its source: {source_of_truth(truth, expected)}"
    return ""


def check_data(root, folders, expected, log, truths):
    """Findings of check_input.py on what the steps read, then the numbers of images. Entries that
    are no images do no harm, and are facts.
    """
    printed = [line for line in last_run(log).splitlines() if line.strip()]
    if not printed or not printed[-1].startswith(f"{root}: "):  # such as a traceback
        raise InputError(f"{log}: check_input.py did not end with its summary; look there")
    *findings, summary = (line for line in printed if line.startswith(str(root)))
    read = [f"{truth}: " for truth in truths]
    for name in folders:
        read += [f"{root / name}: ", f"{root / published.IN_BUCKET.get(name, name)}: "]
    mine = [line for line in findings if line.startswith(tuple(read))]
    strays = [line for line in mine if "entries are no images" in line]
    faults = [line for line in mine if line not in strays]
    if faults:
        more = f" (and {len(faults) - 1} more findings: {log})" if len(faults) > 1 else ""
        finding = faults[0].replace(", or give --partial", "")  # a flag of check_input.py
        raise InputError(f"{finding}{more}{remedy_of(finding, truths, expected)}")
    facts = [summary, *strays]
    for name in folders:
        facts += check_count(root, name, expected, log).facts
    return Findings(facts)


# ---- weights ----


def describe_weights(path):
    """(number of tensors, architecture) of a checkpoint, or why it is none, a str."""
    sys.path.insert(0, str(ROOT / "exp"))
    import v107  # here, in a process of its own: torch takes seconds and hundreds of megabytes

    try:
        content = v107.read_checkpoint(path)
    except v107.InputError as error:
        return str(error)
    return len(content["state_dict"]), str(content.get("arch"))


def in_a_process(function, *arguments):
    """What a function returns, called in a process that ends after it."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=start_worker) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise InputError(f"{arguments[0]}: the process that read it died") from error


def check_weights(path, arch, log):
    """Whether this is a checkpoint, with 1,118 tensors where it is the published network."""
    found = in_a_process(describe_weights, path)
    if isinstance(found, str):
        raise InputError(f"{found}; delete the file, and it is fetched again")
    number, written_by = found
    if arch == published.ARCH and number != published.PUBLISHED_KEYS:
        raise InputError(
            f"{path}: {number} tensors (arch {written_by}), not {published.PUBLISHED_KEYS:,}; it "
            f"is no published checkpoint but one of another architecture: move it away, or give -a"
        )
    return Findings([f"{number:,} tensors, SHA-256 {sha256_of(path)}"])


# ---- known answers ----


def mean_cosine(rows):
    """Mean cosine of different rows, (n, dim); at most SAMPLE of them, spread evenly."""
    rows = rows[:: max(1, len(rows) // SAMPLE)].astype(np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    number = len(rows)
    if number < 2:
        return 0.0
    return float(((rows @ rows.T).sum() - number) / (number * (number - 1)))


def check_spread(rows, name, causes):
    """Raise InputError where different images have nearly the same descriptor; returns a fact.

    causes: what may be wrong then, with the remedy.
    """
    mean = mean_cosine(rows)
    if not mean < COLLAPSED:
        raise InputError(
            f"{name}: the mean cosine of different images is {mean:.3f}, not below {COLLAPSED}: "
            f"{causes}"
        )
    return f"mean cosine of different images {mean:.3f}"


def check_rows(rows, name):
    """Raise InputError where descriptors are not finite or not of length 1; returns a fact."""
    norms = np.linalg.norm(rows, axis=1)
    wrong = ~(np.abs(norms - 1) < NORM_ERROR)  # also where they are no numbers
    if wrong.any():
        raise InputError(
            f"{name}: {wrong.sum():,} of {len(rows):,} rows are not of length 1, such as row "
            f"{np.flatnonzero(wrong)[0]}; fp16 may have overflowed: try --stage-flags 'extract: "
            f"--amp off'; or images are unreadable: replace them, delete this file, and run again"
        )
    return f"{len(rows):,} rows of length 1"


def check_probe(path, log, *, stage, weights, output, arch, input_size):
    """Descriptors of the generated images: apart from each other, and equal to those recorded for
    the same weights.

    output: of the run, for answers that nobody has recorded yet; None for own training.
    """
    with h5py.File(path) as file:
        rows = file["query"][()]
    causes = f"the network has collapsed: its weights are damaged; delete {weights}, and run again"
    if output is None:
        causes = f"the network has collapsed; look at the loss, {train_again(weights)}"
    facts = [check_rows(rows, path), check_spread(rows, path, causes)]
    if output is None:
        return Findings(facts)
    digest = sha256_of(weights)
    known = read_known(KNOWN_ANSWERS)
    for entry in known:
        if entry["sha256"] == digest:
            facts.append(compare_known(rows, entry, path, input_size))
            return Findings(facts)
    same_name = [entry for entry in known if (entry["stage"], entry["arch"]) == (stage, arch)]
    if same_name and arch == published.ARCH:
        raise InputError(
            f"{weights}: its SHA-256 is {digest}, not the recorded {same_name[0]['sha256']}; it is "
            f"another or a damaged file: delete it, and it is fetched again"
        )
    record = {
        "weights": f"{stage}, published" if arch == published.ARCH else f"{stage}, {arch}",
        "stage": stage,
        "arch": arch,
        "sha256": digest,
        "input_size": input_size,
        "versions": {name: version(name) for name in ("torch", "timm", "pillow", "numpy")},
        "descriptors": np.round(rows.astype(float), 4).tolist(),
    }
    own = output / "known_answers.json"
    others = [entry for entry in read_known(own) if entry["stage"] != stage]
    write_known(own, [*others, record])
    facts.append(f"known answers: none recorded for these weights yet, written to {own}")
    return Findings(facts)


def compare_known(rows, entry, path, input_size):
    """Raise InputError where descriptors differ from the recorded ones; returns a fact."""
    recorded = np.array(entry["descriptors"])
    if recorded.shape != rows.shape:
        raise InputError(
            f"{path}: {rows.shape} descriptors, recorded are {recorded.shape}; delete "
            f"{path.parents[3]}, and run again"
        )
    lengths = np.linalg.norm(recorded, axis=1) * np.linalg.norm(rows, axis=1)
    least = float(((recorded * rows).sum(axis=1) / lengths).min())
    if not least >= KNOWN_COSINE:
        cause = (
            "libraries or the GPU compute something else: try --stage-flags 'extract: --amp off', "
            "or the library versions of requirements.txt"
        )
        if input_size != entry["input_size"]:
            cause = f"--input-size is {input_size}, recorded with {entry['input_size']}"
        raise InputError(
            f"{path}: differs from the known answers of {entry['weights']}: least cosine "
            f"{least:.4f}, not {KNOWN_COSINE} or more; the likely cause: {cause}"
        )
    return f"known answers of {entry['weights']}: least cosine {least:.5f}"


def read_known(path):
    """The recorded answers in a file, a list of dicts; [] where there is no file."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
        for entry in entries:
            if not isinstance(entry, dict) or ANSWER_KEYS - entry.keys():
                raise ValueError(f"must be a list of objects with {', '.join(sorted(ANSWER_KEYS))}")
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete or restore it") from None
    return entries


def write_known(path, entries):
    """Write recorded answers, a line for each descriptor."""
    texts = []
    for entry in entries:
        head = {name: value for name, value in entry.items() if name != "descriptors"}
        head_text = json.dumps(head, indent=1).removesuffix("\n}")
        rows = ",\n".join(json.dumps(row) for row in entry["descriptors"])
        texts.append(f'{head_text},\n "descriptors": [\n{rows}\n]}}')
    with atomic(path) as file:
        file.write_text(f"[{', '.join(texts)}]\n")


# ---- training ----


def train_again(path):
    """How to train a stage again with bfloat16, and to keep those before it. path: of a file in
    OUTPUT/exp/vNN/train.
    """
    folder = path.parent.parent
    stage = folder.name.partition("-")[0]
    folders = str(folder)
    if stage == "v83":  # the flags are those of both runs
        folders = f"{folder.parent / 'v83-first'} and {folder.parent / 'v83'}"
    return f"move {folders} away and add --stage-flags '{stage}: --amp bf16'"


def check_training(path, log, first_epoch=0):
    """The log of a training run: its loss, positive pairs and skipped steps. A loss that has not
    fallen is a warning: days of work may be in it, and the score is to judge.

    first_epoch: of this run; lines of earlier epochs came with the checkpoint that it resumed.
    """
    lines, steps_before = read_training_log(path, first_epoch)
    if not lines:
        raise InputError(f"{path}: has no line with a loss; look at {log}")
    losses = [line["loss"] for line in lines]
    facts = check_losses(path, losses)
    pairs = np.mean([line["pos_pairs"] for line in lines])
    if not pairs > 0:
        raise InputError(
            f"{path}: has no positive pair; the views of an image do not share a label, or all are "
            f"nearer than --pos-margin"
        )
    skipped = sum(line["skipped"] for line in lines)
    overflows = sum(line["overflows"] for line in lines)
    steps = lines[-1]["step"] - steps_before
    if skipped > MAX_SKIPPED * steps:
        raise InputError(
            f"{path}: {skipped} of {steps} steps were skipped, more than {MAX_SKIPPED:.1%}; likely "
            f"fp16 overflowed or a GPU computes wrongly: {train_again(path)}"
        )
    facts.append(
        f"{steps:,} steps, {skipped} skipped, {overflows} overflows; {pairs:.1f} active positive "
        f"pairs a step"
    )
    shown = np.unique(np.linspace(0, len(lines) - 1, 10).round().astype(int))
    return Findings(facts, curve=[[lines[i]["step"], round(losses[i], 4)] for i in shown])


def read_training_log(path, first_epoch):
    """(lines with a loss, dicts, from an epoch on; number of the steps before them)."""
    lines = []
    steps_before = 0
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if "loss" not in line:
            continue
        if line["epoch"] >= first_epoch:
            lines.append(line)
        else:
            steps_before = line["step"]
    return lines, steps_before


def check_losses(path, losses):
    """Raise InputError where a loss is not finite; returns facts, a warning among them where it
    has not fallen.
    """
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        raise InputError(
            f"{path}: a line has no finite loss; likely fp16 overflowed: {train_again(path)}"
        )
    tenth = max(1, len(losses) // 10)
    first = np.mean(losses[:tenth])
    last = np.mean(losses[-tenth:])
    facts = [f"loss {first:.4f} in the first tenth, {last:.4f} in the last"]
    if not last < first:
        facts.append(
            f"{WARNING}the loss has not fallen, so the network may not have learned; likely "
            f"causes: other starting weights, another learning rate, images of another kind"
        )
    return facts


# ---- descriptors and scores ----


def check_extraction(path, log, *, images, queries):
    """Rows, order, lengths and spread of a submission."""
    submission = read_submission(path)
    facts = []
    for name, folder in (("query", queries), ("reference", "reference_images")):
        expected = sorted(images_by_id(images, folder))
        ids = [row.decode() for row in submission[f"{name}_ids"]]
        if ids != expected:
            raise InputError(
                f"{path}: its {len(ids):,} {name} ids are not those of the {len(expected):,} "
                f"images in {images / folder}; images were added or removed meanwhile: run again"
            )
        facts.append(f"{name}: {check_rows(submission[name], path)}")
    facts.append(check_spread(submission["reference"], path, ALIKE))
    return Findings(facts)


def check_negatives(path, images, log):
    """Rows, lengths and spread of the descriptors of the training images."""
    rows = read_train(path)
    expected = len(images_by_id(images, "training_images"))
    if len(rows) != expected:
        raise InputError(
            f"{path}: {len(rows):,} rows of {expected:,} training images; images were added or "
            f"removed meanwhile: run again"
        )
    spread = check_spread(rows, path, ALIKE)
    return Findings([f"training images: {check_rows(rows, path)}", spread])


def check_score(
    log, *, title, expected, tolerance, word, note, phase, is_look, whole, trained, changed
):
    """The score at the end of the evaluation's log, beside the expected one, with a verdict.

    word: what that is, "published", or "expected" where the data are not DISC21; note: what has to
    be said beside the score, or ""; whole: with is_look, the expected score of all references, or
    None; trained, changed: as for likely_causes().
    """
    printed = [line for line in last_run(log).splitlines() if line.startswith("{")]
    if not printed:
        raise InputError(f"{log}: has no score")
    found = json.loads(printed[-1])
    score = {
        "title": title,
        **found,
        "word": word,
        "expected": None,
        "note": note,
        "verdict": f"no {word} score",
        "causes": [],
    }
    if is_look:
        score["verdict"] = "a look: of fewer references, compares with none"
        if whole is not None:
            score["verdict"] += f"; it should lie above the {word} {whole.average_precision:.7g}"
    if expected is not None:
        score["expected"] = [expected.average_precision, expected.recall_p90]
        score["verdict"] = "reproduced"
        missed = missed_by(found, expected, tolerance)
        if missed:
            score["verdict"] = f"not reproduced: {' and '.join(missed)}"
            score["causes"] = likely_causes(found, expected, word, phase, trained, changed)
    return Findings([score_in_words(score)], score=score)


def missed_by(found, expected, tolerance):
    """Which parts of a printed score differ from a published.Score by more than the tolerance."""
    missed = []
    if not abs(found["average_precision"] - expected.average_precision) <= tolerance:
        missed.append("µAP")
    recall = expected.recall_p90
    if recall is not None and not abs(found["recall_p90"] - recall) <= tolerance:
        missed.append("R@P90")
    return missed


def score_in_words(score):
    """A score, the expected one, what has to be said of it and the verdict, in a line."""
    text = f"{score['title']}: {score['average_precision']:.7f} / {score['recall_p90']:.7f}"
    notes = [score["note"]] if score["note"] else []
    if score["expected"]:
        theirs = " / ".join(f"{value:.7g}" for value in score["expected"] if value is not None)
        notes.insert(0, f"{score['word']} {theirs}")
    if notes:
        text += f" ({'; '.join(notes)})"
    return f"{text}: {score['verdict']}"


def likely_causes(found, expected, word, phase, trained, changed):
    """The three likeliest causes of a printed score that is another than the expected Score.

    trained: whether the weights are own ones; changed: which of --input-size and --gem-eval-p the
    user has given, without which these are no causes of an own training's score.
    """
    if word != "published":
        causes = [OWN_TRAINING, *CAUSES_ELSEWHERE] if trained else CAUSES_ELSEWHERE
        return causes[:3]
    size = "another input size: one public report had 0.4955 instead of 0.5831 by that"
    other_phase = "queries of the other phase, or its ground truth"
    exponent = "another exponent of GeM pooling (--gem-eval-p 1.0 is the published one)"
    unlabeled = "queries without labels were counted: the ground truth lists those that count"
    truth = "another ground truth than the organizers'"
    if phase == 1:
        unlabeled = (
            f"queries without labels were counted: the ground truth lists {PUBLIC_QUERIES:,}"
        )
        truth = f"another ground truth than the public one of {PUBLIC_QUERIES:,} rows"
    fewer = "fewer references than 1,000,000: these give a higher score"
    weights = "other weights: compare their SHA-256 with another report's"
    if found["average_precision"] < 0.2 * expected.average_precision:
        causes = [other_phase, weights, size, unlabeled]
    elif found["average_precision"] > expected.average_precision:
        causes = [fewer, truth, weights]
    else:
        causes = [size, exponent, unlabeled, truth]
    if trained:
        excluded = [weights]
        if "--input-size" not in changed:
            excluded.append(size)
        if "--gem-eval-p" not in changed:
            excluded.append(exponent)
        causes = [OWN_TRAINING, *(cause for cause in causes if cause not in excluded)]
    return causes[:3]


def last_run(log):
    """What the last run of a step wrote into its log."""
    return log.read_text(errors="replace").rpartition("\n$ ")[2]
