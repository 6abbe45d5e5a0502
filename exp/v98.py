r"""v98: v86 continued at 512 pixels, with reference images as negatives (stage 3 of 4).

- Starts from the weights of v86; the input grows from 384 to 512 pixels.
- Each sample brings two random reference images, without augmentation, as negatives.
- Augmentation is stronger again; the learning rate falls with the epochs.

`# v98` marks what differs from v86, with v86's value. The published command, run in exp/:

    python v98.py -a tf_efficientnetv2_m_in21ft1k --dist-url 'tcp://localhost:10001' \
        --multiprocessing-distributed --world-size 1 --rank 0 --wd 1e-6 --gem-p 1.0 \
        --pos-margin 0.0 --sample-size 1000000 --ncrops 2 --batch-size 64 --memory-size 20000 \
        --neg-margin 1.0 --lr 0.1 --input-size 512 --epochs 3 --seed 999 \
        --weight ./v86/train/checkpoint_0005.pth.tar ../input/training_images/

Evidence: 0.6519 µAP, 0.5710 R@P90 (published, of checkpoint 0001, on the 25,000 public queries
against 1,000,000 references; 16 GPUs).
Needs input/training_images and input/reference_images. Writes
v98/train/checkpoint_{epoch:04d}.pth.tar; v107 starts from 0001.
"""

import argparse
import atexit
import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickletools
import random
import re
import shutil
import signal
import socket
import sys
import time
import zipfile
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
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
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import RandomApply
from torchvision.transforms.v2 import functional as v2
from tqdm import tqdm


# ---- recipe ----
def parse_args(argv=None):
    """The command line; the defaults are the published recipe. Returns an argparse.Namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("recipe").add_argument
    add("-a", "--arch", default="tf_efficientnetv2_m_in21ft1k", help="backbone, a name timm knows")
    add(
        "--input-size",
        type=positive_int,
        default=512,  # v98: was 384
        help="side of the square input in pixels",
    )
    add("--gem-p", type=positive_float, default=1.0, help="exponent of GeM pooling in training")
    add("--gem-eval-p", type=positive_float, default=1.0, help="exponent of GeM in extraction")
    add(
        "-b",
        "--batch-size",
        type=positive_int,
        default=64,  # v98: was 128
        help="samples per step, over all ranks",
    )
    add(
        "--epochs",
        type=positive_int,
        default=3,  # v98: was 7
        help="number of epochs, including those before --resume",
    )
    add("--start-epoch", type=nonnegative_int, default=0, help="first epoch; --resume knows it")
    add(
        "--lr",
        "--learning-rate",
        type=nonnegative_float,
        default=0.1,
        help="learning rate",
    )
    add("--momentum", type=nonnegative_float, default=0.9, help="momentum of SGD")
    add("--wd", "--weight-decay", type=nonnegative_float, default=1e-6, help="weight decay")
    add(
        "--pos-margin",
        type=nonnegative_float,
        default=0.0,
        help="positive pairs nearer than this cost nothing",
    )
    add(
        "--neg-margin",
        type=nonnegative_float,
        default=1.0,
        help="negative pairs farther than this cost nothing",
    )
    add(
        "--memory-size",
        type=positive_int,
        default=20000,
        help="descriptors that the memory bank holds",
    )
    add("--ncrops", type=positive_int, default=2, help="views per image: one moderate, others hard")
    add(
        "--sample-size",
        type=positive_int,
        default=1000000,
        help="use at most so many training images, in the order of their names",
    )
    add(
        "--seed",
        type=nonnegative_int,
        default=999,  # v98: was 99
        help="seed of every random draw",
    )
    add(
        "--reference-world-size",
        type=positive_int,
        default=16,  # v98: was 8
        help="number of GPUs that --lr was tuned for",
    )
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    if leaves_weights_open(args):
        args.weight = str(Path(__file__).with_name("v86") / "train/checkpoint_0005.pth.tar")  # v98
    return args


def moderate_view(input_size):
    """The moderate view: a callable from a PIL image or uint8 (h, w, 3) to a View.

    An operation takes and returns pixels, uint8 (h, w, 3). The last one makes a View of them: the
    pixels, and the box that RandomErasing fills with noise on the device.
    """
    return transforms.Compose(
        [
            to_array,
            RandomResizedCrop(input_size, scale=(0.7, 1.0)),
            RandomApply([horizontal_flip], p=0.5),
            View,
        ]
    )


def hard_view(input_size, overlay_paths):
    """The hard view: a callable from a PIL image or uint8 (h, w, 3) to a View."""
    p = 0.35  # v98: was 0.30
    shuffled = [
        ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),  # v98: was 0.75
        RandomApply([pixelize], p=0.25),
        RandomApply([shuffle_pixels], p=0.25),
        RandomApply([encode_as_jpeg], p=p),
        RandomApply([to_grayscale], p=0.25),
        RandomApply([blur], p=0.25),
        RandomPerspective(distortion_scale=0.5, p=p),
        RandomApply([horizontal_flip], p=0.5),
        RandomApply([vertical_flip], p=0.1),
        RandomApply([overlay_text], p=p),
        RandomApply([overlay_emoji], p=p),
        RandomApply([enhance_edges], p=0.30),  # v98: stays, where the others rise to 0.35
    ]
    overlay_and_crop = OverlayAndCrop(
        input_size,
        overlay_paths,
        overlay_p=0.1,  # v98: was 0.075
        opacity=(0.4, 1.0),  # v98: was (0.5, 1.0)
        overlay_size=(0.2, 0.8),  # v98: was (0.3, 0.7)
        scale=(0.15, 1.0),
        scale_after_overlay=(0.7, 1.0),
    )
    return transforms.Compose(
        [
            to_array,
            RandomApply([rotate_randomly], p=p),
            overlay_and_crop,
            transforms.RandomOrder(shuffled),
            RandomErasing(p=0.25),
        ]
    )


class TrainDataset:
    """Sample i: a list of the views of training image i, and a list of their labels, all i.

    The last two views are of random images in reference_images beside `folder`, not augmented.
    Reference r has a label of its own, the number of training images + r: so it is a negative of
    every training image.

    folder: of the training images; ncrops: views per image; sample_size: how many images to use at
    most. train() sets `epoch`. An unreadable image raises InputError.
    """

    def __init__(self, folder, input_size, ncrops, sample_size, seed, fast_input):  # v98
        self.paths = list_images(folder)[:sample_size]
        self.references = list_images(Path(folder).absolute().parent / "reference_images")  # v98
        self.read = partial(read_resized, input_size=input_size, fast_input=fast_input)  # v98
        self.file_lists = [self.paths, self.references]  # v98
        self.views_per_sample = ncrops + 2  # v98
        hard = hard_view(input_size, self.paths)
        self.views = [moderate_view(input_size)] + [hard] * (ncrops - 1)
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        seed_generators(self.seed, self.epoch, index)  # whichever worker or rank this is
        cv2.setNumThreads(0)  # a data loader worker has one core
        image = read_pixels(self.paths[index])
        views = [view(image) for view in self.views]
        labels = [index] * len(views)
        for number in random.sample(range(len(self.references)), 2):  # v98
            views.append(View(self.read(self.references[number])))
            labels.append(len(self.paths) + number)
        return views, labels


# ---- model ----
def gem(x, p, eps=1e-6):
    """Generalized mean pooling (n, c, h, w) -> (n, c); p = 1: mean of the values clamped at eps."""
    return x.clamp(min=eps).pow(p).mean(dim=(-2, -1)).pow(1 / p)


class ISCNet(torch.nn.Module):
    """Images (n, 3, h, w) -> L2-normalized descriptors (n, fc_dim).

    GeM pools with exponent p in training mode and eval_p in evaluation mode. The names of the
    modules are those of the published weights.
    """

    def __init__(self, backbone, fc_dim=256, p=1.0, eval_p=1.0):
        super().__init__()
        self.backbone = backbone
        self.fc = torch.nn.Linear(backbone.feature_info.channels()[-1], fc_dim, bias=False)
        self.bn = torch.nn.BatchNorm1d(fc_dim)
        self.p = p
        self.eval_p = eval_p
        torch.nn.init.xavier_normal_(self.fc.weight)

    def forward(self, images):
        features = self.backbone(images)[-1]  # the last feature map
        pooled = gem(features, self.p if self.training else self.eval_p)
        return F.normalize(self.bn(self.fc(pooled)))


# ---- loss ----
class MemoryBankContrastiveLoss(torch.nn.Module):
    """Contrastive loss between a batch and the last `memory_size` descriptors, in float32.

    With d the Euclidean distance of two L2-normalized rows: the mean of d - pos_margin over
    positive pairs (equal labels) with d > pos_margin, plus the mean of neg_margin - d over negative
    pairs with d < neg_margin. The values are those of CrossBatchMemory(ContrastiveLoss) of
    pytorch-metric-learning 0.9.99, with which the published weights were trained.
    """

    def __init__(self, memory_size, embedding_size=256, pos_margin=0.0, neg_margin=1.0):
        super().__init__()
        self.pos_margin = pos_margin
        self.neg_margin = neg_margin
        self.stats = {}  # of the last batch: pos_loss, neg_loss, pos_pairs, neg_pairs
        self.register_buffer("bank", torch.zeros(memory_size, embedding_size))
        self.register_buffer("bank_labels", torch.zeros(memory_size, dtype=torch.long))
        self.register_buffer("cursor", torch.tensor(0))  # the next row to overwrite
        self.register_buffer("filled", torch.tensor(0))  # number of valid rows

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, embeddings, labels):
        """This rank's rows (n, d) and labels (n,) -> the loss over the rows of all ranks, a scalar.

        The rows enter the bank first. If one is not finite, none enters and the loss is NaN.
        """
        embeddings = all_gather_rows(embeddings.float())
        labels = all_gather_rows(labels)
        finite = embeddings.isfinite().all()
        fresh = self.enqueue(embeddings, labels, finite)

        queries = F.normalize(embeddings)
        if queries.is_cuda:
            similarity = queries @ F.normalize(self.bank).T
            same_label = labels[:, None] == self.bank_labels
            bank_rows = torch.arange(len(self.bank), device=labels.device)
            # A pair: any row of the batch with any filled row of the bank but its own fresh copy.
            pairs = (bank_rows < self.filled) & (bank_rows != fresh[:, None])
            positive = pairs & same_label
            negative = pairs & ~same_label
        else:
            # A shortcut of the CPU: go on with the few of these pairs that can cost anything. (On
            # CUDA the host would wait for the indices.)
            row, column = self.choose_pairs(queries, labels, fresh)
            similarity = (queries[row] * F.normalize(self.bank[column])).sum(dim=1)
            positive = labels[row] == self.bank_labels[column]
            negative = ~positive

        distance = (2 - 2 * similarity).clamp(min=1e-12).sqrt()  # sqrt has no gradient at 0
        pos_loss, pos_pairs = mean_of_active(distance - self.pos_margin, positive)
        neg_loss, neg_pairs = mean_of_active(self.neg_margin - distance, negative)
        self.stats = {  # scalars on the device; nothing here may make the host wait for it
            "pos_loss": pos_loss.detach(),
            "neg_loss": neg_loss.detach(),
            "pos_pairs": pos_pairs,
            "neg_pairs": neg_pairs,
        }

        # As in the library, no loss where there is at most one pair of each kind, near or far.
        positives = positive.sum()
        negatives = len(embeddings) * (self.filled - 1) - positives
        loss = (pos_loss + neg_loss) * ((positives > 1) | (negatives > 1))
        # Rows that are not finite would drop out of the means unseen. This makes the loss and every
        # gradient NaN, so that the scaler skips the update, without the host asking.
        return loss + torch.where(finite, 0.0, torch.nan) * embeddings.sum()

    @torch.no_grad()
    def choose_pairs(self, queries, labels, fresh):
        """The pairs that are positive or near: (rows of the batch, rows of the bank).

        Negative pairs with d >= neg_margin cost nothing; d**2 = 2 - 2 * similarity, and 1e-4 is for
        rounding. In place, as the matrices are large.
        """
        similarity = queries @ self.bank.T
        similarity /= self.bank.norm(dim=1).clamp(min=1e-12)
        chosen = similarity > 1 - self.neg_margin**2 / 2 - 1e-4
        del similarity
        chosen |= labels[:, None] == self.bank_labels
        chosen[:, self.filled :] = False
        chosen[torch.arange(len(fresh)), fresh] = False
        return chosen.nonzero(as_tuple=True)

    @torch.no_grad()
    def enqueue(self, embeddings, labels, finite):
        """Overwrite the oldest rows of the bank if `finite`; returns their indices (n,)."""
        size = len(self.bank)
        rows = (self.cursor + torch.arange(len(embeddings), device=labels.device)) % size
        self.bank[rows] = torch.where(finite, embeddings, self.bank[rows])
        self.bank_labels[rows] = torch.where(finite, labels, self.bank_labels[rows])
        added = len(embeddings) * finite
        self.cursor.copy_((self.cursor + added) % size)
        self.filled.add_(added).clamp_(max=size)
        return rows


def mean_of_active(cost, pairs):
    """(mean, number) of the costs above 0 among these pairs; the mean is 0 if there are none."""
    active = pairs & (cost > 0)
    number = active.sum()
    return torch.where(active, cost, 0).sum() / number.clamp(min=1), number


def all_gather_rows(rows):
    """The rows of all ranks in rank order; only this rank's own carry gradient."""
    rank, world_size = get_rank_and_world_size()
    if world_size == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(gathered, rows.detach().contiguous())
    gathered[rank] = rows
    return torch.cat(gathered)


