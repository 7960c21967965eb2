"""ORM and UnifiedReward: LLaVA-OneVision models that were trained to judge pictures.

    orm      P(yes) / (P(yes) + P(no)), first token of the answer     LLaVA-OneVision, 8 B (T2I-R1)
    unified  "Final Score: 3.5", read from what the model writes      UnifiedReward, 7 B

Such a checkpoint knows its question from training: another wording is another reward.
Read next: vqascore.py
"""

import functools
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence

from reward_models.hub import NAMES, count, snapshot
from reward_models.judge import ServedJudge
from reward_models.pixels import in_batches, normalize, pad_to_square, to_tensor
from training.files import ROOT, usage_error
from training.weights import load_model, load_part, readable

# Shapes:  B pictures   S tokens   D numbers a token   V tokens in the vocabulary

# --- LLaVA-OneVision, from a checkpoint in LLaVA's own format -----------------------------------

SAME_FIELDS = (  # of the language model, in LLaVA's and transformers' configuration
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act rms_norm_eps max_position_embeddings"
)


def pad_rows(rows, pad, side):
    """Lists of ids -> (ids, mask), (B, S). side: "left" or "right", where the padding goes."""
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, True, pad, side), pad_sequence(masks, True, 0, side)


def model_config(folder, tokenizer):
    """transformers' configuration. LLaVA's own says nothing about the vision tower, a SigLIP.

    The tower's sizes are those of the weights. Its picture size is in its name. It has 16 heads."""
    from transformers import LlavaOnevisionConfig

    theirs, shapes = json.loads((folder / "config.json").read_text()), {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    if not shapes:
        usage_error(f"{folder}: no *.safetensors there; give the folder of a LLaVA-OneVision")
    text = dict(
        {name: theirs[name] for name in SAME_FIELDS.split()},
        model_type="qwen2",
        vocab_size=shapes["lm_head.weight"][0],
        use_sliding_window=False,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": theirs["rope_theta"]},
    )
    tower = "model.vision_tower.vision_tower.vision_model."
    width, _, _, patch = shapes[tower + "embeddings.patch_embedding.weight"]
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=width,
        patch_size=patch,
        num_attention_heads=16,
        intermediate_size=shapes[tower + "encoder.layers.0.mlp.fc1.weight"][0],
        image_size=int(theirs["mm_vision_tower"].rsplit("-", 1)[1]),
        # LLaVA deletes the last layer, and takes the output of the others before the final norm.
        num_hidden_layers=count(shapes, re.escape(tower) + r"encoder\.layers\.(\d+)"),
        vision_use_head=False,
    )
    options = dict(image_token_index=len(tokenizer), tie_word_embeddings=False)
    return LlavaOnevisionConfig(text_config=text, vision_config=vision, **options)


class LlavaOneVision:
    """A fine-tuned LLaVA-OneVision-Qwen2 in the `llava_qwen` format. One picture per question."""

    # Qwen's chat template, with the picture where LLaVA puts it: before the question, then a blank.
    # The two parts are tokenized separately, so "<image>" in a prompt is not a second picture.
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    after = "<|im_end|>\n<|im_start|>assistant\n"

    def __init__(self, folder, device):
        from transformers import LlavaOnevisionForConditionalGeneration as Model
        from transformers import Qwen2Tokenizer

        folder, self.tokenizer = Path(folder), load_part(Qwen2Tokenizer, folder)
        self.pad = self.tokenizer.pad_token_id or 0
        with readable(folder):
            config = model_config(folder, self.tokenizer)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        options = dict(config=config, key_mapping=dict(NAMES["llava"]), dtype=dtype)
        self.model = load_model(Model, folder, **options)
        self.model.to(device).eval().requires_grad_(False)

    def encode_pictures(self, images):
        """(B, patches + 1, D): the projected patches of each picture, and one "newline"."""
        core, size = self.model.model, self.model.config.vision_config.image_size
        squares = [to_tensor(pad_to_square(image, size, (127,) * 3)) for image in images]
        pixels = normalize(torch.stack(squares), (0.5,) * 3, (0.5,) * 3)
        pixels = pixels.to(self.model.device, self.model.dtype)
        patches = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        newline = core.image_newline.expand(len(images), 1, -1)
        return torch.cat([core.multi_modal_projector(patches), newline], 1)

    def embed(self, questions, images):
        """(embeddings (B, S, D), mask (B, S)), padded on the left."""
        pictures, mark = self.encode_pictures(images), self.model.config.image_token_id
        before = self.tokenizer(self.before).input_ids + [mark] * pictures.shape[1]
        afters = [self.tokenizer(f" {question}{self.after}").input_ids for question in questions]
        ids, mask = pad_rows([before + after for after in afters], self.pad, "left")
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        x = self.model.get_input_embeddings()(ids)
        x[ids == mark] = pictures.flatten(0, 1)
        return x, mask

    @torch.inference_mode()
    def logits(self, questions, images):
        """(B, V) float32, of the first token of the answer."""
        x, mask = self.embed(questions, images)
        options = dict(logits_to_keep=1, use_cache=False)
        return self.model(inputs_embeds=x, attention_mask=mask, **options).logits[:, -1].float()

    @torch.inference_mode()
    def write(self, questions, images, max_tokens):
        """What the model writes about each picture: greedy decoding, 8 pictures at a time."""
        options, texts = dict(max_new_tokens=max_tokens, do_sample=False, pad_token_id=self.pad), []
        for i in range(0, len(images), 8):
            x, mask = self.embed(questions[i : i + 8], images[i : i + 8])
            ids = self.model.generate(inputs_embeds=x, attention_mask=mask, **options)
            texts += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts


