"""The trained reward model as a service: ``nemo-rlhf serve-reward`` for as long as its scores are wanted."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from summarize_docstrings.commands import Program

from summarize.preferences import as_response

BATCH = 512  # samples in one request
EXIT_STOPPED = 75  # the server's answer to SIGTERM
_POLL_S = 0.2

Judge = Callable[[Sequence[str], Sequence[str]], list[float]]


@contextmanager
def serve(program: Program, checkpoint: Path, url_file: Path) -> Iterator[Judge]:
    """A function from prompts and summaries to scores: standard deviations above the mean of held-out summaries.

    Raises:
        RuntimeError: the server ended before it was ready, or not as it was told to.
    """
    url_file.unlink(missing_ok=True)
    where = ("server.port=0", f"server.url_file={url_file}")
    cut = (*program.cut, "model.micro_batch_size=128", "server.batch_size=256")
    with program.start("serve-reward", str(checkpoint), *where, "server.normalise=true", *cut) as server:
        try:
            while not url_file.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"nemo-rlhf serve-reward ended with exit code {server.returncode}.")
                time.sleep(_POLL_S)
            url = url_file.read_text().strip()
            yield lambda prompts, summaries: _ask(url, prompts, summaries)
        finally:
            server.terminate()
    if server.returncode != EXIT_STOPPED:
        raise RuntimeError(f"nemo-rlhf serve-reward ended with exit code {server.returncode}.")


def _ask(url: str, prompts: Sequence[str], summaries: Sequence[str]) -> list[float]:
    samples = [
        {"prompt": prompt, "response": as_response(summary), "metadata": {}}
        for prompt, summary in zip(prompts, summaries, strict=True)
    ]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    rewards: list[float] = []
    for start in range(0, len(samples), BATCH):
        body = json.dumps({"samples": samples[start : start + BATCH]}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with opener.open(request) as answer:
            rewards.extend(json.load(answer)["rewards"])
    return rewards
