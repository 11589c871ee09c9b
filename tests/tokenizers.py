"""A tokenizer for tiny models: one token a byte, so that characters are split over tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(
    template: str | None = None, merges: list[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """256 tokens: 255 of the 256 bytes, and as token 0 one that ends a text; the byte 0xFF has none.

    Each pair of `merges` takes the place of another rare byte.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The last letter of the alphabet gives up its place to the end of a text.
    vocabulary = {"<end>": 0} | {letter: i for i, letter in enumerate(letters[:-1], 1)}
    for i, (first, second) in enumerate(merges, 2):
        vocabulary[first + second] = vocabulary.pop(letters[-i])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = template
    return fast
