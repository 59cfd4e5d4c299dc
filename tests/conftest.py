"""What several test modules need: a tiny model's directory, data for it, and means to run jobs of real processes."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nemo_rlhf.feedback.store import Store

# Files with few long tests, which run other processes: begun first, so that none is left alone at the end.
LONGEST = ("survival", "runs", "examples", "learning", "slurm", "readme", "games", "train_api", "reward", "people")
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
REWARDS = "tests.workers.rewards"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with the most tests."""
    counts = Counter(item.path for item in items)
    first = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (first.get(item.path.name, len(first)), -counts[item.path]))


@dataclass(frozen=True)
class Tiny:
    """Files of a model with a token a letter that a test can train in a second or two."""

    root: Path
    hf: Path  # config and tokenizer, no weights
    prompts: Path
    train: Path

    def ppo(self, run_dir: Path, *overrides: str) -> list[str]:
        """Arguments of ``nemo-rlhf`` for a small PPO run with everything switched on; ``overrides`` come last."""
        return [
            "ppo",
            f"model.restore_from={self.hf}",
            "model.init=random",
            f"data.prompts={self.prompts}",
            f"data.validation_prompts={self.prompts}",
            f"reward.function={REWARDS}:count_a",
            f"exp_manager.explicit_log_dir={run_dir}",
            "exp_manager.create_tensorboard_logger=false",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=100",
            "exp_manager.checkpoint_callback_params.save_top_k=0",
            "trainer.max_steps=3",
            "trainer.val_check_interval=1",
            "ppo.num_prompts=8",
            "ppo.samples_per_prompt=2",
            "ppo.epochs=2",
            "ppo.kl.target=0.05",
            "ppo.kl.horizon=100",
            "ppo.entropy_coef=0.01",
            "ppo.reward_scaling=running",
            "model.global_batch_size=8",
            "model.micro_batch_size=2",
            "model.optim.lr=1e-3",
            "model.optim.sched.name=cosine",
            "model.optim.sched.warmup_steps=2",
            "model.critic.optim.lr=1e-3",
            "generation.max_new_tokens=8",
            "generation.num_slots=8",
            "generation.temperature=[0.9,1.2]",
            *overrides,
        ]

    def rft(self, run_dir: Path, *overrides: str) -> list[str]:
        """The same for RFT."""
        return [
            "rft",
            f"model.restore_from={self.hf}",
            "model.init=random",
            f"data.prompts={self.prompts}",
            f"data.validation_prompts={self.prompts}",
            f"reward.function={REWARDS}:count_a",
            f"exp_manager.explicit_log_dir={run_dir}",
            "exp_manager.create_tensorboard_logger=false",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=100",
            "exp_manager.checkpoint_callback_params.save_top_k=0",
            "trainer.max_steps=3",
            "trainer.val_check_interval=3",
            "rft.num_prompts=4",
            "rft.samples_per_prompt=6",
            "rft.improve_steps=3",
            "rft.start_percentile=0.4",
            "rft.end_percentile=0.9",
            "model.global_batch_size=8",
            "model.micro_batch_size=2",
            "model.optim.lr=3e-3",
            "model.optim.sched.name=cosine",
            "generation.max_new_tokens=8",
            "generation.num_slots=8",
            *overrides,
        ]

    def sft(self, run_dir: Path, *overrides: str) -> list[str]:
        """The same for SFT."""
        return [
            "sft",
            f"model.restore_from={self.hf}",
            "model.init=random",
            f"data.train={self.train}",
            f"data.validation={self.train}",
            f"exp_manager.explicit_log_dir={run_dir}",
            "exp_manager.create_tensorboard_logger=false",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=100",
            "exp_manager.checkpoint_callback_params.save_top_k=0",
            "trainer.max_steps=4",
            "trainer.val_check_interval=2",
            "model.global_batch_size=8",
            "model.micro_batch_size=2",
            "model.optim.lr=3e-3",
            "model.optim.sched.name=linear",
            *overrides,
        ]


def write_tokenizer(directory: Path, letters: str = LETTERS) -> int:
    """A tokenizer with a token a letter; returns the number of its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)
    return len(vocabulary)


def write_model_config(directory: Path, vocab_size: int, **changes: int) -> None:
    """``config.json`` of a Llama with two layers."""
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **changes,
    }
    config = LlamaConfig(vocab_size=vocab_size, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    made = Tiny(root, root / "hf", root / "prompts.jsonl", root / "train.jsonl")
    write_model_config(made.hf, write_tokenizer(made.hf))
    draw = random.Random(0)
    words = ["".join(draw.choice(LETTERS[:26]) for _ in range(draw.randint(1, 7))) for _ in range(13)]
    prompts = [{"prompt": f"{word} ", "letter": word[0]} for word in words]
    made.prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    texts = [{"prompt": f"{word} ", "response": word[::-1]} for word in words]
    made.train.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return made


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    from tests.postgres import running_postgres

    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/feedback.db"
    from tests.postgres import new_database

    return new_database(request.getfixturevalue("postgres_server"))


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An empty preference store, on SQLite and on PostgreSQL."""
    from nemo_rlhf.feedback.store import Store

    store = Store.open(store_url)
    yield store
    store.close()


@pytest.fixture
def file_store(tmp_path: Path) -> Iterator[Store]:
    """One on SQLite, for what does not depend on the database."""
    from nemo_rlhf.feedback.store import Store

    store = Store.open(str(tmp_path / "feedback.db"))
    yield store
    store.close()


@pytest.fixture(scope="session")
def judge(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of transformers, of another size than the policy, with scores that differ."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    directory = tmp_path_factory.mktemp("judge")
    write_model_config(directory, write_tokenizer(directory), hidden_size=48, intermediate_size=80)
    torch.manual_seed(6)
    config = LlamaConfig.from_pretrained(directory, num_labels=1, initializer_range=0.2)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    return directory


@pytest.fixture
def outside_of_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is no rank, whatever models other tests opened in it: ranks do not repeat each other's sentences."""
    import torch

    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)


@pytest.fixture
def import_from(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Lets Python import what a directory holds; afterwards no module of it is left for other tests to find."""
    directories: list[Path] = []

    def prepend(directory: Path) -> None:
        directories.append(directory)
        monkeypatch.syspath_prepend(directory)

    yield prepend
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and any(Path(file).is_relative_to(directory) for directory in directories):
            del sys.modules[name]
