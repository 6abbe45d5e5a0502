"""Make a file to ship of a stage's checkpoint: half precision, without what only training needs.

    python weights/pretraining/finish.py small/v98/train/checkpoint_0000.pth.tar \\
        small/v98.pth.tar --statistics small/start.pth.tar

A stage leaves BatchNorm with the statistics of its hard views, which do not fit the plain images
that are searched. A network of 52 million weights hardly minds; a small one does. So the file gets
the backbone's statistics of --statistics, which are ImageNet's.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "exp"), str(REPOSITORY / "scripts")]

import torch

import v98
from common.errors import InputError, one_line_errors
from common.files import atomic
from pretrain import half_precision


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


def parse_args(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of a stage's training")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument(
        "--statistics", required=True, metavar="FILE", help="weights with the statistics to keep"
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the file; returns the exit code."""
    args = parse_args(argv)
    checkpoint = v98.read_checkpoint(args.checkpoint)
    if not {"state_dict", "arch", "args", "epoch"} <= checkpoint.keys():
        raise InputError(f"{args.checkpoint}: is no checkpoint of a stage's training")
    state = checkpoint["state_dict"]
    source = v98.read_checkpoint(args.statistics)
    state.update(statistics_of(source, args.statistics, like=state))
    content = {
        "state_dict": half_precision(state),
        "arch": checkpoint["arch"],
        "args": checkpoint["args"],
        "epoch": checkpoint["epoch"],
    }
    with atomic(args.out) as temporary:
        torch.save(content, temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
