"""The same policy on many GPUs, or on a small one: sharding, LoRA, and a plan that says beforehand whether it fits.

Full training keeps 16 bytes a parameter (float32 weight and gradient, Adam's two moments): 26 GB for Janus-Pro-1B,
110 GB for 7B. Two ways out:

    --shard       FSDP2: every process keeps its share of all that, decoder layer by decoder layer, and gathers a layer
                  when it is needed. Sampling needs all layers 576 times a picture, so for a rollout they are gathered
                  once and let go afterwards. Several nodes: sharded within a node, replicated across (HSDP).
    --lora-rank   train two thin matrices beside each weight; the reference policy is the same model without them.

    torchrun grpo.py --model deepseek-community/Janus-Pro-7B --shard --dry-run --world-size 8

prints the plan, without a GPU and without the weights.   Read next: grpo.py
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import JanusConfig, JanusForConditionalGeneration

from training.files import HERE, usage_error

# --- several processes -----------------------------------------------------------------------------


def start_processes(device="auto"):
    """(rank, number of processes). torchrun sets RANK; without it this is one process."""
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(items):
    """A list from each process -> one list, in the order of the ranks, on all of them."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


# --- sharding -------------------------------------------------------------------------------------


def shard(policy):
    """FSDP2 in place: float32 shards, arithmetic in the policy's dtype, gradients summed in float32.

    The root is the whole Janus, because sampling and scoring enter it at many doors (embedding, image head, aligner); they
    are run inside one forward pass of the root (`Policy.inside`), or the doors would meet shards. The VQ model stays
    whole: it is frozen, and small."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    nodes, kind = dist.get_world_size() // local, policy.device.type
    shape, names = ((nodes, local), ("replicate", "shard")) if nodes > 1 else ((local,), ("shard",))
    options = dict(
        mesh=init_device_mesh(kind, shape, mesh_dim_names=names),
        # Inputs keep their type: among them are the random numbers that choose the tokens, and in bfloat16
        # one in five hundred of those would be 1.
        mp_policy=MixedPrecisionPolicy(
            param_dtype=policy.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    )
    for layer in policy.body.layers:
        fully_shard(layer, **options)
    fully_shard(
        policy.model, ignored_params=set(policy.model.model.vqmodel.parameters()), **options
    )
    policy.model.inside = lambda function, *args: function(*args)
    register_fsdp_forward_method(policy.model, "inside")  # from now on it counts as a forward pass
    return policy


def lighten(policy):
    """In place: frozen matrices in the policy's dtype. Autocast rounds them to it at every use anyway, anew for each token;
    so nothing changes, and they are half as large. Trained ones stay float32, or small steps would be lost; so do norms and
    the VQ model, which are used in float32 and are small."""
    for name, parameter in policy.model.named_parameters():
        if not parameter.requires_grad and parameter.dim() > 1 and "vqmodel" not in name:
            parameter.data = parameter.data.to(policy.dtype)
    return policy


def parts(policy):
    return [module for module in policy.model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def gathered(*policies):
    """Whole weights on every process, for as long as this lasts: gathered once and not once a token. Inside, nobody waits
    for anybody, so processes may take different numbers of steps (thoughts end when they end)."""
    modules = [module for policy in policies if policy for module in parts(policy)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


# --- LoRA -----------------------------------------------------------------------------------------


def add_lora(policy, rank, seed=0):
    """In place: W becomes W + 2 B A, A and B of this rank, B = 0 at first; only they are trained (arXiv:2106.09685). A is
    random, and has to be the same on all processes."""
    from peft import LoraConfig, inject_adapter_in_model

    policy.model.requires_grad_(False)
    targets = r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), policy.model
        )
    return policy


def lora_layers(policy):
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: module
        for name, module in policy.model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@contextlib.contextmanager
def as_reference(policy, reference):
    """The policy that training started from: a model of its own, or with LoRA the same one, switched back."""
    if reference is not None:
        yield reference
        return
    for layer in lora_layers(policy).values():
        layer.enable_adapters(False)
    yield policy
    for layer in lora_layers(policy).values():
        layer.enable_adapters(True)


# --- what goes into a checkpoint ------------------------------------------------------------------


def whole(tree, keep=True):
    """A nest of dicts, lists and tensors, with every shard gathered: on all processes at once, kept where `keep`."""
    if isinstance(tree, dict):
        return {name: whole(value, keep) for name, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value, keep) for value in tree]
    if isinstance(tree, DTensor):
        full = tree.full_tensor()  # everybody has to take part
        return full.cpu() if keep else None
    return tree


def model_state(policy, keep=True):
    """name -> tensor, as from_pretrained wants it: shards gathered, LoRA's matrices added to the weights."""
    layers = lora_layers(policy)
    state = whole(policy.model.state_dict(), keep)
    for name, layer in layers.items():
        state[f"{name}.base_layer.weight"] = (
            (layer.base_layer.weight + layer.get_delta_weight("default")).detach().cpu()
        )
    return {
        name.replace(".base_layer", ""): value
        for name, value in state.items()
        if ".lora_" not in name
    }


