"""The part of the synthetic category: scenes, defects and rendering.

The part is a height field with a colour and a metalness per pixel, lit from one side.
A defect alters the scene, so its mask follows from drawing the same scene twice (see
`changed`). Lengths are in units of 1/320 of the image's side, angles in radians; x points
right, y down.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from padim_jax.data.records import GOOD

DEFECTS = ("scratch", "stain", "missing_piece", "misplaced_part")
SMALLEST = 0.0005  # smallest fraction of the image that a defect covers
UNITS = 320  # the scene's side in units, whatever the image's size

Field = Float32[np.ndarray, "h w"]
Picture = Float32[np.ndarray, "h w 3"]
Colour = tuple[float, float, float]
Length = float | int

# Positions of all components in the part's own frame (origin at its centre).
PLATE = (132.0, 104.0)
SCREWS = ((-112.0, -84.0), (112.0, -84.0), (-112.0, 84.0), (112.0, 84.0))
BOSS = (-58.0, -14.0)
BORE = 19.0
LABEL = (58.0, -40.0)
CONNECTOR = (50.0, 38.0)
PLUG = (-30.0, 66.0)

ALUMINIUM: Colour = (0.42, 0.43, 0.45)
BARE: Colour = (0.75, 0.75, 0.76)
STEEL: Colour = (0.30, 0.30, 0.31)
PLASTIC: Colour = (0.022, 0.023, 0.026)
GOLD: Colour = (0.62, 0.42, 0.12)
PAPER: Colour = (0.60, 0.56, 0.45)
INK: Colour = (0.08, 0.08, 0.09)
RUBBER: Colour = (0.40, 0.035, 0.02)
DARK: Colour = (0.012, 0.012, 0.013)
MAT: Colour = (0.030, 0.036, 0.045)


# ---------------------------------------------------------------- what is drawn


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything that varies between two photographs of good parts.

    Attributes:
      x: position of the part's centre, relative to the image's.
      y: position of the part's centre, relative to the image's.
      angle: rotation of the part, clockwise.
      screw_angles: one per screw.
      grain_seed: seed of the brush strokes.
      light_azimuth: direction of the light.
      gain: exposure factor.
      gradient: relative change of the light from the centre to the right and lower edge.
      vignette: relative loss of light at the middle of an edge.
      sheen: position of the broad reflection on the metal, along x.
    """

    x: float
    y: float
    angle: float
    screw_angles: tuple[float, ...]
    grain_seed: int
    light_azimuth: float
    gain: float
    gradient: tuple[float, float]
    vignette: float
    sheen: float


@dataclasses.dataclass(frozen=True)
class Scratch:
    """A groove along a quadratic Bézier curve."""

    points: tuple[tuple[float, float], ...]
    width: float
    strength: float


@dataclasses.dataclass(frozen=True)
class Blob:
    """A round region with an irregular outline: `lobes` are (frequency, amplitude, phase)."""

    x: float
    y: float
    radius: float
    lobes: tuple[tuple[int, float, float], ...]


@dataclasses.dataclass(frozen=True)
class Stain:
    """A dried drop: a tinted film with a darker rim."""

    blob: Blob
    tint: Colour
    opacity: float


@dataclasses.dataclass(frozen=True)
class Defect:
    """Defect of a part; the default is none.

    Attributes:
      scratches: grooves across any solid surface.
      stains: drops on it.
      chips: pieces broken out of the plate.
      missing: names of the components left out.
      moved: name of a component -> (x, y, angle) relative to its place.
    """

    scratches: tuple[Scratch, ...] = ()
    stains: tuple[Stain, ...] = ()
    chips: tuple[Blob, ...] = ()
    missing: tuple[str, ...] = ()
    moved: dict[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)