# ---- train ----
def train(args):
    """Train the stage; checkpoints, log.jsonl and source.py go to <output>/train.

    Returns the exit code: 0, or 75 after SIGTERM or SIGUSR1 (then --resume auto goes on). Raises
    InputError where arguments, data, weights or a checkpoint cannot be used.
    """
    folder = Path(args.output, "train")
    device = init_distributed(args.gpu, args.dist_backend, timedelta(minutes=args.timeout))
    rank, world_size = get_rank_and_world_size()
    lock = FolderLock(folder)  # held until this function returns or raises
    seed_generators(args.seed)
    torch.backends.cudnn.benchmark = True  # the fastest kernels, which may differ between runs

    # Network. Without a checkpoint or --weight (so in v83 only) it starts from ImageNet weights,
    # which rank 0 fetches alone: DDP copies its weights to the others.
    checkpoint = find_checkpoint(args.resume, folder, lock.continues)
    from_imagenet = checkpoint is None and not args.weight and not args.no_pretrained
    pretrained = from_imagenet and rank == 0
    model = create_model(args.arch, args.gem_p, args.gem_eval_p, device, pretrained)
    if args.grad_checkpointing:
        enable_grad_checkpointing(model.backbone, args.arch)
    if checkpoint is None and args.weight:
        load_weights(model, read_checkpoint(args.weight), args.weight)

    # Data.
    dataset = TrainDataset(  # v98
        args.data, args.input_size, args.ncrops, args.sample_size, args.seed, args.fast_input
    )
    images_per_step = args.batch_size * dataset.views_per_sample
    steps_per_epoch = len(dataset) // args.batch_size
    check_batch_size(args, len(dataset), images_per_step, world_size)
    files_digest = hash_file_names(dataset.file_lists)
    max_bad_images = count_allowed(args.bad_images, args.max_bad, dataset.file_lists)
    config = model.backbone.default_cfg
    preprocess = Preprocess(config["mean"], config["std"], device)

    # Loss and optimizer. Fused SGD can skip a step on the GPU, without the host waiting to know.
    loss_function = MemoryBankContrastiveLoss(
        args.memory_size, model.fc.out_features, args.pos_margin, args.neg_margin
    ).to(device)
    groups = parameter_groups(model, args.wd)
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, fused=device.type == "cuda")
    fp16 = args.amp == "fp16" and device.type == "cuda"
    scaler = create_scaler(fp16, device)
    # The published runs had W GPUs, each with the loss of all rows but the gradient of its own
    # rows; DDP averaged these, so that the update was 1/W of the full gradient, and --lr was tuned
    # for it. DDP here averages over world_size processes: this makes it 1/W on any number of them.
    loss_scale = world_size / args.reference_world_size

    # Where the run stands.
    progress = Progress(epoch=args.start_epoch)
    log_lines = []
    if checkpoint is not None:
        check_same_run(checkpoint, args, files_digest)
        load_weights(model, checkpoint, checkpoint["path"])
        load_states(checkpoint, optimizer, loss_function, scaler, fp16)
        progress = Progress.from_checkpoint(checkpoint, device)
        log_lines = checkpoint.get("log", [])
    check_equal_on_all_ranks((progress.epoch, progress.step))
    if progress.epoch >= args.epochs:
        if rank == 0:
            print(f"{folder}: nothing is left to train, --epochs is {args.epochs}", file=sys.stderr)
        return 0
    refuse_to_overwrite(folder, args, checkpoint, lock.continues)
    lock.claim()
    del checkpoint  # frees its memory
    initialize_momentum(optimizer, model)
    network = distribute(model, device)  # DDP and SyncBN, if there are several ranks
    batchnorm = BatchNormSnapshot(model)
    logger = Logger(log_lines)
    stop = StopRequest()

    def save(*names):
        content = {
            "epoch": progress.epoch,  # the epoch to go on with
            "step": progress.step,  # steps of it that are done
            "arch": args.arch,
            "state_dict": model.state_dict(prefix="module."),  # as in the published checkpoints
            "optimizer": optimizer.state_dict(),
            "memory_bank": loss_function.state_dict(),
            "scaler": scaler.state_dict() if fp16 else None,
            "args": args,
            "seed": args.seed,
            "batch_size": args.batch_size,
            "files": files_digest,
            "world_size": world_size,
            "versions": library_versions(),
            "skipped_in_a_row": progress.skipped_in_a_row,
            "unlogged": [to_device(values, "cpu") for values in progress.unlogged],
            "bad_images": progress.bad_images,
            "log": logger.lines,
        }
        on_rank_0(write_checkpoint, content, [folder / name for name in names])

    save("last.pth.tar")  # so that a full disk shows now, and an early crash can be resumed
    logger.open(folder / "log.jsonl")
    logger.write(
        {
            "epoch": progress.epoch,
            "step": progress.epoch * steps_per_epoch + progress.step,
            "args": vars(args),
            "device": device_name(device),
            "world_size": world_size,
            "seed": args.seed,
            "batch_size": args.batch_size,
            "files": files_digest,
            "versions": library_versions(),
        }
    )

    for epoch in range(progress.epoch, args.epochs):
        dataset.epoch = epoch
        for group in optimizer.param_groups:  # v98: linear decay, epoch by epoch
            group["lr"] = args.lr * (1 - epoch / args.epochs)
        network.train()
        batches = epoch_batches(args.seed, epoch, len(dataset), args.batch_size)
        # Rank r takes the r-th part of each batch: in rank order, rows stand as in one process.
        own_batches = np.split(batches, world_size, axis=1)[rank]
        loader = start_loader(
            own_batches[progress.step :], partial(load_samples, dataset), args, device
        )
        bar = tqdm(loader, f"epoch {epoch}", len(batches), initial=progress.step, disable=rank > 0)
        logged_step = progress.step
        logged_time = time.perf_counter()

        for step, (batch, unreadable) in enumerate(bar, start=progress.step + 1):
            if batch is None:  # a sample could not be read, nor any other in its place
                raise InputError(unreadable[-1])
            seed_generators(args.seed, epoch, step, rank, device=device)  # for dropout, if any
            images = preprocess(batch.pixels, batch.erasings)
            labels = batch.labels.to(device, non_blocking=True)
            values = train_step(
                network,
                images,
                labels,
                loss_function,
                optimizer,
                scaler,
                batchnorm,
                loss_scale=loss_scale,
                amp=args.amp,
            )
            # Over the whole run; `step` counts within the epoch. Both begin at 1.
            run_step = epoch * steps_per_epoch + step
            progress.step = step
            progress.unlogged.append(values)

            if step % args.log_every == 0 or step == steps_per_epoch:
                summary = progress.summarize(args.max_skipped)
                seconds = time.perf_counter() - logged_time
                logger.write(
                    {
                        "epoch": epoch,
                        "step": run_step,
                        "loss": summary["loss"],
                        "pos_loss": summary["pos_loss"],
                        "neg_loss": summary["neg_loss"],
                        "pos_pairs": summary["pos_pairs"],
                        "neg_pairs": summary["neg_pairs"],
                        "lr": optimizer.param_groups[0]["lr"],
                        "skipped": summary["skipped"],
                        "overflows": summary["overflows"],
                        "images_per_second": (step - logged_step) * images_per_step / seconds,
                    }
                )
                bar.set_postfix(loss=summary["loss"])
                logged_step = step
                logged_time = time.perf_counter()

            stopping, messages = exchange(stop.requested, unreadable)
            for message in messages:
                if message not in progress.bad_images:
                    progress.bad_images.append(message)
                    logger.write({"epoch": epoch, "step": run_step, "bad_image": message})
            check_bad_images(progress.bad_images, max_bad_images)
            if stopping or step % args.checkpoint_every == 0:
                save("last.pth.tar")
            if stopping:
                if rank == 0:
                    place = f"step {step} of epoch {epoch}"
                    print(f"stopped after {place}; --resume auto continues", file=sys.stderr)
                return os.EX_TEMPFAIL

        progress.epoch = epoch + 1
        progress.step = 0
        save(f"checkpoint_{epoch:04d}.pth.tar", "last.pth.tar")
    return 0


