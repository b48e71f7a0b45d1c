"""Read a picture of the world back into a `Scene` without a neural network.

The background is the border's colour.  What differs from it is split into things at empty bands of
rows and columns.  A thing's colour is that of its inner pixels; its shape is the template that,
fitted by area (0th moment) and centroid (1st moments), overlaps it best.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from .world import COLOURS, SHAPES, SIZES, SIZES_OF_TWO, Scene, Thing, coverage

Array = NDArray[np.float64]

DIFFERS = 40.0  # RGB distance (0..441) from the background at which a pixel belongs to a thing
LEAST_AREA = 0.003  # of the image; less than that is a speck, and makes a picture unclean
CLEAN_OVERLAP = 0.80  # intersection over union with its template that a clean shape has
CLEAN_COLOUR = 40.0  # RGB distance from the nearest colour of the world that a clean one has
SUPERSAMPLE = 64.0  # px, the radius at which a template's area is measured


@dataclass(frozen=True)
class SeenThing:
    """One thing read from a picture.  x and y are fractions of width and height."""

    thing: Thing
    x: float
    y: float
    overlap: float  # intersection over union with the template of its shape, 0..1
    off_colour: float  # RGB distance to the nearest colour of the world


@dataclass(frozen=True)
class Seen:
    """The things seen in a picture; `clean` is False for specks, odd colours and odd shapes."""

    things: tuple[SeenThing, ...]
    background: str
    clean: bool


def look(pixels: NDArray[np.uint8]) -> Seen:
    """Read a uint8 RGB picture [H, W, 3]."""
    image = pixels.astype(np.float64)  # [H, W, 3]
    height, width = image.shape[:2]
    ground = border_colour(image)  # [3]
    background, off_ground = nearest_colour(ground)
    mask = np.sqrt(((image - ground) ** 2).sum(-1)) > DIFFERS  # [H, W]
    boxes = split(mask)
    large = [b for b in boxes if mask[b].sum() >= LEAST_AREA * height * width]
    sizes = SIZES if len(large) < 2 else SIZES_OF_TWO
    things = tuple(look_at(image, mask, box, ground, sizes) for box in large)
    clean = (
        len(large) in (1, 2)
        and len(large) == len(boxes)
        and off_ground <= CLEAN_COLOUR
        and all(t.overlap >= CLEAN_OVERLAP and t.off_colour <= CLEAN_COLOUR for t in things)
    )
    return Seen(things, background, clean)


def border_colour(image: Array) -> Array:
    """The median colour [3] of a frame two pixels wide."""
    rows = np.concatenate([image[:2], image[-2:]]).reshape(-1, 3)  # [4 * W, 3]
    columns = np.concatenate([image[:, :2], image[:, -2:]], axis=1).reshape(-1, 3)  # [4 * H, 3]
    median: Array = np.median(np.concatenate([rows, columns]), axis=0)  # [3]
    return median


def nearest_colour(colour: Array) -> tuple[str, float]:
    """The world's colour nearest to an RGB triple, and the distance to it."""
    distances = {name: float(np.linalg.norm(colour - rgb)) for name, rgb in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]


def split(mask: NDArray[np.bool_]) -> list[tuple[slice, slice]]:
    """Boxes of things: bands of occupied rows, cut into runs of occupied columns, cut once more."""
    boxes = []
    for rows in runs(mask.any(axis=1)):
        for columns in runs(mask[rows].any(axis=0)):
            for inner in runs(mask[rows, columns].any(axis=1)):
                boxes.append((slice(rows.start + inner.start, rows.start + inner.stop), columns))
    return boxes


def runs(occupied: NDArray[np.bool_] | np.bool_) -> list[slice]:
    """The maximal runs of True in a 1-d mask."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], occupied, [False]]).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def look_at(
    image: Array,
    mask: NDArray[np.bool_],
    box: tuple[slice, slice],
    ground: Array,
    sizes: dict[str, tuple[float, float]],
) -> SeenThing:
    """Read the one thing inside a box."""
    height, width = mask.shape
    box = (widen(box[0], height), widen(box[1], width))
    patch = image[box]  # [h, w, 3]
    inner = erode(mask[box])  # [h, w]
    colour = np.median(patch[inner if inner.any() else mask[box]], axis=0)  # [3]
    name, off_colour = nearest_colour(colour)
    toward = (colour - ground) / ((colour - ground) ** 2).sum()  # [3]
    inside = ((patch - ground) @ toward).clip(0, 1)  # [h, w], how far from ground to colour
    shape, radius, overlap = best_shape(inside)
    y, x = centroid(inside)
    fraction = radius / min(height, width)
    size = min(sizes, key=lambda s: abs(fraction - sum(sizes[s]) / 2))
    thing = Thing(name, shape, size)
    x, y = (x + box[1].start) / width, (y + box[0].start) / height
    return SeenThing(thing, x, y, overlap, off_colour)


def widen(span: slice, side: int) -> slice:
    """One pixel more at each end, for the anti-aliased edge that the mask left out."""
    return slice(max(span.start - 1, 0), min(span.stop + 1, side))


def erode(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels whose four neighbours are in the mask too."""
    padded = np.pad(mask, 1)
    kept: NDArray[np.bool_] = mask & padded[:-2, 1:-1] & padded[2:, 1:-1]
    return kept & padded[1:-1, :-2] & padded[1:-1, 2:]


