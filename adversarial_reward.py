"""The image as its own reward: a reward that learns while the policy tries to fool it (Adv-GRPO,
arXiv:2511.20256).

A fixed reward model has fixed blind spots, and RL finds them. So let the reward learn. A
discriminator D sees reference pictures of the prompts and the policy's own pictures, and learns to
tell them apart. The reward of a picture is how much it looks like a reference to D. If the
policy finds a trick, D sees it in the next rollouts and learns to reject it.

    loss   = hinge(D(class token)) + .3 hinge(D(patches)),
             hinge = 1/2 mean relu(1 - D(reference)) + 1/2 mean relu(1 + D(generated))
    reward = .7 D(class token) + .3 mean D(patches)

D is a small head on a frozen DINOv2, whose features were learned without labels and do represent
structure. A second kind (adversarial-pickscore) trains the last layers of a preference model, by
-log sigmoid(s(reference) - s(generated)). Such a reward ignores what D cannot distinguish,
and it pulls towards *everything* that sets the references apart, their style included.

Run:   torchrun grpo.py --rewards hps,adversarial --combine normalized
       torchrun grpo.py --rewards adversarial --references FOLDER    written by generate.py
       python -m studies.style runs/style_cool                       how far a style was adopted

You should see:  in metrics.jsonl adversarial/accuracy, how often D scores the reference above the
policy's picture of the same prompt: .5 at first, above .8 after five steps, and still there after
fifty. D learns faster than the policy. Gold measures how good the policy becomes.

Left out: discriminators on StyleGAN's, SigLIP's and DINO's middle layers (all in the released
code).   Read next: tiny_world/world.py
"""

import json
import math
import random
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from transformers import Dinov2Model

from reward_models.clip import PickScore
from reward_models.pixels import IMAGENET_MEAN, IMAGENET_STD
from tiny_world import world
from training.decode import open_picture, to_rgb
from training.files import usage_error
from training.processes import gather
from training.records import read_jsonl
from training.weights import load_model

# Shapes:  B pictures   E numbers per token

BATCH = 32  # generated pictures in one update of the discriminator, and as many references
REPLAY = 512  # past rollouts that are kept: D must not forget the tricks of earlier steps


# --- reference pictures -------------------------------------------------------------------------


class References:
    """prompt -> reference pictures, from one of three sources: a folder that generate.py has
    written (its manifest.jsonl); a file (such a manifest, or a JSON object prompt -> [picture
    files], as Adv-GRPO's own); or, in the tiny world, None: clean drawings, eight for each prompt
    as in the paper. Exit code 2 if the source is not readable."""

    def __init__(self, source=None):
        self.source, self.files, self.drawings, self.damaged = source, {}, {}, set()
        if source is None:
            return
        path = Path(source) / "manifest.jsonl" if Path(source).is_dir() else Path(source)
        if not path.is_file():
            usage_error(
                f"--references {source}: neither a file nor a folder with a manifest.jsonl; make "
                "one with `python generate.py --prompts FILE --model PIPELINE --output-dir FOLDER`"
            )
        for prompt, name in self.read_pairs(path):
            if not (isinstance(prompt, str) and isinstance(name, str)):
                usage_error(f"{path}: each line needs a prompt and a path, as generate.py writes")
            self.files.setdefault(prompt.strip(), []).append(path.parent / name)

    @staticmethod
    def read_pairs(path):
        """[(prompt, file name)] of either kind of file."""
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # more than one line: a manifest; or no text, which read_jsonl says
            listed = None
        if isinstance(listed, dict) and all(isinstance(names, list) for names in listed.values()):
            return [(prompt, name) for prompt, names in listed.items() for name in names]
        return [(row.get("prompt"), row.get("path")) for row in read_jsonl(path)]

    def check(self, prompts):
        """Each training prompt needs a reference. Exit code 2 before the first step if not."""
        for prompt in dict.fromkeys(prompts):
            if self.source is None:
                try:
                    world.parse_prompt(prompt)
                except ValueError as problem:
                    usage_error(f"{problem}; for other prompts give --references FOLDER")
                continue
            files = self.files.get(prompt, ["not listed"])
            missing = [name for name in files if not Path(name).is_file()]
            if missing:
                usage_error(
                    f"--references {self.source}: a picture of {prompt!r} is missing "
                    f"({missing[0]}); generate.py makes what is missing"
                )

    def choose(self, prompt, rng):
        """A reference at random; None if all files of the prompt are damaged."""
        if self.source is not None:
            files = self.files[prompt]
            picked = self.open(rng.choice(files))
            # The draws depend on the files only, so a resumed run repeats them.
            return picked or next(filter(None, map(self.open, rng.sample(files, len(files)))), None)
        if prompt not in self.drawings:
            self.drawings[prompt] = [world.reference_picture(prompt, key) for key in range(8)]
        return rng.choice(self.drawings[prompt])

    def open(self, file):
        """As open_picture; a damaged file is named once and not opened again."""
        image = None if file in self.damaged else open_picture(file)
        self.damaged |= set() if image else {file}
        return image


