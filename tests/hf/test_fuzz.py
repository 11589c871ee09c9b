"""Random configurations, shapes, orders of calls and damaged files: documented exceptions, no silent change.

Every case has a number, which is its seed. A run ends after FADE_FUZZ_CASES cases (10,000) or after
FADE_FUZZ_SECONDS seconds (20); FADE_FUZZ_FIRST is the number of the first. A case may take 30 seconds.
"""

import copy
import dataclasses
import os
import random
import signal
import time
import warnings

import pytest
import torch

import fade_fast
from fade_fast.cache.decode_graph import MAX_DECODE_TOKENS
from fade_fast.cli import command
from fade_fast.hf.cache import TieredKVCache
from fade_fast.hf.models import CACHE_NAME
from fade_fast.saved import checkpoint, snapshot
from fade_ref.config import CODECS, PLAN_SCOPES, POLICIES, FadeConfig

from ..models import tiny_llama

CASES = int(os.environ.get("FADE_FUZZ_CASES", 10_000))
SECONDS = float(os.environ.get("FADE_FUZZ_SECONDS", 20))
FIRST = int(os.environ.get("FADE_FUZZ_FIRST", 0))
DOCUMENTED = (ValueError, TypeError)
MOMENTS = ("in use by another thread", "a step has not ended")  # of `RuntimeError`
OBSERVING = ("h2o", "ema", "adaptive", "snapkv", "tova")


@pytest.fixture(scope="module")
def models():
    """Pairs of equal models in float64: one attached, one that reads dense keys and values."""
    sizes = [dict(heads=2, group=1, head_dim=16), dict(heads=1, group=3, head_dim=32)]
    return [[tiny_llama(**size, layers=2, dtype=torch.float64) for _ in range(2)] for size in sizes]


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """Bytes of saved caches, with the pair of models and the configuration."""
    found = []
    configs = [
        FadeConfig(recent_window=8, block_size=4),
        FadeConfig(recent_window=8, block_size=4, int4_budget=6, int2_budget=4, eviction_policy="h2o"),
    ]
    for pair in models:
        for config in configs:
            path = tmp_path_factory.mktemp("saved") / "cache"
            cache = fade_fast.create_cache(pair[0], config)
            forward(pair[0], cache, torch.arange(1, 61).reshape(2, 30))
            cache.save(path)
            found.append((path.read_bytes(), pair[0], cache.state_dict()[0]))
    return found


def forward(model, cache, ids, mask=None):
    with torch.no_grad():
        position = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return model(
            input_ids=ids, attention_mask=mask, position_ids=position, **{CACHE_NAME: cache}, use_cache=True
        ).logits


def documented(error: Exception) -> bool:
    """Whether docs/guide.md has this kind of exception."""
    moment = type(error) is RuntimeError and any(said in str(error) for said in MOMENTS)
    return type(error) in DOCUMENTED and bool(str(error)) or moment


def attempt(action):
    """The result of an action, or the documented exception that it ended in."""
    try:
        return action(), None
    except Exception as error:
        if not documented(error):
            raise
        return None, error


def configuration(draw: random.Random) -> FadeConfig:
    """A valid one that compresses soon."""
    budget = draw.choice([None, 0, 3, 10, 24])
    return FadeConfig(
        n_sink=draw.choice([0, 1, 4, 7]),
        recent_window=draw.choice([0, 1, 5, 16]) if budget is not None else draw.choice([0, 3, 8, None]),
        block_size=draw.choice([1, 3, 8]),
        int4_budget=budget,
        int2_budget=0 if budget is None else draw.choice([0, 4, 9, None]),
        eviction_policy=draw.choice(["position", "position", "knorm", "keydiff", *OBSERVING]),
        middle_k_bits=draw.choice([8, 4, 3, 2]),
        middle_v_bits=draw.choice([8, 4, 3, 2]),
        positions=draw.choice([None, "original", "contiguous"]),
        plan_scope=draw.choice(["sequence", "layer", "head"]),
    )


