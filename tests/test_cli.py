"""The console program: help, arguments, exit codes, and one sentence for wrong input."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import nemo_rlhf
from nemo_rlhf.cli import main
from nemo_rlhf.config import GenerateConfig, PPOConfig, SFTConfig

pytestmark = pytest.mark.usefixtures("outside_of_any_job")

REPOSITORY = Path(nemo_rlhf.__file__).parents[1]
REQUIRED = ["model.restore_from=m", "exp_manager.explicit_log_dir=r"]
PPO = [*REQUIRED, "data.prompts=p", "reward.function=a.b:c"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Puts recorders in the place of the modules that do the work, and returns what they were called with."""
    recorded: list[tuple[Any, ...]] = []

    def recorder(name: str, result: Any = 0) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            recorded.append((name, *args, *kwargs.items()))
            return result

        return record

    run = types.ModuleType("nemo_rlhf.cli.run")
    for name in ("run_sft", "run_ppo", "run_ilql", "run_rft", "run_reward", "run_generate"):
        setattr(run, name, recorder(name, 75 if name == "run_ppo" else 0))
    serve = types.ModuleType("nemo_rlhf.cli.serve")
    serve.run_serve_reward = recorder("run_serve_reward")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nemo_rlhf.cli.serve", serve)
    convert = types.ModuleType("nemo_rlhf.convert")
    for name in ("import_hf", "export_hf"):
        setattr(convert, name, recorder(name, name))
    monkeypatch.setitem(sys.modules, "nemo_rlhf.cli.run", run)
    # the real one would start this test session once per device
    monkeypatch.setattr("nemo_rlhf.cli.launch_if_needed", lambda *sizes: None)
    monkeypatch.setitem(sys.modules, "nemo_rlhf.convert", convert)
    return recorded


def wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What wrong input prints: one line on stderr, and nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nemo-rlhf: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "command",
    [
        "",
        "sft",
        "ppo",
        "generate",
        "report",
        "convert",
        "convert import",
        "convert verify",
        "feedback",
        "feedback import",
    ],
)
def test_help_shows_an_example_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "example" in out and f"  nemo-rlhf {command}" in out
    assert all(f"\n  {code} " in out for code in (0, 1, 2, 75))


