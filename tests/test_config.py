"""Configuration: what loads, what is refused and in which words."""

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import nemo_rlhf.config
from nemo_rlhf.config import (
    GenerateConfig,
    ILQLConfig,
    PPOConfig,
    SFTConfig,
    config_directory,
    dump,
    load,
    quoted,
    sampling_sweep,
)
from nemo_rlhf.config.commands import COMMANDS, REQUIRED
from nemo_rlhf.config.keys import nearest_key, schema_keys
from nemo_rlhf.config.load import GROUPS
from nemo_rlhf.config.validate import CHOICES, RANGES


def required(command: str) -> list[str]:
    return [f"{key}={value}" for key, value in REQUIRED[command].items()]


def ppo(*overrides: str) -> PPOConfig:
    return load("ppo", [*required("ppo"), *overrides])


def refused(*overrides: str, command: str = "ppo") -> str:
    """The one sentence with which these overrides are refused."""
    with pytest.raises(ValueError) as error:
        load(command, [*required(command), *overrides])
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_shipped_defaults_are_those_of_the_schema_and_complete(command: str) -> None:
    shipped = yaml.safe_load((config_directory() / f"{command}.yaml").read_text())
    schema = OmegaConf.to_container(OmegaConf.structured(COMMANDS[command]), resolve=False)
    assert shipped == schema


WHOLE = sorted(path for path in config_directory().rglob("*.yaml") if path.parent.name not in GROUPS)


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_every_shipped_file_loads(path: Path) -> None:
    command = "slurm" if path.parent.name == "cluster" else path.stem.rpartition("_")[2]
    cfg = load(command, required(command), config_file=path)
    assert type(cfg) is COMMANDS[command]
    by_name = load(command, required(command), config_file=path.relative_to(config_directory()).with_suffix(""))
    assert by_name == cfg


def test_values_reach_the_dataclasses() -> None:
    cfg = ppo("model.optim.lr=3e-7", "ppo.offload=[critic]", "model.optim.betas=[0.8,0.9]", "trainer.precision=32")
    assert isinstance(cfg, PPOConfig)
    assert cfg.model.optim.lr == 3e-7 and cfg.model.critic.optim.lr == 5e-6
    assert cfg.ppo.offload == ["critic"] and cfg.model.optim.betas == [0.8, 0.9]
    assert cfg.trainer.precision == "32"
    assert cfg.reward.function == "my_package.rewards:score"
    assert isinstance(load("sft", required("sft")), SFTConfig)
    assert isinstance(load("generate", required("generate")), GenerateConfig)


@pytest.mark.parametrize(
    "text",
    ["it's", "a b, [c]={d}", "back\\slash", "end\\", "\\'", '"', "x", "1", "null", "", "${x}", "\\${", "a\\\\${b} $"],
)
def test_quoted_text_arrives_as_it_is(text: str) -> None:
    assert ppo(f"data.validation_prompts={quoted(text)}").data.validation_prompts == text


def test_interpolations_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ppo("model.global_batch_size=32").ppo.minibatch_size == 32
    assert ppo("model.global_batch_size=32", "ppo.minibatch_size=64").ppo.minibatch_size == 64
    monkeypatch.setenv("TEST_STEPS", "7")
    assert ppo("trainer.max_steps=${oc.env:TEST_STEPS}").trainer.max_steps == 7
    assert "ppo.minibatch_size=${model.foo}" in refused("ppo.minibatch_size=${model.foo}")
    assert "an integer" in refused("ppo.minibatch_size=${model.restore_from}")


def test_user_file_lies_over_the_defaults_and_under_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("trainer:\n  max_steps: 9\n  devices: 2\ngeneration:\nmodel:\n  tensor_model_parallel_size: 2\n")
    cfg = load("ppo", [*required("ppo"), "trainer.max_steps=11"], config_file=path)
    assert (cfg.trainer.max_steps, cfg.trainer.devices, cfg.trainer.log_every_n_steps) == (11, 2, 1)
    assert cfg.generation.max_new_tokens == 256


