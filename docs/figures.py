"""The figures of docs/spec.md, and the numbers behind them.

    python docs/figures.py                      all figures: about five minutes on one core
    python docs/figures.py --only bytes         one figure
    python docs/figures.py --redraw             draw again from the stored numbers

Each figure NAME has two files in docs/figures, NAME.json and NAME.png, and a block in docs/spec.md that
quotes numbers. The script rewrites all three. Needs the extra `docs` (matplotlib) and SmolLM2-135M.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fade_fast import FadeConfig, create_cache, detach
from fade_fast.cli import comparison
from fade_fast.hf import loading
from fade_fast.measure import texts
from fade_ref import attention, baselines, product, rope, tiers
from fade_ref.cache import LayerCache
from fade_ref.rotation import RotatedCodec, key_mean, qr_rotation
from fade_ref.tiers import Tier

HERE = Path(__file__).resolve().parent
WIKITEXT = HERE.parents[1] / "shared/data/wikitext-2/test.txt"
BEAM_SEARCH_HAS_UNFINISHED_SEQUENCES = (
    "Tell me how a lighthouse works, who keeps it, and what a night there is like."
)
SMALL = {"recent_window": 32, "block_size": 16, "int4_budget": 64, "int2_budget": 64}
NEW_TOKENS = 320
LAYER = 10  # whose keys and attention the figures of one layer show
WINDOW, SINKS, BLOCK, QUERIES = 2048, 4, 64, 64  # of the codecs' comparison
MIDDLE = slice(SINKS, SINKS + (WINDOW - SINKS - 64) // BLOCK * BLOCK)
TRAINING_WINDOWS, PQ_EVERY = 2, 3  # 12,288 samples a codebook; PQ for every third layer

BLUE, SKY, GREEN, ORANGE, RED, GREY = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#999999"
TIER_COLOURS = {Tier.FP16: "#1d3461", Tier.INT4: "#2a9d8f", Tier.INT2: "#f2c14e", Tier.EVICTED: "#ececec"}


# -- what is measured


class Lab:
    """The model, loaded on first use, and the runs that several figures share."""

    def __init__(self, name: str | None):
        self.name, self._model, self._life = name, None, None

    @property
    def model(self):
        if self._model is None:
            loading.quiet()
            self._model, self.tokenizer = loading.load(self.name, "cpu", "fp32")
        return self._model

    def about(self) -> dict:
        """The facts about the run that a reader needs; no paths."""
        source = Path(self.model.name_or_path).name
        return {
            "model": source if self.name else loading.HUB_ID.split("/")[-1],
            "source": source,
            "dtype": "fp32",
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        }

    def text(self) -> tuple[str, Tensor]:
        """Name and tokens [windows, WINDOW] of a real text; the last window is the one measured."""
        found, size = WIKITEXT.is_file(), (TRAINING_WINDOWS + 1) * WINDOW
        text = WIKITEXT.read_text(encoding="utf-8") if found else texts.built_in()
        tokenizer = self.model and self.tokenizer
        ids = tokenizer(text[: 10 * size], verbose=False, return_tensors="pt").input_ids[0, :size]
        return "WikiText-2 test" if found else "Python's reference", ids.view(-1, WINDOW)

    @torch.no_grad()
    def attention_calls(self, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Query [Hq, n, D], keys and values [H, n, D] of every layer, for the tokens ids [n]."""
        calls, before = [], self.model.config._attn_implementation

        def record(module, query, keys, values, mask, **kwargs):
            calls.append((query[0], keys[0], values[0]))
            return sdpa_attention_forward(module, query, keys, values, mask, **kwargs)

        AttentionInterface.register("record", record)
        AttentionMaskInterface.register("record", sdpa_mask)
        self.model.set_attn_implementation("record")
        try:
            self.model(ids[None], use_cache=False)
        finally:
            self.model.set_attn_implementation(before)
        return calls

    def life(self) -> tuple[dict, LayerCache]:
        """The tier of every token at every step under two policies, and the second one's cache."""
        if self._life is None:
            inputs = comparison.encode_prompt(
                self.model, self.tokenizer, BEAM_SEARCH_HAS_UNFINISHED_SEQUENCES, NEW_TOKENS
            )
            ids, by_position = _generate(self.model, inputs)
            by_attention, spec = self._replay(ids, inputs.input_ids.shape[1])
            data = {
                **self.about(),
                "config": {"n_sink": FadeConfig().n_sink, **SMALL},
                "layer": LAYER,
                "prompt_tokens": inputs.input_ids.shape[1],
                "tokens_seen": len(by_position[-1]),
                "format": "policy -> token -> [tokens seen, tier it has from then on]",
                "policies": {"position": _changes(by_position), "h2o": _changes(by_attention)},
            }
            self._life = data, spec
        return self._life

    def _replay(self, ids: Tensor, prompt: int) -> tuple[list[Tensor], LayerCache]:
        """The same text through the specification's cache of one layer, planned by h2o."""
        query, keys, values = (x[None].double() for x in self.attention_calls(ids[:-1])[LAYER])
        spec = LayerCache(
            FadeConfig(**SMALL, eviction_policy="h2o"), 1, keys.shape[1], keys.shape[3],
            rope.from_config(self.model.config, layer_idx=LAYER),
        )  # fmt: skip
        history, count = [], prompt
        while spec.columns < query.shape[2]:
            spec.step(*(x[:, :, spec.columns : spec.columns + count] for x in (query, keys, values)))
            now = torch.full((spec.columns,), int(Tier.EVICTED))
            for token in spec.rows[0][0].tokens:
                now[token.position] = int(token.tier)
            # Until the next demotion tokens only arrive: taking them in one step is the same.
            count = SMALL["recent_window"] + SMALL["block_size"] - (spec.columns - spec.boundary)
            count = min(count, query.shape[2] - spec.columns)
            history += [F.pad(now, (0, n), value=int(Tier.FP16)) for n in range(max(count, 1))]
        return history, spec


