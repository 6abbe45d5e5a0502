r"""Train the small starting point, which takes the place of ImageNet weights, from nothing but
generated pictures.

    python weights/pretraining/pretrain_mini.py mini  # an hour on two CPU cores; resumes
    python exp/v98.py -a test_byobnet --input-size 96 --weight mini/start.pth.tar ... \
        mini/input/training_images

Contrastive learning (InfoNCE, van den Oord et al. 2018) of two views of a picture: a plain or
gentle one and a hard one, edited by crops, borders, screens, rotation, shear, perspective,
overlays, text, colour, fog, blur, noise and JPEG, which grow harder over the first steps. A third
of the pictures are siblings of others in the batch: of the same colours or the same things in
another layout, so that neither suffices to tell them apart. Views are small until the learning rate
falls; from then on a quarter of the hard ones are by v98's hard augmentation. Matrices are trained
by Muon (Jordan et al. 2024), vectors by Adam; the weights kept are the running mean over the last
few hundred steps. No photograph is involved.

Writes into OUT
    pictures/0000.npy ...   generated pictures, uint8 (1000, 128, 128, 3); can be removed afterwards
    input/                  3,000 of them as JPEG, in training_images/ and reference_images/, for
                            the stages to train on
    last.pth.tar            everything needed to go on, every --checkpoint-every steps
    log.jsonl               the arguments and versions, then a line per --log-every steps
    start.pth.tar           the weights as a stage's --weight takes them, in half precision

Pictures are scenes: a sky over ground, a room or a plain; over it a few things of mirrored parts,
dead leaves, rows of one shape, strokes or text; textures of 1/f noise, cells, spots and warped
waves; shading, shadow, blur and light. The same command makes the same pictures and draws the same
views, for any number of --workers.
"""

import argparse
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / name) for name in ("exp", "scripts")]

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import v98
from common.errors import one_line_errors
from common.files import atomic
from common.parallel import parallel
from edits import around_center, scale, shift
from pretrain import info_nce, keep_memory, stage_state, update_mean, write_checkpoint

SIDE = 128  # of a generated picture, pixels
TILE = 256  # side of a texture
CHUNK = 1000  # pictures in a file, made with the same textures
TEXTURES = 240
BYTES = 255.0
CHARACTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 .,!?&%-")
FONTS = 8  # of OpenCV
SUBPIXEL = {"lineType": cv2.LINE_AA, "shift": 4}  # coordinates in sixteenths of a pixel


# ---- textures and colours ----


def noise(rng, side, slope, stretch=1.0):
    """1 / f**slope noise (side, side), float32 of mean 0 and deviation 1, drawn out `stretch` times
    in a direction.
    """
    y, x, angle = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side), rng.uniform(0, math.pi)
    along, across = (
        x * math.cos(angle) + y * math.sin(angle),
        y * math.cos(angle) - x * math.sin(angle),
    )
    frequency = np.hypot(along * stretch, across)
    frequency[0, 0] = np.inf
    real, imaginary = rng.normal(size=(2, *frequency.shape)) / frequency**slope
    field = np.fft.irfft2(real + 1j * imaginary, s=(side, side)).astype(np.float32)
    return field / field.std()


def waves(rng):
    """Stripes, grids or checks, warped by noise."""
    y, x = np.mgrid[:TILE, :TILE].astype(np.float32)
    bend = rng.uniform(0, 8)
    x, y = x + bend * noise(rng, TILE, 2), y + bend * noise(rng, TILE, 2)
    angle, period = rng.uniform(0, math.tau), rng.uniform(5, 40)
    first = np.sin((x * math.cos(angle) + y * math.sin(angle)) * math.tau / period)
    period *= rng.uniform(0.5, 2)
    second = np.sin((y * math.cos(angle) - x * math.sin(angle)) * math.tau / period)
    grid = np.maximum(first, second)
    pattern = [first, first * second, np.sign(first * second), grid, grid > 0.7][rng.integers(5)]
    return pattern + 0.2 * noise(rng, TILE, 1)


def cells(rng):
    """The distance to the nearest of some points."""
    points = rng.integers(0, TILE, (rng.integers(20, 300), 2))
    mask = np.full((TILE, TILE), 255, np.uint8)
    mask[points[:, 0], points[:, 1]] = 0
    return cv2.distanceTransform(mask, cv2.DIST_L2, 3) ** rng.choice([0.5, 1])


def spots(rng):
    """Overlapping ellipses."""
    canvas = np.zeros((TILE, TILE), np.float32)
    for _ in range(rng.integers(100, 500)):
        radius = 2 / (rng.uniform() + 0.06)
        axes = max(1, int(radius)), max(1, int(radius * rng.uniform(0.3, 1)))
        centre, angle = rng.integers(0, TILE, 2).tolist(), rng.uniform(0, 180)
        cv2.ellipse(canvas, centre, axes, angle, 0, 360, rng.normal(), cv2.FILLED, cv2.LINE_AA)
    return canvas


def texture(rng):
    """A grey texture (TILE, TILE), float32 of mean 0 and deviation 1."""
    field = noise(rng, TILE, rng.uniform(0.6, 2), rng.uniform(2, 6) if rng.uniform() < 0.3 else 1)
    kind = rng.integers(8)
    if kind < 3:
        field = [np.abs(field), np.sin(field * rng.uniform(1, 6)), field > rng.normal() * 0.7][kind]
    elif kind < 6:
        field = [waves, cells, spots][kind - 3](rng)
    field = field.astype(np.float32)
    return (field - field.mean()) / (field.std() + 1e-6)


