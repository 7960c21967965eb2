"""The policy: what is sampled is what is scored, and a picture depends on its own key alone."""

import copy
import dataclasses
import json
import shutil
import types

import pytest
import torch
import tyro
from PIL import Image

import generate
from training import sharding
from training.files import ROOT
from training.pictures import write_pictures
from training.policy import trainable

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
            generate.logprobs(policy, rollouts, 1.0),
            generate.logprobs(policy, rollouts[1:2], 1.0),
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


# --- what the model reads -----------------------------------------------------------------------


def test_the_contexts_are_the_chat_template_with_the_prompt_and_the_thought(policy):
    """The shorter text is padded on the left; padding is masked."""
    decode = lambda ids, mask: [policy.tokenizer.decode(row[m]) for row, m in zip(ids, mask)]
    prompts = ["a red circle", "three blue crosses above"]
    ids, mask = generate.thought_context(policy, prompts)
    turn = "<bos><|User|>: {}\n<|Assistant|>:"
    assert decode(ids, mask) == [turn.format(f"plan {prompt}") for prompt in prompts]
    assert mask.dtype == torch.bool and mask.shape == ids.shape and mask[1].all()
    assert mask[0].tolist() == [False] * 3 + [True] * 11 and (ids[0, :3] == 0).all()
    ids, mask = generate.image_context(policy, prompts, ["red, left", ""])
    texts = ["a red circle. red, left", "three blue crosses above"]
    assert decode(ids, mask) == [turn.format(text) + "<begin_of_image>" for text in texts]


def test_padding_is_on_the_left_whatever_the_tokenizer_prefers(policy, monkeypatch):
    expected = generate.tokenize(policy, ["a red circle", "a star"])
    monkeypatch.setattr(policy.tokenizer, "padding_side", "right")
    got = generate.tokenize(policy, ["a red circle", "a star"])
    assert torch.equal(got[0], expected[0]) and got[1].tolist()[1] == [False] + [True] * 3


def test_the_unguided_branch_knows_nothing_of_the_words(policy):
    ids, _ = generate.image_context(policy, ["a red circle", "a blue square"], ["", ""])
    blank = generate.unconditional_ids(policy, ids)
    assert not torch.equal(ids[0], ids[1]) and torch.equal(blank[0], blank[1])
    assert blank[0, 0] == policy.tokenizer.bos_token_id and blank[0, -1] == policy.boi


def test_with_guidance_each_context_comes_with_its_words_and_without(policy):
    ids, mask = generate.image_context(policy, ["a red circle", "x"], ["", ""])
    assert generate.add_unconditional(policy, ids, mask, 1) == (ids, mask)
    both, both_masks = generate.add_unconditional(policy, ids, mask, 2.0)
    assert torch.equal(both[:2], ids) and torch.equal(both_masks, torch.cat([mask, mask]))
    kept = (ids == policy.tokenizer.bos_token_id) | (ids == policy.boi)
    assert torch.equal(both[2:], torch.where(kept, ids, policy.tokenizer.pad_token_id))
    assert kept.sum() == 4


def test_a_checkpoint_without_a_guidance_weight_gets_that_of_janus():
    def weight(value):
        settings = types.SimpleNamespace(guidance_scale=value)
        model = types.SimpleNamespace(generation_config=settings)
        return generate.default_cfg_weight(types.SimpleNamespace(model=model))

    assert weight(None) == 5 and weight(1.5) == 1.5


def test_a_token_sees_the_real_tokens_up_to_itself_and_padding_sees_itself():
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    got = generate.causal_mask(mask)
    assert got.shape == (2, 1, 4, 4) and got.dtype == torch.bool
    for n in range(2):
        for i in range(4):
            for j in range(4):
                assert got[n, 0, i, j].item() == (i == j or (j < i and mask[n, j].item()))


# --- sampling -----------------------------------------------------------------------------------


def naive_sample(policy, prompt, key, max_thought, cfg_weight):
    """One rollout by a full forward pass for each token: (thought ids, picture ids). Token t is
    the first one at which the cumulative probability exceeds the t-th random number of the key."""
    numbers = generate.uniform_numbers([key], max_thought + policy.grid**2)[0].tolist()
    model, embed_text = policy.model, policy.embed_text

    def hidden(x):
        return policy.language_model(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1]

    def choose(logits, number):
        cumulative = logits[0].softmax(-1).cumsum(-1)
        return int((cumulative > number * cumulative[-1]).nonzero()[0])

    words, context = [], generate.thought_context(policy, [prompt])[0]
    while len(words) < max_thought and policy.tokenizer.eos_token_id not in words:
        ids = torch.cat([context, torch.tensor([words], dtype=torch.long)], 1)
        words.append(choose(model.lm_head(hidden(embed_text(ids))), numbers[len(words)]))
    thought = policy.tokenizer.decode(words, skip_special_tokens=True).strip()
    ids, tokens = generate.image_context(policy, [prompt], [thought])[0], []
    ids = torch.cat([ids, generate.unconditional_ids(policy, ids)])
    for number in numbers[max_thought:]:
        drawn = torch.tensor([tokens] * 2, dtype=torch.long)
        drawn = model.prepare_embeddings_for_image_generation(drawn)
        c, u = model.model.generation_head(hidden(torch.cat([embed_text(ids), drawn], 1)))
        tokens.append(choose((u + cfg_weight * (c - u))[None], number))
    return words, tokens


