"""The reward that learns: what it compares, when it learns, and that it goes on where it was stopped."""

import json
import math
import random

import pytest
import torch

import adversarial_reward
import generate
import rewards
from tiny_world import world
from training.files import ROOT

PROMPTS = [
    "a red star",
    "two blue circles",
    "a green square above a purple cross",
    "a cyan triangle",
] * 4
CLEAN = [world.reference_picture(prompt, f"another {i}") for i, prompt in enumerate(PROMPTS)]


def broken(prompt, i):
    rng = random.Random(i)
    return world.to_image(
        world.corrupt(world.sample_scene(*world.parse_prompt(prompt), rng), "noise", 1, rng)
    )


BROKEN = [broken(prompt, i) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(params=["adversarial", "adversarial-pickscore"])
def adversary(request):
    return rewards.load(request.param, checkpoint="tiny", steps=8)


# --- learning


def test_a_few_lessons_teach_it_to_tell_references_from_what_the_policy_paints(adversary):
    for _ in range(6):
        metrics = adversary.learn(PROMPTS, BROKEN)
    assert metrics["accuracy"] > 0.85 and metrics["margin"] > 0
    assert (
        adversary(PROMPTS, CLEAN) > adversary(PROMPTS, BROKEN)
    ).float().mean() > 0.85  # unseen ones, too


def test_metrics_are_of_the_judge_that_had_not_seen_these_pictures():
    adversary = rewards.load("adversarial", checkpoint="tiny")
    before = adversary(PROMPTS, BROKEN).mean().item()
    assert adversary.learn(PROMPTS, BROKEN)["generated"] == pytest.approx(before, abs=1e-6)
    assert adversary(PROMPTS, BROKEN).mean().item() < before


def test_dino_stays_as_it_is_and_the_head_moves():
    adversary = rewards.load("adversarial", checkpoint="tiny")
    eyes, head = (
        [p.clone() for p in part.parameters()] for part in (adversary.dino, adversary.head)
    )
    adversary.learn(PROMPTS, BROKEN)
    assert all((a == b).all() for a, b in zip(eyes, adversary.dino.parameters()))
    assert any((a != b).any() for a, b in zip(head, adversary.head.parameters()))


def test_of_pickscore_only_the_last_two_layers_of_the_vision_tower_move():
    adversary = rewards.load("adversarial-pickscore", checkpoint="tiny")
    before = {name: p.clone() for name, p in adversary.scorer.model.named_parameters()}
    assert torch.equal(
        adversary(PROMPTS, BROKEN), rewards.load("pickscore", checkpoint="tiny")(PROMPTS, BROKEN)
    )
    adversary.learn(PROMPTS, BROKEN)
    moved = {
        name for name, p in adversary.scorer.model.named_parameters() if (p != before[name]).any()
    }
    assert moved and {
        name.split(".layers.")[0] + name.split(".layers.")[1][0] for name in moved
    } == {"vision_model.encoder1", "vision_model.encoder2"}  # of 0, 1, 2


def test_update_only_when_beaten_rests_while_the_references_win():
    adversary = rewards.load("adversarial", checkpoint="tiny", when="beaten", steps=3)
    assert adversary.learn(PROMPTS, BROKEN)["updates"] in (0, 3)
    for _ in range(30):
        metrics = adversary.learn(PROMPTS, BROKEN)
        assert metrics["updates"] == (3 if metrics["margin"] < 0 else 0)
    assert metrics["updates"] == 0


def test_hinge_asks_for_a_margin_of_one_and_for_no_more():
    adversary = rewards.load("adversarial", checkpoint="tiny")
    logits = lambda cls, patch: (None, torch.tensor([[cls, patch, patch]]))
    assert adversary.loss(logits(2.0, 1.0), logits(-3.0, -1.0)) == 0
    # class token: (relu(1 - 0) + relu(1 + 0)) / 2 = 1; patches: .3 (relu(1 - .5) + relu(1 + .5)) / 2 = .3
    assert adversary.loss(logits(0.0, 0.5), logits(0.0, 0.5)).item() == pytest.approx(1.3)


def test_the_score_weighs_the_class_token_and_all_patches():
    adversary = rewards.load("adversarial", checkpoint="tiny")
    logits = adversary.head(adversary.tokens(CLEAN[:2]))[..., 0]
    assert logits.shape == (2, 1 + 64)
    expected = 0.7 * logits[:, 0] + 0.3 * logits[:, 1:].mean(1)
    assert torch.allclose(adversary(PROMPTS[:2], CLEAN[:2]), expected, atol=1e-6)


def test_the_same_pictures_get_the_same_scores_alone_and_together(adversary):
    alone = torch.cat([adversary([p], [image]) for p, image in zip(PROMPTS[:3], CLEAN)])
    assert torch.allclose(alone, adversary(PROMPTS[:3], CLEAN[:3]), atol=1e-5)


# --- going on


def test_what_it_has_learned_survives_a_checkpoint(adversary, tmp_path):
    adversary.learn(PROMPTS, BROKEN)
    torch.save(adversary.state_dict(), tmp_path / "state.pt")
    again = type(adversary)(
        checkpoint=str(ROOT / "tiny_world/checkpoints" / adversary.tiny_folder), steps=8
    )
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.learn(PROMPTS, CLEAN) == adversary.learn(PROMPTS, CLEAN)
    assert torch.equal(again(PROMPTS, BROKEN), adversary(PROMPTS, BROKEN))


def test_it_remembers_the_last_rollouts_and_no_more(monkeypatch):
    monkeypatch.setattr(adversarial_reward, "REPLAY", 20)
    adversary = rewards.load("adversarial", checkpoint="tiny", steps=1)
    adversary.learn(PROMPTS, BROKEN)
    adversary.learn(PROMPTS, CLEAN)
    assert len(adversary.past) == 20
    assert [image.tobytes() for _, image in adversary.past[4:]] == [
        image.tobytes() for image in CLEAN
    ]


# --- references


def write_references(folder, prompts):
    for i, prompt in enumerate(prompts):
        world.reference_picture(prompt, i).save(folder / f"{i}.png")


def test_references_are_a_folder_of_generate_or_a_file_of_the_released_code(tmp_path):
    write_references(tmp_path, PROMPTS[:2])
    lines = [
        json.dumps({"prompt": prompt, "path": f"{i}.png"}) for i, prompt in enumerate(PROMPTS[:2])
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    (tmp_path / "released.json").write_text(
        json.dumps({p: [f"{i}.png"] for i, p in enumerate(PROMPTS[:2])})
    )
    for where in (tmp_path, tmp_path / "manifest.jsonl", tmp_path / "released.json"):
        references = adversarial_reward.References(where)
        references.check(PROMPTS[:2])
        picked = references.choose(PROMPTS[1], random.Random(0))
        assert picked.tobytes() == world.reference_picture(PROMPTS[1], 1).tobytes()


def damaged_references(folder, damaged):
    """Two references for each of two prompts; those named in `damaged` are cut in half."""
    listed = {prompt: [f"{i}a.png", f"{i}b.png"] for i, prompt in enumerate(PROMPTS[:2])}
    for prompt, names in listed.items():
        for name in names:
            world.reference_picture(prompt, name).save(folder / name)
            if name in damaged:
                data = (folder / name).read_bytes()
                (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "references.json").write_text(json.dumps(listed))
    return folder / "references.json"


def test_a_damaged_reference_is_named_once_and_another_takes_its_place(tmp_path, capsys):
    references = adversarial_reward.References(damaged_references(tmp_path, {"0a.png"}))
    whole = world.reference_picture(PROMPTS[0], "0b.png").tobytes()
    for seed in range(8):
        assert references.choose(PROMPTS[0], random.Random(seed)).tobytes() == whole
    (line,) = capsys.readouterr().err.splitlines()
    assert "0a.png" in line and "not a readable picture" in line
    again, rng = adversarial_reward.References(references.source), random.Random(0)
    warned = random.Random(0)
    assert again.choose(PROMPTS[0], rng).tobytes() == whole
    assert references.choose(PROMPTS[0], warned).tobytes() == whole
    assert rng.random() == warned.random()  # a resumed run draws the same numbers


def test_training_goes_on_without_the_prompts_whose_references_are_damaged(adversary, tmp_path):
    source = damaged_references(tmp_path, {"0a.png", "0b.png"})
    adversary.references = adversarial_reward.References(source)
    metrics = adversary.learn(PROMPTS[:2] * 2, BROKEN[:2] * 2)
    assert metrics["updates"] == 8 and math.isfinite(metrics["accuracy"])
    assert {prompt for prompt, _ in adversary.past} == {PROMPTS[1]}
    metrics = adversary.learn(PROMPTS[:1], BROKEN[:1])
    assert metrics["updates"] == 0 and math.isnan(metrics["accuracy"])
    assert adversary.calls == 2 and adversary(PROMPTS[:2], BROKEN[:2]).isfinite().all()


def test_what_is_wrong_with_references_is_said_before_the_first_step(tmp_path, capsys):
    write_references(tmp_path, PROMPTS[:1])
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "path": "0.png"}))
    with pytest.raises(SystemExit):
        adversarial_reward.References(tmp_path).check(PROMPTS[:2])
    assert "two blue circles" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        adversarial_reward.References(tmp_path / "nowhere")
    assert "generate.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # the tiny world can draw its own prompts only
        adversarial_reward.References().check(["a corgi reading a newspaper"])
    assert "--references" in capsys.readouterr().err


def test_without_references_the_published_checkpoint_is_refused(capsys):
    with pytest.raises(SystemExit):
        rewards.load("adversarial")
    assert "--references FOLDER" in capsys.readouterr().err


def test_references_come_from_any_pipeline_of_diffusers(tmp_path):
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tiny_world" / "checkpoints" / "hps")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokenizer.model_max_length = 24
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
    )
    StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        DDIMScheduler(clip_sample=False, steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\n")
    cfg = generate.Config(
        model=str(tmp_path / "sd"),
        prompts=str(tmp_path / "prompts.txt"),
        num_images=2,
        batch_size=3,
        output_dir=str(tmp_path / "out"),
        device="cpu",
    )
    generate.main(cfg)
    references = adversarial_reward.References(tmp_path / "out")
    references.check(["a red star", "two blue circles"])
    assert references.choose("a red star", random.Random(0)).size == (32, 32)
    painted = (tmp_path / "out/00001/samples/0001.png").read_bytes()
    generate.main(
        generate.Config(**{**vars(cfg), "batch_size": 1, "output_dir": str(tmp_path / "again")})
    )
    assert (tmp_path / "again/00001/samples/0001.png").read_bytes() == painted  # whatever its batch
