"""The matched codec in the fast cache: codes of the specification, attention on them, calibration."""

import copy
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fade_fast
from fade_fast.formats.matched import MatchedTier
from fade_fast.hf import calibration
from fade_fast.hf.calibration import Calibration
from fade_fast.hf.models import CACHE_NAME
from fade_fast.kernels import decode, matched, rotated
from fade_fast.kernels.packed import TierView
from fade_fast.kernels.rotated import Packed
from fade_ref import matched as spec
from fade_ref.config import FadeConfig
from fade_ref.rope import NOPE, Rope

from ..marks import slow_but
from ..models import compressed_tokens, generate, new_cache, prompt, show_survivors, tiny_llama

SMALL = dict(recent_window=8, block_size=4, quant_backend="matched")
RULES = {
    "keeps all": dict(),
    "two bits": dict(middle_k_bits=2, middle_v_bits=2),
    "eight and three": dict(middle_k_bits=8, middle_v_bits=3),
    "keys alone": dict(middle_v_bits=16),
    "by layer": dict(layer_bits={1: (3, 2), 2: (16, 16)}),
    "renumbered": dict(int4_budget=12),
    "evicts": dict(int4_budget=12, int2_budget=8, positions="original"),
    "two tiers": dict(int4_budget=12, int2_budget=None),
    "by attention": dict(int4_budget=12, eviction_policy="h2o", plan_scope="head"),
}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Calibrations are written to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(dim=64, heads=2, group=2, n=200, seed=0, rope=NOPE):
    """Moments of random vectors, their codecs' matrices in both packages, and the vectors."""
    mix = normal(heads, dim, dim, seed=seed) * torch.linspace(0.1, 1, dim)
    keys = normal(heads, n, dim, seed=seed + 1) @ mix / 4 + normal(heads, 1, dim, seed=seed + 2)
    query = normal(heads * group, n, dim, seed=seed + 3) * torch.linspace(1, 0.1, dim)
    values = normal(heads, n, dim, seed=seed + 4) @ mix.mT / 4
    moments = spec.measure(query, keys, values, None, rope, dim**-0.5, 4)
    found = Calibration({0: moments}, {0: rope}, {})
    tables = found.tables("still", 64, torch.device("cpu"))[0]
    mean, *pair = spec.frame(moments, "still", rope)
    exact = spec.matched(*pair), spec.matched(moments.values, moments.outputs)
    return tables, exact, keys, values


@pytest.mark.parametrize("dim", slow_but((64, 80, 128), 64))
@pytest.mark.parametrize("bits", (8, 4, 3, 2))
def test_codes_of_the_specification(bits, dim):
    """Nearly all vectors have its codes. A rounding error may change a code, and then those after it: the
    damage is that of the specification still."""
    (mean, keys_of, values_of), exact, keys, values = layer(dim, n=120)
    sides = (keys, mean, keys_of, exact[0]), (values, None, values_of, exact[1])
    for x, m, table, matrices in sides:
        codec = spec.MatchedCodec(bits, matrices, of_values=m is None)
        wanted = codec.encode(x, None if m is None else m[:, None].double())
        own = None if m is None else m[None, :, None]
        ours = matched.encode(x[None].float(), own, table.encode, table.feedback, bits, of_values=m is None)
        same = (ours.codes[0] == wanted.codes).all(-1)
        assert same.float().mean() >= 0.98
        torch.testing.assert_close(ours.scale[0].double()[same], wanted.scale[same], rtol=1e-3, atol=0)
        back = rotated.decode(ours, own, table.decode, bits, torch.float64)[0]
        lost = [
            codec.damage(torch.einsum("hij,hnj->hni", matrices.encode, x - y)).sum()
            for y in (back, codec.decode(wanted, None if m is None else m[:, None].double()))
        ]
        assert lost[0] <= 1.01 * lost[1]


def test_tiles_blocks_and_means():
    """Keys and values of a prompt are encoded in tiles, with the mean of their block."""
    (mean, *sides), _, keys, values = layer(n=96)
    keys, values = keys[None].float(), values[None].float()
    means = (mean[None, :, None] + 0.01 * torch.arange(3)[:, None]).half()
    whole = matched.encode_both(keys, values, means, sides, (4, 3))
    for i in range(3):
        part = slice(32 * i, 32 * i + 32)
        own = matched.encode(keys[:, :, part], means[:, :, i, None], sides[0].encode, sides[0].feedback, 4)
        assert torch.equal(whole[0].codes[:, :, part], own.codes)
    other = matched.encode(values, None, sides[1].encode, sides[1].feedback, 3)
    assert torch.equal(whole[1].codes, other.codes) and torch.equal(whole[1].scale, other.scale)