@torch.no_grad()
@pytest.mark.parametrize("max_thought", [40, 3])
def test_a_rollout_is_the_one_that_its_random_numbers_select(policy, max_thought):
    prompts = ["a red circle", "a yellow star above a purple square"]
    keys = [(9, 0, 0, 0), (9, 0, 1, 0)]
    got = generate.sample(policy, prompts, keys, cfg_weight=2.0, max_thought=max_thought)
    for n in range(2):
        words, tokens = naive_sample(policy, prompts[n], keys[n], max_thought, 2.0)
        assert got.thought_ids[n][got.thought_mask[n]].tolist() == words
        assert got.image_ids[n].tolist() == tokens
        assert got.thoughts[n] == policy.tokenizer.decode(words, skip_special_tokens=True).strip()
    assert got.keys == keys and got.prompts == prompts
    longest = got.thought_mask.sum(1).max()  # sampling stops when every thought has ended
    assert got.thought_ids.shape == got.thought_mask.shape == (2, longest)
    assert (got.thought_ids[~got.thought_mask] == policy.tokenizer.pad_token_id).all()


def test_by_default_there_is_a_thought_of_at_most_64_tokens_and_the_checkpoints_guidance(policy):
    default = generate.sample(policy, PROMPTS, KEYS)
    spelled_out = generate.sample(policy, PROMPTS, KEYS, True, 1.0, 64)
    assert torch.equal(default.image_ids, spelled_out.image_ids)
    guided = copy.deepcopy(policy)
    guided.model.generation_config.guidance_scale = 3.0
    expected = generate.sample(policy, PROMPTS[:2], KEYS[:2], cfg_weight=3.0)
    assert torch.equal(generate.sample(guided, PROMPTS[:2], KEYS[:2]).image_ids, expected.image_ids)


def test_the_random_numbers_of_a_pipeline_are_those_of_the_key():
    """SHA-256 of the key's text, its first seven bytes as the seed."""
    seed = int("79ea720bb510db", 16)  # printf '(42, 0, 5, 1)' | sha256sum | head -c 14
    expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    got = torch.rand(3, generator=generate.seeded_generator([42, 0, 5, 1]))
    assert torch.equal(got, expected)


def test_a_number_just_below_one_draws_the_last_token_that_has_probability():
    logits = torch.zeros(1, 5)
    assert generate.sample_inverse_cdf(logits, torch.tensor([1 - 2**-24])).tolist() == [4]
    assert generate.sample_inverse_cdf(logits, torch.tensor([1.0])).tolist() == [4]  # of bfloat16
    assert generate.sample_inverse_cdf(logits, torch.tensor([0.2])).tolist() == [1]  # [.2, .4)


def test_keys_and_values_stay_where_they_are_written():
    """Three tokens of context, then one more; attention gets what lies before `end`."""
    cache = generate.KeyValueCache(3, 2, "cpu")
    first = torch.arange(6.0).view(1, 1, 3, 2)
    keys, values = cache.update(first, -first, 0)
    assert torch.equal(keys, first) and torch.equal(values, -first)
    cache.at, cache.end = torch.tensor([3]), 5
    new = torch.full((1, 1, 1, 2), 9.0)
    keys, values = cache.update(new, -new, 0)
    assert keys[0, 0].tolist() == [[0, 1], [2, 3], [4, 5], [9, 9], [0, 0]]
    assert torch.equal(values, -keys)
    other, _ = cache.update(new, new, 1)  # another layer
    assert other[0, 0].tolist() == [[0, 0]] * 3 + [[9, 9], [0, 0]]


