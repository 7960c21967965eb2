"""GroundingDINO (arXiv:2303.05499), as T2I-R1 uses it: are the objects there, how many, and where?

It finds a phrase in a picture and gives the boxes, so objects can be counted, and their places
compared. What to look for is in the fields of T2I-R1's training file. Its task_type says which one
counts: spatial, numeracy, or else the nouns. Without a task_type it is the first of these:

    spatial_info    {"obj1", "obj2", "locality"}     0.2 for each, 0.5 for the place: at most 0.9
    numeracy_info   [{"obj_name", "num"}]            mean of right count 1, wrong 0.2, none 0
    nouns           ["cat", "fire engine"]           share of the nouns that are found

A prompt without these fields, or with odd ones, cannot be checked: NaN. Comments mark the
differences from the released code (T2I-R1's and ArtifactReward's are the same).

Read next: git.py
"""

import collections
import math

import torch
from transformers import AutoTokenizer

from training.decode import to_rgb
from training.weights import load_model, load_part

# --- boxes are (x0, y0, x1, y1), in shares of the picture ---------------------------------------


def iou(a, b):
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def suppress(boxes, scores, threshold=0.5):
    """Greedy non-maximum suppression: the boxes that do not overlap a better one.

    The released code passes boxes as (center, size), which are read as corners: an object that is
    found three times counts three times."""
    order, kept = sorted(range(len(boxes)), key=lambda i: -scores[i]), []
    for i in order:
        if all(iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return [boxes[i] for i in kept]


# Where the first object is, seen from the second. The released code has no branch for "above": it
# never rewards the place in one spatial prompt of six (364 of 2,195).
DIRECTIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "top of": (0, -1),
    "below": (0, 1),
    "bottom of": (0, 1),
}
RELATION = ("obj1", "obj2", "locality")  # the fields of spatial_info
NEXT = ("next to", "near", "on side of")
# 150 of 384 pixels, along both axes. The released code compares 150 with shares, so everything is
# near, and asks for one axis only.
NEAR = 0.4


def position(locality, a, b, overlap=0.1):
    """How well "a is `locality` b" holds, in [0, 1].

    The centers must differ more along the named axis than across it. An overlap above `overlap`
    lowers the score in proportion. Unknown words give NaN (the released code gives 0)."""
    dx, dy = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    if any(word in locality for word in NEXT):
        return min(1.0, NEAR / max(abs(dx), abs(dy), 1e-9))
    for word, (x, y) in DIRECTIONS.items():
        if word in locality:
            along, across = dx * x + dy * y, abs(dx * y) + abs(dy * x)
            if along <= 0 or along <= across:
                return 0.0
            return 1.0 if iou(a, b) < overlap else overlap / iou(a, b)
    return math.nan


def texts(values):
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def odd_nouns(row):
    """Why the nouns of a prompt cannot be used, or None. (Of a text, each letter would be one.)"""
    for field in ("nouns", "attr_nouns"):
        if not texts(row.get(field) or []):
            return f"{field} is a list of texts, not {str(row[field])[:60]!r}"


def task_of(row):
    """What a prompt is scored by: "spatial", "numeracy", "nouns", or None. As released, the other
    task types have their nouns, also the 185 "complex" rows that name a place."""
    named = row.get("task_type")
    for task, field in (("spatial", "spatial_info"), ("numeracy", "numeracy_info")):
        if row.get(field) and named in (None, task):
            return task
    return "nouns" if row.get("nouns") else None


def odd_fields(row):
    """Why the fields that a prompt is scored by cannot be used, or None."""
    if reason := odd_nouns(row):
        return reason
    relation = row["spatial_info"] if task_of(row) == "spatial" else None
    counts = row["numeracy_info"] if task_of(row) == "numeracy" else []
    if relation and not (isinstance(relation, dict) and texts([*map(relation.get, RELATION)])):
        return f"spatial_info has obj1, obj2 and locality, texts; not {str(relation)[:60]!r}"
    if relation and math.isnan(position(relation["locality"], (0, 0, 0, 0), (1, 1, 1, 1))):
        return f"locality {relation['locality']!r} is none of {', '.join((*NEXT, *DIRECTIONS))}"
    for item in counts if isinstance(counts, list) else [None]:
        named = isinstance(item, dict) and isinstance(item.get("obj_name"), str)
        if not (named and str(item.get("num")).isdecimal()):
            return f"numeracy_info has obj_name and num, a number; not {str(counts)[:60]!r}"


# --- scores -------------------------------------------------------------------------------------


