"""Diagnostics of YAML, schemas, formats and dialects, and of the generator itself."""

from sageLLM.codegen.codes.info import CodeInfo

CODES: dict[str, CodeInfo] = {
    # YAML and schema
    "SAGE001": CodeInfo(
        "invalid YAML",
        "The file must parse as UTF-8 YAML. The caret shows where parsing stopped.",
    ),
    "SAGE002": CodeInfo(
        "unreadable file",
        "The operating system refused to read the file.",
    ),
    "SAGE003": CodeInfo(
        "too large or too deep",
        "A spec file may have at most 256 kB and 64 levels of nesting, so that no input can exhaust the reader.",
    ),
    "SAGE004": CodeInfo(
        "not a single document",
        "A spec file must contain exactly one YAML document.",
    ),
    "SAGE005": CodeInfo(
        "anchor, alias or tag",
        "Anchors, aliases and tags are refused, so that a value is exactly its text. Write the value out.",
    ),
    "SAGE006": CodeInfo(
        "duplicate key",
        "A mapping has the same key twice. Most YAML readers would silently keep the last one.",
    ),
    "SAGE007": CodeInfo(
        "invalid key",
        "A key must be non-empty, single-line text; lists and mappings are refused.",
    ),
    "SAGE008": CodeInfo(
        "number out of range",
        "An integer must have at most 18 digits; a float must fit 64 bits.",
    ),
    "SAGE010": CodeInfo(
        "unknown field",
        "The schema does not define this field. The help names the most similar one.",
    ),
    "SAGE011": CodeInfo(
        "missing field",
        "The schema requires the field.",
    ),
    "SAGE012": CodeInfo(
        "wrong type",
        "The value has another type than the schema requires. Values are never converted: `off` is text, not false.",
    ),
    "SAGE013": CodeInfo(
        "invalid value",
        "The value has the right type but violates a rule of the schema.",
    ),
    "SAGE014": CodeInfo(
        "unknown kind of file",
        "The first line must name the kind of the file: `schema: ops/v1`, models/v1, passes/v1, ...",
    ),
    "SAGE015": CodeInfo(
        "duplicate definition",
        "Two entries of one kind have the same name; both locations are shown.",
    ),
    "SAGE016": CodeInfo(
        "colliding name",
        "Names that differ in the specs would be one name in generated code, or generated code uses the name itself. "
        "Where two entries collide, both locations are shown.",
    ),
    # formats
    "SAGE601": CodeInfo(
        "invalid tensor of a format",
        "A stored tensor has an element type and dims: the dims of the weight and sizes, times and divided by numbers "
        "and sizes, such as `i32[N, K/8]`. A format lists either tensors or the fields of a block of B elements.",
    ),
    "SAGE602": CodeInfo(
        "invalid value of a format",
        "A value is an expression of the stored tensors with + - * / // % ** and the functions bits, rep, lut, e8m0, "
        "take and cat. Dims are matched by name, and the result must have those of the weight.",
    ),
    "SAGE603": CodeInfo(
        "name of a format",
        "Names of formats, tensors and sizes become names of generated code, and the value must use every tensor.",
    ),
    "SAGE604": CodeInfo(
        "architecture of GGUF files",
        "Keys of the metadata are names or products of names, a name in checkpoints belongs to one tensor of a file, "
        "and stacks of experts have `{e}`.",
    ),
    # the generator itself
    "SAGE501": CodeInfo(
        "not written",
        "The generated files could not be written. The tree is unchanged, or the next run completes the update; the "
        "message says which.",
    ),
    "SAGE502": CodeInfo(
        "unusable spec folder",
        "The spec folder does not exist, contains no .yaml file or one with another ending, or is used already.",
    ),
    "SAGE503": CodeInfo(
        "generated code does not parse",
        "A template produced text that is not valid Python. This is a bug in the template, not in a spec.",
    ),
    "SAGE504": CodeInfo(
        "duplicate stem",
        "Two spec files have the same stem, which is the name of the generated file, or two overlays with the same "
        "folder name contain a file at the same path. A file of an overlay may have the path of one of the package.",
    ),
    "SAGE505": CodeInfo(
        "unmanaged file or folder",
        "The path of a generated file is occupied by a file that was not generated, or --out is the root of a project, "
        "or its MANIFEST.json belongs to another tool or to other specs. Nothing was written or deleted.",
    ),
    "SAGE506": CodeInfo(
        "drift",
        "The generated tree differs from the specs, or a run was killed while it wrote. Run `make generate`, which "
        "deletes only files that the manifest of the tree lists; delete other leftovers yourself.",
    ),
    "SAGE507": CodeInfo(
        "formatter missing",
        "ruff and clang-format format the generated files. They are dependencies in exact versions, as other "
        "versions produce other bytes. Nothing was written.",
    ),
    # dialects
    "SAGE701": CodeInfo(
        "malformed pattern",
        "A pattern is text with holes in braces, such as `<tool_call>{object}</tool_call>`; `{? text}` may be absent. "
        "A brace itself is written twice.",
    ),
    "SAGE702": CodeInfo(
        "missing or repeated hole",
        "A call has {object}, or {name} and {arguments}; an argument has {key} and {value} or {python}. Each occurs "
        "once, with text between two holes, so that the end of the first one is known.",
    ),
    "SAGE703": CodeInfo(
        "missing mark",
        "Marks distinguish calls and reasoning from content: visible text at the beginning, and at the end of values "
        "that are not JSON. Only a call that is a JSON object can do without, at the start of the content.",
    ),
    "SAGE704": CodeInfo(
        "incomplete dialect",
        "A dialect describes calls, reasoning or both. {object} requires `keys`; fields without a hole are refused.",
    ),
    "SAGE705": CodeInfo(
        "invalid alias",
        "Aliases are names in commands.",
    ),
    "SAGE706": CodeInfo(
        "dialects that cannot be told apart",
        "The dialect of a checkpoint is the one with the most `detect` texts in the chat template, so no two dialects "
        "may have the same texts.",
    ),
}
