"""The augmentations: geometry against the golden values, each operation and each whole view against
the published one, statistics over 2,000 draws, and images that are a trap.
"""

import inspect
import json
import random
from collections import Counter
from itertools import combinations
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw
from scipy.stats import binom, kstest
from torchvision import transforms

import published_augmentation as published
import v83
import v86
import v98
from conftest import GOLDEN

STAGES = {"v83": v83, "v86": v86, "v98": v98}
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
WIDTH, HEIGHT = 80, 72
SIZE = 64  # of the views
DRAWS = 2000
SHUFFLED = (
    "jitter",
    "pixelize",
    "shuffle_pixels",
    "encoding_quality",
    "to_grayscale",
    "gaussian_blur",
    "perspective",
    "horizontal_flip",
    "vertical_flip",
    "text",
    "emoji",
    "edges",
)
GEOMETRY = json.loads((GOLDEN / "augment_geometry.json").read_text())


def seed_all(seed):
    random.seed(seed)
    torch.manual_seed(seed)


def apply_seeded(seed, transform, image):
    seed_all(seed)
    return transform(image)


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(width, height, seed=0):
    return np.array(Image.fromarray(noise(12, 10, seed)).resize((width, height), Image.BICUBIC))


def difference(pixels, image):
    """Absolute difference of pixels and another image, either an array or PIL's."""
    return np.abs(np.asarray(pixels, int) - np.asarray(image, int))


def assert_equal(pixels, image):
    assert np.array_equal(pixels, np.asarray(image))


def random_state():
    """What the generators would draw next."""
    return random.random(), torch.rand(1).item()


@pytest.fixture
def overlay_path(tmp_path):
    path = tmp_path / "overlay.png"
    Image.fromarray(noise(40, 50, seed=1)).save(path)
    return str(path)


def decide_by(patch, value):
    """From now on, an operation with a probability happens if that is more than `value`."""
    patch.setattr(torch, "rand", lambda *size: torch.full(size, value))
    patch.setattr(random, "random", lambda: value)


@pytest.fixture
def certain(monkeypatch):
    """Have every operation happen that happens with a probability: a function that begins it."""
    return lambda: decide_by(monkeypatch, 0.0)


# ---- geometry ----
@pytest.mark.parametrize("row", GEOMETRY["rotate"]["rows"], ids=lambda row: "{}x{}-{}".format(*row))
def test_rotation_keeps_the_published_rectangle(row):
    width, height, degrees, *expected = row
    pixels = noise(width, height)
    assert list(published.rotate(Image.fromarray(pixels), degrees).size) == expected
    assert list(v83.rotate(pixels, degrees).shape) == [*expected[::-1], 3]


@pytest.mark.parametrize("case", [0, 1])
def test_rotation_gives_the_published_pixels(case):
    """Nearest neighbor, counter-clockwise: all but a few pixels, at rounding edges."""
    arrays = np.load(GOLDEN / "augment_geometry.npz")
    expected = arrays[f"rotate_{case}"]
    rotated = v83.rotate(arrays["image"], float(arrays[f"rotate_{case}_degrees"]))
    assert rotated.shape == expected.shape
    assert (rotated == expected).all(axis=2).mean() > 0.98


@pytest.mark.parametrize("row", GEOMETRY["pixelization"]["rows"], ids=lambda row: f"{row[2]:.3f}")
def test_pixelization_goes_through_the_published_size(monkeypatch, row):
    width, height, ratio, *small_size = row
    monkeypatch.setattr(random, "uniform", lambda low, high: ratio)
    image = Image.fromarray(noise(width, height))
    expected = image.resize(small_size).resize(image.size)
    assert_equal(v83.pixelize(np.array(image)), expected)
    assert_equal(published.pixelize(image), expected)


def overlay_arrays(background, overlay, *parameters):
    """The published overlay, of arrays."""
    images = Image.fromarray(background), Image.fromarray(overlay)
    return np.array(published.overlay_image(*images, *parameters))


@pytest.mark.parametrize("overlay_image", [v83.overlay_image, overlay_arrays])
@pytest.mark.parametrize("case", GEOMETRY["overlay"])
def test_overlay_box_and_opacity(overlay_image, case):
    background = np.zeros((*case["background"][::-1], 3), np.uint8)
    overlay = np.full((*case["overlay"][::-1], 3), (200, 100, 50), np.uint8)
    look = background, overlay, case["opacity"], case["overlay_size"]

    merged = Image.fromarray(overlay_image(*look, case["x_pos"], case["y_pos"]))
    left, top, right, bottom = case["visible_box"]
    assert merged.getbbox() == (left, top, right, bottom)
    center = (left + right) // 2, (top + bottom) // 2
    np.testing.assert_allclose(merged.getpixel(center), case["pixel"], atol=1)

    in_the_corner = Image.fromarray(overlay_image(*look, 0, 0))
    clipped = np.minimum(case["resized"], case["background"])
    assert in_the_corner.getbbox() == (0, 0, *clipped)


