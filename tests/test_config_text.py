"""Text stays text: what a file or an override says for a text key arrives as it was written, or is refused."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rlhf.cli.plots import Curve, Panel, draw
from nemo_rlhf.config import dump, load, quoted
from nemo_rlhf.config.commands import REQUIRED
from nemo_rlhf.config.dumping import masked, masked_word, write_private
from nemo_rlhf.config.keys import schema_keys
from nemo_rlhf.config.overrides import bash_form, read_override
from nemo_rlhf.config.paths import PATHS, PERHAPS, STORE
from nemo_rlhf.config.scalars import typed
from nemo_rlhf.config.schema import PPOConfig

TRAPS = [
    "12:00:00", "1:2", "0123", "007", "1e3", "1.10", "1_000", "0x1F", "0b1", "0o17", "no", "No", "NO", "yes",
    "on", "off", "y", "n", "true", "False", "2026-01-01", "2026-01-01 12:00:00", ".inf", ".nan", "nan", "inf",
    "+1", "-0", "1.", ".5", "=", "<<", "12345678901234567890", "1" * 5000, "0x_", "1__0", "-.5", "1e-3",
    "190:20:30.15",
]  # fmt: skip
NAMES = [trap for trap in TRAPS if trap != "<<" and len(trap) < 1000]  # << merges, and longer ones are no names in yaml


def ppo_file(path: Path, text: str, *overrides: str) -> PPOConfig:
    path.write_text(text)
    needed = [f"{key}={value}" for key, value in REQUIRED["ppo"].items() if f"{key.rpartition('.')[2]}:" not in text]
    return load("ppo", [*needed, *overrides], config_file=path)


def refused(path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        ppo_file(path, text, *overrides)
    assert "\n" not in str(error.value) and str(error.value).endswith((".", "?"))
    return str(error.value)


def test_text_of_a_file_arrives_as_it_was_written(tmp_path: Path) -> None:
    """In every place that is text: a key, a list, a mapping, entries of a list of mappings."""
    stop = "\n".join(f"    - {trap}" for trap in TRAPS)
    tags = "\n".join(f"      {trap}: x" for trap in NAMES)
    cfg = ppo_file(
        tmp_path / "mine.yaml",
        f"generation:\n  stop:\n{stop}\ndata: {{prompts: 12:00:00, validation_prompts: 1e3}}\n"
        f"exp_manager:\n  wandb_logger_kwargs:\n    name: 0123\n    project: 1e3\n    config:\n{tags}\n"
        "reward:\n  sources:\n    - {kind: http, name: 007, url_file: 1_000}\n"
        "    - {kind: function, name: no, function: a.b:c, arguments: {text: a}}\n",
        "reward.function=null",
    )
    assert cfg.generation.stop == TRAPS
    assert (cfg.data.prompts, cfg.data.validation_prompts) == ("12:00:00", "1e3")
    names = cfg.exp_manager.wandb_logger_kwargs
    assert (names["name"], names["project"]) == ("0123", "1e3")
    assert list(names["config"]) == [int(name) if name == "12345678901234567890" else name for name in NAMES]
    assert [source["name"] for source in cfg.reward.sources] == ["007", "no"]
    assert cfg.reward.sources[0]["url_file"] == str(Path.cwd() / "1_000")


def test_whole_numbers_stay_names_where_anything_goes(tmp_path: Path) -> None:
    weights = {"w": {1: 0.5, -2: {0: "x"}, "3": 1, "04": 2, "1_0": 3, "n": 4}}
    entry = (
        "{kind: function, name: b, function: a.b:c, arguments: {w: {1: 0.5, -2: {0: x}, '3': 1, 04: 2, 1_0: 3, n: 4}}}"
    )
    fields = "data: {fields: {prompt: question}, chat_template_kwargs: {5: {6: a}}}\n"
    cfg = ppo_file(tmp_path / "mine.yaml", f"{fields}reward: {{sources: [{entry}]}}\n", "reward.function=null")
    assert cfg.reward.sources[0]["arguments"] == weights
    assert cfg.data.chat_template_kwargs == {"5": {6: "a"}}  # variables of a template have names
    path = tmp_path / "config.yaml"
    path.write_text(dump(cfg))
    assert load("ppo", config_file=path) == cfg
    given = "reward.sources=[{kind: function, name: b, function: a.b:c, arguments: {w: {1: 0.5, 1_0: 3}}}]"
    cfg = ppo_file(path, "", "reward.function=null", given)
    assert cfg.reward.sources[0]["arguments"] == {"w": {1: 0.5, "1_0": 3}}


def test_text_of_a_file_below_others(tmp_path: Path) -> None:
    """Files that Hydra lays over one another, aliases, merged mappings and marks of our own."""
    (tmp_path / "base.yaml").write_text("data: {prompts: 0123, validation_prompts: <0>}\n")
    cfg = ppo_file(
        tmp_path / "mine.yaml",
        "defaults: [base, _self_]  # has prompts:\n"
        "model: {optim: &o {lr: 1e-3, eps: 1e-4}, critic: {optim: {<<: *o, lr: 0.5}}}\n"
        "generation: {stop: [<0>, <7>, &x 1e3, *x, 'a', \"b\\n\", !!str 5]}\n",
    )
    assert (cfg.data.prompts, cfg.data.validation_prompts) == ("0123", "<0>")
    assert cfg.generation.stop == ["<0>", "<7>", "1e3", "1e3", "a", "b\n", "5"]
    assert (cfg.model.critic.optim.lr, cfg.model.critic.optim.eps) == (0.5, 1e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ppo:\n  feedback:\n    run: ~\n", "line 3"),
        ("generation:\n  stop: [a,\n  null]\n", "generation.stop[1]=null"),
        ("generation:\n  stop:\n  -\n", "generation.stop[0]"),
        ("generation:\n  stop:\n  - [a]\n", "generation.stop[0]=[a]"),
        ("exp_manager:\n  explicit_log_dir: {a: b}\n", "it must be text"),
        ("exp_manager:\n  explicit_log_dir: null\n", "line 2"),
        ("exp_manager:\n  wandb_logger_kwargs:\n    when: 12:00:00\n", "line 3) may mean 43200"),
        ("exp_manager: {wandb_logger_kwargs: {offline: no}}\n", "write false, or put it in quotes"),
        ("exp_manager: {wandb_logger_kwargs: {a: [{b: 0x10}]}}\n", "exp_manager.wandb_logger_kwargs.a[0].b"),
        ("reward:\n  sources:\n  - {kind: http, name: ~}\n", "reward.sources[0].name=~"),
        ("trainer: {max_steps: 0123}\n", "may mean 83"),
        ("trainer: {max_steps: 1:00}\n", "may mean 60"),
        ("trainer: {max_steps: 5 x}\n", "line 1) has the wrong type"),
        ("ppo: {feedback: {run: 'a ${'}}\n", "write \\${"),
        ("ppo: {feedback: {run: '${x.y}'}}\n", "cannot be resolved"),
        ("generation: {stop: ['${x.y}']}\n", "write \\${"),
        ("generation: {stop: ['???']}\n", "stands for nothing"),
        ("ppo:\n  feedback:\n    run: ???\n", "ppo.feedback.run is ???"),
        ("ppo: {feedback: {run: a, run: b}}\n", "run twice"),
        ("? [a]\n: b\n", "no text"),
        ("- a\n", "a mapping"),
        ("a: &a [*a]\n", "stands for more than"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e]\n", "fewer aliases"),
        ("generation: {stop: [!!binary aGk=]}\n", "generation.stop"),
        ("a: !!python/object/apply:os.system ['x']\n", "cannot be read"),
        ("modle: {}\n", "did you mean"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_with_its_place(text: str, words: str, tmp_path: Path) -> None:
    said = refused(tmp_path / "mine.yaml", text)
    assert words in said, said


def test_a_file_that_is_no_utf8_and_one_that_is_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for data in (b"a: \xff\n", b"a: \x00\n", b"[" * 5000, b"\xef\xbb\xbfmodel: 5\n"):
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            load("ppo", config_file=path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_numbers_stay_what_they_were(tmp_path: Path) -> None:
    cfg = ppo_file(
        tmp_path / "mine.yaml",
        "trainer: {max_steps: 1_000, enable_progress_bar: off}\nmodel: {optim: {lr: 1e-3, betas: [.9, 0.95]}}\n"
        "ppo: {dual_clip: ~, reward_clip: null}\ngeneration: {temperature: [0.7, 1], top_k: 5}\n"
        "exp_manager: {wandb_logger_kwargs: {a: 1, b: 1e-3, c: true, d: null, e: 2026-01-01, f: text}}\n",
    )
    assert (cfg.trainer.max_steps, cfg.trainer.enable_progress_bar, cfg.model.optim.lr) == (1000, False, 1e-3)
    assert cfg.generation.temperature == [0.7, 1] and cfg.generation.top_k == 5 and cfg.ppo.dual_clip is None
    assert cfg.exp_manager.wandb_logger_kwargs == {
        "a": 1,
        "b": 1e-3,
        "c": True,
        "d": None,
        "e": "2026-01-01",
        "f": "text",
    }


AS_TYPED = [
    *TRAPS, "a b", "a=b", "a,b", "(x)", "a (1).jsonl", "~", "~/x", "$HOME", "a{b", "[a].b", "a]", "}", ":",
    "a: b", "#", "é", "日本", "*.jsonl", "a\nb", "\t", " a ", "a'b", 'a"b', "%", "@", "a\\b", "\\", "",
    "epoch=3-step=1,2 (best).ckpt", "|", "&",
]  # fmt: skip


@pytest.mark.parametrize("text", [text for text in AS_TYPED if text.lower() != "null"])
def test_text_of_an_override_arrives_as_it_was_written(text: str) -> None:
    keys = schema_keys(PPOConfig)
    key, value = read_override(f"ppo.feedback.run={text}", keys)
    assert typed(value, keys[key], key, "") == text


@pytest.mark.parametrize(
    "text", ["[a]", "{a: b}", "'a' b", '"a', "a\\=b=c", "choice(a,b)", "str(1)", "range(1,3)", "int(3)"]
)
def test_what_hydra_takes_for_something_else_is_refused_with_what_to_type(text: str) -> None:
    keys = schema_keys(PPOConfig)
    with pytest.raises(ValueError) as error:
        read_override(f"ppo.feedback.run={text}", keys)
    form = bash_form("ppo.feedback.run", text)
    assert form in str(error.value)
    (word,) = shlex.split(form)
    _, value = read_override(word, keys)
    assert value.text == text


def test_text_in_lists_and_mappings_of_overrides() -> None:
    needed = [f"{key}={value}" for key, value in REQUIRED["ppo"].items() if key != "reward.function"]
    cfg = load(
        "ppo",
        [
            *needed,
            "generation.stop=[1e3, 007, true, 'a b']",
            "exp_manager.wandb_logger_kwargs.name=1e3",
            "+exp_manager.wandb_logger_kwargs.project=0123",
            "reward.sources=[{kind: http, name: 1e3, url_file: x, weight: 1e-1}]",
        ],
    )
    assert cfg.generation.stop == ["1e3", "007", "true", "a b"]
    assert cfg.exp_manager.wandb_logger_kwargs == {"name": "1e3", "project": "0123"}
    assert cfg.reward.sources[0]["name"] == "1e3" and cfg.reward.sources[0]["weight"] == 0.1
    slurm = load("slurm", ["slurm.time=12:00:00", "slurm.environment.A=a (b), c=d", "slurm.environment={B: 1e3}"]).slurm
    assert slurm.time == "12:00:00" and slurm.environment == {"A": "a (b), c=d", "B": "1e3"}


PLAIN = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
ODD = st.text("0123456789eE._:-+~=[]{}(),'\"\\ \t\n#&*!|>%@`$?<yntrufalsxob/é", max_size=14)


def is_one_sentence(error: ValueError) -> bool:
    return "\n" not in str(error) and str(error).endswith((".", "?"))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(PLAIN, ODD))
def test_any_text_of_an_override(text: str) -> None:
    keys = schema_keys(PPOConfig)
    try:
        key, value = read_override(f"ppo.feedback.run={text}", keys)
        found = typed(value, keys[key], key, "")
    except ValueError as error:
        assert is_one_sentence(error), str(error)
    else:
        as_hydra_reads_it = {text.strip()[1:-1]} if text.strip()[:1] in ("'", '"') else set()
        is_escaped = "\\" in text
        assert (
            found == text
            or found in as_hydra_reads_it
            or is_escaped
            or (found is None and text.strip().lower() == "null")
        )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PLAIN)
def test_any_text_in_quotes(text: str) -> None:
    keys = schema_keys(PPOConfig)
    _, value = read_override(f"ppo.feedback.run={quoted(text)}", keys)
    assert value.text.replace("\\${", "${") == text or "${" in text
    if text.isprintable():
        (word,) = shlex.split(bash_form("ppo.feedback.run", text))
        assert read_override(word, keys)[1].text == text


@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=st.one_of(PLAIN, ODD), is_quoted=st.booleans())
def test_any_text_of_a_file(text: str, is_quoted: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As a user types it, in quotes or not; what yaml itself makes of it as text is the measure."""
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    written = (
        yaml.safe_dump(text, allow_unicode=True, default_style='"' if is_quoted else None).split("\n...")[0].strip()
    )
    path.write_text(f"slurm:\n  account: x\n  setup:\n    - {written if is_quoted else text}\n", encoding="utf-8")
    try:
        (found,) = load("slurm", config_file=path).slurm.setup
    except ValueError as error:
        assert is_one_sentence(error), str(error)
        assert not is_quoted or "${" in text or "???" in text or "\0" in text, str(error)
    else:
        assert found == (
            text if is_quoted else yaml.load(path.read_text("utf-8"), yaml.BaseLoader)["slurm"]["setup"][0]
        )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(texts=st.lists(st.one_of(PLAIN, ODD), max_size=4), names=st.lists(ODD, max_size=3))
