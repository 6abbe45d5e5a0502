"""Average the weights of runs of pretrain.py.

    python weights/pretraining/average.py small/leg1.pth.tar small/leg1-?/start.pth.tar

The average of networks that were fine-tuned from one start is often better than each of them (model
soups, Wortsman et al. 2022), and two runs keep two cores busy. A share of the ImageNet weights in
the backbone keeps what training on few photographs forgets (WiSE-FT, Wortsman et al. 2022).
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "exp"), str(REPOSITORY / "scripts")]

import torch

import v98
from common.cli import between
from common.errors import InputError, one_line_errors
from common.files import atomic
from pretrain import load_imagenet_weights


def average(states):
    """The mean of state_dicts of one network, in the precision of the first."""
    result = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        if first.is_floating_point():
            result[name] = torch.stack(values).float().mean(dim=0).to(first.dtype)
        else:
            result[name] = first
    return result


def towards_imagenet(state, arch, share):
    """The backbone's part of a state_dict, moved towards the ImageNet weights by this share."""
    backbone = v98.create_model(arch, 1.0, 1.0, torch.device("cpu")).backbone
    load_imagenet_weights(backbone)
    result = {}
    for name, imagenet in backbone.state_dict().items():
        value = state[f"module.backbone.{name}"]
        if value.is_floating_point():
            moved = value.float().lerp(imagenet, share)
            result[f"module.backbone.{name}"] = moved.to(value.dtype)
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
    parser.add_argument(
        "--imagenet-share",
        type=between(float, 0, 1),
        default=0.0,
        metavar="SHARE",
        help="of the ImageNet weights in the backbone (default: %(default)s)",
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the average; returns the exit code."""
    args = parse_args(argv)
    checkpoints = [v98.read_checkpoint(path) for path in args.files]
    for path, checkpoint in zip(args.files, checkpoints, strict=True):
        if shapes(checkpoint) != shapes(checkpoints[0]):
            raise InputError(f"{path}: is of another network than {args.files[0]}")
    arch = checkpoints[0]["arch"]
    state = average([checkpoint["state_dict"] for checkpoint in checkpoints])
    if args.imagenet_share:
        state |= towards_imagenet(state, arch, args.imagenet_share)
    content = {
        "state_dict": state,
        "arch": arch,
        "args": argparse.Namespace(files=args.files, imagenet_share=args.imagenet_share),
    }
    with atomic(args.out) as temporary:
        torch.save(content, temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
