"""What attach() changes of a model and of generate(): noticed where it is not reached, undone by detach()."""

import copy
import io
import pickle
import subprocess
import sys
import threading
import time
import warnings
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    CompileConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlamaForCausalLM,
)
from transformers.generation import utils as generation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fade_fast
from fade_fast.hf import attention, versions
from fade_fast.hf import generate as hooks
from fade_fast.hf.models import CACHE_NAME, CACHE_NAMES, cache_parameter
from fade_ref.config import FadeConfig

from ..marks import pairwise, slow_but
from ..models import OFF, compressed_tokens, dense, generate, new_cache, prompt, tiny_llama

SMALL = FadeConfig(recent_window=16, block_size=8)
EVICTING = FadeConfig(recent_window=16, block_size=8, int4_budget=8)


def state(model) -> dict:
    """All that attaching could change of a model: attributes, hooks, buffers, modes, attention functions."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (dict(module.__dict__), dict(module._forward_hooks), dict(module._forward_pre_hooks))
        found[name] += (module.training, {k: x.clone() for k, x in module._buffers.items() if x is not None})
    return found


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(*(x.detach().reshape(-1).view(torch.uint8) for x in (a, b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a is b or a == b


def vision_language():
    """Its parts have configurations, and attention functions, of their own."""
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, image_size=28, patch_size=14)
    heads = dict(num_attention_heads=2, layer_types=["full_attention"], num_key_value_heads=1)
    config = Gemma3Config(text_config=text | heads, vision_config=vision | dict(num_attention_heads=2))
    model = Gemma3ForConditionalGeneration(config).eval()
    model.config.vision_config._attn_implementation = "eager"
    return model


@pytest.mark.parametrize("make", [tiny_llama, vision_language])
def test_detach_leaves_the_model_and_the_process_as_they_were(make):
    model = make()
    model.generation_config.pad_token_id = 0
    process = dict(vars(generation.DeferredStopCheck)), dict(vars(generation.GenerationMixin))
    names = [c._attn_implementation for c in (model.config, model.config.get_text_config())]
    before = state(model)
    cache = fade_fast.create_cache(model, SMALL)
    assert not equal(state(model), before) and model.config._attn_implementation == attention.NAME
    if make is tiny_llama:
        generate(model, cache, prompt(30), new=4)
    assert process == (dict(vars(generation.DeferredStopCheck)), dict(vars(generation.GenerationMixin)))
    fade_fast.detach(model)
    after = state(model)
    assert after.keys() == before.keys()
    for name in before:
        assert equal(after[name], before[name]), name
    assert names == [c._attn_implementation for c in (model.config, model.config.get_text_config())]
    if make is vision_language:
        assert model.config.vision_config._attn_implementation == "eager"
    fade_fast.detach(model)  # once more does nothing
    assert equal(state(model), before)


def test_what_others_put_on_the_model_stays():
    """Before us, it is called through us and put back; after us, it is left alone."""
    model, heard = tiny_llama(), []
    own = type(model).generate

    def before(*args, **kwargs):
        heard.append("before")
        return own(model, *args, **kwargs)

    model.generate = before
    cache = fade_fast.create_cache(model, SMALL)
    generate(model, cache, prompt(30), new=2)
    assert heard == ["before"] and model.generate is not before
    fade_fast.detach(model)
    assert model.generate is before
    fade_fast.attach(model)
    ours = model.generate

    def after(*args, **kwargs):
        heard.append("after")
        return ours(*args, **kwargs)

    model.generate = after
    fade_fast.detach(model)
    assert model.generate is after
    generate(model, dense(model), prompt(30), new=2)
    assert heard == ["before", "after", "before"][: len(heard)]


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_both_names_of_a_cache_work_on_every_version_without_a_warning(name):
    """generate() and forward(), whichever name the installed transformers has for it."""
    model, inputs = tiny_llama(), prompt(40)
    expected = generate(model, dense(model), inputs, new=6)
    cache = new_cache(model, OFF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.generate(**inputs, **{name: cache}, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert torch.equal(out[:, 40:], expected)
        with torch.no_grad():
            model(input_ids=out[:, -1:], **{name: cache})
    assert cache.get_seq_length() == 46


def test_a_model_that_ignores_its_cache_is_noticed():
    """As forward(cache=...) did before transformers 5.24, and forward(past_key_values=...) will after "
    "5.40."""
    model = tiny_llama()
    fade_fast.attach(model)
    ids = prompt(8)["input_ids"]
    own = type(model).forward

    def deaf(self, input_ids, **kwargs):
        kwargs = {k: x for k, x in kwargs.items() if k not in CACHE_NAMES}
        return own(self, input_ids, **kwargs)

    with mock.patch.object(type(model), "forward", deaf):
        with pytest.raises(RuntimeError, match="did not use the cache"):
            model(input_ids=ids, **{CACHE_NAME: new_cache(model, OFF)})
    assert cache_parameter(deaf) is None


