"""Trains the tiny policy: a VQ autoencoder, then a Llama, in the format of Janus.

The VQ autoencoder turns a picture into 8 x 8 codes, each for a patch of 4 x 4 pixels, and back. The
language model learns a thought for a prompt, then a picture for a prompt and a thought, by maximum
likelihood:

    loss = mean over tokens of  -log pi(token | the tokens before it)

A share of its training pictures is corrupted, and a share lacks an object. So the policy produces
artifacts and omits objects, as real models do.

Read next: train_preferences.py
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import processors
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.modeling_janus import JanusVQVAE

import generate
from tiny_world.learning import BETAS, SHIPPED, Training, bpe_tokenizer
from tiny_world.world import GROUND, describe
from training.policy import Policy

# --- the VQ autoencoder -------------------------------------------------------------------------


def to_model(pixels):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1], as Janus' image processor scales."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def cut_patches(pictures):
    """(N, 3, 32, 32) -> the 8 x 8 patches of 4 x 4 pixels of each picture, (N, 64, 48)."""
    return F.unfold(pictures, 4, stride=4).transpose(1, 2)


def nearest_code(patches, typical):
    """The number of the nearest of these typical patches (K, 48) for each patch (..., 48)."""
    half_square = typical.square().sum(1) / 2  # |p - t|^2 = |p|^2 - 2 (p t - |t|^2 / 2)
    flat = patches.reshape(-1, patches.shape[-1])
    nearest = [(chunk @ typical.T - half_square).argmax(1) for chunk in flat.split(16384)]
    return torch.cat(nearest).reshape(patches.shape[:-1])


def typical_patches(pictures, count, rounds=25):
    """k-means: `count` patches (count, 48) that stand for all others. The first is plain
    background, which is too frequent to be left to chance."""
    patches = cut_patches(pictures).flatten(0, 1)
    background = to_model(np.full((1, 4, 4, 3), GROUND, np.uint8)).flatten(1)
    patches = patches[(patches - background).abs().amax(1) > 0.01]
    patches = patches[torch.randperm(len(patches))[:60000]]
    typical = torch.cat([background, patches[: count - 1]])
    for _ in range(rounds):
        code = nearest_code(patches, typical)
        size = torch.bincount(code, minlength=count)
        total = torch.zeros_like(typical).index_add_(0, code, patches)
        error = (patches - typical[code]).square().sum(1)
        typical[1:] = (total / size.clamp(min=1)[:, None])[1:]
        unused = (size == 0).nonzero()[:, 0]
        unused = unused[unused > 0]
        if len(unused):  # each moves onto a patch that no other code fits well
            typical[unused] = patches[torch.multinomial(error, len(unused))]
    return typical


def encode(pixels, typical):
    """uint8 pictures (N, 32, 32, 3) -> their codes (N, 64)."""
    chunks = np.array_split(pixels, len(pixels) // 1000 + 1)
    return torch.cat([nearest_code(cut_patches(to_model(chunk)), typical) for chunk in chunks])


def initial_codes(typical, width):
    """Code vectors (K, width) on the unit sphere: the principal components of the typical patches.
    A constant is added as the last coordinate, so that a pale and a full red, which point the same
    way, remain different on the sphere."""
    centered = typical - typical.mean(0)
    components = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[: width - 1].T
    constant = components.norm(dim=1).mean().expand(len(typical), 1)
    return F.normalize(torch.cat([components, constant], 1), dim=1)


def train_vq(pixels, seed, steps=2000, batch=48, unfinished=None):
    """A VQ autoencoder: 32 x 32 pixels <-> 8 x 8 codes out of 512. Returns (vq, the typical patch
    of each code (512, 48)).

    Trained end to end, as usual, so small an autoencoder spreads each object over all 64 tokens:
    the plain background, 70 % of the patches, then used 251 of 256 codes, with an entropy of 5.3
    nats, and the language model had to learn a scrambled code. So here k-means decides first what
    each code means. Encoder, decoder and code vectors are trained to agree with it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    layout = dict(memory_format=torch.channels_last)
    config = JanusConfig.from_pretrained(SHIPPED / "policy").vq_config
    vq = JanusVQVAE(config).to(**layout).train()
    typical = typical_patches(to_model(pixels[:20000]), config.num_embeddings)
    vectors = vq.quantize.embedding.weight
    vectors.data.copy_(initial_codes(typical, config.embed_dim))
    ids = encode(pixels, typical)
    weights = vq.named_parameters()
    training = Training("vq", weights, steps, 2e-3, 0.05, rng, unfinished, betas=BETAS)
    for _ in training:
        chosen = rng.integers(len(pixels), size=batch)
        x, code = to_model(pixels[chosen]).to(**layout), ids[chosen]
        codes = F.normalize(vectors, dim=1)  # Janus looks codes up by angle
        q = codes[code].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
        y = vq.decoder(vq.post_quant_conv(q))
        z = F.normalize(vq.quant_conv(vq.encoder(x)), dim=1).permute(0, 2, 3, 1).flatten(1, 2)
        logits = (z @ codes.T).flatten(0, 1)  # cosines
        encoding = F.cross_entropy(10 * logits, code.flatten())
        l1, right = F.l1_loss(y, x), (logits.argmax(1) == code.flatten()).float().mean()
        training.update(l1 + F.mse_loss(y, x) + 0.02 * encoding, l1=l1, encoded=right)
    with torch.no_grad():
        vectors.copy_(F.normalize(vectors, dim=1))
    return vq.eval(), typical