def test_user_file_may_use_hydra_defaults(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("trainer:\n  max_steps: 9\n")
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\nseed: 5\n")
    cfg = load("ppo", required("ppo"), config_file=tmp_path / "mine.yaml")
    assert (cfg.trainer.max_steps, cfg.seed) == (9, 5)


MODELS = sorted((config_directory() / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("command", ["sft", "reward", "ppo", "ilql", "rft"])
def test_a_model_of_the_group_sets_keys_of_its_section(path: Path, command: str) -> None:
    nodes = ["trainer.devices=8", "trainer.num_nodes=4"]
    cfg: Any = load(command, [f"model={path.stem}", *nodes, *required(command)])
    said = yaml.safe_load(path.read_text())
    assert {key: getattr(cfg.model, key) for key in said} == said
    without: Any = load(command, [*nodes, *required(command)])
    assert {key: value for key, value in vars(cfg.model).items() if key not in said} == {
        key: value for key, value in vars(without.model).items() if key not in said
    }


def test_where_a_choice_from_a_group_lies(tmp_path: Path) -> None:
    def sizes(*overrides: str, config_file: Path | None = None) -> tuple[int, int, int]:
        nodes = ["trainer.devices=8", "trainer.num_nodes=4"]
        model = load("ppo", [*required("ppo"), *nodes, *overrides], config_file=config_file).model
        return model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.micro_batch_size

    assert sizes("model=llama3-70b") == sizes("+model=llama3-70b") == (8, 4, 1)
    assert sizes("model.micro_batch_size=2", "model=llama3-70b") == (8, 4, 2)
    assert sizes("model={micro_batch_size: 4}") == (1, 1, 4)
    (tmp_path / "plain.yaml").write_text("model: {tensor_model_parallel_size: 2, micro_batch_size: 4}\n")
    assert sizes("model=llama3-70b", config_file=tmp_path / "plain.yaml") == (8, 4, 1)
    (tmp_path / "chosen.yaml").write_text("defaults: [model: qwen3-32b, _self_]\nmodel: {micro_batch_size: 4}\n")
    assert sizes(config_file=tmp_path / "chosen.yaml") == (8, 2, 4)
    assert sizes("model=llama3-70b", config_file=tmp_path / "chosen.yaml") == (8, 4, 4)
    assert "choose one of llama3-70b, llama3-8b" in refused("model=llama3-7b")
    assert "sets model.sequence_parallel" in refused("model=llama3-8b", command="generate")


def test_bad_user_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, words in {
        "trainer:\n  max_step: 9\n": ["trainer.max_step ", str(path), "trainer.max_steps?"],
        "trainer:\n  max_steps: many\n": ["trainer.max_steps=many", str(path), "an integer"],
        "trainer: 5\n": ["trainer=5", "section"],
        "trainer: [\n": [str(path), "cannot be read"],
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            load("ppo", required("ppo"), config_file=path)
        assert all(word in str(error.value) for word in words), str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="examples/llama3_8b_ppo"):
        load("ppo", required("ppo"), config_file=tmp_path / "absent.yaml")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ValueError, match=r"end in \.yaml"):
        load("ppo", required("ppo"), config_file=tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("trainer.max_step=3", "trainer.max_steps"),
        ("modle.optim.lr=3", "model.optim.lr"),
        ("+model.tensor_parallel_size=2", "model.tensor_model_parallel_size"),
        ("++lr=2", "model.optim.lr"),
        ("ppo.kl_coef=0.1", "ppo.kl.coef"),
        ("trainer.max_steps.x=1", "trainer.max_steps"),
        ("model.critic.lr=1", "model.critic.optim.lr"),
    ],
)
def test_unknown_key_names_the_nearest(wrong: str, nearest: str) -> None:
    sentence = refused(wrong)
    assert wrong.lstrip("+").partition("=")[0] in sentence
    assert sentence.endswith(f"did you mean {nearest}?")


def test_nearest_key_of_a_known_key_is_itself() -> None:
    keys = schema_keys(PPOConfig)
    assert all(nearest_key(key, keys) == key for key in keys)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_steps=abc", "max_steps=abc (from the command line) has the wrong type: it must be an integer"),
        ("trainer.max_steps=1.5", "an integer"),
        ("trainer.max_steps=null", "trainer.max_steps=null"),
        ("model.optim.betas=[a,b]", "a list of numbers"),
        ("model.sequence_parallel=maybe", "true or false"),
        ("ppo.dual_clip=x", "a number or null"),
        ("exp_manager.wandb_logger_kwargs=5", "a mapping"),
        ("trainer=5", "sets a section"),
        ("model=5", "choose one of llama3-70b"),
        ("trainer.max_steps=1,2", "trainer.max_steps=[a,b]"),
        ("trainer.max_steps", "write key=value"),
        ("generation.stop=[a=b]", """generation.stop='["a b"]' in a shell"""),
        ("trainer.max_steps=(3)", "it must be an integer"),
        ("~trainer.max_steps", "would remove a key"),
    ],
)
def test_wrong_types_and_forms(override: str, words: str) -> None:
    assert words in refused(override)


