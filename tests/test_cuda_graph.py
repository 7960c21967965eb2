"""On a GPU one step of sampling is recorded and replayed. No GPU is needed to see whether the step can be: here every
operation on tensors is written down, undone, and started again on the same memory, as a CUDA graph does."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import generate

PROMPTS = ["a red circle", "three blue crosses", "a cross and a star"]
KEYS = [(5, 0, i, 0) for i in range(len(PROMPTS))]


def tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class Recording(TorchDispatchMode):
    """What torch.cuda.graph does, in slow motion."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.own = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "a graph cannot wait for a number"
        for tensor in tensors((args, kwargs)):
            place = tensor.untyped_storage().data_ptr()
            if place not in self.own and place not in self.before:
                self.before[place] = tensor.untyped_storage(), tensor.untyped_storage().clone()
        out = function(*args, **(kwargs or {}))
        self.own |= {t.untyped_storage().data_ptr() for t in tensors(out)} - self.before.keys()
        self.calls.append((function, args, kwargs or {}, tensors(out)))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():  # recording computes nothing
            storage.copy_(content)

    def replay(self):
        for function, args, kwargs, outs in self.calls:
            for old, new in zip(outs, tensors(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize(
    "cfg_weight, dtype", [(1.0, "float32"), (5.0, "float32"), (1.0, "bfloat16")]
)
def test_a_recorded_step_paints_what_the_step_itself_paints(policy, monkeypatch, cfg_weight, dtype):
    recorded, policy = [], dataclasses.replace(policy, dtype=getattr(torch, dtype))

    def record(step):
        with Recording() as recording:
            step()
        recorded.append(len(recording.calls))
        return recording.replay

    expected = generate.sample(policy, PROMPTS, KEYS, cfg_weight=cfg_weight)
    monkeypatch.setattr(generate, "recordable", lambda policy: True)
    monkeypatch.setattr(generate, "record", record)
    replayed = generate.sample(policy, PROMPTS, KEYS, cfg_weight=cfg_weight)
    assert (
        len(recorded) > 8 and min(recorded) > 100
    )  # eight graphs for pictures, and for thoughts as many as they need
    assert replayed.thoughts == expected.thoughts and torch.equal(
        replayed.image_ids, expected.image_ids
    )


def test_a_step_that_asks_for_a_number_cannot_be_recorded():
    x = torch.ones(1)
    with pytest.raises(AssertionError, match="wait"), Recording():
        x.add_(1).item()


def test_a_step_that_counts_in_python_is_not_what_was_recorded():
    """The reason for `t` being a tensor: a recording knows only the number that Python had at that time."""
    squares, n = torch.zeros(3), [0]

    def step():
        squares[n[0]] = n[0] ** 2 + 1
        n[0] += 1

    with Recording() as recording:
        step()
    assert squares.tolist() == [0, 0, 0]
    for _ in range(3):
        recording.replay()
    assert squares.tolist() == [1, 0, 0]


def test_only_whole_weights_on_a_gpu_are_recorded(policy):
    on_gpu = dict(cuda_graph=True, device=torch.device("cuda"))
    assert generate.recordable(
        SimpleNamespace(**on_gpu, model=object())
    ) and not generate.recordable(policy)
    assert not generate.recordable(SimpleNamespace(**on_gpu, model=SimpleNamespace(inside=len)))
    assert not generate.recordable(
        SimpleNamespace(**on_gpu | {"cuda_graph": False}, model=object())
    )
