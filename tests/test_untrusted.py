"""JSON from outside: any text gives a value or one sentence."""

import json
import os
import random
from pathlib import Path

import pytest

from nemo_rlhf.untrusted import parse_json, read_json


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "not JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("9" * 5000, "not JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "names 'c' twice"),
        ("{'a': 1}", "not JSON"),
    ],
)
def test_what_is_no_json_is_said_in_one_sentence(data: bytes | str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse_json(data, "the request")
    assert str(caught.value).startswith("the request ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_json_is_read_with_and_without_a_byte_order_mark() -> None:
    for text in ("é", "\N{GRINNING FACE}"):
        value = {"a": [1, None, text]}
        assert parse_json(json.dumps(value), "x") == value
        assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8-sig"), "x") == value


def test_any_damage_gives_a_value_or_a_value_error() -> None:
    whole = json.dumps({"a": [1, 2.5, {"b": None}], "é": "\n\U0001f600", "n": 10**30}).encode()
    chance = random.Random(0)
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            parse_json(bytes(data[: chance.randint(0, len(data))]), "it")
        except ValueError as error:
            assert str(error).startswith("it ")
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds null"),
        (b"7", "holds a number"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b" " * 2000 + b"{}", "more than 1000 bytes"),
    ],
)
def test_a_file_of_another_kind_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_json(path, limit=1000)
    assert str(path) in str(caught.value)


def test_devices_pipes_and_directories_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            read_json(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path / "none")
