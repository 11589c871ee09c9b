"""What may differ between `fade_fast` and `fade_ref`, by how much, and why: one table, `CLAIMS`."""

from dataclasses import dataclass

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

EPS = {dtype: torch.finfo(dtype).eps for dtype in ATTENTION}


@dataclass(frozen=True)
class Claim:
    """What is claimed of both packages, and why it may be.

    `allowed` is None where they agree bit for bit, on every device; else the largest error, for every
    dtype or for each.
    """

    reason: str
    allowed: float | dict[torch.dtype, float] | None = None

    @property
    def is_bits(self) -> bool:
        return self.allowed is None

    def allows(self, dtype: torch.dtype) -> float:
        return self.allowed[dtype] if isinstance(self.allowed, dict) else self.allowed or 0.0


CLAIMS = {
    # -- bit for bit
    "packing": Claim("integers are shifted and masked"),
    "numbers of codes": Claim("a code times a power of two, or less its centre, is exact in every dtype"),
    "products of codes": Claim("the sum of the fields' products is that of the codes, over small integers"),
    "codes of exact inputs": Claim(
        "scale, zero and every quotient are exact in float32, so there is nothing to round; what lies "
        "midway goes to the even code"
    ),
    "codec by definition": Claim(
        "the channel and symmetric codecs round the stored scale first, then half to even, in IEEE arithmetic"
    ),
    "centroids": Claim("decoding looks numbers up"),
    "product codes in place": Claim("in float64, a tie to within a rounding does not occur by chance"),
    "plan": Claim("given scores, ranking compares and never adds; ties go to the newer token"),
    "key mean": Claim("summed in float64, where the order of a sum of fp16 numbers leaves no trace in fp16"),
    "tokens": Claim("which tokens live, in which tier, at which positions: integers only"),
    "moved records": Claim("a token is encoded once a tier; after that its bytes are copied"),
    "lengths": Claim("logical length, columns held and tokens evicted are counted"),
    "empty rows": Claim("a query that sees nothing gives 0, whatever invalid slots hold"),
    "frequencies": Claim("RoPE's frequencies are the float32 numbers of the model's own buffer"),
    "identity": Claim("a rotation by 0 positions multiplies by 1 and adds 0"),
    "checkpoint": Claim("a file holds the bytes that were in memory, and what goes on from them is the same"),
    "tokens generated": Claim("a captured step runs the arithmetic of the eager one"),
    "captured as a whole": Claim("a step that is compiled can be captured by the cache itself"),
    "ends": Claim("a text that ends by a token leaves no step too many, where generate() runs ahead"),
    "one graph": Claim("a captured step compiles once and never breaks"),
    "refusal": Claim(
        "what is not served is refused by a ValueError that names it, before anything is written"
    ),
    "registry": Claim("everything that a registry lists has a case"),
    # -- within a tolerance
    "codes differing": Claim(
        "share of codes on a boundary to within the rounding of the float32 product with the rotation: a "
        "boundary every step, D = 256 roundings of 2^-24 |x| at most in it, steps of at least 2^-8 |x| / 16",
        CODES_DIFFERING,
    ),
    "code distance": Claim("a code that differs is a neighbour of the specified one", 1.0),
    "scales": Claim(
        "one rounding of fp16: the number before it is off by some 2^-22; of Lloyd-Max codes, which choose "
        "their scale, where the codes agree",
        SCALE_ULP,
    ),
    "decoding": Claim(
        "a product of D terms with a rotation stored in float32: 2^-24 of a vector's norm each, and as much "
        "again from the sum",
        {torch.float64: 1e-6, torch.float32: 2e-6},
    ),
    "attention": Claim(
        "for the same codes; inputs and output rounded to the dtype, sums in float32 or better; in float64 "
        "the rotation's float32 remains",
        ATTENTION,
    ),
    "mass": Claim(
        "probabilities summed over queries, in float32 or better: as attention in that dtype, and compiled "
        "from float16 scores",
        ATTENTION,
    ),
    "received": Claim(
        "what a token received by itself, of runs that encode for themselves: a code that differs moves the "
        "probabilities of its token",
        SCORES,
    ),
    "stored": Claim(
        "keys and values of two runs that encode for themselves, decoded: one code in 10^4 differs, by a "
        "step of at most two standard deviations (2 bits), and scales by a rounding of fp16",
        2 * CODES_DIFFERING**0.5,
    ),
    "partials": Claim(
        "sums over one tier, in chunks or tiles, as attention",
        {torch.float64: 1e-6, torch.float32: 1e-5},
    ),
    "twin": Claim(
        "the arithmetic of the compiled twin, run eagerly: products in float16, where a CPU may round each "
        "of up to 256 partial sums to 2^-11, a random walk of sqrt(256) 2^-11 = 8e-3 in either product",
        2e-2,
    ),
    "merge": Claim(
        "exponentials, products and a quotient: some ten roundings", {d: 16 * EPS[d] for d in PRODUCT}
    ),
    "product codes": Claim("centroids tie within the rounding of |c|^2 - 2 x.c", TIE),
    "product codes differing": Claim("the share of such ties; one in a small sample", CODES_DIFFERING),
    "product attention": Claim("as attention; no rotation is involved", PRODUCT),
    "rope": Claim(
        "angles of up to 10^6 radians in float64, 4 eps of that; sine, cosine, two products and a sum in the "
        "dtype of the keys",
        {torch.float64: 1e-9, torch.float32: 4 * EPS[torch.float32]},
    ),
    "rope of the model": Claim(
        "the scheme's frequencies in float64 against the model's in float32, which takes powers and "
        "quotients of rounded numbers: ten roundings, that of theta's exponent counting ln(theta) = 13 times",
        32 * EPS[torch.float32],
    ),
    "logits": Claim(
        "one layer after attention, on inputs as they are: its output's error passes through linear layers, "
        "each rounding to the dtype; four of them double it at most",
        {d: 4 * e for d, e in ATTENTION.items()},
    ),
    "captured": Claim("what caches hold after captured steps; compilers may reorder float64 sums", 1e-9),
    "captured, compiled": Claim(
        "the same of uncompressed tokens after code generation, which reorders the model's own norms: these "
        "sum in float32, with some eight roundings of 2^-24 in two layers",
        1e-6,
    ),
}


def floor(dtype: torch.dtype, exact: torch.Tensor) -> float:
    """What attention's tolerance gains where outputs are so small that `dtype` has them subnormal: that of
    the output, or float16 where a compiled kernel's products run in it.

    Half of the smallest subnormal number, over the root mean square of the output.
    """
    info, size = torch.finfo(dtype), float(exact.double().square().mean().sqrt())
    return info.smallest_normal * info.eps / 2 / size if size else 0.0


def strain(dtype: torch.dtype, score: float, *, fused: bool = False) -> float:
    """What an input adds to attention's tolerance by the size of its scores.

    A score is a sum of products, off by eps times the largest product of norms, `score`; a weight is
    the exponential of it, and off by as much. Two roundings, of products and of sums. Compiled, the
    products of two-byte dtypes run in float16.
    """
    half = fused and dtype.itemsize == 2
    eps = EPS[torch.float16] if half else EPS[torch.promote_types(dtype, torch.float32)]
    if dtype == torch.float64:
        eps = EPS[torch.float32] / 8  # of the rotation, which is stored in float32
    return 2 * eps * max(0.0, score - 8.0)  # ordinary scores are in the tolerance
