"""GroundingDINO and GIT: boxes by hand, then small random models of the real architectures."""

import math

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino import image_processing_pil_grounding_dino as pil

from reward_models.git import GIT
from reward_models.grounding_dino import GDino, detection_score, iou, position, suppress

# Boxes at the four edges of the picture, (x0, y0, x1, y1).
LEFT, RIGHT = (0, 0.4, 0.2, 0.6), (0.8, 0.4, 1, 0.6)
TOP, BOTTOM = (0.4, 0, 0.6, 0.2), (0.4, 0.8, 0.6, 1)


def test_overlap_by_hand():
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_an_object_that_is_found_three_times_is_one_object():
    """The released code passes the boxes as (center, size), and counts three."""
    boxes = [(0.6, 0.6, 0.9, 0.9), (0.62, 0.6, 0.9, 0.9), (0.6, 0.62, 0.9, 0.9)]
    scores = [0.9, 0.8, 0.7]
    assert suppress(boxes, scores) == boxes[:1]
    as_released = [((a + c) / 2, (b + d) / 2, c - a, d - b) for a, b, c, d in boxes]
    assert len(suppress(as_released, scores)) == 3
    row = {"nouns": ["cat"], "numeracy_info": [{"obj_name": "cat", "num": 1}]}
    assert detection_score({"cat": list(zip(scores, boxes))}, row) == 1.0


@pytest.mark.parametrize(
    "locality, a, b, expected",
    [
        ("left of", LEFT, RIGHT, 1),
        ("on the left of", RIGHT, LEFT, 0),
        ("on the right of", RIGHT, LEFT, 1),
        ("above", TOP, BOTTOM, 1),  # released: 0
        ("on top of", TOP, BOTTOM, 1),  # released: 0
        ("on the top of", BOTTOM, TOP, 0),
        ("below", BOTTOM, TOP, 1),
        ("on the bottom of", BOTTOM, TOP, 1),
        ("left of", TOP, BOTTOM, 0),
        ("near", LEFT, RIGHT, 0.5),  # released: 1
        ("next to", LEFT, (0.3, 0.4, 0.5, 0.6), 1),
        ("inside", LEFT, RIGHT, math.nan),  # released: 0
    ],
)
def test_places(locality, a, b, expected):
    assert position(locality, a, b) == pytest.approx(expected, nan_ok=True)


def test_an_overlap_lowers_the_score_of_a_place():
    a, b = (0.0, 0.0, 0.6, 0.5), (0.3, 0.0, 0.9, 0.5)  # they share a third of their union
    assert position("left of", a, b) == pytest.approx(0.1 / (1 / 3))


def test_the_four_kinds_of_prompts():
    found = {"cat": [(0.9, LEFT)], "dog": [(0.8, RIGHT), (0.4, TOP)]}
    spatial = {"spatial_info": {"obj1": "cat", "obj2": "dog", "locality": "left of"}}
    both = 2 * 0.2 + 0.5  # never 1, as released
    assert detection_score(found, spatial) == pytest.approx(both)
    assert detection_score({"cat": found["cat"]}, spatial) == pytest.approx(0.2)
    counts = [{"obj_name": "dog", "num": 2}, {"obj_name": "cat", "num": 3}]
    assert detection_score(found, {"numeracy_info": counts}) == pytest.approx((1 + 0.2) / 2)
    nouns = {"nouns": ["cat", "dog", "fire hydrant"]}
    assert detection_score(found, nouns) == pytest.approx(2 / 3)
    assert math.isnan(detection_score(found, {}))
    # As released, task_type decides. 185 "complex" prompts of T2I-R1 name a place, too.
    row = spatial | {"nouns": ["cat", "dog", "mug"], "numeracy_info": counts}
    assert detection_score(found, row | {"task_type": "complex"}) == pytest.approx(2 / 3)
    assert detection_score(found, row | {"task_type": "numeracy"}) == pytest.approx((1 + 0.2) / 2)
    assert detection_score(found, row | {"task_type": "spatial"}) == pytest.approx(both)