def _generate(model, inputs) -> tuple[Tensor, list[Tensor]]:
    """Tokens of a greedy generation, and the tiers that the real cache holds them in at every step."""
    cache, history = create_cache(model, FadeConfig(**SMALL)), []
    layer = cache.tiered[0]  # the policy goes by position, so all layers agree

    class Watch(BaseStreamer):
        def put(self, value):
            if not layer.length:
                return
            layer.compact()
            now = torch.full((layer.length,), int(Tier.EVICTED))
            held = [(Tier.FP16, layer.dense_positions())]
            held += [(t.tier, layer.middle.position(t)) for t in layer.middle.tiers]
            for tier, position in held:
                now[position[position >= 0].long()] = int(tier)
            history.append(now)

        def end(self):
            pass

    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    try:
        ids = model.generate(**inputs, past_key_values=cache, generation_config=greedy, streamer=Watch())
    finally:
        detach(model)
    return ids[0], history


def _changes(history: list[Tensor]) -> list[list[list[int]]]:
    """For each token, [tokens seen, tier] at each change of its tier."""
    found = [[] for _ in history[-1]]
    for now in history:
        for token, tier in enumerate(now.tolist()):
            if not found[token] or found[token][-1][1] != tier:
                found[token].append([len(now), tier])
    return found


def life(lab: Lab) -> dict:
    """Tiers of all tokens over a generation."""
    return lab.life()[0]


def renumbering(lab: Lab) -> dict:
    """Positions of the survivors of `life`'s h2o run, before and after renumbering; angles of three pairs."""
    data, spec = lab.life()
    row = spec.rows[0][0]
    wanted = 2 * math.pi / torch.tensor([24.0, 200.0, 1600.0]).double()  # radians a token
    pairs = [(spec.rope.inv_freq - w).abs().argmin().item() for w in wanted]
    return {
        **lab.about(),
        "layer": LAYER,
        "query": row.seen - 1,
        "evicted": row.evicted,
        "position": [t.position for t in row.tokens],
        "read_at": spec.read_at(row),
        "inv_freq": {pair: spec.rope.inv_freq[pair].item() for pair in pairs},
    }


