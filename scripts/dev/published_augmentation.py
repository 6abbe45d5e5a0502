"""The published augmentation, by AugLy, torchvision and Pillow on PIL images: the oracle of tests
and benchmark.

exp/v83.py, v86.py and v98.py do the same on arrays, faster, by approximations. Here nothing is
approximated. The random draws happen in the same order as in the stages, so equal seeds give equal
views, up to the errors that the stages state. Two operations differ: AugLy shuffles pixels by
another pattern, and torchvision draws the noise of erasing before the place of the box.

Needs AugLy. Imports nothing of this project.
"""

import pickletools
import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pylibmagic  # noqa: F401  libmagic for AugLy, where the system has none
from augly import image as imaugs
from augly.image.utils import rotated_rect_with_max_area
from augly.utils import FONTS_DIR, SMILEY_EMOJI_DIR
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import RandomApply


class Recipe(NamedTuple):
    """What differs between the hard views of the stages."""

    jitter: float  # of brightness, contrast and saturation
    p: float  # of rotation, JPEG, perspective, text and emoji
    edge_p: float
    overlay_p: float
    opacity_lower: float  # of the overlay, at least
    overlay_sizes: tuple  # range of the overlay's height, as a share of the background's


RECIPES = {
    "v83": Recipe(
        jitter=0.7,
        p=0.25,
        edge_p=0.25,
        overlay_p=0.05,
        opacity_lower=0.6,
        overlay_sizes=(0.4, 0.6),
    ),
    "v86": Recipe(
        jitter=0.75,
        p=0.30,
        edge_p=0.30,
        overlay_p=0.075,
        opacity_lower=0.5,
        overlay_sizes=(0.3, 0.7),
    ),
    "v98": Recipe(
        jitter=0.8,
        p=0.35,
        edge_p=0.30,
        overlay_p=0.10,
        opacity_lower=0.4,
        overlay_sizes=(0.2, 0.8),
    ),
}
EDGE_FILTERS = (ImageFilter.EDGE_ENHANCE, ImageFilter.EDGE_ENHANCE_MORE)
EMOJIS = sorted(str(path) for path in Path(SMILEY_EMOJI_DIR).iterdir())
FONTS = sorted(
    str(path) for path in Path(FONTS_DIR).glob("*.ttf") if "TypeMyMusic" not in str(path)
)
JPEG_QUALITIES = (10, 20, 30, 50)


# ---- views ----
def moderate_image(input_size):
    """The moderate view before it becomes a tensor: a callable from a PIL image in mode RGB to
    another one."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(input_size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(p=0.5),
        ]
    )


def hard_image(recipe, input_size, overlay_paths):
    """The hard view before it becomes a tensor: a callable from a PIL image in mode RGB to another
    one."""
    j = recipe.jitter
    p = recipe.p
    shuffled = [
        transforms.ColorJitter(brightness=j, contrast=j, saturation=j, hue=0.2),
        RandomApply([pixelize], p=0.25),
        RandomApply([shuffle_pixels], p=0.25),
        RandomApply([encode_as_jpeg], p=p),
        transforms.RandomGrayscale(p=0.25),
        RandomApply([blur], p=0.25),
        transforms.RandomPerspective(distortion_scale=0.5, p=p),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomVerticalFlip(p=0.1),
        RandomApply([overlay_text], p=p),
        RandomApply([overlay_emoji], p=p),
        RandomApply([enhance_edges], p=recipe.edge_p),
    ]
    return transforms.Compose(
        [
            RandomApply([rotate_randomly], p=p),
            OverlayAndCrop(recipe, input_size, overlay_paths),
            transforms.RandomOrder(shuffled),
        ]
    )


def moderate_augmentation(input_size, mean, std):
    """The moderate view: a callable from a PIL image in mode RGB to float32 (3, input_size,
    input_size)."""
    return transforms.Compose(
        [
            moderate_image(input_size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def hard_augmentation(recipe, input_size, mean, std, overlay_paths):
    """The hard view: a callable from a PIL image in mode RGB to float32 (3, input_size,
    input_size)."""
    return transforms.Compose(
        [
            hard_image(recipe, input_size, overlay_paths),
            transforms.ToTensor(),
            transforms.RandomErasing(p=0.25, value="random"),
            transforms.Normalize(mean, std),
        ]
    )


def open_image(path):
    """The image of a file, in mode RGB."""
    return Image.open(path).convert("RGB")


# ---- operations ----
# Each takes and returns a PIL image in mode RGB.
def rotate_randomly(image):
    """Rotate by 0 to 180 degrees. An image too thin for AugLy stays as it is."""
    degrees = random.uniform(0, 180)
    if min(rotated_rect_with_max_area(*image.size, degrees)) < 2:
        return image
    return rotate(image, degrees)


def rotate(image, degrees):
    """Rotate counter-clockwise, and keep the largest upright rectangle inside."""
    return imaugs.rotate(image, degrees=degrees)


class OverlayAndCrop:
    """With probability overlay_p, another image over or under this one, then a gentle crop;
    otherwise a strong crop."""

    def __init__(self, recipe, input_size, overlay_paths):
        self.recipe = recipe
        self.overlay_paths = overlay_paths
        self.strong_crop = transforms.RandomResizedCrop(input_size, scale=(0.15, 1.0))
        self.gentle_crop = transforms.RandomResizedCrop(input_size, scale=(0.7, 1.0))

    def __call__(self, image):
        if random.random() > self.recipe.overlay_p:
            return self.strong_crop(image)
        pair = [image, open_image(random.choice(self.overlay_paths))]
        random.shuffle(pair)
        background, overlay = pair
        size = random.uniform(*self.recipe.overlay_sizes)
        opacity = random.uniform(self.recipe.opacity_lower, 1)
        x = random.uniform(0, 1 - size)
        y = random.uniform(0, 1 - size)
        return self.gentle_crop(overlay_image(background, overlay, opacity, size, x, y))


def overlay_image(background, overlay, opacity, overlay_size, x_pos, y_pos):
    """Lay `overlay` over `background`; sizes and places are shares of the background's."""
    return imaugs.overlay_image(
        background,
        overlay,
        opacity=opacity,
        overlay_size=overlay_size,
        x_pos=x_pos,
        y_pos=y_pos,
    )


