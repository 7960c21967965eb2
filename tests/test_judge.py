"""The judge: one rule for reading its answer, and a failing judge never becomes a reward."""

import collections
import gc
import http.server
import json
import math
import re
import threading
import time
import types

import pytest
import torch
import tyro
from PIL import Image

import artifact_reward
import grpo
from reward_models import judge as judge_file
from reward_models.judge import ServedJudge
from training import waiting
from training.records import read_jsonl

NAN = math.nan


# --- the judge's scoring rule


def test_every_spelling_of_yes_and_no_counts():
    top = [
        ("No", math.log(0.5)),
        (" no", math.log(0.1)),
        ("YES", math.log(0.2)),
        ("Perhaps", math.log(0.1)),
    ]
    assert artifact_reward.prob_no(top) == pytest.approx(0.75)


def test_neither_yes_nor_no_is_no_score():
    assert math.isnan(artifact_reward.prob_no([("The", -0.1), ("I", -3.0)]))
    assert math.isnan(artifact_reward.prob_no([]))


def test_an_answer_in_the_noise_is_no_score():
    """A model that thinks aloud: yes and no are a millionth of the first token."""
    thinking = [("So", math.log(0.56)), ("Got", math.log(0.44)), ("Yes", math.log(2e-6))]
    assert math.isnan(artifact_reward.prob_no([*thinking, ("No", math.log(1e-6))]))
    assert math.isnan(artifact_reward.prob_no([("no", -1000.0), ("yes", -1000.0)]))
    half = math.log(artifact_reward.MIN_SHARE / 2)
    assert artifact_reward.prob_no([("no", half + 1e-6), ("yes", half + 1e-6)]) == 0.5
    assert math.isnan(artifact_reward.prob_no([("no", half - 1e-6), ("yes", half - 1e-6)]))


@pytest.mark.parametrize(
    "token", ["No,", "**No", "\nNo", "\u2581No", "\u0120No", "\u010aNO", "no.", '"No"', " **No**"]
)
def test_signs_and_blanks_around_a_word_do_not_hide_it(token):
    top = [(token, math.log(0.6)), ("Yes", math.log(0.2))]
    assert artifact_reward.prob_no(top) == pytest.approx(0.75)


@pytest.mark.parametrize("token", ["Yes/No", "not", "none", "nobody", "No1", "", "**"])
def test_other_words_are_neither_yes_nor_no(token):
    assert math.isnan(artifact_reward.prob_no([(token, -0.01)]))


def test_log_probabilities_that_are_no_numbers_are_left_out():
    top = [("No", NAN), ("no", -math.inf), ("No", -1.0), ("yes", -1.0)]
    assert artifact_reward.prob_no(top) == 0.5


def test_a_word_without_probability_is_no_answer():
    assert math.isnan(artifact_reward.prob_no([("no", -math.inf), ("yes", -math.inf)]))
    assert artifact_reward.prob_no([("no", -math.inf), ("yes", -1.0)]) == 0
    assert artifact_reward.prob_no([("no", -1.0)]) == 1


def test_each_picture_has_its_own_score_and_what_is_neither_yes_nor_no_is_counted():
    replies = [[("no", -1.0), ("yes", -1.0)], [], [("The", 0.0), ("A", -1.0)], [("The", 0.0)]]
    asked = []

    def answers(question, images):
        asked.append((question, images))
        return replies

    judge = types.SimpleNamespace(answers=answers, failures=collections.Counter())
    scores = artifact_reward.judge_images(judge, "Broken?", ["a", "b", "c", "d"])
    assert scores == pytest.approx([0.5, NAN, NAN, NAN], nan_ok=True)
    assert asked == [("Broken?", ["a", "b", "c", "d"])]
    # No answer at all is counted where the request failed, with the reason.
    assert judge.failures == {"neither yes nor no, but 'The' (yes and no have less than 1%)": 2}


