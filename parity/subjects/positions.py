"""RoPE: rotation by a position or a difference, detection of the rotation of a model, renumbering."""

import types

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fade_fast
from fade_fast.cache.budget_store import BudgetStore
from fade_fast.hf.rope_probe import RopeProbe
from fade_fast.kernels.rope import rotate
from fade_ref import rope as spec
from fade_ref.config import FadeConfig

from ..case import Case, Draw, Found, relative_error

DIM, CONTEXT = 32, 2048
ORIGINAL = dict(original_max_position_embeddings=512)
#: The parameters of each scheme in addition to theta. The run fails if a scheme is missing here.
PARAMETERS = {
    "default": {},
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "yarn": dict(factor=4.0, **ORIGINAL),
    "llama3": dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
    "longrope": dict(
        factor=4.0,
        short_factor=[1.0 + i for i in range(16)],
        long_factor=[3.0 + i for i in range(16)],
        **ORIGINAL,
    ),
    "proportional": dict(partial_rotary_factor=0.5),
}
MODELS = {"halves": (LlamaConfig, LlamaForCausalLM), "pairs": (CohereConfig, CohereForCausalLM)}


def collect() -> list[Case]:
    found = []
    for scheme in spec.SCHEMES:
        covers = (f"scheme {scheme}",)
        if scheme not in PARAMETERS:
            continue  # the case of the registry reports it
        for style in MODELS:
            run = _rotate(scheme, style == "pairs")
            found.append(Case("positions", "rotate", f"{scheme}, {style}", run, covers))
            found.append(
                Case("positions", "of a model", f"{scheme}, {style}", _of_a_model(scheme, style), covers)
            )
    found.append(Case("positions", "of a model", "none", _without))
    found.append(Case("positions", "rotate", "part of the channels", _partial))
    found.append(Case("positions", "renumber", "random survivors", _renumber, ("positions contiguous",)))
    return found


def _parameters(scheme: str) -> dict:
    return dict(rope_type=scheme, rope_theta=5e5, **PARAMETERS[scheme])


def _rotate(scheme, interleaved):
    def run(found: Found, seed: int):
        draw = Draw(seed)
        rope = spec.from_parameters(_parameters(scheme), head_dim=DIM, max_position_embeddings=CONTEXT)
        frequencies = rope.inv_freq.float()
        rope = spec.Rope(frequencies.double(), interleaved=interleaved)
        position = torch.tensor([0, 1, 2, 7, 63, 64, 4095, 131_071, 999_999, -1, -64, -131_071])
        _compare(found, draw.normal(2, 3, len(position), DIM) * 4, position, rope)
        hot = draw.normal(2, 3, len(position), DIM)
        hot[..., 1] = 3e4
        _compare(found, hot, position, rope)

    return run


def _compare(found: Found, x, position, rope: spec.Rope) -> None:
    frequencies, at = rope.inv_freq.float().to(found.device), position.to(found.device)
    for dtype in (torch.float64, torch.float32):
        there = x.to(dtype).to(found.device)
        ours = rotate(there, at, frequencies, rope.interleaved)
        exact = spec.rotate(there.double().cpu(), position, rope)
        for i, p in enumerate(position.tolist()):
            error = relative_error(ours[..., i, :], exact[..., i, :])
            found.near("rope", error, f"position {p}, {dtype}", dtype=dtype)
        back = rotate(ours, -at, frequencies, rope.interleaved)
        found.near(
            "rope", relative_error(back, there.double().cpu()) / 2, f"there and back, {dtype}", dtype=dtype
        )
        found.same("identity", rotate(there, at * 0, frequencies, rope.interleaved), there)


def _partial(found: Found, seed: int):
    """Channels after the last frequency are unchanged. A position per row is broadcast."""
    for pairs, interleaved in ((1, False), (4, True), (12, False), (12, True)):
        rope = spec.Rope(10_000.0 ** -(torch.arange(pairs).float() / pairs).double(), interleaved=interleaved)
        rope = spec.Rope(rope.inv_freq.float().double(), interleaved=interleaved)
        x, position = Draw(seed).normal(2, 3, 5, DIM), torch.tensor([5, 0, 9, -3, 70_000])
        _compare(found, x, position, rope)
        ours = rotate(
            x.to(found.device), position.to(found.device), rope.inv_freq.to(found.device), interleaved
        )
        found.same("identity", ours[..., 2 * pairs :], x[..., 2 * pairs :])


def _of_a_model(scheme, style):
    def run(found: Found, seed: int):
        config_class, model_class = MODELS[style]
        sizes = dict(
            vocab_size=16, hidden_size=DIM * 2, intermediate_size=16, num_hidden_layers=1, pad_token_id=0
        )
        heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=DIM)
        config = config_class(
            **sizes, **heads, max_position_embeddings=CONTEXT, rope_parameters=_parameters(scheme)
        )
        model = model_class(config).to(found.device)
        if scheme == "dynamic":  # the frequencies change with the length of the text
            found.refused(lambda: RopeProbe(model).find(0), "cannot be renumbered", "layer 0")
            return
        rope = RopeProbe(model).find(0)
        found.holds("frequencies", rope.interleaved == (style == "pairs"), "style of pairs")
        found.same("frequencies", rope.inv_freq(), model.model.rotary_emb.inv_freq)
        exact = spec.from_config(config, interleaved=style == "pairs")
        ours = rope.inv_freq().double().cpu()
        apart = (ours - exact.inv_freq).abs() / exact.inv_freq.clamp_min(1e-300)
        found.near("rope of the model", float(apart.max()))

    return run


def _without(found: Found, seed: int):
    """The tokens of a model without RoPE cannot be renumbered."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    config = FadeConfig(int4_budget=8)
    found.refused(lambda: fade_fast.create_cache(model, config), "cannot be renumbered", "layer 0")


def _renumber(found: Found, seed: int):
    for n_sink, total, recent in ((0, 40, 5), (4, 90, 12), (2, 30, 1)):
        draw = Draw(seed + total)
        alive = draw.chance(0.5, 3, total)
        alive[:, :n_sink] = alive[:, total - recent :] = True
        rank, evicted = spec.renumber(torch.arange(total), alive)
        places, width = [], total - n_sink - recent
        for row in alive[:, n_sink : total - recent]:
            live = row.nonzero().flatten() + n_sink
            live = torch.cat((live, torch.full((width - len(live),), -1)))
            places.append(live[torch.randperm(width, generator=draw.generator)])
        places = torch.stack(places)[:, None].to(torch.int32)
        config = FadeConfig(n_sink=n_sink, int4_budget=8)
        layer = types.SimpleNamespace(config=config)
        lost = evicted[:, None].int().to(found.device)
        tiers = [x.to(found.device) for x in (places[..., :9], places[..., 9:])]
        ours = torch.cat(BudgetStore._renumber(layer, tiers, lost), dim=-1).cpu()
        at = (rank + evicted[:, None]).gather(-1, places[:, 0].long().clamp_min(0))
        exact = at.masked_fill(places[:, 0] < 0, -1)
        found.same("tokens", ours[:, 0], exact, f"{total} tokens")
