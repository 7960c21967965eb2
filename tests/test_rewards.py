"""Rewards: one convention, one scoring rule for the judge, and no made-up numbers."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import requests
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import artifact_reward
import generate
import grpo
import rewards
from reward_models import serving
from training import harness

NAN = math.nan


def test_every_reward_says_what_it_is():
    for kind in rewards.REWARDS.values():
        assert (
            len(kind.range) == 2
            and isinstance(kind.needs, tuple)
            and kind.reference
            and hasattr(kind, "checkpoint")
        )


def test_rewards_are_floats_one_per_picture_and_independent_of_the_batch(hps, artifact):
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "white", "blue")]
    prompts = ["a red square", "a red square", "a blue square"]
    for reward in (hps, artifact, rewards.load("gold")):
        together = reward(prompts, images, None)
        assert (
            together.dtype == torch.float32
            and together.shape == (3,)
            and together.device.type == "cpu"
        )
        assert torch.allclose(together[1:2], reward(prompts[1:2], images[1:2], None), atol=1e-5)


def test_parse_reads_names_and_weights():
    assert rewards.parse("hps,artifact:0.5") == {"hps": 1.0, "artifact": 0.5}


@pytest.mark.parametrize(
    "text, rule",
    [
        ("hsp", "unknown reward 'hsp'"),
        ("hps:heavy", "'heavy' is no number"),
        ("hps:nan", "is no number"),
        ("hps,hps:2", "named twice"),
    ],
)
def test_bad_rewards_are_one_clear_error(text, rule, capsys):
    with pytest.raises(SystemExit) as stop:
        rewards.parse(text)
    assert stop.value.code == 2 and rule in capsys.readouterr().err


def test_a_prompt_from_outside_the_tiny_world_has_no_gold_score():
    scores = rewards.load("gold")(["a red circle", "a corgi"], [Image.new("RGB", (32, 32))] * 2)
    assert scores[0] == 0 and scores[1].isnan()


# --- combining: groups of numbers to check by hand

A, B = torch.tensor([0.0, 1.0, 2.0, 1.0]), torch.tensor([0.3, 0.3, 0.1, 0.1])
SCORES, WEIGHTS = {"a": A, "b": B}, {"a": 1.0, "b": 2.0}


def test_sum_weighs_and_adds():
    assert torch.allclose(
        rewards.combine(SCORES, WEIGHTS, 4, "sum"), torch.tensor([0.6, 1.6, 2.2, 1.2])
    )


def test_normalized_forgets_scale():
    small = {"a": A, "b": B / 1000 * 1000}
    big = {"a": A * 50, "b": B}
    assert torch.allclose(
        rewards.combine(small, WEIGHTS, 4, "normalized"),
        rewards.combine(big, WEIGHTS, 4, "normalized"),
        atol=1e-2,
    )


def test_min_is_the_worst_opinion_and_mean_the_average():
    z = rewards.standardize(torch.stack([A, B], 1), 4)
    assert torch.allclose(z[:, 0], (A - 1) / (A.std() + 1e-4))
    assert torch.equal(rewards.combine(SCORES, WEIGHTS, 4, "min"), z.min(1).values)
    assert torch.equal(rewards.combine(SCORES, WEIGHTS, 4, "mean"), z.mean(1))
    assert torch.allclose(
        rewards.combine(SCORES, WEIGHTS, 4, "uwo"), z.mean(1) - 0.5 * ((z[:, 0] - z[:, 1]) / 2) ** 2
    )


def test_pareto_leaves_out_who_is_beaten_in_everything():
    # (0,.3) is beaten by (1,.3), (1,.1) by both (1,.3) and (2,.1); (1,.3) and (2,.1) by nobody.
    assert rewards.combine(SCORES, WEIGHTS, 4, "pareto").isnan().tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_the_multiplier_rises_below_the_floor_and_falls_above_it_never_below_zero():
    below = rewards.update_multipliers(
        {"b": 0.0}, {"b": torch.tensor([0.2, 0.4, NAN])}, {"b": 0.8}, rate=1.0
    )
    assert below["b"] == pytest.approx(0.5)
    assert (
        rewards.update_multipliers({"b": 0.1}, {"b": torch.ones(2)}, {"b": 0.5}, rate=1.0)["b"] == 0
    )
    total = rewards.combine(SCORES, WEIGHTS, 4, "constrained", {"b": 10.0})
    assert torch.allclose(total, A + 10 * B)


def test_a_failed_score_makes_the_total_nan_and_leaves_the_others_alone():
    broken = {"a": torch.tensor([0.0, NAN, 2.0, 1.0]), "b": B}
    for how in ("sum", "normalized", "mean", "min", "uwo"):
        assert rewards.combine(broken, WEIGHTS, 4, how).isnan().tolist() == [
            False,
            True,
            False,
            False,
        ]


def test_a_reward_of_the_wrong_length_stops_the_run():
    with pytest.raises(ValueError, match="2 scores|\\(2,\\) scores"):
        rewards.score({"x": lambda *_: torch.zeros(2)}, ["p"] * 3, [None] * 3)


def test_image_statistics_by_hand():
    black, red = (Image.new("RGB", (8, 8), color) for color in ((0, 0, 0), (255, 0, 0)))
    half = black.copy()
    half.paste((255, 255, 255), (4, 0, 8, 8))
    got = rewards.score(
        {name: rewards.load(name) for name in rewards.STATS}, ["p"] * 3, [black, red, half]
    )
    assert got["brightness"].tolist() == [0, 1, 0.5] and got["saturation"].tolist() == [0, 1, 0]
    assert got["edges"].tolist() == [
        0,
        0,
        pytest.approx((1 / 7 + 0) / 2),
    ]  # one step in seven, across; none down
    assert got["entropy"].tolist() == [
        0,
        0,
        pytest.approx(1 / 6),
    ]  # one bit of the six that 64 boxes can have


def test_stats_names_all_four_and_none_of_them_trains(capsys):
    assert tuple(rewards.parse("hps,stats")) == ("hps", *rewards.STATS)
    with pytest.raises(SystemExit):
        harness.check(grpo.Config(rewards="hps,edges"), 1)
    assert "can only be watched" in capsys.readouterr().err


# --- rewards on a CLIP, against transformers' own forward pass


@pytest.fixture(scope="module")
def clip(tmp_path_factory, hps):
    """A small random CLIP in the Hugging Face format, with the vocabulary of this world."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = hps.model.config
    config.vision_config.hidden_act = config.text_config.hidden_act = "quick_gelu"
    CLIPModel(config).save_pretrained(folder)
    hps.tokenizer.save_pretrained(folder)
    return folder


