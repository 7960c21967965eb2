"""The judge: a vision-language model that answers a question about a picture.

LocalJudge is Qwen2.5-VL in this process. ServedJudge is any OpenAI-compatible server that returns
log-probabilities, such as vLLM. Both give the likeliest first tokens of the answer, as [(token,
log-probability)]. artifact_reward.py makes a score of them.   Read next: llava.py
"""

import collections
import functools
import itertools
import math
import os
import random
import sys
import threading
import time

import openai
import torch
from PIL import Image, ImageDraw

from reward_models.guards import is_tiny
from reward_models.pixels import data_url
from training import waiting
from training.decode import BadPicture, to_rgb
from training.files import usage_error, without_password
from training.weights import load_model, load_part

DEFAULT_URL = "http://127.0.0.1:8000/v1"  # where `vllm serve MODEL --port 8000` listens
START = "vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000"  # how a judge is started
TOP = 20  # how many first tokens; servers give at most 20
NONSENSE = (AttributeError, LookupError, TypeError, ValueError)  # a reply of another form
PAUSE, RETURN = 1.0, 30.0  # seconds before a request is repeated; until a server is tried again


class LocalJudge:
    """Qwen2.5-VL in this process. One forward pass per batch; no answer is generated."""

    image_token = "<|image_pad|>"

    def __init__(self, checkpoint, device):
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model = load_model(Qwen2_5_VLForConditionalGeneration, checkpoint, dtype=dtype)
        self.model.to(device).eval().requires_grad_(False)
        # The tokenizer and image processor alone: transformers' joint processor needs torchvision.
        self.tokenizer = load_part(AutoTokenizer, checkpoint)
        self.processor = load_part(pil.Qwen2VLImageProcessorPil, checkpoint)
        self.failures = collections.Counter()
        self.tiny = is_tiny(checkpoint)

    def chat_prompt(self, question, patches):
        """The chat template with a question and a picture, as text."""
        content = [{"type": "text", "text": question}, {"type": "image"}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text.replace(self.image_token, self.image_token * patches)

    def encode(self, questions, images):
        """Model inputs for pictures of one size, each with its question; padded on the left."""
        pictures = self.processor(images=images, return_tensors="pt")
        patches = pictures["image_grid_thw"].prod(1) // self.processor.merge_size**2
        texts = [self.chat_prompt(*pair) for pair in zip(questions, patches.tolist())]
        words = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        is_image = words.input_ids == self.tokenizer.convert_tokens_to_ids(self.image_token)
        # Without mm_token_type_ids, the pictures get no 2-D positions.
        return {**words, **pictures, "mm_token_type_ids": is_image.int()}

    def logits(self, questions, images):
        """(N, V) logits of the first answer token."""
        inputs = self.encode(questions, images)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        return self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()

    @torch.inference_mode()
    def answers(self, question, images):
        """For each picture the TOP likeliest first tokens, [(token, log-probability)]; none, and
        counted as a failure, for one that cannot be judged."""
        found = [[] for _ in images]
        for start in range(0, len(images), 64):
            batch = self.readable(images[start : start + 64], start)
            if not batch:
                continue
            logits = self.logits([question] * len(batch), list(batch.values()))
            logprobs, ids = logits.log_softmax(-1).topk(TOP)
            for i, row, values in zip(batch, ids, logprobs.tolist()):
                found[i] = list(zip(self.tokenizer.batch_decode(row[:, None]), values))
        return found

    def readable(self, images, start):
        """Index -> picture in RGB; those that cannot be judged are counted in `failures`."""
        batch = {}
        for i, image in enumerate(images, start):
            try:
                batch[i] = to_rgb(image)
            except BadPicture as problem:
                self.failures[f"no picture to judge: {problem}"] += 1
        return batch


class ServedJudge:
    """One or more OpenAI-compatible servers of one model, which share the work. If one is away, the
    others do its part; if all are, they are waited for, each request `each` seconds in all.

    Reasons of failed requests are counted in `failures`. start: the command for an error message.
    No judge, or not this model: exit code 2."""

    def __init__(
        self, urls, model=None, timeout=60.0, each=waiting.EACH, total=waiting.ALL, start=START
    ):
        # The client repeats what can be repeated, and waits as the server's Retry-After says.
        options = dict(api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"))
        options |= dict(timeout=openai.Timeout(timeout, connect=5.0), max_retries=2)
        self.clients = [openai.OpenAI(base_url=url, **options) for url in urls]
        self.failures, self.turns = collections.Counter(), itertools.count()
        self.away, self.lock = {}, threading.Lock()  # server that does not answer -> since when
        self.model, self.each, self.total = model, each, total
        self.address = ", ".join(map(without_password, urls))
        for url, client in zip(urls, self.clients):
            served = served_models(client)
            if isinstance(served, waiting.Unanswered):
                reason = f"no judge answers at {without_password(url)} ({served})"
                usage_error(f"{reason}; start one with `{start}`, or give the address of one")
            self.model = self.model or (served or ["?"])[0]
            if self.model not in served:
                names = ", ".join(served) or "no model"
                where = without_password(url)
                usage_error(f"--judge-model {self.model}: {where} serves {names}; name one of them")

    def choose(self):
        """The server whose turn it is. One that was away is tried again after a while."""
        now = time.monotonic()
        here = [c for c in self.clients if now - self.away.get(c, -math.inf) > RETURN]
        here = here or self.clients
        return here[next(self.turns) % len(here)]

    def note(self, client, problem):
        """Remember that a server does not answer (or, without a problem, does); say it once."""
        with self.lock:
            changed = bool(problem) != (client in self.away)
            if problem:
                self.away[client] = time.monotonic()
            else:
                self.away.pop(client, None)
        if changed:
            others = "the others do its work" if len(self.clients) > 1 else "waiting for it"
            state = f"does not answer ({problem}); {others}" if problem else "answers again"
            print(f"judge {without_password(client.base_url)} {state}", file=sys.stderr)

    def request(self, text, images, **options):
        """The server's reply. Raises Unanswered with the reason if there is none."""
        # The text comes first: then all pictures share it as a prefix, and the server caches it.
        content, end = [{"type": "text", "text": text}], time.monotonic() + self.each
        try:
            content += [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in images]
        except ValueError as problem:
            raise waiting.Unanswered(f"no picture to judge: {problem}") from problem
        options |= dict(model=self.model, messages=[{"role": "user", "content": content}])
        while True:
            client = self.choose()
            try:
                reply = client.chat.completions.create(**options)
                self.note(client, None)
                return reply
            except (openai.OpenAIError, ValueError, RecursionError) as problem:  # or no JSON
                reason = f"{type(problem).__name__}: {str(problem)[:200]}"
                if not passes(problem) or time.monotonic() + PAUSE > end:
                    raise waiting.Unanswered(reason) from problem
                self.note(client, type(problem).__name__)
            time.sleep(PAUSE)

    def first_tokens(self, question, image):
        """[(token, log-probability)]. Raises Unanswered."""
        options = dict(max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=TOP)
        reply = self.request(question, [image], **options)
        try:
            first = reply.choices[0].logprobs.content[0].top_logprobs
            return [(str(top.token), float(top.logprob)) for top in [first[0], *first[1:]]]
        except NONSENSE as problem:
            raise waiting.Unanswered("the answer came without logprobs") from problem

    def write(self, text, images, max_tokens=512, temperature=0.0, seed=0):
        """The model's answer to a text and pictures. Raises Unanswered; CutOff for half of one."""
        options = dict(max_tokens=max_tokens, temperature=temperature, seed=seed)
        reply = self.request(text, images, **options)
        try:
            if reply.choices[0].finish_reason == "length":
                raise waiting.CutOff(f"the answer was cut off after {max_tokens} tokens")
            return str(reply.choices[0].message.content or "")
        except NONSENSE as problem:
            raise waiting.Unanswered("the answer came without a text") from problem

    def ask(self, calls):
        """The results of these calls, several at a time; None, and a count in `failures`, for one
        without an answer."""
        what = f"the judge at {self.address}"
        found = waiting.outcomes(waiting.start(calls), what, self.each, self.total)
        for i, result in enumerate(found):
            if isinstance(result, waiting.Unanswered):
                self.failures[str(result)] += 1
                found[i] = None
        return found

    def answers(self, question, images):
        """`first_tokens` for each picture; [] where there is no answer."""
        calls = [functools.partial(self.first_tokens, question, image) for image in images]
        return [tokens or [] for tokens in self.ask(calls)]


def served_models(client):
    """The names of the models that a server has, or Unanswered."""

    def names():
        try:
            listed = client.with_options(max_retries=1, timeout=10).models.list()
            return [str(entry.id) for entry in listed.data]
        except (openai.OpenAIError, *NONSENSE) as problem:
            raise waiting.Unanswered(type(problem).__name__) from problem

    return waiting.outcomes(waiting.start([names]), "a list of models", 30, 30)[0]


def passes(problem):
    """Is the server away, or busy, and the request itself not at fault?"""
    away = isinstance(problem, openai.APIConnectionError)
    return away or getattr(problem, "status_code", 0) in (429, 502, 503, 504)


def sanity_images(side=256):
    """Two pictures: a red disc and a blue square; the same with misplaced blocks and noise."""
    clean = Image.new("RGB", (side, side), (236, 236, 236))
    pen = ImageDraw.Draw(clean)
    pen.ellipse([side * 0.1, side * 0.15, side * 0.5, side * 0.55], fill=(214, 40, 40))
    pen.rectangle([side * 0.55, side * 0.5, side * 0.9, side * 0.85], fill=(40, 70, 200))
    broken, cell, rng = clean.copy(), side // 8, random.Random(0)
    for _ in range(24):
        x, y, left, top = (rng.randrange(8) * cell for _ in range(4))
        broken.paste(clean.crop((left, top, left + cell, top + cell)), (x, y))
    noise = Image.frombytes("RGB", (side // 2, side // 2), rng.randbytes(3 * (side // 2) ** 2))
    broken.paste(noise, (side // 4, side // 4))
    return [clean, broken]
