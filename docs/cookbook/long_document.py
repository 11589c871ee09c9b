"""A chat about a long document: it is read once, and each answer is streamed."""

import fade_fast

#: A document of some pages that needs no download.
DOCUMENT = " ".join(f"On day {day} the expedition walked {7 + day * 5 % 11} miles." for day in range(1, 60))
QUESTIONS = ("How far did they walk on day 3?", "And on day 40?")


def main(model, tokenizer, document=DOCUMENT, questions=QUESTIONS):
    """Print the answers, and return them with the cache."""
    cache = fade_fast.create_cache(model, "safe")
    said = [dict(role="user", content=f"{document}\n\n{questions[0]}")]
    answers = []
    for question in questions:
        if answers:  # the next turn: the cache holds all before it, and only the question is read
            said += [dict(role="assistant", content=answers[-1]), dict(role="user", content=question)]
        answer = ""
        for piece in fade_fast.stream(model, tokenizer, said, cache, max_new_tokens=40):
            print(piece, end="", flush=True)
            answer += piece
        print()
        answers.append(answer)
    print(cache.memory())
    return answers, cache


if __name__ == "__main__":
    main(*fade_fast.loading.load())