def train_step(
    network, images, labels, loss_function, optimizer, scaler, batchnorm, *, loss_scale, amp
):
    """One update, by the gradient of loss_scale * loss.

    Returns scalars on the device by name: the loss, its parts, and "overflow". If a gradient
    overflows in fp16, weights and momentum stay as they were. If the loss is not finite, everything
    does: bank, weights, momentum and BatchNorm's statistics.
    """
    before = batchnorm.read()
    embeddings = embed(network, images, amp)
    after = batchnorm.read()  # gradient checkpointing runs the forward pass again in the backward
    loss = loss_function(embeddings, labels)

    scaler.scale(loss * loss_scale).backward()
    fp16_scale = current_scale(scaler, loss)
    scaler.step(optimizer)  # not if a gradient is not finite
    scaler.update()
    optimizer.zero_grad()

    finite = loss.isfinite()
    batchnorm.write(before, after, finite)
    # The scaler lowers its scale when a gradient is not finite.
    overflow = finite & (current_scale(scaler, loss) < fp16_scale)
    return {"loss": loss.detach(), **loss_function.stats, "overflow": overflow}


# ======== infrastructure: the same text in every stage that has it ========
# Edit it in v83.py; `make sync` copies it to the others.


# ---- arguments ----
class InputError(ValueError):
    """What the user gave cannot be used. main() prints it as one line; the exit code is 2."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and each flag's default."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help
        return f"{action.help} (default: %(default)s)"


def positive_int(text):
    """An argparse type: an integer, 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: must be at least 1")
    return number


def nonnegative_int(text):
    """An argparse type: an integer, 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is too small: must be at least 0")
    return number


def nonnegative_float(text):
    """An argparse type: a finite number, 0 or more."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a finite number, at least 0")
    return number


def positive_float(text):
    """An argparse type: a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a finite number above 0")
    return number


def add_run_arguments(parser):
    """Add the flags that no recipe changes."""
    add = parser.add_argument_group("data").add_argument
    add(
        "data",
        metavar="DATA",
        help="folder of the training images; to extract, the folder that holds all sets",
    )
    add(
        "--bad-images",
        choices=["skip", "error", "zero"],
        help="what to do about unreadable images. skip: use another sample (train; its default). "
        "error: end with a list of them (extract's default). zero: write zeros (extract)",
    )
    add(
        "--max-bad",
        type=nonnegative_float,
        default=0.001,
        help="largest share of the images that skip may skip (a single one it always may)",
    )
    add(
        "--fast-input",
        action="store_true",
        help="resize images that are not augmented faster, to values within 1 of 255",
    )

    add = parser.add_argument_group("run").add_argument
    add("--mode", choices=["train", "extract"], default="train", help="train, or extract")
    add(
        "--weight",
        metavar="FILE",
        help="checkpoint to take the weights from (default in training: the published one of the "
        "stage before; in v83 ImageNet weights)",
    )
    add("--no-pretrained", action="store_true", help="start from random weights")
    add(
        "--resume",
        metavar="FILE",
        help="continue from this checkpoint. auto: from the latest one in --output, or from "
        "scratch where there is none",
    )
    add(
        "--start-over",
        action="store_true",
        help="train: move a run that is further on to replaced-N. extract: discard the unfinished "
        "batches of other settings",
    )
    add("--output", default=str(Path(__file__).with_suffix("")), help="holds train/ and extract/")
    add(
        "--amp",
        choices=["fp16", "bf16", "off"],
        default="fp16",
        help="mixed precision on CUDA; a CPU computes in float32",
    )
    add(
        "--grad-checkpointing",
        action="store_true",
        help="compute activations again in the backward pass: a third of the memory, about 38%% "
        "more time",
    )
    add(
        "-j",
        "--workers",
        type=nonnegative_int,
        default=os.cpu_count(),
        help="data loader workers of this node, divided among its ranks",
    )
    add("--log-every", type=positive_int, default=50, help="steps per line of log.jsonl")
    add(
        "--checkpoint-every",
        type=positive_int,
        default=1000,
        help="steps between two saves of last.pth.tar",
    )
    add(
        "--max-skipped",
        type=positive_int,
        default=10,
        help="how many steps in a row may have a loss that is not finite",
    )

    add = parser.add_argument_group("distributed").add_argument
    add("--multiprocessing-distributed", action="store_true", help="start a process for each GPU")
    add("--world-size", type=positive_int, default=1, help="number of nodes (not of processes)")
    add("--rank", type=nonnegative_int, default=0, help="number of this node")
    add("--dist-url", default="tcp://localhost:10001", help="where node 0 listens")
    add("--dist-backend", default="nccl", help="backend on CUDA; a CPU uses gloo")
    add(
        "--timeout",
        type=positive_int,
        default=10,
        help="minutes after which a silent rank or data loader worker counts as dead",
    )
    add("--gpu", type=nonnegative_int, help="the one GPU to use (default: all, or number 0)")

    add = parser.add_argument_group("extraction").add_argument
    add(
        "--target-set",
        default="qr",
        help="which sets to extract: q for queries, r for references, t for training images",
    )
    add(
        "--phase",
        type=int,
        choices=[1, 2],
        default=1,
        help="take the queries from query_images (1) or query_images_phase2 (2)",
    )
    add(
        "--eval-subset",
        nargs="?",
        const="rids_subset.txt",
        metavar="FILE",
        help="extract only the references whose ids FILE in DATA lists, one a line",
    )
    add("--dryrun", action="store_true", help="extract only the first 100 images of each set")
    add_removed_flags(parser)


class RemovedFlag(argparse.Action):
    """A flag of former versions; its error says what replaces it."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string}: was removed; {self.const}")


