"""The command `fade`, also `python -m fade_fast`. Each subcommand is one module.

Only the module of the given subcommand is imported. torch and transformers take seconds to import, so nothing
imports them before the options are parsed: --help and wrong options are answered at once.

Modules in `COMMANDS` have `add_arguments(parser)` and `run(args)`, which may return an exit code. Commands in
`PASSED` parse the arguments after their name themselves.

Exit codes: 0, success; 1, a negative result (a refused model, a failed comparison); 2, an error that the user
can fix, reported in one line on standard error; 130, interrupted; 141, nobody reads the output any more.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..arguments import Parser
from ..errors import LoadError, missing

#: Module and help of each command. The help is the first line of the module's docstring.
COMMANDS = {
    "demo": ("demo", "Compare each preset with DynamicCache on a long prompt."),
    "plan": ("plan", "Plan which caches fit on a GPU, from a model's configuration alone."),
    "check": ("check", "Report which layers of a model a tiered cache compresses, and its memory."),
    "generate": ("generate", "Answer a prompt, or questions about a stored document."),
    "inspect": ("inspect", "Print the contents of a saved cache."),
    "plot": ("plot", "Draw tokens by tier: over time, or as a map."),
    "serve": (
        "serve",
        "Serve a model on this machine, by OpenAI's interface, with a page that shows the cache.",
    ),
    "report": ("report", "Draw the events of a cache as one page that opens in any browser."),
    "calibrate": (
        "calibrate", "Calibrate a model on a text, choose the widths of `safe`, and write both to a file.",
    ),
    "warm": ("warm", "Compile what a model needs in a deployment, and keep it in a file."),
    "vllm-calibrate": (
        "vllm_calibrate", "Calibrate a model for the vLLM plugin on a text, and write a file.",
    ),
}  # fmt: skip
#: Module and help of separate commands. The module's `main(argv)` returns an exit code.
PASSED = {
    "quality": ("fade_fast.measure.quality", "Perplexity with each preset; `--free`: texts that they write."),
    "memory": ("fade_fast.measure.memory", "Bytes of each cache and peak memory, by length."),
    "needles": ("fade_fast.measure.needles", "Recall of facts in long texts, by depth."),
    "ruler": ("fade_fast.measure.ruler", "Tasks of RULER, answered freely."),
    "bench": ("fade_fast.measure.bench", "Bytes and times of caches with a model and a text of yours."),
    "parity": ("parity.__main__", "Check that the fast cache matches the specification."),
    "train-policy": ("fade_fast.hf.train_policy", "Train the learned eviction policy."),
}
BENCHES = {
    "generate": "fade_fast.measure.generate",
    "attention": "fade_fast.measure.decode_attention",
    "choose": "fade_fast.measure.choose",
    "serve": "fade_fast.measure.serve",
    "paged": "fade_fast.measure.paged_attention",
    "throughput": "fade_fast.measure.paged_throughput",
    "prefill": "fade_fast.measure.paged_prefill",
    "parallel": "fade_fast.measure.parallel",
    "start": "fade_fast.measure.start",
}
#: What to do instead of commands that earlier versions had.
GONE = {
    "train-codebook": "caches no longer have product quantization: use --config "
    "quant_backend=matched,middle_k_bits=2,middle_v_bits=2, which needs no codebooks",
}
REPORT = ("--suite", "report", "fade_fast.measure.report")  # two arguments, and their module
FREE = ("--free", "fade_fast.measure.free")
#: Where the options of such a module are parsed. The others import nothing slow before they parse theirs.
PARSERS = {
    module: module.replace(".measure.", ".measure.parsers.")
    for module in (*(x for x, _ in PASSED.values()), *BENCHES.values(), REPORT[2], FREE[1])
    if ".measure." in module and module != BENCHES["start"]
} | {"fade_fast.hf.train_policy": "fade_fast.hf.train_options"}
#: The extra that contains a package which a command imports.
EXTRAS = {"fastapi": "serve", "uvicorn": "serve", "matplotlib": "plot", "sklearn": "train", "scipy": "train"}


def module_of(command: str):
    """The module of a command in `COMMANDS`."""
    return importlib.import_module(f"{__package__}.{COMMANDS[command][0]}")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line. It has the options of one `command`, and the help of all."""
    top = Parser(prog="fade", description="A KV cache in tiers for Hugging Face models.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in {**COMMANDS, **PASSED}.items():
        if name != command or name in PASSED:
            commands.add_parser(name, help=summary, add_help=False)
            continue
        module = module_of(name)
        module.add_arguments(
            commands.add_parser(
                name,
                help=summary,
                description=summary,
                epilog=module.__doc__.partition("\n")[2].strip("\n") or None,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; bad arguments raise `SystemExit(2)`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((x for x in argv if not x.startswith("-")), None)  # no option before it takes a value
    try:
        if command in GONE:
            raise LoadError(GONE[command])
        if argv and argv[0] in PASSED:
            code = pass_on(argv[0], argv[1:])
        else:
            args = parser(command).parse_args(argv)
            code = module_of(args.command).run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads, such as `head`, has seen enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at the exit
        return 141
    except LoadError as error:
        print(f"fade {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def pass_on(command: str, argv: list[str]) -> int:
    """Run a command of `PASSED`; `LoadError` if its module, or one that it needs, is not installed."""
    name, shown = PASSED[command][0], f"fade {command}"
    if command == "bench" and argv and argv[0] in BENCHES:
        name, shown, argv = BENCHES[argv[0]], f"{shown} {argv[0]}", argv[1:]
    if command == "quality" and REPORT[:2] in zip(argv, argv[1:]):
        name, shown, at = REPORT[2], f"{shown} {' '.join(REPORT[:2])}", argv.index(REPORT[0])
        argv = argv[:at] + argv[at + 2 :]
    elif command == "quality" and FREE[0] in argv:
        name, shown, argv = FREE[1], f"{shown} {FREE[0]}", [x for x in argv if x != FREE[0]]
    if name in PARSERS:  # what is wrong with them is told before torch is imported
        importlib.import_module(PARSERS[name]).arguments(argv)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = error.name or name
        if name == absent or name.startswith(f"{absent}."):
            raise LoadError(
                f"{name} is not part of this installation: install fade-fast anew, or run this in a clone"
            ) from error
        if absent in EXTRAS:
            raise missing(shown, absent, EXTRAS[absent]) from error
        raise LoadError(f"{shown} needs {absent}, which is not installed: install it with pip") from error
    before, sys.argv = sys.argv, [shown, *argv]  # argparse takes the command's name from it
    try:
        return module.main(argv) or 0
    finally:
        sys.argv = before
