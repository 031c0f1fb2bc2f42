"""Every diagnostic code, once: what it means and what to do. `sagellm explain SAGE006` prints an entry.

Ranges: 0xx YAML and schema, 1xx ops and the compute language, 2xx models, 3xx passes, 5xx the generator itself.
A code keeps its meaning for ever; a code that is no longer used is not given out again.
"""

from typing import NamedTuple


class CodeInfo(NamedTuple):
    """A code's title (a noun phrase) and its explanation (why it is refused, and the remedy)."""

    title: str
    explanation: str


CODES: dict[str, CodeInfo] = {
    # YAML and schema
    "SAGE001": CodeInfo(
        "not valid YAML", "The file does not parse as UTF-8 YAML. The caret shows where reading stopped."
    ),
    "SAGE002": CodeInfo("unreadable file", "The operating system refused to read the file."),
    "SAGE003": CodeInfo(
        "too large or too deep",
        "A spec file may have 256 kB and 64 levels of nesting, so that no input can exhaust the reader.",
    ),
    "SAGE004": CodeInfo("not one document", "A spec file holds exactly one YAML document."),
    "SAGE005": CodeInfo(
        "anchor, alias or tag",
        "Anchors, aliases and tags are refused: a value means what its text says. Write it out.",
    ),
    "SAGE006": CodeInfo("duplicate key", "A mapping names a key twice; most readers would silently keep the last one."),
    "SAGE007": CodeInfo("odd key", "Keys are single-line text; lists, mappings and empty keys are refused."),
    "SAGE008": CodeInfo("number out of range", "Integers have at most 18 digits, floats fit 64 bits."),
    "SAGE010": CodeInfo("unknown field", "The schema has no such field here. The help names the nearest one it has."),
    "SAGE011": CodeInfo("missing field", "The schema requires the field."),
    "SAGE012": CodeInfo(
        "wrong type",
        "The value has another type than the schema wants. Nothing is converted: `off` is text, not false.",
    ),
    "SAGE013": CodeInfo("value refused", "The value has the right type but breaks a rule of the schema."),
    "SAGE014": CodeInfo(
        "unknown kind of file", "The first line names the kind: `schema: ops/v1`, models/v1, passes/v1, ..."
    ),
    "SAGE015": CodeInfo("defined twice", "Two entries of one kind have the same name; both places are shown."),
    # ops and the compute language
    "SAGE101": CodeInfo(
        "expression does not parse",
        "Expressions are one line of Python's arithmetic in plain ASCII: names, numbers, operators and calls.",
    ),
    "SAGE102": CodeInfo(
        "not part of the language",
        "The language has assignments, arithmetic, comparisons and named functions. Attributes, "
        "subscripts, loops and definitions are refused, so that a spec never runs code.",
    ),
    "SAGE103": CodeInfo(
        "too long, too deep or too large",
        "An expression has at most 4000 characters and 32 levels, an integer is at most 2**53, a float is finite.",
    ),
    "SAGE104": CodeInfo(
        "unknown name",
        "No operand, view, attr, dim or earlier result has this name.",
    ),
    "SAGE105": CodeInfo(
        "unknown function",
        "The language has no such function; the help names the nearest one, or all.",
    ),
    "SAGE106": CodeInfo(
        "wrong arguments",
        "A function or op got another number of arguments than it takes, or an attr that it does not have.",
    ),
    "SAGE107": CodeInfo(
        "element types do not fit",
        "Values of different element types never mix: cast one side, so that every rounding is visible. "
        "Literals and attrs adapt.",
    ),
    "SAGE108": CodeInfo(
        "no such dim in the operand",
        "A reduction, dot or gather names a dim that its operand does not have.",
    ),
    "SAGE109": CodeInfo(
        "declared otherwise",
        "A value has another type than the output, view or hook that it is given to.",
    ),
    "SAGE110": CodeInfo(
        "output not written",
        "Every output is written exactly once, whole or by views that cover it.",
    ),
    "SAGE111": CodeInfo(
        "written twice",
        "Every name is written once; choose a new name for a new value.",
    ),
    "SAGE112": CodeInfo(
        "assignment to an input",
        "Inputs are read only. For an output in an input's memory use `inplace`.",
    ),
    "SAGE113": CodeInfo(
        "cannot broadcast by name",
        "Dims are matched by name, never by position, so a dim may stand only once in a type, and `...` "
        "must be on both sides or cover the other side's dims.",
    ),
    "SAGE114": CodeInfo(
        "not a type or size",
        "A type is an element and named dims, `E[T, 2*I]`; a size is made of dims, whole numbers, + - * "
        "and / by a number.",
    ),
    "SAGE115": CodeInfo(
        "undefined dim",
        "Dims are declared in specs/dims.yaml, under the op's `dims`, or as attrs of type dim.",
    ),
    "SAGE116": CodeInfo(
        "name not possible",
        "A name is a word of the language, shadows another one, is kept for generated code, or has the "
        "wrong case: values are small, dims begin with a capital.",
    ),
    "SAGE117": CodeInfo(
        "not a view",
        "A view names an operand with all its dims, of which some are parts a:b inside the dim, and "
        "perhaps another shape with as many elements.",
    ),
    "SAGE118": CodeInfo(
        "no single source of meaning",
        "An op has exactly one of `compute`, `fuses` and `reference`.",
    ),
    "SAGE119": CodeInfo(
        "unknown op in fuses",
        "`fuses` calls an op that does not exist, or ops that are made of each other.",
    ),
    "SAGE120": CodeInfo(
        "argument does not fit",
        "A call passes a value of another type than the op takes.",
    ),
    "SAGE121": CodeInfo(
        "unknown op_type",
        "The member is not in specs/op_types.yaml.",
    ),
    "SAGE122": CodeInfo(
        "wrong inplace",
        "`inplace` maps an output to an input of the same type.",
    ),
    "SAGE123": CodeInfo(
        "template missing",
        "`reference` names a file in templates/reference.",
    ),
    "SAGE124": CodeInfo(
        "holes and fillings differ",
        "The holes of a template are exactly the op's kernel.params and kernel.hooks.",
    ),
    "SAGE125": CodeInfo(
        "wrong default",
        "A default has the attr's type and lies within its limits and choices.",
    ),
    "SAGE126": CodeInfo(
        "wrong test case",
        "A case gives sizes of the op's dims; `R` gives the leading dims.",
    ),
    "SAGE127": CodeInfo(
        "value never used",
        "A result is neither an output nor used by another line.",
    ),
    "SAGE128": CodeInfo(
        "field does not belong here",
        "Views belong to compute, hooks and cost to reference, a rule to fuses; all but fuses name an op_type.",
    ),
    "SAGE130": CodeInfo(
        "optional input not last",
        "Optional inputs come after the others.",
    ),
    "SAGE131": CodeInfo(
        "may be absent",
        "An optional input or attr is used through `optional(name, with, without)` or `present(name)`.",
    ),
    "SAGE132": CodeInfo(
        "not determined",
        "Dims and element types of outputs follow from inputs and attrs of type dim.",
    ),
    # the generator itself
    "SAGE501": CodeInfo("not written", "The generated files could not be written; the tree was left as it was."),
    "SAGE502": CodeInfo("no specs", "A spec folder holds no .yaml file, or does not exist."),
    "SAGE503": CodeInfo(
        "generated code does not parse",
        "A template made text that is not Python. This is a fault of the template, not of a spec.",
    ),
    "SAGE504": CodeInfo("two files, one output", "Two spec files have the same stem, which names the generated file."),
    "SAGE505": CodeInfo("file not ours", "A file stands where generated code would go and was not generated."),
    "SAGE506": CodeInfo("drift", "The generated tree differs from what the specs say. Run `make generate`."),
}
