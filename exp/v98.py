r"""v98: v86 continued at 512 pixels, with reference images as negatives (stage 3 of 4).

- Each sample brings two random references as negatives; augmentation is stronger again; the
  learning rate decays.

    python v98.py -a tf_efficientnetv2_m_in21ft1k --dist-url 'tcp://localhost:10001'
    --multiprocessing-distributed \
        --world-size 1 --rank 0 --wd 1e-6 --gem-p 1.0 --pos-margin 0.0 --sample-size 1000000
        --ncrops 2 \
        --batch-size 64 --memory-size 20000 --neg-margin 1.0 --lr 0.1 --input-size 512 --epochs 3
        --seed 999 \
        --weight ./v86/train/checkpoint_0005.pth.tar ../input/training_images/

Evidence: 0.6519 uAP, 0.5710 R@P90 (published, of checkpoint 1; 25k public queries, 1M references;
16 GPUs). Needs also input/reference_images; writes train/checkpoint_{epoch:04d}.pth.tar, of which
the next stage takes number 1.
"""

import argparse
import hashlib
import io
import json
import math
import os
import pickletools
import random
import shutil
import signal
import sys
import time
import zipfile
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cv2
import h5py
import numpy as np
import pylibmagic  # noqa: F401  libmagic for AugLy, where the system has none
import simplejpeg
import timm
import torch
import torch.distributed as dist
import torch.distributed.run
import torch.nn.functional as F
from augly import image as imaugs
from augly.image.utils import rotated_rect_with_max_area
from augly.utils import FONTS_DIR, SMILEY_EMOJI_DIR
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms, utils
from torchvision.transforms import v2
from tqdm import tqdm


