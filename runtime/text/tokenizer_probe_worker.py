"""Child process that tries a tokenizer: a script of `tokenizer_probe.py`, tokenizer.json on stdin, one JSON line out.

A tokenizer.json is a program: normalizers that multiply text, regular expressions, tables that the library does not
check. It is loaded and run here first, where a crash or endless work ends only this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import tokenizers

SHORTEST, SHORT, LONG = 256, 1024, 8192
MAX_SHORT_SECONDS = 0.5
MAX_SECONDS_PER_TEXT = 3.0
MAX_GROWTH = 64
"""The most tokens per character of text. NFKC makes up to 18 characters of one, and byte-level BPE 3 tokens of each."""
MAX_TOKEN_LEN = 16_384
MAX_ADDED_TOKENS = 1024
"""The most tokens that the post-processor adds to an empty text."""
SECONDS_PER_TEXT = 30.0
SAMPLE = "The quick brown fox, 12345 jumps!\n\tdef f(x): return 'naïve 你好 👩‍👩‍👧 ﷺ é ½ ☃' # ▁_\u200d\u0301\u00a0\0"
RUNS = "aA0 \n\t._▁é中🙂"
MAX_RUNS = 64


class RefusedError(Exception):
    """The tokenizer exceeds a bound; the message completes "tokenizer.json ..."."""


def probe(data: bytes) -> dict[str, Any]:
    """The bounds of the tokenizer: the length of its longest token, and of the longest text that takes bounded time."""
    backend = tokenizers.Tokenizer.from_buffer(data)
    backend.no_truncation()
    backend.no_padding()
    vocab = backend.get_vocab(with_added_tokens=True)
    longest = max(map(len, vocab), default=1)
    if longest > MAX_TOKEN_LEN:
        raise RefusedError(f"must have tokens of at most {MAX_TOKEN_LEN} characters, got {longest}")
    if num_added(backend) > MAX_ADDED_TOKENS:
        raise RefusedError(f"must add at most {MAX_ADDED_TOKENS} tokens to a text")
    parts = components(backend)
    max_text_len = 2**62
    for text in [SAMPLE, *runs(parts)]:
        end_process_after(MAX_SECONDS_PER_TEXT)
        try:
            check_growth(backend, text, longest)
            max_text_len = min(max_text_len, affordable_len(backend, text))
        except RefusedError:
            raise
        except Exception:  # the library rejects the text, as a vocabulary without an unknown token does
            continue
    for ids in decoded_literals(parts, vocab):
        check_decoded(backend, ids, longest)
    return {"longest": longest, "max_text_len": max_text_len}


def num_added(backend: tokenizers.Tokenizer) -> int:
    try:
        return len(backend.encode("").ids)
    except Exception:  # as above
        return 0


def components(backend: tokenizers.Tokenizer) -> list[Any]:
    """The settings of the normalizer, the pre-tokenizer, the post-processor and the decoder."""
    found = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    return [json.loads(part.__getstate__()) for part in found if part is not None]


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def patterns(value: Any) -> Iterator[str]:
    """The texts and regular expressions that the components search for."""
    if isinstance(value, dict):
        for key in ("String", "Regex"):
            if isinstance(value.get(key), str):
                yield value[key]
        for item in value.values():
            yield from patterns(item)
    elif isinstance(value, list):
        for item in value:
            yield from patterns(item)


def runs(parts: list[Any]) -> list[str]:
    """Texts to repeat: one of each class of characters, and the texts and letters that the components search for."""
    found = dict.fromkeys(RUNS)
    for pattern in patterns(parts):
        if 0 < len(pattern) <= 16:
            found[pattern] = None
        found |= dict.fromkeys(re.findall(r"(?<!\\)\w", pattern)[:16])
        if len(found) >= MAX_RUNS:
            break
    texts = list(found)[:MAX_RUNS]
    if any(text == "Precompiled" for text in strings(parts)):  # a table of any replacements
        texts += ["".join(map(chr, range(start, start + 0x800))) for start in range(0, 0xD800, 0x800)]
    return texts


def check_growth(backend: tokenizers.Tokenizer, text: str, longest: int) -> None:
    # In steps of powers of 16, so that a text which grows is seen before it fills the memory.
    for num_chars in (1, 16, SHORTEST):
        repeated = repeat(text, num_chars)
        start = time.process_time()
        ids = backend.encode(repeated).ids
        if (taken := time.process_time() - start) > MAX_SHORT_SECONDS:
            raise RefusedError(f"must not take {taken:.1f} s for a text of {len(repeated)} characters")
        if len(ids) > MAX_ADDED_TOKENS + MAX_GROWTH * len(repeated):
            raise RefusedError(f"must make at most {MAX_GROWTH} tokens of a character")
        check_decoded(backend, ids, longest)


def check_decoded(backend: tokenizers.Tokenizer, ids: list[int], longest: int) -> None:
    if len(backend.decode(ids, skip_special_tokens=False)) > MAX_GROWTH * (longest + 1) * len(ids) + MAX_ADDED_TOKENS:
        raise RefusedError(f"must decode a token to at most {MAX_GROWTH} times its characters")


def decoded_literals(parts: list[Any], vocab: dict[str, int]) -> Iterator[list[int]]:
    """Tokens that contain a text for which the components search, since a decoder may replace it."""
    for text in list(dict.fromkeys(patterns(parts)))[:MAX_RUNS]:
        if ids := [token_id for token, token_id in vocab.items() if text in token][:4]:
            yield ids


def affordable_len(backend: tokenizers.Tokenizer, text: str) -> int:
    """The longest text of this kind that takes SECONDS_PER_TEXT, if the time grows linearly or with the square."""
    short = seconds(backend, repeat(text, SHORT))
    if short > MAX_SHORT_SECONDS:  # the long text could take minutes
        return int(SHORT * (SECONDS_PER_TEXT / short) ** 0.5)
    long = seconds(backend, repeat(text, LONG))
    ratio = SECONDS_PER_TEXT / max(long, 1e-6)
    # A few microseconds per character are too short to tell the growth; so is a single measurement.
    if long < 0.02 or grows_linearly(backend, text, long):
        return int(LONG * ratio)
    return int(LONG * ratio**0.5)


def grows_linearly(backend: tokenizers.Tokenizer, text: str, long: float) -> bool:
    short = min(seconds(backend, repeat(text, SHORT)) for _ in range(3))
    if long < 1:
        long = min(long, seconds(backend, repeat(text, LONG)))
    return long < 3 * (LONG / SHORT) * short


def repeat(text: str, num_chars: int) -> str:
    """A text of this length with an end that differs, where a regular expression that wants the end turns back."""
    return (text * (num_chars // len(text) + 1))[: max(num_chars, len(text))] + "!"


def seconds(backend: tokenizers.Tokenizer, text: str) -> float:
    start = time.process_time()
    backend.encode(text)
    return time.process_time() - start


def end_process_after(seconds: float) -> None:
    """Ends the process, even inside the library, after this processor time, unless it is called again."""
    if hasattr(signal, "setitimer"):  # the default action of SIGVTALRM
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def limit_resources(max_bytes: int, max_seconds: int) -> None:
    """Limits address space and processor time. Systems without `resource` (Windows) only have the parent's deadline."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    limit_resources(int(sys.argv[1]), int(sys.argv[2]))
    reply: dict[str, Any]
    try:
        reply = probe(sys.stdin.buffer.read())
    except RefusedError as error:
        reply = {"refused": str(error)}
    except MemoryError:
        reply = {"refused": "requires too much memory"}
    except Exception as error:
        reply = {"invalid": str(error)}
    except BaseException as error:  # PanicException, which the library raises for what it does not check
        reply = {"refused": f"makes the tokenizer library panic ({error})"}
    print(json.dumps(reply), flush=True)
    os._exit(0)  # freeing the vocabulary takes time


if __name__ == "__main__":
    main()
