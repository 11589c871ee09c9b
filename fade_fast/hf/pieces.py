"""Text from tokens, piece by piece: what may be shown already, and where a stop string ends it."""

from transformers import PreTrainedTokenizerBase

#: What a tokenizer writes for bytes that are not yet a character.
INCOMPLETE = "\ufffd"


class Detokenizer:
    """Turns tokens into pieces of text. Together they are the text of all tokens, special ones left out.

    A token may hold a part of a character, and the text of a token may depend on the token before it. So a
    piece is the difference of two decoded texts, and it waits until its last character is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # first token that is decoded again, as context of the next piece
        self._shown = 0  # tokens whose text was given

    def push(self, token: int) -> str:
        """Return the text that is complete with this token; "" if none is."""
        self._tokens.append(token)
        return self._advance(self._decode(self._start, len(self._tokens)))

    def flush(self) -> str:
        """Return the text that still waits, with `INCOMPLETE` for bytes that never became a character."""
        return self._advance(self._decode(self._start, len(self._tokens)), last=True)

    def _advance(self, text: str, last: bool = False) -> str:
        before = self._decode(self._start, self._shown)
        if len(text) <= len(before) or (text.endswith(INCOMPLETE) and not last):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        if start == stop:
            return ""
        return self._tokenizer.decode(
            self._tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class StopStrings:
    """Cuts a text at the first of several strings, wherever the pieces of the text are split.

    The end of a text is held back while it may be the beginning of a stop string.

    >>> cut = StopStrings(["END"])
    >>> cut.push("the E"), cut.push("N and EN"), cut.push("D of it"), cut.found
    ('the ', 'EN and ', '', True)
    """

    def __init__(self, strings: list[str] | tuple[str, ...]):
        self.strings = tuple(strings)
        self.found = False
        self._held = ""

    def push(self, piece: str) -> str:
        """Return the text that can be shown now. Nothing follows once `found` is true."""
        if self.found:
            return ""
        if not self.strings:
            return piece
        text = self._held + piece
        ends = [at for string in self.strings if (at := text.find(string)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        keep = max(self._begun(text, string) for string in self.strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back, at the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, string: str) -> int:
        """Length of the longest end of `text` with which `string` begins, without all of `string`."""
        most = min(len(text), len(string) - 1)
        return next((n for n in range(most, 0, -1) if text.endswith(string[:n])), 0)
