"""Emits quantisation methods: a declaration per file, the values of weights as torch functions, tables, and pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sageLLM.codegen.contents import Contents
from sageLLM.codegen.emit.docs import _cell, _code, page, table
from sageLLM.codegen.emit.format_blocks import BlockStoresText
from sageLLM.codegen.emit.format_stores import StoresText
from sageLLM.codegen.emit.format_text import FormatText
from sageLLM.codegen.model.format import Extent, FormatDef, MethodDef, StoredTensor, key_of_state
from sageLLM.codegen.model.format_blocks import block_stores_of
from sageLLM.codegen.model.format_codes import codes_of
from sageLLM.codegen.model.format_stores import stores_of
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header, ident, lit
from sageLLM.codegen.schema.formats import ArchitectureSpec, FormatsFile, Setting

FOLDER = "formats"
BASE = "sageLLM.generated.formats.values.algebra"


@dataclass(frozen=True, slots=True)
class FormatView:
    """A format as its templates read it."""

    format: FormatDef
    text: FormatText

    @property
    def stores(self) -> StoresText | BlockStoresText | None:
        """The function of the stored tensors, if checkpoints of the format are written."""
        if not self.format.spec.write:
            return None
        if self.format.block_bytes is not None:
            blocks = block_stores_of(self.format)
            return None if blocks is None else BlockStoresText(self.format, blocks)
        found = stores_of(self.format)
        return None if found is None else StoresText(self.format, found)

    @property
    def is_written_in_blocks(self) -> bool:
        """Whether blocks of the format are written."""
        return isinstance(self.stores, BlockStoresText)

    @property
    def written(self) -> tuple[str, ...]:
        """The arguments of `Written` as text, empty if such weights are not written."""
        if (text := self.stores) is None:
            return ()
        spec = self.format.spec
        schemes = {name: {key: _value(one) for key, one in settings.items()} for name, settings in spec.write.items()}
        if isinstance(text, BlockStoresText):
            codes, ranges = text.stores.codes, dict(text.stores.ranges)
            block = f"BlockCodes({lit(int(codes.group))}, {lit(tuple(text.parts))}, {lit(ranges)})"
            return (*map(lit, (schemes, codes.kind, "", False, spec.scales, None)), block, lit(spec.incomplete))
        stores = text.stores
        facts = (schemes, stores.kind, stores.scales.name, stores.zeros is not None, spec.scales, spec.shape)
        return tuple(map(lit, facts))

    @property
    def layout_name(self) -> str:
        """The constant with the fields of a block."""
        return self.format.name.upper()

    def parameters(self, tensors: list[str], sizes: list[str]) -> str:
        """The parameters of a function of tensors, and of numbers by keyword."""
        numbers = ["*", *(f"{ident(name)}: int" for name in sizes)] if sizes else []
        return ", ".join([*(f"{ident(name)}: Tensor" for name in tensors), *numbers])

    def dims(self, tensor: StoredTensor) -> str:
        """The dims of a stored tensor as a tuple of products: `(N, K * "b" / 32)`."""
        texts = []
        for one in tensor.dims:
            terms = [*(f" * {lit(term)}" for term in one.times), *(f" / {lit(term)}" for term in one.over)]
            texts.append("".join([ident(one.dim), *terms]))
        return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"

    @staticmethod
    def key(text: str) -> str:
        """The key of the state without its mark."""
        return key_of_state(text)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that differ from the defaults of `Format`."""
        spec = self.format.spec
        found: dict[str, Any] = {
            "weight": self.format.weight if self.format.weight != ("N", "K") else (),
            "when": self.format.when,
            "sizes": {name: size for name, size in spec.sizes.items() if not key_of_state(size)},
            "state": tuple(spec.state),
            "state_sizes": {name: key for name, size in spec.sizes.items() if (key := key_of_state(size))},
            "unused": tuple(spec.unused),
            "block_bytes": self.format.block_bytes,
        }
        found = {name: value for name, value in found.items() if value}
        found |= {"suffix": spec.name} if spec.name != ".weight" else {}
        return found | ({"separator": spec.separator} if spec.separator != "." else {})

    @property
    def doc(self) -> str:
        """The docstring of the function: the format and its equation."""
        lines = [f"{name} = {text}" for name, text in self.format.spec.let.items()]
        lines.append(f"w[{', '.join(self.format.weight)}] = {self.format.spec.value}")
        return "\n".join([self.format.spec.summary, "", *lines])


