"""The sign world's ground truths against its pixels."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from flux2.data import signs
from flux2.data.signs import (
    CELL,
    COLOURS,
    CONTRAST,
    CUBE,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    LIGHTNESS,
    LOOKALIKES,
    NAMES,
    PLACES,
    SHAPES,
    SIZE,
    TASKS,
    TRAIN_WORDS,
    Scene,
    SignWorld,
    draw,
    lab,
    prompt_of,
    rgb,
    sample_scene,
    shape_origins,
)
from flux2.errors import InputError
from flux2.rng import keyed

SCENE = Scene("TAXI", "#FFFFFF", "#0033CC", "star", "#FFCC00", 2, ("top", "left"), (2, -3))


def scenes(count: int, split: str = "train", loose: float = 0.5):
    return [sample_scene(keyed("test", i).random(18), split, False, loose) for i in range(count)]


def same(a, b) -> bool:
    if len(a.references) != len(b.references):
        return False
    arrays = [(a.target, b.target), (a.mask, b.mask), *zip(a.references, b.references, strict=True)]
    return a.prompt == b.prompt and a.meta.keys() == b.meta.keys() and all(
        (x is None and y is None) or np.array_equal(x, y) for x, y in arrays
    )


def test_an_index_is_a_record_whatever_was_asked_before():
    tasks = dict.fromkeys(TASKS, 1.0)
    first = SignWorld("train", length=200, tasks=tasks)
    second = SignWorld("train", length=100, tasks=tasks)
    backwards = {i: second[i] for i in reversed(range(40))}
    assert all(same(first[i], backwards[i]) for i in range(40))
    assert not same(first[0], SignWorld("train", length=200, tasks=tasks, seed=1)[0])
    assert not same(first[0], first[1])


def test_a_known_record_stays_what_it_is():
    """Recipes and reported numbers rest on it: another hash is another dataset."""
    record = SignWorld("train", length=10)[7]
    import hashlib

    assert record.prompt == KNOWN_PROMPT
    assert hashlib.sha256(record.target.tobytes()).hexdigest()[:16] == KNOWN_PIXELS


KNOWN_PROMPT = 'a black circle at the bottom right, "ULMW" in yellow on purple'
KNOWN_PIXELS = "1d713819c91129bb"


def test_splits_share_no_word_and_no_combination():
    assert not set(HELD_OUT_WORDS) & set(TRAIN_WORDS) and len(HELD_OUT_WORDS) > 50
    assert all(len(w) in (3, 4) for w in HELD_OUT_WORDS + TRAIN_WORDS)
    train = [r.meta for r in map(SignWorld("train", length=1500).__getitem__, range(1500))]
    held = [r.meta for r in map(SignWorld("heldout", length=300).__getitem__, range(300))]
    mixed = [r.meta for r in map(SignWorld("combinations", length=300).__getitem__, range(300))]

    def pairs(metas):
        return {(m["shape"], NAMES[m["shape_colour"]]) for m in metas}

    assert not {m["text"][0] for m in train} & set(HELD_OUT_WORDS)
    assert {m["text"][0] for m in held} <= set(HELD_OUT_WORDS)
    assert not {m["text"][0] for m in mixed} & set(HELD_OUT_WORDS)
    assert not pairs(train) & HELD_OUT_PAIRS and len(pairs(train)) == 48 - len(HELD_OUT_PAIRS)
    assert not pairs(held) & HELD_OUT_PAIRS
    assert pairs(mixed) == HELD_OUT_PAIRS


def test_every_held_out_shape_and_colour_is_seen_apart():
    seen = set(itertools.product(SHAPES, COLOURS)) - HELD_OUT_PAIRS
    assert {s for s, _ in seen} == set(SHAPES) and {c for _, c in seen} == set(COLOURS)


@pytest.mark.parametrize("task", ["recolour", "move", "replace"])
def test_edits_in_training_show_no_held_out_word_or_combination(task):
    for i in range(300):
        m = SignWorld("train", length=300, tasks={task: 1.0})[i].meta
        assert m["text"][0] not in HELD_OUT_WORDS
        assert (m["shape"], NAMES[m["shape_colour"]]) not in HELD_OUT_PAIRS


def test_compositions_in_training_show_no_held_out_combination_and_change_something():
    world = SignWorld("train", length=600, tasks={"compose": 1.0})
    assert all(world[i].mask.any() for i in range(600))
    metas = [world[i].meta for i in range(600)]
    assert not [m for m in metas if (m["shape"], NAMES[m["shape_colour"]]) in HELD_OUT_PAIRS]


def test_colours_of_a_sign_can_be_told_apart():
    worlds = [SignWorld(length=200, granularity={g: 1.0}) for g in ("full", "json")]
    for world, i in itertools.product(worlds, range(200)):
        m = world[i].meta
        ground, ink, shape = (lab(rgb(m[k])) for k in ("ground", "ink", "shape_colour"))
        assert np.linalg.norm(ink - ground) >= CONTRAST
        assert np.linalg.norm(shape - ground) >= CONTRAST
        assert abs(ink[0] - ground[0]) >= LIGHTNESS


def test_lab_of_known_colours():
    """Reference values of sRGB primaries under D65 (Lindbloom)."""
    want = {
        "#FFFFFF": (100, 0, 0),
        "#FF0000": (53.24, 80.09, 67.20),
        "#0000FF": (32.30, 79.19, -107.86),
    }
    for colour, expected in want.items():
        np.testing.assert_allclose(lab(rgb(colour)), expected, atol=0.02)


def test_ink_is_within_the_text_box():
    for scene in scenes(300):
        blank = draw(replace(scene, word=""))
        ys, xs = np.nonzero((draw(scene) != blank).any(-1))
        x0, y0, x1, y1 = (SIZE * v for v in scene.text_box)
        assert len(xs) and 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
        assert x0 <= xs.min() and xs.max() < x1 and y0 <= ys.min() and ys.max() < y1
        assert x1 - x0 <= CELL * len(scene.word)  # and the box is no larger than its letters' cells


def test_every_letter_leaves_ink_in_its_own_cell():
    for scene in scenes(100, loose=0.0):
        changed = (draw(scene) != draw(replace(scene, word=""))).any(-1)
        row = changed[CELL * scene.word_row : CELL * (scene.word_row + 1)]
        for k in range(4):
            assert row[:, CELL * k : CELL * (k + 1)].any() == (k < len(scene.word))


def test_letters_and_shapes_are_all_different():
    glyphs = [signs.glyph(a).tobytes() for a in signs.ALPHABET]
    stencils = [signs.stencil(s).tobytes() for s in SHAPES]
    assert len(set(glyphs)) == 26 and len(set(stencils)) == 6


def test_shapes_are_where_the_scene_says_and_as_many():
    for scene in scenes(200):
        image = draw(replace(scene, word=""))
        inked = (image != rgb(scene.ground)).any(-1)
        outside = inked.copy()
        for x, y in shape_origins(scene):
            assert np.array_equal(image[y + 8, x + 8], rgb(scene.shape_colour))
            assert inked[y : y + CELL, x : x + CELL].mean() > 0.1
            outside[y : y + CELL, x : x + CELL] = False
        assert not outside.any() and len(shape_origins(scene)) == scene.count
        ys, xs = np.nonzero(inked)
        vertical, side = scene.place
        assert (ys.mean() < SIZE / 2) == (vertical == "top")
        centre = xs.mean() - (SIZE - 1) / 2
        if side:
            assert (centre < -3) == (side == "left") and (centre > 3) == (side == "right")
        else:
            assert abs(centre) < 1


def test_shapes_and_letters_on_the_grid_do_not_touch():
    for scene in scenes(200, loose=0.0):
        text = (draw(scene) != draw(replace(scene, word=""))).any(-1)
        for x, y in shape_origins(scene):
            assert not text[y : y + CELL, x : x + CELL].any()


def test_colours_are_exact_pixels():
    image = draw(SCENE)
    assert np.array_equal(image[-1, -1], rgb(SCENE.ground))
    for colour in (SCENE.ink, SCENE.shape_colour):
        assert (image == rgb(colour)).all(-1).sum() > 20


def scene_of(meta, shift=(0, 0)) -> Scene:
    return Scene(
        meta["text"][0], meta["ink"], meta["ground"], meta["shape"], meta["shape_colour"],
        meta["count"], meta["place"], shift,
    )  # fmt: skip


@pytest.mark.parametrize("task", [None, "recolour", "move", "replace", "compose"])
def test_the_truth_draws_the_target(task):
    world = SignWorld("train", length=60, tasks=task and {task: 1.0}, loose=0.0)
    for i in range(60):
        record = world[i]
        assert np.array_equal(record.target, draw(scene_of(record.meta)))
        assert record.meta["text_box"] == scene_of(record.meta).text_box
        assert record.bucket == world.bucket_of(i) and world.task_of(i) == record.meta["task"]


@pytest.mark.parametrize("task", ["recolour", "move", "replace", "compose"])
def test_the_mask_is_what_changed(task):
    world = SignWorld("train", length=100, tasks={task: 1.0})
    for i in range(100):
        record = world[i]
        source = record.references[-1]
        assert np.array_equal(record.mask, (record.target != source).any(-1))
        kept = np.where(record.mask[..., None], 0, record.target)
        assert np.array_equal(kept, np.where(record.mask[..., None], 0, source))


@pytest.mark.parametrize("task", ["recolour", "move", "replace"])
def test_an_edit_changes_something(task):
    world = SignWorld("train", length=500, tasks={task: 1.0})
    assert all(world[i].mask.any() for i in range(500))


def edits(task: str, count: int = 150):
    """(source scene, record); the source is found again from the record's own uniforms."""
    world = SignWorld("train", length=count, tasks={task: 1.0})
    for i in range(count):
        u = world._uniforms(i)
        source = sample_scene(u[:18], "train", False, world.loose)
        record = world[i]
        assert np.array_equal(record.references[-1], draw(source))
        yield source, record


