"""Training views against the published pipeline."""

from pathlib import Path

import numpy as np
import torch

import published_augmentation
import v83
from benchmarks.comparison import Comparison, compare_images, preprocess_here
from benchmarks.inputs import MEAN, STD

RECIPE = published_augmentation.RECIPES["v83"]


class Augmentation(Comparison):
    """Both ways with the same seeds, which change from round to round."""

    description = (
        "A batch of v83's two views, moderate and hard, of each photograph, from its file. A and B "
        "use the same seeds, and others in each round."
    )
    published = (
        "published_augmentation.py: AugLy and torchvision on PIL images, to a batch of floats"
    )
    own = "v83.TrainDataset, v83.collate: uint8, for v83.Preprocess on the device"
    unit = "pairs"
    cases = {"256 px": 256, "384 px": 384, "512 px": 512}

    def __init__(self, size, photos, _folder):
        self.size = size
        self.amount = len(photos)
        folder = Path(photos[0]).parent
        self.dataset = v83.TrainDataset(folder, size, ncrops=2, sample_size=len(photos), seed=0)
        self.paths = self.dataset.paths.tolist()
        self.moderate = published_augmentation.moderate_augmentation(size, MEAN, STD)
        self.hard = published_augmentation.hard_augmentation(RECIPE, size, MEAN, STD, self.paths)
        self.samples_a = []  # of the hard views of each round
        self.batches_b = []  # of each round

    def baseline(self, number):
        views = []
        for index, path in enumerate(self.paths):
            v83.seed_generators(0, number, index)  # the seeds of self.dataset
            image = published_augmentation.open_image(path)
            views.append(self.moderate(image))
            views.append(self.hard(image))
        batch = torch.stack(views)
        self.samples_a.append(sample_hard_views(batch))
        return batch

    def ours(self, number):
        self.dataset.epoch = number
        batch = v83.collate([self.dataset[index] for index in range(len(self.dataset))])
        self.batches_b.append(batch)
        return batch

    def agreement(self, a, b):
        """Moderate views of equal seeds pixel by pixel; hard views of equal seeds before erasing;
        mean and deviation of the pixels of all hard views of all rounds.
        """
        images, milliseconds = preprocess_here(b.pixels, b.erasings, self.amount)
        moderate = {}
        for name, value in compare_images(a[::2], images[::2]).items():
            moderate[f"moderate {name}"] = value
        ratios = compare_hard_views(self.size, self.paths)
        means, standard_error, deviations = self.compare_distributions()
        return {
            **moderate,
            "hard PSNR dB, quarter, median": np.percentile(ratios, [25, 50]).tolist(),
            "hard mean A, B": means,
            "each +-": standard_error,
            "hard deviation A, B": deviations,
            "left to the device, ms here": milliseconds,
        }

    def compare_distributions(self):
        """The pixels of A's and B's hard views: (their means, the standard error of each, their
        deviations).
        """
        samples_b = []
        for batch in self.batches_b:
            images, _ = preprocess_here(batch.pixels, batch.erasings, self.amount)
            samples_b.append(sample_hard_views(images))
        pixels = np.stack([torch.cat(self.samples_a), torch.cat(samples_b)])  # (2, views, pixels)
        view_means = pixels.mean(axis=2)
        views = view_means.shape[1]
        means = view_means.mean(axis=1)
        standard_error = view_means.std() / views**0.5
        deviations = pixels.std(axis=2).mean(axis=1)
        return means.tolist(), float(standard_error), deviations.tolist()


def sample_hard_views(batch):
    """Every 64th pixel of the hard views in a batch of normalized views, from 0 to 1: (views,
    values).
    """
    return batch[1::2, :, ::8, ::8].flatten(1) / 2 + 0.5


def compare_hard_views(size, paths):
    """Peak signal-to-noise ratio in dB of v83's hard view to the published one of the same seed,
    before erasing, for each image.

    It is low where pixels are shuffled: v83 shuffles them by another pattern.
    """
    published = published_augmentation.hard_image(RECIPE, size, paths)
    ours = v83.hard_view(size, paths)
    ratios = []
    for number, path in enumerate(paths):
        v83.seed_generators(0, number)
        expected = np.array(published(published_augmentation.open_image(path)), float)
        v83.seed_generators(0, number)
        found = ours(v83.read_pixels(path)).pixels
        error = np.square(found - expected).mean()
        ratios.append(10 * np.log10(255**2 / max(error, 1e-3)))
    return ratios
