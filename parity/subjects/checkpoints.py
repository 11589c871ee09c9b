"""Checkpoints: a loaded cache continues like the saved cache, bit for bit."""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import fade_fast
from fade_fast.hf import cache as hf_cache
from fade_fast.hf.models import CACHE_NAME
from fade_fast.policies import plan
from fade_fast.saved import checkpoint
from fade_ref.config import POSITIONS, PRESETS, FadeConfig
from fade_ref.tiers import INTEGER_TIERS, Tier

from .. import cases as measure
from ..case import Case, Draw, Found
from ..tolerances import ATTENTION

SMALL = dict(recent_window=8, block_size=4)
ALWAYS = ("checkpoint of tier FP16",)
BEFORE = [30, 1, 1, 1, 1, 1]
AFTER = [1] * 7 + [18, 3, ("crop", 2), 1, ("reorder", [1, 0]), 1, ("select", [1]), 1, ("repeat", 3), 1, 6, 1]


def registry() -> list[str]:
    """The names that need a case with a checkpoint: everything that a cache can contain."""
    names = [f"tier {tier.name}" for tier in Tier] + [f"codec {name}" for name in hf_cache.CODECS]
    names += [f"policy {name}" for name in plan.SUPPORTED] + [f"plan scope {name}" for name in plan.SCOPES]
    names += [f"positions {name}" for name in POSITIONS] + [f"preset {name}" for name in PRESETS]
    return [f"checkpoint of {name}" for name in names]


def collect() -> list[Case]:
    cases = []

    def case(group, name, config, *covers, dtype=None, **options):
        covers = (f"codec {config.quant_backend}", *covers)
        names = (*ALWAYS, *(f"checkpoint of {cover}" for cover in covers))
        run = _goes_on(config, dtype=dtype or torch.float32, **options)
        cases.append(Case("checkpoints", group, name, run, names, dtype))

    for (k, first), (v, second) in ((a, b) for a in INTEGER_TIERS.items() for b in INTEGER_TIERS.items()):
        covers = {f"tier {first.name}", f"tier {second.name}"}
        config = FadeConfig(**SMALL, middle_k_bits=k, middle_v_bits=v)
        case("tiers", f"k{k}v{v}", config, *covers)
        if k == v:
            config = FadeConfig(**SMALL, middle_k_bits=k, middle_v_bits=v, int4_budget=9, int2_budget=6)
            case("tiers", f"{k} bits, 2 bits, evict", config, *covers, "tier INT2", "tier EVICTED")
    case("tiers", "off", FadeConfig(recent_window=None))
    case("tiers", "keys alone", FadeConfig(**SMALL, middle_v_bits=16))
    case("tiers", "keys alone, evict", FadeConfig(**SMALL, middle_v_bits=16, int4_budget=20, int2_budget=8))
    case("tiers", "matched", FadeConfig(**SMALL, quant_backend="matched"))
    case(
        "tiers", "matched, evict", FadeConfig(**SMALL, quant_backend="matched", int4_budget=9, int2_budget=6)
    )
    case("tiers", "layers of other widths", FadeConfig(**SMALL, layer_bits={0: (8, 3), 1: (16, 16)}))
    for policy in plan.SUPPORTED:
        for positions in POSITIONS:
            config = FadeConfig(
                **SMALL, int4_budget=7, int2_budget=6, eviction_policy=policy, positions=positions
            )
            case("policies", f"{policy}, {positions}", config, f"policy {policy}", f"positions {positions}")
    for scope in plan.SCOPES:
        # With renumbering and a plan per head, two tiers would read slots at different positions.
        lower = 0 if scope == "head" else 6
        config = FadeConfig(**SMALL, int4_budget=9, int2_budget=lower, plan_scope=scope)
        case("policies", f"plan_scope {scope}", config, f"plan scope {scope}", padding=9)
    for name in PRESETS:
        before = [150, 1, 40, 1]
        case("presets", name, FadeConfig.preset(name), f"preset {name}", before=before)
    for dtype in ATTENTION:
        name = str(dtype).removeprefix("torch.")
        config = FadeConfig(**SMALL, int4_budget=9, int2_budget=6, eviction_policy="h2o")
        case("dtypes", name, config, dtype=dtype)
    evicting = FadeConfig(**SMALL, int4_budget=9)
    case("what came before", "padding", evicting, padding=13)
    case("what came before", "sinks to come", evicting, padding=29, before=[30])
    case("what came before", "nothing", evicting, before=[], after=[30, *AFTER])
    case("what came before", "a due block", FadeConfig(**SMALL), before=[4, 16])
    case("what came before", "nothing is compressed yet", FadeConfig(**SMALL), before=[7, 1])
    changed = [*BEFORE, ("crop", 2), 1, ("select", [1, 1, 0]), 1, ("select", [2, 0]), 1]
    learned = FadeConfig(**SMALL, int4_budget=9, eviction_policy="snapkv")
    case("what came before", "rows and columns changed", learned, before=changed)
    for before in ([5], [7], [8], [9], BEFORE):
        # The layers of transformers cannot be cropped after their window is full.
        run = _goes_on(evicting, model=_gemma, before=before, after=[1, 1, 1, 18, 1, ("reorder", [1, 0]), 1])
        cases.append(Case("checkpoints", "sliding windows of 8", f"{sum(before)} tokens", run))
    kinds = dict(int4=FadeConfig(**SMALL), int3=_both(3)) | {"int8, int2": _both(8)}
    for name, config in kinds.items():
        cases.append(Case("checkpoints", "bytes", name, _bytes(config), ALWAYS))
    cases.append(Case("checkpoints", "refused", "another configuration or model", _refused))
    return cases


