"""The model card of a checkpoint, and the way to the hub, without a network."""

import math

import huggingface_hub
import pytest
import tyro
from huggingface_hub import ModelCard

import grpo
from training import model_card
from training.records import write_jsonl


def a_run(folder, **flags):
    flags = {"model": "tiny", "rewards": "hps", "eval_rewards": "gold"} | flags
    flags["test_prompts"] = "tiny_world/prompts/test.jsonl"
    (folder / "checkpoints/step-000002").mkdir(parents=True)
    (folder / "checkpoints/step-000002/model.safetensors").write_text("weights")
    (folder / "checkpoints/step-000002/optimizer.pt").write_text("moments")
    with grpo.run_folder.atomic(folder / "config.json") as file:
        grpo.run_folder.json.dump({"flags": flags, "command": "grpo.py --rewards hps"}, file)
    first = {"step": 0, "hps": 0.1, "gold": 0.9}
    last = {"step": 2, "hps": 0.25, "gold": math.nan, "hps/two objects": 0.3}
    write_jsonl(folder / "test.jsonl", [first, last])
    return folder


def test_the_hub_reads_the_base_model_and_the_last_scores(tmp_path):
    folder = a_run(tmp_path / "hacked", model="some/Janus", eval_rewards="")
    card = ModelCard(model_card.model_card(folder, 2))
    assert card.data.base_model == "some/Janus" and card.data.pipeline_tag == "text-to-image"
    (result,) = card.data.eval_results  # NaN is no score, a tag's mean is none of the whole
    assert (result.metric_type, result.metric_value) == ("hps", 0.25)
    assert result.dataset_type == "test.jsonl" and card.data.model_name == "hacked"
    assert "held out: `nothing`" in card.text and "| hps | 0.2500 |" in card.text
    flags = {"cures.average": 0.9, "cures.doubted_by": "artifact"}
    cured = model_card.model_card(a_run(tmp_path / "cured", **flags), 2)
    assert "Last test, at step 2 (of the averaged weights, in `average/`)" in cured
    assert "`artifact` decided where the KL counts" in cured
    tiny = ModelCard(model_card.model_card(a_run(tmp_path / "tiny"), 2))
    assert tiny.data.base_model is None and tiny.data.license == "mit"


@pytest.mark.parametrize(
    "name, token, rule",
    [
        ("me/a b", "t", "--push-to-hub me/a b"),
        ("run", "t", "write USER/run"),
        ("me/run", None, "hf auth login"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_the_training(name, token, rule, monkeypatch, capsys):
    monkeypatch.setattr(model_card, "get_token", lambda: token)
    with pytest.raises(SystemExit, match="2"):
        grpo.main(tyro.cli(grpo.Config, args=["--push-to-hub", name]))
    assert rule in capsys.readouterr().err


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def __call__(self):
        return self

    def create_repo(self, name, **options):
        self.calls.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self, **options):
        if self.error:
            raise self.error
        self.calls.append(options)


def test_the_last_checkpoint_is_pushed_without_what_only_a_resume_needs(
    tmp_path, monkeypatch, capsys
):
    hub, folder = Hub(), a_run(tmp_path / "run") / "checkpoints/step-000002"
    monkeypatch.setattr(model_card, "HfApi", hub)
    model_card.push_to_hub("me/run", folder)
    (name, how), upload = hub.calls
    assert name == "me/run" and how == {"private": True, "exist_ok": True}
    names = [path.name for path in folder.iterdir()]
    kept = huggingface_hub.utils.filter_repo_objects(
        names, ignore_patterns=upload["ignore_patterns"]
    )
    assert upload["repo_id"] == "me/run" and list(kept) == ["model.safetensors"]
    assert "on the hub: https://hub/me/run" in capsys.readouterr().out
    hub.calls.clear()
    model_card.push_to_hub("", folder)
    assert not hub.calls


def test_a_failed_push_names_the_command_that_tries_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_card, "HfApi", Hub(OSError("no route")))
    with pytest.raises(SystemExit, match="3"):
        model_card.push_to_hub("me/run", tmp_path)
    err = capsys.readouterr().err
    again = f"hf upload me/run {tmp_path} --private --exclude '*.pt' --exclude 'state.json'"
    assert "no route" in err and err.strip().endswith(again)
