"""Annotators at work in a process of their own: ``python -m tests.workers.feedback_worker URL RUN SEED LOG ID ...``.

Each of them is a thread, and writes down what it is about to do and, once the store has said so, that it is done.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.records import Lease
from nemo_rlhf.feedback.store import Store


class Annotator(threading.Thread):
    def __init__(self, store: Store, run_id: int, annotator_id: int, seed: int, log: Any) -> None:
        super().__init__()
        self.store, self.run_id, self.annotator_id, self.log = store, run_id, annotator_id, log
        self.desk = Desk(store, run_id, annotator_id)
        self.draw = random.Random(seed * 1000 + annotator_id)
        self.is_done = False

    def run(self) -> None:
        while self.store.queue_length(self.run_id):
            lease = self.desk.next()
            if lease is None:
                time.sleep(0.05)
                continue
            self.held(lease)
        self.is_done = True

    def held(self, lease: Lease | None) -> None:
        while lease is not None:
            since = time.monotonic()
            what = self.draw.random()
            if what < 0.05:
                until = time.monotonic()  # before the lease can end, here and below
                self.write("skip", lease, done=False)
                self.desk.skip(lease.token)
                self.write("skip", lease, done=True, since=since, until=until)
                return
            choice = self.draw.choice(["left", "right", "tie"])
            verdict = {"tie": "tie", "left": ("first", "second")[lease.swapped]}.get(
                choice, ("second", "first")[lease.swapped]
            )
            time.sleep(self.draw.random() * 0.005)
            until = time.monotonic()
            self.write("answer", lease, done=False, verdict=verdict)
            self.desk.answer(lease.token, choice, 1.0, f"{self.annotator_id}/{lease.key}")
            self.write("answer", lease, done=True, verdict=verdict, since=since, until=until)
            if what < 0.85:
                return
            self.write("undo", lease, done=False)
            last, (_, lease) = lease, self.desk.undo()
            self.write("undo", last, done=True)

    def write(self, what: str, lease: Lease, **more: Any) -> None:
        line = {"annotator": self.annotator_id, "what": what, "task": lease.task_id, **more}
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()


def longer(prompt: str, answer: str) -> int:
    """What simulated annotators prefer."""
    return len(answer)


def main() -> None:
    url, run_id, seed, log, *ids = sys.argv[1:]
    store = Store.open(url)
    with open(log, "a") as file:
        annotators = [Annotator(store, int(run_id), int(one), int(seed), file) for one in ids]
        while not Path(log).with_name("go").exists():  # so that all processes are at it together
            time.sleep(0.005)
        for annotator in annotators:
            annotator.start()
        for annotator in annotators:
            annotator.join()
    store.close()
    sys.exit(not all(annotator.is_done for annotator in annotators))


if __name__ == "__main__":
    main()
