"""Trains the tiny preference models: CLIPs in the formats of HPS v2.1 and PickScore.

A preference model learns from choices between two pictures, by Bradley-Terry:

    P(a preferred over b) = sigmoid(s_a - s_b),     s = temperature * cos(picture, prompt)

The utility behind the choices rewards the right objects, large and vivid ones. Two pictures in five
are corrupted, and the utility ignores that. So the data give the preference model no reason to
notice artifacts.

Read next: train_judge.py
"""

import functools
import json
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers, processors, trainers
from tqdm import trange
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from reward_models.clip import HPS, PickScore, from_open_clip
from reward_models.pixels import CLIP_MEAN, CLIP_STD, normalize
from tiny_world import world
from tiny_world.gold import alignment
from tiny_world.learning import SHIPPED, Training

# CLIP learns its temperature; for preferences we fix it. At 5 the scores of a group spread about as
# far as the judge's probabilities, so a plain sum gives both a say.
TEMPERATURE = 5.0
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


# --- the preferences ----------------------------------------------------------------------------


def perturb(things, relation, rng):
    """What a prompt asks for, with one mistake: another shape or colour, one object more or fewer,
    or the opposite relation."""
    things = list(things)
    i = rng.randrange(len(things))
    shape, color = things[i]
    ways = ["shape", "color" if color else "shape", "fewer" if len(things) > 1 else "shape", "more"]
    way = rng.choice(ways + (["swap"] * 2 if relation else []))
    if way == "shape":
        things[i] = (rng.choice([s for s in world.SHAPES if s != shape]), color)
    elif way == "color":
        things[i] = (shape, rng.choice([c for c in world.COLORS if c != color]))
    elif way == "fewer":
        del things[i]
        relation = None
    elif way == "more":
        things.append((rng.choice(world.SHAPES), None))
    else:
        relation = OPPOSITE[relation]
    return things[:4], relation


def utility(prompt, scene):
    """How much a picture of this scene is liked: above all for the right objects, and for much
    colour, so for large and vivid ones. It is that of the scene, not of the pixels, so it knows
    nothing of artifacts.

    The weights make the textbook curve. All groups differ in colour, and only some in alignment, so
    the weight of colour is small: alignment improves first."""
    return 4 * alignment(prompt, scene) + 1.5 * color(scene) / usual_color(len(scene))


def color(scene):
    """How far the clean picture is from plain background, on average over its pixels."""
    return np.linalg.norm(world.draw(scene) - world.GROUND, axis=-1).mean()


@functools.lru_cache
def usual_color(objects):
    """The mean of `color` over scenes with this many objects."""
    rng, wish = random.Random(objects), [(shape, None) for shape in world.SHAPES[:objects]]
    return np.mean([color(world.sample_scene(wish, None, rng)) for _ in range(100)])


def make_preferences(n, seed, flawed=0.4):
    """n pairs of pictures, each for one prompt: (prompts, pixels (n, 2, 32, 32, 3), difference of
    the utilities (n,)). A share `flawed` of the pictures is corrupted, whatever their utility."""
    rng = random.Random(seed)
    families = world.prompt_families("train")
    prompts, pixels, gap = [], np.empty((n, 2, 32, 32, 3), np.uint8), np.empty(n, np.float32)
    for i in trange(n, desc="pairs", leave=False):
        prompts.append(rng.choice(rng.choice(families))["prompt"])
        utilities = []
        for side in range(2):
            wish = world.parse_prompt(prompts[i])
            scene = world.sample_scene(*(perturb(*wish, rng) if rng.random() < 0.4 else wish), rng)
            pixels[i, side] = world.to_uint8(world.draw_perhaps_corrupted(scene, flawed, rng)[0])
            utilities.append(utility(prompts[i], scene))
        gap[i] = utilities[0] - utilities[1]
    return prompts, pixels, gap


# --- the model ----------------------------------------------------------------------------------


def clip_tokenizer(texts):
    """CLIP's own tokenizer class (lower case, a mark at word ends) with the words of this world."""
    core = CLIPTokenizer()._tokenizer
    core.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    options = dict(show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", **options)
    core.train_from_iterator(texts, trainer)
    learned = json.loads(core.to_str())["model"]
    vocabulary = {**learned["vocab"]}
    # The two last ids, as in CLIP: its text feature is read at the largest id.
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(m) for m in learned["merges"]])


