"""How long annotators wait for the preference store when it is full.

    python scripts/bench/feedback.py [--candidates 100000] [--store postgresql://...] [--out FILE]

Fills an empty store with tasks of two candidates each, and times ``Desk.next``, ``Desk.answer`` and ``Desk.progress``:
of one annotator, of twenty at once (threads of one process, as in the web page) at the pace of very quick people and as
fast as the store lets them, and in the worst case: an annotator who has answered nearly every task that still waits for
others. Without ``--store`` it makes a SQLite file in a temporary directory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path

from sqlalchemy import insert, literal, select

from nemo_rlhf.feedback.accounts import without_access
from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.records import NewTask
from nemo_rlhf.feedback.store import Store
from nemo_rlhf.feedback.tables import ComparisonRow, Task

ANSWER = "An answer of about two hundred words, which is what people compare most. " * 16
LEFT_OVER = 50  # tasks of the worst case that are not answered yet


class Times:
    """Milliseconds of calls."""

    def __init__(self) -> None:
        self.next: list[float] = []
        self.answer: list[float] = []
        self.progress: list[float] = []

    def row(self, name: str) -> str:
        cells = [f"{quantile(values, q):.1f}" for values in (self.next, self.answer, self.progress) for q in (50, 95)]
        return f"| {name} | {' | '.join(cells)} |"


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def fill(store: Store, name: str, num_tasks: int, answers_wanted: int) -> int:
    run_id = store.run(name, create=True, answers_wanted=answers_wanted)
    for start in range(0, num_tasks, 10_000):
        new = [
            NewTask(f"{i}", f"prompt {i // 4}", (f"{i} {ANSWER}", f"{i}' {ANSWER}"), priority=i % 97)
            for i in range(start, min(start + 10_000, num_tasks))
        ]
        store.add_tasks(run_id, start, new)
    return run_id


def work(desk: Desk, count: int, times: Times, pause_s: float = 0.0) -> None:
    draw = random.Random(desk.annotator_id)
    for _ in range(count):
        time.sleep(draw.uniform(0, 2 * pause_s))
        begin = time.perf_counter()
        lease = desk.next()
        taken = time.perf_counter()
        assert lease is not None
        desk.answer(lease.token, "left", 1.0)
        answered = time.perf_counter()
        desk.progress()
        times.next.append(1e3 * (taken - begin))
        times.answer.append(1e3 * (answered - taken))
        times.progress.append(1e3 * (time.perf_counter() - answered))


def at_once(store: Store, run_id: int, num_annotators: int, count: int, pause_s: float = 0.0) -> Times:
    times = Times()
    desks = [
        Desk(store, run_id, without_access(store, run_id, f"{num_annotators}/{pause_s}/{i}", simulated=True))
        for i in range(num_annotators)
    ]
    threads = [threading.Thread(target=work, args=(desk, count, times, pause_s)) for desk in desks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def worst_case(store: Store, run_id: int, num_tasks: int, count: int) -> Times:
    """All tasks but the last ones wait for a second answer, and the first came from this very annotator."""
    annotator_id = without_access(store, run_id, "diligent", simulated=True)
    with store.database.write() as connection:
        answered = (
            select(
                Task.run_id,
                Task.id,
                literal(annotator_id),
                literal("first"),
                literal(1.0),
                literal(""),
                literal(0.0),
                literal(0.0),
            )
            .where(Task.run_id == run_id)
            .order_by(Task.rank, Task.id)
            .limit(num_tasks - LEFT_OVER)
        )
        columns = ("run_id", "task_id", "annotator_id", "verdict", "seconds", "note", "answered_at", "settles_at")
        connection.execute(insert(ComparisonRow).from_select(columns, answered))
    times = Times()
    work(Desk(store, run_id, annotator_id), min(count, LEFT_OVER), times)
    return times


def measure(store: Store, num_tasks: int, count: int) -> list[str]:
    begin = time.perf_counter()
    run_id = fill(store, "full", num_tasks, 1)
    filled = time.perf_counter() - begin
    rows = [
        at_once(store, run_id, 1, count).row("one annotator, without a pause"),
        at_once(store, run_id, 20, count // 10, 1.0).row("20 at once, each about every second"),
        at_once(store, run_id, 20, count // 10).row("20 at once, without a pause"),
    ]
    other = fill(store, "worst", num_tasks, 2)
    rows.append(worst_case(store, other, num_tasks, count).row("one who has answered all but 50"))
    return [
        f"{2 * num_tasks} candidates added in {filled:.1f} s. Milliseconds:",
        "",
        "| | next, median | p95 | answer, median | p95 | progress, median | p95 |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--calls", type=int, default=500, help="of one annotator; each of twenty makes a tenth")
    parser.add_argument("--store", help="URL of an empty database")
    parser.add_argument("--out", type=Path, help="file for the table, which is printed too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = Store.open(options.store or str(Path(directory) / "feedback.db"))
        lines = [store.database.url.get_backend_name(), "", *measure(store, options.candidates // 2, options.calls)]
        store.close()
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