def test_any_text_is_dumped_and_read_back(
    texts: list[str], names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cfg = load("sft", [f"{key}={value}" for key, value in REQUIRED["sft"].items()])
    texts = [text for text in texts if masked(text) == text and text != "???"]
    cfg.exp_manager.wandb_logger_kwargs = {"texts": texts, "names": dict.fromkeys(names, "x")}
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(cfg), encoding="utf-8")
    assert load("sft", config_file=path).exp_manager.wandb_logger_kwargs == cfg.exp_manager.wandb_logger_kwargs


SECRET = "S3CRET"


def test_no_secret_is_dumped_and_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setenv("MY_STEPS", "7")
    entry = (
        f"{{kind: http, name: a, url: 'http://{SECRET}:{SECRET}@h/x?api_key={SECRET}&n=1'}}, "
        "{kind: function, name: b, function: a.b:c, arguments: "
        f"{{api_key: '${{oc.env:MY_API_KEY}}', url: '${{oc.env:MY_API_KEY}}/x', token: {SECRET}, max_tokens: 3}}}}, "
        "{kind: model, name: c, restore_from: m}"
    )
    sources = tmp_path / "mine.yaml"
    cfg = ppo_file(
        sources,
        f"reward: {{sources: [{entry}]}}\ntrainer: {{max_steps: '${{oc.env:MY_STEPS}}'}}\n",
        "reward.function=null",
        "model.restore_from=m",
        f"ppo.feedback.store='postgresql://fb:{SECRET}/{SECRET}@h/db'",
        f"exp_manager.wandb_logger_kwargs.api_key={SECRET}",
    )
    assert cfg.reward.sources[1]["arguments"]["api_key"] == SECRET and cfg.trainer.max_steps == 7
    text = dump(cfg)
    assert SECRET not in text
    assert "postgresql://fb:***@h/db" in text and "http://***@h/x?api_key=***&n=1" in text and "max_tokens: 3" in text
    assert "${oc.env:MY_API_KEY}/x" in text and "max_steps: ${oc.env:MY_STEPS}" in text
    path = tmp_path / "config.yaml"
    write_private(path, text)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match=r"has \*\*\* in the place of a secret") as error:
        load("ppo", config_file=path)
    assert SECRET not in str(error.value)
    cfg.trainer.max_steps = 9  # what was changed since is not what was written
    assert "max_steps: 9" in dump(cfg)


