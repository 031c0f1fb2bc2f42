"""Emits one module per layout: its config class, its weights, a function per block, and the program."""

import ast
from collections.abc import Iterable
from functools import cached_property
from itertools import groupby

from sageLLM.codegen.contents import Contents, Row, class_name
from sageLLM.codegen.emit.builder_bodies import BodyScope, BodyWriter, layer_texts
from sageLLM.codegen.emit.builder_views import BodyView, StepView
from sageLLM.codegen.emit.config_fields import FieldView, config_fields
from sageLLM.codegen.emit.key_heads import KeyHeads, derived_sizes, key_heads_of
from sageLLM.codegen.emit.layer_conditions import text_of
from sageLLM.codegen.emit.weights import WeightView, tuple_text
from sageLLM.codegen.model.layout import BlockDef, ModelDef, Repeat, WeightDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header, lit
from sageLLM.codegen.schema.models import Scalar

WeightGroup = tuple[str | None, list[WeightView]]
"""Weights with the condition under which they exist."""


def emit_builder(model: ModelDef, specs: Specs, renderer: Renderer) -> list[Output]:
    """`builders/llama.py` for `specs/models/llama.yaml`:

    class LlamaConfig(ModelSizes): ...
    def weights(c: LlamaConfig) -> Iterator[WeightSpec]: ...
    def attention(g: GraphWriter, c: LlamaConfig, stage: Stage, layer: int, n: TensorRef) -> tuple[TensorRef, ...]: ...
    def program(g: GraphWriter, c: LlamaConfig, stage: Stage) -> list[TensorRef]: ...
    LLAMA = ModelLayout(name="llama", ...)
    """
    text = renderer.render("builder.py.jinja", view=BuilderView(model, specs))
    entries = (model.ref, *(source.ref for source in model.sources))
    text = header(model.entry.doc.file, model.name) + text
    return [Output(f"builders/{model.name}.py", text, entries, model_rows(model))]


def model_rows(model: ModelDef) -> tuple[Row, ...]:
    """The ops that a layout calls."""
    return tuple({"op": name, "model": model.name} for name in model.ops_called)


def emit_builder_table(contents: Contents, renderer: Renderer) -> list[Output]:
    """`builders/__init__.py` with MODELS."""
    text = renderer.render("builders_registry.py.jinja", layouts=contents.models)
    entries = tuple(model.ref for model in contents.models)
    return [Output("builders/__init__.py", header("specs/models", "models") + text, entries)]


