"""Rotary sections of a config: the base frequency, and the scaling with its parameters checked.

A config.json has the section as `rope_parameters` (transformers 5), as `rope_scaling` (before), or as both, where
`rope_scaling` wins as in transformers. Each scaling type accepts a closed list of keys: a key that the type does not
have might change the model, so it is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.hf_config import MAX_SIZE, HFConfig, shown

Kind = Literal["positive", "number", "bool", "numbers"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """A pair of rotary tables [P, dim/2] for ops that rotate `dim` components of a head (Su et al., arXiv 2104.09864).

    `scaling` has the parameters of the scaling, with its type under `rope_type`, or is None.
    """

    base: float
    dim: int
    max_position: int
    scaling: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """The type of the scaling; "default" without one."""
        return str(self.scaling["rope_type"]) if self.scaling else "default"

    @property
    def trained(self) -> int:
        """The trained length in tokens. Longer sequences have other frequencies with longrope and dynamic scaling."""
        if self.kind == "dynamic":
            return self.max_position
        return int(min((self.scaling or {}).get("original_max_position_embeddings", self.max_position), MAX_SIZE))

    @property
    def longest(self) -> int:
        """The length of the longest sequence: `max_position`, extended by yarn, linear and dynamic scaling as in vLLM.

        With the other types, `max_position` includes the scaling.
        """
        if self.scaling is None or self.kind not in ("yarn", "linear", "dynamic"):
            return self.max_position
        return max(self.max_position, int(min(self.trained * self.scaling["factor"], MAX_SIZE)))


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The keys of a scaling type with the kinds of their values."""

    required: Mapping[str, Kind]
    optional: Mapping[str, Kind]


_FACTOR: Mapping[str, Kind] = {"factor": "positive"}
_LONGROPE = _Parameters(
    {"short_factor": "numbers", "long_factor": "numbers"},
    {"original_max_position_embeddings": "positive", "attention_factor": "positive", **_FACTOR},
)
SCALINGS: Mapping[str, _Parameters] = {
    "default": _Parameters({}, {}),
    "linear": _Parameters(_FACTOR, {}),
    "dynamic": _Parameters(_FACTOR, {}),
    "llama3": _Parameters(
        {**_FACTOR, "low_freq_factor": "positive", "high_freq_factor": "positive"},
        {"original_max_position_embeddings": "positive"},
    ),
    "yarn": _Parameters(
        _FACTOR,
        {
            "original_max_position_embeddings": "positive",
            "attention_factor": "positive",
            "beta_fast": "positive",
            "beta_slow": "positive",
            "mscale": "number",
            "mscale_all_dim": "number",
            "truncate": "bool",
        },
    ),
    "ntk_alpha": _Parameters({"alpha": "positive"}, {}),  # `dynamic` with an `alpha`, in checkpoints of Hunyuan
    "longrope": _LONGROPE,
    "longrope_mscale": _Parameters(  # `longrope` with factors on the tables, in checkpoints of Phi-3.5-MoE
        {**_LONGROPE.required, "short_mscale": "positive", "long_mscale": "positive"},
        {"original_max_position_embeddings": "positive"},
    ),
    "su": _LONGROPE,  # the original name, in early checkpoints of Phi-3
}
_NO_EFFECT: Mapping[tuple[str, str], tuple[object, ...]] = {
    ("yarn", "finetuned"): (True, False),  # in the YaRN checkpoints of Llama 2; only their own training code reads it
    ("yarn", "attn_factor"): (1, 1.0),
    ("yarn", "extrapolation_factor"): (1, 1.0),
    ("ntk_alpha", "factor"): (1, 1.0),
    ("ntk_alpha", "beta_fast"): (32, 32.0),
    ("ntk_alpha", "beta_slow"): (1, 1.0),
    ("ntk_alpha", "mscale"): (1, 1.0),
    ("ntk_alpha", "mscale_all_dim"): (0, 0.0, 1, 1.0),
}
"""Keys that published checkpoints have, with the values for which they change nothing."""
_READ_ELSEWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def _is_parameter(key: str) -> bool:
    """Whether a scaling type has this key."""
    return any(key in one.required or key in one.optional for one in SCALINGS.values())


