"""Average the weights of runs of pretrain.py that began with the same weights.

    python weights/pretraining/average.py small/leg1.pth.tar small/leg1-?/start.pth.tar

The average of networks that were fine-tuned from one start is often better than each of them (model
soups, Wortsman et al. 2022), and two runs keep two cores busy.
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


def average(states):
    """The mean of state_dicts of one network, in half precision as they are."""
    result = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        if first.is_floating_point():
            result[name] = torch.stack(values).float().mean(dim=0).to(first.dtype)
        else:
            result[name] = first
    return result


def shapes(checkpoint):
    """The shape of each tensor by its name."""
    return {name: value.shape for name, value in checkpoint["state_dict"].items()}


def parse_args(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("files", nargs="+", metavar="FILE", help="start.pth.tar of a run")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the average; returns the exit code."""
    args = parse_args(argv)
    checkpoints = [v98.read_checkpoint(path) for path in args.files]
    for path, checkpoint in zip(args.files, checkpoints, strict=True):
        if shapes(checkpoint) != shapes(checkpoints[0]):
            raise InputError(f"{path}: is of another network than {args.files[0]}")
    content = {
        "state_dict": average([checkpoint["state_dict"] for checkpoint in checkpoints]),
        "arch": checkpoints[0]["arch"],
        "args": argparse.Namespace(files=args.files),
    }
    with atomic(args.out) as temporary:
        torch.save(content, temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
