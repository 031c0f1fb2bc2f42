"""Detects quantised checkpoints: by config.json, by the settings files of quantisation tools, and by tensors.

Detection is separate from support. A format that the engine cannot load is refused by its name, in one line, before its
tensors are compared with the layout.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.checkpoint import ignore_patterns, is_ignored
from sageLLM.runtime.core.model.formats import QuantMethod
from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.checkpoint_index import StoredTensor
from sageLLM.runtime.loader.config_file import NESTED_CONFIGS, text_section
from sageLLM.runtime.loader.json_files import read_json

FLOATS = ("float32", "bfloat16", "float16", "float64")
# The keys of config.json, with the method of a section that does not name one.
CONFIG_KEYS = {"quantization_config": "unknown", "compression_config": "compressed-tensors", "quantization": "mlx"}
# The settings files of AutoGPTQ, AutoAWQ and ModelOpt, with the method of a file that does not name one.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
METHOD_KEYS = ("quant_method", "quant_algo", "quant_type", "method")
BIT_KEYS = ("bits", "w_bit", "wbits", "num_bits", "nbits")

# Endings of tensor names, then last parts of names, and the format that writes them. The first entry that occurs
# decides: GPTQ writes the first three last parts, AWQ the second and third.
_ENDINGS = {"_blocks": "mxfp4", "._data": "quanto"}
_LAST_PARTS = {
    "g_idx": "gptq",
    "qzeros": "awq",
    "qweight": "int4 packed in int32",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8",
    "SCB": "bitsandbytes",
    "weight_format": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "codebooks": "aqlm",
    "Qidxs": "quip#",
    "W_q": "hqq",
    "weight_scale_2": "nvfp4",
    "weight_zero_point": "compressed-tensors",
    "weight_scale": "8-bit weights with scales",
    "weight_scales": "8-bit weights with scales",
    "input_scale": "8-bit weights with scales",
    "scale_weight": "8-bit weights with scales",
}
# Element types of weights only; int64 and bool occur as indices and masks.
_PACKED_DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")


@dataclass(frozen=True, slots=True)
class Quantization:
    """The format of a quantised checkpoint: its method, as `quant_method` spells it, details, and where it was found.

    `settings` is the section of the config or the settings file, empty if the format was found by tensors.
    """

    method: str
    source: str
    details: str = ""
    settings: Mapping[str, Any] | None = None


def find_in_config(config: Mapping[str, Any], folder: Path | None) -> Quantization | None:
    """The format that config.json names, or else a settings file of a quantisation tool in the folder.

    Raises CheckpointError for a damaged settings file.
    """
    for prefix, section in _sections(config):
        for key, method in CONFIG_KEYS.items():
            if section.get(key) is not None:
                return _declared(section[key], f"'{prefix}{key}' in config.json", method)
    for name, method in SETTINGS_FILES.items() if folder is not None else ():
        path = Path(str(folder), name)
        if path.is_file() and (found := _declared(read_json(path), name, method)) is not None:
            return found
    return None


def find_in_tensors(
    layout: ModelLayout, config: Any, tensors: Mapping[str, StoredTensor], *, matches: bool
) -> Quantization | None:
    """The format that the tensors show: by their names unless they match the layout, else by their element types."""
    patterns = ignore_patterns(layout, config)
    read = {name: tensor for name, tensor in tensors.items() if not is_ignored(name, patterns)}
    return (None if matches else _in_names(read)) or _in_dtypes(read, matches)


def _in_names(names: Iterable[str]) -> Quantization | None:
    last_parts: dict[str, str] = {}
    endings: dict[str, str] = {}
    for name in names:
        last_parts.setdefault(name.rpartition(".")[2], name)
        for ending in _ENDINGS:
            if name.endswith(ending):
                endings.setdefault(ending, name)
    for table, found in ((_ENDINGS, endings), (_LAST_PARTS, last_parts)):
        for key, method in table.items():
            if key in found:
                return Quantization(method, f"tensor {_shown_name(found[key])}")
    return None


def _in_dtypes(tensors: Mapping[str, StoredTensor], matches: bool) -> Quantization | None:
    """The format that the element types show: the first tensor that does not hold floats of 16 bits or more.

    A checkpoint that does not match the layout may have other tensors, such as indices and masks, which are skipped.
    """
    for name, tensor in tensors.items():
        if tensor.dtype is None or tensor.dtype in FLOATS:
            continue
        if matches or tensor.dtype in _PACKED_DTYPES or tensor.dtype.startswith("float"):
            return Quantization(tensor.dtype, f"tensor {_shown_name(name)}")
    return None


def method_of(found: Quantization, methods: Mapping[str, QuantMethod]) -> QuantMethod | None:
    """The method with the format, if it is declared by settings and can be loaded."""
    is_declared = found.settings is not None
    return next((one for one in methods.values() if is_declared and one.quant_method == found.method), None)


def why_not_loaded(found: Quantization, methods: Mapping[str, QuantMethod]) -> str | None:
    """The reason to refuse a checkpoint of the format, or None if it can be loaded."""
    if method_of(found, methods) is not None:
        return None
    details = f", {found.details}" if found.details else ""
    text = f"the checkpoint is quantised ({found.method}{details}: {found.source})"
    known = sorted(one.quant_method for one in methods.values() if one.quant_method is not None)
    if found.settings is None and found.method in known:
        return f"{text}, and config.json must have its settings in 'quantization_config'; download it again"
    return (
        f"{text}, which is not supported; "
        f"use a checkpoint in one of {', '.join(known)}, or with float32, bfloat16 or float16 weights"
    )


def refuse_unsupported(found: Quantization | None, folder: Path, methods: Mapping[str, QuantMethod]) -> None:
    """Raises CheckpointError for a format that cannot be loaded."""
    if found is not None and (reason := why_not_loaded(found, methods)) is not None:
        raise CheckpointError(f"{folder}: {reason}")


def _sections(config: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield "", config
    for name in NESTED_CONFIGS:
        if (section := text_section(config, name)) is not config:
            yield f"{name}.", section


def _declared(settings: object, source: str, default: str) -> Quantization | None:
    """The format of a section or settings file; None if it says that weights are not quantised."""
    if not isinstance(settings, Mapping):
        return Quantization(shown(settings), source)
    inner = settings.get("quantization")
    if isinstance(inner, Mapping):  # ModelOpt
        if inner.get("quant_algo") is None:
            return None  # only the KV cache is quantised, which is not a property of the weights
        return Quantization("modelopt", source, _details(inner), inner)
    return Quantization(_method(settings) or default, source, _details(settings), settings)


def _method(settings: Mapping[str, Any]) -> str | None:
    if settings.get("load_in_8bit") is True or settings.get("load_in_4bit") is True:
        return "bitsandbytes"
    return next((_printable(settings[key]) for key in METHOD_KEYS if isinstance(settings.get(key), str)), None)


def _details(settings: Mapping[str, Any]) -> str:
    """The element type, layout and width, as far as the settings have them: "pack-quantized, 4 bits"."""
    texts = [settings[key] for key in ("format", "quant_algo", "fmt") if isinstance(settings.get(key), str)]
    details = [_printable(text) for text in texts[:1]]
    if settings.get("load_in_8bit") is True:
        details.append("8 bits")
    elif settings.get("load_in_4bit") is True:
        details.append("4 bits")
    else:
        bits = next((settings[key] for key in BIT_KEYS if isinstance(settings.get(key), int)), None)
        details += [] if bits is None else [f"{shown(bits)} bits"]
    return ", ".join(details)


def _printable(text: str) -> str:
    """A short text from a file, without control characters."""
    return "".join(char for char in text[:40] if char.isprintable())


def _shown_name(name: str) -> str:
    return f"{name[:200]!r}"
