"""People in the loop: the preference store, and the web page on which people compare a policy's answers.

Nothing here imports torch, and nothing of it is imported before a run or a command asks for it, because its libraries
come with the extra ``feedback`` only.
"""

from __future__ import annotations

from importlib.util import find_spec

_LIBRARIES = (
    "sqlalchemy",
    "alembic",
    "fastapi",
    "uvicorn",
    "jinja2",
    "markdown_it",
    "itsdangerous",
    "python_multipart",
    "krippendorff",
)


def require_libraries() -> None:
    """Raises ValueError where the extra is not installed."""
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise ValueError(f"The preference store needs {missing[0]}: pip install 'nemo_rlhf[feedback]'.")
