"""The networks that match.py can use: from an ONNX file, or by torch from a checkpoint.

onnxruntime and torch are imported by the function that needs them: torch takes seconds to import,
and a light installation does not have it.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import hidden_stderr, usable_cores
from common.errors import InputError
from common.files import sha256_of
from common.views import WHOLE

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_ONNX = ROOT / "weights" / "v98.onnx"
# Entry points of hubconf.py, which fetches their weights.
PUBLISHED = ("isc_ft_v107", "isc_selfsup_v98")
PUBLISHED_THRESHOLD = 0.604169  # least cosine of a copy, by DataComp for isc_ft_v107
PUBLISHED_INPUT_SIZE = 512

# Part of the cache's key, as it stands: other words would make every cached descriptor invalid.
PREPROCESSING = (
    "as viewers show it, transparent on white, deep pixels scaled to 8 bits, JPEG decoded at a "
    "scale of at least 3 inputs, RGB, resized to a square by Pillow's bilinear filter, normalized; "
    "a part of one color is replaced by the whole"
)


@dataclass(frozen=True)
class Thresholds:
    """The least scores of a copy, at a precision of 0.99; None where unknown.

    cosine is for whole queries, cosine_of_views for queries in several views; normalized and
    normalized_of_views are the same for cosines less the query's background.
    """

    cosine: float | None = None
    cosine_of_views: float | None = None
    normalized: float | None = None
    normalized_of_views: float | None = None

    def for_cosine(self, with_views):
        """The threshold of cosines; that of whole queries where the other is unknown."""
        if with_views and self.cosine_of_views is not None:
            return self.cosine_of_views
        return self.cosine

    def for_normalized(self, with_views):
        """The threshold of normalized scores, None where unknown."""
        return self.normalized_of_views if with_views else self.normalized


@dataclass(frozen=True)
class Network:
    """What extracts descriptors.

    run takes float32 (n, 3, input_size, input_size) and returns float32 (n, dimensions). weights is
    their SHA-256, backend the library and device that compute. mean and std are of the three
    channels, for pixels in 0 ... 1. threshold is the least cosine of a copy, None where unknown.
    """

    run: Callable
    weights: str
    backend: str
    input_size: int
    mean: tuple
    std: tuple
    dimensions: int
    thresholds: Thresholds = Thresholds()

    def key(self, view=WHOLE):
        """SHA-256 of all that the descriptor of a view depends on beside the image, 32 bytes."""
        parts = (
            PREPROCESSING,
            self.weights,
            self.backend,
            self.input_size,
            self.mean,
            self.std,
            view,
        )
        return hashlib.sha256(repr(parts).encode()).digest()

    @property
    def on_gpu(self):
        """Whether the network runs on a GPU."""
        return "cuda" in self.backend.lower()

    def preprocess(self, image):
        """A PIL image of mode RGB as the network's input, float32 (3, input_size, input_size).

        The values are those that the stages' extraction computes.
        """
        size = (self.input_size, self.input_size)
        pixels = image.resize(size, Image.Resampling.BILINEAR)
        values = np.asarray(pixels, np.float32) / np.float32(255)
        values = (values - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(values.transpose(2, 0, 1))


# ---- torch ----


def torch_network(weight, arch=None, input_size=None, device=None, amp="off", quiet=False):
    """The Network of `weight`, a checkpoint's path or one of PUBLISHED, run by torch.

    arch: backbone, any name timm knows (default: the published one); input_size: pixels (default:
    512); device: a name of torch's (default: cuda where there is one); amp: "fp16" or "off". quiet
    hides the line about a download. Raises InputError where the network cannot be loaded.
    """
    hubconf, torch = import_hubconf()
    arch = arch or hubconf.ARCH
    input_size = input_size or PUBLISHED_INPUT_SIZE
    try:
        device = torch.device(device or default_device(torch))
        with hidden_stderr(quiet):
            model = load_model(hubconf, weight, arch, input_size, device, amp)
    except ValueError as error:  # its message names the file
        raise InputError(f"{error}") from None
    except OSError as error:
        remedy = "give --weight FILE, as scripts/download_weights.py fetches it, or --onnx FILE"
        raise InputError(f"{weight}: cannot be fetched ({error}); {remedy}") from None
    except (RuntimeError, AssertionError) as error:  # of CUDA, and of a torch without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device or 'cuda'}: {reason}") from None

    @torch.inference_mode()
    def run(images):
        batch = torch.from_numpy(images)
        try:
            batch = batch.to(device, memory_format=torch.channels_last)
            return model(batch).cpu().numpy()
        except torch.OutOfMemoryError:
            raise InputError(
                f"--batch-size {len(images)}: too many images for the memory of {device}; give less"
            ) from None

    backend = f"torch {device.type}"
    if amp == "fp16":  # its descriptors differ, so the cache must tell them apart
        backend += " fp16"
    config = model.backbone.default_cfg
    return Network(
        run=run,
        weights=sha256_of_model(model, arch),
        backend=backend,
        input_size=input_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        dimensions=model.fc.out_features,
        thresholds=Thresholds(cosine=PUBLISHED_THRESHOLD),
    )


def import_hubconf():
    """The modules hubconf and torch. Raises InputError where they cannot be imported."""
    sys.path.insert(0, str(ROOT))
    try:
        import hubconf
        import torch
    except ImportError as error:
        raise InputError(
            f"{error.name}: is not installed, and --weight needs it; install requirements.txt, or "
            f"leave out --weight"
        ) from None
    return hubconf, torch


def default_device(torch):
    """The name of the device that is used where the user names none."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(hubconf, weight, arch, input_size, device, amp):
    """hubconf's model of `weight`, in evaluation mode on `device`; raises what hubconf raises."""
    half = amp == "fp16"
    if half and device.type != "cuda":
        raise InputError(f"--amp fp16: is for CUDA, not {device}; leave it out")
    entry_point = PUBLISHED[0]
    file = weight
    if weight in PUBLISHED:
        entry_point = weight
        file = None  # hubconf fetches it
    load = getattr(hubconf, entry_point)
    model, _ = load(weights=file, arch=arch, input_size=input_size, device=device, half=half)
    return model


