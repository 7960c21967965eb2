"""Large and small machines: LoRA is the same policy plus something small; the plan counts what is really there."""

import copy

import pytest
import torch

import generate
import grpo
from training import harness
from training import sharding as scale


def rollouts_of(policy, cfg):
    rows = generate.load_prompts(cfg.prompts)
    return grpo.rollout(policy, rows, [(0, 0), (0, 1), (1, 0), (1, 1)], 0, cfg)


@pytest.fixture
def cfg():
    cfg = grpo.Config(rewards="hps", lora_rank=4, max_thought=40, device="cpu")
    harness.check(cfg, 1)
    return cfg


def learn(policy, rollouts, cfg):
    optimizer = torch.optim.SGD(grpo.trainable(policy), lr=0.5)
    scores = grpo.reference_logprobs(policy, None, rollouts, cfg)
    grpo.update(policy, scores, optimizer, rollouts, torch.tensor([1.0, -1, 1, -1]), cfg)


def test_lora_begins_as_the_policy_it_is_added_to_and_stays_so_with_it_switched_off(policy, cfg):
    rollouts = rollouts_of(policy, cfg)
    before = grpo.all_logprobs(policy, rollouts, cfg)
    adapted = scale.add_lora(copy.deepcopy(policy), 4)
    assert torch.allclose(grpo.all_logprobs(adapted, rollouts, cfg), before, atol=1e-6)
    learn(adapted, rollouts, cfg)
    assert not torch.allclose(grpo.all_logprobs(adapted, rollouts, cfg), before, atol=1e-3)
    assert torch.allclose(grpo.reference_logprobs(adapted, None, rollouts, cfg), before, atol=1e-6)


def test_only_the_low_rank_matrices_are_trained(policy):
    adapted = scale.add_lora(copy.deepcopy(policy), 4)
    trained = sum(p.numel() for p in grpo.trainable(adapted))
    layer = (
        4 * (128 + 128) * 4 + 3 * (128 + 384) * 4
    )  # rank 4: four square matrices and three of 128 x 384
    assert trained == 4 * layer and trained < 0.1 * sum(
        p.numel() for p in policy.model.parameters()
    )


def test_a_lora_checkpoint_opens_like_any_other_and_goes_on_from_its_matrices(
    policy, cfg, tmp_path
):
    adapted = scale.add_lora(copy.deepcopy(policy), 4)
    rollouts = rollouts_of(policy, cfg)
    learn(adapted, rollouts, cfg)
    expected = grpo.all_logprobs(adapted, rollouts, cfg)
    adapted.save(tmp_path, scale.model_state(adapted))
    torch.save(scale.lora_state(adapted), tmp_path / "lora.pt")
    merged = generate.load_policy(str(tmp_path))
    assert torch.allclose(grpo.all_logprobs(merged, rollouts, cfg), expected, atol=1e-4)
    again, none = harness.load_policies(cfg, tmp_path, "cpu", torch.float32)
    assert none is None and torch.equal(grpo.all_logprobs(again, rollouts, cfg), expected)


def test_gradient_checkpointing_changes_memory_and_not_the_gradient(cfg):
    gradients = []
    for checkpointing in (False, True):
        cfg.lora_rank, cfg.gradient_checkpointing = 0, checkpointing
        policy, reference = harness.load_policies(cfg, None, "cpu", torch.float32)
        rollouts = rollouts_of(policy, cfg)
        scores = grpo.reference_logprobs(policy, reference, rollouts, cfg)
        optimizer = torch.optim.SGD(grpo.trainable(policy), lr=0.0)
        grpo.update(policy, scores, optimizer, rollouts, torch.tensor([1.0, -1, 1, -1]), cfg)
        gradients.append(
            torch.cat([p.grad.flatten() for p in grpo.trainable(policy) if p.grad is not None])
        )
    assert torch.allclose(*gradients, atol=1e-6) and not policy.model.training


def test_the_image_head_is_trained_only_if_asked():
    names = lambda policy: {
        n.split(".")[1] for n, p in policy.model.named_parameters() if p.requires_grad
    }
    assert "generation_head" not in names(generate.load_policy("tiny"))
    assert "generation_head" in names(generate.load_policy("tiny", train_image_head=True))