PHOTOS = [
    Image.effect_mandelbrot((90, 60), (-2, -1.5, 1, 1.5), 40),
    Image.radial_gradient("L"),
    Image.linear_gradient("L"),
]
ASKED = ["a red circle", "two blue stars", "a red circle"]


def theirs(folder):
    """logits_per_image and unit embeddings by CLIPModel.forward and CLIP's own image processor."""
    model, processor = (
        CLIPModel.from_pretrained(folder),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    pixels = processor([image.convert("RGB") for image in PHOTOS], return_tensors="pt").pixel_values
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    words = tokenizer(ASKED, padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=pixels, **words)


def test_pickscore_is_clips_own_score(clip):
    ours = rewards.load("pickscore", checkpoint=clip)(ASKED, PHOTOS)
    assert torch.allclose(ours, theirs(clip).logits_per_image.diagonal(), atol=1e-4)


def test_aesthetic_is_linear_on_the_unit_embedding(clip):
    head = torch.nn.Linear(64, 1)
    torch.save(head.state_dict(), clip / "sa_0_4_vit_l_14_linear.pth")
    ours = rewards.load("aesthetic", checkpoint=clip)(ASKED, PHOTOS)
    assert torch.allclose(ours, head(theirs(clip).image_embeds)[:, 0].detach(), atol=1e-5)


def test_a_missing_head_is_named_with_the_command_that_fetches_it(capsys):
    with pytest.raises(SystemExit) as stop:
        rewards.load("aesthetic")
    assert stop.value.code == 2 and "curl -LO" in capsys.readouterr().err


def test_a_group_reads_its_prompt_once(hps, monkeypatch):
    read = []
    text = hps.model.get_text_features
    monkeypatch.setattr(
        hps.model,
        "get_text_features",
        lambda **words: read.append(len(words["input_ids"])) or text(**words),
    )
    hps(["a red star"] * 8, [Image.new("RGB", (32, 32))] * 8)
    assert read == [1]


def test_noise_compresses_badly_and_emptiness_well():
    flat, noisy = rewards.load("jpeg")(
        ["", ""], [Image.new("RGB", (64, 64)), Image.effect_noise((64, 64), 90)]
    )
    assert -1 < flat < 0 and noisy < 2 * flat


# --- rewards that live elsewhere


@pytest.fixture
def served(hps):
    server = rewards.serve("hps", hps, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_reward_elsewhere_gives_the_same_numbers(hps, served):
    remote = rewards.load("hps", url=served)
    assert remote.range == hps.range and remote.remote
    assert torch.equal(remote(ASKED, PHOTOS), hps(ASKED, PHOTOS))


def test_a_server_that_dies_gives_nan_and_its_reason(served, monkeypatch):
    remote = rewards.load("hps", url=served)
    monkeypatch.setattr(serving.time, "sleep", lambda _: None)
    remote.url = "http://127.0.0.1:9"
    assert remote(ASKED, PHOTOS).isnan().all() and "ConnectionError" in next(iter(remote.failures))


def test_bad_requests_are_refused_and_the_server_lives_on(served):
    assert requests.post(f"{served}/score", data=b"{").status_code == 400
    assert (
        requests.post(
            f"{served}/score", json={"prompts": ["x"], "images": [], "metadata": []}
        ).status_code
        == 400
    )
    assert requests.get(f"{served}/about").json()["name"] == "hps"


def test_another_reward_at_the_address_is_refused(served, capsys):
    with pytest.raises(SystemExit):
        rewards.load("pickscore", url=served)
    assert "'hps' is served there" in capsys.readouterr().err


def test_nobody_at_the_address_is_said_at_once(capsys):
    with pytest.raises(SystemExit):
        rewards.load("hps", url="http://127.0.0.1:9")
    assert "rewards.py serve hps --port 9" in capsys.readouterr().err


def test_deqa_lives_in_an_environment_of_its_own(tmp_path, capsys):
    with pytest.raises(SystemExit):
        rewards.load("deqa")
    assert "reward_models/deqa_server.py" in capsys.readouterr().err
    # Its server, with a stand-in for the package of that environment: what is tested is the way there and back.
    (tmp_path / "src").mkdir()
    (tmp_path / "src/__init__.py").write_text(
        "import torch\nclass Scorer:\n    def __init__(self, pretrained, device): pass\n"
        "    def __call__(self, images): return torch.tensor([image.width / 8 for image in images]).half()\n"
    )
    server = subprocess.Popen(
        [sys.executable, "reward_models/deqa_server.py", "--port", "0"],
        cwd=rewards.HERE,
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    try:
        url = re.search(r"http://[\d.:]+", server.stdout.readline())[0]
        images = [
            Image.new("RGB", (8 * (i % 5 + 1), 8)) for i in range(19)
        ]  # more than two batches
        assert rewards.load("deqa", url=url)(["p"] * 19, images).tolist() == [
            i % 5 + 1 for i in range(19)
        ]
    finally:
        server.kill()


def test_addresses_and_weights_do_not_get_mixed_up():
    text = "hps@http://127.0.0.1:8100:0.5,artifact:2"
    assert rewards.parse(text) == {"hps": 0.5, "artifact": 2.0}
    assert rewards.addresses(text) == {"hps": "http://127.0.0.1:8100"}


# --- the tiny rewards: a preference model's blind spot, and a judge that looks


def pairs(split="test"):
    folder = generate.HERE / "tiny_world/pairs"
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return (
        [r["prompt"] for r in rows],
        [Image.open(folder / r["clean"]) for r in rows],
        [Image.open(folder / r["broken"]) for r in rows],
    )


def accuracy(reward, prompts, clean, broken):
    a, b = reward(prompts, clean), reward(prompts, broken)
    return ((a > b).float() + (a == b).float() / 2).mean().item()


def test_hps_is_nearly_blind_to_artifacts_and_the_judge_is_not(hps, artifact):
    """The paper's Table 2 in small: .53 and .80 there."""
    assert 0.35 < accuracy(hps, *pairs()) < 0.65
    assert accuracy(artifact, *pairs()) > 0.8


def test_the_judge_answers_the_question_it_is_asked(artifact):
    import random

    from tiny_world import world as tiny

    rng = random.Random(0)
    scenes = [tiny.sample_scene([("circle", None), ("square", None)], None, rng) for _ in range(48)]
    noisy = [tiny.to_image(tiny.corrupt(scene, "noise", 0.8, rng)) for scene in scenes]
    about_noise = torch.tensor(
        artifact_reward.ask(
            artifact.judge, "Do you see noise in this picture? Answer yes or no.", noisy
        )
    )
    about_stains = torch.tensor(
        artifact_reward.ask(
            artifact.judge, "Do you see stains in this picture? Answer yes or no.", noisy
        )
    )
    assert about_noise.mean() < 0.3 < 0.7 < about_stains.mean()


def test_pair_prompts_of_test_and_train_are_disjoint():
    assert not set(pairs("train")[0]) & set(pairs("test")[0]) and not set(pairs("train")[0]) & set(
        pairs("validation")[0]
    )


# --- against what the originals computed, recorded with a note of what made it

DATA = rewards.HERE / "tests" / "data"


def largest_difference(reward, recorded, scores):
    images = [
        Image.open(rewards.HERE / name).convert("RGB").resize(recorded["resized to"], Image.LANCZOS)
        for name in recorded["pictures"]
    ]
    return max(
        (reward([prompt] * len(images), images) - torch.tensor(expected)).abs().max().item()
        for prompt, expected in scores.items()
    )


def test_imagereward_computes_what_the_original_computed():
    recorded = json.loads((DATA / "imagereward/expected.json").read_text())
    reward = rewards.load("imagereward", checkpoint=DATA / "imagereward")
    assert largest_difference(reward, recorded, recorded["scores"]) < 1e-5
    spread = torch.tensor(list(recorded["scores"].values()))
    assert spread.std() > 1e-2  # random weights, but not indifferent ones


@pytest.fixture(scope="module")
def original(tmp_path_factory, hps):
    """open_clip's checkpoint as each reward wants it: HPS in open_clip's format, the others in Hugging Face's."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("hps", "pickscore", "aesthetic")}
    for name, folder in folders.items():
        hps.tokenizer.save_pretrained(folder)
        act = "quick_gelu" if name == "aesthetic" else "gelu"  # OpenAI's CLIPs have the former
        config = CLIPConfig(
            text_config=dict(
                vocab_size=len(hps.tokenizer),
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=24,
                hidden_act=act,
                eos_token_id=hps.tokenizer.eos_token_id,
            ),
            vision_config=dict(
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                hidden_act=act,
            ),
            projection_dim=32,
        )
        state = torch.load(DATA / "open_clip/HPS_v2.1_compressed.pt", weights_only=True)[
            "state_dict"
        ]
        model = CLIPModel(config)
        model.load_state_dict(
            rewards.from_open_clip(state)
        )  # strict: every key is used, every weight filled
        model.save_pretrained(folder)
        for file in ("HPS_v2.1_compressed.pt", "sa_0_4_vit_l_14_linear.pth"):
            shutil.copy(DATA / "open_clip" / file, folder)
    return folders


@pytest.mark.parametrize("name", ["hps", "pickscore", "aesthetic"])
def test_rewards_on_a_clip_compute_what_open_clip_computed(name, original):
    recorded = json.loads((DATA / "open_clip/expected.json").read_text())
    reward, expected = rewards.load(name, checkpoint=original[name]), recorded["scores"][name]
    scores = dict(zip(recorded["prompts"], expected if name != "aesthetic" else [expected] * 3))
    assert largest_difference(reward, recorded, scores) < (1e-4 if name == "pickscore" else 1e-5)
    assert torch.tensor(expected).std() > 1e-2


def test_a_reward_that_learns_cannot_score_before_it_has_learned(capsys):
    with pytest.raises(SystemExit):
        rewards.main(
            rewards.Config("score", "adversarial", ("tiny_world/pairs/test/0000_clean.png",))
        )
    assert "beside a policy" in capsys.readouterr().err
