r"""Write a checkpoint as ONNX, TorchScript or safetensors, and check that the file gives the same
descriptors as the network.

    python scripts/export.py weights/v98.onnx  # the small network, match.py's default
    # for onnxruntime, with the least cosine of a copy, so that match.py needs no --threshold
    python scripts/export.py exp/v107/train/checkpoint_0009.pth.tar isc.onnx --threshold 0.604169
    python scripts/export.py exp/v107/train/checkpoint_0009.pth.tar isc16.onnx --precision fp16 \
        --size dynamic
    python scripts/export.py exp/v107/train/checkpoint_0009.pth.tar isc.pt  # TorchScript
    # weights, and isc.json
    python scripts/export.py exp/v107/train/checkpoint_0009.pth.tar isc.safetensors

Input `images`, float32 (n, 3, height, width), n is free; output `descriptors`, float32 (n, 256), of
length 1: two images are copies where the inner product is large. The file states what its input
must be, as JSON: .onnx, metadata `config`; .pt, extra file `config.json`; .safetensors, metadata
`config` and OUTPUT's name with .json. The same checkpoint, flags and versions give a byte-identical
.onnx or .safetensors.

Weights that half precision holds exactly, as those of the checkpoints in weights/, are stored so in
an .onnx, and cast to float32 on loading. fp16 halves any file: an .onnx computes its backbone in
float16, pooling and head in float32; a .safetensors holds the backbone's weights in float16. A file
is kept only if its descriptors of 32 images, preprocessed as in extraction, agree with those of the
network in PyTorch's float32 on the CPU: for each image a cosine above 0.9999 and no number off by
1e-4 or more; in fp16, 0.999 and 0.03. The images are generated, or the first in --photos. With
--size dynamic, other sizes must agree as well. Exit codes: 0; 2 for input that cannot be used, and
for a file that disagrees: nothing is written then.
"""

import argparse
import io
import json
import sys
import warnings
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes
from tqdm import tqdm

from common.cli import at_least, between
from common.errors import one_line_errors
from common.files import atomic, sha256_of
from common.onnx_export import to_onnx
from common.sample_images import dead_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exp"))

import v107
from v107 import InputError

ROOT = Path(__file__).resolve().parents[1]

# The network that is exported without CHECKPOINT, and its thresholds: the least scores of a copy,
# by match.py's ways of scoring. scripts/dev/match_thresholds.py measures them; rounded up.
SMALL = ROOT / "weights" / "v98.pth.tar"
SMALL_ARCH = "tf_efficientnet_lite0"
SMALL_SIZE = 160
SMALL_THRESHOLDS = {
    "threshold": 0.57,
    "threshold_of_views": 0.64,
    "normalized_threshold": 0.22,
    "normalized_threshold_of_views": 0.22,
}
SMALL_THRESHOLD_SOURCE = (
    "precision 0.99 on the development split of weights/README.md, phase 1: 450 queries, "
    "600 references"
)

IMAGES = 32  # on which file and network must agree
BATCHES = (1, 3, 4, 8, 8, 8)  # of these images: the file must take any number at once
OTHER_SIZE_IMAGES = 8  # of these, at each of the other sizes
# The smallest cosine must be above, the largest difference below. In fp16, 0.9997 and 0.017 were
# the worst of six networks of random weights, in which rounding has more effect than in trained
# ones: in fp32 theirs differ by up to 6e-5.
BOUNDS = {"fp32": (0.9999, 1e-4), "fp16": (0.999, 3e-2)}


def create_network(args):
    """The network of --arch with the checkpoint's weights, in evaluation mode, on the CPU.

    Raises InputError where the weights are not of this network.
    """
    model = v107.create_model(args.arch, 1.0, args.gem_eval_p, torch.device("cpu"))
    v107.load_weights(model, v107.read_checkpoint(args.checkpoint), args.checkpoint)
    return model.eval().requires_grad_(False)


def create_config(args, model):
    """Everything a user of the file must know, as a dict of plain values."""
    pretrained = model.backbone.default_cfg
    packages = ("torch", "timm", "onnx", "safetensors")
    config = {
        "arch": args.arch,
        "gem_eval_p": args.gem_eval_p,
        "input": "images",
        "input_size": args.input_size,
        "colour": "RGB",  # this spelling is part of the file format
        "resize": "bilinear, antialias, to a square",
        "scale": "1/255, then (x - mean) / std",
        "mean": list(pretrained["mean"]),
        "std": list(pretrained["std"]),
        "layout": "float32 (n, 3, height, width)",
        "size": args.size,
        "precision": args.precision,
        "output": "descriptors",
        "dim": model.fc.out_features,
        "descriptor": "float32 of length 1, to be compared by inner product",
        "weights": args.checkpoint.name,
        "weights_sha256": sha256_of(args.checkpoint),
        # without suffixes such as "+cpu": the file does not depend on them
        "versions": {name: version(name).partition("+")[0] for name in packages},
    }
    if args.thresholds:
        config |= args.thresholds
        config["threshold_source"] = args.threshold_source
    return config


# ---- formats ----