def _both(bits: int) -> FadeConfig:
    return FadeConfig(
        **SMALL, middle_k_bits=bits, middle_v_bits=bits, int4_budget=9, int2_budget=6, eviction_policy="tova"
    )


SIZES = dict(
    vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=2, head_dim=64,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
)  # fmt: skip


def _llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _gemma():
    """A model with two layers: one keeps the cache of transformers, and one is tiered."""
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=kinds))


def _weights(config: FadeConfig):
    return measure.policy_weights() if config.eviction_policy == "learned" else None


def _cache(model, config: FadeConfig):
    return fade_fast.create_cache(model, config, policy_weights=_weights(config), verify=False)


class Talk:
    """A model that fills a cache step by step, always with the same tokens."""

    def __init__(self, model, cache, padding: int = 0):
        self.model, self.cache, self.padding = model, cache, padding

    def run(self, steps, ids: torch.Tensor) -> list[torch.Tensor]:
        """Logits of each step. The tokens are `ids` [rows, tokens], from the length of the cache on."""
        out = []
        for step in steps:
            if not isinstance(step, int):
                self._change(*step)
                continue
            start = self.cache.get_seq_length()
            rows = self.cache.token_positions.batch if self.cache.token_positions.length else 2
            text = ids[:rows, : start + step].to(self.model.device)
            mask = torch.ones_like(text)
            if start:  # rows may have moved, so the cache says which tokens are padding
                mask[:, :start] = self.cache.token_positions.logical >= 0
            else:
                mask[0, : self.padding] = 0
            output = self.model(
                input_ids=text[:, start:], attention_mask=mask, **{CACHE_NAME: self.cache}, use_cache=True
            )
            out.append(output.logits)
        return out

    def _change(self, what: str, how) -> None:
        cache = self.cache
        if what == "crop":
            cache.crop(-how)
        elif what == "repeat":
            cache.batch_repeat_interleave(how)
        else:
            rows = torch.tensor(how, device=self.model.device)
            cache.reorder_cache(rows) if what == "reorder" else cache.batch_select_indices(rows)


