"""The sign world: drawn signs whose every attribute is known.

A sign is a coloured ground, one to three shapes, and a word. Prompt and image determine each other,
so that text, colours, count, place and shape can be checked without a judge, and edits have exact
targets. It is to post-training what CLEVR was to visual reasoning: small, exact, and hard to fool
oneself with.

Letters stand on the 16-pixel cells of FLUX.2's latent grid (one letter, one token) in nine signs of
ten; the rest are shifted by up to three pixels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flux2.data.record import Record
from flux2.errors import InputError
from flux2.rng import keyed

CELL = 16
SIZE = 4 * CELL
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
PLACES = tuple(itertools.product(("top", "bottom"), ("left", "", "right")))
NUMBERS = ("no", "a", "two", "three")
COLOURS = {
    "white": "#FFFFFF", "black": "#000000", "red": "#CC0000", "green": "#009900",
    "blue": "#0033CC", "yellow": "#FFCC00", "purple": "#9900CC", "cyan": "#00CCFF",
}  # fmt: skip
NAMES = {value: name for name, value in COLOURS.items()}
LEVELS = ("00", "33", "66", "99", "CC", "FF")
CUBE = tuple("#" + "".join(c) for c in itertools.product(LEVELS, repeat=3))
CONTRAST = 40.0
"""Smallest ΔE76 of two colours that must be told apart."""
LIGHTNESS = 25.0
"""Smallest difference in L* between letters and their ground: readers see lightness first."""

WORDS = tuple(
    """
    ABLE ACID AREA ARMY AUNT AXLE BABY BACK BAKE BALL BAND BANK BARN BATH BEAN BEAR BELL BELT BIKE
    BIRD BLUE BOAT BODY BOLT BONE BOOK BOOT BOWL BUSH CAFE CAGE CAKE CALM CAMP CARD CASH CAVE CHEF
    CITY CLAY CLUB COAL COAT CODE COIN COLD COOK CORN CREW CUBE DARK DATE DAWN DECK DEER DESK DIAL
    DISH DIVE DOCK DOOR DOVE DRUM DUCK DUST EAST EASY ECHO EDGE EXIT FACE FARM FAST FERN FILM FIRE
    FISH FLAG FLAT FLEX FOAM FOLK FOOD FORK FREE FROG FUEL GAME GATE GIFT GLOW GOAT GOLD GOLF GRID
    GULF HALL HAND HARP HAWK HERB HERO HIGH HILL HOME HOPE HORN HOST HOUR ICON INCH IRON ITEM JADE
    JAZZ JOKE JUMP JURY KELP KEYS KING KITE KNOT LAKE LAMP LAND LEAF LENS LIME LINE LION LOCK LOFT
    LUCK MAIL MAPS MASK MAZE MEAL MENU MILK MINT MOON MOTH NAVY NEST NEWS NOON NOTE OATS OKAY ONYX
    OPEN OVAL OVEN PAGE PARK PATH PEAR PINE PLUM POEM POLO POND POOL PORT QUAD QUIZ RAIL RAIN REEF
    RING RISK ROAD ROCK ROOF ROPE ROSE RUBY SAFE SAIL SALT SAND SEED SHIP SHOE SILK SNOW SOAP SOUP
    STAR STOP SURF SWAN TAXI TENT TIDE TILE TIME TOWN TREE TUBE TUNA UNIT URGE VASE VEIL VIEW VINE
    VOLT WALK WARM WAVE WEST WIND WOLF WOOD WORK YARD YOGA ZERO ZINC ZONE BUS GYM INN JAM PUB SKI
    SPA TEA VAN ZIP BAR BAY BOX CAB CUP DAM EGG FLY FOX HUB ICE
    """.split()  # noqa: SIM905 (as a list: 244 lines)
)
HELD_OUT_WORDS = WORDS[::4]
TRAIN_WORDS = tuple(w for i, w in enumerate(WORDS) if i % 4)
_HELD_OUT = frozenset(HELD_OUT_WORDS)
HELD_OUT_PAIRS = frozenset(
    (shape, colour)
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOURS)
    if (i + 3 * j) % 8 == 0
)
"""(shape, colour name) pairs that training never shows together."""

LOOKALIKES = {
    a: b for pair in ("CG", "OQ", "EF", "IL", "MN", "UV", "PR", "BD", "SZ", "HK", "XY", "TJ")
    for a, b in (pair, pair[::-1])
}  # fmt: skip
"""What a weak reader takes a letter for."""

SPLITS = ("train", "heldout", "combinations")
TASKS = ("t2i", "recolour", "move", "replace", "compose")
GRANULARITIES = ("full", "short", "json")


@dataclass(frozen=True)
class Scene:
    """Everything there is to know of a sign. Colours are #RRGGBB; `shift` is (dx, dy) in pixels."""

    word: str
    ink: str
    ground: str
    shape: str
    shape_colour: str
    count: int
    place: tuple[str, str]
    shift: tuple[int, int] = (0, 0)

    @property
    def word_row(self) -> int:
        """The row of cells that holds the word: it stands below shapes at the top."""
        return 2 if self.place[0] == "top" else 1

    @property
    def text_box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the word, relative to the image's size."""
        dx, dy = self.shift
        x1 = min(dx + CELL * len(self.word), SIZE)
        return max(dx, 0) / SIZE, (self.word_row * CELL + dy) / SIZE, x1 / SIZE, (
            (self.word_row + 1) * CELL + dy
        ) / SIZE

    def truth(self) -> dict[str, Any]:
        """The ground truth that rewards and metrics read from a record's meta."""
        return {
            "text": (self.word,),
            "text_box": self.text_box,
            "ink": self.ink,
            "ground": self.ground,
            "shape": self.shape,
            "shape_colour": self.shape_colour,
            "count": self.count,
            "place": self.place,
        }


