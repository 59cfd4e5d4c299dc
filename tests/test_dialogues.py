"""Scored dialogues: which tokens are actions, where rewards fall, what is cut, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from nemo_rlhf.data.dialogues import read_dialogues, standardise
from tests.test_data import BOS, EOS, ids, make_tokenizer, write_lines


@pytest.fixture(scope="module")
def plain() -> Any:
    return make_tokenizer()


def one(record: Any, tokenizer: Any, limit: int = 64, **more: Any) -> Any:
    (dialogue,) = read_dialogues([record], tokenizer, limit, **more)
    return dialogue


def actions(dialogue: Any) -> list[tuple[int, float]]:
    """Tokens and rewards of the actions."""
    return [
        (token, reward)
        for token, is_action, reward in zip(dialogue.token_ids, dialogue.action_mask, dialogue.rewards, strict=True)
        if is_action
    ]


def tokens(text: str, *rewards: float) -> list[tuple[int, float]]:
    return list(zip([*ids(text), EOS], rewards, strict=True))


def test_one_reward_falls_on_the_last_token(plain: Any) -> None:
    for record in (
        {"prompt": "a b", "response": "c d", "reward": 2},
        {"turns": ["a b", "c d"], "rewards": 2.0},
    ):
        dialogue = one(record, plain)
        assert list(dialogue.token_ids) == [*ids("a b c d"), EOS]
        assert actions(dialogue) == tokens("c d", 0, 0, 2)
    given = one([["a b", "c d"]][0], plain, rewards=[2])
    assert given == one({"turns": ["a b", "c d"], "reward": 2}, plain)


def test_rewards_by_turn_and_by_token(plain: Any) -> None:
    turns = ["a", "b c", "a a", "d"]
    assert actions(one({"turns": turns, "rewards": [1, -1]}, plain)) == tokens("b c d", 0, 1, 0, -1)
    assert actions(one({"turns": turns, "rewards": [1, 2, 3, 4]}, plain)) == tokens("b c d", 1, 2, 3, 4)
    dialogue = one({"turns": turns, "rewards": [1, -1]}, plain)
    assert [bool(m) for m in dialogue.action_mask] == [False, True, True, False, False, True, True]


def test_the_first_token_of_a_string_is_a_state_only(plain: Any) -> None:
    dialogue = one("a b", plain, rewards=[1.0])
    assert list(dialogue.token_ids) == [*ids("a b"), EOS] and actions(dialogue) == tokens("b", 0, 1)
    with_bos = one("a b", make_tokenizer("<s> $A"), rewards=[1.0])
    assert with_bos.token_ids[0] == BOS and actions(with_bos) == tokens("a b", 0, 0, 1)
    assert one(["", "a b"], plain, rewards=[1.0]) == dialogue


def test_long_dialogues_lose_whole_turns_from_the_left(plain: Any) -> None:
    record = {"turns": ["a a", "b", "c", "d"], "rewards": [5, 1]}
    with pytest.warns(UserWarning, match="Of 1 dialogues, 1 lost their first turns .*, and 0 were left out"):
        dialogue = one(record, plain, 5)
    assert list(dialogue.token_ids) == [*ids("c d"), EOS] and actions(dialogue) == tokens("d", 0, 1)
    with pytest.warns(UserWarning):
        dialogue = one(record, make_tokenizer("<s> $A"), 5)
    assert list(dialogue.token_ids) == [BOS, *ids("c d"), EOS]
    records = [record, {"turns": ["a", "b b b b b b"], "reward": 1}]
    with pytest.warns(UserWarning, match="and 1 were left out because their last turn alone is longer"):
        assert len(read_dialogues(records, plain, 5)) == 1
    with pytest.raises(ValueError, match=r"dialogue 0 has 6 tokens and data\.max_sequence_length is 5"):
        one(record, plain, 5, too_long="refuse")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No dialogue is left within"):
        one(records[1], plain, 5)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"turns": ["a", "b", "c"], "reward": 1}, "line 2 has 3 turns"),
        ({"turns": ["a", ""], "reward": 1}, "line 2: the turn 1 is empty"),
        ({"turns": "a b", "reward": 1}, 'line 2: "turns" is a str'),
        ({"turns": ["a", "b"]}, 'line 2 has no field "reward"'),
        ({"turns": ["a", "b"], "reward": 1, "rewards": [1]}, 'line 2 has both "reward" and "rewards"'),
        ({"turns": ["a", "b"], "rewards": [1, 2, 3]}, r"line 2 has 3 rewards, and 1 turns and 2 tokens of the agent"),
        ({"turns": ["a", "b"], "reward": "good"}, "line 2: the reward 'good' is not a number"),
        ({"turns": ["a", "b"], "reward": True}, "line 2: the reward True is not a finite number"),
        ('{"turns": ["a", "b"], "reward": NaN}', "line 2: the reward nan is not a finite number"),
        ('{"turns": ["a", "b"], "rewards": [Infinity]}', "line 2: the reward inf is not a finite number"),
        (["a", "b"], "line 2 is a list"),
        ({"text": "</s>", "reward": 1}, "line 2 has no token of the agent after its first"),
    ],
)
def test_wrong_records_are_named(plain: Any, tmp_path: Path, record: Any, message: str) -> None:
    path = write_lines(tmp_path / "dialogues.jsonl", {"turns": ["a", "b"], "reward": 1}, record)
    with pytest.raises(ValueError, match=message):
        read_dialogues(path, plain, 64)


def test_samples_and_rewards_are_as_many(plain: Any) -> None:
    with pytest.raises(ValueError, match="There are 2 samples and 1 rewards"):
        read_dialogues(["a b", "c d"], plain, 8, rewards=[1])


def test_standardising_shifts_only_rewards_at_the_end(plain: Any) -> None:
    totals = [1.0, 2.0, 6.0]
    sparse = read_dialogues([["a", "b"]] * 3, plain, 8, rewards=totals)
    ours, others = standardise(sparse, sparse[2:])
    assert [sum(d.rewards) for d in ours] == pytest.approx([-0.92582, -0.46291, 1.38873], abs=1e-5)
    assert all(d.rewards[:-1] == (0.0, 0.0) for d in ours) and others == ours[2:]
    dense = read_dialogues([["a", "b", "a", "c"]] * 2, plain, 8, rewards=[[-1, -1], [-1, 1]])
    assert [[r for _, r in actions(d)] for d in standardise(dense)[0]] == [[-1, 0, -1], [-1, 0, 1]]


def test_equal_rewards_teach_nothing(plain: Any) -> None:
    same = read_dialogues([["a", "b"]] * 3, plain, 8, rewards=[0.1, 0.1, 0.1])
    with pytest.warns(UserWarning, match="All 3 dialogues have the same reward: there is nothing to learn"):
        assert standardise(same) == [same]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        standardise(read_dialogues([["a", "b"]] * 2, plain, 8, rewards=[0.1, 0.2]))


def test_a_dialogue_that_was_cut_off_has_no_end(plain: Any) -> None:
    record = {"turns": ["a", "b", "c", "d"], "rewards": [1, 2]}
    cut, whole = one({**record, "done": False}, plain), one({**record, "done": True}, plain)
    assert (cut.done, whole.done, one(record, plain)) == (False, True, whole)
    assert list(cut.token_ids) == ids("a b c d") and list(whole.token_ids) == [*ids("a b c d"), EOS]
    assert actions(cut) == [(ids("b")[0], 1), (ids("d")[0], 2)] and actions(whole) == tokens("b d", 1, 0, 2)
    with pytest.raises(ValueError, match=r'dialogue 0: "done" is 0, and must be true, or false'):
        one({**record, "done": 0}, plain)