# ---- recipe ----
def parse_args(argv=None):
    """The stage as published: its recipe is the defaults. Returns an argparse.Namespace of plain
    values.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        help="to train: the folder of training images; to extract: the folder of all sets",
    )
    add(
        "--mode",
        choices=["train", "extract"],
        default="train",
        help="train the stage, or describe images",
    )
    add(
        "-a", "--arch", default="tf_efficientnetv2_m_in21ft1k", help="backbone, any name timm knows"
    )
    add("--input-size", type=int, default=512, help="side of the square input, pixels")  # v98: 384
    add("--gem-p", type=float, default=1.0, help="exponent of GeM pooling in training")
    add("--gem-eval-p", type=float, default=1.0, help="exponent of GeM pooling in extraction")
    add(
        "--weight",
        metavar="FILE",
        help="checkpoint whose weights training starts from, or extraction uses",
    )
    add(
        "--amp",
        choices=["fp16", "bf16", "off"],
        default="fp16",
        help="mixed precision on CUDA (never on a CPU)",
    )
    add(
        "-b", "--batch-size", type=int, default=64, help="samples per step, of all processes"
    )  # v98: 128
    add(
        "-j",
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="loader processes per node, divided among its ranks",
    )
    add(
        "--output", default=str(Path(__file__).with_suffix("")), help="where train/ and extract/ go"
    )
    add(
        "--epochs",
        type=int,
        default=3,
        help="epoch to end before, counted from 0 over all resumed runs",
    )  # v98: 7
    add("--start-epoch", type=int, default=0, help="epoch to start at; --resume knows its own")
    add(
        "--lr",
        "--learning-rate",
        type=float,
        default=0.1,
        help="learning rate at --reference-world-size",
    )
    add("--momentum", type=float, default=0.9, help="momentum of SGD")
    add("--wd", "--weight-decay", type=float, default=1e-6, help="weight decay of all but vectors")
    add(
        "--pos-margin",
        type=float,
        default=0.0,
        help="distance below which a positive pair costs nothing",
    )
    add(
        "--neg-margin",
        type=float,
        default=1.0,
        help="distance above which a negative pair costs nothing",
    )
    add("--memory-size", type=int, default=20000, help="rows of the memory bank")
    add("--ncrops", type=int, default=2, help="views of an image: one moderate, the others hard")
    add(
        "--exact",
        action="store_true",
        help="make views by Pillow, as published, not by faster near-equals",
    )
    add(
        "--sample-size",
        type=int,
        default=1000000,
        help="how many training images to use, the first by name",
    )
    add(
        "--seed",
        type=int,
        default=999,
        help="decides every random draw, for any number of processes",
    )  # v98: 99
    add(
        "--resume",
        metavar="FILE",
        help="continue the run that wrote this checkpoint; auto: the newest in --output",
    )
    add(
        "--checkpoint-every",
        type=int,
        default=1000,
        help="steps between two last.pth.tar, which auto resumes",
    )
    add(
        "--max-skipped", type=int, default=10, help="how many steps in a row may lack a finite loss"
    )
    add(
        "--bad-images",
        choices=["skip", "error", "zero"],
        help="to train: skip or error; to extract: error or zero",
    )
    add(
        "--max-bad",
        type=float,
        default=0.001,
        help="share of the images that skip may skip; one it always may",
    )
    add(
        "--no-pretrained",
        action="store_true",
        help="start from random weights, not from timm's ImageNet weights",
    )
    add("--log-every", type=int, default=50, help="steps per line of log.jsonl")
    add(
        "--tensorboard",
        action="store_true",
        help="show the log, and each epoch's first views, in TensorBoard as well",
    )
    add(
        "--target-set",
        default="qr",
        help="what to describe: letters of q(uery), r(eference), t(raining)",
    )
    add(
        "--phase",
        type=int,
        choices=[1, 2],
        default=1,
        help="take query_images or query_images_phase2",
    )
    add(
        "--eval-subset",
        nargs="?",
        const="rids_subset.txt",
        help="file in DATA: only these references, an id a line",
    )
    add(
        "--fast-input",
        action="store_true",
        help="read what is only resized faster, to values within 1 of Pillow's",
    )
    add(
        "--start-over",
        action="store_true",
        help="discard the unfinished extraction of other inputs",
    )
    add("--dryrun", action="store_true", help="only the first 100 images of each set")
    add(
        "--multiprocessing-distributed",
        action="store_true",
        help="start a process for each GPU of this node",
    )
    add("--world-size", type=int, default=1, help="number of nodes")
    add("--rank", type=int, default=0, help="number of this node")
    add("--dist-url", default="tcp://localhost:10001", help="where node 0 listens")
    add("--dist-backend", default="nccl", help="backend on CUDA (gloo on a CPU)")
    add(
        "--timeout",
        type=int,
        default=10,
        help="minutes after which a silent process counts as lost",
    )
    add("--gpu", type=int, help="use this GPU alone")
    add(
        "--reference-world-size",
        type=int,
        default=16,
        help="GPUs that the learning rate was tuned on",
    )  # v98: 8
    args = parser.parse_args(argv)
    args.bad_images = args.bad_images or {"train": "skip", "extract": "error"}[args.mode]
    if args.bad_images == {"train": "zero", "extract": "skip"}[args.mode]:
        parser.error(f"--bad-images {args.bad_images}: does not go with --mode {args.mode}")
    if args.mode == "extract" and not args.weight:
        parser.error("--mode extract: needs --weight FILE")
    if args.mode == "train" and not (
        args.weight or args.no_pretrained or args.resume not in (None, "auto")
    ):
        args.weight = str(Path(__file__).with_name("v86") / "train/checkpoint_0005.pth.tar")  # v98
    may_be_zero = ("gpu", "num_negatives", "rank", "seed", "start_epoch", "workers")
    for name, value in vars(args).items():
        if type(value) is int and value < (name not in may_be_zero):
            parser.error(f"--{name.replace('_', '-')} {value}: is too small")
    return args


def hard_augmentation(input_size, mean, std, overlay_paths, exact=False):
    """The hard view: callable from PIL image or pixels to float tensor (3, input_size,
    input_size).
    """
    p = 0.35  # v98: 0.30
    crop, jitter, pixelization, blur, perspective = operations(exact)
    shuffled = [
        jitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),  # v98: 0.75
        pixelization(min_ratio=0.1, max_ratio=1.0, p=0.25),
        transforms.RandomApply([shuffle_pixels], p=0.25),
        transforms.RandomApply(
            by_pillow(imaugs.OneOf([imaugs.EncodingQuality(q) for q in (10, 20, 30, 50)])), p=p
        ),
        transforms.RandomApply(by_pillow(transforms.Grayscale(3)), p=0.25),
        blur(min_radius=0.0, max_radius=10.0, p=0.25),
        perspective(p=p),
        transforms.RandomApply([partial(cv2.flip, flipCode=1)], p=0.5),
        transforms.RandomApply([partial(cv2.flip, flipCode=0)], p=0.1),
        transforms.RandomApply(by_pillow(overlay_text), p=p),
        transforms.RandomApply(by_pillow(overlay_emoji), p=p),
        partial(enhance_edges, p=0.30),  # v98: as in v86
    ]
    overlay = {
        "overlay_p": 0.1,
        "opacity_lower": 0.4,
        "sizes": (0.2, 0.8),
    }  # v98: 0.075, 0.5, (0.3, 0.7)
    crops = [crop(size=input_size, scale=scale) for scale in ((0.15, 1.0), (0.7, 1.0))]
    geometry = [
        to_array,
        transforms.RandomApply([partial(random_rotation, exact=exact)], p=p),
        partial(overlay_and_crop, crops=crops, overlay_paths=overlay_paths, exact=exact, **overlay),
    ]
    erase = RandomErasing(p=0.25, value="random")
    return transforms.Compose(
        [*geometry, transforms.RandomOrder(shuffled), erase, Finish(mean, std).one]
    )


class TrainDataset:
    """Sample i: views of training image i and their labels; 2 are references."""

    def __init__(self, args, mean, std):
        self.paths = list_images(args.data)[: args.sample_size]
        self.references = list_images(Path(args.data).absolute().parent / "reference_images")  # v98
        self.read_plain = plain_reader(args)  # v98
        self.files, self.rows = [self.paths, self.references], args.ncrops + 2  # v98
        self.seed, self.epoch, self.mean, self.std = args.seed, 0, mean, std
        hard = hard_augmentation(args.input_size, mean, std, self.paths, args.exact)
        crops = [moderate_augmentation(args.input_size, mean, std, args.exact)] + [hard] * (
            args.ncrops - 1
        )
        self.crops = [
            transforms.Compose(crop.transforms[:-1]) for crop in crops
        ]  # the device does the last

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        seed_generators(self.seed, self.epoch, index)
        cv2.setNumThreads(0)  # a loader process has its core
        image = open_image(self.paths[index], pixels=True)
        views, labels = [crop(image) for crop in self.crops], [index] * len(self.crops)
        for number in random.sample(
            range(len(self.references)), 2
        ):  # v98: negatives of every training image
            views.append(View(self.read_plain(self.references[number])))
            labels.append(1000000 + number)
        return views, labels


# ---- model ----
CUDA = torch.cuda.is_available()
LIBRARIES = ("torch", "torchvision", "timm", "augly", "pillow", "simplejpeg")
VERSIONS = {x: version(x) for x in LIBRARIES} | {"opencv": cv2.__version__}


def gem(x, p, eps=1e-6):
    """Generalised mean pooling (n, c, h, w) -> (n, c); p = 1 is the mean of the activations clipped
    at eps.
    """
    return x.clamp(min=eps).pow(p).mean(dim=(-2, -1)).pow(1 / p)


class ISCNet(torch.nn.Module):
    """Images (n, 3, h, w) -> L2-normalised descriptors (n, fc_dim). GeM's exponent is p in
    training, else eval_p.
    """

    def __init__(self, backbone, fc_dim=256, p=1.0, eval_p=1.0):
        super().__init__()
        self.backbone = backbone
        self.fc = torch.nn.Linear(backbone.feature_info.channels()[-1], fc_dim, bias=False)
        self.bn = torch.nn.BatchNorm1d(fc_dim)
        self.p, self.eval_p = p, eval_p
        torch.nn.init.xavier_normal_(self.fc.weight)

    def forward(self, x):
        x = gem(self.backbone(x)[-1], self.p if self.training else self.eval_p)
        return F.normalize(self.bn(self.fc(x)))


def create_model(args, device, pretrained=False):
    """The network of --arch on the device; raises InputError where timm cannot make it or fetch its
    weights.
    """
    try:
        backbone = timm.create_model(args.arch, features_only=True, pretrained=pretrained)
    except Exception as error:  # registry, hub, network and cache each fail in their own way
        what = (
            "cannot fetch its weights, give --weight or --no-pretrained"
            if pretrained
            else "has no such backbone"
        )
        raise InputError(f"{args.arch}: timm {what} ({type(error).__name__})") from error
    return ISCNet(backbone, p=args.gem_p, eval_p=args.gem_eval_p).to(
        device, memory_format=torch.channels_last
    )


# ---- loss ----
def gather(x):
    """The rows of all processes in rank order; only this process's own carry gradient."""
    rank, world_size = process()
    rows = [torch.empty_like(x) for _ in range(world_size)]
    if world_size > 1:
        dist.all_gather(rows, x.detach().contiguous())
    rows[rank] = x
    return torch.cat(rows)