# --- the discriminator --------------------------------------------------------------------------


class Adversarial:
    """The reward: a head on DINOv2 that learns beside the policy. Raw logits, about -3 to 3. They
    drift while it learns; only differences within a group mean anything, and GRPO uses no more.

    steps: discriminator updates for each policy update. when: "always", or "beaten": only while the
    policy's pictures score above the references on average (the released rule for PickScore)."""

    range = (-math.inf, math.inf)
    usual = "-3 to 3"
    needs = ("references",)
    checkpoint = "facebook/dinov2-base"
    gigabytes = 0.4
    reference = "Adv-GRPO, arXiv:2511.20256"
    tiny_folder = "dino"

    def __init__(
        self, device="cpu", checkpoint=None, references=None, steps=4, when="always", seed=0
    ):
        if references is None and checkpoint is None:
            usage_error(f"{self.reference}: needs reference pictures; give --references FOLDER")
        self.device, self.steps, self.when, self.seed = device, steps, when, seed
        self.references = References(references)
        self.calls = 0  # of `learn`
        self.past = []  # [(prompt, picture)], the latest last
        self.build(str(checkpoint or self.checkpoint))

    def build(self, folder):
        self.dino = load_model(Dinov2Model, folder).eval().requires_grad_(False)
        self.dino.to(self.device)
        self.size, width = self.dino.config.image_size, self.dino.config.hidden_size
        with torch.random.fork_rng(devices=[]):  # the same initial weights on all processes
            torch.manual_seed(self.seed)
            # One head for the class token and the patches, as released.
            layers = (torch.nn.Linear(width, 512), torch.nn.GELU(), torch.nn.Linear(512, 1))
            self.head = torch.nn.Sequential(*layers).to(self.device)
        # beta1 = .5: the target moves, so a long memory would lag. lr: the released 1e-4 goes with
        # nine updates, each on new pictures, for one of the policy. Ours are four, on this
        # step's pictures and on past ones, so D must learn faster.
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=1e-3, betas=(0.5, 0.999))

    def parameters(self):
        """Those that are trained."""
        return list(self.head.parameters())

    def check(self, prompts):
        """Exit code 2 if a prompt has no reference picture."""
        self.references.check(prompts)

    @torch.no_grad()
    def tokens(self, images):
        """(B, 1 + patches, E) float32: class token and patches after DINOv2's last LayerNorm. D is
        trained on these and scores these. (Released: trained on them raw, but scores them scaled to
        length 1.)"""
        # Pictures are resized to a square without cropping, as released.
        squares = [to_rgb(i).resize((self.size, self.size), Image.BICUBIC) for i in images]
        data = [torch.frombuffer(bytearray(s.tobytes()), dtype=torch.uint8) for s in squares]
        data = torch.stack(data).view(-1, self.size, self.size, 3) / 255
        data = (data - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        on_gpu = str(self.device).startswith("cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            pixels = data.permute(0, 3, 1, 2).to(self.device)
            return self.dino(pixels).last_hidden_state.float()

    def discriminate(self, prompts, images):
        """(scores (B,), logits (B, 1 + patches)). All patches count; a random 64 of them, as
        released, would give one picture two scores."""
        logits = self.head(self.tokens(images))[..., 0]
        return 0.7 * logits[:, 0] + 0.3 * logits[:, 1:].mean(1), logits

    def loss(self, real, fake):
        """real, fake: what `discriminate` returns for references and for generated pictures."""

        def hinge(r, f):
            return 0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean())

        (_, real), (_, fake) = real, fake
        return hinge(real[:, 0], fake[:, 0]) + 0.3 * hinge(real[:, 1:], fake[:, 1:])

    @torch.no_grad()
    def __call__(self, prompts, images, metadata=None):
        """(N,) float32."""
        starts = range(0, len(images), 64)
        scores = [self.discriminate(prompts[i : i + 64], images[i : i + 64])[0] for i in starts]
        return torch.cat(scores).float().cpu()

    def with_references(self, prompts, images, rng):
        """(prompts, images, their references), without those that have no readable one."""
        chosen = [self.references.choose(prompt, rng) for prompt in prompts]
        known = [pair for pair in zip(prompts, images, chosen) if pair[2] is not None]
        return [list(column) for column in zip(*known)] or ([], [], [])

    def learn(self, prompts, images):
        """Update the discriminator on a step's rollouts, of all processes, against references of
        the same prompts. Returns metrics of the discriminator *before* it learned from these.

        Half of each batch is new, half is from past steps. (The released code samples new pictures
        for each of its nine updates: nine of ten pictures train the discriminator only.)"""
        rng = random.Random(f"{self.seed} {self.calls}")  # the same batches on all processes
        self.calls += 1
        prompts, images, references = self.with_references(prompts, images, rng)
        if not references:  # all files of these prompts are damaged
            nothing = dict.fromkeys(("accuracy", "margin", "reference", "generated"), math.nan)
            return nothing | {"updates": 0}
        real, fake = self(prompts, references), self(prompts, images)
        metrics = {
            "accuracy": (real > fake).float().mean().item(),
            "margin": (real - fake).mean().item(),
            "reference": real.mean().item(),
            "generated": fake.mean().item(),
        }
        updates = self.steps if self.when == "always" or metrics["margin"] < 0 else 0
        new = list(zip(prompts, images))
        for _ in range(updates):
            halves = rng.choices(new, k=BATCH // 2), rng.choices(self.past or new, k=BATCH // 2)
            batch = sum(halves, [])
            batch_prompts, generated = zip(*batch)
            batch_prompts, generated, shown = self.with_references(batch_prompts, generated, rng)
            if not shown:
                continue
            real = self.discriminate(batch_prompts, shown)
            loss = self.loss(real, self.discriminate(batch_prompts, generated))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.past = (self.past + new)[-REPLAY:]
        return metrics | {"updates": updates}

    def state_dict(self):
        """Part of a run's checkpoint: tensors, numbers and texts, so that it opens with
        weights_only=True."""
        images = [image for _, image in self.past]
        bytes_ = [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in images]
        return {
            "weights": [p.detach().cpu().clone() for p in self.parameters()],
            "calls": self.calls,
            "optimizer": self.optimizer.state_dict(),
            "prompts": [prompt for prompt, _ in self.past],
            "sizes": [list(image.size) for image in images],
            "images": bytes_,
        }

    def load_state_dict(self, state):
        for parameter, value in zip(self.parameters(), state["weights"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        pictures = zip(state["sizes"], state["images"])
        images = [Image.frombytes("RGB", size, data.numpy().tobytes()) for size, data in pictures]
        self.past, self.calls = list(zip(state["prompts"], images)), state["calls"]


class AdversarialPickScore(Adversarial):
    """The paper's other kind: PickScore, whose last vision layers learn (two; the released
    configuration has one). It reads the prompt, and starts from human preferences."""

    range = (-100.0, 100.0)
    usual = "18 to 24"
    needs = ("text", "references")
    checkpoint = "yuvalkirstain/PickScore_v1"
    gigabytes = 3.9
    tiny_folder, how = "pickscore", PickScore.how
    layers = 2

    def build(self, folder):
        self.scorer = PickScore(self.device, folder)
        for layer in self.scorer.model.vision_model.encoder.layers[-self.layers :]:
            layer.requires_grad_(True)
        lr = 5e-6 if folder == self.checkpoint else 1e-4
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def parameters(self):
        return [p for p in self.scorer.model.parameters() if p.requires_grad]

    def discriminate(self, prompts, images):
        pixels = torch.stack([self.scorer.preprocess(image) for image in images])
        embeddings = self.scorer.embed_images(pixels)
        return self.scorer.similarity(embeddings, list(prompts)), None

    def loss(self, real, fake):
        """Bradley-Terry, as PickScore was trained; the reference is to win."""
        return -F.logsigmoid(real[0] - fake[0]).mean()


def update_adversaries(adversaries, rollouts):
    """Called once a step by grpo.py. adversaries: name -> reward that learns. Each process learns
    from the rollouts of all processes in the same order; should the results ever differ, rank 0
    decides. Returns metrics, name/key -> number."""
    if not adversaries:
        return {}
    entries = gather(list(zip(rollouts.keys, rollouts.prompts, rollouts.images)))
    _, prompts, images = zip(*sorted(entries, key=lambda entry: entry[0]))
    metrics = {}
    for name, reward in adversaries.items():
        learned = reward.learn(prompts, images)
        metrics |= {f"{name}/{key}": value for key, value in learned.items()}
        for parameter in reward.parameters() if dist.is_initialized() else ():
            dist.broadcast(parameter.data, 0)
    return metrics
