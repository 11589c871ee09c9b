"""Measured block sizes of generated kernels: nothing is tuned when a kernel is compiled."""

#: Block sizes, warps and stages of the generated kernels of one graph, by the number of results of a kernel
#: and the number of summands per result. A number of results that is None stands for all others. A config
#: without R0_BLOCK sums all summands at once. A kernel without sums has one summand per result.
Tiles = dict[tuple[int | None, int], dict]


def tier_tiles(
    heads: int,
    rows: int,
    blocks: int,
    chunk: int,
    bits: tuple[int, int],
    widths: tuple[int, int],
    dim: int,
    page: int | None = None,
) -> Tiles:
    """Tiles of one tier, measured on an H100 for 2 to 64 rows (docs/lab-notebook.md).

    Args:
        heads: batch times KV heads. rows: query rows of each, at least 2.
        blocks: chunks of `chunk` tokens.
        bits, widths: of keys and values, bits a code and codes a field. dim: head_dim.
        page: tokens of a page if there is a block table; measured on an H200 for 4 rows and small pages.
    """
    x, (key_width, value_width) = power_of_two(rows), widths
    scores = dict(ZBLOCK=1, XBLOCK=x, YBLOCK=128, R0_BLOCK=16, num_warps=2, num_stages=3)
    if key_width % 32 == 0:
        scores["R0_BLOCK"] = 32 if x <= 4 else 64
    if x > 4:
        scores.update(YBLOCK=64, num_warps=2 if x <= 8 else 4, num_stages=2)
    if bits[0] == 8:
        block = next((n for n in (64, 32) if key_width % n == 0), 16)  # a divisor needs no mask
        scores.update(R0_BLOCK=block, num_warps=4, num_stages=2)
    elif key_width == 64 and x <= 8:  # the sum is one tile: nothing to pipeline
        scores.update(R0_BLOCK=64, YBLOCK=128, num_warps=2, num_stages=1)
        if chunk > 1024 and x <= 4:
            scores.update(YBLOCK=256, num_warps=4)
    if key_width == 32:
        scores.update(R0_BLOCK=32, YBLOCK=64, num_warps=1, num_stages=1)
    values = dict(ZBLOCK=1, XBLOCK=x, YBLOCK=min(128, max(16, power_of_two(value_width))))
    values.update(R0_BLOCK=128, num_warps=2 if value_width <= 64 else 4)
    values.update(num_stages={2: 4, 4: 3}.get(x, 2))  # more rows leave less room for stages
    if bits[1] == 8:  # wider sums
        values.update(num_warps=4)
        if chunk >= 512 and x <= 4:  # these suit `packed._chosen`
            values.update(num_warps=2, num_stages=3)
    if chunk <= 256 or chunk == 512 and x <= 4 and heads < 32:
        values.update(R0_BLOCK=64, num_stages=4, num_warps=1 if value_width <= 64 else 2)
    if chunk <= 128:
        values.update(num_stages=2, num_warps=2)
    stats = dict(XBLOCK=4, num_warps=min(8, max(1, chunk // (128 if chunk <= 512 else 256))), num_stages=1)
    if page:
        # A pipeline of loads by a table takes a third longer than many small programs that do not load
        # ahead. A row of codes ends with its page: of fewer tokens, a warp loads longer pieces.
        values.update(R0_BLOCK=64, num_stages=4, num_warps=1 if x <= 8 else 2 if x <= 16 else 4)
        if heads * blocks >= 2048:
            values.update(R0_BLOCK=64 if bits[1] >= 4 else 32, num_stages=1)
        if page < chunk:
            stats.update(XBLOCK=1, num_warps=1)  # the rows of a program would exchange their scales
    join = dict(XBLOCK=16, R0_BLOCK=16 if heads >= 32 else 64, num_warps=4)
    if heads >= 32 and blocks <= 32:
        join.update(XBLOCK=32, R0_BLOCK=max(4, power_of_two(blocks)), num_warps=2 if blocks > 8 else 1)
    # No stages: pipelining decoded operands takes eight times as long.
    decode = dict(ZBLOCK=1, XBLOCK=128, YBLOCK=128, num_warps=8, num_stages=1)
    decode.update(R0_BLOCK=64 if dim % 64 == 0 else 32)
    length = blocks * chunk
    return {
        (heads * length * dim, dim): decode,
        (heads * length * rows, dim // 2): dict(scores, R0_BLOCK=32 if dim % 64 == 0 else 16),
        (heads * length * rows, key_width): scores,
        (heads * blocks * value_width * rows, chunk): values,
        (heads * blocks * rows, chunk): stats,
        (heads * value_width * rows, blocks): dict(join, num_stages=1),
    }


def step_tiles(heads: int, rows: int, exact: int, means: int, dim: int) -> Tiles:
    """Tiles of a step outside the tiers, with the arguments of `tier_tiles`.

    Args:
        exact: number of uncompressed tokens.
        means: number of means of all tiers.
    """
    x, table = power_of_two(rows), dim + 1 + exact + means
    first = dict(ZBLOCK=1, XBLOCK=x, YBLOCK=16, R0_BLOCK=64, num_warps=2, num_stages=1)
    if heads * table >= 1 << 14:
        first.update(YBLOCK=32, num_warps=4)
    if dim % 128:  # half of head_dim is summed, in whole tiles
        first.update(R0_BLOCK=32)
    # One block if it fits: such a small kernel then waits for its loads alone.
    last = dict(ZBLOCK=1, XBLOCK=32 if heads >= 32 else 16, YBLOCK=x, num_stages=1)
    last.update(R0_BLOCK=min(512, power_of_two(exact + dim)), num_warps=4 if x <= 4 else 8)
    if x > 8:
        last.update(XBLOCK=64, R0_BLOCK=64, num_warps=4, num_stages=2)
    return {
        (heads * table * rows, dim // 2): first,
        (heads * rows, exact): dict(XBLOCK=1, R0_BLOCK=256, num_warps=1, num_stages=1),
        (heads * rows * dim, exact + dim): last,
    }


def long_element_tiles() -> Tiles:
    """Tiles of kernels without sums that compute much for each element.

    One element a thread: Inductor's first choice is up to 8, which may not fit into registers.
    """
    return {(None, 1): dict(XBLOCK=128, num_warps=4, num_stages=1)}


def summary_tiles(rows: int, dim: int) -> Tiles:
    """Tiles of the products of `kernels/summaries.py`: `rows` query rows, at least 2, and `dim` channels.

    Inductor would compile and measure 19 sets. These are not tuned on a GPU.
    """
    product = dict(ZBLOCK=1, YBLOCK=power_of_two(rows), XBLOCK=128, num_warps=4, num_stages=2)
    return {(None, dim): dict(product, R0_BLOCK=64 if dim % 64 == 0 else 32)}


def prefill_tiles(dim: int | None = None) -> Tiles:
    """Tiles of `vllm/prefill.py`: kernels without sums, and sums over `dim` channels.

    A program of the sums has two tokens of a KV head, and all sums over pairs of their queries and keys. On
    an H200 the sums of 8,192 tokens take 91 us, and 106 with 8 tokens in four warps; the weighted sum of
    values takes 90 us, and 137 with half as many numbers a thread.
    """
    tiles: Tiles = {(None, 1): dict(XBLOCK=256, num_warps=1, num_stages=1)}
    return tiles if dim is None else tiles | {(None, dim): dict(XBLOCK=2, num_warps=1, num_stages=1)}


def channel_tiles(dim: int) -> Tiles:
    """Tiles of sums over `dim` channels of a vector, where neighbors in memory are tokens; not tuned."""
    return {(None, dim): dict(XBLOCK=32, num_warps=4, num_stages=1)}


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
