"""How fast is it, compared with the usual way? All contenders take turns in one process.

Sampling, in image tokens per second:
    ours            generate.sample_image: attention reads only the filled part of the cache; weight
                    1 needs one branch. On a GPU also "step by step": without the CUDA graph
    transformers    JanusForConditionalGeneration.generate, which always computes two branches
    plain loop      T2I-R1's algorithm in our words: a cache and a mask that grow with every token

A GRPO step, in seconds: ours is grpo.rollout and grpo.train_step. The plain step uses `generate`
for thoughts, the plain loop for pictures, computes the text head at all positions, and scores one
picture at a time. Both sample with guidance 5, and score without (--guidance cond), as T2I-R1 does.

    roofline: each token reads all weights, keys and values once, in bytes / bandwidth seconds

Run:   python -m studies.bench                                      the tiny policy
       python -m studies.bench --model Janus-Pro-1B --pictures 64   random weights; needs a GPU

You should see:  after a minute two tables. The ratios matter; the seconds depend on the machine.

Read next: generate.py
"""

import copy
import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from transformers import DynamicCache, JanusForConditionalGeneration

import generate
import grpo
import rewards as reward_lib
from evaluation.tables import markdown
from training import checks, cuda_graph
from training.files import ROOT, usage_error
from training.log import Stopwatch
from training.memory_plan import JANUS_PRO, janus_config
from training.policy import Policy, load_policy, trainable
from training.processes import pick_device
from training.prompts import load_prompts

GUIDANCE = 5.0  # of Janus-Pro


@dataclass
class Config:
    model: str = "tiny"  # "tiny", a folder, or Janus-Pro-1B / Janus-Pro-7B with random weights
    pictures: int = 64  # at a time
    repeats: int = 5  # rounds; the tables show medians
    bandwidth: float = 4800  # GB/s of the GPU's memory, for the roofline (H200)


# --- sampling: (policy, prompts, guidance weight) -> image tokens (N, T) ------------------------


@torch.no_grad()
def ours(policy, prompts, cfg_weight):
    uniform = torch.rand(len(prompts), policy.grid**2, device=policy.device)
    ids, mask = generate.image_context(policy, prompts, [""] * len(prompts))
    return generate.sample_image(policy, ids, mask, uniform, cfg_weight)


def step_by_step(policy, prompts, cfg_weight):
    """Ours, without the CUDA graph."""
    policy.cuda_graph = False
    try:
        return ours(policy, prompts, cfg_weight)
    finally:
        policy.cuda_graph = True


def unrecorded(policy, prompts, cfg_weight):
    """The loop that the CUDA graph records, its kernels started one by one."""
    capture, cuda_graph.capture = cuda_graph.capture, lambda step: step
    try:
        return ours(policy, prompts, cfg_weight)
    finally:
        cuda_graph.capture = capture


@torch.no_grad()
def by_transformers(policy, prompts, cfg_weight):
    ids, mask = generate.tokenize(policy, [generate.chat(policy, prompt) for prompt in prompts])
    flags = {"generation_mode": "image", "do_sample": True, "guidance_scale": cfg_weight}
    return policy.model.generate(input_ids=ids, attention_mask=mask.long(), **flags)


@torch.no_grad()
def by_plain_loop(policy, prompts, cfg_weight):
    ids, mask = generate.image_context(policy, prompts, [""] * len(prompts))
    ids, mask = torch.cat([ids, generate.unconditional_ids(policy, ids)]), mask.repeat(2, 1)
    x, cache, tokens = policy.embed_text(ids), DynamicCache(), []
    for _ in range(policy.grid**2):
        out = policy.language_model(
            inputs_embeds=x, attention_mask=mask.long(), past_key_values=cache, use_cache=True
        )
        c, u = policy.model.model.generation_head(out.last_hidden_state[:, -1]).chunk(2)
        probs = (u + cfg_weight * (c - u)).softmax(-1)
        tokens.append(torch.multinomial(probs, 1)[:, 0])
        x = policy.model.prepare_embeddings_for_image_generation(tokens[-1].repeat(2)[:, None])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(tokens, 1)


# --- a whole step: returns seconds of its parts -------------------------------------------------

PARTS = {
    "rollout": "rollout and decoding to pixels",
    "score": "rewards and reference logprobs",
    "update": "logprobs and update",
}


