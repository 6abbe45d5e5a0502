r"""Write a checkpoint as ONNX, TorchScript or safetensors, and prove that the file describes images
as the network does.

    python scripts/export.py weights/v98.onnx  # the small network, match.py's default
    # for onnxruntime, with the least cosine of a copy, which match.py then need not be told
    python scripts/export.py exp/v107/train/checkpoint_0009.pth.tar isc.onnx --threshold 0.604169
    python scripts/export.py exp/v107/train/checkpoint_0009.pth.tar isc16.onnx --precision fp16 \
        --size dynamic
    python scripts/export.py exp/v107/train/checkpoint_0009.pth.tar isc.pt  # TorchScript
    # weights, and isc.json
    python scripts/export.py exp/v107/train/checkpoint_0009.pth.tar isc.safetensors

Input `images`, float32 (n, 3, height, width), n as you like; output `descriptors`, float32 (n,
256), of length 1: two images are copies where the inner product is large. What the input must be
stands in the file, as JSON: .onnx, metadata `config`; .pt, extra file `config.json`; .safetensors,
metadata `config` and OUTPUT's name with .json. The same checkpoint, flags and
versions give a byte-identical .onnx or .safetensors.

fp16 halves the file: an .onnx computes its backbone in float16, pooling and head in float32; a
.safetensors holds the backbone's weights so. A file is left behind only if it describes 32 images,
prepared as in extraction, as the network in PyTorch's float32 on the CPU does: of each, the cosine
above 0.9999 and no number off by 1e-4 or more; in fp16, 0.999 and 0.03. They are generated
pictures, or the first in --photos. With --size dynamic, other sizes must agree as well. Exit codes:
0; 2 for input that cannot be used, and for a file that disagrees: nothing is written then.
"""

import argparse
import io
import json
import re
import sys
import warnings
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes
from tqdm import tqdm

from common.cli import at_least
from common.files import atomic, sha256_of
from common.sample_images import dead_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exp"))

import v107
from v107 import InputError

ROOT = Path(__file__).resolve().parents[1]

# The network that is exported without CHECKPOINT, and its threshold.
SMALL, SMALL_ARCH, SMALL_SIZE = ROOT / "weights" / "v98.pth.tar", "test_byobnet", 96
SMALL_THRESHOLD = 0.75
SMALL_THRESHOLD_SOURCE = (
    "precision 0.99 and recall 0.71 on the development split of weights/README.md, phase 1: "
    "450 queries, 600 references"
)

IMAGES = 32  # that file and network must agree on
BATCHES = (1, 3, 4, 8, 8, 8)  # into which they are divided: the file must take any number at once
OTHER_SIZE_IMAGES = 8  # of these, at each of the other sizes
# The smallest cosine is to be above, the largest difference below. In fp16, 0.9997 and 0.017 were
# the worst of six networks of random weights, which make more of rounding than trained ones: in
# fp32 theirs differ by up to 6e-5.
BOUNDS = {"fp32": (0.9999, 1e-4), "fp16": (0.999, 3e-2)}
OPSET = 17  # onnxruntime reads it since 2022


def create_network(args):
    """The network of --arch with the checkpoint's weights, ready for evaluation, on the CPU. Raises
    InputError.
    """
    model = v107.create_model(args.arch, 1.0, args.gem_eval_p, torch.device("cpu"))
    v107.load_weights(model, v107.read_checkpoint(args.checkpoint), args.checkpoint)
    return model.eval().requires_grad_(False)


def describe_config(args, model):
    """All that one must know to use the file, as a dict of plain values."""
    pretrained = model.backbone.default_cfg
    packages = ("torch", "timm", "onnx", "safetensors")
    config = {
        "arch": args.arch,
        "gem_eval_p": args.gem_eval_p,
        "input": "images",
        "input_size": args.input_size,
        "colour": "RGB",
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
        # without "+cpu" or the like, which the file does not depend on
        "versions": {name: version(name).partition("+")[0] for name in packages},
    }
    if args.threshold is not None:
        config["threshold"] = args.threshold
        config["threshold_source"] = args.threshold_source
    return config


# ---- formats ----


def to_onnx(model, config, images):
    """The network as the bytes of one .onnx file."""
    batch = {0: "n"}
    size = {2: "height", 3: "width"} if config["size"] == "dynamic" else {}
    # The exporter by torch.export takes a minute instead of a second, and has no end for dynamic
    # sizes with the padding of EfficientNets ("SAME"), which depends on them.
    torch.onnx.export(
        model,
        (images,),
        buffer := io.BytesIO(),
        dynamo=False,
        opset_version=OPSET,
        input_names=[config["input"]],
        output_names=[config["output"]],
        dynamic_axes={config["input"]: batch | size, config["output"]: batch},
    )
    exported = onnx.load_from_string(buffer.getvalue())
    exported.graph.output[0].type.tensor_type.shape.dim[1].dim_value = config["dim"]
    if config["precision"] == "fp16":
        exported = to_half(exported)
    onnx.helper.set_model_props(exported, {"config": json.dumps(config)})
    onnx.checker.check_model(exported, full_check=True)
    return exported.SerializeToString()