# ---------------------------------------------------------------- drawing


def rgb(colour: str) -> np.ndarray:
    """#RRGGBB → 3 uint8."""
    return np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(str(path), size)


@functools.cache
def glyph(letter: str) -> np.ndarray:
    """16×16×1 uint16 coverage (0…255) of a capital letter, centred in its cell."""
    scale = 4
    big = Image.new("L", (CELL * scale, CELL * scale))
    centre = CELL * scale / 2
    ImageDraw.Draw(big).text((centre, centre), letter, 255, _font(20 * scale), anchor="mm")
    small = big.resize((CELL, CELL), Image.Resampling.BOX)
    return np.asarray(small, np.uint16)[..., None]


def _corners(shape: str, r: float) -> list[tuple[float, float]]:
    def ring(radii: tuple[float, ...], turn: float) -> list[tuple[float, float]]:
        angles = turn + 2 * np.pi * np.arange(len(radii)) / len(radii)
        return [(a * np.sin(t), -a * np.cos(t)) for a, t in zip(radii, angles, strict=True)]

    if shape == "square":
        s = 0.86 * r
        return [(-s, -s), (s, -s), (s, s), (-s, s)]
    if shape == "triangle":
        return [(0, -r), (r, 0.85 * r), (-r, 0.85 * r)]
    if shape == "diamond":
        return [(0, -r), (0.72 * r, 0), (0, r), (-0.72 * r, 0)]
    if shape == "star":
        return ring((r, 0.42 * r) * 5, 0.0)
    a = 0.32 * r  # cross
    return [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a),
            (-r, -a), (-a, -a)]  # fmt: skip


@functools.cache
def stencil(shape: str) -> np.ndarray:
    """16×16×1 uint16 coverage (0…255) of a shape."""
    scale = 8
    half, r = CELL * scale / 2, 6.8 * scale
    big = Image.new("L", (CELL * scale, CELL * scale))
    draw = ImageDraw.Draw(big)
    if shape == "circle":
        draw.ellipse((half - r, half - r, half + r, half + r), 255)
    else:
        draw.polygon([(half + x, half + y) for x, y in _corners(shape, r)], 255)
    return np.asarray(big.resize((CELL, CELL), Image.Resampling.BOX), np.uint16)[..., None]


