"""Write files atomically: after an interrupt or a crash, the old file is still there."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces `path` if the block ends without an exception.

    Raises `OSError` if the file cannot be written.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fade-") as scratch:
        written = Path(scratch) / path.name
        yield written
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.replace(written, path)


def write_json(path: str | os.PathLike, value, indent: int = 2) -> None:
    """Write `value` as JSON, atomically."""
    with whole(path) as written:
        written.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