class MemoryBankContrastiveLoss(torch.nn.Module):
    """Contrastive loss between a batch and the last `memory_size` descriptors (paper section 3.1),
    all in float32.

    With d the distance of L2-normalised rows: mean of d - pos_margin over equal labels with d >
    pos_margin, plus mean of neg_margin - d over different labels with d < neg_margin:
    pytorch-metric-learning 0.9.99's, in CrossBatchMemory.
    """

    def __init__(self, memory_size, embedding_size=256, pos_margin=0.0, neg_margin=1.0):
        super().__init__()
        self.pos_margin, self.neg_margin, self.stats = pos_margin, neg_margin, {}
        self.register_buffer("bank", torch.zeros(memory_size, embedding_size))
        self.register_buffer("bank_labels", torch.zeros(memory_size, dtype=torch.long))
        self.register_buffer("cursor", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(0))

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, embeddings, labels):
        """This process's rows (n, d) and labels (n,) -> the loss of all processes' rows; `stats`
        holds its parts.

        Rows enter the bank, then meet all of it but themselves. If one is not finite, none do and
        the loss is NaN.
        """
        rows, labels = gather(embeddings.float()), gather(labels)
        finite, number = rows.isfinite().all(), torch.arange(len(self.bank), device=rows.device)
        own = (self.cursor + number[: len(rows)]) % len(self.bank)
        self.bank[own] = torch.where(finite, rows.detach(), self.bank[own])
        self.bank_labels[own] = torch.where(finite, labels, self.bank_labels[own])
        self.cursor.copy_((self.cursor + len(rows) * finite) % len(self.bank))
        self.filled.add_(len(rows) * finite).clamp_(max=len(self.bank))
        unit = F.normalize(rows)
        sums, gradient = self.compare(unit.detach(), labels, own, number)
        loss = torch.where(finite, 0.0, torch.nan)
        for name, (_, active, cost) in zip(("pos", "neg"), sums, strict=True):
            self.stats |= {f"{name}_loss": cost / active.clamp(min=1), f"{name}_pairs": active}
            loss = loss + self.stats[f"{name}_loss"]
        gradient = (gradient / sums[:, 1, None, None].clamp(min=1)).sum(dim=0)
        slope = (gradient * unit).sum()
        negatives = len(rows) * (self.filled - 1) - sums[0, 0]  # near or far
        return (loss + (slope - slope.detach())) * (
            (sums[0, 0] > 1) | (negatives > 1)
        )  # one pair is no loss, as there

    @torch.no_grad()
    def compare(self, unit, labels, own, number):
        """Block by block: numbers of near and of active pairs, cost, its gradient; for positives,
        for negatives.
        """
        sums, gradient = unit.new_zeros(2, 3), unit.new_zeros(2, *unit.shape)
        size = len(self.bank) if unit.is_cuda else 1024  # few launches there, little memory here
        blocks = zip(
            *(rows.split(size) for rows in (number, self.bank, self.bank_labels)), strict=True
        )
        for block, bank, bank_labels in blocks:
            bank = F.normalize(bank)
            similarity = unit @ bank.T
            dense, i, j = True, number[: len(unit), None], block - block[0]
            if (
                not unit.is_cuda
            ):  # where choosing would wait for the device; here, few pairs are worth looking at
                near = similarity > 0.9999 - self.neg_margin**2 / 2
                known = torch.from_numpy(np.flatnonzero(np.isin(bank_labels, labels)))
                near[:, known] |= labels[:, None] == bank_labels[known]
                chosen = np.flatnonzero(near)  # six times as fast as torch's
                if len(chosen) <= near.numel() // 16:
                    dense, (i, j) = False, map(torch.from_numpy, np.divmod(chosen, near.shape[1]))
            distance = (2 - 2 * similarity[i, j]).clamp(min=1e-12).sqrt()
            same, valid = labels[i] == bank_labels[j], block[j] < self.filled
            for kind, pairs, cost, sign in (
                (0, same & valid & (block[j] != own[i]), distance - self.pos_margin, -1),
                (1, ~same & valid, self.neg_margin - distance, 1),
            ):
                active = pairs & (cost > 0)
                sums[kind] += torch.stack(
                    [pairs.sum(), active.sum(), torch.where(active, cost, 0.0).sum()]
                )
                weight = torch.where(active & (distance > 1e-6), sign / distance, 0.0)
                if not dense:
                    weight = torch.sparse_coo_tensor(
                        torch.stack((i, j)), weight, near.shape, check_invariants=False
                    )
                gradient[kind] += weight @ bank
        return sums, gradient