def photograph(
    kind: str, rng: np.random.Generator, size: int
) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]:
    """Take one photograph.

    Args:
      kind: "good" or one of `DEFECTS`.
      rng: source of all randomness.
      size: side of the image in pixels.

    Returns:
      The RGB image and its ground truth, True where the defect shows.
    """
    scene_rng, defect_rng, sensor_rng = rng.spawn(3)
    scene = draw_scene(scene_rng)
    good = render(scene, Defect(), size)
    if kind == GOOD:
        return expose(good, sensor_rng), changed(good, good)
    while True:
        defective = render(scene, draw_defect(kind, defect_rng), size)
        mask = changed(good, defective)
        # A few do not show, such as a faint scratch on the label: those are drawn again.
        if mask.mean() > SMALLEST:
            return expose(defective, sensor_rng), mask


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw one photograph's pose, lighting and surface grain."""
    return Scene(
        x=rng.uniform(-2, 2),
        y=rng.uniform(-2, 2),
        angle=math.radians(rng.uniform(-2, 2)),
        screw_angles=tuple(rng.uniform(0, math.pi) for _ in SCREWS),
        grain_seed=int(rng.integers(2**32)),
        light_azimuth=math.radians(rng.uniform(-140, -120)),
        gain=rng.uniform(0.92, 1.08),
        gradient=(rng.uniform(-0.08, 0.08), rng.uniform(-0.08, 0.08)),
        vignette=rng.uniform(0.06, 0.14),
        sheen=rng.uniform(-30, 10),
    )


def draw_defect(kind: str, rng: np.random.Generator) -> Defect:
    """Draw one defect of a kind; its severity is uniform from faint to obvious.

    Args:
      kind: one of `DEFECTS`.
      rng: source of all randomness.

    Returns:
      The defect.

    Raises:
      ValueError: the kind is unknown.
    """
    severity = rng.uniform()
    if kind == "scratch":
        return Defect(scratches=_draw_scratches(rng, severity))
    if kind == "stain":
        return Defect(stains=_draw_stains(rng, severity))
    if kind == "missing_piece":
        what = rng.choice(["screw", "plug", "chip"])
        if what == "screw":
            return Defect(missing=(f"screw{rng.integers(len(SCREWS))}",))
        if what == "plug":
            return Defect(missing=("plug",))
        return Defect(chips=(_draw_chip(rng, severity),))
    if kind == "misplaced_part":
        what = str(rng.choice(["connector", "label", "plug"]))
        # A plug that left its seat lies completely beside it; the others are placed askew.
        far = rng.uniform(16, 30) if what == "plug" else 4 + 8 * severity
        turn = math.radians(rng.choice([-1, 1]) * (4 + 10 * severity))
        direction = rng.uniform(0, 2 * math.pi)
        shift = (far * math.cos(direction), far * math.sin(direction))
        return Defect(moved={what: (*shift, turn)})
    raise ValueError(f"kind={kind!r}; expected one of {DEFECTS}")


def _draw_scratches(rng: np.random.Generator, severity: float) -> tuple[Scratch, ...]:
    """Draw one long scratch, often with a shorter one beside it."""
    x, y = _spot(rng)
    angle = rng.uniform(0, 2 * math.pi)
    length = 40 + 70 * severity
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    bend = rng.uniform(-0.15, 0.15) * length
    scratches = []
    for n in range(rng.integers(1, 3)):
        middle = np.array([x, y]) + n * rng.uniform(4, 9) * across
        reach = length * (0.5 if n == 0 else rng.uniform(0.2, 0.4))
        points = (middle - reach * along, middle + bend * across, middle + reach * along)
        scratches.append(
            Scratch(
                points=tuple((float(px), float(py)) for px, py in points),
                width=0.8 + 0.9 * severity * rng.uniform(0.6, 1),
                strength=0.65 + 0.35 * severity,
            )
        )
    return tuple(scratches)


def _draw_stains(rng: np.random.Generator, severity: float) -> tuple[Stain, ...]:
    """Draw one drop, with up to two droplets beside it."""
    oil, rust, coolant = (0.10, 0.07, 0.04), (0.40, 0.13, 0.05), (0.06, 0.20, 0.30)
    tint = (oil, rust, coolant)[rng.integers(3)]
    opacity = 0.4 + 0.4 * severity
    x, y = _spot(rng)
    radius = 9 + 14 * severity
    stains = [Stain(_draw_blob(rng, x, y, radius), tint, opacity)]
    for _ in range(rng.integers(3)):
        angle, small = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.15, 0.35)
        far = radius * 1.25 + small + rng.uniform(1, 8)
        blob = _draw_blob(rng, x + far * math.cos(angle), y + far * math.sin(angle), small)
        stains.append(Stain(blob, tint, opacity))
    return tuple(stains)


