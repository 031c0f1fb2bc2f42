"""Diagnostics of models."""

from sageLLM.codegen.codes.info import CodeInfo

CODES: dict[str, CodeInfo] = {
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
}
