"""Counting, places and questions: by hand on boxes, then whole models of the real architectures."""

import math

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    GitConfig,
    GitForCausalLM,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)

from reward_models import grounding_dino as ours

LEFT, RIGHT, TOP, BOTTOM = (
    (0, 0.4, 0.2, 0.6),
    (0.8, 0.4, 1, 0.6),
    (0.4, 0, 0.6, 0.2),
    (0.4, 0.8, 0.6, 1),
)


def test_overlap_by_hand():
    assert ours.iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert ours.iou((0, 0, 1, 1), (2, 2, 3, 3)) == ours.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_an_object_that_is_found_three_times_is_one_object():
    """As released, the boxes reach suppression as (center, size) and read as corners: it counts three."""
    found = [
        (0.9, (0.6, 0.6, 0.9, 0.9)),
        (0.8, (0.62, 0.6, 0.9, 0.9)),
        (0.7, (0.6, 0.62, 0.9, 0.9)),
    ]
    assert len(ours.suppress([box for _, box in found], [score for score, _ in found])) == 1
    as_released = [
        ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0) for _, (x0, y0, x1, y1) in found
    ]
    assert len(ours.suppress(as_released, [score for score, _ in found])) == 3
    row = {"nouns": ["cat"], "numeracy_info": [{"obj_name": "cat", "num": 1}]}
    assert ours.detection_score({"cat": found}, row) == 1.0


@pytest.mark.parametrize(
    "locality, a, b, expected",
    [
        ("left of", LEFT, RIGHT, 1),
        ("on the left of", RIGHT, LEFT, 0),
        ("on the right of", RIGHT, LEFT, 1),
        ("above", TOP, BOTTOM, 1),
        ("on top of", TOP, BOTTOM, 1),
        ("on the top of", BOTTOM, TOP, 0),  # released: 0, 0, 0
        ("below", BOTTOM, TOP, 1),
        ("on the bottom of", BOTTOM, TOP, 1),
        ("left of", TOP, BOTTOM, 0),
        ("near", LEFT, RIGHT, 0.5),
        ("next to", LEFT, (0.3, 0.4, 0.5, 0.6), 1),  # released: always 1
        ("inside", LEFT, RIGHT, 0),
    ],
)
def test_places(locality, a, b, expected):
    assert ours.position(locality, a, b) == pytest.approx(expected)


def test_overlapping_things_are_less_clearly_beside_each_other():
    a, b = (0.0, 0.0, 0.6, 0.5), (0.3, 0.0, 0.9, 0.5)  # a third of their union is shared
    assert ours.position("left of", a, b) == pytest.approx(0.1 / (1 / 3))


def test_the_four_kinds_of_prompts():
    found = {"cat": [(0.9, LEFT)], "dog": [(0.8, RIGHT), (0.4, TOP)]}
    spatial = {"spatial_info": {"obj1": "cat", "obj2": "dog", "locality": "left of"}}
    assert ours.detection_score(found, spatial) == pytest.approx(
        0.9
    )  # 2 x .2 + .5: never 1, as released
    assert ours.detection_score({"cat": found["cat"]}, spatial) == pytest.approx(0.2)
    count = {"numeracy_info": [{"obj_name": "dog", "num": 2}, {"obj_name": "cat", "num": 3}]}
    assert ours.detection_score(found, count) == pytest.approx((1 + 0.2) / 2)
    assert ours.detection_score(found, {"nouns": ["cat", "dog", "fire hydrant"]}) == pytest.approx(
        2 / 3
    )
    assert math.isnan(ours.detection_score(found, {}))


# --- whole models: the real architectures, small and random


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        "?",
        "yes",
        "no",
        "cat",
        "dog",
        "red",
        "old",
        "fire",
        "engine",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "vocab.txt"))


