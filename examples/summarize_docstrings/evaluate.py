"""Before and after PPO, side by side: greedy summaries of held-out docstrings, generated with plain transformers.

    python -m summarize_docstrings.evaluate SFT_HF_DIR PPO_HF_DIR heldout_prompts.jsonl

The models are the exported ones, so the export is tried as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from summarize_docstrings.corpus import PROMPT_SUFFIX
from summarize_docstrings.reward import rouge_l

MAX_NEW_TOKENS = 24
NUM_EXAMPLES = 3


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


@torch.no_grad()
def summarize(model_directory: Path, prompts: Sequence[str], batch_size: int = 128) -> list[str]:
    """Greedy continuations of ``prompts`` by the Hugging Face model in ``model_directory``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(str(model_directory), padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(str(model_directory), dtype=torch.float32)
    model.to(device).eval()
    summaries: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True).to(device)
        generated = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = generated[:, batch["input_ids"].shape[1] :]
        summaries.extend(tokenizer.batch_decode(new_tokens, skip_special_tokens=True))
    return [summary.strip() for summary in summaries]


def compare(
    before_directory: Path, after_directory: Path, heldout: Path, console: Console | None = None
) -> dict[str, float]:
    """Print the table and the examples. Returns ROUGE-L ``before`` and ``after`` and the relative ``rise``."""
    console = console or Console()
    transformers_logging.disable_progress_bar()
    records = read_jsonl(heldout)
    prompts = [record["prompt"] for record in records]
    references = [record["reference"] for record in records]
    before, after = summarize(before_directory, prompts), summarize(after_directory, prompts)
    scores = {"before": _mean_rouge(before, references), "after": _mean_rouge(after, references)}
    scores["rise"] = scores["after"] / scores["before"] - 1 if scores["before"] else float("inf")

    table = Table(title=f"ROUGE-L on {len(records)} held-out docstrings, greedy decoding")
    for heading in ("model", "ROUGE-L", "words in a summary"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    table.add_row("after SFT", f"{scores['before']:.4f}", f"{_mean_words(before):.1f}")
    table.add_row("after PPO", f"{scores['after']:.4f}", f"{_mean_words(after):.1f}")
    table.add_row("rise", f"{scores['rise']:+.0%}", "")
    console.print(table)
    console.print(_examples(prompts, references, before, after))
    return scores


def _examples(prompts: Sequence[str], references: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Table:
    table = Table(title="Three of them", show_lines=True)
    for heading in ("docstring", "reference", "after SFT", "after PPO"):
        table.add_column(heading, ratio=3 if heading == "docstring" else 2)
    for index in range(0, len(prompts), max(1, len(prompts) // NUM_EXAMPLES))[:NUM_EXAMPLES]:
        table.add_row(
            prompts[index].removesuffix(PROMPT_SUFFIX),
            references[index],
            f"{before[index]} ({rouge_l(before[index], references[index]):.2f})",
            f"{after[index]} ({rouge_l(after[index], references[index]):.2f})",
        )
    return table


def _mean_rouge(summaries: Sequence[str], references: Sequence[str]) -> float:
    return sum(map(rouge_l, summaries, references)) / len(references)


def _mean_words(summaries: Sequence[str]) -> float:
    return sum(len(summary.split()) for summary in summaries) / len(summaries)


def main() -> None:
    parser = argparse.ArgumentParser(description="ROUGE-L of two Hugging Face models on held-out docstrings.")
    parser.add_argument("before", type=Path, help="the model before PPO")
    parser.add_argument("after", type=Path, help="the model after PPO")
    parser.add_argument("heldout", type=Path, help="heldout_prompts.jsonl")
    options = parser.parse_args()
    compare(options.before, options.after, options.heldout)


if __name__ == "__main__":
    main()