def add_removed_flags(parser):
    """Add the flags of former versions, which --help does not show."""
    replacements = {
        "--exact": "the published pipeline is in scripts/dev/published_augmentation.py",
        "--tensorboard": "use scripts/plot_log.py --tensorboard FOLDER",
    }
    hidden = {"nargs": 0, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for name, replacement in replacements.items():
        parser.add_argument(name, action=RemovedFlag, const=replacement, **hidden)


def check_arguments(parser, args):
    """Refuse flags that contradict each other, and complete those that depend on --mode."""
    if args.mode == "train":
        default, other = "skip", "zero"
    else:
        default, other = "error", "skip"
    if args.bad_images is None:
        args.bad_images = default
    if args.bad_images == other:
        parser.error(f"--bad-images {other}: does not go with --mode {args.mode}")
    if args.mode == "extract" and not args.weight:
        parser.error("--mode extract: needs --weight FILE")
    if args.mode == "train" and args.start_over and args.resume == "auto":
        parser.error("--start-over: does not go with --resume auto, which continues what is there")
    if args.rank >= args.world_size:
        parser.error(f"--rank {args.rank}: must be below --world-size {args.world_size}")
    if not re.fullmatch(r"(\w+://)?[^/]+:\d+", args.dist_url):
        parser.error(f"--dist-url {args.dist_url}: must be like tcp://HOST:PORT")


def leaves_weights_open(args):
    """Whether no flag says which weights training starts from."""
    resumes = args.resume not in (None, "auto")
    return args.mode == "train" and not args.weight and not args.no_pretrained and not resumes


# ---- extraction ----
@torch.inference_mode()
def extract(args):
    """Extract descriptors into <output>/extract: fb-isc-submission.h5 of queries and references,
    train_feats.npy of training images.

    Finished batches are kept until the files are written, so that the same command goes on after a
    kill, to byte-identical files. Returns 0; raises InputError where the input cannot be used.
    """
    unlimited = timedelta(days=30)  # the ranks meet at the end
    device = init_distributed(args.gpu, args.dist_backend, unlimited)
    sets = find_sets(args.data, args.target_set, args.phase, args.eval_subset, args.dryrun)
    model = create_model(args.arch, args.gem_p, args.gem_eval_p, device).eval()
    load_weights(model, read_checkpoint(args.weight), args.weight)
    config = model.backbone.default_cfg
    preprocess = Preprocess(config["mean"], config["std"], device)

    folder = Path(args.output, "extract")
    suffix = "-phase2" if args.phase == 2 else ""
    unfinished = folder / f"unfinished{suffix}"
    inputs = describe_inputs(args, sets, device)
    on_rank_0(open_unfinished, unfinished, inputs, args.start_over)
    batches = plan_batches(sets, args.batch_size, unfinished)
    unreadable = compute_missing(batches, model, preprocess, args, device)
    if unreadable and args.bad_images == "error":
        raise InputError(
            f"{len(unreadable)} unreadable images; replace them and run the command again, or "
            f"use --bad-images zero: {'; '.join(unreadable)}"
        )
    if get_rank_and_world_size()[0] == 0:
        write_files(folder, suffix, sets, batches, args.bad_images == "zero")
        shutil.rmtree(unfinished)
    return 0


ID_WIDTH = {"query": 6, "reference": 7}  # bytes, as in DISC21's files; more if ids are longer


class ExtractionBatch(NamedTuple):
    """Images of one set, and the file that their descriptors go to."""

    set_name: str
    paths: np.ndarray
    shard: Path


def find_sets(root, target_set, phase, eval_subset, dryrun):
    """{"query", "reference", "train": sorted paths of images}, of those sets that --target-set
    names.
    """
    root = Path(root)
    if not target_set or set(target_set) - set("qrt"):
        raise InputError(f"--target-set {target_set}: give letters of q, r and t")
    folders = {
        "query": root / ("query_images" if phase == 1 else "query_images_phase2"),
        "reference": root / "reference_images",
        "train": root / "training_images",
    }
    sets = {name: list_images(path) for name, path in folders.items() if name[0] in target_set}
    if eval_subset and "reference" in sets:
        sets["reference"] = restrict_to_subset(sets["reference"], root / eval_subset)
    for name, paths in sets.items():
        if len({Path(path).stem for path in paths}) < len(paths):
            raise InputError(
                f"{folders[name]}: has images whose names differ in their suffix alone; rename "
                f"one of each"
            )
        if dryrun:
            sets[name] = paths[:100]
    return sets


def restrict_to_subset(paths, subset):
    """The paths of the images whose ids the text file `subset` lists, one a line."""
    wanted = set(subset.read_text(errors="replace").split())
    found = np.array([path for path in paths if Path(path).stem in wanted])
    if not wanted or len(found) < len(wanted):
        raise InputError(
            f"{subset}: must list ids of images in {Path(paths[0]).parent}, one a line"
        )
    return found


def describe_inputs(args, sets, device):
    """What the descriptors depend on, by the names of flags: what open_unfinished compares."""
    with Path(args.weight).open("rb") as file:
        weight = hashlib.file_digest(file, "sha256").hexdigest()
    counts = [f"{len(paths)} {name} images" for name, paths in sets.items()]
    return {
        "SHA-256 of --weight": weight,
        "DATA": os.path.realpath(args.data),
        "the number of images": ", ".join(counts),
        "SHA-256 of their names": hash_file_names(sets.values()),
        "--target-set": args.target_set,
        "--phase": args.phase,
        "--eval-subset": args.eval_subset,
        "--dryrun": args.dryrun,
        "--arch": args.arch,
        "--input-size": args.input_size,
        "--gem-eval-p": args.gem_eval_p,
        "--batch-size": args.batch_size,
        "--fast-input": args.fast_input,
        "--amp": args.amp,
        "the device": device.type,
        "the libraries": library_versions(),
    }


def open_unfinished(folder, inputs, start_over):
    """Make the folder for finished batches, or continue it where it is of the same inputs."""
    path = folder / "inputs.json"
    if start_over:
        shutil.rmtree(folder, ignore_errors=True)
    former = read_inputs(path)
    if former:
        changed = [name for name in inputs if inputs[name] != former.get(name)]
        if changed:
            changes = [f"{name} is {inputs[name]}, was {former.get(name)}" for name in changed]
            raise InputError(
                f"{folder}: the unfinished run has different settings: {'; '.join(changes)}; "
                "use those again, or discard it with --start-over"
            )
    elif any(folder.rglob("*.npz")):  # of a former version, or of a run killed while removing them
        print(f"{folder}: is of unknown settings, and computed again", file=sys.stderr)
        shutil.rmtree(folder)
    content = json.dumps(inputs, indent=1).encode()
    save_atomically(path, lambda unfinished: unfinished.write_bytes(content), len(content))


def read_inputs(path):
    """The inputs of an unfinished extraction, or {} where the file is missing or damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        return {}


def plan_batches(sets, batch_size, unfinished):
    """The list of ExtractionBatch, set by set, in the order of the paths."""
    batches = []
    for name, paths in sets.items():
        for start in range(0, len(paths), batch_size):
            shard = unfinished / f"{name}-{start:07d}.npz"
            batches.append(ExtractionBatch(name, paths[start : start + batch_size], shard))
    return batches


def is_missing(batch):
    """Whether a batch is to be computed: also if an image was unreadable, which may be replaced."""
    rows = read_shard(batch)
    return rows is None or not rows.any(axis=1).all()


def compute_missing(batches, model, preprocess, args, device):
    """Write the shards that are not there, each rank its share; returns messages on unreadable
    images.

    Such an image has a row of zeros.
    """
    rank, world_size = get_rank_and_world_size()
    numbers = on_rank_0(lambda: [i for i, batch in enumerate(batches) if is_missing(batch)])
    own_batches = [batches[i] for i in numbers[rank::world_size]]
    load = partial(load_images, input_size=args.input_size, fast_input=args.fast_input)
    loader = start_loader([batch.paths for batch in own_batches], load, args, device)
    own_messages = []
    bar = tqdm(loader, "extract", len(own_batches), unit="batch", disable=rank > 0)
    for batch, (pixels, unreadable) in zip(own_batches, bar, strict=True):
        rows = embed(model, preprocess(pixels), args.amp).float().cpu().numpy()
        rows[list(unreadable)] = 0
        write_shard(batch, rows)
        own_messages += unreadable.values()
    messages = []
    for part in all_gather_objects(own_messages):
        messages += part
    return messages


def write_shard(batch, rows):
    """Write the descriptors (n, 256) of a batch, with zip's checksum."""
    try:
        np.savez(batch.shard, rows=rows)
    except OSError as error:
        raise InputError(
            f"{batch.shard}: cannot be written ({error}); make room and run again"
        ) from error


def read_shard(batch):
    """The descriptors of a batch, float32 (n, 256), or None where they are not there or damaged."""
    try:
        with np.load(batch.shard) as file:
            rows = file["rows"]
    except Exception:  # file system, zip and numpy each fail in their own way
        return None
    if rows.shape != (len(batch.paths), 256) or rows.dtype != np.float32:
        return None
    return rows


def read_set(batches):
    """The descriptors of a set, float32 (n, 256), from its batches in their order."""
    descriptors = np.empty((sum(len(batch.paths) for batch in batches), 256), np.float32)
    start = 0
    for batch in batches:
        rows = read_shard(batch)
        if rows is None:
            raise InputError(
                f"{batch.shard}: is missing or damaged; run the command again, "
                "with --output on a disk that all nodes share"
            )
        descriptors[start : start + len(rows)] = rows
        start += len(rows)
    return descriptors


def write_files(folder, suffix, sets, batches, list_zero_rows):
    """Write the h5 of queries and references, the npy of training images, and zero-rows.txt.

    list_zero_rows: whether to write the latter, the ids of the unreadable images.
    """
    ids = {}
    for name, paths in sets.items():
        ids[name] = [Path(path).stem.encode(errors="backslashreplace") for path in paths]
    submitted = [name for name in ("query", "reference") if name in sets]
    zero_ids = []

    def read(name):
        descriptors = read_set([batch for batch in batches if batch.set_name == name])
        for row in np.flatnonzero(~descriptors.any(axis=1)):
            zero_ids.append(ids[name][row])
        return descriptors

    def write_h5(path):
        try:
            with h5py.File(path, "w") as file:
                for name in submitted:
                    width = max(ID_WIDTH[name], *map(len, ids[name]))
                    file[name] = read(name)
                    file[f"{name}_ids"] = np.array(ids[name], f"S{width}")
        except RuntimeError as error:  # HDF5 cannot close the file where the disk is full
            raise OSError(str(error)) from error

    if submitted:
        rows = sum(len(sets[name]) for name in submitted)
        size = 2**16 + 1280 * rows  # 1,024 bytes a descriptor; the rest is for ids and HDF5
        save_atomically(folder / f"fb-isc-submission{suffix}.h5", write_h5, size)
    if "train" in sets:
        size = 128 + 1024 * len(sets["train"])  # header and descriptors
        save_atomically(folder / "train_feats.npy", lambda path: np.save(path, read("train")), size)
    sidecar = folder / f"zero-rows{suffix}.txt"
    sidecar.unlink(missing_ok=True)
    if list_zero_rows:
        content = b"".join(id_ + b"\n" for id_ in zero_ids)
        save_atomically(sidecar, lambda path: path.write_bytes(content), len(content))


# ---- augmentation operations ----
# Each takes and returns pixels, uint8 (h, w, 3). Those that approximate Pillow's or AugLy's values
# say by how much; scripts/dev/published_augmentation.py has the originals, for tests and benchmark.
# An operation that one stage alone has belongs above its hard_view.
EDGE_FILTERS = (ImageFilter.EDGE_ENHANCE, ImageFilter.EDGE_ENHANCE_MORE)
EMOJIS = sorted(str(path) for path in Path(SMILEY_EMOJI_DIR).iterdir())
# As published, without TypeMyMusic; PainttheSky-Regular is missing from AugLy's wheel anyway.
FONTS = sorted(
    str(path) for path in Path(FONTS_DIR).glob("*.ttf") if "TypeMyMusic" not in str(path)
)
JPEG_QUALITIES = (10, 20, 30, 50)
ROUND_DOWN = -0.499  # Pillow cuts off where OpenCV rounds


def through_pillow(operation, pixels):
    """Apply an operation on PIL images."""
    return np.array(operation(Image.fromarray(pixels)))


def to_array(image):
    """A PIL image of any mode as pixels; pixels as they are."""
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    return image


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's, with the same draws, within 1 of Pillow's values (a few within 2)."""

    def forward(self, pixels):
        top, left, height, width = self.get_params(as_tensor(pixels), self.scale, self.ratio)
        crop = pixels[top : top + height, left : left + width]
        return resize(np.ascontiguousarray(crop), self.size)


class ColorJitter(transforms.ColorJitter):
    """torchvision's, with the same draws, by OpenCV; all four ranges must be given.

    Of 1,000 values one is off by 1; by a change of hue, two of 5, by up to 13, which a change of
    contrast or saturation after it can enlarge.
    """

    def forward(self, pixels):
        order, brightness, contrast, saturation, hue = self.get_params(
            self.brightness, self.contrast, self.saturation, self.hue
        )
        for operation in order.tolist():
            if operation == 0:
                pixels = blend_with_constant(pixels, brightness, 0)
            elif operation == 1:
                mean = round(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0])
                pixels = blend_with_constant(pixels, contrast, mean)
            elif operation == 2:
                gray = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
                pixels = cv2.addWeighted(pixels, saturation, gray, 1 - saturation, ROUND_DOWN)
            else:
                hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
                hsv[..., 0] += np.uint8(int(hue * 255) % 256)
                pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
        return pixels


def blend_with_constant(pixels, factor, constant):
    """factor * pixels + (1 - factor) * constant, in 0 to 255."""
    return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * constant + ROUND_DOWN)


def pixelize(pixels):
    """AugLy's, of a ratio in 0.1 to 1."""
    ratio = random.uniform(0.1, 1.0)
    return through_pillow(partial(imaugs.pixelization, ratio=ratio), pixels)


def encode_as_jpeg(pixels):
    """AugLy's, of one of JPEG_QUALITIES."""
    quality = random.choice(JPEG_QUALITIES)
    return through_pillow(partial(imaugs.encoding_quality, quality=quality), pixels)


def to_grayscale(pixels):
    """Pillow's gray, in three channels."""
    return through_pillow(transforms.Grayscale(3), pixels)


def horizontal_flip(pixels):
    """Mirror left and right."""
    return cv2.flip(pixels, 1)


def vertical_flip(pixels):
    """Mirror top and bottom."""
    return cv2.flip(pixels, 0)


def blur(pixels):
    """Blur by a Gaussian with a radius of 0 to 10 pixels."""
    return gaussian_blur(pixels, random.uniform(0, 10))


def gaussian_blur(pixels, radius):
    """Pillow's GaussianBlur of this radius (standard deviation), by OpenCV: off by 3 at most.

    Three extended box blurs (Gwosdek et al. 2011, as in Pillow's BoxBlur.c): a box of weights 1 has
    a fraction at either end, so that the three together have the variance of the Gaussian.
    """
    variance = radius**2 / 3  # of one box
    box_radius = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    edge_weight = (2 * box_radius + 1) * (box_radius * (box_radius + 1) - 3 * variance)
    edge_weight /= 6 * (variance - (box_radius + 1) ** 2)
    box = np.ones(2 * box_radius + 3)
    box[0] = edge_weight
    box[-1] = edge_weight
    box /= box.sum()
    for _ in range(3):
        pixels = cv2.sepFilter2D(pixels, -1, box, box, borderType=cv2.BORDER_REPLICATE)
    return pixels


class RandomPerspective(transforms.RandomPerspective):
    """torchvision's, with the same draws, by OpenCV: within 1, but for pixels of the outline."""

    def forward(self, pixels):
        if torch.rand(1) >= self.p:
            return pixels
        height, width = pixels.shape[:2]
        start, end = self.get_params(width, height, self.distortion_scale)
        # In a frame of one pixel, so that the border does not fade into the black around it.
        framed = cv2.copyMakeBorder(pixels, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
        inside = np.pad(np.ones((height, width), np.uint8), 1)
        matrix = cv2.getPerspectiveTransform(np.float32(end) - 0.5, np.float32(start) + 0.5)
        warp = partial(cv2.warpPerspective, M=matrix, dsize=(width, height))
        mask = warp(inside, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
        warped = warp(framed, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        return cv2.copyTo(warped, mask)


class RandomErasing(transforms.RandomErasing):
    """torchvision's draws of whether and where. The noise is drawn on the device, by a seed.

    Takes pixels and returns a View.
    """

    def forward(self, pixels):
        if torch.rand(1) >= self.p:
            return View(pixels)
        top, left, height, width, _ = self.get_params(
            as_tensor(pixels), self.scale, self.ratio, value=[0.0]
        )
        if (height, width) == pixels.shape[:2]:  # torchvision has found no box: nothing is erased
            return View(pixels)
        return View(pixels, Erasing(top, left, height, width, random.getrandbits(63)))


def rotate_randomly(pixels):
    """Rotate by 0 to 180 degrees."""
    return rotate(pixels, random.uniform(0, 180))


def rotate(pixels, degrees):
    """AugLy's rotation, counter-clockwise, to the largest upright rectangle inside; by OpenCV.

    One of 200 pixels is another neighbor. An image too thin for such a rectangle stays as it is.
    """
    height, width = pixels.shape[:2]
    kept_size = np.array(rotated_rect_with_max_area(width, height, degrees))
    if kept_size.min() < 2:
        return pixels
    if degrees == 90:  # Pillow turns by whole pixels
        return through_pillow(partial(imaugs.rotate, degrees=degrees), pixels)
    cosine = math.cos(math.radians(degrees))
    sine = math.sin(math.radians(degrees))
    inverse = np.round([[cosine, -sine], [sine, cosine]], 15)  # from the output back to the input
    center = np.array([width, height]) / 2
    # Pillow rotates onto a canvas that holds the whole image, of which AugLy keeps the middle.
    reach = abs(inverse) @ center  # from the center to the sides of the canvas
    canvas_center = (np.ceil(center + reach) - np.floor(center - reach)) / 2
    start = (canvas_center - kept_size / 2).astype(int)
    stop = (canvas_center + kept_size / 2).astype(int)
    # Maps pixel centers of the output, which begins at `start`, to those of the input.
    offset = inverse @ (start + 0.5 - canvas_center) + center - 0.5
    matrix = np.column_stack([inverse, offset])
    size = (stop - start).tolist()
    return cv2.warpAffine(pixels, matrix, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)


class OverlayAndCrop:
    """RandomResizedCrop; or, with probability overlay_p, another image over or under this one
    first.

    overlay_paths: of the other images; opacity: range of the overlay's; overlay_size: range of its
    height, as a share of the background's; scale, scale_after_overlay: of RandomResizedCrop.
    """

    def __init__(
        self,
        input_size,
        overlay_paths,
        overlay_p,
        opacity,
        overlay_size,
        scale,
        scale_after_overlay,
    ):
        self.overlay_paths = overlay_paths
        self.overlay_p = overlay_p
        self.opacity = opacity
        self.overlay_size = overlay_size
        self.crop = RandomResizedCrop(input_size, scale)
        self.crop_after_overlay = RandomResizedCrop(input_size, scale_after_overlay)

    def __call__(self, pixels):
        if random.random() > self.overlay_p:
            return self.crop(pixels)
        pair = [pixels, read_pixels(random.choice(self.overlay_paths))]
        random.shuffle(pair)
        background, overlay = pair
        size = random.uniform(*self.overlay_size)
        opacity = random.uniform(*self.opacity)
        x = random.uniform(0, 1 - size)
        y = random.uniform(0, 1 - size)
        return self.crop_after_overlay(overlay_image(background, overlay, opacity, size, x, y))


def overlay_image(background, overlay, opacity, overlay_size, x_pos, y_pos):
    """AugLy's overlay, without its way through RGBA: within 2.

    Where one of the two is so thin that the overlay would have no pixels, the background.
    """
    height = int(len(background) * overlay_size)
    width = overlay.shape[1] * height // len(overlay)
    if not 0 < width * height < MAX_PIXELS // 4:
        return background
    merged = background.copy()
    top = int(background.shape[0] * y_pos)
    left = int(background.shape[1] * x_pos)
    covered = merged[top : top + height, left : left + width]  # clipped at the border
    resized = resize(overlay, [height, width], Image.BICUBIC)
    visible = resized[: covered.shape[0], : covered.shape[1]]
    opacity = int(255 * opacity) / 255
    covered[:] = cv2.addWeighted(covered, 1 - opacity, visible, opacity, 0)
    return merged


def enhance_edges(pixels):
    """One of Pillow's EDGE_FILTERS, by OpenCV, to the same values; the border stays as it is."""
    size, scale, _, weights = random.choice(EDGE_FILTERS).filterargs
    kernel = np.reshape(weights, size) / scale
    filtered = cv2.filter2D(pixels, -1, kernel, delta=0.001)  # Pillow rounds halves up
    enhanced = pixels.copy()
    enhanced[1:-1, 1:-1] = filtered[1:-1, 1:-1]
    return enhanced


def shuffle_pixels(pixels):
    """Shuffle a tenth of the pixels. (AugLy's transform has one seed, hence one fixed pattern.)"""
    rng = np.random.default_rng(random.getrandbits(32))
    flat = pixels.reshape(-1, 3).copy()
    chosen = rng.choice(len(flat), len(flat) // 10, replace=False)
    flat[chosen] = flat.take(rng.permutation(chosen), axis=0)
    return flat.reshape(pixels.shape)


def overlay_text(pixels):
    """Write one or two lines of random glyphs, as AugLy's overlay_text places and colors them."""
    image = Image.fromarray(pixels)
    font_path = random.choice(FONTS)
    font_size = random.uniform(0.1, 0.3)  # of the image
    color = tuple(random.choices(range(256), k=3))
    x = random.uniform(0, 0.5)
    y = random.uniform(0, 0.5)
    font = ImageFont.truetype(font_path, int(min(image.size) * font_size))
    draw = ImageDraw.Draw(image)
    for line in range(random.randint(1, 2)):
        text = "".join(random.choices(glyphs(font_path), k=random.randint(5, 9)))
        place = (x * image.width, (y + line * font_size) * image.height)
        try:
            draw.text(place, text, color, font)
        except (OSError, RuntimeError):
            return pixels  # the font cannot lay out a glyph
    return np.array(image)


@cache
def glyphs(font_path):
    """The characters that AugLy draws from for a font, as one string.

    AugLy keeps them beside the font as a pickle of numbers; its opcodes are read, not run.
    """
    opcodes = pickletools.genops(Path(font_path).with_suffix(".pkl").read_bytes())
    return "".join(chr(value) for code, value, _ in opcodes if code.name.startswith("BININT"))


def overlay_emoji(pixels):
    """Paste a random smiley at a random place, with a height of 0.1 to 0.3 of the image's."""
    image = Image.fromarray(pixels)
    path = random.choice(EMOJIS)
    side = int(image.height * random.uniform(0.1, 0.3))
    x = random.uniform(0, 1)
    y = random.uniform(0, 1)
    emoji = Image.open(path).resize((side, side)).convert("RGBA")
    image.paste(emoji, (int(image.width * x), int(image.height * y)), emoji)
    return np.array(image)


def hard_augmentation(input_size, mean, std, overlay_paths):
    """hard_view, erased and normalized on the CPU, for scripts/ and tests.

    A callable from a PIL image, or uint8 (h, w, 3), to float32 (3, input_size, input_size).
    """
    preprocess = Preprocess(mean, std)
    return transforms.Compose([hard_view(input_size, overlay_paths), preprocess.one])


def moderate_augmentation(input_size, mean, std):
    """The same of moderate_view."""
    preprocess = Preprocess(mean, std)
    return transforms.Compose([moderate_view(input_size), preprocess.one])


# ---- images ----
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 100_000_000  # a file that claims more is a decompression bomb


def list_images(folder):
    """Sorted paths of the images in `folder`, as an array of strings (which data loader workers
    share without copying). Hidden files are left out. Raises InputError where there is none."""
    folder = Path(folder)
    if folder.name == "training_images" and not folder.exists():
        folder = folder.with_name("train_images")  # DISC21's own name for it
    paths = []
    if folder.is_dir():
        for entry in os.scandir(folder):
            name = entry.name.lower()
            if name.endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                paths.append(entry.path)
    if not paths:
        raise InputError(
            f"{folder}: is no folder of images; see input/README.md for what belongs where"
        )
    return np.array(sorted(paths))


def open_image(path):
    """The (first) image of a file, as a PIL image in mode RGB; EXIF's orientation is not applied.

    Raises InputError where the file cannot be read as an image.
    """
    try:
        return open_checked(path).convert("RGB")
    except Exception as error:  # file system, formats and decoders each fail in their own way
        raise unreadable(path, error) from error


def read_pixels(path):
    """The same as open_image, as uint8 (h, w, 3). simplejpeg decodes JPEGs to Pillow's values,
    sooner.
    """
    try:
        image = open_checked(path)
        if (image.format, image.mode) == ("JPEG", "RGB"):
            with suppress(ValueError):  # a flaw, of which Pillow is the judge
                return simplejpeg.decode_jpeg(np.memmap(path, np.uint8, "r"))
        return np.array(image.convert("RGB"))
    except Exception as error:
        raise unreadable(path, error) from error


def unreadable(path, error):
    """The InputError about an image."""
    return InputError(f"{path}: cannot be read as an image ({error})")


def open_checked(path):
    """The opened PIL image, not yet decoded. Raises where decoding would be unsafe or wrong."""
    if not Path(path).is_file():  # opening a pipe would wait for ever
        raise OSError("there is no such file")
    image = Image.open(str(path), formats=IMAGE_FORMATS)
    tags = getattr(image, "tag_v2", {})
    tile_pixels = tags.get(322, 0) * tags.get(323, 0)  # of a TIFF: may be larger than the image
    if max(image.width * image.height, tile_pixels) > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{size}, more than {MAX_PIXELS} to decode")
    if image.mode in ("I", "F"):  # convert() would make most of them black or white
        raise ValueError("32 bits a pixel, of which no range is given; convert it to 8 or 16")
    if image.mode.startswith("I;16"):  # convert() would clip to 8 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def as_tensor(pixels):
    """Pixels (h, w, 3) as a tensor (3, h, w) that shares their memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize(pixels, size, interpolation=Image.BILINEAR):
    """Resize to (height, width) by torchvision, with antialiasing: within 1 of Pillow's values, as
    a rule (2 if bicubic)."""
    resized = v2.resize(as_tensor(pixels), size, interpolation)
    return resized.permute(1, 2, 0).numpy()


def read_resized(path, input_size, fast_input):
    """An image under the plain evaluation transform, before normalization: uint8 (size, size, 3).

    Pillow resizes, or, if `fast_input`, torchvision, to values within 1 of Pillow's.
    """
    if fast_input:
        return resize(read_pixels(path), [input_size, input_size])
    return np.array(open_image(path).resize((input_size, input_size), Image.BILINEAR))


def evaluation_transform(input_size, mean, std):
    """Resize to a square and normalize, for hubconf.py and scripts/.

    A callable from a PIL image in mode RGB to float32 (3, input_size, input_size).
    """
    preprocess = Preprocess(mean, std)

    def transform(image):
        resized = image.resize((input_size, input_size), Image.BILINEAR)
        return preprocess.one(View(np.array(resized)))

    return transform


class Erasing(NamedTuple):
    """A box of a view that noise shall fill, and the seed of the noise."""

    top: int
    left: int
    height: int
    width: int
    seed: int


class View(NamedTuple):
    """What a data loader worker makes of an image: uint8 (h, w, 3), and what is to be erased."""

    pixels: np.ndarray
    erasing: Erasing | None = None


class Preprocess:
    """ToTensor, RandomErasing and Normalize of batches, on the device.

    So data loader workers send uint8, a quarter of the bytes. Noise comes from a generator seeded
    for each image, so that it does not depend on the number of processes.
    """

    def __init__(self, mean, std, device="cpu"):
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def __call__(self, pixels, erasings=()):
        """uint8 (n, h, w, 3) and pairs (row, Erasing) -> float32 (n, 3, h, w), in channels-last."""
        device = self.mean.device
        images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
        for row, (top, left, height, width, seed) in erasings:
            generator = torch.Generator(device).manual_seed(seed)
            noise = torch.randn(3, height, width, generator=generator, device=device)
            images[row, :, top : top + height, left : left + width] = noise
        return images.sub_(self.mean).div_(self.std)

    def one(self, view):
        """The same of one View -> float32 (3, h, w)."""
        erasings = [] if view.erasing is None else [(0, view.erasing)]
        return self(torch.from_numpy(view.pixels)[None], erasings)[0].contiguous()


# ---- data loading ----
class Batch(NamedTuple):
    """Views of several samples: uint8 (n, h, w, 3), pairs (row, Erasing), and labels (n,)."""

    pixels: torch.Tensor
    erasings: list
    labels: torch.Tensor


def collate(samples):
    """The Batch of samples, each a list of Views and the list of their labels."""
    pixels, erasings, labels = [], [], []
    for views, sample_labels in samples:
        for view in views:
            if view.erasing is not None:
                erasings.append((len(pixels), view.erasing))
            pixels.append(torch.from_numpy(view.pixels))
        labels += sample_labels
    return Batch(torch.stack(pixels), erasings, torch.tensor(labels))


def load_samples(dataset, indices):
    """(Batch of these samples, messages about unreadable images).

    The Batch is None if a sample is unreadable and no substitute can be read.
    """
    samples, messages = [], []
    for index in indices:
        sample, message = load_sample(dataset, index)
        samples.append(sample)
        if message is not None:
            messages.append(message)
    if any(sample is None for sample in samples):
        return None, messages
    return collate(samples), messages


def load_sample(dataset, index):
    """(sample `index`, None); if it is unreadable, (a substitute or None, the error message).

    Which substitute depends on the index alone, so every process and every rerun takes the same.
    """
    try:
        return dataset[index], None
    except InputError as error:
        message = str(error)
    for other in np.random.default_rng(index).integers(len(dataset), size=100).tolist():
        with suppress(InputError):
            return dataset[other], message
    return None, message


def load_images(paths, input_size, fast_input):
    """(uint8 (n, size, size, 3), {position: error message} of the unreadable images, all black)."""
    images, messages = [], {}
    for position, path in enumerate(paths):
        try:
            image = read_resized(path, input_size, fast_input)
        except InputError as error:
            messages[position] = str(error)
            image = np.zeros((input_size, input_size, 3), np.uint8)
        images.append(torch.from_numpy(image))
    return torch.stack(images), messages


def epoch_batches(seed, epoch, length, batch_size):
    """The order of samples in an epoch, (steps, batch_size); what does not fill a batch is left
    out.
    """
    order = np.random.default_rng((seed, epoch)).permutation(length)
    steps = length // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def start_loader(items, load, args, device):
    """Iterate over load(item), computed ahead by this rank's share of the data loader workers."""
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = math.ceil(args.workers / ranks_of_node)
    loader = DataLoader(
        items,
        batch_size=None,
        collate_fn=load,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        timeout=60 * args.timeout if workers else 0,
    )
    # The workers inherit this block, so that a signal to the whole process group stops the ranks
    # alone, which finish their step first.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    iterator = iter(loader)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if len(multiprocessing.active_children()) < workers:  # torch would notice after the timeout
        raise RuntimeError("a data loader worker died when it started")
    return receive_batches(iterator)


def receive_batches(iterator):
    """Iterate over the batches of a DataLoader's iterator, and name a worker that dies.

    torch does so itself, unless the worker is killed while it hands over a tensor and the system
    does not count it as ended yet.
    """
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:
        raise RuntimeError("a DataLoader worker died while it handed over a batch") from error


def kill_workers():
    """At exit, end the data loader workers that an error has left behind.

    multiprocessing would send them SIGTERM, which they block, and wait for them for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch would report them as dead
    for process in multiprocessing.active_children():
        process.kill()


def seed_generators(*key, device=None):
    """Seed Python's, NumPy's and torch's generators from integers, and that of a CUDA device, if
    given.

    torch's own manual_seed would seed every CUDA device too, which data loader workers do not use.
    """
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # noqa: NPY002  AugLy draws from it
    torch.default_generator.manual_seed(seeds[2])
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seeds[2])


def count_allowed(policy, share, file_lists):
    """How many images may be unreadable: one always, if they are skipped."""
    if policy != "skip":
        return 0
    return max(1, int(share * sum(len(paths) for paths in file_lists)))


def check_bad_images(messages, allowed):
    """Raise InputError where more images are unreadable than allowed."""
    if len(messages) > allowed:
        listed = "; ".join(messages[:10])
        raise InputError(f"{len(messages)} unreadable images, --max-bad: {listed}")


# ---- network ----
def create_model(arch, gem_p, gem_eval_p, device, pretrained=False):
    """The ISCNet with a backbone of timm on the device, in channels-last.

    Raises InputError where timm cannot make the backbone, or not fetch its ImageNet weights.
    """
    try:
        backbone = timm.create_model(arch, features_only=True, pretrained=pretrained)
    except Exception as error:  # registry, hub, network and cache each fail in their own way
        problem = "has no such backbone"
        if pretrained:
            problem = "cannot fetch its weights, give --weight or --no-pretrained"
        raise InputError(f"{arch}: timm {problem} ({type(error).__name__})") from error
    for module in backbone.modules():
        if isinstance(module, torch.nn.SiLU):
            module.inplace = False  # in place, autograd would copy its input: 6% more traffic
    model = ISCNet(backbone, p=gem_p, eval_p=gem_eval_p)
    return model.to(device, memory_format=torch.channels_last)


def enable_grad_checkpointing(backbone, arch):
    """Have the backbone compute activations again in the backward pass, not keep them."""
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # not there, or not supported
        raise InputError(
            f"--grad-checkpointing: timm cannot do it for {arch}; leave the flag out"
        ) from error


def embed(network, images, amp):
    """Descriptors (n, 256) of images (n, 3, size, size); on CUDA in the precision of --amp."""
    dtype = torch.bfloat16 if amp == "bf16" else torch.float16
    enabled = images.is_cuda and amp != "off"
    with torch.autocast(images.device.type, dtype, enabled=enabled):
        return network(images)


class BatchNormSnapshot:
    """Reads and writes a network's buffers, which are BatchNorm's running statistics and counters.

    A skipped step must leave no trace in them. And with gradient checkpointing, the backward pass
    runs the forward pass again in parts, which updates them a second time.
    """

    def __init__(self, model):
        buffers = list(model.buffers())
        # One vector for each dtype: a few kernels a step where each buffer alone would be hundreds.
        self.groups = [
            [buffer for buffer in buffers if buffer.dtype == dtype]
            for dtype in sorted({buffer.dtype for buffer in buffers}, key=str)
        ]

    def read(self):
        """A copy of the statistics: a vector for each dtype."""
        return [torch.cat([buffer.flatten() for buffer in group]) for group in self.groups]

    def write(self, before, after, finite):
        """Write what the forward pass left or, if the step is skipped, what was there before."""
        for group, old, new in zip(self.groups, before, after, strict=True):
            chosen = torch.where(finite, new, old)
            parts = chosen.split([buffer.numel() for buffer in group])
            shaped = [part.view_as(buffer) for part, buffer in zip(parts, group, strict=True)]
            torch._foreach_copy_(group, shaped)  # one kernel, as torch's own optimizers use it


def create_scaler(fp16, device):
    """The GradScaler. With fp16 it scales the loss, so that small gradients do not vanish.

    Without fp16 it is there because it skips updates whose gradients are not finite (which
    enabled=False would not). Its factors must differ from 1; these leave a float32 scale at 1.
    """
    if fp16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(
        device.type, init_scale=1.0, growth_factor=1 + 1e-9, backoff_factor=1 - 1e-9
    )


def current_scale(scaler, like):
    """The scale of a GradScaler, on the device of `like`. (get_scale() makes the host wait.)"""
    return scaler.scale(torch.ones_like(like))


def parameter_groups(model, weight_decay):
    """SGD's groups, as published: vectors, biases and gains have no weight decay."""
    no_decay, decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or name.endswith(".bias") or "gain" in name:
            no_decay.append(parameter)
        else:
            decay.append(parameter)
    return [
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": weight_decay},
    ]


def initialize_momentum(optimizer, model):
    """Create the momentum buffers, in the memory layout of their parameters; keep loaded values.

    Fused SGD (torch 2.15) never initializes a buffer whose first step is skipped, and needs that
    layout, which published checkpoints lack.
    """
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        momentum = torch.zeros_like(parameter)
        if "momentum_buffer" in state:
            momentum.copy_(state["momentum_buffer"])
        state["momentum_buffer"] = momentum


# ---- distributed ----
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def get_rank_and_world_size():
    """(rank, world size) of this process; (0, 1) where it is the only one."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def init_distributed(gpu, backend, timeout):
    """Join the process group that torchrun's environment describes, if any; returns the device.

    gpu: number of the one to use, or None; backend: of CUDA tensors; timeout: timedelta after which
    a silent rank counts as dead.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", gpu or 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        store, rank, world_size = rendezvous_with_fresh_keys(timeout)
        # gloo for what the ranks all-gather, which need not wait for the GPU.
        backend = f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=rank, world_size=world_size
        )
    rank, world_size = get_rank_and_world_size()
    if rank == 0:
        print(f"{Path(__file__).name}: {world_size} x {device_name(device)}", file=sys.stderr)
    return device


def rendezvous_with_fresh_keys(timeout):
    """(store, rank, world size) from torchrun's environment.

    After a restart, the store of torchrun (2.15, one node) still holds the addresses of the failed
    attempt's processes; a prefix for each attempt hides them. With several nodes, set the
    environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/FAULTS.md).
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return store, rank, world_size


def device_name(device):
    """What the log says of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def distribute(model, device):
    """The network that training calls: under DDP where there are several ranks, with SyncBN on
    CUDA.

    On a CPU each rank has BatchNorm statistics of its own; rank 0's are saved.
    """
    if get_rank_and_world_size()[1] == 1:
        return model
    if device.type == "cuda":  # torch's own converter drops the activation of timm's BatchNormAct2d
        timm.layers.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def all_gather_objects(value):
    """The values of all ranks, in rank order."""
    world_size = get_rank_and_world_size()[1]
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_0(function, *arguments):
    """Call a function on rank 0 alone; every rank gets its result, or its error as InputError."""
    result, message = None, None
    if get_rank_and_world_size()[0] == 0:
        try:
            result = function(*arguments)
        except (InputError, OSError) as error:
            message = str(error)
    result, message = all_gather_objects((result, message))[0]
    if message is not None:
        raise InputError(message)
    return result


def exchange(stop_requested, unreadable):
    """What the ranks all-gather after a step: whether any shall stop, and the sorted messages
    of all about unreadable images."""
    stopping = False
    messages = set()
    for requested, found in all_gather_objects((stop_requested, unreadable)):
        stopping = stopping or requested
        messages.update(found)
    return stopping, sorted(messages)


def hash_file_names(file_lists):
    """SHA-256 of the file names, whose positions are the labels. Raises InputError where ranks
    differ.
    """
    names = "\n".join(Path(path).name for paths in file_lists for path in paths)
    digest = hashlib.sha256(os.fsencode(names)).hexdigest()
    if len(set(all_gather_objects(digest))) > 1:
        raise InputError("the ranks found different files; give every node the same data")
    return digest


class StopRequest:
    """Notes SIGTERM and SIGUSR1, so that all ranks can finish the step and save."""

    def __init__(self):
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.requested = True


class FolderLock:
    """Lets one run at a time train in a folder, by a lock on its file `lock` that rank 0 holds.

    The lock ends with this object; the kernel releases it at any death. (lockf, not flock: data
    loader workers would inherit that.) `continues`: whether torchrun has restarted this run after a
    failure, so that the checkpoints in the folder are its own. Raises InputError where another
    process holds the lock; a file system without locks is a warning.
    """

    def __init__(self, folder):
        self.continues = on_rank_0(self.acquire, folder)

    def acquire(self, folder):
        """Take the lock; returns whether this launch of torchrun had claimed the folder before."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "lock").open("a+")
        self.file.seek(0)
        former = self.file.read().strip()
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"{folder}: another run is training there ({former}); wait for it, or give another "
                "--output"
            ) from error
        except OSError as error:
            message = f"cannot be locked against a second run ({error})"
            print(f"warning: {folder}: {message}", file=sys.stderr)
        continues = is_restarted() and former.endswith(launch_name())
        owner = f"{socket.gethostname()}, process {os.getpid()}"
        self.write(f"{owner}, {launch_name()}" if continues else owner)
        return continues

    def claim(self):
        """Note that this launch may continue what is in the folder, if torchrun restarts it."""
        if get_rank_and_world_size()[0] == 0:
            self.write(f"{socket.gethostname()}, process {os.getpid()}, {launch_name()}")

    def write(self, line):
        """Replace what the lock file says of its holder."""
        self.file.truncate(0)
        self.file.write(f"{line}\n")
        self.file.flush()


def is_restarted():
    """Whether torchrun has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch_name():
    """What stays the same when torchrun restarts the processes: its run id and its process."""
    return f"launch {os.environ.get('TORCHELASTIC_RUN_ID', 'none')} {os.getppid()}"


# ---- checkpoints ----
def save_atomically(path, write, size):
    """Call write(temporary path), of `size` bytes, so that `path` is the old or the complete new
    file at any time. Raises InputError where there is no room."""
    unfinished = path.with_name(f"unfinished{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        if size > shutil.disk_usage(path.parent).free:  # HDF5 would crash in the middle
            raise OSError("no space left on device")
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file)
        unfinished.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: its {size} bytes cannot be written ({error}); make room and run the command "
            f"again"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def sync_folder(folder):
    """Write the folder's entries to the disk, so that a new name outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(content, paths):
    """Write a checkpoint under each of the paths."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    for path in paths:
        save_atomically(
            path, lambda unfinished: unfinished.write_bytes(buffer.getbuffer()), buffer.tell()
        )


def read_checkpoint(path):
    """The content of a checkpoint, on the CPU, and its "path". A bare state_dict is taken for
    weights.

    Loads tensors, plain values and argparse.Namespace only, never code. Raises InputError where the
    file is missing, damaged, or no checkpoint.
    """
    try:
        damaged = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # file system, zip, pickle and tensors each fail in their own way
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, UnpicklingError):  # torch's words advise to load it unsafely
            reason = "it is damaged, or holds other objects than tensors and plain values"
        elif isinstance(error, FileNotFoundError):
            raise InputError(
                f"{path}: no such checkpoint; train the stage before, or name another file"
            ) from error
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise InputError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    if is_state_dict(content):
        content = {"state_dict": content}
    if not isinstance(content, dict) or not is_state_dict(content.get("state_dict")):
        raise InputError(f"{path}: is no checkpoint: it has no state_dict of tensors")
    content["path"] = str(path)
    return content


def is_state_dict(value):
    """Whether this is a dict of tensors by name."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and torch.is_tensor(value[name]) for name in value)


def load_weights(model, checkpoint, path):
    """Load a checkpoint's weights strictly. Raises InputError that names the first keys that
    differ.
    """
    weights = {
        key.removeprefix("module."): value for key, value in checkpoint["state_dict"].items()
    }
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    misshaped = [
        name for name in weights if name in expected and weights[name].shape != expected[name].shape
    ]
    problems = []
    for problem, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshaped),
    ):
        if names:
            problems.append(f"{len(names)} {problem}, first {names[0]}")
    if problems:
        raise InputError(f"{path}: holds other weights than --arch has ({'; '.join(problems)})")
    model.load_state_dict(weights)


def load_states(checkpoint, optimizer, loss_function, scaler, fp16):
    """Load the states of a checkpoint. Published ones have no memory bank: it stays empty."""
    try:
        # Learning rate, momentum and weight decay are those of this command line.
        groups = optimizer.state_dict()["param_groups"]
        state = checkpoint["optimizer"]["state"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        if "memory_bank" in checkpoint:
            loss_function.load_state_dict(checkpoint["memory_bank"])
        if fp16 and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        problem = f"its optimizer, memory bank or scaler is of another run ({reason})"
        raise InputError(f"{checkpoint['path']}: {problem}") from error


def own_checkpoints(folder):
    """The checkpoints of the runs in a folder, the latest first."""
    epochs = sorted(folder.glob("checkpoint_[0-9][0-9][0-9][0-9].pth.tar"), reverse=True)
    return [path for path in [folder / "last.pth.tar", *epochs] if path.exists()]


def find_checkpoint(resume, folder, continues):
    """The checkpoint to continue, as --resume says, or None. Restarted by torchrun, a run continues
    its own. Raises InputError where there are checkpoints but none can be read."""
    paths = []
    if resume == "auto" or continues:
        paths += own_checkpoints(folder)
    if resume not in (None, "auto"):
        paths.append(resume)
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:
            if path == paths[-1]:
                raise
            print(f"warning: {error}; taking the one before", file=sys.stderr)
            continue
        if "epoch" not in checkpoint or "optimizer" not in checkpoint:
            raise InputError(f"{path}: holds weights alone; start from them with --weight {path}")
        return checkpoint
    return None


def check_same_run(checkpoint, args, files):
    """Raise InputError where a checkpoint is not of this run."""
    path = checkpoint["path"]
    if "memory_bank" in checkpoint:
        try:
            size = len(checkpoint["memory_bank"]["bank"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: is no checkpoint: its memory bank has no rows") from error
        if size != args.memory_size:
            raise InputError(
                f"{path}: was written with --memory-size {size}, not {args.memory_size}"
            )
    differing = []
    if checkpoint.get("files", files) != files:  # labels in the bank are positions in their list
        differing.append("files")
    if checkpoint.get("step", 0) > 0:  # between two epochs these may change
        for name in ("seed", "batch_size"):
            if checkpoint.get(name) != getattr(args, name):
                differing.append(name)
    if differing:
        raise InputError(f"{path}: was written with different {', '.join(differing)}")


def check_equal_on_all_ranks(position):
    """Raise InputError where the ranks would go on at different (epoch, step)."""
    if len(set(all_gather_objects(position))) > 1:
        raise InputError(
            "--resume: the ranks found different checkpoints; share --output among nodes"
        )


def refuse_to_overwrite(folder, args, checkpoint, continues):
    """Raise InputError where `folder` holds a checkpoint further on than where this run starts.

    One that is unreadable, or of another --arch, counts as further on. With --start-over they are
    moved to replaced-N instead. With --resume auto, or restarted by torchrun, the run continues
    what is there.
    """
    if args.resume == "auto" or continues:
        return
    start = (0, 0)
    if checkpoint is not None:
        start = (checkpoint["epoch"], checkpoint.get("step", 0))
    if args.start_over:
        on_rank_0(move_aside, folder)
    else:
        on_rank_0(raise_if_ahead, folder, args.arch, start)


def raise_if_ahead(folder, arch, start):
    """Raise InputError where a checkpoint of the folder is further on than (epoch, step)."""
    for path in own_checkpoints(folder):
        try:
            checkpoint = read_checkpoint(path)
            foreign = checkpoint["arch"] != arch
            ahead = (checkpoint["epoch"], checkpoint.get("step", 0)) > start
        except (InputError, KeyError, TypeError):
            foreign = True
        if foreign or ahead:
            raise InputError(
                f"{path}: a run that is further on would be overwritten; continue it with --resume "
                "auto, give another --output, or move it away with --start-over"
            )


def move_aside(folder):
    """Move a run's files to the first free replaced-N."""
    number = 1
    while (folder / f"replaced-{number}").exists():
        number += 1
    paths = [*own_checkpoints(folder), folder / "log.jsonl", folder / "source.py"]
    paths = [path for path in paths if path.exists()]
    if paths:
        replaced = folder / f"replaced-{number}"
        replaced.mkdir()
        for path in paths:
            path.rename(replaced / path.name)
        print(f"{replaced}: holds the run that was here", file=sys.stderr)


def check_batch_size(args, samples, images_per_step, world_size):
    """Raise InputError where the batch does not fit the ranks, the data or the memory bank."""
    flag = f"--batch-size {args.batch_size}"
    if args.batch_size % world_size:
        raise InputError(f"{flag}: must be a multiple of the {world_size} ranks")
    if args.batch_size > samples:
        raise InputError(f"{flag}: is more than the {samples} samples that there are")
    if images_per_step > args.memory_size:
        raise InputError(
            f"{flag}: its {images_per_step} images must fit into --memory-size {args.memory_size}"
        )


# ---- logging ----
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "augly",
    "opencv-python-headless",
    "pillow",
    "simplejpeg",
)


def library_versions():
    """Versions of the libraries that decide values."""
    versions = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


class Logger:
    """log.jsonl, one JSON object a line, written by rank 0.

    `lines` holds all lines, so that a checkpoint has the log up to its step.
    """

    def __init__(self, lines):
        self.lines = lines
        self.file = None

    def open(self, path):
        """Begin the file with the lines so far; put the script itself beside it, as source.py."""
        if get_rank_and_world_size()[0] == 0:
            shutil.copyfile(__file__, path.with_name("source.py"))
            self.path = path
            self.file = path.open("w")
            self.print("".join(self.lines))

    def write(self, line):
        """Add a line, a dict of plain values."""
        self.lines.append(json.dumps(line) + "\n")
        self.print(self.lines[-1])

    def print(self, text):
        """Write to the file, at once."""
        if self.file is None:
            return
        try:
            print(text, end="", file=self.file, flush=True)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error}); make room and resume"
            ) from error


