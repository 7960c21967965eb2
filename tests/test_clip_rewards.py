"""Rewards on a CLIP, ImageReward, rewards without a model."""

import shutil

import pytest
import torch
from PIL import Image
from recorded import DATA, recorded, scores_of
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward_models import hub
from reward_models.clip import HPS, Aesthetic, PickScore, from_open_clip
from reward_models.image_statistics import Jpeg, image_statistics
from reward_models.imagereward import ImageReward

PHOTOS = [
    Image.effect_mandelbrot((90, 60), (-2, -1.5, 1, 1.5), 40),
    Image.radial_gradient("L"),
    Image.linear_gradient("L"),
]
PROMPTS = ["a red circle", "two blue stars", "a red circle"]

# --- without a model ----------------------------------------------------------------------------


def test_image_statistics_by_hand():
    black, red = (Image.new("RGB", (8, 8), color) for color in ("black", "red"))
    half = black.copy()
    half.paste((255, 255, 255), (4, 0, 8, 8))
    got = image_statistics([black, red, half])
    assert got["image/brightness"].tolist() == [0, 1, 0.5]
    assert got["image/saturation"].tolist() == [0, 1, 0]
    one_step_of_seven = (1 / 7 + 0) / 2  # across; none down
    assert got["image/edges"].tolist() == [0, 0, pytest.approx(one_step_of_seven)]
    one_bit_of_six = 1 / 6  # 64 bins could have six bits
    assert got["image/entropy"].tolist() == [0, 0, pytest.approx(one_bit_of_six)]


def test_the_jpeg_of_noise_is_large_and_that_of_an_empty_picture_is_small():
    images = [Image.new("RGB", (64, 64)), Image.effect_noise((64, 64), 90)]
    flat, noisy = Jpeg()(["", ""], images)
    assert -1 < flat < 0 and noisy < 2 * flat


# --- on a CLIP, compared with transformers' own forward pass ------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory, hps):
    """A small random CLIP in transformers' format, with the vocabulary of the tiny world."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = hps.model.config
    config.vision_config.hidden_act = config.text_config.hidden_act = "quick_gelu"
    CLIPModel(config).save_pretrained(folder)
    hps.tokenizer.save_pretrained(folder)
    return folder


def clip_forward(folder):
    """Output of CLIPModel.forward on pictures from CLIP's own image processor."""
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = [image.convert("RGB") for image in PHOTOS]
    pixels = CLIPImageProcessorPil(**sizes)(images, return_tensors="pt").pixel_values
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    words = tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder)(pixel_values=pixels, **words)


def test_pickscore_is_the_score_of_clip_itself(clip):
    ours = PickScore(checkpoint=clip)(PROMPTS, PHOTOS)
    assert torch.allclose(ours, clip_forward(clip).logits_per_image.diagonal(), atol=1e-4)


def test_aesthetic_is_linear_in_the_unit_embedding(clip):
    head = torch.nn.Linear(64, 1)
    torch.save(head.state_dict(), clip / Aesthetic.file)
    ours = Aesthetic(checkpoint=clip)(PROMPTS, PHOTOS)
    expected = head(clip_forward(clip).image_embeds)[:, 0].detach()
    assert torch.allclose(ours, expected, atol=1e-5)


def test_a_missing_head_is_named_with_the_command_that_downloads_it(capsys):
    with pytest.raises(SystemExit) as stop:
        Aesthetic()
    assert stop.value.code == 2 and "curl -LO" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_downloaded_is_one_clear_error(monkeypatch, capsys):
    def no_network(*_):
        raise ConnectionError

    monkeypatch.setattr(hub, "hf_hub_download", no_network)
    with pytest.raises(SystemExit) as stop:
        HPS()
    assert stop.value.code == 2
    assert f"hf download xswu/HPSv2 {HPS.file}" in capsys.readouterr().err


def test_the_prompt_of_a_group_is_encoded_once(hps, monkeypatch):
    encoded, encode = [], hps.model.get_text_features

    def count(**words):
        encoded.append(len(words["input_ids"]))
        return encode(**words)

    monkeypatch.setattr(hps.model, "get_text_features", count)
    hps(["a red star"] * 8, [Image.new("RGB", (32, 32))] * 8)
    assert encoded == [1]


# --- compared with what the originals computed --------------------------------------------------


def test_imagereward_computes_what_the_original_computed():
    known, images = recorded("imagereward")
    reward = ImageReward(checkpoint=DATA / "imagereward")
    ours, expected = scores_of(reward, known["scores"], images)
    assert (ours - expected).abs().max() < 1e-5
    assert expected.std() > 1e-2  # random weights, but they tell pictures apart


SIZES = dict(num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(SIZES, hidden_size=32, intermediate_size=128, max_position_embeddings=24)
VISION = dict(SIZES, hidden_size=64, intermediate_size=256, image_size=32, patch_size=8)


def original_clip(kind, folder):
    """open_clip's recorded checkpoint in the format that this reward reads."""
    tokenizer = CLIPTokenizer.from_pretrained(DATA / "open_clip")
    tokenizer.save_pretrained(folder)
    act = "quick_gelu" if kind is Aesthetic else "gelu"  # OpenAI's CLIPs have the former
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    text, vision = dict(TEXT, **ids, hidden_act=act), dict(VISION, hidden_act=act)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    state = torch.load(DATA / "open_clip" / HPS.file, weights_only=True)["state_dict"]
    model.load_state_dict(from_open_clip(state))  # strict: all names are used, all weights filled
    model.save_pretrained(folder)
    for file in (HPS.file, Aesthetic.file):
        shutil.copy(DATA / "open_clip" / file, folder)
    return folder


CLIPS = {"hps": HPS, "pickscore": PickScore, "aesthetic": Aesthetic}


@pytest.mark.parametrize("name", CLIPS)
def test_rewards_on_a_clip_compute_what_open_clip_computed(name, tmp_path):
    known, images = recorded("open_clip")
    reward = CLIPS[name](checkpoint=original_clip(CLIPS[name], tmp_path))
    expected = known["scores"][name]
    if name == "aesthetic":  # the same for every prompt
        expected = [expected] * len(known["prompts"])
    ours, expected = scores_of(reward, dict(zip(known["prompts"], expected)), images)
    assert (ours - expected).abs().max() < (1e-4 if name == "pickscore" else 1e-5)
    assert expected.std() > 1e-2
