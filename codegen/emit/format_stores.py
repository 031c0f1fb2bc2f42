"""Text of the functions that make stored tensors from codes, scales and zeros: the inverse of a format's value.

    value   (bits(w, b, K) - 2 ** (b - 1)) * rep(s, G, K)
    stored  {"w": words(codes + (1 << b - 1), b, 1, torch.int32), "s": scales}

Codes [N, K] are relative to a zero that is equal for all of them; scales and other zeros have an element per group.
"""

from dataclasses import dataclass

from sageLLM.codegen.emit.format_text import TORCH, FormatText
from sageLLM.codegen.model.format import Bits, FormatDef, StoredTensor
from sageLLM.codegen.model.format_stores import Stores, tensor_of

TYPES = {**TORCH, "f8": "float8_e4m3fn"}


@dataclass(frozen=True, slots=True)
class StoresText:
    """The function of the stored tensors of one format: the sizes that it takes, and its result."""

    format: FormatDef
    stores: Stores

    @property
    def parts(self) -> list[str]:
        """The tensors that the function takes."""
        return ["codes", "scales", *(["zeros"] if self.stores.zeros is not None else [])]

    @property
    def sizes(self) -> list[str]:
        """The sizes without a constant in the results."""
        text = FormatText(self.format)
        return [name for name in text.sizes if name == self.stores.kind]

    @property
    def lines(self) -> list[str]:
        """Assignments before the results: none."""
        return []

    @property
    def results(self) -> list[tuple[str, str]]:
        """The stored tensors by name."""
        return [(tensor.name, self._tensor_text(tensor)) for tensor in self.format.tensors]

    def _tensor_text(self, tensor: StoredTensor) -> str:
        stores = self.stores
        if tensor.name == tensor_of(stores.scales):
            return self._scales(tensor)
        if stores.zeros is not None and tensor.name == tensor_of(stores.zeros):
            return self._words("zeros", stores.zeros, tensor)
        text = "codes"
        if stores.center is not None:
            text = f"{text} + {FormatText(self.format).text_of(stores.center)}"
        if isinstance(stores.codes, Bits):
            return self._words(text, stores.codes, tensor)
        return f"{text}{_transposed(tensor)}.to(torch.{TYPES[tensor.element]})"

    def _scales(self, tensor: StoredTensor) -> str:
        text = f"scales{_transposed(tensor)}" if tensor.dims else "scales.reshape(1)"
        return text if tensor.element == "float" else f"{text}.to(torch.{TYPES[tensor.element]})"

    def _words(self, text: str, fields: Bits, tensor: StoredTensor) -> str:
        return words_text(f"{text}{_transposed(tensor)}", fields, tensor)


def words_text(text: str, fields: Bits, tensor: StoredTensor) -> str:
    """Words of a tensor with the elements of `text`, whose dims are in its order."""
    axis = [extent.dim for extent in tensor.dims].index(fields.dim)
    extra = f", order={fields.order}" if fields.order is not None else f", run={fields.run}" if fields.run > 1 else ""
    return f"words({text}, {fields.width}, {axis}, torch.{TYPES[tensor.element]}{extra})"


def _transposed(tensor: StoredTensor) -> str:
    return ".T" if [extent.dim for extent in tensor.dims] == ["K", "N"] else ""
