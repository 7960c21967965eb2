"""How the tiny models are trained: two optimizers, and loops that continue after a stop.

Read next: train_policy.py
"""

import re

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from training.files import ROOT, atomic

# All sizes, the chat templates and the image processors are those of the shipped checkpoints; only
# weights and vocabularies are learned anew.
SHIPPED = ROOT / "tiny_world" / "checkpoints"
BETAS = (0.9, 0.95)  # of AdamW, the usual ones for language models
SAVE_STEPS = 250


def optimizers(named_parameters, lr, muon_lr, **options):
    """[(optimizer, highest learning rate)] for these parameters. muon_lr = 0: AdamW for all.

    Muon trains the matrices of the transformer layers: it makes all singular values of an update
    equal (kellerjordan.github.io/posts/muon). With it our policy needs 400 steps for the loss that
    AdamW reaches in 1000. AdamW trains the rest: embeddings, heads, norms, convolutions."""
    is_layer = re.compile(r"\b(layers|blocks)\.\d").search
    matrices = {
        name: p
        for name, p in named_parameters.items()
        if muon_lr and p.dim() == 2 and is_layer(name)
    }
    others = [p for name, p in named_parameters.items() if name not in matrices]
    found = [(torch.optim.AdamW(others, lr=lr, **options), lr)]
    if matrices:
        muon = torch.optim.Muon(matrices.values(), lr=muon_lr, weight_decay=0.01)
        found.append((muon, muon_lr))
    return found


class Training:
    """A training loop with a one-cycle learning rate and clipped gradients:

        training = Training("dino", named_parameters, steps, 1e-3, 0.1, rng, folder)
        for step in training:
            training.update(loss, what_to_show=number)

    Every 250 steps it saves all that the next step depends on in `folder`, and a second training of
    the same name goes on from there; folder None: not at all. rng: numpy's generator, which draws
    the batches. more: other modules that change, such as a teacher."""

    def __init__(
        self,
        name,
        named_parameters,
        steps,
        lr,
        warmup,
        rng,
        folder=None,
        more=(),
        muon_lr=0.0,
        **options,
    ):
        self.parameters, self.steps, self.rng, self.more = dict(named_parameters), steps, rng, more
        self.optimizers = optimizers(self.parameters, lr, muon_lr, **options)
        cycle = dict(total_steps=steps, pct_start=warmup, cycle_momentum=False)
        one_cycle = torch.optim.lr_scheduler.OneCycleLR
        self.schedules = [one_cycle(opt, peak, **cycle) for opt, peak in self.optimizers]
        self.file, self.done = folder and folder / f"{name}.pt", 0
        if self.file and self.file.is_file():
            self.load(torch.load(self.file, weights_only=True))
        self.bar = tqdm(total=steps, desc=name, initial=self.done)

    def __iter__(self):
        while self.done < self.steps:
            yield self.done  # here the loop's body does one step
            if self.file and (self.done % SAVE_STEPS == 0 or self.done == self.steps):
                with atomic(self.file, "wb") as file:
                    torch.save(self.state(), file)

    def update(self, loss, **shown):
        for opt, _ in self.optimizers:
            opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for (opt, _), schedule in zip(self.optimizers, self.schedules):
            opt.step()
            schedule.step()
        if self.done % 10 == 0:
            shown = {"loss": loss} | shown
            self.bar.set_postfix({key: f"{value.item():.3f}" for key, value in shown.items()})
        self.done += 1
        self.bar.update()

    def changing(self):
        return [*(opt for opt, _ in self.optimizers), *self.schedules, *self.more]

    def state(self):
        return {
            "done": self.done,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "changing": [thing.state_dict() for thing in self.changing()],
            "rng": self.rng.bit_generator.state,
        }

    def load(self, state):
        self.done, self.rng.bit_generator.state = state["done"], state["rng"]
        for name, value in state["parameters"].items():
            self.parameters[name].data.copy_(value)
        for thing, value in zip(self.changing(), state["changing"]):
            thing.load_state_dict(value)


def bpe_tokenizer(texts, specials, vocab_size=512):
    """A byte-level BPE tokenizer, as Janus and Qwen have: any text can be written in it, and known
    words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = dict(show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
