"""``nemo-rlhf plan``: which cut of a model over a cluster, how much memory it takes and how fast it may be."""

from __future__ import annotations

from pathlib import Path

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.plan import PlanConfig
from nemo_rlhf.launch.models import ARCHITECTURES
from nemo_rlhf.launch.search import best_plans, why_nothing_fits
from nemo_rlhf.launch.show import as_yaml, show
from nemo_rlhf.launch.work import make_work


def run_plan(config: PlanConfig, count: int, write: Path | None) -> str:
    """Tables of the best ``count`` plans; the first one goes to the file ``write``, too.

    Raises:
        ValueError: there is no such model or directory, or no plan fits; it says what would.
    """
    if count < 1:
        raise ValueError(f"--top={count}: ask for at least one plan.")
    if write is not None and not write.parent.is_dir():
        raise ValueError(f"--write={write}: there is no directory {write.parent}, create it first.")
    asked = config.plan
    work = make_work(config, find_architecture(asked.model), _optional(asked.critic), _optional(asked.reward_model))
    proposals = best_plans(work, count)
    if not proposals:
        raise ValueError(why_nothing_fits(work))
    text = show(work, proposals)
    if write is not None:
        write.write_text(as_yaml(work, proposals[0]))
        text += f"\nPlan 1 is in {write}: nemo-rlhf {asked.algorithm} --config {write} key=value ...\n"
    return text


def _optional(name: str | None) -> Architecture | None:
    return None if name is None else find_architecture(name)


def find_architecture(name: str) -> Architecture:
    """Of a shipped model, or of the one in a directory."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if not Path(name).exists():
        raise ValueError(
            f"There is no model {name}: name the directory of one, or one of {', '.join(sorted(ARCHITECTURES))}."
        )
    from nemo_rlhf.convert.locate import read_architecture

    return read_architecture(name)
