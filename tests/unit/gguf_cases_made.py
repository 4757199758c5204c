"""All cases of the metadata of GGUF: the models, and vocabularies that go with a model of one tensor."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gguf_checkpoints_made import GOLDEN, Case
from gguf_models_made import BPE, MODELS, SPM, config
from gguf_shapes_made import BPE_TOKENS, Shapes

FEW: Shapes = {"model.embed_tokens.weight": (8, 64)}
QWEN2 = config("Qwen2ForCausalLM", "qwen2", vocab_size=BPE_TOKENS, bos_token_id=None, pad_token_id=7)
FIRST, LAST = "<|endoftext|>", "<|im_end|>"


def special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def template(single: list[str], pair: list[str]) -> dict[str, Any]:
    """A post-processor; "A" and "B" are the texts."""
    sides = {"A": {"Sequence": {"id": "A", "type_id": 0}}, "B": {"Sequence": {"id": "B", "type_id": 1}}}
    tokens = {token: {"id": token, "ids": [0], "tokens": [token]} for token in {*single, *pair} - {*sides}}
    parts = {"single": [sides.get(t) or special(t) for t in single], "pair": [sides.get(t) or special(t) for t in pair]}
    return {"type": "TemplateProcessing", **parts, "special_tokens": tokens}


def tokenizer(config_more: Mapping[str, Any] | None, **more: Any) -> Case:
    """Byte-level BPE with other parts; what is None in `config_more` is not in tokenizer_config.json."""
    own = {**json.loads((GOLDEN / "bpe.json").read_text(encoding="utf-8")), **more}
    named = {**json.loads((GOLDEN / "bpe_config.json").read_text(encoding="utf-8")), **(config_more or {})}
    texts = {"tokenizer.json": json.dumps(own)}
    if config_more is not None:
        texts["tokenizer_config.json"] = json.dumps({key: value for key, value in named.items() if value is not None})
    return Case(QWEN2, FEW, {}, "qwen2", texts)


ROBERTA = {
    "type": "RobertaProcessing", "sep": [LAST, 1], "cls": [FIRST, 0], "trim_offsets": True, "add_prefix_space": False,
}  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
BERT = {
    "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": True,
    "lowercase": False,
}  # fmt: skip
LOWER = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
TEMPLATES = {"chat_template.jinja": "a\r\nb\n", "additional_chat_templates/rag.jinja": "{{ rag }}"}
TOKENIZERS: Mapping[str, Case] = {
    "special_last": tokenizer({}, post_processor=template(["A", FIRST], ["A", FIRST, "B", FIRST])),
    "special_both": tokenizer(
        {"bos_token": None}, post_processor=template([FIRST, "A", LAST], [FIRST, "A", "B", LAST])
    ),
    "special_between": tokenizer({}, post_processor=template([FIRST, "A"], [FIRST, "A", LAST, LAST, "B"])),
    "special_other": tokenizer({}, post_processor=template(["<|user|>", "A"], ["<|user|>", "A", "<|user|>", "B"])),
    "special_unnamed": tokenizer(None, post_processor=template([FIRST, "A", LAST], [FIRST, "A", "B", LAST])),
    "special_roberta": tokenizer({"eos_token": None}, post_processor=ROBERTA, normalizer=LOWER),
    "special_bytes": tokenizer({"add_bos_token": True, "cls_token": FIRST}, post_processor=BYTES, normalizer=BERT),
    "template_files": replace(case := tokenizer({"chat_template": None}), texts={**(case.texts or {}), **TEMPLATES}),
    "code_llama": Case(config("LlamaForCausalLM", "llama", vocab_size=32016), FEW, SPM),
    "granite": Case(config("LlamaForCausalLM", "llama", vocab_size=49152), FEW, BPE, "smollm"),
}
CASES: Mapping[str, Case] = {**MODELS, **TOKENIZERS}
