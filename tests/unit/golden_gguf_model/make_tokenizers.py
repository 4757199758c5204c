"""Small tokenizers of the two kinds: python make_tokenizers.py (tokenizers 0.23.3, sentencepiece 0.2.3)."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
TEXT = [
    "The quick brown fox jumps over the lazy dog while 12 345 others look on.",
    "A model file holds tensors, tokens and numbers; nothing else is needed to serve it.",
    "Der schnelle braune Fuchs springt über den faulen Hund, 2026.",
    "def add(a, b):\n    return a + b\n",
]
BPE_TOKENS, PIECES = 300, 320
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[gMASK]", "<|user|>", "<|observation|>")


def make_bpe() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS - len(SPECIAL) - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("\u2581tab\u2581", normalized=True)])
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|> $B",
            special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))],
        ),
    ])  # fmt: skip
    assert tokenizer.get_vocab_size() == BPE_TOKENS, tokenizer.get_vocab_size()
    (HERE / "bpe.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    write("bpe_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>",
        "pad_token": added("<|endoftext|>"), "add_eos_token": False,
        "chat_template": [
            {"name": "default", "template": "{{ messages }}"}, {"name": "tool use", "template": "{{ tools }}"},
        ],
    })  # fmt: skip


def make_pieces() -> None:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT * 20), model_writer=stream, vocab_size=PIECES - 4, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, user_defined_symbols=["<mark>"], control_symbols=["<ctl>"],
        hard_vocab_limit=False, num_threads=1, normalization_rule_name="identity",
    )  # fmt: skip
    (HERE / "pieces.model").write_bytes(stream.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    count = processor.vocab_size()
    assert count <= PIECES - 2, count
    write("pieces_config.json", {
        "tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": added("</s>"), "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "chat_template": "{{ messages }}\n",
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True},
            "2": {"content": "</s>", "special": True}, str(count): {"content": "<|tool|>", "special": False},
            str(count + 1): {"content": "\u2581pad\u2581", "special": False},
        },
    })  # fmt: skip
    pieces = [processor.id_to_piece(i) for i in range(count)]
    joins = [p for p in pieces if len(p) > 1 and not processor.is_byte(pieces.index(p)) and not p.startswith("<")]
    merges = [pair for p in joins if (pair := split(p, pieces))]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    write("pieces.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            *({"id": i, "content": pieces[i], **plain, "special": True} for i in range(3)),
            {"id": count, "content": "<|tool|>", **plain, "special": False},
            {"id": count + 1, "content": "\u2581pad\u2581", **plain, "special": True},
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "ignore_merges": False, "vocab": {p: i for i, p in enumerate(pieces)}, "merges": merges,
        },
    })  # fmt: skip


def added(content: str) -> dict[str, object]:
    """A token as transformers stores it."""
    sides = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **sides}


def split(piece: str, pieces: list[str]) -> list[str] | None:
    """The parts of a piece that are pieces."""
    cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    return next(([a, b] for a, b in cuts if a in pieces and b in pieces), None)


def write(name: str, content: object) -> None:
    (HERE / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    make_bpe()
    make_pieces()
