"""A small model made on the spot, so that everything can be tried without a download.

A mixture-of-experts model with the names and config of Qwen2-MoE as transformers reads them (Qwen2MoeForCausalLM): one
dense layer, two with four experts and a shared expert, router weights in FP32, everything else BF16, untied head. The
bytes are the same on every machine: they come from PCG64 and exact arithmetic only.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shardq.files.atomic import write_atomic
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.sources.base import FileReader, SourceFile, check_part, find_file

_SEED: Final = 20260701
_HIDDEN: Final = 256
_KEY_VALUE: Final = 128  # 2 heads of 64
_DENSE: Final = 512
_EXPERT: Final = 128
_SHARED: Final = 256
_EXPERTS: Final = 4
_VOCAB: Final = 512
_DENSE_LAYERS: Final = (0,)
_LAYERS: Final = 3
_END_TOKEN: Final = 256  # behind the 256 byte tokens

_CONFIG: Final[Mapping[str, object]] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": _END_TOKEN,
    "hidden_act": "silu",
    "hidden_size": _HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": _DENSE,
    "max_position_embeddings": 2048,
    "mlp_only_layers": list(_DENSE_LAYERS),
    "model_type": "qwen2_moe",
    "moe_intermediate_size": _EXPERT,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts": _EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": _SHARED,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": _VOCAB,
}

_README: Final = (
    "---\n"
    "license: apache-2.0\n"
    "library_name: transformers\n"
    "pipeline_tag: text-generation\n"
    "tags: [demo]\n"
    "---\n"
    "# demo\n\n"
    "Random weights in the shape of a small mixture-of-experts model. It says nothing sensible.\n"
)


@dataclass(frozen=True, slots=True)
class DemoSource:
    """The demo model in memory; remote, so that it takes the same way through a run as a repo."""

    contents: Mapping[str, bytes]
    listing: tuple[SourceFile, ...]
    label: str = "demo"
    commit: str | None = None
    remote: bool = True

    def files(self) -> tuple[SourceFile, ...]:
        """All files, with their sha256."""
        return self.listing

    def read(self, name: str, begin: int, end: int) -> bytes:
        """A part of a file, from memory."""
        find_file(self.listing, name, self.label)
        return self.contents[name][begin:end]

    def local_path(self, name: str) -> Path | None:
        """None: there is no such file on disk."""
        del name
        return None

    def fetch(self, name: str, target: Path, on_bytes: Callable[[int], None]) -> str | None:
        """Write a file. Raises DiskFull, NotWritable."""
        file = find_file(self.listing, name, self.label)
        write_atomic(target, self.contents[name])
        on_bytes(file.size_bytes)
        return file.sha256

    def open_file(self, name: str, on_bytes: Callable[[int], None]) -> FileReader:
        """Reads from memory."""
        find_file(self.listing, name, self.label)
        return MemoryReader(self.contents[name], name, on_bytes)


class MemoryReader:
    """Reads a file that is in memory."""

    def __init__(self, data: bytes, name: str, on_bytes: Callable[[int], None]) -> None:
        self._data = data
        self._name = name
        self._on_bytes = on_bytes

    def read_into(self, begin: int, out: memoryview) -> None:
        """Raises CorruptShard past the end of the file."""
        check_part(self._name, begin, out.nbytes, len(self._data))
        out.cast("B")[:] = memoryview(self._data)[begin : begin + out.nbytes]
        self._on_bytes(out.nbytes)

    def close(self) -> None:
        """Nothing to let go of."""


def open_demo() -> DemoSource:
    """Make the demo model: 5 MB in three shards, config, tokenizer and card."""
    parts = [list(_embedding()), *(list(_layer(i)) for i in range(_LAYERS)), list(_head())]
    shards = [parts[0] + parts[1], parts[2], parts[3] + parts[4]]
    weight_map: dict[str, str] = {}
    contents: dict[str, bytes] = {}
    total_bytes = 0
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        contents[name] = _shard(specs)
        weight_map.update((spec.name, name) for spec in specs)
        total_bytes += sum(end - begin for begin, end in plan_file(specs).offsets.values())
    contents["model.safetensors.index.json"] = _json(
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    )
    contents["config.json"] = _json(_CONFIG)
    contents["generation_config.json"] = _json({"do_sample": False, "eos_token_id": _END_TOKEN})
    contents["tokenizer.json"] = _json(_tokenizer())
    contents["tokenizer_config.json"] = _json(
        {
            "eos_token": "<|end|>",
            "model_max_length": 2048,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
    )
    contents["README.md"] = _README.encode()
    listing = tuple(
        SourceFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(contents.items())
    )
    return DemoSource(contents, listing)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _embedding() -> Iterator[TensorSpec]:
    yield TensorSpec("model.embed_tokens.weight", "BF16", (_VOCAB, _HIDDEN))


def _head() -> Iterator[TensorSpec]:
    yield TensorSpec("model.norm.weight", "BF16", (_HIDDEN,))
    yield TensorSpec("lm_head.weight", "BF16", (_VOCAB, _HIDDEN))


def _layer(number: int) -> Iterator[TensorSpec]:
    prefix = f"model.layers.{number}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{prefix}.{norm}.weight", "BF16", (_HIDDEN,))
    for part, rows in (("q_proj", _HIDDEN), ("k_proj", _KEY_VALUE), ("v_proj", _KEY_VALUE)):
        yield TensorSpec(f"{prefix}.self_attn.{part}.weight", "BF16", (rows, _HIDDEN))
        yield TensorSpec(f"{prefix}.self_attn.{part}.bias", "BF16", (rows,))
    yield TensorSpec(f"{prefix}.self_attn.o_proj.weight", "BF16", (_HIDDEN, _HIDDEN))
    if number in _DENSE_LAYERS:
        yield from _gated_mlp(f"{prefix}.mlp", _DENSE)
        return
    yield TensorSpec(f"{prefix}.mlp.gate.weight", "F32", (_EXPERTS, _HIDDEN))
    for expert in range(_EXPERTS):
        yield from _gated_mlp(f"{prefix}.mlp.experts.{expert}", _EXPERT)
    yield from _gated_mlp(f"{prefix}.mlp.shared_expert", _SHARED)
    yield TensorSpec(f"{prefix}.mlp.shared_expert_gate.weight", "BF16", (1, _HIDDEN))


def _gated_mlp(prefix: str, inner: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.gate_proj.weight", "BF16", (inner, _HIDDEN))
    yield TensorSpec(f"{prefix}.up_proj.weight", "BF16", (inner, _HIDDEN))
    yield TensorSpec(f"{prefix}.down_proj.weight", "BF16", (_HIDDEN, inner))


def _shard(specs: list[TensorSpec]) -> bytes:
    plan = plan_file(specs)
    data = bytearray(plan.size_bytes)
    data[: len(plan.header)] = plan.header
    for spec in specs:
        begin, end = plan.offsets[spec.name]
        data[begin:end] = _values(spec)
    return bytes(data)


def _values(spec: TensorSpec) -> bytes:
    """Norms near 1, everything else near 0 with a standard deviation of about 0.02."""
    # A stream per tensor, keyed by its name: another layout of shards changes no value.
    key = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:8], "little")
    uniform = np.random.default_rng([_SEED, key]).random((4, *spec.shape))
    # A sum of four uniform numbers has variance 1/3. IEEE 754 fixes sums and products everywhere, but not the functions
    # behind a library's normal distribution.
    values = (uniform[0] + uniform[1] + uniform[2] + uniform[3] - 2.0) * 0.035
    if spec.name.endswith("norm.weight"):
        values += 1.0
    single = values.astype("<f4")
    return single.tobytes() if spec.dtype == "F32" else _bf16(single).tobytes()


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite fp32 to bf16 bits, round to nearest, ties to even."""
    bits = values.view("<u4")
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def _tokenizer() -> Mapping[str, object]:
    """Byte-level tokenizer without merges: token i stands for byte i of GPT-2's alphabet."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    letters = [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    end = {
        "id": _END_TOKEN,
        "content": "<|end|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: number for number, letter in enumerate(letters)},
            "merges": [],
        },
    }
