"""Rules between the keys of ILQL."""

from __future__ import annotations

from nemo_rlhf.config.schema import ILQLConfig


def check_ilql_validation(cfg: ILQLConfig) -> None:
    if cfg.reward.function is not None and cfg.data.validation_prompts is None:
        raise ValueError(
            f"reward.function={cfg.reward.function} scores samples of validation, but data.validation_prompts is null: "
            "name prompts, or leave the function out."
        )


def check_value_trunk(cfg: ILQLConfig) -> None:
    if cfg.ilql.value_trunk and cfg.ilql.detach_heads:
        raise ValueError(
            "ilql.detach_heads=true would leave the trunk of ilql.value_trunk=true untaught, and the policy's learns "
            "nothing from the heads anyway: leave one of the two out."
        )
