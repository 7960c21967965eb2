"""GIT (arXiv:2205.14100), as T2I-R1 uses it: a yes/no question for each attribute of the prompt.

    score = mean over the questions of P(yes) / (P(yes) + P(no)),      question: "a red apple?"

The nouns come from the fields of T2I-R1's training file: `attr_nouns` ("a red apple", "a wooden
desk"), or `nouns` if there are none.   Read next: judge.py
"""

import collections
import math

import torch
from transformers import AutoTokenizer

from reward_models.grounding_dino import odd_nouns, task_of
from training.decode import to_rgb
from training.weights import load_model, load_part


class GIT:
    """The mean over a prompt's questions.

    As in T2I-R1, prompts about places and counts are left to GroundingDINO: all their pictures get
    0. Other prompts without attributes and nouns cannot be checked: NaN."""

    range = (0.0, 1.0)
    needs = ("nouns",)
    checkpoint = "microsoft/git-large-vqav2"
    gigabytes = 1.6
    reference = "T2I-R1, arXiv:2505.00703"

    def __init__(self, device="cpu", checkpoint=None):
        from transformers import GitForCausalLM
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        folder, self.device = checkpoint or self.checkpoint, device
        self.model = load_model(GitForCausalLM, folder).to(device).eval().requires_grad_(False)
        self.tokenizer = load_part(AutoTokenizer, folder)
        self.processor = load_part(CLIPImageProcessorPil, folder)
        self.failures = collections.Counter()
        self.yes, self.no = (self.encode(word)[0] for word in ("yes", "no"))

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.inference_mode()
    def prob_yes(self, questions, images):
        """(N,): P(yes) / (P(yes) + P(no)) for each question and its picture."""
        # [CLS] and the words, no [SEP]: the model continues the question with the answer.
        ids = [[self.tokenizer.cls_token_id, *self.encode(question)] for question in questions]
        words = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        pixels = self.processor([to_rgb(image) for image in images], return_tensors="pt")
        logits = self.model(**words.to(self.device), **pixels.to(self.device)).logits.float()
        patches = logits.shape[1] - words.input_ids.shape[1]  # the picture's tokens come first
        last = patches + words.attention_mask.sum(1) - 1
        both = logits[torch.arange(len(ids)), last][:, [self.yes, self.no]]
        return both.softmax(-1)[:, 0].cpu()

    def __call__(self, prompts, images, metadata=None):
        rows = list(metadata or [{}] * len(images))
        for i, reason in enumerate(map(odd_nouns, rows)):
            if reason:
                self.failures[reason] += 1
                rows[i] = {}
        skipped = [task_of(row) in ("spatial", "numeracy") for row in rows]
        nouns = [row.get("attr_nouns") or row.get("nouns") or [] for row in rows]
        jobs = [(i, f"{n}?") for i in range(len(rows)) if not skipped[i] for n in nouns[i]]
        answers = [[] for _ in images]
        for start in range(0, len(jobs), 32):
            indices, questions = zip(*jobs[start : start + 32])
            probabilities = self.prob_yes(questions, [images[i] for i in indices])
            for i, probability in zip(indices, probabilities.tolist()):
                answers[i].append(probability)
        defaults = [0.0 if skip else math.nan for skip in skipped]
        scores = [sum(a) / len(a) if a else default for a, default in zip(answers, defaults)]
        return torch.tensor(scores)