@pytest.mark.parametrize(
    "secret",
    ["openai_key: X", "secret_key: X", "key: X", "api_keys: [X, [X]]", "Passphrase: X", "api_key: [X]",
     "headers: {Authorization: 'B X'}", "db_password2: X",
     "credential: {user: X, more: [{a: X}]}", "x-api-Key: X", "tokens: {1: X}"],
)  # fmt: skip
def test_whatever_is_named_as_a_secret_is_masked(secret: str, tmp_path: Path) -> None:
    entry = f"{{kind: function, name: b, function: a.b:c, arguments: {{{secret.replace('X', SECRET)}, n: 1}}}}"
    cfg = ppo_file(tmp_path / "mine.yaml", f"reward: {{sources: [{entry}]}}\n", "reward.function=null")
    text = dump(cfg)
    assert SECRET not in text and "***" in text and "n: 1" in text
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"reward\.sources\.0\.arguments\..* has \*\*\* in the place of a secret"):
        load("ppo", config_file=tmp_path / "config.yaml")
    word = f"reward.sources=[{entry}]".replace("{1: ", "{a: ")
    assert SECRET not in masked_word(word) and masked_word(word).endswith(", n: 1}}]")


def test_texts_that_only_look_like_secrets_are_kept(tmp_path: Path) -> None:
    arguments = (
        "{sep: '***', eos_token: a, pad_tokens: [b], free_tokens: 5, key: null, tokens: [1, 2.5, true], end: '=***'}"
    )
    entry = f"{{kind: function, name: b, function: a.b:c, arguments: {arguments}}}"
    stop = "generation: {stop: ['***', 'https://a@b.c/x', 'https://***@b.c', '?key=***']}\n"
    cfg = ppo_file(tmp_path / "mine.yaml", f"{stop}reward: {{sources: [{entry}]}}\n", "reward.function=null")
    (tmp_path / "config.yaml").write_text(dump(cfg))
    again = load("ppo", config_file=tmp_path / "config.yaml")
    assert again == cfg and again.generation.stop[1] == "https://a@b.c/x"
    for word in (f"reward.sources=[{entry}]", "generation.stop=['https://a@b.c/x', '{key: a}']"):
        assert masked_word(word) == word


