"""Functions by name, ``package.module:name``. Imports nothing heavy: the processes that run reward functions use it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def load_function(name: str, key: str = "reward.function") -> Callable[..., Any]:
    """The function that ``package.module:name`` names; modules of the current directory are found too. ``key`` is the
    configuration's, for the error.

    Raises ValueError when the name has another form, the module does not exist or cannot be imported, or it has no
    such function.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(f'{key} is "{name}": it must have the form package.module:name.')
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)

    def failed(error: Exception) -> ValueError:
        return ValueError(f'{key} is "{name}", and importing {module_name} raised {one_line(error)}.')

    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f'{key} is "{name}", and there is no module {error.name} on the Python path or in {here}.'
            ) from error
        raise failed(error) from error
    except Exception as error:  # whatever the user's module raises
        raise failed(error) from error
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise ValueError(f'{key} is "{name}", and {module_name} has no {attribute}.')
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f'{key} is "{name}", which is a {type(function).__name__} and no function.')
    return function  # type: ignore[no-any-return]


def one_line(error: BaseException) -> str:
    """The kind of the error and what it says."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def plain(value: Any) -> Any:
    """Tensors, arrays and their scalars as numbers and lists; anything else as it is."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return value.tolist() if hasattr(value, "tolist") else value


def brief(value: Any) -> str:
    """The value as a short piece of a sentence."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