def shape_origins(scene: Scene) -> list[tuple[int, int]]:
    """(x, y) of the top left pixel of each shape's cell."""
    vertical, side = scene.place
    y = CELL if vertical == "top" else 2 * CELL
    free = SIZE - CELL * scene.count
    x = {"left": 0, "": free // 2, "right": free}[side]
    return [(x + CELL * k, y) for k in range(scene.count)]


def _stamp(image: np.ndarray, cover: np.ndarray, x: int, y: int, colour: np.ndarray) -> None:
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + CELL, SIZE), min(y + CELL, SIZE)
    part = image[y0:y1, x0:x1]
    c = cover[y0 - y : y1 - y, x0 - x : x1 - x]
    part[:] = (part * (255 - c) + colour * c + 127) // 255


def draw(scene: Scene) -> np.ndarray:
    """The sign, 64 64 3 uint8."""
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    image[:] = rgb(scene.ground)
    colour, cover = rgb(scene.shape_colour), stencil(scene.shape)
    for x, y in shape_origins(scene):
        _stamp(image, cover, x, y, colour)
    dx, dy = scene.shift
    ink = rgb(scene.ink)
    for k, letter in enumerate(scene.word):
        _stamp(image, glyph(letter), CELL * k + dx, CELL * scene.word_row + dy, ink)
    return image


# ---------------------------------------------------------------- colours


def lab(colours: np.ndarray) -> np.ndarray:
    """sRGB uint8 (… 3) → CIE L*a*b* under D65 (… 3)."""
    c = np.asarray(colours, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
         [0.0193339, 0.1191920, 0.9503041]]
    )  # fmt: skip
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@functools.cache
def _cube_lab() -> dict[str, np.ndarray]:
    return dict(zip(CUBE, lab(np.stack([rgb(c) for c in CUBE])), strict=True))


@functools.cache
def _apart(ground: str, pool: tuple[str, ...]) -> tuple[str, ...]:
    """The colours of `pool` that stand out on `ground`."""
    points = _cube_lab()
    return tuple(c for c in pool if np.linalg.norm(points[c] - points[ground]) >= CONTRAST)


@functools.cache
def _legible(ground: str, pool: tuple[str, ...]) -> tuple[str, ...]:
    """The colours of `pool` in which a word can be read on `ground`."""
    points = _cube_lab()
    return tuple(
        c for c in _apart(ground, pool) if abs(points[c][0] - points[ground][0]) >= LIGHTNESS
    )


# ---------------------------------------------------------------- prompts


def _colour_word(colour: str) -> str:
    return NAMES.get(colour, colour)


def _shapes_phrase(scene: Scene, colour: bool = True) -> str:
    name = scene.shape + ("es" if scene.shape == "cross" else "s") * (scene.count > 1)
    tint = f" {_colour_word(scene.shape_colour)}" if colour else ""
    return f"{NUMBERS[scene.count]}{tint} {name}"


def _place_phrase(place: tuple[str, str]) -> str:
    return " ".join(p for p in place if p)


def prompt_of(scene: Scene, granularity: str) -> tuple[str, tuple[str, ...]]:
    """The prompt, and the names of the attributes that it fixes (all that may be scored)."""
    shapes, place = _shapes_phrase(scene), _place_phrase(scene.place)
    if granularity == "full":
        ink, ground = _colour_word(scene.ink), _colour_word(scene.ground)
        text = f'{shapes} at the {place}, "{scene.word}" in {ink} on {ground}'
        return text, ("text", "ink", "ground", "shape", "shape_colour", "count", "place")
    if granularity == "short":
        return f'{shapes}, "{scene.word}"', ("text", "shape", "shape_colour", "count")
    if granularity == "json":
        text = (
            f'{{"text":"{scene.word}","ink":"{scene.ink}","ground":"{scene.ground}",'
            f'"shape":"{shapes} {place}"}}'
        )
        return text, ("text", "ink", "ground", "shape", "shape_colour", "count", "place")
    raise InputError(f"unknown granularity {granularity!r}: choose from {', '.join(GRANULARITIES)}")


# ---------------------------------------------------------------- the dataset


def _pick(u: float, options: tuple[Any, ...]) -> Any:
    return options[int(u * len(options))]


