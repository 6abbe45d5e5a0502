"""Reading images for extraction against Pillow and torchvision."""

import torch
from torchvision import transforms

import published_augmentation
import v83
from benchmarks.comparison import Comparison, compare_images, preprocess_here
from benchmarks.inputs import MEAN, STD


class ExtractionInput(Comparison):
    """A case is (pixels, whether with --fast-input)."""

    description = (
        "From the files of the photographs to a batch of the network's input. A case is the size "
        "in pixels, and whether with --fast-input."
    )
    published = "PIL open, Resize, ToTensor, Normalize, to a batch of floats"
    own = "v83.load_images, to a batch of uint8, for v83.Preprocess on the device"
    unit = "images"
    cases = {"512 px": (512, False), "512 px, fast": (512, True)}

    def __init__(self, case, photos, _folder):
        self.size, self.fast_input = case
        self.photos = photos
        self.amount = len(photos)
        self.published_transform = transforms.Compose(
            [
                published_augmentation.open_image,
                transforms.Resize((self.size, self.size)),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def baseline(self, _number):
        return torch.stack([self.published_transform(path) for path in self.photos])

    def ours(self, _number):
        pixels, unreadable = v83.load_images(self.photos, self.size, self.fast_input)
        assert not unreadable
        return pixels

    def agreement(self, a, b):
        images, milliseconds = preprocess_here(b, [], self.amount)
        return {**compare_images(a, images), "left to the device, ms here": milliseconds}
