"""Sampling parameters of a request: vLLM's `SamplingParams`, with every field checked on creation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

from sageLLM.runtime.errors import SamplingParamsError
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams

INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_N = 128
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 100.0
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LEN = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_LOGIT_BIAS = 100.0
ZERO_TEMPERATURE = 1e-5
"""Temperatures below this one count as 0 (vLLM's `_SAMPLING_EPS`)."""
MAX_GREEDY_TEMPERATURE = 0.01
"""The highest temperature that is greedy. Dividing by less amplifies rounding, and users mean greedy by it."""

_SHOWN_LEN = 60


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling parameters; names, defaults and meanings are vLLM's.

    Raises `SamplingParamsError` with the field, the allowed range and the value. `top_k` 0 and -1 both mean off and are
    stored as 0; `seed` -1 means None; `stop` and `stop_token_ids` are stored as tuples.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        self._check_fields_together()

    def _check_fields_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _error("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        if self.temperature < ZERO_TEMPERATURE and self.n > 1:
            raise _error("n", self.n, "1 when temperature is 0, as all greedy answers are the same")
        if self.structured_outputs is not None and (self.min_tokens or self.ignore_eos):
            name, off = ("min_tokens", 0) if self.min_tokens else ("ignore_eos", False)
            rule = f"{off} with structured_outputs, as the grammar decides where the answer can end"
            raise _error(name, getattr(self, name), rule)

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> SamplingParams:
        """The parameters in a request's body. Raises SamplingParamsError for an unknown name."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise SamplingParamsError(_unknown_name(name, known), param=str(name))
        build: Callable[..., SamplingParams] = cls
        return build(**values)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the likeliest one, also where several have the same logit: no draw decides."""
        return self.temperature <= MAX_GREEDY_TEMPERATURE or self.top_k == 1 or self.min_p == 1.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return _stop_strings("stop", self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(self.stop_token_ids or ())

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


_Check = Callable[[str, object], object]


def _error(name: str, value: object, must: str) -> SamplingParamsError:
    return SamplingParamsError(f"{name} must be {must}, got {_show(value)}", param=name.partition("[")[0])


def _show(value: object) -> str:
    # Python raises ValueError on printing an int of more than 4300 digits.
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | int | float | None):
        text = repr(value)
        return text if len(text) <= _SHOWN_LEN else f"{text[:_SHOWN_LEN]}..."
    return f"a {type(value).__name__}"


def _unknown_name(name: object, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown sampling parameter {_show(name)}; {hint}"


def _number(low: float, high: float, *, open_low: bool = False) -> _Check:
    must = f"a number above {low:g} and at most {high:g}" if open_low else f"a number from {low:g} to {high:g}"

    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise _error(name, value, must)
        number = _as_float(value)
        if math.isnan(number) or not low <= number <= high or (open_low and number == low):
            raise _error(name, value if isinstance(value, int) else number, must)
        return number

    return check


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond the range of a float
        return math.inf


def _integer(low: int, high: int, also: Mapping[int, int | None] | None = None) -> _Check:
    """Checks the range; `also` maps further accepted values to the value that is stored for each."""
    accepted = also or {}
    extra = "".join(f", or {value}" for value in accepted if not low <= value <= high)

    def check(name: str, value: object) -> int | None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise _error(name, value, f"an integer from {low} to {high}{extra}")
        number = int(value)
        if number in accepted:
            return accepted[number]
        if not low <= number <= high:
            raise _error(name, number, f"an integer from {low} to {high}{extra}")
        return number

    return check


def _optional(check: _Check) -> _Check:
    return lambda name, value: None if value is None else check(name, value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _error(name, value, "True or False")
    return value


def _stop_strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings: Sequence[object] = (value,) if isinstance(value, str) else _sequence(name, value, "a string or a list")
    if len(strings) > MAX_STOP_STRINGS:
        raise SamplingParamsError(f"{name} must have at most {MAX_STOP_STRINGS} strings, got {len(strings)}", name)
    return tuple(_stop_string(f"{name}[{i}]", string) for i, string in enumerate(strings))


def _stop_string(name: str, value: object) -> str:
    must = f"a string of 1 to {MAX_STOP_STRING_LEN} characters"
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_STOP_STRING_LEN:
        raise _error(name, value, must)
    return value


def _stop_token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = _sequence(name, value, "a list of token ids")
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise SamplingParamsError(f"{name} must have at most {MAX_STOP_TOKEN_IDS} ids, got {len(ids)}", name)
    return tuple(_token_id(f"{name}[{i}]", token_id) for i, token_id in enumerate(ids))


def _token_id(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) <= INT32_MAX:
        raise _error(name, value, f"an integer from 0 to {INT32_MAX}")
    return int(value)


def _sequence(name: str, value: object, must: str) -> Sequence[object]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise _error(name, value, must)
    return value


_bias_value = _number(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)


def _logit_bias(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _error(name, value, "a mapping from token id to number")
    if len(value) > MAX_LOGIT_BIAS_ENTRIES:
        raise SamplingParamsError(f"{name} must have at most {MAX_LOGIT_BIAS_ENTRIES} entries, got {len(value)}", name)
    biases = {}
    for token_id, bias in value.items():
        key = _token_id(f"{name}[{_show(token_id)}]", token_id)
        _bias_value(f"{name}[{key}]", bias)
        biases[key] = float(bias)
    return biases


def _structured_outputs(name: str, value: object) -> StructuredOutputsParams | None:
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    return StructuredOutputsParams.from_mapping(value)


_CHECKS: dict[str, _Check] = {
    "n": _integer(1, MAX_N),
    "temperature": _number(0, MAX_TEMPERATURE),
    "top_p": _number(0, 1, open_low=True),
    "top_k": _integer(0, INT32_MAX, also={-1: 0}),
    "min_p": _number(0, 1),
    "seed": _optional(_integer(INT64_MIN, INT64_MAX, also={-1: None})),
    "max_tokens": _optional(_integer(1, INT32_MAX)),
    "min_tokens": _integer(0, INT32_MAX),
    "stop": _stop_strings,
    "stop_token_ids": _stop_token_ids,
    "ignore_eos": _flag,
    "logprobs": _optional(_integer(0, MAX_LOGPROBS)),
    "prompt_logprobs": _optional(_integer(0, MAX_LOGPROBS)),
    "include_stop_str_in_output": _flag,
    "skip_special_tokens": _flag,
    "presence_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "repetition_penalty": _number(0, MAX_REPETITION_PENALTY, open_low=True),
    "logit_bias": _optional(_logit_bias),
    "structured_outputs": _structured_outputs,
}
