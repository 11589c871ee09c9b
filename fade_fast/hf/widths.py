"""Choose the widths of each layer, so that the measured loss stays below `FadeConfig.loss_bound`.

The model reads a text twice: with a cache that compresses nothing, and with one that compresses all but the
newest block, as if the text had come block by block (`KVLayer.chunk`). The loss is the mean KL divergence
between both predictions. If the widths of the configuration lose too much, keys and values of single layers
get 8 bits, the most damaged ones first. If 8 bits everywhere are not enough, layers stay uncompressed.
Bisection finds the shortest list of such changes.

The result is known for the rest of the process. For a model with a name it is kept in the user's cache
folder, by a digest of the model, so that every process makes the same choice.
"""

import contextlib
import json
import math
import os
import warnings
import weakref
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fade_ref.config import KEPT, PRESETS, Bits, FadeConfig

from ..cache.guard import without_autocast
from ..errors import NotCalibrated
from ..saved.files import write_json
from .attention import NAME
from .cache import TieredKVCache
from .calibration import Calibration, load, model_file, own_texts, same_ids, text_ids
from .calibration_text import CHECK
from .first_prompt import PromptCalibration
from .layer import TieredLayer
from .models import ranks_of, text_config, unwrapped
from .undisturbed import undisturbed
from .verify import Witness, feed

VERSION = 3  # of the files and of the way to choose
CHUNK = 32  # tokens of a block, and of a chunk: each chunk reads all earlier blocks compressed
TOKENS = 640  # most tokens of the text
MORE = 8  # bits of keys and values that 4 or fewer bits damage too much


PRESET_CONFIGS = tuple(map(FadeConfig.preset, PRESETS))


class CodecWarning(UserWarning):
    """A preset got another codec than its own."""


@dataclass(frozen=True)
class Choice:
    """Widths that were chosen for a model, and the reason.

    Attributes:
        layer_bits: (layer, (bits of keys, bits of values)) of the layers whose widths are not those of the
            configuration.
        loss: measured KL divergence per token with these widths, in nats; None if nothing was measured.
        plain: the same with the widths of the configuration in every layer.
        bound: the value of `FadeConfig.loss_bound`.
        noise: what 8 bits in every layer lose in a model of 16-bit numbers: nearly all of this is rounding,
            and is subtracted from `loss` and `plain`. 0 if it was not needed.
        tokens: number of tokens whose predictions were compared.
        untried: the reason why nothing was measured; empty if something was.
    """

    layer_bits: tuple[tuple[int, Bits], ...] = ()
    loss: float | None = None
    plain: float | None = None
    bound: float = 0.0
    noise: float = 0.0
    tokens: int = 0
    untried: str = ""

    @classmethod
    def of_json(cls, value: dict) -> "Choice":
        """The choice that `dataclasses.asdict` made a dict of, also after JSON."""
        pairs = tuple((int(i), (int(k), int(v))) for i, (k, v) in value["layer_bits"])
        return cls(**{**value, "layer_bits": pairs})

    def apply(self, config: FadeConfig) -> FadeConfig:
        """`config` with these widths. Its `loss_bound` is None, because nothing is left to choose."""
        return replace(config, loss_bound=None, layer_bits=dict(self.layer_bits) or None)

    def __str__(self) -> str:
        if self.untried:
            return f"those of the configuration in every layer; their loss is unknown: {self.untried}"
        where = f"measured over {self.tokens} tokens, bound {self.bound:g}"
        where += f", rounding {self.noise:.2g} subtracted" if self.noise else ""
        if not self.layer_bits:
            return f"those of the configuration in every layer: KL {self.loss:.2g} nats a token ({where})"
        counts = {bits: sum(b == bits for _, b in self.layer_bits) for _, bits in self.layer_bits}
        names = ", ".join(f"{n} layers with K{k} V{v}" for (k, v), n in sorted(counts.items()))
        return f"{names}: KL {self.loss:.2g} nats a token instead of {self.plain:.2g} ({where})"


#: Choices of this process, by model.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, dict[str, Choice]]" = weakref.WeakKeyDictionary()


def chosen(
    model: PreTrainedModel,
    config: FadeConfig,
    calibration: "str | os.PathLike | Calibration | None" = None,
    again: bool = False,
) -> Choice:
    """The choice for a configuration with a `loss_bound`: known, in a file, or measured now.

    Args:
        model: a decoder. It is left unchanged. If it cannot read tokens alone, nothing is measured.
        calibration: as in `create_cache`. A calibration file may contain choices.
        again: whether to measure although the choice is known.

    Raises `ValueError` for a configuration that `TieredKVCache` refuses.
    """
    model = unwrapped(model)
    text_config(model)  # refuses an object that is no model
    name = key(config)
    if isinstance(calibration, (str, os.PathLike)):
        calibration = load(calibration, model)
    stored = (calibration.provenance if calibration is not None else {}).get("choices", {})
    if name in stored and not again:
        return Choice.of_json(stored[name])
    if config.quant_backend != "matched":
        calibration = None
    elif calibration is not None:
        name += calibration.digest
    known = _known.setdefault(model, {})
    path = model_file(model, "widths", VERSION, CHECK, name) if model.name_or_path else None
    if name not in known and path is not None and path.is_file() and not again:
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):  # a damaged file is written anew
            known[name] = Choice.of_json(json.loads(path.read_text(encoding="utf-8")))
    if name not in known or again:
        found = _choose(model, config, calibration)
        if found.untried:  # perhaps the model can run later
            return found
        known[name] = found
        if path is not None:
            with contextlib.suppress(OSError):  # without a writable folder, every process measures
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, asdict(found))
    return known[name]


