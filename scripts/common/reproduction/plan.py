"""The steps of a reproduction as data: each calls one command of this repository."""

import functools
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import InputError
from common.reproduction import checks, prepare, published
from common.reproduction.machine import (
    Fit,
    Machine,
    extraction_fit,
    extraction_hours,
    fit,
    training_hours,
)

ROOT = Path(__file__).resolve().parents[3]
STAGES = ("v83", "v86", "v98", "v107")
KNOWN_ANSWERS = checks.KNOWN_ANSWERS.relative_to(ROOT)
EXTRACTION_BATCH = "128"  # images on each GPU at once
IMAGENET = "timm's ImageNet weights are fetched"
IMAGENET_REMEDY = "for these weights without internet, see docs/FAULTS.md, Before the first run"
BATCH_FLAGS = {"-b", "--batch-size"}
# Other flags that decide how much memory training takes.
MEMORY_FLAGS = {"-a", "--arch", "--input-size", "--ncrops", "--num-negatives"}
CHECKPOINT = "train/checkpoint_{:04}.pth.tar"


@dataclass(frozen=True)
class Expected:
    """What the checks compare with: scores by title, SHA-256 of weights by stage, numbers of
    images by folder.

    disc21: whether the data are DISC21, with its names, numbers and published scores; source: the
    file that says what to expect instead.
    """

    scores: dict = field(default_factory=lambda: published.SCORES)
    sha256: dict = field(default_factory=dict)
    images: dict = field(default_factory=lambda: published.IMAGES)
    disc21: bool = True
    source: Path | None = None

    @property
    def word(self):
        """What its scores are."""
        return "published" if self.disc21 else "expected"


@dataclass(frozen=True)
class Setup:
    """What the command line asks for. Folders are relative to the repository where they lie in it.

    stages: those to be scored; references: number of a first look, or None; stage_flags: {stage:
    flags} for its training, "all" and "extract" among them.
    """

    input: Path
    output: Path
    machine: Machine
    expected: Expected
    train: bool = False
    stages: tuple = ("v98", "v107")
    phase: int = 1
    references: int | None = None
    arch: str = published.ARCH
    input_size: int | None = None
    stage_flags: dict = field(default_factory=dict)
    download: bool = False

    @property
    def truth(self):
        """The ground truth that scores are computed with."""
        name = "public_ground_truth.csv" if self.phase == 1 else "private_ground_truth.csv"
        return self.input / name

    @property
    def training_truth(self):
        """The ground truth that v107 is trained on, in either phase."""
        return self.input / "public_ground_truth.csv"

    @property
    def variant(self):
        """What tells the steps and the report apart from those of other runs in the same folder."""
        parts = []
        if self.train:
            parts.append("-trained")
        if self.references is not None:
            parts.append(f"-references-{self.references}")
        if self.phase == 2:
            parts.append("-phase2")
        return "".join(parts)

    @property
    def kind(self):
        """The name of the folder of results: of own training, or of the published weights."""
        return "exp" if self.train else "published"

    @property
    def queries(self):
        """The folder of the queries."""
        return "query_images" if self.phase == 1 else "query_images_phase2"

    @property
    def tolerance(self):
        """The largest difference to the published score that counts as reproduced."""
        return published.TOLERANCE["trained" if self.train else "published"]


@dataclass(frozen=True)
class Step:
    """One command, and what stands around it. Paths are of files, or of folders of images."""

    name: str
    command: tuple
    check: Callable  # called with log=PATH after it; returns checks.Findings, raises InputError
    needs: tuple = ()  # paths that it reads
    writes: tuple = ()  # paths that are there afterwards
    settings: str = ""  # what its check depends on beside the paths, in words
    prepare: Callable | None = None  # called before it
    prepared: str = ""  # what that does, as one would type it
    accepts: tuple = (0,)  # exit codes that are no failure
    is_stage: bool = False  # SIGTERM makes it save and stop
    trains: bool = False  # a repetition would go on in its folder
    # A run whose check failed, or was not reached, is not repeated while its files are unchanged.
    keeps: bool = False
    downloads: bool = False  # it fetches images
    unfinished: Path | None = None  # folder where an extraction keeps what it has, to resume
    target_set: str = ""  # of an extraction
    gigabytes: float = 0  # that it writes
    hours: float | None = 0  # None: unknown
    remedy: str = ""  # what may help where it fails
    note: str = ""  # what else the plan says of it
    fits: str = ""  # whether it fits the GPUs, with which flags; or that its file is there
    obstacle: str | None = None  # why it cannot run on this machine


