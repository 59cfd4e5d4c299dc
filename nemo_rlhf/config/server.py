"""The section ``server`` of ``nemo-rlhf serve-reward``: where it listens and what it takes; and its rules."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass
class ServerConfig:
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all of this machine's, which needs a token
    port: int = 8000  # 0: a free one
    url_file: str | None = None  # file that holds the address while the server is ready; null: none
    token_env: str | None = None  # environment variable with the token that clients must send; null: none
    batch_size: int = 64  # samples that are scored together, of however many requests
    max_body_mib: int = 16  # largest request
    normalise: bool = False  # scores minus the mean of those on held-out data, divided by their deviation


def check_server(server: ServerConfig) -> None:
    """Whoever can reach the port can use the model: beyond this machine that takes a token."""
    if not is_local(server.host) and server.token_env is None:
        raise ValueError(
            f"server.host={server.host} lets other machines in: set server.token_env to the name of an environment "
            "variable that holds a token, or keep server.host=127.0.0.1."
        )


def is_local(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
