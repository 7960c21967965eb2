"""Does the picture show what the prompt asks for? T2I-R1's two checkers of facts, GroundingDINO and GIT.

A preference model has a feeling; these two look. GroundingDINO finds a phrase in a picture and says where:
so objects can be counted and their places compared. GIT answers a question: "a red apple?" yes or no.
What to look for comes with the prompt, in the fields of T2I-R1's training file:

    nouns           what must be there                       gdino: share found; git: if there are no attr_nouns
    attr_nouns      "a red apple", "a wooden desk"           git: mean of P(yes) / (P(yes) + P(no))
    numeracy_info   [{"obj_name", "num"}]                    gdino: right count 1, wrong count .2, none 0
    spatial_info    {"obj1", "obj2", "locality"}             gdino: .2 for each, .5 for the place: .9 at most

Where this differs from the released code (T2I-R1's and ArtifactReward's are the same), the line says so.
A prompt without any of these fields, such as one of your own, cannot be checked: NaN.

Read next: rewards.py
"""

import math

import torch
from transformers import AutoTokenizer

# --- places and counts: boxes are (x0, y0, x1, y1), in shares of the picture ------------------------


def iou(a, b):
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def suppress(boxes, scores, threshold=0.5):
    """Greedy non-maximum suppression: the best box stays, boxes that overlap it too much go. Returns what stays.

    The released code hands it boxes as (center, size), which it reads as corners: one object found three
    times is counted three times."""
    order, kept = sorted(range(len(boxes)), key=lambda i: -scores[i]), []
    for i in order:
        if all(iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return [boxes[i] for i in kept]


# Words of place -> direction of the first object as seen from the second. The released code has no branch for
# "above" and "on top of": the place of one spatial prompt in five (437 of 2,195) is never rewarded.
DIRECTIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "top of": (0, -1),
    "below": (0, 1),
    "bottom of": (0, 1),
}
NEAR = 0.4  # of the picture's side: 150 of 384 pixels. The released code compares 150 with shares: always near.


def position(locality, a, b, overlap=0.1):
    """How well "a is `locality` b" holds, in [0, 1]. Along the named axis farther than across it; an overlap
    above `overlap` lowers the score in proportion. Unknown words: 0."""
    dx, dy = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    if any(word in locality for word in ("next to", "near", "on side of")):
        return min(1.0, NEAR / max(abs(dx), abs(dy), 1e-9))
    for word, (x, y) in DIRECTIONS.items():
        if word in locality:
            along, across = dx * x + dy * y, abs(dx * y) + abs(dy * x)
            if along <= 0 or along <= across:
                return 0.0
            return 1.0 if iou(a, b) < overlap else overlap / iou(a, b)
    return 0.0


def detection_score(found, row):
    """The reward of one picture. found: phrase -> [(score, box)], every detection above the threshold."""
    if row.get("spatial_info"):
        first, second = row["spatial_info"]["obj1"], row["spatial_info"]["obj2"]
        score = 0.2 * sum(bool(found.get(phrase)) for phrase in (first, second))
        if found.get(first) and found.get(second):
            a, b = (max(found[phrase])[1] for phrase in (first, second))
            score += 0.5 * position(row["spatial_info"]["locality"], a, b)
        return score
    if row.get("numeracy_info"):
        points = 0.0
        for item in row["numeracy_info"]:
            hits = found.get(item["obj_name"], [])
            count = len(suppress([box for _, box in hits], [score for score, _ in hits]))
            points += 1.0 if hits and count == item["num"] else 0.2 if hits else 0.0
        return points / len(row["numeracy_info"])
    if row.get("nouns"):
        return sum(bool(found.get(noun)) for noun in row["nouns"]) / len(row["nouns"])
    return math.nan


def phrases_of(row):
    """What to look for, each phrase once."""
    phrases = [*(row.get("nouns") or [])]
    phrases += [row["spatial_info"][k] for k in ("obj1", "obj2")] if row.get("spatial_info") else []
    phrases += [item["obj_name"] for item in row.get("numeracy_info") or []]
    return list(dict.fromkeys(phrases))


