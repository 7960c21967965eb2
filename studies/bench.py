"""How fast, compared with what you would use instead? Side by side in one process, because machines differ and are noisy.

Sampling, in image tokens a second:
    ours            generate.sample: attention only to what is there, one branch where the guidance weight is 1, no text head
                    on a GPU: one step recorded and replayed (CUDA graph), and step by step
    transformers    JanusForConditionalGeneration.generate(generation_mode="image"), which always computes two branches
    plain loop      as T2I-R1 writes it (its algorithm, our words): a growing cache and a growing mask
A whole GRPO step, split into its parts, ours and the plain algorithm: thoughts by `generate`, the plain loop, all logits of
the text head over the picture's positions, rewards a picture at a time, all one after the other.

    roofline: a step of decoding reads all weights and all keys and values once:  bytes / bandwidth       (GPU only)

Run:   python bench.py                                              the tiny policy, on this machine
       python bench.py --model Janus-Pro-1B --pictures 64           random weights of that size; needs a GPU

You should see:  two tables; the ratio is what to look at. It takes a minute.   Read next: generate.py
"""

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from transformers import DynamicCache, JanusForConditionalGeneration

import generate
import grpo
import rewards
from evaluation import pages as report
from training import harness
from training import sharding as scale
from training.files import HERE


@dataclass
class Config:
    model: str = "tiny"  # "tiny", a folder, or Janus-Pro-1B / Janus-Pro-7B with random weights
    pictures: int = 64  # at a time
    repeats: int = 5  # of everything, taking turns; the median counts
    bandwidth: float = 4800  # GB/s of the GPU's memory, for the roofline (H200)


# --- what one would use instead -------------------------------------------------------------------


@torch.no_grad()
def by_transformers(policy, prompts, weight):
    ids, mask = generate.tokenize(policy, [generate.chat(policy, prompt) for prompt in prompts])
    return policy.model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        generation_mode="image",
        do_sample=True,
        guidance_scale=weight,
    )


@torch.no_grad()
def by_plain_loop(policy, prompts, weight):
    """T2I-R1's loop: conditional and unconditional rows, a cache and a mask that grow by a token a step."""
    ids, mask = generate.image_context(policy, prompts, [""] * len(prompts))
    ids, mask = torch.cat([ids, generate.without_prompt(policy, ids)]), mask.repeat(2, 1)
    x, cache, tokens = policy.body.get_input_embeddings()(ids), DynamicCache(), []
    for _ in range(policy.grid**2):
        out = policy.body(
            inputs_embeds=x, attention_mask=mask.long(), past_key_values=cache, use_cache=True
        )
        c, u = policy.model.model.generation_head(out.last_hidden_state[:, -1]).chunk(2)
        tokens.append(torch.multinomial((u + weight * (c - u)).softmax(-1), 1)[:, 0])
        x = policy.model.prepare_embeddings_for_image_generation(tokens[-1].repeat(2)[:, None])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(tokens, 1)


def ours(policy, prompts, weight):
    uniform = torch.rand(len(prompts), policy.grid**2, device=policy.device)
    ids, mask = generate.image_context(policy, prompts, [""] * len(prompts))
    with torch.no_grad():
        return generate.paint_tokens(policy, ids, mask, uniform, weight)


def step_by_step(policy, prompts, weight):
    """Ours, without the CUDA graph."""
    policy.cuda_graph = False
    try:
        return ours(policy, prompts, weight)
    finally:
        policy.cuda_graph = True