def test_shuffling_moves_a_tenth_and_never_the_same():
    index = np.arange(32 * 32).reshape(32, 32)
    numbered = np.stack([index // 256, index % 256, index * 0], axis=2).astype(np.uint8)
    seed_all(0)
    patterns = set()
    for _ in range(20):
        shuffled = v83.shuffle_pixels(numbered)
        source = shuffled[..., 0].astype(int) * 256 + shuffled[..., 1]
        assert sorted(source.ravel()) == list(range(32 * 32))
        assert 90 <= (source != index).sum() <= 102
        patterns.add(source.tobytes())
    assert len(patterns) == 20


# ---- operations that give the published pixels ----
SIZES = [(80, 72), (71, 90), (300, 40), (9, 200), (2, 3)]


@pytest.mark.parametrize(("width", "height"), [*SIZES, (1, 1)])
def test_edges_are_the_published_ones(width, height):
    flat = np.full((height, width, 3), (255, 128, 1), np.uint8)
    for pixels in (noise(width, height), smooth(width, height), flat):
        for seed in range(10):
            enhanced = apply_seeded(seed, v83.enhance_edges, pixels)
            expected = apply_seeded(seed, published.enhance_edges, Image.fromarray(pixels))
            assert_equal(enhanced, expected)


@pytest.mark.parametrize("name", ["pixelize", "encode_as_jpeg", "overlay_text", "overlay_emoji"])
def test_operations_are_identical_to_the_published_ones(name):
    """The same draws and the same pixels: for text also fonts, glyphs, sizes, colors and places,
    for pixelization also the ratio.
    """
    pixels = smooth(200, 150)
    image = Image.fromarray(pixels)
    changed = 0
    for seed in range(60):
        result = apply_seeded(seed, getattr(v83, name), pixels)
        state = random_state()
        expected = apply_seeded(seed, getattr(published, name), image)
        assert state == random_state()
        assert_equal(result, expected)
        changed += not np.array_equal(result, pixels)
    assert changed > 45  # a glyph without a layout, or outside the border, changes nothing


def test_gray_and_mirror_images_are_identical_to_the_published_ones():
    pixels = noise(80, 72)
    image = Image.fromarray(pixels)
    assert_equal(v83.to_grayscale(pixels), transforms.Grayscale(3)(image))
    assert_equal(v83.horizontal_flip(pixels), TF.hflip(image))
    assert_equal(v83.vertical_flip(pixels), TF.vflip(image))


# ---- approximations ----
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_rotation_is_near_the_published(width, height):
    """All but 1 of 200 pixels."""
    pixels = noise(width, height)
    before = pixels.copy()
    drawn = np.random.default_rng(0).uniform(0, 180, 60)
    shares = []
    for degrees in [0.0, 1e-9, 45.0, 90.0, 90.1, 135.0, 180.0, *drawn.tolist()]:
        if min(v83.rotated_rect_with_max_area(width, height, degrees)) >= 2:
            rotated = v83.rotate(pixels, degrees)
            expected = np.array(published.rotate(Image.fromarray(pixels), degrees))
            assert rotated.shape == expected.shape, degrees
            shares.append((rotated == expected).all(axis=2).mean())
    assert np.mean(shares) > 0.995
    assert min(shares) > 0.95
    assert (pixels == before).all()


@pytest.mark.parametrize("kind", [noise, smooth])
@pytest.mark.parametrize(("width", "height"), SIZES[:-1])  # the last: no pixel of an overlay
def test_overlay_is_near_the_published(kind, width, height):
    background = kind(width, height)
    overlay = kind(40, 50, seed=1)
    before = background.copy(), overlay.copy()
    for parameters in np.random.default_rng(0).uniform((0.4, 0.2, 0, 0), 1, (40, 4)).tolist():
        merged = v83.overlay_image(background, overlay, *parameters)
        expected = overlay_arrays(background, overlay, *parameters)
        assert difference(merged, expected).max() <= 2
    assert (background == before[0]).all() and (overlay == before[1]).all()


@pytest.mark.parametrize("kind", [noise, smooth])
@pytest.mark.parametrize(("width", "height"), [*SIZES, (1, 1)])
def test_blur_is_near_the_published(kind, width, height):
    pixels = kind(width, height)
    for radius in (1e-3, 0.1, 0.5, 1, 1.5, 2, 3, 5, 7.7, 9.99, 10):
        expected = published.gaussian_blur(Image.fromarray(pixels), radius)
        assert difference(v83.gaussian_blur(pixels, radius), expected).max() <= 3, radius


@pytest.mark.parametrize("kind", [noise, smooth])
@pytest.mark.parametrize(("width", "height"), [*SIZES, (1, 1)])
def test_crop_is_near_the_published(kind, width, height):
    """The same draws; values within 1, of a few pixels within 2."""
    ours = v83.RandomResizedCrop(SIZE, scale=(0.15, 1.0))
    theirs = transforms.RandomResizedCrop(SIZE, scale=(0.15, 1.0))
    far = 0
    for seed in range(40):
        pixels = kind(width, height, seed)
        crop = apply_seeded(seed, ours, pixels)
        state = random_state()
        expected = apply_seeded(seed, theirs, Image.fromarray(pixels))
        assert state == random_state()
        assert difference(crop, expected).max() <= 2
        far += (difference(crop, expected) > 1).sum()
    assert far <= 3


@pytest.mark.parametrize("size", [(64, 48), (50, 99), (128, 128), (300, 200)])
def test_resizing_is_near_pillows(size):
    """Not tested: bicubic resizing of noise by unequal factors; nothing here does it."""
    for kind, interpolation, most in (
        (noise, Image.BILINEAR, 1),
        (smooth, Image.BILINEAR, 1),
        (smooth, Image.BICUBIC, 2),
    ):
        pixels = kind(96, 80)
        resized = v83.resize(pixels, size, interpolation)
        expected = Image.fromarray(pixels).resize(size[::-1], interpolation)
        assert difference(resized, expected).max() <= most


@pytest.mark.parametrize("kind", [noise, smooth])
@pytest.mark.parametrize(
    ("operation", "most", "share"),
    [(0, 1, 0.003), (1, 1, 0.003), (2, 1, 0.003), (3, 13, 0.42)],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_jitter_is_near_the_published(monkeypatch, kind, operation, most, share):
    """Each operation alone: the largest difference, and the share of values that differ."""
    draw = transforms.ColorJitter.get_params

    def draw_alone(*ranges):
        _, *factors = draw(*ranges)
        return torch.tensor([operation]), *factors

    monkeypatch.setattr(transforms.ColorJitter, "get_params", staticmethod(draw_alone))
    ours = v83.ColorJitter(0.8, 0.8, 0.8, 0.2)
    theirs = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    differences = []
    for seed in range(30):
        pixels = kind(64, 48, seed)
        result = apply_seeded(seed, ours, pixels)
        expected = apply_seeded(seed, theirs, Image.fromarray(pixels))
        differences.append(difference(result, expected))
        assert (result != pixels).any()
    assert np.max(differences) <= most
    assert np.mean(np.array(differences) > 0) <= share


def test_all_of_jitter_is_near_the_published():
    """The same draws, and the same order of the four operations."""
    ours = v83.ColorJitter(0.8, 0.8, 0.8, 0.2)
    theirs = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    for seed in range(60):
        pixels = smooth(96, 80, seed)
        result = apply_seeded(seed, ours, pixels)
        state = random_state()
        expected = apply_seeded(seed, theirs, Image.fromarray(pixels))
        assert state == random_state()
        assert difference(result, expected).max() <= 40
        assert np.median(difference(result, expected)) <= 1


@pytest.mark.parametrize("kind", [noise, smooth])
def test_perspective_is_near_the_published(kind):
    """The same draws; values within 1, but for some pixels of the outline."""
    ours = v83.RandomPerspective(0.5, p=0.5)
    theirs = transforms.RandomPerspective(0.5, p=0.5)
    changed = 0
    for seed in range(60):
        pixels = kind(96, 80, seed)
        result = apply_seeded(seed, ours, pixels)
        state = random_state()
        expected = apply_seeded(seed, theirs, Image.fromarray(pixels))
        assert state == random_state()
        assert (difference(result, expected).max(axis=2) > 1).sum() <= 5, seed
        changed += (result != pixels).any()
    assert 15 < changed < 45


# ---- whole views against the published ones ----
@pytest.fixture
def photos(tmp_path):
    """Paths of four images."""
    paths = []
    for number in range(4):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(smooth(320, 240, number)).save(paths[-1])
    return paths


@pytest.mark.parametrize("kind", [noise, smooth])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("width", "height"), [(80, 72), (300, 40), (9, 200), (1, 1)])
def test_equal_seeds_give_the_published_moderate_view(kind, stage, width, height):
    unit = (0.0,) * 3, (1 / 255,) * 3  # mean and std that give values from 0 to 255
    ours = STAGES[stage].moderate_augmentation(SIZE, *unit)
    theirs = published.moderate_augmentation(SIZE, *unit)
    image = Image.fromarray(kind(width, height))
    for seed in range(10):
        view = apply_seeded(seed, ours, image)
        state = random_state()
        expected = apply_seeded(seed, theirs, image)
        assert state == random_state()
        assert (view - expected).abs().max() <= 1.01


def number_of_shuffled(view):
    """How many operations a hard view has in random order."""
    (shuffled,) = [step for step in view.transforms if isinstance(step, transforms.RandomOrder)]
    return len(shuffled.transforms)


@pytest.mark.parametrize("stage", STAGES)
def test_equal_seeds_give_the_published_hard_view(monkeypatch, stage, photos):
    """Order, probabilities and parameters of all operations at once: any difference would show.

    Without shuffling pixels, because the patterns differ, and without erasing, a later step.
    """
    module = STAGES[stage]
    for owner in (module, published):
        monkeypatch.setattr(owner, "shuffle_pixels", lambda pixels: pixels)
    ours = module.hard_view(SIZE, photos)
    theirs = published.hard_image(published.RECIPES[stage], SIZE, photos)
    if number_of_shuffled(ours) != number_of_shuffled(theirs):
        pytest.skip(f"{stage} has other operations than the published one")
    ratios = []
    for seed in range(100):
        path = photos[seed % len(photos)]
        view = apply_seeded(seed, ours, module.read_pixels(path))
        expected = apply_seeded(seed, theirs, published.open_image(path))
        error = np.square(difference(view.pixels, expected)).mean()
        ratios.append(10 * np.log10(255**2 / max(error, 1e-3)))  # peak signal-to-noise ratio, dB
    assert min(ratios) > 20
    assert np.quantile(ratios, 0.1) > 30
    assert np.median(ratios) > 40


@pytest.mark.parametrize("stage", STAGES)
def test_the_published_views_are_finite_and_square(stage, photos):
    views = [
        published.moderate_augmentation(SIZE, MEAN, STD),
        published.hard_augmentation(published.RECIPES[stage], SIZE, MEAN, STD, photos),
    ]
    for seed in range(20):
        for view in views:
            image = apply_seeded(seed, view, published.open_image(photos[0]))
            assert image.shape == (3, SIZE, SIZE)
            assert image.isfinite().all()


# ---- statistics ----
class Recorder:
    """Replaces functions and notes their calls: `calls` holds a list for each draw."""

    def __init__(self, patch):
        self.patch = patch
        self.calls = []

    def note(self, name, **values):
        self.calls[-1].append(SimpleNamespace(name=name, **values))

    def replace(self, owner, function_name):
        """Replace an operation by one that notes its arguments and returns its first one, so that a
        draw costs little."""
        signature = inspect.signature(getattr(owner, function_name))

        def stub(*args, **kwargs):
            self.note(function_name, **signature.bind(*args, **kwargs).arguments)
            return args[0]

        self.patch.setattr(owner, function_name, stub)

    def observe_params(self, kind, name):
        """Note what get_params of a transform of torchvision draws, and for which image."""
        get_params = kind.get_params

        def observed(*args, **kwargs):
            params = get_params(*args, **kwargs)
            self.note(name, drawn_for=args[0], params=params)
            return params

        self.patch.setattr(kind, "get_params", staticmethod(observed))

    def observe_pillow(self):
        """Note text and emojis instead of drawing them."""
        opened = []
        open_image = Image.open

        def observed_open(path, **options):
            opened.append(path)
            return open_image(path, **options)

        def write(_draw, place, text, color, font):
            self.note("text", place=place, text=text, color=color, font=font)

        def paste(_image, emoji, place, _mask):
            self.note("emoji", size=emoji.size, place=place, path=opened[-1])

        self.patch.setattr(Image, "open", observed_open)
        self.patch.setattr(Image.Image, "paste", paste)
        self.patch.setattr(ImageDraw.ImageDraw, "text", write)

    def observe_edges(self, cv2):
        """Note the kernels of edge filters instead of applying them."""

        def filter2D(pixels, _depth, kernel, **_options):
            self.note("edges", kernel=kernel)
            return pixels

        self.patch.setattr(cv2, "filter2D", filter2D)


@pytest.fixture(scope="module", params=STAGES)
def draws(request, tmp_path_factory):
    """2,000 hard views of a stage: the calls of each, the erasings, and the published recipe."""
    stage = STAGES[request.param]
    path = str(tmp_path_factory.mktemp("overlay") / "overlay.png")
    Image.fromarray(noise(20, 30, seed=1)).save(path)
    image = Image.fromarray(noise(WIDTH, HEIGHT))
    erasings = []
    happened = []
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        for name in ("rotate", "overlay_image", "gaussian_blur", "shuffle_pixels", "to_grayscale"):
            recorder.replace(stage, name)
        for name in ("horizontal_flip", "vertical_flip", "pixelize"):
            recorder.replace(stage, name)
        recorder.replace(stage.imaugs, "encoding_quality")
        recorder.observe_params(transforms.RandomResizedCrop, "crop")
        recorder.observe_params(transforms.ColorJitter, "jitter")
        recorder.observe_params(transforms.RandomPerspective, "perspective")
        recorder.observe_pillow()
        recorder.observe_edges(stage.cv2)
        hard = stage.hard_view(SIZE, [path])
        seed_all(2021)
        for _ in range(DRAWS):
            recorder.calls.append([])
            view = hard(image)
            assert view.pixels.shape == (SIZE, SIZE, 3)
            erasings.append(view.erasing)
        calls = recorder.calls
        for value in np.arange(0.0125, 1, 0.025).tolist():
            decide_by(patch, value)
            recorder.calls = [[]]
            if hard(image).erasing is not None:
                recorder.note("erasing")
            happened += {call.name for call in recorder.calls[0]}
    return SimpleNamespace(
        calls=calls,
        happened=Counter(happened),
        erasings=[erasing for erasing in erasings if erasing is not None],
        recipe=published.RECIPES[request.param],
        stage=stage,
    )


def calls_of(draws, name):
    return [call for calls in draws.calls for call in calls if call.name == name]


def params_of(draws, name):
    return [call.params for call in calls_of(draws, name)]


def assert_probability(count, total, p, what=None, confidence=1 - 1e-5):
    """`count` of `total` lies within the binomial interval around `p`."""
    low, high = binom.interval(confidence, total, p)
    assert low <= count <= high, (what, count, total, p)


def assert_uniform(values, low, high):
    """Within the range, up to its ends (the chance that none of n comes as close is exp(-12)), and
    spread evenly.
    """
    reach = 12 * (high - low) / len(values)
    assert low <= min(values) <= low + reach
    assert high - reach <= max(values) <= high
    assert kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-4


def test_probabilities(draws):
    """By 2,000 draws; and exactly, by 40 values that a draw is compared with, 1/80 to 79/80."""
    recipe = draws.recipe
    expected = {
        "rotate": recipe.p,
        "overlay_image": recipe.overlay_p,
        "pixelize": 0.25,
        "shuffle_pixels": 0.25,
        "encoding_quality": recipe.p,
        "to_grayscale": 0.25,
        "gaussian_blur": 0.25,
        "perspective": recipe.p,
        "horizontal_flip": 0.5,
        "vertical_flip": 0.1,
        "text": recipe.p,
        "emoji": recipe.p,
        "edges": recipe.edge_p,
        "erasing": 0.25,
        "crop": 1,
        "jitter": 1,
    }
    for name, p in expected.items():
        count = sum(any(call.name == name for call in calls) for calls in draws.calls)
        if name == "erasing":
            count = len(draws.erasings)
        assert_probability(count, DRAWS, p, name)
        assert draws.happened[name] == round(40 * p), name


def test_fixed_order_before_the_shuffled_list(draws):
    for calls in draws.calls:
        names = [call.name for call in calls]
        before_crop = names[: names.index("crop")]
        fixed = ["rotate", "overlay_image"]
        assert before_crop == [name for name in fixed if name in names]


def test_the_list_is_shuffled_uniformly(draws):
    """Of any two operations that happen in a draw, either comes first equally often; each takes
    every place.
    """
    firsts = {pair: [] for pair in combinations(SHUFFLED, 2)}
    places = []
    for calls in draws.calls:
        names = [call.name for call in calls if call.name in SHUFFLED]
        order = list(dict.fromkeys(names))  # a second line of text is no second operation
        for first, second in combinations(order, 2):
            if (first, second) in firsts:
                firsts[first, second].append(True)
            else:
                firsts[second, first].append(False)
        places.append((order.index("jitter") + random.random()) / len(order))
    for pair, came_first in firsts.items():
        assert_probability(sum(came_first), len(came_first), 0.5, pair)
    assert_uniform(places, 0, 1)


def test_rotation_and_color_ranges(draws):
    assert_uniform([call.degrees for call in calls_of(draws, "rotate")], 0, 180)
    jitter = draws.recipe.jitter
    orders, brightness, contrast, saturation, hue = zip(*params_of(draws, "jitter"), strict=True)
    for factors in (brightness, contrast, saturation):
        assert_uniform(factors, 1 - jitter, 1 + jitter)
    assert_uniform(hue, -0.2, 0.2)
    for operation in range(4):
        count = sum(order[0].item() == operation for order in orders)
        assert_probability(count, DRAWS, 1 / 4)


def test_overlay_ranges(draws):
    overlays = calls_of(draws, "overlay_image")
    assert_uniform([call.opacity for call in overlays], draws.recipe.opacity_lower, 1)
    assert_uniform([call.overlay_size for call in overlays], *draws.recipe.overlay_sizes)
    assert_uniform([call.x_pos / (1 - call.overlay_size) for call in overlays], 0, 1)
    assert_uniform([call.y_pos / (1 - call.overlay_size) for call in overlays], 0, 1)
    own_is_background = [call.background.shape == (HEIGHT, WIDTH, 3) for call in overlays]
    own_is_overlay = [call.overlay.shape == (HEIGHT, WIDTH, 3) for call in overlays]
    assert own_is_overlay == [not background for background in own_is_background]
    assert_probability(sum(own_is_background), len(overlays), 0.5)


def test_crop_ranges(draws):
    """Gentle after an overlay, strong otherwise; the aspect ratio is that of RandomResizedCrop, 3/4
    to 4/3.
    """
    strong = []
    for calls in draws.calls:
        crop = next(call for call in calls if call.name == "crop")
        overlaid = any(call.name == "overlay_image" for call in calls)
        _, _, height, width = crop.params
        area = height * width / crop.drawn_for[0].numel()
        assert (0.68 if overlaid else 0.14) <= area <= 1
        assert 3 / 4 - 0.05 <= width / height <= 4 / 3 + 0.05
        if not overlaid:
            strong.append(area)
    assert min(strong) < 0.2
    assert np.mean(np.array(strong) < 0.5) > 0.3


def test_ranges_of_the_shuffled_list(draws):
    assert_uniform([call.radius for call in calls_of(draws, "gaussian_blur")], 0, 10)
    qualities = [call.quality for call in calls_of(draws, "encoding_quality")]
    centers = [round(call.kernel[1, 1]) for call in calls_of(draws, "edges")]
    for choices, drawn in (((10, 20, 30, 50), qualities), ((5, 9), centers)):
        assert set(drawn) == set(choices)
        for choice in choices:
            assert_probability(drawn.count(choice), len(drawn), 1 / len(choices))
    moves = [
        np.abs(np.subtract(start, end)).max() for start, end in params_of(draws, "perspective")
    ]
    assert 0.4 * SIZE / 2 < max(moves) <= 0.5 * SIZE / 2


def test_text(draws):
    lines_of_draws = []
    for calls in draws.calls:
        lines = [call for call in calls if call.name == "text"]
        if lines:
            lines_of_draws.append(lines)
    sizes = []
    for first, *others in lines_of_draws:
        assert 0.1 * SIZE - 1 < first.font.size < 0.3 * SIZE
        assert len(first.color) == 3
        assert all(isinstance(value, int) and 0 <= value <= 255 for value in first.color)
        for line in (first, *others):
            assert 5 <= len(line.text) <= 9
            assert set(line.text) <= set(draws.stage.glyphs(line.font.path))
        for line in others:
            assert line.font == first.font
            assert line.color == first.color
            assert line.place[0] == first.place[0]
            sizes.append((line.place[1] - first.place[1]) / SIZE)  # one font size lower
            assert first.font.size == int(sizes[-1] * SIZE + 1e-9)
    assert_uniform(sizes, 0.1, 0.3)
    assert {len(lines) for lines in lines_of_draws} == {1, 2}
    assert_probability(len(sizes), len(lines_of_draws), 0.5)

    firsts = [lines[0] for lines in lines_of_draws]
    assert_uniform([line.place[0] / SIZE for line in firsts], 0, 0.5)
    assert_uniform([line.place[1] / SIZE for line in firsts], 0, 0.5)
    assert {len(line.text) for line in firsts} == {5, 6, 7, 8, 9}
    glyph_places = []
    for line in firsts:
        glyphs = draws.stage.glyphs(line.font.path)
        if len(glyphs) > 100:
            glyph_places.append(glyphs.index(line.text[0]) / len(glyphs))
    assert_uniform(glyph_places, 0, 1)


def test_fonts(draws):
    """All of AugLy's but two, with equal chance."""
    drawn = {call.font.path for call in calls_of(draws, "text")}
    names = {Path(path).name for path in draws.stage.FONTS}
    assert len(names) == 363
    assert not [name for name in names if name.startswith(("TypeMyMusic", "PainttheSky-Regular"))]
    number = sum(any(call.name == "text" for call in calls) for calls in draws.calls)
    # Of 363 with equal chance, n draws take about 363 x (1 - exp(-n / 363)) different ones.
    expected = 363 * (1 - np.exp(-number / 363))
    assert len(drawn) == pytest.approx(expected, rel=0.1)


def test_emoji(draws):
    emojis = calls_of(draws, "emoji")
    sizes = [call.size[0] for call in emojis]
    assert all(call.size[0] == call.size[1] for call in emojis)
    # 0.1 * SIZE to 0.3 * SIZE, cut off to whole pixels
    assert {6, 7, 18, 19} <= set(sizes) <= set(range(6, 20))
    assert np.mean(sizes) == pytest.approx(0.2 * SIZE - 0.5, abs=1)
    whole = np.array([size for size in sizes if 6 < size < 19])
    assert_uniform(whole + np.random.default_rng(0).random(len(whole)), 7, 19)
    for axis in (0, 1):
        assert_uniform([(call.place[axis] + 0.5) / SIZE for call in emojis], 0, 1)
    assert 80 <= len({call.path for call in emojis}) <= 92


def test_erasing(draws):
    """Boxes of 2% to 33% of the image, of ratios from 0.3 to 3.3; a seed of its own for each."""
    tall = []
    for box in draws.erasings:
        assert 0 <= box.top <= SIZE - box.height
        assert 0 <= box.left <= SIZE - box.width
        assert (box.height - 0.5) * (box.width - 0.5) <= 0.33 * SIZE**2
        assert (box.height + 0.5) * (box.width + 0.5) >= 0.02 * SIZE**2
        assert (box.height + 0.5) / (box.width - 0.5) >= 0.3
        assert (box.height - 0.5) / (box.width + 0.5) <= 3.3
        tall.append(box.height > box.width)
    assert np.mean(tall) == pytest.approx(0.5, abs=0.1)
    areas = [box.height * box.width / SIZE**2 for box in draws.erasings]
    assert np.mean(areas) == pytest.approx(0.175, abs=0.02)
    assert np.std(areas) == pytest.approx(0.31 / 12**0.5, abs=0.01)
    for places in ([box.top for box in draws.erasings], [box.left for box in draws.erasings]):
        assert min(places) < 3 and max(places) > 45
    assert len({box.seed for box in draws.erasings}) == len(draws.erasings)


def test_the_noise_of_erasing(draws):
    """N(0, 1), of its own for each image."""
    preprocess = draws.stage.Preprocess((0.0,) * 3, (1.0,) * 3)
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    noises = []
    for box in draws.erasings:
        image = preprocess.one(draws.stage.View(black, box))
        inside = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
        noises.append(inside.flatten())
        assert image.count_nonzero() == inside.count_nonzero() == inside.numel()
    values = torch.cat(noises)
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)
    assert kstest(values[:20000].numpy(), "norm").pvalue > 1e-4
    assert len({noise[0].item() for noise in noises}) > 0.99 * len(noises)


@pytest.mark.parametrize("stage", STAGES)
def test_moderate_statistics(monkeypatch, stage):
    recorder = Recorder(monkeypatch)
    recorder.replace(STAGES[stage], "horizontal_flip")
    recorder.observe_params(transforms.RandomResizedCrop, "crop")
    moderate = STAGES[stage].moderate_view(SIZE)
    image = noise(WIDTH, HEIGHT)
    recorder.calls.append([])
    seed_all(0)
    for _ in range(500):
        view = moderate(image)
        assert view.pixels.shape == (SIZE, SIZE, 3)
        assert view.erasing is None
    (calls,) = recorder.calls
    crops = [call.params for call in calls if call.name == "crop"]
    areas = [height * width / (WIDTH * HEIGHT) for _, _, height, width in crops]
    assert 0.68 <= min(areas) < 0.75
    assert max(areas) <= 1
    assert_probability(len(calls) - len(crops), 500, 0.5)


# ---- special cases ----
@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_glyph_that_cannot_be_laid_out_leaves_the_image(monkeypatch, error):
    """In the first line, or in the second one."""
    image = noise(SIZE, SIZE)
    write = ImageDraw.ImageDraw.text
    lines_left = []

    def write_some(draw, *args):
        if not lines_left:
            raise error("raster overflow")
        lines_left.pop()
        write(draw, *args)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write_some)
    changed = 0
    for seed in range(30):
        lines_left[:] = []
        assert_equal(apply_seeded(seed, v83.overlay_text, image), image)
        lines_left[:] = ["the first"]
        written = apply_seeded(seed, v83.overlay_text, image)
        changed += not np.array_equal(written, image)  # where the text has one line
    assert 3 < changed < 27


