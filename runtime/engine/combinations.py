"""Arguments of `LLM` that exclude or require others: one table for `LLM`, the commands and docs/engine.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from sageLLM.runtime.engine.options import LLMOptions
from sageLLM.runtime.errors import SageError

ANY = "any"
"""Stands for any value but the default."""
MODE = "mode"
"""Stands for the mode of `scheduler`, which is the flag --pd."""


class Combination(NamedTuple):
    """An option that, if it is set, excludes `other`, or requires it to have the value `needs`; and why.

    If `excluded` is set, only this value of `other` is excluded.
    """

    option: str
    other: str
    why: str
    needs: str | None = None
    excluded: str | None = None

    def problem(self, values: Mapping[str, Any]) -> str | None:
        """The violation by these values of the options, or None."""
        value = values[self.other]
        if not is_set(self.option, values):
            return None
        if self.needs is None:
            if not is_set(self.other, values) or self.excluded not in (None, value):
                return None
            return f"{self.option} must not be combined with {self.other}={value!r}: {self.why}"
        if is_set(self.other, values) if self.needs == ANY else _base(value) == self.needs:
            return None
        wanted = "" if self.needs == ANY else f" {self.needs!r}, got {value!r}"
        return f"{self.option} requires {self.other}{wanted}: {self.why}"


COMBINATIONS = (
    Combination("af", "tensor_parallel_size", "attention workers are single ranks"),
    Combination("af", "pipeline_parallel_size", "attention workers are single ranks"),
    Combination("af", "weights_tier", "its workers keep their weights in memory"),
    Combination("af", "kv_tier", "its workers keep the KV of running requests in memory"),
    Combination("prefill_workers", "decode_workers", "both roles have separate workers, or neither", ANY),
    Combination("decode_workers", "prefill_workers", "both roles have separate workers, or neither", ANY),
    Combination("prefill_workers", MODE, "only --pd strict has two roles", "strict"),
    Combination("prefill_workers", "device", "workers of a role run on CPUs only", "cpu"),
    Combination("prefill_workers", "af", "use one of the two"),
    Combination("prefill_workers", "kv_tier", "KV is copied between pools of one tier"),
    Combination("prefill_workers", "pipeline_parallel_size", "use tensor_parallel_size"),
    Combination("prefill_workers", "nnodes", "its workers are on one host"),
    Combination("pp_layer_partition", "pipeline_parallel_size", "without stages there is nothing to divide", ANY),
    Combination("prefill_tensor_parallel_size", "prefill_workers", "it is the degree of a role", ANY),
    Combination("decode_tensor_parallel_size", "decode_workers", "it is the degree of a role", ANY),
    Combination("decode_block_size", "decode_workers", "without roles all blocks have block_size tokens", ANY),
    Combination("kv_events_config", "prefill_workers", "events describe one prefix cache"),
    Combination("kv_events_config", "af", "events describe one prefix cache"),
    Combination("kv_events_config", "kv_tier", "events describe one prefix cache"),
    Combination("activation_dtype", "device", "only kernels of CPUs have activations of 8 bits", "cpu"),
    Combination("activation_dtype", "weights_tier", "weights read in each step are dequantised", excluded="disk"),
    Combination("weights_tier", "device", "weights of a GPU stay in its memory", "cpu"),
    Combination("weights_budget", "weights_tier", "the weights are in memory otherwise", "disk"),
    Combination("weights_folder", "weights_tier", "the weights are in no file otherwise", ANY),
    Combination("kv_tier", "device", "the KV of a GPU's running requests stays in its memory", "cpu"),
)
"""All of them; those that depend on the model or the machine are checked where these are known."""

_UNSET: Mapping[str, tuple[Any, ...]] = {
    **{option.name: (option.default,) for option in fields(LLMOptions)},
    "nnodes": (None, 1),
}


def check_combinations(options: LLMOptions, mode: str) -> None:
    """Raises SageError for the first entry that the options violate; `mode` is that of the scheduler."""
    if (problem := next(problems({**_values(options), MODE: mode}), None)) is not None:
        raise SageError(problem)


def problems(values: Mapping[str, Any]) -> Iterator[str]:
    """The violations by the values of all options and of the mode."""
    return (found for one in COMBINATIONS if (found := one.problem(values)) is not None)


def is_set(option: str, values: Mapping[str, Any]) -> bool:
    """Whether an option differs from its default."""
    return not any(values[option] is default or values[option] == default for default in _UNSET[option])


def as_table() -> str:
    """The table of docs/engine.md, in Markdown."""
    rows = ["| option | other | reason |", "|---|---|---|"]
    for one in COMBINATIONS:
        relation = "without" if one.needs is None else "only with"
        named = one.excluded if one.needs in (None, ANY) else one.needs
        value = "" if named is None else f" `{named}`"
        rows.append(f"| `{one.option}` | {relation} `{one.other}`{value} | {one.why} |")
    return "\n".join(rows)


def _values(options: LLMOptions) -> dict[str, Any]:
    return {option.name: getattr(options, option.name) for option in fields(LLMOptions)}


def _base(value: Any) -> Any:
    """The type of a device, such as "cuda" of "cuda:1"; other values as they are."""
    return value.partition(":")[0] if isinstance(value, str) else value
