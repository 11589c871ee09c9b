"""Several prompts of different lengths in one batch: padding is never attended, and is the first to go."""

import fade_fast

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there was a fisher who",
    "The three primary colors are red, yellow and",
)


def main(model, tokenizer, prompts=PROMPTS, new=24):
    """Print the text of each prompt, and return the texts with the cache."""
    tokenizer.padding_side = "left"  # so that all rows end where the new tokens begin
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    cache = fade_fast.create_cache(model, "safe")
    out = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    for prompt, text in zip(prompts, texts):
        print(f"{prompt}|{text}")
    return texts, cache


if __name__ == "__main__":
    main(*fade_fast.loading.load())