def typed(command):
    """A command as one would type it in the repository's folder."""
    return shlex.join(str(part) for part in command)


def flag_of(word):
    """The flag in a word of a command such as --timeout, --timeout=5 or -j4, or the word itself."""
    if re.fullmatch(r"-[a-z]\d+", word):
        return word[:2]
    return word.partition("=")[0]


def flags_of_training(setup, training):
    """The user's flags for a training run, a list of words."""
    return [*setup.stage_flags.get("all", []), *setup.stage_flags.get(training.script, [])]


# ---- the whole plan ----


def make_plan(setup):
    """The list of Steps."""
    steps = []
    if setup.download:
        steps += [download_step(setup, name) for name in needed_folders(setup)]
    steps.append(data_step(setup))
    if setup.train:
        for training in needed_trainings(setup):
            steps.append(training_step(setup, training))
            if training.name == training.script:  # the first run of v83 is only half a stage
                weights = checkpoint(setup, training)
                steps.append(probe_step(setup, training.script, weights, training.input_size))
    else:
        for stage in setup.stages:
            steps.append(weights_step(setup, stage))
            steps.append(probe_step(setup, stage, stage_weights(setup, stage)))
    for stage in setup.stages:
        steps += scoring_steps(setup, stage, stage_weights(setup, stage))
    return steps


def needed_trainings(setup):
    """The training runs up to the last stage that is scored."""
    last = max(STAGES.index(stage) for stage in setup.stages)
    return [run for run in published.TRAININGS if STAGES.index(run.script) <= last]


def needs_negatives(setup):
    """Whether negative embedding subtraction is done, which takes the training images."""
    return "v107" in setup.stages and setup.references is None


def needed_folders(setup):
    """The folders of images that the steps read."""
    folders = [setup.queries, "reference_images"]
    if setup.train or needs_negatives(setup):
        folders.append("training_images")
    if setup.train and "v107" in setup.stages and "query_images" not in folders:
        folders.append("query_images")  # v107 trains on the pairs of phase 1
    return folders


def needed_truths(setup):
    """The ground truths that the steps read."""
    truths = [setup.truth]
    if setup.train and "v107" in setup.stages and setup.training_truth != setup.truth:
        truths.append(setup.training_truth)
    return tuple(truths)


def images_of(setup, *folders):
    """The paths of folders of images, whatever the name of that of the training images is."""
    paths = []
    for name in folders:
        found = checks.folder_of_images(ROOT / setup.input, name)
        paths.append(setup.input / (found.name if found else name))
    return tuple(paths)


def folder_of(setup, stage):
    """The folder of a stage's results. Own training and published weights never share one."""
    return setup.output / setup.kind / stage


def checkpoint(setup, training):
    """The checkpoint of a training run that is used afterwards."""
    return setup.output / "exp" / training.name / CHECKPOINT.format(training.result)


def stage_weights(setup, stage):
    """The weights that a stage is scored with: the author's, or the own ones in their place."""
    epoch = {training.name: training.result for training in published.TRAININGS}[stage]
    return folder_of(setup, stage) / CHECKPOINT.format(epoch)


# ---- data and weights ----


def source_of(setup, folder):
    """(the bucket's folder, the folder here) of a folder of images."""
    name = published.IN_BUCKET.get(folder, folder)
    return f"{published.BUCKET}/{name}/", f"{images_of(setup, folder)[0]}/"


def download_step(setup, folder):
    """Fetch what is missing of a folder of images."""
    source, target = source_of(setup, folder)
    gigabytes = 0
    if setup.expected.disc21:
        missing = published.IMAGES[folder] - checks.count_images(setup.input, folder)
        share = max(0, missing) / sum(published.IMAGES.values())
        gigabytes = share * published.BYTES_OF_DATA / 1e9
    return Step(
        name=f"download-{folder}",
        command=("aws", "s3", "sync", source, target, "--no-sign-request", "--no-progress"),
        check=functools.partial(checks.check_count, setup.input, folder, setup.expected),
        writes=images_of(setup, folder),
        downloads=True,
        gigabytes=gigabytes,
        hours=None,
    )


