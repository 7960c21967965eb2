"""The tiny world: pictures whose truth is known, because this program draws them.

Every picture is 32 x 32 pixels and shows one to four flat, coloured shapes on a plain background.
A prompt says which shapes, in which colours, how many and where. Five corruptions imitate the
artifacts of real text-to-image models: parts are missing, shapes are fused, colours bleed, there is
noise, or blocks are shifted.

Read next: gold.py, which measures any picture of this world
"""

import functools
import itertools
import random
import re
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32  # pixels; the policy sees 8 x 8 tokens of 4 x 4 pixels
GRID = 2  # pixels between the places of objects: so 512 different patches show all of them sharply
GROUND = np.array((240, 240, 240), np.float32)  # the background colour
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (225, 45, 45),
    "yellow": (235, 205, 20),
    "green": (35, 165, 60),
    "cyan": (20, 190, 215),
    "blue": (45, 75, 220),
    "purple": (150, 60, 190),
}
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # (dx, dy)
STYLES = ("plain", "outline", "cool")  # of reference pictures
COOL = ("cyan", "blue", "purple")


# --- scenes and how they are drawn ------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """One object. x, y, r in pixels; r is the radius of a circle of about the same size."""

    shape: str
    color: str
    x: float
    y: float
    r: float
    vivid: float = 1.0  # 1 = full colour, 0 = invisible; drawn objects lie in [0.6, 1]


STAR_ANGLE = np.deg2rad(np.arange(10) * 36 - 90)
STAR_RADIUS = np.where(np.arange(10) % 2 == 0, 1.25, 0.55)
CROSS_X = (-0.36, 0.36, 0.36, 1.1, 1.1, 0.36, 0.36, -0.36, -0.36, -1.1, -1.1, -0.36)
CROSS_Y = (-1.1, -1.1, -0.36, -0.36, 0.36, 0.36, 1.1, 1.1, 0.36, 0.36, -0.36, -0.36)
CORNERS = {  # around the centroid, in units of r
    "square": [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)],
    "triangle": [(0, -1.2), (1.05, 0.6), (-1.05, 0.6)],
    "star": list(zip(np.cos(STAR_ANGLE) * STAR_RADIUS, np.sin(STAR_ANGLE) * STAR_RADIUS)),
    "cross": list(zip(CROSS_X, CROSS_Y)),
}


def coverage(shape, x, y, r, fine=8):
    """The share of each pixel that the shape covers: (32, 32) float32 in [0, 1]. The shape is drawn
    `fine` times too large and averaged, so edges are soft. Its centroid is (x, y)."""
    canvas = Image.new("L", (SIZE * fine, SIZE * fine))
    pen = ImageDraw.Draw(canvas)
    if shape == "circle":
        left, top, right, bottom = (x - r) * fine, (y - r) * fine, (x + r) * fine, (y + r) * fine
        pen.ellipse([left, top, right - 1, bottom - 1], fill=255)
    else:
        corners = [((x + u * r) * fine, (y + v * r) * fine) for u, v in CORNERS[shape]]
        pen.polygon(corners, fill=255)
    fine_grid = np.asarray(canvas, np.float32).reshape(SIZE, fine, SIZE, fine)
    return fine_grid.mean((1, 3)) / 255


def draw_over(pixels, thing):
    """Draw one object over float32 pixels (32, 32, 3); returns a new array."""
    alpha = coverage(thing.shape, thing.x, thing.y, thing.r)[..., None] * thing.vivid
    return pixels * (1 - alpha) + np.array(COLORS[thing.color], np.float32) * alpha


def draw(scene):
    """A list of Things -> float32 pixels (32, 32, 3) in 0..255."""
    pixels = np.broadcast_to(GROUND, (SIZE, SIZE, 3)).copy()
    for thing in scene:
        pixels = draw_over(pixels, thing)
    return pixels


def to_uint8(pixels):
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def to_image(pixels):
    return Image.fromarray(to_uint8(pixels))


# --- prompts ----------------------------------------------------------------------------------


