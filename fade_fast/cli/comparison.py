"""What `fade demo` runs: each preset and DynamicCache, with the same prompt."""

import argparse
import warnings
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fade_ref.tiers import Tier

from ..cache.eviction import EvictionWarning
from ..hf.attach import detach
from ..hf.create import create_cache
from ..hf.foreign import ForeignLayer
from ..hf.loading import LoadError, called, load, quiet
from ..hf.models import CACHE_NAME
from ..measure.texts import built_in
from ..saved.files import write_json
from ..saved.memory import storage_bytes
from . import quick
from .session import Stopwatch

PROMPT_TOKENS = 3000
QUESTION = "Summarise the text above in a few sentences, in your own words."
BASELINE = "DynamicCache"


@dataclass(frozen=True)
class Run:
    """One generation through one cache.

    Attributes:
        tokens: ids of the new tokens.
        prefill_s: seconds from the call of generate() to the first new token.
        decode_s: seconds from the first new token to the last.
        allocated: bytes of every distinct storage of the cache right after generate(), without the tables
            that all caches of a model share.
        dense: bytes of an uncompressed cache for the same tokens.
        tiers: number of tokens in each tier.
    """

    tokens: list[int]
    prefill_s: float
    decode_s: float
    allocated: int
    dense: int
    tiers: dict[str, float]

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed, without prefill; None if there is only one new token."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else None

    @property
    def ratio(self) -> float:
        """Uncompressed size of the cache over its allocated size."""
        return self.dense / self.allocated

    def agreement(self, other: "Run") -> int:
        """Number of leading new tokens that are the same in both runs.

        Later tokens are not counted: after the first difference the runs continue different texts.
        """
        differ = [a != b for a, b in zip(self.tokens, other.tokens)]
        return differ.index(True) if any(differ) else len(differ)


def run(args: argparse.Namespace) -> None:
    """Run the demo. Prints one table, and writes `args.json` if it is given."""
    quiet()
    warnings.filterwarnings("ignore", category=EvictionWarning)  # the table shows how many tokens are gone
    name = called(args.model)
    print(f"Loading {name} ...", flush=True)
    if args.quick:
        return run_quick(args, name)
    model, tokenizer = load(args.model, args.device, args.dtype)
    inputs = encode_prompt(model, tokenizer, args.prompt_file, args.max_new_tokens).to(model.device)
    source = "" if model.name_or_path == name else f" (from {model.name_or_path})"
    prompt_tokens = inputs.input_ids.shape[1]
    where = f"{str(model.dtype).removeprefix('torch.')} on {_device_name(model.device)}"
    print(f"{name}{source}, {where}: {prompt_tokens} prompt tokens\n", flush=True)

    runs = compare(model, inputs, list(dict.fromkeys(args.config)), args.max_new_tokens)
    texts = {cache: tokenizer.decode(run.tokens, skip_special_tokens=True) for cache, run in runs.items()}
    print(table(runs, prompt_tokens))
    print(f"\nagree: leading tokens equal to those of {BASELINE}; logits of few bits often tie, and then")
    print("rounding decides which token is taken. The first line of each text:")
    for cache, text in texts.items():
        print(f"  {cache:<{len(BASELINE)}}  {_first_line(text)}")
    if args.json:
        results = records(model.name_or_path, prompt_tokens, runs, texts)
        write_json(args.json, results[0] if len(results) == 1 else results)


def run_quick(args: argparse.Namespace, name: str) -> None:
    """Compare `safe` with an uncompressed cache on one text, by teacher forcing."""
    model, tokenizer = load(args.model, args.device, quick.dtype_for(args.device, args.dtype))
    check_supported(model, [quick.PRESET])
    ids = tokenizer(args.prompt_file or built_in(), return_tensors="pt", verbose=False).input_ids
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None) or ids.shape[1]
    ids = ids[:, : min(quick.PROMPT + quick.MORE, reach)].to(model.device)
    prompt = ids.shape[1] - quick.MORE
    if prompt < quick.MORE:
        raise LoadError(
            f"--quick needs {2 * quick.MORE} tokens: the text or the model has {ids.shape[1]}; give a longer "
            "--prompt-file, or leave out --quick"
        )
    where = f"{str(model.dtype).removeprefix('torch.')} on {_device_name(model.device)}"
    print(f"{name}, {where}: {prompt} tokens read, {quick.MORE} more predicted\n", flush=True)
    found = quick.compare(model, ids, prompt)
    print(quick.text(found, model.device.type == "cpu"))
    if args.json:
        write_json(args.json, quick.record(model.name_or_path, found))


def encode_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None, max_new_tokens: int
):
    """The prompt's tokens, through the chat template if there is one.

    Args:
        text: the user's message; None for a question about `PROMPT_TOKENS` of built-in text, or fewer if the
            model has fewer positions.
    """
    if text is None:
        reach = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT_TOKENS * 2
        most = min(PROMPT_TOKENS, reach - max_new_tokens - 16)  # the cut text may encode to a few more tokens
        room = most - len(_chat(tokenizer, QUESTION).input_ids[0])
        if room <= 0:
            raise LoadError(
                f"the model reads {reach} tokens at most: too few for {max_new_tokens} new ones; lower "
                "--max-new-tokens"
            )
        start = tokenizer(built_in(), add_special_tokens=False, verbose=False).input_ids[:room]
        text = f"{tokenizer.decode(start)}\n\n{QUESTION}"
    return _chat(tokenizer, text)


