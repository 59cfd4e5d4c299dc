"""The checks before a job starts, with a process for each node: what each finds, and that all can sum together."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from nemo_rlhf import device
from nemo_rlhf.cli import preflight, preflight_node, preflight_sum
from tests.jobs import ROOT, with_program
from tests.spawn import run_distributed

pytestmark = pytest.mark.usefixtures("outside_of_any_job")


def check_nodes(
    tmp_path: Path, *of_nodes: dict[str, str], absent: int = 0, inside: Sequence[str] = ()
) -> tuple[int, str]:
    """Exit code and words of the pre-flight step with a process on each node, ``of_nodes`` being what differs there."""
    names = [f"n{index + 1}" for index in range(len(of_nodes) + absent)]
    program = Path(sys.executable).parent / "nemo-rlhf"
    command = [str(program), "preflight", f"--reads={ROOT}", f"--writes={tmp_path}"]
    command = [*inside, *command, "--timeout-s=8", "--nodes", *names]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1] - 1
    processes: list[subprocess.Popen[str]] = []
    for rank, differs in enumerate(of_nodes):
        task = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(len(names)), "SLURM_LOCALID": "0"}
        place = {"SLURMD_NODENAME": names[rank], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env = {**with_program(), **task, **place, "GLOO_SOCKET_IFNAME": "lo", **differs}
        processes.append(
            subprocess.Popen(
                command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [process.communicate(timeout=60)[0] for process in processes]
    codes = {process.returncode for process in processes}
    assert len(codes) == 1, said
    return codes.pop(), "".join(said)


CHOSEN = "set GLOO_SOCKET_IFNAME in slurm.environment to the interface that joins the nodes"


def test_the_bad_node_is_named_before_anything_starts(tmp_path: Path) -> None:
    code, said = check_nodes(tmp_path, {}, {}, {"GLOO_SOCKET_IFNAME": "nothing0"})
    assert code == 1
    pattern = rf"pre-flight: n3 and n1 cannot sum a tensor over the network \(.*nothing0.*\): {CHOSEN}\.\n"
    assert re.fullmatch(pattern, said), said
    other = tmp_path / "other"
    shutil.copytree(ROOT / "nemo_rlhf", other / "nemo_rlhf")
    (other / "nemo_rlhf" / "types.py").write_text("# stale\n")
    code, said = check_nodes(tmp_path, {}, {"PYTHONPATH": str(other)}, absent=1)
    assert code == 1 and said.startswith("pre-flight: n3 was not heard of within 8 s.\n")
    said = said.partition("\n")[2]
    assert re.fullmatch(r"pre-flight: n2 has nemo_rlhf [\d.]+ \(\w+\), .*, but n1 has nemo_rlhf .*\.\n", said), said


# a node of another name, which its files take for the address in $1
RENAMED = """
hostname node-of-a-test
echo "$1 node-of-a-test" >hosts
mount --bind hosts /etc/hosts
shift
unset GLOO_SOCKET_IFNAME
exec "$@"
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False).returncode != 0,
    reason="only root may give a process another host name",
)
@pytest.mark.parametrize("address", ["127.0.1.1", "::1"])
def test_a_name_that_no_other_node_reaches_is_told(address: str, tmp_path: Path) -> None:
    inside = ["unshare", "--uts", "--mount", "bash", "-c", RENAMED, "node", address]
    code, said = check_nodes(tmp_path, {}, {}, inside=inside)
    assert code == 1
    why = f"takes its own name, node-of-a-test, for {address}, where no other node reaches it: {CHOSEN}"
    assert said == f"pre-flight: n1 {why}.\npre-flight: n2 {why}.\n"
    code, said = check_nodes(tmp_path, {"NCCL_SOCKET_IFNAME": "=lo"}, {"NCCL_SOCKET_IFNAME": "lo"}, inside=inside)
    assert code == 0 and said.startswith("pre-flight: 2 nodes are fine: nemo_rlhf "), said


def test_versions_are_said_of_what_is_there_and_of_what_is_not(tmp_path: Path) -> None:
    code, said = check_nodes(tmp_path, {})
    assert code == 0
    assert re.search(r", transformer-engine not installed, flash-attn not installed, apex not installed, ", said), said
    assert re.search(r", cuDNN (\d+|not installed), NCCL (\d+\.\d+\.\d+|not installed)\.\n$", said), said
    install(tmp_path / "other", "transformer_engine", "2.7.0", "")
    code, said = check_nodes(tmp_path, {}, {"PYTHONPATH": f"{ROOT}:{tmp_path / 'other'}"})
    assert code == 1 and ", transformer-engine 2.7.0, " in said and ", transformer-engine not installed, " in said


def install(place: Path, name: str, version: str, code: str) -> None:
    """A distribution with one package, as pip would."""
    (place / name).mkdir(parents=True)
    (place / name / "__init__.py").write_text(code)
    info = place / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")


