"""Make a file to ship of trained weights: averaged, with BatchNorm's statistics mended, in half
precision, without what only training needs.

    python weights/pretraining/finish.py small/start.pth.tar small/leg1.pth.tar \\
        small/pretrain-?/start.pth.tar --new-head --images small/pictures-0/input/training_images
    python weights/pretraining/finish.py small/v98.pth.tar \\
        small/v98/train/checkpoint_0000.pth.tar --statistics small/start.pth.tar \\
        --images small/pictures-0/input/training_images

The average of networks that were fine-tuned from one start is often better than each of them (model
soups, Wortsman et al. 2022), and two runs keep two cores busy.

A stage leaves BatchNorm with the statistics of hard views, but extraction sees plain images. A
network of 52 million weights hardly minds; a small one does. So the backbone gets the statistics of
--statistics, if given: those of the start, which are ImageNet's. The head gets those of the plain
--images: an average of weights has none of its own.

--new-head replaces the head's weights, too, by linear discriminant analysis of the backbone's
features of views of the --images (learned whitening, Mikolajczyk and Matas 2007). weights/README.md
compares it with the trained head.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "exp"), str(REPOSITORY / "scripts")]

import numpy as np
import torch
from tqdm import trange

import v98
from common.cli import at_least
from common.errors import InputError, one_line_errors
from common.files import atomic
from edits import Views
from pictures import SIDE
from pretrain import half_precision, pooled_features, stage_state

KEPT = ("arch", "args", "epoch")  # of a single checkpoint, beside the weights
MIN_IMAGES = 1000  # the covariance of fewer is too rough
BATCH = 100  # images, or pairs of views
BATCHES_OF_PAIRS = 20
SHRINKAGE = 2.0  # of the covariance within pairs: this times its mean variance is added to each


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


def features_of_plain_images(model, paths, input_size):
    """(n, channels) of the images as extraction sees them."""
    config = model.backbone.default_cfg
    transform = v98.evaluation_transform(input_size, config["mean"], config["std"])
    features = []
    for start in trange(0, len(paths), BATCH, desc="plain images", unit="batch"):
        images = [transform(v98.open_image(path)) for path in paths[start : start + BATCH]]
        features.append(pooled_features(model.backbone, torch.stack(images)))
    return torch.cat(features)


def differences_within_pairs(model, paths, input_size):
    """(pairs, channels): features of gentle views of the images minus those of their hard views."""
    pictures = [v98.open_image(path).resize((SIDE, SIDE)) for path in paths]
    views = Views(np.stack(pictures), paths, input_size)
    config = model.backbone.default_cfg
    preprocess = v98.Preprocess(config["mean"], config["std"])
    differences = []
    for number in trange(BATCHES_OF_PAIRS, desc="pairs of views", unit="batch"):
        views.seed(number)
        images = preprocess(torch.from_numpy(views.pairs(BATCH)))
        gentle, hard = pooled_features(model.backbone, images).chunk(2)
        differences.append(gentle - hard)
    return torch.cat(differences)


def discriminant_head(features, differences, count):
    """Linear discriminant analysis: a linear layer's weight (count, channels).

    features (n, channels) are of plain images, differences (pairs, channels) of views of one image.
    What differs between such views counts less; of the rest, the `count` directions in which plain
    images differ most are kept.
    """
    within = differences.T @ differences / (2 * len(differences))
    variances, axes = torch.linalg.eigh(within)
    variances = variances + SHRINKAGE * variances.mean()
    whitening = axes / variances.sqrt() @ axes.T
    _, discriminants = torch.linalg.eigh(torch.cov((features @ whitening).T))  # ascending variance
    return (whitening @ discriminants[:, -count:]).T


@torch.no_grad()
def finish(model, paths, input_size, new_head):
    """Give the head statistics of plain images; with new_head, compute its weights too."""
    model.eval()
    head = model.bn
    features = features_of_plain_images(model, paths, input_size)
    if new_head:
        differences = differences_within_pairs(model, paths, input_size)
        model.fc.weight.copy_(discriminant_head(features, differences, len(model.fc.weight)))
    outputs = model.fc(features)
    head.running_mean.copy_(outputs.mean(dim=0))
    head.running_var.copy_(outputs.var(dim=0))
    if new_head:
        # BatchNorm then only subtracts the mean: equal variances would undo the analysis.
        head.weight.copy_((head.running_var + head.eps).sqrt())
        head.bias.zero_()


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
    add("--images", required=True, metavar="FOLDER", help=f"plain images, {MIN_IMAGES} or more")
    add(
        "--input-size",
        type=at_least(int, 1),
        default=160,
        help="to which they are resized, pixels (default: %(default)s)",
    )
    add("--new-head", action="store_true", help="compute the head's weights too")
    add("--statistics", metavar="FILE", help="weights with the statistics that the backbone gets")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the file; returns the exit code."""
    args = parse_args(argv)
    paths = v98.list_images(args.images)
    if len(paths) < MIN_IMAGES:
        raise InputError(f"{args.images}: has {len(paths)} images; give {MIN_IMAGES} or more")
    checkpoints = read_runs(args.checkpoints)
    first = checkpoints[0]
    state = average([checkpoint["state_dict"] for checkpoint in checkpoints])
    if args.statistics:
        source = v98.read_checkpoint(args.statistics)
        state.update(statistics_of(source, args.statistics, like=state))
    model = v98.create_model(first["arch"], 1.0, 1.0, torch.device("cpu"))
    v98.load_weights(model, {"state_dict": state, "arch": first["arch"]}, args.checkpoints[0])
    finish(model, paths, args.input_size, args.new_head)
    content = {name: first[name] for name in KEPT if name in first}
    if len(checkpoints) > 1:
        content["args"] = argparse.Namespace(**(vars(args) | {"out": str(args.out)}))
    content["state_dict"] = half_precision(stage_state(model))
    with atomic(args.out) as temporary:
        torch.save(content, temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
