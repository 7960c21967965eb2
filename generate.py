"""Text to image with an autoregressive model: a picture is a sentence of 576 tokens.

Janus-Pro is a language model with two output heads. The text head writes words. The image head
writes *image tokens*: each is the number of a small patch in a codebook. They are written row by
row, and a VQ decoder turns the finished grid (24 x 24; 8 x 8 in the tiny world) into pixels. So a
picture has a probability, the product over its tokens, just like a sentence, and reinforcement
learning for language models applies to it:

    p(picture | prompt) = prod_t softmax(u_t + w (c_t - u_t))[token_t]

c and u are the image head's logits with and without the prompt; w is the weight of classifier-free
guidance (w = 1: none). Before it draws, the model may write a "semantic chain of thought" (T2I-R1,
arXiv:2505.00703) with the text head. The thought is then appended to the prompt.

Run:   python generate.py "a red circle left of a blue square"
       python generate.py --prompts tiny_world/prompts/test.jsonl --num-images 4
       python generate.py --model deepseek-community/Janus-Pro-1B "a corgi reading a newspaper"
       python generate.py --model Qwen/Qwen-Image --prompts FILE --output-dir FOLDER

You should see:  the thoughts of up to eight pictures, and outputs/00000/samples/0000.png (GenEval's
layout) with one line for each picture, its thought included, in outputs/manifest.jsonl.

Left out: image understanding (Janus' other half), top-k (samples and log-probabilities would
then be of different distributions).   Read next: rewards.py
"""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image

from evaluation.exports import PICTURES, check_layout, export
from training import cuda_graph
from training.files import fingerprint, usage_error
from training.pictures import write_pictures
from training.pipelines import pipeline_sampler
from training.policy import as_letters, load_policy
from training.processes import pick_device
from training.prompts import load_prompts
from training.run_folder import checkpoint_folder
from training.sharding import cast_frozen_weights

# Shapes:  N rollouts   L context tokens (padded on the left)   C thought tokens   T image tokens
#          S = C + T   D hidden size   V vocabulary

# --- contexts: what the model reads before it writes --------------------------------------------


def chat(policy, text):
    """One user turn in the checkpoint's own template, up to where the model begins to write."""
    turn = [{"role": "user", "content": [{"type": "text", "text": as_letters(policy, text)}]}]
    return policy.processor.apply_chat_template(turn, add_generation_prompt=True)


def tokenize(policy, texts):
    """Token ids and mask, (N, L) each."""
    # Padding goes on the LEFT, masked and without a position of its own. The released code pads on
    # the right and lets padding consume positions: there a picture depends on how long the thoughts
    # of the other rollouts in its batch are.
    batch = policy.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    return batch.input_ids.to(policy.device), batch.attention_mask.bool().to(policy.device)


def thought_context(policy, prompts):
    """Context of the thought: ids and mask, (N, L)."""
    return tokenize(policy, [chat(policy, policy.reasoning.replace("{}", p)) for p in prompts])


def image_context(policy, prompts, thoughts):
    """Context of the picture: "prompt. thought" and the begin-of-image token; ids, mask (N, L)."""
    texts = [f"{p}. {thought}" if thought else p for p, thought in zip(prompts, thoughts)]
    return tokenize(policy, [chat(policy, t) + policy.tokenizer.boi_token for t in texts])


def unconditional_ids(policy, ids):
    """The same contexts with every word replaced by the pad token: u is computed from these. The
    mask stays that of the prompt, as in transformers' Janus (the released code unmasks padding)."""
    keep = (ids == policy.tokenizer.bos_token_id) | (ids == policy.boi)
    return ids.masked_fill(~keep, policy.tokenizer.pad_token_id)


def add_unconditional(policy, ids, mask, cfg_weight):
    """With guidance: N rows with the prompt, then N without it. Without guidance: unchanged."""
    if cfg_weight == 1:
        return ids, mask
    return torch.cat([ids, unconditional_ids(policy, ids)]), mask.repeat(2, 1)


def apply_cfg(logits, cfg_weight):
    """Classifier-free guidance: rows [with prompt; without] (2N, ..., V) -> u + w (c - u)."""
    if cfg_weight == 1:
        return logits
    c, u = logits.chunk(2)
    return u + cfg_weight * (c - u)


