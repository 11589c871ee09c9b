"""What `fade_fast` does not serve yet must be refused clearly: these cases cover what is "spec only"."""

import fade_fast
from fade_ref.config import FadeConfig

from .. import cases as measure
from ..case import Found


def refused_config(found: Found, field: str, value: str, **others) -> None:
    """A cache with `field=value` must be refused, by a message that names both."""
    model = measure._model(measure.Shape(heads=1, group=1))
    config = FadeConfig(**{field: value}, **others)
    found.refused(lambda: fade_fast.create_cache(model, config), field, repr(value))
    found.holds("refusal", model.config._attn_implementation != "fade", "the model was attached all the same")
