"""Vision-language models that were trained to judge: ORM, UnifiedReward, VQAScore.

Asked "does this picture show the prompt?", a model that was trained on that very question answers with a probability:

    orm       P(yes) / (P(yes) + P(no)), first token of the answer               LLaVA-OneVision, 8 B (T2I-R1)
    vqascore  sqrt(P(Yes) P(</s> | Yes)), the answer's mean log-probability      CLIP-FlanT5, 3 or 11 B
    unified   "Final Score: 3.5", read from what it writes                       UnifiedReward, 7 B

The wording of a question is part of such a checkpoint, as the names of its weights are: another wording is another
reward. What their training fixed is given here as constants.

Read next: rewards.py
"""

import json
import math
import re
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from artifact_reward import ServedJudge, picture_part
from training.files import HERE, usage_error

# Shapes:  B pictures   S tokens   D numbers a token


def on_a_square(image, color, size, mean, std):
    """(3, size, size): the picture in the middle of a square of one colour, shrunk, normalised; nothing is cut off."""
    image, side = image.convert("RGB"), max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    data = torch.frombuffer(
        bytearray(square.resize((size, size), Image.BICUBIC).tobytes()), dtype=torch.uint8
    )
    pixels = data.view(size, size, 3).float() / 255
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)


def stack_rows(rows, pad, left):
    """Lists of ids -> (ids, mask), (B, S)."""
    longest = max(map(len, rows))
    fill = [[pad] * (longest - len(row)) for row in rows]
    ids = [f + row if left else row + f for row, f in zip(rows, fill)]
    mask = [
        [0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
        for row, f in zip(rows, fill)
    ]
    return torch.tensor(ids), torch.tensor(mask)


# --- LLaVA-OneVision, from a checkpoint in LLaVA's own format -------------------------------------

LLAVA_NAMES = {  # their names -> transformers'; image_newline and lm_head have the same in both
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(layers|embed_tokens|norm)\.": r"model.language_model.\1.",
}


class LlavaOneVision:
    """A fine-tuned LLaVA-OneVision-Qwen2 in the `llava_qwen` format, in this process. One picture a question."""

    # Qwen's chat template, with the picture where LLaVA puts it: before the question, a blank between them. The two
    # halves are tokenised apart, so that a prompt that says "<image>" is no second picture.
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    after = "<|im_end|>\n<|im_start|>assistant\n"

    def __init__(self, folder, device):
        from transformers import LlavaOnevisionForConditionalGeneration, Qwen2Tokenizer

        self.tokenizer, folder = Qwen2Tokenizer.from_pretrained(folder), Path(folder)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model, report = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder,
            config=self.config(folder),
            key_mapping=LLAVA_NAMES,
            dtype=dtype,
            output_loading_info=True,
        )
        wrong = {kind: names for kind, names in report.items() if names}
        if wrong:  # missing, unexpected or of another shape
            usage_error(
                f"{folder}: not a LLaVA-OneVision in the llava_qwen format: {str(wrong)[:300]}"
            )
        self.model.to(device).eval().requires_grad_(False)
        self.pad = self.tokenizer.pad_token_id or 0

    def config(self, folder):
        """transformers' configuration. The original's says nothing about the vision tower: its sizes are those of the
        weights; that it has 16 heads, and its picture size, are facts about the SigLIP in its name."""
        from transformers import LlavaOnevisionConfig

        shapes = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
        if not shapes:
            usage_error(f"{folder}: no *.safetensors there")
        theirs, tower = (
            json.loads((folder / "config.json").read_text()),
            "model.vision_tower.vision_tower.vision_model.",
        )
        width, _, _, patch = shapes[tower + "embeddings.patch_embedding.weight"]
        same = (
            "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
            "rms_norm_eps max_position_embeddings"
        )
        return LlavaOnevisionConfig(
            text_config=dict(
                {name: theirs[name] for name in same.split()},
                model_type="qwen2",
                vocab_size=shapes["lm_head.weight"][0],
                use_sliding_window=False,
                tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", "rope_theta": theirs["rope_theta"]},
            ),
            # LLaVA deletes the tower's last layer, and reads what is left before its final norm.
            vision_config=dict(
                model_type="siglip_vision_model",
                hidden_size=width,
                patch_size=patch,
                num_attention_heads=16,
                intermediate_size=shapes[tower + "encoder.layers.0.mlp.fc1.weight"][0],
                image_size=int(theirs["mm_vision_tower"].rsplit("-", 1)[1]),
                vision_use_head=False,
                num_hidden_layers=len(
                    {n.split(".")[6] for n in shapes if n.startswith(tower + "encoder.")}
                ),
            ),
            image_token_index=len(self.tokenizer),
            tie_word_embeddings=False,
        )

    @torch.inference_mode()
    def embed(self, questions, images):
        """(embeddings (B, S, D), mask (B, S)), padded on the left: the picture's patches, one "newline", the words."""
        core, size = self.model.model, self.model.config.vision_config.image_size
        pixels = torch.stack(
            [on_a_square(image, (127,) * 3, size, (0.5,) * 3, (0.5,) * 3) for image in images]
        )
        pixels = pixels.to(self.model.device, self.model.dtype)
        seen = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        seen = torch.cat(
            [core.multi_modal_projector(seen), core.image_newline.expand(len(images), 1, -1)], 1
        )
        mark = self.model.config.image_token_id
        rows = [
            self.tokenizer(self.before).input_ids
            + [mark] * seen.shape[1]
            + self.tokenizer(f" {question}{self.after}").input_ids
            for question in questions
        ]
        ids, mask = (part.to(self.model.device) for part in stack_rows(rows, self.pad, left=True))
        x = core.get_input_embeddings()(ids)
        x[ids == mark] = seen.flatten(0, 1)
        return x, mask

    @torch.inference_mode()
    def logits(self, questions, images):
        """(B, V) float32, of the first token of the answer."""
        x, mask = self.embed(questions, images)
        return (
            self.model(inputs_embeds=x, attention_mask=mask, logits_to_keep=1, use_cache=False)
            .logits[:, -1]
            .float()
        )

    @torch.inference_mode()
    def write(self, questions, images, max_tokens):
        """What it writes, a text a picture; always the likeliest word."""
        x, mask = self.embed(questions, images)
        ids = self.model.generate(
            inputs_embeds=x,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=self.pad,
        )
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)