def _draw_chip(rng: np.random.Generator, severity: float) -> Blob:
    """Draw a bite out of the plate's edge, clear of screws and holes."""
    radius = 9 + 9 * severity
    side, end = (float(sign) for sign in rng.choice([-1, 1], 2))
    if rng.uniform() < 0.5:
        return _draw_blob(rng, end * rng.uniform(40, 75), side * PLATE[1], radius)
    return _draw_blob(rng, side * PLATE[0], rng.uniform(-45, 45), radius)


def _draw_blob(rng: np.random.Generator, x: float, y: float, radius: float) -> Blob:
    lobes = tuple(
        (k, rng.uniform(0.3, 0.5) / k, rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5, 9)
    )
    return Blob(x, y, radius, lobes)


def _spot(rng: np.random.Generator) -> tuple[float, float]:
    """Draw a place on the part, but not over the bore: nothing sticks to a hole."""
    while True:
        x, y = rng.uniform(-105, 105), rng.uniform(-78, 78)
        if math.hypot(x - BOSS[0], y - BOSS[1]) > BORE + 12:
            return x, y


# ---------------------------------------------------------------- how it is drawn


@dataclasses.dataclass(frozen=True)
class Surface:
    """The scene as seen by the camera, without light: maps that are painted in place.

    Attributes:
      u: coordinates of the pixels' centres in the local frame, in units.
      v: coordinates of the pixels' centres in the local frame, in units.
      height: height above the mat, in units.
      colour: linear reflectance.
      metal: 0 dull to 1 brushed metal: visibility of grain and sheen.
      solid: 1 on the part, 0 in holes and beside it.
      scale: pixels per unit.
    """

    u: Field
    v: Field
    height: Field
    colour: Picture
    metal: Field
    solid: Field
    scale: float

    def around(self, x: Length, y: Length, angle: Length, reach: Length) -> "Surface":
        """Return the pixels around a place in a local frame; they share memory.

        Args:
          x: the place, in units.
          y: the place, in units.
          angle: rotation of the frame, clockwise.
          reach: half the side of the square, in units.

        Returns:
          The part of the surface.
        """
        du, dv = self.u - x, self.v - y
        near = (np.abs(du) < reach) & (np.abs(dv) < reach)
        rows, columns = np.nonzero(near.any(1))[0], np.nonzero(near.any(0))[0]
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        du, dv = du[box], dv[box]
        cos, sin = math.cos(angle), math.sin(angle)
        return Surface(
            cos * du + sin * dv,
            cos * dv - sin * du,
            self.height[box],
            self.colour[box],
            self.metal[box],
            self.solid[box],
            self.scale,
        )

    def cover(self, distance: Field) -> Field:
        """Return each pixel's coverage from a shape's signed distance (negative inside)."""
        return np.clip(0.5 - distance * self.scale, 0, 1)

    def paint(self, cover: Field, colour: Colour | Picture, metal: float | int) -> None:
        """Lay a material over the covered pixels.

        Args:
          cover: coverage of each pixel, 0 to 1.
          colour: linear reflectance.
          metal: see `Surface`.
        """
        self.colour[:] += cover[..., None] * (np.asarray(colour, np.float32) - self.colour)
        self.metal[:] += cover * (metal - self.metal)

    def level(self, cover: Field, height: Length) -> None:
        """Bring the covered pixels to one height.

        Args:
          cover: coverage of each pixel, 0 to 1.
          height: the height in units.
        """
        self.height[:] += cover * (height - self.height)

    def rise(self, distance: Field, height: Length, bevel: Length) -> None:
        """Raise a shape (lower it if `height` is negative), with sloping flanks.

        Args:
          distance: signed distance to the shape, negative inside.
          height: change of height in units.
          bevel: width of the flanks in units.
        """
        slope = np.clip(-distance / bevel, 0, 1)
        self.height[:] += height * slope * slope * (3 - 2 * slope)

    def drill(self, distance: Field, floor: Length) -> None:
        """Cut a hole with upright walls down to a height.

        Args:
          distance: signed distance to the hole, negative inside.
          floor: height of its bottom in units.
        """
        cover = self.cover(distance)
        self.level(cover, floor)
        self.paint(cover, DARK, 0)
        self.solid[:] *= 1 - cover