def plain_logprobs(policy, prompts, thoughts, thought_ids, image_ids):
    """Log-probabilities with the text head's logits over every position computed, too, and all hidden states kept."""
    parts, embed = [], policy.body.get_input_embeddings()
    for kind, ids in (("thought", thought_ids), ("image", image_ids)):
        context = (
            generate.thought_context(policy, prompts)
            if kind == "thought"
            else generate.image_context(policy, prompts, thoughts)
        )
        after = (
            embed(ids)
            if kind == "thought"
            else policy.model.prepare_embeddings_for_image_generation(ids)
        )
        mask = torch.cat([context[1], torch.ones_like(ids, dtype=torch.bool)], 1).long()
        out = policy.body(
            inputs_embeds=torch.cat([embed(context[0]), after], 1),
            attention_mask=mask,
            output_hidden_states=True,
        )
        words = policy.model.lm_head(
            out.last_hidden_state
        )  # over all positions, as a CausalLM does
        hidden = out.hidden_states[-1][:, -ids.shape[1] - 1 : -1]
        logits = (
            words[:, -ids.shape[1] - 1 : -1]
            if kind == "thought"
            else policy.model.model.generation_head(hidden)
        )
        parts.append(logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0])
    return torch.cat(parts, 1)


# --- a whole step ---------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, part):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part], self.last = now - self.last, now


def our_step(policy, reference, scorers, rows, jobs, cfg, optimizer):
    clock = Clock()
    rollouts = grpo.rollout(policy, rows, jobs, 0, cfg)
    clock("rollout and decoding to pixels")
    scores = rewards.score(scorers, rollouts.prompts, rollouts.images, [rows[i] for i, _ in jobs])
    clock("rewards")
    reference_NS = grpo.all_logprobs(reference, rollouts, cfg)
    clock("reference logprobs")
    advantages = grpo.group_advantages(sum(scores.values()), cfg.num_generations)
    grpo.update(policy, reference_NS, optimizer, rollouts, advantages, cfg)
    clock("logprobs and update")
    return clock.seconds


def plain_step(policy, reference, scorers, rows, jobs, cfg, optimizer):
    clock, prompts = Clock(), [rows[i]["prompt"] for i, _ in jobs]
    ids, mask = generate.thought_context(policy, prompts)
    with torch.no_grad():
        written = policy.model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_mode="text",
            do_sample=True,
            max_new_tokens=cfg.max_thought,
        )[:, ids.shape[1] :]
        thoughts = policy.tokenizer.batch_decode(written, skip_special_tokens=True)
        image_ids = by_plain_loop(policy, [f"{p}. {c}" for p, c in zip(prompts, thoughts)], 5.0)
        images = generate.to_images(policy, image_ids)
    clock("rollout and decoding to pixels")
    scores = sum(
        torch.cat(
            [scorer([p], [image], [rows[i]]) for p, image, (i, _) in zip(prompts, images, jobs)]
        )
        for scorer in scorers.values()
    )
    clock("rewards")
    with torch.no_grad():
        before = plain_logprobs(reference, prompts, thoughts, written, image_ids)
    clock("reference logprobs")
    advantages = grpo.group_advantages(scores, cfg.num_generations)
    logprobs = plain_logprobs(policy, prompts, thoughts, written, image_ids)
    everything = torch.ones_like(logprobs, dtype=torch.bool)
    optimizer.zero_grad()
    grpo.grpo_loss(
        logprobs, logprobs.detach(), before, advantages, everything, 0.01, 0.2, 0.2
    ).mean().backward()
    optimizer.step()
    clock("logprobs and update")
    return clock.seconds


# --- tables ---------------------------------------------------------------------------------------