class ORM:
    """T2I-R1's outcome reward model: was the prompt carried out, yes or no?

    One forward pass, from the model's own probabilities. (Released: one token is sampled at temperature .3, whatever is
    not literally "yes" or "no" counts 0, and the sharpened, cut-off probabilities are used: noisy, and often tied.)"""

    range = (0.0, 1.0)
    needs = ("text",)
    checkpoint = "CaraJ/ORM-T2I-R1"
    reference = "T2I-R1, arXiv:2505.00703"
    # The text of its training.
    question = (
        "This image is generated by a prompt: {}. Does this image accurately represent the prompt? Please answer "
        "yes or no without explanation."
    )

    def __init__(self, device="cpu", checkpoint=None):
        self.judge = LlavaOneVision(snapshot(checkpoint or self.checkpoint), device)
        ids = self.judge.tokenizer.convert_tokens_to_ids
        self.yes, self.no = (
            [ids(word) for word in words if ids(word) is not None]
            for words in (("yes", "Yes"), ("no", "No"))
        )

    def __call__(self, prompts, images, metadata=None):
        scores = []
        for i in range(0, len(images), 8):
            asked = [self.question.format(prompt) for prompt in prompts[i : i + 8]]
            logits = self.judge.logits(asked, images[i : i + 8])
            scores.append(
                (logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)).sigmoid()
            )
        return torch.cat(scores).cpu()


