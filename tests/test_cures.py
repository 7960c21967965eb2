"""The cures of training/cures.py: each formula against a case worked out by hand, and a run with
all of them, killed and resumed."""

import contextlib
import copy
import json
import math
import random
import shutil
import types

import numpy as np
import pytest
import torch
import tyro
from conftest import picture, tensor

import generate
import grpo
from adversarial_reward import References
from training import cures, stopping
from training.cures import Cure, Cures
from training.policy import trainable
from training.prompts import load_prompts
from training.records import read_json, read_jsonl

NAN = math.nan
PROMPTS = ["a red circle", "a yellow star above a purple square"]


@pytest.fixture(scope="module")
def rollouts(policy):
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    return generate.sample(policy, prompts, [(3, 0, n // 4, n % 4) for n in range(8)])


def update(policy, rollouts, advantages, cfg, lr=0.0, **options):
    """One update of a copy by plain gradient descent: (policy, metrics)."""
    trained = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(trainable(trained), lr=lr)
    reference_NS = grpo.all_logprobs(policy, rollouts, cfg)
    betas = torch.full((len(rollouts),), cfg.beta)
    parts = (trained, reference_NS, optimizer, rollouts, advantages, betas, cfg)
    return trained, grpo.update_policy(*parts, **options)


# --- flat optima --------------------------------------------------------------------------------


def test_the_flattened_gradient_is_that_of_the_loss_and_half_its_squared_norm():
    """L = x^T H x / 2 has the gradient g = H x, and gamma/2 |H x|^2 the gradient gamma H H x."""
    H = tensor([2.0, 1.0], [1.0, 3.0])
    x, unused = torch.nn.Parameter(tensor(1.0, -2.0)), torch.nn.Parameter(tensor(5.0))

    def recompute():
        x.grad = None
        (x @ H @ x / 2).backward()

    recompute()
    g = x.grad.clone()
    cures.flatten_gradient([x, unused], recompute, gamma=0.3)
    assert torch.allclose(x.grad, g + 0.3 * H @ g, atol=2e-3)
    assert x.tolist() == [1.0, -2.0] and unused.grad is None


def test_without_memory_for_the_second_gradient_the_weights_are_as_before():
    x = torch.nn.Parameter(tensor(1.0, -2.0))
    x.grad = tensor(3.0, 4.0)

    def recompute():
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        cures.flatten_gradient([x], recompute, gamma=0.3)
    assert x.tolist() == [1.0, -2.0]


def test_an_update_with_a_gradient_penalty_follows_the_definition(policy, rollouts, config):
    advantages = tensor(1.0, -0.5, 0.25, 0.0, 2.0, -1.0, -2.0, 0.5)
    plain, _ = update(policy, rollouts, advantages, config(max_grad_norm=1e9), lr=1.0)
    flags = config(max_grad_norm=1e9, cures=Cures(gradient_penalty=2.0))
    flat, metrics = update(policy, rollouts, advantages, flags, lr=1.0)
    steps = [
        torch.cat([(a - b).flatten() for a, b in zip(trainable(p), trainable(policy))])
        for p in (plain, flat)
    ]
    # -(step) is the gradient g1, and g1 + gamma H g1: their difference again by a finite difference
    g1, change, epsilon = -steps[0], steps[0] - steps[1], 0.05
    moved = copy.deepcopy(policy)
    with torch.no_grad():
        flattened = torch.split(g1, [p.numel() for p in trainable(moved)])
        for p, g in zip(trainable(moved), flattened):
            p.add_(epsilon * g.view_as(p))
    old = grpo.all_logprobs(policy, rollouts, config())
    logprobs = generate.logprobs(moved, rollouts, 1.0)
    losses = grpo.grpo_loss(logprobs, old, old, advantages, rollouts.mask, 0.02, 0.2, 0.2)
    (losses.sum() / rollouts.mask.sum()).backward()
    g2 = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainable(moved)]
    )
    expected = 2.0 * (g2 - g1) / epsilon
    assert torch.cosine_similarity(change, expected, 0) > 0.99
    assert change.norm().item() == pytest.approx(expected.norm().item(), rel=0.1)
    assert metrics["clip_ratio"] == 0  # counted at the weights themselves


# --- GARDO --------------------------------------------------------------------------------------


def test_a_win_rate_is_the_share_of_the_others_that_are_beaten():
    got = cures.win_rates(tensor(3.0, 1.0, 1.0, 0.0, 5.0, NAN, 7.0, 6.0), 4)
    expected = [1, 1.5 / 3, 1.5 / 3, 0, 0, NAN, 1, 0.5]
    assert got.tolist() == pytest.approx(expected, nan_ok=True)
    assert cures.win_rates(tensor(2.0, NAN), 2).tolist() == pytest.approx([0, NAN], nan_ok=True)
    assert cures.win_rates(tensor(1.0, 2.0), 2).tolist() == [0, 1]


def test_the_share_bounds_how_many_of_a_group_are_doubted():
    """U = 2/3 for the first two, -2/3 for the others."""
    reward, judge = tensor(4.0, 3.0, 2.0, 1.0), tensor(2.0, 1.0, 4.0, 3.0)
    for share, number in ((0.01, 1), (0.25, 1), (0.5, 2), (1.0, 2)):
        assert cures.doubtful(reward, [judge], 4, share).tolist()[:2].count(True) == number
        assert cures.doubtful(reward, [judge], 4, share).sum() == number


def test_doubtful_is_what_the_reward_overrates():
    reward = tensor(4.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 4.0)
    judge = tensor(1.0, 3.0, 2.0, 4.0, 1.0, 2.0, 3.0, 4.0)  # the second group: they agree
    got = cures.doubtful(reward, [judge], 4, share=0.1)
    assert got.tolist() == [True] + [False] * 7
    # Two of four: the first, U = 1, and no other, as U must be above 0.
    assert cures.doubtful(reward, [judge], 4, share=0.5).sum() == 1
    both = cures.doubtful(reward, [judge, reward], 4, share=0.1)  # on average still the first
    assert both.tolist() == got.tolist()
    assert not cures.doubtful(reward, [torch.full((8,), NAN)], 4, share=0.5).any()


def test_the_kl_counts_only_for_doubtful_rollouts():
    cure = Cure(Cures(doubted_by="artifact", doubtful_share=0.25))
    total, scores = tensor(4.0, 3.0, 2.0, 1.0), {"artifact": tensor(1.0, 3.0, 2.0, 4.0)}
    assert cure.betas(0.04, total, scores, 4).tolist() == pytest.approx([0.04, 0, 0, 0])
    assert cures.OFF.betas(0.04, total, scores, 4).tolist() == pytest.approx([0.04] * 4)


def test_each_rollout_has_its_own_weight_of_the_kl(policy, rollouts, config):
    """Without advantages, and with beta 0 for all but two, the loss is the KL of these two."""
    cfg, other = config(micro_batch=3), copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in trainable(other):
            parameter.add_(0.02 * torch.randn_like(parameter))
    reference = grpo.all_logprobs(other, rollouts, cfg)
    own = grpo.all_logprobs(policy, rollouts, cfg)
    k3 = torch.where(rollouts.mask, grpo.kl_k3(own, reference), 0.0).sum(1)
    optimizer = torch.optim.SGD(trainable(copy.deepcopy(policy)), lr=0.0)
    betas = tensor(0.0, 0, 3.0, 0, 0, 0, 0, 1.0)
    parts = (policy, reference, optimizer, rollouts, torch.zeros(8), betas, cfg)
    metrics = grpo.update_policy(*parts)
    expected = (3 * k3[2] + k3[7]) / rollouts.mask.sum()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_failed_score_of_the_doubting_reward_is_no_score(policy, rollouts, config):
    """Otherwise the KL would count for nobody, without a word."""
    known = types.SimpleNamespace(weights={"a": 1.0}, adversaries={}, multipliers={})
    known.train = {"a": lambda *_: torch.arange(8.0)}
    known.heldout = {"artifact": lambda *_: torch.full((8,), NAN)}
    rows, cfg = [{"prompt": prompt} for prompt in PROMPTS], config()
    optimizer = torch.optim.SGD(trainable(copy.deepcopy(policy)), lr=0.0)
    parts = (policy, policy, known, optimizer, rollouts, rows, 0, cfg, lambda name: None)
    grpo.train_step(*parts)
    with pytest.raises(stopping.NoScores, match="100% of the rollouts had no score"):
        grpo.train_step(*parts, Cure(Cures(doubted_by="artifact")))


def test_a_positive_advantage_grows_with_the_distance_to_the_nearest_picture():
    black, grey, white = picture((0, 0, 0)), picture((102, 102, 102)), picture((255, 255, 255))
    group = [black, black, grey, white]  # nearest: 0, 0, .4, .6; their mean is .25
    got = cures.spread(tensor(1.0, -1.0, 1.0, 2.0), group, 4)
    assert got.tolist() == pytest.approx([0, -1, 1.6, 4.8], abs=1e-4)
    same = cures.spread(tensor(1.0, -1.0, 0.0, 0.0), [black] * 4, 4)
    assert same.tolist() == [0, -1, 0, 0]
    assert cures.OFF.advantages(tensor(1.0), None, 1).tolist() == [1.0]


def test_the_reference_moves_to_the_policy_every_so_many_steps(policy):
    trained = copy.deepcopy(policy)
    cure = Cure(Cures(reference_steps=2), trained)
    first = trainable(policy)[0].detach().clone()
    for step in (1, 2, 3):
        with torch.no_grad():
            trainable(trained)[0].add_(1.0)
        cure.after_step(trained, step)
        with cure.reference(trained, policy) as original:
            moved = trainable(original)[0] - first
            assert moved.mean().item() == pytest.approx(0.0 if step < 2 else 2.0, abs=1e-4)
        assert (trainable(trained)[0] - first).mean().item() == pytest.approx(step, abs=1e-4)
    with cures.OFF.reference(trained, policy) as original:
        assert original is policy


# --- average of the weights ---------------------------------------------------------------------


def test_the_averaged_weights_are_tested_and_the_others_trained(policy):
    trained = copy.deepcopy(policy)
    cure, first = Cure(Cures(average=0.75), trained), trainable(policy)[0].detach().clone()
    for step, expected in ((1, 0.25), (2, 0.75 * 0.25 + 0.25 * 2)):
        with torch.no_grad():
            trainable(trained)[0].add_(1.0)
        cure.after_step(trained, step)
        with cure.tested(trained):
            moved = (trainable(trained)[0] - first).mean().item()
        assert moved == pytest.approx(expected, abs=1e-4)
        assert (trainable(trained)[0] - first).mean().item() == pytest.approx(step, abs=1e-4)
    with pytest.raises(KeyError), cure.tested(trained):  # also after an error
        raise KeyError
    assert (trainable(trained)[0] - first).mean().item() == pytest.approx(2, abs=1e-4)


# --- STAGE --------------------------------------------------------------------------------------


def test_the_entropy_of_a_token_is_that_of_its_distribution():
    logits = tensor([0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -math.inf, -math.inf])[None]
    quarters = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    got = generate.entropies(logits, torch.zeros(1, 2, dtype=torch.long))
    assert got.tolist()[0] == pytest.approx([math.log(4), quarters])


def test_the_bonus_is_largest_at_the_entropy_of_the_reference(policy, rollouts, config):
    got = cures.entropy_closeness(tensor(2.0, 1.0, 3.5), tensor(2.0, 2.0, 2.0))
    assert got.tolist() == pytest.approx([1.0, 0.5, 1 / 3.25])
    sharper, cfg = copy.deepcopy(policy), config()
    with torch.no_grad():  # logits times 3
        sharper.model.model.generation_head.vision_head.weight.mul_(3)
        sharper.model.model.generation_head.vision_head.bias.mul_(3)
    entropies = lambda p: grpo.all_logprobs(p, rollouts, cfg, generate.entropies)
    cure = Cure(Cures(entropy_bonus=0.4))
    assert cure.entropy_bonus(policy, policy, entropies).tolist() == pytest.approx([0.4] * 8)
    apart = (entropies(policy) - entropies(sharper))[:, -64:].mean(1)
    expected = 0.4 / (1 + apart.square())
    assert torch.allclose(cure.entropy_bonus(sharper, policy, entropies), expected)
    assert expected.max() < 0.4 and cures.OFF.entropy_bonus(policy, policy, entropies) == 0.0


def test_a_run_adds_the_bonus_to_its_total(policy, rollouts, config, monkeypatch):
    """train_step: total = hps + bonus, and the advantages are of this total."""
    cfg, rows = config(cures=Cures(entropy_bonus=0.4)), [{"prompt": prompt} for prompt in PROMPTS]
    rewards = grpo.reward_lib.load_all(cfg, {"hps": 1.0}, [], rows)
    bonus = torch.arange(8.0)
    monkeypatch.setattr(cures, "entropy_closeness", lambda here, there: bonus)
    trained = copy.deepcopy(policy)
    parts = (trained, policy, rewards, grpo.make_optimizer(trained, cfg), rollouts, rows, 0, cfg)
    scores, _ = grpo.train_step(*parts, lambda name: None, Cure(cfg.cures))
    assert torch.allclose(scores["total"], scores["hps"] + 0.4 * bonus)
    expected = grpo.group_advantages(scores["total"], 4)
    assert torch.allclose(scores["advantage"], expected)


class SpyCure(Cure):
    """A cure that does nothing, but says so: each of its answers can be recognised."""

    def __init__(self):
        super().__init__(Cures())
        self.steps = []

    def advantages(self, advantages, images, group_size):
        return torch.arange(8.0) + 100

    def betas(self, beta, total, scores, group_size):
        return torch.arange(8.0) + 200

    def data(self, policy, rollouts, group_size, step):
        return "the data"

    def after_step(self, policy, step):
        self.steps.append(step)

    def reference(self, policy, reference):
        return contextlib.nullcontext("another reference")


def test_what_a_cure_answers_reaches_the_update(policy, rollouts, config, monkeypatch):
    seen, cure, cfg = {}, SpyCure(), config()
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    known = grpo.reward_lib.load_all(cfg, {"hps": 1.0}, [], rows)
    monkeypatch.setattr(grpo, "all_logprobs", lambda policy, *_: seen.update(reference=policy))

    def update(policy, reference_NS, optimizer, rollouts, advantages, betas, cfg, data):
        seen.update(advantages=advantages, betas=betas, data=data)
        return {}

    monkeypatch.setattr(grpo, "update_policy", update)
    parts = (policy, policy, known, grpo.make_optimizer(policy, cfg), rollouts, rows, 6, cfg)
    scores, _ = grpo.train_step(*parts, lambda name: None, cure)
    assert scores["advantage"].tolist() == seen["advantages"].tolist() == list(range(100, 108))
    assert seen["betas"].tolist() == list(range(200, 208)) and seen["data"] == "the data"
    assert seen["reference"] == "another reference" and cure.steps == [7]


def test_dominated_rollouts_do_not_teach(policy, rollouts, config, monkeypatch):
    cfg, rows = config(combine="pareto"), [{"prompt": prompt} for prompt in PROMPTS]
    known, given = grpo.reward_lib.load_all(cfg, {"hps": 1.0, "jpeg": 1.0}, [], rows), {}
    given["hps"] = tensor(3.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 0.0)
    given["jpeg"] = tensor(3.0, 1.0, 2.0, 1.0, 3.0, 2.0, 1.0, 0.0)
    monkeypatch.setattr(grpo.reward_lib, "start_scoring", lambda *_: lambda: dict(given))
    trained = copy.deepcopy(policy)
    parts = (trained, policy, known, grpo.make_optimizer(trained, cfg), rollouts, rows, 0, cfg)
    scores, _ = grpo.train_step(*parts, lambda name: None)
    whole = grpo.group_advantages(given["hps"] + given["jpeg"], 4)
    teaches = torch.tensor([True, False, False, False, True, True, True, False])
    assert torch.allclose(scores["advantage"], whole * teaches)
    assert scores["advantage"][0] > 1  # of a picture that is the best in all it is worth most


# --- the data anchor ----------------------------------------------------------------------------


def test_a_drawn_picture_is_encoded_so_that_it_is_drawn_again(policy):
    references = References(None)
    drawn = [references.choose(prompt, random.Random(0)) for prompt in PROMPTS]
    ids = cures.encode(policy, drawn)
    assert ids.shape == (2, 64)
    for picture_, again in zip(drawn, generate.to_images(policy, ids)):
        pixels = [np.asarray(image).astype(float) for image in (picture_, again)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 8  # of 255
    # The length of a code means nothing, as for the decoder.
    scaled = copy.deepcopy(policy)
    with torch.no_grad():
        codes = scaled.model.model.vqmodel.quantize.embedding.weight
        codes.mul_(torch.rand(len(codes), 1) + 0.1)
    assert torch.equal(cures.encode(scaled, drawn), ids)


def test_reference_pictures_take_the_place_of_sampled_ones(policy, rollouts, config):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    cure = Cure(Cures(data_weight=0.5), policy, References(None), 7, rows)
    data = cure.data(policy, rollouts, 4, step=0)
    # A sampled thought would describe another picture.
    assert data.prompts == PROMPTS and data.thoughts == ["", ""] and any(rollouts.thoughts)
    assert data.mask.shape == (2, 64) and data.mask.all()
    assert torch.equal(data.image_ids, cures.encode(policy, data.images))
    assert cures.OFF.data(policy, rollouts, 4, step=0) is None
    again, other = (cure.data(policy, rollouts, 4, step) for step in (0, 1))
    assert torch.equal(again.image_ids, data.image_ids)
    assert not torch.equal(other.image_ids, data.image_ids)
    # The loss is -.5 of the mean log-probability, per token and prompt, and falls.
    cfg = config(cures=cure.flags, prompts_per_step=2, beta=0.0)
    likelihood = lambda p: grpo.all_logprobs(p, data, cfg)[:, -64:].mean().item()
    trained, metrics = update(policy, rollouts, torch.zeros(8), cfg, lr=0.1, data=data)
    assert metrics["loss"] == pytest.approx(-0.5 * likelihood(policy), rel=1e-4)
    assert likelihood(trained) > likelihood(policy) + 1e-3


def test_a_prompt_without_references_is_refused_at_the_start(policy, capsys):
    with pytest.raises(SystemExit, match="2"):
        Cure(Cures(data_weight=1.0), policy, References(None), 0, [{"prompt": "a dog"}])
    assert "--references" in capsys.readouterr().err


def test_an_image_statistic_of_stats_may_doubt(config):
    cures.check(config(eval_rewards="gold,stats", cures=Cures(doubted_by="brightness")))


# --- a whole run --------------------------------------------------------------------------------

SMALL = (
    "--rewards hps --eval-rewards artifact,gold --num-generations 2 --prompts-per-step 2 "
    "--eval-images 4 --best-of 0 --eval-steps 2 --save-steps 2 --max-steps 4 --max-thought 40 "
    "--learning-rate 1e-3 --warmup-ratio 0 --device cpu --cures.gradient-penalty 1 "
    "--cures.doubted-by artifact --cures.reference-steps 3 --cures.spread --cures.entropy-bonus .4 "
    "--cures.data-weight .1 --cures.average .5 --run-name cured"
).split()


def test_a_run_with_all_cures_resumes_as_if_nothing_had_happened(tmp_path):
    def run(place, *more):
        flags = [*SMALL, "--output-dir", str(tmp_path / place), *more]
        grpo.main(tyro.cli(grpo.Config, args=flags))
        lines = read_jsonl(tmp_path / place / "cured/metrics.jsonl")
        steps = [{k: v for k, v in s.items() if not k.startswith("seconds/")} for s in lines]
        return steps, read_jsonl(tmp_path / place / "cured/test.jsonl")

    whole = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/cured/checkpoints/step-000004")
    assert run("killed", "--resume", "latest") == whole
    made = read_json(tmp_path / "killed/cured/config.json")
    assert len(made["resumed"]) == 1 and made["date"] <= made["resumed"][0]["date"]
    # A run from before these cures cannot go on with one.
    del made["flags"]["cures.spread"]
    (tmp_path / "killed/cured/config.json").write_text(json.dumps(made))
    with pytest.raises(SystemExit, match="2"):
        run("killed", "--resume", "latest", "--max-steps", "5")
    # The averaged policy that was tested is one that generate.py opens.
    averaged = tmp_path / "whole/cured/checkpoints/step-000004/average"
    opened, last = generate.load_policy(str(averaged)), generate.load_policy(str(averaged.parent))
    assert not torch.equal(trainable(opened)[0], trainable(last)[0])
    rows = load_prompts(grpo.checks.PRESETS["tiny"]["test_prompts"])
    rollouts = generate.sample(
        opened, [row["prompt"] for row in rows[:4]], [(42, -1, i, 0) for i in range(4)],
        max_thought=40,
    )  # fmt: skip
    gold = grpo.reward_lib.load("gold")(rollouts.prompts, rollouts.images, rows[:4])
    assert gold.mean().item() == pytest.approx(whole[1][-1]["gold"], abs=1e-5)


@pytest.mark.parametrize(
    "flags, rule",
    [
        ("--cures.gradient-penalty -1", "0 or greater"),
        ("--cures.data-weight nan", "must be a number"),
        ("--cures.average 1", "from 0 to below 1"),
        ("--cures.doubtful-share 0", "above 0"),
        ("--cures.doubted-by hps --rewards hps", "name it in --eval-rewards"),
        ("--cures.entropy-bonus -.4", "0 or greater"),
        ("--cures.doubted-by stats --eval-rewards edges", "name it in --eval-rewards"),
        ("--cures.doubted-by gold", "must not guide"),
        ("--cures.gradient-penalty 1 --dtype bfloat16", "needs --dtype float32"),
        ("--cures.average .9 --lora-rank 2", "not with --lora-rank"),
        ("--cures.reference-steps 2 --shard --world-size 2 --dry-run", "--shard: not with"),
        ("--cures.data-weight 1 --model some/Janus", "needs --references"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, rule, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        grpo.main(tyro.cli(grpo.Config, args=[*flags.split(), "--output-dir", str(tmp_path)]))
    assert rule in capsys.readouterr().err


@pytest.mark.parametrize("truth", ["gold", "gold-clean", "gold-aligned"])
def test_no_part_of_the_truth_guides(truth, config, capsys):
    with pytest.raises(SystemExit, match="2"):
        cures.check(config(cures=Cures(doubted_by=truth)))
    assert "the truth must not guide" in capsys.readouterr().err


def test_the_distances_of_one_group_do_not_count_in_another():
    black, grey, white = picture((0, 0, 0)), picture((102, 102, 102)), picture((255, 255, 255))
    other = [black, picture((51, 51, 51)), white, white]  # nearest: .2, .2, 0, 0; mean .1
    got = cures.spread(tensor(*[1.0] * 8), [black, black, grey, white, *other], 4)
    assert got.tolist() == pytest.approx([0, 0, 1.6, 2.4, 2, 2, 0, 0], abs=1e-4)


def test_references_are_drawn_anew_for_each_seed_step_and_prompt(policy, rollouts):
    drawn, rows = {}, [{"prompt": prompt} for prompt in PROMPTS]

    class Listed:
        check = staticmethod(lambda prompts: None)

        def choose(self, prompt, rng):
            drawn[where, prompt] = rng.random()
            return References().choose(prompt, random.Random(0))

    for where in ((7, 0), (7, 1), (8, 0)):
        cure = Cure(Cures(data_weight=0.5), policy, Listed(), where[0], rows)
        cure.data(policy, rollouts, 4, step=where[1])
    assert len(set(drawn.values())) == len(drawn) == 6


def test_the_data_anchor_scores_with_the_guidance_of_the_policy(policy, rollouts, config):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    cure = Cure(Cures(data_weight=0.5), policy, References(None), 7, rows)
    data = cure.data(policy, rollouts, 4, step=0)
    cfg = config(cures=cure.flags, prompts_per_step=2, beta=0.0, cfg_weight=2.0, micro_batch=1)
    _, metrics = update(policy, rollouts, torch.zeros(8), cfg, data=data)
    expected = -0.5 * grpo.all_logprobs(policy, data, cfg)[:, -64:].mean().item()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_flattened_gradient_is_what_is_scaled_down(policy, rollouts, config):
    advantages = tensor(1.0, -0.5, 0.25, 0.0, 2.0, -1.0, -2.0, 0.5)
    cfg = config(max_grad_norm=0.01, cures=Cures(gradient_penalty=2.0))
    flat, metrics = update(policy, rollouts, advantages, cfg, lr=1.0)
    change = torch.cat([(a - b).flatten() for a, b in zip(trainable(flat), trainable(policy))])
    assert metrics["grad_norm"] > 0.01 and change.norm().item() == pytest.approx(0.01, rel=1e-3)
