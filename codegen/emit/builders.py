"""Emits one module per layout: its config class, its weights, a function per block, and the program."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from sageLLM.codegen.contents import Contents, Row, class_name
from sageLLM.codegen.emit.builder_views import (
    BodyView,
    BranchView,
    CallView,
    ChoiceView,
    FieldView,
    InputView,
    StepView,
)
from sageLLM.codegen.emit.presence import layer_condition, text_of
from sageLLM.codegen.emit.python_text import mentions
from sageLLM.codegen.emit.weights import WeightText, WeightView, tuple_text
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.link.expressions import python_text as render_names
from sageLLM.codegen.model.layout import (
    Attend,
    BlockCall,
    BlockDef,
    Choose,
    ConfigName,
    InputDef,
    ModelDef,
    OpCall,
    Phase,
    Repeat,
    Statement,
    WeightDef,
    plain_statements,
)
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header, lit


def emit_builder(model: ModelDef, specs: Specs, renderer: Renderer) -> list[Output]:
    """`builders/llama.py` for `specs/models/llama.yaml`:

    class LlamaConfig(ModelSizes): ...
    def weights(c: LlamaConfig) -> Iterator[WeightSpec]: ...
    def attention(g: GraphWriter, c: LlamaConfig, stage: Stage, layer: int, n: TensorRef) -> tuple[TensorRef, ...]: ...
    def program(g: GraphWriter, c: LlamaConfig, stage: Stage) -> list[TensorRef]: ...
    LLAMA = ModelLayout(name="llama", ...)
    """
    text = renderer.render("builder.py.jinja", view=BuilderView(model, specs))
    entries = (model.ref, *((model.base.ref,) if model.base else ()))
    text = header(model.entry.doc.file, model.name) + text
    return [Output(f"builders/{model.name}.py", text, entries, model_rows(model))]


def model_rows(model: ModelDef) -> tuple[Row, ...]:
    """The ops that a layout calls."""
    return tuple({"op": name, "model": model.name} for name in model.ops_called)


def emit_builder_table(contents: Contents, renderer: Renderer) -> list[Output]:
    """`builders/__init__.py` with MODELS."""
    names = [model.name for model in contents.models]
    exports = sorted([*(name.upper() for name in names), "MODELS"])
    text = renderer.render("builders_registry.py.jinja", names=names, exports=exports)
    entries = tuple(model.ref for model in contents.models)
    return [Output("builders/__init__.py", header("specs/models", "models") + text, entries)]


Plain = OpCall | Attend | BlockCall
WeightGroup = tuple[str | None, list[WeightView]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where statements stand: the name of the layer's number, the weights in reach, and the names declared around."""

    index: str
    weights: Sequence[WeightDef]
    known: frozenset[str] = frozenset()

    def knowing(self, names: set[str]) -> Place:
        return replace(self, known=self.known | names)


