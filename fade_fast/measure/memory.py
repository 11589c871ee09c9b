"""The size of caches: `fade memory`.

fade memory --model meta-llama/Llama-3.1-8B --lengths 8192 32768

Bytes are those of every distinct storage that a cache holds. They are counted tensor by tensor, not taken
from what the cache reports. The cache holds one row of bfloat16 tokens of the shape of a model, and one
prefill reaches each of the `--lengths`. A "grown" cache made room as tokens came, and a "reserved" one was
made for that length (`max_length`). With `--peak` the model also runs. The peak is the most memory in use
above its weights, with activations, during a prefill and during a step of 17 tokens after it. On CUDA the
caching allocator counts it, and on a CPU the storages that operators made are counted.
"""

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers.cache_utils import Cache

import fade_fast
from fade_fast.hf.layer import TieredLayer
from fade_fast.hf.models import CACHE_NAME
from fade_fast.saved.memory import StorageMeter
from fade_fast.saved.units import size

from . import pictures, runs, texts
from .methods import Method, Unavailable, allocated, key_shape, made_for
from .parsers.memory import arguments

STEP = 17  # tokens of the step after a prefill, more than compiled decode kernels take


@dataclass
class Result:
    """Bytes at a length. None: not measured.

    Attributes:
        grown, reserved: held by a cache that grew, and by one made for `length`.
        prefill, step: most bytes in use above the weights during each.
    """

    method: str
    length: int
    grown: int | None = None
    reserved: int | None = None
    prefill: int | None = None
    step: int | None = None
    failed: str | None = None


@torch.no_grad()
def fill(model, cache, length: int, dtype=torch.bfloat16, step: int | None = None) -> None:
    """Let a cache take in `length` random tokens of one row, as a model of `dtype` would hand them over.

    No model runs, because the size of a cache depends on shapes alone. `step` is the number of tokens at a
    time; None: all.
    """
    generator = torch.Generator(model.device).manual_seed(0)
    for start in range(0, length, step or length):
        new = min(start + (step or length), length) - start
        for i, layer in enumerate(cache.layers):
            heads, dim = key_shape(model, i)
            keys = torch.randn(1, heads, new, dim, generator=generator, device=model.device, dtype=dtype)
            if isinstance(layer, TieredLayer):  # as its attention function does
                layer.kv.compact()
                layer.kv.token_positions.extend(start, None, 1, new, keys.device)
                layer.kv.append(keys, keys, attended=True)
            else:  # a sliding layer's view of a long step holds all of it, until the next step comes
                for part in keys.split([new - 1, 1] if new > 1 else [1], dim=2):
                    layer.update(part, part)


def filled(model, m: Method, length: int, reserved: bool = False) -> Cache:
    """A cache that holds `length` bfloat16 tokens of one row, on a model that is not attached.

    `reserved`: whether the cache was made for that length. It makes no difference for caches of others.
    """
    cache = made_for(model, m, length) if reserved else m(model, length)
    try:
        fill(model, cache, length)
        return cache
    finally:
        fade_fast.detach(model)


def filled_bytes(model, m: Method, length: int, reserved: bool = False) -> int:
    """Bytes of every storage of a cache that `filled` made."""
    return allocated(filled(model, m, length, reserved))


@torch.no_grad()
def peaks(model, m: Method, length: int) -> tuple[int, int]:
    """Most bytes in use above the weights during a prefill of `length` tokens, and during a step after it."""
    gc.collect()
    cuda = model.device.type == "cuda"
    ids = torch.arange(length + STEP, device=model.device)[None] % model.config.get_text_config().vocab_size
    parts, found, meter = (ids[:, :length], ids[:, length:]), [], StorageMeter()
    before = torch.cuda.memory_allocated() if cuda else 0

    def forward(part, cache):
        model(input_ids=part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)

    try:
        cache = m(model, length)
        for part in parts:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                forward(part, cache)
                found.append(torch.cuda.max_memory_allocated() - before)
            else:
                meter.peak = meter.now
                with meter:
                    forward(part, cache)
                found.append(meter.peak)
    finally:
        fade_fast.detach(model)
    return tuple(found)


def run(model, methods: list[Method], lengths: list[int], peak: bool, say=print) -> list[Result]:
    results = []
    for m in methods:
        for length in lengths:
            r = Result(m.name, length)
            try:
                r.grown, r.reserved = (filled_bytes(model, m, length, reserved=x) for x in (False, True))
                if peak:
                    r.prefill, r.step = peaks(model, m, length)
            except Unavailable as error:
                r.failed = str(error)
            except torch.OutOfMemoryError:
                r.failed = "out of memory"
            gc.collect()
            results.append(r)
            say(f"  {r.method}, {r.length} tokens: {r.failed or size(r.grown)}")
    return results


# -- what is shown


#: The tables of a result: field and heading.
FIELDS = {
    "grown": "Held by a cache that grew: MiB, and how many times less than `DynamicCache`",
    "reserved": "Held by a cache made for its length (`max_length`)",
    "prefill": "Most in use above the weights during a prefill, activations included",
    "step": "Most in use above the weights during a step after it",
}


def table(results: list[Result], recall: dict[str, float] | None = None) -> str:
    """Markdown: for each of `FIELDS` that was measured, a table of configurations by lengths.

    `recall`: the share of facts that a method finds again in long texts, by name, for a column of its own.
    """
    found, blocks = {(r.method, r.length): r for r in results}, []
    for field, heading in FIELDS.items():
        told = [r for r in results if r.failed or getattr(r, field) is not None]
        lengths, names = (list(dict.fromkeys(getattr(r, f) for r in told)) for f in ("length", "method"))
        size = {key: getattr(r, field) for key, r in found.items() if getattr(r, field) is not None}
        if not size or (field == "reserved" and all(size[key] == found[key].grown for key in size)):
            continue
        head = ["config", *(f"{n} tokens" for n in lengths), *([] if recall is None else ["facts found"])]
        lines = [f"{heading}:", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name in names:
            cells = []
            for n in lengths:
                mine, dense = size.get((name, n)), size.get(("dynamic", n))
                ratio = f", 1/{dense / mine:.2f}" if mine and dense else ""
                failed = found[name, n].failed if (name, n) in found else None
                cells.append(f"{mine / 2**20:.1f}{ratio}" if mine else failed or "-")
            if recall is not None:
                cells.append(f"{recall[name]:.2f}" if name in recall else "-")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def stored(path: Path) -> tuple[dict, list[Result]]:
    report = json.loads(path.read_text(encoding="utf-8"))
    return report, [Result(**r) for r in report["results"]]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.show:
        report, results = stored(args.show)
    else:
        runs.quiet()
        model, _, name = texts.load_model(args.model, args.device, "bf16")
        results = run(model, args.methods, args.lengths, args.peak, lambda line: print(line, flush=True))
        report = dict(
            kind="memory",
            model=name,
            device=torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
            dtype="bf16",
            torch=torch.__version__.split("+")[0],
            transformers=transformers.__version__,
            results=[asdict(r) for r in results],
        )
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{report['model']}, {report['dtype']}, {report['device']}\n\n{table(results)}")
    if args.plot:
        pictures.memory_curves(results, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