# --- ORM: a probability -------------------------------------------------------------------------


class ORM:
    """T2I-R1's outcome reward model: does the picture show the prompt, yes or no?

    One forward pass, the model's own probabilities. (Released: one token is sampled at temperature
    0.3; all but "yes" and "no" count 0; the probabilities are those after temperature and cut-off.
    Such scores are noisy, and often tied.)"""

    range = (0.0, 1.0)
    needs = ("text",)
    checkpoint = "CaraJ/ORM-T2I-R1"
    gigabytes = 16.1
    reference = "T2I-R1, arXiv:2505.00703"
    min_share = 0.001  # of yes and no together in the first token; below it their ratio is noise
    question = (  # of its training
        "This image is generated by a prompt: {}. Does this image accurately represent the "
        "prompt? Please answer yes or no without explanation."
    )

    def __init__(self, device="cpu", checkpoint=None):
        self.judge = LlavaOneVision(snapshot(checkpoint or self.checkpoint), device)
        self.failures = Counter()

    def spellings(self, *words):
        ids = [self.judge.tokenizer.convert_tokens_to_ids(word) for word in words]
        return [id_ for id_ in ids if id_ is not None]

    def score(self, prompts, images):
        logits = self.judge.logits([self.question.format(prompt) for prompt in prompts], images)
        yes = logits[:, self.spellings("yes", "Yes")].logsumexp(-1)
        no = logits[:, self.spellings("no", "No")].logsumexp(-1)
        noise = yes.logaddexp(no) - logits.logsumexp(-1) < math.log(self.min_share)
        if noise.any():
            self.failures["neither yes nor no (they have less than 0.1 %)"] += int(noise.sum())
        return (yes - no).sigmoid().masked_fill(noise, math.nan)

    def __call__(self, prompts, images, metadata=None):
        return in_batches(self.score, 8, prompts, images)


# --- UnifiedReward: a number in a text ----------------------------------------------------------


def written_score(text):
    """The score in UnifiedReward's text, from 1 to 5; NaN if there is none, or one out of range.

    >>> written_score("It is sharp. Final Score: 3.5")
    3.5
    >>> written_score("Alignment Score (1-5): 4\\nCoherence Score (1-5): 2\\nStyle Score (1-5): 3")
    3.0
    >>> written_score("Final Score: 4/10"), written_score("Alignment Score (1-5): 5\\nCoherence")
    (nan, nan)
    """
    number = r"([0-9]*\.?[0-9]+)(?!\.?[0-9]|\s*/(?!\s*5\b))"  # of 5, if it says of what
    parts = r"(?:Alignment|Coherence|Style) Score(?: \(1-5\))?"
    found = re.findall(rf"Final Score:\s*{number}", text)[-1:]
    if not found:
        found = re.findall(rf"{parts}:\s*{number}", text)
        found = found if len(found) == 3 else []
    score = sum(map(float, found)) / len(found) if found else math.nan
    return score if 1 <= score <= 5 else math.nan


class Unified:
    """UnifiedReward (arXiv:2503.05236) writes about a picture and its caption, and gives 1 to 5.

    -qwen-7b is a Qwen2.5-VL, served by vLLM. -7b-v1.5 has LLaVA's format: give its folder as
    checkpoint, and it runs in this process. Its training prompt, a page long, is not ours to copy:
    prompts/unified.txt asks the same in our words. A unified.txt in the folder replaces it."""

    range = (1.0, 5.0)
    needs = ("text", "judge")
    checkpoint = "CodeGoat24/UnifiedReward-qwen-7b"
    reference = "UnifiedReward, arXiv:2503.05236"
    how = f"vllm serve {checkpoint} --port 8080"
    url, max_tokens = "http://127.0.0.1:8080/v1", 512

    def __init__(self, device="cpu", checkpoint=None, judge_urls=()):
        self.remote = bool(judge_urls) or not checkpoint
        if self.remote:
            self.judge = ServedJudge(list(judge_urls) or [self.url], start=self.how)
        else:
            self.judge = LlavaOneVision(snapshot(checkpoint), device)
        own = Path(checkpoint or "") / "unified.txt"
        text = own if checkpoint and own.is_file() else ROOT / "prompts" / "unified.txt"
        self.question = text.read_text(encoding="utf-8").strip()

        self.address = self.judge.address if self.remote else ""
        self.failures = self.judge.failures if self.remote else Counter()

    def __call__(self, prompts, images, metadata=None):
        questions = [self.question.replace("{}", prompt) for prompt in prompts]
        if self.remote:
            ask = functools.partial(self.judge.write, max_tokens=self.max_tokens)
            pairs = zip(questions, images)
            texts = self.judge.ask([functools.partial(ask, text, [image]) for text, image in pairs])
        else:
            texts = self.judge.write(questions, images, self.max_tokens)
        scores = [written_score(text or "") for text in texts]
        for text, score in zip(texts, scores):
            if text is not None and math.isnan(score):
                self.failures[f"no score from 1 to 5 in the answer {text[:60]!r}"] += 1
        return torch.tensor(scores)
