"""The world and its truth: before anyone is trained against a measure, the measure is tested."""

import random

import pytest
import torch

import generate
from tiny_world import world as tiny

ROWS = tiny.prompt_rows("train", 30)
PROMPTS = [row["prompt"] for row in ROWS]
SCENES = [
    tiny.sample_scene(*tiny.wanted(prompt), random.Random(i)) for i, prompt in enumerate(PROMPTS)
]


def gold_of(pixels, prompts=PROMPTS):
    aligned, clean = tiny.gold(prompts, [tiny.to_image(p) for p in pixels])
    return aligned, clean, aligned * clean


def test_a_clean_drawing_is_gold():
    aligned, clean, gold = gold_of([tiny.draw(scene) for scene in SCENES])
    assert (aligned == 1).all()
    assert gold.mean() > 0.95 and gold.quantile(0.02) > 0.85


@pytest.mark.parametrize("kind", tiny.CORRUPTIONS)
def test_every_corruption_lowers_gold_the_more_the_stronger_it_is(kind):
    by_strength = [
        gold_of(
            [
                tiny.corrupt(scene, kind, strength, random.Random(i))
                for i, scene in enumerate(SCENES)
            ]
        )[2].mean()
        for strength in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert all(a > b for a, b in zip(by_strength, by_strength[1:])), by_strength
    assert by_strength[-1] < 0.5


def test_a_corruption_of_strength_zero_is_the_clean_picture():
    for kind in tiny.CORRUPTIONS:
        assert (tiny.corrupt(SCENES[0], kind, 0, random.Random(0)) == tiny.draw(SCENES[0])).all()


def test_gold_finds_shape_colour_size_and_place():
    scene = [tiny.Thing("star", "blue", 9, 10, 6), tiny.Thing("cross", "red", 22, 23, 5, vivid=0.7)]
    found, _ = tiny.explain([tiny.to_image(tiny.draw(scene))])
    for thing, truth in zip(sorted(found[0], key=lambda t: t.x), scene):
        assert (thing.shape, thing.color) == (truth.shape, truth.color)
        assert (
            abs(thing.x - truth.x) <= 0.5
            and abs(thing.y - truth.y) <= 0.5
            and abs(thing.r - truth.r) <= 0.5
        )
        assert abs(thing.vivid - truth.vivid) < 0.1


def test_gold_reads_the_prompt():
    picture = tiny.to_image(
        tiny.draw([tiny.Thing("circle", "red", 8, 16, 5), tiny.Thing("square", "blue", 24, 16, 5)])
    )
    value = {
        prompt: tiny.gold([prompt], [picture])[0].item()
        for prompt in (
            "a red circle left of a blue square",
            "a red circle right of a blue square",
            "a red circle and a blue square",
            "a red circle and a green square",
            "a red circle",
            "two red circles",
            "a yellow star",
        )
    }
    assert list(value.values()) == [1, 0.5, 1, 0.75, 0.5, 0.5, 0]


def test_an_empty_picture_is_clean_but_not_gold():
    aligned, clean = tiny.gold(["a red circle"], [tiny.to_image(tiny.draw([]))])
    assert clean == 1 and aligned == 0


def test_train_and_test_prompts_are_disjoint_even_in_another_word_order():
    train, test = (
        {" ".join(sorted(row["prompt"].split())) for row in tiny.prompt_rows(split, 10**6)}
        for split in ("train", "test")
    )
    assert train and test and not train & test


def test_prompt_rows_have_the_fields_of_t2i_r1():
    rows = {
        row["prompt"]: row
        for row in tiny.prompt_rows("train", 10**6) + tiny.prompt_rows("test", 10**6)
    }
    assert rows["a red circle left of a blue square"]["spatial_info"] == {
        "obj1": "red circle",
        "obj2": "blue square",
        "locality": "left of",
    }
    assert rows["three crosses"]["numeracy_info"] == [{"obj_name": "cross", "num": 3}]
    assert rows["a red star and a blue cross"]["attr_nouns"] == ["red star", "blue cross"]
    assert all(row["nouns"] and row["task_type"] for row in rows.values())


def test_a_prompt_from_another_world_is_refused_not_scored():
    with pytest.raises(ValueError, match="knows only phrases"):
        tiny.wanted("a corgi reading a newspaper")


def test_the_policy_is_mostly_good_with_honest_flaws(policy, test_prompts):
    prompts = [row["prompt"] for row in test_prompts] * 2
    images = generate.sample(policy, prompts, [(0, 0, i, 0) for i in range(len(prompts))]).images
    aligned, clean = tiny.gold(prompts, images)
    assert 0.55 < (clean >= tiny.CLEAN_ENOUGH).float().mean() < 0.80
    assert aligned.mean() > 0.4


def test_the_policy_says_what_it_is_going_to_paint(policy):
    """Its thought decides: told to think of a large circle, it paints a larger one."""
    sizes = []
    for size in ("small", "large"):
        ids, mask = generate.image_context(
            policy, ["a red circle"] * 32, [f"{size} red circle middle center"] * 32
        )
        uniform = generate.noise([(0, 0, i) for i in range(32)], 64)
        with torch.no_grad():
            tokens = generate.decode(
                policy,
                ids,
                mask,
                64,
                uniform,
                lambda t: policy.model.prepare_embeddings_for_image_generation(t[:, None]),
                policy.model.model.generation_head,
            )
            found, _ = tiny.explain(generate.to_images(policy, tokens))
        sizes.append(sum(max((t.r for t in things), default=0) for things in found) / 32)
    assert sizes[0] + 1 < sizes[1]
