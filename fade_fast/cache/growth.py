"""How many slots a tier that grows gets on a GPU.

Kernels there are compiled for a number of slots, so few numbers should occur: there are eight in each octave.
Unused slots take memory, so a tier gets the next of these numbers, which is at most an eighth more than it
needs. If it is known how long the text will be, the slots for all of it are made at once, as far as a tier
would soon grow anyway. Then the text compiles nothing more.
"""

from ..kernels.packed import roomy, whole

HEADROOM = 1024  # slots that a first buffer has at most for tokens that are known to come, if it is short
BLOCK = 64  # slots for the next demotion: without them, the next step might make a new buffer


def slots(heads: int, needed: int, held: int, expected: int | None = None, most: int | None = None) -> int:
    """Slots to make now.

    Args:
        heads: rows times KV heads.
        needed: slots that are about to be in use.
        held: slots of the present buffer, too few; 0: there is none yet.
        expected: slots that the text is known to need at its end; None: not known.
        most: slots at which the cache is as large as one without compression; None: it never is.

    The result is a whole number of chunks, at least `needed`. It exceeds `most` only if `needed` does.
    """
    room = roomy(heads, needed + BLOCK)
    if room > needed + needed // 8 + 2 * BLOCK:  # many heads have long chunks, and the block begins one
        room = roomy(heads, needed)
    if expected is not None:
        soon = needed + (needed if held else max(HEADROOM, needed // 8))
        room = max(room, min(roomy(heads, expected), roomy(heads, soon)))
    if most is None or room <= most:
        return room
    least = whole(heads, needed)
    step = max(1, room // 16)
    return max(least, min(room, whole(heads, most // step * step)))