class GDino:
    """GroundingDINO (arXiv:2303.05499) as T2I-R1 uses it: are the objects there, how many, and where?"""

    range = (0.0, 1.0)
    needs = ("nouns",)
    checkpoint = "IDEA-Research/grounding-dino-tiny"
    reference = "T2I-R1, arXiv:2505.00703"
    threshold = 0.3

    def __init__(self, device="cpu", checkpoint=None):
        from transformers import GroundingDinoForObjectDetection
        from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
            GroundingDinoImageProcessorPil,
        )

        folder = str(checkpoint or self.checkpoint)
        self.model = (
            GroundingDinoForObjectDetection.from_pretrained(folder)
            .to(device)
            .eval()
            .requires_grad_(False)
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor, self.device = GroundingDinoImageProcessorPil.from_pretrained(folder), device

    @torch.inference_mode()
    def detect(self, phrases, images):
        """phrases: a list for each picture. Returns for each picture phrase -> [(score, box)]."""
        captions = [" . ".join(wanted).lower() + "." for wanted in phrases]
        words = self.tokenizer(
            captions, padding=True, return_tensors="pt", return_offsets_mapping=True
        )
        offsets = words.pop("offset_mapping").tolist()
        pixels = self.processor(
            images=[image.convert("RGB") for image in images], return_tensors="pt"
        )
        output = self.model(**words.to(self.device), **pixels.to(self.device))
        probabilities, boxes = (
            output.logits.float().sigmoid().cpu(),
            output.pred_boxes.float().cpu(),
        )
        corners = torch.cat(
            [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1
        )
        results = []
        for i, wanted in enumerate(phrases):
            found, start = {}, 0
            for phrase in wanted:
                # All tokens of the phrase, however many words it has. (The released code takes the first word and
                # the last, and never recognises a noun of three words again.)
                end = start + len(phrase)
                columns = [
                    t for t, (s, e) in enumerate(offsets[i]) if s >= start and e <= end and e > s
                ]
                score = probabilities[i][:, columns].mean(1)
                hits = (score > self.threshold).nonzero()[:, 0].tolist()
                found[phrase] = [(score[q].item(), corners[i, q].tolist()) for q in hits]
                start = end + 3  # " . "
            results.append(found)
        return results

    def __call__(self, prompts, images, metadata=None):
        rows, scores = list(metadata or [{}] * len(images)), [math.nan] * len(images)
        known = [i for i, row in enumerate(rows) if phrases_of(row)]
        for start in range(0, len(known), 8):
            part = known[start : start + 8]
            for i, found in zip(
                part, self.detect([phrases_of(rows[i]) for i in part], [images[i] for i in part])
            ):
                scores[i] = detection_score(found, rows[i])
        return torch.tensor(scores)


# --- questions ------------------------------------------------------------------------------------


class GIT:
    """GIT (arXiv:2205.14100), asked "a red apple?" for each attribute and noun: P(yes) / (P(yes) + P(no)).

    As in T2I-R1, prompts about places and numbers are none of its business: 0 for all their pictures."""

    range = (0.0, 1.0)
    needs = ("nouns",)
    checkpoint = "microsoft/git-large-vqav2"
    reference = "T2I-R1, arXiv:2505.00703"

    def __init__(self, device="cpu", checkpoint=None):
        from transformers import GitForCausalLM
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        folder = str(checkpoint or self.checkpoint)
        self.model = GitForCausalLM.from_pretrained(folder).to(device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor, self.device = CLIPImageProcessorPil.from_pretrained(folder), device
        self.yes, self.no = (
            self.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no")
        )

    @torch.inference_mode()
    def answer(self, questions, images):
        """P(yes) / (P(yes) + P(no)) for each question and its picture, (N,)."""
        # [CLS] and the words, no [SEP]: the answer goes on from the question.
        ids = [
            [self.tokenizer.cls_token_id, *self.tokenizer.encode(q, add_special_tokens=False)]
            for q in questions
        ]
        words = self.tokenizer.pad(
            {"input_ids": ids}, padding_side="right", return_tensors="pt"
        ).to(self.device)
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt").to(
            self.device
        )
        logits = self.model(**words, **pixels).logits.float()
        last = (
            logits.shape[1] - words.input_ids.shape[1] + words.attention_mask.sum(1) - 1
        )  # after the picture's tokens
        both = logits[torch.arange(len(ids)), last][:, [self.yes, self.no]]
        return both.softmax(-1)[:, 0].cpu()

    def __call__(self, prompts, images, metadata=None):
        rows, jobs, scores = list(metadata or [{}] * len(images)), [], []
        for i, row in enumerate(rows):
            jobs += [
                (i, f"{noun}?")
                for noun in row.get("attr_nouns") or row.get("nouns") or []
                if not (row.get("spatial_info") or row.get("numeracy_info"))
            ]
        answers = [[] for _ in images]
        for start in range(0, len(jobs), 32):
            part = jobs[start : start + 32]
            for (i, _), p in zip(
                part, self.answer([q for _, q in part], [images[i] for i, _ in part]).tolist()
            ):
                answers[i].append(p)
        for row, mine in zip(rows, answers):
            elsewhere = row.get("spatial_info") or row.get("numeracy_info")
            scores.append(sum(mine) / len(mine) if mine else 0.0 if elsewhere else math.nan)
        return torch.tensor(scores)
