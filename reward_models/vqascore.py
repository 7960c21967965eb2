"""VQAScore (arXiv:2404.01291): how probable is the answer "Yes" to 'Does this figure show "..."?'

    score = exp(mean log-probability of the answer's tokens) = sqrt(P(Yes) P(</s> | Yes))

The model is CLIP-FlanT5, with 3 or 11 B parameters. T5 reads

    [instructions </s>] [patches of CLIP ViT-L/14, next to last layer, projected] [question </s>]

The two texts are tokenized separately, and each keeps its end token, as in training.
Read next: serving.py
"""

import json

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from reward_models import pixels
from reward_models.hub import count, snapshot, submodule
from reward_models.llava import pad_rows
from reward_models.pixels import CLIP_MEAN, CLIP_STD
from training.weights import fill, load_part, read_weights, readable

# Shapes:  B pictures   S tokens   D numbers a token


def build_t5(config, state, folder):
    # "tie_word_embeddings": false must be kept. If true, T5 would scale its output by 1/sqrt(D).
    others = ("mm_", "image_", "torch_", "model_", "archit", "transf")
    config = {name: value for name, value in config.items() if not name.startswith(others)}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    # transformers builds the input embedding and the head as one tensor. `assign` makes them two;
    # with copying, the one that is loaded last would replace the other.
    parts = ("shared", "encoder", "decoder", "lm_head")
    weights = {name: value for name, value in state.items() if name.split(".")[0] in parts}
    fill(model, weights, folder, assign=True)
    model.set_input_embeddings(model.shared)
    return model


def build_vision(state, heads, folder):
    """CLIP's vision tower. All sizes but the number of heads are read off the weights."""
    state.pop("embeddings.position_ids", None)  # a constant, not a weight
    width, _, _, patch = state["embeddings.patch_embedding.weight"].shape
    side = round((len(state["embeddings.position_embedding.weight"]) - 1) ** 0.5)
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["encoder.layers.0.mlp.fc1.weight"]),
        patch_size=patch,
        image_size=side * patch,
        hidden_act="quick_gelu",
        num_hidden_layers=count(state, r"encoder\.layers\.(\d+)"),
        num_attention_heads=heads,
    )
    return fill(transformers.CLIPVisionModel(config), state, folder)


class VQAScore:
    """VQAScore by CLIP-FlanT5, in this process."""

    range = (0.0, 1.0)
    needs = ("text",)
    checkpoint = "zhiqiulin/clip-flant5-xxl"
    gigabytes = 23.2
    reference = "VQAScore, arXiv:2404.01291"
    # The texts of its training. The instructions, Vicuna's, are not in the checkpoint.
    before = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
    )
    after = "\n{} ASSISTANT: "
    question = 'Does this figure show "{}"? Please answer yes or no.'

    def __init__(self, device="cpu", checkpoint=None, vision_heads=16):
        folder, state = snapshot(checkpoint or self.checkpoint), {}
        for file in sorted(folder.glob("pytorch_model*.bin")):  # -xl is one file, -xxl several
            state |= read_weights(file, mmap=True)
        tower = submodule(state, "vision_tower.vision_tower.vision_model.")
        with readable(folder):
            config = json.loads((folder / "config.json").read_text())
            self.t5 = build_t5(config, state, folder)
            self.vision = build_vision(tower, vision_heads, folder)
            width = config["d_model"]
            layers = nn.Linear(config["mm_hidden_size"], width), nn.GELU(), nn.Linear(width, width)
        self.projector = fill(nn.Sequential(*layers), submodule(state, "mm_projector."), folder)
        self.device, on_gpu = device, torch.device(device).type == "cuda"
        # bfloat16 and not float16: T5's activations are too large for float16.
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        for module in (self.t5, self.vision, self.projector):
            module.to(device, self.dtype).eval().requires_grad_(False)
        self.tokenizer = load_part(transformers.T5Tokenizer, folder)

    def encode_pictures(self, images):
        """(B, patches, D): the output of CLIP's next to last layer, projected."""
        color, size = tuple(int(255 * value) for value in CLIP_MEAN), self.vision.config.image_size
        squares = [pixels.pad_to_square(image, size, color) for image in images]
        batch = torch.stack([pixels.to_tensor(square) for square in squares])
        batch = pixels.normalize(batch, CLIP_MEAN, CLIP_STD).to(self.device, self.dtype)
        states = self.vision(batch, output_hidden_states=True).hidden_states
        return self.projector(states[-2][:, 1:])

    @torch.inference_mode()
    def score(self, prompts, images):
        to_ids = lambda text: self.tokenizer(text).input_ids
        embed = lambda ids: self.t5.shared(torch.as_tensor(ids, device=self.device))
        questions = [self.after.format(self.question.format(prompt)) for prompt in prompts]
        after, mask = pad_rows([to_ids(question) for question in questions], 0, "right")
        before = embed([to_ids(self.before)] * len(images))
        x = torch.cat([before, self.encode_pictures(images), embed(after)], 1)
        mask = F.pad(mask, (x.shape[1] - mask.shape[1], 0), value=1).to(self.device)
        answer = torch.tensor([to_ids("Yes")] * len(images), device=self.device)  # Yes, </s>
        logits = self.t5(inputs_embeds=x, attention_mask=mask, labels=answer).logits
        # As in the original, without the rows of the head that belong to no word.
        logprobs = logits[..., : len(self.tokenizer)].float().log_softmax(-1)
        return logprobs.gather(-1, answer[..., None])[..., 0].mean(-1).exp()

    def __call__(self, prompts, images, metadata=None):
        return pixels.in_batches(self.score, 8, prompts, images)
