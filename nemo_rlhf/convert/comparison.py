"""Proof that a Hugging Face directory and a Megatron checkpoint are the same model: both are run, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.checkpoint import WEIGHTS
from nemo_rlhf.convert.load import load_weights, open_source
from nemo_rlhf.convert.locate import read_architecture, resolve_restore_from
from nemo_rlhf.convert.token_ids import open_tokenizer
from nemo_rlhf.parallel import manifest, state
from nemo_rlhf.parallel.gpt import GPT, Role, build_gpt

_RANDOM_PROMPTS, _RANDOM_LENGTH = 4, 48
# what rounding explains, relative to the largest number: of fp32 sums in another order, and of bf16's 8 bits
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Agreement:
    """How far two models agree in one precision. ``max_abs_difference`` and ``cosine`` (the lowest of all tokens) are
    of logits (values of a critic), ``top1`` is the share of tokens whose likeliest successor is the same.
    ``first_diverging`` names the first part whose output differs by more than rounding explains; None: they agree."""

    dtype: str
    num_tokens: int
    max_abs_difference: float
    cosine: float
    top1: float
    first_diverging: str | None


@dataclass(frozen=True)
class _Trace:
    """What a model computes for one prompt: the hidden states [S, H] behind the embedding and behind each layer, and
    logits [S, vocabulary] (values [S, 1]), fp32 on the host."""

    hidden: tuple[Tensor, ...]
    logits: Tensor


def verify(hf_dir: str | Path, ckpt_dir: str | Path, prompts: Sequence[str] = ()) -> tuple[Agreement, ...]:
    """Compare a Hugging Face model with a Megatron checkpoint in fp32 and, on a CUDA device, in bf16.

    One model is in memory at a time, in the precision compared. Runs in one process, which need not be prepared.

    Args:
        prompts: texts to compare on; without any, random tokens.

    Raises:
        ValueError: one of the directories holds no such model, or they hold models of different shapes.
    """
    (hf_form, hf_dir), (form, ckpt_dir) = resolve_restore_from(hf_dir), resolve_restore_from(ckpt_dir)
    if (hf_form, form) != ("hf", "megatron"):
        raise ValueError(
            f"{hf_dir if hf_form != 'hf' else ckpt_dir} is of the other format: give HF_DIR, then CKPT_DIR."
        )
    architecture, theirs = read_architecture(ckpt_dir), read_architecture(hf_dir)
    for name in ("family", "num_layers", "hidden_size", "vocab_size", "heads"):
        ours, other = getattr(architecture, name), getattr(theirs, name)
        if ours != other:
            raise ValueError(f"{ckpt_dir} and {hf_dir} are different models: {name} is {ours} and {other}.")
    manifest.check(ckpt_dir, WEIGHTS)
    tokens = _tokens(hf_dir, architecture, prompts)
    dtypes = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]
    return tuple(
        compare(_run_hugging_face(hf_dir, tokens, dtype), _run_megatron(ckpt_dir, architecture, tokens, dtype), dtype)
        for dtype in dtypes
    )


def _tokens(hf_dir: Path, architecture: Architecture, prompts: Sequence[str]) -> list[Tensor]:
    """Token ids [1, S] of each prompt."""
    if not prompts:
        generator = torch.Generator().manual_seed(0)
        size = (_RANDOM_PROMPTS, 1, min(_RANDOM_LENGTH, architecture.max_position_embeddings))
        return list(torch.randint(architecture.vocab_size, size, generator=generator))
    tokenizer = open_tokenizer(hf_dir)
    encoded = [tokenizer(prompt)["input_ids"][: architecture.max_position_embeddings] for prompt in prompts]
    if empty := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if not ids]:
        raise ValueError(f"The prompt {empty[0]!r} has no tokens: give one with text.")
    return [torch.tensor([ids]) for ids in encoded]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _run_hugging_face(hf_dir: Path, tokens: Sequence[Tensor], dtype: torch.dtype) -> list[_Trace]:
    import transformers

    careful = {"trust_remote_code": False, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(hf_dir, **careful)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(hf_dir, dtype=dtype, **careful).to(_device()).eval()
    blocks = next(m for m in model.base_model.children() if isinstance(m, torch.nn.ModuleList))
    head = model.score if hasattr(model, "score") else model.get_output_embeddings()

    def run(ids: Tensor) -> Tensor:
        return head(model.base_model(ids, use_cache=False).last_hidden_state)[0]

    return _trace(tokens, run, blocks, lambda hidden: hidden[0])


@torch.no_grad()
def _run_megatron(
    ckpt_dir: str | Path, architecture: Architecture, tokens: Sequence[Tensor], dtype: torch.dtype
) -> list[_Trace]:
    if not torch.distributed.is_initialized():
        state.set_environment_for_one_process()
    state.initialize(tensor_parallel=1, pipeline_parallel=1, seed=0)
    role: Role = "critic" if architecture.heads else "policy"
    model: GPT = build_gpt(architecture, role=role, dtype=dtype).eval()
    load_weights(model, open_source(ckpt_dir), architecture)

    def run(ids: Tensor) -> Tensor:
        hidden = model(ids, torch.arange(ids.size(1), device=ids.device)[None])[:, 0]
        if role == "critic":
            return model.value_head(hidden)[:, None]
        return model.output_logits(hidden)[:, : architecture.vocab_size]

    return _trace(tokens, run, model.decoder.layers, lambda hidden: hidden[:, 0])


def _trace(
    tokens: Sequence[Tensor],
    run: Callable[[Tensor], Tensor],
    layers: torch.nn.ModuleList,
    of_one: Callable[[Tensor], Tensor],
) -> list[_Trace]:
    """``of_one`` takes hidden states [S, H] out of what passes between layers for a batch of one."""
    traces = []
    for ids in tokens:
        with _watching(layers) as seen:
            logits = run(ids.to(_device()))
        traces.append(_Trace(tuple(of_one(hidden).float().cpu() for hidden in seen), logits.float().cpu()))
    return traces


@contextmanager
def _watching(layers: torch.nn.ModuleList) -> Iterator[list[Tensor]]:
    """Fills the list with what goes into the first layer, and what comes out of each."""
    seen: list[Tensor] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def behind(_: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(behind) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compare(left: Sequence[_Trace], right: Sequence[_Trace], dtype: torch.dtype) -> Agreement:
    """Of the same prompts."""
    logits = [torch.cat([trace.logits for trace in side]) for side in (left, right)]
    parts = [
        torch.cat([trace.hidden[i] for trace in side]) for i in range(len(left[0].hidden)) for side in (left, right)
    ]
    names = ["the embedding", *(f"layer {i}" for i in range(len(left[0].hidden) - 1)), "the output layer or final norm"]
    pairs = [*zip(parts[::2], parts[1::2], strict=True), (logits[0], logits[1])]
    diverging = (name for name, pair in zip(names, pairs, strict=True) if _differ(*pair, _TOLERANCES[dtype]))
    return Agreement(
        dtype=str(dtype).removeprefix("torch."),
        num_tokens=logits[0].size(0),
        max_abs_difference=float((logits[0] - logits[1]).abs().max()),
        cosine=float(torch.nn.functional.cosine_similarity(logits[0], logits[1], dim=-1).min()),
        top1=float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()),
        first_diverging=next(diverging, None),
    )


def _differ(left: Tensor, right: Tensor, tolerance: float) -> bool:
    scale = max(1.0, float(left.abs().max()))
    return not float((left - right).abs().max()) <= tolerance * scale  # NaN differs from everything