# ---- augmentation ----
EDGE_FILTERS = (ImageFilter.EDGE_ENHANCE, ImageFilter.EDGE_ENHANCE_MORE)
FONTS = sorted(
    str(path) for path in Path(FONTS_DIR).glob("*.ttf") if path.stem != "TypeMyMusic_1.1"
)
EMOJIS = sorted(str(path) for path in Path(SMILEY_EMOJI_DIR).iterdir())
ROUND_DOWN = -0.499  # as Pillow does, where OpenCV rounds


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's, with the same draws, to nearly Pillow's values: see resize."""

    def forward(self, image):
        top, left, height, width = self.get_params(to_pixels(image), self.scale, self.ratio)
        return resize(
            np.ascontiguousarray(image[top : top + height, left : left + width]), self.size
        )


class ColorJitter(transforms.ColorJitter):
    """torchvision's, with the same draws, by OpenCV: 1 of 1,000 values is off by one; 2 of 5 by
    hue, up to 13.
    """

    def forward(self, image):
        order, *factors = self.get_params(self.brightness, self.contrast, self.saturation, self.hue)
        for kind in order.tolist():
            factor = factors[kind]
            if kind < 2:  # brightness: blend with black; contrast: with the mean gray
                mean = round(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]) if kind else 0
                image = cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + ROUND_DOWN)
            elif kind == 2:  # saturation: with its own gray
                gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
                image = cv2.addWeighted(image, factor, gray, 1 - factor, ROUND_DOWN)
            else:
                hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
                hsv[..., 0] += np.uint8(int(factor * 255) % 256)
                image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
        return image


class RandomPixelization(imaugs.RandomPixelization):
    """AugLy's, with the same draws, to nearly Pillow's values: see resize."""

    def __call__(self, image):
        if random.random() > self.p:
            return image
        size, ratio = image.shape[:2], random.uniform(self.min_val, self.max_val)
        return resize(
            resize(image, [int(side * ratio) for side in size], Image.BICUBIC), size, Image.BICUBIC
        )


class RandomBlur(imaugs.RandomBlur):
    """AugLy's, with the same draws, by OpenCV: three boxes as Pillow's, rounded three times, not
    six; 3 off at most.
    """

    def __call__(self, image):
        if random.random() > self.p:
            return image
        variance = (
            random.uniform(self.min_val, self.max_val) ** 2 / 3
        )  # of a box that reaches whole + part pixels
        whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
        part = (
            (2 * whole + 1)
            * (whole * (whole + 1) - 3 * variance)
            / (6 * (variance - (whole + 1) ** 2))
        )
        box = np.array([part, *[1] * (2 * whole + 1), part]) / (2 * whole + 1 + 2 * part)
        for _ in range(3):
            image = cv2.sepFilter2D(image, -1, box, box, borderType=cv2.BORDER_REPLICATE)
        return image


class RandomPerspective(transforms.RandomPerspective):
    """torchvision's, with the same draws, by OpenCV, which rounds where Pillow cuts off; outlines
    may differ.
    """

    def forward(self, image):
        if torch.rand(1) >= self.p:
            return image
        size = image.shape[1::-1]
        start, end = map(np.float32, self.get_params(*size, self.distortion_scale))
        matrix = cv2.getPerspectiveTransform(
            end - 0.5, start + 0.5
        )  # in a frame of one pixel, lest the edge fade
        framed = cv2.copyMakeBorder(image, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
        inside = np.pad(np.ones(image.shape[:2], np.uint8), 1)
        warp = partial(cv2.warpPerspective, M=matrix, dsize=size)
        seen = warp(inside, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
        return cv2.copyTo(warp(framed, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP), seen)


class RandomErasing(transforms.RandomErasing):
    """torchvision's, with the same draws, of an array: a View, as erasing is the device's."""

    def forward(self, image):
        if torch.rand(1) >= self.p:
            return View(image)
        top, left, _, _, noise = self.get_params(pixels := to_pixels(image), self.scale, self.ratio)
        return View(image) if noise is pixels else View(image, top, left, noise)  # found no place


def operations(exact):
    """Crop, jitter, pixelization, blur, perspective, of arrays: near-equals, or by_pillow what they
    derive from.
    """
    near_equals = RandomResizedCrop, ColorJitter, RandomPixelization, RandomBlur, RandomPerspective
    return [partial(published, kind.__base__) for kind in near_equals] if exact else near_equals


def published(kind, **recipe):
    """A kind of transform of PIL images, for arrays."""
    return transforms.Compose(by_pillow(kind(**recipe)))


def by_pillow(transform):
    """The steps by which a transform of PIL images does for arrays, uint8 (h, w, 3)."""
    return [Image.fromarray, transform, np.array]


def to_pixels(array):
    """An array (h, w, 3) as pixels (3, h, w), in the same memory."""
    return torch.from_numpy(array).permute(2, 0, 1)


def resize(array, size, interpolation=Image.BILINEAR):
    """To (height, width): as a rule within one of Pillow's values, two if BICUBIC; Pillow may do
    the height first.
    """
    return to_array(v2.functional.resize(to_pixels(array), size, interpolation))


def moderate_augmentation(input_size, mean, std, exact=False):
    """The moderate view: callable from PIL image or pixels to float tensor (3, input_size,
    input_size).
    """
    crop, *_ = operations(exact)
    geometry = [
        crop(size=input_size, scale=(0.7, 1.0)),
        transforms.RandomApply([partial(cv2.flip, flipCode=1)], p=0.5),
    ]
    return transforms.Compose([to_array, *geometry, View, Finish(mean, std).one])


def random_rotation(image, exact):
    """Rotate by U(0, 180) degrees, keep the largest upright rectangle; one too thin (or, exact, too
    long) stays.
    """
    return rotate(image, random.uniform(0, 180), exact)


def rotate(image, degrees, exact):
    """AugLy's, or nearly: without computing what it cuts away, and by OpenCV, for 1 of 200 pixels
    another neighbour.
    """
    center = np.array(image.shape[1::-1]) / 2
    half = np.array(rotated_rect_with_max_area(*center * 2, degrees)) / 2
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    inverse = np.round([[cosine, -sine], [sine, cosine]], 15)
    reach = abs(inverse) @ center  # from the center to the sides of the whole rotated image
    if half.min() < 1 or (exact and 4 * reach.prod() > MAX_PIXELS):
        return image
    if exact or degrees == 90:  # which Pillow turns by whole pixels
        return np.array(imaugs.rotate(Image.fromarray(image), degrees=degrees))
    middle = (np.ceil(center + reach) - np.floor(center - reach)) / 2
    start, stop = (middle - half).astype(int), (middle + half).astype(int)
    matrix = np.column_stack([inverse, inverse @ (start + 0.5 - middle) + center - 0.5])
    return cv2.warpAffine(
        image,
        matrix,
        tuple((stop - start).tolist()),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
    )


def overlay_and_crop(image, crops, overlay_paths, exact, overlay_p, opacity_lower, sizes):
    """Lay another image over or under this one, then crop gently; or, with probability 1 -
    overlay_p, crop strongly.
    """
    strong, gentle = crops
    if random.random() > overlay_p:
        return strong(image)
    pair = [image, to_array(open_image(random.choice(overlay_paths), pixels=True))]
    random.shuffle(pair)
    size, opacity = random.uniform(*sizes), random.uniform(opacity_lower, 1)
    x, y = random.uniform(0, 1 - size), random.uniform(0, 1 - size)
    return gentle(overlay_image(*pair, opacity, size, x, y, exact))


def overlay_image(image, overlay, opacity, overlay_size, x_pos, y_pos, exact):
    """AugLy's, or nearly, without its way through RGBA (see resize); where one of the two is too
    thin, the image.
    """
    height = int(len(image) * overlay_size)
    width = overlay.shape[1] * height // len(overlay)
    if not 0 < width * height < MAX_PIXELS // 4:
        return image
    if exact:
        pair = map(Image.fromarray, (image, overlay))
        return np.array(imaugs.overlay_image(*pair, None, opacity, overlay_size, x_pos, y_pos))
    image, top, left = image.copy(), int(len(image) * y_pos), int(image.shape[1] * x_pos)
    under, opacity = image[top : top + height, left : left + width], int(255 * opacity) / 255
    over = resize(overlay, [height, width], Image.BICUBIC)[: len(under), : under.shape[1]]
    under[:] = cv2.addWeighted(under, 1 - opacity, over, opacity, 0)
    return image


def enhance_edges(image, p):
    """With probability p, one of Pillow's EDGE_FILTERS, by OpenCV to the same pixels; border pixels
    stay.
    """
    if random.random() > p:
        return image
    edged, (size, scale, _, kernel) = image.copy(), random.choices(EDGE_FILTERS)[0].filterargs
    kernel = np.reshape(kernel, size) / scale
    edged[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel, delta=0.001)[
        1:-1, 1:-1
    ]  # Pillow rounds halves up
    return edged


def shuffle_pixels(image):
    """Shuffle a tenth of the pixels, by a pattern drawn here: AugLy's transform has one seed, hence
    one pattern.
    """
    pixels, rng = image.reshape(-1, 3).copy(), np.random.default_rng(random.getrandbits(32))
    chosen = rng.choice(len(pixels), len(pixels) // 10, replace=False)
    pixels[chosen] = pixels.take(rng.permutation(chosen), axis=0)
    return pixels.reshape(image.shape)


def overlay_text(image):
    """Write one or two lines of five to nine random glyphs in a random font, size, colour and
    place, as AugLy does.
    """
    file, size, color = (
        random.choice(FONTS),
        random.uniform(0.1, 0.3),
        tuple(random.choices(range(256), k=3)),
    )
    x, y, written = random.uniform(0, 0.5), random.uniform(0, 0.5), image.copy()
    font = ImageFont.truetype(file, int(min(image.size) * size))
    for line in range(random.randint(1, 2)):
        text = "".join(random.choices(glyphs(file), k=random.randint(5, 9)))
        try:
            ImageDraw.Draw(written).text(
                (x * image.width, (y + line * size) * image.height), text, color, font
            )
        except (OSError, RuntimeError):  # a glyph that the font cannot lay out
            return image
    return written


@cache
def glyphs(file):
    """The characters of a font, which AugLy keeps beside it, as one string."""
    opcodes = pickletools.genops(
        Path(file).with_suffix(".pkl").read_bytes()
    )  # which are read, not run
    return "".join(chr(point) for opcode, point, _ in opcodes if opcode.name.startswith("BININT"))


def overlay_emoji(image):
    """Paste a random smiley of random size at a random place."""
    emoji, size = random.choice(EMOJIS), random.uniform(0.1, 0.3)
    x, y = random.uniform(0, 1), random.uniform(0, 1)
    sprite = Image.open(emoji).resize([int(image.height * size)] * 2).convert("RGBA")
    image.paste(sprite, (int(image.width * x), int(image.height * y)), sprite)
    return image


# ---- data ----
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 100_000_000  # what claims more is a decompression bomb
NO_NOISE = torch.zeros(3, 0, 0)


class InputError(ValueError):
    """What the user gave cannot be used; main() prints it as one line."""


def list_images(folder):
    """Sorted paths of the images in `folder`: an array of strings, which loader processes share
    without copying.
    """
    folder = Path(folder)
    if (
        folder.name == "training_images" and not folder.exists()
    ):  # as the published commands call it
        folder = folder.with_name("train_images")  # as DISC21 calls it
    entries = os.scandir(folder) if folder.is_dir() else ()
    paths = sorted(entry.path for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES))
    if not paths:
        raise InputError(
            f"{folder}: is no folder of images; see input/README.md for what belongs where"
        )
    return np.array(paths)


def open_image(path, pixels=False):
    """The first image at `path`: PIL's, in mode RGB, or pixels, uint8 (3, h, w); raises InputError
    if there is none.
    """
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise OSError("there is no such file")
        image = Image.open(str(path), formats=IMAGE_FORMATS)
        tags = getattr(image, "tag_v2", {})  # TIFF's, whose tiles may be larger than the image
        if max(image.width * image.height, tags.get(322, 0) * tags.get(323, 0)) > MAX_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} pixels, more than {MAX_PIXELS} to decode"
            )
        if image.mode.startswith("I;16"):  # which convert() would clip to 8 bits
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if pixels and (image.format, image.mode) == ("JPEG", "RGB"):  # the same values, sooner
            with suppress(ValueError):  # of a flaw, which is Pillow's to judge
                return torch.from_numpy(
                    simplejpeg.decode_jpeg(np.memmap(path, np.uint8, "r"))
                ).permute(2, 0, 1)
        return v2.functional.pil_to_tensor(image.convert("RGB")) if pixels else image.convert("RGB")
    except Exception as error:  # file system, formats and decoders each fail in their own way
        raise InputError(f"{path}: cannot be read as an image ({error})") from error


def evaluation_transform(input_size, mean, std):
    """Resize to a square, normalise: callable from PIL image or pixels to float tensor (3,
    input_size, input_size).
    """
    return transforms.Compose(
        [v2.Resize((input_size, input_size)), to_array, View, Finish(mean, std).one]
    )


def plain_reader(args):
    """The same without normalising, from files: callable from path to uint8 (input_size,
    input_size, 3).
    """
    read = partial(open_image, pixels=args.fast_input)
    return transforms.Compose([read, v2.Resize((args.input_size, args.input_size)), to_array])


def to_array(image):
    """PIL's image, or pixels (3, h, w), as an array (h, w, 3), uint8."""
    return (
        np.array(image.convert("RGB"))
        if isinstance(image, Image.Image)
        else image.permute(1, 2, 0).numpy()
    )