def _goes_on(config, *, dtype=torch.float32, padding=0, before=BEFORE, after=AFTER, model=_llama):
    def run(found: Found, seed: int):
        torch.manual_seed(seed % 2**31)
        first = model().to(dtype).to(found.device).eval()
        ids = Draw(seed).integers(1, SIZES["vocab_size"], 3, 300)
        cache = _cache(first, config)
        talk = Talk(first, cache, padding)
        talk.run(before, ids)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            cache.save(path)
            second = copy.deepcopy(first)
            loaded = fade_fast.load_cache(path, second, policy_weights=_weights(config), verify=False)
        _same_state(found, loaded, cache, "as loaded")
        found.holds("checkpoint", loaded.memory().tokens == cache.memory().tokens, "tokens by tier")
        for name, x in sorted(loaded.state_dict()[0].items()):  # the digest covers format and integers
            found.bits("checkpoint", (name, x.dtype, x.shape))
            if name.endswith(("timeline", "position", "read_at", "evicted", "demoted")):
                found.bits("checkpoint", x)
        pairs = zip(Talk(second, loaded, padding).run(after, ids), talk.run(after, ids))
        for i, (ours, original) in enumerate(pairs):
            found.holds("checkpoint", _same(ours, original), f"logits {i} after it")
        _same_state(found, loaded, cache, "in the end")

    return run


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree bit for bit. A NaN equals a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a != a) & (b != b)).all())


def _same_state(found: Found, ours, original, when: str) -> None:
    (a, known), (b, expected) = ours.state_dict(), original.state_dict()
    found.holds("checkpoint", known == expected, f"lengths, {when}")
    found.holds("checkpoint", a.keys() == b.keys(), f"names, {when}")
    for name in a.keys() & b.keys():
        found.holds("checkpoint", _same(a[name], b[name]), f"{name}, {when}")


def _bytes(config):
    """On every machine, a file contains exactly the given numbers."""

    def run(found: Found, seed: int):
        torch.manual_seed(seed % 2**31)
        model, draw = _llama().to(found.device).eval(), Draw(seed)
        cache = _cache(model, config)
        Talk(model, cache).run(BEFORE, draw.integers(1, SIZES["vocab_size"], 3, 300))
        tensors, known = cache.state_dict()
        for name in sorted(tensors):
            x = tensors[name]
            if x.dtype == torch.uint8:
                tensors[name] = draw.integers(0, 256, *x.shape).to(x.dtype)
            elif x.is_floating_point():
                tensors[name] = draw.uniform(*x.shape).to(x.dtype)
        twin = _cache(model, config)
        twin.load_state_dict(tensors, known)
        with tempfile.TemporaryDirectory() as folder:
            twin.save(Path(folder) / "cache")
            read, _ = checkpoint.read(Path(folder) / "cache")
        found.holds("checkpoint", read.keys() == tensors.keys(), "names")
        for name in sorted(read):
            found.bits("checkpoint", name)
            found.same("checkpoint", read[name], tensors[name], name)

    return run


def _refused(found: Found, seed: int):
    """A file of another model or configuration is refused and changes nothing."""
    model = _llama().to(found.device).eval()
    cache = _cache(model, FadeConfig(**SMALL))
    Talk(model, cache).run(BEFORE, Draw(seed).integers(1, SIZES["vocab_size"], 3, 300))
    other = _cache(model, FadeConfig(**SMALL, middle_k_bits=8))
    found.refused(lambda: other.load_state_dict(*cache.state_dict()), "configuration", "middle_k_bits")
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache")
        deeper = LlamaForCausalLM(LlamaConfig(**SIZES | dict(num_hidden_layers=3)))
        found.refused(
            lambda: fade_fast.load_cache(Path(folder) / "cache", deeper, verify=False), "num_hidden_layers"
        )
    found.holds("checkpoint", other.get_seq_length() == 0, "nothing was written")
    tensors, known = cache.state_dict()
    known["config"]["quant_backend"] = "product"  # as earlier versions stored it
    found.refused(lambda: other.load_state_dict(tensors, known), "product-quantized", "matched")
    found.holds("checkpoint", other.get_seq_length() == 0, "nothing was written")