def _random_word(u: np.ndarray, split: str) -> str:
    if split == "heldout":
        return _pick(u[0], HELD_OUT_WORDS)
    if u[1] < 0.5:
        return _pick(u[0], TRAIN_WORDS)
    # Random letters: what is learned is spelling, not a dictionary.
    word = "".join(_pick(v, tuple(ALPHABET)) for v in u[2 : 6 - int(u[0] < 0.1)])
    return word if word not in _HELD_OUT else _pick(u[0], TRAIN_WORDS)


def sample_scene(u: np.ndarray, split: str, free_colours: bool, loose: float = 0.1) -> Scene:
    """A sign from 18 uniform numbers; `free_colours` draws from the 216 colours of the web cube."""
    named = tuple(COLOURS.values())
    ground = _pick(u[6], CUBE if free_colours else named)
    ink = _pick(u[7], _legible(ground, CUBE if free_colours else named))
    pairs = pairs_of(split, ground)
    shape, shape_colour = _pick(u[8], pairs)
    shift = (0, 0)
    if u[9] < loose:
        shift = (int(u[10] * 7) - 3, int(u[11] * 7) - 3)
    return Scene(
        _random_word(u, split), ink, ground, shape, shape_colour,
        1 + int(u[12] * 3), _pick(u[13], PLACES), shift,
    )  # fmt: skip


@functools.cache
def pairs_of(split: str, ground: str) -> tuple[tuple[str, str], ...]:
    """(shape, colour) pairs that a split shows on a ground: held-out ones in `combinations`."""
    clear, held = _apart(ground, tuple(COLOURS.values())), split == "combinations"
    return tuple(
        (s, v) for s in SHAPES for c, v in COLOURS.items()
        if ((s, c) in HELD_OUT_PAIRS) == held and v in clear
    )  # fmt: skip


@dataclass(frozen=True)
class SignWorld:
    """Signs by index. `SignWorld("train")[7]` is the same record on every machine.

    Attributes:
        split: train (half real words, half random letters), heldout (words that training never
            spells), combinations (shape and colour pairs that training never shows).
        length: how many records there are; they are made on demand.
        seed: another seed is another world.
        tasks: weights of the tasks (t2i, recolour, move, replace, compose).
        granularity: weights of full, short and json prompts.
        loose: share of signs whose letters do not stand on the latent grid.
    """

    split: str = "train"
    length: int = 1 << 20
    seed: int = 0
    tasks: Mapping[str, float] | None = None
    granularity: Mapping[str, float] | None = None
    loose: float = 0.1
    misread: float = 0.0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"unknown split {self.split!r}: choose from {', '.join(SPLITS)}")
        if self.length < 1:
            raise InputError(f"data.length is {self.length}: it must be at least 1")
        for name, share in (("loose", self.loose), ("misread", self.misread)):
            if not 0 <= share <= 1:
                raise InputError(f"data.{name} is {share}: give a share from 0 to 1")
        for field, known in (("tasks", TASKS), ("granularity", GRANULARITIES)):
            weights = getattr(self, field) or {known[0]: 1.0}
            unknown = set(weights) - set(known)
            if unknown:
                raise InputError(
                    f"data.{field} has no {min(unknown)!r}: choose from {', '.join(known)}"
                )
            if min(weights.values()) < 0 or sum(weights.values()) <= 0:
                raise InputError(f"data.{field}: weights must be ≥ 0 and not all 0")
            object.__setattr__(self, "_" + field, _cumulative(tuple(weights.items())))

    def __len__(self) -> int:
        return self.length

    def _uniforms(self, index: int) -> np.ndarray:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return keyed(self.seed, "signs", self.split, index).random(44)

    def task_of(self, index: int) -> str:
        """The task of a record."""
        return _choose(self._uniforms(index)[38], getattr(self, "_tasks"))  # noqa: B009

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """(64, 64, number of references), without drawing."""
        task = self.task_of(index)
        return SIZE, SIZE, {"t2i": 0, "compose": 2}.get(task, 1)

    def __getitem__(self, index: int) -> Record:
        u = self._uniforms(index)
        task = _choose(u[38], getattr(self, "_tasks"))  # noqa: B009
        granularity = _choose(u[39], getattr(self, "_granularity"))  # noqa: B009
        free = granularity == "json" and task == "t2i" and u[37] < 0.3
        scene = sample_scene(u[:18], self.split, free, self.loose)
        if task == "t2i":
            said = replace(scene, word=self._transcribe(scene.word, u[40:]))
            prompt, asked = prompt_of(said, granularity)
            meta = scene.truth() | {"task": task, "asked": asked, "granularity": granularity}
            return Record(index, prompt, draw(scene), meta=meta)
        other = sample_scene(u[18:36], self.split, False, self.loose)
        said = partial(self._transcribe, u=u[40:])
        return _edit(index, task, self.split, scene, other, u[36], said)

    def _transcribe(self, word: str, u: np.ndarray) -> str:
        """The word as the caption has it; never a held-out one."""
        read = "".join(
            LOOKALIKES.get(c, c) if v < self.misread else c for c, v in zip(word, u, strict=False)
        )
        return word if self.split == "train" and read in _HELD_OUT else read