def test_a_judge_in_this_process_gives_its_twenty_likeliest_first_tokens(artifact):
    question = "Do you see noise in this picture? Answer yes or no."
    images = [image.resize((32, 32)) for image in artifact_reward.sanity_images()]
    found = artifact.judge.answers(question, [image.convert("RGBA") for image in images])
    with torch.no_grad():
        logits = artifact.judge.logits([question] * 2, images)
    for answer, row in zip(found, logits.tolist()):
        total = math.log(sum(map(math.exp, row)))
        likeliest = sorted(range(len(row)), key=lambda token: -row[token])[:20]
        tokens = [artifact.judge.tokenizer.decode([token]) for token in likeliest]
        assert [token for token, _ in answer] == tokens
        expected = pytest.approx([row[token] - total for token in likeliest], abs=1e-4)
        assert [logprob for _, logprob in answer] == expected
    assert len(found) == 2 and found[0] != found[1]


def test_a_judge_in_this_process_looks_at_sixty_four_pictures_at_a_time(artifact, monkeypatch):
    calls = []

    def logits(questions, images):
        calls.append((questions, [image.getpixel((0, 0))[0] for image in images]))
        assert {image.mode for image in images} == {"RGB"}
        return torch.eye(65, 500)[[image.getpixel((0, 0))[0] for image in images]]

    monkeypatch.setattr(artifact.judge, "logits", logits)
    images = [Image.new("RGBA", (2, 2), (n, 0, 0, 255)) for n in range(65)]
    found = artifact.judge.answers("Broken?", images)
    assert calls == [(["Broken?"] * 64, list(range(64))), (["Broken?"], [64])]
    first = [answer[0][0] for answer in found]
    assert first == [artifact.judge.tokenizer.decode([n]) for n in range(65)]


def test_a_batch_without_a_readable_picture_does_not_end_the_judging(artifact):
    narrow, good = Image.new("RGB", (1, 500)), Image.new("RGB", (32, 32), "red")
    found = artifact.judge.answers("Is there noise? Answer yes or no.", [narrow] * 64 + [good])
    assert found[:64] == [[]] * 64 and len(found[64]) == 20


def test_the_sanity_check_asks_about_a_clean_and_a_broken_picture(artifact, monkeypatch, capsys):
    clean_and_broken = [image.tobytes() for image in artifact_reward.sanity_images()]

    def scores(first, second):
        def answers(judge, question, images):
            assert (judge, question) == (artifact.judge, artifact.question)
            assert [image.tobytes() for image in images] == clean_and_broken
            return [(score, [("No", math.log(0.9))]) for score in (first, second)]

        monkeypatch.setattr(artifact_reward, "judge_answers", answers)

    scores(0.6, 0.5)
    artifact.check()
    for first, second in ((0.5, 0.5), (0.4, 0.5), (NAN, 0.5), (0.5, NAN)):
        scores(first, second)
        with pytest.raises(SystemExit) as stop:
            artifact.check()
        assert stop.value.code == 2 and "wrong way round" in capsys.readouterr().err


# --- a server that misbehaves on command

GOOD = [("No", -0.2), ("Yes", -1.8)]
P_GOOD = 1 / (1 + math.exp(-1.6))


