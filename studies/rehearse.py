"""Walk the commands for real models on a CPU: the published names and widths, random weights.

A Hugging Face cache is made that holds the repositories under their published names. Each has the
files, the weight names and the widths of the published one (in the place of Janus-Pro-7B those of
1B); but few layers, a vocabulary of 16,384 words, a thin VQ decoder, and random weights. Then each
command of docs/gpus.md runs in a process of its own with its own flags, followed by smaller numbers
of steps and pictures (the last of two equal flags counts). So all code between a command and its
files runs, apart from CUDA. What the pictures show and how long a step takes means nothing here.

Run:   python -m studies.rehearse                              an hour and a half, 8 GB of memory
       python -m studies.rehearse --vllm vllm/bin/python       also with vLLM as the judge's server
                                                               (tests/vllm_parity.py: installation)

You should see:  a line when each part begins, then the table of docs/gpus.md. A part that has
passed is not repeated; each part's output is in <folder>/NAME.log.

Read next: recipes.py
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from evaluation.tables import markdown
from reward_models.clip import CLIP_H, HPS
from studies.recipes import RECIPES
from tiny_world.learning import SHIPPED
from tiny_world.train_judge import judge_tokenizer
from tiny_world.train_policy import policy_tokenizer
from tiny_world.train_preferences import clip_tokenizer, save_clip
from training.files import ROOT, atomic, usage_error
from training.memory_plan import janus_config

PROMPTS = ["a photo of a red bus", "two green birds on a bench"]
JANUS, JUDGE = "deepseek-community/Janus-Pro-1B", "Qwen/Qwen2.5-VL-7B-Instruct"


@dataclass
class Config:
    folder: str = "runs/rehearsal"  # the cache, the runs, the logs
    vllm: str = ""  # the interpreter of an environment with vLLM; without it no judge is served
    only: tuple[str, ...] = ()  # names of parts [all]
    device: str = "cpu"  # or cuda


# --- checkpoints in the published formats -------------------------------------------------------


def change(config, values):
    for name, value in values.items():
        setattr(config, name, value)


def make_janus(folder):
    config = janus_config("Janus-Pro-1B")
    tokenizer = policy_tokenizer(PROMPTS * 50)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 2
    config.text_config.vocab_size = 16384
    config.vq_config.base_channels = 32  # 128, whose decoder takes minutes for a picture on a CPU
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    for name in ("bos", "eos", "pad"):
        setattr(config.text_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    model = transformers.JanusForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig.from_pretrained(SHIPPED / "policy")
    model.generation_config.guidance_scale = 5.0
    processor = transformers.JanusProcessor.from_pretrained(SHIPPED / "policy")
    processor.tokenizer, processor.num_image_tokens = tokenizer, 576
    processor.image_processor.size = {"height": 384, "width": 384}
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def clip_h_config(tokenizer):
    """CLIP ViT-H/14, with as many layers as our tiny one, whose names save_clip takes."""
    config = transformers.CLIPConfig.from_pretrained(SHIPPED / "hps")
    text = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, hidden_act="gelu")
    text |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text |= dict(pad_token_id=tokenizer.eos_token_id, vocab_size=16384, projection_dim=1024)
    text |= dict(max_position_embeddings=77)
    vision = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=16)
    vision |= dict(hidden_act="gelu", patch_size=14, image_size=224, projection_dim=1024)
    change(config.text_config, text)
    change(config.vision_config, vision)
    config.projection_dim = 1024
    return config


def make_clip_h(folder):
    tokenizer = clip_tokenizer(PROMPTS * 50)
    tokenizer.save_pretrained(folder)
    clip_h_config(tokenizer).save_pretrained(folder)


def make_hps(folder):
    model = transformers.CLIPModel(clip_h_config(clip_tokenizer(PROMPTS * 50)))
    save_clip(HPS, model, folder)


def make_dino(folder):
    config = transformers.Dinov2Config(num_hidden_layers=2, image_size=518, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(folder)


def make_judge(folder):
    """Qwen2.5-VL-7B, two layers of the language model and of the vision tower."""
    config = transformers.Qwen2_5_VLConfig.from_pretrained(SHIPPED / "artifact")
    text = dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, vocab_size=16384)
    text |= dict(num_key_value_heads=4, num_hidden_layers=2, max_position_embeddings=128000)
    text |= dict(layer_types=["full_attention"] * 2)
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    vision = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    vision |= dict(depth=2, patch_size=14, window_size=112, fullatt_block_indexes=[1])
    change(config.text_config, text)
    change(config.vision_config, vision)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    judge_tokenizer().save_pretrained(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(SHIPPED / "artifact")
    # Published: 12,845,056 pixels. vLLM tries the largest picture before it serves.
    images.patch_size, images.size = 14, {"shortest_edge": 3136, "longest_edge": 401408}
    images.save_pretrained(folder)


REPOSITORIES = {
    JANUS: make_janus,
    CLIP_H: make_clip_h,
    HPS.checkpoint: make_hps,
    "facebook/dinov2-base": make_dino,
    JUDGE: make_judge,
}


def make_cache(hub):
    """A cache as huggingface_hub keeps it: models--OWNER--NAME/{refs/main, snapshots/COMMIT/}."""
    torch.manual_seed(0)
    for name, make in REPOSITORIES.items():
        folder = hub / f"models--{name.replace('/', '--')}"
        if (folder / "refs/main").is_file():
            continue
        print(f"making {name}", flush=True)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        make(snapshot)
        with atomic(folder / "refs/main") as file:
            file.write("0" * 40)


# --- the parts ----------------------------------------------------------------------------------

# After a recipe's own flags: fewer pictures, steps and processes.
SMALL = (
    "--device cpu --num-generations 2 --max-steps 1 --eval-images 1 --eval-steps 9 --save-steps 1 "
    "--best-of 0 --max-thought 12 --micro-batch 2 --output-dir runs --prompts prompts.txt "
    "--test-prompts prompts.txt"
)
PORT, JUDGE_PORT = 18100, 18000
# A judge with random weights says neither yes nor no: no score, which exit code 3 reports.
EXPECTED = {"judge": 3}
SERVED_JUDGE = f"--rewards hps,artifact --judge-url http://127.0.0.1:{JUDGE_PORT}/v1"


def flags_of(title):
    """The flags of grpo.py in the recipe of this title."""
    (command,) = [recipe.trainer for recipe in RECIPES if recipe.title == title]
    flags = command.partition("grpo.py ")[2].replace("Janus-Pro-7B", "Janus-Pro-1B")
    return re.sub(r" --judge-url \S+", "", flags)


def parts(vllm, device="cpu"):
    """[(name, what it shows, command, command of a server it needs)]."""
    grpo, processes = "grpo.py", 2 if device == "cpu" else min(2, torch.cuda.device_count())
    two = f"-m torch.distributed.run --standalone --nproc-per-node {processes} grpo.py"
    one, eight = flags_of("1B, two GPUs of 24 GB"), flags_of("1B, eight of 80 GB")
    seven, nodes = flags_of("7B, eight of 80 GB"), flags_of(RECIPES[-1].title)
    serve = f"rewards.py serve hps --model real --port {PORT}"
    remote = f"--rewards hps@http://127.0.0.1:{PORT}"
    hps, P1, P2 = "--rewards hps", "--prompts-per-step 1", "--prompts-per-step 2"
    found = [
        ("plan", "`--dry-run`", f"{grpo} {seven} --rewards hps --dry-run --world-size 7", ""),
        ("generate", "generate.py", f"generate.py --model {JANUS} --prompts prompts.txt "
         "--num-images 1 --max-thought 12 --output-dir pictures --device cpu", ""),
        ("lora", "24 GB: LoRA", f"{grpo} {one} {SMALL} {P1} {hps} --run-name lora", ""),
        ("resume", "the same, one step more", f"{grpo} {one} {SMALL} {P1} {hps} --run-name lora "
         "--max-steps 2 --resume latest", ""),
        ("full", "eight GPUs, 1B: full training, one process",
         f"{grpo} {eight} {SMALL} {P1} {hps} --run-name full", ""),
        ("shard", "eight GPUs, 7B: sharded, two processes",
         f"{two} {seven} {SMALL} {P2} {hps} --run-name shard", ""),
        ("nodes", "two nodes: its checkpoint, resumed on two processes",
         f"{two} {nodes} {SMALL} {P2} {hps} --run-name shard --max-steps 2", ""),
        ("t2i-r1", "`--preset t2i-r1`: unguided log-probabilities",
         f"{grpo} {one} {SMALL} {P1} {hps} --run-name t2i-r1 --preset t2i-r1", ""),
        ("served", "HPS served by `rewards.py serve`",
         f"{grpo} {one} {SMALL} {P1} {remote} --run-name served", serve),
        ("adversarial", "HPS and DINOv2-base, which learns", f"{grpo} {one} {SMALL} {P1} --rewards "
         "hps,adversarial --combine normalized --references pictures --run-name adversarial", ""),
        ("trained", "generate.py with the trained policy", "generate.py --model runs/full "
         "--prompts prompts.txt --num-images 1 --max-thought 12 --output-dir trained --device cpu",
         ""),
        ("evaluate", "evaluate.py --images", "evaluate.py --images trained --prompts prompts.txt "
         "--rewards hps --model real", ""),
    ]  # fmt: skip
    return [
        (name, title, command.replace("--device cpu", f"--device {device}"), serving)
        for name, title, command, serving in found + (judge_parts(one, P1) if vllm else [])
    ]


def judge_parts(one, P1):
    """Those that need vLLM."""
    judge = "-m vllm.entrypoints.openai.api_server --model " + RECIPES[0].judge.split()[3]
    judge += re.sub(r".*?--port \d+", f" --port {JUDGE_PORT}", RECIPES[0].judge)
    judge += " --enforce-eager"  # compiling takes minutes on a CPU
    # The trainer refuses a judge that says neither yes nor no.
    tiny_judge = judge.replace(f"--model {JUDGE}", f"--model {SHIPPED}/artifact --dtype float32")
    tiny_judge += f" --served-model-name {JUDGE}"
    tiny_judge = tiny_judge.replace("--max-model-len 4096", "--max-model-len 512")
    return [
        ("judge", "artifact_reward.py, with vLLM as in the recipe",
         f"artifact_reward.py --judge-url http://127.0.0.1:{JUDGE_PORT}/v1 "
         "pictures/00000/samples/0000.png", judge),
        ("judged", "the trainer, with our tiny judge served by vLLM under the published name",
         f"grpo.py {one} {SMALL} {P1} {SERVED_JUDGE} --run-name judged", tiny_judge),
    ]  # fmt: skip


@contextlib.contextmanager
def server(python, command, log, env):
    """A server in a process of its own; waited for until it answers, 10 minutes at most."""
    if not command:
        yield
        return
    port, start = re.search(r"--port (\d+)", command)[1], time.monotonic()
    place = f"http://127.0.0.1:{port}/{'health' if 'vllm.entry' in command else 'about'}"
    with open(log.with_suffix(".server.log"), "w") as file:
        process = subprocess.Popen(
            [python, *shlex.split(command)], env=env, stdout=file, stderr=file
        )
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(place, timeout=5)
                break
            if process.poll() is not None or time.monotonic() - start > 600:
                usage_error(f"{command}: no answer at {place}; see {file.name}")
            time.sleep(1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def run_part(folder, name, command, serving, vllm):
    """Run one part in `folder`; returns {"seconds", "exit", "last"}, its last line of output."""
    env = os.environ | {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    python = vllm if "vllm.entry" in serving else sys.executable
    command, serving = (
        shlex.join(str(ROOT / w) if (ROOT / w).is_file() else w for w in shlex.split(text))
        for text in (command, serving)
    )
    if "--resume latest" not in command:
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)  # of a part that failed
    log = folder / f"{name}.log"
    with server(python, serving, log, env), open(log, "w") as file:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, *shlex.split(command)],
            env=env,
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    lines = [line for line in re.split("[\r\n]", log.read_text()) if line.strip()]
    seconds = round(time.monotonic() - start)
    return {"seconds": seconds, "exit": done.returncode, "last": lines[-1] if lines else ""}


def main(cfg):
    known = [name for name, *_ in parts(cfg.vllm, cfg.device)]
    for name in cfg.only:
        if name not in known:
            usage_error(f"--only {name}: must be of {', '.join(known)}; judges need --vllm")
    folder = Path(cfg.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    make_cache(folder / "hub")
    file, rows = folder / "results.json", []
    results = json.loads(file.read_text()) if file.is_file() else {}
    for name, title, command, serving in parts(cfg.vllm, cfg.device):
        expected = EXPECTED.get(name, 0)
        if results.get(name, {}).get("exit") != expected and (not cfg.only or name in cfg.only):
            print(f"{name}: {command}", flush=True)
            results[name] = run_part(folder, name, command, serving, cfg.vllm)
            with atomic(file) as target:
                json.dump(results, target, indent=1)
        if result := results.get(name):
            how = "passed" if result["exit"] == expected else f"exit code {result['exit']}"
            rows.append({"rehearsed": title, "result": how, "seconds": result["seconds"]})
    print(markdown(rows))
    failed = [name for name, result in results.items() if result["exit"] != EXPECTED.get(name, 0)]
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