class Progress:
    """Where training stands.

    epoch, step: epochs, and steps of the current one, that are done; skipped_in_a_row: steps
    without a finite loss up to here; unlogged: values of the steps since the last line of the log,
    on the device so that no step waits for them; bad_images: messages about unreadable images, each
    once.
    """

    def __init__(self, epoch=0, step=0, skipped_in_a_row=0, unlogged=(), bad_images=()):
        self.epoch = epoch
        self.step = step
        self.skipped_in_a_row = skipped_in_a_row
        self.unlogged = list(unlogged)
        self.bad_images = list(bad_images)

    @classmethod
    def from_checkpoint(cls, checkpoint, device):
        """What a checkpoint says. Published ones have the epoch alone."""
        unlogged = checkpoint.get("unlogged", [])
        return cls(
            epoch=checkpoint["epoch"],
            step=checkpoint.get("step", 0),
            skipped_in_a_row=checkpoint.get("skipped_in_a_row", 0),
            unlogged=[to_device(values, device) for values in unlogged],
            bad_images=checkpoint.get("bad_images", []),
        )

    def summarize(self, max_skipped):
        """Means of the unlogged steps that were finite (None without any), and numbers of the
        others.

        This waits for the device. Raises InputError after more than max_skipped steps in a row.
        """
        columns = {}
        for name in self.unlogged[0]:
            columns[name] = torch.stack([values[name] for values in self.unlogged]).float().cpu()
        self.unlogged = []
        finite = columns["loss"].isfinite()
        for is_finite in finite.tolist():
            self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
            if self.skipped_in_a_row > max_skipped:
                raise InputError(
                    f"--max-skipped {max_skipped}: more steps in a row had no finite loss"
                )
        summary = {}
        for name, column in columns.items():
            summary[name] = column[finite].mean().item() if finite.any() else None
        summary["skipped"] = int((~finite).sum())
        summary["overflows"] = int((columns["overflow"] > 0).sum())
        return summary


