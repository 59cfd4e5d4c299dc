"""The report page: what it shows, and what it does with damaged or missing files."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from nemo_rlhf.cli.plots import MAX_POINTS, Curve, Panel, draw, thinned
from nemo_rlhf.cli.report import panels, write_report
from nemo_rlhf.cli.samples import read_jsonl, samples_table, spread
from tests.conftest import REWARDS, Tiny
from tests.jobs import metrics_of
from tests.spawn import run_distributed

PPO_ROW = {
    "reward/mean": 0.5, "reward/std": 0.1, "kl/mean": 0.0, "kl/coef": 0.02, "entropy/mean": 2.0, "loss/policy": 0.1,
    "loss/value": 0.2, "ratio/mean": 1.0, "clipfrac/policy": 0.0, "clipfrac/value": 0.0,
    "value/explained_variance": 0.3, "grad_norm/policy": 1.0, "grad_norm/critic": 2.0, "lr/policy": 1e-6,
    "response_length/mean": 30, "eos/share": 0.9, "truncated/share": 0.1,
    "check/ratio_step0": 1.0, "check/kl_step0": 0.0,
    "time/rollout_s": 2.0, "time/score_s": 0.1, "time/experience_s": 0.5, "time/update_s": 1.0, "time/total_s": 3.6,
    "perf/generated_tokens_per_s": 900.0, "perf/trained_tokens_per_s": 3000.0, "memory/peak_mib": 800.0,
}  # fmt: skip


def run_dir(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def titles(page: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", page)


def test_ppo_page_has_every_curve(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": step, **PPO_ROW} for step in range(1, 6)]
    rows[-1] |= {"val/reward@temperature=0.7": 0.8, "val/reward@temperature=1.0": 0.7, "val/rouge": 0.4}
    page = write_report(run_dir(tmp_path, rows)).read_text()
    assert titles(page) == [
        "Validation: reward", "Validation: rouge", "Reward", "KL to the reference", "KL coefficient", "Entropy",
        "Explained variance of values", "Response length", "Responses that ended", "Responses that were cut",
        "Losses", "Clipped share",
        "Probability ratio", "Gradient norm", "Learning rate", "Tokens per second", "Peak memory", "Time per step",
    ]  # fmt: skip
    assert page.count("<svg") == len(titles(page))
    assert "temperature=0.7" in page and "temperature=1.0" in page
    assert "<td>check/ratio_step0</td><td class='number'>1</td><td class='number'>5</td>" in page


def test_page_is_self_contained_and_its_ids_are_unique(tmp_path: Path) -> None:
    page = write_report(run_dir(tmp_path, [{"step": s, **PPO_ROW} for s in (1, 2)])).read_text()
    links = [link for link in re.findall(r'(?:href|src)="([^"]*)"', page) if not link.startswith("#")]
    assert links == [] and "<script" not in page and "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)
    HTMLParser().feed(page)
    assert "prefers-color-scheme: dark" in page


def test_sft_page(tmp_path: Path) -> None:
    rows = [{"step": s, "loss/sft": 3.0 / s, "grad_norm/policy": 1.0} for s in range(1, 5)]
    rows[-1]["val/loss"] = 1.0
    page = write_report(run_dir(tmp_path, rows)).read_text()
    assert titles(page) == ["Validation: loss", "Losses", "Gradient norm"]
    assert "training" in page and "validation" in page


def test_panels_hold_the_right_numbers() -> None:
    series = {
        "step": Curve((1, 2), (1, 2)),
        "reward/mean": Curve((1, 2), (0.1, 0.2)),
        "reward/std": Curve((1, 2), (0.3, 0.4)),
        "time/rollout_s": Curve((1,), (2.0,)),
        "time/total_s": Curve((1,), (9.0,)),
        "mine": Curve((2,), (5.0,)),
    }
    reward, times, mine = panels(series)
    assert reward.curves == {"mean": series["reward/mean"]} and reward.band == series["reward/std"]
    assert times.stacked and times.curves == {"rollout": series["time/rollout_s"]}
    assert mine.title == "mine" and mine.curves == {"mine": series["mine"]}


def test_torn_last_line_is_ignored_and_others_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1, "loss": 2.0}]
    write_report(tmp_path)
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not valid JSON"):
        write_report(tmp_path)
    path.write_text('{"step": 1}\n[1]\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        write_report(tmp_path)
    path.write_bytes(b'{"step": 1}\n{"text": "\xc3')  # cut inside a character
    assert read_jsonl(path) == [{"step": 1}]


@pytest.mark.parametrize(("text", "words"), [("", "no steps yet"), ('{"loss": 1}\n', "without an integer step")])
def test_empty_metrics(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_missing_metrics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run directory: it has no metrics\.jsonl"):
        write_report(tmp_path / "absent")


def test_repeated_steps_count_the_second_time_and_nan_is_left_out(tmp_path: Path) -> None:
    values = [(1, 1.0), (2, 7.0), (2, 3.0), (3, float("nan"))]
    rows = [{"step": step, "mine": value} for step, value in values]
    page = write_report(run_dir(tmp_path, rows)).read_text()
    assert "<td>mine</td><td class='number'>3</td><td class='number'>2</td>" in page


def write_samples(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_samples_are_escaped_and_cut(tmp_path: Path) -> None:
    row = {"prompt": "a" * 5000 + "THE END", "response": "<script>alert(1)</script>" + "b" * 5000, "score": 0.25,
           "finish_reason": "<i>", "num_tokens": 12, "reference": "unseen", "kl": 0.125, "advantage": -1.5,
           "scores": {"<b>length</b>": 0.75}}  # fmt: skip
    chat = {"prompt": [{"role": "user", "content": "hi"}], "response": "hello", "score": 1}
    write_samples(tmp_path / "rollouts" / "step_10.jsonl", row, chat)
    (tmp_path / "config.yaml").write_text("seed: 1 # <b>\n")
    page = write_report(run_dir(tmp_path, [{"step": 10, "loss": 1.0}])).read_text()
    assert "<summary>Step 10 (2 of 2)</summary>" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "THE END" in page and "a" * 2000 not in page and "b" * 2000 not in page
    numbers = "".join(f"<td class='number'>{value}</td>" for value in ("0.25", "0.125", "-1.5", "0.75"))
    assert f"{numbers}<td>&lt;i&gt;</td><td class='number'>12</td>" in page
    assert "<th>&lt;b&gt;length&lt;/b&gt;</th><th>end</th>" in page and "unseen" not in page
    assert "&quot;content&quot;: &quot;hi&quot;" in page
    assert "seed: 1 # &lt;b&gt;" in page


def test_samples_of_the_first_the_middle_and_the_last_step(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9, 10):
        rows = [{"prompt": f"prompt {row // 4}", "response": f"step {step} row {row}", "score": 0} for row in range(40)]
        write_samples(tmp_path / "rollouts" / f"step_{step}.jsonl", *rows)
    page = write_report(run_dir(tmp_path, [{"step": 10, "loss": 1.0}])).read_text()
    assert re.findall(r"<summary>(.*?)</summary>", page) == [f"Step {step} (12 of 40)" for step in (1, 3, 10)]
    assert page.count("<details open>") == 1
    assert len(set(re.findall(r"prompt \d+", page))) == 10, "of every prompt"


def test_validation_samples_by_way_of_sampling(tmp_path: Path) -> None:
    older = {"prompt": "p", "response": "older", "score": 0}
    write_samples(tmp_path / "validation" / "step_2.jsonl", older)
    rows = [
        {"sampling": f"beta={beta}", "prompt": "<p>", "response": f"r{beta}{row}", "score": beta + row}
        for beta in (0, 4)
        for row in range(2)
    ]
    write_samples(tmp_path / "validation" / "step_4.jsonl", *rows)
    page = write_report(run_dir(tmp_path, [{"step": 4, "loss": 1.0}])).read_text()
    assert "Validation samples of step 4" in page and "older" not in page
    found = re.findall(r"<summary>(.*?)</summary>", page)
    assert found == ["beta=0 (2 of 2, mean score 0.5)", "beta=4 (2 of 2, mean score 4.5)"]
    assert all(f"r{beta}{row}" in page for beta in (0, 4) for row in range(2)) and "<p>" not in page.split("<h2>")[-2]


def test_histograms_of_values_at_first_and_at_last(tmp_path: Path) -> None:
    for step in (0, 5, 10):
        counts = {"Q": [1, 2, 3], "target Q": [0, 6, 0], "V": [0, 0, 0]}
        records = [
            {"name": name, "edges": [-1.0, 0.0, 1.0, 2.0], "counts": of_bins} for name, of_bins in counts.items()
        ]
        write_samples(tmp_path / "values" / f"step_{step}.jsonl", *records)
    (tmp_path / "values" / "step_12.jsonl").write_text('{"name": "Q", "ed')  # what a killed run may leave
    page = write_report(run_dir(tmp_path, [{"step": 10, "loss": 1.0}])).read_text()
    assert titles(page) == ["Losses", "Values at step 0", "Values at step 10"]
    assert "target Q" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


# ---- on the terminal


def shown(records: list[dict[str, Any]], terminal: bool) -> str:
    out = io.StringIO()
    Console(file=out, width=300, force_terminal=terminal).print(samples_table(records, "samples of step 3"))
    return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_model_writes_does_not_steer_the_terminal(terminal: bool) -> None:
    hostile = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]\r\u202eback\ttab\nnext"
    text = shown([{"prompt": hostile, "response": hostile, "score": 0.5, "finish_reason": "eos"}], terminal)
    assert "\x1b[2J" not in text and "\x1b]" not in text and not set("\x07\r\u202e") & set(text)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "[bold red]x[/]" in plain and "\\x1b[2J" in plain and "0.5" in plain
    assert "samples of step 3" in plain
    if not terminal:
        assert plain == text, "no colours in a file"


def test_the_table_shows_the_figures_that_there_are() -> None:
    assert "advantage" not in shown([{"prompt": "p", "response": "r", "score": 1}], False)
    text = shown([{"prompt": "x" * 999 + "END", "response": "r" * 999, "kl": 0.25, "advantage": -1}], False)
    assert "advantage" in text and "0.25" in text and "END" in text and text.count("r" * 20) < 16


def test_samples_are_spread_over_the_prompts() -> None:
    records = [{"number": number} for number in range(10)]
    assert [record["number"] for record in spread(records, 4)] == [0, 2, 5, 7]
    assert spread(records[:2], 4) == records[:2] and spread([], 4) == []


def test_thinning_keeps_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=MAX_POINTS * 10)
    steps, thin = thinned(Curve(tuple(range(len(values))), tuple(values)))
    assert len(steps) == len(thin) == MAX_POINTS
    np.testing.assert_allclose(thin, values.reshape(MAX_POINTS, 10).mean(axis=1))
    assert len(draw(Panel("t", "", {"c": Curve(tuple(range(len(values))), tuple(values))}))) < 60_000


def test_stacked_times_of_unequal_steps(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "time/rollout_s": 1.0} for step in (1, 2)]
    rows[1]["time/val_s"] = 4.0
    assert titles(write_report(run_dir(tmp_path, rows)).read_text()) == ["Time per step"]


def test_report_needs_no_torch(tmp_path: Path) -> None:
    run_dir(tmp_path, [{"step": 1, "loss": 1.0}])
    code = (
        f"import sys\nfrom nemo_rlhf.cli import main\nmain(['report', {str(tmp_path)!r}])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "report.html")


# ---- what an ILQL run leaves for it


@pytest.fixture(scope="module")
def ilql_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ilql_report")
    dialogues = [
        {**json.loads(line), "reward": place % 3} for place, line in enumerate(tiny.train.read_text().splitlines())
    ]
    (root / "dialogues.jsonl").write_text("".join(json.dumps(dialogue) + "\n" for dialogue in dialogues))
    arguments = [
        "ilql", f"model.restore_from={tiny.hf}", "model.init=random", f"data.train={root}/dialogues.jsonl",
        f"data.validation={root}/dialogues.jsonl", f"data.validation_prompts={tiny.prompts}",
        f"reward.function={REWARDS}:count_a", f"exp_manager.explicit_log_dir={root}/run", "trainer.max_steps=4",
        "trainer.val_check_interval=2", "model.global_batch_size=4", "model.optim.lr=1e-2", "generation.beta=[0,4]",
        "generation.max_new_tokens=6", "exp_manager.create_tensorboard_logger=false",
        "model.tensor_model_parallel_size=2", "model.sequence_parallel=true",
    ]  # fmt: skip
    without = [a for a in arguments if not a.startswith(("data.validation", "reward.", "exp_manager.explicit"))]
    without += [f"exp_manager.explicit_log_dir={root}/plain", "trainer.max_steps=1"]
    payload = [{"arguments": arguments}, {"arguments": without}]
    for rank in run_distributed("tests.workers.run_worker:runs", 2, payload):
        assert [one["code"] for one in rank] == [0, 0], rank
    return root


def test_histograms_are_of_what_the_metrics_say(ilql_run: Path) -> None:
    metrics = {row["step"]: row for row in metrics_of(ilql_run / "run")}
    assert sorted(path.name for path in (ilql_run / "run" / "values").iterdir()) == [
        "step_0.jsonl", "step_2.jsonl", "step_4.jsonl",
    ]  # fmt: skip
    for step in (0, 2, 4):
        records = {record["name"]: record for record in read_jsonl(ilql_run / "run" / "values" / f"step_{step}.jsonl")}
        for name, metric in (("Q", "val/q/mean"), ("target Q", "val/q/target"), ("V", "val/v/mean")):
            edges, counts = np.array(records[name]["edges"]), np.array(records[name]["counts"])
            assert counts.sum() == sum(len(text) + 1 for text in responses(ilql_run)), "one for each action"
            mean = ((edges[1:] + edges[:-1]) / 2 * counts).sum() / counts.sum()
            assert mean == pytest.approx(metrics[step][metric], abs=(edges[1] - edges[0]) / 2 + 1e-6)


def responses(root: Path) -> list[str]:
    return [record["response"] for record in read_jsonl(root / "dialogues.jsonl")]


def test_validation_samples_are_kept_for_each_beta(ilql_run: Path, tiny: Tiny) -> None:
    metrics = {row["step"]: row for row in metrics_of(ilql_run / "run")}
    for step in (0, 2, 4):
        records = read_jsonl(ilql_run / "run" / "validation" / f"step_{step}.jsonl")
        for beta in ("beta=0.0", "beta=4.0"):
            mine = [record for record in records if record["sampling"] == beta]
            assert [record["prompt"] for record in mine] == [row["prompt"] for row in read_jsonl(tiny.prompts)]
            mean = sum(record["score"] for record in mine) / len(mine)
            assert mean == pytest.approx(metrics[step][f"val/reward@{beta}"], abs=1e-5)
    page = (ilql_run / "run" / "report.html").read_text()
    assert "Validation samples of step 4" in page and "beta=0.0 (12 of 13" in page and "beta=4.0 (12 of 13" in page
    assert "Values at step 0" in page and "Values at step 4" in page


def test_without_validation_values_are_those_of_training_at_the_end(ilql_run: Path) -> None:
    (path,) = (ilql_run / "plain" / "values").iterdir()
    assert path.name == "step_1.jsonl" and not (ilql_run / "plain" / "validation").exists()
    assert "Values at step 1" in (ilql_run / "plain" / "report.html").read_text()


def test_a_report_that_fails_is_told_of_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_rlhf.cli import fit

    def fails(directory: Path) -> Path:
        raise RuntimeError("no space for curves")

    monkeypatch.setattr(fit, "write_report", fails)
    with pytest.warns(UserWarning, match="no space for curves"):
        fit._report(tmp_path)


def test_a_report_shows_no_password(tmp_path: Path) -> None:
    """Of a directory whose config.yaml has one, too."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "cost in $a$ per $b_$": 1.0, "val/x@t=$": 1, "val/x@t=$$": 2}\n'
    )
    (tmp_path / "config.yaml").write_text("store: postgresql://u:PASS@h/d\nurl: http://KEY@h/\n")
    page = write_report(tmp_path).read_text()
    assert "PASS" not in page and "KEY" not in page and "postgresql://u:***@h/d" in page