def centroid(inside: Array) -> tuple[float, float]:
    """First moments (y, x) in pixels; a pixel's centre is at +0.5."""
    total = inside.sum()
    rows, columns = np.arange(inside.shape[0]) + 0.5, np.arange(inside.shape[1]) + 0.5
    return float(inside.sum(1) @ rows / total), float(inside.sum(0) @ columns / total)


def best_shape(inside: Array) -> tuple[str, float, float]:
    """The shape whose template overlaps a soft mask [h, w] best, its radius and that overlap."""
    y, x = centroid(inside)
    fits = []
    for shape in SHAPES:
        radius = float(np.sqrt(inside.sum() / unit_area(shape)))
        drawn = template(shape, inside.shape[0], inside.shape[1], x, y, radius)  # [h, w]
        overlap = float(np.minimum(inside, drawn).sum() / np.maximum(inside, drawn).sum())
        fits.append((overlap, shape, radius))
    overlap, shape, radius = max(fits)
    return shape, radius, overlap


def template(shape: str, height: int, width: int, x: float, y: float, radius: float) -> Array:
    """A shape's coverage [height, width], its centroid at (x, y)."""
    rows = torch.arange(height)[:, None] + (0.5 - y)  # [h, 1]
    columns = torch.arange(width)[None, :] + (0.5 - x)  # [1, w]
    index = torch.tensor(SHAPES.index(shape))
    drawn: Array = coverage(index, columns, rows, torch.tensor(radius)).double().numpy()  # [h, w]
    return drawn


@lru_cache
def unit_area(shape: str) -> float:
    """A shape's area at radius 1."""
    side = int(3 * SUPERSAMPLE)
    drawn = template(shape, side, side, side / 2, side / 2, SUPERSAMPLE)  # [side, side]
    return float(drawn.sum() / SUPERSAMPLE**2)


def position_of(x: float, y: float) -> str:
    """Name the ninth of the image that a centroid (fractions) lies in; the middle is 0.4..0.6."""
    column = "left" if x < 0.4 else "right" if x > 0.6 else ""
    row = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    return f"{row} {column}".strip() or "center"


def relation_of(first: SeenThing, second: SeenThing) -> str:
    """`first relation second`, along the axis on which their centroids differ more."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"


def compare(seen: Seen, asked: Scene) -> dict[str, bool]:
    """The kinds of attribute that a picture got right; an attribute left unsaid is always right.

    Returns: keys colour, shape, size, place, background, clean (clean includes the count)."""
    orders = [seen.things, seen.things[::-1]]
    reports = [compare_in_order(things, seen, asked) for things in orders]
    return max(reports, key=lambda report: sum(report.values()))


def compare_in_order(things: tuple[SeenThing, ...], seen: Seen, asked: Scene) -> dict[str, bool]:
    """`compare`, with the seen things taken in this order as the asked ones."""
    counted = len(things) == len(asked.things)

    def same(kind: str) -> bool:
        pairs = zip(asked.things, things, strict=False)
        wanted = [(getattr(a, kind), getattr(s.thing, kind)) for a, s in pairs]
        return counted and all(a in (None, s) for a, s in wanted)

    return {
        "colour": same("colour"),
        "shape": same("shape"),
        "size": same("size"),
        "place": counted and is_placed(things, asked),
        "background": asked.background in (None, seen.background),
        "clean": counted and seen.clean,
    }


def is_placed(things: tuple[SeenThing, ...], asked: Scene) -> bool:
    if asked.relation is not None:
        return relation_of(*things) == asked.relation
    if asked.position is not None:
        return position_of(things[0].x, things[0].y) == asked.position
    return True


def is_right(seen: Seen, asked: Scene) -> bool:
    """Colour, shape, place and background are all as asked (size and cleanness apart)."""
    report = compare(seen, asked)
    return all(report[kind] for kind in ("colour", "shape", "place", "background"))
