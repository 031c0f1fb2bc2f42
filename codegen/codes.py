"""Table of diagnostic codes with explanations and remedies. `sagellm explain SAGE006` prints an entry.

Ranges: 0xx YAML and schema, 1xx ops and the compute language, 2xx models, 3xx passes, 5xx the generator itself,
7xx dialects.
A code never changes its meaning, and the code of a removed diagnostic is never reused.
"""

from typing import NamedTuple


class CodeInfo(NamedTuple):
    """The title of a code (a noun phrase) and its explanation: the rule, the reason and the remedy."""

    title: str
    explanation: str


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
    # ops and the compute language
    "SAGE101": CodeInfo(
        "syntax error",
        "An expression is one line of Python arithmetic in plain ASCII: names, numbers, operators and calls.",
    ),
    "SAGE102": CodeInfo(
        "unsupported syntax",
        "The language has assignments, arithmetic, comparisons and named functions. Attributes, subscripts, "
        "loops and definitions are refused, so that a spec never runs code.",
    ),
    "SAGE103": CodeInfo(
        "expression too large",
        "An expression may have at most 4000 characters and 32 levels; an integer must be at most 2**53, a "
        "float must be finite. Constant parts are computed: they must not divide by zero, and must fit their type.",
    ),
    "SAGE104": CodeInfo(
        "unknown name",
        "No operand, view, attr, dim or earlier result has this name.",
    ),
    "SAGE105": CodeInfo(
        "unknown function",
        "The language does not define this function. The help names the most similar one, or lists all.",
    ),
    "SAGE106": CodeInfo(
        "wrong arguments",
        "A call has too many or too few arguments, or an attr that the op does not have.",
    ),
    "SAGE107": CodeInfo(
        "element type mismatch",
        "Element types are never converted implicitly: cast one operand, so that every rounding is visible. "
        "Literals and attrs adopt the type of the other operand.",
    ),
    "SAGE108": CodeInfo(
        "unknown dim of the operand",
        "A reduction, dot or gather must name a dim of its operand.",
    ),
    "SAGE109": CodeInfo(
        "type differs from the declaration",
        "A value must have the type of the output, view or hook that it is assigned to.",
    ),
    "SAGE110": CodeInfo(
        "output not assigned",
        "Every output must be assigned exactly once, whole or by views that cover it.",
    ),
    "SAGE111": CodeInfo(
        "name assigned twice",
        "Every name is assigned once. Choose a new name for a new value.",
    ),
    "SAGE112": CodeInfo(
        "assignment to an input",
        "Inputs are read-only. Use `inplace` for an output that overwrites an input.",
    ),
    "SAGE113": CodeInfo(
        "cannot broadcast by name",
        "Dims are matched by name, never by position. A dim may appear only once in a type, and `...` must "
        "be in both operands or cover the dims of the other one.",
    ),
    "SAGE114": CodeInfo(
        "invalid type or size",
        "A type is an element type and named dims, `E[T, 2*I]`. A size consists of dims, whole numbers, + - "
        "* and / by a number.",
    ),
    "SAGE115": CodeInfo(
        "undefined dim",
        "A dim must be declared in specs/dims.yaml, under the op's `dims`, or as an attr of type dim.",
    ),
    "SAGE116": CodeInfo(
        "invalid name",
        "A name must not be a keyword of the language, shadow another name, or be reserved for generated "
        "code. Values are lower case; dims begin with a capital letter.",
    ),
    "SAGE117": CodeInfo(
        "invalid view",
        "A view names an operand with all its dims, of which some may be slices a:b inside the dim, and "
        "optionally another shape with the same number of elements.",
    ),
    "SAGE118": CodeInfo(
        "ambiguous semantics",
        "An op must have exactly one of `compute`, `fuses` and `reference`.",
    ),
    "SAGE119": CodeInfo(
        "invalid op in fuses",
        "`fuses` must call existing ops, and ops must not call each other in a cycle.",
    ),
    "SAGE120": CodeInfo(
        "argument type mismatch",
        "A call must pass values of the types that the op declares.",
    ),
    "SAGE121": CodeInfo(
        "unknown op_type",
        "The op type must be a member in specs/op_types.yaml.",
    ),
    "SAGE122": CodeInfo(
        "invalid inplace",
        "`inplace` must map an output to an input of the same type.",
    ),
    "SAGE123": CodeInfo(
        "missing template",
        "`reference` must name a file in templates/reference.",
    ),
    "SAGE124": CodeInfo(
        "template mismatch",
        "The holes of a template must be exactly the op's kernel.hooks and kernel.params (kernel.triton for Triton).",
    ),
    "SAGE125": CodeInfo(
        "invalid default",
        "A default must have the attr's type and satisfy its limits and choices.",
    ),
    "SAGE126": CodeInfo(
        "invalid test case",
        "A case must have a size of 1 to 2**20 for every dim of the op's inputs and dim attrs; `R` is the "
        "size of the leading dims.",
    ),
    "SAGE127": CodeInfo(
        "unused value",
        "A result must be an output or be used by another line.",
    ),
    "SAGE128": CodeInfo(
        "misplaced field",
        "`views` require `compute`, hooks and `cost` require `reference`, `rule` requires `fuses`; all ops "
        "without `fuses` must have `op_type`.",
    ),
    "SAGE130": CodeInfo(
        "optional input before a required one",
        "Optional inputs must come after the required ones.",
    ),
    "SAGE131": CodeInfo(
        "value may be absent",
        "An optional input or attr must be used through `optional(name, with, without)` or `present(name)`.",
    ),
    "SAGE132": CodeInfo(
        "undetermined dim",
        "Dims and element types of outputs follow from inputs and attrs of type dim.",
    ),
    "SAGE133": CodeInfo(
        "unknown name under tp",
        "`tp` lists for a reference the dims of its inputs that may be divided over the ranks, and the "
        "inputs in which it is linear.",
    ),
    "SAGE134": CodeInfo(
        "unknown input under epilogue_of",
        "`kernel.epilogue_of` must name a required input: the kernel reads it while a GEMM computes it.",
    ),
    "SAGE136": CodeInfo(
        "unused operand, view or attr",
        "An op must read each of its inputs, views and attrs, or determine a dim with it; another name is likely "
        "misspelt.",
    ),
    "SAGE137": CodeInfo(
        "condition that never holds",
        "A condition of `where` must hold for some sizes and attrs, or the op can never be called.",
    ),
    "SAGE138": CodeInfo(
        "slow fusion",
        "A warning: the cost model calls the fused op slower than the ops of `fuses` one after the other, since its "
        "C++ kernel computes values again for each element of a product. Before the product of a GEMM, values are "
        "computed once per row.",
    ),
    "SAGE135": CodeInfo(
        "attr unknown to a rule",
        "An op with `rule` gets its attrs from the ops that it replaces, so each attr of a formula must also be passed "
        "to a line of `fuses` unchanged.",
    ),
    # models
    "SAGE234": CodeInfo(
        "wrong test value",
        "The values of `tests.tiny` must have the types of the config names that read their keys.",
    ),
    "SAGE233": CodeInfo(
        "condition that never holds",
        "A check, a `when` or a branch must hold for some config. In a check, a name with `value` has that value only.",
    ),
    "SAGE201": CodeInfo(
        "invalid base layout",
        "`extends`, and `use` of a block, must name an existing layout that is not made of this one.",
    ),
    "SAGE202": CodeInfo(
        "ambiguous patch",
        "The `before`, `after` or `replace` of a patch must be the beginning of exactly one inherited "
        "statement; whitespace is ignored.",
    ),
    "SAGE203": CodeInfo(
        "incomplete layout",
        "A layout must have a program and returns; a block must have args, a body, returns and an op type, "
        "and with weights also `hf`.",
    ),
    "SAGE204": CodeInfo(
        "invalid name",
        "Names become Python names in generated code, so keywords and names that generated code uses are reserved.",
    ),
    "SAGE205": CodeInfo(
        "unknown config name",
        "An expression may use the names that are defined before it under `config`.",
    ),
    "SAGE206": CodeInfo(
        "invalid config expression",
        "Config values, defaults, checks, conditions and attrs are constants or expressions of config names, "
        "of the declared type. A value that may be null must be tested with `is null` before it is used; "
        "lists are read by `name[i]`, where i is the layer, or with `in`.",
    ),
    "SAGE207": CodeInfo(
        "missing config name",
        "Every layout must define H, L, Nq, Nkv, D, V and max_position, which the runtime reads.",
    ),
    "SAGE208": CodeInfo(
        "unused config name",
        "A layout with `extends` may redefine names of its parent, or add names that weights, statements, "
        "checks or defaults read. Any other name is likely misspelt, and the parent's name would keep its "
        "value.",
    ),
    "SAGE209": CodeInfo(
        "nothing to drop",
        "`drop` removes config names, weights and checks that are inherited or come with a used block; each must be "
        "named exactly.",
    ),
    "SAGE210": CodeInfo(
        "unknown size",
        "Shapes consist of integer config names; `tp.divides` names such sizes.",
    ),
    "SAGE211": CodeInfo(
        "source does not fill the weight",
        "The checkpoint tensors of a weight must fill its shape exactly.",
    ),
    "SAGE212": CodeInfo(
        "invalid tensor name",
        "Tensor names may contain letters, digits, `.`, `_`, `-`, and `{i}` for the layer index.",
    ),
    "SAGE213": CodeInfo(
        "invalid tie",
        "A tied weight must name another weight of the same shape that is not tied itself.",
    ),
    "SAGE214": CodeInfo(
        "not a condition",
        "`when` is a condition on the config: a boolean name, a comparison, `and`, `or`, `not`.",
    ),
    "SAGE215": CodeInfo(
        "unused weight or block",
        "Every weight must be read by a statement, and every block called; otherwise it would be loaded without use.",
    ),
    "SAGE217": CodeInfo(
        "invalid rearrangement",
        "`rearrange` splits a tensor into axes and merges them in another order, as in `(Nq c D) H -> (c Nq "
        "D) H`; each side names every axis once.",
    ),
    "SAGE218": CodeInfo(
        "tensor not read exactly once",
        "Weights that read parts of one tensor must together read all of it, and no part twice.",
    ),
    "SAGE220": CodeInfo(
        "invalid statement",
        "A statement is `names = op(values, attr=...)`; the loop over the layers is `repeat: L`.",
    ),
    "SAGE221": CodeInfo(
        "unknown op",
        "A statement calls an op of specs/ops, a block or, in a block, `attend`.",
    ),
    "SAGE222": CodeInfo(
        "wrong number of values",
        "The call has too few or too many arguments or results.",
    ),
    "SAGE223": CodeInfo(
        "undefined name",
        "A value must be a weight, an argument, an earlier result, or an input of specs/inputs.yaml.",
    ),
    "SAGE224": CodeInfo(
        "operand type mismatch",
        "The value must have the element type and sizes that the op declares.",
    ),
    "SAGE225": CodeInfo(
        "invalid attr",
        "The op does not define this attr, requires one that is missing, or declares another type.",
    ),
    "SAGE226": CodeInfo(
        "absent value",
        "A weight with `when` may be absent, so it may only be passed to an optional operand.",
    ),
    "SAGE227": CodeInfo(
        "loop does not close",
        "A carried value must be assigned before the loop and keep its type in every iteration.",
    ),
    "SAGE228": CodeInfo(
        "invalid result",
        "A result must be assigned by a statement. A block returns one row per token. A program returns "
        "logits and tokens, or rows of embeddings: E[T, ...] or E[B, ...].",
    ),
    "SAGE229": CodeInfo(
        "phase not mapped",
        "Every phase (prefill, decode, hybrid) must have an op that supports it.",
    ),
    "SAGE230": CodeInfo(
        "unknown op type",
        "The op type of a block must be a member in specs/op_types.yaml.",
    ),
    "SAGE231": CodeInfo(
        "duplicate architecture",
        "The checkpoints of an architecture must be read by one layout only.",
    ),
    "SAGE232": CodeInfo(
        "block called twice",
        "A block has one set of weights per layer, so a layer may call it only once.",
    ),
    "SAGE240": CodeInfo(
        "invalid sharding",
        "The `tp` of a weight must shard the dim that `tp.divides` divides, and name the collective that "
        "completes the result.",
    ),
    "SAGE241": CodeInfo(
        "unreduced partial sum",
        "A partial sum over the ranks is reduced where the program calls the block. Before that it may only "
        "be passed to operations that are linear in it: sums of partial sums, and products with complete "
        "values.",
    ),
    "SAGE242": CodeInfo(
        "bias added per rank",
        "The bias of a result that is summed over the ranks must be kept on the first rank only.",
    ),
    "SAGE243": CodeInfo(
        "collective in a layout",
        "Layouts do not call collectives: these follow from `tp` of the weights.",
    ),
    "SAGE245": CodeInfo(
        "invalid use of a block",
        "`use: LAYOUT.BLOCK` starts a block from one of another layout; own weights are added to it, and other own "
        "fields replace those of the block.",
    ),
    "SAGE244": CodeInfo(
        "op on a sharded dim",
        "The sizes in `tp.divides` are divided over the ranks. An op that reduces or indexes such a dim "
        "would see only one rank's shard of it.",
    ),
    "SAGE250": CodeInfo(
        "invalid rope key",
        "The `rope` section must name keys of config.json.",
    ),
    "SAGE252": CodeInfo(
        "rotary table mismatch",
        "`rope.layout` sets the pairs of components that are rotated together: j and j + dim/2 (`half`, op "
        "rope), or 2j and 2j + 1 (`interleaved`, op rope_interleaved). The ops must match it.",
    ),
    "SAGE253": CodeInfo(
        "value outside the key",
        "With `v_of: k` a layer caches keys only, and each value is the leading part of its key: it must "
        "have the same heads and be at most as wide.",
    ),
    "SAGE254": CodeInfo(
        "test config that does not build",
        "Every layout is built from the config in `tests.tiny`, in every stage. It must have each key without a "
        "default, and sizes that fit the layout.",
    ),
    # passes
    "SAGE301": CodeInfo(
        "unknown stage",
        "The stages of the pipeline are listed in order in specs/passes/stages.yaml.",
    ),
    "SAGE302": CodeInfo(
        "unknown op type",
        "A pass selects nodes by a member of specs/op_types.yaml.",
    ),
    "SAGE303": CodeInfo(
        "no op to derive from",
        "`from_op` must name an op with `fuses`, which is the pattern, and `rule`.",
    ),
    "SAGE304": CodeInfo(
        "op of another pass",
        "The `rule` of an op and the pass that lists it with `from_op` must name each other.",
    ),
    "SAGE305": CodeInfo(
        "invalid line of a rule",
        "A line of `match` or `rewrite` is `values = op(values, attr=name)`: operands are names, attrs are "
        "names or constants.",
    ),
    "SAGE306": CodeInfo(
        "unknown op in a rule",
        "A line of `match` or `rewrite` must call an op of specs/ops.",
    ),
    "SAGE307": CodeInfo(
        "wrong number of values in a rule",
        "A line must name every result of the op, and its operands in order; only optional ones may be omitted.",
    ),
    "SAGE308": CodeInfo(
        "unknown attr in a rule",
        "A line names an attr that the op does not have.",
    ),
    "SAGE309": CodeInfo(
        "duplicate result",
        "The results of a pattern must have distinct names.",
    ),
    "SAGE310": CodeInfo(
        "unbound name in a rewrite",
        "A rewrite may read the inputs of the pattern and the results of earlier lines of the rewrite. The "
        "values that the pattern computes are removed from the graph, so the rewrite must compute them itself "
        "before it reads them.",
    ),
    "SAGE311": CodeInfo(
        "kept value not produced",
        "Consumers of the pattern still read its result and the values under `keep`, so the rewrite must "
        "produce each of them under the same name.",
    ),
    "SAGE312": CodeInfo(
        "disconnected pattern",
        "Matching starts at the last line and follows values: from a value to its producer, or to one of its "
        "consumers. So every line must share a value with lines that are connected to the last one.",
    ),
    "SAGE313": CodeInfo(
        "rule never fires",
        "Another rule that is tried first replaces a part of the pattern wherever it occurs. Rules are tried "
        "in the order of their passes, then by benefit, then as written; nodes are visited in graph order.",
    ),
    "SAGE314": CodeInfo(
        "rewriting may not terminate",
        "Rules that do not shrink the graph produce each other's patterns in a cycle.",
    ),
    "SAGE315": CodeInfo(
        "rule without its pass",
        "The `rule` of an op must name an existing pass that lists the op with `from_op`.",
    ),
    "SAGE316": CodeInfo(
        "unknown model",
        "`expect` must list models of specs/models; `*` applies to all others.",
    ),
    "SAGE317": CodeInfo(
        "invalid count",
        "A formula under `expect` consists of integer config names that all of its models have, integers and + - * //.",
    ),
    "SAGE318": CodeInfo(
        "unknown pass",
        "`after` and `before` must name passes.",
    ),
    "SAGE319": CodeInfo(
        "cycle of passes",
        "`after` and `before` must allow an order of the passes.",
    ),
    "SAGE320": CodeInfo(
        "contradictory types",
        "A value of a rule has another number of dims, or another element type, than in the lines before, so "
        "no graph can match.",
    ),
    "SAGE321": CodeInfo(
        "invalid condition of a rule",
        "A `where` of a rule compares numbers, strings and attrs that the pattern names. The functions of a "
        "value are `bytes(x)`, `size(x, 0)`, `rank(x)` and `dtype(x)`.",
    ),
    "SAGE322": CodeInfo(
        "model counted twice",
        "A model must be in only one of the lists under `expect`; its count is the formula of that list.",
    ),
    "SAGE324": CodeInfo(
        "condition that never holds",
        "A condition under `where` must hold for some sizes, element types and attrs, or the rule never fires.",
    ),
    "SAGE331": CodeInfo(
        "op does not fit the pass",
        "A pass that splits, joins or moves values inserts ops with a fixed signature: concatenation of "
        "rows, split into the first rows and the rest, send, and receive.",
    ),
    "SAGE332": CodeInfo(
        "invalid function of a pass",
        "`function` must be `package.module:function`. Passes of the package name functions of "
        "runtime/core/passes; an overlay may name its own.",
    ),
    "SAGE340": CodeInfo(
        "expectation missed",
        "The rules of a pass fire more or less often in a model's graph than `expect` states, for its tiny "
        "config. The near misses show how far each rule matched and what failed. Fix the rule or the count.",
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
