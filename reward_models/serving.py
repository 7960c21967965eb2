"""Rewards over HTTP: on another machine, or in an environment of their own.

A reward maps prompts and pictures to numbers, so a server can compute it: PNGs in, numbers out,
null for a picture without a score. DeQA needs this, because its code needs transformers of 2023. A
large judge needs it if it does not fit beside the policy. The caller sees no difference:

    python rewards.py serve hps --model real --port 8100
    torchrun grpo.py --rewards hps@http://127.0.0.1:8100,artifact

Imports only what an environment of 2023 has.   Read next: deqa_server.py
"""

import functools
import hmac
import json
import math
import os
import socket
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests
import torch

from reward_models import guards
from reward_models.pixels import data_url, from_data_url, in_batches
from training import waiting
from training.decode import MAX_PIXELS, BadPicture
from training.files import usage_error
from training.records import without_nan

PROBLEMS = (requests.RequestException, ValueError, KeyError, TypeError)
PROBLEMS += (OverflowError, RecursionError)
PICTURES, PIXELS = 16, MAX_PIXELS // 2  # of one request: its PNGs must fit into max_bytes
ANSWER = 2**16  # bytes; no answer of ours is longer
TOKEN = "REWARD_TOKEN"  # environment variable: the word that a server started with --token asks for


class RemoteReward:
    """A reward that is served at `url`. A server that is away is waited for, each request `each`
    seconds in all. NaN, and a count in `failures`, where it gives no score, or no number."""

    needs = ("network",)
    checkpoint = None
    remote = True

    def __init__(self, name, url, each=waiting.EACH, total=waiting.ALL):
        self.url, self.each, self.total, self.failures = url, each, total, Counter()
        token = os.environ.get(TOKEN)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        about = waiting.outcomes(waiting.start([self.about]), f"{name} at {url}", 30, 30)[0]
        if isinstance(about, waiting.Unanswered):
            start = f"`python rewards.py serve {name} --model real --port {url.rpartition(':')[2]}`"
            start = DeQA.how if name == "deqa" else f"start it there with {start}"
            usage_error(f"no reward answers at {url} ({about}); {start}")
        if about["name"] != name:
            usage_error(f"{name}@{url}: serves {about['name']!r}; name that, or another address")
        self.range, self.reference = tuple(about["range"]), about["reference"]
        # Which weights give the scores, and whether they are those of the tiny world.
        self.identity, self.address = str(about.get("identity") or name), url
        self.tiny = bool(about.get("tiny"))

    def about(self):
        """What the server says of itself. Raises Unanswered."""
        try:
            status, text = fetch("GET", f"{self.url}/about", 10, headers=self.headers)
            about = json.loads(text) if status == 200 else {}
            if status != 200:
                raise ValueError(f"{status}: {text[:200]}")
            low, high = about["range"]
            numbers = all(type(bound) in (int, float) for bound in (low, high)) and low <= high
            if numbers and isinstance(about["reference"], str) and about["name"]:
                return about
            raise ValueError("no name, range and reference")
        except PROBLEMS as problem:
            raise waiting.Unanswered(f"{type(problem).__name__}: {problem}") from problem

    def __call__(self, prompts, images, metadata=None):
        metadata = list(metadata or [{}] * len(images))
        batches = small_batches(images)
        parts = [(list(prompts[b]), list(images[b]), metadata[b]) for b in batches]
        futures = waiting.start([functools.partial(self.request, *part) for part in parts], 1)
        scores = []
        found = waiting.outcomes(futures, f"the reward at {self.url}", self.each, self.total)
        for (_, batch, _), result in zip(parts, found):
            if isinstance(result, waiting.Unanswered):
                reason, result = str(result), [math.nan] * len(batch)
            else:
                reason = "the server gave no score"
            self.failures += Counter({reason: sum(map(math.isnan, result))})
            scores += result
        return torch.tensor(scores)

    def request(self, prompts, images, metadata):
        """The scores of a batch, a list of floats, NaN for null. Raises Unanswered."""
        end = time.monotonic() + self.each
        pictures = [data_url(image) for image in images]
        body = {"prompts": prompts, "metadata": without_nan(metadata), "images": pictures}
        while True:
            try:
                options = dict(json=body, headers=self.headers)
                status, text = fetch("POST", f"{self.url}/score", self.each, **options)
                if status not in (429, 502, 503, 504):
                    return read_scores(status, text, len(images))
                reason = f"the server says {status}"
            except requests.RequestException as problem:
                reason = f"{type(problem).__name__}: {str(problem)[:200]}"
            if time.monotonic() + 1 > end:
                raise waiting.Unanswered(reason)
            time.sleep(1)


def small_batches(images):
    """Slices of the pictures, none with more than PICTURES, or with more than PIXELS in all."""
    batches, start, pixels = [], 0, 0
    for i, image in enumerate(images):
        pixels += image.width * image.height
        if i > start and (i - start == PICTURES or pixels > PIXELS):
            batches.append(slice(start, i))
            start, pixels = i, image.width * image.height
    return batches + [slice(start, len(images))] * (len(images) > start)


def fetch(method, url, seconds, **options):
    """(status, text) of a reply. Raises RequestException, and Unanswered for one that does not end.
    Byte by byte: a larger part would be waited for, however slowly it comes."""
    end, body = time.monotonic() + seconds, b""
    with requests.request(method, url, stream=True, timeout=seconds, **options) as reply:
        for part in reply.iter_content(1):
            body += part
            if len(body) > ANSWER or time.monotonic() > end:
                raise waiting.Unanswered(f"the answer does not end, after {len(body)} bytes")
        return reply.status_code, body.decode("utf-8", "replace")


