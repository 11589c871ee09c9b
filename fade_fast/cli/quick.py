"""`fade demo --quick`: what the preset `safe` saves on one text, and what it costs in quality."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fade_ref.tiers import Tier

from ..hf import capacity
from ..hf.attach import attach, detach
from ..hf.cache import TieredKVCache
from ..hf.create import create_cache
from ..hf.models import CACHE_NAME

PRESET = "safe"
PROMPT, MORE = 1024, 192  # tokens that are read first, and tokens that are predicted one by one
CHUNK = 16  # tokens of a step: the most that read compressed tokens as a step of one token does


@dataclass(frozen=True)
class Quick:
    """The figures of the quick demo.

    Attributes:
        tokens: tokens in the cache. compressed: those of them that were compressed, a mean over layers.
        predicted: predictions that were compared.
        kl: mean Kullback-Leibler divergence from the uncompressed prediction, in nats.
        top1: share of predictions with the same most likely token.
        uncompressed, held: bytes of an uncompressed cache and of this one, with bfloat16 keys and values.
        tables: bytes that all caches of the model share, which `held` leaves out.
    """

    tokens: int
    compressed: float
    predicted: int
    kl: float
    top1: float
    uncompressed: int
    held: int
    tables: int


def dtype_for(device: str | None, dtype: str) -> str:
    """float32 on a CPU, where bfloat16 is slow, unless the user names a dtype."""
    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return "fp32" if dtype == "auto" and on_cpu else dtype


@torch.no_grad()
def predictions(
    model: PreTrainedModel, cache: Cache, ids: Tensor, label: str, chunk: int = CHUNK, keep: int = 0
) -> Tensor:
    """Log-probabilities [n, vocabulary], float32, of the tokens that follow those of `ids` [1, n].

    The text itself is fed (teacher forcing), `chunk` tokens a step, so all caches see the same tokens. The
    result has the predictions of the last `keep` tokens of each step; 0: of all.
    """
    found = []
    with tqdm(total=ids.shape[1], desc=label, unit="token", leave=False, disable=None) as bar:
        for part in ids.split(chunk, dim=1):
            out = model(input_ids=part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=keep)
            found.append(out.logits[0].float().log_softmax(-1))
            bar.update(part.shape[1])
    return torch.cat(found)


@torch.no_grad()
def store(keys_and_values: DynamicCache, cache: TieredKVCache) -> bool:
    """Give a tiered cache the tokens of another cache. False, and nothing is stored, where the model has
    layers that do not keep every token.
    """
    layers = keys_and_values.layers
    if not all(type(layer) is DynamicLayer for layer in layers):
        return False
    for i, layer in enumerate(layers):
        cache.update(layer.keys, layer.values, i)
    return True


def compare(model: PreTrainedModel, ids: Tensor, prompt: int = PROMPT) -> Quick:
    """Predict the tokens of `ids` [1, n] after the first `prompt` ones, uncompressed and with `safe`.

    The model reads the prompt once: attention over a prompt sees no code, so both caches get the same keys
    and values.
    """
    cache = create_cache(model, PRESET)  # measures the widths first, where that was not done before
    detach(model)
    uncompressed = DynamicCache(config=model.config)
    first = predictions(model, uncompressed, ids[:, :prompt], "prompt", prompt, keep=1)
    first_ours, stored, rest = first, store(uncompressed, cache), ids[:, prompt:]
    plain = predictions(model, uncompressed, rest, "uncompressed")
    try:
        attach(model)
        if not stored:
            first_ours = predictions(model, cache, ids[:, :prompt], PRESET, prompt, keep=1)
        ours = predictions(model, cache, rest, PRESET)
    finally:
        detach(model)
    # The last prediction is of a token that the text does not have.
    plain, ours = torch.cat((first, plain[:-1])), torch.cat((first_ours, ours[:-1]))
    tokens = cache.memory().tokens
    bf16 = capacity.architecture(model.config, torch.bfloat16)
    length = ids.shape[1]
    size = capacity.size(bf16, cache.fade_config, length, on_gpu=False)
    return Quick(
        tokens=length,
        compressed=sum(n for name, n in tokens.items() if name not in (Tier.FP16.name, Tier.EVICTED.name)),
        predicted=len(ours),
        kl=float((plain.exp() * (plain - ours)).sum(-1).mean()),
        top1=float((plain.argmax(-1) == ours.argmax(-1)).float().mean()),
        uncompressed=capacity.uncompressed(bf16, length),
        held=size.device - size.tables,
        tables=size.tables,
    )


def text(found: Quick, on_cpu: bool) -> str:
    """The figures, as the demo prints them."""
    mib = 2**20
    lines = [
        f"{'cache':<14}{'MiB':>8}{'ratio':>8}{'mean KL, nats':>16}{'same top-1 token':>19}",
        f"{'uncompressed':<14}{found.uncompressed / mib:>8.2f}{1:>8.2f}{0:>16.4f}{1:>19.1%}",
        f"{PRESET:<14}{found.held / mib:>8.2f}{found.uncompressed / found.held:>8.2f}{found.kl:>16.4f}"
        f"{found.top1:>19.1%}",
        "",
        f"{found.compressed:g} of {found.tokens} tokens were compressed, and every one can be read.",
        f"MiB: with bfloat16 keys and values, without {found.tables / mib:.2f} MiB of tables that all caches",
        "of the model share. The ratio grows with the length of text.",
        f"KL and top-1: {found.predicted} predictions on the same text, each compared with the prediction of",
        "the uncompressed cache.",
    ]
    if on_cpu:
        lines.append("On a CPU the cache saves memory, and time only in long texts: docs/speed.md.")
    return "\n".join(lines)


def record(model: str, found: Quick) -> dict:
    """The content of the --json file."""
    return dict(model=model, config=PRESET) | asdict(found)
