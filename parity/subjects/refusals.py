"""`fade_fast` must refuse unsupported features clearly. These cases cover the features in "spec only"."""

import fade_fast
from fade_ref.config import FadeConfig

from .. import cases as measure
from ..case import Found


def refused_config(found: Found, field: str, value: str, **others) -> None:
    """Check that a cache with `field=value` is refused with a message that names both."""
    model = measure._model(measure.Shape(heads=1, group=1))
    config = FadeConfig(**{field: value}, **others)
    found.refused(lambda: fade_fast.create_cache(model, config), field, repr(value))
    found.holds("refusal", model.config._attn_implementation != "fade", "the model was attached all the same")
