import pytest

from shardq.checkpoint import SideFile
from shardq.side_files import select_side_files

COPIED = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tiktoken.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja",
    "modeling_custom.py", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md",
]  # fmt: skip
LEFT = [
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "config.json",
    "quantize_config.json", "quantization_config.json", "hf_quant_config.json", "README.md", "consolidated.safetensors",
    "adapter_model.safetensors", "model.gguf", "model.onnx", ".gitattributes", "original/tokenizer.model",
    "optimizer.pt", "shardq.json", "shardq-ledger.json.zst",
]  # fmt: skip


@pytest.mark.parametrize("name", COPIED)
def test_what_serving_needs_is_copied(name: str) -> None:
    assert select_side_files([SideFile(name, 10)])


@pytest.mark.parametrize("name", LEFT)
def test_weights_indexes_and_old_quantization_are_left(name: str) -> None:
    assert not select_side_files([SideFile(name, 10)])


def test_a_huge_tokenizer_is_no_tokenizer() -> None:
    assert not select_side_files([SideFile("tokenizer.json", 1 << 33)])