def _cumulative(weights: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    total, below, out = sum(w for _, w in weights), 0.0, []
    for name, w in weights:
        below += w / total
        out.append((name, below))
    return tuple(out)


def _choose(u: float, cumulative: tuple[tuple[str, float], ...]) -> str:
    return next((name for name, below in cumulative if u < below), cumulative[-1][0])


def _edit(
    index: int,
    task: str,
    split: str,
    scene: Scene,
    other: Scene,
    u: float,
    transcribe: Callable[[str], str],
) -> Record:
    """An edit of `scene` towards an attribute of `other`; a no-op draw is moved on to the next."""
    references: tuple[np.ndarray, ...] = (draw(scene),)
    plural = scene.shape + ("es" if scene.shape == "cross" else "s") * (scene.count > 1)
    if task == "recolour":
        what = ("ink", "ground", "shape_colour")[int(u * 3)]
        target = _recolour(scene, what, other)
        name = {"ink": "word", "ground": "ground", "shape_colour": plural}[what]
        prompt = f"make the {name} {_colour_word(getattr(target, what))}"
    elif task == "move":
        place = other.place
        if place == scene.place:
            place = PLACES[(PLACES.index(place) + 1) % len(PLACES)]
        target = replace(scene, place=place)
        prompt = f"move the {plural} to the {_place_phrase(place)}"
    elif task == "replace":
        word = other.word if other.word != scene.word else scene.word[::-1]
        target = replace(scene, word=word)
        prompt = f'change the word to "{transcribe(word)}"'
    else:
        # Image 1 gives the shape, image 2 everything else. What would not stand out on image 2's
        # ground, would show a pair that the split holds out, or would change nothing, is redrawn.
        pairs = [p for p in pairs_of(split, scene.ground) if p != (scene.shape, scene.shape_colour)]
        if (other.shape, other.shape_colour) not in pairs:
            shape, colour = pairs[int(u * len(pairs))]
            other = replace(other, ground=scene.ground, ink=scene.ink, shape=shape,
                            shape_colour=colour)  # fmt: skip
        target = replace(scene, shape=other.shape, shape_colour=other.shape_colour)
        references = (draw(other), references[0])
        prompt = "put the shape of image 1 on the sign of image 2"
    image = draw(target)
    mask = (image != references[-1]).any(-1)
    asked = ("text", "ink", "ground", "shape", "shape_colour", "count", "place")
    meta = target.truth() | {"task": task, "asked": asked, "granularity": "edit"}
    return Record(index, prompt, image, references, mask, meta=meta)


def _recolour(scene: Scene, what: str, other: Scene) -> Scene:
    """`scene` with one colour changed to another that keeps everything legible."""
    named = tuple(COLOURS.values())
    if what == "ground":
        fits = [
            g
            for g in named
            if g != scene.ground
            and scene.ink in _legible(g, named)
            and scene.shape_colour in _apart(g, named)
        ]
    else:
        pool = (_legible if what == "ink" else _apart)(scene.ground, named)
        fits = [c for c in pool if c != getattr(scene, what)]
    if what == "shape_colour":
        fits = [c for c in fits if (scene.shape, NAMES[c]) not in HELD_OUT_PAIRS] or fits
    wanted = getattr(other, what)
    return replace(scene, **{what: wanted if wanted in fits else fits[len(other.word) % len(fits)]})

