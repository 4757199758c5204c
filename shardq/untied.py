"""A head that is the embedding gets weights of its own, the same, so that it can be quantized."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from shardq.checkpoint import TensorRef

HEADS: Final[Mapping[str, str]] = MappingProxyType(
    {  # embedding -> where readers look for the head (transformers 5.23, vLLM 0.33)
        "model.embed_tokens": "lm_head",
        "model.language_model.embed_tokens": "lm_head",
        "language_model.model.embed_tokens": "language_model.lm_head",
        "transformer.wte": "lm_head",
    }
)
GENERATING: Final = ("ForCausalLM", "ForConditionalGeneration")  # classes with a head; without one it is the embedding
TIED: Final = "tie_word_embeddings"
TEXT: Final = "text_config"  # may say it for the text model


def says_tied(config: Mapping[str, Any]) -> Any:
    """What config.json says of the head being the embedding, at the top or for the text model; None where it says
    nothing."""
    text = config.get(TEXT)
    return config.get(TIED, text.get(TIED) if isinstance(text, Mapping) else None)


def is_tied(config: Mapping[str, Any] | None) -> bool:
    """True where the head is the embedding unless the checkpoint has one."""
    said, classes = says_tied(config or {}), (config or {}).get("architectures")
    if said is not None or not isinstance(classes, list):
        return bool(said)
    return any(isinstance(c, str) and c.endswith(GENERATING) for c in classes)


def untied_head(tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None) -> TensorRef | None:
    """The head of a tied model that has none: see `embedding_as`. None for other models, and where the embedding has a
    name that is not known."""
    if not is_tied(config) or any(f"{head}.weight" in tensors for head in HEADS.values()):
        return None
    made = (embedding_as(f"{head}.weight", tensors) for head in HEADS.values())
    return next((head for head in made if head), None)


def embedding_as(name: str, tensors: Mapping[str, TensorRef]) -> TensorRef | None:
    """The bytes of an embedding under the name that readers of a head look for; None where none goes with it."""
    for module, head in HEADS.items():
        if f"{head}.weight" == name and (embedding := tensors.get(f"{module}.weight")):
            return replace(embedding, name=name, encoded=tuple(replace(e, name=name) for e in embedding.encoded))
    return None