def data_step(setup):
    """Are the data complete and consistent?"""
    command = ["python", "scripts/check_input.py", str(setup.input)]
    if not setup.expected.disc21:
        command.append("--partial")
    check = functools.partial(
        checks.check_data,
        setup.input,
        needed_folders(setup),
        setup.expected,
        truths=needed_truths(setup),
    )
    return Step(
        name=f"check-data{setup.variant}",
        command=tuple(command),
        check=check,
        needs=(*needed_truths(setup), *images_of(setup, *needed_folders(setup))),
        settings=f"{setup.expected.images}",
        accepts=(0, 1),  # 1: findings, perhaps on folders that nothing here reads
    )


def weights_step(setup, stage):
    """The author's weights of a stage: fetched unless they are there."""
    path = stage_weights(setup, stage)
    is_there = (ROOT / path).exists()
    command = ["python", "scripts/download_weights.py", stage]
    command += ["--exp", str(setup.output / "published")]
    digest = setup.expected.sha256.get(stage)
    if digest:
        command += ["--sha256", digest]
    return Step(
        name=f"weights-{stage}",
        command=tuple(command),
        check=functools.partial(checks.check_weights, ROOT / path, setup.arch),
        writes=(path,),
        settings=setup.arch,
        remedy=f"without internet, run `{typed(command)}` elsewhere, and put the file at {path}",
        gigabytes=0 if is_there else published.CHECKPOINT_GB,
        fits="the file is there" if is_there else "",
    )


def probe_step(setup, stage, weights, input_size=published.INPUT_SIZE):
    """Descriptors of a dozen generated images: the known answers, and a collapsed network."""
    input_size = setup.input_size or input_size
    images = setup.output / "probe" / "input"
    output = setup.output / "probe" / setup.kind / weights.parts[-3]
    submission = output / "extract" / "fb-isc-submission.h5"
    return Step(
        name=f"probe-{weights.parts[-3]}{'-trained' if setup.train else ''}",
        command=extract_command(setup, stage, weights, output, images, "q", input_size),
        check=functools.partial(
            checks.check_probe,
            ROOT / submission,
            stage=stage,
            weights=ROOT / weights,
            output=None if setup.train else ROOT / setup.output,
            arch=setup.arch,
            input_size=input_size,
        ),
        needs=(weights, KNOWN_ANSWERS),
        writes=(submission,),
        prepare=functools.partial(prepare.draw_images, ROOT / images),
        prepared=f"# first {checks.PROBE_IMAGES} generated images are drawn into {images}",
        is_stage=True,
    )


# ---- training ----


def training_step(setup, training):
    """A published training command, with --resume auto and paths to match."""
    folder = setup.output / "exp" / training.name
    placement = placement_of_training(setup, training)
    start = start_of(setup, training)
    needs = [start] if start else []
    if training.script == "v107":
        needs.append(setup.training_truth)
    command = ["python", f"exp/{training.script}.py", "-a", setup.arch]
    command += shlex.split(published.COMMON)
    command += ["--epochs", str(training.epochs)]
    command += ["--input-size", str(setup.input_size or training.input_size)]
    command += shlex.split(training.flags)
    if start and not training.resumes:
        command += ["--weight", str(start)]
    command += placement.flags
    command += flags_of_training(setup, training)
    command += ["--resume", "auto", "--output", str(folder)]
    command.append(f"{setup.input / 'training_images'}/")
    log = folder / "train" / "log.jsonl"
    check = functools.partial(checks.check_training, ROOT / log, first_epoch=training.first_epoch)
    checkpoints = training.epochs - training.first_epoch + 1  # last.pth.tar
    given = {flag_of(word) for word in flags_of_training(setup, training)}
    takes_imagenet = not start and not given & {"--weight", "--no-pretrained"}
    step = Step(
        name=f"train-{training.name}",
        command=tuple(command),
        check=check,
        needs=tuple(needs),
        writes=(checkpoint(setup, training), log),
        is_stage=True,
        trains=True,
        gigabytes=checkpoints * published.CHECKPOINT_GB,
        hours=training_hours(training, setup.machine, setup.arch, bool(placement.flags)),
        fits=placement.words,
        note=IMAGENET if takes_imagenet else "",
        remedy=IMAGENET_REMEDY if takes_imagenet else "",
        obstacle=None if placement.ok else f"{training.name}: {placement.words}",
    )
    if training.resumes:
        return with_copy(step, start, folder / "train")
    return step


