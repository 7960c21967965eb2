"""The large judges, each against what its original computed on small random weights: numbers in tests/data, with a
note of what made them; none of the originals' code is needed, or here."""

import json

import pytest
import torch
from PIL import Image

import rewards
from reward_models import maniqa

DATA = rewards.HERE / "tests" / "data"


def recorded(name):
    """(what was recorded, the pictures as the original saw them)"""
    known = json.loads((DATA / name / "expected.json").read_text())
    images = [
        Image.open(rewards.HERE / path).convert("RGB").resize(known["resized to"], Image.LANCZOS)
        for path in known["pictures"]
    ]
    return known, images


# --- MANIQA


@pytest.fixture(scope="module")
def small_maniqa():
    return rewards.load("maniqa", checkpoint=DATA / "maniqa", vit_heads=4)


def test_maniqa_computes_what_the_original_computed(small_maniqa):
    known, images = recorded("maniqa")
    expected = torch.tensor(known["scores"])
    assert (small_maniqa([""] * len(images), images) - expected).abs().max() < 5e-5
    assert expected.std() > 1e-2
    per_crop = small_maniqa.model(small_maniqa.crops(images[0]))
    assert (per_crop - torch.tensor(known["per crop"])).abs().max() < 5e-5


def test_maniqa_of_full_size_has_the_names_and_shapes_of_the_published_checkpoint():
    listed = dict(
        line.split("\t") for line in (DATA / "maniqa" / "names.txt").read_text().splitlines()
    )
    with torch.device("meta"):
        state = maniqa.MANIQA().state_dict()
    assert {name: str(list(value.shape)) for name, value in state.items()} == listed


def test_crops_go_from_edge_to_edge_and_a_small_picture_is_enlarged(small_maniqa):
    assert maniqa.corners(80, 64, 3) == [0, 8, 16] and maniqa.corners(64, 64, 3) == [0]
    assert len(small_maniqa.crops(Image.new("RGB", (32, 40)))) == 3  # 64 x 80: one column of crops
    assert small_maniqa([""], [Image.new("RGB", (32, 40))]).isfinite().all()


def test_a_missing_maniqa_is_named_with_the_command_that_fetches_it(capsys, tmp_path):
    with pytest.raises(SystemExit):
        rewards.load("maniqa", checkpoint=tmp_path)
    assert "curl -LO" in capsys.readouterr().err


# --- ORM and UnifiedReward, in LLaVA's format


@pytest.fixture(scope="module")
def orm():
    reward = rewards.load("orm", checkpoint=DATA / "orm")
    reward.question = recorded("orm")[0]["question template"]
    return reward


def test_orm_computes_what_the_original_computed(orm):
    known, images = recorded("orm")
    for prompt, expected in known["scores"].items():
        expected = torch.tensor(expected)
        assert (
            orm([prompt] * len(images), images) - expected
        ).abs().max() < 1e-5 and expected.std() > 1e-2


def test_questions_of_different_lengths_do_not_disturb_each_other(orm):
    known, images = recorded("orm")
    prompts = [*known["scores"]]
    together = orm(prompts * 2, images[:6])
    alone = torch.cat([orm([prompt], [image]) for prompt, image in zip(prompts * 2, images)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_prompt_that_says_image_is_no_second_picture(orm):
    _, images = recorded("orm")
    assert orm(["a <image> of a star"], images[:1]).isfinite().all()


def test_unified_in_llavas_format_writes_and_what_is_no_score_is_no_number(monkeypatch):
    _, images = recorded("orm")
    reward = rewards.load("unified", checkpoint=DATA / "orm")
    reward.longest = 4
    assert reward(["a star"] * 2, images[:2]).isnan().all()  # random weights write nonsense
    texts = iter(["Final Score: 4", "no idea", "Final Score: 9"])
    monkeypatch.setattr(reward.here, "write", lambda asked, *_: [next(texts) for _ in asked])
    scores = reward(["a star"] * 3, images[:3])
    assert (
        scores[0] == 4 and scores[1:].isnan().all()
    )  # no score, and one out of range, are no numbers
    assert reward.question.replace("{}", "x") != reward.question


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        rewards.load("orm", checkpoint=generate_tokenizer(tmp_path))
    assert "no *.safetensors" in capsys.readouterr().err


def generate_tokenizer(folder):
    for file in (DATA / "orm").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


# --- VQAScore


@pytest.fixture(scope="module")
def vqascore():
    reward = rewards.load("vqascore", checkpoint=DATA / "vqascore", vision_heads=4)
    reward.question = recorded("vqascore")[0]["question template"]
    return reward


def test_vqascore_computes_what_the_original_computed(vqascore):
    known, images = recorded("vqascore")
    for prompt, expected in known[
        "scores"
    ].items():  # of the order of .003, so the difference is relative
        expected = torch.tensor(expected)
        assert (vqascore([prompt] * len(images), images) / expected - 1).abs().max() < 1e-4
        assert expected.std() / expected.mean() > 1e-2


def test_vqascore_of_a_batch_is_that_of_each_alone(vqascore):
    known, images = recorded("vqascore")
    prompts = [*known["scores"]]
    alone = torch.cat([vqascore([prompt], [image]) for prompt, image in zip(prompts, images)])
    assert torch.allclose(vqascore(prompts, images[:3]) / alone, torch.ones(3), atol=1e-4)


def test_the_head_of_t5_is_not_its_embedding(vqascore):
    assert not torch.equal(vqascore.t5.lm_head.weight, vqascore.t5.shared.weight)


# --- full size, on the meta device: the architectures have the published numbers of parameters


def parameters(kind, config):
    with torch.device("meta"):
        return sum(p.numel() for p in kind(config).parameters())


def test_architectures_of_full_size_have_the_published_numbers_of_parameters():
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    clip_h = CLIPConfig(
        text_config=dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            projection_dim=1024,
            hidden_act="gelu",
        ),
        vision_config=dict(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            patch_size=14,
            image_size=224,
            projection_dim=1024,
            hidden_act="gelu",
        ),
        projection_dim=1024,
    )
    assert parameters(CLIPModel, clip_h) == 986_109_441  # HPS v2.1, PickScore
    orm = LlavaOnevisionConfig(
        text_config=dict(
            model_type="qwen2",
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=1152,
            intermediate_size=4304,
            patch_size=14,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=384,
            vision_use_head=False,
        ),
        tie_word_embeddings=False,
    )
    assert parameters(LlavaOnevisionForConditionalGeneration, orm) == pytest.approx(
        8.030e9, rel=1e-3
    )
    for width, hidden, heads, expected in (
        (2048, 5120, 32, 2.850e9),
        (4096, 10240, 64, 11.135e9),
    ):  # flan-t5-xl, -xxl
        t5 = T5Config(
            d_model=width,
            d_ff=hidden,
            num_heads=heads,
            d_kv=64,
            num_layers=24,
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
        # Built, its head and its embedding are one matrix; loaded, they are two.
        assert parameters(T5ForConditionalGeneration, t5) + 32128 * width == pytest.approx(
            expected, rel=1e-3
        )
    base = Dinov2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=14, image_size=518
    )
    assert parameters(Dinov2Model, base) == pytest.approx(86.58e6, rel=1e-3)
    with torch.device("meta"):
        assert sum(p.numel() for p in maniqa.MANIQA().parameters()) == 135_747_530
