"""One emitter per output: each turns linked specs into generated files, not yet formatted."""

from collections.abc import Callable

from sageLLM.codegen.emit.builders import emit_builders
from sageLLM.codegen.emit.cpu import emit_cpu
from sageLLM.codegen.emit.docs import emit_docs
from sageLLM.codegen.emit.hardware import emit_hardware
from sageLLM.codegen.emit.op_tests import emit_op_tests
from sageLLM.codegen.emit.ops import emit_ops
from sageLLM.codegen.emit.package import emit_package
from sageLLM.codegen.emit.passes import emit_passes
from sageLLM.codegen.emit.reference import emit_reference
from sageLLM.codegen.emit.rule_tests import emit_rule_tests
from sageLLM.codegen.emit.schemas import emit_schemas
from sageLLM.codegen.emit.triton import emit_triton
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer

EMITTERS: tuple[Callable[[Specs, Renderer], list[Output]], ...] = (
    emit_ops,
    emit_reference,
    emit_triton,
    emit_cpu,
    emit_builders,
    emit_passes,
    emit_hardware,
    emit_op_tests,
    emit_rule_tests,
    emit_docs,
    emit_schemas,
    emit_package,
)