@pytest.mark.parametrize("name", slow_but(["8 8", "4 4", "3 2", "2 3", "4 16"], "4 4", "2 3"))
@pytest.mark.parametrize("contiguous", (False, True))
@pytest.mark.parametrize("chunks", (None, (64,)), ids=("eager", "as compiled"))
def test_attention_on_codes(name, contiguous, chunks):
    """Against decoded keys and values, in float64; the function that is compiled on a GPU in float16."""
    bits = tuple(map(int, name.split()))
    (mean, keys_of, values_of), _, keys, values = layer(n=128)
    batch, heads, group, dim, new = 2, 2, 3, 64, 2
    dtype = torch.float16 if chunks else torch.float64
    keys, values = (torch.stack((x, x.flip(1))) for x in (keys, values))
    means = mean.half()[None, :, None].expand(batch, -1, 1, -1)
    if bits[1] == 16:
        values = values.to(dtype)
    own = matched.encode_both(keys, values, means, (keys_of, values_of), bits)
    valid = torch.rand(batch, 1, 128, generator=torch.Generator().manual_seed(0)) < 0.9
    inv_freq = 100.0 ** (-torch.arange(0, dim, 2) / dim)
    at = torch.randint(0, 999, (batch, 1, 128)) if contiguous else None
    decoded = rotated.decode(own[0], means, keys_of.decode, bits[0], torch.float64)
    if contiguous:
        decoded = rotated_by(decoded, at, inv_freq)
    seen_values = rotated.decode(own[1], None, values_of.decode, bits[1], torch.float64)
    bound = own[1].scale.float().amax(-1) if bits[1] != 16 else values.float().abs().amax((-2, -1)) * 1.01
    view = TierView(
        own[0], Packed(own[1].codes.mT.contiguous(), own[1].scale, None), bound, means, valid, 1 << 30, at
    )
    query, dense, dense_values = (normal(batch, n, m, dim, seed=5).to(dtype) for n, m in (
        (heads * group, new), (heads, 5), (heads, 5)
    ))  # fmt: skip
    seen = torch.ones(batch, new, 5, dtype=torch.bool).tril(3)
    constants = dict(scaling=0.125, softcap=None, interleaved=False)
    args = query, dense, dense_values, seen, keys_of.decode_and_sum, [view]
    if chunks:
        inputs = (*args, None, inv_freq if contiguous else None, [], values_of.decode)
        own = decode._of_slots_read(inputs, [128])
        found = decode._attend(*own, bits=(bits,), chunks=chunks, **constants)
    else:
        found = decode.attend(
            *args, bits=[bits], slots_read=[128], scaling=0.125, value_matrix=values_of.decode,
            inv_freq=inv_freq if contiguous else None,
        )  # fmt: skip
    all_keys = torch.cat((dense.double(), decoded), 2).repeat_interleave(group, 1)
    all_values = torch.cat((dense_values.double(), seen_values), 2).repeat_interleave(group, 1)
    mask = torch.cat((seen, valid.expand(-1, new, -1)), -1)[:, None]
    scores = (query.double() @ all_keys.mT * 0.125).masked_fill(~mask, -math.inf)
    expected = (scores.softmax(-1) @ all_values).transpose(1, 2)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (4e-3 if chunks else 1e-5)  # sums in float32


def rotated_by(x, position, inv_freq):
    from fade_fast.kernels.rope import rotate

    return rotate(x, position, inv_freq, False)


