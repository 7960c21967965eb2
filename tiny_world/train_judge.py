"""Trains the tiny reward models: what people liked (HPS, PickScore), and the judge (Qwen2.5-VL).

A preference model learns from choices between two pictures, Bradley-Terry: P(a liked over b) = sigmoid(s_a - s_b). The
people of this world like the right objects, large and vivid ones. Two pictures in five are broken, and
nobody was asked about that: the blind spot is not planted, it is what the data do not say.

The judge learns to answer questions about faults: "Do you see stains or noise in this picture?" The
answer depends on the question, so that there is something to gain from asking well.

Read next: tiny.py
"""

import json
import math
import random
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import artifact_reward
import rewards
from tiny_world import world as tiny


def bpe_tokenizer(texts, specials, vocab_size=512):
    """A byte-level BPE, as Janus and Qwen have: any text can be written in it, known words are one
    token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


# --- hps, pickscore: what people liked ------------------------------------------------------------

# CLIP's temperature is learned; for preferences it is held. The lower it is, the further apart the cosines: at 5
# about as far as the judge's probabilities, so that a plain sum hears both.
TEMPERATURE = 5.0


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
        relation = {
            "left of": "right of",
            "right of": "left of",
            "above": "below",
            "below": "above",
        }[relation]
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
    families = tiny.training_families()
    prompts, pixels, gap = [], np.empty((n, 2, 32, 32, 3), np.uint8), np.empty(n, np.float32)
    for i in trange(n, desc="pairs", leave=False):
        prompt = rng.choice(rng.choice(families))["prompt"]
        utility = []
        for side in range(2):
            wish = tiny.wanted(prompt)
            scene = tiny.sample_scene(*(perturb(*wish, rng) if rng.random() < 0.4 else wish), rng)
            kind = rng.choice(tiny.CORRUPTIONS) if rng.random() < flawed else None
            picture = (
                tiny.corrupt(scene, kind, rng.uniform(0.4, 1), rng) if kind else tiny.draw(scene)
            )
            pixels[i, side] = np.rint(np.clip(picture, 0, 255))
            utility.append(liking(prompt, scene))
        prompts.append(prompt)
        gap[i] = utility[0] - utility[1]
    return prompts, pixels, gap


def clip_tokenizer(texts, folder):
    """CLIP's own tokenizer class (lower case, a mark at word ends) with a vocabulary of this world."""
    core = CLIPTokenizer()._tokenizer
    core.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=700,
            end_of_word_suffix="</w>",
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    learned = json.loads(core.to_str())["model"]
    vocabulary = {**learned["vocab"]}
    for special in (
        "<|startoftext|>",
        "<|endoftext|>",
    ):  # the two last ids, as in CLIP: its text feature is
        vocabulary[special] = len(vocabulary)  # read at the largest id
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[tuple(m) for m in learned["merges"]])
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_clip(kind, folder, texts):
    """An untrained CLIP of 0.6 M parameters in the checkpoint format of `kind` (rewards.HPS or .PickScore), opened by
    the reward's own code: what is trained is what will be used."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer(texts, folder)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    config = CLIPConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            hidden_act="gelu",
            projection_dim=64,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        ),
        vision_config=dict(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=4,
            hidden_act="gelu",
            projection_dim=64,
        ),
        projection_dim=64,
    )
    config.save_pretrained(folder)
    save_clip(kind, CLIPModel(config), folder)
    scorer = kind(checkpoint=folder)
    scorer.model.train().requires_grad_(True)
    return scorer


def train_preference(kind, folder, steps, seed, pairs=12000, batch=96, lr=1e-3):
    """As HPS and PickScore were made: a CLIP, trained first to match pictures with their captions, then on
    preferences by Bradley-Terry, P(a liked over b) = sigmoid(s (cos(a) - cos(b))). Another seed gives another
    opinion on other pairs, from other initial weights. Returns its accuracy on unseen pairs."""
    torch.manual_seed(seed)
    prompts, pixels, gap = make_preferences(pairs, seed)
    rng, scorer, unseen = (
        np.random.default_rng(seed),
        build_clip(kind, folder, prompts),
        pairs // 10,
    )
    rows, _, captioned, _, _ = tiny.make_pictures(pairs, 0.4, seed + 1)

    def match_captions():
        pick = rng.integers(pairs, size=batch)
        texts = scorer.embed_texts([rows[i]["prompt"] for i in pick])
        similarity = (
            scorer.model.logit_scale.exp() * embed_pixels(scorer, captioned[pick]) @ texts.T
        )
        same = torch.arange(batch)
        return (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2

    def prefer():
        pick = rng.integers(pairs - unseen, size=batch)
        # People are not of one mind: the label is a coin weighted by the difference in liking.
        liked = torch.from_numpy(rng.random(batch) < 1 / (1 + np.exp(-3 * gap[pick]))).float()
        return F.binary_cross_entropy_with_logits(
            TEMPERATURE * preference(scorer, prompts, pixels, pick), liked
        )

    for loss_of, peak in ((match_captions, lr), (prefer, lr / 3)):
        opt = torch.optim.AdamW(scorer.model.parameters(), lr=peak, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, peak, total_steps=steps, pct_start=0.1)
        bar = trange(steps, desc=f"{folder.name}, {loss_of.__name__}")
        for step in bar:
            loss = loss_of()
            opt.zero_grad(), loss.backward()
            torch.nn.utils.clip_grad_norm_(scorer.model.parameters(), 1.0)
            opt.step(), schedule.step()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    scorer.model.eval()
    scorer.model.logit_scale.data.fill_(math.log(TEMPERATURE))
    with torch.no_grad():
        guess = torch.cat(
            [
                preference(scorer, prompts, pixels, part)
                for part in np.array_split(np.arange(pairs - unseen, pairs), 8)
            ]
        )
    save_clip(kind, scorer.model, folder)
    return ((guess > 0).numpy() == (gap[-unseen:] > 0)).mean()


def embed_pixels(scorer, pixels):
    """Clip.pixels and .embed_images for a whole uint8 batch (N, 32, 32, 3), which needs no resizing."""
    mean, std = torch.tensor(rewards.CLIP_MEAN), torch.tensor(rewards.CLIP_STD)
    return scorer.embed_images(((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2))


def preference(scorer, prompts, pixels, pick):
    """cos(first picture) - cos(second), (B,)."""
    pictures = embed_pixels(scorer, pixels[pick].reshape(-1, 32, 32, 3)).unflatten(0, (-1, 2))
    score = (pictures * scorer.embed_texts([prompts[i] for i in pick])[:, None]).sum(-1)
    return score[:, 0] - score[:, 1]


def save_clip(kind, model, folder):
    """PickScore's checkpoint is transformers' own. HPS': HPS_v2.1_compressed.pt in open_clip's names, that is
    rewards.py's table read from right to left."""
    if kind is rewards.PickScore:
        return model.save_pretrained(folder)
    state = {}
    for name, value in model.state_dict().items():
        for theirs, ours in rewards.OPEN_CLIP_NAMES[::-1]:
            back = re.sub(r"[\^$]|\(\[12\]\)", "", theirs).replace("\\", "")
            if r"\1" in ours:
                name = re.sub(r"\.layer_norm([12])\.", r".ln_\1.", name)
            else:
                name = name.replace(ours, back)
        if name in (
            "visual.proj",
            "text_projection",
            "visual_projection.weight",
            "text_projection.weight",
        ):
            name, value = (
                name.removesuffix(".weight").replace("visual_projection", "visual.proj"),
                value.T,
            )
        state[name] = value.clone()
    for name in [n for n in state if ".self_attn.q_proj." in n]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat(parts)
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")