class Judge(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server. `behaviour`: number of a request (from 0) -> what happens."""

    behaviour, requests, times, lock = staticmethod(lambda n: "good"), [], [], threading.Lock()
    models, key = {"object": "list", "data": [{"id": "qwen", "object": "model"}]}, None

    def log_message(self, *_):
        pass

    def reply(self, status, body, headers=()):
        page = isinstance(body, bytes)
        data = body if page else json.dumps(body).encode()
        self.send_response(status)
        for name, value in [
            ("Content-Length", str(len(data))),
            ("Content-Type", "text/html" if page else "application/json"),
            *headers,
        ]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        Judge.key = self.headers["Authorization"]
        self.reply(200, Judge.models)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Judge.lock:
            what = Judge.behaviour(len(Judge.requests))
            Judge.requests.append(request)
            Judge.times.append(time.monotonic())
        if what == "400":
            return self.reply(400, {"error": {"message": "picture too large"}})
        if what == "429":
            return self.reply(429, {"error": {"message": "slow down"}}, [("Retry-After", "1")])
        if what == "500":
            return self.reply(500, {"error": {"message": "oops"}})
        if what == "502":
            return self.reply(502, {"error": {"message": "nobody there"}})
        if what == "drip":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.2)
        if what == "hang":
            return time.sleep(3)
        if what == "half":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            return self.wfile.write(b'{"choices": [{"ind')
        top = {
            "garbage": [("The", -0.1)],
            "spellings": [(" no", -1.2), ("NO", -1.0), (" YES", -1.8)],
            "thinking": [("So", -0.58), ("Got", -0.82), ("Yes", -13.0), ("No", -13.7)],
            "none": [],
        }.get(what, GOOD)
        choices = [] if what == "empty" else [self.choice(top)]
        if what == "html":
            return self.reply(200, b"<html>a proxy's page</html>")
        if what == "a list":
            return self.reply(200, [1, 2])
        if what == "null logprob":
            choices[0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = None
        if what == "no top":
            choices[0]["logprobs"]["content"][0]["top_logprobs"] = []
        choices = {"null choices": None, "odd choices": "abc"}.get(what, choices)
        head = {"id": "1", "object": "chat.completion", "created": 0, "model": "qwen"}
        self.reply(200, head | {"choices": choices})

    def choice(self, top):
        """One token and its likeliest alternatives, in the format of OpenAI's API."""
        tokens = [{"token": text, "logprob": logprob, "bytes": None} for text, logprob in top]
        content = [tokens[0] | {"top_logprobs": tokens}] if top else []
        return {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": "x"},
            "logprobs": {"content": content} if top else None,
        }


@pytest.fixture
def server(monkeypatch):
    """behave(what) -> url; `what` is a name, or a function of the request's number."""
    Judge.requests.clear(), Judge.times.clear()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()

    def behave(what="good"):
        monkeypatch.setattr(
            Judge, "behaviour", staticmethod(what if callable(what) else lambda n: what)
        )
        return f"http://127.0.0.1:{httpd.server_port}/v1"

    yield behave
    httpd.shutdown()


def judged(url, n=1, timeout=0.5, each=2.0, **options):
    judge = ServedJudge([url], timeout=timeout, each=each, **options)
    return artifact_reward.judge_images(
        judge, "Broken?", [Image.new("RGB", (8, 8))] * n
    ), judge.failures


@pytest.mark.parametrize(
    "what, requests, reason",
    [
        ("400", 1, "picture too large"),  # the request is at fault: asking again would not help
        ("garbage", 1, "neither yes nor no, but 'The'"),
        ("thinking", 1, "neither yes nor no, but 'So'"),
        ("empty", 1, "without logprobs"),
        ("none", 1, "without logprobs"),
        ("html", 1, "without logprobs"),
        ("a list", 1, "without logprobs"),
        ("null choices", 1, "without logprobs"),
        ("odd choices", 1, "without logprobs"),
        ("null logprob", 1, "without logprobs"),
        ("no top", 1, "without logprobs"),
        ("500", 3, "oops"),
        ("502", None, "InternalServerError"),  # of a proxy whose server is away: waited for
        ("hang", None, "APITimeoutError|no answer within 2 s"),
        ("drip", 1, "no answer within 2 s"),  # a time-out of each read would wait for ever
        ("half", None, "Error"),
    ],
)
def test_a_judge_that_gives_no_answer_gives_no_score_and_the_reason_is_kept(
    server, what, requests, reason
):
    (score,), failures = judged(server(what))
    assert math.isnan(score) and len(failures) == 1 and re.search(reason, next(iter(failures)))
    assert requests is None or len(Judge.requests) == requests


@pytest.mark.parametrize("models", [{"data": []}, {"data": None}, {}, [], b"<html>", {"data": [1]}])
def test_a_server_that_lists_no_models_is_no_judge(models, server, monkeypatch, capsys):
    monkeypatch.setattr(Judge, "models", models)
    with pytest.raises(SystemExit, match="2"):
        ServedJudge([server()])
    err = capsys.readouterr().err
    assert "no judge answers at" in err or "serves no model" in err


def test_the_key_of_the_environment_reaches_the_server(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ServedJudge([server()])
    assert Judge.key == "Bearer secret"


def test_two_errors_and_then_an_answer_is_an_answer(server):
    (score,), failures = judged(server(lambda n: "500" if n < 2 else "good"))
    assert score == pytest.approx(P_GOOD) and not failures and len(Judge.requests) == 3


def test_a_busy_judge_is_given_the_time_it_asks_for(server):
    (score,), failures = judged(server(lambda n: "429" if n == 0 else "good"))
    assert score == pytest.approx(P_GOOD) and not failures
    assert Judge.times[1] - Judge.times[0] >= 0.9  # Retry-After: 1


def test_spellings_and_spaces_of_the_server_count_as_well(server):
    (score,), _ = judged(server("spellings"))
    no, yes = math.exp(-1.2) + math.exp(-1.0), math.exp(-1.8)
    assert score == pytest.approx(no / (no + yes))


def test_one_failing_picture_leaves_the_others_their_scores(server):
    scores, failures = judged(server(lambda n: "400" if n == 2 else "good"), n=5)
    assert sum(map(math.isnan, scores)) == 1 and sum(failures.values()) == 1
    assert [s for s in scores if not math.isnan(s)] == pytest.approx([P_GOOD] * 4)


def test_a_hanging_request_does_not_hold_up_the_others(server):
    start = time.monotonic()
    url = server(lambda n: "hang" if n % 2 or n > 15 else "good")
    scores, _ = judged(url, n=16, timeout=1.5, each=1.5)
    # One after the other: 8 x 1.5 s.
    assert sum(map(math.isnan, scores)) == 8 and time.monotonic() - start < 6


def test_all_requests_together_have_a_time_too_and_the_screen_says_what_is_waited_for(
    server, monkeypatch, capsys
):
    monkeypatch.setattr(waiting, "SAY_AFTER", 0.5)
    start = time.monotonic()
    scores, failures = judged(server("drip"), n=40, each=100.0, total=2.0)
    assert all(map(math.isnan, scores)) and time.monotonic() - start < 4
    assert list(failures.values()) == [40] and "2 s after the first" in next(iter(failures))
    err = capsys.readouterr().err
    assert "waiting for the judge at http://127.0.0.1" in err and "40 of 40 not answered" in err


def test_a_judge_that_is_away_for_a_while_is_waited_for(server, monkeypatch, capsys):
    monkeypatch.setattr(judge_file, "RETURN", 0.5)
    start = time.monotonic()
    behave = lambda n: "502" if time.monotonic() - start < 3 else "good"
    scores, failures = judged(server(behave), n=3, each=20.0)
    assert scores == pytest.approx([P_GOOD] * 3) and not failures
    err = capsys.readouterr().err
    assert err.count("does not answer") == 1 and err.count("answers again") == 1


def test_the_work_of_a_judge_that_dies_is_done_by_the_other(server, capsys):
    url, dead = server(), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=dead.serve_forever, daemon=True).start()
    judge = ServedJudge([f"http://127.0.0.1:{dead.server_port}/v1", url])
    dead.shutdown(), dead.server_close()
    scores = artifact_reward.judge_images(judge, "Broken?", [Image.new("RGB", (8, 8))] * 12)
    assert scores == pytest.approx([P_GOOD] * 12) and not judge.failures
    err = capsys.readouterr().err
    assert err.count("does not answer") == 1 and "the others do its work" in err


def test_a_password_in_an_address_is_not_shown(server, capsys):
    host = server().removeprefix("http://")
    assert ServedJudge([f"http://me:secret@{host}"]).address == f"http://{host}"
    with pytest.raises(SystemExit):
        ServedJudge(["http://me:secret@127.0.0.1:9/v1"])
    assert "secret" not in capsys.readouterr().err


def test_several_servers_share_the_work(server):
    url = server()
    judge = ServedJudge([url, url + "/"])
    assert artifact_reward.judge_images(
        judge, "Broken?", [Image.new("RGB", (8, 8))] * 6
    ) == pytest.approx([P_GOOD] * 6)


def test_the_judge_sees_the_question_and_a_lossless_picture_and_not_the_prompt(server):
    artifact_reward.ArtifactReward(judge_urls=[server()], question="Broken?")(
        ["SECRET"], [Image.new("RGB", (8, 8))]
    )
    sent = json.dumps(Judge.requests[-1])
    assert "SECRET" not in sent and "Broken?" in sent and "data:image/png;base64," in sent


def test_a_question_is_a_text_of_any_length_or_a_file(tmp_path, capsys):
    long, file = "Is anything broken? " * 40, tmp_path / "question.txt"
    file.write_text("Any noise?\n")
    assert artifact_reward.read_question(long) == long.strip()
    assert (
        artifact_reward.read_question(str(file)) == "Any noise?"
        and artifact_reward.read_question(None) is None
    )
    file.write_text("\n")
    with pytest.raises(SystemExit):
        artifact_reward.read_question(str(file))
    assert "no question" in capsys.readouterr().err
    file.write_text("Any noise?\n")


def test_no_judge_at_the_address_is_said_before_anything_is_trained(capsys):
    with pytest.raises(SystemExit) as stop:
        artifact_reward.ArtifactReward(judge_urls=["http://127.0.0.1:9/v1"])
    assert stop.value.code == 2 and "vllm serve" in capsys.readouterr().err


def test_a_model_that_is_not_served_is_refused(server, capsys):
    with pytest.raises(SystemExit):
        artifact_reward.ArtifactReward(judge_urls=[server()], judge_model="gpt")
    assert "serves qwen" in capsys.readouterr().err


# --- a judge that is there, and wrong


class Answers:
    """A judge that gives these answers, one for each picture, and again for the next ones."""

    def __init__(self, *tops):
        self.tops, self.failures = tops, collections.Counter()

    def answers(self, question, images):
        return [self.tops[i % len(self.tops)] for i in range(len(images))]


def words(no, yes):
    return [("no", math.log(no)), ("yes", math.log(yes))]


@pytest.mark.parametrize(
    "clean, broken, passes",
    [
        (words(0.8, 0.2), words(0.2, 0.8), True),
        (words(0.50, 0.50), words(0.49, 0.51), False),  # a hair's breadth is no difference
        (words(0.04, 0.01), words(0.01, 0.04), False),  # 5 % of the first word, 95 % something else
        (words(0.8, 0.2), words(0.004, 0.005), False),  # the broken picture gets no score
    ],
)
def test_the_sanity_check_demands_an_answer_and_a_margin(clean, broken, passes, capsys):
    reward = artifact_reward.ArtifactReward.__new__(artifact_reward.ArtifactReward)
    reward.judge, reward.question = Answers(clean, broken), "Broken?"
    if passes:
        return reward.check()
    with pytest.raises(SystemExit) as stop:
        reward.check()
    assert stop.value.code == 2 and "apart" in capsys.readouterr().err


def test_a_picture_that_was_not_opened_gets_no_score_and_the_judge_is_not_asked():
    judge = Answers(words(0.6, 0.3), words(0.3, 0.6))
    picture = Image.new("RGB", (8, 8))
    scores = artifact_reward.judge_images(judge, "Broken?", [picture, None, picture])
    assert scores[::2] == pytest.approx([2 / 3, 1 / 3]) and math.isnan(scores[1])
    assert not judge.failures


def test_a_picture_too_narrow_for_the_judge_costs_one_score(artifact):
    picture, narrow = artifact_reward.sanity_images()[0], Image.new("RGB", (1093, 5))
    before = artifact.failures.total()
    scores = artifact([""] * 3, [picture, narrow, picture]).tolist()
    assert math.isnan(scores[1]) and scores[0] == scores[2] == artifact([""], [picture]).item()
    assert artifact.failures.total() == before + 1


def test_the_tiny_judge_passes_the_sanity_check(artifact):
    artifact.check()
    first, second = artifact_reward.sanity_images(), artifact_reward.sanity_images()
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second] and first[
        0
    ].tobytes() != first[1].tobytes()