class BuilderView:
    """Everything that templates/builder.py.jinja shows of one layout."""

    def __init__(self, model: ModelDef, specs: Specs) -> None:
        self.model = model
        self.specs = specs
        self.config_class = class_name(model.name) + "Config"
        self.constant = model.name.upper()
        self.is_overlay = specs.is_overlay
        self.extends = model.base.name if model.base else None
        self._weights = WeightText(self._text, lambda name: model.config[name].words, self._exists)
        self._views: dict[tuple[str | None, str, str], WeightView] = {}
        self._texts: dict[str, str] = {}

    @property
    def fields(self) -> list[FieldView]:
        return [
            FieldView(name.name, name.python_type, _sentence(name), _read_call(name))
            for name in self.model.config.values()
        ]

    def group(self, items: Iterable[str]) -> str:
        """A tuple of Python texts."""
        return tuple_text(items)

    def quoted(self, items: Iterable[str]) -> str:
        """A tuple of text literals."""
        return tuple_text(map(lit, items))

    @property
    def alibi(self) -> str:
        """The argument of the config for ALiBi's table, or nothing."""
        found = self.model.alibi
        return f"alibi=AlibiSpec({found.heads}, {found.max_bias})" if found is not None else ""

    @property
    def cache(self) -> str:
        """The arguments of KvShape."""
        found = self.model.cache
        shapes = [tuple_text(map(self._text, shape)) for shape in (found.k, found.v)]
        return ", ".join([*shapes, *(["is_shared=True"] if found.is_shared else [])])

    @property
    def divided(self) -> list[tuple[str, str]]:
        """(key of config.json, name) of the sizes that become a rank's share."""
        return [(self.model.config[name].words, name) for name in self.model.divides]

    @property
    def vocab_sizes(self) -> list[tuple[str, str]]:
        """(key of config.json, name) of the sizes by which tables are divided over ranks."""
        weights = [weight for weight in self.all_weights if weight.shard and weight.shard.kind == "vocab"]
        names = [name for weight in weights if weight.shard for name in weight.dims[weight.shard.dim].symbols]
        return [(self.model.config[name].words, name) for name in dict.fromkeys(names) if name in self.model.config]

    @cached_property
    def all_weights(self) -> list[WeightDef]:
        return [*self.model.weights, *(weight for block in self.model.blocks.values() for weight in block.weights)]

    @property
    def first_weights(self) -> list[WeightGroup]:
        """The model's own weights before the layers."""
        own = self.model.weights
        cut = next((i for i, weight in enumerate(own) if weight.is_per_layer), len(own))
        return self._grouped(own[:cut])

    @property
    def layer_weights(self) -> list[WeightGroup]:
        return self._grouped(weight for weight in self.all_weights if weight.is_per_layer)

    @property
    def last_weights(self) -> list[WeightGroup]:
        own = self.model.weights
        cut = next((i for i, weight in enumerate(own) if weight.is_per_layer), len(own))
        return self._grouped(weight for weight in own[cut:] if not weight.is_per_layer)

    def _grouped(self, weights: Iterable[WeightDef]) -> list[WeightGroup]:
        """Neighbours that exist under the same condition, with that condition."""
        views = [self._weight(weight, "i") for weight in weights]
        return [(exists, list(group)) for exists, group in groupby(views, key=lambda view: view.exists)]

    @cached_property
    def blocks(self) -> list[tuple[BlockDef, BodyView]]:
        return [(block, self._body(block.body, Place("layer", block.weights))) for block in self.model.blocks.values()]

    @cached_property
    def program(self) -> BodyView:
        """What the whole program reads; its statements are `program_steps`."""
        calls = [item for item in self.model.program if not isinstance(item, Repeat)]
        whole = [weight for weight in self.model.weights if not weight.is_per_layer]
        return self._body([*calls, *(call for loop in self._loops for call in loop.body)], Place("i", whole))

    @property
    def program_steps(self) -> list[StepView | Repeat]:
        """The program's statements in order; a loop stands for itself."""
        place = Place("i", self.model.weights, self._declared(self.program))
        return [item if isinstance(item, Repeat) else self._step(item, place) for item in self.model.program]

    def loop(self, repeat: Repeat) -> BodyView:
        return self._body(repeat.body, Place(repeat.index, self.model.weights, self._declared(self.program)))

    def _declared(self, body: BodyView) -> frozenset[str]:
        return frozenset({*(weight.name for weight in body.weights), *(given.name for given in body.inputs)})

    def variant(self, block: BlockDef) -> str | None:
        """What the body of a block depends on besides the config: a tuple of Python over `c` and `layer`."""
        texts = [text_of(weight.when, "layer") for weight in block.weights if weight.when and weight.when.index]
        texts += _layer_texts(block.body)
        return tuple_text(dict.fromkeys(texts)) if texts else None

    @cached_property
    def step_dims(self) -> list[str]:
        """Symbols of the step that the module uses; T is local to each function."""
        bodies = [self.program, *(self.loop(loop) for loop in self._loops), *(body for _, body in self.blocks)]
        names = {
            name.id
            for body in bodies
            for given in body.all_inputs()
            for text in given.shape
            for name in ast.walk(ast.parse(text))
            if isinstance(name, ast.Name)
        }
        return sorted(names - {"c", "T"})

    @property
    def join_class(self) -> str:
        assert self.model.join is not None, "the base specs have concat_rows"
        return f"{self._module_of(self.model.join)}.{self.model.join.class_name}"

    @property
    def tiny(self) -> str:
        return lit(dict(self.model.tiny))

    @cached_property
    def _loops(self) -> list[Repeat]:
        return [item for item in self.model.program if isinstance(item, Repeat)]

    def _body(self, statements: Sequence[Statement], place: Place) -> BodyView:
        """The statements with the weights and inputs that they read themselves; branches declare their own."""
        direct = [statement for statement in statements if not isinstance(statement, Choose)]
        read = {name for statement in direct for name in _all_args(statement)}
        weights = tuple(w for w in place.weights if w.name in read and w.name not in place.known)
        inputs = tuple(given for given in self._inputs_of(direct, statements) if given.name not in place.known)
        set_here = {target for statement in plain_statements(statements) for target in _targets(statement)}
        inner = place.knowing({*(w.name for w in weights), *(given.name for given in inputs), *set_here})
        return BodyView(
            tuple(self._weight(weight, place.index) for weight in weights),
            tuple(self._input(given, place.index) for given in inputs),
            tuple(self._step(statement, inner) for statement in statements),
        )

    def _inputs_of(self, direct: Sequence[Plain], statements: Sequence[Statement]) -> list[InputDef]:
        """What every phase reads, in the order of the inputs file; a name that a statement sets is none."""
        own = {target for statement in plain_statements(statements) for target in _targets(statement)}
        read = {name for statement in direct for name in _common_args(statement) if name is not None}
        return [given for name, given in self.model.inputs.items() if name in read - own]

    def _step(self, statement: Statement, place: Place) -> StepView:
        match statement:
            case OpCall():
                return self._op_step(statement, is_program=place.index != "layer")
            case Attend():
                return StepView(call=self._call(statement.store), branches=self._branches(statement, place.index))
            case BlockCall():
                results = tuple(
                    (name, self._text(type_.dims[1]))
                    for name, type_ in zip(statement.targets, statement.types, strict=True)
                )
                reduce_ = tuple(self._reduce(name, "all_reduce") for name in statement.reduced)
                return StepView(block=statement, results=results, reduce=reduce_)
            case Choose():
                return StepView(
                    choices=tuple(
                        ChoiceView(branch.when.python if branch.when else None, self._body(branch.body, place))
                        for branch in statement.branches
                    )
                )

    def _op_step(self, call: OpCall, *, is_program: bool) -> StepView:
        if call.reduce is None or not is_program:
            return StepView(call=self._call(call))
        reduce_ = tuple(self._reduce(name, call.reduce) for name in call.targets)
        if call.shard_op is None:
            return StepView(call=self._call(call), reduce=reduce_)
        table = next(name for name in call.args if name in {weight.name for weight in self.model.weights})
        rows = next(weight for weight in self.model.weights if weight.name == table).dims[0]
        plain, first = self._call(call), f"c.rank * ({self._text(rows)} // c.tp)"
        function = f"{self._module_of(call.shard_op)}.{call.shard_op.name}"
        sharded = CallView(plain.targets, function, plain.args, (("first", first), *plain.attrs))
        return StepView(call=plain, sharded=sharded, reduce=reduce_)

    def _reduce(self, name: str, collective: str) -> CallView:
        op = self.specs.ops[collective]
        degree = (("W", "c.tp"),) if op.attr("W") else ()
        attrs = (*degree, ("group", '"tp"'), ("name", lit(name)))
        return CallView((name,), f"{self._module_of(op)}.{op.name}", (name,), attrs)

    def _branches(self, attend: Attend, index: str) -> tuple[BranchView, ...]:
        by_op: dict[str, list[Phase]] = {}
        for phase, call in attend.by_phase.items():
            by_op.setdefault(call.op.name, []).append(phase)
        groups = sorted(by_op.values(), key=len)
        return tuple(
            BranchView(
                tuple(phases),
                tuple(self._input(given, index) for given in self._only_in(attend, phases[0])),
                self._call(attend.by_phase[phases[0]]),
            )
            for phases in groups
        )

    def _only_in(self, attend: Attend, phase: Phase) -> list[InputDef]:
        common = set(_common_args(attend))
        names = [name for name in attend.by_phase[phase].args if name in self.model.inputs and name not in common]
        return [self.model.inputs[name] for name in names if name is not None]

    def _call(self, call: OpCall) -> CallView:
        args = [name if name is not None else "None" for name in call.args]
        while args and args[-1] == "None":
            args.pop()
        targets = [lit(target) for target in call.targets]
        names = ("name", targets[0]) if len(targets) == 1 else ("names", tuple_text(targets))
        return CallView(call.targets, f"{self._module_of(call.op)}.{call.op.name}", tuple(args), (*call.attrs, names))

    def _module_of(self, op: OpDef) -> str:
        is_own = self.is_overlay and not self.specs.raw.is_base(op.entry)
        return "own_ops" if is_own else "ops"

    def _input(self, given: InputDef, index: str) -> InputView:
        label = f'f"layers.{{{index}}}.{given.name}"' if given.is_per_layer else lit(given.name)
        dtype = "g.dtype" if given.type.element == "E" else lit(given.type.element)
        return InputView(given.name, label, dtype, tuple(self._text(dim) for dim in given.type.dims))

    def _exists(self, weight: WeightDef) -> str | None:
        """The condition for the weight's tensors to be there: in layer i, or for the whole model."""
        condition = layer_condition(self.model, weight)
        if condition is None or weight.is_per_layer or not mentions(condition, "i"):
            return condition
        return f"any({condition} for i in range(c.L))"

    def _weight(self, weight: WeightDef, index: str) -> WeightView:
        key = (weight.block, weight.name, index)
        if key not in self._views:
            self._views[key] = self._weights.view(weight, index)
        return self._views[key]

    def _text(self, size: Size) -> str:
        """A size as Python text: config names are fields of `c`, dims of the step are symbols."""
        text = str(size)
        if text not in self._texts:
            node = ast.parse(text, mode="eval").body
            self._texts[text] = render_names(node, lambda name: f"c.{name}" if name in self.model.config else name)
        return self._texts[text]


