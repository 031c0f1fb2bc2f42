"""Token masks of the sequences with a grammar, computed in a thread while the forward pass of the same step runs.

A mask depends on the token of the step before, which is known when the step begins, and is needed once the logits are
computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.grammar.constraint import GrammarConstraint
from sageLLM.runtime.grammar.masks import MaskFiller
from sageLLM.runtime.worker.order_thread import OrderThread
from sageLLM.runtime.worker.orders import NewSequence
from sageLLM.runtime.worker.sequences import SequenceTable


class TokenMasks:
    """The masks of one worker. The thread starts with the first one."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._filler = MaskFiller()
        self._thread: OrderThread[Sequence[GrammarConstraint], None] | None = None

    def constrain(self, new: Sequence[NewSequence], sequences: SequenceTable) -> None:
        """Adds the grammars of new sequences."""
        for one in new:
            if one.params.structured_outputs is not None:
                sampling = sequences.sampling(one.sequence_id)
                sampling.constraint = GrammarConstraint(
                    self._compiler, one.params.structured_outputs, one.eos_token_ids, sampling.output_token_ids
                )

    def start(self, constraints: Sequence[GrammarConstraint]) -> None:
        """Starts the masks of a step. `GrammarConstraint.bias` waits for them."""
        self._thread = self._thread or OrderThread("sagellm-masks")
        pending = self._thread.submit(self._filler.fill, constraints)
        for one in constraints:
            one.pending = pending

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()
