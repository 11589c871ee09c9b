"""Tiny random models through vLLM's engine: windows, softcaps, sinks, head_dim 128, ranks, decoding modes."""

import pytest
import torch

from . import engines
from .engines import ask, engine

from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM  # isort: skip

pytestmark = pytest.mark.slow

PROMPTS = [[(7 * i * (s + 3) + s) % 250 + 1 for i in range(n)] for s, n in enumerate((5, 130, 64, 33, 200))]
SIZES = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
#: A continuation of few different tokens, some of which are drafted rightly and others wrongly.
FEW = dict(tokens=24, allowed_token_ids=[3, 60, 117, 180])


def saved(folder, make, config):
    """The folder of a random model in float32."""
    torch.manual_seed(0)
    make(config).to(torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """head_dim 128."""
    folder = tmp_path_factory.mktemp("llama")
    return saved(folder, LlamaForCausalLM, LlamaConfig(head_dim=128, **SIZES))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A layer with a window of 48 tokens and a layer without, softcaps in both."""
    config = Gemma2Config(
        head_dim=64, sliding_window=48, query_pre_attn_scalar=64, attn_logit_softcapping=5.0, **SIZES
    )
    assert sorted(config.layer_types) == ["full_attention", "sliding_attention"]
    return saved(tmp_path_factory.mktemp("gemma"), Gemma2ForCausalLM, config)


@pytest.fixture(scope="module")
def calibrated(llama, tmp_path_factory):
    """A calibration of the llama."""
    from fade_fast.hf import calibration

    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    path = str(tmp_path_factory.mktemp("calibration") / "llama.safetensors")
    calibration.calibrate(model, torch.tensor([PROMPTS[4]]), [0, 1]).save(path)
    return path


def tiny(model, fade=None, **options):
    return engine(model, fade, skip_tokenizer_init=True, max_model_len=512, **options)


def tokens(llm, prompts=PROMPTS, **options):
    return ask(llm, prompts, **dict(detokenize=False) | options)[0]


def test_steps_as_vllm_captures_them(gemma, monkeypatch):
    """Decode steps from lengths, tables and slots on the device, as in a graph: the same tokens."""
    from fade_fast.vllm.backend import FadeBuilder

    with tiny(gemma, dict(preset="int4")) as llm:
        expected = tokens(llm)
    build, seen = FadeBuilder.build, []

    def captured(self, prefix, step, fast_build=False):
        if step.max_query_len > 1:
            return build(self, prefix, step, fast_build)
        seen.append(step.num_reqs)
        found = self.build_for_cudagraph_capture(step)
        assert found.cut is None and found.step is found.step
        return found

    monkeypatch.setattr(FadeBuilder, "build", captured)
    with tiny(gemma, dict(preset="int4", full_graphs=True)) as llm:
        support = FadeBuilder.get_cudagraph_support(llm.llm_engine.vllm_config, None)
        assert support.name == "UNIFORM_SINGLE_TOKEN_DECODE" and tokens(llm) == expected
    assert max(seen) > 1


def test_windows_and_softcaps(gemma):
    with tiny(gemma) as llm:
        expected = tokens(llm)
    for fade in (dict(preset="dense"), dict(preset="lossless")):
        with tiny(gemma, fade) as llm:
            impls = [layer.impl.layer for layer in engines.layers(llm).values()]
            assert {x.window for x in impls} == {48, None} and {x.softcap for x in impls} == {5.0}
            assert tokens(llm) == expected
            assert tokens(llm, PROMPTS[::-1]) == expected[::-1]


@pytest.fixture(scope="module")
def one_rank(llama, calibrated):
    """What an engine of one rank says at 4 bits, in several decoding modes, and its pages."""
    with tiny(llama, dict(calibration=calibrated), block_size=128) as llm:
        found = dict(greedy=tokens(llm), few=tokens(llm, **FEW), pages=engines.pages(llm))
        means = {name: x.impl.layer.means for name, x in engines.layers(llm).items()}
        assert all(x.abs().max() > 0 for x in means.values())
        found["means"] = means
        found["again"] = tokens(llm)
        found["alone"] = [tokens(llm, [prompt])[0] for prompt in PROMPTS]
        from vllm import SamplingParams

        params = SamplingParams(
            n=3, max_tokens=12, temperature=1.0, seed=5, detokenize=False, ignore_eos=True
        )
        runs = [
            llm.generate([dict(prompt_token_ids=PROMPTS[1])], params, use_tqdm=False)[0].outputs for _ in "ab"
        ]
        found["sampled"] = [[list(x.token_ids) for x in run] for run in runs]
    return found


def test_many_samples_of_a_prompt_share_its_pages(one_rank):
    first, second = one_rank["sampled"]
    assert len(first) == 3 and first == second and len({tuple(x) for x in first}) > 1


def test_prefix_hits_and_batch_mates(one_rank):
    assert one_rank["again"] == one_rank["greedy"] == one_rank["alone"]


def test_head_dim_128_holds_3_5_times_as_many_tokens(one_rank):
    count, held = one_rank["pages"]
    dense = (
        2 * 128 * 2 * 128 * 2 * 2
    )  # layers, tokens, keys and values, channels, KV heads, bytes of bfloat16
    assert dense / (held / count) >= 3.5


def test_head_dim_64_holds_3_2_times_as_many_tokens(tmp_path):
    """With the pages that vLLM makes unless the user asks for others."""
    model = saved(tmp_path, LlamaForCausalLM, LlamaConfig(head_dim=64, **SIZES))
    with tiny(model, {}, block_size=None) as llm:
        assert {x.kv_cache.shape[2] for x in engines.layers(llm).values()} == {128}
        count, held = engines.pages(llm)
        dense = 2 * 128 * 2 * 64 * 2 * 2  # as above, of 64 channels
        assert dense / (held / count) >= 3.2


def test_two_ranks_say_what_one_says(llama, calibrated, one_rank):
    with tiny(llama, dict(calibration=calibrated), block_size=128, tensor_parallel_size=2) as llm:
        assert tokens(llm) == one_rank["greedy"]


def test_speculative_tokens_change_nothing(llama, calibrated, one_rank):
    options = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=2, prompt_lookup_min=1)
    with tiny(llama, dict(calibration=calibrated), block_size=128, speculative_config=options) as llm:
        assert tokens(llm, **FEW) == one_rank["few"]
        drafted = {
            m.name: m.value for m in llm.get_metrics() if "spec_decode_num" in m.name and hasattr(m, "value")
        }
        assert drafted["vllm:spec_decode_num_accepted_tokens"] > 0
        assert drafted["vllm:spec_decode_num_draft_tokens"] > drafted["vllm:spec_decode_num_accepted_tokens"]


def test_other_widths_by_layer(llama, calibrated):
    fade = dict(
        calibration=calibrated, layer_bits={"0": [16, 16]}, middle_k_bits=3, middle_v_bits=2,
        quant_backend="matched",
    )  # fmt: skip
    with tiny(llama, fade) as llm:
        kinds = [type(x.impl.layer).__name__ for x in engines.layers(llm).values()]
        assert kinds == ["DenseLayer", "CompressedLayer"]
        cells = [x.kv_cache.element_size() * x.kv_cache.shape[-1] for x in engines.layers(llm).values()]
        assert cells[0] == 1024 and cells[1] < 128
        assert tokens(llm) == [tokens(llm, [prompt])[0] for prompt in PROMPTS]


REFUSED = {
    "preset='aggressive': it drops tokens": dict(preset="aggressive"),
    "unknown options": dict(bits=4),
    "middle_k_bits=5": dict(middle_k_bits=5),
    "layer_bits names layers": dict(layer_bits={"9": [8, 8]}),
    "no such file": dict(calibration="/nowhere/at.all"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_options_are_refused_before_a_model_loads(llama, message, capfd):
    with pytest.raises(ValueError, match=message):
        with tiny(llama, REFUSED[message]):
            pass
    assert "Loading" not in capfd.readouterr().err


def test_other_settings_are_refused_before_a_model_loads(gemma, llama, calibrated):
    with pytest.raises(ValueError, match="is of another model: model_type"):
        with tiny(gemma, dict(calibration=calibrated)):
            pass
    with pytest.raises(ValueError, match="does not support --kv-cache-dtype fp8"):
        with tiny(llama, {}, kv_cache_dtype="fp8"):
            pass
    with pytest.raises(ValueError, match="need --attention-backend CUSTOM"):
        with tiny(llama, additional_config={"fade": {}}):
            pass
