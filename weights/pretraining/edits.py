"""Views of pictures for contrastive learning: gentle ones, which resemble references, and hard
ones, which resemble edited copies. Both views of a pair show one content, made of one picture.
"""

import math

import cv2
import numpy as np

import v98

GRAY = np.tile([0.299, 0.587, 0.114], (3, 1))  # a color matrix that takes the luminance
UNIT_CORNERS = np.float32([[0, 0], [1, 0], [1, 1], [0, 1]])
LEAST_CONTRAST = 8  # standard deviation of the gray values of a content, of 255
AUGMENTED_BY_V98 = 0.5  # share of the hard views
OVERSAMPLING = 2  # v98's radii of blur and sizes of blocks are in pixels, made for larger images


# ---- homographies of the unit square ----


def shift(x, y):
    """Moves by (x, y)."""
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def scale(x, y):
    """Scales the axes."""
    return np.diag([x, y, 1.0])


def around_center(matrix):
    """The homography with the center of the unit square as its origin."""
    return shift(0.5, 0.5) @ matrix @ shift(-0.5, -0.5)


def draw_crop(rng, least=0.4):
    """Keeps `least` to all of each side."""
    width, height = rng.uniform(least, 1, 2)
    x = rng.uniform(0, 1 - width)
    y = rng.uniform(0, 1 - height)
    return scale(1 / width, 1 / height) @ shift(-x, -y)


def draw_placement(rng):
    """Shrinks each side to 30% to 100%, and places the image in the middle or anywhere."""
    width, height = rng.uniform(0.3, 1, 2)
    if rng.uniform() < 0.5:
        return around_center(scale(width, height))
    x = rng.uniform(0, 1 - width)
    y = rng.uniform(0, 1 - height)
    return shift(x, y) @ scale(width, height)


def draw_rotation(rng):
    """Turns by any angle, most often a small one."""
    a_little = rng.uniform(-0.4, 0.4)
    right_angles = rng.choice([0.5, 1, 1.5]) * math.pi
    any_angle = rng.uniform(0, math.tau)
    angle = rng.choice([a_little, right_angles, any_angle], p=[0.5, 0.2, 0.3])
    cosine = math.cos(angle)
    sine = math.sin(angle)
    zoom = rng.uniform(0.7, 1.3)
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return around_center(scale(zoom, zoom) @ turn)


def draw_shear(rng):
    """Slants rows or columns, and shrinks the image to fit better."""
    matrix = np.eye(3)
    axis = rng.integers(2)
    matrix[axis, 1 - axis] = rng.uniform(-0.5, 0.5)
    zoom = rng.uniform(0.65, 1)
    return around_center(scale(zoom, zoom) @ matrix)


def draw_perspective(rng):
    """Moves the corners by up to a quarter of the side."""
    shifts = rng.uniform(-0.25, 0.25, (4, 2))
    moved = UNIT_CORNERS + shifts.astype(np.float32)
    return cv2.getPerspectiveTransform(UNIT_CORNERS, moved)


def draw_mirror(rng):
    """Mirrors left and right, or now and then top and bottom."""
    if rng.uniform() < 0.8:
        return around_center(scale(-1, 1))
    return around_center(scale(1, -1))


HOMOGRAPHIES = (
    (draw_crop, 0.4),
    (draw_placement, 0.5),
    (draw_rotation, 0.15),
    (draw_shear, 0.2),
    (draw_perspective, 0.15),
    (draw_mirror, 0.1),
)


def draw_homography(rng):
    """Some of the homographies, in random order: (3, 3)."""
    matrix = np.eye(3)
    for index in rng.permutation(len(HOMOGRAPHIES)):
        draw, probability = HOMOGRAPHIES[index]
        if rng.uniform() < probability:
            matrix = draw(rng) @ matrix
    return matrix


