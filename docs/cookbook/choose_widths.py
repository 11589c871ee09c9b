"""How many bits your model needs: the loss of your text with each width, read through the cache.

The text is read in chunks, so that later tokens attend to compressed ones, as they do while you generate.
Take the fewest bits whose loss you accept. Keys usually need more than values.
"""

import torch

import fade_fast
from fade_fast.hf.models import CACHE_NAME

TEXT = " ".join(
    f"In the year {1500 + 7 * i} the town built bridge number {i} over the river." for i in range(60)
)
WIDTHS = {"8 bits": (8, 8), "4 bits": (4, 4), "K4 V2": (4, 2), "3 bits": (3, 3), "2 bits": (2, 2)}


@torch.no_grad()
def loss_of(model, ids, config, chunk=64):
    """Mean loss of the tokens after the first chunk, and the bytes of the cache."""
    cache, losses, before = fade_fast.create_cache(model, config), [], None
    for part in ids.split(chunk, dim=1):
        logits = model(input_ids=part, **{CACHE_NAME: cache}, use_cache=True).logits.float()
        if before is not None:
            predicted = torch.cat((before, logits[:, :-1]), dim=1)
            losses.append(torch.nn.functional.cross_entropy(predicted[0], part[0], reduction="none"))
        before = logits[:, -1:]
    return float(torch.cat(losses).mean()), cache.memory().allocated


def main(model, tokenizer, text=TEXT, **fields):
    """Print a table, and return loss and bytes by width. `fields` are fields of `FadeConfig`."""
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    configs = {"uncompressed": fade_fast.FadeConfig(recent_window=None)}
    for name, (keys, values) in WIDTHS.items():
        configs[name] = fade_fast.FadeConfig(middle_k_bits=keys, middle_v_bits=values, **fields)
    results = {name: loss_of(model, ids, config) for name, config in configs.items()}
    exact = results["uncompressed"][0]
    for name, (loss, size) in results.items():
        print(f"{name:<13} loss {loss:.4f} ({loss - exact:+.4f}), {size / 1e6:.2f} MB")
    return results


if __name__ == "__main__":
    main(*fade_fast.loading.load())
