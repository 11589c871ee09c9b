"""Tiny random models, and the twin that compressed generation is compared with."""

from contextlib import contextmanager
from unittest import mock

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.candidate_generator import CandidateGenerator

import fade_fast
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig

SMALL = dict(recent_window=16, block_size=8)  # compresses after a few tokens
OFF = FadeConfig(recent_window=None)
SAFE = FadeConfig(**SMALL)
EVICTING = FadeConfig(**SMALL, int4_budget=24)


def tiny_llama(*, heads=2, group=2, head_dim=64, layers=2, dtype=torch.float32, seed=0, **config):
    """A random Llama whose attention is sharp enough for its cache to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16 * heads * group,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads * group,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=16384,
        initializer_range=0.2,
        pad_token_id=0,
        **config,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def prompt(length, *, batch=1, pads=(), seed=0):
    """Random `input_ids` and `attention_mask`, row b left-padded by `pads[b]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 256, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for b, n in enumerate(pads):
        ids[b, :n], mask[b, :n] = 0, 0
    return dict(input_ids=ids, attention_mask=mask)


def generate(model, cache, inputs, new=40, **options):
    """New tokens [B, new] of `generate()`, greedy unless `options` say otherwise."""
    options = dict(do_sample=False, min_new_tokens=new) | options
    out = model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=new, **options)
    return out[:, inputs["input_ids"].shape[1] :]


new_cache = fade_fast.create_cache  # short: most tests call it


class Oracle(CandidateGenerator):
    """Drafts `least` to `most` tokens of the text that is to come, one in five wrong; at its end none."""

    def __init__(self, text, most, least=0):
        self.text, self.most, self.least = text, most, least
        self.random = torch.Generator().manual_seed(0)

    def get_candidates(self, ids, *args, **kwargs):
        start = ids.shape[1]
        wanted = int(torch.randint(self.least, self.most + 1, (), generator=self.random))
        draft = self.text[:, start : max(start, min(start + wanted, self.text.shape[1] - 1))]
        wrong = (torch.rand(draft.shape, generator=self.random) < 0.2).to(draft.device)
        return torch.cat((ids, torch.where(wrong, (draft + 1) % 256, draft)), 1), None

    def update_candidate_strategy(self, *args, **kwargs):
        pass


def predictable(model, by=0.002):
    """The model with less attention, so that its text is nearly the same however its tokens are stored."""
    for name, x in model.named_parameters():
        if name.endswith("o_proj.weight"):
            x.data *= by
    return model


@contextmanager
def drafts(model, text, most=5, least=0):
    """Where `generate(**options)`, given these options, checks drafts of `text`."""
    with drafted_by(model, lambda: Oracle(text, most, least), most) as options:
        yield options


@contextmanager
def drafted_by(model, drafter, most):
    """Where `generate(**options)`, given these options, checks tokens, at most `most`, of `drafter()`."""
    made = mock.Mock(side_effect=lambda *args, **kwargs: drafter())
    with mock.patch.object(type(model), "_get_candidate_generator", made):
        yield dict(prompt_lookup_num_tokens=most)
    assert made.called


def dense(model):
    return DynamicCache(config=model.config)


def teacher_forced(model, cache, inputs, chunks):
    """Logits [B, n, vocabulary] of the input fed in chunks of the given sizes through one cache."""
    ids, mask, start, out = inputs["input_ids"], inputs["attention_mask"], 0, []
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for n in chunks:
            part = slice(start, start + n)
            step = model(
                input_ids=ids[:, part],
                attention_mask=mask[:, : start + n],
                position_ids=position[:, part],
                **{CACHE_NAME: cache},
                use_cache=True,
            )
            out.append(step.logits)
            start += n
    return torch.cat(out, dim=1)


def twin_logits(model, config, inputs, chunks):
    """The same with stock attention over a cache that stores the same codes and reads them dense."""
    cache = fade_fast.create_cache(model, config)
    fade_fast.detach(model)
    show_survivors(cache)
    return teacher_forced(model, cache, inputs, chunks)


def show_survivors(cache) -> None:
    """Let stock attention read what an evicting cache has left: right in rows without padding."""
    for layer in cache.layers:
        layer.shows_survivors = True


def compressed_tokens(cache) -> int:
    """Tokens in any tier of a middle."""
    return sum(n for name, n in cache.memory().tokens.items() if name not in ("FP16", "EVICTED"))


class RandomDrafts(CandidateGenerator):
    """Drafts `count` random tokens per step, which are hardly ever right."""

    def __init__(self, vocabulary: int, count: int):
        self.vocabulary, self.count = vocabulary, count

    def get_candidates(self, ids, **kwargs):
        drafted = torch.randint(self.vocabulary, (len(ids), self.count), device=ids.device)
        return torch.cat((ids, drafted), dim=1), None

    def update_candidate_strategy(self, *args, **kwargs) -> None:
        """Learn nothing from refused drafts."""