def to_half(exported):
    """The model with a backbone in float16; its input and output, pooling and head stay in
    float32.
    """
    exported = onnx.shape_inference.infer_shapes(exported)
    graph, single = exported.graph, single_precision(exported.graph)
    # Around a float32 node the converter casts all that it knows to be float, so that numbers
    # between two such nodes would be rounded. It is to know of those only that pass between float16
    # and float32.
    made = {name for node in graph.node if node.name in single for name in node.output}
    passed = {
        name
        for node in graph.node
        for name in node.input
        if (name in made) != (node.name in single)
    }
    known = [value for value in graph.value_info if value.name in passed]
    del graph.value_info[:]
    graph.value_info.extend(known)
    graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.UNDEFINED
    half = convert_float_to_float16(
        exported, keep_io_types=True, disable_shape_infer=True, node_block_list=single
    )
    half.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    OnnxModel.graph_topological_sort(half.graph)
    return half


def single_precision(graph):
    """Names of the nodes that stay in float32: those behind the backbone, and those that compute
    with sizes, of which float16 would round the large ones."""
    constants, sizes, names = {"", *(weight.name for weight in graph.initializer)}, set(), []
    for node in graph.node:
        inputs = set(node.input) - constants
        sized = bool(inputs) and inputs <= sizes
        if not inputs:
            constants.update(node.output)
        elif sized or node.op_type == "Shape":
            sizes.update(node.output)
        if sized or re.match(
            "/(?!backbone/)", node.name
        ):  # without a slash: other names of equal weights
            names.append(node.name)
    return names


def from_onnx(path):
    """The file's function from images to descriptors, by onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which become one line
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["descriptors"], {"images": images.numpy()})[0]


def to_torchscript(model, config, images):
    """The network as the bytes of a TorchScript file."""
    traced = torch.jit.trace(model, images, check_trace=False)
    torch.jit.save(traced, buffer := io.BytesIO(), _extra_files={"config.json": json.dumps(config)})
    return buffer.getvalue()


def from_torchscript(path):
    """The same by TorchScript."""
    traced = torch.jit.load(path, map_location="cpu")
    return lambda images: traced(images).numpy()


def to_safetensors(model, config, _images):
    """The weights as the bytes of a .safetensors file."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if config["precision"] == "fp16":
        names = [
            name
            for name, value in weights.items()
            if name.startswith("backbone.") and value.is_floating_point()
        ]
        weights |= {name: weights[name].half() for name in names}
    return tensors_to_bytes(weights, metadata={"config": json.dumps(config)})


def from_safetensors(path):
    """The same by a new network that loads the weights; it computes in float32."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    cpu = torch.device("cpu")
    model = v107.create_model(config["arch"], 1.0, config["gem_eval_p"], cpu).eval()
    model.load_state_dict(load_file(path))
    return lambda images: model(images).numpy()


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
    pictures = [v107.open_image(path) for path in paths]
    for number in range(len(pictures), IMAGES):
        rng = np.random.default_rng([IMAGES, number])
        side = int(rng.integers(input_size // 2, input_size, endpoint=True)) + 16
        width, height = (side - int(cut) for cut in rng.integers(0, side // 2, size=2))
        pictures.append(dead_leaves(rng, side).crop((0, 0, width, height)))
    return pictures


def parity_batches(args, model):
    """The images in batches, float32 (n, 3, height, width): all at --input-size, some at other
    sizes if any will do.
    """
    config, size = model.backbone.default_cfg, args.input_size
    pictures = parity_images(args.photos, size)

    def prepared(pictures, side):
        transform = v107.evaluation_transform(side, config["mean"], config["std"])
        return torch.stack([transform(picture) for picture in pictures])

    batches = list(prepared(pictures, size).split(BATCHES))
    if args.size == "dynamic":
        for height, width in (
            (size // 2 + 1, size),
            (size + 33, size + 2),
        ):  # odd and even in each of the stages
            images = prepared(pictures[:OTHER_SIZE_IMAGES], max(height, width))
            batches.append(images[:, :, :height, :width].contiguous())
    return batches


def describe(network, batches, path):
    """A network's descriptors of all batches, (n, dim) float64. Raises InputError, naming its file,
    unless they are finite and tell images apart: anything agrees with what is always the same."""
    rows = [
        np.asarray(network(batch), np.float64) for batch in tqdm(batches, path.name, unit="batch")
    ]
    descriptors = np.concatenate(rows)
    if not np.isfinite(descriptors).all():
        raise InputError(
            f"{path}: has descriptors with NaN or infinity among those of {IMAGES} images"
        )
    if np.ptp(descriptors[:IMAGES], axis=0).max() <= BOUNDS["fp32"][1]:
        raise InputError(
            f"{path}: describes {IMAGES} images by the same numbers, as a collapsed network does"
        )
    return descriptors


def check(expected, actual, precision, path):
    """How well two lists of descriptors agree, in words. Raises InputError, naming the file, beyond
    the bounds.
    """
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    cosine = float(((expected * actual).sum(axis=1) / lengths).min())
    difference = float(np.abs(expected - actual).max())
    figures = f"smallest cosine {cosine:.7f}, largest difference {difference:.2g}"
    least, most = BOUNDS[precision]
    if not (cosine > least and difference < most):
        bounds = f"{precision} has to be above {least} and below {most:g}"
        raise InputError(
            f"{path}: describes images otherwise than PyTorch does: {figures}; {bounds}"
        )
    return f"{figures} of {len(actual)} images"


# ---- main ----


@contextmanager
def in_one_line(what):
    """Turns whatever exporters and runtimes raise into an InputError that says what cannot be
    done.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # tracing, protobuf, zip and each operator fail in their own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{what} ({reason})") from error


