"""The augmentations: geometry against the golden values, statistics over 2,000 draws, and images
that are a trap.
"""

import inspect
import json
import random
from functools import partial
from itertools import combinations
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFilter
from scipy.stats import binom, kstest
from torchvision import transforms

import v83
import v86
import v98
from conftest import GOLDEN

imaugs = v83.imaugs  # AugLy, as the scripts import it: with its C library
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
STAGES = {"v83": v83, "v86": v86, "v98": v98}

# SPEC 4's table: the published recipe of each stage.
RECIPES = {
    "v83": {
        "J": 0.7,
        "p": 0.25,
        "edge_p": 0.25,
        "overlay_p": 0.05,
        "opacity": 0.6,
        "size": (0.4, 0.6),
    },
    "v86": {
        "J": 0.75,
        "p": 0.30,
        "edge_p": 0.30,
        "overlay_p": 0.075,
        "opacity": 0.5,
        "size": (0.3, 0.7),
    },
    "v98": {
        "J": 0.8,
        "p": 0.35,
        "edge_p": 0.30,
        "overlay_p": 0.10,
        "opacity": 0.4,
        "size": (0.2, 0.8),
    },
}
SHUFFLED = (
    "jitter",
    "pixelization",
    "shuffle_pixels",
    "encoding_quality",
    "rgb_to_grayscale",
    "blur",
    "perspective",
    "hflip",
    "vflip",
    "overlay_text",
    "overlay_emoji",
    "enhance_edges",
)
AUGLY = ("pixelization", "encoding_quality", "blur")
OURS = ("rotate", "overlay_image", "shuffle_pixels")  # of the scripts
TORCHVISION = (
    "adjust_brightness",
    "adjust_contrast",
    "adjust_saturation",
    "adjust_hue",
    "rgb_to_grayscale",
    "perspective",
)
WIDTH, HEIGHT, SIZE, DRAWS = 80, 72, 64, 2000


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 AugLy draws from the global generator
    torch.manual_seed(seed)


def seeded(seed, transform, image):
    seed_all(seed)
    return transform(image)