def test_a_configuration_without_secrets_is_dumped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    cfg = ppo_file(tmp_path / "mine.yaml", "data: {prompts: '${oc.env:WHERE}/p.jsonl'}\n", "ppo.kl.target=6", "seed=5")
    (tmp_path / "config.yaml").write_text(dump(cfg))
    again = load("ppo", config_file=tmp_path / "config.yaml")
    assert again == cfg and dump(again) == dump(cfg) and again.data.prompts == "/data/p.jsonl"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h:80/x", "http://***@h:80/x"),
        ("https://token@h/x@y", "https://***@h/x@y"),
        ("HTTP://u:p@w@h", "HTTP://***@h"),
        ("http://h:80/a@b", "http://h:80/a@b"),
        ("postgresql+psycopg://u:p@h/d", "postgresql+psycopg://u:***@h/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql:///d?user=u&password=p&x=1", "postgresql:///d?user=u&password=***&x=1"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
        ("a@b.c and 12:30@x", "a@b.c and 12:30@x"),
        ("url: http://u:p@h/x\nother: https://q@h", "url: http://***@h/x\nother: https://***@h"),
    ],
)
def test_what_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_words_of_a_command_line_are_masked() -> None:
    words = {
        "ppo.feedback.store=postgresql://u:p@h/d": "ppo.feedback.store=postgresql://u:***@h/d",
        "slurm.environment.WANDB_API_KEY=abc": "slurm.environment.WANDB_API_KEY=***",
        "exp_manager.wandb_logger_kwargs.api_key=abc": "exp_manager.wandb_logger_kwargs.api_key=***",
        "reward.sources=[{kind: function, arguments: {api_key: abc, n: 1}}]": (
            "reward.sources=[{kind: function, arguments: {api_key: ***, n: 1}}]"
        ),
        "a=[{arguments: {api_key: [sk-4, sk-5], n: [1]}}]": "a=[{arguments: {api_key: ***, n: [1]}}]",
        "a=[{arguments: {token: 'a,b', n: 1}}]": "a=[{arguments: {token: ***, n: 1}}]",
        "a=[{arguments: {key: {a: [b}, n: 1}}]": "a=[{arguments: {key: ***}]",
        'a=[{arguments: {key: "a\\"b,\'}", pass: ${x:a,b}, n: x}}]': "a=[{arguments: {key: ***, pass: ***, n: x}}]",
        "exp_manager.wandb_logger_kwargs.headers.a={b: c}": "exp_manager.wandb_logger_kwargs.headers.a={b: c}",
        "+exp_manager.wandb_logger_kwargs.api_keys.a=[b,c]": "+exp_manager.wandb_logger_kwargs.api_keys.a=***",
        "slurm.environment.MAX_TOKENS=5": "slurm.environment.MAX_TOKENS=5",
        "generation.max_new_tokens=5": "generation.max_new_tokens=5",
        "reward.sources=[{arguments: {eos_token: abc}}]": "reward.sources=[{arguments: {eos_token: abc}}]",
        "server.token_env=NAME": "server.token_env=NAME",
    }
    assert {word: masked_word(word) for word in words} == words