THIN = [(1, 1), (1, 500), (500, 1), (2, 2), (3, 400), (90, 70), (20000, 30)]


@pytest.mark.parametrize("size", THIN, ids=lambda size: "{}x{}".format(*size))
def test_thin_images(tmp_path, certain, size):
    """As the image and as the overlay, with the published probabilities and with every operation
    happening.
    """
    paths = []
    for width, height in THIN:
        paths.append(str(tmp_path / f"{width}x{height}.png"))
        Image.fromarray(noise(width, height)).save(paths[-1])
    image = Image.fromarray(noise(*size))
    hard = v98.hard_augmentation(SIZE, MEAN, STD, paths)
    moderate = v98.moderate_augmentation(SIZE, MEAN, STD)
    seed_all(0)
    views = [hard(image) for _ in range(20)]
    views += [moderate(image) for _ in range(5)]
    certain()
    views += [hard(image) for _ in range(20)]
    for view in views:
        assert view.shape == (3, SIZE, SIZE)
        assert view.dtype == torch.float32
        assert view.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_an_image_too_thin_to_be_cut_passes_unrotated(size):
    pixels = noise(*size)
    for seed in range(20):
        rotated = apply_seeded(seed, v83.rotate_randomly, pixels)
        assert sorted(rotated.shape[:2]) == sorted(size)


