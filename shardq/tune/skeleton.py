"""A causal LM of transformers without weights: its modules on the meta device, its blocks, and the buffers that it
computes itself."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from shardq.errors import BadOption, SourceUnreadable, UnsupportedSource
from shardq.sources.base import Source
from shardq.tune.library import import_part, import_whole

SIDE_SUFFIXES: Final = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"})
MAX_SIDE_FILE_BYTES: Final = 128 << 20
CODE_SUFFIX: Final = ".py"


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model whose parameters have shapes and no content, but for those that the caller gives it."""

    model: Any  # a PreTrainedModel
    decoder: str  # the module that holds the blocks, its embedding and its last norm
    blocks: str  # the ModuleList of blocks
    count: int
    dtype: torch.dtype  # what is computed with

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def block_name(self, index: int) -> str:
        """The name of a block's module."""
        return f"{self.blocks}.{index}"

    def block(self, index: int) -> nn.Module:
        """The module of a block, without content."""
        found: nn.Module = self.model.get_submodule(self.block_name(index))
        return found


@contextmanager
def side_files(source: Source, code: bool) -> Iterator[Path]:
    """A temporary folder with a source's small files: configuration, tokenizer, and its code if that is wanted."""
    with tempfile.TemporaryDirectory(prefix="shardq-side-") as folder:
        for file in source.files():
            suffix = os.path.splitext(file.name)[1]
            wanted = suffix in SIDE_SUFFIXES and (code or suffix != CODE_SUFFIX) and "/" not in file.name
            if wanted and file.size_bytes <= MAX_SIDE_FILE_BYTES and not file.name.endswith(".index.json"):
                Path(folder, file.name).write_bytes(source.read(file.name, 0, file.size_bytes))
        yield Path(folder)


def make_skeleton(
    source: Source, dtype: torch.dtype | None, trust_remote_code: bool, attention: str | None
) -> Skeleton:
    """The model that a source's config.json describes, in `dtype` or its own. The text part of a model with images is
    found; the rest stays without content.

    Raises SourceUnreadable without a config.json, UnsupportedSource for what transformers does not know or what has no
    list of blocks, BadOption for a model that needs its own code.
    """
    if not any(f.name == "config.json" for f in source.files()):
        raise SourceUnreadable(f"{source.label} has no config.json: block mode needs it to build the model")
    with side_files(source, trust_remote_code) as folder:
        config = load_config(folder, source.label, trust_remote_code)
        if attention is not None:
            config._attn_implementation = attention
        wanted = dtype or own_dtype(config)
        model = _make_model(config, wanted, trust_remote_code, source.label)
    model.eval()
    model.requires_grad_(False)
    decoder, blocks = _find_blocks(model, source.label)
    skeleton = Skeleton(model, decoder, blocks, len(model.get_submodule(blocks)), wanted)
    for name, module in list(model.named_modules()):
        if not name.startswith(f"{blocks}."):
            compute_buffers(model, module, name)
    return skeleton


def load_config(folder: Path, label: str, trust_remote_code: bool) -> Any:
    """The configuration, without what says how a source's weights are quantized: they are decoded before."""
    transformers = import_whole()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError, AttributeError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise BadOption(f"{label} needs code of its own: --trust-remote-code runs it") from error
        raise UnsupportedSource(f"{label}: transformers cannot read its config.json ({_line(error)})") from error
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def own_dtype(config: Any) -> torch.dtype:
    """The type that a configuration names, else bfloat16."""
    for part in (config, config.get_text_config()):
        named = getattr(part, "dtype", None)
        found = getattr(torch, named, None) if isinstance(named, str) else named
        if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1:
            return found
    return torch.bfloat16


def _make_model(config: Any, dtype: torch.dtype, trust_remote_code: bool, label: str) -> Any:
    transformers, initialization = import_whole(), import_part("initialization")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedSource(f"{label} has an encoder and a decoder: block mode reads decoders alone")
    known = transformers.AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    text = type(config) in known or (remote and trust_remote_code)
    auto = transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageTextToText
    try:
        with torch.device("meta"), initialization.no_init_weights():
            return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise BadOption(f"{label} needs code of its own: --trust-remote-code runs it") from error
        raise UnsupportedSource(
            f"{label}: transformers makes no language model of its config.json ({_line(error)})"
        ) from error


def _find_blocks(model: Any, label: str) -> tuple[str, str]:
    """The decoder, and in it the list of as many blocks as the configuration has layers, the largest of them."""
    decoder = model.get_decoder()
    name = next(n for n, m in model.named_modules() if m is decoder)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and _inside(n, name)]
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in lists if len(m) == layers}
    if not sizes:
        raise UnsupportedSource(f"{label}: {type(model).__name__} has no list of its {layers} layers")
    return name, max(sizes, key=lambda n: sizes[n])


def _inside(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def compute_buffers(model: Any, module: nn.Module, name: str) -> None:
    """Compute the buffers of one module that no checkpoint has (tables of rotary embeddings), by the model's own
    initialization: as transformers does it when it loads a model. `name` is the module's in `model`; it may be a copy.

    Raises UnsupportedSource for a buffer of which nobody says what is in it.
    """
    own = [n for n, b in module._buffers.items() if b is not None and n in module._non_persistent_buffers_set]
    for n in own:
        buffer = module._buffers[n]
        assert buffer is not None
        empty = torch.empty_like(buffer, device="cpu")
        module._buffers[n] = empty.fill_(float("nan")) if empty.is_floating_point() else empty
    if not own:
        return
    _owner(model, name)._init_weights(module)
    for n in own:
        buffer = module._buffers[n]
        assert buffer is not None
        if buffer.is_floating_point() and buffer.isnan().any():
            raise UnsupportedSource(f"{name}.{n} is in no checkpoint, and {type(module).__name__} does not compute it")


def _owner(model: Any, name: str) -> Any:
    """The model of transformers that a module belongs to, the innermost."""
    pretrained = import_part("modeling_utils").PreTrainedModel
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        found = model.get_submodule(".".join(parts[:end]))
        if isinstance(found, pretrained):
            return found
    return model


def set_content(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter or a buffer its content."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
        return
    parameter = nn.Parameter(value, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers must not make it random
    owner._parameters[leaf] = parameter


def content(module: nn.Module) -> Mapping[str, torch.Tensor]:
    """Parameters and buffers that a checkpoint has, by name; those that are tied under each."""
    return module.state_dict(keep_vars=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
