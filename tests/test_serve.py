"""A reward model behind HTTP: the protocol, what is refused and how, and the same scores as training gives."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nemo_rlhf.cli import reward_connections, reward_server
from nemo_rlhf.cli.reward_server import RewardServer
from nemo_rlhf.config import load
from nemo_rlhf.config.server import ServerConfig

TOKEN = "REWARD_TOKEN_OF_TESTS"


def ask(url: str, body: Any, *, method: str = "POST", path: str | None = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, answer and headers; ``body`` is sent as JSON, or as it is where it is bytes."""
    host, _, own = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, path or f"/{own}", data, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()


def samples(*texts: str) -> dict[str, Any]:
    return {"samples": [{"prompt": "p ", "response": text, "metadata": {"x": 1}} for text in texts]}


def encode(prompt: str, response: str, where: str) -> tuple[int, ...]:
    if len(response) > 40:
        raise ValueError(f"{where} is too long.")
    return tuple(map(ord, prompt + response))


@contextmanager
def serving(config: ServerConfig, score: Callable[[Sequence[int]], float]) -> Iterator[tuple[RewardServer, list[int]]]:
    """A server whose model is ``score``, and how many texts were scored together each time."""
    server, taken, done = RewardServer(config), [], threading.Event()

    def work() -> None:
        while not done.is_set():
            if jobs := server.jobs.take(config.batch_size, 0.02):
                taken.append(sum(len(job.texts) for job in jobs))
                for job in jobs:
                    job.scores.set_result([score(text) for text in job.texts])

    server.start(encode)
    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield server, taken
    finally:
        done.set()
        worker.join()
        server.close()


# ---- the protocol


def test_scores_arrive_in_order_whoever_asks(tmp_path: Path) -> None:
    """Many clients at a time: what comes while the model is busy is scored together, and nobody gets another's."""
    config = ServerConfig(port=0, batch_size=8, url_file=str(tmp_path / "new" / "reward.url"))

    def slow(text: Sequence[int]) -> float:
        time.sleep(0.005)
        return float(sum(text))

    with serving(config, slow) as (server, taken):
        url = (tmp_path / "new" / "reward.url").read_text().strip()
        assert url == server.url and url.startswith("http://127.0.0.1:") and url.endswith("/score")
        wanted = [[f"{client}{'x' * number}" for number in range(client % 4)] for client in range(24)]
        with ThreadPoolExecutor(12) as clients:
            answers = list(clients.map(lambda texts: ask(url, samples(*texts)), wanted))
        for texts, (status, answer, _) in zip(wanted, answers, strict=True):
            assert status == 200
            assert answer == {"rewards": [float(sum(encode("p ", text, ""))) for text in texts]}
        assert max(taken) > 3 and all(number < 8 + 3 for number in taken)
        assert ask(url, None, method="GET", path="/health")[:2] == (200, {"status": "ok"})
    assert list((tmp_path / "new").iterdir()) == [], "the file must be gone when nobody answers"


def test_a_retry_is_not_scored_again() -> None:
    gate = threading.Event()
    with serving(ServerConfig(port=0), lambda text: gate.wait(20) * 2.0) as (server, taken):
        with ThreadPoolExecutor(3) as clients:
            answers = [clients.submit(ask, server.url, samples("a", "b")) for _ in range(3)]
            time.sleep(0.3)
            gate.set()
            assert [answer.result()[:2] for answer in answers] == [(200, {"rewards": [2.0, 2.0]})] * 3
        assert ask(server.url, samples("a", "b"))[1] == {"rewards": [2.0, 2.0]}
        assert taken == [2]
        assert ask(server.url, samples("b", "a"))[1] == {"rewards": [2.0, 2.0]} and taken == [2, 2]


def test_a_failure_of_the_server_is_said_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(prompt: str, response: str, where: str) -> tuple[int, ...]:
        raise TypeError("no such tokenizer")

    monkeypatch.setattr("tests.test_serve.encode", broken)
    with serving(ServerConfig(port=0), lambda text: 1.0) as (server, _):
        status, answer, _ = ask(server.url, samples("a"))
    assert (status, answer) == (500, {"error": "The server failed; its log says how."})
    assert "TypeError: no such tokenizer" in capfd.readouterr().err


