"""Bytes, ratios and layers as people read them."""

from collections.abc import Iterable


def size(count: float) -> str:
    """A number of bytes in the unit that suits it. MiB are 1024 * 1024 bytes.

    >>> size(0), size(1536), size(23_800_000), size(3 * 2**30)
    ('0 bytes', '1.5 KiB', '22.70 MiB', '3.00 GiB')
    """
    for unit, power, digits in ("GiB", 30, 2), ("MiB", 20, 2), ("KiB", 10, 1):
        if count >= 2**power:
            return f"{count / 2**power:.{digits}f} {unit}"
    return f"{count:.0f} bytes"


def compared(before: float, after: float) -> str:
    """How `after` bytes compare with `before` bytes; empty if one of them is 0.

    >>> compared(311, 100), compared(92, 100), compared(1000, 1001)
    ('3.11 times smaller', '1.09 times larger', 'as large')
    """
    if not before or not after:
        return ""
    ratio = max(before, after) / min(before, after)
    if f"{ratio:.2f}" == "1.00":
        return "as large"
    return f"{ratio:.2f} times {'smaller' if after < before else 'larger'}"


def grouped(layers: Iterable[tuple[int, str]]) -> list[str]:
    """One line for all layers of the same text, by their first layer.

    >>> grouped([(0, "a"), (1, "a"), (2, "b"), (3, "a"), (5, "c")])
    ['layers 0 to 1, 3: a', 'layer 2: b', 'layer 5: c']
    """
    indices: dict[str, list[int]] = {}
    for index, text in layers:
        indices.setdefault(text, []).append(index)
    lines = []
    for text, found in indices.items():
        starts = [i for i in found if i - 1 not in found]
        ends = [i for i in found if i + 1 not in found]
        runs = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends))
        lines.append(f"layer{'s' if len(found) > 1 else ''} {runs}: {text}")
    return lines