def from_onnx(path):
    """The file's network, a function from images to descriptors, run by onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["descriptors"], {"images": images.numpy()})[0]


def to_torchscript(model, config, images):
    """The network as the bytes of a TorchScript file."""
    traced = torch.jit.trace(model, images, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={"config.json": json.dumps(config)})
    return buffer.getvalue()


def from_torchscript(path):
    """The file's network, a function from images to descriptors, run by TorchScript."""
    traced = torch.jit.load(path, map_location="cpu")
    return lambda images: traced(images).numpy()


def to_safetensors(model, config, _images):
    """The weights as the bytes of a .safetensors file."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if config["precision"] == "fp16":
        for name, value in weights.items():
            if name.startswith("backbone.") and value.is_floating_point():
                weights[name] = value.half()
    return tensors_to_bytes(weights, metadata={"config": json.dumps(config)})


def from_safetensors(path):
    """The network with the file's weights, a function from images to descriptors, in float32."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    model = v107.create_model(config["arch"], 1.0, config["gem_eval_p"], torch.device("cpu"))
    model.load_state_dict(load_file(path))
    model.eval()
    return lambda images: model(images).numpy()


# {suffix: (writes the network as bytes, reads the network of a file)}
FORMATS = {
    ".onnx": (to_onnx, from_onnx),
    ".pt": (to_torchscript, from_torchscript),
    ".safetensors": (to_safetensors, from_safetensors),
}


# ---- parity ----