def _layer_texts(body: Sequence[Statement]) -> Iterator[str]:
    """The attrs and conditions of a block that read the layer's number."""
    for statement in body:
        if isinstance(statement, Choose):
            for branch in statement.branches:
                yield from [branch.when.python] if branch.when is not None and branch.when.index else []
                yield from _layer_texts(branch.body)
        elif not isinstance(statement, BlockCall):
            calls = statement.by_phase.values() if isinstance(statement, Attend) else [statement]
            yield from (text for call in calls for _, text in call.attrs if mentions(text, "layer"))


def _all_args(statement: Plain) -> set[str]:
    """The names that the statement reads in any phase."""
    if not isinstance(statement, Attend):
        return {name for name in statement.args if name is not None}
    return {name for call in (statement.store, *statement.by_phase.values()) for name in call.args if name is not None}


def _targets(statement: Plain) -> tuple[str, ...]:
    return (statement.target, *statement.store.targets) if isinstance(statement, Attend) else statement.targets


def _common_args(statement: Plain) -> list[str | None]:
    """The names that the statement reads in every phase."""
    if not isinstance(statement, Attend):
        return list(statement.args)
    calls = list(statement.by_phase.values())
    shared = [name for name in calls[0].args if all(name in call.args for call in calls)]
    return [*statement.store.args, *shared]


