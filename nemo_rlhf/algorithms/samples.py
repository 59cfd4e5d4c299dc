"""What was sampled, in files that people and programs read: one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nemo_rlhf.parallel import checkpoint
from nemo_rlhf.rollout.score import total_scores
from nemo_rlhf.types import Sample, Scored

_DIGITS = 6
ROLLOUTS = "rollouts"
METADATA = "metadata"
# Fields of ours, whether a file has them or not. A field of a prompt that has such a name is in "metadata".
OURS = (
    "prompt",
    "response",
    "score",
    "scores",
    "kl",
    "advantage",
    "finish_reason",
    "num_tokens",
    "response_ids",
    "sampling",
    METADATA,
)


def sample_records(samples: Sequence[Sample], figures: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One record a sample: its prompt's fields (``beside_ours``), prompt, response, ``figures`` ([samples] each; null
    where one is not finite), how it ended, and its tokens."""
    return [
        {
            **beside_ours(sample.prompt.metadata),
            "prompt": sample.prompt.text,
            "response": sample.text,
            **{name: plain_number(values[row]) for name, values in figures.items()},
            "finish_reason": sample.finish_reason,
            "num_tokens": len(sample.response_ids),
            "response_ids": list(sample.response_ids),
        }
        for row, sample in enumerate(samples)
    ]


def beside_ours(fields: Mapping[str, Any], ours: Collection[str] = OURS) -> dict[str, Any]:
    """``fields`` of a prompt's record, those whose names are among ``ours`` in one mapping, "metadata"."""
    named_alike = {name: value for name, value in fields.items() if name in ours}
    others = {name: value for name, value in fields.items() if name not in ours}
    return others | ({METADATA: named_alike} if named_alike else {})


def rollout_records(scored: Scored, figures: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
    """The same of scored samples, with "score", and "scores" by source where rewards have named sources."""
    records = sample_records(scored.rollout.samples, {"score": total_scores(scored), **(figures or {})})
    for row, record in enumerate(records):
        if scored.by_source:
            record["scores"] = {name: plain_number(values[row]) for name, values in scored.by_source.items()}
    return records


def write_rollouts(run_dir: Path, step: int, records: Iterable[Mapping[str, Any]], keep: int | None) -> None:
    """``rollouts/step_N.jsonl``; of those before, the last ``keep - 1`` stay (None: all). All ranks call it."""
    write_records(run_dir / ROLLOUTS / f"step_{step}.jsonl", records)
    if keep is None or dist.get_rank() != 0:
        return
    for path in (run_dir / ROLLOUTS).glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and int(number) <= step - keep:
            path.unlink(missing_ok=True)


def plain_number(value: Tensor | float) -> float | None:
    return round(float(value), _DIGITS) if math.isfinite(value) else None


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Rank 0 writes them, one JSON object a line; all ranks call it."""

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for record in records:
                file.write(json.dumps(record, default=str) + "\n")

    checkpoint.on_rank_zero(write)
