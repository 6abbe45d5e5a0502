"""The published networks by torch.hub, with the author's weights or with a checkpoint of your own.

    model, preprocess = torch.hub.load(REPOSITORY, "isc_ft_v107")  # downloads its weights once
    model, preprocess = torch.hub.load(REPOSITORY, "isc_ft_v107", device="cuda", half=True)
    model, preprocess = torch.hub.load(".", "isc_ft_v107", source="local",
                                       weights="checkpoint_0009.pth.tar")
    images = torch.stack([preprocess(Image.open(path)) for path in paths])
    descriptors = model(images)  # (n, 256), of length 1

`isc_ft_v107` is the final network; it was trained on the labels of the public queries.
`isc_selfsup_v98` is the network before that. Two images are copies where the inner product of their
descriptors is large. Turning images upright by EXIF is left to the caller
(`ImageOps.exif_transpose`). Paper: arXiv 2112.04323.
"""

import hashlib
import os
import sys
import urllib.request
from pathlib import Path

import torch
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent / "exp"))

import v107

dependencies = ["h5py", "numpy", "PIL", "simplejpeg", "timm", "torch", "torchvision", "tqdm"]

ARCH = "tf_efficientnetv2_m_in21ft1k"
RELEASE = "https://github.com/lyakaap/ISC21-Descriptor-Track-1st/releases/download/v1.0.1"


def isc_ft_v107(
    pretrained=True, weights=None, sha256=None, arch=ARCH, input_size=512, device="cpu", half=False
):
    """The final network of the winning solution: (model, preprocess), in evaluation mode.

    pretrained: the author's weights, of the release, or random ones; weights: a checkpoint of this
    arch in their place; sha256: refuse any other file (the author published none); input_size: side
    of the input, pixels; half: compute in fp16 by autocast, on CUDA devices only; its error is not
    measured yet. model takes float32 (n, 3, input_size, input_size) and returns float32 descriptors
    (n, 256) of length 1, also with half; preprocess takes a PIL image of any mode and returns
    float32 (3, input_size, input_size). Files are loaded as tensors only, never as code.

    Raises ValueError, naming the file, where its SHA-256 is another or it is no checkpoint of this
    network; where half is asked for on another device; and where torch is older than 2.10: a file
    could make its weights-only loader run code (CVE-2026-24747).
    """
    return _load("isc_ft_v107.pth.tar", pretrained, weights, sha256, arch, input_size, device, half)


def isc_selfsup_v98(
    pretrained=True, weights=None, sha256=None, arch=ARCH, input_size=512, device="cpu", half=False
):
    """The self-supervised network, from which isc_ft_v107 was fine-tuned. Arguments as there."""
    return _load(
        "isc_selfsup_v98.pth.tar", pretrained, weights, sha256, arch, input_size, device, half
    )


class _HalfISCNet(v107.ISCNet):
    """ISCNet that computes in fp16 where its input is on CUDA, as extraction does.

    Takes and returns float32. Weights stay float32 and keep their names.
    """

    def forward(self, images):
        return v107.embed(super().forward, images, "fp16").float()


def _load(name, pretrained, weights, sha256, arch, input_size, device, half):
    """What the entry points return; `name` is the release's file."""
    device = torch.device(device)
    if half and device.type != "cuda":
        raise ValueError(f"half=True: is for a CUDA device, not {device}; leave it out")
    model = v107.create_model(arch, 1.0, 1.0, device)
    if half:
        model = _HalfISCNet(model.backbone).to(device)
    model.eval()
    if weights or pretrained:
        if torch.__version__ < "2.10":
            raise ValueError(
                f"torch {torch.__version__} may run code in a file of weights; pip install "
                f"'torch>=2.10'"
            )
        path = Path(weights or _fetch(name))
        if sha256 and path.is_file():
            _check_digest(path, sha256)
        v107.load_weights(model, v107.read_checkpoint(path), path)
    config = model.backbone.default_cfg
    transform = v107.evaluation_transform(input_size, config["mean"], config["std"])
    return model, transforms.Compose([_rgb, transform])


def _check_digest(path, sha256):
    """Raise ValueError unless this is the SHA-256 of the file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256.lower():
        raise ValueError(f"{path}: is not the file that sha256 names but {digest}; move it away")


def _fetch(name):
    """The path of the release's file in torch.hub's cache, downloaded there if it is missing.

    The file gets its name only when it is complete.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{name}.{os.getpid()}.tmp")
    print(f"downloading {RELEASE}/{name} into {path.parent}", file=sys.stderr)
    try:  # torch.hub's own download does not notice that the end is missing
        urllib.request.urlretrieve(f"{RELEASE}/{name}", unfinished)  # noqa: S310  a fixed URL
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _rgb(image):
    return image.convert("RGB")