def lora_state(policy):
    return {
        name: p.detach().cpu() for name, p in policy.model.named_parameters() if ".lora_" in name
    }


def load_optimizer(optimizer, state):
    """A whole optimizer state into one of shards: every process takes its part."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in state["state"].items():
        like = parameters[number]
        for name, value in moments.items():
            if isinstance(like, DTensor) and value.shape == like.shape:
                value = value.to(like.device)
                moments[name] = distribute_tensor(
                    value, like.device_mesh, like.placements, src_data_rank=None
                )
    optimizer.load_state_dict(state)


# --- the plan ---------------------------------------------------------------------------------------

NODE = 8  # GPUs of a node, for the plan: shards are spread within one

# From the published configurations, so that a plan needs no network. The language models are Llamas.
JANUS_PRO = {
    "Janus-Pro-1B": dict(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=5632
    ),
    "Janus-Pro-7B": dict(
        hidden_size=4096, num_hidden_layers=30, num_attention_heads=32, intermediate_size=11008
    ),
}


def janus_config(name):
    """The configuration of a Janus: of a folder, or of one of the two that are published."""
    known = JANUS_PRO.get(os.path.basename(str(name)))
    if known is None:
        return JanusConfig.from_pretrained(name)
    width = known["hidden_size"]
    return JanusConfig(
        text_config=dict(
            known,
            vocab_size=102400,
            num_key_value_heads=known["num_attention_heads"],
            model_type="llama",
            max_position_embeddings=16384,
            tie_word_embeddings=False,
        ),
        vision_config=dict(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=384,
            patch_size=16,
            projection_dim=width,
            depth=2,
            num_image_tokens=576,
        ),
        vq_config=dict(projection_dim=width, image_token_embed_dim=width, num_patches=24),
        tie_word_embeddings=False,
    )


def meta_model(config):
    """The architecture without any numbers in it."""
    with torch.device("meta"):
        return JanusForConditionalGeneration(config)


def plan(
    config, world, painted, micro_batch, guided, thought, sharded, lora_rank, checkpointing, text=80
):
    """Rows of (what, value): parameters, then GB a GPU. Arithmetic, not measurement: kernels and fragments come on top.

    painted: pictures a GPU paints at a time. text: tokens of a prompt, about."""
    model, llama = meta_model(config), config.text_config
    groups = {"total": list(model.named_parameters())}
    groups["trained"] = [
        (n, p) for n, p in groups["total"] if n.startswith(("model.language_model.", "lm_head."))
    ]
    count = {name: sum(p.numel() for _, p in members) for name, members in groups.items()}
    frozen = count["total"] - count["trained"]
    if lora_rank:
        wide = [p.shape for n, p in groups["trained"] if n.endswith("_proj.weight")]
        frozen, count["trained"] = count["total"], sum(lora_rank * sum(shape) for shape in wide)
    share = min(world, NODE) if sharded else 1
    T, D, layers = config.vq_config.num_patches**2, llama.hidden_size, llama.num_hidden_layers
    length, rows = text + thought + T, (2 if guided else 1) * micro_batch
    kv = (
        2 * layers * llama.num_key_value_heads * (D // llama.num_attention_heads) * 2
    )  # bytes a token, bfloat16
    heads = max(T * config.vq_config.num_embeddings, thought * llama.vocab_size)
    gathered_bytes = (
        2 * (count["total"] - sum(p.numel() for n, p in groups["total"] if "vqmodel" in n))
        if sharded
        else 0
    )
    kept = (
        2 * rows * length * D * layers * (1 if checkpointing else 16)
    )  # bfloat16; about 16 numbers a layer without
    gigabytes = {
        "weights, gradients, Adam: 16 bytes a trained parameter": 16 * count["trained"] / share,
        "frozen weights: 2 bytes (sharded: 4)": (4 if sharded else 2) * frozen / share,
        "reference policy: 2 bytes": 0 if lora_rank else 2 * count["total"] / share,
        "autocast's copies: 2 bytes a trained parameter": 0 if sharded else 2 * count["trained"],
        "rollout: gathered weights; in tests, of the reference too": 2 * gathered_bytes,
        "rollout: keys and values": kv * painted * (2 if guided else 1) * length,
        "update: activations": kept,
        "update: logits, float32, three alive": 3 * 4 * micro_batch * heads,
    }
    state = sum(list(gigabytes.values())[:4])
    rollout, update = sum(list(gigabytes.values())[4:6]), sum(list(gigabytes.values())[6:])
    return count | {"tokens a picture": T}, {
        name: value / 1e9 for name, value in gigabytes.items()
    } | {"peak, rollout": (state + rollout) / 1e9, "peak, update": (state + update) / 1e9}


def print_plan(cfg, world):
    """--dry-run: what would happen, and whether it fits."""
    try:
        config = janus_config(
            HERE / "tiny_world" / "checkpoints" / "policy" if cfg.model == "tiny" else cfg.model
        )
    except OSError:
        usage_error(
            f"--dry-run --model {cfg.model}: no configuration to be had; give a folder, or one of "
            f"{', '.join(JANUS_PRO)}"
        )
    guided = cfg.guidance != "none" and (cfg.cfg_weight or (1 if cfg.model == "tiny" else 5)) != 1
    rollouts = cfg.prompts_per_step * cfg.num_generations // world
    count, gigabytes = plan(
        config,
        world,
        min(cfg.rollout_batch, rollouts),
        min(cfg.micro_batch, rollouts),
        guided,
        cfg.max_thought * cfg.cot,
        cfg.shard,
        cfg.lora_rank,
        cfg.gradient_checkpointing,
    )
    print(
        f"{cfg.model}: {count['total'] / 1e9:.3f} billion parameters, {count['trained'] / 1e9:.3f} trained, on {world} "
        f"processes\na step: {rollouts * world} pictures of {count['tokens a picture']} tokens, {rollouts} a process; "
        f"{cfg.max_steps} steps, {cfg.max_steps * rollouts * world} pictures\n"
    )
    for name, value in gigabytes.items():
        print(f"{value:9.2f} GB   {name}")
    peak = max(gigabytes["peak, rollout"], gigabytes["peak, update"])
    fits = peak < 0.9 * cfg.gpu_memory
    advice = (
        ""
        if fits
        else "; try "
        + ", ".join(
            hint
            for hint, helps in (
                ("--shard", not cfg.shard and world > 1),
                ("--lora-rank 16", not cfg.lora_rank),
                ("--gradient-checkpointing", not cfg.gradient_checkpointing),
                ("a smaller --micro-batch", cfg.micro_batch > 1),
                ("more GPUs", True),
            )
            if helps
        )
    )
    print(
        f"\n{'fits' if fits else 'does not fit'} into {cfg.gpu_memory:.0f} GB, a tenth kept free{advice}"
    )