def parse_prompt(prompt):
    """What a prompt asks for: ([(shape, colour or None), ...], relation or None). Raises ValueError
    for a prompt from outside this world: without objects, with more than four, with a relation that
    is not one of two single objects, or with other words than these, "and" and commas.

    >>> parse_prompt("two red stars")
    ([('star', 'red'), ('star', 'red')], None)
    >>> parse_prompt("a red circle left of a square")
    ([('circle', 'red'), ('square', None)], 'left of')
    """
    pattern = rf"\b({'|'.join(NUMBERS)}) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})(?:e?s)?\b"
    things, phrases = [], re.findall(pattern, prompt.lower())
    for number, color, shape in phrases:
        things += [(shape, color or None)] * NUMBERS[number]
    relation = re.search("|".join(RELATIONS), prompt.lower())
    rest = re.sub(rf"{pattern}|\b({'|'.join(RELATIONS)}|and)\b|[\s,.]", "", prompt.lower())
    two = len(phrases) == len(things) == 2
    if rest or not 1 <= len(things) <= 4 or (relation and not two):
        raise ValueError(
            f"prompt {prompt!r}: the tiny world knows only phrases like 'two red stars' or "
            f"'a circle above a blue square', with up to four objects ({', '.join(SHAPES)})"
        )
    return things, relation.group() if relation else None


def prompt_row(prompt, task_type, phrases):
    """One line of a prompt file, with the fields of T2I-R1's training file. `phrases` are the
    singular noun phrases of the prompt, "red star" or "star"."""
    row = {"prompt": prompt, "task_type": task_type, "nouns": [p.split()[-1] for p in phrases]}
    if any(" " in p for p in phrases):
        row["attr_nouns"] = phrases
    things, relation = parse_prompt(prompt)
    if relation:
        row["spatial_info"] = {"obj1": phrases[0], "obj2": phrases[1], "locality": relation}
    if task_type == "numeracy":
        row["numeracy_info"] = [{"obj_name": row["nouns"][0], "num": len(things)}]
    return row


@functools.lru_cache
def all_prompts():
    """Every prompt of the world: family -> list of rows. The families are those of GenEval and
    T2I-CompBench: one object, two objects, counting, colour binding, spatial relations."""
    colored = [f"{c} {s}" for c in COLORS for s in SHAPES]
    shape_pairs = itertools.permutations(SHAPES, 2)
    pairs = list(itertools.permutations(colored, 2))
    counted = list(itertools.product(("two", "three", "four"), [*colored, *SHAPES]))
    plural = {p: p + ("es" if p.endswith("cross") else "s") for p in [*colored, *SHAPES]}
    related = itertools.product(pairs, RELATIONS)
    return {
        "object": [prompt_row(f"a {p}", "object", [p]) for p in [*colored, *SHAPES]],
        "two objects": [prompt_row(f"a {s} and a {t}", "object", [s, t]) for s, t in shape_pairs],
        "counting": [prompt_row(f"{n} {plural[p]}", "numeracy", [p]) for n, p in counted],
        "color": [prompt_row(f"a {p} and a {q}", "color", [p, q]) for p, q in pairs],
        "spatial": [prompt_row(f"a {p} {r} a {q}", "spatial", [p, q]) for (p, q), r in related],
    }


def is_test_prompt(prompt):
    """One prompt in five is a test prompt. Its text decides, so all stages agree. Word order does
    not count: "a red star and a blue circle" goes with "a blue circle and a red star"."""
    return zlib.crc32(" ".join(sorted(prompt.split())).encode()) % 5 == 0


def prompt_families(split):
    """The prompts of a split, "train" or "test": a list of rows for each family."""
    return [
        [row for row in members if is_test_prompt(row["prompt"]) == (split == "test")]
        for members in all_prompts().values()
    ]


def prompt_rows(split, per_family, seed=0):
    """`per_family` rows of each family (fewer where it has fewer); split: "train" or "test"."""
    rng, rows = random.Random(f"{split} {seed}"), []
    for members in prompt_families(split):
        rows += rng.sample(members, min(per_family, len(members)))
    rng.shuffle(rows)  # so that the first few show every family
    return [{"id": f"{split}-{i:04d}", **row} for i, row in enumerate(rows)]


# --- random scenes ------------------------------------------------------------------------------


