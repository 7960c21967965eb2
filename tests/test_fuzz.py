"""What comes from a server or a file is a result, a failure that is counted, or one clear error.

A few seconds here; `pytest -m slow tests/test_fuzz.py` tries a hundred times as much.
"""

import collections
import json
import math
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewards
from artifact_reward import judge_answers
from evaluation import official_scores, wise
from reward_models.judge import ServedJudge
from reward_models.llava import written_score
from reward_models.serving import read_scores
from training import waiting
from training.records import read_jsonl

WORDS = st.sampled_from(
    ["yes", "No", " NO,", "score", "Score: ", "/2", "1", "choices", "logprobs", "content", "id"]
    + ["top_logprobs", "token", "logprob", "message", "prompt_id", "consistency", "tag", "correct"]
    + ["answer", "question_id", "scores", "gold", "step"]
)
TEXT = st.one_of(WORDS, st.text(max_size=12))
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
JSON = st.recursive(
    VALUES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=5)),
    max_leaves=25,
)
COUNTS = [pytest.param(50), pytest.param(5000, marks=pytest.mark.slow)]


def fuzz(strategy, examples, check):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    options = dict(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)
    settings(**options)(given(strategy)(check))()


def or_usage_error(function, *arguments):
    """What it returns; None if it ends with exit code 2."""
    try:
        return function(*arguments)
    except SystemExit as stop:
        assert stop.code == 2


def as_objects(value):
    """JSON as the client of OpenAI gives it: objects with attributes."""
    if isinstance(value, dict):
        items = {str(k): as_objects(v) for k, v in value.items()}
        return types.SimpleNamespace(**{k: v for k, v in items.items() if "\0" not in k})
    return [as_objects(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("examples", COUNTS)
def test_a_score_of_the_judge_is_in_its_range_or_a_counted_failure(examples):
    replies = st.fixed_dictionaries({"choices": JSON}) | JSON
    top = st.lists(st.fixed_dictionaries({"token": VALUES, "logprob": VALUES}), max_size=4)
    near = st.builds(lambda t: {"choices": [{"logprobs": {"content": [{"top_logprobs": t}]}}]}, top)
    judge = object.__new__(ServedJudge)
    judge.address, judge.each, judge.total = "here", 5.0, 5.0

    def check(reply):
        judge.failures = collections.Counter()
        judge.request = lambda *_, **__: as_objects(reply)
        ((score, _),) = judge_answers(judge, "Broken?", [object()])
        assert 0 <= score <= 1 or (math.isnan(score) and sum(judge.failures.values()) == 1)
        (text,) = judge.ask([lambda: judge.write("", [])])
        assert isinstance(text, str) or sum(judge.failures.values()) >= 1

    fuzz(replies | near, examples, check)


@pytest.mark.parametrize("examples", COUNTS)
def test_a_reply_of_a_served_reward_is_a_list_of_numbers_or_unanswered(examples):
    def check(body):
        body = body if isinstance(body, str) else json.dumps(body)
        try:
            scores = read_scores(200, body, 2)
        except waiting.Unanswered:
            return
        assert len(scores) == 2 and torch.tensor(scores).dtype == torch.float32

    fuzz(JSON | st.fixed_dictionaries({"scores": JSON}) | st.text(), examples, check)


@pytest.mark.parametrize("examples", COUNTS)
def test_what_a_model_writes_is_a_score_or_none(examples):
    def check(parts):
        text = " ".join(parts)
        for protocol, highest in (("legacy", 2), ("verified", 1)):
            scores = wise.read_scores(text, protocol)
            assert scores is None or all(0 <= v <= highest for v in scores.values())
        score = written_score(text)
        assert math.isnan(score) or 1 <= score <= 5

    parts = st.sampled_from(
        "Score: Consistency: Realism: Aesthetic Quality: Final 1 2 2.0 -1 8/10 1/1 <think> ** nan "
        '</think> {"score": 1} { } 1e9'.split()
    )
    fuzz(st.lists(parts | st.text(max_size=6), max_size=12), examples, check)


@pytest.mark.parametrize("examples", COUNTS)
def test_a_result_file_is_read_or_refused(examples, tmp_path):
    path = tmp_path / "results.jsonl"

    def check(content):
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content).encode()
        path.write_bytes(content)
        assert isinstance(or_usage_error(read_jsonl, path), list | None)
        or_usage_error(official_scores.summarize, path)

    rows = st.dictionaries(TEXT, VALUES, max_size=5)
    fuzz(st.binary(max_size=200) | st.lists(rows | JSON, max_size=4), examples, check)


@pytest.mark.parametrize("examples", COUNTS)
def test_flags_of_rewards_are_read_or_refused(examples):
    def check(parts):
        found = or_usage_error(rewards.parse_parts, "".join(parts))
        assert found is None or all(name in rewards.REWARDS for name, *_ in found)

    names = st.sampled_from(["hps", "artifact", "stats", ":", ",", "@http://a:1", "nan", "1e999"])
    fuzz(st.lists(names | st.text(max_size=4)), examples, check)