def our_step(policy, reference, rewards, optimizer, rows, jobs, cfg):
    clock = Stopwatch()
    rollouts = grpo.rollout(policy, rows, jobs, 0, cfg)
    clock("rollout")
    grpo.train_step(policy, reference, rewards, optimizer, rollouts, rows, 0, cfg, clock)
    return clock.seconds


def plain_forward(policy, context, continuation):
    """(last hidden states (N, n, D), text logits (N, n, V)) that predict the n tokens of the
    continuation. Like a causal language model, it computes both for the whole sequence."""
    (ids, mask), n = context, continuation.shape[1]
    out = policy.language_model(
        inputs_embeds=torch.cat([policy.embed_text(ids), continuation], 1),
        attention_mask=torch.cat([mask, mask.new_ones(len(mask), n)], 1).long(),
        output_hidden_states=True,
    )
    text_logits = policy.model.lm_head(out.last_hidden_state)
    return out.hidden_states[-1][:, -n - 1 : -1], text_logits[:, -n - 1 : -1]


def plain_logprobs(policy, prompts, thoughts, thought_ids, image_ids):
    """The conditional branch's token log-probabilities, (N, C+T)."""
    thought = policy.embed_text(thought_ids)
    picture = policy.model.prepare_embeddings_for_image_generation(image_ids)
    _, words = plain_forward(policy, generate.thought_context(policy, prompts), thought)
    hidden, _ = plain_forward(policy, generate.image_context(policy, prompts, thoughts), picture)
    scored = [(words, thought_ids), (policy.model.model.generation_head(hidden), image_ids)]
    parts = [logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for logits, ids in scored]
    return torch.cat(parts, 1)


@torch.no_grad()
def plain_rollout(policy, prompts, cfg):
    """(thoughts, thought_ids, image_ids, images)"""
    ids, mask = generate.thought_context(policy, prompts)
    flags = {"generation_mode": "text", "do_sample": True, "max_new_tokens": cfg.max_thought}
    written = policy.model.generate(input_ids=ids, attention_mask=mask.long(), **flags)
    thought_ids = written[:, ids.shape[1] :]
    thoughts = policy.tokenizer.batch_decode(thought_ids, skip_special_tokens=True)
    texts = [f"{prompt}. {thought}" for prompt, thought in zip(prompts, thoughts)]
    image_ids = by_plain_loop(policy, texts, GUIDANCE)
    return thoughts, thought_ids, image_ids, generate.to_images(policy, image_ids)


def plain_step(policy, reference, rewards, optimizer, rows, jobs, cfg):
    clock, metadata = Stopwatch(), [rows[i] for i, _ in jobs]
    prompts = [row["prompt"] for row in metadata]
    *tokens, images = plain_rollout(policy, prompts, cfg)
    clock("rollout")
    pictures = list(zip(prompts, images, metadata))
    scores = [
        torch.cat([reward([p], [image], [row]) for p, image, row in pictures])
        for reward in rewards.train.values()
    ]
    with torch.no_grad():
        reference_NS = plain_logprobs(reference, prompts, *tokens)
    clock("score")
    advantages = grpo.group_advantages(sum(scores), cfg.num_generations)
    logprobs = plain_logprobs(policy, prompts, *tokens)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    old = logprobs.detach()
    loss = grpo.grpo_loss(logprobs, old, reference_NS, advantages, mask, 0.01, 0.2, 0.2)
    optimizer.zero_grad()
    loss.mean().backward()
    optimizer.step()
    clock("update")
    return clock.seconds


# --- tables -------------------------------------------------------------------------------------


def take_turns(contenders, repeats):
    """name -> function: a warm-up of each, then rounds in which each runs once. Returns name ->
    list of results."""
    for function in contenders.values():
        function()
    rounds = [{name: function() for name, function in contenders.items()} for _ in range(repeats)]
    return {name: [results[name] for results in rounds] for name in contenders}


def timed(sampler, policy, prompts, cfg_weight):
    start = time.perf_counter()
    with policy.autocast():
        sampler(policy, prompts, cfg_weight)
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def roofline(policy, pictures, cfg_weight, bandwidth, context=60):
    """Seconds if each token only had to read the weights and the cache once, in bfloat16."""
    llama, T = policy.language_model.config, policy.grid**2
    read = ("language_model.layers", "generation")
    named = policy.model.named_parameters()
    weights = 2 * sum(p.numel() for name, p in named if any(part in name for part in read))
    head_size = llama.hidden_size // llama.num_attention_heads
    kv_bytes = 4 * llama.num_hidden_layers * llama.num_key_value_heads * head_size  # of one token
    rows = pictures * (1 if cfg_weight == 1 else 2)
    return T * (weights + rows * (context + T / 2) * kv_bytes) / (bandwidth * 1e9)


