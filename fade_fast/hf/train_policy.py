"""Train the weights of the `learned` policy: `fade train-policy --text FILE --out FILE`.

A model reads windows of a text with eager attention. In every layer, eviction is simulated on the recorded
attention: blocks of tokens leave the recent region. Each plan with more candidates than the budget of the
middle gives training examples. An example has the features that `Learned` sees of a candidate, and the
attention that the following tokens really pay to it. The network learns to predict this attention from the
features.

For the training data of the shipped weights, see their metadata and docs/spec.md, section 7.
"""

import argparse
import hashlib
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm, trange
from transformers import PreTrainedModel

from fade_ref.config import FadeConfig

from ..errors import LoadError, require
from ..policies import scores
from ..saved.files import whole
from .attach import detach
from .create import create_cache
from .loading import load, quiet
from .models import CACHE_NAME, attention_modules
from .train_options import arguments

SINKS, RECENT, BLOCK = 4, 32, 32
#: A token with this share of the attention of every later query is surely worth keeping. The network learns
#: min(1, share / WORTH), where share is the mean over the next AHEAD queries.
WORTH, AHEAD = 0.01, 256
PLANS, TOKENS = 0.2, 60  # fraction of plans that give examples, and candidates per such plan
EPOCHS, HIDDEN = 15, (32, 32)