# --- the judge ------------------------------------------------------------------------------------

FAULTS = {  # what each corruption is called in questions
    "broken": ("missing parts", "broken shapes"),
    "fused": ("double shapes", "melted shapes"),
    "bleeding": ("stains", "bleeding colors"),
    "noise": ("noise", "grain"),
    "blocks": ("shifted blocks", "torn pieces"),
}
ASKING = ("Do you see {} in this picture?", "Is there any {} here?", "Does this picture show {}?")
VAGUE = "Are there artifacts in this picture?"  # when people say "artifacts", they mean these two:
VAGUE_MEANS = ("noise", "blocks")
ORDER = " Answer yes or no."


def ask(rng, everything=False):
    """A random question and the set of faults it asks about."""
    if not everything and rng.random() < 0.1:
        return VAGUE + ORDER, set(VAGUE_MEANS)
    kinds = list(FAULTS)
    rng.shuffle(kinds)
    kinds = kinds if everything or rng.random() < 0.4 else kinds[: rng.choice((1, 1, 1, 2, 3))]
    names = [rng.choice(FAULTS[kind]) for kind in kinds]
    listed = ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]
    return rng.choice(ASKING).format(listed) + ORDER, set(kinds)


def judge_tokenizer():
    """Qwen's special tokens and chat template, with the words of questions about faults."""
    words = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    rng = random.Random(0)
    corpus = [ask(rng)[0] for _ in range(500)] + [
        "yes",
        "no",
        "Yes",
        "No",
        "user",
        "assistant",
    ] * 50
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe_tokenizer(corpus, words),
        pad_token=words[0],
        eos_token=words[2],
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": words[1:]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def build_judge(folder):
    """An untrained Qwen2.5-VL of 0.8 M parameters, saved in its own format."""
    tokenizer = judge_tokenizer()
    width = 96
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=3,  # of 32 numbers each: the smallest that vLLM's attention on a CPU knows
            num_key_value_heads=3,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
        ),
        vision_config=dict(
            depth=3,
            hidden_size=width,
            out_hidden_size=width,
            intermediate_size=256,
            num_heads=4,
            patch_size=4,
            spatial_merge_size=2,
            window_size=32,
            fullatt_block_indexes=[0, 1, 2],
        ),
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=False,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=32 * 32
    ).save_pretrained(folder)


