"""Jobs of two nodes under a real SLURM that lose signals, ranks, cables and nodes, and end as if nothing had been."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REWARDS, Tiny
from tests.jobs import FROM_OUTSIDE, metrics_of, rollouts_of
from tests.slurm import Cluster, Jobs, cluster, job_state, program_of, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

STEPS = 5
ACROSS = ("trainer.num_nodes=2", "trainer.devices=1", "model.tensor_model_parallel_size=2")
ONE_NODE = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
# with ranks dealt out node by node, those that share a layer are on two nodes
WIDE = ("trainer.num_nodes=2", "trainer.devices=2", ACROSS[-1], "slurm.options=['--distribution=cyclic']")
SILENCE_S = 5


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name in FROM_OUTSIDE:  # jobs inherit the environment of who submits them
            patch.delenv(name, raising=False)
        patch.chdir(tmp_path)
        with cluster() as made:
            yield made


def ppo(tiny: Tiny, name: str, *words: str) -> list[str]:
    return tiny.ppo(
        Path(name), f"trainer.max_steps={STEPS}", "trainer.val_check_interval=0", "ppo.epochs=1",
        f"trainer.heartbeat_timeout_s={SILENCE_S}", "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        f"reward.function={REWARDS}:held_until_stopped", *words,
    )  # fmt: skip


class Chain:
    """A job that is disturbed in every attempt, while it scores the samples of a step."""

    def __init__(self, jobs: Jobs, name: str, job: str) -> None:
        self.jobs, self.name, self.job, self.attempt = jobs, name, job, 0

    def reached(self) -> None:
        self.jobs.wait_until((self.jobs.root / f"hold.reached_{self.name}_{self.attempt}").exists)

    def goes_back(self, code: int, step: int) -> str:
        """Wait until it does; returns what ``said`` did."""
        at = f"{self.name}/checkpoints/step_{step}" if step else "no checkpoint"
        self.jobs.wait_until(lambda: f"attempt {self.attempt + 1} on " in self.jobs.log(self.name, self.job))
        said = self.said()
        assert f"exit code {code} after {at}; back into the queue." in said
        self.attempt += 1
        return said

    def stops(self, name: str, step: int) -> None:
        """Wait until a signal has made it go back."""
        self.goes_back(75, step)
        ended = (
            f"nemo-rlhf: {name} ended the run after step {step}, which is saved; the same command goes on from there."
        )
        assert ended in self.log_of(0, self.attempt - 1)

    def log_of(self, rank: int, attempt: int) -> str:
        logs = self.jobs.root / "logs" / f"{self.name}-{self.job}" / f"attempt_{attempt}"
        return (logs / f"rank_{rank}.log").read_text()

    def said(self) -> str:
        """What the attempt has left in the job's log."""
        return self.jobs.log(self.name, self.job).split("nemo-rlhf slurm: attempt ")[self.attempt + 1]


def test_a_job_survives(slurm: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    """Of three jobs that are the same run: one is left alone, on one node; one, TP2 x DP2 over two nodes, sees its time
    limit come; and one has everything happen to it, and ends on one node."""
    hold = tmp_path / "hold"
    hold.touch()
    jobs = Jobs(tmp_path, REWARD_HOLD=str(hold))
    chain = Chain(jobs, "chain", jobs.submit("chain", *ppo(tiny, "chain", *ACROSS)))
    late = Chain(jobs, "late", jobs.submit("late", *ppo(tiny, "late", *WIDE, "slurm.time=1", "slurm.signal_s=55")))

    late.stops("SIGUSR1", 1)
    subprocess.run(["scancel", late.job], check=True)

    chain.reached()
    subprocess.run(["scancel", "--signal=USR1", chain.job], check=True)
    chain.stops("SIGUSR1", 1)
    for step, warned, name in ((2, True, "SIGUSR1"), (3, False, "SIGTERM")):
        chain.reached()
        slurm.warn_preempted(warned)
        jobs.preempt()
        chain.stops(name, step)

    chain.reached()
    program_of(chain.job, 1).send_signal(signal.SIGKILL)
    said = chain.goes_back(137, 3)
    assert f"rank 1 on n2 ended first, with exit code 137; the end of {tmp_path}/logs/" in said

    chain.reached()
    slurm.cut("n2")
    n = chain.attempt
    jobs.wait_until(lambda: "no sign of life" in chain.log_of(0, n) and "no answer from rank 0" in chain.log_of(1, n))
    slurm.plug("n2")
    said = chain.goes_back(1, 3)
    assert "no sign of life from rank 1 on n2 for 5 s, last in step 4, rollout; rank 0 on n1 is in step 4" in said

    chain.reached()
    slurm.crash("n1")  # the script of the job runs there, and rank 0
    elsewhere = "slurm.options=['--exclude=n1']"  # SLURM takes some seconds to notice
    alone = jobs.submit("alone", *ppo(tiny, "alone", *ONE_NODE, elsewhere, f"reward.function={REWARDS}:count_a"))
    jobs.wait_until(lambda: job_state(chain.job) == "PENDING")
    subprocess.run(["scancel", chain.job], check=True)
    hold.unlink()
    again = jobs.submit("again", *ppo(tiny, "chain", *ONE_NODE))
    assert jobs.finished(alone) == jobs.finished(again) == "COMPLETED"
    assert_same_step(tmp_path / "late", tmp_path / "alone", 1)
    assert metrics_of(tmp_path / "chain") == metrics_of(tmp_path / "alone")
    assert rollouts_of(tmp_path / "chain") == rollouts_of(tmp_path / "alone")


def assert_same_step(found: Path, expected: Path, step: int) -> None:
    """Under another cut: but for rounding."""
    one, other = (metrics_of(run_dir)[step - 1] for run_dir in (found, expected))
    assert one == pytest.approx(other, rel=1e-3, abs=2e-5)
    samples = [[row["response"] for row in rollouts_of(run_dir)[f"step_{step}"]] for run_dir in (found, expected)]
    assert samples[0] == samples[1]