def _sentence(name: ConfigName) -> str:
    return name.doc[:1].upper() + name.doc[1:].rstrip(".") + "."


def _read_call(name: ConfigName) -> str:
    """The Python expression that reads a config name; constants stand for themselves."""
    if not name.keys:
        return _default_call(name) if name.default is not None else "None"
    keys = ", ".join(map(lit, name.keys))
    if name.items is not None:
        length = ", length=L" if name.items == "layers" else ""
        read = f"hf.items({keys}, kind={name.type}{length})"
        return read if name.default is None else f"{read} if hf.has({keys}) else {_default_call(name)}"
    if name.default is not None and (name.formula or (name.is_optional and name.default != "None")):
        return f"hf.{name.type}({keys}) if hf.has({keys}) else {_default_call(name)}"
    if name.is_optional:
        return f"hf.opt_{name.type}({keys})"
    default = f", default={name.default}" if name.default is not None else ""
    return f"hf.{name.type}({keys}{default})"


def _default_call(name: ConfigName) -> str:
    """The value of a name that is not read: computed where that may fail, and held to its type."""
    text = str(name.default)
    if name.items is not None and name.formula:
        return f"hf.per_layer({lit(name.name)}, {lit(name.formula)}, L, lambda i: {text})"
    if name.items == "layers":
        return f"hf.one_per_layer({lit(name.name)}, {text}, L)"
    if name.formula:
        text = f"hf.computed({lit(name.name)}, {lit(name.formula)}, lambda: {text})"
    return f"hf.sized({lit(name.name)}, {text})" if name.type == "size" and name.value is None else text
