"""Serves DeQA-Score (arXiv:2501.11561) as the reward `deqa`: how good is this photograph, from 1 to 5?

A language model reads "the quality of the image is", and its belief in five words is read off the next token:

    score = 5 P(excellent) + 4 P(good) + 3 P(fair) + 2 P(poor) + 1 P(bad)

Its code is of 2023 and pins transformers 4.36.1, so it has an environment of its own, and this file to answer from it:

    git clone https://github.com/zhiyuanyou/DeQA-Score && git -C DeQA-Score checkout 8e4abc8
    python3.10 -m venv deqa && deqa/bin/pip install ./DeQA-Score requests
    PYTHONPATH=DeQA-Score deqa/bin/python reward_models/deqa_server.py --port 8101             16 GB of GPU memory
    torchrun grpo.py --rewards hps,deqa@http://127.0.0.1:8101                     elsewhere

The released ArtifactReward code scores one picture at a time; here eight. Not run by us: the weights, 16 GB, were not
at hand; the formula is the one in that repository's src/evaluate/scorer.py, which is what computes it here, too.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from reward_models.serving import serve


class DeQA:
    range = (1.0, 5.0)
    reference = "DeQA-Score, arXiv:2501.11561"

    def __init__(self, checkpoint, device, batch=8):
        from src import Scorer  # the repository's package is really called that

        self.scorer, self.batch = Scorer(pretrained=checkpoint, device=device), batch

    def __call__(self, prompts, images, metadata=None):
        """(N,), without a look at the prompts."""
        parts = [
            self.scorer(images[i : i + self.batch]).float().cpu()
            for i in range(0, len(images), self.batch)
        ]
        return torch.cat(parts)


if __name__ == "__main__":
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--checkpoint", default="zhiyuanyou/DeQA-Score-Mix3", help="folder or hub name"
    )
    flags.add_argument("--device", default="cuda:0")
    flags.add_argument("--port", type=int, default=8101)
    flags.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    chosen = flags.parse_args()
    server = serve("deqa", DeQA(chosen.checkpoint, chosen.device), chosen.port, chosen.host)
    print(f"use it as --rewards deqa@http://{chosen.host}:{server.server_port}", flush=True)
    server.serve_forever()