class Life:
    """One cache under random calls, beside a twin that gets only those that are meant to change it.

    The twin of a cache whose tokens are all real and whose policy does not look at attention is read
    dense by the model's own attention; of others it is a cache of the same kind.
    """

    def __init__(self, draw, pair, path):
        self.draw, self.path, self.config = draw, path, configuration(draw)
        self.rows, self.padded = draw.choice([1, 1, 2, 3]), draw.random() < 0.25
        if self.config.plan_scope == "head" and attempt(lambda: TieredKVCache(pair[0], self.config))[1]:
            self.config = dataclasses.replace(self.config, plan_scope="layer")
        observes = self.config.eviction_policy in OBSERVING
        self.model, dense = pair
        self.cache = fade_fast.create_cache(self.model, self.config, max_length=draw.choice([None, 1, 50]))
        if self.padded or observes:
            self.reader, self.twin = self.model, fade_fast.create_cache(self.model, self.config)
        else:
            self.reader, self.twin = dense, TieredKVCache(dense, self.config)
            for layer in self.twin.layers:
                layer.shows_survivors = True  # there is no padding
        self.mask = torch.ones(self.rows, 0, dtype=torch.long)

    def run(self) -> None:
        self.step(self.draw.choice([1, 2, 5, 17, 40, 70]))
        for _ in range(self.draw.randint(3, 10)):
            weights = {
                self.step: 6, self.crop: 2, self.rows_change: 2, self.look: 2, self.go_on_with_a_copy: 1,
                self.disturb: 3, self.save: 1, self.reset: 0.3,
            }  # fmt: skip
            self.draw.choices(list(weights), list(weights.values()))[0]()
        self.step()
        self.check()

    def step(self, n: int | None = None) -> None:
        n = n or self.draw.choice([1, 1, 1, 1, 2, 3, 9, 17, 30])
        ids = torch.tensor([[self.draw.randrange(1, 256) for _ in range(n)] for _ in range(self.rows)])
        new = torch.ones_like(ids)
        if self.padded:
            first = not self.mask.shape[1]
            for row in new:
                hole = self.draw.randint(0, n - 1) if first or self.draw.random() < 0.3 else 0
                row[:hole] = 0
        self.mask = torch.cat((self.mask, new), 1)
        mask = self.mask if self.padded else None
        found, expected = (
            forward(m, c, ids, mask) for m, c in ((self.model, self.cache), (self.reader, self.twin))
        )
        real = new.bool()
        assert found[real].isfinite().all()
        if self.reader is self.model:
            assert torch.equal(found[real], expected[real])
        else:
            assert (found - expected).norm() <= 1e-6 * expected.norm()
            if (
                n > MAX_DECODE_TOKENS or n == self.mask.shape[1]
            ):  # which of them demotes at once depends on how it is read
                self.cache.memory(), self.twin.memory()

    def crop(self) -> None:
        n = self.draw.choice([0, -1, -2, -5, -30, 1, -1000])
        if -n > min(layer.num_croppable for layer in self.twin.tiered):
            n = -1000
        _, refused = attempt(lambda: self.cache.crop(n))
        if not refused and n:
            self.twin.crop(n)
            self.mask = self.mask[:, : self.mask.shape[1] + n]

    def rows_change(self) -> None:
        kind = self.draw.choice(["reorder", "select", "repeat"])
        index = [self.draw.randrange(self.rows) for _ in range(self.rows)]
        if kind == "select":
            index = index[: self.draw.randint(1, self.rows)] * self.draw.choice([1, 2])
        if kind == "repeat":
            index = [i for i in range(self.rows) for _ in range(2)]
        if len(index) > 4:
            return
        for cache in (self.cache, self.twin):
            if kind == "reorder":
                cache.reorder_cache(torch.tensor(index))
            elif kind == "select":
                cache.batch_select_indices(torch.tensor(index))
            else:
                cache.batch_repeat_interleave(2)
        if self.mask.shape[1]:
            self.mask, self.rows = self.mask[torch.tensor(index)], len(index)
        else:
            self.mask = self.mask.new_ones(self.rows, 0)

    def look(self) -> None:
        """What reads the cache changes nothing but what is due, which `memory` says."""
        self.twin.memory()
        self.draw.choice(
            [self.cache.memory, self.cache.describe, self.cache.snapshot, self.cache.state_dict]
        )()

    def go_on_with_a_copy(self) -> None:
        old, self.cache = self.cache, copy.deepcopy(self.cache)
        if self.mask.shape[1] and not self.padded:
            forward(self.model, old, torch.ones(self.rows, 1, dtype=torch.long))

    def save(self) -> None:
        self.twin.memory()
        self.cache.save(self.path, torch.ones(self.rows, 3, dtype=torch.long))
        self.cache = fade_fast.load_cache(self.path, self.model)
        assert snapshot.of_file(self.path)["length"] == self.mask.shape[1]

    def reset(self) -> None:
        for cache in (self.cache, self.twin):
            cache.reset()
        self.mask = self.mask[:, :0]

    def disturb(self) -> None:
        """What must be refused, and leave no trace."""
        if not self.mask.shape[1]:
            return
        ids, d = torch.ones(self.rows, 2, dtype=torch.long), self.cache.tiered[0].dense["key"].shape
        keys, dim = torch.randn(self.rows, d[1], 2, d[3], dtype=torch.float64), d[3]
        layer = self.cache.layers[self.cache.tiered[0].layer_idx]
        actions = [
            lambda: forward(self.model, self.cache, torch.ones(self.rows + 1, 2, dtype=torch.long)),
            lambda: self.model(input_ids=ids, **{CACHE_NAME: self.cache}, use_cache=False),
            lambda: self.model(ids, torch.ones(self.rows, 2, 2, 2), **{CACHE_NAME: self.cache}),
            lambda: layer.update(keys.float(), keys.float()),
            lambda: layer.update(keys, keys[:, :, :1]),
            lambda: layer.update(keys[..., : dim // 2], keys[..., : dim // 2]),
            lambda: layer.update(keys[:, :, :0], keys[:, :, :0]),
            lambda: layer.update(keys[0], keys[0]),
            lambda: layer.update(keys.long(), keys.long()),
            lambda: self.cache.crop(self.draw.choice([3, -(10**6)])),
            lambda: self.cache.reorder_cache(torch.tensor([self.rows + 3] * self.rows)),
            lambda: self.cache.reorder_cache(torch.tensor([-1] * self.rows)),
            lambda: self.cache.reorder_cache(torch.zeros(self.rows + 1, dtype=torch.long)),
            lambda: self.cache.reorder_cache(torch.zeros(self.rows)),
            lambda: self.cache.batch_select_indices(torch.tensor([[0]])),
            lambda: self.cache.batch_repeat_interleave(0),
            lambda: self.cache.load_state_dict(*self.cache.state_dict()),
            lambda: self.cache.save(self.path, torch.ones(2)),
            lambda: self.cache.listen(3),
        ]
        number = self.draw.randrange(len(actions))
        if number == 16:
            self.twin.memory()
        _, refused = attempt(actions[number])
        assert refused is not None, number
        assert self.cache.token_positions.length == self.mask.shape[1], number

    def check(self) -> None:
        memory, config = self.cache.memory(), self.config
        real = int(self.mask.sum())
        assert sum(memory.tokens.values()) == real and memory.tokens.get("EVICTED", 0) >= 0
        assert memory == dataclasses.replace(memory) and memory.packed <= memory.allocated
        assert (memory.tokens, memory.dense) == (self.twin.memory().tokens, self.twin.memory().dense)
        if config.evicts:
            middle = memory.tokens["EVICTED"] + memory.tokens["FP16"]
            assert real - middle <= self.rows * (config.int4_budget + config.int2_budget)


def any_value(draw: random.Random):
    return draw.choice(
        [None, True, False, -1, 0, 1, 2, 3, 4, 7, 8, 64, 10**9, 1.5, float("nan"), "", "safe", "position",
         "h2o", "rotated", "channel", "layer", "head", "original", (), [], {}, b"x", object(), torch.ones(2)]
    )  # fmt: skip


def garbage_in_configurations(draw, models, files, path) -> None:
    """Fields of any value: a configuration that works, or a documented exception."""
    fields = [field.name for field in dataclasses.fields(FadeConfig)] + ["colour"]
    plausible = dict(
        eviction_policy=POLICIES, quant_backend=CODECS, plan_scope=PLAN_SCOPES, middle_k_bits=(8, 4, 3, 2),
        middle_v_bits=(8, 4, 3, 2), positions=("original", "contiguous"),
    )  # fmt: skip
    chosen = {
        name: draw.choice(plausible[name]) if name in plausible and draw.random() < 0.6 else any_value(draw)
        for name in draw.sample(fields, draw.randint(1, 4))
    }
    config, refused = attempt(lambda: FadeConfig(**chosen))
    if refused:
        return
    model = draw.choice(models)[0]
    cache, refused = attempt(lambda: fade_fast.create_cache(model, config))
    if refused or (config.recent_window or 0) > 10**6 or config.block_size > 10**6:
        return
    _, refused = attempt(lambda: forward(model, cache, torch.ones(1, 40, dtype=torch.long)))
    if not refused:
        assert forward(model, cache, torch.ones(1, 1, dtype=torch.long)).isfinite().all()


def garbage_in_arguments(draw, models, files, path) -> None:
    """Arguments of public functions, of any value."""
    model, value, other = draw.choice(models)[0], any_value(draw), any_value(draw)
    actions = [
        lambda: fade_fast.create_cache(value),
        lambda: fade_fast.create_cache(model, value, max_length=other),
        lambda: fade_fast.create_cache(model, "safe", max_length=value),
        lambda: fade_fast.create_cache(model, FadeConfig(eviction_policy="learned"), policy_weights=value),
        lambda: fade_fast.create_cache(model, "safe", policy_weights=value),
        lambda: fade_fast.check_model(model, value, length=8),
        lambda: fade_fast.check_model(value),
        lambda: fade_fast.check_model(model, "safe", length=value),
        lambda: fade_fast.load_cache(value, model),
        lambda: fade_fast.create_cache(model).load_state_dict(value, other),
        lambda: fade_fast.create_cache(model).load_state_dict(
            {}, dict(config=value, layers=other, holes=False)
        ),
        lambda: fade_fast.create_cache(model).crop(value),
        lambda: fade_fast.FadeConfig.preset(value),
    ]
    number = draw.randrange(len(actions))
    try:
        attempt(actions[number])
    except (FileNotFoundError, IsADirectoryError):
        assert number in (3, 8) and isinstance(value, (str, bytes))


def damaged_files(draw, models, files, path) -> None:
    """Changed bytes, missing ones, more of them: refused, or nothing that counts was changed."""
    data, model, tensors = draw.choice(files)
    data = bytearray(data)
    size = int.from_bytes(data[:8], "little")
    for _ in range(draw.choice([1, 1, 2, 5])):
        where = draw.randrange(min(8 + size, len(data)) if draw.random() < 0.5 else len(data))
        kind = draw.choice(["flip", "set", "cut", "insert", "swap", "end"])
        if kind == "flip":
            data[where] ^= 1 << draw.randrange(8)
        elif kind == "set":
            data[where] = draw.randrange(256)
        elif kind == "cut":
            del data[where : where + draw.randint(1, 100)]
        elif kind == "insert":
            data[where:where] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 20)))
        elif kind == "swap":
            data[where : where + 8], data[-8:] = data[-8:], data[where : where + 8]
        else:
            data = data[: draw.randint(0, len(data))]
        if not data:
            break
    path.write_bytes(data)
    for read in (checkpoint.read_header, checkpoint.read_tokens, snapshot.of_file):
        attempt(lambda read=read: read(path))
    attempt(lambda: snapshot.of_file(path, positions=True))
    cache, refused = attempt(lambda: fade_fast.load_cache(path, model))
    if not refused:
        found = cache.state_dict()[0]
        assert found.keys() == tensors.keys()
        assert all(torch.equal(x, tensors[name]) for name, x in found.items())