def test_lora_is_the_same_on_every_process_because_the_seed_decides(policy):
    one, two, other = (
        scale.lora_state(scale.add_lora(copy.deepcopy(policy), 4, seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_step_in_bfloat16_paints_scores_and_learns(cfg):
    """The arithmetic of a GPU, on a CPU: weights stay float32."""
    cfg.lora_rank = 0
    policy, reference = harness.load_policies(cfg, None, "cpu", torch.bfloat16)
    rollouts = rollouts_of(policy, cfg)
    scores = grpo.reference_logprobs(policy, reference, rollouts, cfg)
    exact = grpo.all_logprobs(generate.load_policy("tiny"), rollouts, cfg)
    assert scores.dtype == torch.float32 and (scores - exact)[rollouts.mask].abs().mean() < 0.05
    before = [p.clone() for p in grpo.trainable(policy)]
    optimizer = torch.optim.AdamW(grpo.trainable(policy), lr=1e-6)
    metrics = grpo.update(policy, scores, optimizer, rollouts, torch.tensor([1.0, -1, 1, -1]), cfg)
    assert metrics["skipped"] == 0 and all(p.dtype == torch.float32 for p in grpo.trainable(policy))
    assert (
        sum((a != b).sum().item() for a, b in zip(before, grpo.trainable(policy))) > 1e5
    )  # they do move by 1e-6


def test_frozen_weights_take_the_type_of_the_arithmetic_and_the_policy_stays_the_same(
    cfg, tmp_path
):
    """Rounded once instead of at every use. What is trained stays float32, and so does what LoRA adds."""
    light, none = harness.load_policies(cfg, None, "cpu", torch.bfloat16)
    assert light.body.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in grpo.trainable(light)} == {torch.float32}
    rollouts, heavy = rollouts_of(light, cfg), generate.load_policy("tiny", dtype=torch.bfloat16)
    with torch.no_grad(), heavy.arithmetic():
        assert [a.tobytes() for a in rollouts.images] == [
            b.tobytes() for b in generate.to_images(heavy, rollouts.image_ids)
        ]
    difference = (
        grpo.all_logprobs(light, rollouts, cfg) - grpo.all_logprobs(heavy, rollouts, cfg)
    ).abs()
    thought = rollouts.thought_ids.shape[1]
    assert difference[:, :thought].max() == 0
    assert (
        difference[:, thought:].mean() < 0.02
    )  # the image head's kernel sums in another order: a last digit now and then
    learn(light, rollouts, cfg)
    light.save(tmp_path, scale.model_state(light))
    plain = scale.JanusForConditionalGeneration.from_pretrained(tmp_path)
    assert {p.dtype for p in plain.parameters()} == {
        torch.float32
    }  # for those who do not ask for a type
    added = torch.cat(
        [
            (a - b).flatten()
            for a, b in zip(
                generate.load_policy(str(tmp_path)).body.layers.parameters(),
                heavy.body.layers.parameters(),
            )
        ]
    )
    assert (
        0 < added[added != 0].abs().min() < 1e-6
    )  # smaller than bfloat16 could hold beside a weight


# --- the plan


def test_the_plan_counts_the_parameters_of_the_published_models():
    for name, total, trained in (
        ("Janus-Pro-1B", 2.08e9, 1.653e9),
        ("Janus-Pro-7B", 7.41e9, 6.910e9),
    ):
        count, _ = scale.plan(scale.janus_config(name), 8, 16, 8, True, 64, True, 0, True)
        assert count["total"] == pytest.approx(total, rel=2e-3) and count[
            "trained"
        ] == pytest.approx(trained, rel=1e-3)
        assert count["tokens a picture"] == 576


def test_the_plan_of_the_tiny_policy_counts_what_is_there(policy):
    count, gigabytes = scale.plan(
        scale.janus_config("tiny_world/checkpoints/policy"), 1, 128, 64, False, 64, False, 0, False
    )
    assert count["total"] == sum(p.numel() for p in policy.model.parameters())
    assert count["trained"] == sum(p.numel() for p in grpo.trainable(policy))
    cache = (
        2 * 4 * 128 * 2 * 128 * (80 + 64 + 64)
    )  # keys and values, 4 layers of 128 numbers, 2 bytes, 208 tokens
    assert gigabytes["rollout: keys and values"] == pytest.approx(cache / 1e9)


def test_sharding_divides_what_is_kept_and_lora_shrinks_it():
    plan = lambda **changes: scale.plan(
        **dict(
            config=scale.janus_config("Janus-Pro-7B"),
            world=8,
            painted=16,
            micro_batch=8,
            guided=True,
            thought=64,
            sharded=False,
            lora_rank=0,
            checkpointing=True,
        )
        | changes
    )[1]
    key = "weights, gradients, Adam: 16 bytes a trained parameter"
    assert plan()[key] == pytest.approx(110.6, rel=1e-2) and plan(sharded=True)[
        key
    ] == pytest.approx(13.8, rel=1e-2)
    assert plan(lora_rank=16)[key] < 1 and plan(lora_rank=16)["reference policy: 2 bytes"] == 0


def test_a_dry_run_says_whether_it_fits_and_what_would_help(capsys):
    cfg = grpo.Config(
        model="deepseek-community/Janus-Pro-7B", rewards="hps", dry_run=True, world_size=8
    )
    with pytest.raises(SystemExit) as end:
        grpo.main(cfg)
    said = capsys.readouterr().out
    assert end.value.code == 0 and "does not fit into 80 GB" in said and "--shard" in said
    with pytest.raises(SystemExit):
        grpo.main(
            grpo.Config(**vars(cfg) | dict(shard=True, micro_batch=8, gradient_checkpointing=True))
        )
    assert "\nfits into 80 GB" in capsys.readouterr().out


def test_sharding_one_process_is_refused(capsys):
    with pytest.raises(SystemExit):
        grpo.main(grpo.Config(shard=True))
    assert "--nproc-per-node" in capsys.readouterr().err


@pytest.mark.slow
def test_janus_pro_1b_with_random_weights_paints_and_scores(policy):
    """The architecture of the published model at full size, in bfloat16: 576 tokens of 16384, 384 x 384 pixels. Needs 6 GB."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = scale.JanusForConditionalGeneration(scale.janus_config("Janus-Pro-1B")).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    large = generate.Policy(model, policy.processor, policy.reasoning, torch.bfloat16)
    rollouts = generate.sample(large, ["a red circle"], [(0, 0, 0, 0)], cot=False, cfg_weight=5.0)
    assert rollouts.image_ids.shape == (1, 576) and 256 < rollouts.image_ids.max() < 16384
    assert rollouts.images[0].size == (384, 384)
    with torch.no_grad():
        scored = generate.logprobs(large, rollouts, 5.0)
    assert scored.shape == (1, 576) and scored.isfinite().all() and scored.mean() < -1
