"""Which versions of transformers fade_fast was tested with: 5.17.0, the oldest allowed, to `NEWEST`."""

import warnings

import transformers
from packaging.version import Version

NEWEST = "5.24.0"

_warned = False


def installed() -> str:
    """The version of transformers that is installed."""
    return transformers.__version__


def untested() -> str:
    """One line if the installed transformers is newer than any that was tested; empty if it is not."""
    if Version(installed()).release[:2] <= Version(NEWEST).release[:2]:
        return ""
    return (
        f"transformers {installed()} is newer than {NEWEST}, the newest that fade_fast was tested with; "
        "create_cache() still compares a model's numbers before it serves it"
    )


def warn_if_untested() -> None:
    """Say so, once a process: a `UserWarning` that can be filtered."""
    global _warned
    if not _warned and (text := untested()):
        _warned = True
        warnings.warn(text, stacklevel=4)
