"""Tokenizers of checkpoints without transformers, and as transformers has them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers_made import BOS, EOS, MARK, TEMPLATE, WORDS, make_tokenizer, words, write_tokenizer

from shardq.errors import MissingPackage, SourceUnreadable
from shardq.sources.local import open_folder
from shardq.tune.tokenizing import open_tokenizer

FORMS: dict[str, tuple[bool, dict[str, Any]]] = {
    "bare": (False, {}),
    "post-processor": (True, {}),
    "config adds, file does not": (False, {"add_bos_token": True, "add_eos_token": True}),
    "config does not, file adds": (True, {"add_bos_token": False}),
    "cut on the left": (True, {"truncation_side": "left"}),
}
EXPECTED = {
    "bare": [1, 2, 3, 4],
    "post-processor": [BOS, 1, 2, EOS],
    "config adds, file does not": [1, 2, 3, 4],
    "config does not, file adds": [BOS, 1, 2, EOS],
    "cut on the left": [BOS, 3, 4, EOS],
}


@pytest.mark.parametrize("form", FORMS)
def test_special_tokens_stay_around_a_text_that_is_cut(tmp_path: Path, form: str) -> None:
    around, config = FORMS[form]
    tokenizer = make_tokenizer(tmp_path, around, **config)
    assert tokenizer.encode([words(1, 2, 3, 4)], 4) == [EXPECTED[form]]


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_transformers(tmp_path: Path, form: str) -> None:
    transformers = pytest.importorskip("transformers", reason="shardq[tune] brings it")
    around, config = FORMS[form]
    folder = write_tokenizer(tmp_path, around, **config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = open_tokenizer(open_folder(str(folder)))
    for text in ("", words(1), words(1, 2, 3, 4, 5), "w1 <mark> w2", "w1 unknown w3 </s> w2"):
        for most in (2, 4, 100):
            assert ours.encode([text], most) == [theirs(text, truncation=True, max_length=most)["input_ids"]]


def test_regular_ids_are_neither_special_nor_added(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, unk_token="w0")
    assert tokenizer.regular == tuple(range(1, WORDS))
    assert tokenizer.special == {0, BOS, EOS}
    assert tokenizer.limit == MARK + 1


def test_a_template_is_found_wherever_it_is(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    for number, (name, content) in enumerate(
        {
            "chat_template.jinja": TEMPLATE,
            "chat_template.json": json.dumps({"chat_template": TEMPLATE}),
            "tokenizer_config.json": json.dumps({"chat_template": TEMPLATE}),
            "./tokenizer_config.json": json.dumps({"chat_template": several}),
        }.items()
    ):
        folder = write_tokenizer(tmp_path / str(number))
        (folder / name).write_text(content)
        template = open_tokenizer(open_folder(str(folder))).template
        assert template is not None
        assert template.render(messages) == "w7 w1 w2 w9"


def test_templates_render_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="shardq[tune] brings it")
    text = (
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'stop' %}{% break %}{% endif %}\n"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    )
    folder = write_tokenizer(tmp_path, chat_template=text)
    messages = [{"role": "user", "content": "<é>"}, {"role": "stop", "content": "x"}]
    ours = open_tokenizer(open_folder(str(folder))).template
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours is not None
    assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_template_that_refuses_system_messages_gets_none(tmp_path: Path) -> None:
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages | length }}"
    template = make_tokenizer(tmp_path, chat_template=text).template
    assert template is not None
    assert template.render([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == "1"
    broken = make_tokenizer(tmp_path, chat_template="{{ raise_exception('never') }}").template
    assert broken is not None
    with pytest.raises(SourceUnreadable, match="never"):
        broken.render([{"role": "user", "content": "b"}])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(SourceUnreadable, match=r"tokenizer_config\.json.*not JSON"):
        open_tokenizer(open_folder(str(tmp_path)))
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceUnreadable, match=r"tokenizer\.json of"):
        open_tokenizer(open_folder(str(tmp_path)))


def test_without_a_tokenizer_json_transformers_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nhello\nworld\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "cls_token": "[CLS]"}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    source = open_folder(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "transformers", None)
        with pytest.raises(MissingPackage, match=r"has no tokenizer\.json.*shardq\[tune\]"):
            open_tokenizer(source)
    pytest.importorskip("transformers", reason="shardq[tune] brings it")
    tokenizer = open_tokenizer(source)
    assert tokenizer.encode(["hello world", "world"], 3) == [[1, 5, 2], [1, 6, 2]]
    assert tokenizer.regular == (5, 6)
