"""Whose kernels a run uses: chosen, said, and never fallen back from in silence; and what they are asked for."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode

from nemo_rlhf import device
from nemo_rlhf.convert.load import RandomSource, load_weights
from nemo_rlhf.parallel import attention, logprobs, state
from nemo_rlhf.parallel.gpt import build_gpt
from nemo_rlhf.parallel.libraries import choose_layer_spec, in_use
from nemo_rlhf.parallel.offload import Offload
from nemo_rlhf.parallel.packing import packed_texts
from nemo_rlhf.parallel.settings import transformer_config
from tests.spawn import ROOT
from tests.test_shapes import ARCHITECTURE

# ---- Transformer Engine, there or not, whole or broken


@pytest.fixture
def installed(import_from: Callable[[Path], None], tmp_path: Path) -> Callable[[str], None]:
    """Puts a package ``transformer_engine`` with this code in its torch part where Python finds it."""

    def install(code: str) -> None:
        package = tmp_path / "transformer_engine"
        (package / "pytorch").mkdir(parents=True)
        # as the real one, which hides a failed import
        (package / "__init__.py").write_text("try:\n    from . import pytorch\nexcept ImportError:\n    pass\n")
        (package / "pytorch" / "__init__.py").write_text(code)
        import_from(tmp_path)

    return install


def test_without_transformer_engine_layers_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    for on_gpu in (False, True):
        monkeypatch.setattr(device, "_CUDA", on_gpu)
        assert choose_layer_spec("auto") == choose_layer_spec("local") == "local"
        with pytest.raises(ValueError, match=r"Transformer Engine is not installed: .* model\.layer_spec=local"):
            choose_layer_spec("transformer_engine")


def test_a_broken_transformer_engine_is_an_error_on_a_gpu(
    installed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("raise ImportError('libcudnn.so.9: cannot open shared object file')")
    assert choose_layer_spec("auto") == "local"  # there is no GPU
    for asked, on_gpu in (("transformer_engine", False), ("auto", True)):
        monkeypatch.setattr(device, "_CUDA", on_gpu)
        with pytest.raises(ValueError, match=r"cannot be imported \(libcudnn\.so\.9: cannot open .*layer_spec=local"):
            choose_layer_spec(asked)
    assert choose_layer_spec("local") == "local"


def test_one_that_megatron_cannot_use_is_an_error_too(
    installed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("")
    monkeypatch.setattr(device, "_CUDA", True)
    with pytest.raises(ValueError, match=r"megatron-core 0\.\d+\.\d+ cannot use Transformer Engine"):
        choose_layer_spec("auto")


def test_what_is_in_use_is_said() -> None:
    said = in_use("local")
    assert said == {"layers": f"local, torch {torch.__version__}", "attention": "torch", "optimizer": "torch AdamW"}


# ---- packed texts


class _Asking(TorchFunctionMode):
    """Counts what would make a host wait for its GPU."""

    ASKS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.ASKS:
            self.asked.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_no_layer_of_packed_texts_asks_the_device() -> None:
    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    model = build_gpt(ARCHITECTURE)
    load_weights(model, RandomSource(ARCHITECTURE, 4), ARCHITECTURE)
    packing = packed_texts(torch.tensor([0, 5, 6, 15, 20]))
    tokens = torch.randint(0, ARCHITECTURE.vocab_size, (1, 20))
    model(tokens, packing.positions, packed_seq_params=packing)  # rotary angles are made once
    with _Asking() as mode:
        model(tokens, packing.positions, packed_seq_params=packing).sum().backward()
    assert mode.asked == []
    with _Asking() as mode:
        assert tokens.sum() > 0
    assert mode.asked == ["__bool__"]


def test_the_one_kernel_of_packed_texts_is_called_as_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the true signature of torch's; its body here is the slow way. What calls it runs on GPUs alone."""
    signature, bounds = inspect.signature(varlen.varlen_attn), [0, 5, 6, 15, 20]

    def body(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        asked: Any = SimpleNamespace(**given.arguments)
        assert asked.cu_seq_q.tolist() == asked.cu_seq_k.tolist() == bounds and asked.max_q == asked.max_k == 9
        assert asked.window_size == (2, 0) and asked.enable_gqa
        parts = []
        for start, end in pairwise(bounds):
            q, k, v = (x[start:end].unsqueeze(1) for x in (asked.query, asked.key, asked.value))
            hidden = attention.within_window(attention.later_queries(0, end - start, q.device), 3)
            part = attention.sdpa(q, k, v, hidden, False, asked.scale)
            parts.append(part.view(end - start, *asked.query.shape[1:]))
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", body)
    monkeypatch.setattr(body, "__signature__", signature, raising=False)
    attention._varlen_kernel.cache_clear()
    kernel = attention._varlen_kernel()
    attention._varlen_kernel.cache_clear()
    assert kernel is not None
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(20, heads, 8, generator=generator) for heads in (4, 2, 2))
    cu = torch.tensor(bounds, dtype=torch.int32)
    fast = kernel(query, key, value, cu, cu, 9, 9, 0.3, (2, 0)).reshape(20, -1)
    config = transformer_config(
        ARCHITECTURE, dtype=torch.float32, sequence_parallel=False, recompute=None, layer_spec="local"
    )
    core = attention.SDPACoreAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.3)
    core.window = 3
    torch.testing.assert_close(fast, core._packed(query, key, value, packed_texts(torch.tensor(bounds))))


