"""Text to image with an autoregressive model: a picture is a sentence of 576 words.

Janus-Pro is a language model with two vocabularies. With the text head it writes words; with the
image head it writes *image tokens*, the numbers of little patches in a codebook, row by row, and a
VQ decoder turns the finished grid (24 x 24; 8 x 8 in the tiny world) into pixels. So a picture has a
probability, the product over its tokens, just like a sentence, and everything that reinforcement
learning knows about language models applies to it:

    p(picture | prompt) = prod_t softmax(u_t + w (c_t - u_t))[token_t]

where c and u are the image head's logits with and without the prompt and w is the weight of
classifier-free guidance (w = 1: none). Before it paints, the model may think: a "semantic chain of
thought" (T2I-R1, arXiv:2505.00703) written by the text head, then appended to the prompt.

Run:   python generate.py "a red circle left of a blue square"
       python generate.py --prompts tiny_world/prompts/test.jsonl --num-images 4
       python generate.py --model deepseek-community/Janus-Pro-1B "a corgi reading a newspaper"
       python generate.py --model Qwen/Qwen-Image --prompts prompts/train.jsonl --output-dir references

You should see:  the thought for each picture, and outputs/00000/samples/0000.png (GenEval's layout)
with a line a picture in outputs/manifest.jsonl.

Left out: image understanding (Janus' other half), beam search, top-k (it would make the sampled
distribution another one than the scored).   Read next: rewards.py
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from tqdm import tqdm
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.utils import logging as transformers_logging

from evaluation import layouts
from training.files import HERE, atomic, load_prompts, usage_error

transformers_logging.set_verbosity_error()  # it would announce each fallback from torchvision to Pillow
transformers_logging.disable_progress_bar()
# On a Hopper GPU torch 2.13 would take cuDNN's attention, whose gradient is now and then NaN under a mask
# (github.com/pytorch/pytorch/issues/196678) and which plans anew for every length; without a GPU this says nothing.
torch.backends.cuda.enable_cudnn_sdp(False)

# Shapes:  N rollouts   L context tokens (padded on the left)   C thought tokens   T image tokens
#          V vocabulary


# --- the policy -------------------------------------------------------------------------------


@dataclass
class Policy:
    """A Janus model with what is needed to speak to it."""

    model: JanusForConditionalGeneration
    processor: JanusProcessor
    reasoning: str  # the instruction that asks for a thought; {} is the prompt
    dtype: torch.dtype  # of the arithmetic; trained weights are float32
    cuda_graph: bool = True  # sampling on a GPU: record one step, replay it

    def __post_init__(self):
        self.tokenizer = self.processor.tokenizer
        self.boi = self.tokenizer.convert_tokens_to_ids(self.tokenizer.boi_token)
        self.body = (
            self.model.model.language_model
        )  # without the text head, which pictures never need
        self.grid = self.model.config.vq_config.num_patches  # pictures are grid x grid tokens

    @property
    def device(self):
        return next(self.model.parameters()).device

    def to(self, device):
        self.model.to(device)
        return self

    def inside(self, function, *args):
        """function(*args), as one forward pass of the whole model: where the weights are spread over processes
        (scale.py), they come together for it. Otherwise it is just a call."""
        return (
            self.model.inside(function, *args) if hasattr(self.model, "inside") else function(*args)
        )

    def save(self, folder, state=None):
        """A folder that load_policy, and JanusForConditionalGeneration.from_pretrained, open. state: whole weights, where
        the model itself has only shards."""
        self.model.save_pretrained(folder, state_dict=state)
        self.model.config.dtype = (
            torch.float32
        )  # it has noted the type of the first weight, which may be a frozen one's,
        self.model.config.save_pretrained(
            folder
        )  # and from_pretrained would round all others to it
        self.processor.save_pretrained(folder)
        (Path(folder) / "reasoning.txt").write_text(self.reasoning + "\n", encoding="utf-8")

    def arithmetic(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def load_policy(name_or_path="tiny", device="cpu", dtype=torch.float32, train_image_head=False):
    """Any Janus in the Hugging Face format: a folder, a hub name, or "tiny" for the one we ship.

    The weights are float32 whatever `dtype` is: at a learning rate of 1e-6 a bfloat16 weight never
    moves (its spacing is 1/256 of its size). As in T2I-R1, only the language model is trained; the
    eyes, the codebook, the VQ model and the image head stay as they are."""
    path = (
        HERE / "tiny_world" / "checkpoints" / "policy"
        if name_or_path == "tiny"
        else Path(name_or_path)
    )
    where = path if path.is_dir() else name_or_path
    if path.is_dir() and (path / "config.json").is_file():
        kind = json.loads((path / "config.json").read_text()).get("model_type")
        if kind != "janus":
            usage_error(
                f"--model {name_or_path}: holds a {kind!r} checkpoint; needed is 'janus' in the Hugging Face format, "
                "such as deepseek-community/Janus-Pro-1B (deepseek-ai's own are not)"
            )
    elif path.is_dir() or name_or_path.startswith((".", "/")):
        usage_error(
            f"--model {name_or_path}: no config.json there; needed is a folder saved by save_pretrained"
        )
    try:
        model = (
            JanusForConditionalGeneration.from_pretrained(where, dtype=torch.float32)
            .to(device)
            .eval()
        )
        processor = JanusProcessor.from_pretrained(where)
    except OSError as problem:
        usage_error(f"--model {name_or_path}: cannot be loaded ({str(problem).splitlines()[0]})")
    own = path / "reasoning.txt"  # a checkpoint may bring the instruction that it was trained with
    reasoning = (
        (own if own.is_file() else HERE / "prompts" / "reasoning.txt")
        .read_text(encoding="utf-8")
        .strip()
    )
    trained = ("model.language_model.", "lm_head.") + (
        ("model.generation_head.",) if train_image_head else ()
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return Policy(model, processor, reasoning, dtype)


def chat(policy, text):
    """One user turn in the checkpoint's own template, up to where the model begins to speak."""
    turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return policy.processor.apply_chat_template(turn, add_generation_prompt=True)


