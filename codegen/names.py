"""Names that are distinct in the specs but collide in generated code, and names that generated code cannot have.

`rope_2d` and `rope2d` would both be the class Rope2d; two rules of one name would be one function.
"""

import builtins
import keyword
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sageLLM.codegen.contents import class_name

_NOUNS = {"ops": "op", "passes": "pass"}
_WORD = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
VALUES = frozenset(
    {"cast", "device", "dims", "dist", "math", "process_group", "row_tile", "split_tile", "tl", "torch", "triton"}
    | {"kv_rows", "kv_values", "kv_width", "wide"}
)
"""Functions and modules that generated functions use, which no value of an op may hide."""
FUNCTIONS = (
    VALUES
    | {"check_dtypes", "check_precision", "check_rule", "check_types", "consumer_of", "describe_consumers"}
    | {"describe_producer", "exp2_difference", "find_group", "has_default", "is_known", "max_and_index", "normalized"}
    | {
        "add_part",
        "cache",
        "choose",
        "current_target",
        "driver",
        "find_item",
        "gated_product",
        "head_blocks",
        "is_latent",
        "load_columns",
        "product",
    }
    | {"load_rows", "score_keys", "score_latent", "split_length", "why_reference"}
    | {"aligned", "code_values", "e4m3_values", "largest_magnitude", "load_scales", "scale_of_codes"}
    | {"store_codes", "store_encoded", "store_scales"}
    | {"by_group", "configuration", "decoded", "field", "stored", "weight_tile"}
    | {"online_softmax", "os", "pytest", "rint", "rounded", "sageLLM", "sagellm", "set_process_group", "sink_scores"}
    | {
        "amax",
        "amin",
        "cummax",
        "cummin",
        "dense",
        "float_of",
        "floor_divide",
        "floor_remainder",
        "integer_power",
        "key_of",
        "larger",
        "last_column",
        "next_largest",
        "power",
        "smaller",
    }
    | {"kv_scale", "size_of", "bool", "i8", "i32", "i64", "f16", "bf16", "f32", "f64"}
    | frozenset(keyword.kwlist)
    | frozenset(dir(builtins))
)
"""Names that no op, rule or pass may have, as modules with generated functions use them."""
PREFIXES = ("has_", "reference_")
"""`has_w` is a size of costs, 1 if the operand is present; `reference_linear` is an import of Triton modules."""
CLASSES = frozenset(
    {"AttrSpec", "AttrValue", "Callable", "Call", "Configuration", "DecodePlan", "Dim", "ElementType", "ExecutionGraph"}
    | {"CODED", "COVERED", "FunctionPass", "Mapping", "Routing", "TARGETS", "TEMPLATES", "Target"}
    | {"GraphWriter", "MemoryPass", "MergePass", "NamedTuple", "NearMiss", "NewCall", "OpNode", "OpType"}
    | {"OpTypeBase", "OptimizationPass", "PlacePass", "PrefetchPass", "Rewrite", "RewritePass", "Rule", "Share"}
    | {"StreamPass", "Tensor", "TensorRef", "Tile", "Where", "Any", "None", "True", "False"}
)
"""Classes that generated modules import, and constants that are words of Python."""
DIMS = CLASSES | frozenset(
    {"BUFSIZ", "EOF", "INFINITY", "MAXFLOAT", "NAN", "NULL", "SNAN"}  # macros of C headers
    | {"AttentionCall", "AttentionHooks", "Block", "Cache", "CandidateFilters", "ContiguousKeys", "Floats", "GemmArgs"}
    | {
        "GemmParts",
        "Ints",
        "KeyRange",
        "KvRow",
        "Max",
        "MICROKERNEL",
        "Microkernel",
        "PANEL",
        "PagedKeys",
        "Part",
        "Route",
        "Routes",
        "Routing",
    }
    | {"SampleEpilogue", "Scratch", "Sum", "TUNING", "Tuning", "Weight"}
    | {"CASES", "KERNELS", "LARGEST", "LOG2E", "OPS", "PASSES", "ROWS", "SAGE"}
)
"""Names that no dim or element type may have: they are variables in kernels of all targets."""


