"""A conversation that goes on after a restart: the cache is saved, and loaded by another process."""

import tempfile
from pathlib import Path

import fade_fast

FIRST = "Here is a list of numbers. " + " ".join(str(n * n) for n in range(1, 90)) + ". What comes next?"
SECOND = "And after that?"


def main(model, tokenizer, first=FIRST, second=SECOND, folder=None):
    """Print both answers, and return the second one as it is with and without the restart."""
    said = [dict(role="user", content=first)]
    cache = fade_fast.create_cache(model, "safe")
    answer = "".join(fade_fast.stream(model, tokenizer, said, cache, max_new_tokens=20))
    print(answer)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(folder or scratch) / "conversation.fade"
        cache.save(path, cache.seen.ids)  # with its tokens, so that the next turn can be compared with them
        # From here on it could be another process. The messages are kept by you.
        again = fade_fast.load_cache(path, model)
    said += [dict(role="assistant", content=answer), dict(role="user", content=second)]
    resumed = "".join(fade_fast.stream(model, tokenizer, said, again, max_new_tokens=20))
    print(resumed)
    went_on = "".join(fade_fast.stream(model, tokenizer, said, cache, max_new_tokens=20))
    return resumed, went_on, again


if __name__ == "__main__":
    main(*fade_fast.loading.load())
