"""One loader for all models: a checkpoint that does not fill its model is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
import rewards
from adversarial_reward import Adversarial
from artifact_reward import ArtifactReward
from reward_models.clip import HPS, PickScore
from training import weights
from training.files import ROOT

TINY = ROOT / "tiny_world/checkpoints"


def policy(folder):
    return generate.load_policy(str(folder))


def judge(folder):
    return ArtifactReward("cpu", str(folder))


def pickscore(folder):
    return PickScore("cpu", str(folder))


def dino(folder):
    return Adversarial("cpu", str(folder))


LOADERS = {"policy": policy, "artifact": judge, "pickscore": pickscore, "dino": dino}


@pytest.fixture(params=LOADERS)
def copy(request, tmp_path):
    """(a copy of a tiny checkpoint, what loads it)"""
    shutil.copytree(TINY / request.param, tmp_path / "copy")
    return tmp_path / "copy", LOADERS[request.param]


def refused(load, folder, capsys):
    """The one line with which it is refused."""
    with pytest.raises(SystemExit) as stop:
        load(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and str(folder) in line
    return line


def change(folder, function):
    """Rewrite the weights of a checkpoint: function(state dict) -> state dict."""
    file = folder / "model.safetensors"
    save_file(function(load_file(file)), file, metadata={"format": "pt"})


def widest(state):
    return max(state, key=lambda name: state[name].numel())


# --- weights that do not fit


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
def test_names_with_a_prefix_are_refused(prefix, copy, capsys):
    folder, load = copy
    change(folder, lambda state: {prefix + name: value for name, value in state.items()})
    line = refused(load, folder, capsys)
    assert "missing (" in line and f"unexpected ({prefix}" in line


def test_a_lora_that_was_not_merged_is_refused(copy, capsys):
    folder, load = copy

    def unmerged(state):
        name = next(
            name for name in state if name.endswith("q_proj.weight") or "query.weight" in name
        )
        stem, value = name.removesuffix(".weight"), state.pop(name)
        low = {f"{stem}.lora_A.default.weight": value[:2].clone()}
        return state | low | {f"{stem}.base_layer.weight": value}

    change(folder, unmerged)
    line = refused(load, folder, capsys)
    assert "1 missing (" in line and "base_layer" in line and "lora_A" in line


def test_a_lora_beside_complete_weights_is_refused(copy, capsys):
    folder, load = copy
    change(folder, lambda state: state | {"extra.lora_A.weight": torch.zeros(2, 4)})
    assert "1 unexpected (extra.lora_A.weight)" in refused(load, folder, capsys)


def test_an_adapter_in_the_folder_is_refused(tmp_path, capsys):
    """transformers would put it into the model, which could then not be trained and saved."""
    from peft import LoraConfig, get_peft_model

    folder = shutil.copytree(TINY / "policy", tmp_path / "copy")
    model = generate.load_policy("tiny").model
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    assert "not merged" in refused(policy, folder, capsys)


def test_a_weight_of_another_shape_is_refused(copy, capsys):
    folder, load = copy
    change(folder, lambda s: s | {widest(s): torch.cat([s[widest(s)], s[widest(s)][:1]])})
    assert "1 of another shape (" in refused(load, folder, capsys)


@pytest.mark.parametrize(
    "kind, part",
    [("policy", "generation_head"), ("artifact", "visual"), ("pickscore", "visual_projection")],
)
def test_a_missing_part_is_refused_and_named(kind, part, tmp_path, capsys):
    folder = shutil.copytree(TINY / kind, tmp_path / "copy")
    change(folder, lambda state: {name: v for name, v in state.items() if part not in name})
    line = refused(LOADERS[kind], folder, capsys)
    assert "missing (" in line and part in line


def test_hps_in_open_clips_format_must_fit_too(tmp_path, capsys):
    folder = shutil.copytree(TINY / "hps", tmp_path / "copy")
    file = folder / HPS.file
    state = torch.load(file, weights_only=True)["state_dict"]
    for changed in (
        {f"module.{name}": value for name, value in state.items()},
        {name: value for name, value in state.items() if not name.startswith("visual.proj")},
        state | {"logit_scale": torch.zeros(2)},
    ):
        torch.save({"state_dict": changed}, file)
        assert "do not fit the model" in refused(lambda f: HPS("cpu", str(f)), folder, capsys)
    for wrong in (state, [1], {"state_dict": 3}, {"state_dict": {"logit_scale": "x"}}):
        torch.save(wrong, file)
        assert "cannot be loaded" in refused(lambda f: HPS("cpu", str(f)), folder, capsys)


# --- files that cannot be read


DAMAGE = {
    "lfs": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "html": lambda data: b"<html>404 not found</html>",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_is_refused_in_one_line(file, damage, copy, capsys):
    folder, load = copy
    if not (folder / file).is_file():
        return
    (folder / file).write_bytes(DAMAGE[damage]((folder / file).read_bytes()))
    assert "cannot be loaded" in refused(load, folder, capsys)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_of_torch_are_refused_in_one_line(damage, tmp_path, capsys):
    folder = shutil.copytree(TINY / "hps", tmp_path / "copy")
    file = folder / HPS.file
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert "cannot be loaded" in refused(lambda f: HPS("cpu", str(f)), folder, capsys)


@pytest.mark.parametrize("text", ["[]", "{}", '{"model_type": "janus", "text_config": 3}', "null"])
def test_a_configuration_that_says_nonsense_is_refused_in_one_line(text, copy, capsys):
    folder, load = copy
    (folder / "config.json").write_text(text)
    assert refused(load, folder, capsys)


def test_a_folder_without_weights_is_refused(copy, capsys):
    folder, load = copy
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(load, folder, capsys)


def test_a_shard_that_is_missing_is_refused(copy, capsys):
    folder, load = copy
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    files[min(names)] = "model-00002-of-00002.safetensors"
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(load, folder, capsys)


# --- what fits


@pytest.mark.parametrize("name", ["hps", "pickscore", "artifact", "adversarial"])
def test_the_tiny_checkpoints_fit(name):
    assert rewards.load(name, checkpoint="tiny")


def test_constants_that_older_code_saved_may_be_left_over(tmp_path, hps):
    """The published PickScore and Aesthetic models hold position_ids, which are no weights."""
    folder = shutil.copytree(TINY / "pickscore", tmp_path / "copy")
    ids = {
        f"{part}_model.embeddings.position_ids": torch.arange(4)[None]
        for part in ("text", "vision")
    }
    change(folder, lambda state: state | ids)
    assert pickscore(folder)


def test_tied_weights_may_be_missing(tmp_path):
    """A head that shares its weights with the embedding is saved once."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(BertConfig(vocab_size=11, **sizes)).save_pretrained(tmp_path)
    assert not any("decoder.weight" in name for name in load_file(tmp_path / "model.safetensors"))
    model = weights.load_model(BertForMaskedLM, tmp_path)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
