"""The report page: what it shows, and what it does with damaged or missing files."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_rlhf.cli.plots import MAX_POINTS, Curve, Panel, draw, thinned
from nemo_rlhf.cli.report import panels, read_jsonl, write_report

PPO_ROW = {
    "reward/mean": 0.5, "reward/std": 0.1, "kl/mean": 0.0, "kl/coef": 0.02, "entropy/mean": 2.0, "loss/policy": 0.1,
    "loss/value": 0.2, "ratio/mean": 1.0, "clipfrac/policy": 0.0, "clipfrac/value": 0.0,
    "value/explained_variance": 0.3, "grad_norm/policy": 1.0, "grad_norm/critic": 2.0, "lr/policy": 1e-6,
    "response_length/mean": 30, "eos/share": 0.9, "check/ratio_step0": 1.0, "check/kl_step0": 0.0,
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
        "Explained variance of values", "Response length", "Responses that ended", "Losses", "Clipped share",
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


def test_samples_of_the_last_rollouts_are_escaped_and_cut(tmp_path: Path) -> None:
    rollouts = tmp_path / "rollouts"
    rollouts.mkdir()
    row = {"prompt": "a" * 5000 + "THE END", "response": "<script>alert(1)</script>" + "b" * 5000, "score": 0.25,
           "finish_reason": "eos", "num_tokens": 12, "reference": "unseen"}  # fmt: skip
    chat = {"prompt": [{"role": "user", "content": "hi"}], "response": "hello", "score": 1}
    (rollouts / "step_9.jsonl").write_text(json.dumps({"prompt": "older", "response": "x", "score": 0}) + "\n")
    (rollouts / "step_10.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(chat) + "\n")
    (tmp_path / "config.yaml").write_text("seed: 1 # <b>\n")
    page = write_report(run_dir(tmp_path, [{"step": 10, "loss": 1.0}])).read_text()
    assert "Samples of step 10 (2 of 2)" in page and "older" not in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "THE END" in page and "a" * 2000 not in page and "b" * 2000 not in page
    assert "<td class='number'>0.25</td><td>eos</td><td class='number'>12</td>" in page
    assert "&quot;content&quot;: &quot;hi&quot;" in page
    assert "seed: 1 # &lt;b&gt;" in page


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
