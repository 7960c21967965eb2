"""ArtifactReward: ask a vision-language model whether the picture is broken.

The cure of "Understanding Reward Hacking in Text-to-Image Reinforcement Learning"
(arXiv:2601.03468) is one yes/no question put to a judge that sees the picture and nothing else,
not even the prompt. The reward is read from the distribution of the first token of the answer:

    artifact = P(no) / (P(yes) + P(no)),   P(yes) = sum over spellings "yes", "Yes", " YES", ...

With a probability instead of an answer, two pictures that are both "no" can still be told apart,
and a group of rollouts has something to learn from. The question is the method's only parameter;
the paper finds it by automatic prompt optimisation, and so does apo.py.

Run:   python artifact_reward.py picture.png                      the tiny judge, in this process
       vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000         the real one, in another terminal
       python artifact_reward.py --judge-url http://127.0.0.1:8000/v1 picture.png

You should see:  a number in [0, 1] per picture: how sure the judge is that nothing is broken.

Left out: any made-up score. A judge that does not answer, or answers neither yes nor no, has given
no score: NaN. (The released code gives such a picture 1.0, a perfect score.)   Read next: grpo.py
"""

import collections
import itertools
import math
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import openai
import torch
import tyro
from PIL import Image, ImageDraw

from evaluation import pages as report
from generate import pick_device
from reward_models.serving import data_url
from training.files import HERE, atomic, usage_error

DEFAULT_URL = "http://127.0.0.1:8000/v1"  # where `vllm serve MODEL --port 8000` listens
TOP = 20  # logprobs of the first token that are looked at; 20 is the most that servers give


def p_no(top_logprobs):
    """The scoring rule, the same for a server and in-process: [(token, logprob)] -> score in [0, 1].

    >>> round(p_no([("No", math.log(.6)), (" no", math.log(.2)), ("Yes", math.log(.2)), ("Maybe", -9.0)]), 6)
    0.8
    >>> p_no([("The", -0.1)])
    nan

    Every spelling counts. (The released code keeps one of them, the least likely.)"""
    mass = {"yes": 0.0, "no": 0.0}
    # exp is safe: logprobs are <= 0; relative to the best one, so that tiny ones do not vanish.
    answers = [(token.strip().lower(), logprob) for token, logprob in top_logprobs]
    best = max((logprob for word, logprob in answers if word in mass), default=None)
    if best is None or not math.isfinite(best):
        return math.nan
    for word, logprob in answers:
        if word in mass:
            mass[word] += math.exp(logprob - best)
    return mass["no"] / (mass["yes"] + mass["no"])


class LocalJudge:
    """Qwen2.5-VL in this process. One forward pass per batch; nothing is generated."""

    def __init__(self, checkpoint, device):
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model = (
            Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
            .to(device)
            .eval()
        )
        self.model.requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        # The tokenizer and image processor alone: transformers' joint processor wants torchvision.
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self.failures = collections.Counter()

    def encode(self, questions, images):
        """Model inputs for pictures of one size, each with its question; padded on the left."""
        pictures = self.processor(images=images, return_tensors="pt")
        token = "<|image_pad|>"
        counts = pictures["image_grid_thw"].prod(1) // self.processor.merge_size**2
        texts = []
        for question, count in zip(questions, counts.tolist()):
            turn = [
                {"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]}
            ]
            text = self.tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, tokenize=False
            )
            texts.append(text.replace(token, token * count))
        words = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        is_image = words.input_ids == self.tokenizer.convert_tokens_to_ids(token)
        return dict(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            mm_token_type_ids=is_image.int(),  # without it the picture gets no 2-D positions
            pixel_values=pictures["pixel_values"],
            image_grid_thw=pictures["image_grid_thw"],
        )

    def logits(self, questions, images):
        """(N, V) logits of the first answer token."""
        inputs = {
            name: value.to(self.model.device)
            for name, value in self.encode(questions, images).items()
        }
        return self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()

    @torch.inference_mode()
    def answers(self, question, images):
        """For each picture the likeliest first tokens, [(token, logprob)]."""
        found = []
        for i in range(0, len(images), 64):
            batch = [image.convert("RGB") for image in images[i : i + 64]]
            logprobs, ids = self.logits([question] * len(batch), batch).log_softmax(-1).topk(TOP)
            for row, values in zip(ids, logprobs.tolist()):
                found.append(list(zip(self.tokenizer.batch_decode(row[:, None]), values)))
        return found


