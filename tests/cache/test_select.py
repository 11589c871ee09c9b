"""A cache that keeps every token and reads the pages that a query chooses."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

import fade_fast
from fade_fast.cache import host, select_store
from fade_fast.cache.select_store import SelectStore
from fade_fast.hf.models import CACHE_NAME
from fade_fast.kernels import pages
from fade_fast.policies import select
from fade_fast.policies.residents import Wanted
from fade_ref import importance
from fade_ref import select as spec
from fade_ref.config import INDEXES, RESIDENT_POLICIES, FadeConfig

from ..marks import slow_but
from ..models import new_cache, prompt, teacher_forced, tiny_llama

SMALL = dict(recent_window=8, block_size=8)
SELECT = FadeConfig(**SMALL, select=16)
PLAIN = FadeConfig(**SMALL)


def read_share(cache) -> float:
    """Tokens of the middle that a query and KV head read, as a share of those that are there now."""
    queries = read = held = 0
    for layer in cache.tiered:
        counted = layer.middle.counted.tolist()
        queries, read, held = queries + counted[0], read + counted[1], held + layer.middle.count
    return read / queries / (held / len(cache.tiered)) if queries else 1.0


@pytest.mark.parametrize("index", slow_but(INDEXES, "k2", "deviation+k2"))
def test_buffers_as_on_a_gpu(index, uncompiled_kernels):
    """They have slots to spare, and hold whole pages and blocks all the same."""
    model, inputs = tiny_llama(dtype=torch.float16), prompt(400)
    cache = new_cache(model, FadeConfig(select=64, index=index), max_length=500)
    logits = teacher_forced(model, cache, inputs, [396, 1, 1, 1, 1])
    assert logits.isfinite().all() and read_share(cache) < 0.3
    assert all(layer.middle.tiers[0].records.capacity % 64 == 0 for layer in cache.tiered)


@pytest.mark.parametrize(
    "codec, indexes",
    [("rotated", ("k2", "deviation+k2")), pytest.param("matched", INDEXES, marks=pytest.mark.slow)],
)
def test_every_torch_can_trace_the_kernels(codec, indexes, traced_kernels, compiled_on):
    """Older versions of Dynamo refuse some Python. Nothing is generated, so this takes seconds."""
    model, inputs = tiny_llama(dtype=torch.float16), prompt(200)
    compiled_on("cpu")
    for index in indexes:
        cold = None if "+" in index else "host"
        config = FadeConfig(select=32, block_size=32, recent_window=16, index=index, cold=cold)
        cache = new_cache(model, replace(config, quant_backend=codec), max_length=250)
        logits = teacher_forced(model, cache, inputs, [198, 1, 1])
        assert logits.isfinite().all() and read_share(cache) < 0.5
    assert all(len(x.graphs) for x in (select._compiled_choose, pages._compiled, select_store._compiled))


@pytest.mark.parametrize("codec", ["rotated", "matched"])
def test_below_the_budget_nothing_changes(codec):
    """To the bit: the same codes, read in the same order."""
    model, inputs = tiny_llama(), prompt(60, batch=2, pads=(0, 9))
    chunks = [40, 1, 1, 5, 1, 12]
    ours = new_cache(model, FadeConfig(**SMALL, select=256, quant_backend=codec))
    theirs = new_cache(model, FadeConfig(**SMALL, quant_backend=codec))
    found, expected = (teacher_forced(model, cache, inputs, chunks) for cache in (ours, theirs))
    assert torch.equal(found, expected)
    for a, b in zip(ours.tiered, theirs.tiered):
        assert a.middle.count == b.middle.count > 0
        assert all(torch.equal(x, y) for x, y in zip(a.decode_all(), b.decode_all()))


def test_above_the_budget_fewer_tokens_are_read():
    model, inputs = tiny_llama(), prompt(90, batch=2, pads=(0, 9))
    chunks = [80] + [1] * 10
    cache = new_cache(model, SELECT)
    found = teacher_forced(model, cache, inputs, chunks)
    expected = teacher_forced(model, new_cache(model, PLAIN), inputs, chunks)
    assert found.isfinite().all()
    assert torch.equal(found[:, :80], expected[:, :80])  # a prompt reads everything
    assert not torch.allclose(found[:, 80:], expected[:, 80:], atol=1e-3)
    assert read_share(cache) < 0.3


WHERE = [{}, dict(select=0.6, select_max=16), dict(middle_v_bits=16)]
WHERE += [dict(index=index) for index in INDEXES[1:]]
WHERE += [dict(eviction_policy=policy) for policy in RESIDENT_POLICIES[1:]]


@pytest.mark.parametrize("fields", slow_but(WHERE, *WHERE[:2], dict(eviction_policy="hybrid")), ids=str)
def test_where_the_payload_lies_changes_nothing(fields, monkeypatch):
    """With few resident pages, many are fetched, and the results are equal to the bit."""
    monkeypatch.setattr(SelectStore, "num_together", lambda self, new: 1)  # products of one shape
    model, inputs = tiny_llama(), prompt(120, batch=2, pads=(0, 9))
    chunks = [60] + [1] * 20 + [5, 20] + [1] * 15
    here = {name: x for name, x in fields.items() if name != "eviction_policy"}
    configs = [
        FadeConfig(**SMALL | dict(select=16) | here),
        FadeConfig(**SMALL | dict(select=16) | fields | COLD),
    ]
    caches = [new_cache(model, config) for config in configs]
    ours, theirs = (teacher_forced(model, cache, inputs, chunks) for cache in caches)
    assert torch.equal(ours, theirs)
    for layer in caches[1].tiered:
        queries, read, hits, misses = layer.middle.counted.tolist()
        assert hits > 0 and misses > 0 and read < 0.5 * queries * layer.middle.count
        assert [x.tolist()[:2] for x in (caches[0].tiered[0].middle.counted,)][0][0] == queries


def test_queries_of_a_step_read_together_what_they_read_one_by_one(monkeypatch):
    model, inputs = tiny_llama(dtype=torch.float64), prompt(110, batch=2, pads=(0, 9))
    for config in (SELECT, FadeConfig(**SMALL, select=0.5, select_max=32)):
        caches = [new_cache(model, config) for _ in range(2)]
        together = teacher_forced(model, caches[0], inputs, [60, 16, 16, 3, 15])
        with monkeypatch.context() as patch:
            patch.setattr(SelectStore, "num_together", lambda self, new: 1)
            alone = teacher_forced(model, caches[1], inputs, [60, 16, 16, 3, 15])
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
        counted = [cache.tiered[1].middle.counted.tolist() for cache in caches]
        assert counted[0] == counted[1] and counted[0][0] == 2 * 2 * 50


COLD = dict(cold="host", resident=24)


@pytest.mark.parametrize("policy", RESIDENT_POLICIES)
def test_residency_equals_the_specification(policy):
    draw, slots, pages, n = torch.Generator().manual_seed(0), 6, 20, 4
    wanted = Wanted(policy, 2, 3, torch.float64, "cpu") if policy != "position" else None
    held = select.Residency(2, 3, slots, "cpu", wanted)
    held.reserve(8)
    exact = [[spec.Residency.first(slots) for _ in range(3)] for _ in range(2)]
    seen, known, missed, ranks = [importance.empty(3) for _ in range(2)], 8, 0, [[None] * 3] * 2
    for step in range(60):
        if step == 20:  # the text grows
            known = pages
            held.reserve(pages)
        if wanted and step % 7:  # some steps bring pages without a query
            mass = torch.rand(2, 3, known, generator=draw, dtype=torch.float64).softmax(-1)
            sees = torch.rand(2, 1, known, generator=draw) < 0.9
            wanted.observe(mass * sees, sees)
            seen = [importance.observe(seen[b], mass[b, :, None], sees[b]) for b in range(2)]
            ranks = [spec.rank(policy, seen[b]).tolist() for b in range(2)]
        index = torch.rand(2, 3, known, generator=draw).topk(n).indices
        keep = None if step % 3 else torch.rand(2, 3, n, generator=draw) < 0.6
        slot, fetched = held.touch(index, keep)
        for b in range(2):
            for h in range(3):
                used = torch.ones(n).bool() if keep is None else keep[b, h]
                found = spec.touch(exact[b][h], index[b, h][used].tolist(), step, ranks[b][h])
                assert slot[b, h][used].tolist() == found.slots and (slot[b, h][~used] == slots).all()
                assert fetched[b, h].tolist() == [
                    bool(u) and found.fetched[int(used[:i].sum())] for i, u in enumerate(used)
                ]
                exact[b][h], missed = found.state, missed + sum(found.fetched)
                assert held.page_of_slot[b, h, :-1].tolist() == list(found.state.pages)
                assert held.last_used[b, h, :-1].tolist() == list(found.state.last_used)
                for page in range(known):
                    at = int(held.slot_of_page[b, h, page])
                    assert at == (found.state.pages.index(page) if page in found.state.pages else -1)
    assert missed > 100


def test_a_share_reads_the_fewest_pages_that_hold_it(monkeypatch):
    """With equal scores a share of the mass is this share of the pages. Sharp queries read few pages."""
    choices, counts = [], []
    real = select.choose

    def kept(mass, pages, share=None):
        found = real(mass, pages, share)
        choices.append((mass, *found))
        return found

    monkeypatch.setattr(select, "choose", kept)
    for scale in (0.0, 1.0, 100.0):
        model = tiny_llama(dtype=torch.float64)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= scale
        cache = new_cache(model, FadeConfig(**SMALL, select=0.49, select_max=56))
        choices.clear()
        teacher_forced(model, cache, prompt(140, batch=2), [90] + [1] * 50)
        num_read, every = [], []
        for mass, index, keep in choices:
            pages, order = mass.shape[-1], keep.sum(-1)
            held = (mass.gather(-1, index) * keep).sum(-1)
            last = mass.gather(-1, index).gather(-1, (order - 1).unsqueeze(-1)).squeeze(-1)
            assert ((held >= 0.49) | (order == 7)).all() and (held - last < 0.49).all()
            assert scale or (order == min(7, math.ceil(0.49 * pages))).all()
            num_read.append(order.double().mean())
            every.append(pages)
        read = cache.memory().selected
        assert read.read == pytest.approx(8 * float(torch.stack(num_read).mean())) and read.read < read.held
        counts.append(read.read)
    assert max(every) > 14 and counts[0] > counts[1] > counts[2] and counts[2] < 16


@pytest.mark.parametrize("policy", slow_but(RESIDENT_POLICIES[1:], "hybrid"))
def test_a_plan_says_what_stays_on_the_gpu(policy):
    """Pages in slots are those that the specification keeps, given the masses and pages of a real cache."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(150, batch=2, pads=(0, 9))
    config = FadeConfig(**SMALL, select=16, **COLD, eviction_policy=policy)
    cache = new_cache(model, config)
    heads, layer = 2, cache.tiered[1]
    exact = [[spec.Residency.first(3) for _ in range(heads)] for _ in range(2)]
    seen, clock, stored, missed = [importance.empty(heads) for _ in range(2)], 0, 0, 0
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp_min(0)

    def use(pages) -> int:
        """Use pages [row][head] by the specification. Returns how many were fetched."""
        nonlocal clock
        fetched = 0
        for b in range(2):
            ranks = spec.rank(policy, seen[b]).tolist() if seen[b].mass.shape[-1] else [None] * heads
            for h in range(heads):
                found = spec.touch(exact[b][h], pages[b][h], clock, ranks[h])
                exact[b][h], fetched = found.state, fetched + sum(found.fetched)
        clock += 1
        return fetched

    def stored_now() -> None:
        """New pages come to the slots, the newest of them at most as many as there are slots."""
        nonlocal stored
        before, stored = stored // 8, layer.middle.count if layer.has_middle else 0
        if new := [*range(max(before, stored // 8 - 3, 3), stored // 8)]:
            use([[new] * heads] * 2)

    for start, stop in [(0, 60), *((i, i + 1) for i in range(60, 150))]:
        layer.compact()
        stored_now()
        choices = []
        if start:
            real = layer.middle.choose
            layer.middle.choose = lambda *args, to=choices, of=real, **options: (
                to.append(of(*args, **options)) or to[0]
            )
        step = dict(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True)
        with torch.no_grad():
            model(**step, position_ids=position[:, start:stop], **{CACHE_NAME: cache})
        if not start:
            stored_now()
            continue
        layer.middle.choose, (choice,) = real, choices
        seen = [importance.observe(seen[b], choice.mass[b], choice.seen[b]) for b in range(2)]
        missed += use(choice.pages[:, :, 0].tolist())
        slots = layer.middle.residency.page_of_slot[..., :-1].tolist()
        assert slots == [[list(x.pages) for x in row] for row in exact]
    queries, read, hits, misses = layer.middle.counted.tolist()
    assert missed >= misses > 0 and hits > 0 and read < 0.5 * queries * layer.middle.count


def test_a_policy_of_residents_is_refused_by_name():
    for fields, message in (
        (dict(eviction_policy="h2o"), "eviction_policy='h2o' contradicts it"),
        (
            dict(eviction_policy="knorm", cold="host"),
            "'knorm' .* single tokens.*position, h2o, ema, tova, hybrid",
        ),
        (dict(eviction_policy="ema", cold="host", index="bounds+k2"), "gives most pages no mass"),
        (dict(int4_budget=100, cold="host"), "resident is the budget"),
    ):
        with pytest.raises(ValueError, match=message):
            FadeConfig(**SMALL, select=16, **fields)


def test_a_cache_tells_what_was_read():
    model, inputs = tiny_llama(), prompt(120, batch=2)
    cache, events = new_cache(model, FadeConfig(**SMALL, select=16, **COLD)), []
    teacher_forced(model, cache, inputs, [60])
    assert cache.memory().selected is None
    with cache.listen(events.append):
        with torch.no_grad():
            for i in range(60, 110):
                model(input_ids=inputs["input_ids"][:, i : i + 1], **{CACHE_NAME: cache}, use_cache=True)
    memory = cache.memory()
    read = memory.selected
    assert read.queries == 2 * 2 * 2 * 50  # layers, rows, KV heads, steps
    assert read.read == 16 and read.held == cache.tiered[0].middle.count >= 88
    assert read.hits + read.misses == 2 * read.queries and read.misses > 0
    payload = sum(x.nbytes for layer in cache.tiered for x in layer.host_tensors())
    assert memory.host == payload > 0
    everything = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held_tensors(cache)}
    assert memory.allocated + memory.host == sum(everything.values())
    assert "a query reads 16 of" in cache.describe() and "in host memory" in cache.describe()
    told = [event for event in events if event["event"] == "selection"]
    assert told and told[-1]["hits"] > told[0]["hits"] and told[-1]["tokens"] == 8 * 2 * told[-1]["queries"]


def held_tensors(cache):
    return [x for layer in cache.tiered for x in layer.tensors()] + cache.token_positions.tensors()


def test_most_of_the_cache_leaves_the_gpu():
    """Bytes of a token on the GPU: half of the key codes, scales of keys, and a share of the means."""
    model = tiny_llama(head_dim=128)
    config = FadeConfig(recent_window=16, select=64, cold="host")
    cache = fade_fast.create_cache(model, config, max_length=4096)
    teacher_forced(model, cache, prompt(4096), [4096])
    memory, dense = cache.memory(), 4096 * 2 * 128 * 4  # the model is float32
    records = cache.tiered[0].middle.tiers[0].records
    on_gpu = [x for name, x in records.tensors.items() if name not in records.cold]
    assert sum(x.nbytes for x in on_gpu) == 2 * records.capacity * (32 + 4)
    assert memory.host == 2 * 2 * records.capacity * (32 + 64 + 4)
    assert memory.allocated - memory.tables < 2 * 2 * dense / 14


def test_host_memory_that_is_missing_is_an_error_before_anything_is_lost(monkeypatch):
    model, inputs = tiny_llama(), prompt(140)
    config = FadeConfig(**SMALL, select=16, **COLD)
    expected = teacher_forced(model, new_cache(model, config), inputs, [60] + [1] * 80)
    cache = new_cache(model, config)
    found = [teacher_forced(model, cache, inputs, [60])]
    real, failures = host.zeros, 0

    def fail(shape, dtype, device):
        raise host.HostMemoryError("cold='host': no memory")

    for i in range(60, 140):
        step = dict(input_ids=inputs["input_ids"][:, i : i + 1], **{CACHE_NAME: cache}, use_cache=True)
        before = content(cache)
        monkeypatch.setattr(host, "zeros", fail)
        try:
            with torch.no_grad():
                found.append(model(**step).logits)
            continue
        except host.HostMemoryError:
            failures += 1
        finally:
            monkeypatch.setattr(host, "zeros", real)
        assert all(torch.equal(x, y) for x, y in zip(before, content(cache), strict=True))
        with torch.no_grad():
            found.append(model(**step).logits)
    assert failures > 2 and torch.equal(torch.cat(found, dim=1), expected)


def content(cache) -> list[torch.Tensor]:
    """Copies of all slots in use. Blocks that are due stay where they are."""
    parts = [cache.token_positions.logical]
    for layer in cache.tiered:
        records = layer.middle.tiers[0].records
        parts += [layer.dense[name] for name in layer.dense.fields] + [
            records[name] for name in records.fields
        ]
    return [x.clone() for x in parts]


def test_pinned_memory_that_cannot_be_had_is_an_error_with_a_cure(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(host.HostMemoryError, match="800 bytes of host memory cannot be pinned.*ulimit -l"):
        host.zeros((100,), torch.float64, torch.device("cuda"))


@pytest.mark.parametrize("cold", [None, "host"])
def test_a_file_holds_everything(cold, tmp_path):
    model, inputs = tiny_llama(), prompt(130, batch=2, pads=(0, 9))
    config = FadeConfig(**SMALL, select=16, cold=cold)
    cache = new_cache(model, config)
    teacher_forced(model, cache, inputs, [60] + [1] * 50)
    cache.save(tmp_path / "cache")
    loaded = fade_fast.load_cache(tmp_path / "cache", model)
    assert loaded.fade_config == config and loaded.tiered[0].middle.chooses
    twin = copy.deepcopy(cache)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    outputs = [[], [], []]
    with torch.no_grad():
        for i in range(110, 130):
            for out, one in zip(outputs, (cache, loaded, twin)):
                step = dict(input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1])
                step |= {"position_ids": position[:, i : i + 1], CACHE_NAME: one, "use_cache": True}
                out.append(model(**step).logits)
    outputs = [torch.cat(x, dim=1) for x in outputs]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert loaded.memory().selected.queries > 0
    if cold:
        assert not {x.data_ptr() for x in twin.tiered[0].host_tensors()} & {
            x.data_ptr() for x in cache.tiered[0].host_tensors()
        }


def test_files_of_configurations_without_a_choice_are_as_before():
    header = new_cache(tiny_llama(), PLAIN).state_dict()[1]
    assert not {"select", "cold", "index", "resident"} & header["config"].keys()


def test_a_model_whose_attention_is_its_own_is_refused():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(
        ValueError, match="select=16: BloomForCausalLM does not let its attention be replaced"
    ):
        fade_fast.create_cache(model, FadeConfig(**SMALL, select=16))


def test_more_pages_than_can_be_told_apart_are_refused_before_a_write(monkeypatch):
    monkeypatch.setattr(select, "MOST_PAGES", 8)
    model = tiny_llama()
    cache = new_cache(model, SELECT)
    with torch.no_grad(), pytest.raises(ValueError, match="chooses from at most 64 in pages of 8"):
        model(prompt(200)["input_ids"], **{CACHE_NAME: cache}, use_cache=True)
    assert all(layer.middle is None or layer.middle.count == 0 for layer in cache.tiered)


@pytest.mark.parametrize("capturing", [False, True])
def test_pinned_memory_is_held_until_the_device_has_finished(capturing, monkeypatch):
    """PyTorch would hand it to its next user, while a kernel still reads the alias."""
    waits = []

    class Stream:
        def synchronize(self):
            waits.append(True)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(host, "_dropped", [])
    memory = torch.zeros(8, dtype=torch.uint8)
    alias = host._Interface(memory, torch.device("cuda"))
    del alias
    assert (len(waits), len(host._dropped)) == ((0, 1) if capturing else (1, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    del memory
    host._release(torch.zeros(1), torch.device("cuda"))
    assert waits and not host._dropped
