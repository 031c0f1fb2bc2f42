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
        "The holes of a template are exactly the op's kernel.hooks and kernel.params (kernel.triton for Triton).",
    ),
    "SAGE125": CodeInfo(
        "wrong default",
        "A default has the attr's type and lies within its limits and choices.",
    ),
    "SAGE126": CodeInfo(
        "wrong test case",
        "A case gives a size of 1 to 2**20 for every dim of the op's inputs and attrs; `R` gives the leading dims.",
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
    "SAGE133": CodeInfo(
        "unknown name under ranks",
        "`ranks` says for a reference which dims of its inputs ranks may share, and in which inputs it is linear.",
    ),
    "SAGE134": CodeInfo(
        "unknown input under epilogue_of",
        "`kernel.epilogue_of` must name a required input: the kernel reads it while a GEMM computes it.",
    ),
    # models
    "SAGE201": CodeInfo(
        "unusable base layout",
        "`extends` names a layout that does not exist, or one that itself extends another. One level is allowed.",
    ),
    "SAGE202": CodeInfo(
        "patch without its place",
        "A patch's `before`, `after` or `replace` must begin exactly one inherited statement; spaces do not count.",
    ),
    "SAGE203": CodeInfo(
        "incomplete layout",
        "A layout needs a program and what it returns; a block needs args, a body, returns and an op type, and with "
        "weights also `hf`.",
    ),
    "SAGE204": CodeInfo(
        "unusable name",
        "Names become Python names in generated code; keywords and names that mean something are taken.",
    ),
    "SAGE205": CodeInfo("unknown config name", "An expression may use names that stand before it under `config`."),
    "SAGE206": CodeInfo(
        "not a config expression",
        "Config values, defaults, checks, conditions and attrs are plain values or expressions of config names, of the "
        "declared type. What may be null is asked for with `is null` before it is used; lists are read by `name[i]`, "
        "the layer, or with `in`.",
    ),
    "SAGE207": CodeInfo(
        "missing config name", "The runtime reads H, L, Nq, Nkv, D, V and max_position of every layout."
    ),
    "SAGE208": CodeInfo(
        "config name that nothing reads",
        "A layout with `extends` changes names of its parent, or adds names that weights, statements, checks or "
        "defaults read. Any other name is a misspelt one, which would leave the parent's as it is.",
    ),
    "SAGE209": CodeInfo(
        "nothing to drop",
        "`drop` takes away config names, weights and checks that are inherited, each named exactly.",
    ),
    "SAGE210": CodeInfo("unknown size", "Shapes are made of integer config names; `tp.divides` names such sizes."),
    "SAGE211": CodeInfo("source does not fill", "The checkpoint tensors of a weight must fill its shape exactly."),
    "SAGE212": CodeInfo(
        "not a tensor name", "Tensor names hold letters, digits, `.`, `_`, `-`, and `{i}` for the number of the layer."
    ),
    "SAGE213": CodeInfo(
        "broken tie", "A tied weight names one other weight of the same shape that is not tied itself."
    ),
    "SAGE214": CodeInfo(
        "not a condition", "`when` is a condition on the config: a boolean name, a comparison, `and`, `or`, `not`."
    ),
    "SAGE215": CodeInfo("unused weight", "A weight that no statement reads would be loaded for nothing."),
    "SAGE217": CodeInfo(
        "not a rearrangement",
        "`rearrange` takes a tensor apart into axes and puts them together in another order, as in "
        "`(Nq c D) H -> (c Nq D) H`; each side names every axis once.",
    ),
    "SAGE218": CodeInfo(
        "tensor not read exactly once",
        "Weights that each take a part of one tensor must take all of it, once.",
    ),
    "SAGE220": CodeInfo("not a statement", "A statement is `names = op(values, attr=...)`; loops are `repeat: L`."),
    "SAGE221": CodeInfo("unknown op", "A statement calls an op of specs/ops, a block, or in a block `attend`."),
    "SAGE222": CodeInfo("wrong count", "The call has too few or too many values or results."),
    "SAGE223": CodeInfo(
        "unbound name", "A value is a weight, an argument, an earlier result, or from specs/inputs.yaml."
    ),
    "SAGE224": CodeInfo(
        "operand does not fit", "The value's element type or sizes are not those that the op declares."
    ),
    "SAGE225": CodeInfo(
        "attr does not fit", "The op has no such attr, needs one that is not given, or has another type."
    ),
    "SAGE226": CodeInfo("absent value", "A weight with `when` may be absent, so only an optional operand can take it."),
    "SAGE227": CodeInfo("loop does not close", "A carried value has the same type before and after each turn."),
    "SAGE228": CodeInfo(
        "wrong result",
        "A result is made by a statement; a block's has one row per token. A program returns logits and tokens, or "
        "rows that are embeddings: E[T, ...] or E[B, ...].",
    ),
    "SAGE229": CodeInfo("phase not mapped", "Every phase (prefill, decode, hybrid) needs an op that serves it."),
    "SAGE230": CodeInfo("unknown op type", "A block's op type is a member of specs/op_types.yaml."),
    "SAGE231": CodeInfo("architecture read twice", "One layout reads the checkpoints of an architecture."),
    "SAGE232": CodeInfo("block called twice", "A block has one set of weights per layer, so a layer calls it once."),
    "SAGE240": CodeInfo(
        "sharding does not fit",
        "A weight's `tp` must divide the dim that `tp.divides` makes local, and say what completes the result.",
    ),
    "SAGE241": CodeInfo(
        "unfinished sum",
        "A rank's part of a sum over ranks is completed where the program calls the block. Before that it may only go "
        "where an op is linear: parts add up to parts, a part times a whole value is a part.",
    ),
    "SAGE242": CodeInfo("bias added per rank", "A bias of a sum over ranks is kept on the first rank only."),
    "SAGE243": CodeInfo("communication in a layout", "Where ranks talk follows from the weights' `tp`."),
    "SAGE244": CodeInfo(
        "op needs what ranks share",
        "A rank has a share of the sizes in `tp.divides`; an op that goes over such a dim would see its share alone.",
    ),
    "SAGE250": CodeInfo("unusable rope key", "The rope section names keys of config.json."),
    "SAGE252": CodeInfo(
        "tables for another rotation",
        "`rope.layout` says which components are turned together: j and j + dim/2 (`half`, the op rope), or 2j and "
        "2j + 1 (`interleaved`, the op rope_interleaved). The ops must agree with it.",
    ),
    "SAGE253": CodeInfo(
        "value outside the key",
        "With `v_of: k` a layer keeps keys only, and each value is the leading part of its key: it has the same heads "
        "and is no wider.",
    ),
    # passes
    "SAGE301": CodeInfo("unknown stage", "The stages of the pipeline stand in order in specs/passes/stages.yaml."),
    "SAGE302": CodeInfo("unknown op type", "A pass selects nodes by a member of specs/op_types.yaml."),
    "SAGE303": CodeInfo(
        "no op to derive from", "`from_op` names an op that has `fuses`, which is the pattern, and a `rule`."
    ),
    "SAGE304": CodeInfo(
        "op of another pass", "The op's `rule` and the pass that lists it with `from_op` must name each other."
    ),
    "SAGE305": CodeInfo(
        "not a line of a rule",
        "A line of `match` or `rewrite` is `values = op(values, attr=name)`: operands are names, attrs are given names "
        "or constants.",
    ),
    "SAGE306": CodeInfo("unknown op in a rule", "A line of `match` or `rewrite` calls an op of specs/ops."),
    "SAGE307": CodeInfo(
        "wrong count in a rule",
        "A line names every result of the op, and its operands in order; only optional ones may be left out.",
    ),
    "SAGE308": CodeInfo("unknown attr in a rule", "A line gives an attr that the op does not have."),
    "SAGE309": CodeInfo("value given twice", "Each result in a pattern has a name of its own."),
    "SAGE310": CodeInfo(
        "unbound name in a rewrite",
        "A rewrite reads what the pattern reads, and what its own earlier lines give. What the pattern computes is "
        "taken out of the graph, so the rewrite must compute it itself before reading it.",
    ),
    "SAGE311": CodeInfo(
        "kept value not given",
        "The nodes behind the pattern go on reading its result and the values under `keep`, so the rewrite gives each "
        "of them under the same name.",
    ),
    "SAGE312": CodeInfo(
        "disconnected pattern",
        "Matching starts at the last line and goes from there along values: from a value to the node that gives it, or "
        "to one that reads it. So every line has a value in common with lines that lead to the last one.",
    ),
    "SAGE313": CodeInfo(
        "rule never fires",
        "Wherever its pattern stands, another rule that is tried before it takes a part of it. Rules are tried in the "
        "order of their passes, then of their benefit, then as written; nodes are visited in the order of the graph.",
    ),
    "SAGE314": CodeInfo(
        "rewriting may never end", "Rules that do not shrink the graph put in what each other look for, in a circle."
    ),
    "SAGE315": CodeInfo(
        "rule without its pass", "An op's `rule` names a pass that exists and lists the op with `from_op`."
    ),
    "SAGE316": CodeInfo("unknown model", "`expect` lists models of specs/models; `*` stands for all others."),
    "SAGE317": CodeInfo(
        "not a count",
        "A formula under `expect` is made of integer config names that all of its models have, integers and + - * //.",
    ),
    "SAGE318": CodeInfo("unknown pass", "`after` and `before` name passes."),
    "SAGE319": CodeInfo("passes in a circle", "`after` and `before` must leave an order in which the passes can run."),
    "SAGE320": CodeInfo(
        "types that do not go together",
        "A value of a rule has another number of dims, or another element type, in one line than in the lines before: "
        "no graph has such a value.",
    ),
    "SAGE321": CodeInfo(
        "not a condition of a rule",
        "A `where` of a rule compares numbers, texts and attrs that the pattern names. Of a value one may ask "
        "`bytes(x)`, `size(x, 0)`, `rank(x)` and `dtype(x)`.",
    ),
    "SAGE322": CodeInfo(
        "model counted twice",
        "A model is in one of the lists under `expect`, and its count is the formula before that list.",
    ),
    "SAGE331": CodeInfo(
        "op does not fit the pass",
        "A pass that cuts, joins or moves values puts ops into the graph: one that joins rows, one that gives the "
        "first rows and the rest, one that sends and one that receives.",
    ),
    "SAGE332": CodeInfo(
        "no function for a pass",
        "`function` names `package.module:function`. The package's own passes name functions of runtime/core/passes; "
        "an overlay may name one of its own.",
    ),
    "SAGE340": CodeInfo(
        "expectation missed",
        "The rules of a pass fire more or less often in a model's graph than `expect` says, on its tiny config. "
        "The reasons say how far each rule got and what stood in its way. Mend the rule, or the count.",
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