def settled(
    model: PreTrainedModel,
    config: FadeConfig,
    calibration: "str | os.PathLike | Calibration | None" = None,
    again: bool = False,
) -> "tuple[FadeConfig, str | os.PathLike | Calibration | None, Choice | None]":
    """What `TieredKVCache` takes: a configuration with nothing left to choose, and the calibration it needs.

    The third is the choice, or None without a `loss_bound`. Arguments and errors are those of `chosen`.

    A preset whose codec needs a calibration, which this model cannot have, not even from its first prompt,
    gets the rotated codec, and a `CodecWarning`.
    """
    if config.quant_backend == "matched" and calibration is None and config in PRESET_CONFIGS:
        try:
            TieredKVCache(model, replace(config, loss_bound=None))
        except NotCalibrated as why:
            warnings.warn(f"{why}. So this cache has the codec 'rotated'", CodecWarning, stacklevel=3)
            config = replace(config, quant_backend="rotated")
    if config.loss_bound is None:
        return config, calibration, None
    choice = chosen(model, config, calibration, again)
    return choice.apply(config), calibration if config.quant_backend == "matched" else None, choice


def key(config: FadeConfig) -> str:
    """The fields of a configuration that a choice depends on, as JSON."""
    names = ("loss_bound", "middle_k_bits", "middle_v_bits", "quant_backend", "n_sink", "positions")
    return json.dumps({name: getattr(config, name) for name in names})


def _choose(model: PreTrainedModel, config: FadeConfig, calibration: Calibration | None) -> Choice:
    ladder = None
    try:
        ladder = Ladder(model, config, calibration)
        with undisturbed(model), without_autocast():
            return ladder.climb()
    except (Untried, NotCalibrated) as why:
        return Choice(bound=config.loss_bound, untried=str(why))
    finally:
        if ladder is not None and ladder.calibration is not None:
            ladder.calibration.drop_tables(CHUNK)  # this process needs them only once


class Untried(Exception):
    """The reason why a model could not be measured."""