@torch.no_grad()
def rotation(lab: Lab) -> dict:
    """One block of keys after each step of the rotated codec."""
    name, windows = lab.text()
    keys = lab.attention_calls(windows[-1])[LAYER][1].double()
    block = keys[:, MIDDLE].unflatten(1, (-1, BLOCK))  # [H, blocks, BLOCK, D]
    centred = block - key_mean(block)
    stages = {"as it came": block, "less the block's mean": centred}
    stages["and rotated"] = centred @ qr_rotation(block.shape[-1]).T
    shown = block.shape[1] // 2
    return {
        **lab.about(),
        "text": name,
        "layer": LAYER,
        "tokens": BLOCK * block.shape[1],
        "stages": {
            stage: {
                "step": ((x.amax(-1) - x.amin(-1)) / 15).mean().item(),
                "low": _short(x[0, shown].amin(0).tolist()),
                "high": _short(x[0, shown].amax(0).tolist()),
                "key": _short(x[0, shown, BLOCK // 2].tolist()),
            }
            for stage, x in stages.items()
        },
    }


def _short(numbers) -> list[float]:
    """Four digits of each."""
    return [float(f"{x:.4g}") for x in numbers]


def _rotated(x: Tensor, bits: int, centre: int = 0) -> Tensor:
    """x [H, n, D] through the rotated codec, less the mean of blocks of `centre` tokens."""
    codec = RotatedCodec(bits, x.shape[-1], qr_rotation(x.shape[-1]))
    blocks = x.unflatten(-2, (-1, centre or x.shape[-2]))
    mean = key_mean(blocks) if centre else None
    return codec.decode(codec.encode(blocks, mean), mean).flatten(-3, -2)


def _before_rope(x: Tensor, bits: int, turns: rope.Rope) -> Tensor:
    """The same for keys rotated back to position 0, less one mean for all, and rotated on again."""
    position = torch.arange(MIDDLE.start, MIDDLE.stop)
    return rope.rotate(_rotated(rope.rotate(x, -position, turns), bits, x.shape[-2]), position, turns)


def _by(name: str, x: Tensor, *args) -> Tensor:
    """x through baselines.NAME_encode and back."""
    return getattr(baselines, f"{name}_decode")(*getattr(baselines, f"{name}_encode")(x, *args))


def _akv(x: Tensor, bits: int) -> Tensor:
    return baselines.akv_decode(*baselines.akv_encode(x, bits, 32), x.shape[-1])


#: Name -> widths; keys and values, through the codec, as functions of (x [H, n, D], bits), and for keys
#: the layer's RoPE; bytes of a key and of a value, of n tokens and d channels, all that is stored counted.
CODECS = {
    "rotated, a mean a block": (
        (8, 4, 3, 2), lambda x, b, r: _rotated(x, b, BLOCK), _rotated,
        lambda b, n, d: (tiers.token_bytes(b, d) + 2 * d / BLOCK, tiers.token_bytes(b, d)),
    ),
    "rotated, one mean": (
        (8, 4, 3, 2), lambda x, b, r: _rotated(x, b, x.shape[-2]), _rotated,
        lambda b, n, d: (tiers.token_bytes(b, d) + 2 * d / n, tiers.token_bytes(b, d)),
    ),
    "rotated, one mean, before RoPE": (
        (8, 4, 3, 2), _before_rope, _rotated,
        lambda b, n, d: (tiers.token_bytes(b, d) + 2 * d / n, tiers.token_bytes(b, d)),
    ),
    "rotated, not centred": (
        (8, 4, 3, 2), lambda x, b, r: _rotated(x, b), _rotated,
        lambda b, n, d: (tiers.token_bytes(b, d),) * 2,
    ),
    "channel (KIVI, groups of 64)": (
        (8, 4, 3, 2), lambda x, b, r: _by("channel", x, b), lambda x, b: _by("group", x, b),
        lambda b, n, d: (d * b / 8 + 4 * d / 64,) * 2,
    ),
    "AKV (groups of 32)": (
        (8, 4, 3, 2), lambda x, b, r: _akv(x, b), _akv, lambda b, n, d: (d * b / 8 + 8 * d / 32,) * 2,
    ),
    "symmetric (fade-kv)": (
        (4,), lambda x, b, r: _by("symmetric", x, -2), lambda x, b: _by("symmetric", x, -1),
        lambda b, n, d: (d / 2 + 2 * d / n, d / 2 + 2),
    ),
}  # fmt: skip
PQ = "PQ"


@torch.no_grad()
def codecs(lab: Lab) -> dict:
    """Errors of every codec and width, layer by layer, in the state of a cache after WINDOW tokens."""
    name, windows = lab.text()
    *training, calls = map(lab.attention_calls, windows)
    heads, _, dim = calls[0][1].shape
    errors: dict = {codec: {bits: [] for bits in widths} for codec, (widths, *_) in CODECS.items()}
    errors[PQ] = {2: []}
    for layer, call in enumerate(calls):
        exact, turns = tuple(x.double() for x in call), rope.from_config(lab.model.config, layer_idx=layer)
        middle = tuple(x[:, MIDDLE] for x in exact[1:])
        for codec, (widths, keys, values, _) in CODECS.items():
            for bits in widths:
                coded = keys(middle[0], bits, turns), values(middle[1], bits)
                errors[codec][bits].append(_errors(exact, coded))
        if layer % PQ_EVERY == 0:
            samples = ([w[layer][side].flatten(0, 1) for w in training] for side in (1, 2))
            books = [product.train(torch.cat(x).double()) for x in samples]
            coded = [product.decode(product.encode(x, book), book) for x, book in zip(middle, books)]
            errors[PQ][2].append(_errors(exact, coded))
    count = MIDDLE.stop - MIDDLE.start
    size = {c: {b: sum(f(b, count, dim)) for b in widths} for c, (widths, _, _, f) in CODECS.items()}
    size[PQ] = {2: 2 * product.bytes_per_token(dim)}
    return {
        **lab.about(),
        "text": name,
        "window": WINDOW,
        "middle": count,
        "queries": QUERIES,
        "head_dim": dim,
        "kv_heads": heads,
        "pq_training": heads * WINDOW * TRAINING_WINDOWS,
        "pq_layers": list(range(0, len(calls), PQ_EVERY)),
        "format": "codec -> bits -> layer -> [rms error of a score, relative error of values, of the output]",
        "errors": {c: {b: [_short(e) for e in each] for b, each in w.items()} for c, w in errors.items()},
        "bytes": size,
    }


def _errors(exact: tuple[Tensor, Tensor, Tensor], coded) -> tuple[float, float, float]:
    """Errors of scores (rms, nats), values, and attention over sinks, coded middle and recent tokens."""
    query, keys, values = exact
    query, dim = query[:, -QUERIES:], query.shape[-1]
    terms, position = attention.Terms(dim**-0.5), torch.arange(WINDOW)
    scores = terms.scaling * attention.dot(query, coded[0] - keys[:, MIDDLE])
    read = [torch.cat((x[:, :SINKS], y, x[:, MIDDLE.stop :]), dim=1) for x, y in zip((keys, values), coded)]

    def output(k: Tensor, v: Tensor) -> Tensor:
        return attention.merge([attention.over_tensors(query, k, v, position[-QUERIES:], position, terms)])

    return (
        scores.square().mean().sqrt().item(),
        _relative(coded[1], values[:, MIDDLE]),
        _relative(output(*read), output(keys, values)),
    )


def _relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


def sizes(lab: Lab) -> dict:
    """Packed bytes of one vector, by tier and head_dim; computed, no model."""
    dims = (64, 128, 256)
    return {
        "head_dims": dims,
        "block_size": BLOCK,
        "codes": {t.name: [tiers.packed_bytes(b, d) for d in dims] for b, t in tiers.INTEGER_TIERS.items()},
        "with_scale": {
            t.name: [tiers.token_bytes(b, d) for d in dims] for b, t in tiers.INTEGER_TIERS.items()
        },
        "mean": [2 * d / BLOCK for d in dims],
    }


# -- how it is drawn


def _axes(columns: int, height: float, rows: int = 1, **kwargs):
    """A figure as wide as GitHub's text, and its axes [rows, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.spines.top": False,
        "axes.spines.right": False, "axes.linewidth": 0.7, "lines.linewidth": 1.4, "legend.frameon": False,
        "legend.fontsize": 8, "savefig.dpi": 150, "figure.constrained_layout.use": True,
    })  # fmt: skip
    return plt.subplots(rows, columns, figsize=(8.2, height), squeeze=False, **kwargs)


def _save(figure, path: Path) -> None:
    """Save a PNG of 64 colors, which takes a third of the bytes that matplotlib would write."""
    from PIL import Image

    figure.savefig(path)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64)
    small.save(path, optimize=True)


def draw_life(data: dict):
    figure, axes = _axes(2, 3.9, sharey=True)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    order, first, last = list(TIER_COLOURS), data["prompt_tokens"], data["tokens_seen"]
    titles = ("position: the newest stay", f"h2o: the most attended stay (layer {data['layer']})")
    for axis, title, changes in zip(axes[0], titles, data["policies"].values()):
        image = torch.full((last, last - first + 1), torch.nan)
        for token, steps in enumerate(changes):
            for seen, tier in steps:
                image[token, seen - first :] = order.index(tier)
        axis.imshow(
            image, origin="lower", aspect="auto", interpolation="nearest", vmin=-0.5, vmax=len(order) - 0.5,
            cmap=ListedColormap(TIER_COLOURS.values()), extent=(first - 0.5, last + 0.5, -0.5, last - 0.5),
        )  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("tokens seen")
    axes[0, 0].set_ylabel("position of the token")
    handles = [Patch(color=c, label=t.name) for t, c in TIER_COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, handlelength=1.2, fontsize=9)
    return figure


def draw_renumbering(data: dict):
    figure, axes = _axes(4, 2.9, width_ratios=(1.5, 1, 1, 1))
    whole, *pairs = axes[0]
    looks = (("as they came", "position", ORANGE, "none"), ("renumbered", "read_at", BLUE, BLUE))
    for label, stored, colour, fill in looks:
        distance = data["query"] - torch.tensor(data[stored]).double()
        whole.plot(distance, color=colour, label=label)
        for axis, w in zip(pairs, data["inv_freq"].values()):
            turns = distance * w / (2 * math.pi) % 1
            axis.plot(turns, "o", color=colour, mfc=fill, ms=1.4 if fill == BLUE else 2.6, mew=0.7)
    whole.set_title("distance to the query")
    whole.set_ylabel("tokens")
    whole.set_xlabel("survivor, oldest first")
    whole.legend(loc="upper right")
    for axis, (pair, w) in zip(pairs, data["inv_freq"].items()):
        axis.set_title(f"pair {pair}: a turn\nin {2 * math.pi / w:,.0f} tokens")
        axis.set_ylim(-0.03, 1.03)
        axis.set_yticks((0, 0.5, 1))
        axis.set_xlabel("survivor")
    pairs[0].set_ylabel("angle to the query, turns")
    return figure


def draw_rotation(data: dict):
    figure, axes = _axes(3, 2.7, sharey=True)
    for axis, (stage, x) in zip(axes[0], data["stages"].items()):
        channel = range(len(x["key"]))
        axis.vlines(channel, x["low"], x["high"], color=SKY, lw=2.2, label=f"all {BLOCK} keys of the block")
        axis.plot(channel, x["key"], "o", color="black", ms=2.2, label="one key")
        axis.set_title(f"{stage}\n4-bit step {x['step']:.2f}")
        axis.set_xlabel("channel")
    axes[0, 0].set_ylabel("value")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


LINES = [(BLUE, "-"), (SKY, "-"), (BLUE, ":"), (SKY, ":")]
LINES += [(ORANGE, "-"), (GREEN, "-"), (GREY, "-"), (RED, "o")]


def draw_codecs(data: dict):
    figure, axes = _axes(3, 5.0, rows=2, sharex=True)
    titles = "keys: rms error of a score, nats", "values: relative error", "attention output: relative error"
    for row, bits in zip(axes, "42"):
        for measure, (axis, title) in enumerate(zip(row, titles)):
            for i, (codec, widths) in enumerate(data["errors"].items()):
                if bits not in widths or (measure == 1 and 0 < i < 4):
                    continue  # values are never centred: one line stands for four
                layers = data["pq_layers"] if codec == PQ else range(len(widths[bits]))
                colour, style = LINES[i]
                axis.plot(
                    layers, [e[measure] for e in widths[bits]], style, color=colour, ms=3.5, label=codec
                )
            axis.set_title(title)
            axis.set_ylim(0)
        row[2].set_ylim(auto=True)
        row[2].set_yscale("log")
        row[2].yaxis.set_major_formatter("{x:g}")
        row[0].set_ylabel(f"{bits} bits", fontweight="bold")
    for axis in axes[1]:
        axis.set_xlabel("layer")
    found = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    handles = [found[codec] for codec in data["errors"]]
    figure.legend(handles, data["errors"], loc="outside upper center", ncols=4, columnspacing=1.2)
    return figure


def draw_bytes(data: dict):
    figure, axes = _axes(1, 2.9)
    axis, width = axes[0, 0], 0.26
    for i, (dim, colour) in enumerate(zip(data["head_dims"], (BLUE, SKY, GREEN))):
        for place, tier in enumerate(data["codes"]):
            codes, whole = data["codes"][tier][i], data["with_scale"][tier][i]
            parts = {f"codes, head_dim {dim}": (codes, colour)}
            if whole > codes:
                parts["scale, zero"] = (whole - codes, "#333333")
                parts["key mean, one a block"] = (data["mean"][i], "#bbbbbb")
            x, top = place + (i - 1) * width, 0.0
            for label, (size, shade) in parts.items():
                bar = axis.bar(x, 8 * size / dim, width * 0.92, top, color=shade)
                if place == 0 and (label.startswith("codes") or i == 2):
                    bar.set_label(label)
                top += 8 * size / dim
            axis.text(x, top + 0.1, whole, ha="center", va="bottom", fontsize=7.5)
    axis.set_xticks(range(len(data["codes"])), data["codes"])
    axis.set_ylabel("bits an element")
    axis.legend(loc="upper right")
    return figure


# -- what the text quotes


def _source(data: dict) -> str:
    return f"{data['model']} in {data['dtype']}, torch {data['torch']}"


def quote_life(data: dict) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in data["config"].items())
    last = {policy: [steps[-1][1] for steps in changes] for policy, changes in data["policies"].items()}
    early = {policy: sum(t != Tier.EVICTED for t in held[:100]) for policy, held in last.items()}
    counts = ", ".join(f"{last['position'].count(t)} {t.name}" for t in TIER_COLOURS)
    return (
        f"*The tier of every token while {data['tokens_seen']} tokens are seen ({_source(data)}; "
        f"{settings}). Left: tiers of the real cache during `generate()`. Right: the same text through "
        f"`cache.LayerCache`, planned by attention. At the end the first cache holds {counts}. It still has "
        f"{early['position']} of the first 100 tokens. The second cache still has {early['h2o']}.*"
    )


def quote_renumbering(data: dict) -> str:
    before, after = (data["query"] - data[k][0] for k in ("position", "read_at"))
    return (
        f"*Survivors of the `h2o` run above, layer {data['layer']}: {data['evicted']} of {data['query'] + 1} "
        f"tokens are evicted. After renumbering, the first sink is {after} tokens from the query instead of "
        f"{before}, and every distance from 0 to {after} occurs once. The angle in attention is the distance "
        "times the frequency. Renumbering gives fast pairs arbitrary angles and makes the angles of slow "
        f"pairs smaller ({_source(data)}).*"
    )


def quote_rotation(data: dict) -> str:
    steps = [s["step"] for s in data["stages"].values()]
    return (
        f"*Keys of a block of {BLOCK} tokens (layer {data['layer']}, KV head 0; {data['text']}; "
        f"{_source(data)}). The 4-bit step is the range of a key divided by 15, averaged over "
        f"{data['tokens']:,} tokens and all heads: {steps[0]:.2f} for the original keys, {steps[1]:.2f} "
        f"after the mean is subtracted, {steps[2]:.2f} after rotation.*"
    )


def quote_codecs(data: dict) -> str:
    def mean(codec: str, bits: str, measure: int) -> float:
        found = [e[measure] for e in data["errors"][codec][bits]]
        return sum(found) / len(found)

    def times(codec: str, measure: int) -> str:
        ratio = (mean(codec, b, measure) / mean(ours, b, measure) for b in "42")
        return "{:.1f} and {:.1f} times".format(*ratio)

    ours, _, before, bare, kivi = list(CODECS)[:5]
    lines = [
        f"*Errors on real keys and values ({_source(data)}; {data['text']}, {data['window']:,} tokens, of "
        f"which {data['middle']:,} are the coded middle; the last {data['queries']} queries). All factors "
        f"are relative to the first line below, at 4 and 2 bits. Without centering, the error of a score is "
        f"{times(bare, 0)} as large. With one mean taken before RoPE, the error of a score is "
        f"{times(before, 0)} as large, but the error of the output is {times(before, 2)} as large. With "
        f"KIVI, the error of the output is {times(kivi, 2)} as large. PQ has one codebook per layer, "
        f"trained on {data['pq_training']:,} other vectors, and is shown for every third layer. The table "
        f"shows means over the layers in the figure, and the bytes of a key and a value of head_dim "
        f"{data['head_dim']} ({data['head_dim'] * 4} uncompressed):*",
        "",
        "| codec | bits | bytes | score, nats | values | output |",
        "|---|---|---|---|---|---|",
    ]
    for codec, widths in data["errors"].items():
        size = ", ".join(f"{x:.0f}" for x in data["bytes"][codec].values())
        columns = [", ".join(f"{mean(codec, bits, m):.3f}" for bits in widths) for m in range(3)]
        lines.append(f"| {' | '.join([codec, ', '.join(widths), size, *columns])} |")
    return "\n".join(lines)


def quote_bytes(data: dict) -> str:
    i = data["head_dims"].index(128)
    ratio = ", ".join(f"{tier} {256 / size[i]:.2f}x" for tier, size in data["with_scale"].items())
    return (
        "*Packed bits per element of one vector. The number on a bar is the bytes of the vector, without the "
        f"key mean. Ratios to 256 bytes in 16 bits, at head_dim 128: {ratio}. The mean of a block of "
        f"{data['block_size']} tokens adds {data['mean'][i]:.0f} bytes to each of its keys.*"
    )


#: For each figure: the functions that measure, draw and quote it, and its alternative text.
FIGURES = {
    "life": (life, draw_life, quote_life, "Tier of every token over a generation, under two policies"),
    "rotation": (rotation, draw_rotation, quote_rotation, "Channels of real keys, centered and rotated"),
    "codecs": (codecs, draw_codecs, quote_codecs, "Error of each codec by layer"),
    "renumbering": (
        renumbering,
        draw_renumbering,
        quote_renumbering,
        "Distances and angles, renumbered or not",
    ),
    "bytes": (sizes, draw_bytes, quote_bytes, "Bits per element of each tier and head_dim"),
}


def quoted(spec: str, name: str) -> str:
    """The text of spec.md with the block of one figure as its stored numbers say."""
    data = json.loads((HERE / f"figures/{name}.json").read_text(encoding="utf-8"))
    *_, quote, title = FIGURES[name]
    block = f"<!-- figure {name} -->\n![{title}](figures/{name}.png)\n\n{quote(data)}\n<!-- end -->"
    changed, count = re.subn(f"<!-- figure {name} -->.*?<!-- end -->", lambda _: block, spec, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"spec.md has {count} blocks of figure {name}")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=f"hub id or folder (default: {loading.HUB_ID}, online or offline)")
    parser.add_argument("--only", choices=FIGURES, metavar="NAME", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--redraw", action="store_true", help="measure nothing, use the stored numbers")
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    lab, spec = Lab(args.model), HERE / "spec.md"
    for name in [args.only] if args.only else FIGURES:
        measure, draw, _, _ = FIGURES[name]
        path = HERE / "figures" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        if not args.redraw:
            path.write_text(json.dumps(measure(lab), separators=(",", ":")) + "\n", encoding="utf-8")
        _save(draw(json.loads(path.read_text(encoding="utf-8"))), path.with_suffix(".png"))
        spec.write_text(quoted(spec.read_text(encoding="utf-8"), name), encoding="utf-8")
        print(f"docs/figures/{name}.png, {path.with_suffix('.png').stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
