"""Several processes on one list of tasks. They are started afresh and import only what the work itself needs."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_work: Callable[[Any], Any]


def each(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Results of ``work`` on every task, as they come; with more than one worker ``work`` is sent to each once.

    All workers have ended when the iterator has, or is closed; none outlives this process. A Python script that asks
    for several must guard its start with ``if __name__ == "__main__"``, since they import it.

    Raises:
        ValueError, OSError: as ``work`` does.
        OSError: a worker was killed.
    """
    if min(workers, len(tasks)) <= 1:
        yield from map(work, tasks)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(work,)
    )
    try:
        for future in as_completed([pool.submit(_do, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise OSError("one of the worker processes was killed, perhaps for want of memory") from None
    except ValueError as error:
        raise ValueError(str(error)) from error  # from here, not from the pool: it is the user's to mend
    finally:
        pool.shutdown(cancel_futures=True)


def check_workers(workers: int) -> None:
    if workers < 1:
        raise ValueError(f"workers={workers} is not a number of processes: give 1 or more.")


def _prepare(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)  # the pool's own threads would wait for its next task for ever


def _do(task: Any) -> Any:
    return _work(task)