def timed(function, policy, *args):
    start = time.perf_counter()
    with policy.arithmetic():
        function(policy, *args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(contenders, repeats):
    """name -> () -> value: each is warmed up once, then all take turns. Returns name -> list of values."""
    for function in contenders.values():
        function()
    rounds = [{name: function() for name, function in contenders.items()} for _ in range(repeats)]
    return {name: [values[name] for values in rounds] for name in contenders}


def sampling_table(policy, prompts, repeats, bandwidth):
    own, tokens, rows = generate.default_cfg(policy), len(prompts) * policy.grid**2, []
    contenders = {
        ("ours", own): ours,
        ("ours", 5.0): ours,
        ("transformers", 5.0): by_transformers,
        ("plain loop", 5.0): by_plain_loop,
    }
    if policy.device.type == "cuda":
        contenders["ours, step by step", 5.0] = step_by_step
    runs = take_turns(
        {
            key: lambda f=f, key=key: timed(f, policy, prompts, key[1])
            for key, f in contenders.items()
        },
        repeats,
    )
    slowest = statistics.median(runs["transformers", 5.0])
    for (name, weight), seconds in runs.items():
        middle = statistics.median(seconds)
        rows.append(
            {
                "sampling": f"{name}, guidance {weight:g}",
                "seconds": middle,
                "tokens/s": round(tokens / middle),
                "times transformers": slowest / middle,
            }
        )
        if policy.device.type == "cuda":
            rows[-1]["share of the roofline"] = (
                roofline(policy, len(prompts), weight, bandwidth) / middle
            )
    return rows


def roofline(policy, pictures, weight, bandwidth, context=60):
    """Seconds, if every step only had to read the weights and the cache once."""
    llama, T = policy.body.config, policy.grid**2
    weights = 2 * sum(
        p.numel()
        for n, p in policy.model.named_parameters()
        if "language_model.layers" in n or "generation" in n
    )
    kv = (
        4
        * llama.num_hidden_layers
        * llama.num_key_value_heads
        * (llama.hidden_size // llama.num_attention_heads)
    )
    rows = pictures * (1 if weight == 1 else 2)
    return T * (weights + rows * (context + T / 2) * kv) / (bandwidth * 1e9)


def step_table(cfg, repeats):
    flags = grpo.Config(rewards="hps,artifact", micro_batch=cfg.pictures)
    weights, _, rows, _ = harness.check(flags, 1)
    jobs = [(i, k) for i in range(cfg.pictures // 8) for k in range(8)]
    scorers = harness.load_rewards(weights, flags, "cpu")
    contenders = {}
    for name, step in (("ours", our_step), ("plain", plain_step)):
        policy, reference = (generate.load_policy("tiny") for _ in "pr")
        optimizer = torch.optim.AdamW(grpo.trainable(policy), lr=0.0)
        contenders[name] = lambda step=step, p=policy, r=reference, o=optimizer: step(
            p, r, scorers, rows, jobs, flags, o
        )
    runs = take_turns(contenders, repeats)
    middle = {
        name: {part: statistics.median(r[part] for r in values) for part in values[0]}
        for name, values in runs.items()
    }
    parts = [
        {
            "a GRPO step, seconds": part,
            "ours": middle["ours"][part],
            "plain": middle["plain"][part],
            "ratio": middle["plain"][part] / middle["ours"][part],
        }
        for part in middle["ours"]
    ]
    a, b = (sum(middle[name].values()) for name in ("ours", "plain"))
    return parts + [{"a GRPO step, seconds": "all", "ours": a, "plain": b, "ratio": b / a}]


def main(cfg):
    device, dtype = generate.pick_device("auto")
    if (
        cfg.model in scale.JANUS_PRO
    ):  # the real size with the tiny tokenizer: words do not matter for speed
        tiny = generate.load_policy("tiny")
        with torch.device(device):
            model = JanusForConditionalGeneration(scale.janus_config(cfg.model)).to(dtype).eval()
        policy = generate.Policy(model, tiny.processor, tiny.reasoning, dtype)
    else:
        policy = generate.load_policy(cfg.model, device, dtype)
    rows = generate.load_prompts(HERE / "tiny_world/prompts/train.jsonl")
    prompts = [row["prompt"] for row in (rows * (1 + cfg.pictures // len(rows)))[: cfg.pictures]]
    print(
        "\n".join(report.markdown(sampling_table(policy, prompts, cfg.repeats, cfg.bandwidth)))
        + "\n"
    )
    if cfg.model == "tiny":
        print("\n".join(report.markdown(step_table(cfg, cfg.repeats))))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
