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