def test_rotation_needs_no_canvas_of_gigabytes():
    assert v83.rotate(np.zeros((200, 60_000, 3), np.uint8), 45.0).shape[0] in (141, 142)


def test_views_do_not_change_the_image(overlay_path, certain):
    """Also where the image has the size of the views, so that a crop may be all of it."""
    pixels = noise(SIZE, SIZE)
    before = pixels.copy()
    hard = v83.hard_view(SIZE, [overlay_path])
    moderate = v83.moderate_view(SIZE)
    for seed in range(40):
        apply_seeded(seed, moderate, pixels)
        apply_seeded(seed, hard, pixels)
    certain()
    for seed in range(20):
        apply_seeded(seed, hard, pixels)
    assert_equal(pixels, before)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_any_mode_becomes_rgb(tmp_path, certain, mode):
    path = str(tmp_path / ("image.jpg" if mode == "CMYK" else "image.png"))
    Image.fromarray(noise(60, 50)).convert(mode).save(path)
    opened = v83.open_image(path)
    assert opened.mode == "RGB"
    assert opened.size == (60, 50)
    assert_equal(v83.read_pixels(path), opened)
    hard = v83.hard_augmentation(SIZE, MEAN, STD, [path])
    moderate = v83.moderate_augmentation(SIZE, MEAN, STD)
    certain()
    for seed in range(5):
        for view in (hard, moderate):
            with Image.open(path) as unconverted:
                result = apply_seeded(seed, view, unconverted)
            assert result.shape == (3, SIZE, SIZE)
            assert torch.equal(result, apply_seeded(seed, view, opened))


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_view(stage, overlay_path):
    module = STAGES[stage]
    image = Image.fromarray(noise(WIDTH, HEIGHT))
    first = module.hard_augmentation(SIZE, MEAN, STD, [overlay_path])
    second = module.hard_augmentation(SIZE, MEAN, STD, [overlay_path])
    different = set()
    for seed in range(20):
        view = apply_seeded(seed, first, image)
        assert torch.equal(view, apply_seeded(seed, second, image))
        different.add(view.numpy().tobytes())
    assert len(different) == 20


