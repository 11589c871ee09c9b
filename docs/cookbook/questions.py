"""Several questions about one text: it is read once, and each question begins with a copy of its cache."""

import copy

import torch

import fade_fast

TEXT = " ".join(f"Room {room} belongs to team {'ABCDE'[room % 5]}." for room in range(1, 80))
QUESTIONS = ("Whose room is room 12? It belongs to team", "Whose room is room 33? It belongs to team")


def main(model, tokenizer, text=TEXT, questions=QUESTIONS, new=4):
    """Print the answers, and return them with the bytes that the text uses."""
    read = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    cache = fade_fast.create_cache(model, "safe")
    # generate() reads the text. The token that it adds is not in the cache, because nothing has read it.
    model.generate(input_ids=read, past_key_values=cache, max_new_tokens=1, do_sample=False)
    answers = []
    for question in questions:
        ids = tokenizer(f" {question}", return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat((read, ids.to(model.device)), dim=1)
        own = copy.deepcopy(cache)
        out = model.generate(input_ids=ids, past_key_values=own, max_new_tokens=new, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        print(f"{question}|{answers[-1]}")
    assert cache.get_seq_length() == read.shape[1]  # the copies have left it as it was
    return answers, cache.memory()


if __name__ == "__main__":
    main(*fade_fast.loading.load())