def test_pixels_are_rounded_clipped_and_decoded_sixteen_at_a_time():
    """The decoder's -1 is 0 and its 1 is 255; channels come first there and last in a picture."""
    sizes = []

    def decode(ids):
        sizes.append(ids.shape)
        return ids.float()[:, None, :, None] + torch.tensor([0.0, 0.5, 3.0])[:, None, None]

    model = types.SimpleNamespace(vqmodel=types.SimpleNamespace(decode=decode))
    policy = types.SimpleNamespace(model=types.SimpleNamespace(model=model))
    policy.device = torch.device("cpu")
    ids = torch.zeros(17, 2, dtype=torch.long)
    ids[16, 1] = -1
    images = generate.to_images(policy, ids)
    assert sizes == [(16, 2)] * 2 and len(images) == 17 and images[0].size == (1, 2)
    # 127.5 (0 + 1) is 127.5, to the even 128; 127.5 * 1.5 = 191.25; above 1 is white
    assert images[0].getpixel((0, 0)) == images[16].getpixel((0, 0)) == (128, 191, 255)
    assert images[16].getpixel((0, 1)) == (0, 64, 255)  # 0, 63.75, 382.5


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


def test_we_draw_what_transformers_draws(policy, monkeypatch):
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


# --- log-probabilities --------------------------------------------------------------------------


def test_log_probabilities_are_float32_even_of_bfloat16_logits():
    logits = torch.tensor([[[8.0, 7.0, 1.0]]]).bfloat16()
    got = generate.gather_logprobs(logits, torch.tensor([[1]]))
    # 7 - log(e^8 + e^7 + e^1) = -1 - log(1 + e^-1 + e^-7)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(-1.313928, abs=1e-5)