@pytest.mark.parametrize("stage", STAGES)
def test_pixels_give_the_view_of_their_image(stage, overlay_path, tmp_path, certain):
    """What read_pixels reads: every draw, every value."""
    module = STAGES[stage]
    path = tmp_path / "image.jpg"
    Image.fromarray(smooth(WIDTH, HEIGHT)).save(path)
    image = module.open_image(path)
    pixels = module.read_pixels(path)
    hard = module.hard_augmentation(SIZE, MEAN, STD, [overlay_path])
    moderate = module.moderate_augmentation(SIZE, MEAN, STD)

    def assert_same_view(seed, view):
        of_image = apply_seeded(seed, view, image)
        assert torch.equal(of_image, apply_seeded(seed, view, pixels))

    for seed in range(20):
        assert_same_view(seed, hard)
        assert_same_view(seed, moderate)
    certain()
    for seed in range(5):
        assert_same_view(seed, hard)


# ---- data loading ----
@pytest.fixture
def input_folder(tmp_path):
    """Twelve training images, and four reference images beside them."""
    for folder, number in (("training_images", 12), ("reference_images", 4)):
        (tmp_path / folder).mkdir()
        for i in range(number):
            Image.fromarray(smooth(WIDTH, HEIGHT, i)).save(tmp_path / folder / f"{i:02}.jpg")
    return tmp_path


