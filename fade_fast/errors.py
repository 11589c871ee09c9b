"""Errors that a user can fix. Importing this module imports nothing else."""

import difflib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

Function = TypeVar("Function", bound=Callable)


class LoadError(RuntimeError):
    """A model or a file cannot be loaded, for a reason that the caller can fix. The message is one line."""


class InputError(LoadError, ValueError):
    """A text or a number that a measurement cannot use. The message is one line."""


class NotCalibrated(ValueError):
    """A model cannot be calibrated, and a codec needs that. The message is one line.

    Args:
        why: the reason. The message adds what helps.
    """

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"{self.why}; quant_backend='rotated' needs no calibration"


class MissingPackage(LoadError, ImportError):
    """A package of an optional extra is not installed. The message names the command that installs it."""


def install_command(extra: str) -> str:
    """The command that installs an optional extra of this distribution.

    >>> install_command("demo")
    'pip install "fade-fast[demo]"'
    """
    return f'pip install "fade-fast[{extra}]"'


def missing(what: str, package: str | None, extra: str) -> MissingPackage:
    """The error for a `package` that is not installed; `what` needs it, and the extra `extra` contains it.

    >>> print(missing("drawing", "matplotlib", "plot"))
    drawing needs matplotlib: pip install "fade-fast[plot]"
    """
    error = MissingPackage(f"{what} needs {package}: {install_command(extra)}")
    error.name = package
    return error


def require(what: str, extra: str, *packages: str) -> None:
    """Raise `MissingPackage` unless all `packages` can be imported. They are not imported here."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise missing(what, " and ".join(absent), extra)


def known_keywords(fields: Iterable[str]) -> Callable[[Function], Function]:
    """A decorator: for an unknown keyword, the `TypeError` of a function lists near names and all names.

    `fields` are those of a configuration, which the function takes as `config` and not as keywords.
    """

    def decorate(function: Function) -> Function:
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def checked(*args, **kwargs):
            for name in kwargs:
                if name in names:
                    continue
                called = f"{function.__name__}() has no argument {name!r}"
                if name in fields:
                    given = f"FadeConfig({name}={kwargs[name]!r})"
                    raise TypeError(f"{called}: it is a field of FadeConfig; pass config={given}")
                near = " or ".join(difflib.get_close_matches(name, names))
                hint = f" (did you mean {near}?)" if near else ""
                raise TypeError(f"{called}{hint}; its arguments are {', '.join(names)}")
            return function(*args, **kwargs)

        return cast(Function, checked)

    return decorate
