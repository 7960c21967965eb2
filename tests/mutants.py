"""Do the tests pin the method? Change one thing in it at a time, and see whether a test fails.

The changes are those of mutmut (a number + 1, < to <=, + to -, an argument dropped or None, ...).
Its own runner skips decorated functions and imports nothing beforehand. Here one process imports
torch and transformers once, and forks for each mutant. Messages to the user are not
mutated, nor what needs a GPU (a device given to torch, the recorded sampling loop).

Run:   pip install mutmut==3.8.1
       python tests/mutants.py                       all functions of the table: an hour
       python tests/mutants.py kl_k3 prob_no         some of them

You should see:  for each survivor its function, line and change; then killed / total.
docs/mutants.md explains those that survive.
"""

import importlib.machinery
import os
import re
import resource
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHOD, GENERATE = "tests/test_method.py", "tests/test_generate.py"
UPDATE = "tests/test_update.py"
ROLLOUT = (
    "tests/test_grpo.py::test_a_rollout_that_does_not_fit_is_sampled_in_halves_and_is_the_same "
    "tests/test_grpo.py::test_a_large_rollout_is_sampled_in_batches_and_is_the_same"
)
TARGETS = [  # (file, its functions, the tests that must notice)
    (
        "grpo.py",
        "group_advantages kl_k3 grpo_loss guidance_weights micro_batches all_logprobs "
        "reference_logprobs compute_gradient update_policy train_step evaluate_policy "
        "best_of_n_pool",
        f"{METHOD} {UPDATE}",
    ),
    ("training/optimizer.py", "learning_rate make_optimizer", f"{METHOD} {UPDATE}"),
    (
        "training/cures.py",
        "flatten_gradient dominated pareto_front win_rates doubtful spread entropy_closeness "
        "encode exchange Cure.__init__ Cure.betas Cure.entropy_bonus Cure.data Cure.after_step",
        f"{METHOD} tests/test_cures.py --deselect "
        "tests/test_cures.py::test_a_run_with_all_cures_resumes_as_if_nothing_had_happened",
    ),
    ("grpo.py", "rollout", f"{UPDATE} {ROLLOUT}"),
    ("training/stopping.py", "in_batches", f"{UPDATE} {ROLLOUT}"),
    (
        "generate.py",
        "tokenize thought_context image_context unconditional_ids add_unconditional apply_cfg "
        "default_cfg_weight causal_mask seeded_generator uniform_numbers sample_inverse_cdf "
        "KeyValueCache.__init__ KeyValueCache.update forward sample_tokens sample think_and_draw "
        "sample_image to_images gather_logprobs teacher_forced_hidden logprobs token_logprobs",
        f"{GENERATE} {METHOD}",
    ),
    ("training/policy.py", "load_policy trainable", f"{GENERATE} {METHOD}"),
    ("training/prompts.py", "prompts_of_step jobs_of_step", METHOD),
    ("training/processes.py", "gather sum_over_processes", UPDATE),
    ("training/sharding.py", "sum_gradients clip_gradients as_reference", UPDATE),
    (
        "artifact_reward.py",
        "prob_no answer_share judge_images ArtifactReward.check",
        "tests/test_judge.py",
    ),
    ("reward_models/judge.py", "LocalJudge.answers", "tests/test_judge.py"),
    (
        "rewards.py",
        "standardize combine Rewards.__init__ Rewards.update_multipliers start_scoring check_roles",
        f"{METHOD} tests/test_rewards.py",
    ),
    (
        "evaluation/best_arm.py",
        "log_likelihoods Race.__init__ Race.run Race.best full ucb successive_rejects "
        "successive_halving",
        "tests/test_best_arm.py",
    ),
    ("evaluation/labels.py", "measures", "tests/test_apo.py"),
    ("evaluation/rubric.py", "pair_differences fit choose learn", "tests/test_rubric.py"),
    ("artifact_reward.py", "parse_rubric ArtifactReward.answers", "tests/test_rubric.py"),
    ("apo.py", "refusal expand optimize CachedJudge.__call__", "tests/test_apo.py"),
    (
        "adversarial_reward.py",
        "Adversarial.build Adversarial.tokens Adversarial.discriminate Adversarial.loss "
        "Adversarial.__call__ Adversarial.learn AdversarialPickScore.build "
        "AdversarialPickScore.parameters AdversarialPickScore.discriminate "
        "AdversarialPickScore.loss update_adversaries",
        "tests/test_adversarial.py",
    ),
]
# Calls that only speak to the user, and the sampling loop of a GPU.
SKIPPED = {"usage_error", "print", "tqdm.write", "ValueError", "cuda_graph.sample_tokens"}


