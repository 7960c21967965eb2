"""Large and small machines: LoRA is the same policy plus something small; the plan counts what is
there."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
import tyro
from transformers import JanusForConditionalGeneration

import generate
import grpo
from training import checks, memory_plan, sharding
from training.policy import Policy, trainable
from training.prompts import load_prompts
from training.records import read_jsonl

ADVANTAGES = torch.tensor([1.0, -1, 1, -1])


@pytest.fixture
def cfg(config):
    return config(lora_rank=4)


def rollouts_of(policy, cfg):
    rows = load_prompts(cfg.prompts)
    return grpo.rollout(policy, rows, [(0, 0), (0, 1), (1, 0), (1, 1)], 0, cfg)


def learn(policy, reference, rollouts, cfg, optimizer):
    reference_NS = grpo.reference_logprobs(policy, reference, rollouts, cfg)
    parts = (policy, reference_NS, optimizer, rollouts, ADVANTAGES, torch.full((4,), cfg.beta))
    return grpo.update_policy(*parts, cfg)


def sgd(policy, lr):
    return torch.optim.SGD(trainable(policy), lr=lr)


# --- LoRA ---------------------------------------------------------------------------------------


def lora_weights(policy):
    return {n: p.detach() for n, p in policy.model.named_parameters() if ".lora_" in n}


def test_lora_begins_as_the_policy_it_is_added_to_and_stays_so_with_it_switched_off(policy, cfg):
    rollouts = rollouts_of(policy, cfg)
    before = grpo.all_logprobs(policy, rollouts, cfg)
    adapted = sharding.add_lora(copy.deepcopy(policy), 4)
    assert torch.allclose(grpo.all_logprobs(adapted, rollouts, cfg), before, atol=1e-6)
    learn(adapted, None, rollouts, cfg, sgd(adapted, 0.5))
    assert not torch.allclose(grpo.all_logprobs(adapted, rollouts, cfg), before, atol=1e-3)
    assert torch.allclose(grpo.reference_logprobs(adapted, None, rollouts, cfg), before, atol=1e-6)


def test_only_the_low_rank_matrices_are_trained(policy):
    adapted = sharding.add_lora(copy.deepcopy(policy), 4)
    trained = sum(p.numel() for p in trainable(adapted))
    # Rank 4, in each of 4 layers: four square matrices, and three of 128 x 384.
    assert trained == 4 * (4 * (128 + 128) * 4 + 3 * (128 + 384) * 4)
    assert trained < 0.1 * sum(p.numel() for p in policy.model.parameters())


def test_lora_adds_twice_the_product_of_its_matrices(policy, tmp_path):
    adapted = sharding.add_lora(copy.deepcopy(policy), 4)
    name = "model.language_model.layers.0.mlp.up_proj"
    module = adapted.model.get_submodule(name)
    torch.nn.init.normal_(module.lora_B["default"].weight)
    product = module.lora_B["default"].weight @ module.lora_A["default"].weight
    adapted.save(tmp_path)
    merged = generate.load_policy(str(tmp_path)).model.get_submodule(name).weight
    expected = policy.model.get_submodule(name).weight + 2 * product
    assert torch.allclose(merged, expected, atol=1e-6)


def trained_lora(policy, cfg):
    """(a policy with LoRA after one update, rollouts, its log-probabilities of them)."""
    adapted = sharding.add_lora(copy.deepcopy(policy), 4)
    rollouts = rollouts_of(policy, cfg)
    learn(adapted, None, rollouts, cfg, sgd(adapted, 0.5))
    return adapted, rollouts, grpo.all_logprobs(adapted, rollouts, cfg)


def test_a_lora_checkpoint_holds_the_matrices_alone_and_opens_like_any_other(policy, cfg, tmp_path):
    adapted, rollouts, expected = trained_lora(policy, cfg)
    adapted.save(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    merged = generate.load_policy(str(tmp_path))
    assert torch.allclose(grpo.all_logprobs(merged, rollouts, cfg), expected, atol=1e-4)
    assert [p.shape for p in trainable(merged)] == [p.shape for p in trainable(policy)]
    again, none = grpo.load_policies(cfg, tmp_path)
    assert none is None and torch.equal(grpo.all_logprobs(again, rollouts, cfg), expected)
    # On demand: whole weights, for transformers.
    merged.save(tmp_path / "merged")
    whole = generate.load_policy(str(tmp_path / "merged"))
    assert torch.equal(
        grpo.all_logprobs(whole, rollouts, cfg), grpo.all_logprobs(merged, rollouts, cfg)
    )


def test_a_lora_may_be_trained_on_top_of_another(policy, cfg, tmp_path):
    first, rollouts, _ = trained_lora(policy, cfg)
    first.save(tmp_path / "first")
    second = generate.load_policy(str(tmp_path / "first"))
    sharding.add_lora(second, 2, seed=1)
    learn(second, None, rollouts, cfg, sgd(second, 0.5))
    expected = grpo.all_logprobs(second, rollouts, cfg)
    second.save(tmp_path / "second")
    opened = generate.load_policy(str(tmp_path / "second"))
    base = json.loads((tmp_path / "second/adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == str(tmp_path / "first")
    assert torch.allclose(grpo.all_logprobs(opened, rollouts, cfg), expected, atol=1e-4)
    assert memory_plan.janus_config(str(tmp_path / "second")).text_config.hidden_size == 128


def test_a_run_with_lora_resumes_from_its_matrices_and_its_policy_draws(tmp_path, capsys):
    flags = (
        "--rewards hps --eval-rewards gold --num-generations 2 --prompts-per-step 2 --lora-rank 2 "
        "--eval-images 4 --best-of 0 --eval-steps 2 --save-steps 2 --max-steps 4 --max-thought 40 "
        f"--learning-rate 1e-2 --warmup-ratio 0 --device cpu --output-dir {tmp_path}"
    ).split()

    def run(name, *more):
        grpo.main(tyro.cli(grpo.Config, args=[*flags, "--run-name", name, *more]))
        lines = read_jsonl(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in s.items() if not k.startswith("seconds/")} for s in lines]

    whole = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/step-000004")
    assert run("killed", "--resume", "latest") == whole and whole[-1]["kl"] > 0
    last = tmp_path / "whole/checkpoints/step-000004"
    assert sum(file.stat().st_size for file in last.glob("*.safetensors")) < 2e5
    assert "library_name: peft" in (last / "README.md").read_text()
    # The policy that is opened is the one that was tested.
    tested = read_jsonl(tmp_path / "whole/tests/step_000004.jsonl")
    opened, cfg = generate.load_policy(str(tmp_path / "whole")), grpo.Config(max_thought=40)
    checks.fill_presets(cfg)
    rollouts = grpo.rollout(
        opened, load_prompts(cfg.test_prompts), [(i, 0) for i in range(4)], -1, cfg
    )
    assert rollouts.thoughts == [record["thought"] for record in tested]
    # Another base model under the same name is noticed.
    config = tmp_path / "killed/config.json"
    made = json.loads(config.read_text())
    made["inputs"]["model"] = "12345678"
    config.write_text(json.dumps(made))
    with pytest.raises(SystemExit, match="2"):
        run("killed", "--resume", "latest", "--max-steps", "5")
    assert "was started with model = '12345678'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"base_model_name_or_path": "/gone"}, "a LoRA for /gone, which holds other weights"),
        ({"base_model_name_or_path": "some/Janus"}, "a LoRA for some/Janus"),
        ({"base_model_name_or_path": None}, "cannot be loaded"),
        ({"r": 3}, "cannot be loaded"),
        ({"target_modules": ["q_proj"]}, "do not fit"),
    ],
)
def test_a_lora_without_its_base_is_refused(change, rule, policy, tmp_path, capsys):
    sharding.add_lora(copy.deepcopy(policy), 4).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SystemExit, match="2"):
        generate.load_policy(str(tmp_path))
    assert rule in capsys.readouterr().err


def test_peft_opens_the_adapter_of_a_checkpoint_beside_the_model_it_was_trained_from(
    policy, cfg, tmp_path
):
    from peft import PeftModel

    adapted, rollouts, expected = trained_lora(policy, cfg)
    adapted.save(tmp_path)
    base = copy.deepcopy(policy)
    PeftModel.from_pretrained(base.model, tmp_path)  # adds the matrices in place
    assert torch.allclose(grpo.all_logprobs(base, rollouts, cfg), expected, atol=1e-5)


def test_lora_is_the_same_on_every_process_because_the_seed_decides(policy):
    one, two, other = (
        lora_weights(sharding.add_lora(copy.deepcopy(policy), 4, seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# --- what is trained, and in which type ---------------------------------------------------------


def test_gradient_checkpointing_changes_memory_and_not_the_gradient(config):
    gradients = []
    for checkpointing in (False, True):
        cfg = config(gradient_checkpointing=checkpointing)
        policy, reference = grpo.load_policies(cfg)
        learn(policy, reference, rollouts_of(policy, cfg), cfg, sgd(policy, 0.0))
        gradients.append(torch.cat([p.grad.flatten() for p in trainable(policy)]))
    assert torch.allclose(*gradients, atol=1e-6) and not policy.model.training


def test_the_image_head_is_trained_only_if_asked():
    def trained_parts(**options):
        named = generate.load_policy("tiny", **options).model.named_parameters()
        return {name.split(".")[1] for name, p in named if p.requires_grad}

    assert "generation_head" not in trained_parts()
    assert "generation_head" in trained_parts(train_image_head=True)


def test_a_step_in_bfloat16_samples_scores_and_learns(config):
    """The arithmetic of a GPU, on a CPU: weights stay float32."""
    cfg = config(dtype="bfloat16")
    policy, reference = grpo.load_policies(cfg)
    rollouts = rollouts_of(policy, cfg)
    scores = grpo.reference_logprobs(policy, reference, rollouts, cfg)
    exact = grpo.all_logprobs(generate.load_policy("tiny"), rollouts, cfg)
    assert scores.dtype == torch.float32
    assert (scores - exact)[rollouts.mask].abs().mean() < 0.05
    before = [p.clone() for p in trainable(policy)]
    optimizer = torch.optim.AdamW(trainable(policy), lr=1e-6)
    metrics = learn(policy, reference, rollouts, cfg, optimizer)
    assert metrics["skipped"] == 0
    assert all(p.dtype == torch.float32 for p in trainable(policy))
    moved = sum((a != b).sum().item() for a, b in zip(before, trainable(policy)))
    assert moved > 1e5  # even at a learning rate of 1e-6


def test_frozen_weights_are_rounded_once_and_the_policy_stays_the_same(config, tmp_path):
    """What is trained stays float32, and so does what LoRA adds to the weights."""
    cfg = config(lora_rank=4, dtype="bfloat16")
    light, none = grpo.load_policies(cfg)
    up = light.language_model.layers[0].mlp.up_proj
    assert up.base_layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trainable(light)} == {torch.float32}
    rollouts, heavy = rollouts_of(light, cfg), generate.load_policy("tiny", dtype=torch.bfloat16)
    with torch.no_grad(), heavy.autocast():
        images = generate.to_images(heavy, rollouts.image_ids)
    assert [a.tobytes() for a in rollouts.images] == [b.tobytes() for b in images]
    difference = grpo.all_logprobs(light, rollouts, cfg) - grpo.all_logprobs(heavy, rollouts, cfg)
    C = rollouts.thought_ids.shape[1]
    assert difference[:, :C].abs().max() == 0
    assert difference[:, C:].abs().mean() < 0.02  # the image head's kernel adds in another order
    learn(light, None, rollouts, cfg, sgd(light, 0.5))
    light.save(tmp_path)
    generate.load_policy(str(tmp_path)).save(tmp_path / "merged")
    plain = JanusForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in plain.parameters()} == {torch.float32}  # without asking for a type
    saved = generate.load_policy(str(tmp_path)).language_model.layers.parameters()
    added = [(a - b).flatten() for a, b in zip(saved, heavy.language_model.layers.parameters())]
    added = torch.cat(added)
    # Smaller than bfloat16 could hold beside a weight.
    assert 0 < added[added != 0].abs().min() < 1e-6


# --- the plan -----------------------------------------------------------------------------------

PLAN_7B = {
    "world_size": 8,
    "pictures": 16,
    "micro_batch": 8,
    "guided": True,
    "thought": 64,
    "sharded": False,
    "lora_rank": 0,
    "checkpointing": True,
}


def plan(name="Janus-Pro-7B", **changes):
    return memory_plan.plan(memory_plan.janus_config(name), **PLAN_7B | changes)


@pytest.mark.parametrize(
    "name, total, trained", [("Janus-Pro-1B", 2.08e9, 1.653e9), ("Janus-Pro-7B", 7.41e9, 6.910e9)]
)
def test_the_plan_counts_the_parameters_of_the_published_models(name, total, trained):
    counts, _ = plan(name)
    assert counts["total"] == pytest.approx(total, rel=2e-3)
    assert counts["trained"] == pytest.approx(trained, rel=1e-3)
    assert counts["tokens of a picture"] == 576
    more, _ = plan(name, image_head=True)
    head = memory_plan.meta_model(memory_plan.janus_config(name)).model.generation_head
    assert more["trained"] - counts["trained"] == sum(p.numel() for p in head.parameters())


def test_the_plan_of_the_tiny_policy_counts_what_is_there(policy):
    tiny = {"world_size": 1, "pictures": 128, "micro_batch": 64, "guided": False}
    counts, gigabytes = plan("tiny", **tiny, checkpointing=False)
    assert counts["total"] == sum(p.numel() for p in policy.model.parameters())
    assert counts["trained"] == sum(p.numel() for p in trainable(policy))
    # Keys and values, 4 layers of 128 numbers, 2 bytes, 128 pictures, 208 tokens.
    cache = 2 * 4 * 128 * 2 * 128 * (80 + 64 + 64)
    assert gigabytes["rollout: keys and values"] == pytest.approx(cache / 1e9)


def test_the_plan_has_every_byte_of_the_frozen_weights(policy):
    """As they are after the cast: matrices in bfloat16, but not those used in float32."""
    rounded = dataclasses.replace(copy.deepcopy(policy), dtype=torch.bfloat16)
    sharding.cast_frozen_weights(rounded)
    frozen = [p for p in rounded.model.parameters() if not p.requires_grad]
    there = sum(p.numel() * p.element_size() for p in frozen)
    tiny = {"world_size": 1, "pictures": 128, "micro_batch": 64, "guided": False}
    _, planned = plan("tiny", **tiny, lora_rank=0, checkpointing=False)
    exact = planned["VQ model and image head, float32: 2 bytes more"] / 2  # of policy and reference
    total = planned["frozen weights: 2 bytes (sharded: 4)"] + exact
    assert there / 1e9 == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_checkpoint_is_as_large_as_planned(lora_rank, config, tmp_path):
    cfg = config(lora_rank=lora_rank)
    policy, _ = grpo.load_policies(cfg)
    optimizer = grpo.make_optimizer(policy, cfg)
    learn(policy, copy.deepcopy(policy), rollouts_of(policy, cfg), cfg, optimizer)
    weights, moments = memory_plan.checkpoint_sizes(memory_plan.janus_config("tiny"), lora_rank)
    policy.save(tmp_path, None if lora_rank else sharding.full_model_state(policy))
    torch.save(sharding.full_optimizer_state(policy, optimizer), tmp_path / "optimizer.pt")
    saved = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert saved / 1e9 == pytest.approx(weights, rel=0.02, abs=1e-5)  # names come on top
    size = (tmp_path / "optimizer.pt").stat().st_size
    assert 0 < size / 1e9 - moments < 1e-4  # names and numbers of steps come on top


def test_copies_and_averages_are_part_of_a_checkpoint(config):
    flags = grpo.Cures(average=0.9, reference_steps=5)
    sizes = memory_plan.checkpoint_sizes(
        memory_plan.janus_config("tiny"), 0, copies=2, average=True
    )
    plain = memory_plan.checkpoint_sizes(memory_plan.janus_config("tiny"), 0)
    assert sizes[0] == 2 * plain[0] and sizes[1] == 2 * plain[1]
    cfg = config(cures=flags)
    policy, _ = grpo.load_policies(cfg)
    cure = grpo.Cure(flags, policy, None, 0, [])
    copies = sum(tensor.numel() * 4 for copy in cure.copies.values() for tensor in copy)
    assert copies / 1e9 == pytest.approx(sizes[1] - plain[1])


def test_without_guidance_the_update_has_one_branch():
    name = "update: activations"
    guided, cond, none = (
        plan(**flags)[1][name] for flags in ({}, {"guided_update": False}, {"guided": False})
    )
    assert guided > cond == none
    cfg = grpo.Config(model="deepseek-community/Janus-Pro-1B", preset="t2i-r1")
    grpo.checks.fill_presets(cfg)
    half = memory_plan.plan_of(cfg, 1, 0.0)[1]
    cfg.guidance = "guided"
    whole = memory_plan.plan_of(cfg, 1, 0.0)[1]
    assert half[name] < whole[name]
    sampling = "rollout: keys and values"
    assert half[sampling] == whole[sampling]


@pytest.mark.parametrize("lora, planned", [(0, 27), (16, 26)])
def test_the_plan_is_what_the_backward_pass_keeps(lora, planned, policy):
    """Bytes counted by saved_tensors_hooks: a layer of the width of Janus-Pro-1B, in bfloat16."""
    (one, tokens), (two, _) = (kept_bytes(policy, layers, lora) for layers in (1, 2))
    numbers = (two - one) / (2 * 2048 * tokens)
    assert 0.95 * planned < numbers <= planned
    options = {"lora_rank": lora, "checkpointing": False, "guided": True, "micro_batch": 2}
    name = "update: activations"
    more, fewer = (plan("Janus-Pro-1B", **options, thought=t)[1][name] for t in (65, 64))
    assert more - fewer == pytest.approx(2 * (2 + 1) * 2 * 2048 * 24 * planned / 1e9)


def kept_bytes(policy, layers, lora):
    """(bytes kept for the backward pass, without weights; tokens) of two guided rollouts."""
    config, width = copy.deepcopy(policy.model.config), 2048
    text = dict(hidden_size=width, intermediate_size=5632, num_hidden_layers=layers)
    text |= dict(num_attention_heads=16, num_key_value_heads=16, head_dim=128)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config.vision_config.projection_dim = config.vq_config.projection_dim = width
    config.vq_config.image_token_embed_dim = width
    model = JanusForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("model.language_model.", "lm_head.")))
    wide = Policy(model, policy.processor, policy.reasoning, torch.bfloat16)
    if lora:
        sharding.add_lora(wide, lora, 0)
    sharding.cast_frozen_weights(wide)
    prompts, thoughts = ["a red circle"] * 2, ["a red circle here"] * 2
    ids, mask = torch.ones(2, 24, dtype=torch.long), torch.ones(2, 24, dtype=torch.bool)
    image = torch.zeros(2, wide.grid**2, dtype=torch.long)
    rollouts = generate.Rollouts([(0, 0, 0, 0)] * 2, prompts, thoughts, ids, mask, image, [])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
    kept = {}  # the tensors themselves, so that no address is used twice

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        generate.logprobs(wide, rollouts, 5.0)
    extra = [t for a, t in kept.items() if a not in weights and t.shape not in shapes]
    contexts = [
        generate.thought_context(wide, prompts),
        generate.image_context(wide, prompts, thoughts),
    ]
    thought, picture = (context.shape[1] for context, _ in contexts)
    tokens = 2 * (thought + 24 - 1) + 2 * 2 * (picture + wide.grid**2 - 1)
    return sum(t.untyped_storage().nbytes() for t in extra), tokens


def test_the_published_rewards_are_in_the_plan(capsys):
    flags = {"model": "deepseek-community/Janus-Pro-1B", "dry_run": True, "eval_rewards": "gold"}
    grpo.main(grpo.Config(**flags, rewards="hps,pickscore,gdino@http://127.0.0.1:8100"))
    assert "     7.80 GB   reward models" in capsys.readouterr().out


def test_sharding_divides_the_state_and_lora_shrinks_it():
    key = "weights, gradients, Adam: 16 bytes for each trained parameter"
    assert plan()[1][key] == pytest.approx(110.6, rel=1e-2)
    assert plan(sharded=True)[1][key] == pytest.approx(13.8, rel=1e-2)
    small = plan(lora_rank=16)[1]
    assert small[key] < 1 and small["reference policy: 2 bytes"] == 0


def test_a_dry_run_says_whether_it_fits_and_what_would_help(capsys):
    flags = {"model": "deepseek-community/Janus-Pro-7B", "rewards": "hps"}
    flags |= {"dry_run": True, "world_size": 8}
    grpo.main(grpo.Config(**flags))
    said = capsys.readouterr().out
    assert "does not fit into 80 GB" in said and "--shard" in said
    flags |= {"shard": True, "micro_batch": 8, "gradient_checkpointing": True}
    grpo.main(grpo.Config(**flags))
    said = capsys.readouterr().out  # 68 pictures of a test at a time
    assert "does not fit into 80 GB" in said and "a smaller --rollout-batch" in said
    grpo.main(grpo.Config(**flags, rollout_batch=16))
    assert "\nfits into 80 GB" in capsys.readouterr().out


def test_the_only_process_of_torchrun_may_shard(config, monkeypatch, capsys):
    cfg = config(shard=True, prompts_per_step=2)
    with pytest.raises(SystemExit, match="2"):
        checks.check_flags(cfg, 1, 1)
    assert "--nproc-per-node" in capsys.readouterr().err
    monkeypatch.setattr(checks, "launched", lambda: True)
    checks.check_flags(cfg, 1, 1)


def test_the_plan_counts_the_pictures_of_a_test():
    """540 pictures on 7 processes are 78 at a time, although a step samples 16."""
    keys = "rollout: keys and values"
    cfg = grpo.Config(model="deepseek-community/Janus-Pro-7B", rewards="hps", prompts_per_step=14)
    checks.fill_presets(cfg)
    tested = memory_plan.plan_of(cfg, 7, 0.0)[1][keys]
    cfg.rollout_batch = 16
    assert tested / memory_plan.plan_of(cfg, 7, 0.0)[1][keys] == pytest.approx(78 / 16)


@pytest.mark.slow
def test_janus_pro_1b_with_random_weights_samples_and_scores(policy):
    """The architecture of the published model at full size, in bfloat16: 576 tokens of 16384,
    384 x 384 pixels. Needs 6 GB."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = memory_plan.janus_config("Janus-Pro-1B")
        model = JanusForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.model.generation_head.float()  # as load_policy leaves it
    large = Policy(model, policy.processor, policy.reasoning, torch.bfloat16)
    rollouts = generate.sample(large, ["a red circle"], [(0, 0, 0, 0)], cot=False, cfg_weight=5.0)
    assert rollouts.image_ids.shape == (1, 576) and 256 < rollouts.image_ids.max() < 16384
    assert rollouts.images[0].size == (384, 384)
    with torch.no_grad():
        scored = generate.logprobs(large, rollouts, 5.0)
    assert scored.shape == (1, 576) and scored.isfinite().all() and scored.mean() < -1
