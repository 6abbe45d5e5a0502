"""The views of a stage's first training samples as one image, as the network sees them.

    python scripts/dev/show_views.py v98 input/training_images --output views.png
    python scripts/dev/show_views.py v107 input/training_images --output views.png --count 4 \
        --input-size 128 --num-negatives 5

A row is a sample: its views after augmentation and erasing, then its references. Samples come in
the order in which training takes them. Other flags are the stage's own, such as --input-size,
--ncrops, --seed and --start-epoch.
"""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "exp"))

from torchvision.utils import save_image

from common.cli import at_least
from common.errors import one_line_errors, warn
from common.files import atomic

STAGES = ("v83", "v86", "v98", "v107")
FORMATS = {".png": "PNG", ".jpg": "JPEG"}


def create_dataset(stage, args):
    """The TrainDataset of a stage, given as a module, with the stage's arguments."""
    values = {"folder": args.data}
    for name in inspect.signature(stage.TrainDataset).parameters:
        if name != "folder":
            values[name] = getattr(args, name)
    return stage.TrainDataset(**values)


def first_views(stage, args, count):
    """The views of the first `count` samples of an epoch, and the number of views of a sample.

    Views are float32 (n, 3, size, size) in 0 ... 1. Messages about unreadable images go to stderr.
    Raises the stage's InputError where data cannot be used.
    """
    dataset = create_dataset(stage, args)
    dataset.epoch = args.start_epoch
    count = min(count, len(dataset))
    indices = stage.epoch_batches(args.seed, args.start_epoch, len(dataset), count)[0]
    batch, messages = stage.load_samples(dataset, indices)
    if batch is None:
        raise stage.InputError(messages[-1])
    for message in messages:
        warn(f"{message}; another sample takes its place")
    preprocess = stage.Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    views = preprocess(batch.pixels, batch.erasings).clamp(0, 1)
    return views, dataset.views_per_sample


def parse_args(argv=None):
    """(this command's flags, the stage's module, its own arguments)."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("stage", choices=STAGES, help="stage whose views to show")
    add("data", metavar="FOLDER", help="folder of the training images")
    add("--output", type=Path, required=True, metavar="FILE", help="image to write, png or jpg")
    add("--count", type=at_least(int, 1), default=8, help="samples (default: %(default)s)")
    args, flags = parser.parse_known_args(argv)
    if args.output.suffix not in FORMATS:
        parser.error(f"--output {args.output}: must end in one of {', '.join(FORMATS)}")
    stage = importlib.import_module(args.stage)
    return args, stage, stage.parse_args([args.data, *flags])


@one_line_errors
def main(argv=None):
    """Write the image; returns the exit code: 0, or 2 with one line on stderr."""
    args, stage, stage_args = parse_args(argv)
    views, columns = first_views(stage, stage_args, args.count)
    with atomic(args.output) as path:
        save_image(views, path, nrow=columns, format=FORMATS[args.output.suffix])
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
