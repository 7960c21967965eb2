"""Whole runs of grpo.py, as a user starts them. The mathematics is in test_method.py."""

import contextlib
import http.server
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import tyro

import generate
import grpo
from reward_models import serving
from reward_models.image_statistics import Jpeg
from training import checks, cures, files, log, processes, run_folder, stopping, trackers
from training.files import ROOT
from training.policy import trainable
from training.prompts import load_prompts
from training.records import read_jsonl, write_jsonl

SMALL = (
    "--rewards hps,artifact,adversarial --num-generations 2 --prompts-per-step 2 --eval-images 4 "
    "--best-of 2 --eval-steps 2 --save-steps 2 --max-thought 40 --learning-rate 1e-3 "
    "--warmup-ratio 0 --device cpu"
).split()


def start(args, processes=1, restarts=0, **options):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [*launcher, str(ROOT / "grpo.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err[-9000:]
    return out, err


def workers(launcher):
    """The process numbers that a torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def wait_for_lines(path, n, process):
    while not (path.exists() and len(path.read_text().splitlines()) >= n):
        assert process.poll() is None, process.communicate()[1][-9000:]
        time.sleep(0.05)


def metrics_of(run):
    lines = read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in lines]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    finish(start([*SMALL, "--max-steps", "4", "--output-dir", str(root), "--run-name", "whole"]))
    return root / "whole"


def test_a_run_leaves_everything_a_person_looks_at(whole_run):
    for name in (
        "config.json metrics.jsonl test.jsonl best_of_n.jsonl hacking.png training.png report.html "
        "rollouts/step_000003.jsonl samples/step_000004.png "
        "checkpoints/step-000004/model.safetensors checkpoints/step-000004/README.md"
    ).split():
        assert (whole_run / name).stat().st_size > 0, name
    config = json.loads((whole_run / "config.json").read_text())
    assert all(config[name] for name in ("date", "commit", "hardware", "command", "torch"))
    record = read_jsonl(whole_run / "rollouts/step_000000.jsonl")[0]
    names = "step prompt thought hps artifact gold gold-clean total advantage".split()
    assert set(names) <= record.keys()
    assert not list(whole_run.rglob("*.partial"))


def test_the_optimizer_is_adamw_as_documented(whole_run):
    """The settings that were used, read from the checkpoint: betas, epsilon, no weight decay."""
    path = whole_run / "checkpoints/step-000004/optimizer.pt"
    state = torch.load(path, weights_only=True)
    (group,) = state["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.99) and group["weight_decay"] == 0
    assert group["eps"] == 1e-8 and group["lr"] == pytest.approx(0.25e-3)  # the fourth step's
    moments = state["state"]["model.language_model.layers.0.mlp.up_proj.weight"]
    assert moments["step"] == 4 and moments["exp_avg"].abs().sum() > 0


def test_the_learning_rate_falls_linearly_to_zero(whole_run):
    rates = [line["learning_rate"] for line in metrics_of(whole_run)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_the_advantages_of_a_run_are_those_of_its_totals(whole_run):
    for path in sorted((whole_run / "rollouts").glob("*.jsonl")):
        records = read_jsonl(path)
        totals = [r["hps"] + r["artifact"] + r["adversarial"] for r in records]
        assert [r["total"] for r in records] == pytest.approx(totals, abs=1e-5)
        for first, second in (records[:2], records[2:]):  # groups of two
            gap = first["total"] - second["total"]
            expected = (gap / 2) / (abs(gap) / 2**0.5 + 1e-4)
            assert first["advantage"] == pytest.approx(expected, abs=1e-3)
            assert second["advantage"] == pytest.approx(-expected, abs=1e-3)


def test_a_checkpoint_opens_with_from_pretrained_and_has_moved(whole_run, policy):
    from transformers import JanusForConditionalGeneration

    folder = whole_run / "checkpoints/step-000004"
    trained = JanusForConditionalGeneration.from_pretrained(folder)
    pairs = zip(trained.named_parameters(), policy.model.parameters())
    moved = {name for (name, a), b in pairs if not torch.equal(a, b)}
    again = generate.load_policy(str(whole_run)).model.state_dict()  # a run: its last checkpoint
    assert all(torch.equal(again[name], p) for name, p in trained.named_parameters())
    assert moved == {name for name, p in policy.model.named_parameters() if p.requires_grad}


def test_a_killed_run_resumes_as_if_nothing_had_happened(whole_run, tmp_path):
    where = ["--output-dir", str(tmp_path), "--run-name", "killed", "--resume", "latest"]
    args = [*SMALL, "--max-steps", "4", *where]
    process, metrics = start(args), tmp_path / "killed/metrics.jsonl"
    wait_for_lines(metrics, 3, process)
    process.send_signal(signal.SIGKILL)  # after the third step: the last checkpoint is the second's
    process.communicate()
    with open(metrics, "a") as file:
        file.write('{"step": 3, "half a li')
    finish(start(args))
    assert metrics_of(tmp_path / "killed") == metrics_of(whole_run)
    tests = [read_jsonl(run / "test.jsonl") for run in (tmp_path / "killed", whole_run)]
    assert tests[0] == tests[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_a_run_resumes_as_if_nothing_had_happened(
    processes, whole_run, tmp_path
):
    """Ten random moments: while it loads, samples, scores, learns, tests, saves or draws."""
    rng, began = random.Random(processes), time.monotonic()
    base = [*SMALL, "--max-steps", "4", "--resume", "latest"]
    finish(start([*base, "--output-dir", str(tmp_path / "timed")], processes))
    duration = time.monotonic() - began
    for number in range(10):
        args = [*base, "--output-dir", str(tmp_path / str(number)), "--run-name", "run"]
        process = start(args, processes)
        time.sleep(rng.uniform(0.2, 1) * duration)
        for victim in (process.pid, *workers(process)):
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=240)
        finish(start(args, processes))
        # Before its first checkpoint a run has nothing to resume from: the next takes a new name.
        run = max((tmp_path / str(number)).glob("run*"), key=lambda path: path.name)
        expected = metrics_of(whole_run)
        for got, known in zip(metrics_of(run), expected, strict=True):
            assert got == (known if processes == 1 else pytest.approx(known, rel=1e-4, abs=1e-5))
        assert [row["step"] for row in read_jsonl(run / "test.jsonl")] == [0, 2, 4]
        assert not list(run.rglob("*.partial"))


def test_a_resumed_run_keeps_its_flags(whole_run, capsys):
    args = [*SMALL, "--max-steps", "6", "--resume", str(whole_run), "--learning-rate", "0.5"]
    with pytest.raises(SystemExit) as stop:
        grpo.main(tyro.cli(grpo.Config, args=args))
    assert stop.value.code == 2 and "was started with --learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_and_a_second_run_in_the_same_folder_is_refused(
    number, tmp_path
):
    where = ["--output-dir", str(tmp_path), "--run-name", "long", "--save-steps", "1000"]
    process = start([*SMALL, "--max-steps", "1000", *where])
    wait_for_lines(tmp_path / "long/metrics.jsonl", 1, process)
    with pytest.raises(SystemExit):
        files.lock(tmp_path / "long", "--run-name")
    started = time.monotonic()
    process.send_signal(number)
    _, err = finish(process, 128 + number)
    (saved,) = run_folder.checkpoints(tmp_path / "long")
    assert time.monotonic() - started < 30 and f"asked to stop; saved {saved}" in err
    assert "Traceback" not in err
    files.lock(tmp_path / "long", "--run-name").close()  # the folder is free again


def limited(kilobytes, command):
    """A process whose files cannot grow beyond this size: as on a full disk, a write fails."""
    script = f"ulimit -f {kilobytes}; exec " + shlex.join(map(str, command))
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=240)
    process = subprocess.run(["bash", "-c", script], **options)
    assert "Traceback" not in process.stderr
    return process


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line_and_leaves_nothing(tmp_path):
    where = ["--output-dir", tmp_path, "--run-name", "full", "--max-steps", "2"]
    process = limited(500, [sys.executable, "grpo.py", *SMALL, *where])
    assert process.returncode == 3
    assert f"error: {tmp_path}/full/checkpoints/step-000002 cannot be saved" in process.stderr
    assert not list((tmp_path / "full/checkpoints").iterdir())
    assert len(metrics_of(tmp_path / "full")) == 2


def test_a_file_that_cannot_be_written_is_named_in_one_line(tmp_path):
    code = "import sys; from training.files import atomic\n"
    code += "with atomic(sys.argv[1]) as file:\n    file.write('a' * 9000)"
    process = limited(1, [sys.executable, "-c", code, tmp_path / "a.txt"])
    assert process.returncode == 1 and not list(tmp_path.iterdir())
    assert process.stderr.startswith(f"error: {tmp_path}/a.txt: File too large; free some space")


@pytest.mark.parametrize("where", ["/dev/null/x", "y" * 300])
def test_a_place_that_cannot_be_written_is_one_line(where):
    code = f"from training.files import atomic\nwith atomic({where!r}) as file: pass"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "name another" in run.stderr


def test_a_name_that_is_no_utf_8_can_be_printed():
    code = "import training.files; print('\\udce9')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_that_waits_for_a_silent_server(tmp_path):
    asked = threading.Event()

    class Silent(serving.ServedReward):
        reward, name = Jpeg(), "jpeg"

        def do_POST(self):
            asked.set()
            time.sleep(60)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served = f"jpeg@http://127.0.0.1:{server.server_port}"
    process = start([*SMALL, "--rewards", f"hps,{served}", "--output-dir", str(tmp_path)])
    assert asked.wait(60)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(10.5)
    assert process.wait(2) == 143
    server.shutdown()


def test_a_kill_while_saving_leaves_the_checkpoint_before_it_whole(
    whole_run, monkeypatch, policy, tmp_path
):
    shutil.copytree(whole_run / "checkpoints/step-000004", tmp_path / "checkpoints/step-000004")
    optimizer = torch.optim.AdamW(trainable(policy))
    rewards = types.SimpleNamespace(adversaries={}, multipliers={})
    run = run_folder.Run(tmp_path, policy, rewards, optimizer, cures.OFF, keep=2)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)  # the policy's files are there, the optimizer's not
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert [folder.name for folder in run_folder.checkpoints(tmp_path)] == ["step-000004"]
    generate.load_policy(str(run_folder.checkpoints(tmp_path)[-1]))


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["whole", "sharded"])
def test_two_processes_learn_what_one_does_and_one_resumes_where_two_stopped(
    how, whole_run, tmp_path
):
    where = [*SMALL, "--output-dir", str(tmp_path), "--run-name", "two"]
    finish(start([*where, "--max-steps", "1", *how], processes=2))
    one, two = metrics_of(whole_run)[0], metrics_of(tmp_path / "two")[0]
    assert two == pytest.approx(one, abs=1e-5)
    by_key = [
        {(r["id"], r["sample"]): r for r in read_jsonl(run / "rollouts/step_000000.jsonl")}
        for run in (whole_run, tmp_path / "two")
    ]
    for key, record in by_key[0].items():  # the same rollouts, whichever process made them
        assert record["thought"] == by_key[1][key]["thought"]
        assert record["hps"] == pytest.approx(by_key[1][key]["hps"], abs=1e-5)
    finish(start([*where, "--max-steps", "2", "--resume", "latest"]))
    resumed = metrics_of(tmp_path / "two")
    assert [line["step"] for line in resumed] == [0, 1]
    for name in ("reward/hps", "kl", "adversarial/margin"):
        assert resumed[1][name] == pytest.approx(metrics_of(whole_run)[1][name], abs=1e-3)


@pytest.mark.parametrize("processes", [2, 4], ids=["uneven", "more than prompts"])
def test_any_number_of_processes_learns_what_one_does(processes, tmp_path):
    """Three prompts: one process has two of them; of four processes, one has none and ends."""
    args = [*SMALL, "--rewards", "hps", "--prompts-per-step", "3", "--max-steps", "1"]
    args += ["--best-of", "0", "--advantage", "global", "--output-dir", str(tmp_path)]
    finish(start([*args, "--run-name", "one"]))
    out, _ = finish(start([*args, "--run-name", "many"], processes=processes))
    assert ("3 of 4 processes have a prompt" in out) == (processes == 4)
    one, many = metrics_of(tmp_path / "one")[0], metrics_of(tmp_path / "many")[0]
    assert many == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
def test_a_dead_process_ends_the_others_and_torchrun_restarts_from_the_checkpoint(tmp_path):
    where = ["--output-dir", str(tmp_path), "--run-name", "mortal", "--save-steps", "1"]
    # Three restarts, as in docs/gpus.md: sometimes gloo does not find its peer at the first try.
    args = [*SMALL, *where, "--resume", "latest", "--max-steps", "5"]
    process = start(args, processes=2, restarts=3)
    wait_for_lines(tmp_path / "mortal/metrics.jsonl", 2, process)
    os.kill(workers(process)[-1], signal.SIGKILL)
    finish(process)
    assert [line["step"] for line in metrics_of(tmp_path / "mortal")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("when", ["at the start", "in a step"])
def test_a_killed_launcher_leaves_no_process(when, tmp_path):
    """torchrun puts each process into a session of its own, so a kill of its group misses them."""
    where = ["--output-dir", str(tmp_path), "--run-name", "orphans", "--max-steps", "1000"]
    process = start([*SMALL, *where], processes=2)
    if when == "in a step":
        wait_for_lines(tmp_path / "orphans/metrics.jsonl", 1, process)
    while len(workers(process)) < 2:
        time.sleep(0.05)
    process.kill()
    _, err = process.communicate(timeout=120)  # until the last of them has closed the pipe
    assert "torchrun is gone; ending without saving" in err  # one may miss the other first
    files.lock(tmp_path / "orphans", "--run-name")


def test_a_process_of_a_group_ends_with_its_code_and_runs_what_libraries_registered():
    code = (
        "import atexit, threading, time; from training import processes; "
        "processes.start_processes('cpu'); atexit.register(print, 'registered'); "
        "threading.Thread(target=time.sleep, args=(600,)).start(); "  # late, as gloo's can be
        "processes.end_processes(7)"
    )
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **group},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (process.returncode, process.stdout) == (7, "registered\n"), process.stderr


# --- divergence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["10", "1e30"])
def test_a_run_that_diverges_ends_and_keeps_the_last_good_checkpoint(rate, tmp_path):
    where = ["--output-dir", str(tmp_path), "--run-name", "lost"]
    args = [*SMALL, "--rewards", "hps", "--save-steps", "1", *where]
    finish(start([*args, "--max-steps", "1"]))
    extended = ["--max-steps", "9", "--resume", "latest"]  # at a rate that check_same_run allows
    config = tmp_path / "lost/config.json"
    config.write_text(
        config.read_text().replace('"learning_rate": 0.001', f'"learning_rate": {rate}')
    )
    _, err = finish(start([*args, *extended, "--learning-rate", rate]), code=3)
    assert "the policy has diverged, and is not saved" in err and "lower --learning-rate" in err
    *_, good = run_folder.checkpoints(tmp_path / "lost")
    lost = int(re.search(r"step (\d+) has", err)[1])  # the policy that sampled this step
    assert int(good.name[5:]) < lost and f"{good} is from before it" in err
    policy = generate.load_policy(str(good))
    assert all(p.isfinite().all() for p in policy.model.parameters())
    names = {path.name for path in good.parent.iterdir()}
    assert names <= {"step-000001", good.name, f"step-{lost:06d}.diverged"}


# --- run folders --------------------------------------------------------------------------------


def make_checkpoint(run, step, saved):
    folder = run / f"checkpoints/step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    os.utime(folder, (saved, saved))
    return folder


def test_the_latest_run_is_the_unfinished_one_that_saved_last(tmp_path):
    make_checkpoint(tmp_path / "a", 50, saved=1)
    make_checkpoint(tmp_path / "a-2", 50, saved=2)
    make_checkpoint(tmp_path / "a-3", 100, saved=3)  # finished
    make_checkpoint(tmp_path / "ab", 10, saved=4)  # another name
    (tmp_path / "a-4").mkdir()  # no checkpoint
    assert run_folder.latest_run(tmp_path, "a", 100).name == "a-2"
    assert run_folder.latest_run(tmp_path, "a", 200).name == "a-3"  # to be extended
    assert run_folder.latest_run(tmp_path, "a", 50).name == "a-3"  # all are finished
    assert run_folder.latest_run(tmp_path, "c", 100) is None


def test_a_run_without_a_checkpoint_keeps_its_log_and_the_next_takes_another_name(
    tmp_path, config, capsys
):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.lock").touch()
    cfg = config(resume="latest", output_dir=str(tmp_path), run_name="a")
    # A lock alone is of a start that was refused: README's names stay free.
    assert run_folder.choose_folder(cfg) == (tmp_path / "a", False)
    assert "no checkpoint of a in" in capsys.readouterr().err
    (tmp_path / "a/config.json").touch()
    assert run_folder.choose_folder(cfg) == (tmp_path / "a-2", False)


def test_a_run_is_not_resumed_to_end_before_it_is(whole_run, config, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    cfg = config(resume=str(tmp_path / "run"), max_steps=3)
    with pytest.raises(SystemExit, match="2"):
        run_folder.open_run(cfg)
    assert "is at step 4 already" in capsys.readouterr().err


def test_a_resume_that_is_refused_removes_nothing(tmp_path, config, capsys):
    cfg = config(prompts=str(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_text("a red star\n")
    run_folder.begin_log(tmp_path, 0, cfg, {})
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": n} for n in range(4)])
    own = tmp_path / "rollouts/step_000003 (copy).jsonl"
    write_jsonl(own, [])
    write_jsonl(tmp_path / "rollouts/step_000003.jsonl", [])
    (tmp_path / "prompts.txt").write_text("a red sky\n")
    with pytest.raises(SystemExit, match="2"):
        run_folder.begin_log(tmp_path, 2, cfg, {})
    (tmp_path / "prompts.txt").write_text("a red star\n")
    (tmp_path / "test.jsonl").write_text('{"step": null}\n')  # found before anything is written
    with pytest.raises(SystemExit, match="2"):
        run_folder.begin_log(tmp_path, 2, cfg, {})
    assert "a line has no step" in capsys.readouterr().err
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4
    (tmp_path / "test.jsonl").unlink()
    run_folder.begin_log(tmp_path, 2, cfg, {})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2
    assert [file.name for file in (tmp_path / "rollouts").iterdir()] == [own.name]


def test_checkpoints_have_numbers_and_one_that_was_being_replaced_comes_back(tmp_path):
    kept = make_checkpoint(tmp_path, 2, saved=1)
    for name in ("step-best", "step-000001.bak"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert run_folder.checkpoints(tmp_path) == [kept]
    kept.rename(kept.with_name(".step-000002.old"))  # killed before the new one was in place
    assert run_folder.checkpoints(tmp_path) == [kept] and kept.is_dir()


def test_of_damaged_checkpoints_the_last_whole_one_is_taken_and_each_is_named(
    whole_run, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    whole, last = run_folder.checkpoints(run)
    assert run_folder.whole_checkpoint(run) == last
    for name in ("model.safetensors", "optimizer.pt", "state.json"):
        kept = (last / name).read_bytes()
        middle = len(kept) // 2
        for damaged in (kept[:middle], kept[:middle] + b"\0" * 9 + kept[middle + 9 :], b""):
            (last / name).write_bytes(damaged)
            assert run_folder.whole_checkpoint(run) == whole
            assert f"{last}: {name} is damaged" in capsys.readouterr().err
        (last / name).unlink()
        assert run_folder.whole_checkpoint(run) == whole
        (last / name).write_bytes(kept)
    assert run_folder.whole_checkpoint(run) == last
    for folder in (whole, last):
        (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit):
        run_folder.whole_checkpoint(run)
    assert "no whole checkpoint" in capsys.readouterr().err


# --- around the loop ----------------------------------------------------------------------------


def test_a_rollout_that_does_not_fit_is_sampled_in_halves_and_is_the_same(
    policy, config, monkeypatch
):
    cfg = config()
    rows, jobs = load_prompts(cfg.prompts), [(i, k) for i in range(3) for k in range(2)]
    whole, sample, sizes = grpo.rollout(policy, rows, jobs, 0, cfg), generate.sample, []

    def small_memory(policy, prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 4:
            raise torch.OutOfMemoryError("no room")
        return sample(policy, prompts, *args)

    monkeypatch.setattr(generate, "sample", small_memory)
    halves = grpo.rollout(policy, rows, jobs, 0, cfg)
    assert sizes == [6, 3, 3] and halves.thoughts == whole.thoughts and halves.keys == whole.keys
    assert torch.equal(halves.image_ids, whole.image_ids)
    assert torch.equal(halves.mask, whole.mask)
    sizes.clear()
    grpo.rollout(policy, rows, jobs * 2, 0, cfg)
    assert sizes == [12, 6, 3, 3, 6, 3, 3]  # until it fits


def test_a_test_that_does_not_fit_ends_the_run_with_advice(capsys):
    with pytest.raises(SystemExit, match="3"), stopping.rescued():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "--rollout-batch" in capsys.readouterr().err


def test_a_process_that_ends_alone_does_not_wait_for_its_group(monkeypatch):
    left = []
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: left.append(1))
    monkeypatch.setattr(processes.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(processes.os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="3"):
        processes.end_processes(3, alone=True)
    assert left == []
    with pytest.raises(SystemExit, match="0"):
        processes.end_processes(0)
    assert left == [1]


def test_a_large_rollout_is_sampled_in_batches_and_is_the_same(policy, config):
    rows, jobs = load_prompts(config().prompts), [(0, k) for k in range(5)]
    whole, parts = (grpo.rollout(policy, rows, jobs, 7, config(rollout_batch=n)) for n in (128, 2))
    assert parts.keys == whole.keys == [(42, 7, 0, k) for k in range(5)]
    assert torch.equal(parts.image_ids, whole.image_ids)


def test_what_ends_a_run():
    fine = {"processes_agree": 1}
    assert stopping.what_is_wrong(fine, 4) == ""
    assert "not finite" in stopping.what_is_wrong(fine, 5)
    assert "different policies" in stopping.what_is_wrong(fine | {"processes_agree": 0}, 0)


def test_a_step_whose_rollouts_have_no_scores_is_none():
    judge = types.SimpleNamespace(failures={"timeout": 3})
    rewards, nan = {"hps": None, "artifact": judge}, float("nan")
    scores = {"hps": torch.tensor([1.0, nan, 1, 1]), "artifact": torch.tensor([1.0, 1, nan, 1])}
    stopping.check_scores(scores, rewards, 0.5)  # two of four
    scores["gold"] = torch.full((4,), nan)  # it does not train
    stopping.check_scores(scores, rewards, 0.5)
    with pytest.raises(stopping.NoScores, match="50% of the rollouts had no score.*timeout"):
        stopping.check_scores(scores, rewards, 0.4)


def test_a_step_that_does_not_fit_into_memory_ends_after_a_checkpoint_with_advice(capsys):
    saved = []
    with (
        pytest.raises(SystemExit, match="3"),
        stopping.rescued(lambda: saved.append(1) or "step-1"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    err = capsys.readouterr().err
    assert saved == [1] and "lower --micro-batch" in err and "saved step-1" in err
    # Of several updates some may have been taken: the weights are no longer those before the step.
    with pytest.raises(SystemExit, match="3"), stopping.rescued(lambda: saved.append(2), updates=2):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert saved == [1] and "lower --micro-batch" in capsys.readouterr().err


def test_a_run_may_diverge_at_the_same_step_again(tmp_path, capsys):
    for _ in range(2):
        (tmp_path / "checkpoints/step-000002").mkdir(parents=True)
        (tmp_path / "checkpoints/step-000002/state.json").write_text("{}")
        with pytest.raises(SystemExit, match="3"):
            far = {"kl_per_token": 9.0, "kl": 999.0, "weights_finite": 1}
            stopping.stop_if_diverged(far, 2, tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000002.diverged"]


def test_a_shorter_second_life_leaves_nothing_of_the_first(whole_run, tmp_path):
    """A run that went to step 4 goes on from step 2: what was written after it is deleted."""
    run = tmp_path / "again"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoints/step-000004")
    (run / "rollouts/step_000009.jsonl").write_text("{}\n")
    rewards = {"hps": types.SimpleNamespace(identity="hps | hps 1")}
    config = json.loads((run / "config.json").read_text())
    config["inputs"] = {"hps": "hps | hps 1"}
    (run / "config.json").write_text(json.dumps(config))
    cfg = tyro.cli(grpo.Config, args=[*SMALL, "--max-steps", "4"])
    checks.fill_presets(cfg)
    run_folder.begin_log(run, 2, cfg, rewards)
    numbers = lambda place: sorted(p.stem for p in (run / place).glob("step_*"))
    assert numbers("rollouts") == ["step_000000", "step_000001"]
    assert numbers("tests") == numbers("samples") == ["step_000000", "step_000002"]
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [0, 1]
    assert [row["step"] for row in read_jsonl(run / "test.jsonl")] == [0, 2]


def test_a_resumed_run_has_the_same_prompts_and_reward_models(tmp_path, config, capsys):
    cfg = config(prompts=str(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_text("a red star\n")
    rewards = {"hps": types.SimpleNamespace(identity="hps | one")}
    run_folder.begin_log(tmp_path, 0, cfg, rewards)
    run_folder.begin_log(tmp_path, 1, cfg, rewards)
    for change, name in (
        (lambda: setattr(rewards["hps"], "identity", "hps | other"), "hps"),
        (lambda: (tmp_path / "prompts.txt").write_text("a red sky\n"), "prompts"),
    ):
        change()
        with pytest.raises(SystemExit, match="2"):
            run_folder.begin_log(tmp_path, 1, cfg, rewards)
        assert f"was started with {name} = " in capsys.readouterr().err
        run_folder.begin_log(tmp_path, 0, cfg, rewards)


def test_runs_of_two_copies_of_the_project_have_the_same_flags(config, tmp_path):
    cfg = config(test_prompts=str(tmp_path / "mine.txt"))
    flags = run_folder.flags_of(cfg)
    assert Path(cfg.prompts).is_absolute() and flags["prompts"] == "tiny_world/prompts/train.jsonl"
    assert flags["test_prompts"] == str(tmp_path / "mine.txt")


def test_a_password_is_not_written_down(tmp_path, config, monkeypatch):
    url = "https://me:secret@judge.example/v1"
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--judge-url", url])
    run_folder.begin_log(tmp_path, 0, config(judge_url=(url,)), {})
    text = (tmp_path / "config.json").read_text()
    assert "secret" not in text and text.count("https://judge.example/v1") == 2


def test_skipped_steps_are_counted_in_a_row():
    run = run_folder.Run(None, None, None, None, cures.OFF, 1)
    for skipped, expected in ((1, 1), (1, 2), (0, 0), (1, 1)):
        run.finish_step(skipped)
        assert run.skipped == expected
    assert run.step == 4 and run.is_due(2, 100) and run.is_due(3, 4) and not run.is_due(3, 100)


class StandIn(types.ModuleType):
    """wandb, whose real one needs an account: what it was told."""

    def __init__(self):
        super().__init__("wandb")
        self.sent, self.started = [], []
        self.Image = lambda file: ("image", Path(file).name)

    def init(self, **given):
        self.started.append(given)
        note = lambda *what, **more: self.sent.append((*what, *more.items()))
        return types.SimpleNamespace(log=note, define_metric=note, finish=lambda: note("finish"))


def test_what_a_tracker_gets_is_what_is_logged(monkeypatch, tmp_path):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = grpo.Config(report_to="wandb", judge_url=("http://me:secret@host:1/v1",))
    tracker = trackers.start_tracker(cfg, tmp_path)
    tracker.send(3, {"kl": 0.5}, {"fixed prompts": tmp_path / "samples/step_000003.png"})
    tracker.finish()
    assert wandb.sent == [
        ("*", ("step_metric", "step")),
        ({"kl": 0.5, "fixed prompts": ("image", "step_000003.png"), "step": 3},),
        ("finish",),
    ]
    trackers.start_tracker(cfg, tmp_path)  # a resumed run is the same run, a new folder is not
    (tmp_path / "new" / tmp_path.name).mkdir(parents=True)
    trackers.start_tracker(cfg, tmp_path / "new" / tmp_path.name)
    one, again, other = (given["id"] for given in wandb.started)
    assert one == again != other and "secret" not in str(wandb.started)


def test_a_tracker_that_is_not_installed_is_found_before_anything_is_loaded(
    monkeypatch, capsys, config
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        checks.check_flags(config(report_to="trackio"), 1, 1)
    assert "pip install trackio" in capsys.readouterr().err


def test_a_tracker_that_fails_costs_a_line_and_not_the_run(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise ConnectionError("no room")

    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = grpo.Config(report_to="wandb")
    running = types.SimpleNamespace(cfg=cfg, tracker=trackers.start_tracker(cfg, tmp_path))
    running.tracker.run.log = fail
    for _ in range(2):
        log.Log.send(running, 3, {"kl": 0.5}, {})
    assert capsys.readouterr().err.count("ConnectionError('no room'); going on without it") == 1
    wandb.init = fail
    for saved in (True, False):  # a run that goes on keeps its folder, a new one leaves none
        folder = tmp_path / "checkpoints/step-000000"
        folder.mkdir(parents=True) if saved else shutil.rmtree(folder)
        with pytest.raises(SystemExit) as stop:
            trackers.start_tracker(cfg, tmp_path)
        assert stop.value.code == 2 and "does not start (no room)" in capsys.readouterr().err
        assert tmp_path.exists() == saved


def test_the_end_of_a_run_sends_its_figures_and_changes(tmp_path):
    sent = []
    write_jsonl(tmp_path / "test.jsonl", [{"step": s, "hps": s / 10, "hps/se": 1} for s in (0, 4)])
    ended = types.SimpleNamespace(folder=tmp_path, send=lambda *what: sent.append(what))
    log.Log.end(ended, "page")
    (step, changes, files), finished = sent
    assert step == 4 and changes == {"change/hps": pytest.approx(0.4)} and not any(finished)
    assert [file.name for file in files.values()] == ["hacking.png", "training.png"]


def test_the_peak_of_the_gpus_memory_is_logged_where_there_is_one(monkeypatch):
    assert log.peak_memory() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 10**9)
    assert log.peak_memory() == {"gpu_gb": 3.0}


def test_a_step_is_summarized_without_its_failed_scores():
    scores = [1.0, 2.0, float("nan"), 4.0]
    records = [
        {"hps": score, "gold": 0.5, "total": score, "advantage": a, "thought": "a red star"}
        for score, a in zip(scores, (-0.7, 0.7, 0.0, 0.0))
    ]
    metrics = log.summarize(records, ["hps"], ["gold"], 2)
    assert metrics["failed"] == 0.25 and metrics["thought_words"] == 3
    assert metrics["reward/hps"] == pytest.approx(7 / 3) and metrics["held-out/gold"] == 0.5
    assert metrics["reward/hps/group_std"] == pytest.approx(0.5**0.5)  # of the one whole group
    assert metrics["unanimous_groups"] == 0.5  # one score alone teaches nothing
    assert metrics["reward/hps/ceiling"] == 0.5
    assert metrics["reward/hps/advantage_corr"] == pytest.approx(1)  # -.5, .5, 0 and -.7, .7, 0


def test_a_reward_at_its_ceiling_and_one_that_decides_nothing_are_seen():
    same = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    assert log.at_the_top(same) == 7 / 8
    advantages = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    assert log.correlation(same, advantages) == pytest.approx(0, abs=1e-6)
    ordered = torch.tensor([[3.0, 1.0, 2.0, 2.0], [102.0, 102.0, 103.0, 101.0]])
    assert log.correlation(ordered, advantages) == pytest.approx(1)
    assert math.isnan(log.correlation(same[1:], advantages[1:]))


BAD_USAGE = [
    ("--rewards hsp", "unknown reward 'hsp'"),
    ("--rewards hps:much", "is no number"),
    ("--num-generations 1", "a group of one"),
    ("--warmup-ratio 1", "from 0 to below 1"),
    ("--warmup-ratio nan", "must be a number"),
    ("--adam-beta2 1", "from 0 to below 1"),
    ("--rewards gold", "cannot be held out"),
    ("--rewards hps,edges", "can only be in --eval-rewards"),
    ("--rewards hps,artifact:200 --combine mean", "uses no weights"),
    ("--rewards hps,artifact:2 --combine constrained", "uses no weights"),
    ("--prompts /nowhere", "no such file"),
    ("--max-steps 0", "greater than 0"),
    ("--resume /nowhere", "no whole checkpoints"),
    ("--resume docs", "no whole checkpoints"),
    ("--beta nan", "must be a number"),
    ("--epsilon inf", "must be a number"),
    ("--cfg-weight nan", "must be a number"),
    ("--floor nan --combine constrained", "must be a number"),
    ("--max-failures nan", "must be a number"),
    ("--max-failures 2", "from 0 to 1"),
    ("--beta -1", "0 or greater"),
    ("--best-of -1", "0 or greater"),
    ("--lora-rank -1", "0 or greater"),
    ("--save-total-limit 1", "keep 2 or more"),
    ("--device cuda", "this machine has none"),
    ("--question runs/apo/question.txt", "an empty file, none of this name, or no question"),
    ("--output-dir /dev/null/runs", "cannot be written"),
    ("--combine constrained --rewards hps", "needs two rewards"),
    ("--eval-rewards adversarial --rewards hps", "unless it learns"),
    ("--rewards hps,adversarial@http://127.0.0.1:8100", "leave the address out"),
    ("--prompts-per-step 600", "as many, each once"),
    ("--references /nowhere --rewards adversarial", "manifest.jsonl"),
    ("--shard", "--nproc-per-node"),
    ("--rewards hps:0", "no number above 0"),
    ("--seed 99999999999999999999", "64 bits"),
    ("--run-name ..", "a name, not a path"),
    ("--test-prompts /nowhere", "--test-prompts /nowhere"),
    ("--eval-rewards gold:.5", "only --rewards of grpo.py has weights"),
    ("--guidance none --cfg-weight 3", "none has no weight"),
]


@pytest.mark.parametrize("args, rule", BAD_USAGE, ids=lambda text: text)
def test_bad_usage_is_one_clear_line_before_anything_is_loaded(args, rule, capsys, tmp_path):
    flags = ["--output-dir", str(tmp_path / "runs"), *args.split()]
    with pytest.raises(SystemExit) as stop:
        grpo.main(tyro.cli(grpo.Config, args=flags))
    assert stop.value.code == 2 and rule in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("typo, said", [("--rewardz x", "Perhaps you"), ("--beta nan", "--beta")])
def test_of_several_processes_the_first_says_what_is_wrong(typo, said):
    _, err = finish(start(typo.split(), processes=2), code=1)
    ours = err[: err.index("Traceback")]  # torchrun's own comes behind
    assert err.count(said) == ours.count(said) == 1


def test_help_and_a_typo_do_not_load_torch():
    code = (
        "import runpy, sys\nsys.argv = ['grpo.py', sys.argv[1]]\n"
        "try:\n    runpy.run_path('grpo.py', run_name='__main__')\n"
        "except SystemExit as end:\n    print('code', end.code, 'torch' in sys.modules)"
    )
    for flag, ended in (("--help", "code 0 False"), ("--rewardz", "code 2 False")):
        command = [sys.executable, "-c", code, flag]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        assert out.splitlines()[-1] == ended and ("held out" in out) == (flag == "--help")


def test_weights_are_kept_where_they_are_used():
    for how in ("sum", "normalized", "pareto"):
        weights, heldout = grpo.reward_lib.check_roles("hps,artifact:.5", "gold", how)
        assert weights == {"hps": 1.0, "artifact": 0.5} and heldout == ["gold"]


def test_every_preset_fills_a_flag_that_has_no_default():
    flags = {name for name, value in vars(grpo.Config()).items() if value is None}
    for preset in checks.PRESETS.values():
        assert preset.keys() <= flags


def test_the_preset_t2i_r1_is_as_released_unless_told_otherwise(capsys):
    cfg = grpo.Config(model="some/Janus", preset="t2i-r1", max_thought=512)
    checks.fill_presets(cfg)
    assert (cfg.guidance, cfg.adam_beta2, cfg.max_thought) == ("cond", 0.999, 512)
    assert (cfg.learning_rate, cfg.beta) == (1e-6, 0.01)
    assert capsys.readouterr().out == "--preset t2i-r1: --guidance cond --adam-beta2 0.999\n"
    cfg = grpo.Config(model="some/Janus")
    checks.fill_presets(cfg)
    assert (cfg.guidance, cfg.adam_beta2, cfg.max_thought) == ("guided", 0.99, 128)
    assert capsys.readouterr().out == ""


def test_config_json_says_what_was_run(whole_run):
    config = json.loads((whole_run / "config.json").read_text())
    assert config["flags"]["rewards"] == "hps,artifact,adversarial" and config["processes"] == 1
    assert config["command"].startswith("grpo.py --rewards hps,artifact,adversarial")