def garbage_in_command_lines(draw, models, files, path) -> None:
    """Options in any order and of any value: parsed, or exit code 2."""
    words = [
        "demo", "check", "generate", "inspect", "plot", "calibrate", "--config", "--model", "--prompt",
        "--save", "--resume", "--json", "--device", "--dtype", "--max-new-tokens", "--row", "safe",
        "n_sink=3", "=", "n_sink=x", "n_sink=3,", "a=b=c", "cpu", "cuda:x", "7", "-7", "1e3", "", "\x00", "é",
        "--", "-", "/", str(path),
    ]  # fmt: skip
    try:
        command.parser().parse_args([draw.choice(words[:6]), *draw.choices(words, k=draw.randint(0, 6))])
    except SystemExit as stopped:
        assert stopped.code == 2


def a_life(draw, models, files, path) -> None:
    Life(draw, draw.choice(models), path).run()


KINDS = {
    a_life: 60,
    garbage_in_configurations: 10,
    garbage_in_arguments: 10,
    damaged_files: 15,
    garbage_in_command_lines: 5,
}


@pytest.mark.slow
def test_fuzz(models, files, tmp_path, capsys):
    def too_long(*args):
        raise AssertionError("a case took 30 seconds")

    previous = signal.signal(signal.SIGALRM, too_long)
    started, done, path = time.perf_counter(), 0, tmp_path / "file"
    try:
        for case in range(FIRST, FIRST + CASES):
            if time.perf_counter() - started > SECONDS:
                break
            draw = random.Random(case)
            kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
            signal.alarm(30)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kind(draw, models, files, path)
            except BaseException as error:
                raise AssertionError(f"case {case}, {kind.__name__}: {error!r}") from error
            signal.alarm(0)
            capsys.readouterr()
            done += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    with capsys.disabled():
        print(f"{done} cases in {time.perf_counter() - started:.0f} s")
    assert done >= min(CASES, 20)