def make_dataset(stage, root):
    """The stage's TrainDataset of three views, one moderate and two hard ones."""
    options = {"input_size": SIZE, "ncrops": 3, "sample_size": 100, "seed": 7}
    if stage == "v98":
        options["fast_input"] = False
    return STAGES[stage].TrainDataset(root / "training_images", **options)


@pytest.mark.parametrize("stage", STAGES)
def test_views_reach_data_loader_workers_that_are_not_forked(stage, overlay_path, input_folder):
    """From Python 3.14 on they are not forked on Linux either: they get the dataset by pickle."""
    module = STAGES[stage]
    assert ForkingPickler.dumps(module.hard_augmentation(SIZE, MEAN, STD, [overlay_path]))
    assert ForkingPickler.dumps(module.moderate_augmentation(SIZE, MEAN, STD))
    assert ForkingPickler.dumps(make_dataset(stage, input_folder))


@pytest.mark.parametrize("stage", STAGES)
def test_a_sample_holds_the_views_that_the_augmentations_give(stage, input_folder):
    module = STAGES[stage]
    dataset = make_dataset(stage, input_folder)
    dataset.epoch = 5
    preprocess = module.Preprocess(MEAN, STD)
    moderate = module.moderate_augmentation(SIZE, MEAN, STD)
    hard = module.hard_augmentation(SIZE, MEAN, STD, dataset.paths)
    for index in range(len(dataset)):
        views, labels = dataset[index]
        assert labels[:3] == [index] * 3
        image = module.open_image(dataset.paths[index])
        module.seed_generators(7, 5, index)
        expected = [moderate(image), hard(image), hard(image)]
        for view, expected_view in zip(views[:3], expected, strict=True):
            assert torch.equal(preprocess.one(view), expected_view)