def test_what_is_refused_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, " secret \n")
    config = ServerConfig(port=0, token_env=TOKEN, max_body_mib=1)
    allowed = {"Authorization": "Bearer secret"}
    with serving(config, lambda text: float("nan") if ord("N") in text else 1.0) as (server, _):

        def refused(body: Any, **more: Any) -> tuple[int, str]:
            status, answer, headers = ask(server.url, body, **{**allowed, **more})
            assert list(answer) == ["error"] and answer["error"].endswith("."), answer
            assert headers["Content-Type"] == "application/json"
            return status, answer["error"]

        assert ask(server.url, samples("a"), **allowed)[:2] == (200, {"rewards": [1.0]})
        assert ask(server.url, samples(), **allowed)[:2] == (200, {"rewards": []})
        for wrong in ("", "Bearer secre", "Bearer secrets", "secret", "Bearer \xe9"):
            status, answer, headers = ask(server.url, samples("a"), Authorization=wrong)
            assert status == 401 and "token" in answer["error"] and headers["WWW-Authenticate"] == "Bearer"
        assert refused(samples("a"), path="/scores")[0] == 404
        assert refused(None, method="GET", path="/score")[0] == 404
        assert refused(b"{", path="/score") == refused(b"\xff\xfe")
        assert refused(b"[" * 100000)[0] == 400 and "not JSON" in refused(b"")[1]
        assert 'no list "samples"' in refused([1])[1] and 'no list "samples"' in refused({"samples": 3})[1]
        for sample in ({"prompt": "a"}, {"prompt": "a", "response": None}, {"prompt": "a", "response": 3}, "a", None):
            assert refused({"samples": [{"prompt": "", "response": ""}, sample]})[1].startswith(
                "samples[1] has no text"
            )
        assert refused({"samples": [{"response": "a"}]}) == (400, 'samples[0] has no text "prompt".')
        assert "surrogate" in refused(b'{"samples": [{"prompt": "\\ud800", "response": ""}]}')[1]
        assert refused(samples("a", "b" * 41)) == (400, "samples[1] is too long.")
        assert refused(samples("a", "N")) == (422, "The reward model's score of samples[1] is not finite.")
        status, sentence = refused(b" " * (2 << 20))
        assert status == 413 and "the server takes 1 MiB" in sentence
        assert refused(None, Content_Length="many")[0] == 411
        assert ask(server.url, samples("a"), **allowed)[0] == 200, "it must have outlived all that"


def speak(url: str, said: bytes) -> bytes:
    """What comes back until the server ends the connection, which it must do."""
    host, port = url.split("/")[2].rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=20) as peer:
        peer.sendall(said)
        heard = b""
        with suppress(ConnectionError):
            while piece := peer.recv(1 << 16):
                heard += piece
        return heard


def test_a_request_has_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a proxy may take for a body, or for the next request, is answered as the other."""
    monkeypatch.setenv(TOKEN, "secret")
    monkeypatch.setattr(reward_connections, "_LINGER_S", 0.1)
    body = json.dumps(samples("a")).encode()
    hidden = b"POST /score HTTP/1.1\r\nAuthorization: Bearer secret\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    post = b"POST /score HTTP/1.1\r\nHost: x\r\n"
    length = b"Content-Length: %d\r\n" % len(hidden)
    heads = {
        post + b"Transfer-Encoding: chunked\r\n" + length: b"400",
        post + b"Transfer-Encoding:\x0bchunked\r\n" + length: b"400",
        post + b"Content-Length: 0\r\n" + length: b"400",
        post + length + b"Content-Length: 0\r\n": b"400",
        post + b"Content-Length: 0, %d\r\n" % len(hidden): b"411",
        post + b"Content-Length : %d\r\n" % len(hidden): b"400",
        post + b"X: a\rContent-Length: 0\r\n": b"400",
        post + b"X: a\0\r\nContent-Length: 0\r\n": b"400",
        post + b"Content-Length: +0\r\n": b"411",
        post + b"Content-Length: \xb2\r\n": b"411",
        post + length: b"401",
        post.replace(b"/score", b"/other") + length: b"404",
        post + b"Content-Length: 99999999\r\n": b"401",
        b"GET /health HTTP/1.1\r\n" + length: b"400",
        b"GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n": b"400",
        b"PUT /score HTTP/1.1\r\n" + length: b"501",
    }
    with serving(ServerConfig(port=0, token_env=TOKEN), lambda text: 1.0) as (server, taken):
        with ThreadPoolExecutor(8) as clients:
            heard = list(clients.map(lambda head: speak(server.url, head + b"\r\n" + hidden), heads))
        for (head, status), answer in zip(heads.items(), heard, strict=True):
            assert answer.startswith(b"HTTP/1.1 " + status) and answer.count(b"HTTP/1.1") == 1, (head, answer)
            assert b"Connection: close" in answer
        assert not taken and ask(server.url, samples("a"), Authorization="Bearer secret")[0] == 200


def test_strangers_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections without a request, or with half of one, end; those who have the token are served meanwhile."""
    monkeypatch.setenv(TOKEN, "secret")
    monkeypatch.setattr(reward_connections, "REQUEST_S", 0.5)
    monkeypatch.setattr(reward_server, "BODY_S", 0.7)
    monkeypatch.setattr(reward_connections, "_LINGER_S", 0.2)
    allowed = {"Authorization": "Bearer secret"}
    with serving(ServerConfig(port=0, token_env=TOKEN), lambda text: 1.0) as (server, _):
        http_server = server._http
        http_server.most = 6
        address = http_server.server_address[:2]
        kept = http.client.HTTPConnection(*address, timeout=20)  # type: ignore[arg-type]
        kept.request("POST", "/score", json.dumps(samples("a")).encode(), allowed)
        assert kept.getresponse().read()
        halves = [b"", b"POST /sc", b"POST /score HTTP/1.1\r\nContent-Length: 5\r\nX: ",
                  b"POST /score HTTP/1.1\r\nContent-Length: 9000000\r\n\r\n{",
                  b"POST /score HTTP/1.1\r\nAuthorization: Bearer secret\r\nContent-Length: 500\r\n\r\n{"]  # fmt: skip
        strangers = [socket.create_connection(address, timeout=20) for _ in range(20)]
        for place, stranger in enumerate(strangers):
            with suppress(ConnectionError):
                stranger.sendall(halves[place % len(halves)])
        assert len(http_server._open) <= 6
        for _ in range(3):
            assert ask(server.url, samples("b"), **allowed)[0] == 200
        kept.request("POST", "/score", json.dumps(samples("c")).encode(), allowed)
        assert kept.getresponse().status == 200, "who has shown the token is not pushed out"
        kept.close()
        for stranger in strangers:
            with suppress(ConnectionError):
                while stranger.recv(1 << 16):
                    pass
            stranger.close()
        until = time.monotonic() + 20
        while http_server._open and time.monotonic() < until:
            time.sleep(0.02)
        assert not http_server._open and not http_server._waits


