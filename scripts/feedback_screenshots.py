"""The pictures of the comparison page in docs/images, taken with the system's Chromium of a store with made-up answers.

python scripts/feedback_screenshots.py [DIRECTORY]
"""

from __future__ import annotations

import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright
from sqlalchemy import update

from nemo_rlhf.feedback.accounts import accounts, invite, without_access
from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.records import NewTask, Refresh
from nemo_rlhf.feedback.store import Store
from nemo_rlhf.feedback.tables import ComparisonRow
from nemo_rlhf.feedback.web.app import make_app

GUIDELINES = """Prefer the summary that a busy engineer could rely on.

1. **True first.** A summary that says something the post does not say loses, however well it reads.
2. **Then complete.** The question that is asked, and what was tried already.
3. **Then short.** Of two that are equally true and complete, the shorter one.

Say *tie* when you would flip a coin, and *both bad* when nobody should be shown either. Leave a note where you
hesitated.
"""
PROMPT = """SUBREDDIT: r/HomeNetworking
TITLE: Wi-Fi drops every evening at around 8

POST: For two weeks now our Wi-Fi has dropped every evening at around eight, for about ten minutes. Wired devices are \
fine. I have changed the channel from auto to 6 and then 11, updated the router's firmware, and moved the router away \
from the microwave. My neighbour says theirs does the same. We live in a block of forty flats. Is there something that \
I can do before buying a new router?

TL;DR:"""
ANSWERS = (
    "Wi-Fi drops every evening at about eight for ten minutes, while wired devices stay fine. Changing channels, new "
    "firmware and moving the router did not help, and a neighbour in the same block has it too. What else can I try "
    "before I buy a new router?",
    "Wi-Fi drops every evening at about eight for ten minutes, and so do wired devices. Changing channels and moving "
    "the router did not help. My neighbour in the same block told me to buy a new router: should I?",
)
PEOPLE = {"Chidi Okafor": 62, "Mei Tanaka": 48, "Ben Ortiz": 35, "scripted-1": 24}
DAY_S = 86400


def fill(store: Store) -> tuple[int, str]:
    """A run in the middle of its work, and the code of an admin who has begun."""
    rng = random.Random(5)
    run_id = store.run("/shared/runs/tldr-7b", create=True, guidelines=GUIDELINES, answers_wanted=2)
    store.add_tasks(run_id, 340, [NewTask(f"340/{i}", PROMPT, ANSWERS) for i in range(120)])
    for name in PEOPLE:
        if name == "scripted-1":
            without_access(store, run_id, name, simulated=True)
        else:
            invite(store, run_id, name)
    code = invite(store, run_id, "Ada Lindqvist", admin=True)
    ids = {account.name: account.id for account, _ in accounts(store, run_id)}
    for name, num in {**PEOPLE, "Ada Lindqvist": 9}.items():
        desk = Desk(store, run_id, ids[name])
        for _ in range(num):
            lease = desk.next()
            assert lease is not None
            preferred = "left" if lease.swapped == (lease.task_id % 3 == 0) else "right"
            choice = rng.choices([preferred, "tie", "both_bad"], [0.9, 0.06, 0.04])[0]
            desk.answer(lease.token, choice, 0.0)
            with store.database.write() as connection:
                days_ago = rng.choices(range(7), [3, 4, 2, 5, 4, 3, 2])[0]
                connection.execute(
                    update(ComparisonRow)
                    .where(ComparisonRow.annotator_id == ids[name], ComparisonRow.seconds == 0.0)
                    .values(seconds=rng.uniform(6, 28), answered_at=time.time() - days_ago * DAY_S, settles_at=0.0)
                )
    accuracy = 0.58
    for number in range(1, 18):
        after = accuracy + rng.gauss(0.012, 0.02)
        store.add_refresh(
            run_id, Refresh(20 * number, number, 40 * number, 8 * number, accuracy, after, after > accuracy)
        )
        accuracy = max(accuracy, after)
    return run_id, code


def take(browser: Any, url: str, code: str, directory: Path) -> None:
    def picture(name: str, **options: Any) -> None:
        path = directory / f"feedback-{name}.png"
        page.screenshot(path=path, **options)
        Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)

    kinds: dict[str, dict[str, Any]] = {
        "light": {"viewport": {"width": 1200, "height": 812}},
        "dark": {"viewport": {"width": 1200, "height": 812}, "color_scheme": "dark"},
        "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    }
    for kind, options in kinds.items():
        context = browser.new_context(base_url=url, **options)
        page = context.new_page()
        page.goto(f"sign-in#{code}")
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(url)
        page.wait_for_load_state()
        if kind != "light":
            page.keyboard.press("d")
        if kind == "phone":
            page.locator("#differences").evaluate("e => e.scrollIntoView()")
        picture(kind)
        if kind == "light":
            page.goto("admin")
            picture("overview", full_page=True)
        context.close()


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "images")
    with tempfile.TemporaryDirectory() as place, socket.create_server(("127.0.0.1", 0)) as listener:
        store = Store.open(str(Path(place) / "feedback.db"))
        run_id, code = fill(store)
        app = make_app(store, run_id, "of the pictures " * 2)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
                take(browser, f"http://127.0.0.1:{listener.getsockname()[1]}/", code, directory)
                browser.close()
        finally:
            server.should_exit = True
            thread.join()
            store.close()


if __name__ == "__main__":
    main()
