"""Rewards over HTTP: the same numbers, and nothing that a server or a caller sends does harm."""

import contextlib
import http.client
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
import requests
import torch
import tyro
from PIL import Image

import rewards
from reward_models import serving
from reward_models.image_statistics import Jpeg
from reward_models.pixels import data_url
from reward_models.serving import DeQA, RemoteReward
from training import waiting
from training.files import ROOT

PHOTOS = [
    Image.effect_mandelbrot((60, 40), (-2, -1.5, 1, 1.5), 40),
    Image.radial_gradient("L").resize((32, 32)),
    Image.linear_gradient("L").resize((32, 32)),
]
PROMPTS = ["a red circle", "two blue stars", "a red circle"]


@pytest.fixture
def served(hps):
    """The URL of a server for hps."""
    server = serving.serve("hps", hps, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_remote_reward_gives_the_same_numbers(hps, served):
    remote = rewards.load("hps", checkpoint="tiny", url=served)
    assert remote.identity == hps.identity and remote.address == served
    assert remote.range == hps.range and remote.remote
    assert torch.equal(remote(PROMPTS, PHOTOS), hps(PROMPTS, PHOTOS))


def test_a_range_without_bounds_reaches_the_client():
    server = serving.serve("jpeg", Jpeg(), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert RemoteReward("jpeg", f"http://127.0.0.1:{server.server_port}").range == (-1e9, 0)
    server.shutdown()
    server.server_close()


def test_a_server_that_dies_gives_nan_and_the_reason(served):
    remote = RemoteReward("hps", served)
    remote.url, remote.each = "http://127.0.0.1:9", 2.0
    assert remote(PROMPTS, PHOTOS).isnan().all()
    ((reason, count),) = remote.failures.items()
    assert "ConnectionError" in reason and count == len(PHOTOS)


def test_bad_requests_are_refused_and_the_server_goes_on(served):
    different_numbers = {"prompts": ["x"], "images": [], "metadata": []}
    assert requests.post(f"{served}/score", data=b"{").status_code == 400
    assert requests.post(f"{served}/score", json=different_numbers).status_code == 400
    assert requests.get(f"{served}/about").json()["name"] == "hps"


BAD_BODIES = [
    b"[" * 100000,
    b"[]",
    b'{"prompts": "ab", "images": ["", ""], "metadata": [{}, {}]}',
    b'{"prompts": [1], "images": [""], "metadata": [{}]}',
    b'{"prompts": ["a"], "images": [5], "metadata": [{}]}',
    b'{"prompts": ["a"], "images": [""], "metadata": null}',
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_request_of_another_form_is_answered_with_the_reason(body, served):
    reply = requests.post(f"{served}/score", data=body)
    assert reply.status_code == 400 and reply.json()["error"]


@pytest.mark.parametrize("length, status", [("-1", 411), ("x", 411), ("999999999999", 413)])
def test_a_length_that_is_none_is_refused_before_anything_is_read(length, status, served):
    connection = http.client.HTTPConnection(served.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/score")
    connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == status


def test_pictures_with_too_many_pixels_together_are_refused(served):
    url = data_url(Image.new("1", (6000, 6000)))  # a few kB each
    body = {"prompts": ["p"] * 3, "images": [url] * 3, "metadata": [{}] * 3}
    reply = requests.post(f"{served}/score", json=body)
    assert reply.status_code == 413 and "pixels" in reply.json()["error"]


def test_large_pictures_are_sent_in_smaller_requests():
    """A request has room for half as many pixels as the server takes, or for one picture."""
    sizes = [(100, 100)] * 20 + [(5000, 5000)] * 3 + [(8192, 8192), (10, 10)]
    images = [types.SimpleNamespace(width=w, height=h) for w, h in sizes]
    batches = [range(25)[batch] for batch in serving.small_batches(images)]
    assert [len(batch) for batch in batches] == [16, 5, 1, 1, 1, 1]  # 4 small ones and a large one
    assert [i for batch in batches for i in batch] == list(range(25))
    for batch in batches:
        assert len(batch) == 1 or sum(sizes[i][0] * sizes[i][1] for i in batch) <= serving.PIXELS
    assert serving.small_batches([]) == []


def test_pictures_that_are_too_many_for_one_request_are_all_scored(monkeypatch):
    server = serving.serve("jpeg", Jpeg(), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote = RemoteReward("jpeg", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(serving, "MAX_PIXELS", 3000)  # the server's: two of these pictures
    monkeypatch.setattr(serving, "PIXELS", 2048)
    assert torch.equal(remote(PROMPTS, PHOTOS), Jpeg()(PROMPTS, PHOTOS))
    server.shutdown()
    server.server_close()


def test_a_reward_that_fails_does_not_take_the_server_with_it(monkeypatch):
    reward = Jpeg()
    server = serving.serve("jpeg", reward, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote = RemoteReward("jpeg", f"http://127.0.0.1:{server.server_port}")
    with monkeypatch.context() as patch:
        patch.setattr(Jpeg, "__call__", lambda *_: 1 / 0)
        assert remote(PROMPTS, PHOTOS).isnan().all()
    ((reason, count),) = remote.failures.items()
    assert "500" in reason and "ZeroDivisionError" in reason and count == len(PHOTOS)
    assert torch.equal(remote(PROMPTS, PHOTOS), reward(PROMPTS, PHOTOS))
    server.shutdown()
    server.server_close()


def test_a_token_closes_a_server(monkeypatch, capsys):
    server = serving.serve("jpeg", Jpeg(), 0, token="word")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for token in ("", "other", "wörd"):
        monkeypatch.setenv("REWARD_TOKEN", token)
        with pytest.raises(SystemExit):
            RemoteReward("jpeg", url)
    assert requests.post(f"{url}/score", json={}).status_code == 401
    monkeypatch.setenv("REWARD_TOKEN", "word")
    assert RemoteReward("jpeg", url)(PROMPTS, PHOTOS).isfinite().all()
    server.shutdown()
    server.server_close()


def test_a_taken_port_is_one_clear_error(served, capsys):
    with pytest.raises(SystemExit):
        serving.serve("jpeg", Jpeg(), int(served.rpartition(":")[2]))
    assert "another --port" in capsys.readouterr().err


def test_who_can_use_a_served_reward_is_said(capsys):
    serving.announce("hps", "0.0.0.0", 8100, "")
    out = capsys.readouterr().out
    assert "0.0.0.0" not in out and "everybody" in out and ":8100" in out
    serving.announce("hps", "0.0.0.0", 8100, "word")
    out = capsys.readouterr().out
    assert "everybody" not in out and "REWARD_TOKEN=word" in out


class Nonsense(http.server.BaseHTTPRequestHandler):
    """A server of the reward x that answers with `body`."""

    about, body = {"name": "x", "range": [0, 1], "reference": ""}, ""

    def log_message(self, *_):
        pass

    def reply(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.reply(json.dumps(self.about))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(self.body)


@pytest.fixture
def nonsense():
    handler = type("Handler", (Nonsense,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "{}",
        '{"scores": {"0": 1, "1": 2, "2": 3}}',
        '{"scores": ["a", "b", "c"]}',
        '{"scores": [1, 2]}',
        '{"scores": [[1], [2], [3]]}',
        '{"scores": [true, 1, 1]}',
        '{"scores": [1, 1, 1' + "0" * 400 + "]}",
        "[1, 2, 3]",
        "[" * 60_000,
    ],
)
def test_what_is_no_list_of_scores_is_a_counted_failure(body, nonsense):
    handler, url = nonsense
    handler.body = body
    remote = RemoteReward("x", url)
    assert remote(PROMPTS[:3], PHOTOS[:3]).isnan().all()
    ((reason, count),) = remote.failures.items()
    assert "no list of 3 scores" in reason and count == 3


def test_an_answer_that_does_not_end_is_given_up(nonsense, monkeypatch):
    handler, url = nonsense
    remote = RemoteReward("x", url)
    monkeypatch.setattr(serving, "ANSWER", 1000)
    handler.body = " " * 5000
    assert remote(PROMPTS[:3], PHOTOS[:3]).isnan().all()
    assert "does not end" in next(iter(remote.failures))


def test_an_answer_that_comes_too_slowly_is_given_up():
    """A byte each tenth of a second: no single wait is long."""

    def drip(listener):
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        begin = time.monotonic()
        with pytest.raises(waiting.Unanswered, match="does not end"):
            serving.fetch("GET", f"http://127.0.0.1:{listener.getsockname()[1]}", 0.5)
        assert time.monotonic() - begin < 3


def test_a_token_that_no_header_can_carry_is_refused(capsys, served):
    with pytest.raises(SystemExit, match="2"):
        serving.serve("jpeg", Jpeg(), 0, token="geheim-ü")
    assert "ASCII" in capsys.readouterr().err
    server = serving.serve("jpeg", Jpeg(), 0, token="word")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    about = f"http://127.0.0.1:{server.server_port}/about"
    for given, status in (("Bearer ü", 401), ("Bearer word", 200)):
        headers = {"Authorization": given.encode("latin-1")}
        assert requests.get(about, headers=headers).status_code == status
    server.shutdown()
    server.server_close()


def test_null_and_nan_are_no_scores_and_the_others_count(nonsense):
    handler, url = nonsense
    handler.body = '{"scores": [null, NaN, 0.5]}'
    remote = RemoteReward("x", url)
    scores = remote(PROMPTS[:3], PHOTOS[:3])
    assert scores[:2].isnan().all() and scores[2] == 0.5
    assert remote.failures == {"the server gave no score": 2}


@pytest.mark.parametrize("number", [1, 4])
def test_a_served_reward_that_gives_another_number_of_scores_gives_none(number, monkeypatch):
    monkeypatch.setattr(Jpeg, "__call__", lambda *_: torch.zeros(number))
    server = serving.serve("jpeg", Jpeg(), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote = RemoteReward("jpeg", f"http://127.0.0.1:{server.server_port}")
    assert remote(PROMPTS, PHOTOS).isnan().all()
    assert f"gave ({number},) scores for 3 pictures" in str(remote.failures)
    server.shutdown()
    server.server_close()


def test_a_missing_field_of_a_prompt_is_sent_as_null(served, hps):
    metadata = [{"count": float("nan")}, {}, {}]
    remote = RemoteReward("hps", served, each=5)
    assert torch.equal(remote(PROMPTS, PHOTOS, metadata), hps(PROMPTS, PHOTOS))


@pytest.mark.parametrize(
    "about",
    [[], {}, {"name": "x"}, {"name": "x", "range": 1, "reference": ""}]
    + [{"name": "x", "range": [0, None], "reference": ""}, {"range": [0, 1], "reference": ""}]
    + [{"name": "x", "range": ["a", "b"], "reference": ""}],
)
def test_a_server_that_does_not_say_what_it_serves_is_none(about, nonsense, capsys):
    handler, url = nonsense
    handler.about = about
    with pytest.raises(SystemExit, match="2"):
        RemoteReward("x", url)
    assert "no reward answers" in capsys.readouterr().err


def test_the_toy_is_not_taken_for_the_published_reward(served, capsys):
    with pytest.raises(SystemExit):
        rewards.load("hps", url=served)
    assert "tiny world" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rewards.main(tyro.cli(rewards.Config, args=["serve", "hps"]))
    assert "which weights?" in capsys.readouterr().err


def test_a_server_of_another_reward_is_refused(served, capsys):
    with pytest.raises(SystemExit):
        RemoteReward("pickscore", served)
    assert "serves 'hps'" in capsys.readouterr().err


def test_an_address_without_a_server_is_one_clear_error(capsys):
    with pytest.raises(SystemExit):
        RemoteReward("hps", "http://127.0.0.1:9")
    assert "rewards.py serve hps --model real --port 9" in capsys.readouterr().err


def test_deqa_without_its_environment_says_how_to_make_one(capsys):
    with pytest.raises(SystemExit):
        DeQA()
    assert "reward_models/deqa_server.py" in capsys.readouterr().err


STAND_IN = """import torch
class Scorer:
    def __init__(self, pretrained, device): pass
    def __call__(self, images):
        return torch.tensor([image.width / 8 for image in images]).half()
"""


def test_deqa_is_served_from_its_own_environment(tmp_path):
    """A stand-in replaces the package of that environment; the server and the client are real."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/__init__.py").write_text(STAND_IN)
    command = [sys.executable, "reward_models/deqa_server.py", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    options = dict(cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **options) as server:
        try:
            url = re.search(r"http://[\d.:]+", server.stdout.readline())[0]
            expected = [i % 5 + 1 for i in range(19)]  # more than two batches
            images = [Image.new("RGB", (8 * score, 8)) for score in expected]
            remote = RemoteReward("deqa", url)
            assert remote(["p"] * 19, images).tolist() == expected
            assert remote.identity == f"deqa | {DeQA.checkpoint}"  # whose weights these are
        finally:
            server.kill()


def test_a_taken_port_is_found_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(rewards, "load", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ["serve", "hps", "--model", "tiny", "--port", port]
        with pytest.raises(SystemExit, match="2"):
            rewards.main(tyro.cli(rewards.Config, args=flags))
    assert f"--port {port}: " in (err := capsys.readouterr().err) and err.count("\n") == 1