class Palette:
    """The colours of a picture: as in photographs, of few hues and different mostly in
    luminance.
    """

    def __init__(self, rng):
        self.rng = rng
        hues = rng.normal(size=(rng.integers(1, 5), 3))
        hues -= hues.mean(axis=1, keepdims=True)
        self.hues = hues / (np.linalg.norm(hues, axis=1, keepdims=True) + 1e-6)
        self.saturation = rng.choice([0, 0.25, 0.5, 1], p=[0.08, 0.4, 0.35, 0.17])
        wide = rng.uniform(0, 70), rng.uniform(170, BYTES)
        self.low, self.high = wide if rng.uniform() < 0.7 else sorted(rng.uniform(0, BYTES, 2))

    def colour(self):
        """Three floats in 0..255."""
        grey, chroma = (
            self.rng.uniform(self.low, self.high),
            self.saturation * self.rng.gamma(2, 35),
        )
        return (grey + chroma * self.rng.choice(self.hues)).clip(0, BYTES)


def ramp(rng, width, height):
    """A gradient (height, width) from 0 to 1, straight or round."""
    y, x = np.mgrid[:height, :width].astype(np.float32) / np.reshape([height, width], (2, 1, 1))
    if rng.uniform() < 0.6:
        angle = rng.uniform(0, math.tau) if rng.uniform() < 0.6 else math.pi / 2 * rng.integers(4)
        field = x * math.cos(angle) + y * math.sin(angle)
    else:
        field = np.hypot(
            x - rng.uniform(-0.2, 1.2), (y - rng.uniform(-0.2, 1.2)) * rng.uniform(0.5, 2)
        )
    field = (field - field.min()) / (np.ptp(field) + 1e-6)
    return field ** math.exp(rng.uniform(-1, 1))


# ---- pictures ----


def turned(points, angle):
    """Points (n, 2) turned around the origin."""
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def outline(rng, radius):
    """A closed shape of about the radius around the origin: points (n, 2)."""
    kind = rng.integers(7)
    corners = [rng.integers(3, 7), 4, 28, 40, 40, 40, rng.integers(4, 12)][kind]
    angles = (
        np.sort(rng.uniform(0, math.tau, corners))
        if kind == 6
        else np.arange(corners) * math.tau / corners
    )
    radii = rng.uniform(0.3, 1, corners) if kind == 6 else np.ones(corners)
    if kind in (3, 4, 5):  # a smooth blob; the last kind is symmetric
        rough = rng.uniform(0.15, 0.6)
        for frequency in range(2, 7):
            phase = 0 if kind == 5 else rng.uniform(0, math.tau)
            radii += rough / frequency * rng.normal() * np.cos(frequency * angles + phase)
        radii = radii.clip(0.15, 2)
    points = (
        np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.25, 1)], axis=1)
        * radii[:, None]
        * radius
    )
    return turned(
        points, rng.uniform(0, math.tau) if rng.uniform() < 0.6 else math.pi / 2 * rng.integers(4)
    )


def fixed(points):
    """Points (n, 2) as what OpenCV draws with SUBPIXEL."""
    return [np.round(points * 16).astype(np.int32)]


