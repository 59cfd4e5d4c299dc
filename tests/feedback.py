"""What tests of the preference store share: tasks, annotators, and what they say."""

from __future__ import annotations

from nemo_rlhf.feedback.accounts import without_access
from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.records import Lease, NewTask
from nemo_rlhf.feedback.store import Store


def tasks(num: int, start: int = 0) -> list[NewTask]:
    return [NewTask(f"task-{i}", f"prompt {i % 3}", (f"a{i}", f"b{i}")) for i in range(start, start + num)]


def desks(store: Store, run_id: int, *names: str, **how: float) -> list[Desk]:
    return [Desk(store, run_id, without_access(store, run_id, name, simulated=False), **how) for name in names]


def held(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def verdicts(store: Store, run_id: int) -> dict[tuple[str, str], str]:
    found = store.comparisons(store.comparison_ids(run_id))
    assert len({(one.annotator, one.key) for one in found}) == len(found)
    return {(one.annotator, one.key): one.verdict for one in found}


def say(desk: Desk, verdict: str, note: str = "") -> None:
    lease = held(desk.next())
    if verdict in ("first", "second"):
        verdict = "left" if (verdict == "first") != lease.swapped else "right"
    desk.answer(lease.token, verdict, 0.0, note)
