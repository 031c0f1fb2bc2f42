"""Emits one module per layout: its config class, its weights, a function per block, and the program."""

import ast
from collections.abc import Iterable, Sequence

from sageLLM.codegen.emit.builder_views import (
    BodyView,
    BranchView,
    CallView,
    FieldView,
    InputView,
    StepView,
)
from sageLLM.codegen.emit.weights import WeightText, WeightView, tuple_text
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.link.config import render as render_names
from sageLLM.codegen.model.layout import (
    Attend,
    BlockCall,
    BlockDef,
    ConfigName,
    InputDef,
    ModelDef,
    OpCall,
    Phase,
    Repeat,
    WeightDef,
)
from sageLLM.codegen.model.op import OpDef, class_name
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header, lit


def emit_builders(specs: Specs, renderer: Renderer) -> list[Output]:
    """`builders/llama.py` for `specs/models/llama.yaml`, and the table of all in `builders/__init__.py`:

    class LlamaConfig(ModelSizes): ...
    def weights(c: LlamaConfig) -> Iterator[WeightSpec]: ...
    def attention(g: GraphWriter, c: LlamaConfig, stage: Stage, layer: int, n: TensorRef) -> tuple[TensorRef, ...]: ...
    def program(g: GraphWriter, c: LlamaConfig, stage: Stage) -> list[TensorRef]: ...
    LLAMA = ModelLayout(name="llama", ...)
    """
    models = [model for model in specs.models.values() if not specs.raw.is_base(model.entry)]
    return [_module(model, specs, renderer) for model in models] + [_registry(models, renderer)]


def _module(model: ModelDef, specs: Specs, renderer: Renderer) -> Output:
    text = renderer.render("builder.py.jinja", view=BuilderView(model, specs))
    entries = (model.ref, *((model.base.ref,) if model.base else ()))
    return Output(f"builders/{model.name}.py", header(model.entry.doc.file, model.name) + text, entries)


def _registry(models: Sequence[ModelDef], renderer: Renderer) -> Output:
    names = [model.name for model in models]
    return Output(
        "builders/__init__.py",
        header("specs/models", "models")
        + renderer.render(
            "builders_registry.py.jinja", names=names, exports=sorted([*(name.upper() for name in names), "MODELS"])
        ),
        tuple(model.ref for model in models),
    )


class BuilderView:
    """Everything that templates/builder.py.jinja shows of one layout."""

    def __init__(self, model: ModelDef, specs: Specs) -> None:
        self.model = model
        self.specs = specs
        self.config_class = class_name(model.name) + "Config"
        self.constant = model.name.upper()
        self.is_overlay = specs.is_overlay
        self.extends = model.base.name if model.base else None
        self._weights = WeightText(self._text, lambda name: model.config[name].words)

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

    @property
    def all_weights(self) -> list[WeightDef]:
        return [*self.model.weights, *(weight for block in self.model.blocks.values() for weight in block.weights)]

    @property
    def first_weights(self) -> list[WeightView]:
        """The model's own weights before the layers."""
        own = self.model.weights
        cut = next((i for i, weight in enumerate(own) if weight.is_per_layer), len(own))
        return [self._weights.view(weight, "i") for weight in own[:cut]]

    @property
    def layer_weights(self) -> list[WeightView]:
        return [self._weights.view(weight, "i") for weight in self.all_weights if weight.is_per_layer]

    @property
    def last_weights(self) -> list[WeightView]:
        own = self.model.weights
        cut = next((i for i, weight in enumerate(own) if weight.is_per_layer), len(own))
        return [self._weights.view(weight, "i") for weight in own[cut:] if not weight.is_per_layer]

    @property
    def blocks(self) -> list[tuple[BlockDef, BodyView]]:
        return [(block, self._body(block.body, block.weights, "layer")) for block in self.model.blocks.values()]

    @property
    def program(self) -> BodyView:
        calls = [item for item in self.model.program if not isinstance(item, Repeat)]
        weights = [weight for weight in self.model.weights if not weight.is_per_layer]
        return self._body([*calls, *(call for loop in self._loops for call in loop.body)], weights, "i")

    @property
    def program_steps(self) -> list[StepView | Repeat]:
        """The program's statements in order; a loop stands for itself."""
        return [item if isinstance(item, Repeat) else self._step(item, "i") for item in self.model.program]

    def loop(self, repeat: Repeat) -> BodyView:
        weights = [weight for weight in self.model.weights if weight.is_per_layer]
        used = {name for call in repeat.body for name in call.args}
        return self._body(repeat.body, [weight for weight in weights if weight.name in used], repeat.index)

    @property
    def step_dims(self) -> list[str]:
        """Symbols of the step that the module uses; T is local to each function."""
        bodies = [self.program, *(body for _, body in self.blocks)]
        inputs = [i for body in bodies for i in body.inputs]
        inputs += [i for body in bodies for step in body.steps for branch in step.branches for i in branch.inputs]
        names = {
            name.id
            for i in inputs
            for text in i.shape
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

    @property
    def _loops(self) -> list[Repeat]:
        return [item for item in self.model.program if isinstance(item, Repeat)]

    def _body(
        self, statements: Sequence[OpCall | Attend | BlockCall], weights: Iterable[WeightDef], index: str
    ) -> BodyView:
        inputs = tuple(self._input(given, index) for given in self._inputs_of(statements))
        steps = tuple(self._step(statement, index) for statement in statements)
        branched = [i for step in steps for branch in step.branches for i in branch.inputs]
        needs_rows = any("T" in text.split() for i in (*inputs, *branched) for text in i.shape)
        return BodyView(needs_rows, tuple(self._weights.view(weight, index) for weight in weights), inputs, steps)

    def _inputs_of(self, statements: Sequence[OpCall | Attend | BlockCall]) -> list[InputDef]:
        """What every phase reads, in the order of the inputs file; a name that a statement sets is none."""
        own = {target for statement in statements for target in _targets(statement)}
        read = {name for statement in statements for name in _common_args(statement) if name is not None}
        return [given for name, given in self.model.inputs.items() if name in read - own]

    def _step(self, statement: OpCall | Attend | BlockCall, index: str) -> StepView:
        match statement:
            case OpCall():
                return self._op_step(statement, is_program=index != "layer")
            case Attend():
                return StepView(call=self._call(statement.store), branches=self._branches(statement, index))
            case BlockCall():
                results = tuple(
                    (name, self._text(type_.dims[1]))
                    for name, type_ in zip(statement.targets, statement.types, strict=True)
                )
                reduce_ = tuple(self._reduce(name, "all_reduce") for name in statement.reduced)
                return StepView(block=statement, results=results, reduce=reduce_)

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

    def _text(self, size: Size) -> str:
        """A size as Python text: config names are fields of `c`, dims of the step are symbols."""
        node = ast.parse(str(size), mode="eval").body
        return render_names(node, lambda name: f"c.{name}" if name in self.model.config else name)


def _targets(statement: OpCall | Attend | BlockCall) -> tuple[str, ...]:
    return (statement.target, *statement.store.targets) if isinstance(statement, Attend) else statement.targets


def _common_args(statement: OpCall | Attend | BlockCall) -> list[str | None]:
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
        return name.default or "None"
    keys = ", ".join(map(lit, name.keys))
    if name.is_optional:
        return f"hf.opt_{name.type}({keys})"
    default = f", default={name.default}" if name.default is not None else ""
    return f"hf.{name.type}({keys}{default})"