def test_a_recolouring_changes_one_colour_as_told():
    kinds: Counter[str] = Counter()
    for source, record in edits("recolour"):
        m = record.meta
        changed = [k for k in ("ink", "ground", "shape_colour") if m[k] != getattr(source, k)]
        assert len(changed) == 1
        word = {"ink": "word", "ground": "ground"}.get(changed[0], source.shape)
        assert record.prompt.startswith(f"make the {word}")
        assert record.prompt.endswith(f" {NAMES[m[changed[0]]]}")
        assert np.array_equal(record.target, draw(replace(source, **{changed[0]: m[changed[0]]})))
        kinds[changed[0]] += 1
    assert min(kinds.values()) > 20 and len(kinds) == 3


def test_a_move_changes_the_place_as_told():
    for source, record in edits("move"):
        place = record.meta["place"]
        assert place != source.place and place in PLACES
        assert record.prompt.endswith("to the " + " ".join(p for p in place if p))
        assert np.array_equal(record.target, draw(replace(source, place=place)))


def test_a_replacement_changes_the_word_as_told():
    for source, record in edits("replace"):
        (word,) = record.meta["text"]
        assert word != source.word and record.prompt == f'change the word to "{word}"'
        assert np.array_equal(record.target, draw(replace(source, word=word)))