def test_groups_of_others_do_not_matter() -> None:
    """NeMo, once it is imported, has one that is called as a section of ours."""
    from nemo.core.config import pytorch_lightning  # noqa: F401

    assert "sets a section" in refused("trainer=5")
    assert "trainer" in ConfigStore.instance().repo


def test_required_keys() -> None:
    instead = r"\(or environment.function in place of data.prompts\)\.$"
    with pytest.raises(ValueError, match=rf"data.prompts is not set: .* {instead}"):
        ppo("data.prompts=null")
    with pytest.raises(ValueError) as error:
        load("sft")
    assert all(f"{key}={value}" in str(error.value) for key, value in REQUIRED["sft"].items())
    in_memory = ["data.prompts", "reward.function"]
    cfg = load("ppo", required("ppo")[:2], supplied=in_memory)
    assert cfg.data.prompts is None and cfg.reward.function is None
    with pytest.raises(ValueError, match=r"data.prompts is set .* and given in Python"):
        load("ppo", required("ppo"), supplied=["data.prompts"])


# One violation of every rule, and what the sentence must say.
VIOLATIONS = [
    (("trainer.devices=3", "model.tensor_model_parallel_size=2"), "model.tensor_model_parallel_size=2"),
    (("trainer.devices=4", "model.pipeline_model_parallel_size=8"), "4 processes"),
    (("model.sequence_parallel=true",), "model.tensor_model_parallel_size=1"),
    (("model.micro_batch_size=3",), "ppo.minibatch_size=128 is not divisible by model.micro_batch_size=3"),
    (("trainer.devices=3",), "3 data-parallel ranks"),
    (("ppo.num_prompts=100",), "200 samples per step, which ppo.minibatch_size=128 does not divide"),
    (("ppo.minibatch_size=256",), "ppo.minibatch_size=256"),
    (("model.optim.betas=[0.9]",), "model.optim.betas=[0.9]"),
    (("model.critic.optim.betas=[0.9,1.0]",), "model.critic.optim.betas"),
    (("model.optim.sched.min_lr=1",), "model.optim.sched.min_lr=1.0 is above the peak"),
    (("exp_manager.checkpoint_callback_params.monitor=reward",), "val/"),
    (("ppo.offload=[policy]",), "optimizer, critic, reference"),
    (("ppo.keep_graph=true",), "ppo.minibatch_size=128 is more than the"),
    (
        (
            "ppo.keep_graph=true",
            "model.micro_batch_size=128",
            "model.pipeline_model_parallel_size=2",
            "trainer.devices=2",
        ),
        "model.pipeline_model_parallel_size=2 splits it",
    ),
    (("ppo.keep_graph=true", "model.micro_batch_size=128", "ppo.offload=[critic]"), "ppo.offload holds critic"),
    (("reward.function=rewards.py",), "package.module:name"),
    (("reward.function=a.b:c d",), "package.module:name"),
    (("generation.temperature=0",), "greedy"),
    (("generation.temperature=[0.0,1.0]",), "greedy"),
    (("generation.temperature=-1",), "a number, 0 or more"),
    (("generation.temperature=hot",), "a number"),
    (("generation.temperature=[1.0,hot]",), "a number"),
    (("generation.temperature=[]",), "is empty"),
    (("generation.top_p=0",), "generation.top_p=0"),
    (("generation.top_k=1.5",), "an integer"),
    (("generation.max_new_tokens=0",), "generation.max_new_tokens=0"),
    (("generation.max_new_tokens=true",), "an integer"),
    (("generation.validation.top_p=2",), "generation.validation.top_p=2"),
    (("generation.temperature=[1.0,2.0]", "generation.validation.top_p=[0.5,1.0]"), "only one sampling key"),
    (("generation.top_k=[1,2]",), "generation.validation.temperature=null"),
]


