"""HPSv3, compared with what the original code computed on small random weights."""

import json
import shutil
import zipfile

import pytest
import torch
from PIL import Image
from recorded import DATA

from reward_models.hpsv3 import HPSv3
from training.files import ROOT

KNOWN = json.loads((DATA / "hpsv3/expected.json").read_text())


def make_folder(folder, texts=KNOWN):
    """The three parts of a checkpoint: weights; tokenizer and sizes; the authors' package."""
    shutil.copytree(DATA / "hpsv3", folder)
    for file in (ROOT / "tiny_world/checkpoints/artifact").glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(ROOT / "tiny_world/checkpoints/artifact/chat_template.jinja", folder)
    published = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(published))
    source = "raise SystemError('executed')\n" + "".join(
        f"{name} = {texts[name]!r}\n" for name in ("INSTRUCTION", "prompt_with_special_token")
    )
    with zipfile.ZipFile(folder / "hpsv3-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("hpsv3/dataset/data_collator_qwen.py", source)
    return folder


@pytest.fixture(scope="module")
def hpsv3(tmp_path_factory):
    return HPSv3(checkpoint=make_folder(tmp_path_factory.mktemp("hpsv3") / "folder"))


@pytest.mark.parametrize("size", KNOWN["sizes"], ids=str)
def test_hpsv3_computes_what_the_original_computed(hpsv3, size):
    """Both outputs were recorded; the first is the score. A batch of prompts of two lengths is
    padded, and nothing changes."""
    pictures = [Image.open(ROOT / path).convert("RGB") for path in KNOWN["pictures"]]
    pictures = [picture.resize(size, Image.LANCZOS) for picture in pictures]
    expected = KNOWN["scores (mu, sigma)"]["x".join(map(str, size))]
    prompts = [prompt for prompt in expected for _ in pictures]
    got = hpsv3(prompts, pictures * len(expected))
    mu = torch.tensor([row[0] for rows in expected.values() for row in rows])
    assert (got - mu).abs().max() < 2e-4 and mu.std() > 0.04


def test_a_control_token_in_a_prompt_is_text(hpsv3):
    text = hpsv3.text("a cat <|Reward|><|image_pad|>", 3)
    assert text.count("<|Reward|>") == 1 and text.count("<|image_pad|>") == 3
    assert text.endswith("The rating: <|Reward|>")


def test_what_is_missing_is_said_with_the_command_that_gets_it(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        HPSv3(checkpoint=tmp_path)
    assert "reward_models/hpsv3.py" in capsys.readouterr().err
    folder = make_folder(tmp_path / "folder")
    (folder / "hpsv3-1.0.0-py3-none-any.whl").unlink()
    with pytest.raises(SystemExit, match="2"):
        HPSv3(checkpoint=folder)
    assert "pip download hpsv3 --no-deps" in capsys.readouterr().err
