"""Caches that are kept for later requests, in memory and on disk.

An entry is a cache and the tokens that it holds. A request takes a copy of the entry with the longest
beginning of its prompt, so entries never change. What has not been used for the longest time goes to disk
first, and is forgotten first.
"""

import copy
import hashlib
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..hf.cache import TieredKVCache
from ..hf.create import load_cache
from ..saved import checkpoint

#: Bytes at the beginning and at the end of each weight that identify a model.
SAMPLE = 4096


@dataclass(eq=False)
class Entry:
    """A kept cache: in memory (`cache`), or in a file (`path`).

    Attributes:
        tokens: the tokens that the cache holds, int32 [n].
        bytes: bytes that it uses in memory; 0 while it is on disk.
        used: when it was used last, as a count.
    """

    tokens: np.ndarray
    cache: TieredKVCache | None
    path: Path | None
    bytes: int
    used: int


@dataclass(frozen=True)
class Match:
    """The best entry for a prompt.

    Attributes:
        entry: the entry; None if none is of use.
        length: tokens of the prompt that a copy of it provides.
        shared: tokens that the prompt shares with any entry, whether or not a cache provides them.
    """

    entry: Entry | None
    length: int
    shared: int


class Prefixes:
    """The kept caches of one model and one configuration. It belongs to the thread that runs the model.

    Args:
        model: the model, attached.
        budget: most bytes of kept caches in memory; None: no limit.
        most: most entries, those on disk included.
        kind: identifies all that decides the bits of a cache besides the model and its tokens.
        folder: where caches go. They are found there again after a restart. None: a temporary folder.
        load: arguments of `load_cache`: policy_weights.
        crops: whether caches may be cropped to what a prompt shares with them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int | None,
        most: int,
        kind: str,
        folder: str | os.PathLike | None = None,
        load: dict | None = None,
        crops: bool = False,
    ):
        self._model, self._budget, self._most, self._load_options = model, budget, most, load or {}
        self._crops = crops
        self.others = 0  # bytes that other caches use
        self.entries: list[Entry] = []
        self._clock = 0
        self.stored = self.loaded = self.dropped = 0  # counts, for metrics
        self._temporary = folder is None
        if folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="fade-serve-"))
        else:
            self.folder = (
                Path(folder) / f"{digest_of(model)}-{hashlib.sha256(kind.encode()).hexdigest()[:16]}"
            )
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it tells what people wrote
            self._find_files()

    def _find_files(self) -> None:
        """Make entries of the files that an earlier run has left."""
        paths = [path for path in self.folder.glob("*.fade") if path.is_file() and not path.is_symlink()]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime):
            try:
                tokens = checkpoint.read_tokens(path)
            except ValueError:
                tokens = None
            if tokens is None:
                path.unlink()
                continue
            self.entries.append(Entry(tokens[0].numpy().astype(np.int32), None, path, 0, self._tick()))
        self.trim()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    @property
    def bytes(self) -> int:
        """Bytes of the kept caches in memory."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def in_memory(self) -> int:
        """Number of kept caches in memory."""
        return sum(entry.cache is not None for entry in self.entries)

    def match(self, tokens: np.ndarray) -> Match:
        """The entry with the longest beginning of `tokens` [n], at most n - 1."""
        best, length, longest = None, 0, 0
        for entry in self.entries:
            shared = min(shared_length(entry.tokens, tokens), len(tokens) - 1)
            longest = max(longest, shared)
            usable = shared if shared == len(entry.tokens) or self._can_crop(entry, shared) else 0
            if usable > length:
                best, length = entry, usable
        return Match(best, length, longest)

    def _can_crop(self, entry: Entry, length: int) -> bool:
        if not self._crops or entry.cache is None or not length:
            return False
        return len(entry.tokens) - length <= min(x.num_croppable for x in entry.cache.tiered)

    def take(self, match: Match) -> TieredKVCache | None:
        """A copy of what `match` found, cropped to its length; None if its file cannot be read any more."""
        entry = match.entry
        entry.used = self._tick()
        if entry.cache is None and not self._load(entry):
            return None
        cache = copy.deepcopy(entry.cache)
        if match.length < len(entry.tokens):
            cache.crop(match.length - len(entry.tokens))
        return cache

    def put(self, tokens: np.ndarray, cache: TieredKVCache) -> None:
        """Keep a cache that holds `tokens` in its only row. Nobody else may change it from now on."""
        for entry in self.entries:
            if np.array_equal(entry.tokens, tokens):
                entry.used = self._tick()
                return
        size = cache.memory().own
        self.entries.append(Entry(tokens.astype(np.int32), cache, None, size, self._tick()))
        self.trim()

    def trim(self) -> None:
        """Keep to the limits. Caches that are worked on (`others`) use a part of the budget."""
        self.entries.sort(key=lambda entry: entry.used)
        while len(self.entries) > self._most:
            self._drop(self.entries[0])
        if self._budget is None:
            return
        for entry in list(self.entries):
            if self.bytes + self.others <= self._budget:
                return
            if entry.cache is not None:
                self._store(entry)

    def _store(self, entry: Entry) -> None:
        """Move an entry to disk. If that fails, drop the entry."""
        name = hashlib.sha256(entry.tokens.tobytes()).hexdigest()[:32]
        path = self.folder / f"{name}.fade"
        try:
            if not path.exists():  # an entry never changes, so a file that is there is right
                entry.cache.save(path, torch.from_numpy(entry.tokens).long()[None])
        except (OSError, ValueError) as error:
            warnings.warn(
                f"a cache of {len(entry.tokens)} tokens is dropped: {error}. Its text is read again when "
                "needed; see that the folder of --cache-dir has room and can be written",
                stacklevel=2,
            )
            self._drop(entry)
            return
        entry.cache, entry.bytes, entry.path = None, 0, path
        self.stored += 1

    def _load(self, entry: Entry) -> bool:
        """Read an entry from its file. If that fails, drop the entry."""
        try:
            entry.cache = load_cache(entry.path, self._model, verify=False, **self._load_options)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"a stored cache cannot be read and is dropped: {error}. Its text is read again; see that "
                "nothing else writes to the folder of --cache-dir",
                stacklevel=2,
            )
            self._drop(entry)
            return False
        entry.bytes = entry.cache.memory().own
        self.loaded += 1
        return True

    def _drop(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.dropped += 1
        if entry.path is not None:
            entry.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Write what is in memory to the folder, or remove the temporary folder."""
        if self._temporary:
            self.entries.clear()
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for entry in list(self.entries):
            if entry.cache is not None:
                self._store(entry)


def shared_length(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Number of leading tokens that agree.

    >>> shared_length(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    count = min(len(ours), len(theirs))
    differs = ours[:count] != theirs[:count]
    return int(differs.argmax()) if differs.any() else count


def digest_of(model: PreTrainedModel) -> str:
    """Identify the weights of a model: the names, shapes and dtypes, and some bytes of each one."""
    digest = hashlib.sha256()
    for name, x in model.named_parameters():
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        flat = x.detach().reshape(-1)
        count = max(1, SAMPLE // x.element_size())
        for part in (flat[:count], flat[-count:]):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
