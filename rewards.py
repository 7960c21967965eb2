"""Every reward and every metric, in one dictionary, behind one calling convention.

    reward = rewards.load("hps")
    scores = reward(prompts, images, metadata)      # (N,) float32, higher is better, NaN = no score

A reward model is an opinion, and every opinion is silent about something. HPS was fitted to which of
two pictures people preferred (Bradley-Terry: P(a over b) = sigmoid(s_a - s_b)); whoever never had to
choose between a clean picture and a broken one taught it nothing about breakage. ArtifactReward is
asked about nothing else. Several opinions become one number, or one verdict, in `combine`.

Run:   python rewards.py --list
       python rewards.py --list --verbose             also: the command that downloads or starts each
       python rewards.py score hps,stats outputs/00000/samples/*.png --prompt "a red star"
       python rewards.py score hps,gold --images outputs --prompts tiny_world/prompts/test.jsonl
       python rewards.py serve hps --port 8100        then, elsewhere: --rewards hps@http://HOST:8100

You should see:  a line per reward, with its range and what it needs; then a score per picture.

A reward of your own: a class like Jpeg below (not Statistic: those are only watched), and a line in REWARDS. README.md has an
example; `cog -r README.md` puts it into the README's table.

Left out: anything that trains. The same object serves as training reward and as held-out metric; which
one it is, is decided in grpo.py and nowhere else.   Read next: artifact_reward.py
"""

import io
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from adversarial_reward import Adversarial, AdversarialPickScore
from artifact_reward import ArtifactReward
from evaluation import pages as report
from generate import pick_device
from reward_models.grounding_dino import GIT, GDino
from reward_models.llava import ORM, Unified, VQAScore
from reward_models.maniqa import ManiqaReward
from reward_models.serving import Elsewhere, serve
from training.files import HERE, usage_error