def detection_score(found, row):
    """The score of one picture. found: phrase -> [(score, box)], each above the threshold."""
    task = task_of(row)
    if task == "spatial":
        first, second = row["spatial_info"]["obj1"], row["spatial_info"]["obj2"]
        score = 0.2 * sum(bool(found.get(phrase)) for phrase in (first, second))
        if found.get(first) and found.get(second):
            a, b = (max(found[phrase])[1] for phrase in (first, second))
            score += 0.5 * position(row["spatial_info"]["locality"], a, b)
        return score
    if task == "numeracy":
        points = 0.0
        for item in row["numeracy_info"]:
            hits = found.get(item["obj_name"], [])
            objects = suppress([box for _, box in hits], [score for score, _ in hits])
            points += 1.0 if hits and len(objects) == int(item["num"]) else 0.2 if hits else 0.0
        return points / len(row["numeracy_info"])
    if task == "nouns":
        return sum(bool(found.get(noun)) for noun in row["nouns"]) / len(row["nouns"])
    return math.nan


def phrases_of(row):
    """What to look for, each phrase once."""
    phrases, task = list(row.get("nouns") or []), task_of(row)
    if task == "spatial":
        phrases += [row["spatial_info"]["obj1"], row["spatial_info"]["obj2"]]
    if task == "numeracy":
        phrases += [item["obj_name"] for item in row["numeracy_info"]]
    return list(dict.fromkeys(phrases))


def token_columns(phrases, offsets):
    """phrase -> its tokens in the caption "a . b . c.". offsets: (start, end) of each token.

    All tokens of the phrase count. (The released code takes the first word and the last, and never
    recognizes a noun of three words.)"""
    columns, start = {}, 0
    for phrase in phrases:
        end = start + len(phrase)
        columns[phrase] = [t for t, (s, e) in enumerate(offsets) if start <= s < e <= end]
        start = end + len(" . ")
    return columns


class GDino:
    """T2I-R1's detector of objects, counts and places."""

    range = (0.0, 1.0)
    needs = ("nouns",)
    checkpoint = "IDEA-Research/grounding-dino-tiny"
    gigabytes = 0.7
    reference = "T2I-R1, arXiv:2505.00703"
    threshold = 0.3

    def __init__(self, device="cpu", checkpoint=None):
        from transformers import GroundingDinoForObjectDetection
        from transformers.models.grounding_dino import image_processing_pil_grounding_dino as pil

        folder, self.device = checkpoint or self.checkpoint, device
        self.model = load_model(GroundingDinoForObjectDetection, folder)
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer = load_part(AutoTokenizer, folder)
        self.processor = load_part(pil.GroundingDinoImageProcessorPil, folder)
        self.failures = collections.Counter()

    @torch.inference_mode()
    def detect(self, phrases, images):
        """phrases: a list for each picture. Returns for each picture phrase -> [(score, box)]."""
        captions = [" . ".join(listed).lower() + "." for listed in phrases]
        words = self.tokenizer(
            captions, padding=True, return_offsets_mapping=True, return_tensors="pt"
        )
        offsets = words.pop("offset_mapping").tolist()
        pixels = self.processor([to_rgb(image) for image in images], return_tensors="pt")
        output = self.model(**words.to(self.device), **pixels.to(self.device))
        probabilities = output.logits.float().sigmoid().cpu()  # (B, queries, tokens)
        center, size = output.pred_boxes.float().cpu().split(2, -1)
        boxes = torch.cat([center - size / 2, center + size / 2], -1)
        found = [{} for _ in images]
        for i, listed in enumerate(phrases):
            for phrase, columns in token_columns(listed, offsets[i]).items():
                score = probabilities[i][:, columns].mean(1)
                hits = (score > self.threshold).nonzero()[:, 0].tolist()
                found[i][phrase] = [(score[q].item(), boxes[i, q].tolist()) for q in hits]
        return found

    def __call__(self, prompts, images, metadata=None):
        rows, scores = list(metadata or [{}] * len(images)), [math.nan] * len(images)
        by_size = collections.defaultdict(list)  # beside a larger one, a picture would be padded
        for i, row in enumerate(rows):
            reason = odd_fields(row) or self.too_long(row)
            if reason:
                self.failures[reason] += 1
            elif phrases_of(row):
                by_size[images[i].size].append(i)
        for known in by_size.values():
            for start in range(0, len(known), 8):
                batch = known[start : start + 8]
                phrases = [phrases_of(rows[i]) for i in batch]
                found = self.detect(phrases, [images[i] for i in batch])
                for i, detections in zip(batch, found):
                    scores[i] = detection_score(detections, rows[i])
        return torch.tensor(scores)

    def too_long(self, row):
        """Why the phrases of a prompt do not fit into the model, or None."""
        length = len(self.tokenizer(" . ".join(phrases_of(row)) + ".").input_ids)
        limit = self.model.config.max_text_len
        return f"{length} tokens of nouns; the model reads {limit}" if length > limit else None