def snapshot(name):
    """The folder of a checkpoint: a folder, or a repository of the hub, downloaded."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name)))
    except Exception as problem:  # many kinds: no network, no such repository, no right to it
        usage_error(
            f"{name} cannot be had ({type(problem).__name__}); where there is a network: hf download {name}"
        )


# --- UnifiedReward: a number in words --------------------------------------------------------------


def written_score(text):
    """What UnifiedReward wrote -> a number from 1 to 5; NaN if there is none in it.

    >>> written_score("It is sharp. Final Score: 3.5")
    3.5
    >>> written_score("Alignment Score (1-5): 4\\nCoherence Score (1-5): 2\\nStyle Score (1-5): 3")
    3.0
    >>> written_score("A fine picture.")
    nan
    """
    found = re.findall(r"Final Score:\s*([0-9]*\.?[0-9]+)", text)[-1:]
    found = found or re.findall(
        r"(?:Alignment|Coherence|Style) Score(?: \(1-5\))?:\s*([0-9]*\.?[0-9]+)", text
    )
    score = sum(map(float, found)) / len(found) if found else math.nan
    return score if 1 <= score <= 5 else math.nan


class Unified:
    """UnifiedReward (arXiv:2503.05236): writes what it thinks of a picture and a caption, and a score from 1 to 5.

    -qwen-7b is a Qwen2.5-VL: served by vLLM, asked as the judge is. -7b-v1.5 has LLaVA's format: give its folder as
    checkpoint, and it works in this process. Its training prompt, a page long, is not ours to copy: prompts/unified.txt
    asks for the same in our words; a checkpoint's own unified.txt goes before it."""

    range = (1.0, 5.0)
    needs = ("text", "judge")
    checkpoint = "CodeGoat24/UnifiedReward-qwen-7b"
    reference = "UnifiedReward, arXiv:2503.05236"
    how = "vllm serve CodeGoat24/UnifiedReward-qwen-7b --port 8080"
    url, longest = "http://127.0.0.1:8080/v1", 512

    def __init__(self, device="cpu", checkpoint=None, judge_urls=()):
        self.here = (
            LlavaOneVision(snapshot(checkpoint), device) if checkpoint and not judge_urls else None
        )
        self.served = None if self.here else ServedJudge(list(judge_urls) or [self.url])
        own = Path(checkpoint or "") / "unified.txt"
        text = own if checkpoint and own.is_file() else HERE / "prompts" / "unified.txt"
        self.question, self.remote = (
            text.read_text(encoding="utf-8").strip(),
            self.served is not None,
        )

    @property
    def failures(self):
        return self.served.failures if self.served else {}

    def __call__(self, prompts, images, metadata=None):
        asked = [self.question.replace("{}", prompt) for prompt in prompts]
        if self.served:
            contents = [
                [{"type": "text", "text": text}, picture_part(image)]
                for text, image in zip(asked, images)
            ]
            texts = list(
                self.served.pool.map(
                    lambda content: self.served.write(content, self.longest), contents
                )
            )
        else:
            texts = [
                text
                for i in range(0, len(images), 8)
                for text in self.here.write(asked[i : i + 8], images[i : i + 8], self.longest)
            ]
        return torch.tensor([written_score(text) for text in texts])


# --- VQAScore --------------------------------------------------------------------------------------