@dataclass
class Player:
    """Simulates eviction on the attention of one layer.

    Args:
        shares: float [H, S, S], share of a query's attention (row) that each token gets, of all earlier
            tokens.
        depth: relative depth of the layer, 0 to 1.
        budget: tokens of the middle.
        fade: decay of a token's worth with its age: by a factor of e per this many tokens; 0: no decay.
        start: number of tokens seen at the first plan. Until then all tokens are kept.
    """

    shares: Tensor
    depth: float
    budget: int
    fade: float
    start: int

    def plans(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(features [H, n, 4], later attention [H, n]) of every plan with more candidates than the budget."""
        heads, length = self.shares.shape[:2]
        mass, queries = torch.zeros(heads, length), torch.zeros(length)
        alive, index = torch.zeros(length), torch.arange(length)
        kept, front = index[:0], SINKS
        for stop in range(BLOCK, length + 1, BLOCK):
            alive[stop - BLOCK : stop] = 1
            given = self.shares[:, stop - BLOCK : stop] * alive
            mass += (given / given.sum(-1, keepdim=True)).sum(1)
            queries += alive * (stop - index.clamp_min(stop - BLOCK)).clamp_min(0)
            due = (stop - front - RECENT) // BLOCK * BLOCK
            if stop < self.start or due <= 0:
                continue
            candidates, front = torch.cat((kept, index[front : front + due])), front + due
            if len(candidates) <= self.budget:
                kept = candidates
                continue
            score = (mass[:, candidates] / queries[candidates]).double()
            now = torch.tensor([[[stop - 1]]])
            seen = scores.features(score[None], candidates[None, None], now, self.depth)[0]
            if stop < length:
                yield seen, self.shares[:, stop : stop + AHEAD, candidates].mean(1)
            worth = score.mean(0).log() + (candidates / self.fade if self.fade else 0.0)
            kept = candidates[worth.topk(self.budget).indices].sort().values
            alive[candidates] = 0
            alive[kept] = 1


def examples(model: PreTrainedModel, windows: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [N, 4] and targets [N], float64 in [0, 1], from windows of token ids [W, S].

    The model is restored afterwards. Raises `ValueError` if it does not return its attention weights.
    """
    modules, draw = attention_modules(model), torch.Generator().manual_seed(seed)
    pairs: list[tuple[Tensor, Tensor]] = []

    def hook(index: int) -> Callable:
        def hear(module, args, out):
            if not isinstance(out, tuple) or out[1] is None:
                raise ValueError(
                    f"layer {index} of {type(model).__name__} does not show its attention: use a model with "
                    "attn_implementation='eager'"
                )
            weights = out[1][0].float().cpu()
            group = getattr(module, "num_key_value_groups", 1)
            shares = weights.unflatten(0, (-1, group)).mean(1)
            for player in _players(shares, index / max(len(modules) - 1, 1), draw):
                pairs.extend(_drawn(player, draw))

        return hear

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [module.register_forward_hook(hook(index)) for index, module in modules.items()]
    try:
        for window in tqdm(windows, desc="attention", unit="window", leave=False):
            with torch.no_grad():
                model(input_ids=window[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for h in hooks:
            h.remove()
        model.set_attn_implementation(before)
    return tuple(torch.cat(parts) for parts in zip(*pairs))


def _players(shares: Tensor, depth: float, draw: torch.Generator) -> Iterator[Player]:
    """By attention with a fixed budget; by attention and age; by attention from a late start."""
    length = shares.shape[1]

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand(1, generator=draw).item()

    yield Player(shares, depth, length // 4 - SINKS - RECENT - BLOCK, 0.0, 0)
    yield Player(shares, depth, int(uniform(length / 16, length / 2)), uniform(32, 512), 0)
    yield Player(shares, depth, int(uniform(length / 16, length / 2)), 0.0, int(uniform(0.5, 0.8) * length))


def _drawn(player: Player, draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Random candidates of random plans: features [n, 4] and targets [n]."""
    for seen, share in player.plans():
        if torch.rand(1, generator=draw) < PLANS:
            chosen = torch.randperm(seen.shape[1], generator=draw)[:TOKENS]
            target = (share[:, chosen].double() / WORTH).clamp_max(1)
            yield seen[:, chosen].flatten(0, 1), target.flatten()


def fit(features: Tensor, targets: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Weights of the network, float32, by name (`scores.MLP`). The network predicts targets in [0, 1].

    A target y is learned as one example of each class, with weights y and 1 - y.
    """
    from sklearn.neural_network import MLPClassifier  # slow to import, and only in the extra "train"

    weight = torch.cat((targets, 1 - targets))
    some = weight > 1e-6
    label = torch.cat((torch.ones_like(targets), torch.zeros_like(targets)))[some].numpy()
    x, weight = torch.cat((features, features))[some].numpy(), weight[some].numpy()
    network = MLPClassifier(HIDDEN, batch_size=min(2048, len(x)), learning_rate_init=2e-3, random_state=seed)
    bar = trange(EPOCHS, desc="fit", unit="epoch", leave=False)
    for _ in bar:
        network.partial_fit(x, label, classes=[0.0, 1.0], sample_weight=weight)
        bar.set_postfix(loss=f"{network.loss_:.4f}")
    weights = {}
    for i, (kernel, bias) in enumerate(zip(network.coefs_, network.intercepts_)):
        weights[f"net.{2 * i}.weight"] = torch.tensor(kernel.T, dtype=torch.float32).contiguous()
        weights[f"net.{2 * i}.bias"] = torch.tensor(bias, dtype=torch.float32)
    return weights


def quarter(policy: str, length: int) -> FadeConfig:
    """A configuration that keeps a quarter of `length` tokens, all but sinks and recent tokens at INT4."""
    return FadeConfig(
        n_sink=SINKS,
        recent_window=RECENT,
        block_size=BLOCK,
        int4_budget=length // 4 - SINKS - RECENT - BLOCK,
        eviction_policy=policy,
    )


def perplexity(model: PreTrainedModel, cache, window: Tensor) -> float:
    """Perplexity of the last three quarters of a window [S], fed to a cache `BLOCK` tokens at a time."""
    losses, window = [], window.to(model.device)
    for start in range(0, len(window), BLOCK):
        part = slice(start, min(start + BLOCK, len(window)))
        position = torch.arange(part.start, part.stop, device=model.device)[None]
        with torch.no_grad():
            step = model(
                input_ids=window[None, part], position_ids=position, **{CACHE_NAME: cache}, use_cache=True
            )
        next_ = window[part.start + 1 : part.stop + 1]
        losses.append(
            torch.nn.functional.cross_entropy(step.logits[0, : len(next_)].float(), next_, reduction="none")
        )
    return torch.cat(losses)[len(window) // 4 :].mean().exp().item()


def table(model: PreTrainedModel, weights: dict[str, Tensor], windows: Tensor, policies=()) -> str:
    """Perplexity by policy with a quarter of the tokens kept: geometric mean, and each window of [W, S]."""
    names = [*policies, "learned"]
    by_policy = {name: [] for name in names}
    for window in tqdm(windows, desc="perplexity", unit="window", leave=False):
        for name in names:
            given = weights if name == "learned" else None
            cache = create_cache(model, quarter(name, len(window)), policy_weights=given)
            by_policy[name].append(perplexity(model, cache, window))
            assert cache.memory().tokens["EVICTED"] > 0
    detach(model)
    lines = ["policy      geometric mean  each window"]
    for name, values in by_policy.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append(f"{name:11} {mean:14.3f}  " + " ".join(f"{x:.3f}" for x in values))
    return "\n".join(lines)


def windows_of(tokenizer, path: Path, count: int, length: int) -> Tensor:
    """`count` windows of `length` tokens, spread evenly over a text: int64 [count, length].

    Raises `LoadError` if the file cannot be read or the text is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read {path}: {error}; give a text file in UTF-8") from error
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < count * length:
        raise LoadError(
            f"{path} has {len(ids)} tokens: {count} windows of {length} are more; give a longer text, or "
            "fewer or shorter windows"
        )
    step = len(ids) // count
    return torch.stack([ids[i * step : i * step + length] for i in range(count)])


def train(args: argparse.Namespace, command: str) -> None:
    """Train as the command line says. `command` is written into the metadata of the file."""
    require("training a policy", "train", "sklearn")
    quiet()
    model, tokenizer = load(args.model, args.device, args.dtype)
    windows = windows_of(tokenizer, args.text, args.windows, args.length)
    tests = args.test and windows_of(tokenizer, args.test, args.test_windows, args.length)
    x, y = examples(model, windows, args.seed)
    weights = fit(x, y, args.seed)
    metadata = {
        "made by": command,
        "model": model.name_or_path,
        "text": f"{args.text.name}, SHA-256 {hashlib.sha256(args.text.read_bytes()).hexdigest()}",
        "examples": f"{len(x)} from {args.windows} windows of {args.length} tokens",
        "features": "; ".join(scores.FEATURES),
        "target": f"min(1, share of attention over the next {AHEAD} queries / {WORTH})",
        "versions": f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, "
        f"scikit-learn {version('scikit-learn')}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with whole(args.out) as written:
        save_file(weights, written, metadata=metadata)
    print(f"{args.out}: {len(x):,} examples, mean target {y.mean():.4f}")
    if tests is not None:
        print(table(model, weights, tests, args.policies.split(",")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv)
    names = [Path(x).name if Path(x).is_absolute() or ".." in x else x for x in argv]
    try:
        train(args, shlex.join(["fade", "train-policy", *names]))
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
