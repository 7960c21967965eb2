"""Trains the tiny judge, a Qwen2.5-VL that answers questions about artifacts with yes or no.

"Do you see stains or noise in this picture?" The answer depends on the question, so a better
question makes a better judge; apo.py searches for one.

Read next: train_dino.py
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reward_models.judge import LocalJudge
from tiny_world.learning import BETAS, SHIPPED, Training, bpe_tokenizer
from tiny_world.questions import FAULTS, random_question

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION]


def judge_tokenizer():
    """Qwen's special tokens and chat template, with the words of questions about faults."""
    rng = random.Random(0)
    texts = [random_question(rng)[0] for _ in range(500)]
    texts += ["yes", "no", "Yes", "No", "user", "assistant"] * 50
    core = bpe_tokenizer(texts, SPECIALS)
    names = dict(pad_token=SPECIALS[0], eos_token=SPECIALS[2], padding_side="left")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    tokenizer.chat_template = (SHIPPED / "artifact" / "chat_template.jinja").read_text()
    return tokenizer


def build_judge(folder):
    """Save an untrained Qwen2.5-VL of 0.9 M parameters in its own format."""
    tokenizer, config = judge_tokenizer(), Qwen2_5_VLConfig.from_pretrained(SHIPPED / "artifact")
    config.text_config.vocab_size = len(tokenizer)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil.from_pretrained(SHIPPED / "artifact").save_pretrained(folder)


def sample_examples(drawn, sampled, batch, rng, nrng):
    """A training batch: (questions, pictures, the right answers, faults (batch, 16, kinds) marking
    which fault shows in which cell).

    One picture in four is the policy's own. Gold says whether it has artifacts but not of which
    kind, so its question names all kinds."""
    (pixels, kinds, where), (images, clean) = drawn, sampled
    questions, pictures, broken, faults = [], [], [], torch.zeros(batch, 16, len(FAULTS))
    for b in range(batch):
        if b < batch // 4:
            i = nrng.integers(len(images))
            question, _ = random_question(rng, everything=True)
            broken.append(not clean[i])
            pictures.append(images[i])
        else:
            i = nrng.integers(len(pixels))
            question, named = random_question(rng)
            broken.append(kinds[i] in named)
            pictures.append(Image.fromarray(pixels[i]))
            if kinds[i]:
                faults[b, :, list(FAULTS).index(kinds[i])] = torch.from_numpy(where[i]).float()
        questions.append(question)
    return questions, pictures, broken, faults


def train_judge(folder, drawn, sampled, seed, steps=2200, batch=64, unfinished=None):
    """Visual question answering about faults. drawn: (pixels, kinds, where) of `make_pictures`;
    sampled: (images, clean), the policy's own pictures and whether gold calls them artifact-free.

    From the answers alone the model learns only how frequent "yes" is. Therefore an auxiliary head,
    not kept after training, must also tell for each of the 16 cells which fault shows there."""
    torch.manual_seed(seed)
    nrng = np.random.default_rng(seed)
    build_judge(folder)
    judge = LocalJudge(folder, "cpu")
    judge.model.train().requires_grad_(True)
    yes, no = judge.tokenizer.convert_tokens_to_ids(["yes", "no"])
    auxiliary_head, seen = torch.nn.Linear(96, len(FAULTS)), []
    judge.model.model.visual.register_forward_hook(
        lambda module, inputs, output: seen.append(output.pooler_output)
    )
    parameters = [*judge.model.named_parameters(), *auxiliary_head.named_parameters()]
    options = dict(betas=BETAS, weight_decay=0.05)
    training = Training("judge", parameters, steps, 1e-3, 0.1, nrng, unfinished, **options)
    own = batch // 4  # the policy's pictures, whose faults are not known
    for step in training:
        rng = random.Random(f"{seed} {step}")
        questions, pictures, broken, faults = sample_examples(drawn, sampled, batch, rng, nrng)
        answers = torch.tensor([yes if is_broken else no for is_broken in broken])
        seen.clear()
        logits = judge.logits(questions, pictures)
        loss = F.cross_entropy(logits, answers)
        cells = auxiliary_head(seen[0].view(batch, 16, 96))[own:]
        weight = torch.tensor(4.0)  # of the cells with a fault, which are rare
        auxiliary = F.binary_cross_entropy_with_logits(cells, faults[own:], pos_weight=weight)
        correct = (logits.argmax(1) == answers).float().mean()
        training.update(loss + 5 * auxiliary, answer=loss, auxiliary=auxiliary, correct=correct)
    judge.model.eval().save_pretrained(folder)