def test_use_cache_false_is_refused_where_a_step_enters():
    model = tiny_llama()
    cache = new_cache(model, OFF)
    calls_of_model = (
        lambda: generate(model, cache, prompt(30), use_cache=False),
        lambda: model(**prompt(30), use_cache=False, **{CACHE_NAME: cache}),
    )
    for call in calls_of_model:
        with pytest.raises(ValueError, match="use_cache=True"):
            call()
    model.generation_config.use_cache = False
    with pytest.raises(ValueError, match="use_cache=True"):
        generate(model, cache, prompt(30))
    assert cache.get_seq_length() == 0


# -- copies


def test_an_attached_model_can_be_copied_pickled_and_saved():
    model, inputs = tiny_llama(), prompt(40)
    expected = generate(model, new_cache(model, SMALL), inputs, new=6)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(file, weights_only=False),
    }
    fade_fast.detach(model)
    for how, twin in copies.items():
        assert twin.generate.args[0] is twin, how
        assert torch.equal(generate(twin, fade_fast.create_cache(twin, SMALL), inputs, new=6), expected), how
        fade_fast.detach(twin)
        assert not [name for name in vars(twin) if "fade" in name], how
        assert not twin._forward_hooks and not twin._forward_pre_hooks, how
        assert torch.equal(
            generate(twin, dense(twin), inputs, new=6), generate(model, dense(model), inputs, new=6)
        )


@pytest.mark.slow
def test_an_attached_model_travels_to_a_new_process(tmp_path):
    """As multiprocessing with spawn sends it."""
    model = tiny_llama()
    fade_fast.create_cache(model, SMALL)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "import fade_fast\n"
        "cache = fade_fast.create_cache(model, 'safe')\n"
        "ids = torch.arange(3, 30)[None]\n"
        "out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache, "
        "max_new_tokens=3)\nprint(out.shape[1], cache.get_seq_length())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["30", "29"], done.stderr


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, lambda cache: torch.save(cache, io.BytesIO())])
def test_a_cache_is_neither_pickled_nor_copied_shallowly(how):
    with pytest.raises(TypeError, match=r"cache\.save\(path\).*copy\.deepcopy"):
        how(fade_fast.create_cache(tiny_llama(), SMALL))


# -- gradients


def gradients(model, cache, prefix_grad: bool, count=10):
    """Gradients of a continuation behind a cached prefix."""
    model.zero_grad()
    ids = prompt(40 + count)["input_ids"]
    with torch.set_grad_enabled(prefix_grad):
        first = model(input_ids=ids[:, :40], **{CACHE_NAME: cache})
    out = model(input_ids=ids[:, 40:], **{CACHE_NAME: cache})
    (first.logits.sum() * prefix_grad + out.logits.pow(2).sum()).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("prefix_grad", [False, True])
@pytest.mark.parametrize("count", slow_but([1, 10, 40], 1, 40))
@pytest.mark.parametrize("config", slow_but([OFF, SMALL, EVICTING], OFF, EVICTING))
def test_a_gradient_through_cached_tokens_is_refused_with_its_reason(config, count, prefix_grad):
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="no gradient goes through a tiered cache"):
        gradients(model, new_cache(model, config), prefix_grad, count)


