"""What may differ between `fade_fast` and `fade_ref`, by how much, and why."""

import torch

#: Attention: norm of the difference over norm of the float64 result, for the same codes. Inputs and
#: output are rounded to the dtype (half its eps each); sums run in float32 or better. In float64 what
#: remains is that the codec's rotation is stored in float32.
ATTENTION = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

#: Share of rotated codes that may differ: those whose input lies on a boundary to within the rounding
#: of the float32 product with the rotation. They must be neighbours of the specified code.
CODES_DIFFERING = 1e-4

#: Stored scales and zeros may differ by one rounding of fp16, for the same reason.
SCALE_ULP = 2.0**-10

#: Codes of product quantisation may differ where two centroids are equally far to within the rounding of
#: the kernel's products: |c|^2 - 2 x.c of each, in units of eps (|x| + |c|)^2.
TIE = 1.0

#: Attention over product-quantised codes, as above; no rotation is involved.
PRODUCT = {torch.float64: 1e-13, torch.float32: 1e-5}

#: What a token received, between runs that encode for themselves: norm of the difference over norm. Where
#: codes agree it is rounding; one that differs (`CODES_DIFFERING`) moves the probabilities of its token.
SCORES = 1e-3
