"""Serve a model on this machine, by OpenAI's interface, with a page that shows the cache.

Every field of FadeConfig is an option too, such as --int4-budget 400. FADE_API_KEY
can hold the API key. --engine vllm is for many users at once. See docs/server.md.
"""

import argparse
import importlib.util
import json
import logging
import os
import socket
import sys

from .. import arguments
from ..errors import LoadError, missing
from ..hf.names import HUB_ID
from . import options

REUSE = ("exact", "longest", "off")  # those of the engine, which imports torch; a test compares them
#: Presets and fields that vLLM's pages can hold: tokens are never dropped there.
VLLM_PRESETS = ("safe", "lossless")
VLLM_FIELDS = ("middle_k_bits", "middle_v_bits", "layer_bits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade serve`."""
    parser.usage = "%(prog)s [OPTION ...] [--FIELD VALUE ...]"
    options.add_model(parser)
    options.add_config(parser)
    options.add_fields(parser)
    add = parser.add_argument
    add("--engine", choices=("fade", "vllm"), default="fade", help="default: fade")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=arguments.natural, default=8000, metavar="N", help="default: 8000; 0: any free one")
    add("--name", metavar="NAME", help="the model's name for clients")
    add("--api-key", metavar="KEY", help="what clients must send; default: nothing")
    add("--reuse", choices=REUSE, default="exact", help="of kept caches (default: exact)")
    add("--max-sessions", type=arguments.natural, default=32, metavar="N", help="kept caches (default: 32)")
    add("--memory-budget", type=arguments.size, metavar="SIZE", help="of caches in memory, such as 2GB")
    add("--cache-dir", metavar="DIR", help="keep idle caches there, also for the next start")
    add(
        "--max-queue", type=arguments.positive, default=64, metavar="N", help="waiting requests (default: 64)"
    )
    add("--max-active", type=arguments.positive, default=4, metavar="N", help="taking turns (default: 4)")
    add("--max-batch", type=arguments.positive, default=1, metavar="N", help="of one length (default: 1)")
    add("--max-length", type=arguments.positive, metavar="N", help="tokens of a prompt with its answer")
    add("--max-body", type=arguments.size, default=4 * 2**20, metavar="SIZE", help="default: 4MiB")
    add("--connections", type=arguments.positive, default=512, metavar="N", help="default: 512")
    add("--chunk", type=arguments.positive, metavar="N", help="prompt tokens read at once")
    add(
        "--calibration",
        type=arguments.readable,
        metavar="FILE",
        help="for safe and for quant-backend matched",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    if args.engine == "vllm":
        return start_vllm(args)
    config = options.with_fields(args)
    from ..hf.loading import load, quiet
    from ..serve.engine import Engine, Options

    settings = Options(
        reuse=args.reuse,
        chunk=args.chunk,
        max_active=args.max_active,
        max_queue=args.max_queue,
        max_batch=args.max_batch,
        max_sessions=args.max_sessions,
        memory_budget=args.memory_budget,
        folder=args.cache_dir,
        max_length=args.max_length,
    )
    try:
        from ..serve import http
    except ModuleNotFoundError as error:
        raise missing("serving", error.name, "serve") from error
    listening = listen(args.host, args.port)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    quiet()
    try:
        model, tokenizer = load(args.model, args.device, args.dtype)
        try:
            engine = Engine(model, tokenizer, config, settings, calibration=args.calibration)
        except (ValueError, OSError) as error:
            raise LoadError(str(error)) from error
        name = args.name or os.path.basename((args.model or HUB_ID).rstrip("/"))
        with engine:
            address = http.address_of(listening)
            print(f"{name} is served at {address}; Ctrl-C stops.", flush=True)
            print("For many users at once, start it with --engine vllm.", flush=True)
            http.serve(
                engine, name, listening, host=args.host, max_body=args.max_body,
                api_key=args.api_key or os.environ.get("FADE_API_KEY") or None, connections=args.connections,
            )  # fmt: skip
    finally:
        listening.close()
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. `LoadError` if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise LoadError(
            f"cannot listen at {host}, port {port}: {why}; choose another --port or --host"
        ) from error


def start_vllm(args: argparse.Namespace) -> int:
    """Replace this process by vLLM's server with our attention backend."""
    command = vllm_command(args)
    if importlib.util.find_spec("vllm") is None:
        raise missing("--engine vllm", "vllm", "vllm")
    if importlib.util.find_spec("fade_fast.vllm") is None:
        raise LoadError(
            "--engine vllm needs fade_fast.vllm, which this version does not have: install fade-fast anew"
        )
    sys.stdout.flush()
    os.execv(command[0], command)


def vllm_command(args: argparse.Namespace) -> list[str]:
    """The command line of vLLM's server. `LoadError` for options that it cannot have."""
    if args.model is None:
        raise LoadError("--engine vllm needs a --model: give a hub id or a folder")
    preset = next((name for name in VLLM_PRESETS if args.config == options.config(name)), None)
    fields = options.fields_of(args)
    other = sorted(fields.keys() - set(VLLM_FIELDS))
    if preset is None or other:
        what = f"--{other[0].replace('_', '-')}" if other else "this --config"
        raise LoadError(
            f"{what}: a page of vLLM keeps all its tokens, so --config {' or '.join(VLLM_PRESETS)} and "
            f"{', '.join('--' + name.replace('_', '-') for name in VLLM_FIELDS)} are possible"
        )
    fade = dict(preset=preset, **fields)
    if args.calibration:
        fade["calibration"] = str(args.calibration)
    # `vllm serve` is not used, because it does not start from the wheel for CPUs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    command += ["--host", args.host, "--port", str(args.port), "--attention-backend", "CUSTOM"]
    command += ["--additional-config", json.dumps(dict(fade=fade))]
    command += ["--served-model-name", args.name] if args.name else []
    command += ["--max-model-len", str(args.max_length)] if args.max_length else []
    dtype = dict(bf16="bfloat16", fp16="float16", fp32="float32").get(args.dtype)
    command += ["--dtype", dtype] if dtype else []
    key = args.api_key or os.environ.get("FADE_API_KEY")
    return command + (["--api-key", key] if key else [])