@pytest.mark.parametrize("stage", STAGES)
def test_views_do_not_depend_on_the_batch(stage, input_folder):
    """Nor on the number of processes: pixels, boxes and noise depend on the image alone."""
    module = STAGES[stage]
    dataset = make_dataset(stage, input_folder)
    preprocess = module.Preprocess(MEAN, STD)

    def load(indices):
        batch, messages = module.load_samples(dataset, indices)
        assert messages == []
        return preprocess(batch.pixels, batch.erasings), batch

    indices = list(range(12))
    images, batch = load(indices)
    assert len(batch.erasings) > 2
    rows = len(images) // 12
    for world_size in (2, 4):
        for rank in range(world_size):
            torch.manual_seed(rank)  # each rank has a seed of its own
            own = np.split(np.array(indices), world_size)[rank].tolist()
            own_images, own_batch = load(own)
            own_rows = slice(rows * own[0], rows * (own[-1] + 1))
            assert torch.equal(own_images, images[own_rows])
            assert torch.equal(own_batch.labels, batch.labels[own_rows])


# ---- preprocessing on the device ----
def erasing_views(size):
    """100 views, many with a box to erase, by seeds 0 to 99."""
    erase = v83.RandomErasing(p=0.7)
    return [apply_seeded(seed, erase, noise(size, size, seed)) for seed in range(100)]


