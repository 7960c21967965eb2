"""The policy: a Janus model with its processor, loaded and saved in the Hugging Face format.

Read next: generate.py, which samples from it
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, JanusForConditionalGeneration, JanusProcessor

from training.files import ROOT, fingerprint, usage_error
from training.run_folder import checkpoint_folder
from training.sharding import merge_lora
from training.weights import load_model, load_part, readable

# On a Hopper GPU torch 2.13 would choose cuDNN's attention. Its gradient is sometimes NaN under a
# mask (github.com/pytorch/pytorch/issues/196678), and it makes a new plan for every length.
torch.backends.cuda.enable_cudnn_sdp(False)
# Convolutions in float32 (the VQ decoder, patch embeddings) are not rounded to ten bits (TF32).
torch.backends.cudnn.allow_tf32 = False


@dataclass
class Policy:
    """A Janus model with its processor."""

    model: JanusForConditionalGeneration
    processor: JanusProcessor
    reasoning: str  # the instruction that asks for a thought; {} stands for the prompt
    dtype: torch.dtype  # of the arithmetic; trained weights are float32
    name: str = ""  # "tiny", a hub name, or the folder of its weights
    cuda_graph: bool = True  # sampling on a GPU: see training/cuda_graph.py
    adapter: object = None  # with LoRA: peft's wrapper of the same model

    def __post_init__(self):
        self.tokenizer = self.processor.tokenizer
        self.boi = self.tokenizer.convert_tokens_to_ids(self.tokenizer.boi_token)
        self.language_model = self.model.model.language_model  # without the text head
        self.embed_text = self.language_model.get_input_embeddings()
        self.grid = self.model.config.vq_config.num_patches  # a picture is grid x grid tokens

    @property
    def device(self):
        return next(self.model.parameters()).device

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def run_in_root_forward(self, function, *args):
        """function(*args) as one forward pass of the whole model: FSDP gathers sharded weights at
        such passes only (training/sharding.py). Without sharding it is a plain call."""
        run = getattr(self.model, "run_in_root_forward", None)
        return run(function, *args) if run else function(*args)

    def save(self, folder, state=None):
        """Write a folder that load_policy and JanusForConditionalGeneration.from_pretrained open.
        state: the full weights, where the model itself holds only shards. With LoRA: the matrices
        alone, as peft's PeftModel.from_pretrained(base, folder) takes them."""
        if self.adapter:
            self.adapter.save_pretrained(folder, save_embedding_layers=False)  # as in load_lora
            self.model.generation_config.save_pretrained(folder)  # has the guidance weight
            base = fingerprint(checkpoint_folder(self.name))  # as it is now
            (Path(folder) / "base.txt").write_text(f"{base}\n")
        else:
            self.model.save_pretrained(folder, state_dict=state)
            # save_pretrained notes the type of the first weight, which may be a frozen bfloat16
            # one. from_pretrained would then round all the others to it.
            self.model.config.dtype = torch.float32
            self.model.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (Path(folder) / "reasoning.txt").write_text(self.reasoning + "\n", encoding="utf-8")


def adapter_base(folder):
    """The model to which the LoRA in this folder is to be added, if a LoRA (as peft writes it) is
    all that it holds; else None."""
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    with readable(folder):
        base = json.loads(file.read_text())["base_model_name_or_path"]
        if not isinstance(base, str):
            raise TypeError(f"its base_model_name_or_path is {base}")
    return base


def check_janus(name_or_path, path):
    """Exit code 2 if this is no Janus in the Hugging Face format, as far as can be seen."""
    if (path / "config.json").is_file():
        with readable(f"--model {name_or_path}"):
            kind = json.loads((path / "config.json").read_text()).get("model_type")
        if kind != "janus":
            usage_error(
                f"--model {name_or_path}: holds a {kind!r} checkpoint; it must be 'janus' in the "
                "Hugging Face format, such as deepseek-community/Janus-Pro-1B (deepseek-ai's own "
                "are not)"
            )
    elif path.is_dir() or name_or_path.startswith((".", "/")):
        usage_error(f"--model {name_or_path}: no config.json; give a folder of save_pretrained")
    elif name_or_path.startswith("deepseek-ai/Janus"):
        usage_error(
            f"--model {name_or_path}: is in DeepSeek's own format; the same weights in that of "
            f"transformers are {name_or_path.replace('deepseek-ai', 'deepseek-community')}"
        )


def load_policy(name_or_path="tiny", device="cpu", dtype=torch.float32, train_image_head=False):
    """Load a Janus in the Hugging Face format: a folder, a hub name, or "tiny" (shipped with us);
    or the folder of a LoRA, which is added to the weights of its base model.

    The weights are float32 whatever `dtype` is: at a learning rate of 1e-6 a bfloat16 weight never
    moves (its spacing is 1/256 of its size). As in T2I-R1 the language model with its text head is
    trained; vision tower, aligners, image embeddings, image head and VQ model stay frozen. Exit
    code 2 if there is no such checkpoint, or if it does not fill the model."""
    path = checkpoint_folder(name_or_path)
    base = adapter_base(path)
    if base:
        then, now = path / "base.txt", fingerprint(checkpoint_folder(base))
        if then.is_file() and then.read_text().strip() != now:
            usage_error(
                f"--model {name_or_path}: a LoRA for {base}, which holds other weights today; "
                "restore them"
            )
        policy = load_policy(base, "cpu", dtype)
        model, processor = merge_lora(policy.model, path), policy.processor
        if (path / "generation_config.json").is_file():
            model.generation_config = load_part(GenerationConfig, path)
    else:
        check_janus(name_or_path, path)
        source = path if path.is_dir() else name_or_path
        model = load_model(JanusForConditionalGeneration, source, dtype=torch.float32)
        processor = load_part(JanusProcessor, source)
    own = path / "reasoning.txt"  # a checkpoint may bring the instruction that it was trained with
    reasoning = own if own.is_file() else ROOT / "prompts/reasoning.txt"
    trained = ("model.language_model.", "lm_head.")
    trained += ("model.generation_head.",) if train_image_head else ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    model.to(device).eval()
    reasoning = reasoning.read_text(encoding="utf-8").strip()
    local = path.is_dir() and name_or_path != "tiny"  # a run folder has another last one tomorrow
    return Policy(model, processor, reasoning, dtype, str(path) if local else name_or_path)


def trainable(policy):
    return [p for p in policy.model.parameters() if p.requires_grad]


def as_letters(policy, text):
    """The text without control tokens: "<begin_of_image>" in a prompt would begin the picture. A
    blank behind the bracket makes it text like any other."""
    for token in policy.tokenizer.added_tokens_encoder:
        if token.startswith("<") and len(token) > 1:
            text = text.replace(token, f"< {token[1:]}")
    return text