# ---- what a GPU is asked for


def test_cudnn_attention_is_off_and_ranks_take_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(device, "_CUDA", True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "6")
    torch.backends.cuda.enable_cudnn_sdp(True)
    device.install()
    assert taken == [2] and not torch.backends.cuda.cudnn_sdp_enabled()


def test_products_in_fp32_are_what_the_configuration_says(tmp_path: Path) -> None:
    """Also where the environment allows TF32, as NVIDIA's containers do."""
    code = """
        import torch
        from nemo_rlhf.cli.rank import begin
        from nemo_rlhf.config.schema import HardwareConfig, ModelConfig
        before = torch.get_float32_matmul_precision()
        for precision in ("highest", "high"):
            begin(ModelConfig(), HardwareConfig(matmul_precision=precision), 0)
            print(before, torch.get_float32_matmul_precision())
    """
    env = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["high", "highest", "high", "high"]
    line = f"nemo-rlhf: layers: local, torch {torch.__version__}; attention: torch; optimizer: torch AdamW"
    assert [said for said in done.stderr.splitlines() if said.startswith("nemo-rlhf")] == [
        f"{line}; fp32 products: {precision} precision." for precision in ("highest", "high")
    ]


def test_logits_of_16_bit_weights_are_not_rounded_to_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs: torch is asked for a product in fp32. What it gives is played by the exact one."""
    hidden, weight = torch.randn(5, 64).bfloat16(), torch.randn(7, 64).bfloat16()
    exact = hidden.float() @ weight.float().t()
    original, asked = torch.mm, []

    def mm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        asked.append((a.dtype, out_dtype))
        return original(a.float(), b.float())

    class OnGPU(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(torch, "mm", mm)
    found = logprobs.fp32_product(hidden.as_subclass(OnGPU), weight)
    assert asked == [(torch.bfloat16, torch.float32)]
    torch.testing.assert_close(torch.Tensor(found), exact, rtol=0, atol=1e-5)
    monkeypatch.undo()
    rounded = logprobs.fp32_product(hidden, weight)
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() > 1e-3


def test_pinned_memory_is_as_large_as_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the next power of two, and given back with its holder."""
    locked: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            locked[address] = size
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            del locked[address]

    monkeypatch.setattr(device, "_CUDA", True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(device, "synchronize", lambda: None)
    tensors = [torch.randn(1000), torch.randn(3, 70)]
    kept = [tensor.clone() for tensor in tensors]
    offload = Offload(tensors)
    assert sorted(locked.values()) == [840, 4000]
    offload.out()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
    offload.back()
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    del offload
    gc.collect()
    assert locked == {}


def test_memory_that_cannot_be_locked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = SimpleNamespace(cudaHostRegister=lambda *given: 2)
    monkeypatch.setattr(device, "_CUDA", True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(RuntimeError, match=r"CUDA cannot lock 0\.0 GiB of host memory \(error 2\): raise the limit"):
        device.pinned_empty(100)
