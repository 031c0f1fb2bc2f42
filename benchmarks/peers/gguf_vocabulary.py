"""Adds the vocabulary of a checkpoint to its GGUF file in the form that llama.cpp tokenises with.

    PYTHON_OF_LLAMA benchmarks/peers/gguf_vocabulary.py FOLDER FILE.gguf NEW.gguf

For byte-level BPE whose rule to split words llama.cpp lacks: it splits as GPT-2 does. So words and spaces have the same
tokens, and other texts may differ. `sagellm convert` writes the tokenizer's own file instead, which others do not read.
"""

import argparse
import json
from pathlib import Path

import gguf

DROPPED = ("GGUF.", "general.architecture", "tokenizer.")


def add_vocabulary(folder: Path, source: Path, target: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith(DROPPED):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    _add_tokens(writer, tokenizer)
    for name in ("bos", "eos"):
        if (field := reader.fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", int(field.contents()))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    model, added = tokenizer["model"], {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    ids = model["vocab"] | added
    tokens = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in tokens] == list(range(len(tokens))), "the ids have gaps"
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in added else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "source", "target"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    add_vocabulary(options.folder, options.source, options.target)


if __name__ == "__main__":
    main()