@pytest.fixture(scope="module")
def gdino(tmp_path_factory, vocabulary):
    folder = tmp_path_factory.mktemp("gdino")
    torch.manual_seed(0)
    text = BertConfig(
        vocab_size=15,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    swin = SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=160,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=text,
        num_queries=20,
        encoder_layers=1,
        decoder_layers=2,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    GroundingDinoImageProcessorPil(
        size={"shortest_edge": 160, "longest_edge": 200}
    ).save_pretrained(folder)
    return ours.GDino(checkpoint=folder)


@pytest.fixture(scope="module")
def git(tmp_path_factory, vocabulary):
    folder = tmp_path_factory.mktemp("git")
    torch.manual_seed(0)
    config = GitConfig(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            image_size=32,
            num_attention_heads=2,
            patch_size=16,
        ),
        vocab_size=15,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    GitForCausalLM(config).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return ours.GIT(checkpoint=folder)


IMAGES = [
    Image.radial_gradient("L"),
    Image.linear_gradient("L"),
    Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 20),
]


def test_a_noun_of_three_words_is_all_its_tokens(gdino, monkeypatch):
    monkeypatch.setattr(
        gdino, "threshold", -1.0
    )  # everything is found: look at the scores themselves
    (found,) = gdino.detect([["old fire engine", "cat"]], IMAGES[:1])
    words = gdino.tokenizer("old fire engine . cat.", return_tensors="pt")
    pixels = gdino.processor(images=[IMAGES[0].convert("RGB")], return_tensors="pt")
    with torch.no_grad():
        p = gdino.model(**words, **pixels).logits.sigmoid()[0]
    assert [s for s, _ in found["old fire engine"]] == pytest.approx(
        p[:, 1:4].mean(1).tolist(), abs=1e-6
    )
    assert [s for s, _ in found["cat"]] == pytest.approx(p[:, 5].tolist(), abs=1e-6)


def test_a_detection_does_not_depend_on_its_batch(gdino, monkeypatch):
    monkeypatch.setattr(gdino, "threshold", -1.0)
    phrases = [["cat"], ["dog", "old fire engine"], ["red cat", "dog"]]
    for together, (wanted, image) in zip(gdino.detect(phrases, IMAGES), zip(phrases, IMAGES)):
        (alone,) = gdino.detect([wanted], [image])
        for phrase in wanted:
            assert [s for s, _ in together[phrase]] == pytest.approx(
                [s for s, _ in alone[phrase]], abs=1e-5
            )


def test_prompts_that_cannot_be_checked_have_no_score(gdino, git):
    rows = [{"nouns": ["cat"]}, {}]
    for reward in (gdino, git):
        scores = reward(["a cat", "love"], IMAGES[:2], rows)
        assert scores[0].isfinite() and scores[1].isnan()


def test_git_in_a_batch_equals_git_alone_and_the_generic_forward(git):
    questions = ["red cat?", "dog?", "old fire engine?"]
    together = git.answer(questions, IMAGES)
    for i, question in enumerate(questions):
        assert together[i] == pytest.approx(
            git.answer([question], IMAGES[i : i + 1])[0].item(), abs=1e-6
        )
        ids = torch.tensor([[2, *git.tokenizer.encode(question, add_special_tokens=False)]])
        pixels = git.processor([IMAGES[i].convert("RGB")], return_tensors="pt").pixel_values
        with torch.no_grad():  # as released: softmax over everything, then yes over yes and no
            p = git.model(pixel_values=pixels, input_ids=ids).logits[0, -1].softmax(-1)
        assert together[i].item() == pytest.approx((p[7] / (p[7] + p[8])).item(), abs=1e-6)


def test_git_averages_the_attributes_and_leaves_places_alone(git):
    rows = [
        {"attr_nouns": ["red cat", "old dog"], "nouns": ["cat"]},
        {"nouns": ["cat"], "spatial_info": {"obj1": "cat"}},
    ]
    scores = git(["", ""], [IMAGES[0]] * 2, rows)
    expected = git.answer(["red cat?", "old dog?"], [IMAGES[0]] * 2).mean()
    assert scores.tolist() == pytest.approx([expected.item(), 0.0])
