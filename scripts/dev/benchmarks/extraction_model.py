"""The network in extraction against the published memory layout."""

import torch

import v83
from benchmarks.comparison import Comparison, compare_descriptors
from benchmarks.inputs import ARCH, random_network


class ExtractionModel(Comparison):
    """Descriptors of two images of noise by a network of random weights, in float32 on the CPU.

    A: eager, NCHW
    B: v83.create_model, v83.embed: eager, channels-last
    """

    unit = "images"
    cases = {"2 x 512 px": (ARCH, 512)}

    def __init__(self, case, _photos):
        arch, size = case
        self.published, self.images = random_network(arch, size)
        self.amount = len(self.images)
        self.own = v83.create_model(arch, 1.0, 1.0, torch.device("cpu"))
        self.own.load_state_dict(self.published.state_dict())
        self.own.eval()

    @torch.inference_mode()
    def baseline(self, _number):
        return self.published(self.images).numpy()

    @torch.inference_mode()
    def ours(self, _number):
        images = self.images.to(memory_format=torch.channels_last)
        return v83.embed(self.own, images, amp="off").numpy()

    def agreement(self, a, b):
        return compare_descriptors(a, b)