@torch.no_grad()
def export(args):
    """Write the output and what goes beside it, all or nothing; returns its line for the user.
    Raises InputError.
    """
    write, read = FORMATS[args.output.suffix]
    with in_one_line(f"{args.arch}: cannot describe images of --input-size {args.input_size}"):
        model = create_network(args)
        batches = parity_batches(args, model)
        expected = describe(model, batches, args.checkpoint)
    config = describe_config(args, model)
    with ExitStack() as stack:
        path = stack.enter_context(atomic(args.output))
        if write is to_safetensors:
            beside = stack.enter_context(atomic(args.output.with_suffix(".json")))
            beside.write_text(json.dumps(config, indent=1) + "\n")
        with in_one_line(f"{args.output}: cannot be made of {args.arch} with --size {args.size}"):
            path.write_bytes(write(model, config, batches[1][:2]))
            actual = describe(read(path), batches, args.output)
        figures = check(expected, actual, args.precision, args.output)
        return f"{args.output}: {path.stat().st_size / 1e6:.1f} MB, {figures}"


def parse_args(argv=None):
    """The command line; exits with code 2 and one line where it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    what = (
        "of any stage, or the author's; only tensors are loaded (default: the small network in "
        "weights/)"
    )
    add("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help=what)
    add(
        "output",
        type=Path,
        metavar="OUTPUT",
        help=f"ends in {', '.join(FORMATS)}, which says the format",
    )
    defaults = v107.parse_args(["."])
    arch, size = defaults.arch, defaults.input_size
    add("-a", "--arch", help=f"backbone, any name timm knows (default: {arch}, small {SMALL_ARCH})")
    add(
        "--input-size",
        type=at_least(int, 32),
        help=f"side of the square input (default: {size}, small {SMALL_SIZE})",
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
        help="whether height and width must be --input-size, which onnxruntime enforces, or are "
        "shown to be free "
        "(default: fixed)",
    )
    add(
        "--threshold",
        type=at_least(float, -1),
        help="least cosine of a copy, written into the file, where match.py finds it (default: of "
        f"the small network {SMALL_THRESHOLD}, of others none)",
    )
    add(
        "--photos",
        type=Path,
        metavar="DIR",
        help="compare on the images in DIR, the first 32, before generated ones",
    )
    args = parser.parse_args(argv)
    if not args.checkpoint:
        args.checkpoint, arch, size = SMALL, SMALL_ARCH, SMALL_SIZE
    args.arch, args.input_size = args.arch or arch, args.input_size or size
    args.threshold_source = "--threshold of export.py"
    measured = args.checkpoint == SMALL and args.input_size == SMALL_SIZE
    if args.threshold is None and measured and args.gem_eval_p == defaults.gem_eval_p:
        args.threshold, args.threshold_source = SMALL_THRESHOLD, SMALL_THRESHOLD_SOURCE
    if args.threshold is not None and args.threshold > 1:
        parser.error(f"--threshold {args.threshold}: no cosine is above 1")
    if args.output.suffix not in FORMATS:
        parser.error(f"{args.output}: OUTPUT has to end in one of {', '.join(FORMATS)}")
    if args.output.suffix == ".pt" and args.precision == "fp16":
        parser.error(
            "--precision fp16: is for .onnx and .safetensors; a CPU cannot check it in "
            "TorchScript in time"
        )
    return args


def main(argv=None):
    """Runs the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    try:
        if not args.output.parent.is_dir() or args.output.is_dir():
            raise InputError(
                f"{args.output}: is a folder, or in none that there is; give the name of a file"
            )
        if (
            args.output.exists()
            and args.checkpoint.exists()
            and args.output.samefile(args.checkpoint)
        ):
            raise InputError(f"{args.output}: is the checkpoint itself; give another name")
        if args.checkpoint == SMALL:
            name = SMALL.relative_to(ROOT)
            print(
                f"export.py: {name} is exported; give CHECKPOINT for another network",
                file=sys.stderr,
            )
        with warnings.catch_warnings(action="ignore"):  # of exporters and timm about themselves
            print(export(args))
    except (InputError, OSError) as error:
        place = (
            f"{args.output}: " if isinstance(error, OSError) and not error.filename else ""
        )  # as of a full disk
        print(f"export.py: error: {place}{error}; nothing was written", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
