"""Where rewards come from: functions in processes of their own, shipped rules, services, several of them together."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rlhf.config import PPOConfig, load
from nemo_rlhf.config.commands import REQUIRED
from nemo_rlhf.config.sources import KINDS, FunctionSourceConfig, HttpSourceConfig, read_sources
from nemo_rlhf.rollout import pool as pools
from nemo_rlhf.rollout import rules
from nemo_rlhf.rollout.http import RewardService
from nemo_rlhf.rollout.named import load_function
from nemo_rlhf.rollout.pool import Pool
from nemo_rlhf.rollout.score import Unavailable, score, total_scores
from nemo_rlhf.rollout.sources import CalledSource, open_sources, score_all
from nemo_rlhf.types import Prompt, Rollout, Sample
from tests.conftest import REWARDS, Tiny
from tests.jobs import error_lines, metrics_of, rollouts_of
from tests.spawn import run_distributed
from tests.workers.rewards import HANGS_FOR, count_a

DOCS = Path(__file__).resolve().parent.parent / "docs"
REASONS = ("eos", "stop:.", "length")


def make_rollout(*texts: str, **metadata: list[Any]) -> Rollout:
    """A sample a text, with a token a letter and one for its end; ``metadata``: one value a sample."""
    samples = []
    for index, text in enumerate(texts):
        fields_of_prompt = {name: values[index] for name, values in metadata.items()}
        prompt = Prompt((5,), f"prompt {index} ", fields_of_prompt)
        ids = (*map(ord, text), 1)
        samples.append(Sample(prompt, index, ids, text, REASONS[index % 3]))  # type: ignore[arg-type]
    return Rollout(tuple(samples))


# ---- configuration


def ppo(*overrides: str) -> PPOConfig:
    given = [f"{key}={value}" for key, value in REQUIRED["ppo"].items() if key != "reward.function"]
    return load("ppo", [*given, *overrides])


def refused(entries: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        ppo(f"reward.sources={entries}", *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sources_reach_their_dataclasses() -> None:
    cfg = ppo(
        "reward.sources=[{kind: function, name: f, function: 'a.b:c', arguments: {x: [1, 2]}, workers: 2,"
        "timeout_s: 3},"
        "{kind: http, name: judge, weight: 0.5, url_file: /shared/url, token_env: TOKEN},"
        "{kind: model, name: rm, restore_from: /models/rm, residence: swap}]"
    )
    function, http, model = read_sources(cfg.reward.sources)
    assert isinstance(function, FunctionSourceConfig) and isinstance(http, HttpSourceConfig)
    assert (function.arguments, function.workers, function.timeout_s, function.weight) == ({"x": [1, 2]}, 2, 3.0, 1.0)
    assert (http.url, http.url_file, http.weight, http.token_env) == (None, "/shared/url", 0.5, "TOKEN")
    assert (model.kind, model.name) == ("model", "rm")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("[5]", "a list of mappings"),
        ("[{name: a}]", "reward.sources[0].kind=None is not known: choose one of function, model, http"),
        ("[{kind: function, name: a, functoin: 'a:b'}]", "reward.sources[0].functoin in a source of kind function: did "
         "you mean function?"),
        ("[{kind: http, name: a, url: 'http://a/b', workers: 3}]", "[0].workers in a source of kind http"),
        ("[{kind: function, name: a}]", "reward.sources[0].function is not set"),
        ("[{kind: function, function: 'a:b'}]", "reward.sources[0].name is not set"),
        ("[{kind: function, name: a, function: nowhere}]", "package.module:name"),
        ("[{kind: function, name: a, function: 'a:b', weight: much}]", "weight=much has the wrong type: it must be a "
         "number"),
        ("[{kind: function, name: a, function: 'a:b', weight: inf}]", "weight=inf is out of range"),
        ("[{kind: function, name: mean, function: 'a:b'}]", 'neither "mean"'),
        ("[{kind: function, name: 'a b', function: 'a:b'}]", "cannot be logged as reward/<name>"),
        ("[{kind: function, name: a, function: 'a:b'},{kind: model, name: a, restore_from: x}]", "sources[1].name"),
        ("[{kind: function, name: a, function: 'a:b', timeout_s: 3}]", "set workers to 1 or more"),
        ("[{kind: function, name: a, function: 'a:b', on_failure: 0}]", "set workers to 1 or more"),
        ("[{kind: function, name: a, function: 'a:b', workers: 1, on_failure: skip}]", '"error" or a finite number'),
        ("[{kind: model, name: a, restore_from: x, residence: disk}]", "choose one of resident, swap"),
        ("[{kind: http, name: a}]", "either url or url_file"),
        ("[{kind: http, name: a, url: 'http://a', url_file: b}]", "either url or url_file"),
        ("[{kind: http, name: a, url: 'node7:8000'}]", "write it whole"),
        ("[{kind: http, name: a, url: 'http://a', batch_size: 0}]", "batch_size=0 is out of range: it must be 1"),
        ("[{kind: http, name: a, url: 'http://a', wait_s: 3600}]", "trainer.timeout_s=1800 would end the job"),
    ],
)  # fmt: skip
def test_wrong_entries_are_named(entries: str, words: str) -> None:
    assert words in refused(entries)


def test_one_of_function_and_sources() -> None:
    entries = "[{kind: function, name: a, function: 'a:b'}]"
    assert "reward.function and reward.sources are both set" in refused(entries, "reward.function=a.b:c")
    with pytest.raises(ValueError, match=r"reward\.function is not set: .*\(or reward\.sources "):
        ppo()


def test_every_key_of_a_source_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "rewards.md").read_text(), re.MULTILINE)
    for kind in KINDS.values():
        assert {field.name for field in fields(kind)} <= set(rows), kind


# ---- functions and workers


def make_pool(name: str, **changes: Any) -> Pool:
    function = f"{REWARDS}:{name}"
    config = FunctionSourceConfig("function", "f", function=function, **{"workers": 2, **changes})
    return Pool(config, load_function(function))


def test_workers_return_what_the_function_returns(tiny: Any) -> None:
    from nemo_rlhf.data.tokenizer import load_tokenizer

    rollout = make_rollout("a", "bcd", "", "efghi", "jk")
    pool = make_pool("misbehaving", arguments={"scale": 0.5})
    assert score(pool, rollout, object()).scores.tolist() == [0.5, 1.5, 0.0, 2.5, 1.0]
    assert score(pool, make_rollout("abc"), object()).scores.tolist() == [1.5]
    pool.close()
    tokenizer = load_tokenizer(tiny.hf)
    pool = make_pool("vocabulary_size", workers=1)
    assert score(pool, rollout, tokenizer).scores.tolist() == [len(tokenizer)] * 5
    pool.close()


def test_coroutines_in_workers_and_without() -> None:
    rollout = make_rollout("a", "bcd")
    pool = make_pool("slow_lengths")
    for function in (pool, load_function(f"{REWARDS}:slow_lengths")):
        rewards = score(function, rollout, None).token_rewards
        assert rewards is not None and [each.tolist() for each in rewards] == [[1, 1], [3, 3, 3, 3]]

    async def from_a_notebook() -> None:  # where a loop runs already
        assert score(load_function(f"{REWARDS}:slow_lengths"), rollout, None).token_rewards is not None

    asyncio.run(from_a_notebook())
    pool.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exit", "ended its process with exit code 7 for sample 2, whose prompt is 'prompt 2 '."),
        ("segfault", "was killed by SIGSEGV for sample 2"),
        ("hang", "took more than 2 s for sample 2"),
        ("raise", "raised KeyError: 'no such word' for sample 2"),
        ("odd", "and must return a list with one reward, for sample 2"),
    ],
)
def test_bad_samples_are_named_or_get_the_fallback(text: str, words: str) -> None:
    rollout = make_rollout("a", "bcd", text, "efghi", "jk")
    timeout_s = 2 if text == "hang" else 60
    pool = make_pool("misbehaving", timeout_s=timeout_s)
    for _ in range(1 if text == "hang" else 2):  # an error leaves nothing behind that would disturb the next call
        with pytest.raises(ValueError) as caught:
            score(pool, rollout, None)
        assert words in str(caught.value) and f"reward function {REWARDS}:misbehaving" in str(caught.value)
    assert score(pool, make_rollout("abc"), None).scores.tolist() == [3.0]
    pool.close()
    pool = make_pool("misbehaving", timeout_s=timeout_s, on_failure=-2)
    with pytest.warns(UserWarning, match=r"for sample 2, .* It gets on_failure; reward/f/fallbacks says how many do"):
        scored = score_all([CalledSource(pool, "f", 2.0)], rollout, None)
    assert scored.scores.tolist() == [2.0, 6.0, -4.0, 10.0, 4.0]
    assert scored.by_source["f"].tolist() == [1.0, 3.0, -2.0, 5.0, 2.0] and scored.fallbacks == {"f": 1}
    assert score_all([CalledSource(pool, "f", 2.0)], make_rollout("abc"), None).fallbacks == {"f": 0}
    pool.close()


def test_nothing_that_a_worker_sends_runs_in_the_run(tmp_path: Path) -> None:
    """Whoever has a worker owns its connection. A lie about a reward is all that goes through it."""
    marker = tmp_path / "ran"
    pool = make_pool("hostile", arguments={"marker": str(marker)}, timeout_s=2, on_failure=-1)
    attacks = {
        "pickle": "took more than 2 s",
        "half": "took more than 2 s",
        "close": "closed its connection",
        "pickle line": "answered with something other than numbers",
    }
    with pytest.warns(UserWarning):
        scores = score(pool, make_rollout(*attacks, "large", "good"), None).scores.tolist()
    assert scores == [-1.0] * 5 + [2.0] and not marker.exists()
    pool.close()
    pool = make_pool("hostile", arguments={"marker": str(marker)}, workers=1)
    with pytest.raises(ValueError, match=r"\\x1b\[2Jraised for sample 0"):
        score(pool, make_rollout("escape"), None)


@pytest.mark.parametrize(
    "said",
    [b'[true, "1"]', b"[true, [[1.0]]]", b"[true, [null]]", b"[true, true]", b"[" * 100_000, b'{"a": 1, "b": 2}',
     b"[true, " + b"9" * 5000 + b"]", b"[true, 1.0]\n[true, 2.0]", b"[true]", b"[1, 2.0]", b"[false, 7]", b"", b"null",
     b"\xff\xfe", pickle.dumps((True, 1.0))],
)  # fmt: skip
def test_only_numbers_or_a_sentence_are_taken_from_a_worker(said: bytes) -> None:
    with pytest.raises(pools._Lost, match="something other than numbers"):
        pools._checked(said + b"\n")


def test_nothing_that_a_function_started_outlives_its_time_out() -> None:
    import psutil

    pool = make_pool("misbehaving", workers=1, timeout_s=1, on_failure=0)
    with pytest.warns(UserWarning, match="took more than 1 s"):
        assert score(pool, make_rollout("hang"), None).scores.tolist() == [0.0]
    assert not [process for process in psutil.process_iter(["cmdline"]) if HANGS_FOR in (process.info["cmdline"] or ())]
    pool.close()


def test_time_out_counts_for_each_sample_and_not_for_all() -> None:
    pool = make_pool("slow_lengths", workers=1, timeout_s=0.5)
    assert score(pool, make_rollout(*["ab"] * 80), None).token_rewards is not None  # 0.8 s and more
    pool.close()


def test_workers_stay_and_dead_ones_are_replaced() -> None:
    import psutil

    rollout = make_rollout(*"abcdefgh")
    pool = make_pool("process_id")
    first = {int(number) for number in score(pool, rollout, None).scores}
    assert os.getpid() not in first and 1 <= len(first) <= 2
    assert {int(number) for number in score(pool, rollout, None).scores} <= {
        child.pid for child in psutil.Process().children()
    }
    for child in psutil.Process().children():
        if child.pid in first:
            child.kill()
            child.wait()
    assert first.isdisjoint(int(number) for number in score(pool, rollout, None).scores)
    pool.close()
    assert not [child for child in psutil.Process().children() if "pool_worker" in " ".join(child.cmdline())]


def test_sources_are_opened_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def source(**keys: Any) -> list[CalledSource]:
        return open_sources([FunctionSourceConfig("function", "f", **keys)], lambda: False, 60.0)

    (one,) = source(function=f"{REWARDS}:misbehaving", arguments={"scale": 3})
    assert (one.name, one.weight) == ("f", 1.0)
    assert score(one.reward_fn, make_rollout("ab"), None).scores.tolist() == [6.0]
    with pytest.raises(
        ValueError, match=r'reward\.sources\[0\]\.function is "tests\.nothing:f", and there is no module'
    ):
        source(function="tests.nothing:f")
    with pytest.raises(ValueError, match=r"reward\.sources\[0\]\.arguments do not fit .*unexpected keyword argument"):
        source(function="nemo_rlhf.rollout.rules:normalise", arguments={"words": 3})
    with pytest.raises(ValueError, match=r"arguments has outputs"):
        source(function=f"{REWARDS}:misbehaving", arguments={"outputs": 3})
    with pytest.raises(
        ValueError, match=r'The prompts have a field "scale", which is an argument of the reward function'
    ):
        score(one.reward_fn, make_rollout("ab", scale=[1]), None)
    (pooled,) = source(function=f"{REWARDS}:misbehaving", arguments={"scale": 3}, workers=1)
    with pytest.raises(ValueError, match=r'a field "scale", which is an argument of the reward function'):
        score(pooled.reward_fn, make_rollout("ab", scale=[1]), None)


# ---- shipped functions


def test_rules() -> None:
    rollout = make_rollout("x = 12", "so: 7\n", "none", answer=["12", 7, ["no", "None!"]])
    texts = [sample.text for sample in rollout.samples]
    assert rules.regex_match(texts, pattern=r"\d+") == [1, 1, 0]
    assert rules.regex_match(texts, pattern=r"so.*7", whole=True) == [0, 1, 0]
    options = {"function": "nemo_rlhf.rollout.rules:exact_answer", "arguments": {"pattern": r"[=:] (\d+)"}}
    configs = [
        FunctionSourceConfig("function", "answer", **options),  # type: ignore[arg-type]
        FunctionSourceConfig("function", "plain", function="nemo_rlhf.rollout.rules:exact_answer"),
        FunctionSourceConfig(
            "function", "length", function="nemo_rlhf.rollout.rules:length_penalty",
            arguments={"free_tokens": 5, "per_token": 0.5},
        ),
        FunctionSourceConfig(
            "function", "eos", function="nemo_rlhf.rollout.rules:missing_eos_penalty", arguments={"penalty": 3}
        ),
    ]  # fmt: skip
    scored = score_all(open_sources(configs, lambda: False, 60.0), rollout, None)
    assert {name: scores.tolist() for name, scores in scored.by_source.items()} == {
        "answer": [1, 1, 0],
        "plain": [0, 0, 1],
        "length": [-1, -1, 0],
        "eos": [0, 0, -3],  # of "eos", "stop", "length"
    }
    with pytest.raises(ValueError, match='exact_answer raised ValueError: a prompt has no field "answer"'):
        score(rules.exact_answer, make_rollout("a"), None)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  Paris. ", "paris"), ("New   YORK", "new york"), ('"yes"', "Yes!"), ("$1,200.50", "1200.5"), ("-3.0", "-3"),
        (".5", "0.50"), ("1e3", "1000"), ("-0", "0"), ("２", "2"), ("(b)", "B"), ("1e999999999", "1E999999999"),
    ],
)  # fmt: skip
def test_normalised_answers_are_the_same(text: str, same: str) -> None:
    assert rules.normalise(text) == rules.normalise(same)


@pytest.mark.parametrize(("text", "other"), [("3", "-3"), ("1,20", "120"), ("1.5", "15"), ("a b", "ab"), ("", "0")])
def test_normalised_answers_differ(text: str, other: str) -> None:
    assert rules.normalise(text) != rules.normalise(other)


# ---- several sources


def test_sources_add_up_by_weight() -> None:
    rollout = make_rollout("ab", "c", "def")

    def lengths(outputs: list[str], **_: Any) -> list[float]:
        return [float(len(output)) for output in outputs]

    def tokens(output_ids: list[list[int]], **_: Any) -> list[Any]:
        return [[1.0] * len(ids) for ids in output_ids]

    def some(output_ids: list[list[int]], **_: Any) -> list[Any]:
        return [[0.0, 1.0, 2.0], 10.0, 20.0]

    scored = score_all(
        [CalledSource(lengths, "lengths", 2.0), CalledSource(tokens, "tokens", -0.5), CalledSource(some, "some", 3.0)],
        rollout,
        None,
    )
    assert scored.scores.tolist() == [4.0, 32.0, 66.0]
    assert scored.token_rewards is not None
    assert [each.tolist() for each in scored.token_rewards] == [[-0.5, 2.5, 5.5], [-0.5] * 2, [-0.5] * 4]
    assert {name: values.tolist() for name, values in scored.by_source.items()} == {
        "lengths": [2, 1, 3], "tokens": [3, 2, 4], "some": [3, 10, 20],
    }  # fmt: skip
    weights = torch.tensor([2.0, -0.5, 3.0])
    assert torch.equal(total_scores(scored), weights @ torch.stack(list(scored.by_source.values())))
    alone = score_all([CalledSource(some)], rollout, None)
    assert alone.by_source == {} and total_scores(alone).tolist() == [3.0, 10.0, 20.0]


# ---- services


class Service:
    """A reward service whose answers a test may spoil. ``spoil(number, handler)`` is called with the count of requests
    before it and returns True where it has answered itself."""

    def __init__(self, spoil: Callable[[int, Any], bool] = lambda number, handler: False, port: int = 0) -> None:
        self.scored: list[str] = []  # the samples of every request that was answered well
        self.requests: list[tuple[str, dict[str, str], list[Any]]] = []
        self.busiest = 0
        busy, lock = [0], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:
                samples = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))["samples"]
                with lock:
                    number = len(self.requests)
                    self.requests.append((handler.path, dict(handler.headers), samples))
                    busy[0] += 1
                    self.busiest = max(self.busiest, busy[0])
                try:
                    if not spoil(number, handler):
                        with lock:
                            self.scored += [sample["prompt"] for sample in samples]
                        handler.reply(200, {"rewards": [float(len(sample["response"])) for sample in samples]})
                finally:
                    with lock:
                        busy[0] -= 1

            def reply(handler, status: int, content: Any, **headers: str) -> None:
                body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                handler.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    handler.send_header(name.replace("_", "-"), value)
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def start(*arguments: Any) -> Service:
        services.append(Service(*arguments))
        return services[-1]

    yield start
    for service in services:
        service.stop()


def client(is_stopping: Callable[[], bool] = lambda: False, limit_s: float = 600.0, **keys: Any) -> RewardService:
    defaults = {"batch_size": 3, "concurrency": 2, "timeout_s": 5.0, "backoff_s": 0.01, "wait_s": 5.0}
    return RewardService(HttpSourceConfig("http", "judge", **{**defaults, **keys}), is_stopping, limit_s)


WORDS = [letter * (number % 4 + 1) for number, letter in enumerate("abcdefghij")]
LENGTHS = [float(len(word)) for word in WORDS]


def test_service_is_asked_in_batches(serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    service = serve(lambda number, handler: bool(time.sleep(0.05)))
    rollout = make_rollout(*WORDS, letter=[*"abcdefghi", None])
    assert score(client(url=service.url, token_env="JUDGE_TOKEN"), rollout, None).scores.tolist() == LENGTHS
    assert sorted(len(samples) for _, _, samples in service.requests) == [1, 3, 3, 3]
    assert service.busiest == 2
    assert {path for path, _, _ in service.requests} == {"/score"}
    assert {headers["Authorization"] for _, headers, _ in service.requests} == {"Bearer secret"}
    assert len({headers["X-Request-Id"] for _, headers, _ in service.requests}) == 4
    first = min(service.requests, key=lambda request: request[2][0]["prompt"])[2][0]
    assert first == {"prompt": "prompt 0 ", "response": "a", "metadata": {"letter": "a"}}


def spoil_first(number: int, handler: Any) -> bool:
    """Every way in which an answer may fail, one after the other."""
    if number == 0:
        handler.reply(500, "broken")
    elif number == 1:
        handler.connection.shutdown(socket.SHUT_RDWR)  # before an answer
        handler.close_connection = True
    elif number == 2:
        handler.reply(200, {"rewards": [1.0]})
    elif number == 3:
        handler.reply(200, "{no json")
    elif number == 4:
        handler.reply(429, "later", Retry_After="0")
    elif number == 5:
        time.sleep(1.5)  # longer than the client waits
    elif number == 6:
        handler.reply(200, {"scores": []})
    elif number == 7:  # in the midst of an answer
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"rewards": [')
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
    elif number == 8:
        handler.reply(503, "starting")
    else:
        return False
    return True


def test_service_is_asked_until_every_batch_has_one_good_answer(serve: Callable[..., Service]) -> None:
    service = serve(spoil_first)
    rewards = score(client(url=service.url, timeout_s=1.0, concurrency=3), make_rollout(*WORDS), None)
    assert rewards.scores.tolist() == LENGTHS
    assert set(service.scored) == {f"prompt {number} " for number in range(10)}
    by_id: dict[str, set[str]] = {}
    for _, headers, samples in service.requests:
        by_id.setdefault(headers["X-Request-Id"], set()).add(json.dumps(samples))
    assert len(by_id) == 4 and all(len(bodies) == 1 for bodies in by_id.values()), "a retry is known by its number"
    assert len(service.requests) >= 4 + 9


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (400, "prompt is empty", r"refused a request with HTTP 400: prompt is empty"),
        (401, "", r"refused a request with HTTP 401"),
        (302, "", r"refused a request with HTTP 302"),
        (200, {"rewards": [1.0, None, 2.0]}, r"returned None for sample 1: it must be a finite number"),
        (200, '{"rewards": [1.0, 2.0, NaN]}', r"returned nan for sample 2"),
    ],
)
def test_service_that_refuses_is_not_asked_again(
    serve: Callable[..., Service], status: int, content: Any, words: str
) -> None:
    service = serve(lambda number, handler: handler.reply(status, content) or True)
    with pytest.raises(ValueError, match=rf"The reward service judge \(http://.*/score\) {words}"):
        score(client(url=service.url), make_rollout("a", "b", "c"), None)
    assert len(service.requests) == 1


def test_service_that_stays_away_is_given_up_after_the_wait() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/score"
    begin = time.monotonic()
    with pytest.raises(Unavailable, match=r"judge .* no good answer for [01] s \(wait_s=0.5, .*last time: .*onnect"):
        score(client(url=url, wait_s=0.5), make_rollout(*WORDS), None)
    with pytest.raises(Unavailable, match=r"gave no good answer for [01] s \(wait_s=60, within trainer\.timeout_s\)"):
        score(client(limit_s=0.5, url=url, wait_s=60), make_rollout(*WORDS), None)
    assert 0.5 <= time.monotonic() - begin < 3
    begin = time.monotonic()
    with pytest.raises(Unavailable, match="was asked to stop while"):  # nobody waits for the rest of the time
        score(client(lambda: time.monotonic() > begin + 0.3, url=url, wait_s=60), make_rollout(*WORDS), None)
    assert time.monotonic() - begin < 3


def test_a_batch_that_never_succeeds_ends_although_others_do(serve: Callable[..., Service]) -> None:
    def spoil(number: int, handler: Any) -> bool:
        poisoned = service.requests[number][2][0]["prompt"] == "prompt 3 "
        if poisoned:
            handler.reply(500, "cannot")
        return poisoned

    service = serve(spoil)
    with pytest.raises(Unavailable, match="HTTP 500"):
        score(client(url=service.url, wait_s=0.3, backoff_s=0.05), make_rollout(*WORDS), None)
    assert len(service.scored) == 7


def test_service_that_moves_is_found_by_its_file(serve: Callable[..., Service], tmp_path: Path) -> None:
    address = tmp_path / "url"
    found = client(url_file=str(address), wait_s=20)
    threads = []

    def spoil(number: int, handler: Any) -> bool:
        if number < 2:
            return False
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        if number == 2:  # it dies with a batch in hand; another starts elsewhere
            threads.append(threading.Timer(0.3, lambda: address.write_text(serve().url + "\n")))
            threads[0].start()
        return True

    first = serve(spoil)
    threading.Timer(0.2, lambda: address.write_text(first.url)).start()  # nor is there a file at first
    assert score(found, make_rollout(*WORDS), None).scores.tolist() == LENGTHS
    assert len(first.scored) == 6 and len(threads) == 1


def packed(number: int, handler: Any) -> bool:
    """What grows a thousandfold."""
    bomb = zlib.compress(b'{"rewards": [' + b" " * 1_000_000 + b"]}", 9, 31)
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(bomb)))
    handler.end_headers()
    handler.wfile.write(bomb)
    return True


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (packed, r"an answer that is packed \(gzip\)"),
        ("[" * 100_000, "an answer that is not"),
        ('{"rewards": ' + "[" * 100_000, "an answer that is not"),
        ('{"rewards": [' + "9" * 5000 + "]}", "an answer that is not"),
        ('{"rewards": [1], "rewards": [2]}', "an answer that is not"),
        ("[1.0]", "an answer that is not"),
        ("\x1b]0;owned\x07\x1b[2J\u202e", r"\\x1b\]0;owned\\x07\\x1b\[2J\\u202e"),
        (" " * 200_000, "an answer of more than 0 MiB"),
    ],
)  # fmt: skip
def test_hostile_answers_are_asked_for_again_and_do_no_harm(
    serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, content: Any, words: str
) -> None:
    from nemo_rlhf.rollout import http

    monkeypatch.setattr(http, "MOST_BYTES", 150_000)

    def spoil(number: int, handler: Any) -> bool:
        assert handler.headers["Accept-Encoding"] == "identity"
        return content(number, handler) if callable(content) else (handler.reply(200, content) or True)

    service = serve(spoil)
    with pytest.raises(Unavailable, match=words) as caught:
        score(client(url=service.url, wait_s=0.05), make_rollout("a"), None)
    assert service.requests and str(caught.value).isprintable() and len(str(caught.value)) < 800


def test_what_a_service_refuses_with_is_shown_harmlessly(serve: Callable[..., Service]) -> None:
    service = serve(lambda number, handler: handler.reply(418, "\x1b[31m" + "no " * 1_000_000) or True)
    with pytest.raises(ValueError, match=r"HTTP 418: \\x1b\[31mno no") as caught:
        score(client(url=service.url.replace("//", "//user:PASSWORD@")), make_rollout("a"), None)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 400 and "PASSWORD" not in said and "user" not in said


@pytest.mark.parametrize(
    "address",
    [b"", b"\xff\xfe", b"ftp://a/b", b"http://", b"http://user:pw@127.0.0.1/", b"http://127.0.0.1/\r\nX: y",
     b"http://127.0.0.1:port/", b"http://[::1/", b"x" * 1_000_000, b"http://a\\@b/", b"http://a b/", None],
)  # fmt: skip
def test_addresses_in_files_that_are_none_are_read_again(
    serve: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: bytes | None
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    file = tmp_path / "url"
    if address is None:
        os.mkfifo(file)
    else:
        file.write_bytes(address)
    service, looks = serve(), iter(range(100))

    def mend() -> bool:  # asked whenever the client waits
        if next(looks) == 1:
            file.unlink()
            file.write_text(service.url)
        return False

    found = client(mend, url_file=str(file), token_env="JUDGE_TOKEN", wait_s=20)
    assert score(found, make_rollout("abc"), None).scores.tolist() == [3.0]


def test_a_token_goes_only_where_its_owner_says(
    serve: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    service, file = serve(), tmp_path / "url"
    file.write_text(service.url)
    file.chmod(0o666)
    with pytest.raises(ValueError, match=r"would send its token wherever .*url says.*written by all: make it your own"):
        score(client(url_file=str(file), token_env="JUDGE_TOKEN"), make_rollout("a"), None)
    assert not service.requests
    assert score(client(url_file=str(file)), make_rollout("a"), None).scores.tolist() == [1.0]  # no token to lose
    file.chmod(0o664)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if file.stat().st_uid:  # root's are trusted
        with pytest.raises(ValueError, match="belongs to another user"):
            score(client(url_file=str(file), token_env="JUDGE_TOKEN"), make_rollout("a"), None)
    for token in ("se\r\ncret", "s\xe9cret", "a b", "x\0y"):
        monkeypatch.setitem(os.environ, "JUDGE_TOKEN", token.replace("\0", "\x01"))
        with pytest.raises(ValueError, match=r"printable ASCII characters without spaces, and \$JUDGE_TOKEN") as caught:
            client(url=service.url, token_env="JUDGE_TOKEN")
        assert "cret" not in str(caught.value)


def test_an_address_that_cannot_be_asked_ends_at_once() -> None:
    for url in ("http://[::1/", "http://a:port/x", "http://" + "x" * 300 + "/"):
        with pytest.raises((ValueError, Unavailable)) as caught:
            score(client(url=url, wait_s=0.05), make_rollout("a"), None)
        assert str(caught.value).isprintable()


def test_what_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"needs the token in \$JUDGE_TOKEN, which is not set"):
        score(client(url="http://127.0.0.1:9/", token_env="JUDGE_TOKEN"), make_rollout("a"), None)
    with pytest.raises(ValueError, match="cannot be sent to the reward service judge"):
        score(client(url="http://127.0.0.1:9/"), make_rollout("a", x=[float("nan")]), None)


def test_messages_do_not_tell_who_asks() -> None:
    for url in ("http://KEY:PASS@127.0.0.1:9/score", "http://KEY@127.0.0.1:9/score?token=PASS", "http://KEY:PASS@[/"):
        with pytest.raises((ValueError, Unavailable)) as error:
            score(client(url=url, wait_s=0.1, backoff_s=0.01), make_rollout("a"), None)
        assert "***" in str(error.value) and "KEY" not in str(error.value) and "PASS" not in str(error.value)
    said = refused("[{kind: http, name: a, url: 'ftp://u:PASS@h'}]")
    assert "PASS" not in said and "no address" in said


# ---- whole runs


PROMPTS, VARIANTS, SAMPLES = 13, 2, 16  # of the tiny PPO run: validations, and what a step samples
VALIDATION = PROMPTS * VARIANTS


class Judge(Service):
    """Scores as ``count_a``. ``/ok`` always answers; ``/N`` goes away for good after N samples, and another of these
    writes its address to ``moves_to`` a second later, if that is given."""

    def __init__(self, moves_to: Path | None = None) -> None:
        self.good: Counter[str] = Counter()
        self.successors: list[Judge] = []
        self.moves_to, self._counting = moves_to, threading.Lock()
        super().__init__(self.judge)

    def judge(self, number: int, handler: Any) -> bool:
        path, _, samples = self.requests[number]
        name = path.strip("/")
        with self._counting:
            is_away = name.isdigit() and self.good[name] >= int(name)
            if is_away and self.moves_to is not None and not self.successors:
                self.successors.append(Judge())
                threading.Timer(1.0, self.moves_to.write_text, [self.successors[0].at("ok")]).start()
        if is_away:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return True
        with self._counting:
            self.good[name] += len(samples)
        outputs = [sample["response"] for sample in samples]
        handler.reply(200, {"rewards": count_a(outputs, [sample["metadata"]["letter"] for sample in samples])})
        return True

    def at(self, path: str) -> str:
        return self.url.removesuffix("score") + path

    def stop(self) -> None:
        super().stop()
        for successor in self.successors:
            successor.stop()


def judged_by(place: str, wait_s: float) -> str:
    return f"{{kind: http, name: judge, concurrency: 1, {place}, wait_s: {wait_s}, backoff_s: 0.05, batch_size: 4}}"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    address = tmp_path_factory.mktemp("address") / "url"
    service = Judge(moves_to=address)
    address.write_text(service.at("30"))
    yield service
    service.stop()


@pytest.fixture(scope="module")
def judged(tiny: Tiny, judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    place = tmp_path_factory.mktemp("judged")
    others = Judge()

    def at(path: str) -> str:
        return f"url: '{others.at(path)}'"

    def ppo_run(name: str, where: str, wait_s: float = 0.3, **more: Any) -> dict[str, Any]:
        sources = f"reward.sources=[{judged_by(where, wait_s)}]"
        return {"arguments": tiny.ppo(place / name, "reward.function=null", sources), **more}

    tp2 = ("model.tensor_model_parallel_size=2", "trainer.max_steps=1", "reward.function=null")
    lengths = "{kind: function, name: eos, weight: 2.0, function: 'nemo_rlhf.rollout.rules:missing_eos_penalty'}"
    crash = f"{{kind: function, name: f, function: '{REWARDS}:exiting', workers: 2}}"
    payload = [
        {"arguments": tiny.ppo(place / "plain")},
        ppo_run("served", f"url_file: '{judge.moves_to}'", 60.0),
        ppo_run("away", at("0")),  # in the first validation
        ppo_run("away", at(str(2 * VALIDATION + SAMPLES))),  # in the rollout of step 2
        ppo_run("away", at(str(SAMPLES)), 2.0, stop_in_step=2),  # in the validation after it; a signal on one rank
        ppo_run("away", at(str(VALIDATION + SAMPLES))),  # that validation is made up for; away in the last
        ppo_run("away", at("ok")),
        {"arguments": tiny.rft(place / "rft", *tp2, f"reward.sources=[{lengths},{judged_by(at('ok'), 1)}]")},
        {"arguments": tiny.rft(place / "rft_away", *tp2, f"reward.sources=[{lengths},{judged_by(at('0'), 0)}]")},
        {"arguments": tiny.rft(place / "rft_crash", *tp2, f"reward.sources=[{crash}]")},
    ]
    results = run_distributed("tests.workers.run_worker:runs", 2, payload, timeout_s=400)
    others.stop()
    for one in zip(*results, strict=True):
        assert "traceback" not in one[0], one[0]["traceback"]
        assert one[0]["code"] == one[1]["code"], "ranks disagree"
    both = [one[0]["stderr"] + one[1]["stderr"] for one in zip(*results, strict=True)]
    return place, [{**one, "stderr": said} for one, said in zip(results[0], both, strict=True)]


def without_names(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "judge" not in name} for row in rows]


def test_exit_codes(judged: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [one["code"] for one in judged[1]] == [0, 0, 69, 69, 75, 69, 0, 0, 69, 2]


def test_a_service_that_moves_in_the_midst_of_a_run_changes_nothing(judged: tuple[Path, Any], judge: Judge) -> None:
    place, _ = judged
    rows = metrics_of(place / "served")
    assert without_names(rows) == metrics_of(place / "plain")
    assert all(row["reward/judge"] == pytest.approx(row["reward/mean"], abs=1e-6) for row in rows[1:])
    assert all(row["val/reward/judge"] == pytest.approx(row["val/reward"], abs=1e-6) for row in rows)
    assert all(f"val/reward/judge@temperature={value}" in rows[0] for value in ("0.9", "1.2"))
    samples = [sample for step in rollouts_of(place / "served").values() for sample in step]
    assert all(sample["scores"] == {"judge": sample["score"]} for sample in samples)
    (successor,) = judge.successors
    assert judge.good["30"] + successor.good["ok"] == 4 * VALIDATION + 3 * SAMPLES, "each sample was scored once"
    assert successor.good["ok"] > 0


def test_a_service_that_stays_away_costs_nothing_but_time(judged: tuple[Path, Any]) -> None:
    place, results = judged
    assert without_names(metrics_of(place / "away")) == metrics_of(place / "plain")
    assert rollouts_of(place / "away") == rollouts_of(place / "served")
    assert {path.name for path in (place / "away" / "checkpoints").iterdir()} == {"step_2", "step_3"}
    for result, steps in zip(results[2:6], (0, 1, 2, 3), strict=True):
        said = [line for line in result["stderr"].splitlines() if line.startswith("nemo-rlhf: The")]
        assert len(said) == 1 and "reward service judge" in said[0], result["stderr"]
        assert f"Steps done and saved: {steps}; the same command goes on from there." in said[0]
    assert "has all" not in results[6]["stderr"]


def test_sources_of_rft(judged: tuple[Path, Any]) -> None:
    place, results = judged
    (row,) = [row for row in metrics_of(place / "rft") if row["step"] == 1]
    assert row["reward/mean"] == pytest.approx(2 * row["reward/eos"] + row["reward/judge"], abs=1e-6)
    assert row["val/reward"] == pytest.approx(2 * row["val/reward/eos"] + row["val/reward/judge"], abs=1e-6)
    assert row["reward/eos"] < 0
    (line,) = error_lines(results[9]["stderr"])
    assert "exiting ended its process with exit code 3 for sample " in line