def thought_context(policy, prompts):
    """What the model reads before it thinks: ids and mask, (N, L)."""
    return tokenize(policy, [chat(policy, policy.reasoning.replace("{}", p)) for p in prompts])


def image_context(policy, prompts, thoughts):
    """What the model reads before it paints: "prompt. thought" and the begin-of-image token."""
    texts = [f"{p}. {c}" if c else p for p, c in zip(prompts, thoughts)]
    return tokenize(policy, [chat(policy, t) + policy.tokenizer.boi_token for t in texts])


def tokenize(policy, texts):
    # Padding goes on the LEFT, masked and without a position of its own. The released code pads on
    # the right and lets pads consume positions: there a picture depends on how long the thoughts of
    # its batch-mates are.
    batch = policy.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    return batch.input_ids.to(policy.device), batch.attention_mask.bool().to(policy.device)


def without_prompt(policy, ids):
    """The same contexts with every word blotted out by the pad token: what u is computed from.
    The mask stays that of the prompt, as in transformers' Janus (the released code unmasks padding)."""
    keep = (ids == policy.tokenizer.bos_token_id) | (ids == policy.boi)
    return ids.masked_fill(~keep, policy.tokenizer.pad_token_id)


def causal(mask_NL):
    """Who sees whom, (N, 1, L, L): each token the real ones up to itself. Padding sees itself,
    because a softmax over nothing is NaN."""
    L = mask_NL.shape[1]
    past = torch.ones(L, L, dtype=torch.bool, device=mask_NL.device).tril()
    itself = torch.eye(L, dtype=torch.bool, device=mask_NL.device)
    return ((past & mask_NL[:, None, :]) | itself)[:, None]


