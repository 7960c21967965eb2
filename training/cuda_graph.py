"""The sampling loop of generate.py, recorded on a GPU: the same tokens, fewer calls from Python.

For one token a GPU needs less time than Python does to start its thousand kernels one by one: the
GPU would wait for Python. A CUDA graph records the kernels of one step once; a single call
then starts them all again. A recording knows addresses, not values. So everything that a step reads
and writes keeps its place in memory, the number of the step included.

Read next: generate.py, `sample_tokens`
"""

import torch

from training.files import usage_error

STRETCH = 144  # tokens for which attention keeps its length; each stretch is recorded anew


def is_usable(policy):
    """On a GPU, with whole weights: FSDP's hooks are Python, and a graph replays no Python."""
    sharded = hasattr(policy.model, "run_in_root_forward")
    return policy.cuda_graph and policy.device.type == "cuda" and not sharded


def capture(step):
    """step() as a CUDA graph; returns the function that replays it.

    One graph at a time, as all are captured with the same workspace. While a graph is alive no
    thread may leave an autocast context of its own: torch would free the rounded weights that the
    graph reads."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may use the GPU meanwhile. Nothing is computed yet.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except torch.AcceleratorError as problem:
        usage_error(
            f"this GPU cannot record a step of sampling ({str(problem).splitlines()[0]}); use "
            "--no-cuda-graph, which is slower"
        )
    return graph.replay


def sample_tokens(
    read, embed, choose, hidden, position, visible, ended, cache, uniform, pad, eos, stretch=STRETCH
):
    """The loop of generate.sample_tokens after it has read the context (`hidden`, (rows, D)).

    read(x, attention_mask, position) -> hidden; embed(ids); choose(hidden, uniform (N,)) -> ids.
    Returns (N, n) token ids; fewer columns if every row has sampled `eos` before."""
    (N, n), L, device = uniform.shape, cache.end, uniform.device
    t = torch.zeros(1, dtype=torch.long, device=device)  # tokens sampled so far, minus one
    tokens = torch.full((N, n), pad, device=device)
    position = position.clone()

    def sample_one(hidden):
        token = choose(hidden, uniform.index_select(1, t)[:, 0])
        if eos is not None:
            token = torch.where(ended, pad, token)
            ended.logical_or_(token == eos)
        tokens.index_copy_(1, t, token[:, None])

    def step():
        """Feed the last token, sample the next."""
        x = embed(tokens.index_select(1, t)[:, 0])
        cache.at = t + L
        visible.index_fill_(3, cache.at, 0.0)
        position.add_(1)
        t.add_(1)
        sample_one(read(x, visible[..., : cache.end], position))

    sample_one(hidden)
    for sampled in range(1, n):
        if eos is not None and ended.all():
            return tokens[:, :sampled]
        place = (sampled - 1) % stretch
        if place == 0:
            cache.end, proceed = cache.end + stretch, step
        if place == 2:  # the kernels of this length are loaded, autocast has made its copies
            proceed = capture(step)
        proceed()
    return tokens