def to_device(values, device):
    """A dict of tensors, on a device."""
    return {name: value.to(device) for name, value in values.items()}


# ---- main ----
def check_gpu(args):
    """Raise InputError where the command asks for a GPU that torch cannot use.

    Where there are GPUs, but the driver is too old for torch, training would go on for weeks on the
    CPU. CUDA_VISIBLE_DEVICES, empty or -1, is a wish for that.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if args.gpu is not None and args.gpu >= count:
            raise InputError(f"--gpu {args.gpu}: torch sees {count}, numbered from 0")
        return
    by_torchrun = "RANK" in os.environ
    asked = args.gpu is not None or args.multiprocessing_distributed or by_torchrun
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not asked or hidden:
        return
    if shutil.which("nvidia-smi") or any(Path("/dev").glob("nvidia[0-9]*")):
        if torch.version.cuda is None:
            raise InputError(
                f"torch {torch.__version__} is built without CUDA, and this machine has a GPU: "
                "install a build with it; CUDA_VISIBLE_DEVICES= trains on the CPU"
            )
        raise InputError(
            f"torch {torch.__version__} cannot use this machine's GPU: the NVIDIA driver must be "
            f"one for CUDA {torch.version.cuda} or newer; CUDA_VISIBLE_DEVICES= trains on the CPU"
        )


def launch(args, argv, processes):
    """Start this node's processes, as torchrun's own command would; returns the exit code."""
    host, _, port = args.dist_url.rpartition("//")[2].rpartition(":")
    command = [
        f"--nnodes={args.world_size}",
        f"--node-rank={args.rank}",
        f"--nproc-per-node={processes}",
        f"--master-addr={host}",
        f"--master-port={port}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
        __file__,
        *argv,
    ]
    try:
        return dist.run.main(command) or 0
    except dist.elastic.multiprocessing.errors.ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except dist.elastic.multiprocessing.SignalException as error:  # the processes have had it too
        return os.EX_TEMPFAIL if error.sigval in STOP_SIGNALS else 1


def is_user_error(error):
    """Whether the user can fix an error, so that it ends in one line.

    Of OSError only those of a file: a lost connection is one too.
    """
    if isinstance(error, OSError):
        return error.filename is not None
    return isinstance(error, InputError | torch.OutOfMemoryError)


def describe_error(error, args):
    """The line about an error that the user can fix."""
    if isinstance(error, torch.OutOfMemoryError):
        remedy = "use more GPUs"
        if args.mode == "extract":
            remedy = "use a smaller --batch-size"
        elif not args.grad_checkpointing:
            remedy = "use --grad-checkpointing, or more GPUs"
        return f"the GPU is out of memory: {remedy}"
    return " ".join(str(error).split())


def main(argv=None):
    """Run the stage; returns the exit code: 2 for input that cannot be used, 75 after a signal to
    stop.
    """
    if argv is None:
        argv = sys.argv[1:]
    args = parse_args(argv)
    atexit.register(kill_workers)
    configured = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if args.grad_checkpointing and not configured:
        # CUDA memory fragments less if large blocks are not split: v107 needs that on 141 GB.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:512"
    try:
        check_gpu(args)
        processes = 1
        if args.multiprocessing_distributed and args.gpu is None:
            processes = max(1, torch.cuda.device_count())
        if "RANK" not in os.environ and args.world_size * processes > 1:
            return launch(args, argv, processes)
        code = train(args) if args.mode == "train" else extract(args)
    except Exception as error:
        # torch's handler would raise the loss of a worker once more, while the error is printed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not is_user_error(error):
            raise
        print(f"{Path(__file__).name}: error: {describe_error(error, args)}", file=sys.stderr)
        return 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