@pytest.mark.parametrize(("overrides", "words"), VIOLATIONS, ids=[" ".join(case[0]) for case in VIOLATIONS])
def test_rules(overrides: tuple[str, ...], words: str) -> None:
    sentence = refused(*overrides)
    assert words in sentence, sentence


def test_sft_rules() -> None:
    assert "model.global_batch_size=100" in refused("model.global_batch_size=100", "trainer.devices=3", command="sft")
    assert "data.train_on=prompt" in refused("data.train_on=prompt", command="sft")
    assert "only validation" in refused("generation.temperature=[0.0,1.0]", command="generate")


def test_ranges_and_choices_hold_for_existing_keys_and_bite() -> None:
    everything = {key for schema in COMMANDS.values() for key in schema_keys(schema)}
    assert set(RANGES) | set(CHOICES) <= everything
    for key in schema_keys(PPOConfig):
        if key in RANGES:
            assert re.match(rf"{re.escape(key)}=-1(\.0)? is out of range", refused(f"{key}=-1")), key
        if key in CHOICES:
            assert "choose one of" in refused(f"{key}=nonsense"), key


@pytest.mark.parametrize("override", ["ppo.clip_low=1.5", "ppo.lam=1.01", "ppo.dual_clip=1", "model.optim.lr=nan"])
def test_upper_ends_of_ranges(override: str) -> None:
    assert "out of range" in refused(override)


def test_nullable_keys_take_null() -> None:
    cfg = ppo("ppo.reward_clip=null", "ppo.kl.target=null", "model.activations_checkpoint_granularity=null")
    assert cfg.ppo.reward_clip is None


def test_warns_of_truncated_rollouts() -> None:
    with pytest.warns(UserWarning, match="generation.top_p=0.9"):
        ppo("generation.top_p=0.9")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ppo("generation.validation.temperature=1.0", "generation.validation.top_p=0.9")


def test_sampling_without_sweep() -> None:
    rollout, variants = sampling_sweep(ppo("generation.temperature=1", "generation.seed=3").generation)
    assert rollout == {
        "max_new_tokens": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3, "beta": 0.0, "stop": (),
        "stop_token_ids": (), "ignore_eos": False, "adv_clip": None,
    }  # fmt: skip
    assert isinstance(rollout["temperature"], float)
    assert variants == [("", {**rollout, "temperature": 0.0})]


def test_sampling_sweep_over_a_rollout_key() -> None:
    cfg = ppo("generation.temperature=[0.7,1]", "generation.stop=['END']", "generation.validation.max_new_tokens=9")
    rollout, variants = sampling_sweep(cfg.generation)
    assert rollout["temperature"] == 0.7 and rollout["max_new_tokens"] == 256 and rollout["stop"] == ("END",)
    assert [suffix for suffix, _ in variants] == ["@temperature=0.7", "@temperature=1.0"]
    assert [settings["temperature"] for _, settings in variants] == [0.7, 1.0]
    assert all(settings["max_new_tokens"] == 9 and settings["stop"] == ("END",) for _, settings in variants)


def test_sampling_sweep_over_a_validation_key() -> None:
    cfg = ppo("generation.validation.top_k=[1,5]", "generation.validation.temperature=null",
              "generation.validation.ignore_eos=true", "generation.validation.stop=['X']")  # fmt: skip
    rollout, variants = sampling_sweep(cfg.generation)
    assert rollout["top_k"] == 0 and not rollout["ignore_eos"] and rollout["stop"] == ()
    assert [(suffix, settings["top_k"]) for suffix, settings in variants] == [("@top_k=1", 1), ("@top_k=5", 5)]
    assert all(s["temperature"] == 1.0 and s["ignore_eos"] and s["stop"] == ("X",) for _, s in variants)