METHODS = ("algebra", "values")
"""Modules next to those of quantisation methods."""


@dataclass(frozen=True, slots=True)
class Named:
    """An entry of a spec file, and names that it declares: `symbols` of ops, `blocks` of models, `rules` of passes.

    Each symbol and each rule comes with the field that declares it.
    """

    kind: str
    name: str
    file: str
    declares: Mapping[str, Any]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.file).stem


@dataclass(frozen=True, slots=True)
class Clash:
    """A finding about an entry: a sentence, the place inside the entry, and the other entry with the place there."""

    message: str
    entry: Named
    path: tuple[str | int, ...] = ()
    other: Named | None = None
    other_path: tuple[str | int, ...] = ()


def clashes(entries: Iterable[Named], base: frozenset[str]) -> Iterator[Clash]:
    """All clashes; an entry of the package's files, `base`, is never the one that must be renamed."""
    entries = sorted(entries, key=lambda entry: entry.file not in base)
    own = [entry for entry in entries if entry.file not in base]
    for entry in own:
        yield from _unusable(entry)
    yield from _shared_classes(entries)
    yield from _shared_rules(entries)
    yield from _shared_files(own)
    yield from _symbols_of_files(own)
    yield from _packed_names(own)
    yield from _block_names(entries, base)


def declared_names(kind: str, spec: Any) -> dict[str, Any]:
    """The names that an entry declares, as JSON values, see Named."""
    match kind:
        case "ops":
            dim_attrs = [name for name, attr in spec.attrs.items() if attr.type == "dim"]
            declared = {"dims": spec.dims, "types": spec.types, "attrs": dim_attrs}
            return {"symbols": [[key, name] for key, names in declared.items() for name in names]}
        case "models":
            return {"blocks": list(spec.blocks)}
        case "passes":
            named = [("from_op", rule.from_op) if rule.from_op else ("name", rule.name) for rule in spec.rules]
            return {"rules": [[key, name] for key, name in named]}
    return {}


def why_not_a_function(name: str) -> str | None:
    """The reason why generated code cannot have a function, module or local variable of the name."""
    if not _WORD.match(name):
        return "it must begin with a lower-case letter and contain only lower-case letters, digits and `_`"
    if name in FUNCTIONS or name.startswith(PREFIXES):
        return "generated code uses the name itself"
    return None


def _unusable(entry: Named) -> Iterator[Clash]:
    """Names that generated code cannot have. Those of ops, models and config names are checked when they are linked."""
    if entry.kind in ("ops", "passes") and (why := _why_not_a_stem(entry.stem)):
        yield Clash(f"the file name '{PurePosixPath(entry.file).name}' cannot be used: {why}", entry)
    if entry.kind == "passes":
        if why := why_not_a_function(entry.name):
            yield Clash(f"the pass name '{entry.name}' cannot be used: {why}", entry)
        for i, (key, rule) in enumerate(entry.declares["rules"]):
            if key == "name" and (why := why_not_a_function(rule)):
                yield Clash(f"the rule name '{rule}' cannot be used: {why}", entry, ("rules", i, key))
    if entry.kind in ("ops", "passes") and class_name(entry.name) in CLASSES:
        yield Clash(f"the class {class_name(entry.name)} of '{entry.name}' is a class that generated code uses", entry)
    if entry.kind == "dialects" and (why := why_not_a_function(entry.name)):
        yield Clash(f"the dialect name '{entry.name}' cannot be used: {why}", entry, ("dialect",))
    if entry.kind == "formats":
        why = why_not_a_function(entry.name) or ("a module has the name" if entry.name in METHODS else None)
        if why:
            yield Clash(f"the method name '{entry.name}' cannot be used: {why}", entry, ("method",))
    if entry.kind == "hardware":
        why = why_not_a_function(entry.name) or ("its table has the name" if entry.name == "hardware" else None)
        if why:
            yield Clash(f"the device name '{entry.name}' cannot be used: {why}", entry, ("hardware",))


