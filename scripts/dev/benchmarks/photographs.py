"""Photographs of phones, from the file to a descriptor, by match.py's own reading."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.comparison import Comparison, compare_descriptors
from common.extraction import DECODED_INPUTS, PixelBudget, load_image
from common.images import MAX_PIXELS, open_image
from common.networks import DEFAULT_ONNX, onnx_network
from common.search import normalize

PHONE = (4032, 3024)  # pixels, 12 million
COUNT = 4


class Photographs(Comparison):
    """A case is the size of the photographs in pixels."""

    description = (
        "From JPEGs of 12 million pixels to descriptors of the small network: the first "
        "photographs, enlarged. The network is the same in both."
    )
    published = "decodes all pixels"
    own = "decodes at a half, a quarter or an eighth, of at least three inputs a side"
    unit = "images"
    cases = {"4032 x 3024": PHONE}

    def __init__(self, case, photos, folder):
        self.network = onnx_network(str(DEFAULT_ONNX), device="cpu")
        self.paths = []
        for number, photo in enumerate(photos[:COUNT]):
            path = Path(folder, f"phone-{number}.jpg")
            Image.open(photo).resize(case, Image.Resampling.BICUBIC).save(path, quality=85)
            self.paths.append(path)
        self.amount = len(self.paths)

    def baseline(self, _number):
        inputs = [self.network.preprocess(open_image(path)) for path in self.paths]
        return normalize(self.network.run(np.stack(inputs)))

    def ours(self, _number):
        inputs = []
        for path in self.paths:
            with path.open("rb") as file:
                inputs.append(self.read(file))
        return normalize(self.network.run(np.stack(inputs)))

    def read(self, file):
        """The network's input of an open file, as match.py reads it."""
        least_side = DECODED_INPUTS * self.network.input_size
        budget = PixelBudget(MAX_PIXELS)
        network_input, _ = load_image(file, self.network.preprocess, budget, least_side)
        return network_input

    def agreement(self, a, b):
        return compare_descriptors(a, b)
