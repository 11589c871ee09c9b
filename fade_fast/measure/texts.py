"""Texts to measure on, as windows of tokens, and models to measure."""

import functools
import importlib.util
import itertools
import re
from pathlib import Path

import torch
import transformers
from torch import Tensor

from fade_fast.errors import InputError, require
from fade_fast.hf import loading

from .options import is_missing_file

BUILT_IN = "built-in"  # what the text that needs no download is called there
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
WORDS = 1_000_000  # more than the built-in text has
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # that `datasets` reads


def read(source: str) -> str:
    """The text that `source` names.

    Args:
        source: a file of plain text; or a .json, .jsonl, .csv or .parquet file with a column "text"; or a
            data set on the hub, NAME[:CONFIGURATION[:SPLIT[:COLUMN]]], by default its split "test" and its
            column "text"; or `BUILT_IN`. Rows are joined by an empty line. Files of plain text are unchanged.

    Raises `MissingPackage` if `datasets` is needed and not installed, and `InputError` if the set cannot be
    loaded or the column is missing.
    """
    path = Path(source)
    if source == BUILT_IN:
        return built_in(WORDS)
    if path.is_file() and path.suffix not in TABLES:
        return path.read_text(encoding="utf-8")
    if is_missing_file(source):
        raise InputError(f"cannot read {source}: no such file; give the path of a file")
    what = f"{source} is {'no file of plain text' if path.is_file() else 'no file'}: reading it as a data set"
    require(what, "data", "datasets")
    from datasets import load_dataset  # a slow import

    name, configuration, split, column = (source.split(":") + [""] * 3)[:4]
    try:
        if path.is_file():
            rows, column = load_dataset(TABLES[path.suffix], data_files=str(path), split="train"), ""
        else:
            rows = load_dataset(name, configuration or None, split=split or "test")
    except Exception as error:  # `datasets` and the hub client raise their own errors
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load the data set {source}: {why}; or name a file of text") from error
    column = column or "text"
    if column not in rows.column_names:
        raise InputError(f"{source}: no column {column!r}: there are {', '.join(rows.column_names)}")
    return "\n\n".join(rows[column])


def read_or_default(source: str | None) -> tuple[str, str]:
    """The text that `source` names, and its name in reports.

    None: WikiText-2 if `datasets` is installed and the hub answers, or else the built-in text.
    """
    if source is None:
        online = importlib.util.find_spec("datasets") is not None and loading.hub_reachable()
        source = WIKITEXT if online else BUILT_IN
    return read(source), called(source)


#: Chapters of Python's language reference in plain prose. The others follow them in the built-in text.
CHAPTERS = ("objects", "execmodel", "import", "dynamic-features", "attribute-access", "customization")


def built_in(words: int = 10_000) -> str:
    """The first words of Python's language reference, which every CPython contains; 50,000 at most."""
    text = _reference()
    last = next(itertools.islice(re.finditer(r"\S+", text), words - 1, None), None)
    return text if last is None else text[: last.end()]


@functools.cache
def _reference() -> str:
    """All chapters. Some are a part of others, so each paragraph is taken once."""
    from pydoc_data.topics import topics

    chapters = [topics.get(name, "").strip() for name in (*CHAPTERS, *sorted(topics))]
    paragraphs = [x for chapter in chapters if chapter for x in chapter.split("\n\n")]
    return "\n\n".join(dict.fromkeys(paragraphs))


def load_model(name: str, device, dtype: str):
    """Model, tokenizer, and the name of the model in reports: a hub id, or the name of a folder or GGUF file.

    `name` is as in `loading.load`. Raises the errors of `loading.load`.
    """
    print(f"Loading {loading.called(name)} ...", flush=True)
    model, tokenizer = loading.load(name, device, dtype)
    if loading.is_default(name):
        return model, tokenizer, loading.HUB_ID.split("/")[-1]
    if not Path(name).is_dir():
        return model, tokenizer, name
    file = next(Path(name).glob("*.gguf"), None)
    whole = (Path(name) / "config.json").exists() or file is None
    return model, tokenizer, Path(name).resolve().name if whole else file.stem


def called(source: str) -> str:
    """The name of a text in reports, without folders."""
    return Path(source).name if Path(source).is_file() else source


def windows(tokenizer, text: str, count: int, length: int) -> Tensor:
    """The first `count` windows of `length` tokens, one after the other: int64 [count, length].

    Raises `InputError` if the text is too short.
    """
    needed = count * length
    ids = tokenizer(text[: 12 * needed], return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < needed:
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < needed:
        raise InputError(
            f"the text has {len(ids)} tokens: {count} window{'s' * (count > 1)} of {length} need {needed}; "
            "give a longer one with --text"
        )
    return ids[:needed].reshape(count, length).to(torch.int64)


def circumstances(kind: str, model, name: str, text: str, dtype: str) -> dict:
    """The part of a report that says what was measured, where, and with which versions.

    `text` is what the text is called.
    """
    return dict(
        kind=kind,
        model=name,
        text=text,
        device=torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
        dtype=dtype,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
    )