class View(NamedTuple):
    """What loaders make of an image: uint8 (h, w, 3), and float noise (3, height, width) to be put
    at (top, left).
    """

    pixels: np.ndarray
    top: int = 0
    left: int = 0
    noise: torch.Tensor = NO_NOISE


def collate(samples):
    """(views, labels) of each sample as a batch: pixels (n, h, w, 3), places of noise, its values,
    labels (n,).
    """
    views = [view for views, _ in samples for view in views]
    labels = torch.tensor([label for _, labels in samples for label in labels])
    places = [
        (row, view.top, view.left, *view.noise.shape[1:])
        for row, view in enumerate(views)
        if len(view.noise[0])
    ]
    noise = torch.cat([view.noise.flatten() for view in views])
    return default_collate([view.pixels for view in views]), places, noise, labels


class Finish:
    """ToTensor, what RandomErasing fills, Normalize: by the device, so that loaders have a quarter
    of the bytes.
    """

    def __init__(self, mean, std, device="cpu"):
        self.constants = torch.tensor([(255.0,) * 3, mean, std], device=device)[..., None, None]

    def __call__(self, pixels, places=(), noise=NO_NOISE):
        """Pixels, uint8 (n, h, w, 3), with noise in some places, as collate gives them -> float (n,
        3, h, w).
        """
        white, mean, std = self.constants  # no numbers: CUDA would multiply by the reciprocal
        pixels, noise = (x.to(white.device, non_blocking=True) for x in (pixels, noise))
        images = pixels.permute(0, 3, 1, 2).float(memory_format=torch.contiguous_format).div_(white)
        values = noise.flatten().split([3 * height * width for *_, height, width in places])
        for (row, top, left, height, width), part in zip(places, values, strict=True):
            images[row, :, top : top + height, left : left + width] = part.view(3, height, width)
        return images.sub_(mean).div_(std).to(memory_format=torch.channels_last)

    def one(self, view):
        """The same of one View, float (3, h, w)."""
        *views, _ = collate([([view], [])])
        return self(*views)[0].contiguous()


def load(get, items, blank, collate_fn, indices):
    """Collated get(items[i]) for i in indices, and {position: why} where instead stands blank or,
    if None, another.
    """
    samples, bad = [], {}
    for position, index in enumerate(indices):
        others = (
            np.random.default_rng(index).integers(len(items), size=100) if blank is None else []
        )
        for other in (index, *others):
            try:
                samples.append(get(items[other]))
                break
            except InputError as error:
                bad.setdefault(position, str(error))
        else:
            if blank is None:
                raise InputError(bad[position])
            samples.append(blank)
    return collate_fn(samples), bad


def seed_generators(*key):
    """Seed Python's, NumPy's and torch's generators from integers, so that what is drawn next
    depends on them alone.
    """
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    seed_torch = (
        torch.manual_seed if CUDA else torch.default_generator.manual_seed
    )  # the former takes a millisecond
    for seed, value in zip((random.seed, np.random.seed, seed_torch), seeds, strict=True):
        seed(value)


# ---- distributed ----
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def process():
    """(rank, world size) of this process; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(args):
    """Join the process group that torchrun's environment describes, if any; returns this process's
    torch device.
    """
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", args.gpu or 0)))
        if CUDA
        else torch.device("cpu")
    )
    if CUDA:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = (
            args.mode == "train"
        )  # a choice by time, while extraction keeps to its bits
    if "RANK" in os.environ:
        # Ranks of an extraction meet at its end only; a process that dies is noticed at once by the
        # others anyway.
        timeout = timedelta(minutes=args.timeout) if args.mode == "train" else timedelta(days=30)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if (
            os.environ.get("GROUP_WORLD_SIZE") == "1"
        ):  # torchrun's store still has the addresses of a failed attempt
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = (
            f"cpu:gloo,cuda:{args.dist_backend}" if CUDA else "gloo"
        )  # share() must not wait for the GPU
        dist.init_process_group(
            backend, timeout=timeout, world_size=world_size, rank=rank, store=store
        )
    args.workers = -(-args.workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of this process
    return device


def share(value):
    """The values of all processes, in rank order."""
    values = [value] * process()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def hash_files(*lists):
    """SHA-256 of the names in lists of files, by whose positions images are known: the same on all
    processes.
    """
    names = "\n".join(Path(path).name for paths in lists for path in paths)
    digest = hashlib.sha256(os.fsencode(names)).hexdigest()
    if len(set(share(digest))) > 1:
        raise InputError("the processes found different files; give every node the same data")
    return digest


def embed(args, model, images):
    """Descriptors (n, 256) of images (n, 3, size, size), in the precision that --amp names."""
    dtype = torch.bfloat16 if args.amp == "bf16" else torch.float16
    with torch.autocast(images.device.type, dtype, enabled=CUDA and args.amp != "off"):
        return model(images)


# ---- checkpoint ----
def save(path, write, size):
    """Call write(path), of `size` bytes, so that either the old or the whole new file is there at
    any time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, folder = (
        path.with_name(f"unfinished{path.suffix}"),
        os.open(path.parent, os.O_RDONLY),
    )
    try:
        unfinished.unlink(missing_ok=True)
        if size > shutil.disk_usage(path.parent).free:  # HDF5 would crash
            raise OSError("no space left on device")
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file)
        unfinished.replace(path)
        os.fsync(folder)
    except (OSError, RuntimeError) as error:
        if "DataLoader worker" in str(error):  # torch tells of its loss wherever the process is
            raise
        raise InputError(
            f"{path}: its {size} bytes cannot be written ({error}); make room and go on"
        ) from error
    finally:
        os.close(folder)
        unfinished.unlink(missing_ok=True)


