"""Compares steps that generate() compiles and captures with eager steps."""

import copy

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import fade_fast
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig

from ..case import Case, Draw, Found, relative_error

SMALL = dict(recent_window=8, block_size=4)
CHOOSING = dict(recent_window=8, block_size=8, select=8)
DRAFT = 2  # tokens that a copy of the model drafts per step
#: The cases that run compiled on a GPU by default.
COMPILED = ("int4, int2, evict, padded", "int4, beams", "h2o, evict, ending", "evict, drafted")
CONFIGS = {
    "int4": (FadeConfig(**SMALL), False),
    "k3v2": (FadeConfig(**SMALL, middle_k_bits=3, middle_v_bits=2), False),
    "int4, int2, evict, padded": (FadeConfig(**SMALL, int4_budget=10, int2_budget=6), True),
    "evict, original positions": (FadeConfig(**SMALL, int4_budget=10, positions="original"), False),
    "h2o, evict": (FadeConfig(**SMALL, int4_budget=10, eviction_policy="h2o"), False),
    "off": (FadeConfig(recent_window=None), False),
    "matched": (FadeConfig(**SMALL, quant_backend="matched"), True),
    "matched, evict": (FadeConfig(**SMALL, quant_backend="matched", int4_budget=10), False),
    "int4, beams": (FadeConfig(**SMALL), False, 3),
    "int4, int2, evict, padded, beams": (FadeConfig(**SMALL, int4_budget=10, int2_budget=6), True, 3),
    "int4, ending": (FadeConfig(**SMALL), False, 1, 9),
    "h2o, evict, ending": (FadeConfig(**SMALL, int4_budget=10, eviction_policy="h2o"), False, 1, 9),
    "layers of other widths": (FadeConfig(**SMALL, layer_bits={0: (16, 16), 1: (8, 16)}), False),
    "layers of other widths, padded, beams": (FadeConfig(**SMALL, layer_bits={0: (3, 2)}), True, 3),
    "a layer not compressed, drafted": (FadeConfig(**SMALL, layer_bits={0: (16, 16)}), False, 1, None, True),
    "a layer that evicts, one that does not": (
        FadeConfig(**SMALL, int4_budget=10, int2_budget=6, layer_bits={1: (16, 16)}),
        True,
    ),
    "select": (FadeConfig(**CHOOSING), True),
    "select, share, beams": (FadeConfig(**CHOOSING | dict(select=0.6, select_max=16)), False, 3),
    "select, drafted": (FadeConfig(**CHOOSING, cold="host"), False, 1, None, True),
    "select, two indexes": (FadeConfig(**CHOOSING, index="deviation+k2"), True),
    "select, bounds, a policy": (
        FadeConfig(**CHOOSING, index="bounds", cold="host", eviction_policy="hybrid"),
        False,
        3,
    ),
    "int4, drafted": (FadeConfig(**SMALL), False, 1, None, True),
    "evict, drafted": (FadeConfig(**SMALL, int4_budget=10), False, 1, None, True),
}


def collect() -> list[Case]:
    return [
        Case("captured", "steps", name, _steps(*options), compiled=name in COMPILED)
        for name, options in CONFIGS.items()
    ]


def _steps(config, padded, beams=1, ends=None, drafted=False):
    """A case with two rows. With `ends`, the text ends when both rows have produced the token of this index.

    `drafted`: only the second row runs, with assisted decoding. The draft model is a copy of the model with
    noise and without compression. Attention adds little in this model, so most drafts are correct.
    """

    def run(found: Found, seed: int):
        torch.manual_seed(seed % 2**31)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=64,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
            )
        ).double().to(found.device).eval()  # fmt: skip
        ids = Draw(seed).integers(1, 256, 2, 24)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, :9] = ids[1, :9] = 0
        inputs = dict(input_ids=ids.to(found.device), attention_mask=mask.to(found.device))
        new, options = 14, dict(do_sample=False, num_beams=beams)
        if drafted:
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.data *= 2e-3
            new = 30
            inputs = {name: x[1:] for name, x in inputs.items()}
            options["assistant_model"] = draft = copy.deepcopy(model)
            draft.lm_head.weight.data += 0.03 * Draw(seed).normal(256, 64).to(found.device)
            draft.generation_config.update(
                num_assistant_tokens=DRAFT, num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=0.0,
            )  # fmt: skip
        torch._dynamo.reset()  # here, since the counters below must not count the compiled encoders

        def eagerly(**more):
            cache = fade_fast.create_cache(model, config, verify=False)
            cache.decode_graph.compileable = False
            return cache, model.generate(
                **inputs, **{CACHE_NAME: cache}, max_new_tokens=new, **options, **more
            )

        eager, expected = eagerly(min_new_tokens=new)
        if ends is not None:
            options["eos_token_id"] = expected[:, ids.shape[1] + ends].tolist()
            eager, expected = eagerly()
            found.holds("ends", ids.shape[1] < expected.shape[1] <= ids.shape[1] + ends + 1, "its length")
        else:
            options["min_new_tokens"] = new
        counters.clear()
        twins = found.ran.traced
        # Without code generation, the case tests whether steps can be captured, and their results.
        backend, mode = ("inductor", "reduce-overhead") if found.fused else ("aot_eager", None)
        compiling = CompileConfig(fullgraph=True, backend=backend, mode=mode)
        compiling._compile_all_devices = True
        model.generation_config.compile_config = compiling  # beam search reads this attribute
        cache = fade_fast.create_cache(model, config, verify=False)
        cache.decode_graph.compileable = True
        begin, widths = cache.decode_graph.begin, []
        cache.decode_graph.begin = lambda new, batch: (
            widths.append(begin(new, batch) and new) or bool(widths[-1])
        )
        ours = model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=new, **options)
        found.same("tokens generated", ours, expected)
        if drafted:
            found.holds("captured as a whole", max(widths) == DRAFT + 1, f"steps of {set(widths)}")
        if found.fused:
            found.holds("captured as a whole", cache.decode_graph.captures, "refused")
            found.holds("ends", ends is None or cache.decode_graph.runs_ahead, "not ahead")
        for layer in (*cache.tiered, *eager.tiered):  # a step after the end may have demoted a due block
            layer.compact()
        graphs = counters["stats"]["unique_graphs"] - (found.ran.traced - twins)
        found.holds("one graph", graphs == 1 or drafted and graphs == 2, f"{graphs}")
        found.holds("one graph", not counters["graph_break"], "a graph break")
        found.same("lengths", cache.token_positions.logical, eager.token_positions.logical)
        claim = "captured, compiled" if found.fused else "captured"
        # A captured step encodes the blocks of all layers in one product. On a GPU, the size of a product
        # decides the order of its sums.
        stored = "stored" if found.device == "cuda" else claim
        for i, (a, b) in enumerate(zip(cache.tiered, eager.tiered)):
            for side, x, y in zip(("keys", "values"), a.decode_all(), b.decode_all()):
                error = relative_error(x, y.double().cpu())
                found.near(stored, error, f"{side} of layer {i}")
            for side in ("key", "value") if found.fused else ():
                x, y = (layer.dense[side][:, :, : layer.dense.count] for layer in (a, b))
                found.near(claim, relative_error(x, y.double().cpu()), f"uncompressed {side}s of layer {i}")
            for name in a.observer.fields if a.observer else ():
                error = relative_error(a.dense[name].double(), b.dense[name].double().cpu())
                found.near("received" if found.fused else claim, error, f"{name} of layer {i}")

    return run
