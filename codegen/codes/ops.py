"""Diagnostics of ops and the compute language."""

from sageLLM.codegen.codes.info import CodeInfo

CODES: dict[str, CodeInfo] = {
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
}