# --- whole models: the real architectures, small and random -------------------------------------

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . ? yes no cat dog red old fire engine".split()
CLS, YES, NO = (WORDS.index(word) for word in ("[CLS]", "yes", "no"))
TEXT = dict(vocab_size=15, hidden_size=32, num_attention_heads=2, intermediate_size=32)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(WORDS))
    return transformers.BertTokenizer(str(file))


@pytest.fixture(scope="module")
def gdino(tmp_path_factory, vocabulary):
    folder = tmp_path_factory.mktemp("gdino")
    torch.manual_seed(0)
    text = transformers.BertConfig(**TEXT, num_hidden_layers=1)
    sizes = dict(embed_dim=16, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4)
    stages = ["stage2", "stage3", "stage4"]
    swin = transformers.SwinConfig(**sizes, image_size=160, out_features=stages)
    ffn = dict(encoder_ffn_dim=32, decoder_ffn_dim=32)
    layers = dict(encoder_layers=1, decoder_layers=2, num_queries=20, d_model=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, text_config=text, **layers, **ffn, **heads
    )
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    size = {"shortest_edge": 160, "longest_edge": 200}
    pil.GroundingDinoImageProcessorPil(size=size).save_pretrained(folder)
    return GDino(checkpoint=folder)


@pytest.fixture(scope="module")
def git(tmp_path_factory, vocabulary):
    folder = tmp_path_factory.mktemp("git")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2)
    vision = dict(sizes, num_hidden_layers=1, image_size=32, patch_size=16)
    config = transformers.GitConfig(vision_config=vision, num_hidden_layers=2, **TEXT)
    transformers.GitForCausalLM(config).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return GIT(checkpoint=folder)


MANDELBROT = Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 20)
IMAGES = [Image.radial_gradient("L"), Image.linear_gradient("L"), MANDELBROT]


def scores_in(detections):
    return [score for score, _ in detections]


def test_all_tokens_of_a_noun_of_three_words_count(gdino, monkeypatch):
    monkeypatch.setattr(gdino, "threshold", -1.0)  # all is found: compare the scores themselves
    (found,) = gdino.detect([["old fire engine", "cat"]], IMAGES[:1])
    words = gdino.tokenizer("old fire engine . cat.", return_tensors="pt")
    pixels = gdino.processor(images=[IMAGES[0].convert("RGB")], return_tensors="pt")
    with torch.no_grad():
        p = gdino.model(**words, **pixels).logits.sigmoid()[0]  # (queries, tokens)
    engine, cat = p[:, 1:4].mean(1).tolist(), p[:, 5].tolist()
    assert scores_in(found["old fire engine"]) == pytest.approx(engine, abs=1e-6)
    assert scores_in(found["cat"]) == pytest.approx(cat, abs=1e-6)


def test_a_detection_does_not_depend_on_its_batch(gdino, monkeypatch):
    monkeypatch.setattr(gdino, "threshold", -1.0)
    phrases = [["cat"], ["dog", "old fire engine"], ["red cat", "dog"]]
    together = gdino.detect(phrases, IMAGES)
    for found, listed, image in zip(together, phrases, IMAGES):
        (alone,) = gdino.detect([listed], [image])
        assert list(found) == listed
        for phrase in listed:
            assert scores_in(found[phrase]) == pytest.approx(scores_in(alone[phrase]), abs=1e-5)


def test_prompts_that_cannot_be_checked_have_no_score(gdino, git):
    for reward in (gdino, git):
        scores = reward(["a cat", "love"], IMAGES[:2], [{"nouns": ["cat"]}, {}])
        assert scores[0].isfinite() and scores[1].isnan()