def test_a_judge_that_cannot_tell_torn_from_whole_is_not_trained_on(server, capsys):
    reward = artifact_reward.ArtifactReward(
        judge_urls=[server()]
    )  # it says the same of every picture
    with pytest.raises(SystemExit) as stop:
        reward.check()
    assert stop.value.code == 2 and "wrong way round" in capsys.readouterr().err


def test_a_dying_judge_stops_the_run_after_a_checkpoint_and_is_quoted(server, tmp_path, capsys):
    """Ten requests go well, two for the sanity check, four for the first test, four for the first
    step; then it dies."""

    def behaviour(n):
        return "400" if n >= 2 + 4 + 4 else "good"

    url = server(behaviour)
    args = [
        "--rewards",
        "hps,artifact",
        "--judge-url",
        url,
        "--max-steps",
        "9",
        "--num-generations",
        "2",
        "--prompts-per-step",
        "2",
        "--eval-images",
        "4",
        "--best-of",
        "0",
        "--output-dir",
        str(tmp_path),
    ]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(
            artifact_reward.ArtifactReward,
            "check",
            lambda self, _: self([""] * 2, artifact_reward.sanity_images()),
        )
        grpo.main(tyro.cli(grpo.Config, args=args))
    assert stop.value.code == 3 and "picture too large" in capsys.readouterr().err
    (run,) = tmp_path.iterdir()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]
    del stop  # its traceback keeps the lock of the run
    gc.collect()
    # Nothing was trained on the step without scores; it is made again when the run goes on.
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [0]
    server("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact_reward.ArtifactReward, "check", lambda *_: None)
        again = ["--resume", str(run), "--max-steps", "2"]
        grpo.main(tyro.cli(grpo.Config, args=[*args, *again]))
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [0, 1]


# --- the command line


def test_the_answer_can_be_looked_at(tmp_path, capsys):
    for name, image in zip(("whole", "torn"), artifact_reward.sanity_images(32)):
        image.save(tmp_path / f"{name}.png")
    args = [
        str(tmp_path / "whole.png"),
        str(tmp_path / "torn.png"),
        "--explain",
        str(tmp_path / "page.html"),
    ]
    with pytest.raises(SystemExit) as stop:
        artifact_reward.main(tyro.cli(artifact_reward.Config, args=args))
    page = (tmp_path / "page.html").read_text()
    assert stop.value.code == 0 and page.count("data:image/png") == 2
    assert "&#39;yes&#39;" in page  # escaped, like every text in a page
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    "side, args, rule",
    [(65, ["x.png"], "knows pictures of 32 x 32"), (32, [], "name pictures")],
    ids=["a photograph", "nothing"],
)
def test_what_the_tiny_judge_cannot_score_is_refused(
    side, args, rule, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (side, side)).save("x.png")
    with pytest.raises(SystemExit, match="2"):
        artifact_reward.main(tyro.cli(artifact_reward.Config, args=args))
    assert rule in capsys.readouterr().err


def test_a_file_that_is_no_picture_costs_one_score(tmp_path, capsys):
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(SystemExit) as stop:
        artifact_reward.main(tyro.cli(artifact_reward.Config, args=[str(tmp_path / "x.png")]))
    assert stop.value.code == 3 and "nan" in capsys.readouterr().out
