"""The image as its own reward: a judge that learns as fast as it is fooled (Adv-GRPO, arXiv:2511.20256).

A fixed reward model has fixed blind spots, and RL finds them. So let the reward learn: a discriminator D is
shown reference pictures of the prompts and the policy's own, and told which is which; how much a picture
looks like a reference to D is its reward. Whatever trick the policy learns, D sees it in the next rollouts.

    loss   = hinge(D(class token)) + .3 hinge(D(patches)),
             hinge = 1/2 mean relu(1 - D(reference)) + 1/2 mean relu(1 + D(generated))
    reward = .7 D(class token) + .3 mean D(patches)

D is a small head on a DINOv2 that stays frozen: features made without labels, which do see structure. A second
kind trains the last layers of a preference model along instead (adversarial-pickscore), by
-log sigmoid(s(reference) - s(generated)). It says nothing about what D cannot tell apart, and it pulls towards
*all* that sets the references apart, their style included.

Run:   torchrun grpo.py --rewards hps,adversarial --combine normalized
       torchrun grpo.py --rewards adversarial --references FOLDER      a folder that generate.py has written
       python adversarial_reward.py runs/style_cool                    how far a style has come

You should see:  in metrics.jsonl adversarial/accuracy, how often the reference beats the picture that the
policy painted for the same prompt: .5 at first, above .8 after five steps, and still there after fifty. D learns
faster than the policy; how far the policy comes is for gold to say.

Left out: StyleGAN's and SigLIP's discriminators, DINO's middle layers (all in the released code).
Read next: contest.py
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from transformers import Dinov2Model

from evaluation.hacking import cut_sheet, training_grid
from tiny_world import world as tiny
from training.files import read_jsonl, usage_error

# Shapes:  B pictures   P patches of each   D numbers a token

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32  # generated pictures in a step of the discriminator, and as many references
REPLAY = 512  # so many past rollouts are remembered: D must not forget yesterday's tricks


# --- reference pictures -------------------------------------------------------------------------


class References:
    """prompt -> reference pictures. Three sources: a folder that generate.py has written (its manifest.jsonl),
    a file (such a manifest, or a JSON object prompt -> [picture files], as Adv-GRPO's own), or, in the tiny
    world, nothing: clean drawings, eight a prompt as in the paper."""

    def __init__(self, where=None):
        self.where, self.files, self.drawn = where, {}, {}
        if where is None:
            return
        path = Path(where) / "manifest.jsonl" if Path(where).is_dir() else Path(where)
        if not path.is_file():
            usage_error(
                f"--references {where}: neither a file nor a folder with a manifest.jsonl; make one with "
                "`python generate.py --prompts FILE --model PIPELINE --output-dir FOLDER`"
            )
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:  # more than one line: a manifest
            listed = None
        if isinstance(listed, dict) and all(isinstance(names, list) for names in listed.values()):
            pairs = [(prompt, name) for prompt, names in listed.items() for name in names]
        else:
            pairs = [(row.get("prompt"), row.get("path")) for row in read_jsonl(path)]
        for prompt, name in pairs:
            if not (isinstance(prompt, str) and isinstance(name, str)):
                usage_error(
                    f"{path}: every line needs a prompt and a path, as generate.py writes them"
                )
            self.files.setdefault(prompt.strip(), []).append(path.parent / name)

    def check(self, prompts):
        """Every training prompt needs one: found out before the first step, not at the 900th."""
        for prompt in dict.fromkeys(prompts):
            if self.where is None:
                try:
                    tiny.wanted(prompt)
                except ValueError as problem:
                    usage_error(f"{problem}; for other prompts give --references FOLDER")
                continue
            missing = [
                name for name in self.files.get(prompt, ["not listed"]) if not Path(name).is_file()
            ]
            if missing:
                usage_error(
                    f"--references {self.where}: a picture of {prompt!r} is missing ({missing[0]}); "
                    "generate.py makes what is missing"
                )

    def pick(self, prompt, rng):
        if self.where is not None:
            return Image.open(rng.choice(self.files[prompt])).convert("RGB")
        if prompt not in self.drawn:
            self.drawn[prompt] = [tiny.reference(prompt, key) for key in range(8)]
        return rng.choice(self.drawn[prompt])


# --- the discriminator --------------------------------------------------------------------------


class Adversarial:
    """The reward: a head on DINOv2, trained along. Raw logits, about -3 to 3; they drift as it learns, and only
    differences within a group mean anything, which is all that GRPO uses."""

    range = (-math.inf, math.inf)
    needs = ("references",)
    checkpoint = "facebook/dinov2-base"
    reference = "Adv-GRPO, arXiv:2511.20256"
    folder = "dino"  # of the tiny checkpoint

    def __init__(
        self, device="cpu", checkpoint=None, references=None, steps=4, when="always", seed=0
    ):
        """steps: of the discriminator for each of the policy's. when: "always", or "beaten": only while the
        policy's pictures score higher than the references on average, the released rule for PickScore."""
        if references is None and checkpoint is None:
            usage_error(
                f"{self.reference}: this reward compares with reference pictures; give --references FOLDER"
            )
        self.device, self.steps, self.when, self.seed, self.learned = device, steps, when, seed, 0
        self.references = References(references)
        self.past = []  # [(prompt, picture)], the latest last
        self.build(str(checkpoint or self.checkpoint))

    def build(self, folder):
        self.eyes = Dinov2Model.from_pretrained(folder).eval().requires_grad_(False).to(self.device)
        self.size, width = self.eyes.config.image_size, self.eyes.config.hidden_size
        with torch.random.fork_rng(
            devices=[]
        ):  # its beginnings depend on the seed alone, on every process
            torch.manual_seed(self.seed)
            # One head for the class token and the patches, as released.
            self.head = torch.nn.Sequential(
                torch.nn.Linear(width, 512), torch.nn.GELU(), torch.nn.Linear(512, 1)
            )
        self.head.to(self.device)
        # The first moment is short (beta .5): the target moves. lr: the released 1e-4 came with nine steps of D,
        # each on new pictures, for one of the policy; with four on the same pictures it has to be faster.
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=1e-3, betas=(0.5, 0.999))

    def parameters(self):
        return list(self.head.parameters())

    @torch.no_grad()
    def tokens(self, images):
        """(B, 1 + P, D) float32: the class token, then the patches, after DINOv2's last LayerNorm. D is trained on
        these and asked about these. (Released: trained on them raw, asked about them scaled to length 1.)"""
        # Images are squeezed to a square, as released.
        squares = [
            image.convert("RGB").resize((self.size, self.size), Image.BICUBIC) for image in images
        ]
        data = torch.stack(
            [torch.frombuffer(bytearray(s.tobytes()), dtype=torch.uint8) for s in squares]
        )
        data = data.view(-1, self.size, self.size, 3) / 255
        data = ((data - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(
            0, 3, 1, 2
        )
        with torch.autocast("cuda", torch.bfloat16, enabled=str(self.device).startswith("cuda")):
            return self.eyes(data.to(self.device)).last_hidden_state.float()

    def judge(self, prompts, images):
        """(scores (B,), loss terms): D of each picture. All patches are asked; a random 64 of them, as released,
        would give one picture two scores."""
        logits = self.head(self.tokens(images))[..., 0]  # (B, 1 + P)
        return 0.7 * logits[:, 0] + 0.3 * logits[:, 1:].mean(1), logits

    def loss(self, real, fake):
        def hinge(r, f):
            return 0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean())

        (_, real), (_, fake) = real, fake
        return hinge(real[:, 0], fake[:, 0]) + 0.3 * hinge(real[:, 1:], fake[:, 1:])

    @torch.no_grad()
    def __call__(self, prompts, images, metadata=None):
        scores = [
            self.judge(prompts[i : i + 64], images[i : i + 64])[0]
            for i in range(0, len(images), 64)
        ]
        return torch.cat(scores).float().cpu()

    def learn(self, prompts, images):
        """Some steps of the discriminator on a step's rollouts, of all processes, against references of the same
        prompts. Returns metrics, which are those of the discriminator *before* it saw these pictures.

        Half of each batch is new and half is remembered. (The released code paints anew for each of its nine
        steps: nine tenths of the pictures that it pays for never train the policy.)"""
        # Every process draws the same batches, so all arrive at the same weights.
        rng = random.Random(f"{self.seed} {self.learned}")
        real = self([*prompts], [self.references.pick(prompt, rng) for prompt in prompts])
        fake = self(prompts, images)
        metrics = {
            "accuracy": (real > fake).float().mean().item(),
            "margin": (real - fake).mean().item(),
            "reference": real.mean().item(),
            "generated": fake.mean().item(),
        }
        new = list(zip(prompts, images))
        updates = self.steps if self.when == "always" or metrics["margin"] < 0 else 0
        for _ in range(updates):
            half = BATCH // 2 if self.past else BATCH
            batch = rng.choices(new, k=half) + rng.choices(self.past or new, k=BATCH - half)
            asked, generated = zip(*batch)
            shown = [self.references.pick(prompt, rng) for prompt in asked]
            loss = self.loss(self.judge(asked, shown), self.judge(asked, generated))
            self.optimizer.zero_grad(), loss.backward(), self.optimizer.step()
        self.past, self.learned = (self.past + new)[-REPLAY:], self.learned + 1
        return metrics | {"updates": updates}

    # The state is part of a run's checkpoint: a run that goes on does so with the judge it had.

    def state_dict(self):
        """Tensors, numbers and texts only, so that it opens with weights_only=True."""
        prompts, images = zip(*self.past) if self.past else ((), ())
        return {
            "weights": [p.detach().cpu().clone() for p in self.parameters()],
            "learned": self.learned,
            "optimizer": self.optimizer.state_dict(),
            "prompts": list(prompts),
            "sizes": [list(image.size) for image in images],
            "images": [
                torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images
            ],
        }

    def load_state_dict(self, state):
        for parameter, value in zip(self.parameters(), state["weights"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        images = [
            Image.frombytes("RGB", size, data.numpy().tobytes())
            for size, data in zip(state["sizes"], state["images"])
        ]
        self.past, self.learned = list(zip(state["prompts"], images)), state["learned"]


class AdversarialPickScore(Adversarial):
    """The paper's other kind: PickScore, the last layers of whose vision tower are trained along (here two; the released
    configuration has one). It reads the prompt, and begins with what people like instead of with nothing."""

    range = (0.0, 40.0)
    needs = ("text", "references")
    checkpoint = "yuvalkirstain/PickScore_v1"
    folder = "pickscore"
    layers = 2

    def build(self, folder):
        from rewards import PickScore  # lazily: rewards.py lists this class

        self.scorer = PickScore(self.device, folder)
        for layer in self.scorer.model.vision_model.encoder.layers[-self.layers :]:
            layer.requires_grad_(True)
        self.optimizer = torch.optim.Adam(
            self.parameters(), lr=5e-6 if folder == self.checkpoint else 1e-4
        )

    def parameters(self):
        return [p for p in self.scorer.model.parameters() if p.requires_grad]

    def judge(self, prompts, images):
        pixels = torch.stack([self.scorer.pixels(image) for image in images])
        return self.scorer.score(self.scorer.embed_images(pixels), list(prompts)), None

    def loss(self, real, fake):
        """Bradley-Terry, as PickScore was made: the reference is to win. -log softmax([real, fake])[0]."""
        return -F.logsigmoid(real[0] - fake[0]).mean()


# --- how far a style has come -----------------------------------------------------------------------


@dataclass
class Config:
    run: Annotated[
        str, tyro.conf.Positional
    ]  # a run folder, trained with --references in another style
    figure: str = "docs/style.png"  # the fixed prompts, before and after


def main(cfg):
    """Of the first and the last test's pictures: how many objects have a cool colour, as gold finds them, and how large the
    painted part of a picture is."""
    run = Path(cfg.run)
    if not (run / "tests" / "last.png").is_file():
        usage_error(f"{run}: no run folder of grpo.py, or it was not tested twice")
    n = len(read_jsonl(sorted((run / "tests").glob("step_*.jsonl"))[0]))
    for name in ("first", "last"):
        pictures = cut_sheet(run / "tests" / f"{name}.png", n)
        found, _ = tiny.explain(pictures)
        painted = np.mean(
            [(abs(np.asarray(picture) - tiny.GROUND).max(-1) > 40).mean() for picture in pictures]
        )
        colors = [thing.color for things in found for thing in things]
        share = sum(color in tiny.COOL for color in colors) / len(colors)
        print(
            f"{name} test: {share:.3f} of {len(colors)} objects are {', '.join(tiny.COOL)}; {painted:.3f} of the pixels are "
            "painted"
        )
    training_grid(run, cfg.figure, rows=2)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
