"""Codes of the matched codec without feedback. Parity compares those with feedback with the specification."""

import pytest
import torch

from fade_fast.kernels import matched
from fade_fast.kernels.rotated import LARGEST, center, scaled


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("seed", range(3))
def test_codes_without_feedback_are_the_nearest_ones(bits, seed):
    """By the stored scale, in float64, and no other scale that is tried has a smaller error."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.randn(2, 3, 40, 64, generator=draws) * torch.logspace(-4, 3, 40).unsqueeze(-1)
    y[0, 0, 5] = 0  # a vector of zeros
    y[0, 1, 6] = 1e9  # beyond every scale of half precision
    found = matched.quantize_to_nearest(y, bits)
    assert found.codes.dtype == torch.uint8 and found.codes.shape == y.shape
    assert found.scale.dtype == torch.float16 and found.scale.shape == y.shape[:-1] and found.zero is None
    assert found.codes.max() <= 2**bits - 1 and found.scale.isfinite().all()

    exact, middle = y.double(), center(bits)
    size = exact.square().mean(-1, keepdim=True).sqrt() * matched.STEPS[bits]
    tried = [(size * x).clamp_max(LARGEST).half().double() for x in matched.FACTORS]
    levels = [
        (torch.where(s > 0, exact / s, 0.0) + middle).round().clamp(0, 2**bits - 1) - middle for s in tried
    ]
    errors = torch.stack([(exact - s * x).square().sum(-1) for s, x in zip(tried, levels)])
    error = (exact - scaled(found, bits, torch.float64)).square().sum(-1)
    assert (error <= errors.amin(0) * (1 + 1e-5) + 1e-30).all()
    # A rounded float32 scale may be the neighbor of the float64 one; there is no third.
    assert (torch.stack(tried).squeeze(-1).half() == found.scale).any(0).double().mean() > 0.99
    assert scaled(found, bits, torch.float64)[0, 0, 5].abs().max() <= found.scale[0, 0, 5]
