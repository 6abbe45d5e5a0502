"""The data that parts of the benchmark share: photographs, random descriptors, a random network."""

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import v83
from common import sample_images

ARCH = "tf_efficientnetv2_m"  # of all stages
MEAN = (0.5, 0.5, 0.5)  # as timm gives them for this architecture
STD = (0.5, 0.5, 0.5)
MAX_PHOTOS = 16
TILE = 256  # pixels


def make_photos(folder):
    """Write photographs of 1024 x 768: mosaics of 4 x 3 tiles of the photographs inside
    scikit-image and scikit-learn, at their own resolution. Returns their paths.
    """
    tiles = sample_images.embedded_tiles(TILE)
    paths = []
    for number, rng in enumerate(np.random.default_rng(0).spawn(MAX_PHOTOS)):
        mosaic = Image.new("RGB", (4 * TILE, 3 * TILE))
        chosen = rng.choice(len(tiles), 12, replace=False).tolist()
        for place, choice in enumerate(chosen):
            source = sample_images.open_embedded(tiles[choice].path, TILE)
            row, column = divmod(place, 4)
            mosaic.paste(source.crop(tiles[choice].box), (TILE * column, TILE * row))
        path = folder / f"{number}.jpg"
        mosaic.save(path, quality=90)
        paths.append(str(path))
    return paths


def random_descriptors(n):
    """Unit rows (n, 256) float32 with a direction in common: cosine 0.38 on average, above 0.5 for
    0.1% of pairs.
    """
    common = F.normalize(torch.randn(1, 256))
    own = F.normalize(torch.randn(n, 256))
    return F.normalize(0.38**0.5 * common + 0.62**0.5 * own)


def random_network(arch, size):
    """An ISCNet of random weights in evaluation mode, and two images of noise, (2, 3, size, size).

    BatchNorm's running statistics are those of these two images: with others, the activations of
    random weights explode.
    """
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size)
    model = v83.ISCNet(timm.create_model(arch, features_only=True))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1
    with torch.no_grad():
        model(images)
    return model.eval().requires_grad_(False), images