@pytest.mark.parametrize("pads", [pytest.param((0, 0), marks=pytest.mark.slow, id="unpadded"), (0, 11)])
@pytest.mark.parametrize("name", slow_but(RULES, "keeps all", "evicts", "by layer"))
def test_generate_save_copy(name, pads, tmp_path):
    """Attention on codes equals attention over the same codes read dense; files and copies hold the same."""
    model, config = tiny_llama(layers=3, dtype=torch.float64), FadeConfig(**SMALL, **RULES[name])
    inputs = prompt(60, batch=2, pads=pads)
    cache = new_cache(model, config)
    with torch.no_grad():
        generate(model, cache, inputs, new=30)
    tiers = [tier.format for kv in cache.tiered for tier in kv.held_tiers()]
    assert tiers and all(type(tier) is MatchedTier for tier in tiers) and compressed_tokens(cache) > 0
    assert all(kv.middle.tiers[0].records.fields.keys().isdisjoint({"key_zero", "value_zero"})
               for kv in cache.tiered if kv.middle is not None)  # fmt: skip
    memory, matrices = cache.memory(), 2 * 2 * (3 * 64 + 1) * 64 * 2  # two sides of two heads
    assert memory.tables == 3 * (matrices + 2 * 64 * 4) < memory.allocated
    cache.save(tmp_path / "cache")
    assert fade_fast.load_cache(tmp_path / "cache", model, verify=False).calibration is cache.calibration
    calibration._in_use.clear()  # as in another process
    twin, again = copy.deepcopy(cache), fade_fast.load_cache(tmp_path / "cache", model, verify=False)
    assert twin.calibration is cache.calibration and again.calibration is not cache.calibration
    step = dict(input_ids=torch.tensor([[5], [9]]), attention_mask=torch.ones(2, cache.get_seq_length() + 1))
    step["attention_mask"][:, :60] = inputs["attention_mask"]
    with torch.no_grad():
        outputs = [model(**step, **{CACHE_NAME: x}).logits for x in (cache, twin, again)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", slow_but(RULES, "keeps all", "two tiers"))
def test_codes_equal_a_dense_twin(name):
    """The model's own attention over decoded keys and values gives the same logits."""
    model, config = tiny_llama(layers=3, dtype=torch.float64), FadeConfig(**SMALL, **RULES[name])
    if config.plan_scope == "head":
        pytest.skip("heads that keep different tokens have no dense twin in stock attention")
    inputs = prompt(70)
    ours = new_cache(model, config)
    logits = fed(model, ours, inputs)
    twin = new_cache(model, config)
    fade_fast.detach(model)
    show_survivors(twin)
    torch.testing.assert_close(logits, fed(model, twin, inputs), rtol=1e-6, atol=1e-6)
    assert compressed_tokens(ours) > 0


def fed(model, cache, inputs, size=5):
    out = []
    with torch.no_grad():
        for part in inputs["input_ids"].split(size, dim=1):
            out.append(model(input_ids=part, **{CACHE_NAME: cache}, use_cache=True).logits)
    return torch.cat(out, dim=1)


def test_the_user_s_folder_keeps_the_calibration(cache_folder):
    model = tiny_llama()
    first = new_cache(model, FadeConfig(**SMALL)).calibration
    (file,) = (cache_folder / "fade" / "calibration").iterdir()
    assert new_cache(model, FadeConfig(**SMALL, int4_budget=9)).calibration is first
    again = new_cache(tiny_llama(), FadeConfig(**SMALL)).calibration
    assert again is first  # equal models share the tables
    calibration._in_use.clear()  # as in another process
    again = new_cache(tiny_llama(), FadeConfig(**SMALL)).calibration
    assert again is not first and again.digest == first.digest
    assert again.provenance["tokens"] == calibration.TOKENS
    other = new_cache(tiny_llama(seed=1), FadeConfig(**SMALL)).calibration
    assert other.digest != first.digest and len(list(file.parent.iterdir())) == 2
    file.write_bytes(b"damaged")
    assert new_cache(tiny_llama(), FadeConfig(**SMALL)).calibration.digest == first.digest


def test_calibration_leaves_the_model_as_it_was():
    model = tiny_llama()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state, names = torch.random.get_rng_state(), dict(model.__dict__)
    calibration.of_model(model, [0, 1])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state) and model.__dict__.keys() == names.keys()
    assert model.config._attn_implementation == "sdpa"


def test_files(tmp_path):
    """A file serves its model; other files, models and configurations are refused."""
    model = tiny_llama()
    ids = prompt(80, batch=2)["input_ids"]
    found = calibration.calibrate(model, ids, [0, 1])
    found.save(tmp_path / "file")
    cache = fade_fast.create_cache(model, FadeConfig(**SMALL), calibration=tmp_path / "file", verify=False)
    assert cache.calibration.digest == found.digest and found.provenance["tokens"] == 160
    half = tiny_llama(dtype=torch.bfloat16)  # of another dtype
    fade_fast.create_cache(half, FadeConfig(**SMALL), calibration=found, verify=False)
    refused = [
        (tiny_llama(heads=1), FadeConfig(**SMALL), tmp_path / "file", "measured on another model"),
        (model, FadeConfig(), found, "calibration given"),
        (model, FadeConfig(**SMALL), calibration.calibrate(model, ids, [1]), r"layers \[1\], .* \[0, 1\]"),
    ]
    for other, config, source, words in refused:
        with pytest.raises(ValueError, match=words):
            fade_fast.create_cache(other, config, calibration=source, verify=False)
    (tmp_path / "text").write_text("no calibration")
    with pytest.raises(ValueError, match="holds no calibration"):
        calibration.load(tmp_path / "text")
    with pytest.raises(TypeError, match="not list"):
        fade_fast.create_cache(model, FadeConfig(**SMALL), calibration=[], verify=False)
    loaded = calibration.load(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"")  # in place: what was loaded must not be pages of the file
    assert loaded.digest == found.digest


