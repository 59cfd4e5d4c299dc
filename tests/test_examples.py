"""The parts of the examples that are no training: corpus, tokenizer, reward, preferences, random walks."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import randomwalks  # noqa: E402
from summarize import figures, plot, preferences  # noqa: E402
from summarize_docstrings import corpus, evaluate, model, prepare, reward  # noqa: E402
from summarize_docstrings.corpus import Pair  # noqa: E402

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SUBSET = {name: STDLIB / name for name in ("asyncio", "logging", "json", "http", "importlib")}


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return corpus.gather(SUBSET, processes=1)


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return model.train_tokenizer((f"{pair.body} {pair.summary}" for pair in pairs), vocabulary_size=600)


# ---- corpus


def test_docstrings_become_pairs(tmp_path):
    (tmp_path / "module.py").write_text('''
class Stack:
    """A stack of values that grows and shrinks at its end.

    Values are put on the end of the stack by push, and leave it at its end in the opposite order.
    """

    def push(self, value):
        """Put a value on the stack. It may be anything at all.

        The ``value`` that is pushed last is the one which
        leaves the :class:`Stack` first.

        >>> Stack().push(1)
        """

    def pop(self):
        """Take a value off."""

    def unrelated(self):
        """Frobnicate quux bazaars.

        Nothing of what the first line says can be read in these lines of text.
        """
''')
    found = corpus.read_module(tmp_path / "module.py", "m/module.py")
    assert found == [
        Pair(
            "m/module.py",
            "Values are put on the end of the stack by push, and leave it at its end in the opposite order.",
            "A stack of values that grows and shrinks at its end.",
        ),
        Pair(
            "m/module.py",
            "It may be anything at all. The value that is pushed last is the one which leaves the Stack first.",
            "Put a value on the stack.",
        ),
    ]


def test_a_file_that_is_not_python_has_no_pairs(tmp_path):
    (tmp_path / "broken.py").write_text('def f(:\n    """Text."""\n')
    assert corpus.read_module(tmp_path / "broken.py", "m") == []


def test_private_packages_and_tests_are_left_out(tmp_path):
    for name in ("a.py", "_b.py", "tests/c.py", "_private/d.py", "test_e.py", "sub/f.py", "site-packages/g.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [path.relative_to(tmp_path).as_posix() for path in corpus.source_files(tmp_path)]
    assert found == ["_b.py", "a.py", "sub/f.py"]


def test_the_standard_library_gives_pairs_in_a_fixed_order(pairs):
    assert len(pairs) > 50
    assert pairs == corpus.gather(SUBSET, processes=2)
    for pair in pairs:
        assert corpus.MIN_SUMMARY_WORDS <= len(corpus.normalise(pair.summary).split()) <= corpus.MAX_SUMMARY_WORDS
        assert corpus.MIN_BODY_WORDS <= len(pair.body.split()) <= corpus.MAX_BODY_WORDS
        assert pair.summary.endswith(".") and "\n" not in pair.body


def test_duplicates_go_and_frequent_summaries_are_capped():
    same_body = [Pair("m", "Some body text.", "One."), Pair("n", "some BODY, text", "Two.")]
    assert corpus.deduplicate(same_body) == same_body[:1]
    same_summary = [Pair("m", f"body {number}", "Do it.") for number in range(10)]
    assert corpus.deduplicate(same_summary) == same_summary[: corpus.MAX_REPEATS]


def test_no_held_out_text_is_in_train(pairs):
    unique = corpus.deduplicate(pairs)
    # the same texts again under other modules, most of which fall on the other side
    shadowed = unique + [Pair(f"copy{number}.py", p.body, p.summary) for number, p in enumerate(unique)]
    train, heldout = corpus.split_by_module(shadowed, heldout_percent=50)
    assert train and heldout
    for text in (lambda p: corpus.normalise(p.body), lambda p: corpus.normalise(p.summary), lambda p: p.module):
        assert not {text(p) for p in train} & {text(p) for p in heldout}


def test_the_side_of_a_module_does_not_depend_on_the_others(pairs):
    train, heldout = corpus.split_by_module(pairs, heldout_percent=30)
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert corpus.split_by_module(shuffled, heldout_percent=30) == (train, heldout)
    modules = {pair.module for pair in train}
    some = [pair for pair in pairs if pair.module in sorted(modules)[:5]]
    assert corpus.split_by_module(some, heldout_percent=30)[1] == []


def test_prepared_directory(tmp_path):
    num_train, num_heldout = prepare.prepare(tmp_path, SUBSET)
    records = {path.stem: evaluate.read_jsonl(path) for path in tmp_path.glob("*.jsonl")}
    assert len(records["train"]) == len(records["prompts"]) > 20
    assert len(records["heldout"]) == len(records["heldout_prompts"]) > 0
    assert num_train >= len(records["train"]) and num_heldout >= len(records["heldout"])

    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / prepare.MODEL)
    for supervised, prompt in zip(records["train"], records["prompts"], strict=True):
        assert supervised == {"prompt": prompt["prompt"], "response": " " + prompt["reference"]}
        assert prompt["prompt"].endswith(corpus.PROMPT_SUFFIX)
        assert len(tokenizer(prompt["prompt"])["input_ids"]) <= prepare.MAX_PROMPT_TOKENS
    assert not {r["prompt"] for r in records["prompts"]} & {r["prompt"] for r in records["heldout_prompts"]}

    config = AutoConfig.from_pretrained(tmp_path / prepare.MODEL)
    assert config.vocab_size == len(tokenizer)
    assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == 0


# ---- tokenizer


def test_any_text_survives_the_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Return the  value.\nSummary:", " leading", "naïve 漢字 🙂 \t tab", "x_1 = f(a, b)[0]", "don 't . ,"):
        for one in (tokenizer, loaded):
            ids = one(text)["input_ids"]
            assert one.decode(ids) == text
            assert not {one.pad_token_id, one.eos_token_id} & set(ids)
    assert (loaded.pad_token, loaded.eos_token, loaded.chat_template) == (model.PAD, model.EOS, None)
    assert loaded("Return the value.")["input_ids"] == tokenizer("Return the value.")["input_ids"]


def test_cut_keeps_the_longest_prefix_of_whole_words(tokenizer):
    text = "Return a new event loop policy for the current process"
    words = text.split(" ")
    prefixes = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
    for budget in range(3, 12):
        fitting = [prefix for prefix in prefixes if len(tokenizer(prefix)["input_ids"]) <= budget]
        assert model.cut(tokenizer, text, budget) == fitting[-1]
    assert model.cut(tokenizer, text, 1000) == text


# ---- reward


def _longest_common_subsequence(left: list[str], right: list[str]) -> int:
    for length in range(min(len(left), len(right)), 0, -1):
        if set(itertools.combinations(left, length)) & set(itertools.combinations(right, length)):
            return length
    return 0


def test_rouge_l_against_brute_force():
    generator = random.Random(0)
    for _ in range(50):
        summary, target = ([generator.choice("abcd") for _ in range(generator.randint(1, 7))] for _ in range(2))
        common = _longest_common_subsequence(summary, target)
        assert reward.rouge_l(" ".join(summary), " ".join(target)) == pytest.approx(2 * common / len(summary + target))


def test_reward_function_takes_references_from_metadata():
    from rouge_score import rouge_scorer

    outputs = [" Return the list of names.", "", " Names of the list, returned."]
    references = ["Return a list of names.", "Anything.", "Return a list of names."]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    expected = [scorer.score(r, o)["rougeL"].fmeasure for r, o in zip(references, outputs, strict=True)]
    prompts = ["p"] * 3
    rewards = reward.reward_fn(
        samples=[p + o for p, o in zip(prompts, outputs, strict=True)],
        prompts=prompts,
        outputs=outputs,
        tokenizer=None,
        reference=references,
        module=["m"] * 3,
    )
    assert rewards == expected
    assert rewards[0] == pytest.approx(0.8) and rewards[1] == 0.0


def test_token_rewards_sum_to_rouge_l(tokenizer):
    texts = [" Return the list of names.", " names", ""]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    references = ["Return a list of names."] * 3
    blank = [""] * 3
    rewards = reward.reward_fn(blank, blank, texts, tokenizer, reference=references, output_ids=ids)
    assert [len(row) for row in rewards] == [len(row) for row in ids]
    assert [sum(row) for row in rewards] == pytest.approx([reward.rouge_l(text, references[0]) for text in texts])
    assert rewards[0][-1] == 0.0  # EOS
    words = tokenizer.convert_ids_to_tokens(ids[0])
    assert rewards[0][next(i for i, word in enumerate(words) if "the" in word)] < 0 < max(rewards[0])


# ---- preferences, and what came of them


def _sampled(*summaries: str) -> preferences.Sampled:
    return preferences.Sampled("Names of all members.\nSummary:", "Return the list of names.", summaries)


def test_pairs_go_from_best_with_worst_inwards():
    best, good, poor, worst = "Return the list of names.", "Return the list.", "Return it.", "Nothing at all."
    pairs = preferences.compare(_sampled(poor, best, worst, "", good, best), random.Random(0), noise=0.0)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        (f" {best}", f" {worst}"),
        (f" {good}", f" {poor}"),
    ]
    assert pairs[0]["prompt"] == "Names of all members.\nSummary:" and pairs[0]["rouge_l"] == [1.0, 0.0]
    # a third one is left over; nobody can tell two apart that share nothing with the reference
    assert len(preferences.compare(_sampled(best, good, worst), random.Random(0), noise=0.0)) == 1
    assert preferences.compare(_sampled("Nothing.", "At all.", "", ""), random.Random(0)) == []


def test_people_are_as_often_wrong_as_the_noise_says():
    sampled = _sampled("Return a list.", "Return it.")
    better, worse = (reward.rouge_l(summary, sampled.reference) for summary in sampled.summaries)
    generator, noise = random.Random(0), 0.2
    pairs = [pair for _ in range(4000) for pair in preferences.compare(sampled, generator, noise)]
    # the difference of two opinions is normal with sqrt(2) times the deviation of one
    right = 0.5 * (1 + math.erf((better - worse) / (noise * math.sqrt(2)) / math.sqrt(2)))
    assert 0.6 < right < 0.95
    assert preferences.agreement(pairs) == pytest.approx(right, abs=4 * math.sqrt(right * (1 - right) / len(pairs)))


def test_samples_of_several_seeds_become_pairs_that_reward_models_read(tmp_path, tokenizer):
    from nemo_rlhf.data.pairs import read_pairs

    files = []
    for seed, summaries in enumerate([[" Return the list.", " Set it."], [" Return.", " Take a value off the stack."]]):
        files.append(tmp_path / f"seed_{seed}.jsonl")
        references = ["Return the list of names.", "Take a value off the stack."]
        records = (
            {"prompt": f"p{number}\nSummary:", "reference": reference, "response": summary, "finish_reason": "eos"}
            for number, (reference, summary) in enumerate(zip(references, summaries, strict=True))
        )
        files[-1].write_text("".join(json.dumps(record) + "\n" for record in records))
    samples = preferences.read_samples(files)
    assert [one.summaries for one in samples] == [
        ("Return the list.", "Return."),
        ("Set it.", "Take a value off the stack."),
    ]
    written = preferences.write_pairs(tmp_path / "pairs.jsonl", samples, seed=1)
    assert written == evaluate.read_jsonl(tmp_path / "pairs.jsonl")
    assert written == preferences.write_pairs(tmp_path / "again.jsonl", samples, seed=1)
    (first, second) = read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, 96)
    texts = [tokenizer.decode(pair.chosen, skip_special_tokens=True) for pair in (first, second)]
    assert texts == ["p0\nSummary: Return the list.", "p1\nSummary: Take a value off the stack."]


def test_win_rate_and_best_of_n_by_hand():
    assert figures.win_rate([0.5, 0.2, 0.1, 0.0], [0.4, 0.3, 0.1, 0.0]) == 0.5
    assert figures.win_rate([1.0, 0.1, 0.2], [0.0, 0.1, 0.1]) == pytest.approx(2.5 / 3)
    summaries = [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c0", "c1", "c2"]]
    scores = [[0.1, -2.0, 1.0], [0.3, -1.0, 1.0], [0.2, -3.0, 0.0]]
    assert figures.best_of(summaries, scores) == (["b0", "b1", "a2"], [0.3, -1.0, 1.0])


def test_figures_in_files(tmp_path):
    references = ["Return the list of names.", "Take a value off."]
    before, after = ["Return it.", "Take it off the stack."], ["Return the list.", "Value."]
    rows = [
        figures.measure("SFT", before, references, [0.0, -1.0]),
        figures.measure("PPO", after, references, [1.0, 2.0], before),
    ]
    expected = [reward.rouge_l(*both) for both in zip(after, references, strict=True)]
    assert rows[1].rouge_l == pytest.approx(sum(expected) / 2)
    assert (rows[1].score, rows[1].words) == (1.5, 2.0)
    assert (rows[0].win_rate, rows[1].win_rate) == (None, 0.5)
    (tmp_path / "metrics.jsonl").write_text('{"kl": 1.0, "val/accuracy": 0.5}\n{"kl": 2.0}\n')
    training = figures.last_metrics(tmp_path, ("val/accuracy", "kl"))
    assert training == {"val/accuracy": 0.5, "kl": 2.0}
    figures.write(tmp_path, rows, training)
    stored = json.loads((tmp_path / "figures.json").read_text())
    assert stored["training"] == training and [row["name"] for row in stored["held_out"]] == ["SFT", "PPO"]
    table = (tmp_path / "figures.md").read_text()
    assert f"| PPO | {sum(expected) / 2:.4f} | +1.500 | 50.0% | 2.0 |" in table and "- kl: 2\n" in table


# ---- random walks


@pytest.fixture(scope="module")
def task():
    return randomwalks.make_task()


def test_graph_and_walks(task):
    edges = task.edges
    assert edges.shape == (21, 21)
    assert not edges.diagonal().any()
    assert edges[1:].any(1).all()
    assert len(task.walks) == 1000
    for walk in task.walks:
        nodes = [randomwalks.NAMES.index(name) for name in walk]
        assert 1 <= len(nodes) <= 10
        assert all(edges[here, there] for here, there in itertools.pairwise(nodes))
        assert 0 not in nodes[:-1]
        assert len(nodes) == 10 or nodes[-1] == 0
    again = randomwalks.make_task()
    assert again.walks == task.walks and np.array_equal(again.edges, task.edges)
    assert randomwalks.make_task(seed=1).walks != task.walks


def test_walks_are_far_from_optimal_before_learning(task):
    mean = float(np.mean(randomwalks.optimality(task, list(task.walks))))
    assert 0.2 < mean < 0.5


def test_shortest_ways_against_powers_of_the_adjacency_matrix(task):
    reach = np.eye(21, dtype=bool)
    expected = [math.inf] * 21
    for nodes in range(1, 23):
        for start in range(21):
            if reach[start, 0] and expected[start] == math.inf:
                expected[start] = nodes
        reach = (task.edges.astype(int) @ reach.astype(int)) > 0
    assert list(task.shortest) == expected


def test_optimality_by_hand():
    # d -> c -> b -> a, with the shortcuts d -> b; e has no way to a
    edges = np.zeros((21, 21), dtype=bool)
    for start, end in ("dc", "cb", "ba", "db", "bd", "ee"):
        edges[randomwalks.NAMES.index(start), randomwalks.NAMES.index(end)] = True
    task = randomwalks.Task(edges, randomwalks.shortest_ways(edges), ())
    assert task.shortest[:5] == (1, 2, 3, 3, math.inf)
    expected = {
        "dba": 1.0,
        "dcba": 6 / 7,
        "ba": 1.0,
        "bdba": 6 / 8,
        "dcbdba": 4 / 7,
        "dbdbdbdbdba": 0.0,  # 11 nodes
        "dbdbdbdcba": 0.0,  # 10 nodes
        "da": 0.0,  # no such edge
        "db": 0.0,  # does not arrive
        "dbaba": 1.0,  # what follows the goal does not count
    }
    assert randomwalks.optimality(task, list(expected)) == pytest.approx(list(expected.values()))


def test_node_names_are_the_tokens(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    directory = randomwalks.write_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("bcua")["input_ids"]
    assert len(ids) == 4 and tokenizer.decode(ids) == "bcua"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "bcua"
    config = json.loads((directory / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) == 23
    assert AutoConfig.from_pretrained(directory).num_attention_heads % 2 == 0


def test_curves_of_several_runs_are_drawn(tmp_path):
    for name, rises in (("one", 1.0), ("two", 2.0)):
        for kl in ("0.05", "0"):
            directory = tmp_path / name / f"ppo_kl_{kl}"
            directory.mkdir(parents=True)
            rows = [{"step": n, "reward/preference": n * rises, "reward/rouge_l": 0.1} for n in range(1, 4)]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"val/x": 1}, *rows]))
    runs = [tmp_path / "one", tmp_path / "two"]
    assert plot.curves(runs, "0", "reward/preference") == [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]
    plot.draw(runs, ["0.05", "0"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"has no PPO run with --kl 1: run summarize.run --out \S*one --kl 1 first"):
        plot.curves(runs, "1", "reward/preference")
