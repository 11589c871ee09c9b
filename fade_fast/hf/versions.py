"""The versions of transformers that fade_fast was tested with: 5.17.0, the oldest allowed, to `NEWEST`."""

import warnings

import transformers
from packaging.version import Version

NEWEST = "5.24.0"

_warned: set[str] = set()  # versions that a warning has named


def installed() -> str:
    """Version of the installed transformers."""
    return transformers.__version__


def untested() -> str:
    """A one-line message if the installed transformers is newer than all tested versions, else empty."""
    if Version(installed()).release[:2] <= Version(NEWEST).release[:2]:
        return ""
    return (
        f"transformers {installed()} is newer than {NEWEST}, the newest that fade_fast was tested with; "
        "create_cache() still compares a model's numbers before it serves it. Install "
        f"{NEWEST}, or silence this warning with warnings.filterwarnings"
    )


def warn_if_untested() -> None:
    """Warn once per process, by a `UserWarning`, if the installed transformers is untested."""
    if installed() not in _warned and (text := untested()):
        _warned.add(installed())
        warnings.warn(text, stacklevel=4)
