"""Why a checkpoint has the tensors of a model under other names: what wrote it, and what helps."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_WRITERS = {
    "base_model.model.": "PEFT; merge its adapter with merge_and_unload() and save that",
    "_orig_mod.": "torch.compile; save the model that was compiled",
    "_fsdp_wrapped_module.": "FSDP; save the model's full state dict",
    "_forward_module.": "DeepSpeed or Lightning; save the wrapped model",
    "module.": "DistributedDataParallel or DeepSpeed; save the wrapped model",
    "language_model.": "a model of images and text; save its language model by itself",
    "model.": "a module around the model; save the model by itself",
}
_PARTS = {
    "lora_": "it holds a LoRA adapter that is not merged: merge it with merge_and_unload() and save that",
    "base_layer.": "it holds a LoRA adapter that is not merged: merge it with merge_and_unload() and save that",
    "qweight": "its weights are quantised: use the unquantised model",
    "weight_scale": "its weights are quantised: use the unquantised model",
    "weight_packed": "its weights are quantised: use the unquantised model",
    "quant_state": "its weights are quantised: use the unquantised model",
}


def reason(missing: Sequence[str], found: Collection[str]) -> str | None:
    """Why ``missing`` names are not among those of a checkpoint, in a few words; None where nothing tells."""
    for part, words in _PARTS.items():
        if any(part in name for name in found):
            return words
    wanted = missing[len(missing) // 2]
    for ending in (wanted, wanted.split(".", 1)[-1]):
        prefixed = [name for name in found if name.endswith(f".{ending}")]
        # "weight" alone ends many
        if len(prefixed) == 1 and ending.count(".") > 1:
            prefix = prefixed[0].removesuffix(ending)
            writer = next((words for start, words in _WRITERS.items() if start in prefix), "another program")
            return f"names there begin with {prefix!r}, which is of {writer}"
    return None
