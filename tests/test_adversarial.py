"""The reward that learns: what it compares, when it learns, and what a checkpoint keeps."""

import copy
import json
import math
import random
import types

import diffusers
import pytest
import torch
from conftest import picture, tensor

import adversarial_reward
import generate
import rewards
from tiny_world import world
from training import pipelines
from training.files import ROOT

PROMPTS = ["a red star", "two blue circles", "a green square above a purple cross"]
PROMPTS = [*PROMPTS, "a cyan triangle"] * 4
CLEAN = [world.reference_picture(prompt, f"another {i}") for i, prompt in enumerate(PROMPTS)]


def corrupted_picture(prompt, i):
    rng = random.Random(i)
    scene = world.sample_scene(*world.parse_prompt(prompt), rng)
    return world.to_image(world.corrupt(scene, "noise", 1, rng))


BROKEN = [corrupted_picture(prompt, i) for i, prompt in enumerate(PROMPTS)]
KINDS = ["adversarial", "adversarial-pickscore"]


def make(kind="adversarial", **options):
    return rewards.load(kind, checkpoint="tiny", **options)


# --- what it is made of -------------------------------------------------------------------------


def test_the_head_is_trained_by_adam_with_a_short_memory_and_dino_is_frozen():
    adversary = make()
    kinds = [type(layer) for layer in adversary.head]
    assert kinds == [torch.nn.Linear, torch.nn.GELU, torch.nn.Linear]
    width = adversary.dino.config.hidden_size
    shapes = [tuple(p.shape) for p in adversary.parameters()]
    assert shapes == [(512, width), (512,), (1, 512), (1,)]
    (group,) = adversary.optimizer.param_groups
    assert type(adversary.optimizer) is torch.optim.Adam and group["weight_decay"] == 0
    assert (group["lr"], group["betas"]) == (1e-3, (0.5, 0.999))
    assert list(map(id, group["params"])) == list(map(id, adversary.head.parameters()))
    assert not adversary.dino.training
    assert not any(p.requires_grad for p in adversary.dino.parameters())
    assert str(adversary.device) == "cpu"


