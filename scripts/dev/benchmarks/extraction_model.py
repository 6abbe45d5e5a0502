"""The network in extraction against the published memory layout."""

import torch

import v83
from benchmarks.comparison import Comparison, compare_descriptors
from benchmarks.inputs import ARCH, random_network


class Extraction(Comparison):
    """What is common to all ways of running the network: the input, and A. A case is
    (architecture, pixels).
    """

    description = (
        "Descriptors of two images of noise by a network of random weights, in float32 on the CPU."
    )
    published = "eager, NCHW"
    unit = "images"
    cases = {"2 x 512 px": (ARCH, 512)}

    def __init__(self, case, _photos, _folder):
        arch, size = case
        self.arch = arch
        self.model, self.images = random_network(arch, size)
        self.amount = len(self.images)

    @torch.inference_mode()
    def baseline(self, _number):
        return self.model(self.images).numpy()

    def agreement(self, a, b):
        return compare_descriptors(a, b)


class ExtractionModel(Extraction):
    """B: the network as extraction runs it."""

    own = "v83.create_model, v83.embed: eager, channels-last"

    def __init__(self, case, photos, folder):
        super().__init__(case, photos, folder)
        self.own_model = v83.create_model(self.arch, 1.0, 1.0, torch.device("cpu"))
        self.own_model.load_state_dict(self.model.state_dict())
        self.own_model.eval()

    @torch.inference_mode()
    def ours(self, _number):
        images = self.images.to(memory_format=torch.channels_last)
        return v83.embed(self.own_model, images, amp="off").numpy()