def test_paths_begin_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "a place"
    home.mkdir()
    here.mkdir()
    (here / "p.jsonl").touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    given_ = {
        "exp_manager.explicit_log_dir": "~/run",
        "model.restore_from": "../m",
        "model.critic.restore_from": "./c",
        "data.prompts": "p.jsonl",
        "data.validation_prompts": "org/name",
        "ppo.feedback.store": "sqlite:///~/f.db",
    }
    sources = "reward.sources=[{kind: model, name: m, restore_from: ~r}, {kind: http, name: h, url_file: '~/u'}]"
    cfg = load("ppo", [*(f"{key}={value}" for key, value in given_.items()), sources.replace("~r", "r")])
    assert cfg.exp_manager.explicit_log_dir == f"{home}/run" and cfg.model.restore_from == f"{tmp_path}/m"
    assert cfg.model.critic.restore_from == f"{here}/c" and cfg.ppo.feedback.store == f"sqlite:///{home}/f.db"
    assert cfg.data.prompts == f"{here}/p.jsonl" and cfg.data.validation_prompts == "org/name"
    assert [entry.get("restore_from") or entry["url_file"] for entry in cfg.reward.sources] == [
        f"{here}/r",
        f"{home}/u",
    ]
    generate = load("generate", ["model.restore_from=/m", "data.prompts=~/x", "out=o.jsonl", "model.tokenizer=~"])
    assert generate.out == f"{here}/o.jsonl" and generate.model.tokenizer == str(home)
    serve = load("serve-reward", ["model.restore_from=~/m", "server.url_file=u"])
    assert (serve.model.restore_from, serve.server.url_file) == (f"{home}/m", f"{here}/u")


