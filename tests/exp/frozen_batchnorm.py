"""Run a stage script with BatchNorm in evaluation mode: python frozen_batchnorm.py v83 [the
script's arguments].

So one process with a whole batch and several with its parts compute the same thing.
"""

import importlib
import sys

import torch


def stay_in_evaluation_mode(model, mode=True):
    return torch.nn.Module.train(model, False)


if __name__ == "__main__":
    stage = importlib.import_module(sys.argv[1])
    stage.ISCNet.train = stay_in_evaluation_mode
    sys.exit(stage.main(sys.argv[2:]))