def load_checkpoint(paths, model, **parts):
    """Load weights, and the states of those `parts` it has, from the first readable of `paths`;
    returns all it has.
    """
    for path in paths:
        try:
            if (
                zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
            ):  # torch does not look at the checksums
                raise ValueError("damaged")
            with torch.serialization.safe_globals(
                [argparse.Namespace]
            ):  # and no other Python object
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            weights = {
                key.removeprefix("module."): value
                for key, value in checkpoint["state_dict"].items()
            }
            model.load_state_dict(weights)
            if "optimizer" in parts:  # learning rate and the like are those given now
                checkpoint["optimizer"]["param_groups"] = parts["optimizer"].state_dict()[
                    "param_groups"
                ]
            for name in (
                parts.keys() & checkpoint.keys()
            ):  # published ones have no memory bank: it stays empty
                parts[name].load_state_dict(checkpoint[name])
            return checkpoint
        except (
            Exception
        ) as error:  # file system, zip, pickle and tensors each fail in their own way
            reason = "; ".join(line.strip()[:100] for line in str(error).strip().splitlines()[:4])
            message = (
                f"{path}: is no checkpoint for these arguments ({reason}); check file and --arch"
            )
            if path == paths[-1]:
                raise InputError(message) from error
            print(f"warning: {message}; using the one before", file=sys.stderr)


# ---- train ----
def open_board(args, step):
    """TensorBoard's writer, whose files replace an earlier run's from `step` on; gives None without
    --tensorboard.
    """
    if not args.tensorboard or process()[0] > 0:
        return nullcontext()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard: is not installed; pip install tensorboard") from error
    return SummaryWriter(Path(args.output, "train/tensorboard"), purge_step=step)


def parameter_groups(model, weight_decay):
    """Parameters without weight decay (vectors, biases, gains), then those with it, as
    published.
    """
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and not name.endswith(".bias") and "gain" not in name][
            "params"
        ].append(parameter)
    return groups


def prepare_momenta(optimizer, model):
    """As fused SGD needs them: laid out as their parameters, and there, lest a first step left out
    take any memory.
    """
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        state["momentum_buffer"] = torch.zeros_like(parameter).add_(state.get("momentum_buffer", 0))


def train(args):
    """Train the stage, with checkpoints and log.jsonl in <output>/train; returns the exit code."""
    device, folder, stopping = join(args), Path(args.output, "train"), []
    rank, world_size = process()
    newest = sorted(
        folder.glob("*.pth.tar"), reverse=True
    )  # last.pth.tar, then the epochs' from the last one on
    resumed = newest if args.resume == "auto" else [args.resume] * bool(args.resume)
    seed_generators(args.seed)
    # DDP hands the weights of rank 0 to the others, so only rank 0 fetches them.
    model = create_model(
        args, device, rank == 0 and not (args.no_pretrained or args.weight or resumed)
    )
    mean, std = (model.backbone.default_cfg[name] for name in ("mean", "std"))
    dataset = TrainDataset(args, mean, std)
    about = {"files": hash_files(*dataset.files), "seed": args.seed, "batch_size": args.batch_size}
    rows, steps = args.batch_size * dataset.rows, len(dataset) // args.batch_size
    if args.batch_size % world_size or not steps or rows > args.memory_size:
        limits = (
            f"{world_size} processes and fit the {len(dataset)} samples, its {rows} images "
            f"--memory-size"
        )
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of {limits}")
    if args.weight and not resumed:
        load_checkpoint([args.weight], model)
    loss_function = MemoryBankContrastiveLoss(
        args.memory_size, 256, args.pos_margin, args.neg_margin
    ).to(device)
    # Fused, it takes the scaler's verdict on a step without waiting for the device.
    optimizer = torch.optim.SGD(
        parameter_groups(model, args.wd), args.lr, args.momentum, fused=CUDA
    )
    # In every precision the scaler leaves out a step whose gradients are not finite; but for
    # float16 it stays at 1.
    half = CUDA and args.amp == "fp16"
    scaler = torch.amp.GradScaler(device.type, *(() if half else (1.0, 1 + 1e-9, 1 - 1e-9)))
    parts = {"optimizer": optimizer, "memory_bank": loss_function} | (
        {"scaler": scaler} if half else {}
    )
    state = {
        "epoch": args.start_epoch,
        "step": 0,
        "skipped": 0,
        "history": torch.zeros(0, 5),
        "bad": [],
        "log": [],
    }
    changed = []
    if resumed:
        checkpoint = load_checkpoint(resumed, model, **parts)
        state |= {name: checkpoint[name] for name in state.keys() & checkpoint.keys()}
        fixed = (
            about if state["step"] else ["files"]
        )  # between two epochs, seed and batch may change
        changed = [name for name in fixed if checkpoint.get(name, about[name]) != about[name]]
    prepare_momenta(optimizer, model)
    if len(set(share((bool(resumed), state["epoch"], state["step"])))) > 1 or changed:
        raise InputError(
            f"--resume {args.resume}: is of other {' and '.join(changed) or 'steps on other nodes'}"
        )
    if (
        CUDA and world_size > 1
    ):  # torch's own converter drops the activation of timm's fused BatchNormAct2d
        timm.layers.convert_sync_batchnorm(model)
    network = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    about |= {"source": Path(__file__).read_text(), "versions": VERSIONS, "world_size": world_size}
    limit = (
        max(1, int(args.max_bad * sum(map(len, dataset.files)))) if args.bad_images == "skip" else 0
    )
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: stopping.append(True))

    def log(**values):
        line = {"epoch": state["epoch"], "step": state["epoch"] * steps + state["step"], **values}
        state["log"].append(json.dumps(line) + "\n")
        print(state["log"][-1], end="", file=log_file, flush=True)
        for name, value in values.items() if board and values.get("loss") is not None else ():
            board.add_scalar(name, value, line["step"])

    def save_checkpoint(*names):
        if rank == 0:
            weights = {
                "state_dict": model.state_dict(prefix="module."),
                "arch": args.arch,
                "args": args,
            }
            content = (
                about | state | weights | {name: part.state_dict() for name, part in parts.items()}
            )
            torch.save(content, buffer := io.BytesIO())
            for name in names:
                save(
                    folder / name, lambda path: path.write_bytes(buffer.getbuffer()), buffer.tell()
                )
        share("saved")

    save_checkpoint("last.pth.tar")
    log_path = folder / "log.jsonl" if rank == 0 else Path(os.devnull)
    first = state["epoch"] * steps + state["step"] + 1
    with open_board(args, first) as board, log_path.open("w") as log_file:
        log_file.writelines(state["log"])
        log(args=vars(args), device=torch.cuda.get_device_name() if CUDA else "cpu", **about)
        for epoch in range(state["epoch"], args.epochs):
            for views, bad in train_one_epoch(
                args, state, dataset, network, loss_function, optimizer, scaler, log
            ):
                if board and state["step"] == 1:
                    images = Finish((0.0,) * 3, (1.0,) * 3)(*views)[: 8 * dataset.rows].clamp(0, 1)
                    board.add_image(
                        "views", utils.make_grid(images, dataset.rows), epoch * steps + 1
                    )
                stops, bad = zip(*share((bool(stopping), bad)), strict=True)
                for message in sorted(
                    {message for messages in bad for message in messages} - {*state["bad"]}
                ):
                    state["bad"].append(message)
                    log(bad_image=message)
                if len(state["bad"]) > limit:
                    raise InputError(
                        f"{len(state['bad'])} bad images, --max-bad: {'; '.join(state['bad'][:10])}"
                    )
                if any(stops) or state["step"] % args.checkpoint_every == 0:
                    save_checkpoint("last.pth.tar")
                if any(stops):
                    print(
                        f"stopped at step {state['step']} of epoch {epoch}; --resume auto goes on",
                        file=sys.stderr,
                    )
                    return os.EX_TEMPFAIL
            state |= {"epoch": epoch + 1, "step": 0}
            save_checkpoint(f"checkpoint_{epoch:04d}.pth.tar", "last.pth.tar")
    return 0