def image_logits(policy, hidden, cfg_weight):
    """Hidden states -> guided logits of image tokens, float32. Nothing is rounded to bfloat16 from
    here on: guidance would multiply the rounding by w. (Measured on the tiny policy with w = 5: two
    whose weights differ by 1e-6 seem .07 nats apart; with this head in bfloat16, .12.)"""
    with torch.autocast(policy.device.type, enabled=False):
        return apply_cfg(policy.model.model.generation_head(hidden.float()), cfg_weight)


def default_cfg_weight(policy):
    weight = policy.model.generation_config.guidance_scale
    return 5.0 if weight is None else weight  # 5: Janus' own default


def causal_mask(mask_NL):
    """(N, 1, L, L) bool: each token attends to the real tokens up to itself, and padding to itself
    (a softmax over nothing is NaN)."""
    L = mask_NL.shape[1]
    past = torch.ones(L, L, dtype=torch.bool, device=mask_NL.device).tril()
    itself = torch.eye(L, dtype=torch.bool, device=mask_NL.device)
    return ((past & mask_NL[:, None, :]) | itself)[:, None]


# --- sampling -----------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """N samples of the policy: thoughts and pictures."""

    keys: list  # N tuples (seed, step, prompt index, sample index)
    prompts: list  # N texts
    thoughts: list  # N texts, "" without chain of thought
    thought_ids: torch.Tensor  # (N, C) the sampled tokens, end of sentence included, then padding
    thought_mask: torch.Tensor  # (N, C) bool, True where a token was sampled
    image_ids: torch.Tensor  # (N, T)
    images: list  # N PIL images

    @property
    def mask(self):
        """(N, C+T) bool: which columns of `logprobs` are actions of the policy."""
        return torch.cat([self.thought_mask, torch.ones_like(self.image_ids, dtype=torch.bool)], 1)

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, rows):
        """The rollouts `rows`, a slice."""
        return Rollouts(*(getattr(self, field.name)[rows] for field in fields(self)))


def join(parts):
    """Rollouts of several batches -> one batch; thoughts are padded to the longest."""
    width = max(part.thought_ids.shape[1] for part in parts)
    joined = {}
    for field in fields(Rollouts):
        values = [getattr(part, field.name) for part in parts]
        if field.name.startswith("thought_"):
            values = [torch.nn.functional.pad(v, (0, width - v.shape[1])) for v in values]
        is_tensor = isinstance(values[0], torch.Tensor)
        joined[field.name] = torch.cat(values) if is_tensor else sum(values, [])
    return Rollouts(**joined)


def seeded_generator(key):
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def uniform_numbers(keys, length):
    """All the randomness of a rollout: (N, length) numbers in [0, 1), drawn from its key (seed,
    step, prompt index, sample index) alone. So a rollout can be repeated: in any batch, on any
    number of processes, after a crash."""
    return torch.stack([torch.rand(length, generator=seeded_generator(key)) for key in keys])


def sample_inverse_cdf(logits_NV, uniform_N):
    """Sample from softmax(logits) by inverting its cumulative distribution: (N,) token ids."""
    cumulative = logits_NV.float().softmax(-1).cumsum(-1)
    below = cumulative <= uniform_N[:, None] * cumulative[:, -1:]
    return below.sum(-1).clamp(max=logits_NV.shape[-1] - 1)


class KeyValueCache:
    """Keys and values of all tokens read so far, so that each token is read once. For each layer
    two tensors (rows, heads, length, width) that keep their place in memory."""

    def __init__(self, context, new_tokens, device):
        self.length, self.layers = context + new_tokens, {}
        self.at = torch.arange(context, device=device)  # where the next keys and values go
        self.end = context  # attention reads up to here; a mask hides what is not filled yet

    def update(self, keys, values, layer):
        """Called by transformers' attention: keep these, return all that it may attend to."""
        if layer not in self.layers:  # zeros, because even a masked NaN gives NaN
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self.layers[layer] = [keys.new_zeros(shape), values.new_zeros(shape)]
        for kept, new in zip(self.layers[layer], (keys, values)):
            kept.index_copy_(2, self.at, new)
        return [kept[:, :, : self.end] for kept in self.layers[layer]]


