"""Text of the functions that make blocks from codes, scales and minima: the inverse of a block's value.

value   d * rep(s % 16, 16, B) * bits(q, 2, B, 32) - dmin * rep(s // 16, 16, B)
blocks  block((scales + 16 * minima).to(torch.uint8), words(codes, 2, 2, torch.uint8, run=32), ...)
"""

from dataclasses import dataclass

from sageLLM.codegen.emit.format_stores import TYPES, words_text
from sageLLM.codegen.model.format import FormatDef, StoredTensor
from sageLLM.codegen.model.format_blocks import BlockStores, Term


@dataclass(frozen=True, slots=True)
class BlockStoresText:
    """The function of the blocks of one format: the parts that it takes, its lines and its result."""

    format: FormatDef
    stores: BlockStores

    @property
    def parts(self) -> list[str]:
        """The tensors that the function takes."""
        return list(self.stores.parts)

    @property
    def sizes(self) -> list[str]:
        """No numbers: the sizes of blocks are constants."""
        return []

    @property
    def lines(self) -> list[str]:
        """The parts by block: [N, K/B, length]."""
        return [f"{name} = in_blocks({name}, {size})" for name, size in self.stores.lengths.items()]

    @property
    def results(self) -> list[tuple[str, str]]:
        """All fields as one tensor."""
        return [("blocks", f"block({', '.join(map(self._field, self.format.tensors))})")]

    def _field(self, tensor: StoredTensor) -> str:
        terms = self.stores.fields[tensor.name]
        if (fields := terms[0].bits) is not None:
            return words_text(_text(terms[0])[0], fields, tensor)
        if terms[0].part not in self.stores.lengths:
            return f"{terms[0].part}[..., None].to(torch.{TYPES[tensor.element]})"
        texts = [_text(term) for term in terms]
        text = texts[0][0] if len(texts) == 1 else " + ".join(one for one, _ in texts)
        is_atom = len(texts) == 1 and texts[0][1]
        return f"{text if is_atom else f'({text})'}.to(torch.{TYPES[tensor.element]})"


def _text(term: Term) -> tuple[str, bool]:
    """The text of a term, and whether it has no operator outside of brackets."""
    text, is_atom = term.part, True
    for step, number in term.steps:
        inner = text if is_atom else f"({text})"
        match step:
            case "to" | "from":
                text, is_atom = f"{inner}[..., {f':{number}' if step == 'to' else f'{number}:'}]", True
            case _:
                text, is_atom = f"{inner} {step} {number}", False
    if term.times > 1:
        text, is_atom = f"{term.times} * {text if is_atom else f'({text})'}", False
    return text, is_atom
