"""GRPO: the mathematics in groups small enough to check by hand, then whole runs."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

import generate
import grpo
from evaluation import hacking
from evaluation import pages as report
from studies import explain
from training import files, harness

ROOT = Path(grpo.__file__).parent
NAN = float("nan")


# --- advantages


def test_an_advantage_is_a_z_score_within_the_group():
    advantages = grpo.group_advantages(torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 40.0]), 3)
    assert torch.allclose(
        advantages, torch.tensor([-1.0, 0, 1, -0.57735, -0.57735, 1.1547]), atol=1e-3
    )


@pytest.mark.parametrize("divide", ["group", "none", "global", "best"])
def test_a_unanimous_group_teaches_nothing(divide):
    for reward in (0.5, 0.7, 1.36):  # the mean of eight times 1.36 is not 1.36 in float32
        assert (grpo.group_advantages(torch.tensor([reward] * 8), 8, divide) == 0).all()


def test_a_failed_score_gets_no_advantage_and_does_not_move_the_others():
    with_failure = grpo.group_advantages(torch.tensor([1.0, NAN, 3.0, 2.0]), 4)
    assert with_failure[1] == 0
    assert torch.allclose(
        with_failure[[0, 2, 3]], grpo.group_advantages(torch.tensor([1.0, 3.0, 2.0]), 3)
    )


def test_a_group_with_at_most_one_score_teaches_nothing():
    assert (grpo.group_advantages(torch.tensor([NAN, 1.0, NAN, NAN]), 2) == 0).all()


def test_raft_imitates_the_best_of_each_group():
    rewards = torch.tensor([1.0, NAN, 3.0, 5.0, 5.0, 5.0])
    assert grpo.group_advantages(rewards, 3, "best").tolist() == [
        0,
        0,
        1,
        0,
        0,
        0,
    ]  # a unanimous group has no best


def test_dr_grpo_does_not_divide_and_flow_grpo_divides_by_the_whole_batch():
    rewards = torch.tensor([0.0, 2.0, 10.0, 10.2])
    assert torch.allclose(
        grpo.group_advantages(rewards, 2, "none"), torch.tensor([-1.0, 1.0, -0.1, 0.1]), atol=1e-5
    )
    by_batch = grpo.group_advantages(rewards, 2, "global")
    assert torch.allclose(
        by_batch, torch.tensor([-1.0, 1.0, -0.1, 0.1]) / (rewards.std() + 1e-4), atol=1e-5
    )


# --- loss


def test_kl_is_zero_when_policy_equals_reference_and_never_negative():
    logprobs = torch.randn(4, 5)
    assert (grpo.kl_k3(logprobs, logprobs) == 0).all()
    assert (grpo.kl_k3(logprobs, torch.randn(4, 5)) >= 0).all()


def test_k3_estimates_the_kl_without_bias():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    expected = (p * grpo.kl_k3(p.log(), q.log())).sum()  # over samples of the policy p
    assert expected == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)


def test_the_ratio_is_one_but_its_gradient_is_not_zero_on_the_first_update():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss = grpo.grpo_loss(
        logprobs,
        logprobs.detach(),
        logprobs.detach(),
        torch.tensor([3.0]),
        torch.ones(1, 2, dtype=torch.bool),
        0.0,
        0.2,
        0.2,
    )
    assert loss.tolist() == [[-3.0, -3.0]]
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[-3.0, -3.0]]  # REINFORCE: minus the advantage


@pytest.mark.parametrize(
    "ratio, advantage, pushes",
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, -1.0, False), (0.5, 1.0, True), (1.1, 1.0, True)],
)
def test_clipping_stops_who_has_gone_far_enough_and_nobody_else(ratio, advantage, pushes):
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    loss = grpo.grpo_loss(
        logprobs,
        torch.zeros(1, 1),
        torch.zeros(1, 1),
        torch.tensor([advantage]),
        torch.ones(1, 1, dtype=torch.bool),
        0.0,
        0.2,
        0.2,
    )
    loss.sum().backward()
    assert (logprobs.grad.item() != 0) == pushes


def test_padding_is_no_action():
    logprobs = torch.randn(1, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    grpo.grpo_loss(
        logprobs, logprobs.detach(), torch.zeros(1, 3), torch.ones(1), mask, 0.1, 0.2, 0.2
    ).sum().backward()
    assert logprobs.grad[0, 1] == 0 and logprobs.grad[0, 0] != 0


# --- one step of the real thing


def config(**changes):
    cfg = grpo.Config(
        rewards="hps",
        num_generations=4,
        prompts_per_step=2,
        max_thought=40,
        device="cpu",
        **changes,
    )
    harness.check(cfg, 1)
    return cfg


def step(cfg, policy, reference, learning_rate=0.0):
    rows = generate.load_prompts(cfg.prompts)
    jobs = [(i, k) for i in grpo.prompts_of_step(rows, 0, cfg) for k in range(4)]
    rollouts = grpo.rollout(policy, rows, jobs, 0, cfg)
    advantages = grpo.group_advantages(torch.arange(8.0) ** 2, 4)
    optimizer = torch.optim.SGD(grpo.trainable(policy), lr=learning_rate)
    metrics = grpo.update(
        policy, grpo.all_logprobs(reference, rollouts, cfg), optimizer, rollouts, advantages, cfg
    )
    gradients = [p.grad.flatten() for p in grpo.trainable(policy) if p.grad is not None]
    return metrics, torch.cat([torch.zeros(0), *gradients])


def test_micro_batches_do_not_change_the_gradient():
    grads = []
    for size in (8, 3):
        policy = generate.load_policy("tiny")
        grads.append(step(config(micro_batch=size, max_grad_norm=1e9), policy, policy)[1])
    assert torch.allclose(*grads, atol=1e-6) and grads[0].norm() > 0


def test_thought_and_picture_are_both_taught():
    policy = generate.load_policy("tiny")
    step(config(), policy, policy)
    assert policy.model.lm_head.weight.grad.norm() > 0  # only thoughts reach the text head
    policy = generate.load_policy("tiny")
    step(config(cot=False), policy, policy)
    assert policy.model.lm_head.weight.grad is None or policy.model.lm_head.weight.grad.norm() == 0


@pytest.mark.parametrize("guidance", ["guided", "cond", "none"])
def test_without_a_step_away_from_the_reference_the_kl_is_zero(guidance):
    policy = generate.load_policy("tiny")
    metrics, gradient = step(config(guidance=guidance, cfg_weight=2.0), policy, policy)
    assert (
        metrics["kl"] == pytest.approx(0, abs=1e-6)
        and metrics["clip_ratio"] == 0
        and gradient.isfinite().all()
    )


def test_a_second_update_on_the_same_rollouts_has_a_ratio_and_may_be_clipped():
    policy = generate.load_policy("tiny")
    reference = copy.deepcopy(policy)
    metrics, _ = step(
        config(updates_per_rollout=4, max_grad_norm=1e9), policy, reference, learning_rate=0.2
    )
    assert metrics["clip_ratio"] > 0


def test_a_step_whose_gradient_is_no_number_is_not_taken(monkeypatch):
    policy = generate.load_policy("tiny")
    before = [p.clone() for p in grpo.trainable(policy)]
    monkeypatch.setattr(grpo, "grpo_loss", lambda logprobs, *_: logprobs * NAN)
    metrics, _ = step(config(updates_per_rollout=2), policy, policy, learning_rate=1.0)
    assert metrics["skipped"] == 1 and all(
        (a == b).all() for a, b in zip(before, grpo.trainable(policy))
    )


def test_five_skipped_steps_in_a_row_end_the_run():
    state, metrics = {"skipped": 4}, {"failed": 0.0, "processes_agree": True}
    assert harness.what_is_wrong(metrics, state, {}, config()) == ""
    assert "gradients" in harness.what_is_wrong(metrics, state | {"skipped": 5}, {}, config())
    assert "different policies" in harness.what_is_wrong(
        metrics | {"processes_agree": False}, state, {}, config()
    )
    assert "no score" in harness.what_is_wrong({"failed": 0.9}, state, {}, config())


def test_a_rollout_that_does_not_fit_is_made_in_two_halves_and_is_the_same(policy, monkeypatch):
    cfg, rows = config(), generate.load_prompts(config().prompts)
    jobs = [(i, k) for i in range(3) for k in range(2)]
    whole, sample, sizes = grpo.rollout(policy, rows, jobs, 0, cfg), generate.sample, []

    def small_memory(policy, prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 4:
            raise torch.OutOfMemoryError("no room")
        return sample(policy, prompts, *args)

    monkeypatch.setattr(generate, "sample", small_memory)
    halves = grpo.rollout(policy, rows, jobs, 0, cfg)
    assert sizes == [6, 3, 3] and halves.thoughts == whole.thoughts
    assert torch.equal(halves.image_ids, whole.image_ids) and torch.equal(halves.mask, whole.mask)
    with pytest.raises(torch.OutOfMemoryError):  # once, and not down to nothing
        grpo.rollout(policy, rows, jobs * 2, 0, cfg)


def test_every_prompt_comes_once_an_epoch_in_an_order_that_only_the_seed_decides():
    rows, cfg = list(range(10)), config()
    cfg.prompts_per_step = 4
    seen = [i for s in range(5) for i in grpo.prompts_of_step(rows, s, cfg)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == rows and seen[:10] != seen[10:]
    assert seen == [i for s in range(5) for i in grpo.prompts_of_step(rows, s, cfg)]


def test_what_is_reported_elsewhere_is_what_is_logged(monkeypatch, tmp_path, capsys):
    import types

    seen = []
    stand_in = types.ModuleType("wandb")  # the real one wants an account
    stand_in.init = lambda **given: types.SimpleNamespace(
        log=lambda numbers: seen.append((given["name"], numbers))
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    harness.reporter(grpo.Config(report_to="wandb"), tmp_path / "run7")(3, {"kl": 0.5})
    assert seen == [("run7", {"kl": 0.5, "step": 3})]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    with pytest.raises(SystemExit):
        harness.reporter(grpo.Config(report_to="tensorboard"), tmp_path)
    assert "pip install tensorboard" in capsys.readouterr().err


# --- best of n


def test_best_of_n_is_the_expectation_over_all_draws():
    pool = [{"id": "x", "total": t, "gold": g} for t, g in ((3.0, 0.0), (2.0, 1.0), (1.0, 0.5))]
    value = [hacking.best_of_n(pool, n, lambda r: r["gold"]) for n in (1, 2, 3)]
    assert value == pytest.approx([0.5, (0 + 0 + 1) / 3, 0.0])  # pairs: {3,2}, {3,1}, {2,1}


# --- whole runs, as a user starts them

SMALL = [
    "--rewards",
    "hps,artifact,adversarial",
    "--num-generations",
    "2",
    "--prompts-per-step",
    "2",
    "--eval-images",
    "4",
    "--best-of",
    "2",
    "--eval-steps",
    "2",
    "--save-steps",
    "2",
    "--max-thought",
    "40",
    "--learning-rate",
    "1e-3",
    "--device",
    "cpu",
]


def start(args, processes=1, restarts=0, **environment):
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "--max-restarts",
            str(restarts),
        ]
    return subprocess.Popen(
        [*launcher, str(ROOT / "grpo.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err[-9000:]
    return out, err


def metrics_of(run):
    return [
        {k: v for k, v in line.items() if not k.startswith("seconds/")}
        for line in files.read_jsonl(run / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    finish(start([*SMALL, "--max-steps", "4", "--output-dir", str(root), "--run-name", "whole"]))
    return root / "whole"


def test_a_run_leaves_everything_a_person_looks_at(whole_run):
    for name in (
        "config.json",
        "metrics.jsonl",
        "test.jsonl",
        "best_of_n.jsonl",
        "hacking.png",
        "training.png",
        "report.html",
        "rollouts/step_000003.jsonl",
        "samples/step_000004.png",
        "checkpoints/step-000004/model.safetensors",
    ):
        assert (whole_run / name).stat().st_size > 0, name
    record = files.read_jsonl(whole_run / "rollouts/step_000000.jsonl")[0]
    assert {
        "prompt",
        "thought",
        "hps",
        "artifact",
        "gold",
        "gold-clean",
        "total",
        "advantage",
    } <= record.keys()
    assert not list(whole_run.rglob("*.partial"))


def test_a_step_can_be_told_number_by_number(tmp_path, capsys):
    cfg = grpo.Config(
        rewards="hps",
        num_generations=4,
        max_thought=40,
        device="cpu",
        explain=True,
        output_dir=str(tmp_path),
    )
    grpo.main(cfg)
    said = capsys.readouterr().out
    assert (
        all(f"\n{number}. " in "\n" + said for number in range(1, 8))
        and "picture tokens (4, 64)" in said
    )
    assert (tmp_path / "explain.html").read_text().count("data:image/png") == 4
    assert (
        float(re.search(r"two columns is ([+-]\d\.\d+)", said)[1]) > 0.5
    )  # better pictures became likelier


def test_one_group_is_drawn_before_and_after(whole_run, tmp_path):
    cfg = explain.Config(runs=(str(whole_run),), pictures=3, figure=str(tmp_path / "group.png"))
    title, group = explain.group_row(
        "x", str(files.checkpoints(whole_run)[-1]), {"hps": 1.0}, "sum", cfg
    )
    assert [a for _, _, a in group] == sorted((a for _, _, a in group), reverse=True)
    assert [s["hps"] for _, s, _ in group] == sorted((s["hps"] for _, s, _ in group), reverse=True)
    explain.group_figure([(title, group)], cfg)
    assert (tmp_path / "group.png").stat().st_size > 3000


def test_the_learning_rate_falls_linearly_to_zero(whole_run):
    rates = [line["learning_rate"] for line in metrics_of(whole_run)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_the_report_escapes_what_people_write():
    assert report.table([{"prompt": "<script>alert(1)</script>"}]).count("<script>") == 0


def test_a_checkpoint_opens_with_from_pretrained_and_has_moved(whole_run, policy):
    from transformers import JanusForConditionalGeneration

    trained = JanusForConditionalGeneration.from_pretrained(whole_run / "checkpoints/step-000004")
    moved = {
        name
        for (name, a), b in zip(trained.named_parameters(), policy.model.parameters())
        if not torch.equal(a, b)
    }
    assert moved == {name for name, p in policy.model.named_parameters() if p.requires_grad}


def test_a_killed_run_resumes_as_if_nothing_had_happened(whole_run, tmp_path):
    args = [
        *SMALL,
        "--max-steps",
        "4",
        "--output-dir",
        str(tmp_path),
        "--run-name",
        "killed",
        "--resume",
        "latest",
    ]
    process = start(args)
    log = tmp_path / "killed/metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(
        signal.SIGKILL
    )  # after the third step: the checkpoint of the second is the last
    process.communicate()
    with open(log, "a") as file:
        file.write('{"step": 3, "half a li')
    finish(start(args))
    assert metrics_of(tmp_path / "killed") == metrics_of(whole_run)
    assert files.read_jsonl(tmp_path / "killed/test.jsonl") == files.read_jsonl(
        whole_run / "test.jsonl"
    )


def test_a_run_that_goes_on_keeps_its_flags(whole_run, capsys):
    args = [*SMALL, "--max-steps", "6", "--resume", str(whole_run), "--learning-rate", "0.5"]
    with pytest.raises(SystemExit) as stop:
        grpo.main(tyro.cli(grpo.Config, args=args))
    assert stop.value.code == 2 and "was started with --learning-rate" in capsys.readouterr().err


def test_sigterm_ends_with_a_checkpoint_and_a_second_run_in_the_same_folder_is_refused(tmp_path):
    where = ["--output-dir", str(tmp_path), "--run-name", "long"]
    process = start([*SMALL, "--max-steps", "1000", *where, "--save-steps", "1000"])
    log = tmp_path / "long/metrics.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.05)
    with pytest.raises(SystemExit):
        files.lock(tmp_path / "long")
    started = time.monotonic()
    process.terminate()
    _, err = finish(process, 143)
    assert time.monotonic() - started < 30 and "asked to stop" in err
    assert len(files.checkpoints(tmp_path / "long")) == 1
    files.lock(tmp_path / "long").close()  # and the folder is free again


def test_a_kill_while_saving_leaves_the_checkpoint_before_it_whole(
    whole_run, monkeypatch, policy, tmp_path
):
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(files.checkpoints(whole_run)[-1], tmp_path / "checkpoints" / "step-000004")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        torch, "save", killed
    )  # the policy's files are written, the optimizer's are not
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint(tmp_path, {"step": 5}, policy, None, {"optimizer": {}}, keep=2)
    assert [folder.name for folder in files.checkpoints(tmp_path)] == ["step-000004"]
    generate.load_policy(str(files.checkpoints(tmp_path)[-1]))


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["whole", "sharded"])
def test_two_processes_learn_what_one_does_and_one_goes_on_where_two_stopped(
    how, whole_run, tmp_path
):
    where = [*SMALL, "--output-dir", str(tmp_path), "--run-name", "two"]
    finish(start([*where, "--max-steps", "1", *how], processes=2))
    one, two = metrics_of(whole_run)[0], metrics_of(tmp_path / "two")[0]
    assert two == pytest.approx(one, abs=1e-5)
    by_key = [
        {(r["id"], r["sample"]): r for r in files.read_jsonl(run / "rollouts/step_000000.jsonl")}
        for run in (whole_run, tmp_path / "two")
    ]
    for key, record in by_key[0].items():  # the same rollouts, whoever made them
        assert record["thought"] == by_key[1][key]["thought"] and record["hps"] == pytest.approx(
            by_key[1][key]["hps"], abs=1e-5
        )
    finish(start([*where, "--max-steps", "2", "--resume", "latest"]))
    assert [line["step"] for line in metrics_of(tmp_path / "two")] == [0, 1]
    for name in ("reward/hps", "kl", "adversarial/margin"):
        assert metrics_of(tmp_path / "two")[1][name] == pytest.approx(
            metrics_of(whole_run)[1][name], abs=1e-3
        )


@pytest.mark.slow
def test_a_dead_process_ends_the_others_and_torchrun_goes_on_from_the_checkpoint(tmp_path):
    where = [
        *SMALL,
        "--output-dir",
        str(tmp_path),
        "--run-name",
        "mortal",
        "--save-steps",
        "1",
        "--resume",
        "latest",
    ]
    # Three restarts, as in the README's recipe: now and then gloo does not find its peer again at the first attempt.
    process = start([*where, "--max-steps", "5"], processes=2, restarts=3)
    log = tmp_path / "mortal/metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and process.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    finish(process)
    assert [line["step"] for line in metrics_of(tmp_path / "mortal")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "args, rule",
    [
        (["--rewards", "hsp"], "unknown reward 'hsp'"),
        (["--rewards", "hps:much"], "no number"),
        (["--num-generations", "1"], "a group of one"),
        (["--rewards", "gold"], "cannot be believed"),
        (["--prompts", "/nowhere"], "no such file"),
        (["--max-steps", "0"], "greater than 0"),
        (["--resume", "/nowhere"], "no checkpoints"),
        (["--combine", "constrained", "--rewards", "hps"], "needs two rewards"),
        (["--eval-rewards", "adversarial", "--rewards", "hps"], "unless it learns"),
        (["--rewards", "hps,adversarial@http://127.0.0.1:8100"], "leave the address out"),
        (["--prompts-per-step", "600"], "would be copies"),
        (["--references", "/nowhere", "--rewards", "adversarial"], "manifest.jsonl"),
    ],
)
def test_bad_usage_is_one_clear_line_before_anything_is_loaded(args, rule, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        grpo.main(tyro.cli(grpo.Config, args=[*args, "--output-dir", str(tmp_path / "runs")]))
    assert stop.value.code == 2 and rule in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