ODD = {
    "nouns is a list": {"nouns": "circle"},
    "attr_nouns is a list": {"attr_nouns": [3]},
    "obj1, obj2 and locality": {"nouns": ["cat"], "spatial_info": {"obj1": "cat"}},
    "obj1, obj2 and locality, texts": {
        "spatial_info": {"obj1": "cat", "obj2": "dog", "locality": None}
    },
    "locality 'inside' is none": {"spatial_info": {"obj1": "c", "obj2": "d", "locality": "inside"}},
    "obj_name and num": {"numeracy_info": [{"obj_name": "cat", "num": "two"}]},
    "not 'cat'": {"numeracy_info": "cat"},
    "tokens of nouns": {"nouns": [f"{x} {y}" for x in WORDS[5:] for y in WORDS[5:]]},
}


@pytest.mark.parametrize("reason", ODD)
def test_odd_fields_cost_one_score_and_are_counted(reason, gdino, git):
    rows = [{"nouns": ["cat"]}, ODD[reason]]
    for reward in (gdino, git) if "list" in reason else (gdino,):
        reward.failures.clear()
        scores = reward(["", ""], IMAGES[:2], rows)
        assert scores[0].isfinite() and scores[1].isnan()
        assert sum(reward.failures.values()) == 1 and reason in next(iter(reward.failures))


def test_a_number_may_be_written_as_a_text():
    found = {"dog": [(0.8, LEFT), (0.4, RIGHT)]}
    assert detection_score(found, {"numeracy_info": [{"obj_name": "dog", "num": "2"}]}) == 1


def test_a_score_does_not_depend_on_the_sizes_of_the_other_pictures(gdino, monkeypatch):
    monkeypatch.setattr(gdino, "threshold", 0.0)
    sizes = [(160, 160), (160, 200), (200, 160), (160, 160)]
    images = [MANDELBROT.resize(size) for size in sizes]
    rows = [{"numeracy_info": [{"obj_name": "cat", "num": n}]} for n in range(1, 5)]
    seen, detect = [], gdino.detect

    def listen(phrases, batch):
        seen.append({image.size for image in batch})
        return detect(phrases, batch)

    monkeypatch.setattr(gdino, "detect", listen)
    together = gdino([""] * 4, images, rows)
    assert all(len(batch) == 1 for batch in seen) and len(seen) == 3
    alone = [gdino([""], [image], [row]).item() for image, row in zip(images, rows)]
    assert together.tolist() == alone


def test_git_in_a_batch_equals_git_alone_and_the_generic_forward(git):
    questions = ["red cat?", "dog?", "old fire engine?"]
    together = git.prob_yes(questions, IMAGES)
    for i, question in enumerate(questions):
        alone = git.prob_yes([question], IMAGES[i : i + 1])[0].item()
        ids = torch.tensor([[CLS, *git.tokenizer.encode(question, add_special_tokens=False)]])
        pixels = git.processor([IMAGES[i].convert("RGB")], return_tensors="pt").pixel_values
        with torch.no_grad():  # as released: softmax over all tokens, then yes over yes and no
            p = git.model(pixel_values=pixels, input_ids=ids).logits[0, -1].softmax(-1)
        expected = (p[YES] / (p[YES] + p[NO])).item()
        assert together[i].item() == pytest.approx(alone, abs=1e-6)
        assert together[i].item() == pytest.approx(expected, abs=1e-6)


def test_git_asks_about_the_nouns_of_a_complex_prompt_that_names_a_place(git):
    place = {"obj1": "cat", "obj2": "dog", "locality": "on top of"}
    row = {"nouns": ["cat", "dog"], "spatial_info": place, "task_type": "complex"}
    expected = git.prob_yes(["cat?", "dog?"], [IMAGES[0]] * 2).mean()
    assert git([""], IMAGES[:1], [row]).item() == pytest.approx(expected.item())


def test_git_averages_the_attributes_and_gives_0_to_prompts_about_places(git):
    attributes = {"attr_nouns": ["red cat", "old dog"], "nouns": ["cat"]}
    places = {"nouns": ["cat"], "spatial_info": {"obj1": "cat"}}
    scores = git(["", ""], [IMAGES[0]] * 2, [attributes, places])
    expected = git.prob_yes(["red cat?", "old dog?"], [IMAGES[0]] * 2).mean()
    assert scores.tolist() == pytest.approx([expected.item(), 0.0])