def picture(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def array(width, height, seed=0):
    return np.array(picture(width, height, seed))


def piece(hard, name):
    """One operation of a hard augmentation, of arrays, made certain; SPEC 4 gives their order."""
    outer = ("to_array", "rotation", "overlay")
    found = (
        hard.transforms[outer.index(name)]
        if name in outer
        else hard.transforms[3].transforms[SHUFFLED.index(name)]
    )
    if name in ("overlay", "enhance_edges"):  # functions with their recipe
        found.keywords["overlay_p" if name == "overlay" else "p"] = 1.0
    else:  # by_pillow's steps, or itself
        (found.transforms[1] if type(found) is transforms.Compose else found).p = 1.0
    return found


@pytest.fixture
def overlay_path(tmp_path):
    path = tmp_path / "overlay.png"
    picture(40, 50, seed=1).save(path)
    return str(path)


@pytest.fixture
def hard(overlay_path):
    return v83.hard_augmentation(SIZE, MEAN, STD, [overlay_path])


@pytest.fixture
def exact(overlay_path):
    return v83.hard_augmentation(SIZE, MEAN, STD, [overlay_path], exact=True)


# ---- geometry ----

GEOMETRY = json.loads((GOLDEN / "augment_geometry.json").read_text())


@pytest.mark.parametrize("row", GEOMETRY["rotate"]["rows"], ids=lambda row: "{}x{}-{}".format(*row))
def test_rotation_keeps_the_published_rectangle(hard, exact, monkeypatch, row):
    width, height, degrees, *expected = row
    monkeypatch.setattr(random, "uniform", lambda low, high: degrees)
    for transform in (hard, exact):
        assert list(piece(transform, "rotation")(array(width, height)).shape) == [
            *expected[::-1],
            3,
        ]


@pytest.mark.parametrize("case", [0, 1])
def test_rotation_pixels(hard, monkeypatch, case):
    """Nearest neighbour, counter-clockwise: all but a few pixels at rounding edges are the
    published ones.
    """
    arrays = np.load(GOLDEN / "augment_geometry.npz")
    degrees, expected = float(arrays[f"rotate_{case}_degrees"]), arrays[f"rotate_{case}"]
    monkeypatch.setattr(random, "uniform", lambda low, high: degrees)
    result = piece(hard, "rotation")(arrays["image"])
    assert result.shape == expected.shape
    assert (result == expected).all(axis=2).mean() > 0.98


def test_pixelization_sizes(hard, monkeypatch):
    transform, sizes, resize = piece(hard, "pixelization"), [], v83.resize
    monkeypatch.setattr(
        v83,
        "resize",
        lambda image, size, *args: sizes.append([*size]) or resize(image, size, *args),
    )
    for width, height, ratio, *small in GEOMETRY["pixelization"]["rows"]:
        monkeypatch.setattr(random, "uniform", lambda low, high, ratio=ratio: ratio)
        sizes.clear()
        assert transform(array(width, height)).shape == (height, width, 3)
        assert sizes == [small[::-1], [height, width]]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("case", GEOMETRY["overlay"])
def test_overlay_box_and_opacity(tmp_path, monkeypatch, case, exact):
    Image.new("RGB", case["overlay"], (200, 100, 50)).save(tmp_path / "overlay.png")
    black = np.zeros((*case["background"][::-1], 3), np.uint8)
    hard = v83.hard_augmentation(SIZE, MEAN, STD, [str(tmp_path / "overlay.png")], exact)
    transform, places, resized = piece(hard, "overlay"), [], []
    transform.keywords["crops"] = [np.asarray] * 2

    def uniform(low, high):
        if low == 0:
            places.append((case["x_pos"], case["y_pos"])[len(places) % 2])
            return places[-1]
        return case["opacity"] if high == 1 else case["overlay_size"]

    near, pillows = v83.resize, Image.Image.resize
    monkeypatch.setattr(
        v83,
        "resize",
        lambda image, size, kind: resized.append(size[::-1]) or near(image, size, kind),
    )
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size: resized.append([*size]) or pillows(self, size)
    )
    monkeypatch.setattr(random, "uniform", uniform)
    for seed in range(40):  # until this image is the background
        seed_all(seed)
        resized.clear()
        merged = Image.fromarray(transform(black))
        if merged.size == (black.shape[1], black.shape[0]) and merged.getpixel((0, 0)) == (0, 0, 0):
            break
    left, top, right, bottom = case["visible_box"]
    assert resized == [case["resized"]]
    assert merged.getbbox() == (left, top, right, bottom)
    pixel = merged.getpixel(((left + right) // 2, (top + bottom) // 2))
    np.testing.assert_allclose(pixel, case["pixel"], atol=1)


def numbered(side):
    """An image whose pixels tell their flat index."""
    index = np.arange(side * side).reshape(side, side)
    return np.stack([index // 256, index % 256, index * 0], axis=2).astype(np.uint8)


def source_index(image):
    return image[..., 0].astype(int) * 256 + image[..., 1]


def test_shuffling_moves_a_tenth_and_never_the_same(hard):
    transform, index = piece(hard, "shuffle_pixels"), np.arange(1024).reshape(32, 32)
    seed_all(0)
    patterns = [source_index(transform(numbered(32))) for _ in range(20)]
    for pattern in patterns:
        assert sorted(pattern.ravel()) == list(range(1024))
        assert 90 <= (pattern != index).sum() <= 102
    assert len({pattern.tobytes() for pattern in patterns}) == 20


# ---- what is computed otherwise than by AugLy and Pillow, to the same pixels ----

SIZES = [(80, 72), (71, 90), (300, 40), (9, 200), (2, 3)]


@pytest.mark.parametrize(("width", "height"), [*SIZES, (1, 1)])
def test_edges_give_pillows_pixels(width, height):
    kinds = (ImageFilter.EDGE_ENHANCE, ImageFilter.EDGE_ENHANCE_MORE)
    published = imaugs.OneOf([imaugs.ApplyPILFilter(kind) for kind in kinds], p=0.5)
    for image in (picture(width, height), Image.new("RGB", (width, height), (255, 128, 1))):
        for seed in range(20):
            edged = seeded(seed, partial(v83.enhance_edges, p=0.5), np.asarray(image))
            assert (edged == np.asarray(seeded(seed, published, image))).all()


def test_text_gives_auglys_pixels(monkeypatch):
    """Its glyphs and places, told by what Pillow is asked to draw."""
    image, drawn, draw, different = picture(200, 150), [], ImageDraw.ImageDraw.text, 0

    def note(self, place, text, fill, font):
        draw(self, place, text, fill, font)
        drawn.append((place, text, fill, font))

    for seed in range(60):
        drawn.clear()
        with monkeypatch.context() as patch:
            patch.setattr(ImageDraw.ImageDraw, "text", note)
            written = seeded(seed, v83.overlay_text, image)
        if written is image:  # a glyph that could not be laid out
            continue
        expected = image
        for (x, y), text, fill, font in drawn:
            numbers, size = (
                [v83.glyphs(font.path).index(glyph) for glyph in text],
                (font.size + 0.5) / 150,
            )
            expected = imaugs.overlay_text(
                expected, None, numbers, font.path, size, 1.0, fill, x / 200, y / 150
            )
        assert written == expected
        different += written != image
    assert different > 50


def test_emojis_give_auglys_pixels(monkeypatch):
    image, draws = picture(200, 150), []
    uniform, choice = random.uniform, random.choice
    monkeypatch.setattr(
        random, "uniform", lambda low, high: draws.append(uniform(low, high)) or draws[-1]
    )
    monkeypatch.setattr(random, "choice", lambda paths: draws.append(choice(paths)) or draws[-1])
    for seed in range(40):
        draws.clear()
        emojified = seeded(seed, v83.overlay_emoji, image.copy())
        path, size, x, y = draws
        assert emojified == imaugs.overlay_emoji(image, None, path, 1.0, size, x, y)


# ---- near-equals of AugLy's and Pillow's operations ----


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_rotation_is_near_auglys(width, height):
    """All but some pixels at rounding edges; exact, all of them."""
    image, same = array(width, height), []
    for degrees in [
        0.0,
        1e-9,
        45.0,
        90.0,
        90.1,
        135.0,
        180.0,
        *np.random.default_rng(0).uniform(0, 180, 40).tolist(),
    ]:
        if min(v83.rotated_rect_with_max_area(width, height, degrees)) >= 2:
            expected = np.asarray(imaugs.rotate(Image.fromarray(image), degrees=degrees))
            assert np.array_equal(v83.rotate(image, degrees, exact=True), expected), degrees
            rotated = v83.rotate(image, degrees, exact=False)
            assert rotated.shape == expected.shape, degrees
            same.append((rotated == expected).all(axis=2).mean())
    assert np.mean(same) > 0.98
    assert min(same) > 0.9


@pytest.mark.parametrize(
    ("width", "height"), SIZES[:-1]
)  # on the last, an overlay would have no pixels
def test_overlay_is_near_auglys(width, height):
    image, overlay = array(width, height), array(40, 50, seed=1)
    before, pair, rng = (
        image.copy(),
        (Image.fromarray(image), Image.fromarray(overlay)),
        np.random.default_rng(0),
    )
    for opacity, size, x, y in rng.uniform((0.4, 0.2, 0, 0), 1, (40, 4)).tolist():
        expected = np.asarray(imaugs.overlay_image(*pair, None, opacity, size, x, y)).astype(int)
        for exact in (True, False):
            result = v83.overlay_image(image, overlay, opacity, size, x, y, exact)
            assert np.abs(result - expected).max() <= 2 * (not exact)
    assert (image == before).all()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("width", "height"), [(80, 72), (300, 40), (9, 200), (1, 1)])
def test_crops_differ_by_one_at_most(stage, width, height):
    """The same draws, and what torchvision and Pillow make of them."""
    image = picture(width, height)
    for seed in range(20):
        views = []
        for exact in (True, False):
            seed_all(seed)
            view = STAGES[stage].moderate_augmentation(SIZE, (0.0,) * 3, (1 / 255,) * 3, exact)(
                image
            )
            views.append((view, torch.rand(1), random.random()))
        assert (views[0][0] - views[1][0]).abs().max() <= 1.01
        assert views[0][1:] == views[1][1:]


@pytest.mark.parametrize(("kind", "tolerance"), [(0, 0.3), (1, 0.3), (2, 0.3), (3, 6)])
def test_jitter_is_near_pillows(monkeypatch, kind, tolerance):
    """Brightness, contrast, saturation, hue, each alone: the root of the mean squared difference,
    of 255.
    """
    image = picture(8, 6).resize((64, 48), Image.BICUBIC)
    for seed in range(30):
        results = []
        for module in (transforms.ColorJitter, v83.ColorJitter):
            jitter = module(0.7, 0.7, 0.7, 0.2)
            seed_all(seed)
            _, *factors = jitter.get_params(
                jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
            )
            monkeypatch.setattr(
                jitter, "get_params", lambda *_, f=factors: (torch.tensor([kind]), *f)
            )
            results.append(
                np.asarray(jitter(image if module is transforms.ColorJitter else np.asarray(image)))
            )
        assert np.sqrt(((results[0].astype(int) - results[1]) ** 2).mean()) <= tolerance
        assert (results[0] != np.asarray(image)).any()


RECIPE = {
    "crop": {"size": 64, "scale": (0.15, 1.0)},
    "jitter": {"brightness": 0.7, "contrast": 0.7, "saturation": 0.7, "hue": 0.2},
    "pixelization": {"min_ratio": 0.1, "max_ratio": 1.0, "p": 0.5},
    "blur": {"min_radius": 0.0, "max_radius": 10.0, "p": 0.5},
    "perspective": {"p": 0.5},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", RECIPE)
def test_operations_are_near_the_published(stage, name):
    """The same draws; values that differ by a few at most, hue and some pixels of the perspective's
    outline aside.
    """
    most, far = {
        "crop": (1, 0),
        "jitter": (40, 0),
        "pixelization": (2, 0),
        "blur": (3, 0),
        "perspective": (1, 5),
    }[name]
    near, published = (
        dict(zip(RECIPE, STAGES[stage].operations(exact), strict=True))[name](**RECIPE[name])
        for exact in (False, True)
    )
    changed = 0
    for seed in range(60):
        image = np.array(picture(12, 10, seed).resize((96, 80), Image.BICUBIC))
        results = []
        for transform in (near, published):
            seed_all(seed)
            results.append((transform(image), torch.rand(1), random.random()))
        (result, *draws), (expected, *same_draws) = results
        difference = np.abs(result - expected.astype(int)).max(axis=2)
        assert draws == same_draws
        assert (difference > most).sum() <= far, seed
        changed += result.shape != image.shape or (result != image).any()
    assert changed > 15


# ---- statistics ----


@pytest.fixture(scope="module", params=RECIPES)
def draws(request, tmp_path_factory):
    """What 2,000 hard augmentations of a stage ask of the libraries, and of the script: a list of
    calls for each draw.

    The functions are replaced by stubs that note their arguments and return the image, so that a
    draw costs little.
    """
    path = tmp_path_factory.mktemp("overlay") / "overlay.png"
    picture(20, 30, seed=1).save(path)
    calls, paths, opened = [], [], Image.open

    def stub(module, name, result=lambda image, call: image):
        signature = inspect.signature(getattr(module, name))

        def noted(image, *args, **kwargs):
            arguments = signature.bind(image, *args, **kwargs).arguments
            call = SimpleNamespace(**arguments | {"name": name, "image": image})
            calls[-1].append(call)
            return result(image, call)

        return noted

    def note(name, result, **arguments):
        calls[-1].append(SimpleNamespace(name=name, **arguments))
        return result

    def open_image(path, **options):
        paths.append(path)
        return opened(path, **options)

    def write(_draw, place, text, color, font):
        note("overlay_text", None, place=place, text=text, color=color, font=font)

    def paste(image, sprite, place, _mask):
        note("overlay_emoji", None, size=sprite.size, place=place, path=paths[-1])

    def flip(image, flipCode):
        return note("hflip" if flipCode else "vflip", image)

    def view(pixels, *erased):
        return note("erase", View(pixels, *erased), erased=erased) if erased else View(pixels)

    def filter_pixels(pixels, _, kernel, **_kwargs):
        return note("enhance_edges", pixels, kernel=kernel)

    resized = {"resized_crop": lambda image, call: image.resize((SIZE, SIZE))}
    with pytest.MonkeyPatch.context() as patch:
        for name in AUGLY:
            replacement = stub(imaugs.functional, name)
            patch.setattr(imaugs.functional, name, replacement)
            patch.setattr(imaugs, name, replacement)
        for name in TORCHVISION:
            patch.setattr(TF, name, stub(TF, name))
        for name, result in resized.items():
            patch.setattr(TF, name, stub(TF, name, result))
        stage = STAGES[request.param]
        View = stage.View
        patch.setattr(stage, "View", view)
        for name in OURS:
            patch.setattr(stage, name, stub(stage, name))
        patch.setattr(stage.cv2, "filter2D", filter_pixels)
        patch.setattr(stage.cv2, "flip", flip)
        patch.setattr(Image, "open", open_image)
        patch.setattr(Image.Image, "paste", paste)
        patch.setattr(ImageDraw.ImageDraw, "text", write)
        hard = stage.hard_augmentation(SIZE, MEAN, STD, [str(path)], exact=True)
        image = picture(WIDTH, HEIGHT)
        seed_all(2021)
        for _ in range(DRAWS):
            calls.append([])
            assert hard(image).shape == (3, SIZE, SIZE)
    return SimpleNamespace(calls=calls, glyphs=stage.glyphs, **RECIPES[request.param])


def of(draws, name):
    return [call for calls in draws.calls for call in calls if call.name == name]


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
    expected = dict.fromkeys(
        ("pixelization", "shuffle_pixels", "rgb_to_grayscale", "blur", "erase"), 0.25
    )
    expected |= dict.fromkeys(
        ("rotate", "encoding_quality", "perspective", "overlay_text", "overlay_emoji"), draws.p
    )
    expected |= {
        "hflip": 0.5,
        "vflip": 0.1,
        "enhance_edges": draws.edge_p,
        "overlay_image": draws.overlay_p,
    }
    for name, p in expected.items():
        count = sum(any(call.name == name for call in calls) for calls in draws.calls)
        assert_probability(count, DRAWS, p, name)
    for name in (
        "adjust_brightness",
        "adjust_contrast",
        "adjust_saturation",
        "adjust_hue",
        "resized_crop",
    ):
        assert len(of(draws, name)) == DRAWS, name


def test_fixed_order_around_the_shuffled_list(draws):
    for calls in draws.calls:
        names = [call.name for call in calls]
        crop = names.index("resized_crop")
        assert [name for name in names[:crop] if name != "rotate"] in ([], ["overlay_image"])
        assert names[0] == "rotate" or "rotate" not in names
        assert "erase" not in names[:-1]


def test_the_list_is_shuffled_uniformly(draws):
    """Of any two operations that happen in a draw, either comes first equally often; each takes
    every place.
    """
    before, places = {pair: [] for pair in combinations(SHUFFLED, 2)}, []
    for calls in draws.calls:
        names = [call.name for call in calls]
        names = names[names.index("resized_crop") + 1 :]
        order = list(
            dict.fromkeys("jitter" if name.startswith("adjust") else name for name in names)
        )
        order = [name for name in order if name in SHUFFLED]
        for pair in combinations(order, 2):
            known = pair in before
            before[pair if known else pair[::-1]].append(known)
        places.append((order.index("jitter") + random.random()) / len(order))
    for pair, firsts in before.items():
        assert_probability(sum(firsts), len(firsts), 0.5, pair)
    assert_uniform(places, 0, 1)


def test_rotation_and_colour_ranges(draws):
    assert_uniform([call.degrees for call in of(draws, "rotate")], 0, 180)
    for kind in ("brightness", "contrast", "saturation"):
        factors = [getattr(call, f"{kind}_factor") for call in of(draws, f"adjust_{kind}")]
        assert_uniform(factors, 1 - draws.J, 1 + draws.J)
    assert_uniform([call.hue_factor for call in of(draws, "adjust_hue")], -0.2, 0.2)


def test_overlay_ranges(draws):
    overlays = of(draws, "overlay_image")
    low, high = draws.size
    assert_uniform([call.opacity for call in overlays], draws.opacity, 1)
    assert_uniform([call.overlay_size for call in overlays], low, high)
    assert_uniform([call.x_pos / (1 - call.overlay_size) for call in overlays], 0, 1)
    assert_uniform([call.y_pos / (1 - call.overlay_size) for call in overlays], 0, 1)
    own = [call.image.shape == (HEIGHT, WIDTH, 3) for call in overlays]
    assert [call.overlay.shape == (HEIGHT, WIDTH, 3) for call in overlays] == [
        not background for background in own
    ]
    assert_probability(sum(own), len(own), 0.5)


def test_crop_ranges(draws):
    """Gentle after an overlay, strong otherwise; the side ratio is that of RandomResizedCrop, 3/4
    to 4/3.
    """
    strong = []
    for calls in draws.calls:
        crop = next(call for call in calls if call.name == "resized_crop")
        overlaid = any(call.name == "overlay_image" for call in calls)
        width, height = crop.img.size
        area = crop.height * crop.width / (width * height)
        assert (0.68 if overlaid else 0.14) <= area <= 1
        assert 3 / 4 - 0.05 <= crop.width / crop.height <= 4 / 3 + 0.05
        strong += [] if overlaid else [area]
    assert min(strong) < 0.2
    assert np.mean(np.array(strong) < 0.5) > 0.3


def test_shuffled_operations_ranges(draws):
    assert_uniform([call.ratio for call in of(draws, "pixelization")], 0.1, 1)
    assert_uniform([call.radius for call in of(draws, "blur")], 0, 10)
    qualities = [call.quality for call in of(draws, "encoding_quality")]
    centers = [
        call.kernel[1, 1] for call in of(draws, "enhance_edges")
    ]  # of EDGE_ENHANCE, EDGE_ENHANCE_MORE
    for choices, drawn in (((10, 20, 30, 50), qualities), ((5, 9), centers)):
        assert set(drawn) == set(choices)
        for choice in choices:
            assert_probability(drawn.count(choice), len(drawn), 1 / len(choices))
    for call in of(draws, "perspective"):
        moves = np.abs(np.array(call.startpoints) - np.array(call.endpoints))
        assert moves.max() <= 0.5 * SIZE / 2
    assert (
        max(np.abs(np.subtract(c.startpoints, c.endpoints)).max() for c in of(draws, "perspective"))
        > 0.4 * SIZE / 2
    )


def test_text(draws):
    texts = [[call for call in calls if call.name == "overlay_text"] for calls in draws.calls]
    texts, sizes = [lines for lines in texts if lines], []
    for first, *more in texts:
        assert all(5 <= len(line.text) <= 9 for line in (first, *more))
        assert all(
            (line.font, line.color, line.place[0]) == (first.font, first.color, first.place[0])
            for line in more
        )
        sizes += [(line.place[1] - first.place[1]) / SIZE for line in more]
        assert not more or first.font.size == int(sizes[-1] * SIZE + 1e-9)
        assert 0.1 * SIZE - 1 < first.font.size < 0.3 * SIZE
        assert not {"TypeMyMusic", "PainttheSky"} & {
            Path(first.font.path).stem.split("_")[0].split("-")[0]
        }
        assert len(first.color) == 3
        assert all(isinstance(value, int) and 0 <= value <= 255 for value in first.color)
    assert_uniform(sizes, 0.1, 0.3)
    assert_uniform([lines[0].place[0] / SIZE for lines in texts], 0, 0.5)
    assert_uniform([lines[0].place[1] / SIZE for lines in texts], 0, 0.5)
    assert {len(lines) for lines in texts} == {1, 2}
    assert_probability(len(sizes), len(texts), 0.5)
    assert {len(lines[0].text) for lines in texts} == {5, 6, 7, 8, 9}
    # 363 fonts with equal chance: about 363 x (1 - exp(-n / 363)) different ones in n draws
    fonts = len({lines[0].font.path for lines in texts})
    assert fonts == pytest.approx(363 * (1 - np.exp(-len(texts) / 363)), rel=0.1)
    pairs = [(line.text, draws.glyphs(line.font.path)) for lines in texts for line in lines]
    assert all(set(text) <= set(glyphs) for text, glyphs in pairs)
    assert_uniform(
        [glyphs.index(text[0]) / len(glyphs) for text, glyphs in pairs if len(glyphs) > 100], 0, 1
    )


def test_emoji(draws):
    emojis = of(draws, "overlay_emoji")
    sizes = [call.size[0] for call in emojis]
    assert all(call.size == (size, size) for call, size in zip(emojis, sizes, strict=True))
    assert {6, 7, 18, 19} <= set(sizes) <= set(range(6, 20))
    assert np.mean(sizes) == pytest.approx(0.2 * SIZE - 0.5, abs=1)
    whole = np.array(
        [size for size in sizes if 6 < size < 19]
    )  # 0.1 * SIZE to 0.3 * SIZE, cut off to whole pixels
    assert_uniform(whole + np.random.default_rng(0).random(len(whole)), 7, 19)
    for axis in (0, 1):
        assert_uniform([(call.place[axis] + 0.5) / SIZE for call in emojis], 0, 1)
    assert 80 <= len({call.path for call in emojis}) <= 92


def test_erasing(draws):
    """Noise over 2% to 33% of an image."""
    noises, ratios = [], []
    for call in of(draws, "erase"):
        top, left, noise = call.erased
        _, height, width = noise.shape
        assert 0 <= top <= SIZE - height and 0 <= left <= SIZE - width
        assert (height - 0.5) * (width - 0.5) <= 0.33 * SIZE**2
        assert (height + 0.5) * (width + 0.5) >= 0.02 * SIZE**2
        assert (height + 0.5) / (width - 0.5) >= 0.3
        assert (height - 0.5) / (width + 0.5) <= 3.3
        ratios.append(np.log(height / width))
        noises.append(noise.flatten())
    noise = torch.cat(noises)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert np.mean(np.array(ratios) > 0) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("stage", STAGES)
def test_moderate_statistics(monkeypatch, stage):
    crops, flips, image = [], [], picture(WIDTH, HEIGHT)
    crop, flip, module = TF.resized_crop, v83.cv2.flip, STAGES[stage]
    monkeypatch.setattr(
        TF, "resized_crop", lambda *args, **kwargs: crops.append(args) or crop(*args, **kwargs)
    )
    monkeypatch.setattr(
        module.cv2, "flip", lambda image, flipCode: flips.append(flipCode) or flip(image, flipCode)
    )
    moderate = module.moderate_augmentation(SIZE, MEAN, STD, exact=True)
    seed_all(0)
    views = [moderate(image) for _ in range(500)]
    assert all(view.shape == (3, SIZE, SIZE) and view.abs().max() <= 1 for view in views)
    areas = [height * width / (WIDTH * HEIGHT) for _, _, _, height, width, *_ in crops]
    assert 0.68 <= min(areas) < 0.75
    assert max(areas) <= 1
    assert_probability(len(flips), 500, 0.5)
    assert set(flips) == {1}


# ---- traps ----


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_glyph_that_cannot_be_laid_out_leaves_the_image(hard, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("raster overflow")

    transform, image = piece(hard, "overlay_text"), array(SIZE, SIZE)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", fail)
    for seed in range(5):
        seed_all(seed)
        assert (transform(image) == image).all()


def certain(hard):
    """A hard augmentation whose every operation happens."""
    for name in ("rotation", "overlay", *SHUFFLED):
        piece(hard, name)
    return hard


THIN = [(1, 1), (1, 500), (500, 1), (2, 2), (3, 400), (90, 70), (20000, 30)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", THIN, ids=lambda size: "{}x{}".format(*size))
def test_thin_images(tmp_path, size, exact):
    """As the image and as the overlay, with the published probabilities and with every operation
    happening.
    """
    paths = []
    for width, height in THIN:
        paths.append(str(tmp_path / f"{width}x{height}.png"))
        picture(width, height).save(paths[-1])
    image = picture(*size)
    usual = v98.hard_augmentation(SIZE, MEAN, STD, paths, exact)
    every = certain(v98.hard_augmentation(SIZE, MEAN, STD, paths, exact))
    seed_all(0)
    for transform in (
        [usual] * 20 + [every] * 20 + [v98.moderate_augmentation(SIZE, MEAN, STD, exact)] * 5
    ):
        view = transform(image)
        assert view.shape == (3, SIZE, SIZE)
        assert view.dtype == torch.float32
        assert view.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_an_image_too_thin_to_be_cut_passes_unrotated(hard, size):
    rotation, image = piece(hard, "rotation"), array(*size)
    for seed in range(20):
        seed_all(seed)
        assert sorted(rotation(image).shape[:2]) == sorted(size)


def test_what_would_need_a_canvas_of_gigabytes_stays_unrotated_when_exact():
    image = np.zeros((200, 60_000, 3), np.uint8)
    assert v83.rotate(image, 45.0, exact=True) is image
    assert v83.rotate(image, 45.0, exact=False).shape[0] in (141, 142)


@pytest.mark.parametrize("exact", [False, True])
def test_the_image_is_left_as_it_is(overlay_path, exact):
    """It is that of both views; where it has their size, a crop may be all of it."""
    image, moderate = array(SIZE, SIZE), v83.moderate_augmentation(SIZE, MEAN, STD, exact)
    hard = certain(v83.hard_augmentation(SIZE, MEAN, STD, [overlay_path], exact))
    before, pixels = image.copy(), torch.from_numpy(image).permute(2, 0, 1)
    hard.transforms[2].keywords["overlay_p"] = 0.5
    for view in (moderate, hard):
        for seed in range(40):
            seeded(seed, view, pixels)
    assert (image == before).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    picture(60, 50).convert(mode).save(path)
    opened = v83.open_image(str(path))
    assert opened.mode == "RGB"
    assert opened.size == (60, 50)
    hard = certain(v83.hard_augmentation(SIZE, MEAN, STD, [str(path)]))
    seed_all(0)
    for transform in [hard] * 5 + [v83.moderate_augmentation(SIZE, MEAN, STD)]:
        assert transform(opened).shape == (3, SIZE, SIZE)
        with Image.open(path) as unconverted:
            assert transform(unconverted).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_view(stage, overlay_path):
    module, image = STAGES[stage], picture(WIDTH, HEIGHT)
    first, second = (module.hard_augmentation(SIZE, MEAN, STD, [overlay_path]) for _ in range(2))
    views = []
    for seed in range(20):
        for transform in (first, second):
            seed_all(seed)
            views.append(transform(image))
        assert torch.equal(views[-1], views[-2])
    assert len({view.numpy().tobytes() for view in views}) == 20


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_the_views_reach_loader_processes_that_are_not_forked(stage, overlay_path, exact):
    """As of Python 3.14 they are not, on Linux: they get the data set by pickle."""
    hard = STAGES[stage].hard_augmentation(SIZE, MEAN, STD, [overlay_path], exact)
    for views in (hard, STAGES[stage].moderate_augmentation(SIZE, MEAN, STD, exact)):
        assert ForkingPickler.dumps(views)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_the_flag_reaches_every_operation(stage, tmp_path, monkeypatch, exact):
    module, calls = STAGES[stage], []
    for folder in ("training_images", "reference_images"):
        (tmp_path / folder).mkdir()
        picture(WIDTH, HEIGHT).save(tmp_path / folder / "0.png")
    for name in ("rotate", "overlay_image"):
        monkeypatch.setattr(module, name, lambda image, *args: calls.append(args[-1]) or image)
    args = module.parse_args(
        [str(tmp_path / "training_images"), "--input-size", str(SIZE), *["--exact"] * exact]
    )
    moderate, hard = module.TrainDataset(args, MEAN, STD).crops
    shuffled = dict(zip(SHUFFLED, hard.transforms[3].transforms, strict=True))
    operations = [shuffled[name] for name in ("jitter", "pixelization", "blur", "perspective")]
    operations += [moderate.transforms[1], *hard.transforms[2].keywords["crops"]]
    assert {isinstance(operation, transforms.Compose) for operation in operations} == {exact}
    certain(hard)(picture(WIDTH, HEIGHT))
    assert calls == [exact] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_pixels_give_the_view_of_their_image(stage, overlay_path, tmp_path):
    """What open_image(pixels=True) reads: every draw, every value."""
    module = STAGES[stage]
    picture(9, 7).resize((WIDTH, HEIGHT)).save(tmp_path / "image.jpg")
    images = [module.open_image(tmp_path / "image.jpg", pixels) for pixels in (False, True)]
    usual, every = (module.hard_augmentation(SIZE, MEAN, STD, [overlay_path]) for _ in range(2))
    transforms = (
        [usual] * 20 + [certain(every)] * 5 + [module.moderate_augmentation(SIZE, MEAN, STD)] * 5
    )
    for seed, transform in enumerate(transforms):
        assert torch.equal(*(seeded(seed, transform, image) for image in images))


@pytest.mark.parametrize("size", [SIZE, 1], ids=["usual", "too small to erase"])
def test_what_loaders_leave_to_the_device_gives_torchvisions_bits(size):
    """Of a whole batch, and of each view alone: ToTensor, RandomErasing of the same draws,
    Normalize.
    """
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    erase = transforms.RandomErasing(p=0.7, value="random")
    published = transforms.Compose([transforms.ToTensor(), erase, transforms.Normalize(mean, std)])
    ours, finish = v83.RandomErasing(p=0.7, value="random"), v83.Finish(mean, std)
    arrays = [array(size, size, seed) for seed in range(100)]
    expected, views = (
        [seeded(i, transform, arrays[i]) for i in range(100)] for transform in (published, ours)
    )
    pixels, places, noise, labels = v83.collate(
        [(views[:30], [*range(30)]), (views[30:], [*range(30, 100)])]
    )
    assert pixels.dtype == torch.uint8 and labels.tolist() == [*range(100)]
    assert len(places) == (0 if size == 1 else sum(len(view.noise[0]) > 0 for view in views))
    assert torch.equal(finish(pixels, places, noise), torch.stack(expected))
    assert torch.equal(torch.stack([finish.one(view) for view in views]), torch.stack(expected))
    assert all((pixels[i].numpy() == arrays[i]).all() for i in range(100))


def test_the_view_is_normalised(overlay_path):
    """Erasing aside, mean and std map [0, 1] to the range that they say."""
    black = Image.new("RGB", (WIDTH, HEIGHT))
    view = v83.moderate_augmentation(SIZE, (0.25, 0.5, 0.75), (0.5, 0.25, 0.125))(black)
    np.testing.assert_allclose(view[:, 0, 0], [-0.5, -2, -6], rtol=1e-6)