def emit_method(method: MethodDef, renderer: Renderer, *, is_overlay: bool) -> list[Output]:
    """`formats/awq.py` with `AWQ = QuantMethod(...)`, `formats/values/awq.py` with a function per format, the page."""
    spec, ref = method.spec, method.entry.ref
    formats = [FormatView(one, FormatText(one, codes_of(one))) for one in method.formats]
    fields = {"groups": spec.groups, "skip": tuple(spec.skip), "keys": tuple(spec.keys), "writes": spec.writes}
    fields["activations"] = spec.activations
    fields = {name: value for name, value in fields.items() if value}
    about = header(method.entry.doc.file, method.name)
    defaults, architectures = _architectures(spec)
    dims = sorted({extent.dim for one in method.formats for tensor in one.tensors for extent in tensor.dims})
    declared = renderer.render(
        "format.py.jinja",
        method=method,
        formats=formats,
        fields=fields,
        dims=dims,
        defaults=defaults,
        architectures=architectures,
    )
    helpers = BASE if is_overlay else ".algebra"
    names = sorted(
        [one.name for one in method.formats]
        + [f"{one.format.name}_codes" for one in formats if one.text.codes]
        + [f"{one.format.name}_stored" for one in formats if one.stores]
    )  # as ruff orders `__all__`
    values = renderer.render("format_values.py.jinja", method=method, formats=formats, names=names, helpers=helpers)
    return [
        Output(f"{FOLDER}/{method.name}.py", about + declared, (ref,)),
        Output(f"{FOLDER}/values/{method.name}.py", about + values, (ref,)),
        _method_page(method),
    ]


def emit_format_support(specs: Specs, renderer: Renderer) -> list[Output]:
    """`formats/values/algebra.py`, the functions of the expressions, which an overlay uses from the package."""
    if specs.is_overlay:
        return []
    text = header("specs/formats", "formats") + renderer.render("format_algebra.py.jinja")
    return [Output(f"{FOLDER}/values/algebra.py", text)]


def emit_format_table(contents: Contents, renderer: Renderer) -> list[Output]:
    """`formats/__init__.py` with METHODS, and `formats/values/__init__.py` with VALUES."""
    names = [one.name for one in contents.formats]
    about = header("specs/formats", "formats")
    return [
        Output(f"{FOLDER}/__init__.py", about + renderer.render("formats_registry.py.jinja", names=names)),
        Output(f"{FOLDER}/values/__init__.py", about + renderer.render("format_values_registry.py.jinja", names=names)),
    ]


def _architectures(spec: FormatsFile) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The fields of the defaults and of each architecture that differ from those of `Architecture`."""

    def fields_of(one: ArchitectureSpec) -> dict[str, Any]:
        given = {name: getattr(one, name) for name in type(one).model_fields if name in one.model_fields_set}
        return {name: _frozen(value) for name, value in given.items()}

    return fields_of(spec.architecture_defaults), {name: fields_of(one) for name, one in spec.architectures.items()}


def _frozen(value: Any) -> Any:
    """Lists as tuples, also in mappings."""
    if isinstance(value, dict):
        return {key: _frozen(one) for key, one in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _method_page(method: MethodDef) -> Output:
    parts = [_cell(method.spec.summary)]
    if method.spec.quant_method is not None:
        parts.append(f"`quant_method` in config.json: `{method.spec.quant_method}`.")
    parts += [_format_section(one) for one in method.formats]
    title = f"Formats: {method.name}"
    return page(f"docs/formats/{method.name}.md", title, method.entry.doc.file, parts, [method.entry.ref])


def _format_section(one: FormatDef) -> str:
    """Tensors, value and shards of a format."""
    rows = [(_code(tensor.name), _code(str(tensor))) for tensor in one.tensors]
    lines = [f"{name} = {text}" for name, text in one.spec.let.items()]
    facts = [
        *((_code(key), " or ".join(_code(_setting(value)) for value in values)) for key, values in one.when.items()),
        *((_code(name), _code(str(size))) for name, size in one.spec.sizes.items()),
        ("shards along", "; ".join(_shards(one.weight, one.tensors)) or "any"),
        *([("bytes of a block", str(one.block_bytes))] if one.block_bytes is not None else []),
    ]
    return "\n\n".join(
        [
            f"## {one.name}",
            _cell(one.spec.summary),
            table(("tensor", "type"), rows),
            "```\n" + "\n".join([*lines, f"[{', '.join(one.weight)}] = {one.spec.value}"]) + "\n```",
            table(("", ""), facts),
        ]
    )


def _value(value: Setting | list[int]) -> Setting | tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else value


def _setting(value: str | int | bool | None) -> str:
    return "absent" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _shards(weight: Sequence[str], tensors: Sequence[StoredTensor]) -> list[str]:
    """The multiples at which a weight may be cut along its dims."""
    found = []
    for dim in weight:
        cuts = {_multiple(extent) for one in tensors for extent in one.dims if extent.dim == dim}
        if cuts := cuts - {"1"}:
            found.append(f"{dim} at multiples of {', '.join(sorted(cuts))}")
    return found


def _multiple(extent: Extent) -> str:
    above, below = "*".join(map(str, extent.times)), "*".join(map(str, extent.over))
    return f"{below or 1}/{above}" if above else below or "1"