class VQAScore:
    """VQAScore (arXiv:2404.01291) by CLIP-FlanT5: exp of the mean log-probability of the answer "Yes" and its end.

    T5 reads [instructions </s>] [patches of CLIP ViT-L/14, next to last layer, projected] [question </s>]: the text before
    the picture and that after it are tokenised apart, and each keeps its end mark, as in training."""

    range = (0.0, 1.0)
    needs = ("text",)
    checkpoint = "zhiqiulin/clip-flant5-xxl"
    reference = "VQAScore, arXiv:2404.01291"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    # The text of its training: Vicuna's instructions, which the checkpoint does not bring along.
    before = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: "
    )
    after = "\n{} ASSISTANT: "
    question = 'Does this figure show "{}"? Please answer yes or no.'

    def __init__(self, device="cpu", checkpoint=None, vision_heads=16):
        from transformers import (
            CLIPVisionConfig,
            CLIPVisionModel,
            T5Config,
            T5ForConditionalGeneration,
            T5Tokenizer,
        )

        folder, state = snapshot(checkpoint or self.checkpoint), {}
        for file in sorted(folder.glob("pytorch_model*.bin")):  # -xl is one file, -xxl several
            state |= torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        config = json.loads((folder / "config.json").read_text())
        tower = "vision_tower.vision_tower.vision_model."
        vision = {n.removeprefix(tower): v for n, v in state.items() if n.startswith(tower)}
        projector = {
            n.removeprefix("mm_projector."): v
            for n, v in state.items()
            if n.startswith("mm_projector.")
        }
        t5 = {
            n: v
            for n, v in state.items()
            if n.split(".")[0] in ("shared", "encoder", "decoder", "lm_head")
        }

        # "tie_word_embeddings": false must arrive: T5 scales what it says by 1/sqrt(D) if the two are one.
        kept = {
            n: v
            for n, v in config.items()
            if not n.startswith(("mm_", "image_", "torch_", "model_", "archit", "transf"))
        }
        self.t5 = T5ForConditionalGeneration(T5Config(**kept))
        # And they must be two: transformers builds them as one, and copying would let the last one win.
        self.t5.load_state_dict(t5, assign=True)
        self.t5.set_input_embeddings(self.t5.shared)
        self.vision = CLIPVisionModel(
            CLIPVisionConfig(**self.tower_sizes(vision), num_attention_heads=vision_heads)
        )
        vision.pop("embeddings.position_ids", None)  # a constant, not a weight
        self.vision.load_state_dict(vision)
        width, seen = config["d_model"], config["mm_hidden_size"]
        self.projector = nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))
        self.projector.load_state_dict(projector)
        # bfloat16 and not float16: T5's activations are too large for that.
        self.device, self.dtype = (
            device,
            torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32,
        )
        for module in (self.t5, self.vision, self.projector):
            module.to(device, self.dtype).eval().requires_grad_(False)
        self.tokenizer = T5Tokenizer.from_pretrained(folder)

    @staticmethod
    def tower_sizes(vision):
        """CLIP's vision tower, from its weights; the number of heads leaves no trace there."""
        width, _, _, patch = vision["embeddings.patch_embedding.weight"].shape
        side = round((len(vision["embeddings.position_embedding.weight"]) - 1) ** 0.5)
        return dict(
            hidden_size=width,
            intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
            patch_size=patch,
            image_size=side * patch,
            hidden_act="quick_gelu",
            num_hidden_layers=1
            + max(int(n.split(".")[2]) for n in vision if n.startswith("encoder.layers.")),
        )

    @torch.inference_mode()
    def ask(self, questions, images):
        """(B,): how likely the answer "Yes" is, per token."""
        color, size = tuple(int(255 * value) for value in self.mean), self.vision.config.image_size
        pixels = torch.stack(
            [on_a_square(image, color, size, self.mean, self.std) for image in images]
        )
        patches = self.vision(
            pixels.to(self.device, self.dtype), output_hidden_states=True
        ).hidden_states[-2][:, 1:]
        before = [self.tokenizer(self.before).input_ids] * len(images)
        after, mask = stack_rows(
            [self.tokenizer(self.after.format(q)).input_ids for q in questions], 0, left=False
        )
        embed = lambda ids: self.t5.shared(torch.as_tensor(ids, device=self.device))
        x = torch.cat([embed(before), self.projector(patches), embed(after)], 1)
        mask = torch.nn.functional.pad(mask, (x.shape[1] - mask.shape[1], 0), value=1).to(
            self.device
        )
        answer = torch.tensor(
            [self.tokenizer("Yes").input_ids] * len(images), device=self.device
        )  # Yes, </s>
        # The original cuts the vocabulary to the words there are: rows beyond them take no part.
        logits = (
            self.t5(inputs_embeds=x, attention_mask=mask, labels=answer)
            .logits[..., : len(self.tokenizer)]
            .float()
        )
        return logits.log_softmax(-1).gather(-1, answer[..., None])[..., 0].mean(-1).exp()

    def __call__(self, prompts, images, metadata=None):
        asked = [self.question.format(prompt) for prompt in prompts]
        return torch.cat(
            [self.ask(asked[i : i + 8], images[i : i + 8]) for i in range(0, len(images), 8)]
        ).cpu()