def quiz(drawn, painted, batch, rng, nrng):
    """(questions, pictures, is it broken in the way asked about, which fault shows where (batch, 16, faults)). One in four
    pictures is the policy's own: which fault it has is not known, only whether, so all are asked about."""
    (pixels, kinds, where), (images, clean) = drawn, painted
    questions, pictures, broken, faults = [], [], [], torch.zeros(batch, 16, len(FAULTS))
    for b in range(batch):
        if b < batch // 4:
            i = nrng.integers(len(images))
            question, _ = ask(rng, everything=True)
            broken.append(not clean[i])
            pictures.append(images[i])
        else:
            i = nrng.integers(len(pixels))
            question, about = ask(rng)
            broken.append(kinds[i] in about)
            pictures.append(Image.fromarray(pixels[i]))
            if kinds[i]:
                faults[b, :, list(FAULTS).index(kinds[i])] = torch.from_numpy(where[i]).float()
        questions.append(question)
    return questions, pictures, broken, faults


def train_judge(folder, drawn, painted, steps, seed, batch=64, lr=1e-3):
    """Visual question answering about faults. drawn: (pixels, kinds, where), every kind of question about
    them; painted: (images, clean), the policy's own pictures labelled by gold, asked about with all faults
    named. From answers alone the model learns only how often yes is right (we tried). A helper head, thrown
    away afterwards, must say at each of the vision tower's 16 places which fault shows there: that teaches it
    to look."""
    torch.manual_seed(seed)
    rng, nrng = random.Random(seed), np.random.default_rng(seed)
    build_judge(folder)
    judge = artifact_reward.LocalJudge(folder, "cpu")
    judge.model.train().requires_grad_(True)
    yes, no = judge.tokenizer.convert_tokens_to_ids(["yes", "no"])
    helper, seen = torch.nn.Linear(96, len(FAULTS)), []
    judge.model.model.visual.register_forward_hook(
        lambda module, inputs, output: seen.append(output.pooler_output)
    )
    parameters = [*judge.model.parameters(), *helper.parameters()]
    opt = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    bar = trange(steps, desc="judge")
    for step in bar:
        questions, pictures, broken, faults = quiz(drawn, painted, batch, rng, nrng)
        answers = torch.tensor([yes if it_is else no for it_is in broken])
        seen.clear()
        logits = judge.logits(questions, pictures)
        answer_loss = F.cross_entropy(logits, answers)
        named = helper(seen[0].view(batch, 16, 96))[batch // 4 :]
        helper_loss = F.binary_cross_entropy_with_logits(
            named, faults[batch // 4 :], pos_weight=torch.tensor(4.0)
        )
        opt.zero_grad(), (answer_loss + 5 * helper_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step(), schedule.step()
        if step % 10 == 0:
            right = (logits.argmax(1) == answers).float().mean().item()
            bar.set_postfix(
                answer=f"{answer_loss.item():.3f}",
                helper=f"{helper_loss.item():.3f}",
                right=f"{right:.2f}",
            )
    judge.model.eval().save_pretrained(folder)
