"""The comparison page and its server: what is refused to whom, and that what was acknowledged stays."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs the extra feedback")

from fastapi import FastAPI
from starlette.testclient import TestClient

from nemo_rlhf.cli import main
from nemo_rlhf.feedback.accounts import invite, revoke
from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.records import NewTask
from nemo_rlhf.feedback.store import Store, run_name
from nemo_rlhf.feedback.web.app import make_app
from nemo_rlhf.feedback.web.security import MAX_BODY, Attempts
from tests.browser import listening
from tests.feedback_site import HOSTILE, SECRET, Place, csrf, field, flash, make_place, plain_tasks, shown_answers, vote
from tests.jobs import Job


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = make_place(tmp_path, plain_tasks(12), answers_wanted=2, guidelines="Be *fair*.")
    yield made
    made.store.close()


# ---- what is refused


def routes(app: Any) -> list[tuple[str, str]]:
    """Method and path of everything that answers, but the files of the page itself."""
    while not isinstance(app, FastAPI):
        app = app._app
    return [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]


def a_form(client: TestClient, place: Place, token: str) -> dict[str, str]:
    """A form that every address would take, but for who sends it."""
    return {
        "token": token,
        "verdict": "left",
        "code": place.codes["ben"],
        "form": "pairs",
        "csrf": csrf(client, "/sign-in"),
    }


def test_nothing_answers_without_a_session(place: Place) -> None:
    member = place.client("ben")
    token = field(member.get("/").text, "token")
    revoked, other_secret, tampered, anonymous = (place.client() for _ in range(4))
    revoked = place.client("eve")
    revoke(place.store, place.run_id, "eve")
    (cookie,) = member.cookies.jar
    strange = TestClient(make_app(place.store, place.run_id, "x" * 40), follow_redirects=False)
    strange.post("/sign-in", data={"csrf": csrf(strange, "/sign-in"), "code": place.codes["ben"]})
    other_secret.cookies.set(cookie.name, next(iter(strange.cookies.jar)).value)
    tampered.cookies.set(cookie.name, "A" + cookie.value[1:])
    assert len(routes(place.app)) == 9
    for client in (anonymous, revoked, other_secret, tampered):
        for method, path in routes(place.app):
            if path == "/sign-in":
                continue
            data = a_form(client, place, token) if method == "POST" else None
            answer = client.request(method, path, data=data)
            if path == "/sign-out":
                assert answer.headers["location"] == "sign-in"
            elif method == "GET":
                assert (answer.status_code, answer.headers["location"]) == (303, "sign-in"), path
            else:
                assert answer.status_code == 401, path
            assert "Question" not in answer.text and token not in answer.text
    assert place.num_rows() == 0
    assert field(member.get("/").text, "token") == token


def test_sessions_are_of_one_run(tmp_path: Path) -> None:
    """Also where two runs share a secret and somebody renames the cookie."""
    one = make_place(tmp_path, plain_tasks(1))
    other_id = one.store.run("other", create=True)
    one.store.add_tasks(other_id, 1, [NewTask("secret", "Secret?", ("a", "b"))])
    for name in ("x", "y", "z"):
        invite(one.store, other_id, name, admin=True)
    other = TestClient(make_app(one.store, other_id, SECRET), follow_redirects=False)
    name = next(iter(other.get("/sign-in").cookies.jar)).name
    (cookie,) = one.client("ada").cookies.jar
    assert cookie.name != name
    other.cookies.clear()
    other.cookies.set(name, cookie.value)
    assert other.get("/").headers["location"] == "sign-in" and other.get("/admin").status_code == 303
    one.store.close()


def test_only_admins_see_the_overview(place: Place) -> None:
    client = place.client("ben")
    assert "Overview" not in client.get("/").text and "Overview" in place.client("ada").get("/").text
    assert client.get("/admin").status_code == 403
    answer = client.post("/export", data={"csrf": csrf(client), "form": "pairs"})
    assert answer.status_code == 403 and "chosen" not in answer.text


def test_another_annotators_task_is_refused(place: Place) -> None:
    ben, eve = place.client("ben"), place.client("eve")
    token = field(ben.get("/").text, "token")
    assert token not in eve.get("/").text
    for address in ("/answer", "/skip"):
        answer = eve.post(address, data={"csrf": csrf(eve), "token": token, "verdict": "left"})
        assert answer.status_code == 303 and "went to somebody else" in flash(eve.get("/").text)
    assert place.num_rows() == 0 and field(ben.get("/").text, "token") == token


def test_forged_forms_are_refused(place: Place) -> None:
    ben, eve = place.client("ben"), place.client("eve")
    page = ben.get("/").text
    good, token = field(page, "csrf"), field(page, "token")
    assert good != csrf(ben), "masked anew for each page"
    wrong = ["", "00", good[:-2], good + "00", "zz" * 32, "é", csrf(eve), good[::-1], "00" * 32]
    addresses = [path for method, path in routes(place.app) if method == "POST"]
    assert set(addresses) == {"/answer", "/skip", "/undo", "/export", "/sign-in", "/sign-out"}
    for path in addresses:
        data = {"token": token, "verdict": "left", "code": place.codes["ada"], "form": "pairs"}
        for forged in wrong:
            assert ben.post(path, data={**data, "csrf": forged}).status_code == 403, (path, forged)
        assert ben.post(path, data=data).status_code == 403
        assert ben.post(path, json={**data, "csrf": good}).status_code in (403, 422)
        for site in ("cross-site", "same-site"):
            answer = ben.post(path, data={**data, "csrf": good}, headers={"Sec-Fetch-Site": site})
            assert answer.status_code == 403, (path, site)
        assert ben.get(path, params={**data, "csrf": good}).status_code in (200, 405), "a link changes nothing"
    assert place.num_rows() == 0
    assert flash(vote(ben, "left", page, csrf=good)) == "Saved."


@pytest.mark.parametrize("nasty", ["' OR '1'='1", "1-' OR 1=1; DROP TABLE tasks --", "\x00%00", HOSTILE, "９-x"])
def test_injection_is_text(place: Place, nasty: str) -> None:
    stranger = place.client()
    answer = stranger.post("/sign-in", data={"csrf": csrf(stranger, "/sign-in"), "code": nasty[:200]})
    assert answer.status_code == 401 and "evil.example" not in answer.text
    client = place.client("ben")
    good = csrf(client)
    for name, value in (("token", nasty), ("token", f"1-{nasty}"[:100]), ("verdict", nasty)):
        data = {"csrf": good, "token": field(client.get("/").text, "token"), "verdict": "left", name: value}
        answer = client.post("/answer", data=data)
        assert answer.status_code in (303, 422)
        said = flash(client.get("/").text)
        assert (
            said.startswith(("There is no such task", "This task went to somebody else")) or answer.status_code == 422
        )
    assert client.get("/", params={"q": nasty}).status_code == 200
    assert place.num_rows() == 0
    vote(client, "left", note=nasty)
    (found,) = place.compared()
    assert found.note == nasty.strip()
    admin = place.client("ada")
    assert json.loads(admin.post("/export", data={"csrf": csrf(admin, "/admin")}).text)["note"] == nasty.strip()


def test_large_bodies_are_refused(place: Place) -> None:
    client = place.client("ben")
    page = client.get("/").text
    data = {"csrf": field(page, "csrf"), "token": field(page, "token"), "verdict": "left"}
    assert client.post("/answer", data={**data, "note": "x" * MAX_BODY}).status_code == 413
    pieces = (b"note=" + b"x" * 1000 for _ in range(MAX_BODY // 1000 + 1))
    chunked = client.post("/answer", content=pieces, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert chunked.status_code == 413 and "A request may have 64 kB" in chunked.text
    for path in ("/sign-in", "/undo", "/export"):
        assert place.client().post(path, data={"code": "x" * MAX_BODY}).status_code == 413
    assert client.post("/answer", data={**data, "note": "x" * 30_000}).status_code == 422
    assert client.post("/answer", data={**data, "token": "x" * 200}).status_code == 422
    assert client.post("/answer", files={"note": b"x" * 1000}, data=data).status_code in (303, 422)
    assert client.post("/answer", data={"csrf": data["csrf"], "token": data["token"]}).status_code == 422
    assert place.num_rows() == 0


def test_paths_lead_out_of_nowhere(place: Place) -> None:
    tricks = [
        *("/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static/..%5capp.py"),
        *("/static//etc/passwd", "/static/%2fetc%2fpasswd", "//etc/passwd", "/static/%00", "/static/", "/static"),
        *("/templates/base.html", "/docs", "/redoc", "/openapi.json", "/sign-in/../admin", "/%2e%2e/admin", "/admin/"),
    ]
    with listening(place.app) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        for path in tricks:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 404 and b"import" not in body and b"root:" not in body, (path, answer.status)
        connection.request("GET", "/static/page.js")
        assert connection.getresponse().read().startswith(b"// ")


def test_every_answer_has_the_headers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    client = place.client("ada", raise_server_exceptions=False)
    answers = [client.get(path) for path in ("/", "/admin", "/sign-in", "/nowhere", "/static/style.css", "/answer")]
    answers += [client.post("/undo"), client.post("/answer", data={"note": "x" * MAX_BODY}), place.client().get("/")]

    def broken(*args: Any) -> None:
        raise RuntimeError("the database is on fire")

    monkeypatch.setattr(Desk, "next", broken)
    answers.append(client.get("/"))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 200, 405, 403, 413, 303, 500]
    assert "on fire" not in answers[-1].text and "Traceback" not in answers[-1].text
    for answer in answers:
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in str(policy) and set(policy.values()) == {"'none'", "'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        is_file = str(answer.url).endswith(".css")
        assert ("immutable" if is_file else "no-store") in answer.headers["cache-control"]


def test_cookies_are_for_this_site_only(place: Place) -> None:
    for base, secure in (("http://testserver", False), ("https://testserver", True)):
        client = TestClient(place.app, follow_redirects=False, base_url=base)
        answer = client.post("/sign-in", data={"csrf": csrf(client, "/sign-in"), "code": place.codes["ben"]})
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and ("secure" in cookie) == secure
        assert place.codes["ben"] not in cookie
    client = place.client("ben")
    kept = client.get("/").text
    assert client.post("/sign-out", data={"csrf": field(kept, "csrf")}).headers["location"] == "sign-in"
    assert client.get("/").status_code == 303
    assert client.post("/undo", data={"csrf": field(kept, "csrf")}).status_code == 403


def test_guessing_codes_is_slowed_down(place: Place) -> None:
    client = place.client()
    good = csrf(client, "/sign-in")
    codes = [client.post("/sign-in", data={"csrf": good, "code": f"guess {n}"}).status_code for n in range(21)]
    assert codes == [401] * 20 + [429]
    answer = client.post("/sign-in", data={"csrf": good, "code": place.codes["ben"]})
    assert answer.status_code == 429 and 0 < int(answer.headers["retry-after"]) <= 300
    attempts = Attempts(limit=1, window_s=0.05, max_addresses=2)
    for address in "abc":
        attempts.begin(address)
    with pytest.raises(Exception, match="Too many attempts"):
        attempts.begin("c")
    attempts.begin("a")  # forgotten for those that came later
    time.sleep(0.06)
    attempts.begin("c")


# ---- the process


def serve(directory: Path, *arguments: str) -> tuple[Job, str]:
    """The server as a process of its own, and its address once it listens."""
    store = ["--store", str(directory / "feedback.db"), "--run", str(directory), "--port", "0"]
    job = Job(["feedback", "serve", *store, *arguments], directory)
    job.wait_until(lambda: "http://" in job.stdout, 60)
    return job, job.stdout.split()[-1]


class Visitor:
    """A signed-in browser without scripts that speaks real HTTP."""

    def __init__(self, url: str, code: str | None = None, cookie: str = "") -> None:
        self.host, self.cookie = urlsplit(url).netloc, cookie
        if code is not None:
            form = {"csrf": field(self.send("GET", "/sign-in")[1], "csrf"), "code": code}
            assert self.send("POST", "/sign-in", form)[0] == 303

    def send(self, method: str, path: str, form: dict[str, str] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, timeout=20)
        headers = {"Cookie": self.cookie, "Content-Type": "application/x-www-form-urlencoded"}
        try:
            connection.request(method, path, urlencode(form or {}) if method == "POST" else None, headers)
            answer = connection.getresponse()
            if cookie := answer.headers.get("Set-Cookie"):
                self.cookie = cookie.partition(";")[0]
            return answer.status, answer.read().decode()
        finally:
            connection.close()


def test_acknowledged_votes_outlive_a_killed_server(tmp_path: Path) -> None:
    """Three people vote as fast as they can; the server is killed with SIGKILL in the middle, and started again."""
    place = make_place(tmp_path, plain_tasks(400))
    job, url = serve(tmp_path)
    acknowledged: dict[str, str] = {}
    sent: dict[str, str] = {}

    def work(visitor: Visitor, verdicts: random.Random) -> None:
        try:
            while True:
                page = visitor.send("GET", "/")[1]
                verdict = verdicts.choice(["left", "right", "tie", "both_bad"])
                form = {"csrf": field(page, "csrf"), "token": field(page, "token"), "verdict": verdict}
                answers = [one.split()[0] for one in shown_answers(page)]
                key = form["token"].partition("-")[0]
                sent[key] = {"left": answers[0], "right": answers[1]}.get(verdict, verdict)
                if visitor.send("POST", "/answer", form)[0] == 303:
                    acknowledged[key] = sent[key]
        except (OSError, http.client.HTTPException):
            return

    visitors = [Visitor(url, place.codes[name]) for name in place.codes]
    with ThreadPoolExecutor(3) as people:
        working = [people.submit(work, visitor, random.Random(n)) for n, visitor in enumerate(visitors)]
        job.wait_until(lambda: len(acknowledged) > 25, 60)
        job.process.send_signal(signal.SIGKILL)
        for one in working:
            one.result()
    assert job.wait() == -signal.SIGKILL
    found = {str(one.task_id): one.verdict for one in place.compared()}
    assert len(found) == place.num_rows() and acknowledged.items() <= found.items() <= sent.items()
    assert len(found) - len(acknowledged) <= 3

    job, url = serve(tmp_path)
    for visitor in visitors:
        again = Visitor(url, cookie=visitor.cookie)
        status, page = again.send("GET", "/")
        assert status == 200, "the session is still good: the secret was kept"
        form = {"csrf": field(page, "csrf"), "token": field(page, "token"), "verdict": "tie"}
        assert again.send("POST", "/answer", form)[0] == 303
    assert place.num_rows() == len(found) + 3
    assert (tmp_path / "feedback.db.secret").stat().st_mode & 0o777 == 0o600
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75 and job.stderr == ""
    place.store.close()


def test_ctrl_c_ends_the_server(tmp_path: Path) -> None:
    place = make_place(tmp_path, [])
    (tmp_path / "guidelines.md").write_text("Be **kind**.")
    (tmp_path / "secret").write_text("x" * 40 + "\n")
    (tmp_path / "secret").chmod(0o600)
    files = ("--guidelines", str(tmp_path / "guidelines.md"), "--secret-file", str(tmp_path / "secret"))
    job, url = serve(tmp_path, *files)
    for scheme in ("http", "https"):  # as a proxy on this machine says
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        connection.request("GET", "/sign-in", headers={"X-Forwarded-Proto": scheme})
        answer = connection.getresponse()
        assert ("secure" in answer.headers["Set-Cookie"]) == (scheme == "https") and "Server" not in answer.headers
    assert "<strong>kind</strong>" in Visitor(url, place.codes["ben"]).send("GET", "/")[1]
    job.process.send_signal(signal.SIGINT)
    assert job.wait(20) == 0 and job.stderr == "" and not (tmp_path / "feedback.db.secret").exists()
    place.store.close()


def test_what_serve_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """With one sentence and exit code 2, before it listens."""
    Store.open(str(tmp_path / "feedback.db")).run(run_name(tmp_path), create=True)
    (tmp_path / "short").write_text("abc")
    assert main(["feedback", "serve", "--store", str(tmp_path / "feedback.db"), "--run", str(tmp_path),
                 "--secret-file", str(tmp_path / "short")]) == 2  # fmt: skip
    assert "short signs the sessions and can be read by others: chmod 600" in capfd.readouterr().err
    (tmp_path / "short").chmod(0o600)

    def refused(*arguments: str) -> str:
        given = ["feedback", "serve", "--store", str(tmp_path / "feedback.db"), "--run", str(tmp_path), *arguments]
        assert main(given) == 2
        (line,) = capfd.readouterr().err.splitlines()
        return line.removeprefix("nemo-rlhf: error: ")

    monkeypatch.delenv("NEMO_RLHF_FEEDBACK_SECRET", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert refused("--host", host).startswith(
            f"--host {host} lets other machines in: set NEMO_RLHF_FEEDBACK_SECRET"
        )
    assert "holds 3 characters, and a secret has at least 32" in refused("--secret-file", str(tmp_path / "short"))
    monkeypatch.setenv("NEMO_RLHF_FEEDBACK_SECRET", "short")
    assert refused("--host", "0.0.0.0").startswith("NEMO_RLHF_FEEDBACK_SECRET holds 5 characters")
    monkeypatch.delenv("NEMO_RLHF_FEEDBACK_SECRET")
    assert "cannot be read" in refused("--secret-file", str(tmp_path / "none"))
    assert "cannot be read" in refused("--guidelines", str(tmp_path / "none"))
    (tmp_path / "long.md").write_text("x" * 100_001)
    assert "The guidelines has 100001 characters" in refused("--guidelines", str(tmp_path / "long.md"))
    assert "must be between 0" in refused("--port", "70000")
    assert "has no run" in refused("--run", str(tmp_path / "other"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port} cannot be listened on (Address already in use)" in refused("--port", port)
    (tmp_path / "feedback.db.secret").chmod(0o644)
    assert "can be read by others: chmod 600" in refused()
