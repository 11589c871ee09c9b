"""Check that a prompt continues a cache before generate() runs, and record its token ids afterwards.

transformers feeds the part of a prompt beyond the length of the cache, whatever the cache holds. So an edited
history, another text or a shorter text would be appended to a text that it does not continue.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..cache import masks

if TYPE_CHECKING:
    from .cache import TieredKVCache

#: Options of generate() that affect a cache.
OPTIONS = ("use_cache", "output_attentions", "disable_compile", "compile_config")


class SeenTokens:
    """Token ids of a cache, as far as generate() showed them: int32 [B, n] on the host.

    The first n token positions of the cache are known. Tokens that were fed in another way are unknown. Ids
    of padding have no meaning.
    """

    def __init__(self):
        self.ids: Tensor | None = None

    @property
    def known(self) -> int:
        """n, the number of known tokens per row."""
        return 0 if self.ids is None else self.ids.shape[1]

    def set(self, ids: Tensor | None) -> None:
        """Store ids [B, n]; None forgets all ids."""
        self.ids = None if ids is None else ids.to("cpu", torch.int32)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row."""
        if length < self.known:
            self.ids = self.ids[:, :length].clone() if length else None

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by rows `index` [B']."""
        if self.ids is not None:
            self.ids = self.ids[index.to("cpu", torch.int64)]

    def shared(self, ids: Tensor, real: Tensor | None) -> int:
        """Number of leading tokens of ids [B, m] that agree with the known ids in every row.

        Padding (False in `real`) always agrees.
        """
        count = min(self.known, ids.shape[1])
        if not count:
            return 0
        differs = self.ids[:, :count] != ids[:, :count].to("cpu", torch.int32)
        if real is not None:
            differs &= real[:, :count].cpu()
        mismatch = differs.any(0)
        return int(mismatch.int().argmax()) if mismatch.any() else count


def common_prefix(cache: "TieredKVCache", ids: Tensor) -> int:
    """Number of leading tokens of `ids`, integers [B, n], that a cache can keep.

    It is at most n - 1, because one token must be fed. To crop the cache to this prefix, if the tokens beyond
    are still uncompressed: `cache.crop(common_prefix(cache, ids) - cache.get_seq_length())`. The cache knows
    a token only if generate() fed or chose it, or if `load_cache` found its id in the file.

    Raises `ValueError` for ids of another number of rows.
    """
    rows = cache.token_positions.batch if cache.get_seq_length() else ids.shape[0]
    if ids.dim() != 2 or ids.shape[0] != rows:
        raise ValueError(f"ids of shape {tuple(ids.shape)}: [{rows}, n] is allowed for this cache")
    return min(cache.seen.shared(ids, cache.token_positions.real()), max(0, ids.shape[1] - 1))


@dataclass
class Prompt:
    """Arguments of generate(): ids [B, n], mask [B, m] and `OPTIONS`; None where one is missing.

    `longest` is the number of tokens at which the text ends if nothing ends it before; None: not known.
    """

    cache: Cache
    ids: Tensor | None
    mask: Tensor | None
    embedded: bool
    options: dict
    longest: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, cache: Cache, args: tuple, kwargs: dict) -> "Prompt":
        """Collect the fields from the arguments of `model.generate`."""
        given = args[0] if args else kwargs.get("inputs")
        ids = kwargs.get("input_ids", given)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            ids = None
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        config = args[1] if len(args) > 1 else kwargs.get("generation_config") or model.generation_config
        options = {name: kwargs.get(name, getattr(config, name, None)) for name in OPTIONS}
        new, most = (kwargs.get(n, getattr(config, n, None)) for n in ("max_new_tokens", "max_length"))
        known = mask if mask is not None else ids  # of all tokens, if only new ids are passed
        longest = most if new is None else None if known is None else known.shape[1] + new
        return cls(cache, ids, mask, kwargs.get("inputs_embeds") is not None, options, longest)

    @property
    def texts(self) -> int | None:
        """How many texts are asked for, before they are repeated for beams; None: not known."""
        known = self.mask if self.ids is None else self.ids
        return None if known is None else known.shape[0]

    def check(self) -> None:
        """Raise `ValueError` if the prompt does not continue the cache. Warn about outputs that get lost."""
        if self.options["use_cache"] is False:
            raise ValueError(
                "use_cache=False with a cache would feed every token again: pass use_cache=True to generate()"
            )
        if self.options["output_attentions"]:
            warnings.warn(
                "output_attentions=True: attention over a tiered cache forms no weights, so those of tiered "
                "layers are missing. For weights, call fade_fast.detach(model), and generate with "
                "attn_implementation='eager' and another cache",
                stacklevel=4,
            )
        held = self.cache.get_seq_length()
        if not held or self.embedded:
            return
        token_positions = self.cache.token_positions
        if self.mask is None and token_positions.has_padding:
            raise ValueError(
                "the cache holds rows with padding: pass the attention_mask of all tokens, cached ones "
                "included"
            )
        mask, ids = self._per_row(self.mask), self._per_row(self.ids)
        complete = ids is not None and (mask is None or mask.shape[1] == ids.shape[1])
        if complete and ids.shape[1] <= held:
            raise ValueError(
                f"the prompt has {ids.shape[1]} tokens, but the cache holds {held} already: a new text "
                "needs a "
                "new cache, or reset(). To go on with a text, pass all of it, cached tokens included; to "
                "change its end, crop() the cache to common_prefix(cache, ids) first"
            )
        if mask is not None:
            new = mask.shape[1] - held if complete or ids is None else ids.shape[1]
            masks.check(mask, mask.shape[0], new, token_positions.logical)
        if complete and ids.shape[0] == token_positions.batch:
            shared, known = self.cache.seen.shared(ids, token_positions.real()), self.cache.seen.known
            if shared < min(known, held):
                raise ValueError(
                    f"the prompt differs from the {held} cached tokens at token {shared}: a new text "
                    f"needs a new cache, or reset(). To go on from what both share, crop the cache first: "
                    f"cache.crop({shared - held}), if tokens from {shared} on are still uncompressed"
                )

    def _per_row(self, x: Tensor | None) -> Tensor | None:
        """Rows of `x` repeated for each row of the cache, which may hold several beams or samples of one."""
        rows = self.cache.token_positions.batch
        if x is not None and x.shape[0] != rows and rows % x.shape[0] == 0:
            return x.repeat_interleave(rows // x.shape[0], dim=0)
        return x

    def remember(self, output) -> None:
        """Record the ids that the cache now holds, from the output of generate()."""
        held, seen = self.cache.get_seq_length(), self.cache.seen
        text = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        if not held or self.ids is None or self.embedded or text is None:
            return
        if self.mask is not None and self.mask.shape[1] != self.ids.shape[1]:  # only the new ids were passed
            before = self.mask.shape[1] - self.ids.shape[1]
            if seen.known < before:
                return
            text = torch.cat((seen.ids[:, :before], text.to("cpu", torch.int32)), dim=1)
        if self.cache.decode_graph.reordered or text.shape[0] != self.cache.token_positions.batch:
            text = self._per_row(self.ids)  # rows of the cache differ from rows of the text
        seen.set(text[:, :held] if text.shape[0] == self.cache.token_positions.batch else None)