def read_scores(status, text, number):
    """The scores in a reply: floats, NaN for null. Raises Unanswered if it has another form."""
    try:
        scores = json.loads(text)["scores"] if status == 200 else None
        if isinstance(scores, list) and len(scores) == number:
            if all(v is None or type(v) in (int, float) for v in scores):
                return [math.nan if value is None else float(value) for value in scores]
    except PROBLEMS:
        pass
    raise waiting.Unanswered(f"no list of {number} scores, but {status}: {text[:200]}")


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


class BadRequest(ValueError):
    """A request that cannot be answered. `status` is HTTP's number for the reason."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


class ServedReward(BaseHTTPRequestHandler):
    """Answers the requests of RemoteReward. `serve` sets `reward`, `name` and `token`."""

    reward, name, token, lock, timeout = None, "", "", threading.Lock(), 60
    max_bytes, max_pictures = 2**28, 256

    def log_message(self, *_):
        pass

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, work):
        """Reply with what work() returns, or with the reason why there is nothing."""
        given = self.headers.get("Authorization", "")
        try:
            expected = f"Bearer {self.token}".encode()
            if self.token and not hmac.compare_digest(given.encode("utf-8", "replace"), expected):
                raise BadRequest(401, f"set {TOKEN} to the word that `serve --token` was given")
            self.reply(200, work())
        except BadRequest as problem:
            self.reply(problem.status, {"error": str(problem)})
        except ConnectionError:
            pass  # the caller is gone
        except Exception as problem:  # the reward's own fault; this server goes on
            self.reply(500, {"error": f"{type(problem).__name__}: {problem}"})

    def do_GET(self):
        bounds = [max(-1e9, min(1e9, value)) for value in self.reward.range]  # JSON has no infinity
        about = {"name": self.name, "range": bounds, "reference": self.reward.reference}
        about["identity"] = getattr(self.reward, "identity", "")
        about["tiny"] = getattr(self.reward, "tiny", False)
        self.answer(lambda: about)

    def do_POST(self):
        self.answer(lambda: {"scores": self.scores(*self.read_request())})

    def read_request(self):
        """(prompts, pictures, metadata), of the same number; None for a damaged picture."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise BadRequest(411, f"Content-Length {length!r}: the number of bytes is needed")
        if int(length) > self.max_bytes:
            raise BadRequest(413, f"over {self.max_bytes} bytes; send fewer pictures")
        try:
            request = json.loads(self.rfile.read(int(length)))
            prompts, urls, metadata = (request[n] for n in ("prompts", "images", "metadata"))
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as problem:
            raise BadRequest(400, f"{type(problem).__name__}: {problem}") from problem
        kinds = ((prompts, str), (urls, str), (metadata, dict))
        if not all(isinstance(v, list) and all(isinstance(x, k) for x in v) for v, k in kinds):
            raise BadRequest(
                400, "prompts and images are lists of texts, metadata is one of objects"
            )
        if not len(prompts) == len(urls) == len(metadata) <= self.max_pictures:
            raise BadRequest(
                400,
                f"{len(prompts)} prompts, {len(urls)} images and {len(metadata)} metadata: as "
                f"many of each, {self.max_pictures} at most",
            )
        return prompts, self.open_pictures(urls), metadata

    def open_pictures(self, urls):
        """The pictures of data URLs; None, and a line on stderr, for what is none. All together may
        have as many pixels as one picture may."""
        images, pixels = [], 0
        for url in urls:
            try:
                images.append(from_data_url(url))
                pixels += images[-1].width * images[-1].height
            except BadPicture as problem:
                images.append(None)
                print(
                    f"error: a picture that was sent is not readable ({problem})", file=sys.stderr
                )
            if pixels > MAX_PIXELS:
                raise BadRequest(413, f"over {MAX_PIXELS:,} pixels; send fewer pictures")
        return images

    def scores(self, prompts, images, metadata):
        """A number for each picture; None for one without a score."""
        good, scores = [i for i, image in enumerate(images) if image], [None] * len(images)
        batch = [[values[i] for i in good] for values in (prompts, images, metadata)]
        with self.lock:  # one model, one batch at a time
            values = self.reward(*batch) if good else []
        values = guards.check_scores(self.name, self.reward, values, len(good))
        for i, value in zip(good, values.tolist()):
            scores[i] = value if math.isfinite(value) else None
        return scores


def serve(name, reward, port, host="127.0.0.1", token=""):
    """A server for one reward; .serve_forever() runs it, .server_port is its port. Exit code 2 if
    the port is taken. token: only those who send it are answered."""
    if not token.isascii():
        usage_error(f"--token {token!r}: letters of ASCII only, as HTTP's headers have")
    handler = type("Handler", (ServedReward,), {"reward": reward, "name": name, "token": token})
    try:
        return ThreadingHTTPServer((host, port), handler)
    except (OSError, OverflowError) as problem:
        usage_error(f"--host {host} --port {port}: {problem}; give another --port")


def serve_forever(name, load, port, host, token):
    """Serve the reward that load() returns. A taken port is found before it is loaded."""
    serve(name, None, port, host, token).server_close()
    server = serve(name, load(), port, host, token)
    announce(name, host, server.server_port, token)
    server.serve_forever()


def announce(name, host, port, token):
    """Say how a served reward is used, and who can use it."""
    open_to_all = host == "0.0.0.0"
    address = socket.gethostname() if open_to_all else host
    print(f"use it as --rewards {name}@http://{address}:{port}", flush=True)
    if token:
        print(f"with {TOKEN}={token} in the environment of the program that asks", flush=True)
    elif open_to_all:
        print("everybody who can reach this machine may use it; --token WORD closes it", flush=True)