def test_dump_is_read_back(tmp_path: Path) -> None:
    cfg = ppo("generation.temperature=[0.7,1.0]", r'generation.stop=["\n\n", "é"]', "ppo.kl.target=6.0")
    path = tmp_path / "config.yaml"
    path.write_text(dump(cfg))
    assert load("ppo", config_file=path) == cfg


def test_module_can_be_called_and_knows_its_commands() -> None:
    assert nemo_rlhf.config("sft", overrides=required("sft")) == load("sft", required("sft"))  # type: ignore[operator]
    with pytest.raises(ValueError, match="choose one of ppo, sft, ilql, rft, reward, generate"):
        load("dpo")


def test_works_inside_a_hydra_program() -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        assert load("sft", required("sft")).trainer.devices == 1
        assert compose("sft").trainer.devices == 1


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, nemo_rlhf.config as c\n"
        f"c.load('ppo', {required('ppo')!r})\n"
        "print(sorted({'torch', 'nemo', 'megatron', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def ilql(*overrides: str) -> ILQLConfig:
    return load("ilql", [*required("ilql"), *overrides])


def test_ilql_sweeps_beta_in_validation() -> None:
    cfg = ilql("generation.beta=[0,1,100]", "generation.adv_clip=5")
    rollout, variants = sampling_sweep(cfg.generation)
    assert rollout["beta"] == 0.0 and rollout["adv_clip"] == 5.0
    assert [suffix for suffix, _ in variants] == ["@beta=0.0", "@beta=1.0", "@beta=100.0"]
    assert [settings["beta"] for _, settings in variants] == [0.0, 1.0, 100.0]


def test_ilql_rules() -> None:
    assert "between 0 and 1" in refused("ilql.tau=1.5", command="ilql")
    assert "choose one of td, mc" in refused("ilql.target=mcts", command="ilql")
    assert "data.validation_prompts is null" in refused("reward.function=a.b:c", command="ilql")
    both = ("ilql.value_trunk=true", "ilql.detach_heads=true")
    assert "leave one of the two out" in refused(*both, command="ilql")


def test_environment_rules() -> None:
    ppo = [override for override in required("ppo") if not override.startswith(("data.", "reward."))]
    env = "environment.function=a.b:make"
    assert load("ppo", [*ppo, env]).data.prompts is None
    wrong = {
        "data.prompts and environment.function are both set": (env, "data.prompts=p.jsonl"),
        "reward.sources and environment.function are both set": (env, "reward.sources=[{kind: http}]"),
        "does not name a Python function": ("environment.function=make",),
        "has no use beside environments": (env, "data.validation_prompts=p.jsonl"),
        "has no room for a first turn": (env, "environment.max_sequence_length=256"),
        "must be 1 or more": (env, "environment.max_turns=0"),
    }
    for words, overrides in wrong.items():
        with pytest.raises(ValueError, match=words):
            load("ppo", [*ppo, *overrides])
    assert "which this policy has not" in refused("generation.beta=1")
    assert "which this policy has not" in refused("generation.validation.beta=[0,1]")


def test_rft_and_sft_rules() -> None:
    assert "rft.start_percentile=0.99 is above" in refused("rft.start_percentile=0.99", command="rft")
    assert "makes rollouts greedy" in refused("generation.temperature=0", command="rft")
    assert "which this policy has not" in refused("generation.beta=1", command="rft")
    assert "does not name a Python function" in refused("reward.function=here", command="rft")
    assert "at most 100" in refused("data.top_percent=101", command="sft")
    assert "at most 100" in refused("data.top_percent=0", command="sft")
    assert "1 or more" in refused("trainer.max_epochs=0", command="sft")
    assert "0 or more" in refused("exp_manager.checkpoint_callback_params.save_top_k=-1", command="sft")