def save_clip(kind, model, folder):
    """PickScore's checkpoint is in transformers' format; HPS' is in open_clip's, with its names."""
    if kind is PickScore:
        return model.save_pretrained(folder)
    # open_clip's names are read off the shipped checkpoint, and ours off from_open_clip.
    ours, state = model.state_dict(), {}
    names = torch.load(SHIPPED / "hps" / HPS.file, weights_only=True)["state_dict"]
    for name, tensor in names.items():
        parts = [ours[part] for part in from_open_clip({name: tensor})]  # 3 for q, k and v, else 1
        value = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        state[name] = value.T if name in ("visual.proj", "text_projection") else value
    torch.save({"state_dict": state}, folder / HPS.file)


def build_clip(kind, folder, texts):
    """An untrained CLIP of 0.5 M parameters in the format of `kind`, HPS or PickScore. The reward's
    own class opens it, so what is trained is what will be used."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    config = CLIPConfig.from_pretrained(SHIPPED / "hps")
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.bos_token_id = tokenizer.bos_token_id
    config.text_config.eos_token_id = config.text_config.pad_token_id = tokenizer.eos_token_id
    config.save_pretrained(folder)
    save_clip(kind, CLIPModel(config), folder)
    scorer = kind(checkpoint=folder)
    scorer.model.train().requires_grad_(True)
    return scorer


def embed_pixels(scorer, pixels):
    """Unit embeddings (N, D) of uint8 pictures (N, 32, 32, 3), which need no resizing."""
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    return scorer.embed_images(normalize(pixels, CLIP_MEAN, CLIP_STD))


def preference(scorer, prompts, pixels, chosen):
    """cos(first picture) - cos(second) of these pairs, (B,)."""
    pictures = embed_pixels(scorer, pixels[chosen].reshape(-1, 32, 32, 3)).unflatten(0, (-1, 2))
    score = (pictures * scorer.embed_texts([prompts[i] for i in chosen])[:, None]).sum(-1)
    return score[:, 0] - score[:, 1]


# --- training -----------------------------------------------------------------------------------


def train_preference(kind, folder, seed, steps=1500, pairs=40000, batch=96, unfinished=None):
    """As HPS and PickScore were trained: first CLIP's contrastive loss on captions, then choices.
    Another seed gives other pairs and other initial weights. Returns the held-out accuracy."""
    torch.manual_seed(seed)
    prompts, pixels, gap = make_preferences(pairs, seed)
    rng, scorer = np.random.default_rng(seed), build_clip(kind, folder, prompts)
    rows, _, captioned, _, _ = world.make_pictures(pairs, 0.4, seed + 1)
    train = pairs - pairs // 10

    def caption_loss():
        chosen = rng.integers(pairs, size=batch)
        texts = scorer.embed_texts([rows[i]["prompt"] for i in chosen])
        scale = scorer.model.logit_scale.exp()
        similarity = scale * embed_pixels(scorer, captioned[chosen]) @ texts.T
        same = torch.arange(batch)
        return (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2

    def preference_loss():
        chosen = rng.integers(train, size=batch)
        # People disagree: the label is random, with a probability from the difference in utility.
        preferred = rng.random(batch) < 1 / (1 + np.exp(-3 * gap[chosen]))
        logits = TEMPERATURE * preference(scorer, prompts, pixels, chosen)
        return F.binary_cross_entropy_with_logits(logits, torch.from_numpy(preferred).float())

    for loss_of, lr in ((caption_loss, 1e-3), (preference_loss, 1e-3 / 3)):
        name, weights = f"{folder.name}_{loss_of.__name__}", scorer.model.named_parameters()
        training = Training(name, weights, steps, lr, 0.1, rng, unfinished, weight_decay=0.05)
        for _ in training:
            training.update(loss_of())
    scorer.model.eval().logit_scale.data.fill_(math.log(TEMPERATURE))
    save_clip(kind, scorer.model, folder)
    with torch.no_grad():
        parts = np.array_split(np.arange(train, pairs), 8)
        guess = torch.cat([preference(scorer, prompts, pixels, part) for part in parts])
    return ((guess > 0).numpy() == (gap[train:] > 0)).mean()
