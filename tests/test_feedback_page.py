"""The comparison page: what people see and do, in a browser and without one; and that hostile text does nothing."""

from __future__ import annotations

import html
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra feedback")

from nemo_rlhf.feedback.accounts import without_access
from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.exchange import export_records
from nemo_rlhf.feedback.records import MAX_NOTE, NewTask, Refresh
from nemo_rlhf.feedback.web import text as web_text
from nemo_rlhf.feedback.web.figures import figures
from nemo_rlhf.feedback.web.site import guidelines_html
from tests.browser import chromium, listening
from tests.feedback_site import HOSTILE, Place, csrf, field, flash, make_place, plain_tasks, shown_answers, vote


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = make_place(tmp_path, plain_tasks(12), answers_wanted=2, guidelines="Be *fair*.")
    yield made
    made.store.close()


# ---- hostile text


def as_text(markup: str) -> str:
    """What a browser shows of ``markup``, if only the tags that we make are in it."""
    assert set(re.findall(r"<(/?\w+)[^>]*>", markup)) <= {"i", "/i", "mark", "/mark"}
    return html.unescape(re.sub(r"</?(?:i|mark)>", "", markup))


def test_text_is_shown_as_it_is() -> None:
    rng = random.Random(0)
    signs = ["<", ">", "&", '"', "'", "a", "b", " ", "\n", "é", "語", "😀", "</mark>", "<i>", "&lt;"]
    for _ in range(300):
        text = "".join(rng.choices(signs, k=rng.randrange(60)))
        spans = sorted({tuple(sorted(rng.sample(range(len(text) + 1), 2))) for _ in range(2) if text})
        changed = [span for n, span in enumerate(spans) if n == 0 or spans[n - 1][1] <= span[0]]
        found = web_text.shown(text, changed)
        assert as_text(found.head) == text and found.num_hidden == 0 and found.rest == ""
        marked = "".join(re.findall(r"<mark>(.*?)</mark>", str(found.head), re.DOTALL))
        assert html.unescape(marked) == "".join(text[begin:end] for begin, end in changed)


def test_nothing_is_invisible_and_nothing_turns_the_direction() -> None:
    text = "a\u202eb\u202e\u202ec\u2066\u200b\x00\x1b[31m\u200f\ufeff\ud800\U000e0041\u00ad\n\td"
    found = str(web_text.shown(text).head)
    assert found == (
        "a<i>U+202E</i>b<i>U+202E ×2</i>c<i>U+2066</i><i>U+200B</i><i>U+0000</i><i>U+001B</i>[31m<i>U+200F</i>"
        "<i>U+FEFF</i><i>U+D800</i><i>U+E0041</i><i>U+00AD</i>\n\td"
    )
    assert web_text.shown("👩\u200d💻 क्\u200dष").head == "👩\u200d💻 क्\u200dष", "joiners belong to what people write"
    assert web_text.one_line_ends("a\r\nb\rc\n") == "a\nb\nc\n"


@pytest.mark.parametrize("text", ["word " * 20_000, "x" * 100_000, "\n" * 100_000, "line of text\n" * 7000])
def test_long_text_is_cut_and_all_there(text: str) -> None:
    found = web_text.shown(text)
    assert len(found.head) <= web_text.HEAD_CHARACTERS and found.head.count("\n") <= web_text.HEAD_LINES
    assert found.head + found.rest == text and found.num_hidden == len(found.rest)
    assert " " not in text or found.head[-1] in " \n", "cut between words"
    short = text[: web_text.HEAD_CHARACTERS + 100].replace("\n", " ")
    assert web_text.shown(short).num_hidden == 0, "not worth a click"


def unmarked(text: str, spans: list[tuple[int, int]]) -> str:
    """The signs outside of ``spans``, without space."""
    kept = (sign for at, sign in enumerate(text) if not any(begin <= at < end for begin, end in spans))
    return "".join("".join(kept).split())