class Painter:
    """Draws scenes with the same textures; every draw comes from `rng`."""

    def __init__(self, rng):
        self.rng = rng
        self.textures = [texture(rng) for _ in range(TEXTURES)]

    def chance(self, probability):
        """Whether something of this probability happens."""
        return self.rng.uniform() < probability

    def cut(self, width, height):
        """A turned and scaled part of a texture, (height, width)."""
        angle = self.rng.uniform(0, math.tau) if self.chance(0.6) else 0
        scale = math.exp(self.rng.uniform(-1.1, 0.5))
        cos, sin, shift = (
            math.cos(angle) * scale,
            math.sin(angle) * scale,
            self.rng.uniform(0, TILE, 2),
        )
        matrix = np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]]])
        if self.chance(0.2):
            matrix[1, :2] *= self.rng.uniform(1, 3)
        field = self.textures[self.rng.integers(TEXTURES)]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(
            field, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT
        )

    def fill(self, width, height):
        """A plain, graded or textured surface, (height, width, 3)."""
        kind, colour = self.rng.uniform(), self.palette.colour()
        surface = np.full((height, width, 3), colour, np.float32)
        if 0.2 <= kind < 0.7:
            other = (self.palette.colour() - colour) * self.rng.uniform(0.2, 1)
            surface += ramp(self.rng, width, height)[..., None] * other.astype(np.float32)
        if kind > 0.4:
            field = self.cut(width, height)[..., None]
            if self.chance(0.25):
                share = np.clip(field * 0.5 + 0.5, 0, 1)
                surface += share * (self.palette.colour().astype(np.float32) - surface)
            else:
                surface += field * (
                    self.rng.gamma(2, 12) * (1 + self.palette.hues[0] * 0.3)
                ).astype(np.float32)
        return surface

    def paste(self, points, shadow=False):
        """Fill a shape; may shade it, let it cast a shadow, or draw its outline."""
        low = np.maximum(np.floor(points.min(axis=0)).astype(int) - 2, 0)
        high = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 3, SIDE)
        width, height = (high - low).tolist()
        if min(width, height) < 2:
            return
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, fixed(points - low), 255, **SUBPIXEL)
        if shadow and width > 8 and self.chance(0.25):
            shade = np.zeros((SIDE, SIDE), np.uint8)
            cv2.fillPoly(
                shade, fixed(points + self.rng.normal(size=2) * width / 10), 255, **SUBPIXEL
            )
            shade = cv2.GaussianBlur(shade, (0, 0), self.rng.uniform(1, 6))
            self.canvas *= 1 - shade[..., None] * np.float32(self.rng.uniform(0.2, 0.7) / BYTES)
        surface = self.fill(width, height)
        if self.chance(0.35):  # rounded
            depth = cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 3)
            depth = np.sqrt(depth / (depth.max() + 1e-6))[..., None]
            surface *= 1 - self.rng.uniform(0.2, 0.7) * (1 - depth)
        opacity = 1 if self.chance(0.85) else self.rng.uniform(0.4, 0.9)
        region = self.canvas[low[1] : high[1], low[0] : high[0]]
        region += (surface - region) * (
            mask[..., None].astype(np.float32) * np.float32(opacity / BYTES)
        )
        if self.chance(0.15):
            colour, thickness = self.palette.colour().tolist(), int(self.rng.integers(1, 4))
            cv2.polylines(self.canvas, fixed(points), True, colour, thickness, **SUBPIXEL)

    def ground(self):
        """A plain, some layers below a horizon, or a room."""
        self.canvas = self.fill(SIDE, SIDE)
        kind = self.rng.uniform()
        if kind < 0.35:
            level, corners = (
                self.rng.uniform(0.25, 0.8) * SIDE,
                [[SIDE + 2, SIDE + 2], [-2, SIDE + 2]],
            )
            for _ in range(self.rng.integers(1, 4)):
                row = self.textures[self.rng.integers(TEXTURES)][self.rng.integers(TILE), :SIDE]
                row = cv2.GaussianBlur(row[None], (0, 0), math.exp(self.rng.uniform(0, 3)))[0]
                edge = np.stack(
                    [np.linspace(0, SIDE, SIDE), level + row * self.rng.uniform(0, 14)], axis=1
                )
                self.paste(np.concatenate([edge, corners]))
                level += self.rng.uniform(5, 40)
        elif kind < 0.45:
            square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
            centre, half = self.rng.uniform(0.2, 0.8, 2) * SIDE, self.rng.uniform(0.1, 0.35) * SIDE
            far = centre + (2 * square - 1) * half
            for i, j in (0, 1), (1, 2), (2, 3), (3, 0):
                self.paste(np.stack([far[i], far[j], square[j] * SIDE, square[i] * SIDE]))

    def thing(self):
        """A shape with parts, often mirrored."""
        centre, radius = (
            self.rng.uniform(0.2, 0.8, 2) * SIDE,
            SIDE * math.exp(self.rng.uniform(-2.2, -0.8)),
        )
        self.paste(outline(self.rng, radius) + centre, shadow=True)
        mirrored = self.chance(0.6)
        for _ in range(self.rng.integers(1, 7)):
            part = (
                outline(self.rng, radius * self.rng.uniform(0.08, 0.5))
                + self.rng.normal(size=2) * radius * 0.55
            )
            self.paste(part + centre)
            if mirrored:
                self.paste(part * [-1, 1] + centre)

    def leaves(self):
        """Dead leaves: radii follow the r**-3 law that makes them look alike at every scale."""
        smallest, largest = SIDE / 30, SIDE / 2.3
        for _ in range(int(math.exp(self.rng.uniform(2.5, 4.6)))):
            radius = (smallest**-2 + self.rng.uniform() * (largest**-2 - smallest**-2)) ** -0.5
            self.paste(outline(self.rng, radius) + self.rng.uniform(0, SIDE, 2), shadow=True)

    def rows(self):
        """The same shape in rows and columns, as windows, trees or a crowd."""
        shape, columns, rows = (
            outline(self.rng, 1),
            int(self.rng.integers(2, 8)),
            int(self.rng.integers(1, 7)),
        )
        jitter = self.rng.choice([0, 3])
        for i in range(columns * rows):
            centre = np.array([(i % columns + 0.5) / columns, (i // columns + 0.5) / rows]) * SIDE
            size = SIDE / max(columns, rows) * self.rng.uniform(0.3, 0.5)
            self.paste(shape * size + centre + self.rng.normal(size=2) * jitter)

    def strokes(self, number):
        """Curved lines."""
        for _ in range(number):
            steps = self.rng.normal(size=(self.rng.integers(2, 30), 2)) * self.rng.uniform(2, 14)
            points = np.cumsum(steps, axis=0)
            if len(points) > 7 and self.chance(0.6):
                points = cv2.GaussianBlur(points.astype(np.float32), (1, 7), 0)
            thickness = int(self.rng.integers(1, 2 + int(1 + 6 * self.rng.uniform() ** 3)))
            points = fixed(points + self.rng.uniform(0, SIDE, 2))
            cv2.polylines(
                self.canvas, points, False, self.palette.colour().tolist(), thickness, **SUBPIXEL
            )

    def text(self):
        """A word."""
        mask, place = (
            np.zeros((SIDE, SIDE), np.uint8),
            (int(self.rng.integers(-20, SIDE)), int(self.rng.integers(SIDE))),
        )
        scale, thickness = math.exp(self.rng.uniform(-1.2, 1)), int(self.rng.integers(1, 4))
        cv2.putText(
            mask,
            word(self.rng),
            place,
            int(self.rng.integers(FONTS)),
            scale,
            255,
            thickness,
            cv2.LINE_AA,
        )
        self.canvas += (self.palette.colour() - self.canvas) * (mask[..., None] / BYTES)

    def scene(self):
        """A picture, uint8 (SIDE, SIDE, 3)."""
        self.palette = Palette(self.rng)
        self.ground()
        if self.chance(0.3):  # something out of focus behind
            for _ in range(self.rng.integers(2, 15)):
                self.paste(
                    outline(self.rng, self.rng.uniform(5, 40)) + self.rng.uniform(0, SIDE, 2),
                    shadow=True,
                )
            self.canvas = cv2.GaussianBlur(self.canvas, (0, 0), math.exp(self.rng.uniform(0, 2)))
        if self.chance(0.35):
            self.palette = Palette(self.rng)
        kind = self.rng.uniform()
        if kind < 0.25:
            self.leaves()
        elif kind < 0.7:
            for _ in range(1 + self.rng.poisson(1.2)):
                self.thing()
        elif kind < 0.8:
            self.rows()
        elif kind < 0.87:
            self.strokes(int(math.exp(self.rng.uniform(1, 4.3))))
        elif kind < 0.92:
            for _ in range(self.rng.integers(1, 10)):
                self.text()
        if self.chance(0.3):
            self.strokes(int(self.rng.integers(1, 8)))
        if self.chance(0.08):
            self.text()
        return self.expose()

    def expose(self):
        """The canvas under uneven light, a little blurred or noisy, as uint8."""
        image = self.canvas
        if self.chance(0.5):
            clouds = cv2.resize(0.5 + 0.2 * noise(self.rng, 32, 1.8), (SIDE, SIDE)).clip(0, 1)
            light = ramp(self.rng, SIDE, SIDE) if self.chance(0.5) else clouds
            image = image * (1 - self.rng.uniform(0.2, 0.9) * light[..., None])
        if self.chance(0.3):
            image = cv2.GaussianBlur(image, (0, 0), math.exp(self.rng.uniform(-0.7, 0.7)))
        if self.chance(0.3):
            image = image + self.rng.normal(size=image.shape) * self.rng.uniform(1, 12)
        return image.clip(0, BYTES).astype(np.uint8)

    def picture(self):
        """A scene, or now and then a collage of two."""
        image = self.scene()
        if self.chance(0.06):
            other, border = self.scene(), int(self.rng.uniform(0.25, 0.75) * SIDE)
            image[border:] = cv2.resize(other, (SIDE, SIDE - border))
            image = image.transpose(1, 0, 2).copy() if self.chance(0.5) else image
        return image


def word(rng):
    """Up to 13 random characters."""
    return "".join(rng.choice(CHARACTERS, rng.integers(1, 14)))


def write_pictures(number, folder, seed):
    """Write file `number` of the pictures, unless it is there."""
    path = folder / f"{number:04}.npy"
    if path.exists():
        return
    cv2.setNumThreads(1)
    painter = Painter(np.random.default_rng([seed, 0, number]))
    pictures = np.stack([painter.picture() for _ in range(CHUNK)])
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, pictures)


def write_images(out):
    """Write the first pictures as images, two of three into training_images/, the others into
    reference_images/.

    Unless they are there: input/ appears when it is whole.
    """
    if (out / "input").exists():
        return
    pictures = np.concatenate(
        [np.load(path, mmap_mode="r") for path in sorted((out / "pictures").glob("*.npy"))[:3]]
    )
    unfinished = out / "unfinished"
    for i, picture in enumerate(pictures):
        folder, name = (
            ("reference_images", f"R{i:06}.jpg")
            if i % 3 == 2
            else ("training_images", f"T{i:06}.jpg")
        )
        (unfinished / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(unfinished / folder / name, quality=95)
    unfinished.replace(out / "input")


# ---- views ----


def colour_statistics(image):
    """Mean (3,) of an image's colours and a root (3, 3) of their covariance, a little of grey
    added.
    """
    pixels = image.reshape(-1, 3)[::7].astype(np.float64)
    return pixels.mean(axis=0), np.linalg.cholesky(np.cov(pixels.T) + 4 * np.eye(3))


class Views:
    """Edited views, uint8 (size, size, 3), of pictures (n, SIDE, SIDE, 3); homographies are of the
    unit square.
    """

    def __init__(self, pictures, size, augment=None):
        self.pictures, self.size, self.augment = pictures, size, augment

    def seed(self, *key):
        """What is drawn next depends on the key alone."""
        self.rng = np.random.default_rng(key)
        v98.seed_generators(*key)  # which augment() draws from

    def chance(self, probability):
        """Whether something of this probability happens."""
        return self.rng.uniform() < probability

    def colour(self):
        """Three ints."""
        return self.rng.integers(0, 256, 3).tolist()

    def any_picture(self):
        """One of the pictures."""
        chunk = self.pictures[self.rng.integers(len(self.pictures))]
        return np.array(chunk[self.rng.integers(len(chunk))])

    def content(self):
        """What both views of a pair show: part of a picture, mirrored and recoloured by chance,
        never almost plain.
        """
        for _ in range(10):
            image = self.any_picture()
            if self.chance(0.7):
                width, height = self.rng.integers(60, SIDE, 2)
                x, y = (
                    self.rng.integers(0, SIDE - width + 1),
                    self.rng.integers(0, SIDE - height + 1),
                )
                image = cv2.resize(
                    image[y : y + height, x : x + width],
                    (SIDE, SIDE),
                    interpolation=cv2.INTER_LINEAR,
                )
            image = image[:, ::-1] if self.chance(0.5) else image
            image = image[::-1] if self.chance(0.1) else image
            image = image.transpose(1, 0, 2) if self.chance(0.1) else image
            image = image[..., self.rng.permutation(3)] if self.chance(0.5) else image
            image = np.ascontiguousarray(255 - image if self.chance(0.04) else image)
            if self.chance(0.4):
                image = cv2.transform(image, self.colour_matrix(0.5))
            if image[::4, ::4].mean(axis=2).std() > 8:
                break
        return image

    def colour_matrix(self, strength):
        """A (3, 4) matrix of saturation, grey, hue, contrast, brightness and fog.

        Each is drawn by chance."""
        uniform, matrix, offset = self.rng.uniform, np.eye(3), np.zeros(3)
        grey = np.tile([0.299, 0.587, 0.114], (3, 1))
        if self.chance(0.5):
            factor = uniform(0, 3) if self.chance(0.5) else uniform(1 - strength, 1 + strength)
            matrix = factor * matrix + (1 - factor) * grey
        if self.chance(0.12):
            matrix = grey
        if self.chance(0.25):  # hue: a turn around the grey axis
            turn, _ = cv2.Rodrigues(np.full(3, uniform(-1.5, 1.5) * strength / math.sqrt(3)))
            matrix = turn @ matrix
        if self.chance(0.5):
            factor = math.exp(uniform(-1, 0.7) * strength)
            matrix, offset = factor * matrix, 128 * (1 - factor) + offset
        if self.chance(0.5):
            factor = math.exp(uniform(-1, 0.8) * strength)
            matrix, offset = factor * matrix, factor * offset + uniform(-40, 40) * strength
        if self.chance(0.2):  # fog: partly transparent over a plain ground
            opacity = uniform(1 - strength * 0.9, 1)
            ground = uniform(0, 255, 3) if self.chance(0.25) else 255 * self.chance(0.7)
            matrix, offset = opacity * matrix, opacity * offset + (1 - opacity) * ground
        return np.column_stack([matrix, offset])

    def sibling(self, image):
        """A content that shares colours or things with the image but not the layout: a hard
        negative.
        """
        kind = self.rng.uniform()
        if kind < 0.4:
            image = self.in_colours_of(image, self.content())
        elif kind < 0.7:
            image = self.shuffled(image)
        if kind > 0.6:
            nodes = int(self.rng.integers(3, 6))
            bend = self.rng.normal(size=(nodes, nodes, 2)) * self.rng.uniform(15, 35)
            x, y = cv2.split(
                cv2.resize(bend, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
                + np.mgrid[:SIDE, :SIDE].T
            )
            maps, border = (np.float32(x), np.float32(y)), {"borderMode": cv2.BORDER_REFLECT}
            image = cv2.remap(image, *maps, cv2.INTER_LINEAR, **border)
        return image

    def in_colours_of(self, image, other):
        """The other image with the mean and covariance of the image's colours."""
        (mean, root), (other_mean, other_root) = (
            colour_statistics(pixels) for pixels in (image, other)
        )
        matrix = root @ np.linalg.inv(other_root)
        return cv2.transform(other, np.column_stack([matrix, mean - matrix @ other_mean]))

    def shuffled(self, image):
        """The tiles of the image, mirrored by chance, in random order."""
        number = int(self.rng.integers(2, 5))
        side = SIDE // number
        image = cv2.resize(image, (side * number, side * number))
        tiles = (
            image.reshape(number, side, number, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        )
        tiles = [
            tile[:: self.rng.choice([-1, 1]), :: self.rng.choice([-1, 1])]
            for tile in self.rng.permutation(tiles)
        ]
        rows = [np.concatenate(tiles[i : i + number], axis=1) for i in range(0, number**2, number)]
        return cv2.resize(np.concatenate(rows), (SIDE, SIDE))

    def busy(self, image):
        """The image with the fine detail of another picture."""
        other = self.any_picture().astype(np.int16)
        detail = other - cv2.GaussianBlur(other, (0, 0), self.rng.uniform(1, 4))
        detail = detail.mean(axis=2, keepdims=True) if self.chance(0.7) else detail
        return (image + detail * self.rng.uniform(0.7, 2.5)).clip(0, BYTES).astype(np.uint8)

    def place(self, image, matrix, canvas):
        """Draw the square image through the homography onto the canvas, which is changed and
        returned.
        """
        size, side = len(canvas), len(image)
        corners = matrix @ np.array([[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
        x, y = corners[:2] / corners[2]
        area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
        while side > 8 and side * 0.72 > size * math.sqrt(area):  # against aliasing
            side //= 2
        if side < len(image):
            image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        pixels = (
            shift(-0.5, -0.5)
            @ scale(size, size)
            @ matrix
            @ scale(1 / side, 1 / side)
            @ shift(0.5, 0.5)
        )
        border = {"borderMode": cv2.BORDER_TRANSPARENT}
        return cv2.warpPerspective(
            image, pixels, (size, size), dst=canvas, flags=cv2.INTER_LINEAR, **border
        )

    def screen(self):
        """What looks like a screen or a page: bars, paragraphs, rows of icons, small pictures."""
        zoom, dark = int(self.rng.integers(1, 4)), self.chance(0.25)
        size = self.size * zoom
        ground = int(self.rng.integers(0, 60) if dark else self.rng.integers(225, 256))
        canvas = np.full((size, size, 3), ground, np.uint8)

        def ink():
            grey = self.rng.integers(120, 256) if dark else self.rng.integers(0, 160)
            return [int(grey)] * 3 if self.chance(0.7) else self.colour()

        for _ in range(self.rng.integers(0, 4)):
            (left, right), (top, bottom) = np.sort(self.rng.integers(0, size, (2, 2))).tolist()
            if self.chance(0.5):
                left, right = 0, size
            elif self.chance(0.5):
                top, bottom = 0, size
            grey = int(np.clip(ground + self.rng.integers(-40, 40), 0, 255))
            colour = [grey] * 3 if self.chance(0.7) else self.colour()
            cv2.rectangle(canvas, (left, top), (right, bottom), colour, cv2.FILLED)
        for _ in range(self.rng.integers(1, 8)):
            (left, y), colour = self.rng.integers(0, size, 2).tolist(), ink()
            width, thickness = self.rng.integers(3, size // 2), int(self.rng.integers(1, 2 + zoom))
            for _ in range(self.rng.integers(1, 6)):
                for x in range(left, left + int(width * self.rng.uniform(0.4, 1)), 2 + zoom):
                    if self.chance(0.75):
                        cv2.line(canvas, (x, y), (x + 2, y), colour, thickness)
                y += int(self.rng.integers(2, 6)) * zoom
        for _ in range(self.rng.integers(0, 5)):
            (x, y), radius = (
                self.rng.integers(0, size, 2).tolist(),
                int(self.rng.integers(1, max(2, size // 14))),
            )
            step, down = radius * self.rng.uniform(2.2, 5), self.chance(0.4)
            colour, thickness = ink(), cv2.FILLED if self.chance(0.7) else 1
            for i in range(self.rng.integers(1, 9)):
                centre = (x, y + int(i * step)) if down else (x + int(i * step), y)
                cv2.circle(
                    canvas,
                    centre,
                    radius,
                    colour if self.chance(0.6) else ink(),
                    thickness,
                    cv2.LINE_AA,
                )
        for _ in range(self.rng.integers(1, 3) if self.chance(0.4) else 0):
            place = shift(*self.rng.uniform(0, 0.9, 2)) @ scale(*self.rng.uniform(0.08, 0.3, 2))
            self.place(self.any_picture(), place, canvas)
        return cv2.resize(canvas, (self.size, self.size), interpolation=cv2.INTER_AREA)

    def ground(self):
        """What a picture is put on: black, white, a colour, a screen, or another picture."""
        kind, blank = self.rng.uniform(), np.zeros((self.size, self.size, 3), np.uint8)
        if kind < 0.45:
            blank[:] = (
                self.rng.choice([0, 255, 128], p=[0.6, 0.35, 0.05]) if kind < 0.2 else self.colour()
            )
            return blank
        if kind < 0.75:
            return self.screen()
        other = cv2.resize(self.any_picture(), (self.size, self.size), interpolation=cv2.INTER_AREA)
        return cv2.GaussianBlur(other, (0, 0), self.size / 20) if self.chance(0.3) else other

    def crop(self, k):
        """Keep a part."""
        width, height = self.rng.uniform(1 - 0.6 * k, 1, 2)
        height = height if self.chance(0.7) else width
        return scale(1 / width, 1 / height) @ shift(
            -self.rng.uniform(0, 1 - width), -self.rng.uniform(0, 1 - height)
        )

    def embed(self, k):
        """Become a part."""
        width, height = self.rng.uniform(1 - (0.35 if self.chance(0.5) else 0.7) * k, 1, 2)
        if self.chance(0.3):
            width = 1
        elif self.chance(0.3):
            height = 1
        place = (0.5, 0.5) if self.chance(0.4) else self.rng.uniform(0, 1, 2)
        return shift(place[0] * (1 - width), place[1] * (1 - height)) @ scale(width, height)

    def rotate(self, k):
        """Turn a little, by right angles, or anyhow."""
        kind = self.rng.uniform()
        angle = (
            self.rng.uniform(-0.35, 0.35) * min(1, 1.5 * k)
            if kind < 0.6
            else self.rng.uniform(-math.pi, math.pi)
        )
        angle = math.pi / 2 * self.rng.integers(1, 4) if 0.6 <= kind < 0.8 else angle
        zoom = self.rng.uniform(0.7, 1) if self.chance(0.5) else self.rng.uniform(1, 1.4)
        cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
        return around_center(np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]))

    def shear(self, k):
        """Shift rows or columns, with or without losing corners."""
        amount = self.rng.uniform(-0.5, 0.5) * k
        zoom = 1 if self.chance(0.3) else 1 / (1 + abs(amount))
        matrix = np.array([[zoom, amount * zoom, 0], [0, 1, 0], [0, 0, 1]])
        return around_center(matrix if self.chance(0.5) else matrix[[1, 0, 2]][:, [1, 0, 2]])

    def perspective(self, k):
        """Move the corners."""
        corners = np.float32([[0, 0], [1, 0], [1, 1], [0, 1]])
        return cv2.getPerspectiveTransform(
            corners, corners + np.float32(self.rng.uniform(-0.25, 0.25, (4, 2)) * k)
        )

    def geometry(self, k):
        """Some of the homographies in random order, after a mirroring by chance."""
        matrix = scale(1, 1)
        if self.chance(0.12 * k):
            matrix = around_center(scale(-1, 1)) @ matrix
        if self.chance(0.03 * k):
            matrix = around_center(scale(1, -1)) @ matrix
        kinds = [self.crop, self.embed, self.rotate, self.shear, self.perspective]
        chances = [0.35, 0.5, 0.13 * k, 0.2, 0.15]
        for i in self.rng.permutation(len(kinds)):
            if self.chance(chances[i]):
                matrix = kinds[i](k) @ matrix
        return matrix

    def boxed(self, image):
        """The image within a letterbox or a border."""
        canvas = np.zeros_like(image)
        canvas[:] = self.colour() if self.chance(0.4) else 0
        size = (
            (self.rng.uniform(0.5, 0.95), 1) if self.chance(0.7) else self.rng.uniform(0.6, 0.95, 2)
        )
        return self.place(image, around_center(scale(*size)), canvas)

    def screenshot(self, image, k):
        """The image as a part of a screen."""
        image = self.boxed(image) if self.chance(0.4) else image
        width, height = self.rng.uniform(0.28, 1), self.rng.uniform(0.28, 0.75)
        left = 0.5 if self.chance(0.5) else self.rng.uniform()
        matrix = shift(left * (1 - width), self.rng.uniform(0, 1 - height)) @ scale(width, height)
        if self.chance(0.3):
            matrix = self.geometry(0.4 * k) @ matrix
        return self.place(image, matrix, self.screen())

    def stripes(self, image):
        """Parallel stripes over the image."""
        over, angle = image.copy(), self.rng.uniform(0, math.pi)
        along, across = np.array(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        )
        gap, colour = self.rng.uniform(0.08, 0.5) * self.size, self.colour()
        width = max(1, int(gap * self.rng.uniform(0.1, 0.6)))
        for distance in np.arange(-self.size, self.size, gap):
            middle, reach = across * distance + self.size / 2, along * 2 * self.size
            ends = np.int32([middle - reach, middle + reach]).tolist()
            cv2.line(over, *ends, colour, width, cv2.LINE_AA)
        return self.blend(image, over, self.rng.uniform(0.4, 1))

    def blend(self, image, over, opacity):
        """The image under another of this opacity."""
        return cv2.addWeighted(over, opacity, image, 1 - opacity, 0)

    def patch(self, image):
        """Another picture over a part of the image."""
        width, height = self.rng.uniform(0.15, 0.65, 2)
        place = shift(
            self.rng.uniform(-0.1, 1 - width), self.rng.uniform(-0.1, 1 - height)
        ) @ scale(width, height)
        over = self.place(self.any_picture(), place, image.copy())
        return self.blend(image, over, self.rng.uniform(0.4, 1) if self.chance(0.6) else 1)

    def veil(self, image):
        """Another picture, faint, over all of the image."""
        over = cv2.resize(self.any_picture(), (self.size, self.size), interpolation=cv2.INTER_AREA)
        return self.blend(image, over, self.rng.uniform(0.1, 0.45))

    def words(self, image):
        """Words over the image."""
        for _ in range(self.rng.integers(1, 4)):
            place = (
                int(self.rng.uniform(-0.1, 0.8) * self.size),
                int(self.rng.uniform(0.1, 1) * self.size),
            )
            size, thickness = (
                self.size / 100 * math.exp(self.rng.uniform(-0.5, 0.9)),
                int(self.rng.integers(1, 3)),
            )
            font = int(self.rng.integers(FONTS))
            cv2.putText(
                image, word(self.rng), place, font, size, self.colour(), thickness, cv2.LINE_AA
            )
        return image

    def stickers(self, image):
        """Faces, discs, and plain or noisy boxes over the image."""
        for _ in range(self.rng.integers(1, 4)):
            x, y = (self.rng.uniform(0, 1, 2) * self.size).astype(int).tolist()
            radius, colour = int(self.rng.uniform(0.03, 0.2) * self.size) + 1, self.colour()
            if self.chance(0.6):
                cv2.circle(image, (x, y), radius, colour, cv2.FILLED, cv2.LINE_AA)
                eyes = [int(x - 0.35 * radius), int(x + 0.35 * radius)] if self.chance(0.6) else []
                for eye in eyes:
                    centre = eye, int(y - 0.3 * radius)
                    cv2.circle(
                        image, centre, max(1, radius // 6), (0, 0, 0), cv2.FILLED, cv2.LINE_AA
                    )
                continue
            width, height = (self.rng.uniform(0.5, 2, 2) * radius).astype(int)
            box = image[y : y + height, x : x + width]
            box[:] = self.rng.integers(0, 256, box.shape) if self.chance(0.4) else colour
        return image

    def overlay(self, image, k):
        """Some things over the image."""
        kinds = [self.stripes, self.patch, self.veil, self.words, self.stickers]
        for kind, chance in zip(kinds, (0.15, 0.2, 0.06, 0.18, 0.15), strict=True):
            if self.chance(chance * k):
                image = kind(image)
        return image

    def compress(self, image, low, high):
        """The image after JPEG of a quality between two."""
        _, code = cv2.imencode(
            ".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(self.rng.uniform(low, high))]
        )
        return cv2.imdecode(code, cv2.IMREAD_COLOR)

    def degrade(self, image, k):
        """Other colours, less detail."""
        shape, uniform = (self.size, self.size), self.rng.uniform
        if self.chance(0.7 * k + 0.1):
            image = cv2.transform(image, self.colour_matrix(0.2 + 0.5 * k))
        if self.chance(0.1 * k):
            levels = 255 * (np.arange(256) / 255) ** math.exp(uniform(-0.8, 0.8))
            image = cv2.LUT(image, levels.astype(np.uint8))
        if self.chance(0.2 * k):
            image = cv2.GaussianBlur(image, (0, 0), self.size / 64 * uniform(0.3, 1.6))
        elif self.chance(0.12 * k):
            blocks = [int(self.size * uniform(0.25, 1))] * 2
            image = cv2.resize(image, blocks, interpolation=cv2.INTER_AREA)
            image = cv2.resize(image, shape, interpolation=cv2.INTER_NEAREST)
        if self.chance(0.05 * k):
            image = cv2.addWeighted(image, 2.5, cv2.GaussianBlur(image, (0, 0), 1), -1.5, 0)
        if self.chance(0.15 * k):
            grain = self.rng.normal(size=image.shape) * uniform(2, 30)
            image = (image + grain).clip(0, 255).astype(np.uint8)
        return self.compress(image, 25, 90) if self.chance(0.3 * k + 0.05) else image

    def edited(self, image, k):
        """A view of strength k in 0..1."""
        if self.chance(0.15 * k):
            image = self.screenshot(image, k)
        else:
            image = self.boxed(image) if self.chance(0.12 * k) else image
            image = self.place(image, self.geometry(k), self.ground())
        if self.chance(0.5):
            return self.overlay(self.degrade(image, k), k)
        return self.degrade(self.overlay(image, k), k)

    def augmented(self, image):
        """A view by the stages' hard augmentation, so that they do not begin with statistics
        unknown to BatchNorm.
        """
        values = self.augment(Image.fromarray(image)).clamp(0, 1) * BYTES
        return values.round().byte().permute(1, 2, 0).numpy()

    def plain(self, image):
        """The image as a reference is: only made smaller, by chance compressed."""
        image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        return self.compress(image, 50, 95) if self.chance(0.3) else image

    def pairs(self, number, k):
        """Views uint8 (2 * number, size, size, 3): plain or gentle ones of as many contents, then
        their hard ones.
        """
        views, image = np.empty((2, number, self.size, self.size, 3), np.uint8), None
        for gentle, hard in zip(*views, strict=True):
            image = self.content() if image is None or self.chance(0.65) else self.sibling(image)
            image = self.busy(image) if self.chance(0.25) else image
            gentle[:] = self.plain(image) if self.chance(0.65) else self.edited(image, k / 2)
            hard[:] = (
                self.augmented(image)
                if self.augment and self.chance(0.25)
                else self.edited(image, k)
            )
        return views.reshape(-1, *views.shape[2:])


class Batches(torch.utils.data.Dataset):
    """Batch of step i: views uint8 (2 * pairs, size, size, 3), harder over the first steps, larger
    in the last.
    """

    def __init__(self, args):
        files = sorted((args.out / "pictures").glob("*.npy"))[: args.pictures]
        pictures, size = [np.load(path, mmap_mode="r") for path in files], args.input_size
        overlays = v98.list_images(args.out / "input" / "training_images")
        self.args, self.early = args, Views(pictures, args.early_size)
        self.late = Views(
            pictures, size, v98.hard_augmentation(size, (0, 0, 0), (1, 1, 1), overlays)
        )

    def __len__(self):
        return self.args.steps

    def __getitem__(self, step):
        cv2.setNumThreads(1)
        views = self.early if step < self.args.steps * (1 - self.args.decay) else self.late
        views.seed(self.args.seed, 1, step)
        strength = min(1, 0.5 + 0.5 * step / self.args.ramp)
        return torch.from_numpy(views.pairs(self.args.pairs, strength))


# ---- training ----


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made nearly orthogonal before the step (Jordan et al. 2024).

    As torch.optim.Muon, but for convolutions too, and in float32: bfloat16 is twenty times slower
    on most CPUs.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Update the parameters, (rows, ...) each."""
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                rate = group["lr"] * max(1, len(update) / update.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                    update.view_as(parameter), alpha=-rate
                )


def orthogonal(matrix, steps=5):
    """The nearest matrix of singular values near 1, by a Newton-Schulz iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def rate(step, args):
    """The learning rate's share at a step: rising over `warmup` steps, falling to 0 over the last
    part, `decay`.
    """
    return min(1, (step + 1) / args.warmup, (1 - step / args.steps) / args.decay)


def load(path, mean_model, parts):
    """Load a checkpoint: the weights of the mean model, and the states of the `parts`, by name.

    Returns the number of steps that are done. Raises InputError where it is no checkpoint of this
    script.
    """
    checkpoint = v98.read_checkpoint(path)
    absent = {"step", *parts} - checkpoint.keys()
    if absent:
        names = ", ".join(sorted(absent))
        raise v98.InputError(f"{path}: is no checkpoint of pretrain_mini.py: it has no {names}")
    v98.load_weights(mean_model, checkpoint, path)
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["step"]


def train(args):
    """Train to args.steps, going on from last.pth.tar if it is there; writes the log, checkpoints,
    start.pth.tar.
    """
    keep_memory()
    torch.manual_seed(args.seed)
    cpu = torch.device("cpu")
    model = v98.create_model(args.arch, 1.0, 1.0, cpu)
    mean_model = v98.create_model(args.arch, 1.0, 1.0, cpu)
    mean_model.load_state_dict(model.state_dict())
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    parts = {
        "network": model,
        "matrices": Muon(matrices, args.lr, weight_decay=args.wd),
        "vectors": torch.optim.Adam(vectors, args.lr, betas=(0.9, 0.98)),
    }
    rates = {"matrices": 1, "vectors": 0.1}
    start, last = 0, args.out / "last.pth.tar"
    if last.exists():
        start = load(last, mean_model, parts)
    config = model.backbone.default_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) * BYTES for name in ("mean", "std"))
    batches = torch.utils.data.Subset(Batches(args), range(start, args.steps))
    loader = DataLoader(batches, None, num_workers=args.workers)
    sums, started = [], time.time()
    plain = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }

    def checkpoint(path, step, half=False):
        state = {name: value.half() if half and value.is_floating_point() else value
                 for name, value in stage_state(mean_model).items()}  # fmt: skip
        extra = {} if half else {name: part.state_dict() for name, part in parts.items()}
        write_checkpoint(
            path,
            {
                "state_dict": state,
                "arch": args.arch,
                "args": argparse.Namespace(**plain),
                "step": step,
            }
            | extra,
        )

    with (args.out / "log.jsonl").open("a") as log:
        print(
            json.dumps({"step": start, "args": plain, "versions": v98.library_versions()}),
            file=log,
            flush=True,
        )
        for step, views in enumerate(
            tqdm(loader, "training", args.steps, initial=start, unit="step"), start
        ):
            for name, share in rates.items():
                parts[name].param_groups[0]["lr"] = args.lr * share * rate(step, args)
            model.train()
            images = views.permute(0, 3, 1, 2).float().sub_(mean).div_(std)
            loss, found = info_nce(model(images), args.temperature)
            model.zero_grad()
            loss.backward()
            for name in rates:
                parts[name].step()
            update_mean(mean_model, model, min(args.ema, (step + 1) / (step + 10)))
            sums.append((loss.item(), found.item()))
            if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
                loss, found = np.mean(sums, axis=0).tolist()
                speed = 2 * args.pairs * len(sums) / (time.time() - started)
                line = {"step": step + 1, "loss": loss, "found": found, "rate": rate(step, args)}
                print(json.dumps(line | {"images_per_second": speed}), file=log, flush=True)
                sums, started = [], time.time()
            if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
                checkpoint(last, step + 1)
    checkpoint(args.out / "start.pth.tar", args.steps, half=True)


# ---- main ----


def parse_args(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write into; goes on with what is there")
    add(
        "-a",
        "--arch",
        default="test_byobnet",
        help="backbone, any name timm knows (default: %(default)s)",
    )
    add(
        "--input-size",
        type=int,
        default=96,
        help="side of the square input, pixels (default: %(default)s)",
    )
    add(
        "--early-size",
        type=int,
        default=64,
        help="side until the rate falls, cheaper (default: %(default)s)",
    )
    add(
        "--pictures",
        type=int,
        default=20,
        help="thousands of generated pictures (default: %(default)s)",
    )
    add("--pairs", type=int, default=128, help="pairs of views per step (default: %(default)s)")
    add("--steps", type=int, default=5000, help="of training (default: %(default)s)")
    add(
        "--lr",
        type=float,
        default=0.02,
        help="Muon's rate; Adam's is a tenth (default: %(default)s)",
    )
    add("--wd", type=float, default=0.02, help="weight decay of matrices (default: %(default)s)")
    add("--temperature", type=float, default=0.07, help="of the loss (default: %(default)s)")
    add(
        "--warmup",
        type=int,
        default=150,
        help="steps over which the rate rises (default: %(default)s)",
    )
    add(
        "--ramp",
        type=int,
        default=1500,
        help="steps over which the edits grow harder (default: %(default)s)",
    )
    add(
        "--decay",
        type=float,
        default=0.3,
        help="share of the steps over which the rate falls (default: %(default)s)",
    )
    add(
        "--ema",
        type=float,
        default=0.995,
        help="how much of the mean weights a step keeps (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("-j", "--workers", type=int, default=1, help="loader processes (default: %(default)s)")
    add(
        "--log-every",
        type=int,
        default=50,
        help="steps per line of log.jsonl (default: %(default)s)",
    )
    add(
        "--checkpoint-every",
        type=int,
        default=250,
        help="steps between two last.pth.tar (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int | float) and value < (
            1e-9 if isinstance(value, float) else name not in ("seed", "workers")
        ):
            parser.error(f"--{name.replace('_', '-')} {value}: is too small")
    return args


@one_line_errors
def main(argv=None):
    """Make the pictures and train; returns the exit code."""
    args = parse_args(argv)
    folder = args.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    make = functools.partial(write_pictures, folder=folder, seed=args.seed)
    list(parallel(make, range(args.pictures), os.cpu_count(), "pictures"))
    write_images(args.out)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
