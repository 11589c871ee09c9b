"""Why a tolerance is what it is."""

import torch

from fade_fast.kernels import rotated
from parity.tolerances import CLAIMS


def test_keys_a_rounding_apart_may_be_stored_further_apart():
    """What "captured, compiled" allows of uncompressed keys is too little for those that are encoded: a mean,
    a scale or a zero in fp16 may round the other way, and a code with them."""
    matrix, over = rotated.rotation(64).float(), []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        keys, noise = torch.randn(2, 6, 2, 6, 4, 64, generator=generator, dtype=torch.float64)
        stored = []
        for x in (keys, keys * (1 + 5e-8 * noise)):
            mean = x.mean(3, keepdim=True).half()
            codes = rotated.encode(x, mean, matrix, 4)
            stored.append(rotated.dequantize(codes, 4, torch.float64) @ matrix.double() + mean.double())
        error = float((stored[0] - stored[1]).norm() / stored[0].norm())
        assert error <= CLAIMS["stored"].allows(torch.float64)
        over += [error] * (error > CLAIMS["captured, compiled"].allows(torch.float64))
    print(f"{len(over)} of 300 over 1e-6, from {min(over):.1e} to {max(over):.1e}")
    assert 1 <= len(over) <= 150