def test_codes_of_another_calibration_are_refused():
    model = tiny_llama()
    caches = [
        fade_fast.create_cache(
            model, FadeConfig(**SMALL), verify=False,
            calibration=calibration.calibrate(model, prompt(90, seed=seed)["input_ids"], [0, 1]),
        )
        for seed in (0, 1)
    ]  # fmt: skip
    generate(model, caches[0], prompt(40), new=4)
    with pytest.raises(ValueError, match="codes of another calibration"):
        caches[1].load_state_dict(*caches[0].state_dict())
    assert not caches[1].get_seq_length()


def test_a_model_without_rope(tmp_path):
    """Its keys are coded as they come, less one mean."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_head=2, n_layer=2, n_positions=300)).eval()
    cache = fade_fast.create_cache(model, FadeConfig(**SMALL))
    assert not any(cache.calibration.rotates(i) for i in range(2))
    generate(model, cache, dict(input_ids=prompt(50)["input_ids"] % 99), new=20)
    assert compressed_tokens(cache) > 0
    cache.save(tmp_path / "cache")
    again = fade_fast.load_cache(tmp_path / "cache", model)
    step = dict(input_ids=torch.tensor([[7]]))
    with torch.no_grad():
        assert torch.equal(*(model(**step, **{CACHE_NAME: x}).logits for x in (cache, again)))


def test_means_follow_positions():
    """The mean of a block is that before RoPE, rotated to the positions of the block's real tokens."""
    model, inputs = tiny_llama(), prompt(60, batch=2, pads=(0, 9))
    cache = new_cache(model, FadeConfig(**SMALL))
    generate(model, cache, inputs, new=4)
    for i, kv in enumerate(cache.tiered):
        rope = cache.calibration.ropes[i]
        rope = Rope(rope.inv_freq, interleaved=rope.interleaved)
        positions = kv.middle.position(kv.middle.tiers[0])[:, 0].unflatten(-1, (-1, 4))
        for b in range(2):
            for j, at in enumerate(positions[b]):
                mean = cache.calibration.moments[i].mean
                expected = spec.block_mean(mean, at[at >= 0].long(), rope)
                torch.testing.assert_close(
                    kv.middle.means["mean"][b, :, j].double(), expected, rtol=2e-3, atol=2e-3
                )


def test_keys_of_other_heads_are_refused():
    """As a process would have whose model splits heads in a way that is not known."""
    cache = new_cache(tiny_llama(), FadeConfig(**SMALL))
    keys = torch.randn(1, 1, 40, 64)
    with pytest.raises(ValueError, match="layer 0 has 1 KV heads, its calibration is for 2"):
        cache.tiered[0].check(keys, keys)
    keys = keys.expand(-1, 2, -1, -1)
    cache.tiered[0].check(keys, keys)


def test_tables_do_not_depend_on_the_number_of_threads():
    """Several layers at a time, with one thread each; the number of threads is left as it was."""
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for i in range(3):
        x = torch.randn(5, 2, 64, 64, generator=generator)
        moments[i] = spec.Moments(x[0, :, 0], *(x[1:] @ x[1:].mT / 64))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made = Calibration(moments, dict.fromkeys(moments, NOPE), {})
            found.append(made.tables("still", 64, torch.device("cpu")))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    seen = calibration._by_single_threads(lambda i: (i, torch.get_num_threads()), range(6))
    assert seen == [(i, 1) for i in range(6)]
    for other in found[1:]:
        for i, (mean, *sides) in found[0].items():
            assert torch.equal(mean, other[i][0])
            assert all(torch.equal(a, b) for x, y in zip(sides, other[i][1:]) for a, b in zip(x, y))
