"""HPSv3 (arXiv:2508.03789): a Qwen2-VL of 7 B that was trained on a million human choices.

    score = mu, the first output of a small network on the hidden state of one token, <|Reward|>

The token stands behind the picture, a page of instructions and the prompt. (The second output is
an uncertainty, which the score leaves out.) The means of the authors' twelve models go from -0.2
(Stable Diffusion 2) to 10.6 (Kolors), where HPSv2 has 0.2 to 0.35: in a plain sum HPSv3 alone would
decide. Use `--combine normalized`, or a weight of .03.

The instructions are the authors' text. They are read from the authors' package, as text: nothing
in it is executed. Three files make the checkpoint, in one folder:

    hf download MizzenAI/HPSv3 HPSv3.safetensors --local-dir checkpoints/hpsv3
    hf download Qwen/Qwen2-VL-7B-Instruct --exclude "*.safetensors" --local-dir checkpoints/hpsv3
    pip download hpsv3 --no-deps -d checkpoints/hpsv3

Read next: git.py
"""

import ast
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

from reward_models.hub import NAMES, rename
from reward_models.llava import pad_rows
from reward_models.pixels import in_batches
from training.decode import to_rgb
from training.files import usage_error
from training.weights import load_model, load_part, readable

# Shapes:  B pictures   S tokens   D numbers a token

REWARD, PATCH = "<|Reward|>", "<|image_pad|>"
PIXELS = 256 * 28 * 28  # each picture is scaled to about as many


def instructions(folder):
    """The text around a prompt, {text_prompt}, up to the token that is scored; two constants of the
    package hpsv3, from its wheel. Exit code 2 if it is not there."""
    for wheel in sorted(folder.glob("hpsv3-*.whl")):
        with readable(wheel), zipfile.ZipFile(wheel) as archive:
            source = archive.read("hpsv3/dataset/data_collator_qwen.py").decode()
            nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
            texts = {ast.unparse(node.targets[0]): node.value for node in nodes}
            before = ast.literal_eval(texts["INSTRUCTION"])
            after = ast.literal_eval(texts["prompt_with_special_token"])
            # What follows the token cannot change it: attention only looks back.
            return before, after.split(REWARD)[0] + REWARD
    usage_error(f"{folder}: no hpsv3-*.whl; pip download hpsv3 --no-deps -d {folder}")


class Model(Qwen2VLForConditionalGeneration):
    """Qwen2-VL with HPSv3's head ("ranknet" in its code), which stays in float32."""

    _keep_in_fp32_modules_strict = ["rm_head"]

    def __init__(self, config):
        super().__init__(config)
        width = config.text_config.hidden_size
        first, second, last = nn.Linear(width, 1024), nn.Linear(1024, 16), nn.Linear(16, 2)
        self.rm_head = nn.Sequential(first, nn.ReLU(), nn.Identity(), second, nn.ReLU(), last)


class HPSv3:
    """HPSv3, in this process; 17 GB. It is better served: `rewards.py serve hpsv3`."""

    range = (-100.0, 100.0)
    usual = "0 to 11"
    needs = ("text",)
    checkpoint = "MizzenAI/HPSv3"
    gigabytes = 16.6
    reference = "HPSv3, arXiv:2508.03789"
    how = "three files, see reward_models/hpsv3.py"

    def __init__(self, device="cpu", checkpoint=None):
        self.downloaded = folder = Path(checkpoint or "checkpoints/hpsv3")
        if not (folder / "HPSv3.safetensors").is_file():
            usage_error(
                f"{folder}: no HPSv3.safetensors; reward_models/hpsv3.py says how to get it"
            )
        self.before, self.after = instructions(folder)
        self.tokenizer = load_part(AutoTokenizer, folder)
        # As in training: one more token, and a table of embeddings cut to the tokens that exist.
        self.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
        config = load_part(Qwen2VLConfig, folder)
        config.text_config.vocab_size = len(self.tokenizer)
        with readable(folder):
            state = rename(load_file(folder / "HPSv3.safetensors"), NAMES["qwen2-vl"])
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model = load_model(Model, None, config=config, state_dict=state, dtype=dtype)
        self.model.to(device).eval().requires_grad_(False)
        sizes = {"min_pixels": PIXELS, "max_pixels": PIXELS}
        self.processor = load_part(pil.Qwen2VLImageProcessorPil, folder, **sizes)

    def text(self, prompt, patches):
        """The chat with a picture of so many patches, up to the token that is scored."""
        letters = prompt.replace("<|", "< |")  # a control token in a prompt is text like any other
        written = self.before.format(text_prompt=letters) + self.after
        content = [{"type": "image"}, {"type": "text", "text": written}]
        chat = [{"role": "user", "content": content}]
        whole = self.tokenizer.apply_chat_template(chat, tokenize=False)
        return whole.split(REWARD)[0].replace(PATCH, PATCH * patches) + REWARD

    @torch.inference_mode()
    def score(self, prompts, images):
        data = self.processor([to_rgb(image) for image in images], return_tensors="pt")
        merged = data["image_grid_thw"].prod(1) // self.processor.merge_size**2
        rows = [
            self.tokenizer(self.text(prompt, patches)).input_ids
            for prompt, patches in zip(prompts, merged.tolist())
        ]
        ids, mask = pad_rows(rows, self.tokenizer.pad_token_id, "right")
        core, device = self.model.model, self.model.device
        ids, mask = ids.to(device), mask.to(device)
        x = self.model.get_input_embeddings()(ids)
        pixels = data["pixel_values"].to(device, x.dtype)
        pictures = core.visual(pixels, grid_thw=data["image_grid_thw"].to(device)).pooler_output
        x[ids == self.model.config.image_token_id] = pictures.to(x.dtype)
        # Called without positions, the language model numbers the tokens 0, 1, 2, ..., as HPSv3 did
        # in training. Qwen2-VL itself would give the patches places in a grid: another score.
        hidden = core.language_model(inputs_embeds=x, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
        return self.model.rm_head(last.float())[:, 0]

    def __call__(self, prompts, images, metadata=None):
        """(N,) float32."""
        return in_batches(self.score, 8, prompts, images)
