"""The sampling loop for GPUs gives the tokens of the plain loop. On a GPU its step is recorded and
replayed. No GPU is needed to see whether it can be: here each operation on tensors is written down,
undone, and repeated on the same memory, as a CUDA graph does."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import generate
import grpo
from training import cuda_graph
from training.policy import trainable

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

    @torch.autocast("cpu", enabled=False)  # what was written down has been cast already
    def replay(self):
        for function, args, kwargs, outs in self.calls:
            for old, new in zip(outs, tensors(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def use_the_loop_for_gpus(monkeypatch):
    """Sample by it on a CPU, with this capture function, in stretches as long as the plain loop's
    steps of attention, so that both add in the same order."""

    def use(capture):
        loop = cuda_graph.sample_tokens
        in_eights = lambda *args: loop(*args, stretch=8)
        monkeypatch.setattr(cuda_graph, "is_usable", lambda policy: True)
        monkeypatch.setattr(cuda_graph, "capture", capture)
        monkeypatch.setattr(cuda_graph, "sample_tokens", in_eights)

    return use


def same(a, b):
    return a.thoughts == b.thoughts and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("mask", "image_ids")
    )


@pytest.mark.parametrize("cfg_weight", [1.0, 5.0])
def test_the_loop_for_gpus_samples_the_tokens_of_the_plain_loop(
    policy, use_the_loop_for_gpus, cfg_weight
):
    plain = generate.sample(policy, PROMPTS, KEYS, cfg_weight=cfg_weight)
    use_the_loop_for_gpus(lambda step: step)  # nothing is recorded: the loop itself
    assert same(generate.sample(policy, PROMPTS, KEYS, cfg_weight=cfg_weight), plain)


@pytest.mark.parametrize(
    "cfg_weight, dtype", [(1.0, "float32"), (5.0, "float32"), (1.0, "bfloat16")]
)
def test_a_recorded_step_gives_the_same_tokens(policy, use_the_loop_for_gpus, cfg_weight, dtype):
    recorded, policy = [], dataclasses.replace(policy, dtype=getattr(torch, dtype))

    def capture(step):
        with Recording() as recording:
            step()
        recorded.append(len(recording.calls))
        return recording.replay

    plain = generate.sample(policy, PROMPTS, KEYS, cfg_weight=cfg_weight)
    use_the_loop_for_gpus(capture)
    assert same(generate.sample(policy, PROMPTS, KEYS, cfg_weight=cfg_weight), plain)
    # Eight graphs for pictures, and as many as they need for thoughts.
    assert len(recorded) > 8 and min(recorded) > 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_graph_on_a_gpu_draws_what_the_unrecorded_loop_draws(config, monkeypatch, lora_rank):
    """Also after an update: autocast's rounded copies of the trained weights are made anew."""
    cfg = config(device="cuda", dtype="bfloat16", lora_rank=lora_rank)
    policy, _ = grpo.load_policies(cfg)
    optimizer, drawn = torch.optim.SGD(trainable(policy), lr=1e-3), []
    for _ in range(2):
        drawn.append(generate.sample(policy, PROMPTS, KEYS, cfg_weight=5.0))
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graph, "capture", lambda step: step)
            again = generate.sample(policy, PROMPTS, KEYS, cfg_weight=5.0)
        assert same(drawn[-1], again)
        generate.logprobs(policy, drawn[-1], 5.0).sum().backward()
        optimizer.step()
    assert not same(*drawn)


def test_a_step_that_reads_a_number_cannot_be_recorded():
    x = torch.ones(1)
    with pytest.raises(AssertionError, match="wait"), Recording():
        x.add_(1).item()


def test_a_step_that_counts_in_python_is_not_what_was_recorded():
    """Why the number of the step is a tensor: a recording knows only the number of that time."""
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
    def usable(cuda_graph_flag=True, **model):
        stand_in = SimpleNamespace(cuda_graph=cuda_graph_flag, device=torch.device("cuda"))
        stand_in.model = SimpleNamespace(**model)
        return cuda_graph.is_usable(stand_in)

    assert usable() and not cuda_graph.is_usable(policy)
    assert not usable(run_in_root_forward=len) and not usable(cuda_graph_flag=False)