def test_an_accelerator_that_cannot_be_imported_is_told(
    tmp_path: Path, import_from: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU pre-flight does not import them: they may need the driver."""
    te = tmp_path / "transformer_engine"
    install(tmp_path, "transformer_engine", "2.7.0", "try:\n    from . import pytorch\nexcept ImportError:\n    pass\n")
    (te / "pytorch.py").write_text("raise ImportError('undefined symbol:\\n_ZN3c10')\n")
    install(tmp_path, "flash_attn", "2.7.4", "raise RuntimeError('built for sm_90')\n")
    import_from(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    options = Namespace(reads=str(tmp_path), writes=str(tmp_path), min_free_gib=0.0, gpus=8, nodes=["n1"])
    assert preflight_node.problem("n1", 0, options) == (
        "has transformer-engine 2.7.0, but cannot import transformer_engine.pytorch (ImportError: undefined symbol: "
        "_ZN3c10) and has flash-attn 2.7.4, but cannot import flash_attn (RuntimeError: built for sm_90)"
    )
    (te / "pytorch.py").write_text("")
    shutil.rmtree(tmp_path / "flash_attn-2.7.4.dist-info")  # then megatron-core's own search does not find it either
    sys.modules.pop("transformer_engine", None)
    importlib.invalidate_caches()
    assert preflight_node.problem("n1", 0, options) is None
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    assert preflight_node.problem("n1", 0, options) == "has 7 GPUs that work, not 8"


def test_one_visible_gpu_for_each_task_is_enough_where_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Namespace(uuid=f"GPU-{index}"))
    options = Namespace(reads=str(tmp_path), writes=str(tmp_path), min_free_gib=0.0, gpus=2, nodes=["n1"])
    assert preflight_node.problem("n1", 1, options) is None
    assert preflight_node.only_device() == "GPU-0"
    places = [("n1", 0), ("n1", 1), ("n2", 0), ("n2", 1)]

    def complaints(*devices: str | None) -> list[str]:
        found = [{"node": n, "local": i, "device": d} for (n, i), d in zip(places, devices, strict=True)]
        return preflight._shared_devices(found)

    assert complaints("a", "b", "a", "b") == []
    assert complaints(None, None, None, None) == []  # each sees all
    (said,) = complaints("a", "b", "c", "c")
    assert said.startswith("n2 shows its tasks 0, 1 the same single GPU (c): ")


@pytest.mark.parametrize(("visible", "devices"), [(8, [0, 5, 7]), (1, [0, 0, 0]), (4, [0, 1, 3])])
def test_a_rank_finds_its_device_among_those_that_it_sees(
    visible: int, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("nemo_rlhf.device._CUDA", True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    for rank in (0, 5, 7):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        device.install()
    assert chosen == devices


class Nodes(preflight_sum.Reduction):
    """All on one host, and each fails in the all-reduce when it is told to."""

    def __init__(self, store: dist.Store, rank: int, fails_after_s: dict[int, float]) -> None:
        super().__init__(store, rank, len(fails_after_s), on_gpus=False)
        self._fails_after_s = fails_after_s[rank]

    def _everybody(self) -> None:
        time.sleep(self._fails_after_s)
        raise RuntimeError(f"rank {self._rank} is cut off")

    def _pair(self, node: str, place: int) -> None:
        pass


@pytest.mark.parametrize(
    ("fails_after_s", "said"),
    [
        ({0: 9.0, 1: 9.0, 2: 0.0}, "the all-reduce of all failed on n3 (rank 2 is cut off)"),
        (
            {0: 0.5, 1: 0.0, 2: 0.5},
            "the all-reduce of all failed on every node, and no single one was found to be at fault: each reaches n1 "
            "over its host's network (heard first, from n2: rank 1 is cut off)",
        ),
    ],
)
def test_no_node_is_named_where_all_fail(
    fails_after_s: dict[int, float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_sum, "WORDS_S", 1.0)
    store, names = dist.HashStore(), ["n1", "n2", "n3"]
    for rank in (1, 2):
        node = Nodes(store, rank, fails_after_s)
        threading.Thread(target=node.follow, args=(names[rank], 0), daemon=True).start()
    assert Nodes(store, 0, fails_after_s).lead([{"node": name} for name in names]) == [said]
    store.set("verdict", "bad")


class OnGpus(preflight_sum.Reduction):
    """NCCL has nothing to complain of."""

    def _on_devices(self) -> None:
        pass


def test_gloo_must_work_too_where_nccl_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for interface, said in (("lo", []), ("nothing0", [f"n2 and n1 cannot sum a tensor .*nothing0.*: {CHOSEN}"])):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        other = OnGpus(store.clone(), 1, 2, on_gpus=True)
        follower = threading.Thread(target=other.follow, args=("n2", 0), daemon=True)
        follower.start()
        found = OnGpus(store, 0, 2, on_gpus=True).lead([{"node": "n1"}, {"node": "n2"}])
        assert len(found) == len(said) and all(map(re.fullmatch, said, found)), found
        store.set("verdict", "bad")
        follower.join()


def test_a_node_whose_mount_is_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str, *more: Any, **named: Any) -> NoReturn:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    options = Namespace(reads="x" * 300, writes=str(tmp_path), min_free_gib=0.0, gpus=0, nodes=["n1"])
    assert preflight_node.problem("n1", 0, options) == f"does not see {options.reads} (File name too long)"
    options.reads = str(tmp_path)
    assert preflight_node.problem("n1", 0, options) is None
    monkeypatch.setattr(shutil, "disk_usage", broken)
    assert preflight_node.problem("n1", 0, options) == f"cannot write to {tmp_path} (Stale file handle)"


def test_ranks_of_the_run_sum_together_before_anything_else() -> None:
    """NCCL says here that two ranks have the same device."""
    for called in run_distributed("tests.workers.state_worker:first_calls", 2, timeout_s=120):
        assert called[:2] == ["init_process_group", "all_reduce"] and "new_group" in called[2:]
