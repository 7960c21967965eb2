"""What a trained policy says about itself, and how it gets to the Hugging Face hub.

The card is written into each checkpoint. Its head, in YAML, is what the hub reads: base model,
task, and the scores of the last test as a "model-index".

Read next: log.py
"""

import sys
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from training.files import usage_error
from training.processes import end_processes
from training.records import read_json, read_jsonl

RESUME_ONLY = ["*.pt", "state.json"]  # what a resume needs, and nobody else


def model_card(folder, step):
    """The text of README.md: the command, the roles of the rewards, the last test. The scores in
    its head are those over all test prompts, finite ones only."""
    config, test = read_json(folder / "config.json"), read_jsonl(folder / "test.jsonl")[-1]
    flags = config["flags"]
    scores = {k: v for k, v in test.items() if "/" not in k and k != "step" and v == v}
    prompts = Path(flags["test_prompts"]).name
    results = [
        EvalResult("text-to-image", prompts, f"test prompts ({prompts})", name, round(value, 6))
        for name, value in scores.items()
    ]
    tiny = flags["model"] == "tiny"
    head = ModelCardData(
        model_name=folder.name,
        base_model=None if tiny or Path(flags["model"]).exists() else flags["model"],
        license="mit" if tiny else None,
        library_name="peft" if flags.get("lora_rank") else "transformers",
        pipeline_tag="text-to-image",
        tags=["grpo", "reinforcement-learning", "reward-hacking"],
        eval_results=results,
    )
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items())
    doubted_by, averaged = flags.get("cures.doubted_by"), flags.get("cures.average")
    guided = f" `{doubted_by}` decided where the KL counts." if doubted_by else ""
    which = " (of the averaged weights, in `average/`)" if averaged else ""
    return (
        f"---\n{head.to_yaml()}\n---\n\n# {folder.name}, step {step}\n\n"
        f"Trained from `{flags['model']}` by\n\n    {config['command']}\n\n"
        f"Trained on `{flags['rewards']}`; held out: `{flags['eval_rewards'] or 'nothing'}`. A "
        f"score that was trained on says nothing about the quality of the pictures.{guided} Last "
        f"test, at step {test['step']}{which}:\n\n"
        f"| measured | mean |\n|---|---|\n{rows}\n"
    )


def check_hub(name):
    """Exit code 2, before the training, if --push-to-hub cannot work."""
    if not name:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as problem:
        usage_error(f"--push-to-hub {name}: {str(problem).splitlines()[0]}")
    if "/" not in name:
        usage_error(f"--push-to-hub {name}: write USER/{name}")
    if get_token() is None:
        usage_error(f"--push-to-hub {name}: not logged in; run `hf auth login` first")


def push_to_hub(name, checkpoint):
    """Upload a checkpoint; to a private repository, if it is new. If it fails the run is none the
    worse: exit code 3, with the command that tries again."""
    if not name:
        return
    try:
        url = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=checkpoint, ignore_patterns=RESUME_ONLY)
    except Exception as problem:  # no network, no rights, no room there: the library's own kinds
        unwanted = " ".join(f"--exclude '{pattern}'" for pattern in RESUME_ONLY)
        again = f"hf upload {name} {checkpoint} --private {unwanted}"
        print(f"error: --push-to-hub {name}: {problem}; again: {again}", file=sys.stderr)
        end_processes(3)
    print(f"on the hub: {url}")
