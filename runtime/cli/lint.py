"""Command `sagellm lint model`: checks a checkpoint's config, and its index if present, without weights or a GPU."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.formats import QuantMethod
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.model.layout_table import LayoutTable
from sageLLM.runtime.core.model.stored import with_stored_names, with_stored_shapes, with_stored_ties
from sageLLM.runtime.core.printable import printable
from sageLLM.runtime.errors import MAX_MESSAGE_LEN, SageError
from sageLLM.runtime.inspect.checkpoint_report import DEGREES, Degree, Report, lint_model
from sageLLM.runtime.loader.checkpoint_index import INDEX_FILE, StoredTensor, has_single_file, weight_map
from sageLLM.runtime.loader.config_file import layout_of, read_config_file
from sageLLM.runtime.loader.gguf_folder import WEIGHTS
from sageLLM.runtime.loader.quantization import find_in_config, find_in_tensors, method_of, why_not_loaded
from sageLLM.runtime.loader.sentence_transformers import model_folder
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.registry.trees import BASE, import_folder, layout_table, read_table

FINDINGS = 100
MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class LintRequest:
    """The command's arguments. `target` is "model" or a layout's name; `tp` lists degrees, None for the usual."""

    target: str
    config: Path | None
    index: Path | None
    tp: str | None
    plugins: Sequence[Path]
    as_json: bool


def lint_checkpoint(request: LintRequest) -> int:
    """Prints the report. Exit code 1: an error; 100: the checkpoint is quantised, its tensors differ from those of the
    layout, or a requested degree does not divide.
    """
    try:
        report = _report(request)
    except (SageError, ConfigError, OSError) as error:
        print(f"error: {printable(str(error), MAX_MESSAGE_LEN)}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(report)) if request.as_json else "\n".join(_lines(report)))
    refused = request.tp is not None and any(degree.problem for degree in report.degrees)
    return FINDINGS if report.quantization or report.index or refused else 0


def _report(request: LintRequest) -> Report:
    packages = [BASE, *(import_folder(plugin) for plugin in request.plugins)]
    layouts = layout_table(packages)
    methods: dict[str, QuantMethod] = read_table(packages, "formats", "METHODS")
    if request.config is not None:
        request = replace(request, config=model_folder(request.config))
    layout, data, path = _config(request, layouts)
    config = layout.read_config(HFConfig(data, path))
    folder = request.config if request.config is None or request.config.is_dir() else request.config.parent
    found = find_in_config(data, folder)
    is_loaded = found is not None and method_of(found, methods) is not None
    tensors = _tensors(request, is_quantized=is_loaded) if found is None or is_loaded else None
    shapes = None if tensors is None else {name: tensor.shape for name, tensor in tensors.items()}
    if shapes is not None:
        layout = with_stored_shapes(with_stored_names(layout, shapes), shapes)
        layout = with_stored_ties(layout, config, shapes, lambda owner, spec: True)
    report = lint_model(layout, config, path, _degrees(request.tp), shapes)
    if tensors is not None and not is_loaded:
        found = find_in_tensors(layout, config, tensors, matches=not report.index)
    if found is None or (reason := why_not_loaded(found, methods)) is None:
        return report
    return replace(report, quantization=reason, index=None, index_tensors=None)


def _config(request: LintRequest, layouts: LayoutTable) -> tuple[ModelLayout, Mapping[str, Any], str]:
    """The layout, its config, and the name of the config: from the file, or the layout's own small one."""
    layout = layouts.get(request.target)
    if layout is None and request.target != "model":
        raise SageError(f"unknown layout '{request.target}'; use `model`, or one of {', '.join(layouts)}")
    if request.config is None:
        if layout is None:
            raise SageError("the config.json is missing; use `sagellm lint model --config FILE`")
        return layout, layout.tiny, f"{layout.name}: tests.tiny"
    path = request.config / "config.json" if request.config.is_dir() else request.config
    data = read_config_file(path)
    return layout or layout_of(data, path, layouts), data, str(path)


def _tensors(request: LintRequest, *, is_quantized: bool) -> Mapping[str, StoredTensor] | None:
    """The tensors in the index of the request, else those in the folder of the config; None without either.

    Those of a quantised checkpoint are its weights, which an index alone does not tell.
    """
    if is_quantized and (request.config is None or not _has_weights(request.config)):
        return None
    if request.index is not None and not is_quantized:
        return dict.fromkeys(weight_map(request.index), StoredTensor())
    if request.config is None or not request.config.is_dir():
        return None
    if not _has_weights(request.config):
        index = request.config / INDEX_FILE
        return dict.fromkeys(weight_map(index), StoredTensor()) if index.is_file() else None
    from sageLLM.runtime.loader.open_checkpoint import open_checkpoint  # torch, only for headers

    return open_checkpoint(request.config, load_registry(request.plugins)).stored()


def _has_weights(folder: Path) -> bool:
    """Whether the folder has all files of the weights."""
    if not folder.is_dir():
        return False
    if has_single_file(folder) or (folder / WEIGHTS).exists():
        return True
    index = folder / INDEX_FILE
    return index.is_file() and all((folder / file).is_file() for file in set(weight_map(index).values()))


def _degrees(text: str | None) -> tuple[int, ...]:
    if text is None:
        return DEGREES
    try:
        degrees = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise SageError(f"--tp: expected degrees by commas, such as 1,2,4, got '{text[:40]}'") from None
    if any(degree < 1 for degree in degrees):
        raise SageError(f"--tp: degrees must be at least 1, got '{text[:40]}'")
    return degrees


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.config}: {report.layout} ({report.spec})"
    yield f"  tensors       {report.tensors:,}"
    yield f"  parameters    {report.parameters:,}"
    if report.quantization is not None:
        yield f"  quantised     {report.quantization}"
    else:
        yield f"  bytes         {_by_dtype(report.bytes)}"
    yield f"  KV per token  {_by_dtype(report.kv_bytes_per_token)}"
    yield from (f"  tp {degree.tp:<11}{_degree_words(degree)}" for degree in report.degrees)
    if report.index is None:
        return
    if not report.index:
        yield f"  index         {report.index_tensors:,} tensors, exactly those of the layout"
        return
    yield f"  index         {report.index_tensors:,} tensors, which differ from the layout:"
    yield from (f"    {problem}" for problem in report.index[:MAX_SHOWN])
    if len(report.index) > MAX_SHOWN:
        yield f"    and {len(report.index) - MAX_SHOWN} more"


def _by_dtype(numbers: Mapping[str, int]) -> str:
    return "  ".join(f"{dtype} {number:,}" for dtype, number in numbers.items())


def _degree_words(degree: Degree) -> str:
    if degree.problem is not None:
        return f"no: {degree.problem}"
    padded = f", the vocabulary padded to {degree.padded_vocab:,}" if degree.padded_vocab is not None else ""
    return f"divides{padded}; {degree.parameters:,} parameters per rank"
