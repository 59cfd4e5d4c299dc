"""What one process of the pre-flight step finds on its node: files, space, GPUs, libraries, the node's own address."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import ipaddress
import os
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

import nemo_rlhf

_LIBRARIES = ("torch", "megatron-core", "nemo_toolkit", "transformers", "transformer-engine", "flash-attn", "apex")
# Modules that megatron-core does without, and says nothing, where they are installed and broken.
_ACCELERATORS = {"transformer-engine": "transformer_engine.pytorch", "flash-attn": "flash_attn"}


def versions() -> str:
    """Of what must be the same everywhere; of this package its very files, as a checkout may be a stale copy."""
    root, digest = Path(nemo_rlhf.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    found = {name: _version(name) for name in _LIBRARIES}
    found["cuDNN"] = str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
    libraries = ", ".join(f"{name} {known or 'not installed'}" for name, known in found.items())
    return f"nemo_rlhf {nemo_rlhf.__version__} ({digest.hexdigest()[:8]}), {libraries}"


def problem(node: str, local: int, options: argparse.Namespace) -> str | None:
    """What keeps this process from doing its part, in words that follow the name of its node."""
    try:
        os.stat(options.reads)
    except OSError as error:
        return f"does not see {options.reads} ({error.strerror})"
    probe = Path(options.writes) / f".preflight_{node}_{local}"
    try:
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(options.writes).free / 2**30
    except OSError as error:
        return f"cannot write to {options.writes} ({error.strerror})"
    if free < options.min_free_gib:
        return f"has {free:.1f} GiB free at {options.writes}, less than slurm.min_free_gib={options.min_free_gib:g}"
    if options.gpus and torch.cuda.device_count() < options.gpus and only_device() is None:
        return f"has {torch.cuda.device_count()} GPUs that work, not {options.gpus}"
    if len(options.nodes) > 1 and (address := _loopback()):
        return (
            f"takes its own name, {socket.gethostname()}, for {address}, where no other node reaches it: set "
            "GLOO_SOCKET_IFNAME in slurm.environment to the interface that joins the nodes"
        )
    return _broken_accelerators() if options.gpus else None  # without a driver they cannot be imported


def only_device() -> str | None:
    """UUID of the GPU of this process where it sees no other, as SLURM may bind one to each task."""
    return str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.device_count() == 1 else None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _broken_accelerators() -> str | None:
    said = []
    for distribution, module in _ACCELERATORS.items():
        if (found := _version(distribution)) is None:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a library that was built for another one makes of it is the finding
            words = " ".join(str(error).split())[:200]
            said.append(f"has {distribution} {found}, but cannot import {module} ({type(error).__name__}: {words})")
    return " and ".join(said) or None


def _loopback() -> str | None:
    """The address that gloo would give to other nodes as ours, where it is one that only this node reaches.

    Without GLOO_SOCKET_IFNAME it takes the first address of the host's name that is ours, or else that of localhost.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    try:
        known = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        known = []
    for family, kind, protocol, _, address in known:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
        found = str(address[0]).partition("%")[0]
        return found if ipaddress.ip_address(found).is_loopback else None
    return "127.0.0.1"
