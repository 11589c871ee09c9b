"""A policy of your own: what a token has received, halved for every 200 tokens of its age.

A policy is an observer. It says which fields a stored token has, how the attention of a step changes them,
and how they make a score. `Summed` already has the sum of the attention and the number of queries, so this
policy only needs its own score. It takes the place of one of the names that `FadeConfig` knows.
"""

import contextlib

import fade_fast
from fade_fast.policies import scores

TEXT = " ".join(f"Item {i} costs {i * 7 % 13} coins." for i in range(1, 90))


class Fading(scores.Summed):
    """Mean attention per query, which fades with age."""

    def score_candidates(self, attention_stats, position, now):
        return self.score(attention_stats) * 0.5 ** ((now - position) / 200)


@contextlib.contextmanager
def named(name, policy):
    """Inside, caches that ask for the policy `name` get this one."""
    before, scores.OBSERVERS[name] = scores.OBSERVERS[name], policy
    try:
        yield
    finally:
        scores.OBSERVERS[name] = before


def main(model, tokenizer, text=TEXT, budget=200, new=20):
    """Generate with the policy and with H2O, and return both caches."""
    config = fade_fast.FadeConfig(int4_budget=budget, eviction_policy="h2o")
    with named("h2o", Fading):
        ours = fade_fast.create_cache(model, config)
    theirs = fade_fast.create_cache(model, config)
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    for cache in (ours, theirs):
        out = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=new, do_sample=False)
        print(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        print(cache.memory().tokens)
    return ours, theirs


if __name__ == "__main__":
    main(*fade_fast.loading.load())
