"""What a reward function gets, what it may return, and the sentence for everything else."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rlhf.rollout.named import load_function
from nemo_rlhf.rollout.score import score
from nemo_rlhf.types import Prompt, Rollout, Sample, Scored


def make_rollout() -> Rollout:
    """Three samples with responses of 3, 1 and 2 tokens."""
    prompts = [Prompt((5,), "one ", {"answer": 1}), Prompt((6,), "two "), Prompt((7,), "three ", {"hint": "x"})]
    texts, responses = ["alpha", "beta", "gamma"], [(8, 9, 2), (8,), (9, 2)]
    return Rollout(
        tuple(
            Sample(prompt, index, ids, text, "eos")
            for index, (prompt, text, ids) in enumerate(zip(prompts, texts, responses, strict=True))
        )
    )


def run(returned: Any) -> Scored:
    def reward(samples, **_):
        return returned

    return score(reward, make_rollout(), None)


def fail(returned: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(returned)
    message = str(caught.value)
    assert "test_score.run.<locals>.reward" in message
    assert "\n" not in message
    return message


def test_reward_function_is_called_once_with_texts_and_metadata():
    calls = []

    def reward(samples, prompts, outputs, tokenizer, **metadata):
        calls.append((samples, prompts, outputs, tokenizer, metadata))
        return [len(output) for output in outputs]

    tokenizer, rollout = "a tokenizer", make_rollout()
    scored = score(reward, rollout, tokenizer)
    assert calls == [
        (
            ["one alpha", "two beta", "three gamma"],
            ["one ", "two ", "three "],
            ["alpha", "beta", "gamma"],
            tokenizer,
            {"answer": [1, None, None], "hint": [None, None, "x"]},
        )
    ]
    assert scored.rollout is rollout
    assert scored.token_rewards is None
    assert scored.scores.dtype == torch.float32
    assert scored.scores.tolist() == [5, 4, 5]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5, -2],
        (True, 0.5, np.float32(-2)),
        [torch.tensor(1.0), 0.5, torch.tensor(-2.0, dtype=torch.bfloat16)],
        np.array([1, 0.5, -2]),
        torch.tensor([1, 0.5, -2], requires_grad=True),
        torch.tensor([1, 0.5, -2]).bfloat16(),
    ],
)
def test_scalar_rewards_of_every_kind(returned):
    scored = run(returned)
    assert scored.scores.tolist() == [1.0, 0.5, -2.0]
    assert scored.token_rewards is None
    assert not scored.scores.requires_grad


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_dense_rewards_of_every_kind(kind):
    scored = run([kind([1.0, 2.0, 3.0]), kind([4.0]), kind([5.0, 6.0])])
    assert scored.scores.tolist() == [0.0, 0.0, 0.0]
    assert [rewards.tolist() for rewards in scored.token_rewards] == [[1, 2, 3], [4], [5, 6]]
    assert all(rewards.dtype == torch.float32 for rewards in scored.token_rewards)


def test_dense_and_scalar_rewards_side_by_side():
    scored = run([[1.0, 2.0, 3.0], 7.0, [5.0, 6.0]])
    assert scored.scores.tolist() == [0.0, 7.0, 0.0]
    assert [rewards.tolist() for rewards in scored.token_rewards] == [[1, 2, 3], [0], [5, 6]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 samples"),
        (torch.zeros(4), "returned 4 rewards for 3 samples"),
        (None, "returned None, and must return a list"),
        (3.0, "returned 3.0, and must return a list"),
        (torch.tensor(3.0), "returned tensor(3.), and must return a list"),
        ("abc", "returned 'abc', and must return a list"),
        ({0: 1, 1: 2, 2: 3}, "must return a list"),
        ([1.0, float("nan"), 2.0], "returned nan for sample 1"),
        (np.array([1.0, 2.0, np.inf]), "returned inf for sample 2"),
        ([1.0, -1e39, 2.0], "returned -1e+39 for sample 1"),  # infinite in fp32
        ([1.0, "2.0", 2.0], "returned '2.0' for sample 1"),
        ([None, 1.0, 2.0], "returned None for sample 0"),
        ([1.0, 2.0, 1j], "returned 1j for sample 2"),
        ([[1.0, 2.0], [1.0], [1.0, 2.0]], "2 token rewards for sample 0, whose response has 3 tokens"),
        (torch.zeros(3, 1), "1 token rewards for sample 0"),
        ([[1.0, 2.0, 3.0], [float("nan")], [1.0, 2.0]], "returned nan for token 0 of sample 1"),
        ([[1.0, 2.0, [3.0]], [1.0], [1.0, 2.0]], "returned [3.0] for token 2 of sample 0"),
    ],
)
def test_wrong_rewards_are_named(returned, message):
    assert message in fail(returned)


def test_long_values_are_shortened_in_messages():
    assert len(fail("x" * 5000)) < 250


def test_error_of_the_reward_function_is_one_sentence_with_its_cause():
    def reward(samples, **_):
        raise KeyError("missing\nkey")

    with pytest.raises(ValueError, match=r"locals>\.reward raised KeyError: 'missing\\nkey'\.$") as caught:
        score(reward, make_rollout(), None)
    assert isinstance(caught.value.__cause__, KeyError)


def test_type_error_inside_the_reward_function_is_its_own():
    def reward(samples, **_):
        return samples + 1

    with pytest.raises(ValueError, match="raised TypeError: can only concatenate") as caught:
        score(reward, make_rollout(), None)
    assert isinstance(caught.value.__cause__, TypeError)


def test_reward_function_that_does_not_take_the_metadata():
    def reward(samples, prompts, outputs, tokenizer):
        return [0.0] * len(samples)

    with pytest.raises(ValueError, match=r"reward cannot be called with samples, .*answer.*\*\*metadata"):
        score(reward, make_rollout(), None)


def test_metadata_may_not_shadow_what_the_reward_function_gets():
    rollout = Rollout((Sample(Prompt((5,), "a", {"outputs": 1}), 0, (2,), "", "eos"),))
    with pytest.raises(ValueError, match='field "outputs"'):
        score(lambda **_: [0.0], rollout, None)


def test_callable_objects_partials_and_empty_rollouts():
    class Reward:
        def __call__(self, samples, **_):
            return [float("nan")] * len(samples)

    with pytest.raises(ValueError, match=r"<locals>\.Reward returned nan for sample 0"):
        score(Reward(), make_rollout(), None)

    def constant(value, samples, **_):
        return [value] * len(samples)

    assert score(partial(constant, 2.0), make_rollout(), None).scores.tolist() == [2.0] * 3
    assert score(Reward(), Rollout(()), None).scores.shape == (0,)


def test_load_function_from_the_current_directory(tmp_path, monkeypatch):
    package = tmp_path / "some_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text("LIMIT = 3\ndef reward(samples, **_):\n    return [0.5] * len(samples)\n")
    (package / "bad.py").write_text("1 / 0\n")
    (package / "needy.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    function = load_function("some_rewards.good:reward")
    assert score(function, make_rollout(), None).scores.tolist() == [0.5] * 3
    for name, message in [
        ("some_rewards.good", "must have the form"),
        (":reward", "must have the form"),
        ("no_such_rewards:reward", "there is no module no_such_rewards"),
        ("some_rewards.missing:reward", r"there is no module some_rewards\.missing"),
        ("some_rewards.good:rewrad", "has no rewrad"),
        ("some_rewards.good:LIMIT", "is a int and no function"),
        ("some_rewards.bad:reward", r"importing some_rewards\.bad raised ZeroDivisionError"),
        ("some_rewards.needy:reward", "raised ModuleNotFoundError: No module named 'no_such_library'"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_function(name)
        assert "\n" not in str(caught.value)


def test_function_that_asks_for_tokens_gets_them_and_may_reward_each():
    def reward(outputs, output_ids, **_):
        assert output_ids == [[8, 9, 2], [8], [9, 2]]
        return [[0.5 * token for token in ids] for ids in output_ids]

    scored = score(reward, make_rollout(), None)
    assert scored.token_rewards is not None
    assert [rewards.tolist() for rewards in scored.token_rewards] == [[4.0, 4.5, 1.0], [4.0], [4.5, 1.0]]
    assert not scored.scores.any()