def parity_images(photos, input_size):
    """32 RGB images: the first in the folder `photos`, if given, made up to the number by generated
    ones of several sizes and shapes.
    """
    paths = v107.list_images(photos)[:IMAGES] if photos else []
    images = [v107.open_image(path) for path in paths]
    for number in range(len(images), IMAGES):
        rng = np.random.default_rng([IMAGES, number])
        side = int(rng.integers(input_size // 2, input_size, endpoint=True)) + 16
        width, height = (side - int(cut) for cut in rng.integers(0, side // 2, size=2))
        images.append(dead_leaves(rng, side).crop((0, 0, width, height)))
    return images


def parity_batches(args, model):
    """The images in batches, float32 (n, 3, height, width): all at --input-size, some at other
    sizes if any will do.
    """
    config = model.backbone.default_cfg
    size = args.input_size
    images = parity_images(args.photos, size)

    def preprocess(images, side):
        transform = v107.evaluation_transform(side, config["mean"], config["std"])
        return torch.stack([transform(image) for image in images])

    batches = list(preprocess(images, size).split(BATCHES))
    if args.size == "dynamic":
        # Odd and even in each of the network's stages.
        for height, width in ((size // 2 + 1, size), (size + 33, size + 2)):
            pixels = preprocess(images[:OTHER_SIZE_IMAGES], max(height, width))
            batches.append(pixels[:, :, :height, :width].contiguous())
    return batches


def extract_descriptors(network, batches, path):
    """A network's descriptors of all batches, (n, dim) float64.

    Raises InputError, naming its file, unless they are finite and tell images apart: a comparison
    of constant descriptors proves nothing.
    """
    rows = []
    for batch in tqdm(batches, path.name, unit="batch"):
        rows.append(np.asarray(network(batch), np.float64))
    descriptors = np.concatenate(rows)
    if not np.isfinite(descriptors).all():
        raise InputError(f"{path}: gives NaN or infinity among the descriptors of {IMAGES} images")
    if np.ptp(descriptors[:IMAGES], axis=0).max() <= BOUNDS["fp32"][1]:
        raise InputError(
            f"{path}: gives {IMAGES} different images the same numbers; the network has collapsed"
        )
    return descriptors


def check(expected, actual, precision, path):
    """How well two arrays of descriptors (n, dim) agree, in words. Raises InputError, naming the
    file, beyond the bounds.
    """
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    cosine = float(((expected * actual).sum(axis=1) / lengths).min())
    difference = float(np.abs(expected - actual).max())
    figures = f"smallest cosine {cosine:.7f}, largest difference {difference:.2g}"
    least, most = BOUNDS[precision]
    if not (cosine > least and difference < most):
        raise InputError(
            f"{path}: its descriptors differ from PyTorch's: {figures}; {precision} must be above "
            f"{least} and below {most:g}"
        )
    return f"{figures} of {len(actual)} images"


# ---- main ----


@contextmanager
def as_input_error(what):
    """Turn whatever exporters and runtimes raise into an InputError that begins with `what`."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # tracing, protobuf, zip and each operator fail in their own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{what} ({reason})") from error


@torch.no_grad()
def export(args):
    """Write OUTPUT and the .json beside it, both or neither; returns the line for the user.

    Raises InputError where the network cannot be exported, or the file disagrees with it.
    """
    write, read = FORMATS[args.output.suffix]
    with as_input_error(f"{args.arch}: cannot run at --input-size {args.input_size}"):
        model = create_network(args)
        batches = parity_batches(args, model)
        expected = extract_descriptors(model, batches, args.checkpoint)
    config = create_config(args, model)
    with ExitStack() as stack:
        path = stack.enter_context(atomic(args.output))
        if args.output.suffix == ".safetensors":
            beside = stack.enter_context(atomic(args.output.with_suffix(".json")))
            beside.write_text(json.dumps(config, indent=1) + "\n")
        impossible = f"{args.output}: cannot be made of {args.arch} with --size {args.size}"
        with as_input_error(impossible):
            path.write_bytes(write(model, config, batches[1][:2]))
            actual = extract_descriptors(read(path), batches, args.output)
        figures = check(expected, actual, args.precision, args.output)
        return f"{args.output}: {path.stat().st_size / 1e6:.1f} MB, {figures}"


def parse_args(argv=None):
    """The command line; exits with code 2 and one line where it is invalid."""
    defaults = v107.parse_args(["."])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="of any stage, or the author's; only tensors are loaded (default: the small network "
        "in weights/)",
    )
    add(
        "output",
        type=Path,
        metavar="OUTPUT",
        help=f"ends in {', '.join(FORMATS)}, and so chooses the format",
    )
    add(
        "-a",
        "--arch",
        help=f"backbone, any name that timm knows (default: {defaults.arch}, of the small network "
        f"{SMALL_ARCH})",
    )
    add(
        "--input-size",
        type=at_least(int, 32),
        help=f"side of the square input (default: {defaults.input_size}, of the small network "
        f"{SMALL_SIZE})",
    )
    add(
        "--gem-eval-p",
        type=float,
        default=defaults.gem_eval_p,
        help="exponent of GeM pooling (default: %(default)s)",
    )
    add(
        "--precision",
        choices=BOUNDS,
        default="fp32",
        help="of weights, and of an .onnx's backbone (default: fp32)",
    )
    add(
        "--size",
        choices=["fixed", "dynamic"],
        default="fixed",
        help="whether height and width must be --input-size (onnxruntime enforces it) or are free; "
        "then other sizes are compared too (default: fixed)",
    )
    add(
        "--threshold",
        type=between(float, -1, 1),
        help="least cosine of a copy, written into the file for match.py, as are the next three "
        f"(default: of the small network {SMALL_THRESHOLDS['threshold']}, of others none)",
    )
    add(
        "--threshold-of-views",
        type=between(float, -1, 1),
        help="the same for queries in several views",
    )
    add(
        "--normalized-threshold",
        type=between(float, -2, 1),
        help="least normalized score of a copy; match.py normalizes by default where it is known",
    )
    add(
        "--normalized-threshold-of-views",
        type=between(float, -2, 1),
        help="the same for queries in several views",
    )
    add(
        "--photos",
        type=Path,
        metavar="DIR",
        help="compare on the images in DIR, the first 32, before generated ones",
    )
    args = parser.parse_args(argv)
    if args.output.suffix not in FORMATS:
        parser.error(f"{args.output}: OUTPUT must end in one of {', '.join(FORMATS)}")
    if args.output.suffix == ".pt" and args.precision == "fp16":
        parser.error(
            "--precision fp16: is for .onnx and .safetensors; a CPU cannot check it in "
            "TorchScript in time"
        )
    choose_network(args, defaults)
    return args


def choose_network(args, defaults):
    """Fill in what the command line leaves open: the network, its input size and its thresholds."""
    if args.checkpoint:
        args.arch = args.arch or defaults.arch
        args.input_size = args.input_size or defaults.input_size
    else:
        args.checkpoint = SMALL
        args.arch = args.arch or SMALL_ARCH
        args.input_size = args.input_size or SMALL_SIZE
    given = {name: getattr(args, name) for name in SMALL_THRESHOLDS}
    args.thresholds = {name: value for name, value in given.items() if value is not None}
    args.threshold_source = "the command line of export.py"
    # The thresholds of the small network were measured with these settings.
    measured = (
        args.checkpoint == SMALL
        and args.input_size == SMALL_SIZE
        and args.gem_eval_p == defaults.gem_eval_p
    )
    if measured and not args.thresholds:
        args.thresholds = SMALL_THRESHOLDS
        args.threshold_source = SMALL_THRESHOLD_SOURCE


def check_output(args):
    """Raise InputError where OUTPUT cannot be written."""
    if not args.output.parent.is_dir() or args.output.is_dir():
        raise InputError(
            f"{args.output}: is a folder, or its folder does not exist; give the name of a file"
        )
    both_exist = args.output.exists() and args.checkpoint.exists()
    if both_exist and args.output.samefile(args.checkpoint):
        raise InputError(f"{args.output}: is the checkpoint itself; give another name")


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    try:
        check_output(args)
        if args.checkpoint == SMALL:
            print(
                f"export.py: {SMALL.relative_to(ROOT)} is exported; give CHECKPOINT for another "
                f"network",
                file=sys.stderr,
            )
        with warnings.catch_warnings(action="ignore"):  # of exporters and timm about themselves
            print(export(args))
    except (InputError, OSError) as error:
        place = ""
        if isinstance(error, OSError) and not error.filename:  # a full disk does not say where
            place = f"{args.output}: "
        raise InputError(f"{place}{error}; nothing was written") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
