"""Writes the fields of a layout's config class, and the expressions that read them from config.json."""

from dataclasses import dataclass, replace

from sageLLM.codegen.model.layout import ConfigName, ModelDef
from sageLLM.codegen.render import lit


@dataclass(frozen=True, slots=True)
class FieldView:
    """A field of the config class, and the Python expression that reads it from config.json."""

    name: str
    type: str
    doc: str
    read: str


def config_fields(model: ModelDef) -> list[FieldView]:
    """The fields in definition order, since an expression may use earlier fields."""
    return [FieldView(name.name, name.python_type, _sentence(name), _read(name)) for name in model.config.values()]


def _sentence(name: ConfigName) -> str:
    return name.doc[:1].upper() + name.doc[1:].rstrip(".") + "."


def _read(name: ConfigName) -> str:
    """The expression that reads a config name; a name without a key has its constant or computed value."""
    if not name.keys:
        return _default(name) if name.default is not None else "None"
    keys = ", ".join(map(lit, name.keys))
    if name.texts:
        numbers = "".join(f"{number!r} if hf.is_text({lit(text)}, {keys}) else " for text, number in name.texts)
        return f"{numbers}{_read(replace(name, texts=()))}"
    if name.if_null is None:
        return _read_key(name, keys)
    return f"{_default(name.if_null)} if hf.is_null({keys}) else {_read_key(replace(name, if_null=None), keys)}"


def _read_key(name: ConfigName, keys: str) -> str:
    if name.items is not None:
        length = ", length=L" if name.items == "layers" else ""
        read = f"hf.items({keys}, kind={name.type}{length})"
        has = "has_items" if name.items == "layers" else "has"
        return read if name.default is None else f"{read} if hf.{has}({keys}) else {_default(name)}"
    if name.default == "None":
        return f"hf.opt_{name.type}({keys})"
    if name.default is not None and name.value is None:
        # Evaluated only when the key is absent: the default of a present key may be undefined.
        return f"hf.{name.type}({keys}) if hf.has({keys}) else {_default(name)}"
    default = f", default={name.default}" if name.default is not None else ""
    return f"hf.{name.type}({keys}{default})"


def _default(name: ConfigName) -> str:
    """The default as an expression that checks its type, and reports the formula if evaluating it fails."""
    text = str(name.default)
    if name.items is not None and name.formula:
        return f"hf.per_layer({lit(name.name)}, {lit(name.formula)}, L, lambda i: {text})"
    if name.items == "layers":
        return f"hf.one_per_layer({lit(name.name)}, {text}, L)"
    if name.formula:
        text = f"hf.computed({lit(name.name)}, {lit(name.formula)}, lambda: {text})"
    return f"hf.sized({lit(name.name)}, {text})" if name.type == "size" and name.value is None else text