def test_differences_are_what_one_text_has_and_the_other_has_not() -> None:
    rng = random.Random(1)
    for _ in range(200):
        left, right = (" ".join(rng.choices(["a", "b", "c", "dd", "e.", "語彙"], k=rng.randrange(25))) for _ in "lr")
        found = web_text.differences(left, right)
        assert found is not None
        same = [
            re.findall(
                r"\w|[^\w\s]", "".join(sign for at, sign in enumerate(text) if not any(b <= at < e for b, e in spans))
            )
            for text, spans in zip((left, right), found, strict=True)
        ]
        assert same[0] == same[1], (left, right, found)
    assert web_text.differences("The cat sat.", "The dog sat.") == ([(4, 7)], [(4, 7)])
    assert web_text.differences("same", "same") == ([], [])
    assert web_text.differences("a " * 2000, "b " * 2000) is None, "too long"


def test_guidelines_are_markdown_and_nothing_else() -> None:
    found = guidelines_html(
        "# T\n\n*a* <b onclick=x>b</b> ![i](http://e/x.png) [l](javascript:alert(1)) [m](https://e/)"
    )
    assert "<h1>T</h1>" in found and "<em>a</em>" in found and '<a href="https://e/">m</a>' in found
    assert "<b" not in found and "<img" not in found and 'href="javascript' not in found


# ---- comparing, without scripts