def test_one_connection_for_many_requests() -> None:
    with serving(ServerConfig(port=0), lambda text: 1.0) as (server, _):
        connection = http.client.HTTPConnection(server.url.split("/")[2], timeout=30)
        for body in (samples("a"), {"samples": 1}, samples("b"), samples("c")):
            connection.request("POST", "/score", json.dumps(body).encode())
            answer = connection.getresponse()
            assert answer.status == (200 if body["samples"] != 1 else 400) and answer.read()
        assert connection.sock is not None, "it was closed between requests"
        connection.close()


def test_who_waits_when_it_ends_is_told_to_come_back() -> None:
    server = RewardServer(ServerConfig(port=0))
    server.start(encode)
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(ask, server.url, samples("a"))
        while not server.jobs._waiting:
            time.sleep(0.01)
        server.close()
        status, _, headers = waiting.result()
    assert status == 503 and headers["Retry-After"] == "5"
    with pytest.raises(ConnectionError):
        ask(server.url, samples("a"))


def test_a_file_of_another_server_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "reward.url"
    with serving(ServerConfig(port=0, url_file=str(path)), lambda text: 1.0):
        path.write_text("http://the-next-job:1/score\n")
    assert path.read_text() == "http://the-next-job:1/score\n"


def test_wrong_places_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(message: str, *overrides: str) -> None:
        with pytest.raises(ValueError, match=message):
            load("serve-reward", ["model.restore_from=m", *overrides])

    wrong("server.host=0.0.0.0 lets other machines in", "server.host=0.0.0.0")
    wrong("server.host=node7 lets other machines in", "server.host=node7")
    wrong("server.port=70000 is out of range", "server.port=70000")
    load("serve-reward", ["model.restore_from=m", "server.host=localhost"])
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ValueError, match=f"server.token_env={TOKEN} names an environment variable that is not set"):
        RewardServer(ServerConfig(port=0, token_env=TOKEN))
    monkeypatch.setenv(TOKEN, "x")
    with serving(ServerConfig(host="0.0.0.0", port=0, token_env=TOKEN), lambda text: 1.0) as (server, _):
        monkeypatch.setenv("SLURMD_NODENAME", "node7")
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(ValueError, match=f"server.port={port} cannot be listened on"):
            RewardServer(ServerConfig(host="0.0.0.0", port=port, token_env=TOKEN))
        other = RewardServer(ServerConfig(host="0.0.0.0", port=0, token_env=TOKEN))
        assert other.url.startswith("http://node7:")
        other.close()
    (tmp_path / "file").write_text("")
    server = RewardServer(ServerConfig(port=0, url_file=str(tmp_path / "file" / "url")))
    with pytest.raises(ValueError, match=r"server\.url_file=.*cannot be written"):
        server.start(encode)
    server.close()