# --- sampling ---------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """N samples of the policy: what it thought, what it painted."""

    prompts: list  # N texts
    thoughts: list  # N texts, "" without chain of thought
    thought_ids: torch.Tensor  # (N, C) the sampled tokens, end-of-sentence included, then padding
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
        """The rollouts rows (a slice)."""
        return Rollouts(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def join(parts):
    """Rollouts that were made in several batches -> one batch; thoughts are filled up to the longest."""
    width = max(part.thought_ids.shape[1] for part in parts)
    joined = {}
    for name in Rollouts.__dataclass_fields__:
        values = [getattr(part, name) for part in parts]
        if name.startswith("thought_"):
            values = [
                torch.nn.functional.pad(value, (0, width - value.shape[1])) for value in values
            ]
        joined[name] = torch.cat(values) if isinstance(values[0], torch.Tensor) else sum(values, [])
    return Rollouts(**joined)


def noise(keys, length):
    """All the chance that a rollout has: (N, length) uniform numbers, drawn from its key alone (seed,
    step, prompt index, sample index). So a rollout can be made again, in any batch, on any number of
    processes, or after a crash."""
    return torch.stack([torch.rand(length, generator=generator(key)) for key in keys])


def generator(key):
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw_token(logits_NV, uniform_N):
    """Sample from softmax(logits) by inverting its cumulative distribution: (N,) token ids."""
    cumulative = logits_NV.float().softmax(-1).cumsum(-1)
    below = cumulative <= uniform_N[:, None] * cumulative[:, -1:]
    return below.sum(-1).clamp(max=logits_NV.shape[-1] - 1)


def guide(logits, cfg_weight):
    """Classifier-free guidance: rows [with prompt; without] -> u + w (c - u)."""
    if cfg_weight == 1:
        return logits
    c, u = logits.chunk(2)
    return u + cfg_weight * (c - u)


class Cache:
    """The keys and values of all that was read, so that a token is read once: two tensors (rows, heads, length, width) a
    layer, which stay where they are. `at`: where the next ones go, `end`: how far attention looks (a mask hides what is
    not there yet)."""

    def __init__(self, context, more, device):
        self.length, self.layers = context + more, {}
        self.at, self.end = torch.arange(context, device=device), context

    def update(self, keys, values, layer):
        """What transformers' attention calls: keep these, return those to look at."""
        if layer not in self.layers:  # zeros, because even a masked NaN is one
            self.layers[layer] = [
                x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in (keys, values)
            ]
        for kept, new in zip(self.layers[layer], (keys, values)):
            kept.index_copy_(2, self.at, new)
        return [kept[:, :, : self.end] for kept in self.layers[layer]]


def decode(policy, ids, mask, new_tokens, uniform, embed, head, eos=None):
    """The sampling loop of both heads: read the context once, then a token at a time with a key-value cache. embed: (N,) ids
    -> (rows, 1, D); head: (rows, D) -> (N, V). Returns (N, new_tokens), fewer columns if every row has met `eos`."""
    (rows, L), N, device = ids.shape, len(uniform), ids.device
    cache = Cache(L, new_tokens, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def read(x, allowed, position):
        """What comes after x: the last hidden states, (rows, D)."""
        # in policy.dtype, or the cache would be made for float32, and refuse what comes
        return policy.body(
            inputs_embeds=x.to(policy.dtype),
            attention_mask=allowed[..., : cache.end],
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    # All that a step reads and writes stays where it is in memory, the number of the step too: so one step is like
    # another, and can be recorded.
    t = torch.zeros(1, dtype=torch.long, device=device)  # tokens drawn so far, less one
    tokens = torch.full((N, new_tokens), policy.tokenizer.pad_token_id, device=device)
    ended = torch.zeros(N, dtype=torch.bool, device=device)
    position = positions[:, -1:].clone()
    allowed = torch.full(
        (rows, 1, 1, cache.length), -torch.inf, dtype=policy.dtype, device=device
    )  # added to the logits
    allowed[..., :L].masked_fill_(mask[:, None, None], 0.0)

    def choose(hidden):
        token = draw_token(head(hidden), uniform.index_select(1, t)[:, 0])
        if eos is not None:
            token = torch.where(ended, policy.tokenizer.pad_token_id, token)
            ended.logical_or_(token == eos)
        tokens.index_copy_(1, t, token[:, None])

    def step():
        """Feed the last token, draw the next."""
        x = embed(tokens.index_select(1, t)[:, 0])
        cache.at = t + L
        allowed.index_fill_(3, cache.at, 0.0)
        position.add_(1)
        t.add_(1)
        choose(read(x, allowed, position))

    # Attention looks no further than the stretch that is being drawn. On a GPU each stretch is recorded anew.
    stretch = 144 if device.type == "cuda" else 8
    choose(read(policy.body.get_input_embeddings()(ids), causal(mask), positions))
    for drawn in range(1, new_tokens):
        if eos is not None and ended.all():
            return tokens[:, :drawn]
        if (drawn - 1) % stretch == 0:
            cache.end, proceed = cache.end + stretch, step
        if (drawn - 1) % stretch == 2 and recordable(
            policy
        ):  # kernels for this length are loaded, autocast has its copies
            proceed = record(step)
        proceed()
    return tokens


def recordable(policy):
    """Sharded weights stay out: FSDP's hooks are Python, and a graph replays none."""
    return (
        policy.cuda_graph and policy.device.type == "cuda" and not hasattr(policy.model, "inside")
    )


def record(step):
    """step() as a CUDA graph: the kernels that it starts are written down, then started again by one call. For a
    token the GPU needs about a millisecond, Python 25 (a thousand kernels, one by one): it would wait for Python.
    One graph at a time, as all are captured with the same workspace; and while it lives no thread may leave an autocast
    of its own: torch would free the rounded weights that the graph reads."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # other threads may talk to the GPU meanwhile
            step()  # nothing is computed yet
    except torch.AcceleratorError as problem:
        usage_error(
            f"this GPU cannot record a step of sampling ({str(problem).splitlines()[0]}); --no-cuda-graph goes on "
            "without, more slowly"
        )
    return graph.replay


@torch.no_grad()  # not inference_mode: the token ids are used again in a forward pass with gradients
def sample(policy, prompts, keys, cot=True, cfg_weight=None, max_thought=64):
    """Sample one picture for each prompt.

    keys: N tuples of integers (seed, step, prompt index, sample index), all the randomness there is.
    cfg_weight: guidance weight, None = the checkpoint's own (5 for Janus-Pro, 1 for tiny).
    Temperature is 1 and nothing is cut off: what is sampled from is exactly what `logprobs` scores."""
    cfg_weight = default_cfg(policy) if cfg_weight is None else cfg_weight
    uniform = noise(keys, max_thought + policy.grid**2).to(policy.device)
    return policy.inside(paint, policy, prompts, uniform, cot, cfg_weight, max_thought)


def paint(policy, prompts, uniform, cot, cfg_weight, max_thought):
    """Think, then paint, from these random numbers."""
    with policy.arithmetic():
        if cot:
            ids, mask = thought_context(policy, prompts)
            embed = policy.body.get_input_embeddings()
            thought_ids = decode(
                policy,
                ids,
                mask,
                max_thought,
                uniform,
                lambda t: embed(t[:, None]),
                policy.model.lm_head,
                eos=policy.tokenizer.eos_token_id,
            )
        else:
            thought_ids = torch.zeros(len(prompts), 0, dtype=torch.long, device=policy.device)
        # Everything up to and including the first end-of-sentence was a choice; padding was not.
        ended = (thought_ids == policy.tokenizer.eos_token_id).long()
        thought_mask = ended.cumsum(1) - ended == 0
        thoughts = [
            policy.tokenizer.decode(row[chosen], skip_special_tokens=True).strip()
            for row, chosen in zip(thought_ids, thought_mask)
        ]

        ids, mask = image_context(policy, prompts, thoughts)
        image_ids = paint_tokens(policy, ids, mask, uniform[:, max_thought:], cfg_weight)
        images = to_images(policy, image_ids)
    return Rollouts(list(prompts), thoughts, thought_ids, thought_mask, image_ids, images)


def paint_tokens(policy, ids, mask, uniform, cfg_weight):
    """The image tokens after these contexts, (N, T). Guided, the rows without a prompt run beside those with one."""
    branches = 1 if cfg_weight == 1 else 2
    if branches == 2:
        ids, mask = torch.cat([ids, without_prompt(policy, ids)]), mask.repeat(2, 1)

    def embed(token):
        return policy.model.prepare_embeddings_for_image_generation(token[:, None]).repeat(
            branches, 1, 1
        )

    def head(hidden):
        return guide(policy.model.model.generation_head(hidden).float(), cfg_weight)

    return decode(policy, ids, mask, policy.grid**2, uniform, embed, head)


def default_cfg(policy):
    weight = policy.model.generation_config.guidance_scale
    return 5.0 if weight is None else weight  # 5: Janus' own default


def to_images(policy, image_ids, chunk=16):
    """(N, T) image tokens -> N PIL images. The VQ decoder speaks [-1, 1]; rounding, not truncating.

    Always `chunk` at a time, the last one filled up: convolution kernels are chosen by batch size and
    differ in the seventh digit, which now and then rounds a pixel the other way."""
    images = []
    for ids in image_ids.split(chunk):
        filled = torch.nn.functional.pad(ids, (0, 0, 0, chunk - len(ids)))
        pixels = policy.model.model.vqmodel.decode(filled)[: len(ids)].float()
        pixels = (
            ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        )
        images += [Image.fromarray(p) for p in pixels]
    return images


# --- scoring: the log-probability of what was sampled -------------------------------------------


def logprobs(policy, rollouts, cfg_weight=1.0):
    """log pi(token | what came before), of exactly the tokens of these rollouts, differentiable.

    Returns (N, C+T) float32: the thought's tokens, then the image's; meaningful where rollouts.mask.
    cfg_weight is that of the distribution to score: the sampler's own for on-policy learning; 1 for
    the conditional branch alone, as T2I-R1 released it (see grpo.py, --guidance)."""
    return policy.inside(score, policy, rollouts, cfg_weight)


def score(policy, rollouts, cfg_weight):
    parts = []
    with policy.arithmetic():
        C = rollouts.thought_ids.shape[1]
        if C:
            ids, mask = thought_context(policy, rollouts.prompts)
            embed = policy.body.get_input_embeddings()
            hidden = teach(
                policy, embed(ids), mask, embed(rollouts.thought_ids), rollouts.thought_mask
            )
            parts.append(pick(policy.model.lm_head(hidden), rollouts.thought_ids))
        ids, mask = image_context(policy, rollouts.prompts, rollouts.thoughts)
        painted = policy.model.prepare_embeddings_for_image_generation(rollouts.image_ids)
        if cfg_weight != 1:
            ids, mask = torch.cat([ids, without_prompt(policy, ids)]), mask.repeat(2, 1)
            painted = painted.repeat(2, 1, 1)
        hidden = teach(policy, policy.body.get_input_embeddings()(ids), mask, painted)
        logits = policy.model.model.generation_head(hidden).float()
        parts.append(pick(guide(logits, cfg_weight), rollouts.image_ids))
    return torch.cat(parts, 1)


def teach(policy, context, mask, continuation, continuation_mask=None):
    """Teacher forcing: hidden states (N, n, D) from which each of the n continuation tokens was drawn.
    The last token predicts nothing, so it is not fed."""
    n = continuation.shape[1]
    x = torch.cat([context, continuation[:, :-1]], 1)
    if continuation_mask is None:
        continuation_mask = torch.ones(continuation.shape[:2], dtype=torch.bool, device=x.device)
    mask = torch.cat([mask, continuation_mask[:, :-1]], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = policy.body(
        inputs_embeds=x.to(policy.dtype),
        attention_mask=causal(mask),
        position_ids=position,
        use_cache=False,
    )
    return out.last_hidden_state[:, -n:]


def pick(logits_NTV, ids_NT):
    """log_softmax at the chosen tokens, in float32: bfloat16 has steps of 1/128 near 1."""
    logits = logits_NTV.float()
    return logits.gather(-1, ids_NT[..., None])[..., 0] - logits.logsumexp(-1)


# --- command line -----------------------------------------------------------------------------


@dataclass
class Config:
    prompt: Annotated[str, tyro.conf.Positional] = ""  # what to paint; or give --prompts
    prompts: str = ""  # a prompt file: JSONL, JSON, text, TSV/CSV or a folder of texts
    model: str = (
        "tiny"  # "tiny", a folder or hub name (a Janus, or a pipeline of diffusers), or drawn-plain
    )
    num_images: int = 4  # pictures for each prompt
    output_dir: str = "outputs"  # pictures go to <output-dir>/00000/samples/0000.png
    seed: int = 42  # with the prompt's place and the picture's number, all the randomness there is
    cot: bool = True  # think before painting
    cfg_weight: float | None = None  # guidance w; default: the checkpoint's own
    max_thought: int = 64  # longest thought, in tokens
    batch_size: int = 32  # pictures at a time
    cuda_graph: bool = (
        True  # on a GPU: record the kernels of one token and replay them, several times as fast
    )
    limit: int = 0  # only the first prompts; 0 = all
    layout: Literal["geneval", "t2i-compbench", "wise", "dpg", "hpdv2"] = (
        "geneval"  # also export for this scorer
    )
    overwrite: bool = False  # make pictures again that are there already
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the arithmetic; auto: bfloat16 on cuda
    )


def pick_device(device, dtype="auto"):
    """("auto", "auto") -> the best there is: (device name, torch dtype)."""
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, getattr(torch, dtype)


def main(cfg):
    from tiny_world import draw as painters  # uphill, for once: it needs all of the above

    if bool(cfg.prompt) == bool(cfg.prompts):
        usage_error('give one prompt, python generate.py "a red circle", or a file, --prompts FILE')
    if cfg.num_images < 1 or cfg.batch_size < 1:
        usage_error(
            f"--num-images {cfg.num_images} --batch-size {cfg.batch_size}: both must be at least 1"
        )
    rows = (
        load_prompts(cfg.prompts) if cfg.prompts else [{"id": "0", "prompt": cfg.prompt, "tag": ""}]
    )
    rows = rows[: cfg.limit or None]
    paint_all, weight = painters.painter(cfg)
    root = Path(cfg.output_dir)
    manifest, entries = root / "manifest.jsonl", {}
    if manifest.exists():
        entries = {
            entry["path"]: entry for entry in map(json.loads, manifest.read_text().splitlines())
        }

    todo, replaced = [], 0
    for i, row in enumerate(rows):
        with atomic(root / f"{i:05d}" / "metadata.jsonl") as file:
            file.write(json.dumps(row))
        for k in range(cfg.num_images):
            # Names come from numbers, never from prompts: a prompt may hold "/" or have 300 letters.
            entry = {
                "path": f"{i:05d}/samples/{k:04d}.png",
                "id": row["id"],
                "prompt": row["prompt"],
                "sample": k,
                "seed": cfg.seed,
                "model": cfg.model,
                "cfg_weight": weight,
                "cot": cfg.cot,
            }
            known = entries.get(entry["path"], {})
            made = (
                root / entry["path"]
            ).exists() and entry.items() <= known.items()  # by these very settings
            if cfg.overwrite or not made:
                todo.append((i, k, entry))
                replaced += bool(known)
    if replaced:
        print(
            f"{replaced} pictures in {root}/ were made for other prompts or with other settings; they are replaced"
        )

    for start in tqdm(
        range(0, len(todo), cfg.batch_size), desc="painting", disable=len(todo) <= cfg.batch_size
    ):
        batch = todo[start : start + cfg.batch_size]
        prompts, keys = (
            [rows[i]["prompt"] for i, _, _ in batch],
            [(cfg.seed, 0, i, k) for i, k, _ in batch],
        )
        for (_, _, entry), image, thought in zip(batch, *paint_all(prompts, keys)):
            with atomic(root / entry["path"], "wb") as file:
                image.save(file, "PNG")
            digest = hashlib.sha256((root / entry["path"]).read_bytes()).hexdigest()
            entries[entry["path"]] = entry | {"thought": thought, "sha256": digest}
            if len(todo) <= 8:
                print(f"{root / entry['path']}  {thought}")
        with atomic(manifest) as file:  # whole after each batch, so that a stopped run can go on
            file.writelines(json.dumps(entries[path]) + "\n" for path in sorted(entries))
    print(
        f"{len(todo)} pictures made, {len(rows) * cfg.num_images - len(todo)} were there already, in {root}/"
    )
    if cfg.layout != "geneval":
        out = Path(f"{root}-{cfg.layout}")
        made = layouts.export(root, cfg.layout, out, Path(cfg.prompts).stem)
        print(f"the same as {made} files for the official scorer, in {out}/")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