class BuilderView:
    """The view of one layout for templates/builder.py.jinja."""

    def __init__(self, model: ModelDef, specs: Specs) -> None:
        self.model = model
        self.specs = specs
        self.config_class = class_name(model.name) + "Config"
        self.constant = model.name.upper()
        self.checkpoints = model.checkpoints
        self.is_overlay = specs.is_overlay
        self.extends = model.base.name if model.base else None
        self._bodies = BodyWriter(model, specs)

    @property
    def fields(self) -> list[FieldView]:
        return config_fields(self.model)

    def group(self, items: Iterable[str]) -> str:
        """A tuple of Python texts."""
        return tuple_text(items)

    def quoted(self, items: Iterable[str]) -> str:
        """A tuple of text literals."""
        return tuple_text(map(lit, items))

    def mapping(self, items: Iterable[tuple[str, Scalar]]) -> str:
        """A dict of literals."""
        return "{" + ", ".join(f"{lit(key)}: {lit(value)}" for key, value in items) + "}"

    @property
    def has_fallbacks(self) -> bool:
        """Whether some name is read from the first of several keys."""
        return any(len(name.keys) > 1 for name in self.model.config.values())

    @property
    def alibi(self) -> str:
        """The argument of the config class for the ALiBi table, if any."""
        found = self.model.alibi
        return f"alibi=AlibiSpec({found.heads}, {found.max_bias})" if found is not None else ""

    @property
    def cache(self) -> str:
        """The arguments of KvShape."""
        found = self.model.cache
        shapes = [tuple_text(map(self._bodies.size_text, shape)) for shape in (found.k, found.v)]
        return ", ".join([*shapes, *(["is_shared=True"] if found.is_shared else [])])

    @property
    def divided(self) -> list[tuple[str, str, str]]:
        """(function, key of config.json as Python, name) of the sizes that are divided over the ranks."""
        heads = self._key_heads.name if self._key_heads is not None else None
        functions = {name: "divided_heads" if name == heads else "divided" for name in self.model.divides}
        return [(function, self.model.config[name].key_text, name) for name, function in functions.items()]

    @property
    def derived(self) -> list[tuple[str, str]]:
        """(name, its value as Python over `c`) of the sizes that depend on the number of key heads."""
        if self._key_heads is None:
            return []
        found = derived_sizes(self.model, self._key_heads.name)
        return [(one.name, self._bodies.size_text(one.default or "")) for one in found]

    @cached_property
    def _key_heads(self) -> KeyHeads | None:
        return key_heads_of(self.model)

    @cached_property
    def all_weights(self) -> list[WeightDef]:
        return [*self.model.weights, *(weight for block in self.model.blocks.values() for weight in block.weights)]

    @property
    def first_weights(self) -> list[WeightGroup]:
        """The weights of the model that are defined before the per-layer ones."""
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
        """Runs of weights that exist under the same condition."""
        views = [self._bodies.weight(weight, "i") for weight in weights]
        return [(exists, list(group)) for exists, group in groupby(views, key=lambda view: view.exists)]

    @cached_property
    def blocks(self) -> list[tuple[BlockDef, BodyView]]:
        blocks = self.model.blocks.values()
        return [(block, self._bodies.body(block.body, BodyScope("layer", block.weights))) for block in blocks]

    @cached_property
    def program(self) -> BodyView:
        """The whole program with the weights and inputs that it reads; its statements are in `program_steps`."""
        calls = [item for item in self.model.program if not isinstance(item, Repeat)]
        whole = [weight for weight in self.model.weights if not weight.is_per_layer]
        statements = [*calls, *(call for loop in self._loops for call in loop.body)]
        return self._bodies.body(statements, BodyScope("i", whole))

    @property
    def program_steps(self) -> list[StepView | Repeat]:
        """The statements of the program in order; loops are left as they are."""
        scope = BodyScope("i", self.model.weights, self._declared(self.program))
        return [item if isinstance(item, Repeat) else self._bodies.step(item, scope) for item in self.model.program]

    def loop(self, repeat: Repeat) -> BodyView:
        scope = BodyScope(repeat.index, self.model.weights, self._declared(self.program))
        return self._bodies.body(repeat.body, scope)

    def _declared(self, body: BodyView) -> frozenset[str]:
        return frozenset({*(weight.name for weight in body.weights), *(one.name for one in body.inputs)})

    def variant(self, block: BlockDef) -> str | None:
        """The layer-dependent values in the body of a block, as a tuple of Python over `c` and `layer`.

        Layers with equal values share one body.
        """
        texts = [text_of(weight.when, "layer") for weight in block.weights if weight.when and weight.when.index]
        texts += layer_texts(block.body)
        return tuple_text(dict.fromkeys(texts)) if texts else None

    @cached_property
    def step_dims(self) -> list[str]:
        """The symbols of step dims that the module uses; T is local to each function."""
        bodies = [self.program, *(self.loop(loop) for loop in self._loops), *(body for _, body in self.blocks)]
        names = {
            name.id
            for body in bodies
            for one in body.all_inputs()
            for text in one.shape
            for name in ast.walk(ast.parse(text))
            if isinstance(name, ast.Name)
        }
        return sorted(names - {"c", "T"})

    @property
    def join_class(self) -> str:
        assert self.model.join is not None, "the base specs have concat_rows"
        return f"{self._bodies.module_of(self.model.join)}.{self.model.join.class_name}"

    @property
    def tiny(self) -> str:
        return lit(dict(self.model.tiny))

    @cached_property
    def _loops(self) -> list[Repeat]:
        return [item for item in self.model.program if isinstance(item, Repeat)]
