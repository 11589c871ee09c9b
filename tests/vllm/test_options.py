"""What a user may ask, and what is refused with which reason. No engine is needed."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from fade_fast.hf import calibration as measured
from fade_fast.hf.widths import Choice, key
from fade_fast.vllm import calibration, options
from fade_fast.vllm.pages import SPAN
from fade_ref import matched as spec
from fade_ref.config import FadeConfig
from fade_ref.matched import NOPE, Moments

from ..models import tiny_llama


def config(fade=None, backend="CUSTOM", model=None, **changes):
    """What `options.check` reads of vLLM's configuration. `changes` are fields by their path."""
    if model is None:
        text = SimpleNamespace(num_hidden_layers=4)
    else:
        text = model.config
    made = SimpleNamespace(
        additional_config={} if fade is None else {"fade": fade},
        attention_config=SimpleNamespace(
            backend=backend and SimpleNamespace(name=backend), backend_per_kind=None, use_non_causal=False
        ),
        model_config=SimpleNamespace(
            use_mla=False, is_encoder_decoder=False, is_hybrid=False, is_mm_prefix_lm=False,
            dtype=torch.bfloat16, hf_text_config=text, rswa_window=None,
            get_head_size=lambda: text.head_dim if model else 64,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", kv_cache_dtype_skip_layers=[]),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        speculative_config=None,
        kv_transfer_config=None,
    )  # fmt: skip
    for path, value in changes.items():
        *parents, name = path.split("__")
        at = made
        for parent in parents:
            at = getattr(at, parent)
        setattr(at, name, value)
    return made


def test_presets_and_widths():
    read = lambda **fade: options.read({"fade": fade})  # noqa: E731
    assert options.read({}).bits(0, 4) == options.read(None).bits(0, 4) == (4, 4)
    assert read(preset="lossless").bits(3, 4) == (8, 8) and read(preset="dense").bits(0, 4) == (16, 16)
    mixed = read(middle_k_bits=8, middle_v_bits=3, layer_bits={"1": [16, 16], "2": [4, 16]})
    assert [mixed.bits(i, 4) for i in range(4)] == [(8, 3), (16, 16), (4, 16), (8, 3)]
    assert [read(layer_bits="boundary").bits(i, 6)[0] for i in range(6)] == [8, 8, 4, 4, 8, 8]
    assert read(full_graphs=True).full_graphs and not read(preset="dense").full_graphs
    options.check(config(dict(preset="lossless")))


CHUNKED = SimpleNamespace(num_hidden_layers=4, attention_chunk_size=8)
REFUSED = [
    (dict(fade=dict(preset="balanced")), "it drops tokens.*safe, int4, lossless, dense"),
    (dict(fade=dict(preset="best")), "preset='best': one of"),
    (dict(fade=dict(n_sink=0)), "unknown options .'n_sink'. under 'fade'"),
    (dict(fade="safe"), "an object with options is allowed"),
    (dict(fade=dict(middle_k_bits=16)), "middle_k_bits=16"),
    (dict(fade=dict(preset="dense", middle_k_bits=4)), "contradicts middle_k_bits"),
    (dict(fade=dict(layer_bits={"4": [8, 8]})), "layer_bits names layers .4."),
    (dict(fade=dict(quant_backend="matched")), "needs calibration"),
    (dict(fade=dict(quant_backend="product")), "'product': one of rotated, matched"),
    (dict(fade=dict(calibration=3)), "the path of a file"),
    (dict(fade=dict(full_graphs="yes")), "full_graphs='yes': true or false"),
    (dict(fade=dict(calibration="/nowhere/at.all")), "no such file"),
    (dict(fade={}, backend=None), "need --attention-backend CUSTOM"),
    (dict(fade={}, backend="FLASH_ATTN"), "need --attention-backend CUSTOM"),
    (dict(model_config__use_mla=True), "latent attention"),
    (dict(model_config__is_encoder_decoder=True), "encoder-decoder"),
    (dict(model_config__is_hybrid=True), "state-space"),
    (dict(model_config__is_mm_prefix_lm=True), "bidirectional"),
    (dict(model_config__rswa_window=4), "reference sliding-window"),
    (dict(model_config__dtype=torch.float64), "float64"),
    (dict(model_config__get_head_size=lambda: 100), "head_dim 100"),
    (dict(model_config__hf_text_config=CHUNKED), "chunked"),
    (dict(cache_config__cache_dtype="fp8"), "--kv-cache-dtype fp8"),
    (dict(cache_config__cache_dtype="float16"), "--kv-cache-dtype float16"),
    (dict(cache_config__kv_cache_dtype_skip_layers=["0"]), "skip-layers"),
    (dict(kv_transfer_config=object()), "KV connectors"),
    (dict(parallel_config__decode_context_parallel_size=2), "context parallelism"),
    (dict(speculative_config=SimpleNamespace(method="eagle3")), "speculative decoding by 'eagle3'"),
    (dict(attention_config__use_non_causal=True), "non-causal"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        options.check(config(**changes))


def test_other_backends_are_left_alone():
    options.check(config(backend=None, model_config__use_mla=True))
    options.check(config(speculative_config=SimpleNamespace(method="ngram")))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """A calibration of the model, and its keys' means measured directly."""
    path = tmp_path_factory.mktemp("calibration") / "file.safetensors"
    ids = torch.randint(1, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    measured.calibrate(model, ids, list(range(model.config.num_hidden_layers))).save(path)
    return str(path)


def test_key_means_are_those_of_stored_keys(model, file):
    """Each row is the mean before RoPE, rotated to its positions one by one."""
    found = calibration.load(file, config(model=model).model_config)
    means = calibration.key_means(found, 0, 9)
    mean, frequency = found.moments[0].mean.double(), found.ropes[0].inv_freq.double()
    angles = torch.arange(9 * SPAN)[:, None].double() * frequency
    a, b = mean[:, None].chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    expected = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).unflatten(1, (9, SPAN)).mean(2)
    assert means.dtype == torch.float16 and means.shape == (len(mean), 9, mean.shape[1])
    torch.testing.assert_close(means.double(), expected, rtol=1e-3, atol=1e-5)
    assert (means[:, 1:] - means[:, :-1]).abs().amax((0, 2)).min() > 0.01
    with pytest.raises(ValueError, match="not layer 7"):
        calibration.key_means(found, 7, 9)


def test_layers_whose_positions_are_unknown_have_one_mean(file):
    """The calibration then holds the mean of keys as they are stored."""
    found = measured.load(file)
    found.ropes[1] = NOPE
    means = calibration.key_means(found, 1, 9)
    assert torch.equal(means, found.moments[1].mean[:, None].half())


def test_matrices_are_those_of_keys_less_their_means(model, file):
    """The codec's share of a key has the moments that the matrices were made for."""
    found = calibration.load(file, config(model=model).model_config)
    keys, values = calibration.matched(found, 1)
    moments, rope = found.moments[1], found.ropes[1]
    assert keys.encode.shape == values.encode.shape == (len(moments.mean), *moments.keys.shape[1:])
    mean, *both = spec.frame(Moments(*(x.double() for x in moments)), "block", rope, SPAN)
    assert torch.equal(mean, moments.mean.double())
    expected = spec.matched(*both)
    assert torch.equal(keys.encode.double(), expected.encode)
    assert torch.equal(keys.decode.double(), expected.decode.mT)
    centered = spec.matched(both[0] + mean[:, :, None] * mean[:, None], both[1])
    assert not torch.allclose(keys.encode.double(), centered.encode, atol=1e-2)  # with the means
    with pytest.raises(ValueError, match="not layer 7"):
        calibration.matched(found, 7)


def test_a_calibration_of_another_model_or_a_damaged_one_is_refused(model, file, tmp_path):
    other = config(model=tiny_llama(group=3)).model_config
    with pytest.raises(ValueError, match="of another model: hidden_size is 64"):
        calibration.load(file, other)
    damaged = tmp_path / "damaged.safetensors"
    with open(file, "rb") as whole:
        damaged.write_bytes(whole.read()[:-100])
    with pytest.raises(ValueError, match="holds no calibration, or is damaged"):
        calibration.load(str(damaged), config(model=model).model_config)
    found = measured.load(file)
    found.moments[1] = found.moments[1]._replace(mean=found.moments[1].mean * torch.nan)
    found.save(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="means of layer 1"):
        calibration.load(str(tmp_path / "nan.safetensors"), config(model=model).model_config)


@pytest.mark.parametrize("total, ranks", [(8, 1), (8, 2), (8, 4), (2, 4), (1, 2)])
def test_ranks_get_the_means_of_their_heads(total, ranks):
    mean, heads = torch.arange(total)[:, None].expand(-1, 4), max(1, total // ranks)
    parts = [calibration.of_rank(mean, heads, rank, ranks)[:, 0].tolist() for rank in range(ranks)]
    assert sum(parts, []) == sorted(range(total) if total >= ranks else [*range(total)] * (ranks // total))
    with pytest.raises(ValueError, match="KV heads, the model"):
        calibration.of_rank(mean, heads + 1, 0, ranks)


def test_safe_takes_the_widths_of_the_file(tmp_path):
    """Only where the options name no widths."""
    model = tiny_llama(layers=3)
    found = measured.calibrate(model, torch.arange(40)[None], [0, 1, 2])
    choice = Choice(((1, (8, 4)),), 1e-4, 5e-3, FadeConfig.safe().loss_bound, 0.0, 40)
    safe = replace(FadeConfig.safe(), quant_backend="rotated")
    found.provenance["choices"] = {key(safe): asdict(choice)}
    path = str(tmp_path / "file")
    found.save(path)
    read = lambda **given: [options.read({"fade": given}).bits(i, 3) for i in range(3)]  # noqa: E731
    assert read(calibration=path) == read(calibration=path, preset="safe") == [(4, 4), (8, 4), (4, 4)]
    assert read() == read(calibration=path, preset="int4") == [(4, 4)] * 3
    assert read(calibration=path, middle_v_bits=3) == [(4, 3)] * 3
    assert read(calibration=path, layer_bits={0: (8, 8)}) == [(8, 8), (4, 4), (4, 4)]
    assert read(calibration=path, quant_backend="matched") == [(4, 4)] * 3  # measured for another codec
    with pytest.raises(ValueError, match="no such file"):
        read(calibration=str(tmp_path / "other"))
