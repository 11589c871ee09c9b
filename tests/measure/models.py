"""A tiny model in a folder, with a tokenizer of words, as benchmarks load it."""

import itertools
import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..models import tiny_llama

WORDS = ["".join(pair) for pair in itertools.product("abcdefghijklmn", repeat=2)]


def words(count: int, seed: int = 0) -> str:
    """A text of `count` tokens."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and one a digit."""
    known = ["<unk>", *WORDS, *"0123456789", *"?.:,"]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    found.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>")


def save(folder) -> str:
    """Folder with a tiny random model and the tokenizer."""
    tiny_llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