def test_a_composition_takes_the_shape_of_image_1_and_the_rest_of_image_2():
    same_shape = 0
    for source, record in edits("compose"):
        m, (first, second) = record.meta, record.references
        want = replace(source, shape=m["shape"], shape_colour=m["shape_colour"])
        assert np.array_equal(record.target, draw(want)) and np.array_equal(second, draw(source))
        # Image 1 shows that shape in that colour: its cells' pixels are found in it.
        assert (first == rgb(m["shape_colour"])).all(-1).sum() >= 20
        same_shape += m["shape"] == source.shape
    assert same_shape < 75


def test_prompts_say_what_is_asked():
    text, asked = prompt_of(SCENE, "full")
    assert text == 'two yellow stars at the top left, "TAXI" in white on blue'
    assert set(asked) == {"text", "ink", "ground", "shape", "shape_colour", "count", "place"}
    text, asked = prompt_of(SCENE, "short")
    assert text == 'two yellow stars, "TAXI"'
    assert set(asked) == {"text", "shape", "shape_colour", "count"}
    text, asked = prompt_of(
        replace(SCENE, ink=CUBE[5], count=1, shape="cross", place=("bottom", "")), "json"
    )
    body = json.loads(text)
    assert body == {"text": "TAXI", "ink": CUBE[5], "ground": "#0033CC",
                    "shape": "a yellow cross bottom"}  # fmt: skip
    assert prompt_of(replace(SCENE, shape="cross"), "short")[0].startswith("two yellow crosses")


