"""The world the demonstration model draws: plain backgrounds with one or two flat shapes.

A `Scene` is the meaning of a picture.  Any of its attributes may be None, "left unsaid": then it is
what a caption asks for, and `complete` fills in the rest.  Lengths are pixels unless a name or
comment says otherwise; y grows downwards.
"""

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {  # RGB, 0..255; the closest two are 103 apart
    "red": (215, 35, 45),
    "green": (35, 155, 65),
    "blue": (40, 80, 220),
    "yellow": (250, 220, 50),
    "orange": (242, 122, 20),
    "purple": (140, 60, 175),
    "black": (20, 20, 22),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
POSITIONS: dict[str, tuple[float, float]] = {  # centre, as a fraction of width and height
    "center": (0.5, 0.5),
    "left": (0.24, 0.5),
    "right": (0.76, 0.5),
    "top": (0.5, 0.24),
    "bottom": (0.5, 0.76),
    "top left": (0.24, 0.24),
    "top right": (0.76, 0.24),
    "bottom left": (0.24, 0.76),
    "bottom right": (0.76, 0.76),
}
RELATIONS = ("above", "below", "left of", "right of")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

# Radius ranges as a fraction of the shorter side.  Two shapes must fit beside each other, so theirs
# are smaller.
SIZES = {"small": (0.110, 0.125), "medium": (0.165, 0.185), "large": (0.240, 0.265)}
SIZES_OF_TWO = {"small": (0.095, 0.105), "medium": (0.135, 0.150), "large": (0.185, 0.200)}
REACH = 1.15  # no shape extends further than this many radii from its centroid
MARGIN = 0.02  # free border, as a fraction of the side
JITTER = 0.03  # of a centre, as a fraction of the side
GAP = 0.04  # least distance between two shapes, as a fraction of the shorter side


@dataclass(frozen=True)
class Thing:
    """One shape; None is an attribute left unsaid."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """One thing at a position, or two in a relation (`things[0] relation things[1]`)."""

    things: tuple[Thing, ...]
    background: str | None = None
    position: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class Placed:
    """A thing's centroid and radius in pixels."""

    x: float
    y: float
    radius: float


def is_held_out_triple(scene: Scene) -> bool:
    """Colour, shape and position never seen together in training, though every pair of them is."""
    if len(scene.things) != 1:
        return False
    (thing,) = scene.things
    if thing.colour is None or thing.shape is None or scene.position is None:
        return False
    colour, shape = list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)
    return (7 * colour + 5 * shape + 3 * list(POSITIONS).index(scene.position)) % 11 == 0


def is_held_out(scene: Scene) -> bool:
    """A complete scene never seen in training, in any sizes: the triples, and one in 16 others.

    Of two things, one in 256: held out in both orders, for "A above B" shows "B below A"."""
    return is_held_out_triple(scene) or (is_in_lot(scene) and is_in_lot(turned(scene)))


def is_in_lot(scene: Scene) -> bool:
    """Whether the scene is one of the 1 in 16 drawn by hash, whatever its sizes."""
    key = repr([(t.colour, t.shape) for t in scene.things] + [scene.background, scene.position])
    return zlib.crc32((key + str(scene.relation)).encode()) % 16 == 0


def turned(scene: Scene) -> Scene:
    """The same picture, its two things named in the other order; one thing has no other."""
    if scene.relation is None:
        return scene
    return replace(scene, things=scene.things[::-1], relation=INVERSE[scene.relation])


def sample_thing(rng: random.Random, background: str, taken: str | None = None) -> Thing:
    """A thing whose colour is neither its background's nor the `taken` one."""
    colour = rng.choice([c for c in COLOURS if c not in (background, taken)])
    return Thing(colour, rng.choice(SHAPES), rng.choice(list(SIZES)))


def sample_scene(
    rng: random.Random, two: bool, wanted: Callable[[Scene], bool] = lambda _: True
) -> Scene:
    """A complete scene of one thing or two, drawn until it is `wanted`."""
    while True:
        background = rng.choice(list(COLOURS))
        first = sample_thing(rng, background)
        if two:
            things = (first, sample_thing(rng, background, first.colour))
            scene = Scene(things, background, relation=rng.choice(RELATIONS))
        else:
            scene = Scene((first,), background, position=rng.choice(list(POSITIONS)))
        if wanted(scene):
            return scene


def place(scene: Scene, height: int, width: int, rng: random.Random) -> tuple[Placed, ...]:
    """Choose a centroid and radius for each thing of a complete scene."""
    if len(scene.things) == 2:
        return place_two(scene, height, width, rng)
    (thing,) = scene.things
    assert thing.size is not None, "place needs a complete scene"
    assert scene.position is not None, "place needs a complete scene"
    radius = rng.uniform(*SIZES[thing.size]) * min(height, width)
    fx, fy = POSITIONS[scene.position]
    x, y = place_centre(fx, width, radius, rng), place_centre(fy, height, radius, rng)
    return (Placed(x, y, radius),)


def place_centre(fraction: float, side: int, radius: float, rng: random.Random) -> float:
    """A coordinate near `fraction` of the side that keeps the whole shape inside the image."""
    low = MARGIN * side + REACH * radius
    wanted = (fraction + rng.uniform(-JITTER, JITTER)) * side
    return min(max(wanted, low), side - low)


