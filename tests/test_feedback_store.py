"""The preference store on SQLite and on a real PostgreSQL: leases, votes, undo, migrations, accounts."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from nemo_rlhf.feedback.accounts import accounts, invite, revoke, sign_in, sign_out, signed_in, without_access
from nemo_rlhf.feedback.database import VERSION_TABLE
from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.records import MAX_TEXT, Lease, NewTask, Refresh, TooLate
from nemo_rlhf.feedback.store import Store, run_name
from nemo_rlhf.feedback.tables import Base
from tests.feedback import desks, held, tasks, verdicts
from tests.jobs import FROM_OUTSIDE, ROOT

NASTY = ["'); DROP TABLE tasks; --", '" OR 1=1 --', "%s %(x)s :x ? {0} \\", "\x00\x1a\ud800 \u202e é 漢", ""]


# -- at once ----------------------------------------------------------------------------------------------------------


DONE = '"done": true'


def worker(store_url: str, run_id: int, seed: int, log: Path, ids: list[int]) -> subprocess.Popen[bytes]:
    arguments = [store_url, str(run_id), str(seed), str(log), *map(str, ids)]
    environment = {name: value for name, value in os.environ.items() if name not in FROM_OUTSIDE}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.workers.feedback_worker", *arguments], cwd=ROOT, env=environment
    )


def test_twenty_annotators_at_once_and_one_process_killed(store: Store, store_url: str, tmp_path: Path) -> None:
    """No task is with two of them at one time; what the store has acknowledged is there, once, also of those whose
    process was killed; and they go on where they were."""
    num_tasks, wanted = 60, 3
    run_id = store.run("at once", create=True, answers_wanted=wanted)
    store.add_tasks(run_id, 1, tasks(num_tasks))
    ids = [without_access(store, run_id, f"annotator {i}", simulated=True) for i in range(20)]
    groups = [ids[start : start + 4] for start in range(0, 20, 4)]
    logs = [tmp_path / f"log-{index}" for index in range(len(groups))]
    processes = [worker(store_url, run_id, 0, log, group) for log, group in zip(logs, groups, strict=True)]
    try:
        deadline = time.monotonic() + 60
        while not all(log.exists() for log in logs):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        (tmp_path / "go").touch()
        # The first that has got anywhere: SQLite is fair to nobody who asks without a pause.
        while (victim := next((i for i, log in enumerate(logs) if log.read_text().count(DONE) >= 8), None)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        processes[victim].kill()
        processes.append(worker(store_url, run_id, 1, tmp_path / "log-again", groups[victim]))
        codes = [process.wait(60) for process in processes]
        assert codes.pop(victim) == -signal.SIGKILL and codes == [0] * 5
    finally:
        for process in processes:
            process.kill()
            process.wait()

    lines = [json.loads(line) for log in [*logs, tmp_path / "log-again"] for line in log.read_text().splitlines()]
    stays = [line for line in lines if "until" in line]
    for one, other in combinations(sorted(stays, key=lambda line: line["task"]), 2):
        if one["task"] == other["task"]:
            assert one["until"] <= other["since"] or other["until"] <= one["since"], (one, other)

    # What may be there: one thing where the last word was acknowledged, two where the process was killed before it was.
    possible: dict[tuple[int, int], set[str | None]] = {}
    num_unsure = num_votes = 0
    for annotator_id in ids:
        mine = [line for line in lines if line["annotator"] == annotator_id and line["what"] != "skip"]
        for line, following in zip_longest(mine, mine[1:]):
            before = possible.get((annotator_id, line["task"]), {None})
            after = line["verdict"] if line["what"] == "answer" else None
            if line["done"]:
                assert after is None or None in before, "answered twice"
                possible[annotator_id, line["task"]] = {after}
                num_votes += after is not None
            elif not (following and following["done"] and following["task"] == line["task"]):
                possible[annotator_id, line["task"]] = {*before, after}
                num_unsure += 1
    with store.database.read() as connection:
        rows = connection.execute(
            text("SELECT annotator_id, task_id, verdict FROM comparisons WHERE verdict <> 'skip'")
        ).all()
    there = {(row[0], row[1]): row[2] for row in rows}
    assert len(there) == len(rows) == num_tasks * wanted
    assert set(Counter(task for _, task in there).values()) == {wanted}
    assert num_unsure <= 4 and num_votes >= len(there) - 4
    for where in {*there, *possible}:
        assert there.get(where) in possible.get(where, {None}), where
    for one in store.comparisons(store.comparison_ids(run_id)):
        assert one.note == f"{ids[int(one.annotator.split()[1])]}/{one.key}"
    assert store.queue_length(run_id) == 0


def test_many_open_an_empty_store_at_once(store_url: str) -> None:
    """The tables are made once, and a run too."""
    found: list[Any] = []

    def work() -> None:
        store = Store.open(store_url)
        run_id = store.run("one", create=True)
        found.append((run_id, store.add_tasks(run_id, 1, tasks(20))))
        store.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run for run, _ in found] == [1] * 8
    assert sorted(num for _, num in found) == [0] * 7 + [20]


# -- leases, answers, undo --------------------------------------------------------------------------------------------


def test_the_order_of_tasks_and_one_lease_each(store: Store) -> None:
    run_id = store.run("run", create=True)
    low, high = NewTask("low", "p", ("a", "b"), priority=-1), NewTask("high", "p", ("a", "b"), priority=0.5)
    assert store.add_tasks(run_id, 1, [low, *tasks(2), high]) == 4
    assert store.add_tasks(run_id, 2, [*tasks(3), high]) == 1
    ann, ben, cem, dan, eve, fay = desks(store, run_id, "ann", "ben", "cem", "dan", "eve", "fay")
    leases = [held(desk.next()) for desk in (ann, ben, cem, dan, eve)]
    assert [lease.key for lease in leases] == ["high", "task-0", "task-1", "task-2", "low"]
    assert [lease.step for lease in leases] == [1, 1, 1, 2, 1]
    assert fay.next() is None
    again = held(ann.next())
    assert (again.token, again.answers, again.swapped) == (leases[0].token, leases[0].answers, leases[0].swapped)
    ann.skip(again.token)
    assert ann.next() is None and held(fay.next()).key == "high"
    assert store.queue_length(run_id) == 5 and store.comparison_ids(run_id) == []


def test_answers_are_stored_in_stored_order_and_settle(store: Store) -> None:
    run_id = store.run("run", create=True, undo_s=0)
    store.add_tasks(run_id, 4, [NewTask("k", "p", ("one", "two"), metadata={"sample": 7})])
    (ann,) = desks(store, run_id, "ann")
    lease = held(ann.next())
    assert lease.answers == (("two", "one") if lease.swapped else ("one", "two"))
    time.sleep(0.02)
    ann.answer(lease.token, "left" if lease.answers[0] == "two" else "right", 1e6, "why")
    assert ann.undo() == (False, None)
    (one,) = store.comparisons(store.settled_ids(run_id))
    assert (one.key, one.step, one.prompt, one.answers, one.verdict) == ("k", 4, "p", ("one", "two"), "second")
    assert (one.annotator, one.simulated, one.note, one.metadata) == ("ann", False, "why", {"sample": 7})
    assert 0.02 <= one.seconds < 60, "cut to the time since the lease began"
    assert store.comparisons([99, one.id]) == [one], "without what is none (any more)"


def test_both_orders_are_shown(file_store: Store) -> None:
    run_id = file_store.run("run", create=True)
    file_store.add_tasks(run_id, 1, tasks(64))
    (ann,) = desks(file_store, run_id, "ann")
    swapped = []
    for _ in range(64):
        lease = held(ann.next())
        swapped.append(lease.swapped)
        ann.answer(lease.token, "left", 0.0)
    assert 10 < sum(swapped) < 54
    for one, was_swapped in zip(file_store.comparisons(file_store.comparison_ids(run_id)), swapped, strict=True):
        assert one.verdict == ("second" if was_swapped else "first")


def test_expired_leases_and_late_answers(store: Store) -> None:
    run_id = store.run("run", create=True)
    store.add_tasks(run_id, 1, tasks(2))
    ann, ben = desks(store, run_id, "ann", "ben", lease_s=0.05)
    late, other = held(ann.next()), held(ben.next())
    time.sleep(0.1)
    (cem,) = desks(store, run_id, "cem")
    taken = held(cem.next())
    assert taken.task_id == late.task_id
    with pytest.raises(TooLate, match="somebody else"):
        ann.answer(late.token, "left", 1.0)  # cem is at it
    cem.answer(taken.token, "tie", 1.0)
    with pytest.raises(TooLate, match="somebody else"):
        ann.answer(late.token, "left", 1.0)  # cem has answered
    ben.answer(other.token, "both_bad", 1.0)  # late, but nobody was waiting
    with pytest.raises(TooLate, match="already"):
        ben.answer(other.token, "left", 1.0)
    with pytest.raises(TooLate):
        ann.answer(taken.token, "left", 1.0)  # another's token
    for token in [
        "",
        "x",
        "1",
        "-",
        "1-x",
        "99999-x",
        "9" * 40 + "-x",
        "2147483647-x",
        "2147483648-x",
        "9999999999-x",
        "１-x",
        "1' OR '1'='1",
    ]:
        with pytest.raises(TooLate):
            ann.answer(token, "left", 1.0)
    for choice, seconds, note in [
        ("first", 1.0, ""),
        ("left", -1.0, ""),
        ("left", math.nan, ""),
        ("tie", 1.0, "x" * 2001),
    ]:
        with pytest.raises(ValueError, match=r"choice|seconds|note"):
            ann.answer(late.token, choice, seconds, note)
    assert verdicts(store, run_id) == {("cem", "task-0"): "tie", ("ben", "task-1"): "both_bad"}


def test_undo(store: Store) -> None:
    run_id = store.run("run", create=True, undo_s=60)
    store.add_tasks(run_id, 1, tasks(3))
    (ann,) = desks(store, run_id, "ann")
    first = held(ann.next())
    ann.answer(first.token, "left", 1.0)
    second = held(ann.next())
    ann.skip(second.token)
    assert held(ann.next()).key == "task-2"
    assert store.settled_ids(run_id) == [] and len(store.comparison_ids(run_id)) == 1
    assert held(undone(ann)).key == "task-1", "the skip"
    back = held(undone(ann))
    assert back.key == "task-0" and ann.undo() == (False, None) and store.comparison_ids(run_id) == []
    with pytest.raises(TooLate):
        ann.answer(first.token, "right", 1.0)
    ann.answer(back.token, "tie", 1.0)
    assert verdicts(store, run_id) == {("ann", "task-0"): "tie"}
    store.run("run", create=True, undo_s=0)
    assert ann.undo() == (False, None), "the run allows it no more"


def undone(desk: Desk) -> Lease | None:
    taken_back, lease = desk.undo()
    assert taken_back
    return lease


def test_undo_where_others_have_taken_over(store: Store) -> None:
    run_id = store.run("run", create=True, answers_wanted=2)
    store.add_tasks(run_id, 1, tasks(2))
    ann, ben = desks(store, run_id, "ann", "ben")
    ann.answer(held(ann.next()).token, "left", 1.0)
    others = held(ben.next())
    assert others.key == "task-0"
    assert held(undone(ann)).key == "task-1", "ben is at task-0, and ann's answer is gone"
    ben.answer(others.token, "right", 1.0)
    ann.skip(held(ann.next()).token)
    assert held(ann.next()).key == "task-0", "which comes back"
    assert verdicts(store, run_id).keys() == {("ben", "task-0")}

    run_id = store.run("skipped", create=True)
    store.add_tasks(run_id, 1, tasks(1))
    ann, ben = desks(store, run_id, "ann", "ben")
    ann.skip(held(ann.next()).token)
    ben.answer(held(ben.next()).token, "left", 1.0)
    assert undone(ann) is None and ann.next() is None, "answered as often as was wanted"
    assert store.queue_length(run_id) == 0 and ann.progress().skipped == 0

    run_id = store.run("alone", create=True, answers_wanted=2)
    store.add_tasks(run_id, 1, tasks(1))
    ann, ben = desks(store, run_id, "ann", "ben")
    ann.answer(held(ann.next()).token, "left", 1.0)
    others = held(ben.next())
    assert undone(ann) is None and verdicts(store, run_id) == {}, "taken back, while ben is at the only task"
    ben.skip(others.token)
    assert held(ann.next()).key == "task-0"


def test_answers_settle_when_they_cannot_be_undone(store: Store) -> None:
    run_id = store.run("run", create=True, undo_s=0.2)
    store.add_tasks(run_id, 1, tasks(1))
    (ann,) = desks(store, run_id, "ann")
    ann.answer(held(ann.next()).token, "left", 1.0)
    assert store.settled_ids(run_id) == []
    time.sleep(0.3)
    assert ann.undo() == (False, None)
    deadline = time.monotonic() + 5
    while not store.settled_ids(run_id):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_progress_throughput_and_several_answers(store: Store) -> None:
    run_id = store.run("run", create=True, answers_wanted=2)
    store.add_tasks(run_id, 1, tasks(3))
    ann, ben = desks(store, run_id, "ann", "ben")
    for desk, said in ((ann, ["first", "first", "tie"]), (ben, ["first", "second", None])):
        for verdict in said:
            lease = held(desk.next())
            if verdict is None:
                desk.skip(lease.token)
            else:
                left = verdict if verdict == "tie" else ("left" if (verdict == "first") != lease.swapped else "right")
                desk.answer(lease.token, left, 0.0)
    progress = ben.progress()
    assert (progress.answered, progress.skipped, progress.agreed, progress.compared) == (2, 1, 1, 2)
    assert (progress.answered_by_all, progress.open_tasks, progress.mean_seconds) == (5, 1, 0.0)
    assert ben.next() is None
    assert [(one.annotator, one.answers, one.simulated) for one in store.throughput(run_id)] == [
        ("ann", 3, False),
        ("ben", 2, False),
    ]
    assert store.throughput(run_id)[0].day == time.strftime("%Y-%m-%d", time.gmtime())


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text(store: Store) -> None:
    run_id = store.run("'; DROP TABLE runs; --", create=True, guidelines=NASTY[0])
    for index, nasty in enumerate(NASTY):
        new = NewTask(f"{index}'; --", nasty, (nasty, nasty + "!"), metadata={"text": nasty})
        assert store.add_tasks(run_id, 1, [new]) == 1
    (ann,) = desks(store, run_id, '"; DELETE FROM annotators; --')
    for nasty in NASTY:
        lease = held(ann.next())
        assert lease.prompt == nasty and sorted(lease.answers) == sorted((nasty, nasty + "!"))
        ann.answer(lease.token, "tie", 1.0, nasty)
    found = store.comparisons(store.comparison_ids(run_id))
    assert [(one.prompt, one.answers[0], one.note, one.metadata["text"]) for one in found] == [
        (n, n, n, n) for n in NASTY
    ]
    assert store.info(run_id).guidelines == NASTY[0] and found[0].annotator == '"; DELETE FROM annotators; --'


def test_metadata_is_counted_in_characters(file_store: Store) -> None:
    run_id = file_store.run("run", create=True)
    assert file_store.add_tasks(run_id, 1, [NewTask("k", "p", ("a", "b"), metadata={"x": "漢" * (MAX_TEXT - 20)})]) == 1


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (NewTask("k", "x" * (MAX_TEXT + 1), ("a", "b")), "the prompt has 100001 characters"),
        (NewTask("k", "p", ("a", "x" * (MAX_TEXT + 1))), "an answer has 100001 characters"),
        (NewTask("k", "p", ("a", 3)), "an answer is a int"),  # type: ignore[arg-type]
        (NewTask("k", "p", ("a",)), "two answers"),  # type: ignore[arg-type]
        (NewTask("k", "p", ("a", "b"), priority=math.nan), "finite priority"),
        (NewTask("k" * 201, "p", ("a", "b")), "a key has 1 to 200"),
        (NewTask("k", "p", ("a", "b"), metadata={"x": math.nan}), "no JSON"),
        (NewTask("k", "p", ("a", "b"), metadata={"x": "y" * MAX_TEXT}), "metadata has"),
    ],
)
def test_tasks_that_are_refused(task: NewTask, says: str, file_store: Store) -> None:
    run_id = file_store.run("run", create=True)
    with pytest.raises(ValueError, match=says):
        file_store.add_tasks(run_id, 1, [*tasks(1), task])
    assert file_store.queue_length(run_id) == 0, "all or none"


def test_refreshes(store: Store) -> None:
    run_id = store.run("run", create=True)
    made = [Refresh(step, n, 10 * n, 3, 0.25, 0.5, n != 2) for n, step in ((1, 5), (2, 10), (3, 15))]
    for refresh in made:
        store.add_refresh(run_id, refresh)
    assert store.refreshes(run_id) == made
    again = Refresh(10, 2, 21, 0, math.nan, math.nan, True)
    store.add_refresh(run_id, again)
    found = store.refreshes(run_id)
    assert found[0] == made[0] and len(found) == 2
    assert math.isnan(found[1].accuracy_before) and found[1].comparisons == 21 and found[1].accepted is True


def test_runs(file_store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has none yet"):
        file_store.run("a")
    one = file_store.run("a", create=True, answers_wanted=2, undo_s=5)
    assert file_store.run("a", guidelines="be kind") == file_store.run("a", create=True) == one
    info = file_store.info(one)
    assert (info.guidelines, info.answers_wanted, info.undo_s) == ("be kind", 2, 5)
    with pytest.raises(ValueError, match="has no run b: it has a"):
        file_store.run("b")
    for wrong in ({"answers_wanted": 0}, {"undo_s": -1}, {"undo_s": math.inf}, {"guidelines": "x" * (MAX_TEXT + 1)}):
        with pytest.raises(ValueError):
            file_store.run("a", **wrong)  # type: ignore[arg-type]
    assert run_name(tmp_path / "x" / ".." / "y") == str(tmp_path.resolve() / "y")


def test_invitations(store: Store) -> None:
    run_id, other_run = store.run("run", create=True), store.run("other", create=True)
    token = invite(store, run_id, "ann", admin=True)
    account = sign_in(store, run_id, token)
    assert account is not None and account.name == "ann" and account.is_admin
    assert sign_in(store, other_run, token) is None and sign_in(store, run_id, token + "x") is None
    assert signed_in(store, run_id, account.id, account.token_id) == account
    assert signed_in(store, other_run, account.id, account.token_id) is None
    assert signed_in(store, run_id, account.id, "") is None
    with store.database.read() as connection:
        stored = str(connection.execute(text("SELECT * FROM annotators")).all())
    assert token not in stored
    fresh = invite(store, run_id, "ann")
    assert sign_in(store, run_id, token) is None and signed_in(store, run_id, account.id, account.token_id) is None
    account = sign_in(store, run_id, fresh)
    assert account is not None and not account.is_admin
    store.add_tasks(run_id, 1, tasks(1))
    desk = Desk(store, run_id, account.id)
    lease = held(desk.next())
    revoke(store, run_id, "ann")
    assert sign_in(store, run_id, fresh) is None and signed_in(store, run_id, account.id, account.token_id) is None
    for call in (desk.next, desk.undo, lambda: desk.answer(lease.token, "left", 1.0)):
        with pytest.raises(ValueError, match="no access"):
            call()
    nobody = without_access(store, run_id, "simulated-1", simulated=True)
    assert signed_in(store, run_id, nobody, "") is None
    for name in ("", " ", "a\nb", "x" * 201):
        with pytest.raises(ValueError, match="printable"):
            invite(store, run_id, name)
    with pytest.raises(ValueError, match="is simulated"):
        invite(store, run_id, "simulated-1")
    with pytest.raises(ValueError, match="no annotator bob"):
        revoke(store, run_id, "bob")
    assert [(one.name, can_sign_in) for one, can_sign_in in accounts(store, run_id)] == [
        ("ann", False),
        ("simulated-1", False),
    ]


# -- the database -----------------------------------------------------------------------------------------------------


def test_migrations_give_the_tables(store: Store) -> None:
    with store.database.read() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_a_store_of_the_first_version_is_brought_up_to_date(store: Store, store_url: str) -> None:
    run_id = store.run("old", create=True)
    token = invite(store, run_id, "ada")
    with store.database.write() as connection:
        connection.execute(text("ALTER TABLE annotators DROP COLUMN sign_outs"))
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0001'"))
    again = Store.open(store_url)
    account = sign_in(again, run_id, token)
    assert account is not None and signed_in(again, run_id, account.id, account.token_id) == account
    sign_out(again, account)
    assert signed_in(again, run_id, account.id, account.token_id) is None
    again.close()


def test_a_newer_store_is_refused(store: Store, store_url: str) -> None:
    with store.database.write() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(ValueError, match="newer nemo_rlhf"):
        Store.open(store_url)


def test_a_database_of_something_else_is_refused(store: Store, store_url: str) -> None:
    with store.database.write() as connection:
        connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))
    with pytest.raises(ValueError, match="that is not ours"):
        Store.open(store_url)


def test_places_where_no_store_is(tmp_path: Path) -> None:
    (tmp_path / "no.db").write_text("This is not a database, " * 100)
    for url, says in [
        (str(tmp_path / "no.db"), "not a SQLite file"),
        (str(tmp_path / "none" / "x.db"), "no directory"),
        (str(tmp_path), "is a directory"),
        ("sqlite://", "is a file"),
        ("mysql://host/x", "postgresql://"),
        ("://", "no URL"),
        ("postgresql://user:secret@127.0.0.1:1/x", "cannot be opened"),
    ]:
        with pytest.raises(ValueError, match=says) as error:
            Store.open(url)
        assert "secret" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no.db"]
