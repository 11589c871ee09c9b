"""Answer a prompt, or questions about a stored document.

fade generate --document book.txt --save book.fade        read it once
fade generate --resume book.fade --prompt "Who died?"     ask, in another process
"""

import argparse
import contextlib
import time
import warnings
from typing import TYPE_CHECKING

from .. import arguments
from ..cache.eviction import EvictionWarning
from ..errors import LoadError
from ..saved.files import write_json
from ..saved.units import size
from . import options

if TYPE_CHECKING:
    from .session import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade generate`."""
    options.add_model(parser)
    options.add_config(parser)
    parser.add_argument(
        "--document", type=arguments.text_file, metavar="FILE", help="UTF-8 text to read first"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask")
    parser.add_argument(
        "--prompt-file", type=arguments.text_file, metavar="FILE", help="the same, from a file"
    )
    options.add_new_tokens(parser)
    parser.add_argument(
        "--save", type=arguments.writable, metavar="FILE", help="store the cache of --document"
    )
    parser.add_argument("--resume", type=arguments.readable, metavar="FILE", help="begin with a stored cache")
    parser.add_argument(
        "--compare", action="store_true", help="with --resume: also read everything afresh, and compare"
    )
    parser.add_argument(
        "--telemetry", type=arguments.writable, metavar="FILE", help="append events as JSON lines"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Read, save and answer. Prints the answer and its times."""
    question = args.prompt or args.prompt_file
    _check(args, question)
    from ..hf.create import create_cache
    from ..hf.loading import quiet
    from . import session

    quiet()
    warnings.filterwarnings("ignore", category=EvictionWarning)  # the number of forgotten tokens is printed
    model, tokenizer = options.loaded(args)
    started = time.perf_counter()
    try:
        if args.resume:
            cache, read = session.resume(args.resume, model)
        else:
            cache = create_cache(model, args.config)
            read, _ = session.encode(tokenizer, args.document or "", question or "")
    except ValueError as error:
        raise LoadError(str(error)) from error
    with cache.listen(args.telemetry) if args.telemetry else contextlib.nullcontext():
        if not args.resume and read.shape[1]:
            session.prefill(model, cache, read)
        record = dict(
            model=model.name_or_path, read_tokens=read.shape[1], read_s=time.perf_counter() - started
        )
        memory = cache.memory()
        how = f"loaded from {args.resume}" if args.resume else "read"
        print(f"{read.shape[1]} tokens {how} in {record['read_s']:.2f} s; the cache has {size(memory.own)}")
        if args.save:
            cache.save(args.save, read)
            record |= dict(file_bytes=args.save.stat().st_size)
            print(f"saved to {args.save}: {size(record['file_bytes'])}")
        if question:
            _, rest = session.encode(tokenizer, "", question)
            record |= _answer(args, model, tokenizer, cache, read, rest, record["read_s"])
    record["forgotten"] = cache.memory().forgotten
    if record["forgotten"]:
        print(
            f"forgotten: {record['forgotten']:g} of {cache.get_seq_length()} tokens, for good. `safe`, "
            "`recall` and 2 bits keep every token"
        )
    if args.json:
        write_json(args.json, record)


def _check(args: argparse.Namespace, question: str | None) -> None:
    """Raise `LoadError`, before any work, for options that contradict each other."""
    if args.prompt and args.prompt_file:
        raise LoadError("--prompt and --prompt-file: give one of them")
    if args.resume and args.document:
        raise LoadError("--resume has a document: leave out --document")
    if args.save and not args.document:
        raise LoadError("--save stores what was read of a --document: give one, or leave out --save")
    if args.compare and not args.resume:
        raise LoadError("--compare needs --resume: give a file to resume, or leave out --compare")
    if not question and not args.save:
        raise LoadError("nothing to do: give a --prompt, or a --document to --save")


def _answer(args, model, tokenizer, cache, read, rest, read_s: float) -> dict:
    """Answer, print the times, and compare with a fresh cache if --compare is given."""
    from ..hf.create import create_cache
    from . import session

    ids = session.joined(read, rest)
    given = session.answer(model, cache, ids, args.max_new_tokens)
    text = tokenizer.decode(given.tokens, skip_special_tokens=True)
    first = read_s + given.first_token_s
    print(f"\n{text}\n")
    print(f"first token after {first:.2f} s, {_speed(given)}")
    record = dict(
        new_tokens=len(given.tokens), first_token_s=first, tokens_per_s=given.tokens_per_s, text=text
    )
    if args.compare:
        started = time.perf_counter()
        fresh = create_cache(model, cache.fade_config)
        session.prefill(model, fresh, read)
        again = session.answer(model, fresh, ids, args.max_new_tokens)
        fresh_s = time.perf_counter() - started - again.decode_s
        same = again.tokens == given.tokens
        print(f"afresh: first token after {fresh_s:.2f} s, {'the same' if same else 'other'} tokens")
        record |= dict(fresh_first_token_s=fresh_s, same=same)
    return record


def _speed(given: "Answer") -> str:
    if given.tokens_per_s is None:
        return f"{len(given.tokens)} new token"
    return f"{len(given.tokens)} new tokens, {given.tokens_per_s:.1f} a second"