def _why_not_a_stem(stem: str) -> str | None:
    """Files become Python modules of their own, which may share a name with other modules but not with keywords."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", stem):
        return "it must begin with a letter and contain only letters, digits and `_`"
    return "it is a keyword of Python" if keyword.iskeyword(stem) else None


def _shared_classes(entries: Iterable[Named]) -> Iterator[Clash]:
    seen: dict[str, Named] = {}
    for entry in entries:
        if entry.kind in ("ops", "passes"):
            other = seen.setdefault(class_name(entry.name), entry)
            if other is not entry:
                both = f"the {_NOUNS[entry.kind]} '{entry.name}' and the {_NOUNS[other.kind]} '{other.name}'"
                yield Clash(f"{both} would both be the class {class_name(entry.name)}", entry, other=other)


def _shared_rules(entries: Iterable[Named]) -> Iterator[Clash]:
    """Rules and passes are selected by name, whatever their file."""
    passes = [entry for entry in entries if entry.kind == "passes"]
    seen: dict[str, tuple[Named, tuple[str | int, ...]]] = {entry.name: (entry, ()) for entry in passes}
    for entry in passes:
        for i, (key, rule) in enumerate(entry.declares["rules"]):
            path = ("rules", i, key)
            other, other_path = seen.setdefault(rule, (entry, path))
            of_one_op = {key, *other_path[-1:]} == {"from_op"}  # reported when the rules are linked
            if (other, other_path) != (entry, path) and not of_one_op:
                what = "rule" if other_path else "pass"
                yield Clash(f"the rule '{rule}' has the name of another {what}", entry, path, other, other_path)


def _shared_files(own: Iterable[Named]) -> Iterator[Clash]:
    """Files of one kind that would become one module. Some file systems do not distinguish letter case."""
    seen: dict[tuple[str, str], Named] = {}
    reported = set()
    for entry in own:
        if entry.kind in ("ops", "passes"):
            other = seen.setdefault((entry.kind, entry.stem.lower()), entry)
            if other.file != entry.file and entry.file not in reported:
                reported.add(entry.file)
                module = f"{entry.kind}/{other.stem}.py"
                yield Clash(f"{entry.file} and {other.file} would both be the module {module}", entry, other=other)


def _symbols_of_files(own: Iterable[Named]) -> Iterator[Clash]:
    """Dims and element types, which are module-level names, against classes of the same module."""
    classes: dict[tuple[str, str], Named] = {}
    for entry in own:
        if entry.kind == "ops":
            classes[entry.file, class_name(entry.name)] = entry
    for entry in own:
        for key, symbol in entry.declares.get("symbols", ()):
            path = (key, symbol)
            if symbol in DIMS:
                message = f"'{symbol}' cannot be a dim or element type: generated code uses the name itself"
                yield Clash(message, entry, path)
            elif other := classes.get((entry.file, symbol)):
                message = f"'{symbol}' of '{entry.name}' has the name of the class of '{other.name}'"
                yield Clash(message, entry, path, other)


def _packed_names(own: Iterable[Named]) -> Iterator[Clash]:
    """`linear_packed` is the kernel of `linear` on a packed table."""
    ops = {(entry.file, entry.name): entry for entry in own if entry.kind == "ops"}
    for (file, name), entry in ops.items():
        if name.endswith("_packed") and (other := ops.get((file, name.removesuffix("_packed")))):
            yield Clash(f"'{name}' may also be a kernel of '{other.name}', for packed tables", entry, other=other)


def _block_names(entries: Iterable[Named], base: frozenset[str]) -> Iterator[Clash]:
    """A layout has functions for its blocks, next to those of the ops that it calls."""
    blocks: dict[str, Named] = {}
    for entry in entries:
        for block in entry.declares.get("blocks", ()) if entry.file in base else ():
            blocks.setdefault(block, entry)
    for entry in entries:
        if entry.kind == "ops" and entry.file not in base and (other := blocks.get(entry.name)):
            message = f"the op '{entry.name}' has the name of a block of '{other.name}'"
            yield Clash(message, entry, (), other, ("blocks", entry.name))
