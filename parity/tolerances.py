"""The allowed differences between `fade_fast` and `fade_ref`, and their reasons: the table `CLAIMS`."""

from dataclasses import dataclass

import torch

#: Attention over the same codes: norm of the difference divided by the norm of the float64 result. Inputs
#: and output are rounded to the dtype, each by half its eps. Sums use float32 or better. In float64 only
#: one error remains: the codec stores its rotation in float32.
ATTENTION = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

#: Share of rotated codes that may differ. The input of such a code is near a boundary, closer than the
#: rounding of the float32 product with the rotation. The code must be a neighbor of the specified code.
CODES_DIFFERING = 1e-4

#: Stored scales and zero points may differ by one rounding of fp16, for the same reason.
SCALE_ULP = 2.0**-10

#: The attention that a token received, in two runs that encode independently: norm of the difference divided
#: by the norm. If the codes agree, the difference is rounding. A code that differs (`CODES_DIFFERING`)
#: changes the probabilities of its token.
SCORES = 1e-3

EPS = {dtype: torch.finfo(dtype).eps for dtype in ATTENTION}


@dataclass(frozen=True)
class Claim:
    """An agreement between both packages, and its reason.

    `allowed` is None if they agree bit for bit on every device. Otherwise it is the largest allowed error:
    one number, or one number per dtype.
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
    "packing": Claim("the code shifts and masks integers"),
    "numbers of codes": Claim("a code times a power of two, or minus its center, is exact in every dtype"),
    "products of codes": Claim("the sums over fields and over codes are equal sums of small integers"),
    "codes of exact inputs": Claim(
        "the scale, the zero point and every quotient are exact in float32, so nothing is rounded; a tie "
        "goes to the even code"
    ),
    "codec by definition": Claim(
        "the channel and symmetric codecs first round the stored scale; then they round half to even in IEEE "
        "arithmetic"
    ),
    "plan": Claim("the plan only compares the given scores and adds nothing; in a tie the newer token wins"),
    "key mean": Claim("the sum is in float64, so its order does not change the result in fp16"),
    "tokens": Claim("the live tokens, their tiers and their positions are integers"),
    "moved records": Claim("a token is encoded once per tier; after that its bytes are copied"),
    "lengths": Claim("the logical length, the stored tokens and the evicted tokens are counts"),
    "tokens read": Claim("pages are chosen by masses that differ by far more than their rounding"),
    "empty rows": Claim("a query that sees no key returns 0 for any content of the invalid slots"),
    "frequencies": Claim("the RoPE frequencies are the float32 numbers of the model's buffer"),
    "identity": Claim("a rotation by 0 positions multiplies by 1 and adds 0"),
    "checkpoint": Claim("the file contains the bytes of the memory; equal bytes give equal next steps"),
    "tokens generated": Claim("a captured step runs the same arithmetic as an eager step"),
    "captured as a whole": Claim("the cache can capture a compiled step in one CUDA graph"),
    "ends": Claim("generate() may run one step ahead; if a token ends the text, this step leaves no trace"),
    "one graph": Claim("a captured step compiles once and has no graph break"),
    "refusal": Claim("an unsupported request raises a ValueError that names it, before anything is written"),
    "registry": Claim("each entry of a registry has a case"),
    # -- within a tolerance
    "codes differing": Claim(
        "share of codes near a boundary, within the rounding of the float32 product with the rotation: there "
        "is one boundary per step, the product has at most D = 256 roundings of 2^-24 |x|, and a step is at "
        "least 2^-8 |x| / 16",
        CODES_DIFFERING,
    ),
    "code distance": Claim("a code that differs is a neighbor of the specified code", 1.0),
    "scales": Claim(
        "one rounding of fp16: the number before the rounding has an error of about 2^-22; Lloyd-Max codes "
        "determine their scale, so these scales are compared where the codes agree",
        SCALE_ULP,
    ),
    "vectors differing": Claim(
        "share of vectors of the matched codec with any other code: a code near a boundary changes the codes "
        "after it, and two scales may do nearly the same damage; D codes and 5 scales give each vector 5 D "
        "chances",
        2e-2,
    ),
    "damage": Claim(
        "relative difference of the damage that all codes of the matched codec do: vectors that differ are "
        "as good, up to the rounding of their choice",
        2e-3,
    ),
    "decoding": Claim(
        "a product of D terms with a rotation stored in float32: each term adds 2^-24 of the vector's norm, "
        "and the sum adds the same again",
        {torch.float64: 1e-6, torch.float32: 2e-6},
    ),
    "attention": Claim(
        "the codes are the same; inputs and output are rounded to the dtype, and sums use float32 or better; "
        "in float64 the float32 rotation remains",
        ATTENTION,
    ),
    "mass": Claim(
        "probabilities are summed over queries in float32 or better, so the error is as in attention; a "
        "compiled kernel takes them from float16 scores",
        ATTENTION,
    ),
    "received": Claim(
        "the attention that one token received, in two runs that encode independently: a code that differs "
        "changes the probabilities of its token",
        SCORES,
    ),
    "stored": Claim(
        "decoded keys and values of two runs that encode independently: one code in 10^4 differs, by a step "
        "of at most two standard deviations (2 bits), and scales differ by one rounding of fp16",
        2 * CODES_DIFFERING**0.5,
    ),
    "stored, searched": Claim(
        "the same where the matched codec searches scales, at 3 and 2 bits: up to 2 % of the vectors have "
        "codes of a scale that is as good (`vectors differing`), and two such vectors differ by up to .35 of "
        "their norm",
        0.35 * 2e-2**0.5,
    ),
    "partials": Claim(
        "sums over one tier in chunks or tiles; the error is as in attention",
        {torch.float64: 1e-6, torch.float32: 1e-5},
    ),
    "twin": Claim(
        "the arithmetic of the compiled version, run eagerly: products use float16, and a CPU may round each "
        "of up to 256 partial sums to 2^-11; each product is a random walk of sqrt(256) 2^-11 = 8e-3",
        2e-2,
    ),
    "merge": Claim(
        "exponentials, products and a quotient: about ten roundings",
        {d: 16 * EPS[d] for d in (torch.float64, torch.float32)},
    ),
    "rope": Claim(
        "angles of up to 10^6 radians in float64 have an error of 4 eps; the sine, the cosine, two products "
        "and a sum use the dtype of the keys",
        {torch.float64: 1e-9, torch.float32: 4 * EPS[torch.float32]},
    ),
    "rope of the model": Claim(
        "the scheme has float64 frequencies, the model has float32 frequencies: it computes powers and "
        "quotients of rounded numbers, with ten roundings; theta's exponent counts ln(theta) = 13 times",
        32 * EPS[torch.float32],
    ),
    "logits": Claim(
        "one layer after attention, on the inputs of that model: the error of the attention output passes "
        "through linear layers, and each rounds to the dtype; four of them at most double the error",
        {d: 4 * e for d, e in ATTENTION.items()},
    ),
    "captured": Claim("the cache content after captured steps; compilers may reorder float64 sums", 1e-9),
    "captured, compiled": Claim(
        "the uncompressed tokens in the cache after code generation, which reorders the sums of the model's "
        "norms: these use float32, with about eight roundings of 2^-24 in two layers",
        1e-6,
    ),
}


def floor(dtype: torch.dtype, exact: torch.Tensor) -> float:
    """The addition to the tolerance of attention for outputs that are subnormal in `dtype`.

    `dtype` is the dtype of the output, or float16 if a compiled kernel computes its products in float16. The
    result is half of the smallest subnormal number, divided by the root mean square of the output.
    """
    info, size = torch.finfo(dtype), float(exact.double().square().mean().sqrt())
    return info.smallest_normal * info.eps / 2 / size if size else 0.0


def strain(dtype: torch.dtype, score: float, *, fused: bool = False) -> float:
    """The addition to the tolerance of attention for an input with large scores.

    A score is a sum of products. Its error is eps times the largest product of norms, `score`. A weight is
    the exponential of a score and has the same relative error. There are two roundings: of the products and
    of the sums. Compiled kernels compute the products of two-byte dtypes in float16.
    """
    half = fused and dtype.itemsize == 2
    eps = EPS[torch.float16] if half else EPS[torch.promote_types(dtype, torch.float32)]
    if dtype == torch.float64:
        eps = EPS[torch.float32] / 8  # the error of the rotation, which is stored in float32
    return 2 * eps * max(0.0, score - 8.0)  # the tolerance includes ordinary scores
