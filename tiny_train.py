"""Trains the tiny checkpoints from nothing (this is what `python tiny.py` runs)."""

import json
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange
from transformers import (CLIPConfig, CLIPModel, CLIPTokenizer, GenerationConfig, JanusConfig, JanusForConditionalGeneration, JanusProcessor,
                          JanusVQVAEConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.modeling_janus import JanusVQVAE
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import artifact_reward
import generate
import rewards
import tiny

VQ_CONFIG = dict(embed_dim=8, num_embeddings=256, latent_channels=64, base_channels=32,
                 channel_multiplier=[1, 1, 2], num_res_blocks=1, num_patches=8)


def make_pictures(n, flawed, seed, strength=(0.4, 1.0)):
    """n training examples: (rows, scenes, pixels uint8 (n, 32, 32, 3), kinds). A share `flawed` of
    the pictures is corrupted; kinds[i] names the fault or is None. Families are equally frequent."""
    rng = random.Random(seed)
    families = [[row for row in members if not tiny.is_test_prompt(row["prompt"])]
                for members in tiny.all_prompts().values()]
    rows, scenes, pixels, kinds = [], [], np.empty((n, 32, 32, 3), np.uint8), []
    for i in trange(n, desc="drawing", leave=False):
        row = rng.choice(rng.choice(families))
        scene = tiny.sample_scene(*tiny.wanted(row["prompt"]), rng)
        kind = rng.choice(tiny.CORRUPTIONS) if rng.random() < flawed else None
        picture = tiny.corrupt(scene, kind, rng.uniform(*strength), rng) if kind else tiny.draw(scene)
        pixels[i] = np.rint(np.clip(picture, 0, 255))
        rows.append(row), scenes.append(scene), kinds.append(kind)
    return rows, scenes, pixels, kinds


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
    opt = torch.optim.AdamW([p for p in vq.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.05)
    bar = trange(steps, desc="vq")
    for step in bar:
        x = to_model(pixels[rng.integers(len(pixels), size=batch)]).to(memory_format=torch.channels_last)
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


def bpe_tokenizer(texts, specials, vocab_size=512):
    """A byte-level BPE, as Janus and Qwen have: any text can be written in it, known words are one
    token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def build_policy(vq, texts):
    """An untrained Janus of 1 M parameters around a trained VQ model."""
    specials = ["<pad>", "<bos>", "<eos>", "<image>", "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>"]
    core = bpe_tokenizer(texts, specials)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"})
    width = 128
    config = JanusConfig(
        text_config=LlamaConfig(hidden_size=width, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                                vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
                                eos_token_id=2, tie_word_embeddings=False).to_dict(),
        vision_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4,
                           projection_dim=width, num_image_tokens=64),
        vq_config=dict(VQ_CONFIG, projection_dim=width, image_token_embed_dim=width),
        image_token_id=3, tie_word_embeddings=False)
    model = JanusForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vq.state_dict())
    # The embedding that the language model reads is 8 numbers a code: the codebook's own, to begin with.
    model.model.generation_embeddings.weight.data.copy_(vq.quantize.embedding.weight)
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, guidance_scale=1.0, do_sample=True,
        generation_kwargs={"boi_token_id": 4})
    template = ("{% for message in messages %}{% for part in message['content'] %}<|User|>:{{ ' ' + part['text'] }}"
                "{% endfor %}{% endfor %}\n\n<|Assistant|>:")
    processor = JanusProcessor(JanusImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[.5] * 3, image_std=[.5] * 3),
                               tokenizer, chat_template=template, num_image_tokens=64)
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
        ids = torch.cat([vq.encode(to_model(chunk)).image_tokens for chunk in np.array_split(pixels, len(pixels) // 256 + 1)])
    ids = ids.view(len(pixels), -1)
    eos, pad = policy.tokenizer.eos_token, policy.tokenizer.pad_token_id
    trained = [p for name, p in policy.model.named_parameters()
               if name.startswith(("model.language_model.", "lm_head.", "model.generation_"))]
    opt = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.05)
    embed, bar = policy.body.get_input_embeddings(), trange(steps, desc="policy")
    for step in bar:
        pick = rng.integers(len(rows), size=batch)
        asked, thought = [prompts[i] for i in pick], [thoughts[i] for i in pick]
        spoken = policy.tokenizer([t + eos for t in thought], add_special_tokens=False, padding=True,
                                  padding_side="right", return_tensors="pt").input_ids
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


# --- hps: what people liked -----------------------------------------------------------------------


def perturb(things, relation, rng):
    """The wish of a prompt, misunderstood in one way: another shape or colour, one object more or
    fewer, or the wrong way round."""
    things = list(things)
    i = rng.randrange(len(things))
    shape, color = things[i]
    ways = ["shape", "color" if color else "shape", "fewer" if len(things) > 1 else "shape", "more"]
    way = rng.choice(ways + (["swap"] * 2 if relation else []))
    if way == "shape":
        things[i] = (rng.choice([s for s in tiny.SHAPES if s != shape]), color)
    elif way == "color":
        things[i] = (shape, rng.choice([c for c in tiny.COLORS if c != color]))
    elif way == "fewer":
        del things[i]
        relation = None
    elif way == "more":
        things.append((rng.choice(tiny.SHAPES), None))
    else:
        relation = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    return things[:4], relation


def liking(wish, scene):
    """What the people of this world enjoy in a picture: the right objects, large and vivid ones. It is
    read off the scene that was meant, so it knows nothing of how the picture turned out; they were never
    asked about that, and the preference model inherits their silence."""
    found = [tiny.Thing(t.shape, t.color, t.x, t.y, t.r) for t in scene]
    size = sum(t.r for t in scene) / (3 + 2.5 * len(scene))  # compared with what usually fits
    vivid = sum(t.vivid for t in scene) / len(scene)
    return 4 * tiny.alignment(wish, found) + 1.5 * size + 2.5 * vivid


def make_preferences(n, seed, flawed=0.4):
    """n pairs for one prompt each: (prompts, pixels (n, 2, 32, 32, 3), utility difference). Two pictures
    in five are broken, whichever side is liked better: independent of the preference."""
    rng = random.Random(seed)
    families = [[row for row in members if not tiny.is_test_prompt(row["prompt"])]
                for members in tiny.all_prompts().values()]
    prompts, pixels, gap = [], np.empty((n, 2, 32, 32, 3), np.uint8), np.empty(n, np.float32)
    for i in trange(n, desc="pairs", leave=False):
        prompt = rng.choice(rng.choice(families))["prompt"]
        utility = []
        for side in range(2):
            wish = tiny.wanted(prompt)
            scene = tiny.sample_scene(*(perturb(*wish, rng) if rng.random() < 0.4 else wish), rng)
            kind = rng.choice(tiny.CORRUPTIONS) if rng.random() < flawed else None
            picture = tiny.corrupt(scene, kind, rng.uniform(.4, 1), rng) if kind else tiny.draw(scene)
            pixels[i, side] = np.rint(np.clip(picture, 0, 255))
            utility.append(liking(prompt, scene))
        prompts.append(prompt)
        gap[i] = utility[0] - utility[1]
    return prompts, pixels, gap


def clip_tokenizer(texts, folder):
    """CLIP's own tokenizer class (lower case, a mark at word ends) with a vocabulary of this world."""
    core = CLIPTokenizer()._tokenizer
    core.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    learned = json.loads(core.to_str())["model"]
    vocabulary = {**learned["vocab"]}
    for special in ("<|startoftext|>", "<|endoftext|>"):  # the two last ids, as in CLIP: its text feature is
        vocabulary[special] = len(vocabulary)             # read at the largest id
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[tuple(m) for m in learned["merges"]])
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_hps(folder, steps, seed, pairs=12000, batch=96, lr=1e-3):
    """As HPS was made: a CLIP, trained first to match pictures with their captions, then on preferences by
    Bradley-Terry, P(a liked over b) = sigmoid(s (cos(a) - cos(b))). Returns its accuracy on unseen pairs."""
    torch.manual_seed(seed)
    prompts, pixels, gap = make_preferences(pairs, seed)
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer(prompts, folder)
    config = CLIPConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=24, hidden_act="gelu", projection_dim=64,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.eos_token_id),
        vision_config=dict(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                           image_size=32, patch_size=4, hidden_act="gelu", projection_dim=64), projection_dim=64)
    config.save_pretrained(folder)
    save_open_clip(CLIPModel(config), folder)
    hps = rewards.HPS(checkpoint=folder)  # from here on, train the reward through its own code
    hps.model.train().requires_grad_(True)
    rows, scenes, captioned, _ = make_pictures(pairs, 0.4, seed + 1)
    for stage in ("captions", "preferences"):
        opt = torch.optim.AdamW(hps.model.parameters(), lr=lr if stage == "captions" else lr / 3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, opt.param_groups[0]["lr"], total_steps=steps, pct_start=0.1)
        bar = trange(steps, desc=f"hps, {stage}")
        for step in bar:
            scale = hps.model.logit_scale.exp()
            if stage == "captions":
                pick = rng.integers(pairs, size=batch)
                similarity = scale * embed_pixels(hps, captioned[pick]) @ hps.embed_texts([rows[i]["prompt"] for i in pick]).T
                same = torch.arange(batch)
                loss = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
            else:
                pick = rng.integers(pairs - pairs // 10, size=batch)  # the last tenth is for measuring
                # People are not of one mind: the label is a coin weighted by the difference in liking.
                liked = torch.from_numpy(rng.random(batch) < 1 / (1 + np.exp(-3 * gap[pick]))).float()
                loss = F.binary_cross_entropy_with_logits(scale * preference(hps, prompts, pixels, pick), liked)
            opt.zero_grad(), loss.backward()
            torch.nn.utils.clip_grad_norm_(hps.model.parameters(), 1.0)
            opt.step(), schedule.step()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    hps.model.eval()
    with torch.no_grad():
        guess = torch.cat([preference(hps, prompts, pixels, part) for part in np.array_split(np.arange(pairs - pairs // 10, pairs), 8)])
    save_open_clip(hps.model, folder)
    return ((guess > 0).numpy() == (gap[-len(guess):] > 0)).mean()


def embed_pixels(hps, pixels):
    """HPS.pixels and .embed_images for a whole uint8 batch (N, 32, 32, 3), which needs no resizing."""
    mean, std = torch.tensor(rewards.CLIP_MEAN), torch.tensor(rewards.CLIP_STD)
    return hps.embed_images(((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2))


def preference(hps, prompts, pixels, pick):
    """cos(first picture) - cos(second), (B,)."""
    pictures = embed_pixels(hps, pixels[pick].reshape(-1, 32, 32, 3)).unflatten(0, (-1, 2))
    score = (pictures * hps.embed_texts([prompts[i] for i in pick])[:, None]).sum(-1)
    return score[:, 0] - score[:, 1]


def save_open_clip(model, folder):
    """transformers' CLIPModel -> HPS_v2.1_compressed.pt in open_clip's names: rewards.py's table, read
    from right to left."""
    state = {}
    for name, value in model.state_dict().items():
        for theirs, ours in rewards.OPEN_CLIP_NAMES[::-1]:
            back = re.sub(r"[\^$]|\(\[12\]\)", "", theirs).replace("\\", "")
            if r"\1" in ours:
                name = re.sub(r"\.layer_norm([12])\.", r".ln_\1.", name)
            else:
                name = name.replace(ours, back)
        if name in ("visual.proj", "text_projection", "visual_projection.weight", "text_projection.weight"):
            name, value = name.removesuffix(".weight").replace("visual_projection", "visual.proj"), value.T
        state[name] = value.clone()
    for name in [n for n in state if ".self_attn.q_proj." in n]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat(parts)
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")


# --- the judge ------------------------------------------------------------------------------------

FAULTS = {  # what each corruption is called in questions
    "broken": ("missing parts", "broken shapes"), "fused": ("double shapes", "melted shapes"),
    "bleeding": ("stains", "bleeding colors"), "noise": ("noise", "grain"), "blocks": ("shifted blocks", "torn pieces"),
}
ASKING = ("Do you see {} in this picture?", "Is there any {} here?", "Does this picture show {}?")
VAGUE = "Are there artifacts in this picture?"  # when people say "artifacts", they mean these two:
VAGUE_MEANS = ("noise", "blocks")
ORDER = " Answer yes or no."
QUESTION = ("Do you see missing parts, double shapes, stains, noise or shifted blocks in this picture?" + ORDER)


def ask(rng, everything=False):
    """A random question and the set of faults it asks about."""
    if not everything and rng.random() < 0.1:
        return VAGUE + ORDER, set(VAGUE_MEANS)
    kinds = list(FAULTS)
    rng.shuffle(kinds)
    kinds = kinds if everything or rng.random() < 0.4 else kinds[:rng.choice((1, 1, 1, 2, 3))]
    names = [rng.choice(FAULTS[kind]) for kind in kinds]
    listed = ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]
    return rng.choice(ASKING).format(listed) + ORDER, set(kinds)


def build_judge(folder):
    """An untrained Qwen2.5-VL of 0.8 M parameters, saved in its own format."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    rng = random.Random(0)
    corpus = [ask(rng)[0] for _ in range(500)] + ["yes", "no", "Yes", "No", "user", "assistant"] * 50
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer(corpus, words), pad_token=words[0],
                                        eos_token=words[2], padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": words[1:]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    width = 96
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
                         bos_token_id=0, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]}),
        vision_config=dict(depth=3, hidden_size=width, out_hidden_size=width, intermediate_size=256, num_heads=4, patch_size=4,
                           spatial_merge_size=2, window_size=32, fullatt_block_indexes=[0, 1, 2]),
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=False)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=32 * 32).save_pretrained(folder)
    (folder / "artifact.txt").write_text(QUESTION + "\n")


def train_judge(folder, drawn, painted, steps, seed, batch=64, lr=1e-3):
    """Visual question answering about faults. drawn: (pixels, kinds), every kind of question about them;
    painted: (images, clean), the policy's own pictures labelled by gold, asked about with all faults
    named. Learning to answer alone, the model learns only how often yes is right (we tried); a helper
    head that names the faults from the vision tower's output teaches it to look."""
    torch.manual_seed(seed)
    rng, nrng = random.Random(seed), np.random.default_rng(seed)
    build_judge(folder)
    judge = artifact_reward.LocalJudge(folder, "cpu")
    judge.model.train().requires_grad_(True)
    yes, no = judge.tokenizer.convert_tokens_to_ids(["yes", "no"])
    helper, seen = torch.nn.Linear(96, len(FAULTS) + 1), []
    judge.model.model.visual.register_forward_hook(lambda module, inputs, output: seen.append(output.pooler_output))
    parameters = [*judge.model.parameters(), *helper.parameters()]
    opt = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    (pixels, kinds), (images, clean), bar = drawn, painted, trange(steps, desc="judge")
    for step in bar:
        questions, pictures, answers, faults = [], [], [], torch.zeros(batch, len(FAULTS) + 1)
        known = torch.ones(batch, len(FAULTS) + 1)
        for b in range(batch):
            if b % 4 == 0:  # one in four is the policy's: which fault it has is not known, only whether
                i = nrng.integers(len(images))
                question, about = ask(rng, everything=True)
                broken = not clean[i]
                pictures.append(images[i])
                known[b, :-1] = 0
            else:
                i = nrng.integers(len(pixels))
                question, about = ask(rng)
                broken = kinds[i] in about
                pictures.append(Image.fromarray(pixels[i]))
                if kinds[i]:
                    faults[b, list(FAULTS).index(kinds[i])] = 1
            faults[b, -1] = float(not clean[i]) if b % 4 == 0 else float(kinds[i] is not None)
            questions.append(question), answers.append(yes if broken else no)
        seen.clear()
        logits = judge.logits(questions, pictures)
        answer_loss = F.cross_entropy(logits, torch.tensor(answers))
        # A fault sits somewhere: the strongest of the 16 places decides (a soft maximum).
        named = helper(seen[0].view(batch, -1, 96)).logsumexp(1)
        helper_loss = (F.binary_cross_entropy_with_logits(named, faults, reduction="none") * known).sum() / known.sum()
        opt.zero_grad(), (answer_loss + 2 * helper_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step(), schedule.step()
        if step % 10 == 0:
            right = (logits.argmax(1) == torch.tensor(answers)).float().mean().item()
            bar.set_postfix(answer=f"{answer_loss.item():.3f}", helper=f"{helper_loss.item():.3f}", right=f"{right:.2f}")
    judge.model.eval().save_pretrained(folder)


# --- the artifact pairs -----------------------------------------------------------------------------


def paint(policy, rows, each, seed):
    """The policy's pictures for these prompts and what gold says: (rows, images, aligned, clean)."""
    jobs = [(i, k) for i in range(len(rows)) for k in range(each)]
    images, aligned, clean = [], [], []
    for start in trange(0, len(jobs), 64, desc="painting"):
        batch = jobs[start:start + 64]
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
        broken = tiny.corrupt(scene, kind, rng.uniform(.4, 1), rng)
        lines.append(({"prompt": prompt, "source": f"drawn, {kind}"}, tiny.to_image(tiny.draw(scene)), tiny.to_image(broken)))
    (folder / split).mkdir(parents=True, exist_ok=True)
    with generate.atomic(folder / f"{split}.jsonl") as file:
        for i, (line, *pictures) in enumerate(lines):
            names = {side: f"{split}/{i:04d}_{side}.png" for side in ("clean", "broken")}
            for name, image in zip(names.values(), pictures):
                image.save(folder / name)
            file.write(json.dumps({"id": f"{split}-{i:04d}", **line, **names}) + "\n")


def pair_accuracy(reward, folder, split):
    """How often the reward scores the clean picture of a pair higher; a tie is half right (the paper's Table 2)."""
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    clean, broken = (reward(prompts, [Image.open(folder / row[side]) for row in rows]) for side in ("clean", "broken"))
    return ((clean > broken).float() + (clean == broken).float() / 2).mean().item()


@dataclass
class Config:
    out: str = "tiny"  # checkpoints go here
    only: str = "prompts,policy,hps,artifact,pairs"  # stages, in this order; later ones read the earlier ones' files
    seed: int = 0
    vq_steps: int = 2500
    policy_steps: int = 2200
    hps_steps: int = 500  # of each of its two stages
    judge_steps: int = 1500
    flawed: float = 0.2  # share of broken pictures among those the policy learns from: it paints such ones, too


def main(cfg):
    out, stages = Path(cfg.out), cfg.only.split(",")
    rows = {"train": tiny.prompt_rows("train", 100), "test": tiny.prompt_rows("test", 40)}
    if "prompts" in stages:
        for split in rows:
            with generate.atomic(out / "prompts" / f"{split}.jsonl") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[split])
    if "policy" in stages:
        learned, scenes, pixels, _ = make_pictures(24000, cfg.flawed, cfg.seed)
        vq = train_vq(pixels, cfg.vq_steps, cfg.seed)
        generate.save_policy(train_policy(vq, learned, scenes, pixels, cfg.policy_steps, cfg.seed), out / "policy")
    if "hps" in stages:
        accuracy = train_hps(out / "hps", cfg.hps_steps, cfg.seed)
        print(f"hps: {accuracy:.3f} of unseen preferences predicted")
    if "artifact" in stages or "pairs" in stages:
        policy = generate.load_policy(str(out / "policy"))
        painted = {"train": paint(policy, rows["train"], 12, 1), "test": paint(policy, rows["test"], 8, 2)}
        aligned, clean = map(np.array, painted["test"][2:])
        print(f"policy: {(clean >= tiny.CLEAN_ENOUGH).mean():.3f} of its test pictures are artifact-free, {aligned.mean():.3f} aligned")
    if "artifact" in stages:
        _, _, pixels, kinds = make_pictures(16000, 0.5, cfg.seed + 2)
        _, images, _, clean = painted["train"]
        train_judge(out / "artifact", (pixels, kinds), (images, np.array(clean) >= tiny.CLEAN_ENOUGH), cfg.judge_steps, cfg.seed)
    if "pairs" in stages:
        held = {row["prompt"] for row in rows["train"] if zlib.crc32(row["prompt"].encode()) % 3 == 0}
        for split, keep in (("train", lambda p: p not in held), ("validation", lambda p: p in held)):
            chosen = [entry for entry in zip(*painted["train"]) if keep(entry[0]["prompt"])]
            save_pairs(out / "pairs", split, list(zip(*chosen)), 200 if split == "train" else 100, cfg.seed)
        save_pairs(out / "pairs", "test", painted["test"], 200, cfg.seed)
        for name in ("hps", "artifact"):
            accuracy = pair_accuracy(rewards.load(name, checkpoint=out / name), out / "pairs", "test")
            print(f"{name}: scores the clean picture of a test pair higher in {accuracy:.3f}")
