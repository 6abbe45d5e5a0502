"""Make a file to ship of trained weights: with BatchNorm's statistics of plain images, in half
precision, without what only training needs.

    python weights/pretraining/finish.py small/v98/train/checkpoint_0000.pth.tar \\
        small/v98.pth.tar --statistics small/start.pth.tar \\
        --images small/leg1-0/input/training_images

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
from common.cli import at_least
from common.errors import InputError, one_line_errors
from common.files import atomic
from pretrain import half_precision, stage_state

KEPT = ("arch", "args", "epoch")  # of the checkpoint, beside the weights
BATCH = 100  # images


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
    add("checkpoint", metavar="CHECKPOINT", help="of a stage's training, or of average.py")
    add("out", type=Path, metavar="OUT", help="file to write")
    add("--images", required=True, metavar="FOLDER", help=f"plain images, {BATCH} or more")
    add(
        "--input-size",
        type=at_least(int, 1),
        default=128,
        help="to which they are resized, pixels (default: %(default)s)",
    )
    add("--statistics", metavar="FILE", help="weights with the statistics that the backbone gets")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the file; returns the exit code."""
    args = parse_args(argv)
    checkpoint = v98.read_checkpoint(args.checkpoint)
    state = checkpoint["state_dict"]
    if args.statistics:
        source = v98.read_checkpoint(args.statistics)
        state.update(statistics_of(source, args.statistics, like=state))
    paths = v98.list_images(args.images)
    if len(paths) < BATCH:
        raise InputError(f"{args.images}: has {len(paths)} images; give {BATCH} or more")
    model = v98.create_model(checkpoint["arch"], 1.0, 1.0, torch.device("cpu"))
    v98.load_weights(model, checkpoint, args.checkpoint)
    estimate_head_statistics(model, paths, args.input_size)
    content = {name: checkpoint[name] for name in KEPT if name in checkpoint}
    content["state_dict"] = half_precision(stage_state(model))
    with atomic(args.out) as temporary:
        torch.save(content, temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
