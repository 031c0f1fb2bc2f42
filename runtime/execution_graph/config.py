"""Configuration of a graph: the sizes of the model and the degrees of parallelism."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model, independent of its family."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_seq_len: int = 4096

    def to_hf(self) -> dict[str, int]:
        """The same sizes under the keys of a Hugging Face config.json."""
        return {
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_seq_len,
        }


@dataclass(frozen=True)
class ParallelConfig:
    """The degrees of parallelism of a model. Data parallelism copies the graph, so the graph does not show it."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