# --- on a CLIP: what people prefer -------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# open_clip's names -> transformers' names. One table, read in both directions: the checkpoint of HPS
# is in open_clip's, and tiny_train.py writes ours in it too.
OPEN_CLIP_NAMES = [
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # (sic)
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def from_open_clip(state):
    """An open_clip state dict -> one for transformers' CLIPModel. open_clip keeps queries, keys and
    values in one matrix, and its two final projections the other way round."""
    out = {}
    for name, value in state.items():
        for pattern, ours in OPEN_CLIP_NAMES:
            name = re.sub(pattern, ours, name)
        if ".attn.in_proj_" in name:
            for part, chunk in zip("qkv", value.chunk(3)):
                out[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = chunk
        elif name in ("visual_projection.weight", "text_projection.weight"):
            out[name] = value.T
        elif name != "attn_mask":  # a constant, not a weight
            out[name] = value
    return out


class Clip:
    """What all rewards on a CLIP share: two encoders into one space. Not a reward itself."""

    needs = ("text",)

    def prepare(self, model, base, device):
        """model: a CLIPModel; base: folder or hub name of a CLIP with the right vocabulary."""
        # float32 throughout: a group's scores differ by about .01, and bfloat16 has steps of .002 at .3.
        self.model, self.device = model.float().eval().requires_grad_(False).to(device), device
        self.tokenizer = CLIPTokenizer.from_pretrained(base)
        self.size = model.config.vision_config.image_size
        self.length = model.config.text_config.max_position_embeddings

    def fit(self, image):
        """CLIP's way to a square: the shorter side to the model's size, the middle cut out."""
        scale = self.size / min(image.size)
        image = image.resize(
            [max(self.size, int(side * scale)) for side in image.size], Image.BICUBIC
        )
        left, top = (int((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))

    def pixels(self, image):
        """(3, H, W), normalised. Pillow's resampling, which smooths when shrinking (torchvision's old one,
        on tensors, did not: scores of old code differ a little)."""
        square = self.fit(image.convert("RGB"))
        data = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(
            self.size, self.size, 3
        )
        return ((data / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(2, 0, 1)

    def embed_texts(self, prompts):
        """(N, D), of length 1. A prompt that occurs many times, as in a group, is read once."""
        unique = list(dict.fromkeys(prompts))
        words = self.tokenizer(
            unique,
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        text = self.model.get_text_features(**words.to(self.device)).pooler_output
        text = torch.nn.functional.normalize(text.float(), dim=-1)
        return text[[unique.index(prompt) for prompt in prompts]]

    def embed_images(self, pixels):
        """(N, D), of length 1."""
        picture = self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output
        return torch.nn.functional.normalize(picture.float(), dim=-1)

    def score(self, picture, prompts):
        """The cosine of each picture and its text."""
        return (picture * self.embed_texts(list(prompts))).sum(-1)

    @torch.inference_mode()
    def __call__(self, prompts, images, metadata=None):
        scores = []
        for i in range(0, len(images), 64):
            picture = self.embed_images(
                torch.stack([self.pixels(image) for image in images[i : i + 64]])
            )
            scores.append(self.score(picture, prompts[i : i + 64]))
        return torch.cat(scores).cpu()


class HPS(Clip):
    """Human Preference Score v2.1 (arXiv:2306.09341): the cosine between CLIP's picture and text.

    Raw values, about 0.2 to 0.35 for the real model (people often report them times 100). Only
    comparable within one prompt, which is what a GRPO group is."""

    range = (-1.0, 1.0)
    checkpoint = "xswu/HPSv2"
    reference = "HPSv2, arXiv:2306.09341"
    how = "hf download xswu/HPSv2 HPS_v2.1_compressed.pt && hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K *.json merges.txt"

    def __init__(self, device="cpu", checkpoint=None):
        folder = Path(checkpoint or self.checkpoint)
        if folder.is_dir():
            weights, base = folder / "HPS_v2.1_compressed.pt", folder
        else:  # the weights come without configuration or vocabulary; CLIP ViT-H/14 has both
            weights, base = download(str(folder), "HPS_v2.1_compressed.pt"), CLIP_H
        model = CLIPModel(CLIPConfig.from_pretrained(base))
        model.load_state_dict(from_open_clip(torch.load(weights, weights_only=True)["state_dict"]))
        self.prepare(model, base, device)

    def fit(self, image):
        """HPS does not crop: the longer side to the model's size, in the middle of a black square."""
        scale = self.size / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.BICUBIC)
        square = Image.new("RGB", (self.size, self.size))
        square.paste(image, ((self.size - image.width) // 2, (self.size - image.height) // 2))
        return square


class PickScore(Clip):
    """PickScore v1 (arXiv:2305.01569): CLIP's own score, temperature times cosine, after people's choices.

    About 18 to 24. (The code released with ArtifactReward leaves the temperature of 100 out; a plain sum
    with other rewards then hears a hundredth of it.)"""

    range = (0.0, 40.0)
    checkpoint = "yuvalkirstain/PickScore_v1"
    reference = "PickScore, arXiv:2305.01569"

    def __init__(self, device="cpu", checkpoint=None):
        folder = str(checkpoint or self.checkpoint)
        self.prepare(
            CLIPModel.from_pretrained(folder), folder if Path(folder).is_dir() else CLIP_H, device
        )

    def score(self, picture, prompts):
        return self.model.logit_scale.exp() * super().score(picture, prompts)


class Aesthetic(Clip):
    """LAION's aesthetic predictor, the linear one: w . e + b on the picture's unit embedding by CLIP ViT-L/14.

    About 4 to 7. It never sees the prompt: trained on alone, every prompt gets the same pretty picture."""

    range = (1.0, 10.0)
    needs = ()
    checkpoint = "openai/clip-vit-large-patch14"
    reference = "github.com/LAION-AI/aesthetic-predictor"
    head = "sa_0_4_vit_l_14_linear.pth"
    how = f"curl -LO https://github.com/LAION-AI/aesthetic-predictor/raw/main/{head}"

    def __init__(self, device="cpu", checkpoint=None):
        folder = Path(checkpoint or ".")
        if not (folder / self.head).is_file():
            usage_error(f"aesthetic: {folder / self.head} is missing; it is 4 kB: {self.how}")
        base = str(folder) if (folder / "config.json").is_file() else self.checkpoint
        self.prepare(CLIPModel.from_pretrained(base), base, device)
        self.linear = (
            torch.nn.Linear(self.model.config.projection_dim, 1).to(device).requires_grad_(False)
        )
        self.linear.load_state_dict(torch.load(folder / self.head, weights_only=True))

    def score(self, picture, prompts):
        return self.linear(picture)[:, 0]


# BLIP's own names -> transformers' names, of the vision tower; the text tower has the same names in both.
BLIP_NAMES = [
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"^norm\.", "post_layernorm."),
]


class ImageReward(Clip):
    """ImageReward v1.0 (arXiv:2304.05977): BLIP reads the prompt while looking at the picture; a linear MLP on
    its first token, shifted and scaled to mean 0 and deviation 1. About -2.3 to 2; prompts are cut at 35 tokens."""

    range = (-3.0, 3.0)
    checkpoint = "zai-org/ImageReward"
    reference = "ImageReward, arXiv:2304.05977"
    how = (
        "hf download zai-org/ImageReward ImageReward.pt && hf download bert-base-uncased vocab.txt"
    )
    mean, std, length = 0.16717362830052426, 1.0333394966054072, 35

    def __init__(self, device="cpu", checkpoint=None):
        from transformers import (
            BertTokenizer,
            BlipTextConfig,
            BlipTextModel,
            BlipVisionConfig,
            BlipVisionModel,
        )

        folder = Path(checkpoint or self.checkpoint)
        weights = (
            folder / "ImageReward.pt"
            if folder.is_dir()
            else download(str(folder), "ImageReward.pt")
        )
        state, self.device = torch.load(weights, weights_only=True), device
        vision = {
            n.removeprefix("blip.visual_encoder."): v
            for n, v in state.items()
            if ".visual_encoder." in n
        }
        text = {
            n.removeprefix("blip.text_encoder."): v
            for n, v in state.items()
            if ".text_encoder." in n
        }
        mlp = {n.removeprefix("mlp.layers."): v for n, v in state.items() if n.startswith("mlp.")}

        # Every size can be read off the weights; heads are 64 wide in all BLIPs.
        width, patch = vision["cls_token"].shape[-1], vision["patch_embed.proj.weight"].shape[-1]
        self.size = round((vision["pos_embed"].shape[1] - 1) ** 0.5) * patch
        vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_attention_heads=width // 64,
                image_size=self.size,
                patch_size=patch,
                num_hidden_layers=layers(vision),
                hidden_act="gelu",
                layer_norm_eps=1e-6,
            )
        )
        # is_decoder builds the cross-attention. The forward pass leaves it off: on, the mask would be causal.
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                encoder_hidden_size=width,
                intermediate_size=4 * hidden,
                num_hidden_layers=layers(text),
                num_attention_heads=hidden // 64,
                is_decoder=True,
                max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            ),
            add_pooling_layer=False,
        )
        self.mlp = torch.nn.Sequential(
            *(  # dropout between the layers, and no activation
                torch.nn.Linear(*mlp[f"{i}.weight"].T.shape)
                if f"{i}.weight" in mlp
                else torch.nn.Identity()
                for i in range(8)
            )
        )
        for pattern, name in BLIP_NAMES:
            vision = {re.sub(pattern, name, n): v for n, v in vision.items()}
        text.pop("embeddings.position_ids", None)  # a constant, not a weight
        for module, weights in ((self.vision, vision), (self.text, text), (self.mlp, mlp)):
            module.load_state_dict(weights)
            module.eval().requires_grad_(False).to(device)
        base = folder if (folder / "vocab.txt").is_file() else "bert-base-uncased"
        self.tokenizer = BertTokenizer.from_pretrained(base)

    def embed_images(self, pixels):
        return self.vision(pixels.to(self.device)).last_hidden_state

    def score(self, picture, prompts):
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(self.device)
        seen = self.text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=picture,
            encoder_attention_mask=torch.ones(picture.shape[:2], device=self.device),
        )
        return (self.mlp(seen.last_hidden_state[:, 0])[:, 0] - self.mean) / self.std


def layers(state):
    """How many layers a state dict has."""
    return 1 + max(
        int(found[1])
        for name in state
        if (found := re.search(r"\.?(?:blocks|layer)\.(\d+)\.", name))
    )


CLIP_H = (
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # configuration and vocabulary of HPS and PickScore
)


def download(repository, name):
    """A file of a model repository; without a network, one line that says what to do."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, name)
    except Exception as problem:  # many kinds: no network, no such file, no right to it
        usage_error(
            f"{repository}/{name} cannot be had ({type(problem).__name__}); where there is a network: "
            f"hf download {repository} {name}"
        )


# --- no model at all ----------------------------------------------------------------------------


class Jpeg:
    """How small a picture gets: minus the kilobytes of its JPEG. DDPO's "compressibility" (arXiv:2305.13301);
    what training on it does to pictures is hacking in its purest form, and seen in minutes."""

    range = (-math.inf, 0.0)
    needs = ()
    checkpoint = None
    reference = "DDPO, arXiv:2305.13301"

    def __init__(self, device="cpu", checkpoint=None):
        pass

    def __call__(self, prompts, images, metadata=None):
        sizes = []
        for image in images:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=95)
            sizes.append(-len(buffer.getvalue()) / 1000)
        return torch.tensor(sizes)


class Statistic:
    """What hacked pictures often give away, each in [0, 1]: watched, never trained on. `stats` names all four."""

    range = (0.0, 1.0)
    needs = ()
    checkpoint = None
    reference = "hacked pictures look alike"
    only_watched = True

    def __init__(self, device="cpu", checkpoint=None):
        pass

    def __call__(self, prompts, images, metadata=None):
        return torch.tensor([float(self.measure(image)) for image in images])


class Brightness(Statistic):
    """Mean value, of hue, saturation and value."""

    measure = staticmethod(
        lambda image: np.asarray(image.convert("HSV"), np.float32)[..., 2].mean() / 255
    )


class Saturation(Statistic):
    """Mean saturation: preference models like colours, and policies find out."""

    measure = staticmethod(
        lambda image: np.asarray(image.convert("HSV"), np.float32)[..., 1].mean() / 255
    )


class Edges(Statistic):
    """Mean step between neighbouring pixels of the grey picture: texture, grain, grids."""

    @staticmethod
    def measure(image):
        grey = np.asarray(image.convert("L"), np.float32) / 255
        return np.mean([np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)])


class Entropy(Statistic):
    """Entropy of the colours, in 4 x 4 x 4 boxes, as a share of the largest there can be."""

    @staticmethod
    def measure(image):
        boxes = np.asarray(image.convert("RGB"), np.int64) // 64 @ (16, 4, 1)
        share = np.bincount(boxes.ravel(), minlength=64) / boxes.size
        return -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(64)


# --- in an environment of its own ----------------------------------------------------------------


class DeQA:
    """DeQA-Score (arXiv:2501.11561): a model of 8 B parameters that grades photographs, 1 to 5, without the prompt. Its
    code needs transformers 4.36 and cannot live in this process; reward_models/deqa_server.py runs it, in an environment of its own."""

    range = (1.0, 5.0)
    needs = ("server",)
    checkpoint = "zhiyuanyou/DeQA-Score-Mix3"
    reference = "DeQA-Score, arXiv:2501.11561"
    how = "see the first lines of reward_models/deqa_server.py; then deqa@http://127.0.0.1:8101"

    def __init__(self, device="cpu", checkpoint=None):
        usage_error(f"deqa works in an environment of its own, {self.how}")


# --- gold: the truth, where there is one ------------------------------------------------------


class Gold:
    """The tiny world's truth (tiny.py): does the picture show what the prompt says, times: is it
    whole. Prompts from outside that world have no gold score: NaN."""

    range = (0.0, 1.0)
    needs = ("text",)
    checkpoint = None
    reference = "tiny.py"
    part = staticmethod(lambda aligned, clean: aligned * clean)

    def __init__(self, device="cpu", checkpoint=None):
        from tiny_world import world as tiny  # lazily: whoever trains Janus-Pro has no use for it

        self.world = tiny

    def __call__(self, prompts, images, metadata=None):
        scores = torch.full((len(images),), math.nan)
        known = []
        for i, prompt in enumerate(prompts):
            try:
                self.world.wanted(prompt)
                known.append(i)
            except ValueError:
                pass  # stays NaN
        if known:
            aligned, clean = self.world.gold(
                [prompts[i] for i in known], [images[i] for i in known]
            )
            scores[known] = self.part(aligned, clean).float()
        return scores


class GoldAligned(Gold):
    """The first factor of gold: what the prompt asks for is there."""

    part = staticmethod(lambda aligned, clean: aligned)


class GoldClean(Gold):
    """The second factor of gold: nothing in the picture is left unexplained."""

    part = staticmethod(lambda aligned, clean: clean)


# --- the dictionary ---------------------------------------------------------------------------

REWARDS = {
    "hps": HPS,
    "pickscore": PickScore,
    "imagereward": ImageReward,
    "aesthetic": Aesthetic,
    "maniqa": ManiqaReward,
    "deqa": DeQA,
    "gdino": GDino,
    "git": GIT,
    "orm": ORM,
    "vqascore": VQAScore,
    "unified": Unified,
    "artifact": ArtifactReward,
    "adversarial": Adversarial,
    "adversarial-pickscore": AdversarialPickScore,
    "jpeg": Jpeg,
    "brightness": Brightness,
    "saturation": Saturation,
    "edges": Edges,
    "entropy": Entropy,
    "gold": Gold,
    "gold-aligned": GoldAligned,
    "gold-clean": GoldClean,
}


STATS = tuple(name for name, kind in REWARDS.items() if issubclass(kind, Statistic))


def load(name, device="cpu", checkpoint=None, url=None, **options):
    """The reward of that name. checkpoint: None = the published one, "tiny" = ours, or a folder; with url,
    the one that is served there."""
    if name not in REWARDS:
        usage_error(f"unknown reward {name!r}; known are {', '.join(REWARDS)}")
    if url:
        return Elsewhere(name, url)
    if checkpoint == "tiny":
        checkpoint = HERE / "tiny_world" / "checkpoints" / getattr(REWARDS[name], "folder", name)
        if REWARDS[name].checkpoint and not checkpoint.is_dir():
            usage_error(
                f"{name} has no tiny checkpoint; take the published one (a --model other than tiny)"
            )
    return REWARDS[name](device=device, checkpoint=checkpoint, **options)


def parse(text):
    """ "hps:1,artifact:0.5" -> {"hps": 1.0, "artifact": 0.5}. Wrong input ends with exit code 2."""
    return {name: weight for name, weight, _ in parse_all(text)}


def addresses(text):
    """ "hps@http://127.0.0.1:8100:0.5,artifact" -> {"hps": "http://127.0.0.1:8100"}: who lives elsewhere."""
    return {name: url for name, _, url in parse_all(text) if url}


def parse_all(text):
    """(name, weight, address or None) of each part; name, name:weight, name@http://host:port[:weight]."""
    found = []
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in (name for part in parts for name in (STATS if part == "stats" else [part])):
        name, url, weight = re.fullmatch(
            r"([^:@]*)(?:@(https?://[^/:]+:\d+))?(?::(.*))?|.*", part
        ).groups()
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if name is None:
            usage_error(
                f"--rewards {text}: {part!r} is none of name, name:weight, name@http://host:port:weight"
            )
        if not math.isfinite(value):
            usage_error(
                f"--rewards {text}: {weight!r} is no number; write name:weight, as in hps:1,artifact:0.5"
            )
        if name not in REWARDS:
            usage_error(
                f"--rewards {text}: unknown reward {name!r}; known are {', '.join(REWARDS)}"
            )
        if name in (known for known, *_ in found):
            usage_error(f"--rewards {text}: {name!r} is named twice; give it one weight")
        found.append((name, value, url))
    return found


def start_scoring(rewards, prompts, images, metadata=None):
    """Begin to score pictures with all rewards of a dict; call the result to have the scores.

    Rewards that work elsewhere are asked at once, in threads, and answer while the policy does something of
    its own; those of this process wait until the scores are wanted, for two at a time on one machine only get
    in each other's way. A reward that raises, or that returns another number of scores, ends the run: only
    a *picture* may fail, and is NaN then."""
    pool = ThreadPoolExecutor(max(1, len(rewards)))
    asked = {
        name: pool.submit(reward, prompts, images, metadata)
        for name, reward in rewards.items()
        if getattr(reward, "remote", False)
    }

    def finish():
        scores = {}
        for name, reward in rewards.items():
            values = asked[name].result() if name in asked else reward(prompts, images, metadata)
            values = torch.as_tensor(values, dtype=torch.float32).cpu()
            if values.shape != (len(images),):
                raise ValueError(
                    f"reward {name!r} gave {tuple(values.shape)} scores for {len(images)} pictures"
                )
            scores[name] = torch.where(values.isfinite(), values, math.nan)
        pool.shutdown()
        return scores

    return finish


def score(rewards, prompts, images, metadata=None):
    """All rewards of a dict on the same pictures: dict name -> (N,) float32, NaN where a picture failed."""
    return start_scoring(rewards, prompts, images, metadata)()


# --- several opinions, one number -------------------------------------------------------------


def standardize(values_NK, group_size):
    """z-scores within each group of group_size rows, NaN-aware; n - 1 in the deviation as in T2I-R1."""
    groups = values_NK.view(-1, group_size, values_NK.shape[-1])
    known = groups.isfinite()
    count = known.sum(1, keepdim=True)
    mean = groups.nan_to_num().sum(1, keepdim=True) / count.clamp(min=1)
    square = torch.where(known, groups - mean, 0.0).square().sum(1, keepdim=True)
    std = (square / (count - 1).clamp(min=1)).sqrt()
    return ((groups - mean) / (std + 1e-4)).view_as(values_NK)


def combine(scores, weights, group_size, how="sum", multipliers=None):
    """Many rewards -> one number a rollout, (N,). NaN marks a rollout that gets no advantage: one of its
    scores failed, or (pareto) it is dominated.

    sum          sum_k w_k r_k: the paper, and T2I-R1. Scale decides who is heard.
    normalized   sum_k w_k z_k, z within the group: everyone is heard alike (GDPO).
    mean, min    of the z_k: ensembles (Coste et al., arXiv:2310.02743; mean and worst case). Taken over
    uwo          mean - 0.5 variance                       z, because our opinions have different scales.
    pareto       sum, but only over rollouts that no other one of the group beats in every reward at
                 once (Parrot, arXiv:2401.05675).
    constrained  r_1 + sum_{k>1} lambda_k r_k, the multipliers set by `update_multipliers` so that each
                 further reward stays above its floor (arXiv:2310.04373).
    """
    names = list(weights)
    values = torch.stack([scores[name] for name in names], 1)  # (N, K)
    weight = torch.tensor([weights[name] for name in names])
    if how in ("sum", "pareto"):
        total = (values * weight).sum(1)
    elif how == "constrained":
        multiplier = torch.tensor([multipliers[name] for name in names[1:]])
        total = values[:, 0] + (values[:, 1:] * multiplier).sum(1)
    else:
        z = standardize(values, group_size)
        total = {
            "normalized": lambda: (z * weight).sum(1),
            "mean": lambda: z.mean(1),
            "min": lambda: z.min(1).values,
            "uwo": lambda: z.mean(1) - 0.5 * z.var(1, correction=0),
        }[how]()
    if how == "pareto":
        total = total.masked_fill(dominated(values * weight.sign(), group_size), math.nan)
    return total


def dominated(values_NK, group_size):
    """Who is beaten by another one of the group in every respect at once: nowhere better, somewhere worse. (N,) bool."""
    groups = values_NK.view(-1, group_size, values_NK.shape[-1])
    a, b = groups[:, :, None], groups[:, None]
    return ((b >= a).all(-1) & (b > a).any(-1)).any(2).view(-1)


def update_multipliers(multipliers, scores, floors, rate=0.1):
    """Lagrange: lambda_k <- [lambda_k + rate (floor_k - mean r_k)]_+, one step of dual ascent."""
    return {
        name: max(0.0, value + rate * (floors[name] - float(scores[name].nanmean())))
        for name, value in multipliers.items()
    }


def refuse_learners(parsed):
    """Pictures alone cannot be scored by what would first have to learn."""
    names = [name for name, *_ in parsed if hasattr(REWARDS[name], "learn")]
    if names:
        usage_error(
            f"{', '.join(names)}: knows nothing before it has learned beside a policy; it scores within grpo.py only"
        )


# --- command line -----------------------------------------------------------------------------


@dataclass
class Config:
    command: Annotated[Literal["", "score", "serve"], tyro.conf.Positional] = ""  # what to do
    reward: Annotated[str, tyro.conf.Positional] = ""  # score: which rewards; serve: which one
    files: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # score: picture files
    list: bool = False  # list all rewards
    verbose: bool = False  # list: also how to get each checkpoint, or start its server
    prompt: str = ""  # score: what the pictures were to show
    images: str = ""  # score: or a folder of pictures, as evaluate.py
    prompts: str = ""  # score: and the file of their prompts
    model: str = "tiny"  # "tiny" for our checkpoints, "real" for the published ones
    checkpoint: str | None = None  # or a folder of your own
    port: int = 8100  # serve: where to listen
    host: str = "127.0.0.1"  # serve: 0.0.0.0 lets other machines in


def overview(verbose):
    rows = []
    for name, kind in REWARDS.items():
        rows.append(
            {
                "name": name,
                "range": f"{kind.range[0]:g} to {kind.range[1]:g}",
                "needs": ", ".join(kind.needs) or "-",
                "checkpoint": kind.checkpoint or "-",
                "reference": kind.reference,
            }
        )
        if verbose:
            rows[-1]["to have it"] = getattr(
                kind, "how", f"hf download {kind.checkpoint}" if kind.checkpoint else "-"
            )
    return rows


def main(cfg):
    if cfg.list or not cfg.command:
        return print("\n".join(report.markdown(overview(cfg.verbose))))
    if cfg.command == "score" and cfg.images:
        import evaluate  # uphill, for once: scoring a folder is its business

        return evaluate.main(
            evaluate.Config(
                images=cfg.images, prompts=cfg.prompts, rewards=cfg.reward, model=cfg.model
            )
        )
    parsed, checkpoint = (
        parse_all(cfg.reward),
        cfg.checkpoint or ("tiny" if cfg.model == "tiny" else None),
    )
    if not parsed or len(parsed) > 1 and cfg.command == "serve":
        usage_error(
            f"{cfg.reward!r}: name a reward to score with, or one to serve; --list shows them"
        )
    if cfg.command == "score" and not cfg.files:
        usage_error(
            'give pictures as well: python rewards.py score hps picture.png --prompt "a red star", or a folder, '
            "--images DIR --prompts FILE"
        )
    refuse_learners(parsed)
    loaded = {name: load(name, pick_device("auto")[0], checkpoint, url) for name, _, url in parsed}
    if cfg.command == "serve":
        ((name, reward),) = loaded.items()
        server = serve(name, reward, cfg.port, cfg.host)
        print(f"use it as --rewards {name}@http://{cfg.host}:{server.server_port}", flush=True)
        return server.serve_forever()
    rows = []
    for path in cfg.files:
        try:
            image = Image.open(path).convert("RGB")
            scores = {name: reward([cfg.prompt], [image]).item() for name, reward in loaded.items()}
        except OSError as problem:  # one bad picture costs one line
            print(f"error: {path}: not a readable picture ({problem})", file=sys.stderr)
            scores = dict.fromkeys(loaded, math.nan)
        rows.append(scores | {"picture": path})
    print("\n".join(report.markdown(rows)))
    sys.exit(3 if any(math.isnan(row[name]) for row in rows for name in loaded) else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
