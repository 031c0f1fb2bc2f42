"""Writes the bounds of a mask as Triton: the first and the last key that a tile of rows can see."""

from dataclasses import dataclass

from sageLLM.codegen.kernel.mask import MaskBounds


@dataclass(frozen=True, slots=True)
class MaskText:
    """The bounds as text; templates call `first` and `stop`."""

    bounds: MaskBounds

    def first(self, m: str) -> str:
        """The first key that is visible to rows from m on."""
        first = "0"
        for window in self.bounds.windows:
            first = f"(tl.maximum({m} - {window.attr} + 1, {first}) if {window.attr} is not None else {first})"
        for chunk in self.bounds.chunks:
            first = f"(tl.maximum({m} - {m} % {chunk}, {first}) if {chunk} is not None else {first})"
        return first

    def stop(self, m: str, length: str) -> str:
        """The end of the keys, of `length` keys, that are visible to rows up to m."""
        bounds, causal_stop = self.bounds, f"tl.minimum({m} + 1, {length})"
        if bounds.is_causal:
            stop = causal_stop
        elif bounds.causal_attr:
            stop = f"({causal_stop} if {bounds.causal_attr} else {length})"
        else:
            stop = length
        for window in bounds.windows:
            if window.is_symmetric:
                stop = f"(tl.minimum({m} + {window.attr}, {stop}) if {window.attr} is not None else {stop})"
        return stop

    @property
    def unmasked(self) -> str:
        """The condition under which the upper bound is equivalent to the mask."""
        if not self.bounds.is_exact:
            return "False"
        limits = [*(window.attr for window in self.bounds.windows), *self.bounds.chunks]
        return " and ".join(f"{attr} is None" for attr in limits) or "True"