@pytest.mark.parametrize("command", ["sft", "ppo", "ilql", "rft", "reward", "generate", "serve-reward"])
def test_examples_in_help_are_valid(command: str, capsys: pytest.CaptureFixture[str], calls: list[Any]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = capsys.readouterr().out.partition("example:\n")[2].partition("\n\n")[0]
    words = example.replace("\\\n", " ").split()
    assert words[:2] == ["nemo-rlhf", command]
    main(words[1:])
    assert len(calls) == 1
    assert Path(REPOSITORY / "conf" / f"{command}.yaml").is_file()


def test_training_commands_get_their_configuration(calls: list[Any], tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer: {max_steps: 9}\n")
    assert main(["ppo", *PPO, "--config", str(mine), "seed=3"]) == 75
    assert main(["sft", "seed=4", *REQUIRED, "data.train=t"]) == 0
    (_, ppo), (_, sft) = calls
    assert isinstance(ppo, PPOConfig) and (ppo.seed, ppo.trainer.max_steps) == (3, 9)
    assert isinstance(sft, SFTConfig) and sft.seed == 4


def test_generate_and_convert(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["generation.top_k=4", "trainer.devices=2"]
    assert main(["generate", "dir", overrides[0], "--prompts", "p", "--out", "o", overrides[1]]) == 0
    assert main(["convert", "import", "hf", "ckpt"]) == 0
    assert main(["convert", "export", "ckpt", "hf", "--max-shard-size", "1GB", "--force", "--workers", "3"]) == 0
    (_, generate), *others = calls
    assert isinstance(generate, GenerateConfig) and generate.data.prompts == "p"
    assert generate.out == str(Path.cwd() / "o")
    assert generate.model.restore_from == str(Path.cwd() / "dir")
    assert (generate.generation.top_k, generate.trainer.devices) == (4, 2)
    assert others == [
        ("import_hf", "hf", "ckpt", ("force", False), ("workers", 1)),
        ("export_hf", "ckpt", "hf", "1GB", ("force", True), ("workers", 3)),
    ]
    assert capsys.readouterr().out == "import_hf\nexport_hf\n"


def test_paths_of_generate_may_hold_anything(calls: list[Any]) -> None:
    odd = "it's a=b, [c] \\ {d}\\"
    assert main(["generate", "my dir", "--prompts", "a=b.jsonl", "--out", odd]) == 0
    ((_, generate),) = calls
    assert (generate.model.restore_from, generate.out) == (str(Path.cwd() / "my dir"), f"{Path.cwd()}/{odd}")
    assert generate.data.prompts == "a=b.jsonl"


def test_wrong_arguments(capsys: pytest.CaptureFixture[str], calls: list[Any]) -> None:
    assert "invalid choice: 'dpo'" in wrong(capsys, "dpo")
    assert "COMMAND" in wrong(capsys)
    assert "--prompts" in wrong(capsys, "generate", "dir")
    assert "CKPT_DIR" in wrong(capsys, "convert", "import", "hf")
    assert "--nonsense" in wrong(capsys, "ppo", *PPO, "--nonsense")
    assert calls == []


def test_wrong_configuration(capsys: pytest.CaptureFixture[str], calls: list[Any], tmp_path: Path) -> None:
    assert "did you mean trainer.max_steps?" in wrong(capsys, "ppo", *PPO, "trainer.max_step=3")
    assert "no configuration key ppo.epochs" in wrong(capsys, "sft", *REQUIRED, "data.train=t", "ppo.epochs=3")
    assert "reward.function" in wrong(capsys, "ppo", *PPO[:-1])
    assert "absent.yaml" in wrong(capsys, "ppo", *PPO, "--config", str(tmp_path / "absent.yaml"))
    assert "is not a run directory" in wrong(capsys, "report", str(tmp_path))
    assert calls == []


def fail_with(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Let ``nemo-rlhf report`` run ``source``, as if it stood in a module of the package."""
    module = types.ModuleType("nemo_rlhf.cli.report")
    module.__dict__["write_report"] = lambda _: exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "nemo_rlhf.cli.report", module)


def test_our_own_sentences_are_wrong_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, "raise FileNotFoundError('There is no file x.')")
    assert wrong(capsys, "report", "x") == "nemo-rlhf: error: There is no file x.\n"
    fail_with(monkeypatch, "raise ValueError('This is wrong.')")
    assert wrong(capsys, "report", "x") == "nemo-rlhf: error: This is wrong.\n"


@pytest.mark.parametrize(
    "source",
    [
        "raise RuntimeError('broken')",
        "import json; json.loads('x')",  # a ValueError of a library
        "open('/nonexistent/file')",  # a FileNotFoundError of the system
        "import torch; torch.zeros(2).reshape(3)",
    ],
)
def test_every_other_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    fail_with(monkeypatch, source)
    with pytest.raises((RuntimeError, ValueError, FileNotFoundError)):
        main(["report", "x"])


def test_exit_codes_of_the_process() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nemo_rlhf", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)

    assert run("--help").returncode == 0
    done = run("ppo", "model.lr=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["ppo", "--help"], ["ppo", "lr=1"], ["report", "/nowhere"]])
def test_quick_answers_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys\nfrom nemo_rlhf.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'nemo', 'megatron', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, True),  # the first of another node, which may lack what rank 0 has
    ],
)
def test_ranks_do_not_repeat_each_other(
    env: dict[str, str], said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["ppo", "model.lr=1"]) == 2
    assert ("model.lr" in capsys.readouterr().err) is said


def test_connected_ranks_let_the_first_one_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    fail_with(monkeypatch, "raise ValueError('Only this rank sees it.')")
    assert main(["report", "x"]) == 2
    assert capsys.readouterr().err == "nemo-rlhf: error (rank 3): Only this rank sees it.\n"
    monkeypatch.setenv("RANK", "0")
    assert main(["report", "x"]) == 2
    assert capsys.readouterr().err == ""
