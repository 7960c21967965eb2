"""Rewards over HTTP: on another machine, or in an environment of their own.

A reward maps prompts and pictures to numbers, so a server can compute it: PNGs in, numbers out,
null for a picture without a score. DeQA needs this, because its code needs transformers of 2023. A
large judge needs it if it does not fit beside the policy. The caller sees no difference:

    python rewards.py serve hps --port 8100
    torchrun grpo.py --rewards hps@http://127.0.0.1:8100,artifact

Imports only what an environment of 2023 has.   Read next: deqa_server.py
"""

import json
import math
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests
import torch

from reward_models.pixels import data_url, from_data_url, in_batches
from training.decode import BadPicture
from training.files import usage_error

PROBLEMS = (requests.RequestException, ValueError, KeyError, TypeError)  # of a request or its reply


class RemoteReward:
    """A reward that is served at `url`. A failed request is repeated; in the end it gives NaN."""

    needs = ("network",)
    checkpoint = None
    remote = True

    def __init__(self, name, url, timeout=300.0, tries=3):
        self.url, self.timeout, self.tries, self.failures = url, timeout, tries, Counter()
        try:
            about = requests.get(f"{url}/about", timeout=10).json()
            self.range, self.reference = tuple(about["range"]), about["reference"]
            served = about["name"]
        except PROBLEMS as problem:
            usage_error(
                f"no reward answers at {url} ({type(problem).__name__}); start it there with "
                f"`python rewards.py serve {name} --port {url.rpartition(':')[2]}`"
            )
        if served != name:
            usage_error(f"{name}@{url}: serves {served!r}; name that, or give another address")

    def __call__(self, prompts, images, metadata=None):
        scores, metadata = [], list(metadata or [{}] * len(images))
        for i in range(0, len(images), 16):
            batch = slice(i, i + 16)
            scores += self.request(list(prompts[batch]), images[batch], metadata[batch])
        return torch.tensor([math.nan if value is None else value for value in scores])

    def request(self, prompts, images, metadata):
        """The scores of a batch, a list: numbers, None or NaN."""
        pictures = [data_url(image) for image in images]
        body = {"prompts": prompts, "metadata": metadata, "images": pictures}
        for attempt in range(self.tries):
            try:
                reply = requests.post(f"{self.url}/score", json=body, timeout=self.timeout)
                scores = reply.json()["scores"] if reply.ok else []
                if len(scores) == len(images):
                    return scores
                problem = f"{reply.status_code}, {len(scores)} scores for {len(images)} pictures"
                problem = f"{problem}: {reply.text[:200]}"
            except PROBLEMS as raised:
                problem = f"{type(raised).__name__}: {str(raised)[:200]}"
            time.sleep(0.5 * 2**attempt)
        self.failures[problem] += len(images)
        return [math.nan] * len(images)


class DeQA:
    """DeQA-Score (arXiv:2501.11561) rates photographs. It runs only where its code is installed."""

    range = (1.0, 5.0)
    needs = ("server",)
    checkpoint = "zhiyuanyou/DeQA-Score-Mix3"
    reference = "DeQA-Score, arXiv:2501.11561"
    how = "see the first lines of reward_models/deqa_server.py; then deqa@http://127.0.0.1:8101"

    def __init__(self, device="cpu", checkpoint=None):
        try:
            from src import Scorer  # the package of its repository really has this name
        except ImportError as problem:
            usage_error(f"deqa runs in an environment of its own ({problem}): {self.how}")
        self.scorer = Scorer(pretrained=checkpoint or self.checkpoint, device=device)

    def __call__(self, prompts, images, metadata=None):
        return in_batches(lambda _, batch: self.scorer(batch).float(), 8, prompts, images)


def open_url(url):
    """The picture in a data URL; None and a line on stderr if there is none: it gets no score."""
    try:
        return from_data_url(url)
    except BadPicture as problem:
        print(f"error: a picture that was sent is not readable ({problem})", file=sys.stderr)


class ServedReward(BaseHTTPRequestHandler):
    """Answers the requests of RemoteReward. `serve` sets `reward` and `name`."""

    reward, name, lock, max_bytes = None, "", threading.Lock(), 2**28

    def log_message(self, *_):
        pass

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        bounds = [max(-1e9, min(1e9, value)) for value in self.reward.range]  # JSON has no infinity
        self.reply(200, {"name": self.name, "range": bounds, "reference": self.reward.reference})

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        if length > self.max_bytes:
            return self.reply(413, {"error": f"over {self.max_bytes} bytes; send fewer pictures"})
        try:
            request = json.loads(self.rfile.read(length))
            images = [open_url(url) for url in request["images"]]
            prompts, metadata = request["prompts"], request["metadata"]
            if not len(prompts) == len(images) == len(metadata):
                raise ValueError("prompts, images and metadata differ in number")
        except (ValueError, KeyError, TypeError, OSError) as problem:
            return self.reply(400, {"error": f"{type(problem).__name__}: {problem}"})
        good, scores = [i for i, image in enumerate(images) if image], [None] * len(images)
        batch = [[values[i] for i in good] for values in (prompts, images, metadata)]
        with self.lock:  # one model, one batch at a time
            values = torch.as_tensor(self.reward(*batch)).tolist() if good else []
        for i, value in zip(good, values):
            scores[i] = value if math.isfinite(value) else None
        self.reply(200, {"scores": scores})


def serve(name, reward, port, host="127.0.0.1"):
    """A server for one reward; .serve_forever() runs it, .server_port is its port."""
    handler = type("Handler", (ServedReward,), {"reward": reward, "name": name})
    return ThreadingHTTPServer((host, port), handler)