def sampling_table(policy, prompts, repeats, bandwidth):
    on_gpu = policy.device.type == "cuda"
    contenders = {("ours", generate.default_cfg_weight(policy)): ours, ("ours", 5.0): ours}
    contenders |= {("transformers", 5.0): by_transformers, ("plain loop", 5.0): by_plain_loop}
    contenders |= {("ours, step by step", 5.0): step_by_step} if on_gpu else {}
    runs = {
        (name, weight): lambda f=sampler, w=weight: timed(f, policy, prompts, w)
        for (name, weight), sampler in contenders.items()
    }
    results = take_turns(runs, repeats)
    seconds = {contender: statistics.median(times) for contender, times in results.items()}
    rows = []
    for (name, weight), median in seconds.items():
        row = {"sampling": f"{name}, guidance {weight:g}", "seconds": median}
        row["tokens/s"] = round(len(prompts) * policy.grid**2 / median)
        row["times transformers"] = seconds["transformers", 5.0] / median
        if on_gpu:
            fastest = roofline(policy, len(prompts), weight, bandwidth)
            row["share of the roofline"] = fastest / median
        rows.append(row)
    if on_gpu:
        tokens = []
        for sampler in (ours, unrecorded):
            torch.manual_seed(0)
            with policy.autocast():
                tokens.append(sampler(policy, prompts, 5.0))
        same = (tokens[0] == tokens[1]).float().mean().item()
        print(f"the recorded loop draws the same token in {same:.2%} of the places\n")
    return rows


def step_table(pictures, repeats):
    # Learning rate 0: every round trains the same policy.
    cfg = grpo.Config(eval_rewards="", learning_rate=0.0, micro_batch=pictures, device="cpu")
    cfg.cfg_weight, cfg.guidance = GUIDANCE, "cond"
    checks.fill_presets(cfg)
    rows, G = load_prompts(cfg.prompts), cfg.num_generations
    jobs = [(i, k) for i in range(pictures // G) for k in range(G)]
    rewards = reward_lib.load_all(cfg, {"hps": 1.0, "artifact": 1.0}, [], rows)
    contenders = {}
    for name, step in (("ours", our_step), ("plain", plain_step)):
        policy, reference = grpo.load_policies(cfg)
        optimizer = torch.optim.AdamW(trainable(policy), lr=0.0)
        state = (policy, reference, rewards, optimizer, rows, jobs, cfg)
        contenders[name] = lambda step=step, state=state: step(*state)
    results, lines = take_turns(contenders, repeats), []
    for part, title in PARTS.items():
        seconds = {name: [s[f"seconds/{part}"] for s in results[name]] for name in contenders}
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        lines.append({"a GRPO step, seconds": title} | medians)
    sums = {name: sum(line[name] for line in lines) for name in contenders}
    lines.append({"a GRPO step, seconds": "all"} | sums)
    return [line | {"ratio": line["plain"] / line["ours"]} for line in lines]


def load(name):
    """The policy to measure. The sizes of Janus-Pro get random weights and the tiny tokenizer: what
    the tokens say does not matter for speed."""
    device, dtype = pick_device("auto")
    if name not in JANUS_PRO:
        return load_policy(name, device, dtype)
    with torch.device(device):
        model = JanusForConditionalGeneration(janus_config(name)).to(dtype).eval()
    model.model.generation_head.float()  # as in policy.py
    tiny = load_policy("tiny")
    model.generation_config = copy.deepcopy(tiny.model.generation_config)  # for `by_transformers`
    return Policy(model, tiny.processor, tiny.reasoning, dtype)


def main(cfg):
    G = grpo.Config.num_generations
    if cfg.pictures < G or cfg.repeats < 1:
        usage_error(f"--pictures must be {G} or more, a group; --repeats 1 or more")
    rows = load_prompts(ROOT / "tiny_world/prompts/train.jsonl")
    prompts = [rows[i % len(rows)]["prompt"] for i in range(cfg.pictures)]
    print(markdown(sampling_table(load(cfg.model), prompts, cfg.repeats, cfg.bandwidth)) + "\n")
    if cfg.model == "tiny":
        print(markdown(step_table(cfg.pictures, cfg.repeats)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
