"""Views of an image: the whole, parts of it, mirrored, turned.

A copy that shows a part of an image, or the image mirrored or turned, resembles one of these views
more than the whole. So match.py compares several views of a query with the whole references.
"""

from dataclasses import dataclass

from PIL import Image

PART = 2 / 3  # of the width and height; the four parts overlap
TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class View:
    """How a view is made: cut out, then mirrored, then turned.

    left and top are where the part begins, as shares of the image's width and height, and `size`
    its extent, as a share of both. `turned` is in degrees, counterclockwise.
    """

    name: str
    left: float = 0
    top: float = 0
    size: float = 1
    mirrored: bool = False
    turned: int = 0

    def of(self, image):
        """The view of a PIL image."""
        if self.size < 1:
            left = round(self.left * image.width)
            top = round(self.top * image.height)
            right = round((self.left + self.size) * image.width)
            bottom = round((self.top + self.size) * image.height)
            box = (left, top, max(right, left + 1), max(bottom, top + 1))
            image = image.crop(box)
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.turned:
            image = image.transpose(TURNS[self.turned])
        return image


WHOLE = View("whole")
PARTS = (
    View("top left", 0, 0, PART),
    View("top right", 1 - PART, 0, PART),
    View("bottom left", 0, 1 - PART, PART),
    View("bottom right", 1 - PART, 1 - PART, PART),
)
TURNED = tuple(View(f"turned {degrees}", turned=degrees) for degrees in TURNS)
KINDS = ("parts", "mirrored", "turned")  # of --views


def mirrored(view):
    """The same view, mirrored left to right."""
    name = "mirrored" if view is WHOLE else f"{view.name} mirrored"
    return View(name, view.left, view.top, view.size, mirrored=True)


def choose_views(kinds):
    """The views that kinds of views ask for, a tuple that begins with WHOLE.

    "mirrored" mirrors the whole and, with "parts", each part. "all" is every kind: 13 views.
    """
    if "all" in kinds:
        kinds = KINDS
    views = [WHOLE]
    if "parts" in kinds:
        views += PARTS
    if "mirrored" in kinds:
        views += [mirrored(view) for view in views]
    if "turned" in kinds:
        views += TURNED
    return tuple(views)


ALL_VIEWS = choose_views(["all"])
VIEW_OF_NAME = {view.name: view for view in ALL_VIEWS}
