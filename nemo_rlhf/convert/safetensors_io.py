"""The safetensors format at the level of bytes, so that tensors are read and written in parts and by several processes.

A file is the header's length (8 bytes, little-endian), the header (JSON, padded with spaces to 8 bytes) and the
tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nemo_rlhf.convert.files import Array
from nemo_rlhf.convert.mapping import Shape
from nemo_rlhf.untrusted import parse_json

# in the order in which the library lays tensors out
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


def read_arrays(path: Path, ignored: Callable[[str], bool]) -> dict[str, Array]:
    """Where each tensor of a file lies; ``ignored`` ones are left out.

    Raises ValueError when the file is damaged, or holds a tensor that is not of floating-point numbers.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header, and that the file is as long as it says
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): download or copy it again.") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length), str(path))
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__" or ignored(name):
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: tensor {name} is stored as {entry['dtype']}; floating-point weights are needed.")
        start, _ = entry["data_offsets"]
        arrays[name] = Array(path, 8 + length + start, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    return arrays


class Header(NamedTuple):
    """The first ``content`` of a file to write, where its tensors go, and how many bytes it has in all."""

    content: bytes
    arrays: dict[str, Array]
    size: int


def lay_out(path: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> Header:
    """Header and places of a file as ``safetensors.torch.save_file`` writes it for transformers, byte for byte."""
    order = sorted(tensors, key=lambda name: (_RANKS[tensors[name][1]], name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in order:
        shape, dtype = tensors[name]
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text
    arrays = {name: Array(path, len(content) + starts[name], *tensors[name]) for name in order}
    return Header(content, arrays, len(content) + end)
