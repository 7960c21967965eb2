"""The same policy on many GPUs, or on a small one: FSDP2, LoRA, and full states for checkpoints.

Full training keeps 16 bytes for each parameter (float32 weight and gradient, Adam's two moments):
26 GB for Janus-Pro-1B, 110 GB for 7B. There are two ways out:

    --shard       FSDP2: each process keeps its shard of all that, decoder layer by decoder layer,
                  and gathers a layer when it is needed. Sampling needs all layers 576 times for a
                  picture, so for a rollout they are gathered once. Several nodes: sharded within a
                  node, replicated across nodes (HSDP).
    --lora-rank   train two thin matrices beside each projection of the decoder layers. The
                  reference policy is the same model with them switched off.

Read next: cuda_graph.py
"""

import contextlib
import dataclasses
import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from training.processes import world_size
from training.weights import check_fit, readable

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # rank 0 gets whole tensors


def shard(policy):
    """FSDP2 in place: float32 shards, arithmetic in the policy's dtype, float32 sum of gradients.

    The root is the whole Janus, because sampling and training call several of its modules
    (embedding, image head, aligner). They run inside one forward pass of the root
    (Policy.run_in_root_forward); outside of it they would find shards. The VQ model is frozen and
    small, and stays whole."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = world_size() // local
    shape, names = ((nodes, local), ("replicate", "shard")) if nodes > 1 else ((local,), ("shard",))
    mesh = init_device_mesh(policy.device.type, shape, mesh_dim_names=names)
    # Inputs keep their type: among them are the uniform numbers that select the tokens, and in
    # bfloat16 one in five hundred of those would be 1.
    precision = MixedPrecisionPolicy(policy.dtype, torch.float32, cast_forward_inputs=False)
    for layer in policy.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    head, exact = policy.model.model.generation_head, MixedPrecisionPolicy(torch.float32)
    fully_shard(head, mesh=mesh, mp_policy=exact)  # generate.image_logits
    vq_parameters = set(policy.model.model.vqmodel.parameters())
    fully_shard(policy.model, mesh=mesh, mp_policy=precision, ignored_params=vq_parameters)
    policy.model.run_in_root_forward = lambda function, *args: function(*args)
    register_fsdp_forward_method(policy.model, "run_in_root_forward")
    return policy


def cast_frozen_weights(policy):
    """In place: frozen matrices in the policy's dtype. Autocast rounds them to it at every use
    anyway, so no result changes, and they take half the memory. Trained weights stay float32, or
    small updates would be lost; so do norms, image head and VQ model, which are used in float32."""
    for name, parameter in policy.model.named_parameters():
        kept = "vqmodel" in name or "generation_head" in name
        if not parameter.requires_grad and parameter.dim() > 1 and not kept:
            parameter.data = parameter.data.to(policy.dtype)
    return policy


@contextlib.contextmanager
def unsharded(*policies):
    """Whole weights on every process inside this context: gathered once and not once a token. So
    processes need not take the same number of steps (thoughts differ in length)."""
    models = [policy.model for policy in policies if policy is not None]
    modules = [m for model in models for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def sum_gradients(parameters):
    """Each process has the gradient of its share of one loss, divided by the tokens of all
    processes already: add them."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:  # with --no-cot the text head has none, on any process
            continue
        if isinstance(parameter.grad, DTensor):  # FSDP2 has averaged it, shard by shard
            parameter.grad.mul_(world_size())
        else:
            dist.all_reduce(parameter.grad)


def clip_gradients(parameters, max_norm):
    """Scale the gradient down to this norm; returns the norm before, a tensor."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# --- LoRA ---------------------------------------------------------------------------------------


def add_lora(policy, rank, seed=0):
    """In place: W becomes W + 2 B A with A and B of this rank, B = 0 at first; only A and B are
    trained (arXiv:2106.09685). A is random and must be the same on all processes."""
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    with torch.random.fork_rng(devices=[]):  # the matrices are on the CPU still
        torch.manual_seed(seed)
        policy.adapter = get_peft_model(policy.model, config)
    policy.adapter.peft_config["default"].base_model_name_or_path = policy.name
    return policy


def load_lora(adapter, folder):
    """The matrices of a checkpoint into peft's wrapper of the model."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    with readable(file):
        # Embeddings are not trained. Left to itself, peft would ask the hub whether they are.
        own = get_peft_model_state_dict(adapter, save_embedding_layers=False)
        state = load_file(file)
        check_fit(file, own.keys() - state.keys(), state.keys() - own.keys(), [])
        set_peft_model_state_dict(adapter, state)


def resume_lora(policy, checkpoint):
    """The matrices of a checkpoint, and the instruction that they were trained with."""
    load_lora(policy.adapter, checkpoint)
    policy.reasoning = (checkpoint / "reasoning.txt").read_text(encoding="utf-8").strip()


def merge_lora(model, folder):
    """In place: add the product of the matrices in this folder to the model's weights."""
    from peft import LoraConfig, get_peft_model

    with readable(folder):
        config = LoraConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # or peft would compare the two names
        adapter = get_peft_model(model, config)
    load_lora(adapter, folder)
    return adapter.merge_and_unload()


@contextlib.contextmanager
def as_reference(policy, reference):
    """The policy that training started from: its own model; with LoRA (reference is None) the
    policy with its adapter switched off."""
    if reference is not None:
        yield reference
    else:
        with policy.adapter.disable_adapter():
            yield policy


# --- full states, for checkpoints ---------------------------------------------------------------


def full_model_state(policy):
    """name -> tensor, as from_pretrained reads it: shards gathered. All processes must call it;
    only rank 0 gets the tensors."""
    return get_model_state_dict(policy.model, options=FULL)


def full_optimizer_state(policy, optimizer):
    """Adam's moments by parameter name, shards gathered. Before the first update there are none
    (asked for them, torch would make an update of size 0, which Adam counts)."""
    if not optimizer.state:
        return {}
    return get_optimizer_state_dict(policy.model, optimizer, options=FULL)


def load_optimizer_state(policy, optimizer, state):
    """The reverse, on one process or on several: each takes its shard. Weights that never had a
    gradient have no moments (the text head, without thoughts): so not strict."""
    if state:
        options = dataclasses.replace(FULL, strict=False)
        set_optimizer_state_dict(policy.model, optimizer, state, options=options)
