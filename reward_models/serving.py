"""Rewards that live elsewhere: on another machine, or in an environment of their own.

A reward is a function from prompts and pictures to numbers, so it can be asked over HTTP: PNGs in, numbers out,
null for a picture that could not be scored. Some have to be: DeQA needs a transformers of 2023, and a judge of 7 B
parameters does not fit beside a policy in training. Whoever asks does not notice the difference:

    python rewards.py serve hps --port 8100
    torchrun grpo.py --rewards hps@http://127.0.0.1:8100,artifact

This file imports nothing that an old environment would not have.   Read next: rewards.py
"""

import base64
import io
import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests
import torch
from PIL import Image

from training.files import usage_error

# --- the one who asks -----------------------------------------------------------------------------


def data_url(image):
    """A picture as text. PNG, not JPEG: its blocks and ringing are artifacts, and a judge would be right to say so."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def from_data_url(url):
    """Raises ValueError or OSError for what is no picture."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


class Elsewhere:
    """A reward that is served at `url`, under the contract of rewards.py. One time-out, a few tries, then NaN."""

    needs = ("network",)
    checkpoint = None
    remote = True

    def __init__(self, name, url, timeout=300.0, tries=3):
        self.url, self.timeout, self.tries, self.failures = url, timeout, tries, Counter()
        try:
            about = requests.get(f"{url}/about", timeout=10).json()
            self.range, self.reference = tuple(about["range"]), about["reference"]
        except (requests.RequestException, ValueError, KeyError, TypeError) as problem:
            usage_error(
                f"no reward answers at {url} ({type(problem).__name__}); start it there with "
                f"`python rewards.py serve {name} --port {url.rpartition(':')[2]}`"
            )
        if about["name"] != name:
            usage_error(
                f"{name}@{url}: {about['name']!r} is served there; name that, or another address"
            )

    def __call__(self, prompts, images, metadata=None):
        scores, metadata = [], list(metadata or [{}] * len(images))
        for i in range(0, len(images), 16):
            scores += self.ask(list(prompts[i : i + 16]), images[i : i + 16], metadata[i : i + 16])
        return torch.tensor([math.nan if value is None else value for value in scores])

    def ask(self, prompts, images, metadata):
        body = {
            "prompts": prompts,
            "metadata": metadata,
            "images": [data_url(image) for image in images],
        }
        for attempt in range(self.tries):
            try:
                reply = requests.post(f"{self.url}/score", json=body, timeout=self.timeout)
                scores = reply.json()["scores"] if reply.ok else []
                if len(scores) == len(images):
                    return scores
                problem = f"{reply.status_code}, {len(scores)} scores for {len(images)} pictures: {reply.text[:200]}"
            except (requests.RequestException, ValueError, KeyError, TypeError) as raised:
                problem = f"{type(raised).__name__}: {str(raised)[:200]}"
            time.sleep(0.5 * 2**attempt)
        self.failures[problem] += len(images)
        return [math.nan] * len(images)


# --- the one who answers --------------------------------------------------------------------------


class Served(BaseHTTPRequestHandler):
    """The other end of Elsewhere. `reward` and `name` are set by `serve`."""

    reward, name, lock, largest = None, "", threading.Lock(), 2**28

    def log_message(self, *_):
        pass

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        bounds = [
            value if math.isfinite(value) else 1e9 * (1 if value > 0 else -1)
            for value in self.reward.range
        ]
        self.reply(200, {"name": self.name, "range": bounds, "reference": self.reward.reference})

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        if length > self.largest:
            return self.reply(
                413, {"error": f"more than {self.largest} bytes; send fewer pictures"}
            )
        try:
            asked = json.loads(self.rfile.read(length))
            images = [from_data_url(url) for url in asked["images"]]
            prompts, metadata = asked["prompts"], asked["metadata"]
            if not len(prompts) == len(images) == len(metadata):
                raise ValueError("prompts, images and metadata differ in number")
        except (ValueError, KeyError, TypeError, OSError) as problem:
            return self.reply(400, {"error": f"{type(problem).__name__}: {problem}"})
        with self.lock:  # one model, one batch at a time
            scores = torch.as_tensor(self.reward(prompts, images, metadata)).tolist()
        self.reply(200, {"scores": [value if math.isfinite(value) else None for value in scores]})


def serve(name, reward, port, host="127.0.0.1"):
    """A server for one reward; .serve_forever() runs it, .server_port is its port."""
    handler = type("ServedReward", (Served,), {"reward": reward, "name": name})
    return ThreadingHTTPServer((host, port), handler)