def train_one_epoch(args, state, dataset, network, loss_function, optimizer, scaler, log):
    """The rest of a pass over the data. Yields each step's views and what could not be read; logs
    now and then.
    """
    (rank, world_size), size, epoch, done = (
        process(),
        args.batch_size,
        state["epoch"],
        state["step"],
    )
    device, dataset.epoch = loss_function.bank.device, epoch
    order = np.random.default_rng((args.seed, epoch)).permutation(len(dataset))[
        : len(dataset) // size * size
    ]
    # A process takes consecutive samples: the rows of all processes, in rank order, stand as they
    # do in one.
    batches = order.reshape(-1, world_size, size // world_size)[:, rank].tolist()
    # The parameters see 1/N of the gradient of the loss of all rows, as on the N GPUs that the
    # learning rate was tuned on (where each had its own rows' part of it, averaged by DDP).
    # pytorch-metric-learning >= 1.0 gives N times that.
    scale = world_size / args.reference_world_size
    for group in optimizer.param_groups:  # v98: linear decay, per epoch
        group["lr"] = args.lr * (1 - epoch / args.epochs)
    network.train()
    get_batch = partial(load, dataset.__getitem__, range(len(dataset)), None, collate)
    loader = DataLoader(
        batches[done:], None, collate_fn=get_batch, num_workers=args.workers, pin_memory=CUDA
    )
    signal.pthread_sigmask(
        signal.SIG_BLOCK, STOP_SIGNALS
    )  # in loader processes: this one decides when all stop
    bar = tqdm(
        iter(loader), desc=f"epoch {epoch}", initial=done, total=len(batches), disable=rank > 0
    )
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    logged, started, buffers = done, time.time(), list(network.buffers())
    groups = [
        [x for x in buffers if x.is_floating_point() == kind] for kind in (True, False)
    ]  # vectors: few launches
    finish = Finish(dataset.mean, dataset.std, device)
    for step, ((*views, labels), bad) in enumerate(bar, start=done + 1):
        seed_generators(
            args.seed, epoch, step, rank
        )  # without workers, loading has used the same generators
        before = [parameters_to_vector(group) for group in groups]
        embeddings = embed(args, network, finish(*views))
        loss = loss_function(embeddings, labels.to(device, non_blocking=True))
        scaler.scale(loss * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for group, kept in zip(
            groups, before, strict=True
        ):  # BatchNorm's statistics of a step left out
            vector = torch.where(loss.isfinite(), parameters_to_vector(group), kept)
            parts = vector.split([buffer.numel() for buffer in group])
            torch._foreach_copy_(
                group, [part.view_as(buffer) for part, buffer in zip(parts, group, strict=True)]
            )
        values = torch.stack([loss.detach(), *loss_function.stats.values()])
        state |= {"step": step, "history": torch.cat([state["history"].to(device), values[None]])}
        if step % args.log_every == 0 or step == len(batches):
            values, state["history"] = state["history"].cpu(), torch.zeros(0, 5)
            finite = values.isfinite().all(dim=1)
            for good in finite.tolist():
                state["skipped"] = 0 if good else state["skipped"] + 1
                if state["skipped"] > args.max_skipped:
                    raise InputError(
                        f"--max-skipped {args.max_skipped}: more steps in a row had no finite loss"
                    )
            means = values[finite].mean(dim=0).tolist() if finite.any() else [None] * len(values[0])
            line = dict(zip(("loss", *loss_function.stats), means, strict=True))
            line |= {"lr": optimizer.param_groups[0]["lr"], "skipped": int((~finite).sum())}
            log(
                **line,
                images_per_second=(step - logged) * size * dataset.rows / (time.time() - started),
            )
            bar.set_postfix(loss=line["loss"])
            logged, started = step, time.time()
        yield views, list(bad.values())


# ---- extract ----
def extraction_sets(args):
    """The sorted image paths of each set in --target-set, by name: query, reference, train."""
    root, queries = Path(args.data), "query_images" if args.phase == 1 else "query_images_phase2"
    folders = {
        "query": root / queries,
        "reference": root / "reference_images",
        "train": root / "training_images",
    }
    sets = {
        name: list_images(folder) for name, folder in folders.items() if name[0] in args.target_set
    }
    if not sets or set(args.target_set) - set("qrt"):
        raise InputError(f"--target-set {args.target_set}: give letters of q, r and t")
    if args.eval_subset and "reference" in sets:
        subset = root / args.eval_subset
        wanted = set(subset.read_text(errors="replace").split())
        sets["reference"] = np.array(
            [path for path in sets["reference"] if Path(path).stem in wanted]
        )
        if not wanted or len(sets["reference"]) < len(wanted):
            raise InputError(
                f"{subset}: must list ids of images in {folders['reference']}, one a line"
            )
    if any(len({Path(path).stem for path in paths}) < len(paths) for paths in sets.values()):
        raise InputError(
            f"{root}: has images whose names differ in their suffix alone; rename one of each"
        )
    return {name: paths[: 100 if args.dryrun else None] for name, paths in sets.items()}


def read_shard(path, number):
    """The descriptors of a finished batch, float32 (number, 256), or None: not there, or damaged by
    zip's checksum.
    """
    try:
        with np.load(path) as file:
            rows = file["rows"]
    except Exception:  # file system, zip and numpy each fail in their own way
        return None
    return rows if rows.shape == (number, 256) and rows.dtype == np.float32 else None


@torch.inference_mode()
def extract(args):
    """Write fb-isc-submission.h5 (queries, references) and train_feats.npy (training) into
    <output>/extract.
    """
    device, sets, bad, zeros = join(args), extraction_sets(args), [], []
    (rank, world_size), paths = process(), np.concatenate([*sets.values()])
    sets = dict(
        zip(sets, np.split(paths, np.cumsum([*map(len, sets.values())])[:-1]), strict=True)
    )  # views
    model = create_model(args, device).eval()
    load_checkpoint([args.weight], model)
    finish = Finish(*(model.backbone.default_cfg[name] for name in ("mean", "std")), device)
    with Path(args.weight).open("rb") as file:
        inputs = [
            hashlib.file_digest(file, "sha256").hexdigest(),
            os.path.realpath(args.data),
            VERSIONS,
            CUDA,
        ]
    inputs += map(
        vars(args).get,
        ("arch", "input_size", "fast_input", "gem_eval_p", "batch_size", "amp", "tta"),
    )
    inputs += [[(name, len(part)) for name, part in sets.items()], hash_files(paths)]
    folder, phase = Path(args.output, "extract"), "-phase2" if args.phase == 2 else ""
    unfinished = folder / f"unfinished{phase}" / hashlib.sha256(repr(inputs).encode()).hexdigest()
    if args.start_over and rank == 0:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
    share("ready")
    if others := set(unfinished.parent.glob("*")) - {unfinished}:
        raise InputError(
            f"{others.pop()}: was begun with other weights, images or flags; go on so, or "
            f"--start-over"
        )
    unfinished.mkdir(parents=True, exist_ok=True)  # for finished batches, until all are
    starts = range(0, len(paths), args.batch_size)
    batches = [range(start, min(start + args.batch_size, len(paths))) for start in starts]
    shards, todo = {batch: unfinished / f"{batch.start:07d}.npz" for batch in batches}, []
    for batch, shard in shards.items() if rank == 0 else ():  # once for all processes
        rows = read_shard(shard, len(batch))
        if rows is None or not rows.any(axis=1).all():  # what was bad may have been replaced
            todo.append(batch)
    todo = share(todo)[0][rank::world_size]
    blank = np.zeros((args.input_size, args.input_size, 3), np.uint8)
    get_batch = partial(load, plain_reader(args), paths, blank, default_collate)
    loader = DataLoader(todo, None, collate_fn=get_batch, num_workers=args.workers, pin_memory=CUDA)
    for batch, (pixels, unread) in zip(
        todo, tqdm(loader, unit="batch", disable=rank > 0), strict=True
    ):
        rows = embed(args, model, finish(pixels)).float().cpu().numpy()
        rows[list(unread)] = 0
        np.savez(shards[batch], rows=rows)
        bad += unread.values()
    bad = [message for messages in share(bad) for message in messages]
    if bad and args.bad_images == "error":
        raise InputError(
            f"{len(bad)} bad images; replace them and go on, or --bad-images zero: {'; '.join(bad)}"
        )
    if rank > 0:
        return 0

    def finished():
        for batch, shard in shards.items():
            if (rows := read_shard(shard, len(batch))) is None:
                raise InputError(
                    f"{shard}: is missing or damaged; go on, with --output on a disk that all "
                    f"nodes share"
                )
            yield from rows

    rows = finished()  # which the sets take in their order

    def collect(name):
        ids = [Path(path).stem.encode(errors="backslashreplace") for path in sets[name]]
        descriptors = np.fromiter(rows, np.dtype((np.float32, 256)), len(ids))
        zeros.extend(ids[row] + b"\n" for row in np.flatnonzero(~descriptors.any(axis=1)))
        return ids, descriptors

    def write_submission(path):
        with h5py.File(path, "w") as file:
            for name in submitted:
                ids, file[name] = collect(name)
                width = max(
                    {"query": 6, "reference": 7}[name], *map(len, ids)
                )  # DISC21's, unless ids are longer
                file[f"{name}_ids"] = np.array(ids, f"S{width}")

    if submitted := [name for name in sets if name != "train"]:
        size = 2**16 + 1280 * sum(
            len(sets[name]) for name in submitted
        )  # with ids and what HDF5 adds
        save(folder / f"fb-isc-submission{phase}.h5", write_submission, size)
    if "train" in sets:
        save(
            folder / "train_feats.npy",
            lambda path: np.save(path, collect("train")[1]),
            1024 * len(sets["train"]),
        )
    (sidecar := folder / f"zero-rows{phase}.txt").unlink(missing_ok=True)
    if args.bad_images == "zero":
        save(sidecar, lambda path: path.write_bytes(b"".join(zeros)), sum(map(len, zeros)))
    shutil.rmtree(unfinished.parent)
    return 0


# ---- main ----
def main(argv=None):
    """Run the stage; returns the exit code: 2 for input that cannot be used, 1 for a lost process,
    75 for a signal.
    """
    args = parse_args(argv)
    gpus = torch.cuda.device_count() if args.multiprocessing_distributed and args.gpu is None else 1
    if "RANK" not in os.environ and (args.world_size > 1 or gpus > 1):
        host, _, port = args.dist_url.rpartition("//")[2].rpartition(":")
        node = f"--nnodes={args.world_size} --node-rank={args.rank} --nproc-per-node={max(1, gpus)}"
        node += (
            f" --master-addr={host} --master-port={port} --signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
        )
        try:  # torchrun, as its own command would start this node's processes
            return (
                dist.run.main([*node.split(), __file__, *(sys.argv[1:] if argv is None else argv)])
                or 0
            )
        except dist.elastic.multiprocessing.errors.ChildFailedError as error:
            return error.get_first_failure()[1].exitcode
        except (
            dist.elastic.multiprocessing.SignalException
        ) as error:  # which has reached the processes
            return os.EX_TEMPFAIL if error.sigval in STOP_SIGNALS else 1
    try:
        code = train(args) if args.mode == "train" else extract(args)
    except (InputError, OSError, EOFError, RuntimeError) as error:
        signal.signal(
            signal.SIGCHLD, signal.SIG_DFL
        )  # or torch raises a loader process's loss again, in here
        words = ("DataLoader worker", "Pin memory thread", "gloo", "NCCL")
        lost = isinstance(error, ConnectionError | EOFError | dist.DistError)
        lost = lost or (
            isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        )
        if isinstance(error, RuntimeError) and not lost:
            raise
        place = (
            f"{args.output}: " if isinstance(error, OSError) and not error.filename else ""
        )  # as of a full disk
        message = (
            str(error).rpartition("InputError: ")[2].strip().replace("\n", " ")
        )  # after a loader's traceback
        hint = "; continue with --resume auto" if lost and args.mode == "train" else ""
        print(
            f"{Path(__file__).name}: error: {'lost a process: ' if lost else place}{message}{hint}",
            file=sys.stderr,
        )
        return 1 if lost else 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
