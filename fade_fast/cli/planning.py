"""The figures and the table of `fade plan`."""

from fade_ref.config import FadeConfig

from ..hf import capacity

MIB = 2**20
UNCOMPRESSED = "uncompressed"
NO_LIMIT = 1 << 27  # tokens that mean that a length is not limited by memory


def row(
    model: capacity.Architecture, name: str, config: FadeConfig | None, length: int, room: int
) -> dict[str, object]:
    """The figures of one cache: JSON values, bytes as integers. `config` None is `DynamicCache`."""
    refused = model.refusal(config) if config else None
    if refused:
        return dict(cache=name, refused=refused)

    def size(tokens: int, rows: int = 1) -> capacity.Size:
        if config is None:
            return capacity.Size(capacity.uncompressed(model, tokens, rows))
        return capacity.size(model, config, tokens, rows)

    each = size(length)
    tokens = capacity.most_tokens(lambda n: size(n).device, room, most=NO_LIMIT)
    return dict(
        cache=name,
        tokens=tokens,
        any_length=tokens >= NO_LIMIT
        or bool(config and config.evicts and tokens >= (model.longest or NO_LIMIT)),
        sequences=capacity.most_rows(lambda n: size(length, n).device, room),
        bytes=each.device,
        tables=each.tables,
        host=each.host,
        per_token=per_token(model, config, length),
        ratio=capacity.uncompressed(model, length) / own if (own := each.device - each.tables) else 1.0,
        forgets=bool(config and config.evicts),
    )


def per_token(model: capacity.Architecture, config: FadeConfig | None, length: int) -> float:
    """Bytes on the device that one more token takes, from a sequence of twice the length."""
    if config is None:
        return (capacity.uncompressed(model, 2 * length) - capacity.uncompressed(model, length)) / length
    more = capacity.size(model, config, 2 * length).device - capacity.size(model, config, length).device
    return more / length


def table(rows: list[dict], length: int) -> str:
    """One line for each cache."""
    lines = [
        ["cache", "longest sequence", f"sequences of {length:,}", "MiB each", "ratio", "host MiB", "keeps"]
    ]
    for x in rows:
        if "refused" in x:
            lines.append([x["cache"], "-", "-", "-", "-", "-", f"not for this model: {x['refused']}"])
            continue
        longest = "any length" if x["any_length"] else f"{x['tokens']:,}"
        host = f"{x['host'] / MIB:,.1f}" if x["host"] else ""
        ratio = "" if x["cache"] == UNCOMPRESSED else f"{x['ratio']:.2f}"
        own = x["bytes"] - x["tables"]
        keeps = "part of the text" if x["forgets"] else "every token"
        lines.append(
            [
                x["cache"],
                longest,
                f"{x['sequences']:,}",
                f"{own / MIB:,.1f}",
                ratio,
                host,
                keeps,
            ]
        )
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * n for n in width])
    side = [str.ljust, *[str.rjust] * 5, str.ljust]
    return "\n".join("  ".join(f(x, n) for f, x, n in zip(side, line, width)).rstrip() for line in lines)


def notes(model, rows: list[dict], configs: dict[str, FadeConfig], length: int, room: int) -> list[str]:
    """What the table cannot say, one line each."""
    said = ["Caches made with max_length, as `cache.memory()` counts them. One that grows: up to 1/8 more."]
    if shared := {x["cache"]: x["tables"] for x in rows[1:] if x.get("tables", 0) > MIB}:
        told = ", ".join(f"{tables / MIB:.1f} MiB of `{name}`" for name, tables in shared.items())
        said.append(f"Tables that all caches of the model share are counted once, not in `MiB each`: {told}.")
    if room <= 0:
        said.append("The weights and the reserve alone are larger than this memory: nothing fits.")
    if model.longest:
        said.append(f"The model was made for {model.longest:,} positions.")
    if any(config.loss_bound is not None for config in configs.values()):
        said.append(
            "`safe` is counted with 4 bits in every layer: `fade check` measures whether some need 8."
        )
    everything = capacity.size(model, FadeConfig.int4(), length).device
    for x in rows[1:]:
        if x.get("forgets") and x["bytes"] >= everything:
            said.append(
                f"`{x['cache']}` forgets tokens and yet holds more bytes at {length:,} tokens than `int4`, "
                f"which keeps all of them: {x['bytes'] / MIB:,.1f} MiB against {everything / MIB:,.1f}."
            )
        elif x.get("ratio", 1.0) < 1:
            said.append(f"`{x['cache']}` is larger than an uncompressed cache at {length:,} tokens.")
    return said
