"""Settings of the ``nemo-rlhf feedback`` commands, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SimulateConfig:
    """Of ``feedback simulate``.

    Raises:
        ValueError: there is no annotator, or the noise is no probability.
    """

    noise: float = 0.1  # chance that an annotator prefers the other answer
    annotators: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.annotators < 1:
            raise ValueError(f"--annotators {self.annotators}: there must be one or more.")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"--noise {self.noise} must be between 0 and 1.")


@dataclass(frozen=True)
class ServeConfig:
    """Of ``feedback serve``.

    Raises:
        ValueError: there is no such port.
    """

    host: str = "127.0.0.1"  # address to listen on; any that others can reach needs a secret
    port: int = 8765  # 0: a free one
    secret_file: str | None = None  # with what signs the sessions; None: of the environment, or made and kept
    allow_hosts: tuple[str, ...] = ()  # names under which browsers may ask, besides this machine's and any address

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port} must be between 0 (a free one) and 65535.")
