"""One loader for all models: a checkpoint that does not fill the whole model is refused.

transformers gives random numbers to the weights that a checkpoint lacks, leaves out those that it
does not know, and says so in a log only. Such a model runs, and its pictures and scores mean
nothing. A prefix (`module.`), a LoRA that was not merged, or a missing head is enough.

Read next: policy.py
"""

import contextlib

import torch
from transformers.utils import logging as transformers_logging

from training.files import usage_error

transformers_logging.set_verbosity_error()  # it would announce each fallback to Pillow
transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def readable(source):
    """Exit code 2, naming the checkpoint, for whatever is raised while it is read.

    Many kinds are: a pointer of Git LFS instead of weights, a file that was cut off, broken JSON,
    a setting that the configuration refuses, no network."""
    try:
        yield
    except Exception as problem:
        kind = type(problem).__name__
        first = (str(problem).strip() or kind).splitlines()[0][:300]
        usage_error(f"{source}: cannot be loaded ({kind}: {first})")


def load_part(kind, source, **options):
    """kind.from_pretrained(source): a tokenizer, a processor or a configuration. Exit code 2 if it
    cannot be read."""
    with readable(source):
        return kind.from_pretrained(source, **options)


def check_kind(kind, source):
    """Exit code 2 if a checkpoint is of another architecture. With its settings, or none, a model
    of any size would be built first, and then not be filled."""
    found = kind.config_class.get_config_dict(source)[0].get("model_type")
    needed = kind.config_class.model_type
    if found != needed:
        usage_error(f"{source}: its config.json has model_type {found!r}; it must be {needed!r}")


def load_model(kind, source, **options):
    """kind.from_pretrained(source) with each weight from the checkpoint, else exit code 2.

    source: a folder or a hub name. Weights that transformers itself ties, or ignores because they
    are constants, may be missing or left over."""
    with readable(source):
        if "config" not in options:
            check_kind(kind, source)
        options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # to list them all
        model, report = kind.from_pretrained(source, **options)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers found adapter_config.json
        usage_error(
            f"{source}: holds a LoRA that is not merged; use merge_and_unload and save that"
        )
    shapes = [f"{name} {tuple(a)} for {tuple(b)}" for name, a, b in report["mismatched_keys"]]
    check_fit(source, report["missing_keys"], report["unexpected_keys"], shapes)
    return model


def read_weights(path, key=None, **options):
    """The state dict in a file of torch.save, on the CPU; with `key`, the one under that name.
    Exit code 2 if it cannot be read."""
    with readable(path):
        state = torch.load(path, weights_only=True, map_location="cpu", **options)
        state = state[key] if key else state
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError("it holds more than names and tensors")
        return state


def fill(model, state, source, **options):
    """model.load_state_dict(state), all of it and nothing else, else exit code 2."""
    own = model.state_dict()
    pairs = [(name, state[name].shape, own[name].shape) for name in own.keys() & state.keys()]
    shapes = [f"{name} {tuple(a)} for {tuple(b)}" for name, a, b in pairs if a != b]
    check_fit(source, own.keys() - state.keys(), state.keys() - own.keys(), shapes)
    model.load_state_dict(state, **options)
    return model


def check_fit(source, missing, unexpected, mismatched):
    """Exit code 2, with the first names, if a checkpoint and its model do not have the same."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    found = [f"{len(v)} {kind} ({', '.join(sorted(v)[:3])})" for kind, v in kinds.items() if v]
    if found:
        usage_error(
            f"{source}: the weights do not fit the model: {'; '.join(found)}. Remove a prefix from "
            "the names, merge a LoRA (merge_and_unload), or give a complete checkpoint"
        )