def render(scene: Scene, defect: Defect, size: int) -> Picture:
    """Render the part as an ideal camera sees it, without noise.

    Args:
      scene: pose, lighting and grain.
      defect: defect of the part; `Defect()` for a good one.
      size: side of the image in pixels.

    Returns:
      RGB in [0, 1], gamma-coded, `(size, size, 3)` float32.
    """
    return _shade(_assemble(scene, defect, size), scene)


def expose(picture: Picture, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """Add the sensor's noise (about 2 grey levels) and quantise to 8 bits.

    Args:
      picture: (h, w, 3) in [0, 1].
      rng: source of the noise.

    Returns:
      (h, w, 3) uint8.
    """
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    levels = 255 * picture + noise * (1.2 + 1.3 * picture)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def changed(good: Picture, defective: Picture) -> Bool[np.ndarray, "h w"]:
    """Return the ground truth: the pixels where the defect shows.

    These are pixels where any channel of the noise-free picture differs by more than 8 of 255
    grey levels, about four standard deviations of the sensor's noise: shadows and reflected
    light of a defect fade over the whole neighbourhood, and differences below the noise
    cannot be detected. For a misplaced part they are its old and its new place,
    except pixels that look the same either way.

    Args:
      good: the scene rendered without the defect.
      defective: the same scene rendered with it.

    Returns:
      (h, w), True where the defect shows.
    """
    return (np.abs(good - defective) > 8 / 255).any(-1)


def _assemble(scene: Scene, defect: Defect, size: int) -> Surface:
    """Assemble the part, bottom to top."""
    scale = size / UNITS
    axis = (np.arange(size, dtype=np.float32) + 0.5) / scale - UNITS / 2
    x, y = np.meshgrid(axis - scene.x, axis - scene.y)
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    part = Surface(
        u=cos * x + sin * y,
        v=cos * y - sin * x,
        height=np.zeros_like(x),
        colour=np.full((size, size, 3), MAT, np.float32),
        metal=np.zeros_like(x),
        solid=np.zeros_like(x),
        scale=scale,
    )
    _plate(part, defect.chips)
    _boss(part, scene)
    for n, (screw, angle) in enumerate(zip(SCREWS, scene.screw_angles, strict=True)):
        seat = part.around(*screw, angle, 16)
        _screw_seat(seat)
        if f"screw{n}" not in defect.missing:
            _screw(seat)
    for name, place, reach, seat, component in (
        ("connector", CONNECTOR, 60, _connector_seat, _connector),
        ("label", LABEL, 62, _label_seat, _label),
        ("plug", PLUG, 20, _plug_seat, _plug),
    ):
        seat(part.around(*place, 0, reach))
        if name not in defect.missing:
            dx, dy, turn = defect.moved.get(name, (0, 0, 0))
            component(part.around(place[0] + dx, place[1] + dy, turn, reach))
    grain = part.metal * _grain(scene, size, scale)
    part.height[:] += 0.10 * grain
    part.colour[:] *= 1 + 0.07 * grain[..., None]
    for stain in defect.stains:
        _stain(part, stain)
    for scratch in defect.scratches:
        _scratch(part, scratch)
    return part


def _plate(part: Surface, chips: tuple[Blob, ...]) -> None:
    edge = _box(part.u, part.v, *PLATE, 18)
    for chip in chips:
        edge = np.maximum(edge, -_blob(part.u - chip.x, part.v - chip.y, chip))
    part.rise(edge, 9, 4)
    cover = part.cover(edge)
    part.solid[:] = cover
    part.paint(cover, ALUMINIUM, 1)
    # A milled groove follows the edge; a slot and two holes go through the plate.
    groove = np.abs(_box(part.u, part.v, PLATE[0] - 30, PLATE[1] - 9, 8)) - 1.2
    part.rise(np.maximum(groove, edge), -1, 1.2)
    slot = part.around(-84, 62, 0, 26)
    slot.drill(_box(slot.u, slot.v, 16, 5, 5), 0)
    for x, y in ((0, -84), (0, 88)):
        hole = part.around(x, y, 0, 12)
        radius = np.hypot(hole.u, hole.v)
        hole.rise(radius - 8, -2.5, 4)
        hole.drill(radius - 4.5, 0)


def _boss(part: Surface, scene: Scene) -> None:
    """Add a turned ring: its highlight is the bow tie of concentric tool marks."""
    boss = part.around(*BOSS, 0, 52)
    radius = np.hypot(boss.u, boss.v)
    bow = np.cos(2 * (np.arctan2(boss.v, boss.u) - scene.light_azimuth - math.pi / 2))
    turned = 0.9 + 0.22 * bow * np.abs(bow) + 0.05 * np.sin(radius * 2.1)
    boss.rise(radius - 44, 7, 5)
    boss.rise(np.abs(radius - 30) - 2.2, -1.6, 1.6)
    colour = np.asarray(ALUMINIUM, np.float32) * turned[..., None]
    boss.paint(boss.cover(radius - 40), colour, 0.45)
    boss.rise(radius - BORE - 4, -3, 4)
    boss.drill(radius - BORE, 1)


def _screw_seat(seat: Surface) -> None:
    """Add a counterbore with a threaded hole."""
    radius = np.hypot(seat.u, seat.v)
    seat.rise(radius - 12, -1.5, 1.5)
    hole = seat.cover(radius - 5)
    thread = 0.8 + 0.6 * np.sin(radius * 3 + np.arctan2(seat.v, seat.u))
    seat.height[:] -= 6 * hole
    seat.paint(hole, np.asarray(DARK, np.float32) * thread[..., None], 0.1)


def _screw(seat: Surface) -> None:
    """Add a domed head with a cross recess."""
    radius = np.hypot(seat.u, seat.v)
    head = radius - 10
    cover = seat.cover(head)
    seat.level(cover, 8.5)
    seat.rise(head, 4.5, 6)
    seat.paint(cover, STEEL, 0.5)
    cross = np.minimum(_box(seat.u, seat.v, 6, 1.3, 0.4), _box(seat.u, seat.v, 1.3, 6, 0.4))
    seat.rise(cross, -2.5, 1)
    seat.paint(0.8 * seat.cover(cross), DARK, 0)


def _connector_seat(seat: Surface) -> None:
    """Add a milled pocket with a circuit board at its bottom."""
    pocket = _box(seat.u, seat.v, 42, 19, 4)
    seat.rise(pocket, -3, 1.5)
    seat.paint(seat.cover(_box(seat.u, seat.v, 38, 15, 2)), (0.03, 0.075, 0.035), 0.1)


def _connector(seat: Surface) -> None:
    """Add a black housing, two rows of gold pins in its cavity, and a key at its side."""
    housing = np.minimum(_box(seat.u, seat.v, 41, 18, 4), _box(seat.u, seat.v - 18, 9, 5, 2))
    cover = seat.cover(housing)
    seat.level(cover, 8)
    seat.rise(housing, 7, 2.5)
    seat.paint(cover, PLASTIC, 0.06)
    cavity = _box(seat.u, seat.v, 34, 11, 2)
    seat.rise(cavity, -8, 1.5)
    hollow = seat.cover(cavity)
    seat.paint(hollow, DARK, 0.02)
    seat.solid[:] *= 1 - hollow  # scratches and stains do not reach the bottom
    # Two rows of six, 10.5 apart: distances are measured from the nearest pin's axis.
    column = np.clip(np.rint(seat.u / 10.5 - 0.5), -3, 2) + 0.5
    pin = _box(seat.u - 10.5 * column, np.abs(seat.v) - 5, 2.2, 1.9, 0.4)
    seat.rise(pin, 6, 1.2)
    seat.paint(seat.cover(pin), GOLD, 0.3)


def _label_seat(seat: Surface) -> None:
    seat.rise(_box(seat.u, seat.v, 47, 26, 4), -1.0, 1.5)


def _label(seat: Surface) -> None:
    """Add a printed sticker."""
    edge = _box(seat.u, seat.v, 45, 24, 3)
    art = _label_art()
    height, width = art.shape[:2]
    at = np.stack([seat.v + height / 2 - 0.5, seat.u + width / 2 - 0.5])
    ink = ndimage.map_coordinates(art, at, order=1, mode="nearest", prefilter=False)
    cover = seat.cover(edge)
    seat.rise(edge, 0.6, 0.8)
    seat.paint(cover, PAPER, 0.04)
    seat.paint(cover * ink, INK, 0.04)


@functools.cache
def _label_art() -> Field:
    """Return the sticker's print, one pixel per unit: 0 paper to 1 ink."""
    canvas = Image.new("L", (90, 48), 0)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default_imagefont()
    draw.rectangle((2, 2, 87, 15), fill=175)
    draw.text((8, 3), "PX-320 REV C", fill=0, font=font)
    draw.text((46, 19), "24V 6A", fill=255, font=font)
    draw.text((46, 31), "IP-67", fill=255, font=font)
    widths = (2, 1, 1, 3, 1, 2, 2, 1, 1, 1, 3, 1, 2, 1, 1, 2, 1, 3, 1, 1, 2, 1, 2)
    x = 4
    for n, width in enumerate(widths):
        if n % 2 == 0:
            draw.rectangle((x, 20, x + width - 1, 43), fill=255)
        x += width
    return np.asarray(canvas, np.float32) / 255


def _plug_seat(seat: Surface) -> None:
    radius = np.hypot(seat.u, seat.v)
    seat.rise(radius - 13, -1.5, 2)
    seat.drill(radius - 8, 2)


def _plug(seat: Surface) -> None:
    """Add a rubber stopper with a dimple."""
    radius = np.hypot(seat.u, seat.v)
    cover = seat.cover(radius - 11)
    seat.level(cover, 8.5)
    seat.rise(radius - 11, 4, 5)
    seat.rise(radius - 5, -2, 3)
    seat.paint(cover, RUBBER, 0.08)
    seat.solid[:] = np.maximum(seat.solid, cover)


def _stain(part: Surface, stain: Stain) -> None:
    """Add a film that tints what lies beneath, with a darker rim; it does not wet holes."""
    blob = stain.blob
    spot = part.around(blob.x, blob.y, 0, 2 * blob.radius + 4)
    distance = _blob(spot.u, spot.v, blob)
    soft = np.clip(0.5 - distance / 4, 0, 1)
    rim = np.exp(-((distance + 2) ** 2) / 6)
    cover = spot.solid * soft * stain.opacity * (0.8 + 0.3 * rim)
    spot.paint(cover, spot.colour * np.asarray(stain.tint, np.float32), 0.1)


def _scratch(part: Surface, scratch: Scratch) -> None:
    """Add a bright groove that fades in and out."""
    start, control, end = (np.asarray(point) for point in scratch.points)
    middle = (start + end) / 2
    reach = math.dist(start, end) / 2 + 12
    spot = part.around(float(middle[0]), float(middle[1]), 0, reach)
    t = np.linspace(0, 1, 17)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end - middle
    distance = np.full_like(spot.u, np.inf)
    progress = np.zeros_like(spot.u)
    for n, ((ax, ay), (bx, by)) in enumerate(itertools.pairwise(curve.tolist())):
        du, dv, dx, dy = spot.u - ax, spot.v - ay, bx - ax, by - ay
        along = np.clip((du * dx + dv * dy) / (dx * dx + dy * dy), 0, 1)
        here = np.hypot(du - along * dx, dv - along * dy)
        progress = np.where(here < distance, (n + along) / (len(t) - 1), progress)
        distance = np.minimum(distance, here)
    taper = np.sqrt(np.clip(4 * progress * (1 - progress), 0, 1))
    pressure = taper * (0.8 + 0.2 * np.sin(23 * progress))
    cover = spot.cover(distance - scratch.width * taper) * pressure * spot.solid
    spot.height[:] -= 0.8 * scratch.strength * cover
    spot.paint(scratch.strength * cover, BARE, 0.3)


def _grain(scene: Scene, size: int, scale: float) -> Field:
    """Return brush strokes: noise stretched along the part's x axis, rotated with the part."""
    rng = np.random.default_rng(scene.grain_seed)
    noise = rng.standard_normal((size, size), dtype=np.float32)
    strokes = np.zeros_like(noise)
    for length in (24, 120):
        pixels = max(1, round(length * scale))
        stroke = ndimage.uniform_filter1d(noise, pixels, axis=1, mode="wrap")
        strokes += stroke * math.sqrt(pixels / 2)
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    middle = size / 2
    turn = (cos, sin, middle - middle * (cos + sin), -sin, cos, middle - middle * (cos - sin))
    turned = Image.fromarray(strokes).transform(
        (size, size), Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR
    )
    return np.asarray(turned)


def _shade(surface: Surface, scene: Scene) -> Picture:
    """Light the surface from one side: diffuse, highlight, cast shadow, occlusion, sheen."""
    height, scale, azimuth = surface.height, surface.scale, scene.light_azimuth
    elevation = math.radians(52)
    light_x = math.cos(azimuth) * math.cos(elevation)
    light_y = math.sin(azimuth) * math.cos(elevation)
    light_z = math.sin(elevation)
    slope_y, slope_x = (scale * slope for slope in np.gradient(height))
    # Lambert, and Blinn's highlight with the camera straight above.
    length = np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    towards = light_z - slope_x * light_x - slope_y * light_y
    diffuse = np.clip(towards / length, 0, None)
    highlight = np.clip((towards + 1) / length / math.sqrt(2 + 2 * light_z), 0, 1) ** 32

    lit = 1 - 0.7 * _shadow(height, azimuth, elevation, scale)
    hollow = np.clip(ndimage.gaussian_filter(height, 5 * scale) - height, 0, None)
    ambient = 1 / (1 + 0.15 * hollow)
    band = np.exp(-(((surface.u + 0.5 * surface.v - scene.sheen) / 90) ** 2))

    light = 0.42 * ambient + 0.85 * diffuse * lit
    light *= 1 + 0.35 * surface.metal * band
    gloss = (0.05 + 0.25 * surface.metal) * highlight * lit * ambient
    picture = surface.colour * light[..., None] + gloss[..., None]
    picture *= _illumination(scene, len(height))[..., None]
    picture = np.sqrt(np.clip(picture, 0, 1))
    # The lens: a point is about a pixel wide.
    return ndimage.gaussian_filter(picture, (0.5, 0.5, 0), truncate=2)


def _shadow(height: Field, azimuth: float, elevation: float, scale: float) -> Field:
    """Return 0 (lit) to 1 (shadowed), from higher ground between a pixel and the light."""
    blocked = np.zeros_like(height)
    for step in range(1, 13):
        dx = round(step * scale * math.cos(azimuth))
        dy = round(step * scale * math.sin(azimuth))
        above = np.roll(height, (-dy, -dx), (0, 1)) - height
        blocked = np.maximum(blocked, above - step * math.tan(elevation))
    return np.clip(blocked / 2, 0, 1)


def _illumination(scene: Scene, size: int) -> Field:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    slant = 1 + scene.gradient[0] * x + scene.gradient[1] * y
    return scene.gain * slant * (1 - scene.vignette * (x * x + y * y))


def _box(u: Field, v: Field, half_u: Length, half_v: Length, radius: Length) -> Field:
    """Return the signed distance to a rectangle with rounded corners."""
    du = np.abs(u) - (half_u - radius)
    dv = np.abs(v) - (half_v - radius)
    outside = np.hypot(np.maximum(du, 0), np.maximum(dv, 0))
    return outside + np.minimum(np.maximum(du, dv), 0) - radius


def _blob(u: Field, v: Field, blob: Blob) -> Field:
    """Return roughly the signed distance to a blob from its centre; only its sign is exact."""
    angle = np.arctan2(v, u)
    outline = np.ones_like(u)
    for frequency, amplitude, phase in blob.lobes:
        outline += amplitude * np.sin(frequency * angle + phase)
    return np.hypot(u, v) - blob.radius * outline
