"""The exported network in ONNX Runtime against PyTorch."""

import warnings

import onnxruntime
import torch

import export
from benchmarks.comparison import Comparison, compare_descriptors
from benchmarks.inputs import ARCH, random_network


class ExtractionOnnx(Comparison):
    """Descriptors of two images of noise by a network of random weights, in float32 on the CPU.

    A: eager, NCHW
    B: the file of export.to_onnx, by ONNX Runtime
    """

    unit = "images"
    cases = {"2 x 512 px": (ARCH, 512)}

    def __init__(self, case, _photos):
        arch, size = case
        self.published, self.images = random_network(arch, size)
        self.amount = len(self.images)
        config = {
            "input": "images",
            "output": "descriptors",
            "dim": 256,
            "size": "fixed",
            "precision": "fp32",
        }
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about its own deprecation
            exported = export.to_onnx(self.published, config, self.images)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            exported, options, providers=["CPUExecutionProvider"]
        )

    @torch.inference_mode()
    def baseline(self, _number):
        return self.published(self.images).numpy()

    def ours(self, _number):
        return self.session.run(None, {"images": self.images.numpy()})[0]

    def agreement(self, a, b):
        return compare_descriptors(a, b)