def test_the_first_weights_are_the_same_on_all_processes_and_depend_on_the_seed():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(torch.rand(1), expected)  # no one else's random numbers change
    weights = [adversary.head[0].weight for adversary in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_last_two_vision_layers_of_pickscore_are_trained(monkeypatch):
    adversary = make("adversarial-pickscore")
    vision = adversary.scorer.model.vision_model.encoder.layers
    assert len(vision) == 3
    expected = [id(p) for layer in vision[1:] for p in layer.parameters()]
    assert list(map(id, adversary.parameters())) == expected
    (group,) = adversary.optimizer.param_groups
    assert type(adversary.optimizer) is torch.optim.Adam and group["lr"] == 1e-4
    assert list(map(id, group["params"])) == expected
    # The published model learns more slowly.
    kind = adversarial_reward.AdversarialPickScore
    folder = str(ROOT / "tiny_world/checkpoints/pickscore")
    monkeypatch.setattr(kind, "checkpoint", folder)
    assert kind(checkpoint=folder).optimizer.param_groups[0]["lr"] == 5e-6


def test_pickscore_begins_as_the_reward_of_that_name():
    pickscore = make("pickscore")
    expected = pickscore(PROMPTS, BROKEN)
    assert torch.equal(make("adversarial-pickscore")(PROMPTS, BROKEN), expected)


# --- scores and losses --------------------------------------------------------------------------


def test_the_features_are_dinos_tokens_of_the_normalized_square_picture():
    adversary, image = make(), CLEAN[0].crop((0, 0, 32, 20)).convert("RGBA")
    side = adversary.dino.config.image_size
    square = image.convert("RGB").resize((side, side), 3)  # 3: bicubic
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    pixels = torch.empty(1, 3, side, side)
    for x in range(side):
        for y in range(side):
            for channel, value in enumerate(square.getpixel((x, y))):
                pixels[0, channel, y, x] = (value / 255 - mean[channel]) / std[channel]
    with torch.no_grad():
        expected = adversary.dino(pixels).last_hidden_state
    got = adversary.tokens([CLEAN[1], image])
    assert torch.allclose(got[1:], expected, atol=1e-4)
    assert got.shape == (2, 65, adversary.dino.config.hidden_size)
    assert got.dtype == torch.float32 and not got.requires_grad


def test_the_score_weighs_the_class_token_and_all_patches():
    adversary = make()
    logits = adversary.head(adversary.tokens(CLEAN[:2]))[..., 0]
    expected = [0.7 * row[0] + 0.3 * sum(row[1:]) / 64 for row in logits.tolist()]
    scores, returned = adversary.discriminate(PROMPTS[:2], CLEAN[:2])
    assert adversary(PROMPTS[:2], CLEAN[:2]).tolist() == pytest.approx(expected, abs=1e-6)
    assert scores.tolist() == pytest.approx(expected, abs=1e-6) and torch.equal(returned, logits)


def test_hinge_asks_for_a_margin_of_one_and_for_no_more():
    adversary = make()
    logits = lambda cls, *patches: (None, tensor([cls, *patches]))
    assert adversary.loss(logits(2.0, 1.0, 1.0), logits(-3.0, -1.0, -1.0)) == 0
    # class token: (relu(1 - .5) + relu(1 - 2)) / 2 = .25
    # patches: (relu(1 - 0) + relu(1 - 2)) / 2 = .5; (relu(1 + 1) + relu(1 + 2)) / 2 = 2.5
    loss = adversary.loss(logits(0.5, 0.0, 2.0), logits(-2.0, 1.0, 2.0))
    assert loss.item() == pytest.approx(0.25 + 0.3 * (0.5 + 2.5) / 2)


def test_the_loss_is_a_mean_over_pictures():
    adversary = make()
    real = (None, tensor([0.0, 1.0], [1.0, 1.0]))  # 1 and 0 of a class token, 0 of the patches
    fake = (None, tensor([0.0, -1.0], [-1.0, 0.0]))  # 1 and 0; 0 and 1
    loss = adversary.loss(real, fake).item()
    assert loss == pytest.approx((0.5 + 0.5) / 2 + 0.3 * 0.5 / 2)


def test_the_reference_is_to_win_by_the_bradley_terry_model():
    loss = make("adversarial-pickscore").loss((tensor(3.0, 1.0), None), (tensor(1.0, 2.0), None))
    expected = -(math.log(1 / (1 + math.exp(-2))) + math.log(1 / (1 + math.exp(1)))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_pictures_are_scored_sixty_four_at_a_time(monkeypatch):
    adversary, calls = make(), []

    def discriminate(prompts, images):
        calls.append((prompts, images))
        assert not torch.is_grad_enabled()
        return tensor(*map(float, images)), None

    monkeypatch.setattr(adversary, "discriminate", discriminate)
    prompts, images = [str(n) for n in range(65)], list(range(65))
    assert adversary(prompts, images, metadata=None).tolist() == images
    assert calls == [(prompts[:64], images[:64]), (prompts[64:], images[64:])]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pictures_get_the_same_scores_alone_and_together(kind):
    adversary = make(kind)
    alone = torch.cat([adversary([p], [image]) for p, image in zip(PROMPTS[:3], CLEAN)])
    assert torch.allclose(alone, adversary(PROMPTS[:3], CLEAN[:3]), atol=1e-5)


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_to_tell_references_from_pictures_of_the_policy(kind):
    adversary = make(kind, steps=8)
    for _ in range(4):
        metrics = adversary.learn(PROMPTS, BROKEN)
    assert metrics["accuracy"] > 0.85 and metrics["margin"] > 0
    wins = adversary(PROMPTS, CLEAN) > adversary(PROMPTS, BROKEN)
    assert wins.float().mean() > 0.85  # on references that it has not seen, too


def test_metrics_are_of_the_discriminator_that_had_not_seen_these_pictures():
    adversary = make()
    before = adversary(PROMPTS, BROKEN).mean().item()
    assert adversary.learn(PROMPTS, BROKEN)["generated"] == pytest.approx(before, abs=1e-6)
    assert adversary(PROMPTS, BROKEN).mean().item() < before


class Scripted(adversarial_reward.Adversarial):
    """An adversary whose pictures are numbers, and whose score of a picture is that number. It
    notes the batches it learns from. A reference is drawn as "reference of PROMPT"."""

    def __init__(self, real=0.0, **options):
        self.real, self.batches, self.losses = real, [], []
        super().__init__(checkpoint="scripted", **options)
        self.references = types.SimpleNamespace(choose=self.choose)

    def build(self, folder):
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)

    def parameters(self):
        return [self.weight]

    def choose(self, prompt, rng):
        rng.random()  # as a choice does
        return f"reference of {prompt}"

    def discriminate(self, prompts, images):
        assert all(p in i for p, i in zip(prompts, images) if isinstance(i, str))
        if torch.is_grad_enabled():
            self.batches.append((list(prompts), list(images)))
        scores = [self.real if isinstance(image, str) else image for image in images]
        return tensor(*map(float, scores)) + self.weight, images

    def loss(self, real, fake):
        self.losses.append((real[1], fake[1]))
        return fake[0].mean()  # its gradient is 1 at any weight


def test_the_metrics_compare_each_picture_with_the_reference_of_its_prompt():
    metrics = Scripted(real=2.0, steps=0).learn(["a", "b", "c", "d"], [1, 3, 2, 0])
    # 2 > 1 and 2 > 0, but not 2 > 3 and not 2 > 2; (1 - 1 + 0 + 2) / 4 = .5
    expected = {"accuracy": 0.5, "margin": 0.5, "reference": 2.0, "generated": 1.5, "updates": 0}
    assert metrics == expected


def test_each_update_sees_thirty_two_pictures_and_the_references_of_their_prompts():
    adversary = Scripted(steps=3)
    assert adversary.learn(["a", "b"], [1, 2])["updates"] == 3
    assert adversary.weight.item() == -3  # three steps of size 1 along a gradient of 1
    assert len(adversary.batches) == 6 and len(adversary.losses) == 3
    for (prompts, real), (same_prompts, fake) in zip(*[iter(adversary.batches)] * 2):
        assert prompts == same_prompts and len(prompts) == 32
        assert real == [f"reference of {prompt}" for prompt in prompts]
        assert fake == [{"a": 1, "b": 2}[prompt] for prompt in prompts]
        assert set(fake) == {1, 2}
    shown = [(real, fake) for real, fake in adversary.losses]
    pairs = [images for _, images in adversary.batches]
    assert [(list(real), list(fake)) for real, fake in shown] == list(zip(pairs[::2], pairs[1::2]))


def test_half_of_each_batch_is_new_and_half_is_from_past_steps():
    adversary = Scripted(steps=2)
    adversary.learn(["a", "b"], [1, 2])
    adversary.batches.clear()
    adversary.learn(["c", "d"], [3, 4])
    for _, fake in adversary.batches[1::2]:
        assert set(fake[:16]) == {3, 4} and set(fake[16:]) == {1, 2}
    assert adversary.past == [("a", 1), ("b", 2), ("c", 3), ("d", 4)]


def test_the_batches_depend_on_the_seed_and_the_number_of_the_call_alone():
    """random.Random("seed call"): a reference for each picture, then the batches."""
    adversary = Scripted(steps=1, seed=7)
    for call in range(2):
        adversary.batches.clear()
        past = list(adversary.past)
        adversary.learn(["a", "b"], [1, 2])
        rng, new = random.Random(f"7 {call}"), [("a", 1), ("b", 2)]
        for _ in new:
            rng.random()
        batch = rng.choices(new, k=16 if past else 32) + rng.choices(past or new, k=16 * bool(past))
        assert adversary.batches[1] == ([p for p, _ in batch], [i for _, i in batch])
    assert adversary.calls == 2


@pytest.mark.parametrize("generated, updates", [(1, 3), (0, 0), (-1, 0)])
def test_with_beaten_it_learns_only_while_the_pictures_score_above_the_references(
    generated, updates
):
    adversary = Scripted(when="beaten", steps=3)
    assert adversary.learn(["a"], [generated])["updates"] == updates
    assert adversary.weight.item() == -updates and len(adversary.past) == 1
    assert Scripted(when="always", steps=3).learn(["a"], [generated])["updates"] == 3


def test_an_update_is_a_step_of_adam_on_the_hinge_loss(monkeypatch):
    adversary, batches = make(steps=2), []
    naive, discriminate = copy.deepcopy(adversary.head), adversary.discriminate

    def spy(prompts, images):
        batches.append(adversary.tokens(images))
        return discriminate(prompts, images)

    adversary.learn(PROMPTS[:2], BROKEN[:2])  # the gradients of this step must not stay
    naive.load_state_dict(adversary.head.state_dict())
    optimizer = torch.optim.Adam(naive.parameters(), lr=1e-3, betas=(0.5, 0.999))
    optimizer.load_state_dict(copy.deepcopy(adversary.optimizer.state_dict()))
    monkeypatch.setattr(adversary, "discriminate", spy)
    adversary.learn(PROMPTS, BROKEN)
    for real, fake in zip(batches[2::2], batches[3::2]):  # the first two are for the metrics
        (r, f), loss = (naive(tokens)[..., 0] for tokens in (real, fake)), 0.0
        for columns, weight in ((slice(0, 1), 1.0), (slice(1, None), 0.3)):
            loss += weight * 0.5 * (1 - r[:, columns]).clamp(min=0).mean()
            loss += weight * 0.5 * (1 + f[:, columns]).clamp(min=0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(batches) == 6
    for a, b in zip(adversary.head.parameters(), naive.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_dino_stays_as_it_is_and_the_head_moves():
    adversary = make()
    parts = (adversary.dino, adversary.head)
    dino, head = ([p.clone() for p in part.parameters()] for part in parts)
    adversary.learn(PROMPTS, BROKEN)
    assert all((a == b).all() for a, b in zip(dino, adversary.dino.parameters()))
    moved = [(a != b).any() for a, b in zip(head, adversary.head.parameters())]
    # While all scores are within the hinge's margin, the gradients of the last bias cancel out.
    assert all(moved[:-1])


def test_of_pickscore_only_the_last_two_layers_of_the_vision_tower_move():
    adversary = make("adversarial-pickscore", steps=1)
    before = {name: p.clone() for name, p in adversary.scorer.model.named_parameters()}
    adversary.learn(PROMPTS, BROKEN)
    after = adversary.scorer.model.named_parameters()
    moved = {name for name, p in after if (p != before[name]).any()}
    layers = {name.split(".layers.")[0] + name.split(".layers.")[1][0] for name in moved}
    assert layers == {"vision_model.encoder1", "vision_model.encoder2"}  # of 0, 1, 2


# --- several processes --------------------------------------------------------------------------


class Listener:
    def __init__(self):
        self.weight, self.heard = torch.nn.Parameter(tensor(1.0, 2.0)), None

    def parameters(self):
        return [self.weight]

    def learn(self, prompts, images):
        self.heard = (list(prompts), list(images))
        return {"margin": 0.5, "updates": 4}


def test_every_process_learns_from_the_rollouts_of_all_in_the_order_of_their_keys(monkeypatch):
    rollouts = types.SimpleNamespace(keys=[(0, 0, 3, 0)], prompts=["b"], images=["C"])
    other = [((0, 0, 4, 0), "a", "D"), ((0, 0, 1, 1), "c", "B"), ((0, 0, 1, 0), "c", "A")]
    monkeypatch.setattr(adversarial_reward, "gather", lambda entries: other + entries)
    first, second = Listener(), Listener()
    metrics = adversarial_reward.update_adversaries({"x": first, "y": second}, rollouts)
    assert first.heard == second.heard == (list("ccba"), list("ABCD"))
    expected = {"x/margin": 0.5, "x/updates": 4, "y/margin": 0.5, "y/updates": 4}
    assert metrics == expected and first.weight.tolist() == [1, 2]


def test_the_first_process_decides_about_the_weights(monkeypatch):
    def broadcast(tensor, source):
        assert source == 0 and not tensor.requires_grad
        tensor.fill_(7.0)

    stand_in = types.SimpleNamespace(is_initialized=lambda: True, broadcast=broadcast)
    monkeypatch.setattr(adversarial_reward, "dist", stand_in)
    rollouts = types.SimpleNamespace(keys=[(0, 0, 0, 0)], prompts=["a"], images=["A"])
    listener = Listener()
    adversarial_reward.update_adversaries({"x": listener}, rollouts)
    assert listener.weight.tolist() == [7, 7]


def test_without_an_adversary_nothing_is_gathered(monkeypatch):
    monkeypatch.setattr(adversarial_reward, "gather", None)
    assert adversarial_reward.update_adversaries({}, None) == {}


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_has_learned_survives_a_checkpoint(kind, tmp_path):
    adversary = make(kind, steps=2)
    adversary.learn(PROMPTS, BROKEN)
    torch.save(adversary.state_dict(), tmp_path / "state.pt")
    again = make(kind, steps=2)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.learn(PROMPTS, CLEAN) == adversary.learn(PROMPTS, CLEAN)
    assert torch.equal(again(PROMPTS, BROKEN), adversary(PROMPTS, BROKEN))


def test_it_remembers_the_last_rollouts_and_no_more(monkeypatch):
    assert adversarial_reward.REPLAY == 512  # four steps of the default
    monkeypatch.setattr(adversarial_reward, "REPLAY", 3)
    adversary = Scripted(steps=1)
    adversary.learn(["a", "b"], [1, 2])
    adversary.learn(["c", "d"], [3, 4])
    assert adversary.past == [("b", 2), ("c", 3), ("d", 4)]


# --- reference pictures -------------------------------------------------------------------------


def write_references(folder, prompts):
    for i, prompt in enumerate(prompts):
        world.reference_picture(prompt, i).save(folder / f"{i}.png")


def test_references_are_a_folder_of_generate_or_a_file_of_the_released_code(tmp_path):
    write_references(tmp_path, PROMPTS[:2])
    files = {prompt: f"{i}.png" for i, prompt in enumerate(PROMPTS[:2])}
    lines = [json.dumps({"prompt": prompt, "path": name}) for prompt, name in files.items()]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    released = json.dumps({prompt: [name] for prompt, name in files.items()})
    (tmp_path / "released.json").write_text(released)
    for where in (tmp_path, tmp_path / "manifest.jsonl", tmp_path / "released.json"):
        references = adversarial_reward.References(where)
        references.check(PROMPTS[:2])
        picked = references.choose(PROMPTS[1], random.Random(0))
        assert picked.tobytes() == world.reference_picture(PROMPTS[1], 1).tobytes()


def test_references_that_are_no_text_are_refused(tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="2"):
        adversarial_reward.References(str(tmp_path / "a.png"))
    assert "a.png" in capsys.readouterr().err


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


@pytest.mark.parametrize("name", ["adversarial", "adversarial-pickscore"])
def test_training_goes_on_without_the_prompts_whose_references_are_damaged(name, tmp_path):
    adversary = rewards.load(name, checkpoint="tiny", steps=8)
    source = damaged_references(tmp_path, {"0a.png", "0b.png"})
    adversary.references = adversarial_reward.References(source)
    metrics = adversary.learn(PROMPTS[:2] * 2, BROKEN[:2] * 2)
    assert metrics["updates"] == 8 and math.isfinite(metrics["accuracy"])
    assert {prompt for prompt, _ in adversary.past} == {PROMPTS[1]}
    metrics = adversary.learn(PROMPTS[:1], BROKEN[:1])
    assert metrics["updates"] == 0 and math.isnan(metrics["accuracy"])
    assert adversary.calls == 2 and adversary(PROMPTS[:2], BROKEN[:2]).isfinite().all()


def test_wrong_references_are_refused_before_the_first_step(tmp_path, capsys):
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


def save_stable_diffusion(path):
    """Stable Diffusion with small random weights, in the format of the real one."""
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
    unet = diffusers.UNet2DConditionModel(
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
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
    )
    diffusers.StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(path)


def test_references_come_from_any_pipeline_of_diffusers(tmp_path):
    save_stable_diffusion(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/model_index.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        generate.main(generate.Config(model=str(tmp_path / "broken"), device="cpu"))
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
    drawn = (tmp_path / "out/00001/samples/0001.png").read_bytes()
    changes = {"batch_size": 1, "output_dir": str(tmp_path / "again")}
    generate.main(generate.Config(**vars(cfg) | changes))
    again = (tmp_path / "again/00001/samples/0001.png").read_bytes()
    assert again == drawn  # the batch makes no difference


class FakePipeline:
    def set_progress_bar_config(self, disable):
        pass

    def to(self, device):
        return self


class Qwen(FakePipeline):
    def __call__(self, prompt, negative_prompt=None, true_cfg_scale=4.0, guidance_scale=None, **_):
        self.got = (negative_prompt, true_cfg_scale, guidance_scale)
        return types.SimpleNamespace(images=[None] * len(prompt))


class Flux(FakePipeline):
    def __call__(self, prompt, negative_prompt=None, true_cfg_scale=1.0, guidance_scale=3.5, **_):
        self.got = (negative_prompt, true_cfg_scale, guidance_scale)
        return types.SimpleNamespace(images=[None] * len(prompt))


@pytest.mark.parametrize(
    "kind, weight, got",
    [
        (Qwen, None, ([" ", " "], 4.0, None)),
        (Qwen, 8.0, ([" ", " "], 8.0, None)),
        (Flux, None, (None, 1.0, 3.5)),
        (Flux, 8.0, (None, 1.0, 8.0)),
    ],
)
def test_a_pipeline_is_guided_by_the_argument_that_it_reads(
    kind, weight, got, tmp_path, monkeypatch
):
    pipeline = kind()
    (tmp_path / "model_index.json").write_text("{}")
    load = lambda *_, **__: pipeline
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    sample = pipelines.pipeline_sampler(
        str(tmp_path), "cpu", torch.float32, weight, lambda key: key
    )
    sample(["a", "b"], [1, 2])
    assert pipeline.got == got


def test_each_reference_of_a_prompt_is_shown(tmp_path):
    prompt = "a red star"
    chosen = lambda r: {r.choose(prompt, random.Random(n)).tobytes() for n in range(100)}
    for n in range(3):
        world.reference_picture(prompt, n).save(tmp_path / f"{n}.png")
    (tmp_path / "r.json").write_text(json.dumps({prompt: [f"{n}.png" for n in range(3)]}))
    assert len(chosen(adversarial_reward.References(tmp_path / "r.json"))) == 3
    assert len(chosen(adversarial_reward.References())) == 8