def test_every_key_that_is_a_path_is_known() -> None:
    """By what the schema says of it."""
    from nemo_rlhf.config.commands import COMMANDS

    package = Path(__import__("nemo_rlhf").__file__).parent / "config"
    found = set()
    for file in package.glob("*.py"):
        for line in file.read_text().splitlines():
            name, colon, rest = line.strip().partition(": ")
            words = ("file", "directory", "checkpoint", "store")
            if colon and rest.startswith("str") and any(word in rest.partition("#")[2].lower() for word in words):
                found.add(name)
    listed = {key.rpartition(".")[2] for key in (*PATHS, *PERHAPS, STORE)} | {"url_file"}
    assert {"explicit_log_dir", "restore_from", "prompts", "url_file", "store"} <= found
    assert found <= listed | {"url", "run", "where"}, found - listed
    everything = {key for schema in COMMANDS.values() for key in schema_keys(schema)}  # type: ignore[arg-type]
    assert {*PATHS, *PERHAPS, STORE} <= everything


def test_what_to_type_is_what_bash_gives(tmp_path: Path) -> None:
    texts = ["a b", "it's", 'a "b" \\', "$HOME `x` $(y)", "~/x (1), [2] {3}=4", "a\nb\t\x01\u2028é", "\\"]
    forms = " ".join(bash_form("ppo.feedback.run", text) for text in texts)
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {forms}"],
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    found = done.stdout.decode().split("\0")[:-1]
    keys = schema_keys(PPOConfig)
    values: list[Any] = [read_override(word, keys)[1] for word in found]
    assert [value.text for value in values] == texts


def test_names_of_curves_are_no_mathematics() -> None:
    curves = {"cost in $x_1": Curve((1,), (1.0,)), "a $\\frac$ b": Curve((1,), (2.0,)), "$": Curve((1,), (3.0,))}
    assert "cost in $x_1" in draw(Panel("a $b$", "in $\\y$", curves))
