"""A reward service: asked in batches, several at a time, and asked again until it answers or is given up.

Every batch is sent until one good answer has come, and that answer is taken once: nothing is lost and nothing counts
twice, whatever happens on the way.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import aiohttp

from nemo_rlhf.config.dumping import masked
from nemo_rlhf.config.sources import HttpSourceConfig
from nemo_rlhf.rollout.score import RewardError, Unavailable
from nemo_rlhf.rollout.terminal import printable
from nemo_rlhf.rollout.words import one_line
from nemo_rlhf.untrusted import parse_json

LONGEST_PAUSE_S = 30.0
_LOOK_S = 0.2  # how often a pause is broken to see whether the run is to stop
_AGAIN = (408, 429)  # and every 5xx
MOST_BYTES = 1 << 26  # of an answer
_PIECE = 1 << 16
_BRIEF = 200  # characters of what a service says, in a sentence
_LONGEST_URL = 4096


class _NotNow(Exception):
    """What may be well when it is tried again; ``pause_s``: what the service asks for."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class RewardService:
    """A reward function whose work is done elsewhere.

    A request is ``POST {"samples": [{"prompt": str, "response": str, "metadata": {...}}, ...]}``, its answer
    ``{"rewards": [number, ...]}``. ``X-Request-Id`` is the same whenever a batch is sent again. Connection errors,
    time-outs, 408, 429, 5xx and answers that are not of this form are tried again, after pauses that double and vary;
    any other status is an error.
    """

    def __init__(self, config: HttpSourceConfig, is_stopping: Callable[[], bool], limit_s: float) -> None:
        """``limit_s``: of a whole call, for which other ranks wait; a service that is away then is given up.

        Raises:
            RewardError: the variable that holds the token is not set.
        """
        self._config, self._is_stopping, self._limit_s = config, is_stopping, limit_s
        self.reward_title = f"reward service {config.name} ({masked(config.url or str(config.url_file))})"
        self._authorization = self._headers()

    async def __call__(
        self, samples: list[str], prompts: list[str], outputs: list[str], tokenizer: Any, **metadata: list[Any]
    ) -> list[Any]:
        """The service's rewards, one a sample.

        Raises:
            RewardError: it refuses a request, or what is sent cannot be written as JSON.
            Unavailable: it gave no good answer for ``wait_s`` or until ``limit_s``, or the run is to stop meanwhile.
        """
        records = [
            {"prompt": prompt, "response": output, "metadata": {name: values[row] for name, values in metadata.items()}}
            for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
        rewards: list[Any] = [None] * len(records)
        starts = iter(range(0, len(records), self._config.batch_size))
        limit = aiohttp.ClientTimeout(total=self._config.timeout_s)
        self._last_answer = self._started = monotonic()
        # What is packed may grow a thousandfold: it is neither asked for nor unpacked.
        headers = {**self._authorization, "Accept-Encoding": "identity"}
        async with aiohttp.ClientSession(timeout=limit, headers=headers, auto_decompress=False) as session:
            tasks = [
                asyncio.create_task(self._work(session, records, starts, rewards))
                for _ in range(self._config.concurrency)
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return rewards

    async def _work(
        self, session: aiohttp.ClientSession, records: list[Any], starts: Iterator[int], rewards: list[Any]
    ) -> None:
        """Batches, until none is left."""
        for start in starts:
            batch = records[start : start + self._config.batch_size]
            rewards[start : start + len(batch)] = await self._score(session, batch)

    async def _score(self, session: aiohttp.ClientSession, batch: list[Any]) -> list[Any]:
        body, pause = self._body(batch), self._config.backoff_s
        headers = {"Content-Type": "application/json", "X-Request-Id": uuid.uuid4().hex}
        while True:
            try:
                answer = await self._attempt(session, body, headers, len(batch))
            except asyncio.TimeoutError:
                failure = _NotNow(f"no answer within {self._config.timeout_s:g} s")
            except _NotNow as error:
                failure = error
            except RewardError:
                raise
            except (aiohttp.ClientError, OSError, ValueError) as error:
                said = printable(masked(one_line(error)), _BRIEF)
                if isinstance(error, ValueError) and self._config.url is not None:
                    raise RewardError(f"The {self.reward_title} cannot be asked at this address ({said}).") from None
                failure = _NotNow(said)
            else:
                self._last_answer = monotonic()
                return answer
            await self._pause(max(failure.pause_s, pause * random.uniform(0.5, 1.0)), str(failure))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _attempt(
        self, session: aiohttp.ClientSession, body: bytes, headers: dict[str, str], size: int
    ) -> list[Any]:
        async with session.post(self._url(), data=body, headers=headers, allow_redirects=False) as response:
            status = response.status
            if status in _AGAIN or status >= 500:
                raise _NotNow(f"HTTP {status}", _seconds(response.headers.get("Retry-After")))
            if status != 200:
                said = printable((await response.content.read(4 * _BRIEF)).decode("utf-8", "replace"), _BRIEF)
                raise RewardError(f"The {self.reward_title} refused a request with HTTP {status}: {said}")
            if (packed := response.headers.get("Content-Encoding", "identity")) != "identity":
                raise _NotNow(f"an answer that is packed ({printable(packed, 20)}), which was not asked for")
            answer = bytearray()
            async for piece in response.content.iter_chunked(_PIECE):
                answer += piece
                if len(answer) > MOST_BYTES:
                    raise _NotNow(f"an answer of more than {MOST_BYTES >> 20} MiB")
        try:
            rewards = parse_json(bytes(answer), "the answer")["rewards"]
        except (ValueError, KeyError, TypeError):
            said = printable(answer[: 4 * _BRIEF].decode("utf-8", "replace"), _BRIEF)
            raise _NotNow(f'an answer that is not {{"rewards": [...]}}: {said}') from None
        if not isinstance(rewards, list) or len(rewards) != size:
            many = len(rewards) if isinstance(rewards, list) else "no list of"
            raise _NotNow(f"{many} rewards for {size} samples")
        return rewards

    async def _pause(self, seconds: float, reason: str) -> None:
        """Wait before the next attempt; Unavailable when the service has been away too long, or the run must end."""
        end = monotonic() + seconds
        while True:
            now = monotonic()
            give_up = min(self._last_answer + self._config.wait_s, self._started + self._limit_s)
            if self._is_stopping():
                raise Unavailable(f"The run was asked to stop while the {self.reward_title} did not answer ({reason}).")
            if now >= give_up:
                raise Unavailable(
                    f"The {self.reward_title} gave no good answer for {now - self._last_answer:.0f} s "
                    f"(wait_s={self._config.wait_s:g}, within trainer.timeout_s); the last time: {reason.rstrip('.')}."
                )
            if now >= end:
                return
            await asyncio.sleep(min(_LOOK_S, end - now, give_up - now))

    def _url(self) -> str:
        """Read anew for every attempt: the job that serves it may have moved to another node."""
        if self._config.url is not None:
            return self._config.url
        try:
            # A pipe would be waited for.
            with os.fdopen(os.open(str(self._config.url_file), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                if self._authorization:
                    self._check_owner(os.fstat(file.fileno()))
                url = file.read(_LONGEST_URL).decode("ascii", "replace").strip()
        except OSError as error:
            raise _NotNow(f"{self._config.url_file} cannot be read ({error.strerror})") from None
        if not re.fullmatch(r"https?://[^\s/?#@\\\ufffd]+(/[!-?A-~]*)?", url):
            raise _NotNow(f"{self._config.url_file} holds no address")
        return url

    def _check_owner(self, found: os.stat_result) -> None:
        """Whoever can write the address gets the token, which goes to it. Raises RewardError where that is anybody."""
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & stat.S_IWOTH:
            raise RewardError(
                f"The {self.reward_title} would send its token wherever {self._config.url_file} says, and that file "
                "belongs to another user or can be written by all: make it your own (chmod o-w), or set url."
            )

    def _headers(self) -> dict[str, str]:
        variable = self._config.token_env
        if variable is None:
            return {}
        token = os.environ.get(variable, "").strip()
        if not token:
            raise RewardError(f"The {self.reward_title} needs the token in ${variable}, which is not set or empty.")
        if not re.fullmatch("[!-~]+", token):
            raise RewardError(
                f"The {self.reward_title} needs a token of printable ASCII characters without spaces, and ${variable} "
                "holds others."
            )
        return {"Authorization": f"Bearer {token}"}

    def _body(self, batch: list[Any]) -> bytes:
        try:
            return json.dumps({"samples": batch}, allow_nan=False, default=str).encode()
        except ValueError as error:
            raise RewardError(f"The prompts cannot be sent to the {self.reward_title} as JSON: {error}.") from None


def _seconds(header: str | None) -> float:
    """Of ``Retry-After``, where it is a number; its other form, a date, is as good as nothing here."""
    return min(float(header), LONGEST_PAUSE_S) if header is not None and header.isdecimal() else 0.0