def test_prompts_of_other_scenes_differ():
    """Prompt and image determine each other: two scenes with one full prompt are one picture."""
    seen: dict[str, bytes] = {}
    for scene in scenes(2000, loose=0.0):
        text = prompt_of(scene, "full")[0]
        assert seen.setdefault(text, draw(scene).tobytes()) == draw(scene).tobytes()
    assert len(seen) > 1900


def test_weights_of_tasks_and_granularities_are_kept():
    world = SignWorld("train", length=4000, tasks={"t2i": 3.0, "move": 1.0},
                      granularity={"full": 1.0, "json": 1.0})  # fmt: skip
    tasks = Counter(world.task_of(i) for i in range(4000))
    assert set(tasks) == {"t2i", "move"} and abs(tasks["move"] / 4000 - 0.25) < 0.03
    metas = [world[i].meta for i in range(600)]
    kinds = Counter(m["granularity"] for m in metas if m["task"] == "t2i")
    assert set(kinds) == {"full", "json"} and abs(kinds["full"] / kinds.total() - 0.5) < 0.1


def test_the_share_of_loose_letters():
    shifts = [s.shift for s in scenes(2000, loose=0.1)]
    loose = sum(s != (0, 0) for s in shifts) / 2000
    assert 0.07 < loose < 0.13 and max(abs(v) for s in shifts for v in s) == 3
    assert all(s.shift == (0, 0) for s in scenes(100, loose=0.0))


@pytest.mark.parametrize(
    "wrong",
    [{"split": "test"}, {"length": 0}, {"tasks": {"paint": 1.0}}, {"tasks": {"t2i": 0.0}},
     {"granularity": {"full": -1.0, "json": 2.0}}],
)  # fmt: skip
def test_wrong_worlds_are_refused(wrong):
    with pytest.raises(InputError):
        SignWorld(**wrong)


def test_indices_beyond_the_end_are_refused():
    with pytest.raises(IndexError):
        SignWorld(length=3)[3]
    with pytest.raises(IndexError):
        SignWorld(length=3)[-1]


def test_misread_captions_swap_lookalikes_and_nothing_else():
    clean, noisy = SignWorld(length=400), SignWorld(length=400, misread=0.38)
    letters = swapped = able = 0
    for i in range(400):
        a, b = clean[i], noisy[i]
        (word,) = b.meta["text"]
        said = b.prompt.split('"')[1]
        assert (a.target == b.target).all() and a.meta == b.meta
        assert b.prompt.replace(said, word) == a.prompt
        for c, d in zip(word, said, strict=True):
            assert d in (c, LOOKALIKES.get(c, c))
            letters, swapped, able = letters + 1, swapped + (c != d), able + (c in LOOKALIKES)
    assert abs(swapped / able - 0.38) < 0.05
    assert not {noisy[i].prompt.split('"')[1] for i in range(400)} & set(HELD_OUT_WORDS)