def test_the_image_head_computes_in_float32_whatever_the_rest_does(policy):
    """In training on a GPU, too: its frozen matrices are not rounded to bfloat16."""
    rounded = dataclasses.replace(copy.deepcopy(policy), dtype=torch.bfloat16)
    rounded.model.model.generation_head.requires_grad_(False)
    sharding.cast_frozen_weights(rounded)
    width = policy.model.config.text_config.hidden_size
    hidden = torch.randn(4, 3, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = generate.apply_cfg(policy.model.model.generation_head(hidden.float()), 5.0)
    with rounded.autocast():
        got = generate.image_logits(rounded, hidden, 5.0)
        coarse = generate.apply_cfg(rounded.model.model.generation_head(hidden).float(), 5.0)
    assert torch.equal(got, expected) and (coarse - expected).abs().max() > 1e-2


def test_guidance_multiplies_the_rounding_of_bfloat16_and_less_with_an_exact_head(
    policy, monkeypatch
):
    """The KL between two policies whose weights differ by 1e-6, at guidance weight 5: hardly any.
    In bfloat16 it seems to be a tenth of a nat, and half as much if the image head is exact."""
    prompts = ["a red circle", "two blue stars"] * 4
    rollouts = generate.sample(policy, prompts, [(1, 0, i, 0) for i in range(8)], cfg_weight=5.0)

    def kl(dtype):
        pair, generator = [], torch.Generator().manual_seed(0)
        for size in (0.0, 1e-6):
            moved = dataclasses.replace(copy.deepcopy(policy), dtype=dtype)
            with torch.no_grad():
                for p in trainable(moved):
                    p.add_(size * torch.randn(p.shape, generator=generator).sign())
                pair.append(generate.logprobs(moved, rollouts, 5.0)[:, -64:])
        d = pair[0] - pair[1]
        return (d.exp() - d - 1).sum(1).mean().item()

    exact, ours = kl(torch.float32), kl(torch.bfloat16)
    coarse = lambda policy, hidden, w: generate.apply_cfg(
        policy.model.model.generation_head(hidden).float(), w
    )
    monkeypatch.setattr(generate, "image_logits", coarse)
    assert exact < 1e-3 and 0.02 < ours < 0.8 * kl(torch.bfloat16) < 0.2, (exact, ours)


# --- checkpoints and prompt files ---------------------------------------------------------------


@pytest.mark.parametrize("image_head", [False, True])
def test_weights_are_float32_and_only_the_language_model_is_trained(image_head):
    """And the image head, if asked for."""
    loaded = generate.load_policy("tiny", dtype=torch.bfloat16, train_image_head=image_head)
    trained = ["model.language_model.", "lm_head."] + ["model.generation_head."] * image_head
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad == any(name.startswith(part) for part in trained)
    assert [id(p) for p in trainable(loaded)] == [
        id(p) for p in loaded.model.parameters() if p.requires_grad
    ]
    assert not loaded.model.training and loaded.dtype == torch.bfloat16
    default = generate.load_policy()
    assert loaded.reasoning == "plan {}" and default.dtype == torch.float32
    assert not any(p.requires_grad for p in default.model.model.generation_head.parameters())


def test_a_checkpoint_in_bfloat16_without_an_instruction_gets_float32_and_the_papers(tmp_path):
    for file in (ROOT / "tiny_world/checkpoints/policy").iterdir():
        if file.name not in ("reasoning.txt", "config.json"):
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((ROOT / "tiny_world/checkpoints/policy/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    loaded = generate.load_policy(str(tmp_path))
    expected = (ROOT / "prompts/reasoning.txt").read_text(encoding="utf-8").strip()
    assert loaded.reasoning == expected
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("where", ["/nowhere", "./nowhere", "tests"])
def test_a_folder_without_a_checkpoint_is_refused(where, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        generate.load_policy(where)
    assert stop.value.code == 2 and "no config.json" in capsys.readouterr().err


def test_the_checkpoint_in_deepseeks_own_format_is_named_with_the_right_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        generate.load_policy("deepseek-ai/Janus-Pro-1B")
    assert "deepseek-community/Janus-Pro-1B" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "layout, number", [("geneval", 4), ("t2i-compbench", 10), ("wise", 1), ("hpdv2", 1), ("dpg", 4)]
)
def test_the_number_of_pictures_is_that_of_the_layout(layout, number, monkeypatch, tmp_path):
    sampler = lambda prompts, keys: ([Image.new("RGB", (4, 4))] * len(prompts), [""] * len(prompts))
    monkeypatch.setattr(generate, "policy_sampler", lambda *_: (sampler, 1.0))
    flags = dict(layout=layout, output_dir=str(tmp_path / "out"))
    generate.main(generate.Config(prompt="a star", **flags))
    assert len(list((tmp_path / "out").rglob("*.png"))) == number
    generate.main(generate.Config(prompt="a sun", num_images=5, **flags))
    assert len(list((tmp_path / "out").rglob("*.png"))) == 5


def test_pictures_of_other_settings_or_weights_are_made_again(tmp_path, capsys):
    shutil.copytree(ROOT / "tiny_world/checkpoints/policy", tmp_path / "policy")

    def made(**changes):
        flags = dict(prompt="a star", num_images=1, output_dir=str(tmp_path / "out"))
        generate.main(generate.Config(model=str(tmp_path / "policy"), **flags | changes))
        return int(capsys.readouterr().out.splitlines()[-1].split()[0])

    assert (made(), made(), made(max_thought=40), made(max_thought=40)) == (1, 0, 1, 0)
    (tmp_path / "policy/reasoning.txt").write_text("{} plan")  # other weights would count alike
    assert made(max_thought=40) == 1


def test_padding_has_log_probability_zero_and_no_gradient(policy):
    """exp of it, in the loss, could be infinite; and infinity times 0 is NaN."""
    prompts = ["a red circle", "a yellow star above a purple square"]
    rollouts = generate.sample(policy, prompts, [(3, 0, n, 0) for n in range(2)])
    padding = ~rollouts.mask
    assert padding.any()
    both = generate.logprobs(policy, rollouts, 1.0, generate.with_entropies)
    assert both[padding].eq(0).all() and both[rollouts.mask].ne(0).any(1).all()
    scored = generate.logprobs(policy, rollouts, 1.0)
    weight = policy.language_model.layers[0].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(scored[padding].sum(), weight)
    assert gradient.eq(0).all()


@pytest.mark.parametrize(
    "flags, rule",
    [
        (["--batch-size", "0"], "must be 1 or more"),
        (["--max-thought", "0"], "must be 1 or more"),
        (["--max-thought", "-5"], "must be 1 or more"),
        (["--num-images", "0"], "must be 1 or more"),
        (["--limit", "-1"], "--limit -1"),
        (["--cfg-weight", "nan"], "--cfg-weight nan"),
        (["--layout", "dpg", "--num-images", "2"], "tiles four pictures"),
    ],
)
def test_numbers_that_draw_nothing_are_refused(flags, rule, tmp_path, capsys):
    args = ["a red circle", *flags, "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        generate.main(tyro.cli(generate.Config, args=args))
    assert rule in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit):
        generate.load_policy(str(tmp_path))
    assert "'llama'" in capsys.readouterr().err


def test_the_flags_of_the_command_reach_the_sampler():
    cfg = generate.Config(prompt="a red star", cot=False, cfg_weight=3.0, device="cpu")
    sampler, weight = generate.policy_sampler(cfg, "cpu", torch.float32)
    prompts, keys = ["a red star"], [(1, 0, 0, 0)]
    images, thoughts = sampler(prompts, keys)

    def draw(**flags):
        flags |= {"cot": False, "max_thought": cfg.max_thought}
        return generate.sample(generate.load_policy(), prompts, keys, **flags).images[0].tobytes()

    assert weight == 3 and thoughts == [""]
    assert images[0].tobytes() == draw(cfg_weight=3.0) != draw()