def placement_of_training(setup, training):
    """Whether a training run fits the GPUs; without words where its flags decide that, and nobody
    knows.
    """
    flags = {flag_of(word) for word in flags_of_training(setup, training)}
    if setup.machine.gpus and flags & BATCH_FLAGS:
        return Fit(True, (), "")
    same_size = setup.input_size in (None, training.input_size)
    is_published = setup.arch == published.ARCH and same_size and not flags & MEMORY_FLAGS
    return fit(training.script, setup.machine, is_published)


def start_of(setup, training):
    """The checkpoint that a training run starts from, or None."""
    if training.start is None:
        return None
    name, epoch = training.start
    return setup.output / "exp" / name / CHECKPOINT.format(epoch)


def with_copy(step, start, folder):
    """A training step that resumes from a checkpoint of another folder: it begins with a copy."""
    copy = folder / start.name
    return replace(
        step,
        prepare=functools.partial(prepare.copy_once, ROOT / start, ROOT / copy),
        prepared=f"mkdir -p {folder} && cp {start} {folder}/",
        gigabytes=step.gigabytes + published.CHECKPOINT_GB,
    )


# ---- scores ----


def extract_command(setup, stage, weights, output, images, target_set, input_size, phase=1):
    """The published extraction on all GPUs."""
    command = ["python", f"exp/{stage}.py", "-a", setup.arch, "--multiprocessing-distributed"]
    command += ["--mode", "extract", "--batch-size", EXTRACTION_BATCH, "--gem-eval-p", "1.0"]
    command += ["--weight", str(weights)]
    command += ["--input-size", str(input_size), "--target-set", target_set]
    command += setup.stage_flags.get("extract", [])
    command += ["--output", str(output)]
    if phase == 2:
        command += ["--phase", "2"]
    return (*command, f"{images}/")


def scoring_steps(setup, stage, weights):
    """Extract the descriptors of a stage and score them, in v107 after NES too."""
    extraction = extraction_step(setup, stage, weights)
    (submission,) = extraction.writes
    title = stage if setup.phase == 1 else f"{stage}, phase 2"
    evaluation = evaluation_step(setup, f"evaluate-{stage}{setup.variant}", title, submission)
    if stage != "v107" or not needs_negatives(setup):
        return [extraction, evaluation]
    negatives = negatives_step(setup, stage, weights)
    subtraction = subtraction_step(setup, stage, submission, negatives.writes[0])
    evaluation_of_nes = evaluation_step(
        setup,
        f"evaluate-{stage}-nes{setup.variant}",
        title.replace(stage, f"{stage} + NES"),
        subtraction.writes[0],
    )
    if setup.phase == 2:  # no raw score was published of it
        return [extraction, negatives, subtraction, evaluation_of_nes]
    return [extraction, evaluation, negatives, subtraction, evaluation_of_nes]


def extraction_step(setup, stage, weights):
    """Extract queries and references: all of them, or for a first look a part."""
    input_size = setup.input_size or published.INPUT_SIZE
    folder = folder_of(setup, stage)
    images = setup.input
    if setup.references is not None:
        folder = folder_of_look(setup) / setup.kind / stage
        images = folder_of_look(setup) / "input"
    suffix = "-phase2" if setup.phase == 2 else ""
    submission = folder / "extract" / f"fb-isc-submission{suffix}.h5"
    number = number_of_images(setup)
    placement = placement_of_extraction(setup)
    step = Step(
        name=f"extract-{stage}{setup.variant}",
        command=extract_command(
            setup, stage, weights, folder, images, "qr", input_size, setup.phase
        ),
        check=check_of_submission(setup, submission, images),
        needs=(weights, *images_of(setup, setup.queries, "reference_images")),
        writes=(submission,),
        is_stage=True,
        keeps=True,
        unfinished=folder / "extract" / f"unfinished{suffix}",
        target_set="qr",
        gigabytes=number * published.DESCRIPTOR_GB,
        hours=extraction_hours(number, setup.machine, setup.arch),
        fits=placement.words,
        obstacle=None if placement.ok else f"extraction: {placement.words}",
    )
    return step if setup.references is None else with_links(setup, step, images)


