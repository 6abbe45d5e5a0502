"""The exported network in ONNX Runtime against PyTorch."""

import warnings

import onnxruntime
import torch

from benchmarks.extraction_model import Extraction
from common import onnx_export


class ExtractionOnnx(Extraction):
    """B: the network as export.py writes it."""

    own = "the file of common/onnx_export.py: to_onnx, by ONNX Runtime"

    def __init__(self, case, photos, folder):
        super().__init__(case, photos, folder)
        config = {
            "input": "images",
            "output": "descriptors",
            "dim": 256,
            "size": "fixed",
            "precision": "fp32",
        }
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about its own deprecation
            exported = onnx_export.to_onnx(self.model, config, self.images)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            exported, options, providers=["CPUExecutionProvider"]
        )

    def ours(self, _number):
        return self.session.run(None, {"images": self.images.numpy()})[0]