def pixelize(image):
    """Shrink by a ratio in 0.1 to 1, and enlarge again."""
    return imaugs.pixelization(image, ratio=random.uniform(0.1, 1.0))


def shuffle_pixels(image):
    """Shuffle a tenth of the pixels. (The published code left AugLy its one seed, hence one
    pattern.)"""
    return imaugs.shuffle_pixels(image, factor=0.1, seed=random.getrandbits(32))


def encode_as_jpeg(image):
    """Encode as JPEG of one of JPEG_QUALITIES, and decode."""
    return imaugs.encoding_quality(image, quality=random.choice(JPEG_QUALITIES))


def blur(image):
    """Blur by a Gaussian with a radius of 0 to 10 pixels."""
    return gaussian_blur(image, random.uniform(0, 10))


def gaussian_blur(image, radius):
    """Blur by a Gaussian of this radius (standard deviation)."""
    return imaugs.blur(image, radius=radius)


def overlay_text(image):
    """Write one or two lines of random glyphs. Where the font cannot lay one out, the image stays
    as it is."""
    font_path = random.choice(FONTS)
    font_size = random.uniform(0.1, 0.3)
    color = tuple(random.choices(range(256), k=3))
    x = random.uniform(0, 0.5)
    y = random.uniform(0, 0.5)
    written = image
    for line in range(random.randint(1, 2)):
        glyphs = random.choices(range(count_glyphs(font_path)), k=random.randint(5, 9))
        try:
            written = imaugs.overlay_text(
                written,
                text=glyphs,
                font_file=font_path,
                font_size=font_size,
                color=color,
                x_pos=x,
                y_pos=y + line * font_size,
            )
        except (OSError, RuntimeError):
            return image
    return written


@cache
def count_glyphs(font_path):
    """How many characters AugLy lists for a font.

    The list is a pickle of numbers beside the font; its opcodes are read, not run.
    """
    opcodes = pickletools.genops(Path(font_path).with_suffix(".pkl").read_bytes())
    return sum(code.name.startswith("BININT") for code, _, _ in opcodes)


def overlay_emoji(image):
    """Paste a random smiley at a random place, with a height of 0.1 to 0.3 of the image's."""
    path = random.choice(EMOJIS)
    size = random.uniform(0.1, 0.3)
    x = random.uniform(0, 1)
    y = random.uniform(0, 1)
    return imaugs.overlay_emoji(image, emoji_path=path, emoji_size=size, x_pos=x, y_pos=y)


def enhance_edges(image):
    """Apply one of Pillow's EDGE_FILTERS."""
    return imaugs.apply_pil_filter(image, filter_type=random.choice(EDGE_FILTERS))