def placement_of_extraction(setup):
    """Whether an extraction fits the GPUs, at its batch size."""
    flags = ["--batch-size", EXTRACTION_BATCH, *setup.stage_flags.get("extract", [])]
    last = len(flags) - 1 - flags[::-1].index("--batch-size")
    input_size = setup.input_size or published.INPUT_SIZE
    return extraction_fit(int(flags[last + 1]), input_size, setup.machine, setup.arch)


def folder_of_look(setup):
    """The folder of all that a first look writes."""
    return setup.output / f"references-{setup.references}"


def with_links(setup, step, images):
    """An extraction that begins with links to a part of the references, in the folder `images`."""
    link = functools.partial(
        prepare.link_part,
        setup.input,
        ROOT / images,
        ROOT / setup.truth,
        setup.queries,
        setup.references,
    )
    return replace(
        step,
        needs=(*step.needs, setup.truth),
        prepare=link,
        prepared=f"# first {setup.references:,} references and the queries of the ground truth are "
        f"linked into {images}",
    )


def check_of_submission(setup, submission, images):
    """The check of a file of descriptors."""
    return functools.partial(
        checks.check_extraction, ROOT / submission, images=ROOT / images, queries=setup.queries
    )


def subtraction_step(setup, stage, submission, negatives):
    """Negative embedding subtraction."""
    folder = folder_of(setup, stage)
    command = ["python", "scripts/postprocess.py", stage, "--exp", str(folder.parent)]
    name = f"{stage}_iso.h5"
    if setup.phase == 2:
        command += ["--phase", "2"]
        name = f"{stage}_iso_phase2.h5"
    subtracted = folder / "extract" / name
    return Step(
        name=f"subtract-{stage}{setup.variant}",
        command=tuple(command),
        check=check_of_submission(setup, subtracted, setup.input),
        needs=(submission, negatives),
        writes=(subtracted,),
        keeps=True,
        gigabytes=number_of_images(setup) * 1024e-9,
        hours=None,
    )


def negatives_step(setup, stage, weights):
    """Extract the training images, which negative embedding subtraction takes: once for both
    phases, so in a step of its own.
    """
    input_size = setup.input_size or published.INPUT_SIZE
    folder = folder_of(setup, stage)
    negatives = folder / "extract" / "train_feats.npy"
    number = setup.expected.images.get("training_images", 0)
    placement = placement_of_extraction(setup)
    return Step(
        name=f"extract-{stage}-negatives{'-trained' if setup.train else ''}",
        command=extract_command(setup, stage, weights, folder, setup.input, "t", input_size),
        check=functools.partial(checks.check_negatives, ROOT / negatives, setup.input),
        needs=(weights, *images_of(setup, "training_images")),
        writes=(negatives,),
        is_stage=True,
        keeps=True,
        unfinished=folder / "extract" / "unfinished",
        target_set="t",
        gigabytes=number * published.DESCRIPTOR_GB,
        hours=extraction_hours(number, setup.machine, setup.arch),
        fits=placement.words,
        obstacle=None if placement.ok else f"extraction: {placement.words}",
    )


def number_of_images(setup):
    """How many queries and references an extraction reads."""
    images = setup.expected.images
    queries = images.get(setup.queries, 0)
    references = images.get("reference_images", 0)
    if setup.references is not None:
        references = setup.references
        if setup.phase == 1:
            queries = min(queries, checks.PUBLIC_QUERIES)
    return queries + references


def evaluation_step(setup, name, title, submission):
    """Score a submission and compare it with the published score."""
    expected = setup.expected.scores.get(title)
    if setup.references is not None:
        expected = None  # fewer references give a higher score
    saw_pairs = setup.train or setup.expected.disc21
    is_contaminated = title.startswith("v107") and setup.phase == 1 and saw_pairs
    candidates = submission.with_name(f"{submission.stem}_candidates.csv")
    return Step(
        name=name,
        command=("python", "scripts/eval_metrics.py", str(submission), str(setup.truth)),
        check=functools.partial(
            checks.check_score,
            title=title,
            expected=expected,
            tolerance=setup.tolerance,
            whole=setup.expected.scores.get(title) if setup.references is not None else None,
            is_look=setup.references is not None,
            word=setup.expected.word,
            note=published.CONTAMINATED if is_contaminated else "",
            phase=setup.phase,
            trained=setup.train,
            changed=changed_flags(setup, title.partition(" ")[0].rstrip(",")),
        ),
        needs=(submission, setup.truth),
        writes=(candidates,),
        settings=f"{setup.expected.word}: {expected}, {setup.tolerance}",
    )