def test_the_gradient_of_a_first_step_is_right():
    """Nothing is cached yet: the same as without a cache."""
    model, ids = tiny_llama(), prompt(40)["input_ids"]
    found = []
    for arguments in (dict(use_cache=False), {CACHE_NAME: new_cache(model, SMALL)}):
        model.zero_grad()
        model(input_ids=ids, **arguments).logits.pow(2).sum().backward()
        found.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


def test_forward_without_no_grad_works():
    model, ids = tiny_llama(), prompt(60)["input_ids"]
    found = []
    for enabled in (True, False):
        cache = new_cache(model, SMALL)
        with torch.set_grad_enabled(enabled):
            for part in ids.split(20, dim=1):
                out = model(input_ids=part, **{CACHE_NAME: cache}).logits
        found.append(out.detach())
        assert compressed_tokens(cache) > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("some", [False, True], ids=["all layers", "one layer"])
def test_gradient_checkpointing_in_training_mode_is_refused(some):
    model, inputs = tiny_llama(), prompt(40)
    expected = generate(model, dense(model), inputs, new=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    assert torch.equal(generate(model, new_cache(model, OFF), inputs, new=6), expected), (
        "evaluation mode works"
    )
    model.model.layers[1].train() if some else model.train()
    cache = new_cache(model, OFF)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        generate(model, cache, inputs, new=6)
    assert cache.get_seq_length() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_disable()
    assert torch.equal(generate(model, cache, inputs, new=6), expected), "training mode without it works"


def test_dropout_of_attention_is_refused():
    model = tiny_llama(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"dropout=0\.1 .* model\.eval\(\)"):
        generate(model, new_cache(model, OFF), prompt(30), new=2)


# -- other libraries and other ways to decode


def test_attention_functions_are_called_as_those_of_transformers(monkeypatch):
    """Other libraries wrap all of them: dropout is the sixth argument, scaling the seventh, and no more."""
    model, inputs = tiny_llama(), prompt(40)

    def wrapped(function):
        def inside(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
            return function(module, query, key, value, attention_mask, dropout, scaling, **kwargs)

        return inside

    for name, function in list(ALL_ATTENTION_FUNCTIONS.items()):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, wrapped(function))
    expected = generate(model, dense(model), inputs)
    cache = new_cache(model, OFF)
    assert torch.equal(generate(model, cache, inputs), expected)
    assert torch.equal(generate(model, dense(model), inputs), expected), "a plain cache under our attention"


def test_unknown_keywords_reach_stock_attention_and_known_ones_once():
    """`is_causal`, which our own products pass to `sdpa`, may come from the model as well."""
    model = tiny_llama()
    cache, ids = new_cache(model, OFF), prompt(40)["input_ids"]
    found = []
    for extra in ({}, dict(is_causal=True, something=1)):
        cache.reset()
        with torch.no_grad():
            parts = [
                model(input_ids=part, **{CACHE_NAME: cache}, **extra).logits for part in ids.split(20, dim=1)
            ]
        found.append(torch.cat(parts, dim=1))
    assert torch.equal(*found)
    for unknown in (dict(position_bias=torch.zeros(1)), dict(is_causal=False)):
        cache.reset()
        with pytest.raises(ValueError, match="cannot be served|needs a mask"), torch.no_grad():
            model(input_ids=ids, **{CACHE_NAME: cache}, **unknown)
        assert cache.get_seq_length() == 0


def test_continuous_batching_says_detach():
    model = tiny_llama()
    fade_fast.create_cache(model, SMALL)
    for name in ("generate_batch", "init_continuous_batching"):
        with pytest.raises(ValueError, match=r"fade_fast\.detach\(model\)"):
            getattr(model, name)([[3, 4, 5]])


@pytest.mark.slow
def test_continuous_batching_works_after_detach():
    from transformers import ContinuousBatchingConfig  # not in every supported version

    model = tiny_llama()
    fade_fast.create_cache(model, SMALL)
    fade_fast.detach(model)
    asked = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    few = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # by default they fill the memory
    options = dict(generation_config=asked, continuous_batching_config=few, progress_bar=False)
    (found,) = model.generate_batch([[3, 4, 5]], **options).values()
    assert 1 <= len(found.generated_tokens) <= 3


def test_attention_weights_that_get_lost_are_announced():
    model, inputs = tiny_llama(), prompt(30)
    with pytest.warns(UserWarning, match=r"output_attentions=True.*fade_fast\.detach\(model\)"):
        generate(model, new_cache(model, OFF), inputs, new=2, output_attentions=True)
    model.generation_config.output_attentions = True
    with pytest.warns(UserWarning, match="output_attentions=True"):
        generate(model, new_cache(model, OFF), inputs, new=2)


@pytest.mark.parametrize(
    "name, whole, dynamic",
    slow_but(
        pairwise(
            ("off", "safe", "evicting", "h2o"), (True, False), (None, True), keep=[("evicting", True, None)]
        ),
        ("evicting", True, None),
    ),
)
def test_a_forward_that_the_user_compiles(name, whole, dynamic):
    """In one graph, in few compilations, with the tokens of eager steps."""
    configs = dict(off=OFF, safe=SMALL, evicting=FadeConfig(recent_window=16, block_size=8, int4_budget=8))
    configs["h2o"] = FadeConfig(recent_window=16, block_size=8, int4_budget=8, eviction_policy="h2o")
    model, inputs = tiny_llama(dtype=torch.float64), prompt(40, batch=2, pads=(0, 9))
    expected = generate(model, new_cache(model, configs[name]), inputs, new=16)
    torch._dynamo.reset()
    counted = CompileCounter()
    model.forward = torch.compile(model.forward, backend=counted, fullgraph=whole, dynamic=dynamic)
    cache = new_cache(model, configs[name])
    assert torch.equal(generate(model, cache, inputs, new=16), expected)
    assert name == "off" or compressed_tokens(cache) > 0
    assert counted.frame_count <= 4, "compiled anew at every length"


@pytest.mark.slow
def test_a_gradient_through_a_compiled_forward_is_refused():
    model = tiny_llama()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="no gradient goes through a tiered cache"):
        gradients(model, new_cache(model, OFF), prefix_grad=False)