def compare(model: PreTrainedModel, inputs, configs: list[str], max_new_tokens: int) -> dict[str, Run]:
    """Runs by name: `BASELINE` with the model's own attention, then each preset."""
    runs = {}
    try:
        check_supported(model, configs)
        detach(model)
        # A warm-up run, because the first prefill and step allocate memory and load kernels.
        _generate(model, inputs, DynamicCache(config=model.config), 2)
        for name in (BASELINE, *configs):
            cache = DynamicCache(config=model.config) if name == BASELINE else create_cache(model, name)
            runs[name] = measure(model, inputs, cache, name, max_new_tokens)
    finally:
        detach(model)
    return runs


def check_supported(model: PreTrainedModel, configs: list[str]) -> None:
    """Raise `LoadError`, before any work, if the model does not work with one of the presets."""
    try:
        for name in configs:
            create_cache(model, name)
    except ValueError as error:
        raise LoadError(str(error)) from error


def measure(model: PreTrainedModel, inputs, cache, name: str, max_new_tokens: int) -> Run:
    """Generate through `cache`. Measures the speed, and the size of the cache afterwards."""
    label = f"{name:<{len(BASELINE)}}"
    with tqdm(
        total=max_new_tokens, desc=label, unit="token", mininterval=1, leave=False, disable=None
    ) as bar:
        watch = Stopwatch(bar)
        tokens = _generate(model, inputs, cache, max_new_tokens, watch)
    if isinstance(cache, DynamicCache):
        allocated = dense = storage_bytes(
            [x for layer in cache.layers for x in ForeignLayer(layer).tensors()]
        )
        tiers = {Tier.FP16.name: cache.get_seq_length()}
    else:
        memory = cache.memory()
        allocated, dense, tiers = memory.own, memory.dense, memory.tokens
    first, last = watch.times[0], watch.times[-1]
    return Run(tokens, first - watch.start, last - first, allocated, dense, tiers)


def table(runs: dict[str, Run], prompt_tokens: int) -> str:
    """The numbers of all runs, one line per run."""
    rows = [
        {
            "cache": name,
            "prompt": str(prompt_tokens),
            "new": str(len(run.tokens)),
            "prefill s": f"{run.prefill_s:.1f}",
            "tokens/s": "-" if run.tokens_per_s is None else f"{run.tokens_per_s:.1f}",
            "MB": f"{run.allocated / 1e6:.2f}",
            "dense MB": f"{run.dense / 1e6:.2f}",
            "ratio": f"{run.ratio:.2f}",
            "agree": "" if name == BASELINE else f"{run.agreement(runs[BASELINE])}/{len(run.tokens)}",
            "tokens by tier": ", ".join(f"{n:g} {tier}" for tier, n in run.tiers.items()),
        }
        for name, run in runs.items()
    ]
    rows.insert(0, {column: column for column in rows[0]})
    width = {column: max(len(row[column]) for row in rows) for column in rows[0]}
    rows.insert(1, {column: "-" * width[column] for column in width})
    words = ("cache", "tokens by tier")
    return "\n".join(
        "  ".join(x.ljust(width[c]) if c in words else x.rjust(width[c]) for c, x in row.items()).rstrip()
        for row in rows
    )


def records(model: str, prompt_tokens: int, runs: dict[str, Run], texts: dict[str, str]) -> list[dict]:
    """The content of the --json file: one record per preset, with the uncompressed run beside it."""
    base = runs[BASELINE]
    return [
        {
            "model": model,
            "config": name,
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(run.tokens),
            "baseline": {"tokens_per_s": base.tokens_per_s, "allocated": base.allocated},
            "tiered": {
                "tokens_per_s": run.tokens_per_s,
                "allocated": run.allocated,
                "dense": run.dense,
                "ratio": run.ratio,
                "tokens": run.tiers,
            },
            "agreement": run.agreement(base),
            "text": texts[name],
        }
        for name, run in runs.items()
        if name != BASELINE
    ]


def _generate(model, inputs, cache, max_new_tokens: int, streamer=None) -> list[int]:
    """Ids of the new tokens, decoded greedily."""
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    out = model.generate(**inputs, **{CACHE_NAME: cache}, generation_config=greedy, streamer=streamer)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def _chat(tokenizer: PreTrainedTokenizerBase, text: str):
    """Token ids and mask of one user message."""
    if not tokenizer.chat_template:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    said = [{"role": "user", "content": text}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(said, **options)


def _first_line(text: str) -> str:
    lines = text.strip().splitlines() or ["(empty)"]
    return lines[0] if len(lines[0]) <= 100 else lines[0][:99] + "…"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type
