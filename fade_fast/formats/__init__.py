"""What a stored token is: its fields, their bytes, and how it is encoded, decoded and attended."""

from fade_ref.config import FadeConfig

from .rotated import tier_name, tier_widths


def tier_names(config: FadeConfig, layer: int, layers: int) -> list[str]:
    """Names in reports of the tiers of a layer's middle, finest first. A model has `layers` layers."""
    return [tier_name(bits) for bits in tier_widths(config, config.bits(layer, layers))]
