"""The comparison page under attack by whoever reaches its port: connections, addresses, cookies, a damaged store."""

from __future__ import annotations

import asyncio
import http.client
import random
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("fastapi", reason="needs the extra feedback")

from fastapi import HTTPException
from itsdangerous import TimestampSigner
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from nemo_rlhf.cli import main
from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.store import Store, run_name
from nemo_rlhf.feedback.web import app as app_module
from nemo_rlhf.feedback.web import connections
from nemo_rlhf.feedback.web.security import Attempts, Crowd, Hosts
from nemo_rlhf.feedback.web.server import _Server
from nemo_rlhf.feedback.web.text import differences, shown
from tests.feedback_site import SECRET, Place, csrf, field, make_place, plain_tasks

MOST = 8


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = make_place(tmp_path, plain_tasks(3))
    yield made
    made.store.close()


@pytest.fixture
def port(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of the server as it is, in a thread, with room for few connections and little patience."""
    monkeypatch.setattr(connections, "REQUEST_S", 0.5)
    monkeypatch.setattr(connections, "most_connections", lambda: MOST)
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(Hosts(place.app, {"page.example"}), "127.0.0.1", listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield listener.getsockname()[1]
        assert len(server.server_state.connections) <= MOST
        server.should_exit = True
        thread.join(20)


def ask(port: int, path: str, host: str = "127.0.0.1", **form: str) -> tuple[int, Any, str]:
    """Status, headers and text of one request by a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Host": host, "Content-Type": "application/x-www-form-urlencoded"}
    headers |= {name: form.pop(name) for name in ("Cookie", "X-Forwarded-For") if name in form}
    try:
        connection.request("POST" if form else "GET", path, urlencode(form) if form else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def open_with(port: int, said: bytes) -> socket.socket:
    stranger = socket.create_connection(("127.0.0.1", port), timeout=20)
    stranger.sendall(said)
    return stranger


def has_ended(stranger: socket.socket) -> bool:
    """Whether the server ends this connection; a test of one that it does not waits for 20 s and fails."""
    try:
        while stranger.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


# ---- connections


def test_half_sent_requests_keep_nobody_out(port: int) -> None:
    halves = [
        b"",
        b"GE",
        b"GET /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ",
        b"POST /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900\r\n\r\ncode=",
        b"POST /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nco",
        b"GET /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HT",  # a whole one, and half of the next
    ]
    strangers = [open_with(port, half) for half in halves]
    for _ in range(3):  # all rooms are taken, several times over
        strangers += [open_with(port, b"") for _ in range(MOST)]
        assert ask(port, "/sign-in")[0] == 200
    strangers += [open_with(port, half) for half in halves]
    assert all(map(has_ended, strangers))
    for stranger in strangers:
        stranger.close()


def test_a_long_answer_is_waited_for(port: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked whole is answered, however long the store takes and whoever comes meanwhile."""
    client = place.client("ben")
    (cookie,) = client.cookies.jar
    begun, gate = threading.Event(), threading.Event()
    progress = Desk.progress

    def slowly(desk: Desk) -> Any:
        begun.set()
        assert gate.wait(20)
        return progress(desk)

    monkeypatch.setattr(Desk, "progress", slowly)
    with ThreadPoolExecutor(1) as people:
        asked = people.submit(ask, port, "/", Cookie=f"{cookie.name}={cookie.value}")
        assert begun.wait(20)
        strangers = [open_with(port, b"") for _ in range(2 * MOST)]
        time.sleep(1.2)  # longer than a request may take to come
        gate.set()
        assert asked.result()[0] == 200
    for stranger in strangers:
        stranger.close()


def test_too_few_descriptors_are_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.new_event_loop()
    connections.quieten(loop)
    full = OSError(24, "Too many open files")
    for _ in range(1000):
        loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": full})
    loop.close()
    assert capfd.readouterr().err == "nemo-rlhf: connections are refused (Too many open files).\n"
    for files, most in ((64, 16), (300, 140), (1024, 256), (1 << 20, 256)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda kind, files=files: (files, files))
        assert connections.most_connections() == most


def test_many_who_wait_for_the_store_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "Crowd", partial(Crowd, 2))
    place = make_place(tmp_path, plain_tasks(3))
    clients = [place.client(name) for name in ("ada", "ben", "eve")]
    gate, waiting = threading.Event(), threading.Semaphore(0)
    following = Desk.next

    def held(desk: Desk) -> Any:
        waiting.release()
        assert gate.wait(20)
        return following(desk)

    monkeypatch.setattr(Desk, "next", held)
    with ThreadPoolExecutor(2) as people:
        asked = [people.submit(client.get, "/") for client in clients[:2]]
        for _ in asked:
            assert waiting.acquire(timeout=20)
        for path in ("/", "/sign-in"):
            answer = clients[2].get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5") and "Busy" in answer.text
        assert clients[2].get("/static/style.css").status_code == 200
        gate.set()
        assert [one.result().status_code for one in asked] == [200, 200]
    assert clients[2].get("/").status_code == 200
    place.store.close()


def test_a_locked_store_is_no_traceback(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def locked(*args: Any) -> None:
        raise OperationalError("BEGIN IMMEDIATE", {}, sqlite3.OperationalError("database is locked"))

    client = place.client("ben")
    monkeypatch.setattr(Desk, "next", locked)
    answer = client.get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5") and "try again" in answer.text
    assert answer.headers["x-frame-options"] == "DENY"
    assert capfd.readouterr().err == "nemo-rlhf: the store did not answer a request: database is locked\n"


# ---- addresses


def test_names_and_odd_addresses_lead_nowhere(port: int) -> None:
    for host in ("127.0.0.1", f"localhost:{port}", "[::1]:80", "10.1.2.3", "PAGE.example", socket.gethostname()):
        assert ask(port, "/sign-in", host)[0] == 200, host
    for host in ("evil.example", "", "page.example.evil.example", "127.0.0.1.evil.example", "a@127.0.0.1", "[::1"):
        status, headers, text = ask(port, "/sign-in", host)
        assert status == 421 and "--allow-host" in text and headers["X-Frame-Options"] == "DENY", host
    for path in ("/admin/", "/sign-in/", "//evil.example/sign-in/", "//evil.example/%2e%2e"):
        status, headers, text = ask(port, path)
        assert status == 404 and headers["Location"] is None, path
    assert len(ask(port, "/" * 30_000)[2]) < 4000


def test_codes_cannot_be_guessed_under_many_addresses(port: int, place: Place) -> None:
    _, headers, page = ask(port, "/sign-in")
    cookie = headers["Set-Cookie"].partition(";")[0]
    found = []
    for n in range(22):
        form = {"csrf": field(page, "csrf"), "code": f"guess {n}"}
        found.append(ask(port, "/sign-in", Cookie=cookie, **{"X-Forwarded-For": f"10.0.0.{n}"}, **form)[0])
    assert found == [401] * 20 + [429] * 2

    attempts, passed = Attempts(limit=20), []

    def attempt(_: int) -> None:
        try:
            attempts.begin("x" * 60_000)
            time.sleep(0.01)  # the look at the store
            passed.append(1)
        except HTTPException:
            pass

    with ThreadPoolExecutor(30) as people:
        list(people.map(attempt, range(60)))
    assert len(passed) == 20 and all(len(address) <= 64 for address in attempts._failed)
    attempts.succeeded("x" * 70_000)
    attempts.begin("x" * 80_000)


# ---- sessions


def test_signing_out_ends_the_sessions_everywhere(place: Place) -> None:
    here, there, other = place.client("ben"), place.client("ben"), place.client("eve")
    (kept,) = here.cookies.jar
    assert here.post("/sign-out", data={"csrf": csrf(here)}).status_code == 303
    stolen = place.client()
    stolen.cookies.set(kept.name, kept.value)
    for client in (stolen, there):
        answer = client.get("/")
        assert (answer.status_code, answer.headers["location"]) == (303, "sign-in")
    assert other.get("/").status_code == 200 and place.client("ben").get("/").status_code == 200
    before = place.client("eve")
    stolen.post("/sign-out", data={"csrf": csrf(stolen, "/sign-in")})  # of a session that is over: ends nothing
    assert before.get("/").status_code == 200


@pytest.mark.parametrize(
    ("ahead_s", "is_taken"), [(1, True), (50, True), (300, False), (-86400, True), (-1.3e6, False)]
)
def test_clocks_may_differ_a_little(place: Place, ahead_s: float, is_taken: bool) -> None:
    class Clock(TimestampSigner):
        def get_timestamp(self) -> int:
            return int(time.time() + ahead_s)

    client = place.client("ben")
    (cookie,) = client.cookies.jar
    value = Clock(SECRET).sign(TimestampSigner(SECRET).unsign(cookie.value)).decode()
    client.cookies.clear()
    client.cookies.set(cookie.name, value)
    assert (client.get("/").status_code == 200) == is_taken


def test_a_proxy_that_speaks_https_gets_secure_cookies(place: Place) -> None:
    for scheme, secure in (("https", True), ("http", False), ("httpsx", False)):
        answer = TestClient(place.app).get("/sign-in", headers={"X-Forwarded-Proto": scheme})
        assert ("secure" in answer.headers["set-cookie"]) == secure


# ---- texts


def test_what_shows_nothing_is_named() -> None:
    hidden = "\U000e0100\U000e01ef\u3164\u115f\u1160\u034f\u2800\uffa0\ufe00\u180b\u17b4\U0001d173\U000e0fff\U00013430"
    assert str(shown(hidden).head) == "".join(f"<i>U+{ord(char):04X}</i>" for char in hidden)
    for plain in ("می\u200cخواهم", "❤\ufe0f 1\ufe0f\u20e3 ☺\ufe0e", "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈", "क्\u200dष"):
        assert str(shown(plain).head) == plain
    assert str(shown("a\u200cb\u200d é\ufe0f").head) == "a<i>U+200C</i>b<i>U+200D</i> é<i>U+FE0F</i>"
    assert str(shown("ک\u200c\u200d\u200c\u200c❤\ufe0f\ufe0e").head).count("<i>") == 3


def test_texts_that_take_long_to_compare_are_not_compared() -> None:
    assert differences("a " * 2800, "a b " * 99) is None
    assert differences("a b c " * 700, "c b a " * 66) is None
    found = differences("one two three " * 100, "one four three " * 30)
    hits = differences.cache_info().hits
    assert found is not None and differences("one two three " * 100, "one four three " * 30) == found
    assert differences.cache_info().hits == hits + 1


# ---- the store


def test_the_store_is_its_owners_only(place: Place) -> None:
    files = sorted(Path(str(place.store.database.url.database)).parent.glob("feedback.db*"))
    assert len(files) == 3  # with the log and its index
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_damaged_stores_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with the file: a sentence and 2, or what can still be read and 0."""
    # ranks of a job say a sentence once, and other tests may have made this process one
    monkeypatch.setattr("nemo_rlhf.cli._speaks", lambda rank, sentence: True)
    file = tmp_path / "feedback.db"
    store = Store.open(str(file))
    run_id = store.run(run_name(tmp_path), create=True)
    store.add_tasks(run_id, 1, plain_tasks(20))
    store.close()
    whole, chance = file.read_bytes(), random.Random(0)

    def overwritten(data: bytearray, start: int, length: int) -> bytes:
        data[start : start + length] = chance.randbytes(length)
        return bytes(data)

    damages: list[Callable[[bytearray], bytes]] = [
        lambda data: bytes(data[: len(data) // 2]),
        lambda data: bytes(data[:4096]),
        lambda data: bytes(data[:50]),
        lambda data: b"x" * 200,
        lambda data: overwritten(data, 100, 3000),  # the schema
        lambda data: overwritten(data, 4096, len(data) - 4096),
        *(lambda data: overwritten(data, chance.randrange(100, len(data)), 500) for _ in range(10)),
    ]
    said = []
    for damage in damages:
        file.write_bytes(damage(bytearray(whole)))
        out = tmp_path / "pairs.jsonl"
        code = main(["feedback", "export", "--store", str(file), "--run", str(tmp_path), str(out), "--force"])
        lines = capfd.readouterr().err.splitlines()
        assert (code, len(lines)) in ((0, 0), (2, 1)), (code, lines)
        said += lines
    assert any(f"{file} is damaged (" in line for line in said) and any("not a SQLite file" in line for line in said)