# -- hooks that are never reached


def compiling() -> dict:
    config = CompileConfig(backend="aot_eager", mode=None)
    config._compile_all_devices = True
    return dict(compile_config=config)


@pytest.fixture
def unheard(monkeypatch):
    monkeypatch.setattr(hooks, "_noticed", set())
    torch._dynamo.reset()


def test_steps_that_come_by_no_hook_are_noticed(unheard, monkeypatch):
    """As on transformers 5.24, where the cache had another name: said once, and the text is right."""

    class Plain(LlamaForCausalLM):
        def _valid_auto_compile_criteria(self, *args):
            return False

    model, inputs = Plain(tiny_llama().config).eval(), prompt(30)
    expected = generate(model, new_cache(model, SMALL), inputs, new=8)
    cache = new_cache(model, SMALL)
    cache.decode_graph.compileable = True
    for name in (hooks.GET_COMPILED_CALL, hooks.VALID_AUTO_COMPILE_CRITERIA):
        del model.__dict__[name]
    monkeypatch.setattr(hooks, "_is_hook", lambda x: False)  # nor does the model put them back
    with pytest.warns(UserWarning, match="steps are not captured: 7 decode steps came by none of our hooks"):
        assert torch.equal(generate(model, cache, inputs, new=8), expected)
    cache.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, cache, inputs, new=8)


