"""What a stored token is: its fields, their bytes, and how it is encoded, decoded and attended."""

from fade_ref.config import FadeConfig
from fade_ref.tiers import Tier

from .rotated import tier_name, tier_widths


def tier_names(config: FadeConfig) -> list[str]:
    """Names in reports of the tiers of a middle, finest first."""
    if config.quant_backend == "product":
        return [Tier.PQ.name]
    return [tier_name(bits) for bits in tier_widths(config, (config.middle_k_bits, config.middle_v_bits))]