def read_rope(
    hf: HFConfig,
    *,
    base: float,
    dim: int,
    max_position: int,
    keys: tuple[str, ...],
    allow: tuple[str, ...],
    is_partial: bool = False,
    reads_theta: bool = False,
    read: tuple[str, ...] = (),
    is_mrope: bool = False,
    default: Mapping[str, Any] | None = None,
    original: int | None = None,
) -> RopeSpec:
    """A rotary section of a config, from `keys`, or `default` without one.

    `is_partial` tells that `dim` follows the config's `partial_rotary_factor`, and `reads_theta` that `base` follows
    its `rope_theta`; `read` are further keys of the section that the layout reads. `original` is the trained length
    where the architecture has a default for it. With `is_mrope`, parts of a head rotate by other positions in images
    (`mrope_section`, Qwen2-VL, arXiv 2409.12191); the positions of text are equal, so the tables are the plain ones.
    Raises ConfigError for an odd `dim`, a scaling type that is not in `allow`, and a key or value that the type does
    not have.
    """
    if not base > 0:
        raise ConfigError(f"{hf.path}: the base frequency of the rotation must be positive, got {base:g}")
    if dim % 2:
        raise ConfigError(f"{hf.path}: the number of rotated components of a head must be even, got {dim}")
    if not is_partial:
        _require_whole_heads(hf, "partial_rotary_factor", hf.data.get("partial_rotary_factor"))
    name, section = _section(hf, keys)
    if section is None and default is not None:
        name, section = "the default rope section", default
    if section is None:
        return RopeSpec(base, dim, max_position)
    section = _without_mrope(hf, section, dim) if is_mrope else section
    kind = _type_of(hf, name, section)
    if kind == "dynamic" and section.get("alpha") and "ntk_alpha" in allow:
        kind = "ntk_alpha"
    if kind == "longrope" and "longrope_mscale" in allow:
        kind = "longrope_mscale"
    section = {key: value for key, value in section.items() if key not in read or _is_parameter(key)}
    if kind not in allow:
        raise ConfigError(f"{hf.path}: rope scaling '{kind[:40]}' is not supported; known are {', '.join(allow)}")
    if not reads_theta and section.get("rope_theta") not in (None, base):
        raise ConfigError(
            f"{hf.path}: '{name}.rope_theta' must equal the base frequency {base:g}, "
            f"got {shown(section['rope_theta'])}; remove one of the two"
        )
    if not is_partial:
        _require_whole_heads(hf, f"{name}.partial_rotary_factor", section.get("partial_rotary_factor"))
    scaling = _checked(hf, name, kind, section, dim)
    if kind == "default":
        return RopeSpec(base, dim, max_position)
    if "original_max_position_embeddings" in SCALINGS[kind].optional:
        # Phi-3 has it next to the scaling; there it takes precedence.
        trained = hf.opt_int("original_max_position_embeddings")
        trained = trained if trained is not None else original
        if trained is not None:
            _check_value(hf, "original_max_position_embeddings", kind, trained, "positive", dim)
            scaling["original_max_position_embeddings"] = float(trained)
    return RopeSpec(base, dim, max_position, {**scaling, "rope_type": kind})


def _section(hf: HFConfig, keys: tuple[str, ...]) -> tuple[str, Mapping[str, Any] | None]:
    """The name of the section and the section, merged if the config has both forms."""
    if not keys:
        return "", None
    *new, old = keys if keys[-1] == "rope_scaling" else (*keys, "")
    scaling = hf.mapping(old) if old else None
    found = hf.mapping(*new) if new else None
    if new and "." in new[0]:
        _require_nested(hf, new[0].split(".")[0])
    name = next((key for key in new if hf.has(key)), "")
    if not scaling:  # transformers takes an empty `rope_scaling` for an absent one
        return (name, found) if found is not None else (old, scaling)
    if not found:
        return old, scaling
    if "." in name:  # one section per layer type, which rope_scaling updates
        return old, {**_without_type(found), **scaling}
    theirs, ours = _parameters_of(hf, name, found), _parameters_of(hf, old, scaling)
    if theirs != {"rope_type": "default"} and theirs != ours:
        raise ConfigError(
            f"{hf.path}: '{name}' and '{old}' are two different rope scalings; remove the one that is not meant"
        )
    return old, scaling


def _parameters_of(hf: HFConfig, name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in section.items() if key not in _READ_ELSEWHERE and value is not None}
    return {**values, "rope_type": _type_of(hf, name, section)}


