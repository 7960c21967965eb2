"""Serves DeQA-Score (arXiv:2501.11561) as the reward `deqa`: how good is this photograph, 1 to 5?

A language model continues "the quality of the image is" with one of five words:

    score = 5 P(excellent) + 4 P(good) + 3 P(fair) + 2 P(poor) + 1 P(bad)

Run:   git clone https://github.com/zhiyuanyou/DeQA-Score && git -C DeQA-Score checkout 8e4abc8
       python3.10 -m venv deqa && deqa/bin/pip install ./DeQA-Score requests
       PYTHONPATH=DeQA-Score deqa/bin/python reward_models/deqa_server.py --port 8101
       torchrun grpo.py --rewards hps,deqa@http://127.0.0.1:8101        in grpo.py's environment

You should see:  the address for --rewards. The server needs 16 GB of GPU memory.

Left out: a run with the published weights, which we did not have. The formula is computed by the
repository's own src/evaluate/scorer.py. The released ArtifactReward code scores one picture at a
time; this server scores eight.   Read next: ../rewards.py
"""

import argparse
import sys
from pathlib import Path

# Python searches this file's folder first, where git.py and clip.py hide packages of these names.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parents[1]))

from reward_models import guards
from reward_models.serving import DeQA, serve_forever


def main():
    raw = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flags.add_argument("--checkpoint", default=DeQA.checkpoint, help="folder or hub name")
    flags.add_argument("--device", default="cuda:0")
    flags.add_argument("--port", type=int, default=8101)
    flags.add_argument("--host", default="127.0.0.1", help="0.0.0.0 accepts other machines")
    flags.add_argument("--token", default="", help="answer only those who send this word")
    cfg = flags.parse_args()

    def load():
        reward = DeQA(cfg.device, cfg.checkpoint)
        reward.identity = guards.identity(reward, "deqa", cfg.checkpoint)
        return reward

    serve_forever("deqa", load, cfg.port, cfg.host, cfg.token)


if __name__ == "__main__":
    main()
