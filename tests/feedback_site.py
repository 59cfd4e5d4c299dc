"""A store with tasks, people who are invited, and its pages, for the tests of the comparison page."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from starlette.testclient import TestClient

from nemo_rlhf.feedback.accounts import accounts, invite
from nemo_rlhf.feedback.records import Comparison, NewTask
from nemo_rlhf.feedback.store import Store, run_name
from nemo_rlhf.feedback.tables import ComparisonRow
from nemo_rlhf.feedback.web.app import make_app

SECRET = "of-tests-" * 4
HOSTILE = (
    "</div></section><script>document.title='broken'; alert(1)</script>"
    "<img src=http://evil.example/pixel.png onerror=alert(2)>"
    "<style>body{display:none}</style><svg onload=alert(3)><a href='javascript:alert(4)'>x</a>"
    "<iframe src=http://evil.example/></iframe><meta http-equiv=refresh content='0;url=http://evil.example/'>"
    "{{ 7 * 7 }} ' OR 1=1; DROP TABLE comparisons; -- \u202egnp.exe\u202c\u200b\x00"
)


@dataclass
class Place:
    """A store with one run that is being compared."""

    store: Store
    run_id: int
    app: Any
    codes: dict[str, str]

    def account_id(self, name: str) -> int:
        return next(account.id for account, _ in accounts(self.store, self.run_id) if account.name == name)

    def client(self, name: str | None = None, **options: Any) -> TestClient:
        """A browser without scripts, signed in as ``name``."""
        client = TestClient(self.app, follow_redirects=False, **options)
        if name is not None:
            answer = client.post("/sign-in", data={"csrf": csrf(client, "/sign-in"), "code": self.codes[name]})
            assert (answer.status_code, answer.headers["location"]) == (303, "."), answer.text
        return client

    def compared(self) -> list[Comparison]:
        return self.store.comparisons(self.store.comparison_ids(self.run_id))

    def num_rows(self) -> int:
        with self.store.database.read() as connection:
            return connection.scalar(select(func.count()).select_from(ComparisonRow)) or 0


def make_place(directory: Path, tasks: list[NewTask], **settings: Any) -> Place:
    store = Store.open(str(directory / "feedback.db"))
    run_id = store.run(run_name(directory), create=True, **settings)
    store.add_tasks(run_id, 7, tasks)
    codes = {name: invite(store, run_id, name, admin=name == "ada") for name in ("ada", "ben", "eve")}
    return Place(store, run_id, make_app(store, run_id, SECRET), codes)


def plain_tasks(num: int) -> list[NewTask]:
    return [NewTask(f"t{i}", f"Question {i}?", (f"first of {i}", f"second of {i}")) for i in range(num)]


def csrf(client: TestClient, page: str = "/") -> str:
    return field(client.get(page).text, "csrf")


def field(page: str, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found, page
    return html.unescape(found[1])


def flash(page: str) -> str:
    found = re.search(r'role="status">([^<]*)', page)
    return html.unescape(found[1]) if found else ""


def shown_answers(page: str) -> list[str]:
    """Of a page with plain short texts: the two answers from left to right."""
    found = re.findall(r'<h2 id="answer-\d">Answer \d</h2>\s*<div class="text" dir="auto">(.*?)</div>', page, re.DOTALL)
    assert len(found) == 2, page
    return [html.unescape(re.sub("<[^>]*>", "", one)) for one in found]


def vote(client: TestClient, verdict: str, page: str | None = None, **more: str) -> str:
    """Answer the task that is shown, as a form does, and return the next page."""
    page = page or client.get("/").text
    data = {"csrf": field(page, "csrf"), "token": field(page, "token"), "verdict": verdict, "seconds": "", **more}
    answer = client.post("/answer", data=data)
    assert (answer.status_code, answer.headers["location"]) == (303, "."), answer.text
    return client.get("/").text