def forward(policy, x, attention_mask, positions, cache=None):
    """Embeddings (rows, n, D) -> the language model's last hidden states (rows, n, D)."""
    out = policy.language_model(
        inputs_embeds=x.to(policy.dtype),  # or the cache would be made for float32
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return out.last_hidden_state


def sample_tokens(policy, ids, mask, uniform, embed, head, eos=None):
    """The sampling loop of both heads: read the context once, then one token at a time.

    ids, mask: (rows, L). uniform: (N, n), a number for each new token. embed: (N,) ids ->
    (rows, 1, D); head: (rows, D) -> logits (N, V). Returns (N, n) ids; fewer columns if all rows
    end earlier, by `eos`."""
    (rows, L), (N, n), device = ids.shape, uniform.shape, ids.device
    pad = policy.tokenizer.pad_token_id
    cache = KeyValueCache(L, n, device)
    read = lambda x, visible, position: forward(policy, x, visible, position, cache)[:, -1]

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = read(policy.embed_text(ids), causal_mask(mask), positions)
    position = positions[:, -1:]
    visible = torch.full((rows, 1, 1, L + n), -torch.inf, dtype=policy.dtype, device=device)
    visible[..., :L].masked_fill_(mask[:, None, None], 0.0)  # added to attention's logits
    ended = torch.zeros(N, dtype=torch.bool, device=device)
    if cuda_graph.is_usable(policy):  # the same loop, recorded
        choose = lambda hidden, u: sample_inverse_cdf(head(hidden), u)
        return cuda_graph.sample_tokens(
            read, embed, choose, hidden, position, visible, ended, cache, uniform, pad, eos
        )

    tokens = []
    for t in range(n):
        token = sample_inverse_cdf(head(hidden), uniform[:, t])
        if eos is not None:
            token = torch.where(ended, pad, token)
            ended |= token == eos
        tokens.append(token)
        if t == n - 1 or (eos is not None and ended.all()):
            break
        cache.at = torch.tensor([L + t], device=device)
        cache.end = L + 8 * (t // 8 + 1)  # in steps of 8: few different shapes
        visible[..., L + t] = 0.0
        hidden = read(embed(token), visible[..., : cache.end], position + t + 1)
    return torch.stack(tokens, 1)


@torch.no_grad()  # not inference_mode: the token ids are used again in a pass with gradients
def sample(policy, prompts, keys, cot=True, cfg_weight=None, max_thought=64):
    """Sample one thought and one picture for each prompt: Rollouts.

    keys: N tuples of integers (seed, step, prompt index, sample index), all the randomness.
    cfg_weight: guidance weight, None = the checkpoint's own (5 for Janus-Pro, 1 for tiny).
    Temperature is 1 and nothing is cut off: `logprobs` is of exactly this distribution."""
    cfg_weight = default_cfg_weight(policy) if cfg_weight is None else cfg_weight
    uniform = uniform_numbers(keys, max_thought + policy.grid**2).to(policy.device)
    arguments = (policy, keys, prompts, uniform, cot, cfg_weight, max_thought)
    return policy.run_in_root_forward(think_and_draw, *arguments)


def think_and_draw(policy, keys, prompts, uniform, cot, cfg_weight, max_thought):
    eos = policy.tokenizer.eos_token_id
    with policy.autocast():
        thought_ids = torch.zeros(len(prompts), 0, dtype=torch.long, device=policy.device)
        if cot:
            ids, mask = thought_context(policy, prompts)
            embed = lambda token: policy.embed_text(token[:, None])
            u = uniform[:, :max_thought]
            thought_ids = sample_tokens(policy, ids, mask, u, embed, policy.model.lm_head, eos)
        # Everything up to and including the first end of sentence was sampled; padding was not.
        ended = (thought_ids == eos).long()
        thought_mask = ended.cumsum(1) - ended == 0
        thoughts = [
            policy.tokenizer.decode(row[sampled], skip_special_tokens=True).strip()
            for row, sampled in zip(thought_ids, thought_mask)
        ]
        ids, mask = image_context(policy, prompts, thoughts)
        image_ids = sample_image(policy, ids, mask, uniform[:, max_thought:], cfg_weight)
        images = to_images(policy, image_ids)
    tensors = (thought_ids, thought_mask, image_ids)
    return Rollouts(list(keys), list(prompts), thoughts, *tensors, images)


def sample_image(policy, ids, mask, uniform, cfg_weight):
    """The image tokens after these contexts, (N, T). With guidance the rows without a prompt are
    sampled beside those with one; both read the same tokens."""
    ids, mask = add_unconditional(policy, ids, mask, cfg_weight)
    branches = len(ids) // len(uniform)

    def embed(token):
        x = policy.model.prepare_embeddings_for_image_generation(token[:, None])
        return x.repeat(branches, 1, 1)

    head = lambda hidden: image_logits(policy, hidden, cfg_weight)
    return sample_tokens(policy, ids, mask, uniform, embed, head)


def to_images(policy, image_ids, chunk=16):
    """(N, T) image tokens -> N PIL images. The VQ decoder gives [-1, 1]; rounded, not truncated.

    Always `chunk` at a time, the last chunk filled up: convolution kernels are chosen by batch size
    and differ in the seventh digit, which sometimes rounds a pixel the other way."""
    images = []
    for ids in image_ids.split(chunk):
        filled = torch.nn.functional.pad(ids, (0, 0, 0, chunk - len(ids)))
        with torch.autocast(policy.device.type, enabled=False):  # in float32
            pixels = policy.model.model.vqmodel.decode(filled)[: len(ids)]
        pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        images += [Image.fromarray(picture) for picture in pixels.cpu().numpy()]
    return images


# --- log-probabilities of what was sampled ------------------------------------------------------


def gather_logprobs(logits_NTV, ids_NT):
    """log_softmax at the chosen tokens, in float32: bfloat16 has steps of 1/128 near 1."""
    logits = logits_NTV.float()
    return logits.gather(-1, ids_NT[..., None])[..., 0] - logits.logsumexp(-1)


def entropies(logits_NTV, ids_NT):
    """Entropy of each token's distribution, nats; which token was sampled does not matter."""
    return torch.special.entr(logits_NTV.float().softmax(-1)).sum(-1)


def with_entropies(logits_NTV, ids_NT):
    """Log-probabilities and entropies, (N, T, 2)."""
    return torch.stack([gather_logprobs(logits_NTV, ids_NT), entropies(logits_NTV, ids_NT)], -1)


def teacher_forced_hidden(policy, context, mask, continuation, continuation_mask=None):
    """Teacher forcing: feed all n tokens of the continuation at once. Returns the hidden states
    (N, n, D) from which each of them was sampled; the last token is not fed."""
    n = continuation.shape[1]
    x = torch.cat([context, continuation[:, :-1]], 1)
    if continuation_mask is None:
        continuation_mask = torch.ones(continuation.shape[:2], dtype=torch.bool, device=x.device)
    mask = torch.cat([mask, continuation_mask[:, :-1]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return forward(policy, x, causal_mask(mask), positions)[:, -n:]


def logprobs(policy, rollouts, cfg_weight, read=gather_logprobs):
    """log pi(token | what came before) of exactly the tokens of these rollouts, differentiable.

    Returns (N, C+T) float32: the thought's tokens, then the picture's; 0 where not rollouts.mask.
    cfg_weight is that of the distribution: the sampler's own for on-policy learning; 1 for
    the conditional branch alone, as T2I-R1 released it (see grpo.py, --guidance). read: what is
    wanted of each token's logits; `entropies` for something else than log-probabilities."""
    return policy.run_in_root_forward(token_logprobs, policy, rollouts, cfg_weight, read)


def token_logprobs(policy, rollouts, cfg_weight, read):
    parts, thought_ids = [], rollouts.thought_ids
    with policy.autocast():
        if thought_ids.shape[1]:  # thoughts are never guided
            ids, mask = thought_context(policy, rollouts.prompts)
            context, thought = policy.embed_text(ids), policy.embed_text(thought_ids)
            hidden = teacher_forced_hidden(policy, context, mask, thought, rollouts.thought_mask)
            parts.append(read(policy.model.lm_head(hidden), thought_ids))
        ids, mask = image_context(policy, rollouts.prompts, rollouts.thoughts)
        ids, mask = add_unconditional(policy, ids, mask, cfg_weight)
        picture = policy.model.prepare_embeddings_for_image_generation(rollouts.image_ids)
        picture = picture.repeat(len(ids) // len(rollouts), 1, 1)
        hidden = teacher_forced_hidden(policy, policy.embed_text(ids), mask, picture)
        logits = image_logits(policy, hidden, cfg_weight)
        parts.append(read(logits, rollouts.image_ids))
    found, mask = torch.cat(parts, 1), rollouts.mask  # exp of padding could be infinite
    return torch.where(mask if found.ndim == 2 else mask[..., None], found, 0.0)


# --- command line -------------------------------------------------------------------------------


def policy_sampler(cfg, device, dtype):
    """sample_batch of a Janus, (prompts, keys) -> (images, thoughts), and its guidance weight."""
    policy = load_policy(cfg.model, "cpu", dtype)
    policy.model.requires_grad_(False)  # nothing is trained, so all matrices may be cast
    cast_frozen_weights(policy).model.to(device)
    policy.cuda_graph = cfg.cuda_graph
    weight = default_cfg_weight(policy) if cfg.cfg_weight is None else cfg.cfg_weight
    cfg.max_thought = cfg.max_thought or (64 if policy.grid == 8 else 128)

    def sample_batch(prompts, keys):
        rollouts = sample(policy, prompts, keys, cfg.cot, weight, cfg.max_thought)
        return rollouts.images, rollouts.thoughts

    return sample_batch, weight


@dataclass
class Config:
    prompt: Annotated[str, tyro.conf.Positional] = ""  # what to draw; or give --prompts
    prompts: str = ""  # a prompt file: JSONL, JSON, text, TSV/CSV or a folder of texts
    model: str = "tiny"  # "tiny", or a folder or hub name of a Janus or of a diffusers pipeline
    num_images: int | None = None  # for each prompt [4; t2i-compbench: 10; wise, hpdv2: 1]
    output_dir: str = "outputs"  # pictures go to <output-dir>/00000/samples/0000.png
    seed: int = 42  # with the number of the prompt and of the picture, all the randomness
    cot: bool = True  # write a thought before drawing
    cfg_weight: float | None = None  # guidance weight w [the checkpoint's own]
    max_thought: int | None = None  # longest thought, in tokens [tiny: 64; else 128]
    batch_size: int | None = None  # pictures at a time [Janus: 32; a diffusers pipeline: 1]
    cuda_graph: bool = True  # on a GPU: record the step of one token and replay it
    limit: int = 0  # only the first prompts; 0 = all
    # geneval: as it is; else also export for this official scorer
    layout: Literal["geneval", "t2i-compbench", "wise", "dpg", "hpdv2"] = "geneval"
    overwrite: bool = False  # draw again what is there already
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic [cuda: bfloat16]


def main(cfg):
    if bool(cfg.prompt.strip()) == bool(cfg.prompts):
        usage_error('give one prompt, python generate.py "a red circle", or --prompts FILE')
    num_images = PICTURES[cfg.layout] if cfg.num_images is None else cfg.num_images
    batch_size = 1 if cfg.batch_size is None else cfg.batch_size
    if min(num_images, batch_size, 1 if cfg.max_thought is None else cfg.max_thought) < 1:
        usage_error("--num-images, --batch-size and --max-thought must be 1 or more")
    if cfg.limit < 0 or not 0 <= (cfg.cfg_weight or 0) < float("inf"):
        usage_error(f"--limit {cfg.limit}, --cfg-weight {cfg.cfg_weight}: must be 0 or greater")
    rows = [{"id": "0", "prompt": cfg.prompt, "tag": ""}]
    rows = (load_prompts(cfg.prompts) if cfg.prompts else rows)[: cfg.limit or None]
    check_layout(rows, cfg.layout, num_images)
    device, dtype = pick_device(cfg.device, cfg.dtype)
    weight, sample_batch = cfg.cfg_weight, None
    if cfg.model != "tiny":
        sample_batch = pipeline_sampler(cfg.model, device, dtype, weight, seeded_generator)
    if sample_batch is None:
        sample_batch, weight = policy_sampler(cfg, device, dtype)
        batch_size = cfg.batch_size or 32
    settings = {"seed": cfg.seed, "model": cfg.model, "cfg_weight": weight, "cot": cfg.cot}
    weights = fingerprint(checkpoint_folder(cfg.model))  # a folder may hold others today
    settings |= {"max_thought": cfg.max_thought, "dtype": str(dtype), "weights": weights}
    write_pictures(
        rows, sample_batch, settings, cfg.output_dir, num_images, batch_size, cfg.overwrite
    )
    if cfg.layout != "geneval":
        out = f"{Path(cfg.output_dir).resolve()}-{cfg.layout}"
        made = export(cfg.output_dir, cfg.layout, out, Path(cfg.prompts).stem)
        print(f"the same as {made} files for the official scorer, in {out}/")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