# --- the language model -------------------------------------------------------------------------


def policy_tokenizer(texts):
    """Janus' special tokens and the words of the tiny world's prompts and thoughts."""
    image = {"image_token": "<image>", "boi_token": "<begin_of_image>"}
    image["eoi_token"] = "<end_of_image>"
    specials = ["<pad>", "<bos>", "<eos>", *image.values(), "<|User|>", "<|Assistant|>"]
    core = bpe_tokenizer(texts, specials)
    add_bos = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    core.post_processor = add_bos
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, extra_special_tokens=image)


def build_policy(vq, texts):
    """An untrained Janus of 2 M parameters with this trained VQ model."""
    folder = SHIPPED / "policy"
    processor, config = JanusProcessor.from_pretrained(folder), JanusConfig.from_pretrained(folder)
    processor.tokenizer = policy_tokenizer(texts)
    config.text_config.vocab_size = len(processor.tokenizer)
    model = JanusForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vq.state_dict())
    # The language model reads a code through an embedding of 16 numbers: at first, the code itself.
    model.model.generation_embeddings.weight.data.copy_(vq.quantize.embedding.weight)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return Policy(model, processor, "plan {}", torch.float32)


def text_loss(policy, prompts, thoughts):
    """Mean over tokens of -log pi(thought | prompt)."""
    embed, tokenizer = policy.embed_text, policy.tokenizer
    options = dict(add_special_tokens=False, padding=True, padding_side="right")
    texts = [thought + tokenizer.eos_token for thought in thoughts]
    ids = tokenizer(texts, return_tensors="pt", **options).input_ids
    mask = ids != tokenizer.pad_token_id
    context, context_mask = generate.thought_context(policy, prompts)
    hidden = generate.teacher_forced_hidden(policy, embed(context), context_mask, embed(ids), mask)
    return -generate.gather_logprobs(policy.model.lm_head(hidden), ids)[mask].mean()


def image_loss(policy, prompts, thoughts, dropped, ids):
    """Mean over tokens of -log pi(image | prompt, thought); where `dropped`, without the prompt."""
    context, mask = generate.image_context(policy, prompts, thoughts)
    context = torch.where(dropped, generate.unconditional_ids(policy, context), context)
    image = policy.model.prepare_embeddings_for_image_generation(ids)
    hidden = generate.teacher_forced_hidden(policy, policy.embed_text(context), mask, image)
    return -generate.gather_logprobs(policy.model.model.generation_head(hidden), ids).mean()


class Examples(NamedTuple):
    """What the policy learns from: N pictures as codes (N, 64), with their prompts and thoughts."""

    ids: torch.Tensor
    prompts: list
    thoughts: list


def make_examples(typical, rows, scenes, pixels):
    """Examples from what `make_pictures` returns, encoded by these typical patches."""
    prompts, thoughts = [row["prompt"] for row in rows], [describe(scene) for scene in scenes]
    return Examples(encode(pixels, typical), prompts, thoughts)


def train_policy(vq, examples, worse, seed, steps=(14000, 1000), unfinished=None):
    """Maximum likelihood by the same forward pass as GRPO's, in two rounds: first on good examples,
    then, with a third of the learning rate, on worse ones. So the policy draws well, and has the
    habits of real models: sometimes it omits an object, sometimes it breaks one. (Trained on the
    worse examples alone, it draws less well.)"""
    torch.manual_seed(seed)
    policy = build_policy(vq, examples.prompts + examples.thoughts + ["plan a red circle."])
    fit(policy, examples, "policy", seed, steps[0], 1, unfinished)
    fit(policy, worse, "policy_habits", seed + 1, steps[1], 1 / 3, unfinished)
    policy.model.eval()
    return policy


def fit(policy, examples, name, seed, steps, rate, unfinished, batch=32):
    """One round of training, with this share of the full learning rate.

    A quarter of the thoughts is left out, so the policy can also generate without one. One context
    in ten loses its prompt, which trains the unconditional branch of classifier-free guidance.
    Thoughts are learned much sooner than pictures: a quarter of the batch is enough for them."""
    ids, prompts, thoughts = examples
    rng = np.random.default_rng(seed)
    names = ("model.language_model.", "lm_head.", "model.generation_")
    trained = [(n, p) for n, p in policy.model.named_parameters() if n.startswith(names)]
    options = dict(betas=BETAS, weight_decay=0.05, muon_lr=0.02 * rate)
    training = Training(name, trained, steps, 3e-3 * rate, 0.05, rng, unfinished, **options)
    for _ in training:
        chosen = rng.integers(len(prompts), size=batch)
        batch_prompts, batch_thoughts = [prompts[i] for i in chosen], [thoughts[i] for i in chosen]
        text = text_loss(policy, batch_prompts[: batch // 4], batch_thoughts[: batch // 4])
        batch_thoughts = [t if rng.random() < 0.75 else "" for t in batch_thoughts]
        dropped = torch.from_numpy(rng.random(batch) < 0.1)[:, None]
        image = image_loss(policy, batch_prompts, batch_thoughts, dropped, ids[chosen])
        training.update(0.3 * text + image, image=image, thought=text)
