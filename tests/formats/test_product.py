"""Caches whose middle is product-quantised: the specification's codes, lives, refusals."""

import copy
import random

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import fade_fast
from fade_fast.hf.codebooks import Codebooks, train
from fade_fast.hf.models import CACHE_NAME
from fade_fast.saved import checkpoint, telemetry
from fade_ref import product as spec
from fade_ref.config import FadeConfig
from parity import cases

from ..marks import slow_but
from ..models import (
    CODED,
    SAFE,
    codebooks,
    compressed_tokens,
    dense,
    generate,
    new_cache,
    prompt,
    teacher_forced,
    tiny_llama,
)  # fmt: skip


@pytest.mark.parametrize("seed", slow_but(range(6), 0, 1))
@pytest.mark.parametrize("group", slow_but([1, 3], 3))
def test_codes_and_attention_are_the_specification_s(seed, group):
    """Random steps, padding, crops and orders of rows in float64: codes to the bit, outputs to a rounding."""
    draw = random.Random(seed)
    config = FadeConfig(
        n_sink=draw.choice([1, 4]), recent_window=draw.choice([0, 7]), block_size=draw.choice([1, 4, 8]),
        quant_backend="product",
    )  # fmt: skip
    shape = cases.Shape(group=group, dtype=torch.float64)
    steps = [draw.randint(5, 40)]
    for _ in range(8):
        steps += draw.choice([[1, 1], [draw.randint(2, 40)], [("crop", 2)], [("reorder", [1, 0])]])
    padding = (0, draw.randint(0, steps[0])) if draw.random() < 0.5 else ()
    coded = 0
    for step in cases.trace(config, shape, [*steps, 1], padding=padding, seed=seed):
        assert step.output_error < 1e-13 and step.same_tokens and step.same_records and step.same_lengths
        coded = max(coded, step.middle)
    assert coded > 0 and len(step.codes[0]) > 0
    assert torch.equal(*step.codes)


def test_what_is_stored_are_the_specification_s_codes():
    model, books = tiny_llama(dtype=torch.float64), codebooks(tiny_llama())
    inputs, exact = prompt(60, batch=2), dense(model)
    cache = fade_fast.create_cache(model, CODED, codebooks=books)
    teacher_forced(model, cache, inputs, [60])
    fade_fast.detach(model)
    teacher_forced(model, exact, inputs, [60])
    count = cache.tiered[0].middle.count
    assert 0 < count < 60 and compressed_tokens(cache) == 2 * count
    for side, x in (("key", exact.layers[0].keys), ("value", exact.layers[0].values)):
        theirs = spec.encode(x[:, :, 4 : 4 + count].double(), books[f"0.{side}"].double())
        found = cache.tiered[0].middle.tiers[0].records[f"{side}_codes"]
        assert found.dtype == torch.uint8 and torch.equal(found, theirs)


