"""Trains the tiny policy: a VQ autoencoder, then a Llama, in the format of Janus.

The VQ autoencoder learns 256 patches; 8 x 8 of them show any picture of the tiny world. The
language model learns a thought for a prompt, then a picture for a prompt and a thought, by maximum
likelihood:

    loss = mean over tokens of  -log pi(token | the tokens before it)

A share of its training pictures is corrupted, so it produces artifacts, as real models do.

Read next: train_preferences.py
"""

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.modeling_janus import JanusVQVAE

import generate
from tiny_world.world import describe
from training.files import ROOT
from training.policy import Policy

# All sizes, the chat template and the image processor are those of the shipped checkpoint; only its
# weights and its vocabulary are learned anew. The other train_*.py do the same.
SHIPPED = ROOT / "tiny_world" / "checkpoints"
BETAS = (0.9, 0.95)  # of AdamW, the usual ones for language models


def optimizer(name, parameters, steps, lr, warmup, **options):
    """AdamW with a one-cycle learning rate and clipped gradients. Returns update(loss, **shown),
    which makes one step and shows the loss and these numbers in a progress bar."""
    parameters = list(parameters)
    opt = torch.optim.AdamW(parameters, lr=lr, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=warmup)
    bar = tqdm(total=steps, desc=name)

    def update(loss, **shown):
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        schedule.step()
        if bar.n % 10 == 0:
            shown = {"loss": loss} | shown
            bar.set_postfix({key: f"{value.item():.3f}" for key, value in shown.items()})
        bar.update()

    return update


def bpe_tokenizer(texts, specials, vocab_size=512):
    """A byte-level BPE tokenizer, as Janus and Qwen have: any text can be written in it, and known
    words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = dict(show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# --- the VQ autoencoder -------------------------------------------------------------------------


def to_model(pixels):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1], as Janus' image processor scales."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def train_vq(pixels, seed, steps=2500, batch=64):
    """A VQ autoencoder: 32 x 32 pixels <-> 8 x 8 codes out of 256.

    Janus looks codes up by angle, so codes and latents are trained on the unit sphere. Each code is
    a moving average of its latents (van den Oord et al., arXiv:1711.00937, app. A); an unused code
    is moved onto a latent of the current batch."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    layout = dict(memory_format=torch.channels_last)
    vq = JanusVQVAE(JanusConfig.from_pretrained(SHIPPED / "policy").vq_config).to(**layout).train()
    codes = vq.quantize.embedding.weight
    codes.requires_grad_(False).copy_(F.normalize(torch.randn_like(codes), dim=1))
    usage, sums = torch.ones(len(codes)), codes.clone()
    trained = [p for p in vq.parameters() if p.requires_grad]
    update = optimizer("vq", trained, steps, lr=2e-3, warmup=0.05, betas=BETAS)
    for step in range(steps):
        x = to_model(pixels[rng.integers(len(pixels), size=batch)]).to(**layout)
        z = F.normalize(vq.quant_conv(vq.encoder(x)), dim=1)
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        index = (flat.detach() @ codes.T).argmax(1)
        q = codes[index].view(len(x), 8, 8, -1).permute(0, 3, 1, 2)
        y = vq.decoder(vq.post_quant_conv(z + (q - z).detach()))  # straight-through gradient
        l1 = F.l1_loss(y, x)
        loss = l1 + F.mse_loss(y, x) + 0.25 * F.mse_loss(z, q) * z.shape[1]
        update(loss, l1=l1, used=(usage > 0.05).sum())
        with torch.no_grad():
            count = torch.zeros_like(usage).index_add_(0, index, torch.ones(len(index)))
            usage.lerp_(count, 0.01)
            sums.lerp_(torch.zeros_like(sums).index_add_(0, index, flat), 0.01)
            if step < steps // 2 and step % 10 == 0:
                unused = (usage < 0.05).nonzero()[:, 0]
                sums[unused] = flat[torch.from_numpy(rng.integers(len(flat), size=len(unused)))]
                usage[unused] = 1.0
            codes.copy_(F.normalize(sums, dim=1))
    return vq.eval()


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
    # The language model reads a code through an embedding of 8 numbers: at first, the code itself.
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


def train_policy(vq, rows, scenes, pixels, seed, steps=3600, batch=64):
    """Maximum likelihood on given thoughts and pictures, by the same forward pass as GRPO's.

    A quarter of the thoughts is left out, so the policy can also generate without one. One context
    in ten loses its prompt, which trains the unconditional branch of classifier-free guidance."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    prompts, thoughts = [row["prompt"] for row in rows], [describe(scene) for scene in scenes]
    policy = build_policy(vq, prompts + thoughts + ["plan a red circle."])
    with torch.no_grad():
        chunks = np.array_split(pixels, len(pixels) // 256 + 1)
        ids = torch.cat([vq.encode(to_model(chunk)).image_tokens for chunk in chunks])
    ids = ids.view(len(pixels), -1)
    names = ("model.language_model.", "lm_head.", "model.generation_")
    trained = [p for name, p in policy.model.named_parameters() if name.startswith(names)]
    update = optimizer("policy", trained, steps, 1.5e-3, 0.05, betas=BETAS, weight_decay=0.05)
    for _ in range(steps):
        chosen = rng.integers(len(rows), size=batch)
        batch_prompts, batch_thoughts = [prompts[i] for i in chosen], [thoughts[i] for i in chosen]
        text = text_loss(policy, batch_prompts, batch_thoughts)
        batch_thoughts = [t if rng.random() < 0.75 else "" for t in batch_thoughts]
        dropped = torch.from_numpy(rng.random(batch) < 0.1)[:, None]
        image = image_loss(policy, batch_prompts, batch_thoughts, dropped, ids[chosen])
        update(0.3 * text + image, image=image, thought=text)
    policy.model.eval()
    return policy
