"""The PQ kernel by itself: against decoding first, in float64, at the edges, and its refusals."""

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fade_fast.kernels import product, product_decode
from fade_fast.kernels.merge import combine, merge

from ..marks import slow_but

K = 16  # centroids, and so the shortest tile


def sample(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_codes(*shape, seed=0, k=K):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, k, shape, generator=generator, dtype=torch.uint8)


def decoded_first(query, keys, key_book, values, value_book, visible, softcap=None):
    """Softmax attention over decoded tokens in float64; 0 for a row that sees none."""
    keys, values = (product.decode(c, b, torch.float64) for c, b in ((keys, key_book), (values, value_book)))
    scores = query.double() @ keys.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0) @ values


@pytest.fixture(autouse=True, params=["counted", "decoded"])
def poisoned(request, product_elements, monkeypatch):
    """Uninitialised memory holds NaN, and tiles are as short as they get; values as on a CPU and a GPU."""
    product_elements(1)
    monkeypatch.setattr(product, "counts_repeatably", lambda x: request.param == "counted")
    torch.use_deterministic_algorithms(True)  # which fills new memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", slow_but(range(40), *range(4)))
def test_random_cases(seed):
    """Any shape, mask and dtype; holes are poisoned with bytes that name no centroid."""
    pick = random.Random(seed)
    batch, heads, dim = pick.randint(1, 3), pick.randint(1, 3), pick.choice([64, 80, 96, 128, 256])
    rows, length = pick.choice([1, 2, 3, 7, 16, 64]), pick.randint(1, 60)
    widths = [pick.choice([w for w in (1, 2, 4, 5, 8, 16, 32) if dim % w == 0]) for _ in "kv"]
    centroids = [pick.choice([2, 16, 64]) for _ in "kv"]
    own = pick.choice([(), (1,), (heads,)])
    dtype = pick.choice([torch.float32, torch.float64])
    books = [sample(*own, dim // w, k, w, seed=seed).half() for w, k in zip(widths, centroids)]
    codes = [some_codes(batch, heads, length, dim // w, seed=seed, k=k) for w, k in zip(widths, centroids)]
    query = sample(batch, heads, rows, dim, seed=seed, dtype=dtype) * dim**-0.5
    generator = torch.Generator().manual_seed(seed)
    one = [pick.choice([1, n]) for n in (batch, heads, rows)]
    visible = torch.rand(*one, length, generator=generator) < pick.choice([0.1, 0.7, 1.0])
    softcap = pick.choice([None, 0.5, 30.0])
    exact = decoded_first(query, codes[0], books[0], codes[1], books[1], visible, softcap)
    hole = ~visible.expand(batch, heads, rows, length).any(2).unsqueeze(-1)
    codes = [c.masked_fill(hole, 255) for c in codes]
    part = product.attend(query, codes[0], books[0], codes[1], books[1], visible, softcap)
    assert part.acc.shape == query.shape and {x.dtype for x in part} == {dtype}
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert (merge([part]) - exact).norm() <= bound * exact.norm()
    nothing = ~visible.expand(batch, heads, rows, length).any(-1)
    assert not part.acc[nothing].any() and not part.row_sum[nothing].any()


@pytest.mark.parametrize(
    "length", slow_but([0, 1, 3, K - 1, K, K + 1, 2 * K - 1, 2 * K, 2 * K + 1], 0, K, 2 * K + 1)
)
def test_lengths_around_tiles(length):
    book, query = sample(16, K, 4), sample(2, 2, 3, 64, seed=1)
    keys, values = (some_codes(2, 2, length, 16, seed=s) for s in (2, 3))
    visible = torch.ones(1, 1, 1, length, dtype=torch.bool)
    part = product.attend(query, keys, book, values, book, visible)
    expected = decoded_first(query, keys, book, values, book, visible)
    torch.testing.assert_close(merge([part]), expected, rtol=1e-12, atol=1e-13)
    x = product.decode(keys, book, torch.float64)
    assert x.shape == (2, 2, length, 64) and torch.equal(product.encode(x, book), keys)


def test_rows_that_see_nothing():
    """They give 0 and leave what they are merged with alone; whole tiles may be hidden."""
    book, query, codes = sample(16, K, 4), sample(1, 1, 4, 64), some_codes(1, 1, 3 * K, 16)
    visible = torch.ones(1, 1, 4, 3 * K, dtype=torch.bool)
    visible[..., 0, :], visible[..., 1, :K], visible[..., 2, K:] = False, False, False
    part = product.attend(query, codes, book, codes, book, visible)
    expected = decoded_first(query, codes, book, codes, book, visible)
    torch.testing.assert_close(merge([part]), expected, rtol=1e-12, atol=1e-13)
    none = product.attend(query, codes, book, codes, book, torch.zeros_like(visible))
    assert not merge([none]).any()
    for both in (combine(part, none), combine(none, part)):
        assert all(torch.equal(a, b) for a, b in zip(both, part))


def test_large_scores_do_not_overflow():
    book, codes = sample(16, K, 4, dtype=torch.float32), some_codes(1, 1, 40, 16)
    query = sample(1, 1, 2, 64, dtype=torch.float32) * 1e30
    visible = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    assert merge([product.attend(query, codes, book, codes, book, visible)]).isfinite().all()


def test_keys_and_values_of_different_width():
    book, wider = sample(16, K, 4), sample(24, K, 4, seed=1)
    query, keys, values = sample(1, 2, 3, 64), some_codes(1, 2, 20, 16), some_codes(1, 2, 20, 24)
    visible = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    part = product.attend(query, keys, book, values, wider, visible)
    expected = decoded_first(query, keys, book, values, wider, visible)
    torch.testing.assert_close(merge([part]), expected, rtol=1e-12, atol=1e-13)


def test_codes_of_nan_and_of_equals():
    """NaN, as slots without a token may hold, gives a code and touches no other; ties go down."""
    book, x = sample(16, K, 4), sample(1, 2, 5, 64, dtype=torch.float32)
    clean = product.encode(x, book)
    x[:, 0, 3], x[:, 1, 2] = math.nan, math.inf
    codes = product.encode(x, book)
    hole = ~x.isfinite().all(-1)
    assert codes.max() < K and torch.equal(codes[~hole], clean[~hole])
    book = torch.tensor([[[1.0], [-1.0], [1.0], [-1.0]]])
    x = torch.tensor([1.0, -1.0, 0.0]).reshape(1, 1, 3, 1)
    assert product.encode(x, book).flatten().tolist() == [0, 1, 0]


def test_memory_is_that_of_a_tile(product_elements):
    """No operation allocates more numbers than a tile has, however many the tokens."""
    product_elements(1 << 12)
    book, query, x = sample(16, K, 4), sample(1, 1, 2, 64), sample(1, 1, 2000, 64)
    visible = torch.ones(1, 1, 1, 2000, dtype=torch.bool)
    allocated = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                if out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                    allocated.append(out.untyped_storage().nbytes() // out.itemsize)
            return out

    with Watch():
        codes = product.encode(x, book)
        product.attend(query, codes, book, codes, book, visible)
    assert 1 << 11 <= max(allocated) <= 1 << 12


@pytest.mark.slow
def test_one_graph():
    """Nothing depends on data: both functions are traced whole."""
    book, query = sample(16, K, 4).half(), sample(1, 2, 3, 64, dtype=torch.float32)
    codes, visible = some_codes(1, 2, 40, 16), sample(1, 1, 1, 40) > 0
    args = (query, codes, book, codes, book, visible, 5.0)
    traced = torch.compile(product.attend, fullgraph=True, dynamic=False, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(traced(*args), product.attend(*args)))
    traced = torch.compile(product.encode, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(traced(query, book), product.encode(query, book))


def test_refusals():
    book, query, codes = sample(16, K, 4), sample(1, 2, 3, 64), some_codes(1, 2, 5, 16)
    visible = torch.ones(1, 1, 1, 5, dtype=torch.bool)

    def attend(query=query, keys=codes, key_book=book, values=codes, value_book=book):
        product.attend(query, keys, key_book, values, value_book, visible)

    attend()
    for x, match in ((sample(1, 2, 3, 66), "do not divide"), (sample(1, 2, 3, 128), "has 16 subspaces")):
        with pytest.raises(ValueError, match=match):
            product.encode(x, book)
        with pytest.raises(ValueError, match=match):
            attend(query=x)
    for wrong, match in (
        (book.byte(), "uint8"),
        (book[0], "shape"),
        (sample(16, 257, 4), "k <= 256"),
        (book[:, :0], "shape"),
        (sample(3, 16, K, 4), "for 3 heads, not 2"),
    ):
        for call in (
            lambda b: product.encode(query, b),
            lambda b: product.decode(codes, b, torch.float32),
            lambda b: attend(key_book=b),
            lambda b: attend(value_book=b),
        ):
            with pytest.raises(ValueError, match=match):
                call(wrong)
    for wrong in (codes.int(), codes[..., 1:], codes[:, :1], codes[:, :, 1:]):
        with pytest.raises(ValueError, match="codes of shape"):
            attend(values=wrong)
    with pytest.raises(ValueError, match="codes of shape"):
        product.decode(codes.int(), book, torch.float32)


@pytest.mark.parametrize("compiler", slow_but(["as written", "inductor"], "as written"))
@pytest.mark.parametrize("heads, rows, softcap", [(1, 2, None), (3, 5, 2.0)])
def test_the_compiled_twin_reads_its_slots_and_no_more(heads, rows, softcap, compiler):
    """One graph for all spans, bytes beyond the centroids in slots that nobody sees, keys unlike values."""
    books = sample(4, K, 8, seed=1), sample(16, 5, 2, seed=2)
    capacity, query = 5 * product_decode.UNIT + 32, sample(2, heads, rows, 32, seed=3)
    twin = product_decode.Compiled(product_decode._look_up, options={}) if compiler == "inductor" else None
    for blocks in (1, 2, 4):
        num_read = blocks * product_decode.UNIT
        keys, values = (some_codes(2, heads, capacity, n, seed=n, k=k) for n, k in ((4, K), (16, 5)))
        visible = torch.rand(2, 1, rows, capacity, generator=torch.Generator().manual_seed(blocks)) < 0.7
        visible[0, 0, 0] = False  # a row that sees nothing
        visible[:, :, :, [3, num_read - 2]] = False
        for x in (keys, values):
            x[:, :, [3, num_read - 2]] = 255
        args = query, keys, books[0], values, books[1], visible
        dynamic_size = torch.empty(1).expand(blocks + 1)
        if twin:
            found = twin([product_decode.dynamic_size(blocks)], dict, *args, softcap=softcap)
        else:
            found = product_decode._look_up([dynamic_size], *args, softcap=softcap)
        narrow = [x.narrow(2, 0, num_read) for x in (keys, values)]
        expected = product.attend(
            query, narrow[0], books[0], narrow[1], books[1], visible[..., :num_read], softcap
        )
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert not twin or len(twin.graphs) == 1
