"""Decodes single tokens, for log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from sageLLM.runtime.text.detokenizer import MAX_UTF8_BYTES, REPLACEMENT, Decoder, common_prefix_len


class TokenText:
    """The text of one token within a text; the texts of an answer's tokens joined are the answer.

    A token alone would lose its leading space in a sentencepiece-style decoder, so it is decoded after an anchor, an
    ordinary token. Incomplete bytes are "", and the token that completes a character has the whole character (as in
    vLLM); bytes that never become a character are "" as well.
    """

    def __init__(self, decoder: Decoder, anchor: Sequence[int]) -> None:
        """`anchor` is a short text's ids, such as those of "a"; without one, tokens are decoded alone."""
        self._decoder = decoder
        self._anchor = list(anchor)
        self._anchor_text = self._decode([])
        self._texts: dict[int, str] = {}

    def __call__(self, token_id: int, before: Sequence[int] = ()) -> str:
        """The text of the token; `before` are the tokens to its left, of which the last 3 are used."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._minus(self._decode([token_id]), self._anchor_text)
        return self._complete(token_id, before) if REPLACEMENT in text else text

    def _complete(self, token_id: int, before: Sequence[int]) -> str:
        """The text without incomplete bytes, decoded after as many tokens as its first character requires."""
        for num_before in range(min(len(before), MAX_UTF8_BYTES - 1) + 1):
            context = list(before[len(before) - num_before :])
            text = self._decode([*context, token_id])
            if not self._minus(text, self._anchor_text).startswith(REPLACEMENT):
                return self._minus(text.rstrip(REPLACEMENT), self._decode(context).rstrip(REPLACEMENT))
        return ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(self._anchor + token_ids, skip_special_tokens=False)

    @staticmethod
    def _minus(text: str, prefix: str) -> str:
        return text[common_prefix_len(text, prefix) :]
