"""The policy: what is sampled is what is scored, and a picture depends on its own key alone."""

import json

import pytest
import torch
from PIL import Image

import generate
from training.pictures import write_pictures

PROMPTS = [
    "a red circle",
    "three blue crosses",
    "a yellow star above a purple square",
    "a cross and a star",
]
KEYS = [(7, 0, i, 0) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("cfg_weight", [1.0, 3.0])
def test_cached_sampling_and_teacher_forcing_agree(policy, monkeypatch, cfg_weight):
    drawn, draw = [], generate.sample_inverse_cdf

    def spy(logits, uniform):
        token = draw(logits, uniform)
        drawn.append(logits.float().log_softmax(-1).gather(1, token[:, None]))
        return token

    monkeypatch.setattr(generate, "sample_inverse_cdf", spy)
    rollouts = generate.sample(policy, PROMPTS, KEYS, cfg_weight=cfg_weight)
    with torch.no_grad():
        scored = generate.logprobs(policy, rollouts, cfg_weight)
    sampled = torch.cat(drawn, 1)
    assert sampled.shape == scored.shape == rollouts.mask.shape
    assert (sampled - scored)[rollouts.mask].abs().max() < 1e-4


def test_a_picture_does_not_change_with_its_batch_mates(policy):
    together = generate.sample(policy, PROMPTS, KEYS, cfg_weight=2.0)
    for i, (prompt, key) in enumerate(zip(PROMPTS, KEYS)):
        alone = generate.sample(policy, [prompt], [key], cfg_weight=2.0)
        assert alone.thoughts[0] == together.thoughts[i]
        assert torch.equal(alone.image_ids[0], together.image_ids[i])
        assert alone.images[0].tobytes() == together.images[i].tobytes()


def test_a_log_probability_does_not_change_with_its_batch_mates(policy):
    rollouts = generate.sample(policy, PROMPTS, KEYS)
    with torch.no_grad():
        together, alone = (
            generate.logprobs(policy, rollouts),
            generate.logprobs(policy, rollouts[1:2]),
        )
    assert (together[1:2] - alone)[rollouts.mask[1:2]].abs().max() < 1e-4


def test_another_key_makes_another_picture(policy):
    first, second = generate.sample(
        policy, ["a red circle"] * 2, [(7, 0, 0, 0), (7, 0, 0, 1)]
    ).image_ids
    assert not torch.equal(first, second)


def test_tokens_are_drawn_in_proportion_to_their_probability():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(10000, 3)
    counts = generate.sample_inverse_cdf(logits, torch.arange(10000) / 10000).bincount(minlength=3)
    assert counts.tolist() == pytest.approx([1000, 2000, 7000], abs=2)


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert all(
        generate.sample_inverse_cdf(logits, torch.tensor([u])) == 1 for u in (0.0, 0.5, 1 - 2**-24)
    )


def test_the_unguided_branch_knows_nothing_of_the_words(policy):
    ids, _ = generate.image_context(policy, ["a red circle", "a blue square"], ["", ""])
    blank = generate.unconditional_ids(policy, ids)
    assert not torch.equal(ids[0], ids[1]) and torch.equal(blank[0], blank[1])
    assert blank[0, 0] == policy.tokenizer.bos_token_id and blank[0, -1] == policy.boi


@pytest.mark.parametrize("context", [generate.thought_context, generate.image_context])
def test_a_prompt_holds_no_control_tokens(policy, context):
    """Else "<begin_of_image>" in a prompt would begin the picture."""

    def control_tokens(prompt):
        arguments = [[""]] if context is generate.image_context else []
        ids, _ = context(policy, [prompt], *arguments)
        return [token for token in ids[0].tolist() if token in policy.tokenizer.all_special_ids]

    for token in policy.tokenizer.all_special_tokens:
        assert control_tokens(f"a {token} cat") == control_tokens("a cat")
    assert "a < 3" in generate.chat(policy, "a < 3")


def test_we_paint_what_transformers_paints(policy, monkeypatch):
    """Greedily, with guidance 3: our loop against JanusForConditionalGeneration.generate."""
    monkeypatch.setattr(generate, "sample_inverse_cdf", lambda logits, uniform: logits.argmax(-1))
    ours = generate.sample(policy, PROMPTS[:1], KEYS[:1], cot=False, cfg_weight=3.0).image_ids
    ids, mask = generate.image_context(policy, PROMPTS[:1], [""])
    theirs = policy.model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        generation_mode="image",
        do_sample=False,
        guidance_scale=3.0,
    )
    assert torch.equal(ours, theirs)


def test_weights_are_float32_and_only_the_language_model_is_trained(policy):
    for name, parameter in policy.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad == name.startswith(("model.language_model", "lm_head"))


def test_pictures_are_laid_out_as_geneval_reads_them_and_made_once(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\nin/../the <b>dark\n")
    cfg = generate.Config(
        prompts=str(tmp_path / "p.txt"), num_images=2, output_dir=str(tmp_path / "out")
    )
    generate.main(cfg)
    root = tmp_path / "out"
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*.png")) == [
        f"{i:05d}/samples/{k:04d}.png" for i in range(2) for k in range(2)
    ]
    assert json.loads((root / "00001/metadata.jsonl").read_text())["prompt"] == "in/../the <b>dark"
    assert len((root / "manifest.jsonl").read_text().splitlines()) == 4
    before = {p: p.read_bytes() for p in root.rglob("*.png")}
    next(iter(before)).unlink()  # an interrupted run is completed, with the same picture
    generate.main(cfg)
    assert {p: p.read_bytes() for p in root.rglob("*.png")} == before
    assert "1 pictures made, 3 were there already" in capsys.readouterr().out


def test_a_setting_that_is_null_is_the_same_setting_next_time(tmp_path):
    made = []

    def sample_batch(prompts, keys):
        made.extend(keys)
        return [Image.new("RGB", (4, 4))] * len(prompts), [""] * len(prompts)

    rows, settings = [{"id": "0", "prompt": "a star"}], {"seed": 1, "cfg_weight": None}
    for _ in range(2):
        write_pictures(rows, sample_batch, settings, tmp_path, 2, 8)
    assert made == [(1, 0, 0, 0), (1, 0, 0, 1)]


def test_pictures_of_another_prompt_are_never_taken_for_this_one(tmp_path, capsys):
    for prompt in ("a red circle", "a blue star"):
        generate.main(generate.Config(prompt=prompt, num_images=1, output_dir=str(tmp_path)))
    assert "1 pictures made, 0 were there already" in capsys.readouterr().out.splitlines()[-1]
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["prompt"] == "a blue star"


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit):
        generate.load_policy(str(tmp_path))
    assert "'llama'" in capsys.readouterr().err
