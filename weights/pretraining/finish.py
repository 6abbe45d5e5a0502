"""Turn trained weights into a file to publish: averaged over runs, with other BatchNorm statistics,
in half precision, without the optimizer.

    python weights/pretraining/finish.py small/start.pth.tar \\
        small/pretrain-?/last.pth.tar small/before.pth.tar --new-head \\
        --images small/images/training_images
    python weights/pretraining/finish.py small/v98.pth.tar \\
        small/v98/train/checkpoint_0000.pth.tar --statistics small/start.pth.tar \\
        --images small/images/training_images

The average of networks that were fine-tuned from one start is often better than each of them (model
soups, Wortsman et al. 2022), and two runs keep two cores busy.

A stage leaves BatchNorm with the statistics of its batches, most of which are augmented and
generated; extraction sees unaugmented photographs. So the backbone gets the statistics of
--statistics, if given: those of the start, which are ImageNet's. The head gets those of unaugmented
images: random ones of views.py.

--new-head computes the head's weights, too: the principal components of the backbone's features of
these images, whitened in part. BatchNorm then subtracts most of the mean.
weights/EXPERIMENTS.md has other heads to compare.
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
from pretrain import pooled_features, stage_state
from views import random_image

MIN_IMAGES = 1000  # of dead leaves; with fewer, too many of the 5,000 images would be the same
BATCHES = 50
BATCH_SIZE = 100  # unaugmented images
WHITENING = 0.25  # components are scaled by variance ** -WHITENING; 0.5 whitens fully
# Of the mean, to subtract. Leaving a part raises the recall at a precision of 0.99, and leaving
# more makes normalized scores find fewer copies (weights/EXPERIMENTS.md).
MEAN_SHARE = 0.9


# ---- checkpoints ----


def read_checkpoints(paths):
    """The checkpoints. Raises InputError where they are of different networks."""
    checkpoints = [v98.read_checkpoint(path) for path in paths]
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if not {"arch", "args"} <= checkpoint.keys():
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


def half_precision(state):
    """A state_dict with the floating-point tensors in half precision.

    They share one storage: one for each would take 75 kB more in all, and with three such files
    the four networks in weights/ would exceed their limit of 25 MB.
    """
    names = [name for name, value in state.items() if value.is_floating_point()]
    values = torch.cat([state[name].half().flatten() for name in names])
    parts = values.split([state[name].numel() for name in names])
    return state | {
        name: part.view_as(state[name]) for name, part in zip(names, parts, strict=True)
    }


# ---- head ----


def unaugmented_features(model, leaf_paths, input_size):
    """Features of unaugmented images, as extraction sees them: float32 (n, channels)."""
    config = model.backbone.default_cfg
    preprocess = v98.Preprocess(config["mean"], config["std"])
    features = []
    v98.seed_generators(0)
    for _ in trange(BATCHES, desc="unaugmented images", unit="batch"):
        images = [random_image(leaf_paths) for _ in range(BATCH_SIZE)]
        pixels = np.stack([v98.resize(image, [input_size, input_size]) for image in images])
        batch = preprocess(torch.from_numpy(pixels))
        features.append(pooled_features(model.backbone, batch))
    return torch.cat(features)


def whitening_head(features, count):
    """Principal component analysis, partly whitened: a linear layer's weight (count, channels).

    features: (n, channels). The `count` directions of largest variance are kept, in ascending
    order. Whitening makes the strongest count less than they would, but still most. Jégou and Chum
    2012 whiten fully.
    """
    variances, axes = torch.linalg.eigh(torch.cov(features.T))
    # Variances of zero may come out negative; their power would be NaN.
    variances = variances.clamp(min=1e-6 * variances.max())
    return (axes[:, -count:] * variances[-count:] ** -WHITENING).T


@torch.no_grad()
def finish_head(model, leaf_paths, input_size, new_head):
    """Give the head's BatchNorm statistics of unaugmented images; with new_head, compute the linear
    layer's weight, and BatchNorm's weight and bias, too.
    """
    model.eval()
    batchnorm = model.bn
    features = unaugmented_features(model, leaf_paths, input_size)
    if new_head:
        model.fc.weight.copy_(whitening_head(features, len(model.fc.weight)))
    outputs = model.fc(features)
    batchnorm.running_mean.copy_(outputs.mean(dim=0))
    batchnorm.running_var.copy_(outputs.var(dim=0))
    if new_head:
        # BatchNorm then gives x - MEAN_SHARE * mean: with a weight of 1 it would whiten fully.
        batchnorm.weight.copy_((batchnorm.running_var + batchnorm.eps).sqrt())
        batchnorm.bias.copy_((1 - MEAN_SHARE) * batchnorm.running_mean)


# ---- main ----


def parse_args(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=v98.HelpFormatter)
    add = parser.add_argument
    add("out", metavar="OUT", help="file to write")
    add(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="of a stage or of pretrain.py; several are averaged",
    )
    add(
        "--images",
        required=True,
        metavar="FOLDER",
        help=f"{MIN_IMAGES} images of dead leaves or more, as make_dataset.py writes them",
    )
    add("--input-size", type=at_least(int, 1), default=160, help="of the images, pixels")
    add("--new-head", action="store_true", help="compute the head's weights too")
    add("--statistics", metavar="FILE", help="weights with the statistics that the backbone gets")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the file; returns the exit code."""
    args = parse_args(argv)
    leaf_paths = v98.list_images(args.images)
    if len(leaf_paths) < MIN_IMAGES:
        raise InputError(f"{args.images}: has {len(leaf_paths)} images; give {MIN_IMAGES} or more")
    checkpoints = read_checkpoints(args.checkpoints)
    state = average([checkpoint["state_dict"] for checkpoint in checkpoints])
    arch = checkpoints[0]["arch"]
    model = v98.create_model(arch, gem_p=1.0, gem_eval_p=1.0, device=torch.device("cpu"))
    if args.statistics:
        v98.load_weights(model, v98.read_checkpoint(args.statistics), args.statistics)
        other_state = stage_state(model)
        # The head's, which are among these, are computed below.
        state |= {name: value for name, value in other_state.items() if "running_" in name}
    v98.load_weights(model, {"state_dict": state}, args.checkpoints[0])
    finish_head(model, leaf_paths, args.input_size, args.new_head)
    content = {
        "state_dict": half_precision(stage_state(model)),
        "arch": arch,
        "args": checkpoints[0]["args"],
        "finish": args,
    }
    v98.write_checkpoint(content, [Path(args.out)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