def _without_type(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in ("rope_type", "type")}


def _without_mrope(hf: HFConfig, section: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """The section with the rotation of text: without the keys of mrope, of which `mrope` is the older type name."""
    parts = section.get("mrope_section")
    if parts is not None and not (isinstance(parts, list) and all(map(_is_size, parts)) and sum(parts) == dim // 2):
        raise ConfigError(
            f"{hf.path}: 'mrope_section' must be a list of sizes with the sum {dim // 2}, half of the rotated "
            f"components, got {shown(parts)}"
        )
    found = {key: value for key, value in section.items() if key not in ("mrope_section", "mrope_interleaved")}
    return found | {key: "default" for key in ("rope_type", "type") if found.get(key) == "mrope"}


def _require_nested(hf: HFConfig, name: str) -> None:
    """Refuses parameters outside the sections of the layer types, which would be read by none of them."""
    for key, value in (hf.mapping(name) or {}).items():
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"{hf.path}: '{name}.{shown(key)[1:-1]}': expected an object for a layer type, got {shown(value)}; "
                "move the parameters into the sections of the layer types"
            )


def _type_of(hf: HFConfig, name: str, section: Mapping[str, Any]) -> str:
    named, older = section.get("rope_type"), section.get("type")
    kind = named if named is not None else older if older is not None else "default"
    if not isinstance(kind, str):
        raise ConfigError(f"{hf.path}: the type of the rope scaling must be text, got {shown(kind)}")
    if older is not None and older != kind:
        raise ConfigError(
            f"{hf.path}: '{name}.rope_type' is {shown(kind)}, but '{name}.type' is {shown(older)}; remove one of them"
        )
    return kind


def _require_whole_heads(hf: HFConfig, name: str, value: object) -> None:
    """Refuses a partial rotation, for layouts that rotate whole heads."""
    if value is not None and (isinstance(value, bool) or value != 1):
        raise ConfigError(f"{hf.path}: '{name}' must be absent or 1.0 for this architecture, got {shown(value)}")


def _checked(hf: HFConfig, name: str, kind: str, section: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """The parameters of the scaling. Raises ConfigError for an unknown key, and for a value of the wrong kind."""
    known = {**SCALINGS[kind].required, **SCALINGS[kind].optional}
    for key, value in section.items():
        no_effect = _NO_EFFECT.get((kind, key), ())
        if key not in known and key not in _READ_ELSEWHERE and value is not None and value not in no_effect:
            expected = ", ".join(known) or "none"
            raise ConfigError(
                f"{hf.path}: '{name}.{shown(key)[1:-1]}' is not a parameter of rope scaling '{kind}', which might "
                f"change the model; known are {expected}"
            )
    for key, expects in known.items():
        if section.get(key) is not None or key in SCALINGS[kind].required:
            _check_value(hf, key, kind, section.get(key), expects, dim)
    found = {key: section[key] for key in known if section.get(key) is not None}
    return {key: _as_floats(value) for key, value in found.items()}


def _as_floats(value: Any) -> Any:
    if isinstance(value, list):
        return [float(item) for item in value]
    return value if isinstance(value, bool) else float(value)


def _check_value(hf: HFConfig, key: str, kind: str, value: object, expects: Kind, dim: int) -> None:
    label = f"{hf.path}: '{key}' of rope scaling '{kind}'"
    match expects:
        case "bool":
            if not isinstance(value, bool):
                raise ConfigError(f"{label} must be true or false, got {_got(value)}")
        case "number":
            if not (_is_positive(value) or (not isinstance(value, bool) and value == 0)):
                raise ConfigError(f"{label} must be a number of at least 0, got {_got(value)}")
        case "positive":
            if not _is_positive(value):
                raise ConfigError(f"{label} must be a positive number, got {_got(value)}")
        case "numbers":
            if not isinstance(value, list) or len(value) != dim // 2:
                got = f"{len(value)}" if isinstance(value, list) else _got(value)
                raise ConfigError(f"{label} must be a list of {dim // 2} numbers, got {got}")
            for index, item in enumerate(value):
                if not _is_positive(item):
                    raise ConfigError(
                        f"{hf.path}: {key}[{index}] of rope scaling '{kind}' must be a positive number, "
                        f"got {_got(item)}"
                    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _got(value: object) -> str:
    return "nothing" if value is None else shown(value)
