"""The judge: a vision-language model that answers a question about a picture.

LocalJudge is Qwen2.5-VL in this process. ServedJudge is any OpenAI-compatible server that returns
log-probabilities, such as vLLM. Both give the likeliest first tokens of the answer, as [(token,
log-probability)]. artifact_reward.py makes a score of them.   Read next: llava.py
"""

import collections
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import openai
import torch

from reward_models.pixels import data_url
from training.decode import BadPicture, to_rgb
from training.files import usage_error
from training.weights import load_model, load_part

DEFAULT_URL = "http://127.0.0.1:8000/v1"  # where `vllm serve MODEL --port 8000` listens
TOP = 20  # how many first tokens; servers give at most 20
NONSENSE = (AttributeError, LookupError, TypeError, ValueError)  # a reply of another form


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
    """One or more OpenAI-compatible servers of one model, which share the work.

    Reasons of failed requests are counted in `failures`."""

    def __init__(self, urls, model=None, timeout=60.0, retries=4, concurrency=16):
        # The client does all retries: it waits as the server's Retry-After says, and repeats only
        # what can be repeated. A second loop around it would multiply the waiting.
        options = dict(
            api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"), timeout=timeout, max_retries=retries
        )
        self.clients = [openai.OpenAI(base_url=url, **options) for url in urls]
        self.failures, self.turns = collections.Counter(), itertools.cycle(self.clients)
        self.pool = ThreadPoolExecutor(concurrency)  # threads, not processes: they only wait
        self.model = model
        for url, client in zip(urls, self.clients):
            try:
                listed = client.with_options(max_retries=1, timeout=10).models.list()
                served = [str(entry.id) for entry in listed.data]
            except (openai.OpenAIError, *NONSENSE) as problem:
                reason = f"no judge answers at {url} ({type(problem).__name__})"
                start = "`vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000`"
                usage_error(f"{reason}; start one with {start}, or give another --judge-url")
            self.model = self.model or (served or ["?"])[0]
            if self.model not in served:
                names = ", ".join(served) or "no model"
                usage_error(f"--judge-model {self.model}: {url} serves {names}; name one of these")

    def request(self, client, text, images, **options):
        """The server's reply; None, and counted, if the request failed."""
        # The text comes first: then all pictures share it as a prefix, and the server caches it.
        content = [{"type": "text", "text": text}]
        try:
            content += [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in images]
            options |= dict(model=self.model, messages=[{"role": "user", "content": content}])
            return client.chat.completions.create(**options)
        except (openai.OpenAIError, ValueError) as problem:  # ValueError: no JSON, or no picture
            self.failures[f"{type(problem).__name__}: {str(problem)[:200]}"] += 1

    def first_tokens(self, client, question, image):
        """[(token, log-probability)]; empty, and counted as a failure, if the server gave none."""
        options = dict(max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=TOP)
        reply = self.request(client, question, [image], **options)
        if reply is None:
            return []
        try:
            first = reply.choices[0].logprobs.content[0].top_logprobs
            return [(str(top.token), float(top.logprob)) for top in [first[0], *first[1:]]]
        except NONSENSE:
            self.failures["the answer came without logprobs"] += 1
            return []

    def answers(self, question, images):
        """`first_tokens` for each picture. The servers take turns."""
        clients, questions = itertools.cycle(self.clients), itertools.repeat(question)
        return list(self.pool.map(self.first_tokens, clients, questions, images))

    def write(self, text, images, max_tokens=512, temperature=0.0, seed=0):
        """The model's answer to a text and pictures; "" if there is none."""
        options = dict(max_tokens=max_tokens, temperature=temperature, seed=seed)
        reply = self.request(next(self.turns), text, images, **options)
        try:
            return reply.choices[0].message.content or ""
        except NONSENSE:
            return ""