def random_thing(shape, color, smallest, largest, rng):
    """An object of random size, place and vividness; of random colour if `color` is None."""
    r = rng.randrange(int(smallest * 2), int(largest * 2) + 1) / 2
    edge = r * 1.25 + 0.5
    first, last = int(edge // GRID) + 1, int((SIZE - edge) // GRID)
    x, y = GRID * rng.randint(first, last), GRID * rng.randint(first, last)
    return Thing(shape, color or rng.choice(list(COLORS)), x, y, r, rng.uniform(0.6, 1))


def sample_scene(things, relation, rng):
    """A scene of these [(shape, colour or None)] with the first in `relation` to the second.
    Objects do not touch. Rejection sampling makes it fair to all allowed layouts."""
    # Small enough that all fit; large enough that a star (3.5 pixels) still looks like one.
    sizes = {1: (4.5, 10), 2: (4, 6.5), 3: (3.5, 5)}.get(len(things), (3.5, 4.25))
    while True:
        scene = [random_thing(shape, color, *sizes, rng) for shape, color in things]
        apart = all(
            np.hypot(a.x - b.x, a.y - b.y) - 1.2 * (a.r + b.r) - 1.5 > 0
            for a, b in itertools.combinations(scene, 2)
        )
        if apart and (relation is None or holds(relation, scene[0], scene[1])):
            return scene


def holds(relation, a, b):
    """Is a `relation` b? The offset along the named axis must be at least that across it."""
    dx, dy = RELATIONS[relation]
    along = (a.x - b.x) * dx + (a.y - b.y) * dy
    across = abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx)
    return along > 2 and along >= across


def describe(scene):
    """The scene in words, the policy's chain of thought: size, colour, shape and place."""
    parts = []
    for t in scene:
        size = "small" if t.r < 5 else "large" if t.r >= 7 else "medium"
        row = ("top", "middle", "bottom")[min(2, int(t.y * 3 / SIZE))]
        column = ("left", "center", "right")[min(2, int(t.x * 3 / SIZE))]
        parts.append(f"{size} {t.color} {t.shape} {row} {column}")
    return "; ".join(parts)


# --- corruptions: the artifacts of this world ---------------------------------------------------

# Each function draws the scene with one structural fault at one object, the victim. direction: a
# random unit vector (ux, uy). strength: in [0, 1], 0 gives the clean picture.
YS, XS = np.mgrid[0:SIZE, 0:SIZE] + 0.5  # centres of the pixels


def draw_broken(scene, victim, direction, strength, rng):
    """One side of the victim is missing."""
    ux, uy = direction
    depth = (XS - victim.x) * ux + (YS - victim.y) * uy  # pixels along the direction
    gone = np.clip(depth - victim.r * (1.3 - 1.5 * strength), 0, 1)[..., None]
    return draw(scene) * (1 - gone) + draw([t for t in scene if t is not victim]) * gone


def draw_fused(scene, victim, direction, strength, rng):
    """A second shape of the same colour grows out of the victim."""
    if strength == 0:
        return draw(scene)
    shape, (ux, uy) = rng.choice(SHAPES), direction
    shift = victim.r * (0.5 + 0.7 * strength)
    x, y, r = victim.x + ux * shift, victim.y + uy * shift, victim.r * (0.4 + 0.6 * strength)
    return draw_over(draw(scene), replace(victim, shape=shape, x=x, y=y, r=r))


def draw_bleeding(scene, victim, direction, strength, rng):
    """A stain of another colour lies over the edge of the victim."""
    other = np.array(COLORS[rng.choice([c for c in COLORS if c != victim.color])], np.float32)
    ux, uy = direction
    spot = victim.r * 0.85 * np.sqrt(strength)
    near = np.hypot(XS - victim.x - ux * victim.r * 0.8, YS - victim.y - uy * victim.r * 0.8)
    stain = np.clip(spot + 0.5 - near, 0, 1)[..., None] * 0.9 * (strength > 0)
    return draw(scene) * (1 - stain) + other * stain


def draw_noise(scene, victim, direction, strength, rng):
    """Gaussian noise on the victim and around it."""
    noise = np.random.default_rng(rng.randrange(2**32))
    mask = (np.hypot(XS - victim.x, YS - victim.y) < victim.r * 1.5)[..., None]
    texture = noise.normal(0, 110 * strength, (SIZE, SIZE, 3)).astype(np.float32)
    return draw(scene) + mask * texture