def mutants(path, functions):
    """[(function, line, change, a function that gives the file's text with this change)]"""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.file_mutation import MutationVisitor, mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    class Visitor(MutationVisitor):
        def _skip_node_and_children(self, node):
            if isinstance(node, cst.FunctionDef):
                return False  # decorated ones, too
            called = text(node.func) if isinstance(node, cst.Call) else ""
            if called in SKIPPED:
                return True
            return super()._skip_node_and_children(node)

    code = (ROOT / path).read_text(encoding="utf-8")
    wrapper = MetadataWrapper(cst.parse_module(code))
    text = wrapper.module.code_for_node
    visitor = Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    wrapper.visit(visitor)
    names = {}  # definition -> qualified name
    for outer in wrapper.module.body:
        for node in outer.body.body if isinstance(outer, cst.ClassDef) else [outer]:
            if isinstance(node, cst.FunctionDef):
                prefix = "" if node is outer else f"{outer.name.value}."
                names[node] = prefix + node.name.value
    lines = wrapper.resolve(PositionProvider)
    found = []
    for mutation in visitor.mutations:
        name = names.get(mutation.contained_by_top_level_function)
        old, new = mutation.original_node, mutation.mutated_node
        devices = [re.sub(r",?\s*device=[^,)]*", "", text(node)) for node in (old, new)]
        if name in functions and devices[0] != devices[1]:
            change = f"{text(old).strip()}  ->  {text(new).strip()}"
            mutated = lambda old=old, new=new: wrapper.module.deep_replace(old, new).code
            found.append((name, lines[old].start.line, " ".join(change.split()), mutated))
    return found


class NoticedFirst:
    """A pytest plugin: tests that noticed earlier mutants of the function run first."""

    def __init__(self, first, note):
        self.first, self.note = first, note

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: item.nodeid not in self.first)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.note.write_text(report.nodeid)


def fork(path, mutated, tests, first, notes, limit=240):
    """Start the tests with another text as the content of this file; returns the process' id."""
    pid = os.fork()
    if pid:
        return pid
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))  # an endless loop counts as noticed,
    signal.alarm(5 * limit)  # and a machine that stalls for a minute does not
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))  # a mutant may ask for any amount
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    code, load = mutated(), importlib.machinery.SourceFileLoader.get_code

    def get_code(loader, name):
        if Path(loader.path) == ROOT / path:
            return compile(code, loader.path, "exec")
        return load(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code
    import pytest
    import torch

    torch.set_num_threads(1)
    torch.set_num_threads = lambda n: None  # two mutants run side by side
    plugin = NoticedFirst(first, notes / str(os.getpid()))
    arguments = [*"-x -q --tb=no -p no:cacheprovider".split(), *tests.split()]
    os._exit(pytest.main(arguments, plugins=[plugin]))


def preload():
    """Import all libraries, and forget our own modules again."""
    sys.path.insert(0, str(ROOT))
    import peft  # noqa: F401
    import pytest  # noqa: F401

    import apo  # noqa: F401
    import grpo  # noqa: F401

    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name != "__main__" and Path(file).is_relative_to(ROOT):
            del sys.modules[name]


def main(chosen, workers=2):
    os.chdir(ROOT)
    preload()
    todo = []
    for path, functions, tests in TARGETS:
        functions = [f for f in functions.split() if not chosen or f in chosen or path in chosen]
        if functions:
            code = (ROOT / path).read_text(encoding="utf-8")
            todo.append((path, "unchanged", 0, "", lambda code=code: code, tests))
            todo += [(path, *mutant, tests) for mutant in mutants(path, functions)]
    running, killed, total, number = {}, Counter(), Counter(), len(todo)
    noticed, notes = defaultdict(set), Path(tempfile.mkdtemp())
    while todo or running:
        if todo and len(running) < workers:
            path, function, line, change, mutated, tests = todo.pop(0)
            first = noticed[path, function]
            pid = fork(path, mutated, tests, first, notes)
            running[pid] = (path, function, line, change)
            continue
        pid, status = os.wait()
        path, function, line, change = running.pop(pid)
        if function == "unchanged":
            assert status == 0, f"{path}: its tests fail without any mutant"
            continue
        total[path, function] += 1
        print(f"\r{number - len(todo)} / {number}", end="", file=sys.stderr)
        killed[path, function] += status != 0
        if (notes / str(pid)).exists():
            noticed[path, function].add((notes / str(pid)).read_text())
        if status == 0:
            print(f"SURVIVED {path}:{line} {function}: {change}", flush=True)
        elif status != 256:
            print(f"         {path}:{line} {function}: status {status}: {change}", flush=True)
    for path, function in total:
        print(f"{killed[path, function]:4d} / {total[path, function]:4d}  {path} {function}")
    print(f"{sum(killed.values()):4d} / {sum(total.values()):4d}  killed")


if __name__ == "__main__":
    main(sys.argv[1:])
