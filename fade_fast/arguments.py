"""What all commands share: a parser that reports an error in one line, and checks of values.

Importing this module imports nothing slow.
"""

import argparse
import os
import re
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """Reports an error in one line. Only --help shows the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def size(text: str) -> int:
    """A number of bytes with its unit: 24 alone may mean GB.

    >>> size("2GB"), size("1.5 MiB"), size("100 B"), size("0")
    (2000000000, 1572864, 100, 0)
    """
    units = dict(B=1, KB=10**3, MB=10**6, GB=10**9, TB=10**12, KIB=2**10, MIB=2**20, GIB=2**30, TIB=2**40)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or (found[2] or "B").upper() not in units:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of bytes such as 2GB or 512MiB is allowed")
    if not found[2] and float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: a unit is missing; write {text.strip()}GB, for example")
    return int(float(found[1]) * units[(found[2] or "B").upper()])


def natural(text: str) -> int:
    """An integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: an integer of at least 0 is allowed")
    return int(text)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: an integer of at least 1 is allowed")
    return int(text)


def text_file(path: str) -> str:
    """The text of a UTF-8 file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"cannot read {path}: {why}; give a text file in UTF-8") from error
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{path} is empty: give a file with a text")
    return text


def readable(path: str) -> Path:
    """The path of an existing file."""
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"cannot read {path}: no such file; give the path of a file")
    return Path(path)


def writable(path: str) -> Path:
    """The path of a writable file. Checked before the work, not after it."""
    where = Path(path)
    if where.is_dir():
        why = "it is a folder"
    elif not where.parent.is_dir():
        why = f"there is no folder {where.parent}"
    elif not os.access(where if where.exists() else where.parent, os.W_OK):
        why = "it is protected"
    else:
        return where
    raise argparse.ArgumentTypeError(
        f"{path} cannot be written: {why}; name a file in a folder that you may write to"
    )


#: The kinds of devices that `torch.device` knows. A test compares them, because importing torch is slow.
DEVICES = (
    "cpu", "cuda", "ipu", "xpu", "mkldnn", "opengl", "opencl", "ideep", "hip", "ve", "fpga", "maia", "xla",
    "lazy", "vulkan", "mps", "meta", "hpu", "mtia", "privateuseone",
)  # fmt: skip


def device(name: str) -> str:
    """The name of a device."""
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(:(0|[1-9]\d*))?", name):
        raise argparse.ArgumentTypeError(
            f"{name!r} is not the name of a device: give cpu, cuda, or cuda:1 for the second GPU"
        )
    return name