def test_a_cache_is_not_compileable_where_our_hooks_are_missing(monkeypatch):
    """Or transformers would compile a step without what belongs around it."""
    seen = []

    class Watched(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            seen.append(cache.is_compileable)
            return super().prepare_inputs_for_generation(*args, **kwargs)

    model = Watched(tiny_llama().config).eval()
    cache = new_cache(model, SMALL)
    cache.decode_graph.compileable = True
    assert not cache.is_compileable, "outside of generate()"
    generate(model, cache, prompt(30), new=3, disable_compile=True)
    assert seen and all(seen)
    fade_fast.detach(model)
    seen.clear()
    monkeypatch.setattr(hooks, "VALID_AUTO_COMPILE_CRITERIA", "_a_name_of_a_later_version")
    cache = new_cache(model, SMALL)
    cache.decode_graph.compileable = True
    generate(model, cache, prompt(30), new=3, disable_compile=True)
    assert seen and not any(seen)


MODES = [{}, dict(num_beams=2), dict(do_sample=True), dict(prompt_lookup_num_tokens=3)]


@pytest.mark.parametrize("options", slow_but(MODES, {}))
@pytest.mark.parametrize("disabled", [False, True], ids=["compiled", "disable_compile"])
def test_steps_that_are_captured_or_declined_are_not_complained_about(unheard, options, disabled):
    model = tiny_llama(layers=1)
    cache = new_cache(model, SMALL)
    cache.decode_graph.compileable = True
    more = dict(disable_compile=True) if disabled else compiling()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if "num_beams" in options or "prompt_lookup_num_tokens" in options:
            model.generation_config.compile_config = more.get("compile_config")
        generate(model, cache, prompt(30), new=8, **options, **more)
    assert (cache.decode_graph.steps > 0) == (not disabled)
    assert not hooks._noticed


def test_a_newer_transformers_is_announced_once(monkeypatch):
    assert not versions.untested(), "the installed one was tested"
    monkeypatch.setattr(versions, "installed", lambda: "5.99.0.dev0")
    with pytest.warns(UserWarning, match="transformers 5.99.0.dev0 is newer than"):
        fade_fast.create_cache(tiny_llama(), SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fade_fast.create_cache(tiny_llama(), SMALL)
    assert "is newer than" in str(fade_fast.check_model(tiny_llama(), SMALL))


# -- readers in other threads


def test_a_reader_never_stops_the_worker():
    """memory(), describe(), snapshot(), save() in another thread: refused now and then, or served "
    "between steps."""
    model, inputs = tiny_llama(), prompt(60)
    expected = generate(model, new_cache(model, SMALL), inputs, new=30)
    cache, found = new_cache(model, SMALL), []
    worker = threading.Thread(target=lambda: found.append(generate(model, cache, inputs, new=30)))
    worker.start()
    served = refused = 0
    while worker.is_alive():
        time.sleep(0.001)
        for look in (cache.memory, cache.describe, cache.snapshot, cache.state_dict):
            try:
                look()
                served += 1
            except RuntimeError as error:
                assert "another thread" in str(error)
                refused += 1
    worker.join()
    assert served and torch.equal(found[0], expected)


def test_two_workers_are_refused():
    """The second, at once, and the first goes on."""
    model = tiny_llama()
    cache, inside, leave = new_cache(model, SMALL), threading.Event(), threading.Event()

    def hold():
        with cache.guard:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        for call in (cache.reset, cache.memory, lambda: generate(model, cache, prompt(30), new=2)):
            with pytest.raises(RuntimeError, match="in use by another thread"):
                call()
    finally:
        leave.set()
        thread.join()
    assert generate(model, cache, prompt(30), new=2).shape[1] == 2


def test_a_worker_waits_for_a_reader():
    cache = new_cache(tiny_llama(), SMALL)
    reading, done = threading.Event(), []

    def read():
        with cache.guard.reading:
            reading.set()
            time.sleep(0.2)
            done.append("read")

    thread = threading.Thread(target=read)
    thread.start()
    reading.wait()
    cache.reset()
    assert done == ["read"]
    thread.join()


def test_attach_in_a_with_block():
    """The model is attached inside, and as it was afterwards, also after an error."""
    model = tiny_llama()
    before = dict(vars(model)), model.config._attn_implementation
    with fade_fast.attach(model) as inside:
        assert inside is model and model.config._attn_implementation == "fade"
        generate(model, new_cache(model, SMALL), prompt(30), new=2)
    assert (dict(vars(model)), model.config._attn_implementation) == before
    with pytest.raises(KeyError), fade_fast.attach(model):
        raise KeyError
    assert (dict(vars(model)), model.config._attn_implementation) == before
