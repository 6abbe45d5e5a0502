"""Make a file to ship of trained weights: averaged, with BatchNorm's statistics of plain images, in
half precision, without what only training needs.

    python weights/pretraining/finish.py small/start.pth.tar small/leg1.pth.tar \\
        small/pretrain-?/start.pth.tar --imagenet-share 0.1 \\
        --images small/pretrain-0/input/training_images
    python weights/pretraining/finish.py small/v98.pth.tar \\
        small/v98/train/checkpoint_0000.pth.tar --statistics small/start.pth.tar \\
        --images small/pretrain-0/input/training_images

The average of networks that were fine-tuned from one start is often better than each of them (model
soups, Wortsman et al. 2022), and two runs keep two cores busy. A share of the ImageNet weights in
the backbone brings back what training on few photographs forgot (WiSE-FT, Wortsman et al. 2022).

A stage leaves BatchNorm with the statistics of hard views, but extraction sees plain images. A
network of 52 million weights hardly minds; a small one does. So the backbone gets the statistics of
--statistics, if given: those of the start, which are ImageNet's. The head's are computed again on
the plain --images: also for averaged weights, whose statistics were computed for none of them.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "exp"), str(REPOSITORY / "scripts")]

import torch
from tqdm import tqdm

import v98
from common.cli import at_least, between
from common.errors import InputError, one_line_errors
from common.files import atomic
from pretrain import (
    IMAGENET_ARCH,
    half_precision,
    load_imagenet_weights,
    move_weights,
    stage_state,
)

KEPT = ("arch", "args", "epoch")  # of a single checkpoint, beside the weights
BATCH = 100  # images


def read_runs(paths):
    """The checkpoints. Raises InputError where they are of different networks."""
    checkpoints = [v98.read_checkpoint(path) for path in paths]
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if "arch" not in checkpoint:
            raise InputError(f"{path}: is no checkpoint of a stage or of pretrain.py")
        if shapes(checkpoint) != shapes(checkpoints[0]):
            raise InputError(f"{path}: is of another network than {paths[0]}")
    return checkpoints


def shapes(checkpoint):
    """The shape of each tensor by its name."""
    return {name: value.shape for name, value in checkpoint["state_dict"].items()}


def average(states):
    """The mean of state_dicts of one network, in float32."""
    result = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            result[name] = torch.stack([state[name].float() for state in states]).mean(dim=0)
        else:
            result[name] = first
    return result


def move_towards_imagenet(backbone, arch, share):
    """Move the backbone's weights and statistics towards ImageNet's by this share of the way.

    Raises InputError where there are none for this network.
    """
    if arch != IMAGENET_ARCH:
        raise InputError(f"{arch}: has no ImageNet weights here; leave out --imagenet-share")
    imagenet = v98.create_model(arch, 1.0, 1.0, torch.device("cpu")).backbone
    load_imagenet_weights(imagenet)
    move_weights(backbone, imagenet, share)


def statistics_of(checkpoint, path, like):
    """The running means and variances of the backbone, {name: tensor}.

    like: state_dict of the network that will get them. Raises InputError where they do not fit it.
    """
    result = {}
    for name, value in like.items():
        if not (name.startswith("module.backbone.") and "running_" in name):
            continue
        found = checkpoint["state_dict"].get(name)
        if found is None or found.shape != value.shape:
            raise InputError(
                f"{path}: has no {name} of shape {tuple(value.shape)}; give weights "
                f"of the same network"
            )
        result[name] = found
    return result


def estimate_head_statistics(model, paths, input_size):
    """Compute the head's BatchNorm statistics again: of these images, plain, in equal batches."""
    config = model.backbone.default_cfg
    transform = v98.evaluation_transform(input_size, config["mean"], config["std"])
    model.eval()
    model.bn.reset_running_stats()
    model.bn.momentum = None  # the mean of all batches
    model.bn.train()
    whole_batches = len(paths) // BATCH * BATCH
    for start in tqdm(range(0, whole_batches, BATCH), "statistics", unit="batch"):
        images = [transform(v98.open_image(path)) for path in paths[start : start + BATCH]]
        with torch.no_grad():
            model(torch.stack(images))


def parse_args(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="file to write")
    add(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="of a stage's training or of pretrain.py; several are averaged",
    )
    add("--images", required=True, metavar="FOLDER", help=f"plain images, {BATCH} or more")
    add(
        "--input-size",
        type=at_least(int, 1),
        default=128,
        help="to which they are resized, pixels (default: %(default)s)",
    )
    add(
        "--imagenet-share",
        type=between(float, 0, 1),
        default=0.0,
        metavar="SHARE",
        help="of the ImageNet weights and statistics in the backbone (default: %(default)s)",
    )
    add("--statistics", metavar="FILE", help="weights with the statistics that the backbone gets")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the file; returns the exit code."""
    args = parse_args(argv)
    paths = v98.list_images(args.images)
    if len(paths) < BATCH:
        raise InputError(f"{args.images}: has {len(paths)} images; give {BATCH} or more")
    checkpoints = read_runs(args.checkpoints)
    first = checkpoints[0]
    state = average([checkpoint["state_dict"] for checkpoint in checkpoints])
    if args.statistics:
        source = v98.read_checkpoint(args.statistics)
        state.update(statistics_of(source, args.statistics, like=state))
    model = v98.create_model(first["arch"], 1.0, 1.0, torch.device("cpu"))
    v98.load_weights(model, {"state_dict": state, "arch": first["arch"]}, args.checkpoints[0])
    if args.imagenet_share:
        move_towards_imagenet(model.backbone, first["arch"], args.imagenet_share)
    estimate_head_statistics(model, paths, args.input_size)
    content = {name: first[name] for name in KEPT if name in first}
    if len(checkpoints) > 1:
        content["args"] = argparse.Namespace(**(vars(args) | {"out": str(args.out)}))
    content["state_dict"] = half_precision(stage_state(model))
    with atomic(args.out) as temporary:
        torch.save(content, temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