def picture_part(image):
    """A picture as a part of a chat message."""
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


class ServedJudge:
    """Any OpenAI-compatible server that gives logprobs, such as vLLM; several addresses share the work."""

    def __init__(self, urls, model=None, timeout=60.0, retries=4, concurrency=16):
        # One policy for time-outs and retries, the client's own: it waits as the server's Retry-After
        # says and repeats what can be repeated. A second loop around it would multiply the waiting.
        self.clients = [
            openai.OpenAI(base_url=url, api_key="EMPTY", timeout=timeout, max_retries=retries)
            for url in urls
        ]
        self.failures, self.turn = collections.Counter(), itertools.cycle(self.clients)
        self.pool = ThreadPoolExecutor(concurrency)  # threads, not processes: the work is waiting
        self.model = model
        for url, client in zip(urls, self.clients):
            try:
                served = [
                    entry.id
                    for entry in client.with_options(max_retries=1, timeout=10).models.list().data
                ]
            except openai.OpenAIError as problem:
                usage_error(
                    f"no judge answers at {url} ({type(problem).__name__}); start one with "
                    "`vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000` or give another --judge-url"
                )
            self.model = self.model or served[0]
            if self.model not in served:
                usage_error(
                    f"--judge-model {self.model}: {url} serves {', '.join(served)}; name one of these"
                )

    def answers(self, question, images):
        """As LocalJudge.answers; an empty list where the server gave none, the reason in `failures`."""
        return list(
            self.pool.map(
                self.ask, itertools.cycle(self.clients), itertools.repeat(question), images
            )
        )

    def write(self, content, max_tokens=512, temperature=0.0, seed=0):
        """What the served model writes to these parts of a message; "" where it fails, the reason in `failures`."""
        try:
            reply = next(self.turn).chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
            )
        except (openai.OpenAIError, ValueError) as problem:
            self.failures[f"{type(problem).__name__}: {str(problem)[:200]}"] += 1
            return ""
        return (reply.choices[0].message.content if reply.choices else None) or ""

    def ask(self, client, question, image):
        # The question comes first: then it is the same prefix for all pictures, and is cached.
        content = [{"type": "text", "text": question}, picture_part(image)]
        try:
            reply = client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=1,
                temperature=0.0,
                logprobs=True,
                top_logprobs=TOP,
            )
        except (openai.OpenAIError, ValueError) as problem:  # ValueError: a body that is no JSON
            self.failures[f"{type(problem).__name__}: {str(problem)[:200]}"] += 1
            return []
        tokens = reply.choices[0].logprobs if reply.choices else None
        if not (tokens and tokens.content and tokens.content[0].top_logprobs):
            self.failures["the answer came without logprobs"] += 1
            return []
        return [(top.token, top.logprob) for top in tokens.content[0].top_logprobs]


def read_question(text):
    """A question, or the name of a file that holds one (apo.py writes such files); None stays None."""
    if text is None:
        return None
    question = (
        Path(text).read_text(encoding="utf-8") if os.path.isfile(text) else text
    )  # Path.is_file fails on a long one
    return question.strip() or usage_error(
        f"--question {text!r}: is empty; ask what yes and no can answer"
    )