def test_verdicts_are_of_what_was_shown(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way round the answers were shown."""
    ways = itertools.cycle((False, True, True))
    monkeypatch.setattr("nemo_rlhf.feedback.desk.secrets.choice", lambda options: next(ways))
    client, expected, sides = place.client("ben"), {}, set()
    page = client.get("/").text
    assert "<em>fair</em>" in page and " open>" in page and "answered at step 7 of the training" in page
    for number, verdict in enumerate(["left", "right", "tie", "both_bad", "left", "right", "left", "right"]):
        answers = shown_answers(page)
        sides.add(answers[0].split()[0])
        chosen = {"left": answers[0], "right": answers[1]}.get(verdict, verdict)
        expected[f"t{number}"] = chosen.split()[0]
        assert chosen == verdict or chosen.endswith(f"of {number}")
        assert page.count("answer-1") == 2 and client.get("/").text.count(field(page, "token")) == 1, "the same again"
        page = vote(client, verdict, page)
        assert flash(page) == "Saved." and flash(client.get("/").text) == ""
    assert {one.key: one.verdict for one in place.compared()} == expected
    assert sides == {"first", "second"} and "Your answers</dt><dd>8<" in page
    assert '<details class="card guidelines">' in page, "read by now"


def test_seconds_and_notes(place: Place) -> None:
    client = place.client("ben")
    page = client.get("/").text
    time.sleep(0.3)
    vote(client, "left", page, seconds="0.2", note="  two\r\nlines ")
    for seconds in ("", "999", "nan", "inf", "-1", "1e400", "0x1", "soon"):
        vote(client, "left", seconds=seconds)
    first, *others = place.compared()
    assert (first.seconds, first.note) == (0.2, "two\nlines")
    assert len(others) == 8 and all(0 < one.seconds < 5 and one.note == "" for one in others), "as the desk measured"
    vote(client, "left", note="x" * (MAX_NOTE + 1))
    assert len(place.compared()) == 9


def test_skip_and_undo(place: Place) -> None:
    client = place.client("ben")
    page = client.get("/").text
    skipped = field(page, "token")
    client.post("/skip", data={"csrf": field(page, "csrf"), "token": skipped})
    page = client.get("/").text
    assert flash(page) == "Skipped." and "Question 1?" in page and place.compared() == []
    page = vote(client, "left", page)
    assert "Question 2?" in page and len(place.compared()) == 1
    client.post("/undo", data={"csrf": field(page, "csrf")})
    page = client.get("/").text
    assert flash(page) == "Your last answer is taken back." and "Question 1?" in page and place.compared() == []
    page = vote(client, "right", page)
    again = client.post("/answer", data={"csrf": field(page, "csrf"), "token": skipped, "verdict": "left"})
    assert again.status_code == 303 and "answered or skipped this task already" in flash(client.get("/").text)
    assert len(place.compared()) == 1


def test_an_empty_queue_and_no_undo(tmp_path: Path) -> None:
    place = make_place(tmp_path, plain_tasks(1), undo_s=0)
    client = place.client("ben")
    assert 'formaction="skip"' in client.get("/").text and 'form="undo"' not in client.get("/").text
    page = vote(client, "tie")
    assert "Nothing to compare right now" in page and 'http-equiv="refresh"' in page
    client.post("/undo", data={"csrf": field(page, "csrf")})
    assert flash(client.get("/").text) == "There is no answer of the last 0 seconds to take back."
    place.store.close()


def test_undo_where_nothing_else_is_left(tmp_path: Path) -> None:
    """What is taken back is said to be, though no task is shown in its place; and a skip can be taken back there."""
    place = make_place(tmp_path, plain_tasks(1), answers_wanted=2)
    ben, eve = place.client("ben"), place.client("eve")
    page = vote(ben, "left")
    assert "Nothing to compare" in page and 'form="undo"' in page
    held_by_eve = eve.get("/").text
    ben.post("/undo", data={"csrf": field(page, "csrf")})
    page = ben.get("/").text
    assert flash(page) == "Your last answer is taken back." and place.compared() == []
    assert "Nothing to compare" in page and 'form="undo"' not in page
    eve.post("/skip", data={"csrf": field(held_by_eve, "csrf"), "token": field(held_by_eve, "token")})
    page = eve.get("/").text
    assert "Nothing to compare" in page and 'form="undo"' in page
    eve.post("/undo", data={"csrf": field(page, "csrf")})
    assert "Question 0?" in eve.get("/").text
    place.store.close()


def test_agreement_with_others(place: Place) -> None:
    desk = Desk(place.store, place.run_id, place.account_id("eve"))
    for _ in range(4):
        lease = desk.next()
        assert lease is not None
        desk.answer(lease.token, "tie", 1.0)
    client = place.client("ben")
    for verdict in ("tie", "left", "tie", "tie"):
        page = vote(client, verdict)
    assert re.search(r"Agreement.*?<dd>75 % <small>of 4</small>", page)


# ---- the overview


def test_the_overview_shows_what_there_is(place: Place) -> None:
    empty = place.client("ada").get("/admin").text
    assert "Nobody has answered yet" in empty and "<svg" not in empty
    for name, choices in (("ben", ["tie", "tie", "left"]), ("scripted", ["tie", "right", "tie"])):
        if name == "scripted":
            without_access(place.store, place.run_id, name, simulated=True)
        desk = Desk(place.store, place.run_id, place.account_id(name))
        for choice in choices:
            lease = desk.next()
            assert lease is not None
            if choice != "tie":
                choice = "left" if lease.swapped == (choice == "right") else "right"
            desk.answer(lease.token, choice, 0.0)
    accuracies = [(math.nan, math.nan), (0.5, 0.75), (0.75, 0.625)]
    for number, (before, after) in enumerate(accuracies, 1):
        refresh = Refresh(10 * number, number, 20, 0 if number == 1 else 8, before, after, after > before)
        place.store.add_refresh(place.run_id, refresh)
    shown = figures(place.store, place.run_id)
    assert (shown.open_tasks, shown.comparisons, shown.simulated, shown.compared_tasks) == (9, 6, 3, 3)
    # ties: t0 both, t1 and t2 one each; nominal alpha = 1 - 5 * 4 / (2 * (4 * 1 + 4 * 1 + 1 * 1)), by its definition
    assert shown.alpha == pytest.approx(1 - 5 * 4 / (2 * 9))
    assert [(one.name, one.simulated, one.by_day, one.answers) for one in shown.workers] == [
        ("ben", False, [3], 3),
        ("scripted", True, [3], 3),
    ]
    assert shown.chart is not None and [accepted for *_, accepted, _ in shown.chart.dots] == [True, False]
    heights = [y for _, y, *_ in shown.chart.dots]
    grid = {label: y for y, label in shown.chart.rows}
    assert grid["70 %"] > heights[0] > grid["80 %"] and grid["60 %"] > heights[1] > grid["70 %"]
    page = place.client("ada").get("/admin").text
    assert page.count("<circle") == 2 and page.count('class="badge">simulated') == 1 and "3 simulated" in page
    assert f"{shown.alpha:.2f}" in page and "75.0 %" in page and "not accepted" in page


def test_export_from_the_page(place: Place) -> None:
    client = place.client("ben")
    for verdict in ("left", "right", "tie"):
        vote(client, verdict, note="é <b>")
    admin = place.client("ada")
    for form in ("pairs", "conversational"):
        answer = admin.post("/export", data={"csrf": csrf(admin, "/admin"), "form": form})
        assert answer.headers["content-disposition"] == f'attachment; filename="{form}.jsonl"'
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert lines == list(export_records(place.store, place.run_id, form)) and len(lines) == 2


# ---- in a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@dataclass
class Seen:
    """What a page did that it should not do, and the addresses that it asked for."""

    problems: list[str]
    addresses: list[str]


@contextmanager
def visiting(browser: Any, url: str, **options: Any) -> Iterator[tuple[Any, Seen]]:
    """A page in a fresh browser profile. Nothing but ``url`` can be reached."""
    context = browser.new_context(base_url=url, **options)
    context.set_default_timeout(15_000)
    seen = Seen([], [])

    def route(asked: Any) -> None:
        seen.addresses.append(asked.request.url)
        if asked.request.url.startswith(url):
            asked.continue_()
        else:
            asked.abort()

    context.route("**/*", route)
    page = context.new_page()
    page.on("dialog", lambda dialog: (seen.problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: seen.problems.append(f"error {error}"))
    page.on("console", lambda said: said.type == "error" and seen.problems.append(f"console {said.text}"))
    page.on("popup", lambda popup: seen.problems.append(f"popup {popup.url}"))
    try:
        yield page, seen
    finally:
        context.close()


def enter(page: Any, code: str) -> None:
    """By an invitation link."""
    page.goto(f"sign-in#{code}")
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(re.compile(r"/$"))


def said(page: Any, text: str) -> None:
    """Wait for the page that says so."""
    page.get_by_role("status").filter(has_text=text).wait_for()
    page.wait_for_load_state()  # keys work from then on


def answers_in(page: Any) -> list[str]:
    return [one.strip() for one in page.locator(".answer .text").all_inner_texts()]


def test_a_person_compares(place: Place, browser: Any) -> None:
    """Refused without a code; then by mouse, by each key, with a note, with undo; and all of it is in the store."""
    expected: dict[str, str] = {}
    with listening(place.app) as url, visiting(browser, url) as (page, seen):
        page.goto("./")
        assert page.url.endswith("/sign-in")
        page.get_by_label("Invitation code").fill("not one")
        page.keyboard.press("Enter")
        said(page, "Nobody was invited with this code")
        seen.problems.clear()  # browsers report the 401
        enter(page, place.codes["ben"])
        assert page.url == url and place.codes["ben"] not in page.content()

        def answer(number: int, verdict: str, how: Callable[[], None]) -> None:
            assert page.locator(".prompt .text").inner_text() == f"Question {number}?"
            answers = answers_in(page)
            chosen = {"left": answers[0], "right": answers[1]}.get(verdict, verdict)
            expected[f"t{number}"] = chosen.split()[0]
            how()
            page.get_by_text(f"Question {number + 1}?").wait_for()
            said(page, "Saved.")
            assert place.compared()[-1].key == f"t{number}", "stored before the page says so"

        for number, (verdict, name) in enumerate(
            [("left", "1 is better"), ("right", "2 is better"), ("tie", "Tie"), ("both_bad", "Both bad")]
        ):
            answer(number, verdict, lambda name=name: page.get_by_role("button", name=name).click())
        for number, (verdict, key) in enumerate([("left", "1"), ("right", "2"), ("tie", "t"), ("both_bad", "B")], 4):
            answer(number, verdict, lambda key=key: page.keyboard.press(key))
        page.keyboard.press("u")
        said(page, "Your last answer is taken back.")
        assert page.locator(".prompt .text").inner_text() == "Question 7?" and len(place.compared()) == 7
        note = page.get_by_label("Note (optional)")
        note.click()
        page.keyboard.type("1 2 t b s u d")
        assert note.input_value() == "1 2 t b s u d" and len(place.compared()) == 7
        page.keyboard.press("Escape")
        answer(7, "right", lambda: page.keyboard.press("2"))
        page.keyboard.press("s")
        said(page, "Skipped.")
        for combination in ("Control+1", "Alt+t", "Meta+b"):
            page.keyboard.press(combination)
        assert page.locator(".stats div").first.inner_text().split() == ["Your", "answers", "8"]
        assert seen.problems == []
    found = place.compared()
    assert {one.key: one.verdict for one in found} == expected and len(found) == 8
    assert found[-1].note == "1 2 t b s u d"


def test_with_the_keyboard_alone_and_without_scripts(place: Place, browser: Any) -> None:
    with listening(place.app) as url, visiting(browser, url, java_script_enabled=False) as (page, seen):
        page.goto("./")
        page.locator("#code:focus").wait_for()
        page.keyboard.type(place.codes["ben"])
        page.keyboard.press("Enter")
        page.wait_for_url(url)
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            reached.append(focused.get_attribute("id") or focused.inner_text().strip())
        verdicts = ["1 is better 1", "Tie t", "Both bad b", "2 is better 2", "Skip s", "Undo u"]
        assert [" ".join(one.split()) for one in reached] == [
            *("Skip to the content", "Compare", "Sign out", "Guidelines", "differences", "note"),
            *verdicts,
        ]
        page.locator("#differences").focus()
        page.keyboard.press("Space")
        assert page.locator("#differences").is_checked()
        page.locator(".answer mark").first.wait_for()
        page.get_by_role("button", name="Tie").focus()
        page.keyboard.press("Enter")
        said(page, "Saved.")
        assert place.compared()[0].verdict == "tie" and seen.problems == []


def test_differences_show_on_demand(place: Place, browser: Any) -> None:
    colour = "getComputedStyle(document.querySelector('.answer mark')).backgroundColor"
    with listening(place.app) as url, visiting(browser, url) as (page, seen):
        enter(page, place.codes["ben"])
        assert sorted(page.locator(".answer mark").all_inner_texts()) == ["first", "second"]
        assert page.evaluate(colour) == "rgba(0, 0, 0, 0)"
        page.keyboard.press("d")
        assert page.evaluate(colour) == "rgb(255, 233, 163)"
        page.keyboard.press("t")
        said(page, "Saved.")
        assert page.evaluate(colour) == "rgb(255, 233, 163)", "as it was chosen"
        page.get_by_label("Show differences").uncheck()
        page.reload()
        assert page.evaluate(colour) == "rgba(0, 0, 0, 0)" and seen.problems == []


def test_hostile_text_does_nothing(tmp_path: Path, browser: Any) -> None:
    """In prompts, answers, notes, names and guidelines: nothing runs, nothing is fetched, nothing moves."""
    huge = "<b>" + "W" * 60_000 + "\u202e" * 500 + "\n" * 30_000
    tasks = [
        NewTask("markup", HOSTILE, (HOSTILE, f"{HOSTILE} and more")),
        NewTask("huge", huge, (huge, "\u0e01" + "\u0e49" * 5000)),
        NewTask("rtl", "\u05d0\u05d1 \u202e<u>", ("\u2067\u2066)(", "\u200f\u0645\u0631\u062d\u0628\u0627")),
    ]
    place = make_place(tmp_path, tasks, guidelines=HOSTILE, answers_wanted=2)
    name = HOSTILE.translate(dict.fromkeys(map(ord, "\x00\u202e\u202c\u200b")))[:200]
    without_access(place.store, place.run_id, name, simulated=True)
    desk = Desk(place.store, place.run_id, place.account_id(name))
    lease = desk.next()
    assert lease is not None
    desk.answer(lease.token, "tie", 1.0, HOSTILE)
    foreign = "img, iframe, object, embed, [onerror], [onload], [style], main :is(script, style, link, meta, svg, base)"
    with listening(place.app) as url, visiting(browser, url, viewport={"width": 390, "height": 800}) as (page, seen):
        enter(page, place.codes["ada"])
        for key in ("markup", "huge", "rtl"):
            page.wait_for_load_state("networkidle")
            assert page.title() == f"Compare · {tmp_path.name}"
            assert page.locator(foreign).count() == 0 and page.locator("script").count() == 1
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than the phone"
            assert page.evaluate("[...document.querySelectorAll('.text')].every(e => e.scrollWidth <= e.clientWidth)")
            for verdict in ("1 is better", "2 is better", "Undo"):
                assert page.get_by_role("button", name=verdict).is_visible()
            if key == "markup":
                texts = page.locator(".prompt .text").inner_text()
                assert "<script>document.title='broken'; alert(1)</script>" in texts and "{{ 7 * 7 }}" in texts
                assert "U+202Egnp.exeU+202CU+200BU+0000" in texts
            if key == "huge":
                assert page.locator("body").evaluate("e => e.scrollHeight") < 20_000
                more = page.locator(".prompt details.more")
                more.locator("summary").click()
                assert "U+202E ×500" in more.inner_text()
            page.get_by_role("button", name="Both bad").click()
            page.get_by_role("status").wait_for()
        page.goto("admin")
        page.wait_for_load_state("networkidle")
        assert name in page.locator("table bdi").all_inner_texts() and page.locator(foreign).count() == 0
        assert seen.problems == [] and all(one.startswith(url) for one in seen.addresses)
    place.store.close()


def test_other_sites_cannot_send_forms(place: Place, browser: Any) -> None:
    """Nor show the page in a frame; a link from there still finds people signed in."""
    with listening(place.app) as url:
        context = browser.new_context(base_url=url)
        page = context.new_page()
        enter(page, place.codes["ben"])
        page.get_by_role("button", name="Tie").click()
        said(page, "Saved.")
        sites = {
            "form": f"<form method=post action={url}undo></form><script>document.forms[0].submit()</script>",
            "frame": f"<iframe src={url}></iframe>",
            "link": f"<a href={url}>look</a>",
        }
        context.route(
            "http://evil.example/*",
            lambda route: route.fulfill(body=sites[route.request.url.split("/")[-1]], content_type="text/html"),
        )
        page.goto("http://evil.example/form")
        page.wait_for_url(f"{url}undo")
        assert "Not allowed" in page.content() and place.num_rows() == 1
        page.goto("http://evil.example/frame")
        page.wait_for_load_state("networkidle")
        assert "Question" not in page.frames[1].content()
        page.goto("http://evil.example/link")
        page.get_by_text("look").click()
        page.get_by_text("Question 1?").wait_for()
        context.close()


def test_the_overview_in_a_browser(place: Place, browser: Any, tmp_path: Path) -> None:
    with listening(place.app) as url, visiting(browser, url) as (page, seen):
        enter(page, place.codes["ada"])
        page.keyboard.press("1")
        said(page, "Saved.")
        page.get_by_role("link", name="Overview").click()
        for name, fields in (("pairs", {"prompt", "chosen", "rejected"}), ("chats", {"chosen", "rejected"})):
            with page.expect_download() as download:
                page.get_by_role("button", name=f"Download {'as ' * (name == 'chats')}{name}").click()
            download.value.save_as(tmp_path / name)
            (line,) = (tmp_path / name).read_text().splitlines()
            assert fields <= json.loads(line).keys()
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url("**/sign-in")
        page.go_back()
        page.wait_for_url("**/sign-in")
        assert seen.problems == []


def test_everything_can_be_read(place: Place, browser: Any) -> None:
    """Contrast of all text (WCAG 2.2, AA) in light and dark; every control has a name."""
    desk = Desk(place.store, place.run_id, place.account_id("eve"))
    lease = desk.next()
    assert lease is not None
    desk.answer(lease.token, "tie", 1.0)
    place.store.add_refresh(place.run_id, Refresh(10, 1, 20, 8, 0.5, 0.75, True))
    for scheme in ("light", "dark"):
        with listening(place.app) as url, visiting(browser, url, color_scheme=scheme) as (page, _):
            for address in ("sign-in", "./", "admin", "nowhere"):
                if address == "./":
                    enter(page, place.codes["ada"])
                    page.keyboard.press("d")
                else:
                    page.goto(address)
                poor = page.evaluate(_POOR_CONTRAST)
                assert poor == [], (scheme, address)
                for control in page.locator("button, input:not([type=hidden]), textarea, summary, a").all():
                    assert control.evaluate("e => (e.labels && e.labels.length) || e.innerText.trim().length"), address


_POOR_CONTRAST = """
() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const found = channels(getComputedStyle(e).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const has = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!has || !e.getClientRects().length || e.matches(".unseen, .skip, title")) continue;
    const style = getComputedStyle(e);
    const [one, other] = [luminance(channels(e.matches("svg text") ? style.fill : style.color)), luminance(behind(e))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) poor.push(`${e.tagName} ${e.textContent.trim()} ${contrast.toFixed(2)}`);
  }
  return poor;
}
"""
