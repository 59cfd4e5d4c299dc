"""Functions by name, ``package.module:name``. Imports nothing heavy: the processes that run reward functions use it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from nemo_rlhf.rollout.isolation import foreign
from nemo_rlhf.rollout.words import one_line


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

    importing = foreign(f'{key} is "{name}", and importing {module_name}', (ModuleNotFoundError,))
    try:
        with importing:
            function: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                function = getattr(function, part, None)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f'{key} is "{name}", and there is no module {error.name} on the Python path or in {here}.'
            ) from error
        raise ValueError(f'{key} is "{name}", and importing {module_name} raised {one_line(error)}.') from error
    if function is None:
        raise ValueError(f'{key} is "{name}", and {module_name} has no {attribute}.')
    if not callable(function):
        raise ValueError(f'{key} is "{name}", which is a {type(function).__name__} and no function.')
    return function  # type: ignore[no-any-return]