def sha256_of_model(model, arch):
    """SHA-256 of a model's architecture and weights, 64 hexadecimal digits."""
    digest = hashlib.sha256(arch.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


# ---- ONNX ----


def onnx_network(path, input_size=None, device=None):
    """The Network in an ONNX file of export.py, run by ONNX Runtime.

    input_size: pixels, for a file that takes any (default: the file's own); device: cpu, cuda or
    cuda:N (default: cuda where there is one). Raises InputError where the network cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "onnxruntime: is not installed; pip install -r requirements-match.txt"
        ) from None
    providers = onnx_providers(onnxruntime.get_available_providers(), device)
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; make it with export.py")
    weights = sha256_of(Path(path))
    onnxruntime.set_default_logger_severity(4)  # what is logged as an error is raised as well
    try:
        session = onnxruntime.InferenceSession(
            path, session_options(onnxruntime), providers=providers
        )
        (images,) = session.get_inputs()
        (output,) = session.get_outputs()
        dimensions = int(output.shape[1])
        config = read_onnx_config(session)
    except Exception as error:  # the parser and missing metadata each fail in their own way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{path}: is not an ONNX file of export.py ({reason}); export it again"
        ) from None
    has_fixed_size = isinstance(images.shape[2], int)
    if has_fixed_size and input_size not in (None, config["input_size"]):
        only = f"takes {config['input_size']} pixels only"
        raise InputError(f"{path}: {only}; leave out --input-size {input_size}")

    def run(batch):
        try:
            (descriptors,) = session.run([output.name], {images.name: batch})
        except Exception as error:  # each kernel fails in its own way, also for lack of memory
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: does not run ({reason}); export it again") from None
        return descriptors

    return Network(
        run=run,
        weights=weights,
        backend=f"onnxruntime {session.get_providers()[0]}",
        input_size=input_size or config["input_size"],
        mean=config["mean"],
        std=config["std"],
        dimensions=dimensions,
        thresholds=config["thresholds"],
    )


def session_options(onnxruntime):
    """ONNX Runtime's options, of its module, for a process whose other threads read files."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()  # by default one for each core of the machine
    # Threads that have nothing to do would else keep cores busy waiting.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def onnx_providers(available, device):
    """ONNX Runtime's execution providers for a device as the user names it, or None.

    Raises InputError where none of the `available` ones is for it.
    """
    kind, _, number = (device or "").partition(":")
    has_cuda = "CUDAExecutionProvider" in available
    if kind not in ("", "cpu", "cuda") or (kind == "cuda" and not has_cuda):
        has = f"this onnxruntime has {', '.join(available)}"
        raise InputError(f"--device {device}: {has}; say cpu, or install onnxruntime-gpu")
    if kind == "cpu" or not has_cuda:
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": number or "0"})]


def read_onnx_config(session):
    """What export.py has written into a file's metadata: input_size, mean, std, thresholds.

    Raises various exceptions where that is missing or makes no sense.
    """
    config = json.loads(session.get_modelmeta().custom_metadata_map["config"])
    thresholds = Thresholds(
        cosine=config.get("threshold"),
        cosine_of_views=config.get("threshold_of_views"),
        normalized=config.get("normalized_threshold"),
        normalized_of_views=config.get("normalized_threshold_of_views"),
    )
    for name, value in asdict(thresholds).items():
        if value is not None and not -2 <= value <= 1:
            raise ValueError(f"{name} threshold {value}")
    return {
        "input_size": int(config["input_size"]),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "thresholds": thresholds,
    }