def place_two(scene: Scene, height: int, width: int, rng: random.Random) -> tuple[Placed, ...]:
    """Put two things on either side of the middle of the relation's axis, with a gap between."""
    shorter = min(height, width)
    radii = [rng.uniform(*SIZES_OF_TWO[t.size or "medium"]) * shorter for t in scene.things]
    vertical = scene.relation in ("above", "below")
    along, across = (height, width) if vertical else (width, height)
    first_leads = scene.relation in ("above", "left of")
    r_low, r_high = radii if first_leads else reversed(radii)
    low, high = place_pair(r_low, r_high, along, GAP * shorter, rng)
    offsets = [(0.5 + rng.uniform(-2, 2) * JITTER) * across for _ in radii]
    centres = (low, high) if first_leads else (high, low)
    return tuple(
        Placed(off, c, r) if vertical else Placed(c, off, r)
        for c, off, r in zip(centres, offsets, radii, strict=True)
    )


def place_pair(
    r_low: float, r_high: float, side: int, gap: float, rng: random.Random
) -> tuple[float, float]:
    """Coordinates near 0.28 and 0.72 of a side, at least `gap` between the two reaches."""
    low = place_centre(0.28, side, r_low, rng)
    high = place_centre(0.72, side, r_high, rng)
    missing = max(0.0, gap - (high - low - REACH * (r_low + r_high)))
    low = max(low - missing / 2, MARGIN * side + REACH * r_low)
    high = min(high + missing / 2, side * (1 - MARGIN) - REACH * r_high)
    return low, high


def pack(scene: Scene, placed: tuple[Placed, ...]) -> list[float]:
    """The numbers `render` needs: background RGB, then x, y, radius, shape index, RGB per thing.

    An absent second thing has radius 0."""
    assert scene.background is not None, "pack needs a complete scene"
    row = [c / 255 for c in COLOURS[scene.background]]
    for thing, at in zip(scene.things, placed, strict=True):
        assert thing.colour is not None
        assert thing.shape is not None
        row += [at.x, at.y, at.radius, SHAPES.index(thing.shape)]
        row += [c / 255 for c in COLOURS[thing.colour]]
    return row + [0.0] * (17 - len(row))


def render(packed: Tensor, height: int, width: int) -> Tensor:
    """Draw packed scenes [B, 17], anti-aliased by their signed distances.

    Returns: float [B, 3, height, width] in -1..1, RGB."""
    y = torch.arange(height, device=packed.device).view(1, 1, -1, 1) + 0.5  # [1, 1, H, 1]
    x = torch.arange(width, device=packed.device).view(1, 1, 1, -1) + 0.5  # [1, 1, 1, W]
    columns = packed.T[:, :, None, None, None]  # [17, B, 1, 1, 1]
    image = packed[:, 0:3, None, None].expand(-1, -1, height, width)  # [B, 3, H, W]
    for start in (3, 10):
        cx, cy, radius, shape = columns[start : start + 4]  # each [B, 1, 1, 1]
        inside = coverage(shape, (x - cx), (y - cy), radius)  # [B, 1, H, W]
        colour = packed[:, start + 4 : start + 7, None, None]  # [B, 3, 1, 1]
        image = image + inside * (colour - image)
    return image * 2 - 1


def coverage(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of the pixel at (x, y) from the centroid a shape covers, 0..1 (any one shape)."""
    scale = radius.clamp(min=1e-3)
    u, v = x / scale, y / scale
    distance = torch.zeros_like(u + v)
    for index, function in enumerate(DISTANCES):
        distance = torch.where(shape == index, function(u, v), distance)
    return (0.5 - distance * scale).clamp(0, 1) * (radius > 0)


# Signed distances, in radii, negative inside; after https://iquilezles.org/articles/distfunctions2d


def circle_distance(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y) - 1.0


def square_distance(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88


def triangle_distance(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, pointing up, its corners 1.15 from the centroid."""
    slope = x.abs() * math.sin(math.pi / 3) - y * 0.5
    return torch.maximum(slope, y) - 1.15 / 2


def star_distance(x: Tensor, y: Tensor) -> Tensor:
    """Five points, one up: corners at 1.15, notches at 0.53 from the centroid."""
    angle = torch.atan2(x, -y).abs()  # 0 at the top point, pi at the bottom
    turn = 2 * math.pi / 5
    folded = (torch.remainder(angle + turn / 2, turn) - turn / 2).abs()  # 0..pi/5, one half point
    length = torch.sqrt(x * x + y * y)
    u, v = length * torch.cos(folded), length * torch.sin(folded)
    notch_u, notch_v = 0.53 * math.cos(math.pi / 5), 0.53 * math.sin(math.pi / 5)
    edge_u, edge_v = notch_u - 1.15, notch_v
    norm = math.hypot(edge_u, edge_v)
    return ((u - 1.15) * edge_v - v * edge_u) / norm


def ring_distance(x: Tensor, y: Tensor) -> Tensor:
    return (torch.sqrt(x * x + y * y) - 0.82).abs() - 0.23


def cross_distance(x: Tensor, y: Tensor) -> Tensor:
    across, along = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return torch.maximum(across - 0.34, along - 1.05)


DISTANCES = (
    circle_distance,
    square_distance,
    triangle_distance,
    star_distance,
    ring_distance,
    cross_distance,
)