def changed_flags(setup, stage):
    """Which of --input-size and --gem-eval-p the user has given for a stage, a set."""
    words = [*setup.stage_flags.get("extract", [])]
    if setup.train:
        words += setup.stage_flags.get("all", []) + setup.stage_flags.get(stage, [])
    given = {flag_of(word) for word in words}
    changed = set()
    if setup.input_size is not None or "--input-size" in given:
        changed.add("--input-size")
    if given & {"--gem-p", "--gem-eval-p"}:
        changed.add("--gem-eval-p")
    return changed


# ---- what keeps it from starting ----


def count_all(setup):
    """{folder: number of its images} of the folders that the steps read."""
    return {name: checks.count_images(setup.input, name) for name in needed_folders(setup)}


def obstacles(setup, steps, counts, finished=frozenset()):
    """What keeps the steps from ending, a line each with its remedy, as far as it shows before
    anything runs. counts: of count_all(); finished: names of steps.
    """
    to_do = [step for step in steps if step.name not in finished]
    found = [step.obstacle for step in to_do if step.obstacle]
    if setup.machine.assumed:  # the data of this machine say nothing about another
        return found
    found += missing_data(setup, counts)
    if setup.references is not None and not found and not setup.download:
        try:
            prepare.check_number(setup.input, ROOT / setup.truth, setup.references)
        except InputError as error:
            found.append(str(error))
    if "--start-over" not in setup.stage_flags.get("extract", []):
        found += stopped_extractions(steps, finished)
    return found


def missing_data(setup, counts):
    """Which images and ground truths are missing, a line each with its remedy."""
    root = ROOT / setup.input
    if root.exists() and not root.is_dir():
        return [f"{setup.input}: is no folder; give --input"]
    if not root.exists() and not setup.download:
        return [f"{setup.input}: no such folder; give --input, or make it and run this again"]
    found = []
    for folder in needed_folders(setup):
        source, target = source_of(setup, folder)
        command = f"aws s3 sync {source} {target} --no-sign-request"
        if not counts[folder]:
            command = f"aws s3 cp {source} {target} --recursive --no-sign-request"
        wrong = checks.wrong_count(
            target.rstrip("/"),
            folder,
            counts[folder],
            setup.expected,
            remedy=f"give --download, or run: {command}",  # at the end, to be copied
        )
        if wrong and not setup.download:
            found.append(wrong)
    for truth in needed_truths(setup):
        if not (ROOT / truth).is_file():
            found.append(f"{truth}: is missing; {checks.source_of_truth(truth, setup.expected)}")
    return found


def stopped_extractions(steps, finished):
    """Extractions that were stopped, and stand where a step of this plan needs the folder for
    another: a line each with its remedy. Phase 1's, where phase 2 begins with the training images.
    """
    found = []
    folders = set()
    for step in steps:
        if not step.unfinished or step.name in finished or step.unfinished in folders:
            continue
        folders.add(step.unfinished)  # the steps after this one find it gone
        former = prepare.target_set_of(ROOT / step.unfinished)
        if former not in (None, step.target_set):
            found.append(
                f"{step.unfinished}: an extraction of --target-set {former} was stopped here, and "
                f"{step.name} needs the folder; first end that with the command that began it "
                f"(other --phase or --stages), or delete the folder"
            )
    return found


def parse_stage_flags(texts):
    """{stage: list of flags} of texts such as "v83: --lr 0.01"; "all" is for every training,
    "extract" for every extraction.
    """
    flags = {}
    for text in texts:
        stage, colon, rest = text.partition(":")
        if not colon or stage not in (*STAGES, "all", "extract"):
            raise InputError(
                f"--stage-flags {text!r}: must be like 'v83: --lr 0.01', with one of "
                f"{', '.join(STAGES)}, all, extract before the colon"
            )
        try:
            words = shlex.split(rest)
        except ValueError as error:  # a quotation mark without its partner
            raise InputError(f"--stage-flags {text!r}: {error}; correct it") from None
        flags.setdefault(stage, []).extend(words)
    return flags