def draw_blocks(scene, victim, direction, strength, rng):
    """The 4 x 4 blocks nearest to the victim are shifted, each by its own offset."""
    noise = np.random.default_rng(rng.randrange(2**32))
    pixels, moved = draw(scene), max(0, round(10 * strength))
    out = pixels.copy()

    def distance(corner):
        y, x = corner
        return np.hypot(x + 2 - victim.x, y + 2 - victim.y) + rng.uniform(0, 3)

    corners = [(y, x) for y in range(0, SIZE, 4) for x in range(0, SIZE, 4)]
    for y, x in sorted(corners, key=distance)[:moved]:
        sy, sx = (min(SIZE - 4, max(0, v + int(noise.choice([-3, -2, 2, 3])))) for v in (y, x))
        out[y : y + 4, x : x + 4] = pixels[sy : sy + 4, sx : sx + 4]
    return out


CORRUPTIONS = ("broken", "fused", "bleeding", "noise", "blocks")
DRAW_CORRUPTED = (draw_broken, draw_fused, draw_bleeding, draw_noise, draw_blocks)


def corrupt(scene, kind, strength, rng):
    """Draw the scene with a fault of this kind at a random object: float pixels (32, 32, 3)."""
    victim = rng.choice(scene)
    angle = rng.uniform(0, 2 * np.pi)
    draw_corrupted = dict(zip(CORRUPTIONS, DRAW_CORRUPTED))[kind]
    return draw_corrupted(scene, victim, (np.cos(angle), np.sin(angle)), strength, rng)


def draw_perhaps_corrupted(scene, flawed, rng):
    """Draw the scene, corrupted with probability `flawed`: (pixels, kind or None)."""
    if rng.random() >= flawed:
        return draw(scene), None
    kind = rng.choice(CORRUPTIONS)
    return corrupt(scene, kind, rng.uniform(0.4, 1), rng), kind


# --- sets of pictures ---------------------------------------------------------------------------


def reference_picture(prompt, key=0, style="plain"):
    """A clean picture of a prompt, the same for the same key: one of the real pictures of the
    adversarial reward. Style outline: only the rim of every shape; cool: only the colours of COOL,
    whatever the prompt says."""
    rng = random.Random(f"{prompt} {key} {style}")
    scene = sample_scene(*parse_prompt(prompt), rng)
    if style == "cool":
        scene = [replace(thing, color=rng.choice(COOL)) for thing in scene]
    pixels = draw(scene)
    for thing in scene if style == "outline" else ():
        inside = coverage(thing.shape, thing.x, thing.y, thing.r - 2)[..., None]
        pixels = pixels * (1 - inside) + GROUND * inside
    return to_image(pixels)


def make_pictures(n, flawed, seed, forgotten=0.0):
    """n training examples: (rows, scenes, pixels uint8 (n, 32, 32, 3), kinds, where). A share
    `flawed` of the pictures is corrupted. kinds[i] names the fault or is None; where[i], (16,)
    bool, marks the cells of 8 x 8 pixels in which it shows. Of the pictures of several objects, a
    share `forgotten` lacks one: captions from the web, too, name things that nobody can see, and
    omitted objects are a known weakness of text-to-image models. All families are equally frequent.
    """
    rng = random.Random(seed)
    families = prompt_families("train")
    rows, scenes, kinds = [], [], []
    pixels, where = np.empty((n, 32, 32, 3), np.uint8), np.zeros((n, 16), bool)
    for i in range(n):
        rows.append(rng.choice(rng.choice(families)))
        scene = sample_scene(*parse_prompt(rows[i]["prompt"]), rng)
        if forgotten and len(scene) > 1 and rng.random() < forgotten:
            scene.pop(rng.randrange(len(scene)))
        scenes.append(scene)
        picture, kind = draw_perhaps_corrupted(scenes[i], flawed, rng)
        changed = np.abs(picture - draw(scenes[i])).max(-1) > 60
        where[i] = changed.reshape(4, 8, 4, 8).sum((1, 3)).reshape(16) >= 3
        pixels[i] = to_uint8(picture)
        kinds.append(kind)
    return rows, scenes, pixels, kinds, where