def preprocess_by_torchvision(view):
    """ToTensor, erasing by the noise of the view's seed, and Normalize."""
    image = TF.to_tensor(view.pixels)
    if view.erasing is not None:
        top, left, height, width, seed = view.erasing
        generator = torch.Generator().manual_seed(seed)
        box = torch.randn(3, height, width, generator=generator)
        image = TF.erase(image, top, left, height, width, box)
    return TF.normalize(image, MEAN, STD)


@pytest.mark.parametrize("size", [SIZE, 1], ids=["usual", "too small to erase"])
def test_preprocessing_is_bit_identical_to_torchvisions(size):
    """Of a whole batch, and of each view alone."""
    views = erasing_views(size)
    erased = [number for number, view in enumerate(views) if view.erasing is not None]
    assert 50 < len(erased) < 90 or (size == 1 and not erased)
    expected = torch.stack([preprocess_by_torchvision(view) for view in views])

    samples = [(views[:30], [*range(30)]), (views[30:], [*range(30, 100)])]
    batch = v83.collate(samples)
    assert batch.pixels.dtype == torch.uint8
    assert batch.labels.tolist() == [*range(100)]
    assert [row for row, _ in batch.erasings] == erased
    preprocess = v83.Preprocess(MEAN, STD)
    images = preprocess(batch.pixels, batch.erasings)
    assert torch.equal(images, expected)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    for number, view in enumerate(views):
        assert torch.equal(preprocess.one(view), expected[number])
        assert_equal(view.pixels, noise(size, size, number))  # unchanged
        assert_equal(batch.pixels[number].numpy(), view.pixels)


def test_erasing_draws_as_torchvision_does():
    """Whether, and the size of the box. (Its place is drawn before the noise, not after it.)"""
    erase = transforms.RandomErasing(p=0.7, value="random")
    for seed, view in enumerate(erasing_views(SIZE)):
        image = TF.to_tensor(view.pixels)
        changed = (apply_seeded(seed, erase, image) != image).any(dim=0)
        size = changed.any(dim=1).sum().item(), changed.any(dim=0).sum().item()
        if view.erasing is None:
            assert size == (0, 0)
        else:
            assert size == (view.erasing.height, view.erasing.width)


def test_noise_depends_on_the_seed_of_the_image_alone():
    """It neither takes from the generator of the process nor changes it."""
    preprocess = v83.Preprocess(MEAN, STD)
    view = next(view for view in erasing_views(SIZE) if view.erasing is not None)
    results = []
    for seed in (0, 1):
        seed_all(seed)
        state = torch.get_rng_state()
        results.append(preprocess.one(view))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*results)
    other = view._replace(erasing=view.erasing._replace(seed=view.erasing.seed + 1))
    assert not torch.equal(preprocess.one(other), results[0])


def test_the_view_is_normalized():
    """Mean and std of each channel shift and scale [0, 1]."""
    black = Image.new("RGB", (WIDTH, HEIGHT))
    view = v83.moderate_augmentation(SIZE, (0.25, 0.5, 0.75), (0.5, 0.25, 0.125))(black)
    np.testing.assert_allclose(view[:, 0, 0], [-0.5, -2, -6], rtol=1e-6)
