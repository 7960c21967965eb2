"""MANIQA, ORM, UnifiedReward and VQAScore, compared with what their originals computed."""

import json
import math
import shutil

import pytest
import torch
import transformers
from PIL import Image
from recorded import DATA, recorded, scores_of

from reward_models import guards, maniqa
from reward_models.llava import ORM, Unified, written_score
from reward_models.maniqa import MANIQA, MANIQAReward
from reward_models.vqascore import VQAScore

# --- MANIQA -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_maniqa():
    sizes = dict(width=24, vit_heads=4, side=8, classes=10, hidden=40)
    return MANIQAReward(checkpoint=DATA / "maniqa", **sizes)


def test_maniqa_computes_what_the_original_computed(small_maniqa):
    known, images = recorded("maniqa")
    expected = torch.tensor(known["scores"])
    assert (small_maniqa([""] * len(images), images) - expected).abs().max() < 5e-5
    assert expected.std() > 1e-2
    per_crop = small_maniqa.model(small_maniqa.crops(images[0]))
    assert (per_crop - torch.tensor(known["per crop"])).abs().max() < 5e-5


def test_maniqa_of_full_size_has_the_names_and_shapes_of_the_published_checkpoint():
    lines = (DATA / "maniqa/names.txt").read_text().splitlines()
    with torch.device("meta"):
        state = MANIQA().state_dict()
    ours = {name: str(list(value.shape)) for name, value in state.items()}
    assert ours == dict(line.split("\t") for line in lines)


def test_crops_go_from_edge_to_edge_and_a_small_picture_is_enlarged(small_maniqa):
    assert maniqa.crop_starts(80, 64) == [0, 8, 16] and maniqa.crop_starts(64, 64) == [0]
    small = Image.new("RGB", (32, 40))
    assert len(small_maniqa.crops(small)) == 3  # 64 x 80: one column of crops
    assert small_maniqa([""], [small]).isfinite().all()


def test_a_score_above_1_is_a_score(small_maniqa):
    """A weighted mean of what ReLU leaves has no upper bound."""
    values = torch.tensor([0.2, 1.3])
    assert guards.check_scores("maniqa", small_maniqa, values, 2).tolist() == values.tolist()


@pytest.mark.parametrize(
    "text, score",
    [
        ("Final Score: 4/5", 4),
        ("Final Score: 4 / 5", 4),
        ("Final Score: 4.", 4),
        ("Final Score: 4.5/10", None),
        ("Final Score: 4 / 10", None),
        ("Final Score: 4/50", None),
        ("Alignment Score: 5\nCoherence Score: 4\nStyle Score: 3", 4),
        ("Alignment Score (1-5): 5\nCoherence", None),  # cut off
    ],
)
def test_a_score_is_of_five_and_whole(text, score):
    assert written_score(text) == pytest.approx(score or math.nan, nan_ok=True)


def test_a_missing_maniqa_is_named_with_the_command_that_downloads_it(capsys, tmp_path):
    with pytest.raises(SystemExit):
        MANIQAReward(checkpoint=tmp_path)
    assert "curl -LO" in capsys.readouterr().err


# --- ORM and UnifiedReward, in LLaVA's format ---------------------------------------------------


@pytest.fixture(scope="module")
def orm():
    reward = ORM(checkpoint=DATA / "orm")
    reward.question = recorded("orm")[0]["question template"]
    return reward


def test_orm_computes_what_the_original_computed(orm):
    known, images = recorded("orm")
    ours, expected = scores_of(orm, known["scores"], images)
    assert (ours - expected).abs().max() < 1e-5
    assert (expected.std(1) > 1e-2).all()


def test_questions_of_different_lengths_do_not_change_each_other(orm):
    known, images = recorded("orm")
    prompts, images = [*known["scores"]] * 2, images[:6]
    alone = torch.cat([orm([prompt], [image]) for prompt, image in zip(prompts, images)])
    assert torch.allclose(orm(prompts, images), alone, atol=1e-5)


def test_an_answer_in_the_noise_is_no_score(orm, monkeypatch):
    _, images = recorded("orm")
    logits = torch.zeros(2, 384)
    logits[1, 7] = 30.0  # another word, with a probability of almost 1
    monkeypatch.setattr(orm.judge, "logits", lambda *_: logits)
    before = orm.failures.total()
    known, noise = orm(["a star"] * 2, images[:2]).tolist()
    assert known == 0.5 and math.isnan(noise) and orm.failures.total() == before + 1


def test_image_in_a_prompt_is_not_a_second_picture(orm):
    _, images = recorded("orm")
    assert orm(["a <image> of a star"], images[:1]).isfinite().all()


def test_unified_in_llavas_format_writes_and_a_text_without_a_score_is_nan(monkeypatch):
    _, images = recorded("orm")
    reward = Unified(checkpoint=DATA / "orm")
    reward.max_tokens = 4
    assert reward(["a star"] * 2, images[:2]).isnan().all()  # random weights write nonsense
    questions = []

    def write(asked, *_):
        questions.extend(asked)
        return ["Final Score: 4", "no idea", "Final Score: 9"]  # the last one is out of range

    monkeypatch.setattr(reward.judge, "write", write)
    scores = reward(["a star"] * 3, images[:3])
    assert scores[0] == 4 and scores[1:].isnan().all()
    assert "a star" in questions[0] and "{}" not in questions[0]


def test_a_checkpoint_without_weights_is_refused(tmp_path, capsys):
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(DATA / "orm", tmp_path, ignore=ignore, dirs_exist_ok=True)
    with pytest.raises(SystemExit):
        ORM(checkpoint=tmp_path)
    assert "no *.safetensors" in capsys.readouterr().err


# --- VQAScore -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vqascore():
    reward = VQAScore(checkpoint=DATA / "vqascore", vision_heads=4)
    reward.question = recorded("vqascore")[0]["question template"]
    return reward


def test_vqascore_computes_what_the_original_computed(vqascore):
    known, images = recorded("vqascore")
    ours, expected = scores_of(vqascore, known["scores"], images)
    assert (ours / expected - 1).abs().max() < 1e-4  # scores are about 0.003: relative
    assert (expected.std(1) / expected.mean(1) > 1e-2).all()


def test_vqascore_of_a_batch_is_that_of_each_picture_alone(vqascore):
    known, images = recorded("vqascore")
    prompts, images = [*known["scores"]], images[:3]
    alone = torch.cat([vqascore([prompt], [image]) for prompt, image in zip(prompts, images)])
    assert torch.allclose(vqascore(prompts, images) / alone, torch.ones(3), atol=1e-4)


def test_the_head_of_t5_is_not_its_embedding(vqascore):
    assert not torch.equal(vqascore.t5.lm_head.weight, vqascore.t5.shared.weight)


# --- full size, on the meta device --------------------------------------------------------------

PUBLISHED = json.loads((DATA / "architectures.json").read_text())


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "about"])
def test_architectures_of_full_size_have_the_published_numbers_of_parameters(name):
    entry = PUBLISHED[name]
    kind = getattr(transformers, entry["model"])
    with torch.device("meta"):
        model = kind(kind.config_class(**entry["config"]))
    count = sum(parameter.numel() for parameter in model.parameters())
    if entry["model"] == "T5ForConditionalGeneration":
        count += model.shared.weight.numel()  # built, head and embedding are one; loaded, two
    assert count == pytest.approx(entry["parameters"], rel=entry["tolerance"])


def test_maniqa_of_full_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in MANIQA().parameters()) == 135_747_530