class Ladder:
    """The measurements for one choice. A list of changes, most urgent first, is the ladder."""

    def __init__(self, model: PreTrainedModel, config: FadeConfig, calibration: Calibration | None):
        self.model, self.bound, self.calibration = model, config.loss_bound, calibration
        self.at_once = model._can_set_attn_implementation()
        self.ranks = ranks_of(model)
        #: Without recent tokens and in short blocks, a short text shows what a long one would lose.
        self.config = replace(config, loss_bound=None, recent_window=0, block_size=CHUNK)
        cache = TieredKVCache(model, self.config, calibration=calibration)
        if isinstance(cache.calibration, PromptCalibration):  # this text must not give the matrices
            raise Untried(cache.calibration.why)
        self.calibration = cache.calibration
        self.layers = [layer.layer_idx for layer in cache.tiered]
        self.bits = {i: (config.middle_k_bits, config.middle_v_bits) for i in self.layers}
        self.ids = self.exact = self.witness = None

    def climb(self) -> Choice:
        """The choice. Raises `Untried`."""
        self._read_exact()
        plain = self.loss(self.bits)
        compared = self.ids.numel() - self.ids.shape[0] * CHUNK
        noise = 0.0
        if plain > self.bound:
            wide = self.loss({i: (max(k, MORE), max(v, MORE)) for i, (k, v) in self.bits.items()})
            if self.exact.dtype in (torch.float16, torch.bfloat16):
                noise, plain, wide = wide, max(0.0, plain - wide), 0.0
        found = Choice((), plain, plain, self.bound, noise, compared)
        if plain <= self.bound:
            return found
        enough = wide <= self.bound
        changes = self.changes(not enough)
        low, high = 0, len(changes)  # `high` changes are enough; `low` are not
        loss = wide if enough else 0.0  # with every change, no layer is compressed
        while high - low > 1:
            middle = (low + high) // 2
            measured = max(0.0, self.loss(self.after(changes[:middle])) - noise)
            if measured <= self.bound:
                high, loss = middle, measured
            else:
                low = middle
        best = self.after(changes[:high])
        pairs = tuple((i, best[i]) for i in self.layers if best[i] != self.bits[i])
        return replace(found, layer_bits=pairs, loss=loss)

    def changes(self, give_up: bool) -> list[tuple[int, int, int]]:
        """(layer, bits of keys, bits of values) in the order in which they are made; 0: no other bits.

        With `give_up`, layers are left uncompressed after all of them have `MORE` bits.
        """
        k_bits, v_bits = next(iter(self.bits.values()))
        damage, last = [], []
        if k_bits < MORE:
            damage += [(x, i, MORE, 0) for i, x in self.damage(k_bits, max(v_bits, MORE)).items()]
        if v_bits < MORE:
            damage += [(x, i, 0, MORE) for i, x in self.damage(max(k_bits, MORE), v_bits).items()]
        if give_up:
            wide = self.damage(max(k_bits, MORE), max(v_bits, MORE))
            last = [(x, i, KEPT, KEPT) for i, x in wide.items()]
        order = [sorted(part, key=lambda change: (-change[0], change[1:])) for part in (damage, last)]
        return [change[1:] for part in order for change in part]

    def after(self, changes: list[tuple[int, int, int]]) -> dict[int, Bits]:
        """The bits of every layer after some changes."""
        bits = dict(self.bits)
        for i, keys, values in changes:
            bits[i] = max(bits[i][0], keys), max(bits[i][1], values)
        return bits

    def damage(self, k_bits: int, v_bits: int) -> dict[int, float]:
        """Relative error of each layer's attention output, where its input is exact."""
        if self.witness is None:
            self.witness, cache = Witness(self.model), self._cache(replace(self.config, recent_window=None))
            with self.witness:
                self._feed(cache)
        cache = self._cache(self._with(dict.fromkeys(self.layers, (k_bits, v_bits))))
        self.witness.relative.clear()
        with self.witness:
            self._feed(cache)
        found = {i: error for i, error in self.witness.relative.items() if i in self.bits}
        return dict(zip(found, self._agreed(list(found.values()))))

    def loss(self, bits: dict[int, Bits]) -> float:
        """Mean KL divergence of the predictions with these bits from the exact ones, in nats per token.

        The first `CHUNK` tokens of a text do not count, because they read nothing compressed. The mean is in
        float64. Raises `Untried` if it is not finite.
        """
        cache = self._cache(self._with(bits))
        found = self._feed(cache)
        total = 0.0
        for ours, exact in zip(found.split(CHUNK, 1)[1:], self.exact.split(CHUNK, 1)[1:]):
            ours, exact = (x.float().log_softmax(-1) for x in (ours, exact))
            total += torch.nn.functional.kl_div(ours, exact, reduction="sum", log_target=True).item()
        (total,) = self._agreed([total])
        if not math.isfinite(total):
            raise Untried("the outputs of the model are not finite")
        return max(0.0, total / (self.ids.numel() - self.ids.shape[0] * CHUNK))

    def _agreed(self, numbers: list[float]) -> list[float]:
        """The numbers of the first process, if the model is split between several.

        All have the same predictions. But if a last bit differed, one process might choose other widths, or
        measure once more and wait for the others for ever.
        """
        if self.ranks is None:
            return numbers
        told = torch.tensor(numbers, dtype=torch.float64)
        return self.ranks.of_first(told, self.model.device).tolist()

    def _read_exact(self) -> None:
        name = type(self.model).__name__
        try:
            if self.at_once:
                self.model.set_attn_implementation(NAME)
            ids = text_ids(self.model, CHECK, TOKENS)
            self.ids = same_ids(self.model, own_texts(self.model)[1] if ids is None else ids)
            if self.at_once:  # `own_texts` used another one
                self.model.set_attn_implementation(NAME)
            if self.ids.shape[1] <= CHUNK:
                raise Untried(f"{name} reads at most {self.ids.shape[1]} tokens")
            cache = self._cache(replace(self.config, recent_window=None))
            self.exact = self._feed(cache)
        except Untried:
            raise
        except Exception as error:  # noqa: BLE001 - any error of the model's own code
            raise Untried(
                f"the forward pass of {name} over tokens raises {type(error).__name__}: {error}"
            ) from error
        if self.exact.is_meta or self.exact.dim() != 3 or not self.exact.isfinite().all():
            raise Untried(f"{name} gives no finite predictions")

    def _feed(self, cache: TieredKVCache) -> Tensor:
        """Predictions of the text: from one pass, where our attention can act as if it came in chunks."""
        each = self.ids.shape[1] if self.at_once else CHUNK
        return feed(self.model, cache, self.ids, [each] * -(-self.ids.shape[1] // each))

    def _cache(self, config: FadeConfig) -> TieredKVCache:
        compresses = config.compresses
        if not compresses:
            config = replace(config, quant_backend="rotated", layer_bits=None)
        cache = TieredKVCache(self.model, config, calibration=self.calibration if compresses else None)
        for layer in cache.layers:
            if isinstance(layer, TieredLayer) and self.at_once:
                layer.kv.chunk = CHUNK
        return cache

    def _with(self, bits: dict[int, Bits]) -> FadeConfig:
        return replace(self.config, layer_bits=bits)