def shrink(image, side):
    """The image in `side` x `side` pixels, without aliasing."""
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def warp(image, matrix, canvas):
    """Draw the image through a homography of the unit square onto the canvas.

    image uint8 (h, w, 3); canvas uint8 (size, size, 3), which is changed and returned.
    """
    size = len(canvas)
    corners = cv2.perspectiveTransform(UNIT_CORNERS[None], matrix)
    drawn_side = size * math.sqrt(cv2.contourArea(corners))
    side = len(image)
    while side > 8 and side > 1.4 * drawn_side:  # against aliasing
        side //= 2
    image = shrink(image, side)
    to_unit = scale(1 / side, 1 / side) @ shift(0.5, 0.5)
    to_pixels = shift(-0.5, -0.5) @ scale(size, size)
    return cv2.warpPerspective(
        image,
        to_pixels @ matrix @ to_unit,
        (size, size),
        dst=canvas,
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_TRANSPARENT,
    )


# ---- views ----


class Views:
    """Draws pairs of views, uint8 (size, size, 3), of pictures, uint8 (n, side, side, 3).

    overlay_paths: images that v98's augmentation lays over or under its own.
    """

    def __init__(self, pictures, overlay_paths, size):
        self.pictures = pictures
        self.size = size
        black = (0, 0, 0)
        unit = (1, 1, 1)
        large = size * OVERSAMPLING
        self.augment = v98.hard_augmentation(large, black, unit, overlay_paths)
        self.edits = (
            (self.draw_lines, 0.15),
            (self.recolor, 0.7),
            (self.compress, 0.4),
        )

    def seed(self, *key):
        """What is drawn next depends on the key alone, integers."""
        self.rng = np.random.default_rng(key)
        v98.seed_generators(*key)  # which v98's augmentation draws from

    def chance(self, probability):
        """Whether something of this probability happens."""
        return self.rng.uniform() < probability

    def pairs(self, number):
        """(2 * number, size, size, 3): gentle views of as many contents, then their hard ones."""
        views = np.empty((2, number, self.size, self.size, 3), np.uint8)
        for index in range(number):
            content = self.content()
            views[0, index] = self.gentle(content)
            if self.chance(AUGMENTED_BY_V98):
                views[1, index] = self.augmented(content)
            else:
                views[1, index] = self.edited(content)
        return views.reshape(-1, *views.shape[2:])

    def picture(self):
        """One of the pictures."""
        return self.pictures[self.rng.integers(len(self.pictures))]

    def color(self):
        """Three ints; often black or white."""
        if self.chance(0.4):
            return [255 * int(self.chance(0.4))] * 3
        return self.rng.integers(0, 256, 3).tolist()

    def content(self):
        """What both views of a pair show: a part of a picture, mirrored, turned and recolored by
        chance, and never almost plain.
        """
        while True:
            image = self.picture()
            side = len(image)
            width, height = self.rng.integers(side // 2, side + 1, 2)
            x = self.rng.integers(0, side - width + 1)
            y = self.rng.integers(0, side - height + 1)
            part = image[y : y + height, x : x + width]
            image = cv2.resize(part, (side, side))
            if self.chance(0.5):
                image = image[:, ::-1]
            if self.chance(0.2):
                image = image.transpose(1, 0, 2)
            if self.chance(0.5):
                image = image[..., self.rng.permutation(3)]
            image = np.ascontiguousarray(image)
            if self.chance(0.5):
                image = self.recolor(image)
            if image.mean(axis=2).std() > LEAST_CONTRAST:
                return image

    def gentle(self, image):
        """The image made smaller, sometimes cropped a little or compressed."""
        canvas = np.zeros((self.size, self.size, 3), np.uint8)
        matrix = np.eye(3)
        if self.chance(0.5):
            matrix = draw_crop(self.rng, least=0.8)
        image = warp(image, matrix, canvas)
        return self.compress(image) if self.chance(0.3) else image

    def augmented(self, image):
        """The image by v98's hard augmentation."""
        large = self.size * OVERSAMPLING
        image = cv2.resize(image, (large, large))
        values = self.augment(image).clamp(0, 1) * 255
        pixels = values.round().byte().permute(1, 2, 0).numpy()
        return shrink(pixels, self.size)

    def edited(self, image):
        """The image, warped onto a background, then some edits in random order."""
        image = warp(image, draw_homography(self.rng), self.background())
        for index in self.rng.permutation(len(self.edits)):
            edit, probability = self.edits[index]
            if self.chance(probability):
                image = edit(image)
        return image

    def background(self):
        """What an image is put on: a color, a screen or another picture."""
        kind = self.rng.choice(["color", "screen", "picture"], p=[0.45, 0.3, 0.25])
        if kind == "picture":
            return shrink(self.picture(), self.size)
        canvas = np.empty((self.size, self.size, 3), np.uint8)
        canvas[:] = self.color()
        return self.draw_screen(canvas) if kind == "screen" else canvas

    def draw_screen(self, canvas):
        """What looks like a web page: bars, lines of words as dashes, and small pictures."""
        size = len(canvas)
        canvas[:] = 255 if self.chance(0.7) else 30
        for _ in range(self.rng.integers(0, 4)):
            left, right, top, bottom = self.rng.integers(0, size, 4).tolist()
            corner = (left, top)
            opposite = (right, bottom)
            cv2.rectangle(canvas, corner, opposite, self.color(), cv2.FILLED)
        for _ in range(self.rng.integers(1, 12)):
            x, y = self.rng.integers(0, size, 2).tolist()
            ink = self.color()
            for _ in range(self.rng.integers(1, 8)):
                word = int(self.rng.integers(2, 10))
                cv2.line(canvas, (x, y), (x + word, y), ink)
                x += word + 3
        for _ in range(self.rng.integers(0, 3)):
            corner = self.rng.uniform(0, 0.9, 2)
            sides = self.rng.uniform(0.08, 0.3, 2)
            canvas = warp(self.picture(), shift(*corner) @ scale(*sides), canvas)
        return canvas

    def draw_lines(self, image):
        """Parallel lines over the image, more or less opaque."""
        angle = self.rng.uniform(0, math.pi)
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]])
        gap = self.rng.uniform(0.08, 0.5) * self.size
        width = max(1, int(gap * self.rng.uniform(0.1, 0.6)))
        color = self.color()
        over = image.copy()
        for distance in np.arange(-self.size, self.size, gap):
            middle = self.size / 2 + across * distance
            reach = 2 * self.size * along
            start = (middle - reach).astype(int).tolist()
            end = (middle + reach).astype(int).tolist()
            cv2.line(over, start, end, color, width, cv2.LINE_AA)
        opacity = self.rng.uniform(0.4, 1)
        return cv2.addWeighted(over, opacity, image, 1 - opacity, 0)

    def recolor(self, image):
        """Two colors, or other saturation, hue, contrast and brightness, fog, each by chance."""
        if self.chance(0.15):
            dark, light = self.rng.uniform(0, 255, (2, 3))
            matrix = (light - dark)[:, None] / 255 * GRAY
            return cv2.transform(image, np.column_stack([matrix, dark]))
        matrix = np.eye(3)
        offset = np.zeros(3)
        if self.chance(0.5):
            saturation = self.rng.uniform(0, 3)
            matrix = saturation * matrix + (1 - saturation) * GRAY
        if self.chance(0.2):  # a turn around the gray axis
            angle = self.rng.uniform(-math.pi, math.pi)
            turn, _ = cv2.Rodrigues(np.full(3, angle))
            matrix = turn @ matrix
        if self.chance(0.5):
            contrast = math.exp(self.rng.uniform(-0.7, 0.6))
            matrix = contrast * matrix
            brightness = self.rng.uniform(-40, 40)
            offset = np.full(3, 128 * (1 - contrast) + brightness)
        if self.chance(0.2):
            opacity = self.rng.uniform(0.3, 1)
            matrix = opacity * matrix
            offset = opacity * offset + (1 - opacity) * np.array(self.color())
        return cv2.transform(image, np.column_stack([matrix, offset]))

    def compress(self, image):
        """After JPEG of a quality of 25 to 90."""
        quality = int(self.rng.uniform(25, 90))
        _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return cv2.imdecode(code, cv2.IMREAD_COLOR)