class ArtifactReward:
    """P(no artifact) by a vision-language judge; sees the picture, never the prompt.

    checkpoint: a Qwen2.5-VL to load into this process; without it the judge is asked over HTTP."""

    range = (0.0, 1.0)
    needs = ("judge",)
    checkpoint = "Qwen/Qwen2.5-VL-7B-Instruct"
    reference = "ArtifactReward, arXiv:2601.03468"
    how = "vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000"

    def __init__(
        self, device="cpu", checkpoint=None, judge_urls=(), judge_model=None, question=None
    ):
        if checkpoint and not judge_urls:
            self.judge = LocalJudge(checkpoint, device)
        else:
            self.judge = ServedJudge(list(judge_urls) or [DEFAULT_URL], judge_model)
        own = (
            Path(checkpoint or "") / "artifact.txt"
        )  # a judge may bring the question that suits it
        default = own if checkpoint and own.is_file() else HERE / "prompts" / "artifact.txt"
        self.question = read_question(question) or default.read_text(encoding="utf-8").strip()

    @property
    def failures(self):
        """Why pictures got no score: a Counter of reasons."""
        return self.judge.failures

    @property
    def remote(self):
        """Is the work done elsewhere, so that there is time for something else meanwhile?"""
        return isinstance(self.judge, ServedJudge)

    def __call__(self, prompts, images, metadata=None):
        return torch.tensor(ask(self.judge, self.question, list(images)), dtype=torch.float32)

    def check(self):
        """The canary: before anything is trained on this judge, it must find an obviously broken picture worse
        than a whole one. A wrong model, or a server that ignores pictures, is found here and not after a day."""
        whole, broken = self([""] * 2, canary()).tolist()
        if not whole > broken:
            usage_error(
                f"the judge gives a whole picture {whole:.3f} and a torn one {broken:.3f}, which is the wrong "
                f"way round; look with `python artifact_reward.py PICTURE --explain PAGE`, or change --question "
                f"({dict(self.failures) or self.question!r})"
            )


def ask(judge, question, images):
    """P(no) of each picture by either kind of judge; NaN, counted with its reason, where there is none."""
    scores = []
    for answer in judge.answers(question, images):
        scores.append(p_no(answer))
        if answer and math.isnan(scores[-1]):
            judge.failures[f"neither yes nor no, but {answer[0][0]!r}"] += 1
    return scores


def canary(side=256):
    """Two pictures: a red disc and a blue square; the same with blocks that have slipped, and noise."""
    whole = Image.new("RGB", (side, side), (236, 236, 236))
    pen = ImageDraw.Draw(whole)
    pen.ellipse([side * 0.1, side * 0.15, side * 0.5, side * 0.55], fill=(214, 40, 40))
    pen.rectangle([side * 0.55, side * 0.5, side * 0.9, side * 0.85], fill=(40, 70, 200))
    broken, cell, rng = whole.copy(), side // 8, random.Random(0)
    for _ in range(24):
        x, y, left, top = (rng.randrange(8) * cell for _ in range(4))
        broken.paste(whole.crop((left, top, left + cell, top + cell)), (x, y))
    static = Image.frombytes("RGB", (side // 2, side // 2), rng.randbytes(3 * (side // 2) ** 2))
    broken.paste(static, (side // 4, side // 4))
    return [whole, broken]


@dataclass
class Config:
    images: Annotated[tuple[str, ...], tyro.conf.Positional]  # picture files
    explain: str = (
        ""  # also write a page here: picture, question, the answer's probabilities, score
    )
    judge_url: tuple[str, ...] = ()  # server(s) to ask; none: the judge runs in this process
    judge_model: str | None = None  # the served model's name; default: the first that is served
    checkpoint: str = "tiny"  # in-process judge: "tiny", a folder, or a hub name
    question: str | None = (
        None  # a text or a file, instead of the judge's artifact.txt or prompts/artifact.txt
    )


def main(cfg):
    local = (
        str(HERE / "tiny_world" / "checkpoints" / "artifact")
        if cfg.checkpoint == "tiny"
        else cfg.checkpoint
    )
    reward = ArtifactReward(
        pick_device("auto")[0],
        None if cfg.judge_url else local,
        cfg.judge_url,
        cfg.judge_model,
        cfg.question,
    )
    rows, failed = [], 0
    for path in cfg.images:
        try:
            image = Image.open(path).convert("RGB")
            answer = reward.judge.answers(reward.question, [image])[0]
        except OSError as problem:
            print(f"error: {path}: not a readable picture ({problem})", file=sys.stderr)
            image, answer = "", []
        score = p_no(answer)
        failed += math.isnan(score)
        print(f"{score:.4f}  {path}")
        said = ", ".join(f"{token!r} {math.exp(logprob):.3f}" for token, logprob in answer[:6])
        rows.append(
            {"picture": image, "file": path, "first tokens of the answer": said, "score": score}
        )
    for reason, count in reward.failures.items():
        print(f"{count} without a score: {reason}", file=sys.stderr)
    if cfg.explain:
        with atomic(cfg.explain) as file:
            file.write(report.page(reward.question, report.table(rows)))
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