@pytest.mark.parametrize("chunks", [[30] + [1] * 30, [40, 20], [20, 5, 3, 12, 20]], ids=str)
def test_decoding_codes_reads_what_is_decoded(chunks):
    """Our attention over codes, and the model's own over the same codes decoded."""
    model, inputs = tiny_llama(dtype=torch.float64, group=3), prompt(60, batch=2)
    cache = new_cache(model, CODED)
    found = teacher_forced(model, cache, inputs, chunks)
    assert compressed_tokens(cache) > 0
    cache = new_cache(model, CODED)
    fade_fast.detach(model)
    expected = teacher_forced(model, cache, inputs, chunks)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_softcap_and_sliding_layers():
    """Gemma 2: every other layer has a sliding window, and takes no codebooks; scores are capped."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=16, attn_logit_softcapping=2.0, pad_token_id=0,
        query_pre_attn_scalar=4, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    model, inputs = Gemma2ForCausalLM(config).double().eval(), prompt(60)
    books = {name: x for name, x in codebooks(model).items() if name.startswith("1.")}
    with pytest.raises(ValueError, match="0.key, 0.value are missing or left over"):
        fade_fast.create_cache(model, CODED, codebooks=codebooks(model))
    found = []
    for reads_codes in (True, False):
        cache = fade_fast.create_cache(model, CODED, codebooks=books)
        if not reads_codes:
            fade_fast.detach(model)
        found.append(teacher_forced(model, cache, inputs, [30, 1, 1, 18, 5, 5]))
        assert compressed_tokens(cache) > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)  # the model's own softmax is in float32


def test_generate_beams_and_drafts():
    model, inputs = tiny_llama(), prompt(40, batch=2, pads=(0, 9))
    cache = new_cache(model, CODED)
    assert generate(model, cache, inputs, num_beams=2).shape == (2, 40) and compressed_tokens(cache) > 0
    model, inputs = tiny_llama(dtype=torch.float64), prompt(40)
    expected = generate(model, new_cache(model, CODED), inputs)
    drafted = new_cache(model, CODED)
    found = generate(model, drafted, inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected) and compressed_tokens(drafted) > 0


def test_a_codebook_that_holds_every_vector_changes_nothing():
    """Of a text that was learned by heart, coding loses the rounding to float16 alone."""
    model, inputs = tiny_llama(heads=1, layers=1), prompt(60)
    exact = dense(model)
    expected = teacher_forced(model, exact, inputs, [60])
    layer = exact.layers[0]
    books = {
        f"0.{side}": x[0, 0].half().unflatten(-1, (16, 4)).transpose(0, 1)
        for side, x in (("key", layer.keys), ("value", layer.values))
    }
    cache = fade_fast.create_cache(model, CODED, codebooks=books)
    found = teacher_forced(model, cache, inputs, [40] + [1] * 20)
    assert compressed_tokens(cache) > 0
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_bytes_are_counted():
    model, books = tiny_llama(), codebooks(tiny_llama())
    cache = fade_fast.create_cache(model, CODED, codebooks=books)
    size = sum(x.nbytes for x in books.values())
    assert (cache.memory().allocated, cache.memory().packed) == (size, 0)
    generate(model, cache, prompt(100, batch=2), new=5)
    memory = cache.memory()
    exact = 2 * memory.tokens["FP16"] * 2 * 2 * 64 * 4
    codes = 2 * memory.tokens["PQ"] * 2 * 2 * 16
    assert memory.tokens["PQ"] > 100 and memory.packed == exact + codes + size <= memory.allocated
    assert sum(layer["bytes"] for layer in cache.snapshot()["layers"]) == memory.packed
    assert f"{memory.tokens['PQ']} PQ" in cache.describe()
    length = cache.get_seq_length()
    one = fade_fast.create_cache(model, CODED, codebooks=books)
    generate(model, one, prompt(length), new=1)
    found = fade_fast.check_model(model, CODED, length=length, codebooks=books)
    assert found.packed == one.memory().packed and "product-quantised" in str(found)
    assert "codebooks missing" in fade_fast.check_model(model, CODED).refused


def test_max_length_makes_room_at_once():
    model = tiny_llama()
    cache = new_cache(model, CODED, max_length=200)
    generate(model, cache, prompt(30), new=1)
    before = [x.data_ptr() for layer in cache.tiered for x in layer.tensors()]
    generate(model, cache, prompt(100), new=90)
    assert before == [x.data_ptr() for layer in cache.tiered for x in layer.tensors()]


def test_a_copy_shares_codebooks_and_nothing_else():
    model, ids = tiny_llama(), prompt(50)["input_ids"]
    cache = new_cache(model, CODED)
    talk = lambda cache, ids: model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=12, do_sample=False)  # noqa: E731
    out = talk(cache, ids)
    twin = copy.deepcopy(cache)
    for ours, theirs in zip(cache.tiered, twin.tiered):
        assert all(a is b for a, b in zip(ours.format.codebooks, theirs.format.codebooks))
    shared = {x.data_ptr() for layer in cache.tiered for x in layer.tensors()}
    shared &= {x.data_ptr() for layer in twin.tiered for x in layer.tensors() if x.dtype == torch.uint8}
    assert not shared
    first = talk(cache, out)
    assert torch.equal(talk(twin, out), first)
    cache.reset()
    assert torch.equal(talk(cache, ids), out) and compressed_tokens(cache) > 0


def test_offloading_and_its_way_back():
    model, inputs = tiny_llama(), prompt(50)
    expected = teacher_forced(model, new_cache(model, CODED), inputs, [40, 1, 9])
    cache = new_cache(model, CODED)
    found = [teacher_forced(model, cache, {k: x[:, :40] for k, x in inputs.items()}, [40])]
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    for part in (slice(40, 41), slice(41, 50)):
        with torch.no_grad():
            found.append(model(input_ids=inputs["input_ids"][:, part], **{CACHE_NAME: cache}).logits)
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_a_saved_cache_needs_its_codebooks(tmp_path):
    """The file has their digest: without them, or with others, it is refused; with them it goes on."""
    model, path, ids = tiny_llama(), tmp_path / "c", prompt(50, batch=2)["input_ids"]
    books = codebooks(model)
    cache = fade_fast.create_cache(model, CODED, codebooks=books)
    talk = lambda cache, ids: model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=12, do_sample=False)  # noqa: E731
    out = talk(cache, ids)
    cache.save(path)
    tensors, known = cache.state_dict()
    assert {x.dtype for name, x in tensors.items() if "tier" in name} == {torch.uint8}
    assert not any("mean" in name or "scale" in name for name in tensors)
    with pytest.raises(ValueError, match="codebooks missing"):
        fade_fast.load_cache(path, model)
    others = codebooks(model, seed=1)
    with pytest.raises(ValueError, match="codes of other codebooks"):
        fade_fast.load_cache(path, model, codebooks=others)
    with pytest.raises(ValueError, match="codes of other codebooks"):
        fade_fast.create_cache(model, CODED, codebooks=others).load_state_dict(tensors, known)
    assert checkpoint.read_header(path)[0]["codebooks"] == Codebooks(books, {}).digest
    loaded = fade_fast.load_cache(path, model, codebooks=Codebooks(books, {}))
    assert compressed_tokens(loaded) == compressed_tokens(cache) > 0
    assert torch.equal(talk(loaded, out), talk(cache, out))
    again = fade_fast.create_cache(model, CODED, codebooks=books)
    again.load_state_dict(tensors, known)
    assert all(torch.equal(x, tensors[name]) for name, x in again.state_dict()[0].items())


def test_demotion_is_whole():
    model = tiny_llama()
    cache = new_cache(model, CODED)
    teacher_forced(model, cache, prompt(40), [40])
    middle, names = cache.tiered[0].middle, ("key_codes", "value_codes")
    before, count = [middle.tiers[0].records[name].clone() for name in names], middle.count

    def fail(evicted):
        raise torch.OutOfMemoryError("out of memory, as a test has it")

    keys = torch.randn(1, 2, 8, 64)
    with pytest.raises(torch.OutOfMemoryError):
        middle.demote(keys, keys, 4 + count, 40, {}, fail)
    assert middle.count == count
    for x, name in zip(before, names):
        assert torch.equal(middle.tiers[0].records[name], x)


def test_telemetry(tmp_path):
    model = tiny_llama()
    cache = new_cache(model, CODED)
    with cache.listen(tmp_path / "events"):
        generate(model, cache, prompt(40), new=20)
    events = telemetry.read(tmp_path / "events")
    demoted = [e for e in events if e["event"] == "demotion"]
    assert {e["into"] for e in demoted} == {"PQ"} and not any(e["planned"] for e in demoted)
    per_layer = sum(e["tokens"] for e in demoted if e["layer"] == 0)
    assert per_layer == cache.memory().tokens["PQ"] > 0
    assert sum(e["bytes_after"] for e in demoted if e["layer"] == 0) == per_layer * 2 * 2 * 16
    assert {e["buffer"] for e in events if e["event"] == "growth"} == {"timeline", "exact", "PQ"}


class TestRefusals:
    def test_configurations(self):
        for wrong, says in (
            (dict(int4_budget=8), "int4_budget=8"),
            (dict(positions="contiguous"), "contiguous"),
            (dict(middle_k_bits=8), "middle_k_bits=8"),
            (dict(middle_v_bits=2), "middle_v_bits=2"),
        ):
            with pytest.raises(ValueError, match=says):
                FadeConfig(quant_backend="product", **wrong)
        assert FadeConfig(quant_backend="product", positions="original").relocatable is False

    def test_codebooks_and_configuration_go_together(self):
        model = tiny_llama()
        with pytest.raises(ValueError, match="quant_backend='product', codebooks missing"):
            fade_fast.create_cache(model, CODED)
        with pytest.raises(ValueError, match="quant_backend='rotated', codebooks given"):
            fade_fast.create_cache(model, SAFE, codebooks=codebooks(model))
        assert model.config._attn_implementation != "fade"

    def test_what_is_no_set_of_codebooks(self):
        model, whole = tiny_llama(), codebooks(tiny_llama())

        def refused(says, error=ValueError, **changes):
            books = {name: x for name, x in (whole | changes).items() if x is not None}
            with pytest.raises(error, match=says):
                fade_fast.create_cache(model, CODED, codebooks=books)

        refused("1.value are missing", **{"1.value": None})
        refused("2.key are missing or left over", **{"2.key": whole["0.key"]})
        for wrong in (
            whole["0.key"][0], whole["0.key"].int(), whole["0.key"][:, :0], torch.randn(16, 257, 4),
            whole["0.key"] * torch.nan, "a codebook",
        ):  # fmt: skip
            refused("codebook 0.key is .* k at most 256", **{"0.key": wrong})
        for wrong in (3, [whole], torch.ones(2)):
            with pytest.raises(TypeError, match="a file, Codebooks, or a dict of tensors"):
                fade_fast.create_cache(model, CODED, codebooks=wrong)

    def test_other_models(self, tmp_path):
        model, other = tiny_llama(), tiny_llama(head_dim=32)
        books = train(model, prompt(40)["input_ids"], centroids=4)
        books.save(tmp_path / "books")
        for given in (books, tmp_path / "books", str(tmp_path / "books")):
            fade_fast.create_cache(tiny_llama(dtype=torch.float16), CODED, codebooks=given)  # is the same
            with pytest.raises(ValueError, match="learned from another model"):
                fade_fast.create_cache(other, CODED, codebooks=given)
            cache = fade_fast.create_cache(model, CODED, codebooks=given)
            generate(model, cache, prompt(40), new=2)
            assert compressed_tokens(cache) > 0
        with pytest.raises(FileNotFoundError):
            fade_fast.create_cache(model, CODED, codebooks=tmp_path / "none")

    def test_codebooks_of_another_head_dim(self):
        """Told when the first keys come, before anything is written."""
        model = tiny_llama(head_dim=32)
        cache = fade_fast.create_cache(model, CODED, codebooks=codebooks(tiny_llama()))
        with pytest.raises(ValueError, match="layer 0 has keys of 32 channels, its codebook is for 64"):
            generate(model, cache, prompt(40))
        assert cache.get_seq_length() == 0 and not any(x.is_initialized for x in cache.tiered)

    def test_codes_cannot_be_cropped(self):
        model = tiny_llama()
        cache = new_cache(model, CODED)
        teacher_forced(model, cache, prompt(60), [60])
        with pytest.raises(ValueError, match="uncompressed"):
            cache.crop(-cache.tiered[0].recent - 1)
        assert cache.get_seq_length() == 60
