"""Trains the tiny checkpoints from nothing; this is what `python tiny.py` runs.

The policy is made in the two steps that made Janus. First an alphabet: a VQ autoencoder learns 256
patches, with which any picture of this world can be spelled in 8 x 8 letters. Then the language: a
Llama learns to write a thought for a prompt, and a picture for a prompt and a thought, by maximum
likelihood, mean over tokens of -log pi(token | what came before). A quarter of the pictures it learns
from is broken, so it paints some broken ones, as real models do.

Read next: tiny_rewards.py (the preference model and the judge)
"""

import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import processors
from tqdm import trange
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.modeling_janus import JanusVQVAE

import apo
import evaluate
import generate
import rewards
from evaluation import pages as report
from tiny_world import world as tiny
from tiny_world.train_dino import train_dino
from tiny_world.train_judge import bpe_tokenizer, train_judge, train_preference
from training.files import atomic

VQ_CONFIG = dict(
    embed_dim=8,
    num_embeddings=256,
    latent_channels=64,
    base_channels=32,
    channel_multiplier=[1, 1, 2],
    num_res_blocks=1,
    num_patches=8,
)


def to_model(pixels):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1], as Janus' image processor scales."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def train_vq(pixels, steps, seed, batch=64, lr=2e-3):
    """The picture's alphabet: a VQ autoencoder, 32x32 pixels <-> 8x8 words out of 256.

    Janus looks codes up by angle (codes and latents on the unit sphere), so that is how they are
    learned. The codebook follows the latents by a moving average (van den Oord et al. 2017, app. A)
    and a code that nobody uses is moved onto a latent of the current batch."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vq = JanusVQVAE(JanusVQVAEConfig(**VQ_CONFIG)).to(memory_format=torch.channels_last).train()
    codes = vq.quantize.embedding.weight
    codes.requires_grad_(False).copy_(F.normalize(torch.randn_like(codes), dim=1))
    usage, sums = torch.ones(len(codes)), codes.clone()
    opt = torch.optim.AdamW(
        [p for p in vq.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.05)
    bar = trange(steps, desc="vq")
    for step in bar:
        x = to_model(pixels[rng.integers(len(pixels), size=batch)]).to(
            memory_format=torch.channels_last
        )
        z = F.normalize(vq.quant_conv(vq.encoder(x)), dim=1)
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        index = (flat.detach() @ codes.T).argmax(1)
        q = codes[index].view(len(x), 8, 8, -1).permute(0, 3, 1, 2)
        y = vq.decoder(vq.post_quant_conv(z + (q - z).detach()))  # straight-through
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 0.25 * F.mse_loss(z, q) * z.shape[1]
        opt.zero_grad(), loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        opt.step(), schedule.step()
        with torch.no_grad():
            count = torch.zeros_like(usage).index_add_(0, index, torch.ones(len(index)))
            usage.lerp_(count, 0.01)
            sums.lerp_(torch.zeros_like(sums).index_add_(0, index, flat), 0.01)
            if step < steps // 2 and step % 10 == 0:
                dead = (usage < 0.05).nonzero()[:, 0]
                sums[dead] = flat[torch.from_numpy(rng.integers(len(flat), size=len(dead)))]
                usage[dead] = 1.0
            codes.copy_(F.normalize(sums, dim=1))
        if step % 10 == 0:
            bar.set_postfix(l1=f"{F.l1_loss(y, x).item():.4f}", used=int((usage > 0.05).sum()))
    return vq.eval()


# --- the policy ---------------------------------------------------------------------------------


def policy_tokenizer(texts):
    """Janus' special tokens, with the words of this world's prompts and thoughts."""
    specials = [
        "<pad>",
        "<bos>",
        "<eos>",
        "<image>",
        "<begin_of_image>",
        "<end_of_image>",
        "<|User|>",
        "<|Assistant|>",
    ]
    core = bpe_tokenizer(texts, specials)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )


CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}<|User|>:{{ ' ' + part['text'] }}"
    "{% endfor %}{% endfor %}\n\n<|Assistant|>:"
)


def build_policy(vq, texts):
    """An untrained Janus of 1 M parameters around a trained VQ model."""
    tokenizer, width = policy_tokenizer(texts), 128
    config = JanusConfig(
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        ).to_dict(),
        vision_config=dict(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            projection_dim=width,
            num_image_tokens=64,
        ),
        vq_config=dict(VQ_CONFIG, projection_dim=width, image_token_embed_dim=width),
        image_token_id=3,
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vq.state_dict())
    # The embedding that the language model reads is 8 numbers a code: the codebook's own, to begin with.
    model.model.generation_embeddings.weight.data.copy_(vq.quantize.embedding.weight)
    model.generation_config = GenerationConfig(
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        guidance_scale=1.0,
        do_sample=True,
        generation_kwargs={"boi_token_id": 4},
    )
    eyes = JanusImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = JanusProcessor(eyes, tokenizer, chat_template=CHAT, num_image_tokens=64)
    return generate.Policy(model, processor, "plan {}", torch.float32)


def train_policy(vq, rows, scenes, pixels, steps, seed, batch=64, lr=1.5e-3):
    """Maximum likelihood: the same `logprobs` that GRPO will use, on thoughts and pictures that
    somebody else made. A quarter of the thoughts is left out, so that the policy paints without one
    too; one context in ten is blotted out, so that guidance has its unconditional branch."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    prompts, thoughts = [row["prompt"] for row in rows], [tiny.describe(scene) for scene in scenes]
    policy = build_policy(vq, prompts + thoughts + ["plan a red circle."])
    with torch.no_grad():
        ids = torch.cat(
            [
                vq.encode(to_model(chunk)).image_tokens
                for chunk in np.array_split(pixels, len(pixels) // 256 + 1)
            ]
        )
    ids = ids.view(len(pixels), -1)
    eos, pad = policy.tokenizer.eos_token, policy.tokenizer.pad_token_id
    names = ("model.language_model.", "lm_head.", "model.generation_")
    trained = [p for name, p in policy.model.named_parameters() if name.startswith(names)]
    opt = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.05)
    embed, bar = policy.body.get_input_embeddings(), trange(steps, desc="policy")
    for step in bar:
        pick = rng.integers(len(rows), size=batch)
        asked, thought = [prompts[i] for i in pick], [thoughts[i] for i in pick]
        spoken = policy.tokenizer(
            [t + eos for t in thought],
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        ).input_ids
        context, mask = generate.thought_context(policy, asked)
        hidden = generate.teach(policy, embed(context), mask, embed(spoken), spoken != pad)
        text_loss = -generate.pick(policy.model.lm_head(hidden), spoken)[spoken != pad].mean()
        thought = [t if rng.random() < 0.75 else "" for t in thought]
        context, mask = generate.image_context(policy, asked, thought)
        blotted = torch.from_numpy(rng.random(batch) < 0.1)[:, None]
        context = torch.where(blotted, generate.without_prompt(policy, context), context)
        painted = policy.model.prepare_embeddings_for_image_generation(ids[pick])
        hidden = generate.teach(policy, embed(context), mask, painted)
        image_loss = -generate.pick(policy.model.model.generation_head(hidden), ids[pick]).mean()
        opt.zero_grad(), (0.3 * text_loss + image_loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        opt.step(), schedule.step()
        if step % 10 == 0:
            bar.set_postfix(image=f"{image_loss.item():.3f}", thought=f"{text_loss.item():.3f}")
    policy.model.eval()
    return policy


# --- the artifact pairs -----------------------------------------------------------------------------


def paint(policy, rows, each, seed):
    """The policy's pictures for these prompts and what gold says: (rows, images, aligned, clean)."""
    jobs = [(i, k) for i in range(len(rows)) for k in range(each)]
    images, aligned, clean = [], [], []
    for start in trange(0, len(jobs), 64, desc="painting"):
        batch = jobs[start : start + 64]
        prompts = [rows[i]["prompt"] for i, _ in batch]
        images += generate.sample(policy, prompts, [(seed, 0, i, k) for i, k in batch]).images
        a, c = tiny.gold(prompts, images[start:])
        aligned += a.tolist()
        clean += c.tolist()
    return [rows[i] for i, _ in jobs], images, aligned, clean


def save_pairs(folder, split, painted, n, seed):
    """n pairs for n prompts: a clean picture and a broken one of the same prompt. Half are the policy's own
    pictures, labelled by gold; half are drawn. One line a pair in <split>.jsonl, pictures beside it."""
    rng, lines = random.Random(f"{split} {seed}"), []
    by_prompt = {}
    for row, image, _, clean in zip(*painted):
        by_prompt.setdefault(row["prompt"], []).append((clean, image))
    prompts = list(by_prompt)
    rng.shuffle(prompts)
    for prompt in prompts:
        group = sorted(by_prompt[prompt], key=lambda entry: entry[0])
        if group[0][0] < 0.4 and group[-1][0] > 0.7 and len(lines) < n // 2:
            lines.append(({"prompt": prompt, "source": "policy"}, group[-1][1], group[0][1]))
    while len(lines) < n:
        prompt, kind = rng.choice(prompts), rng.choice(tiny.CORRUPTIONS)
        scene = tiny.sample_scene(*tiny.wanted(prompt), rng)
        broken = tiny.corrupt(scene, kind, rng.uniform(0.4, 1), rng)
        lines.append(
            (
                {"prompt": prompt, "source": f"drawn, {kind}"},
                tiny.to_image(tiny.draw(scene)),
                tiny.to_image(broken),
            )
        )
    (folder / split).mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{split}.jsonl") as file:
        for i, (line, *pictures) in enumerate(lines):
            names = {side: f"{split}/{i:04d}_{side}.png" for side in ("clean", "broken")}
            for name, image in zip(names.values(), pictures):
                image.save(folder / name)
            file.write(json.dumps({"id": f"{split}-{i:04d}", **line, **names}) + "\n")


@dataclass
class Config:
    out: str = "tiny"  # checkpoints go here
    # stages, in this order; later ones read earlier ones' files
    only: str = "prompts,policy,hps,pickscore,dino,artifact,pairs,question"
    seed: int = 0
    vq_steps: int = 2500
    policy_steps: int = 3600
    hps_steps: int = 700  # of each of its two stages
    dino_steps: int = 2000
    judge_steps: int = 2200
    flawed: float = 0.25  # share of broken pictures among those the policy learns from: it paints such ones, too


def main(cfg):
    out, stages = Path(cfg.out), cfg.only.split(",")
    rows = {"train": tiny.prompt_rows("train", 100), "test": tiny.prompt_rows("test", 40)}
    if "prompts" in stages:
        for split in rows:
            with atomic(out / "prompts" / f"{split}.jsonl") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[split])
    if "policy" in stages:
        learned, scenes, pixels, _, _ = tiny.make_pictures(40000, cfg.flawed, cfg.seed)
        vq = train_vq(pixels[:24000], cfg.vq_steps, cfg.seed)
        train_policy(vq, learned, scenes, pixels, cfg.policy_steps, cfg.seed).save(out / "policy")
    for name, seed in (("hps", cfg.seed), ("pickscore", cfg.seed + 100)):
        if name in stages:
            accuracy = train_preference(rewards.REWARDS[name], out / name, cfg.hps_steps, seed)
            print(f"{name}: {accuracy:.3f} of unseen preferences predicted")
    if "dino" in stages:
        train_dino(
            out / "dino", tiny.make_pictures(6000, 0.3, cfg.seed + 77)[2], cfg.dino_steps, cfg.seed
        )
    if "artifact" in stages or "pairs" in stages:
        policy = generate.load_policy(str(out / "policy"))
        painted = {
            "train": paint(policy, rows["train"], 12, 1),
            "test": paint(policy, rows["test"], 8, 2),
        }
        aligned, clean = map(np.array, painted["test"][2:])
        print(
            f"policy: {(clean >= tiny.CLEAN_ENOUGH).mean():.3f} of its test pictures are artifact-free, "
            f"{aligned.mean():.3f} aligned"
        )
    if "artifact" in stages:
        drawn = tiny.make_pictures(16000, 0.5, cfg.seed + 2)[2:]
        _, images, _, clean = painted["train"]
        train_judge(
            out / "artifact",
            drawn,
            (images, np.array(clean) >= tiny.CLEAN_ENOUGH),
            cfg.judge_steps,
            cfg.seed,
        )
    if "pairs" in stages:
        held = {
            row["prompt"] for row in rows["train"] if zlib.crc32(row["prompt"].encode()) % 3 == 0
        }
        for split, keep in (
            ("train", lambda p: p not in held),
            ("validation", lambda p: p in held),
        ):
            chosen = [entry for entry in zip(*painted["train"]) if keep(entry[0]["prompt"])]
            save_pairs(
                out / "pairs", split, list(zip(*chosen)), 200 if split == "train" else 100, cfg.seed
            )
        save_pairs(out / "pairs", "test", painted["test"], 200, cfg.seed)
    if "question" in stages:  # the judge's own question, from its mistakes, as in the paper
        judge, name = apo.load_judge(apo.Config(checkpoint=str(out / "artifact")))
        answers, data = apo.Answers(Path(":memory:"), judge, name), apo.load_examples(out / "pairs")
        settings = apo.Config()
        found, *_ = apo.optimize(
            settings.question,
            data,
            answers,
            apo.ScriptedEditor(),
            "successive-rejects",
            cfg.seed,
            settings,
        )
        with atomic(out / "artifact" / "artifact.txt") as file:
            file.write(found + "\n")
        judges = {name: rewards.load(name, checkpoint=out / name) for name in ("hps", "artifact")}
        print("\n".join(report.markdown(evaluate.pair_table(judges, out / "pairs"))))
