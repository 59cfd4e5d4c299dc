"""What ``generation.*`` means for rollouts and for validation: one list among its keys is a sweep in validation."""

from __future__ import annotations

from typing import Any

from nemo_rlhf.config.schema import GenerationConfig, SamplingConfig

# Keys whose value may be a list, with the type of one value.
SWEEPABLE: dict[str, type[int] | type[float]] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
    "beta": float,
}
_LISTS = ("stop", "stop_token_ids")


def sampling_values(generation: SamplingConfig) -> dict[str, Any]:
    """Settings of rollouts (and of ``generate``), the first value where a list is given: the keys of
    ``SWEEPABLE``, ``stop`` and ``stop_token_ids`` as tuples, ``ignore_eos``, ``adv_clip``."""
    values: dict[str, Any] = {key: kind(_first(getattr(generation, key))) for key, kind in SWEEPABLE.items()}
    lists = {key: tuple(getattr(generation, key)) for key in _LISTS}
    return {**values, **lists, "ignore_eos": generation.ignore_eos, "adv_clip": generation.adv_clip}


def sampling_sweep(generation: GenerationConfig) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """Settings of rollouts, and of each validation as ``(suffix, settings)``.

    The suffix is empty, or ``@temperature=0.7`` where a list sweeps the temperature. A list in ``generation`` is
    swept whatever ``generation.validation`` says of that key; every other key of ``validation`` that is not null
    takes the place of its namesake.
    """
    rollout = sampling_values(generation)
    validation = dict(rollout)
    for key in (*SWEEPABLE, "ignore_eos"):
        value = getattr(generation.validation, key)
        if value is not None and not isinstance(value, list):
            validation[key] = SWEEPABLE.get(key, bool)(value)
    for key in _LISTS:
        if (given := getattr(generation.validation, key)) is not None:
            validation[key] = tuple(given)
    for section in (generation, generation.validation):
        for key, kind in SWEEPABLE.items():
            values = getattr(section, key)
            if isinstance(values, list):
                return rollout, [(f"@{key}={kind(value)}", {**validation, key: kind(value)}) for value in values]
    return rollout, [("", validation)]


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value
