"""A real model, quantized by us and loaded by transformers with the peers' own inference code: it must answer, and
compute what a model with our dequantized weights computes."""

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from shardq import Limits, Recipe, make_recipe, quantize

QUESTION: Final = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER: Final = "Paris"
LINEARS: Final = 30 * 7  # in its blocks
# layout -> package whose inference code transformers uses for it
PEERS: Final = {"auto_round": "auto_round", "gptq": "gptqmodel"}
EXCEPTIONS: Final = {"re:.*[.]2[0-9][.]self_attn[.]o_proj": {"bits": 4, "group_size": 32}, "**.0.mlp.*": {"bits": 16}}
RECIPES: Final = {
    "auto_round-W4A16G64": make_recipe("W4A16G64"),
    "auto_round-W4A16G32": make_recipe("W4A16G32"),
    "auto_round-W8A16G64": make_recipe("W8A16G64"),
    "auto_round-W4A16G64-asym": make_recipe("W4A16G64", symmetric=False),
    "auto_round-mixed": make_recipe("W8A16G64", layer_config=EXCEPTIONS),
    "gptq-W4A16G64": make_recipe("W4A16G64@gptq"),
    "gptq-W8A16G64": make_recipe("W8A16G64@gptq"),
    "gptq-W4A16G64-asym": make_recipe("W4A16G64@gptq", symmetric=False),
    "gptq-mixed": make_recipe("W8A16G64@gptq", layer_config=EXCEPTIONS),
}


class Transposed(torch.nn.Module):
    """A Linear that multiplies by [columns, rows], as the peers' kernels do; the other way float32 sums are ordered
    differently, and logits differ by about 1e-6 of their size."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight.T.contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.reshape(-1, x.shape[-1]), self.weight).reshape((*x.shape[:-1], -1))


@pytest.fixture(scope="session")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed; `nox -s oracles` installs it")


@pytest.fixture(scope="module")
def source(transformers: Any, smollm2: Path) -> Any:
    """The unquantized model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(transformers: Any, smollm2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def question(tokenizer: Any) -> Any:
    return tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def load_model(folder: Path, recipe: Recipe, transformers: Any) -> Any:
    """The quantized model, in the peer's plain torch code."""
    if recipe.layout == "gptq" and recipe.layer_rules:  # transformers does not look at `dynamic`
        gptqmodel = pytest.importorskip("gptqmodel")
        return gptqmodel.GPTQModel.load(str(folder), backend="torch", device="cpu", dtype=torch.float16).model
    config = transformers.AutoRoundConfig(backend="torch")
    if recipe.layout == "gptq":
        config = transformers.GPTQConfig(bits=recipe.scheme.bits, backend="torch")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, quantization_config=config)


def answer(model: Any, tokenizer: Any, question: Any) -> str:
    """The first words of the greedy answer."""
    tokens = model.generate(**question, max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(tokens[0, question["input_ids"].shape[1] :], skip_special_tokens=True))


def to_float32(model: Any, source: Any) -> None:
    """Undo the peer's cast to float16 of what is not quantized: norms, the embedding, rotary frequencies."""
    torch.nn.Module.float(model)  # transformers refuses `model.float()` for quantized models
    kept = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept:
            tensor.data.copy_(kept[name])


@pytest.mark.oracle
def test_the_unquantized_model_knows(source: Any, tokenizer: Any, question: Any) -> None:
    assert ANSWER in answer(source, tokenizer, question)


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """GPTQModel compiles its modules, which takes minutes where the answer takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("name", RECIPES)
def test_a_quantized_model_loads_and_answers(
    name: str,
    tmp_path: Path,
    transformers: Any,
    smollm2: Path,
    source: Any,
    tokenizer: Any,
    question: Any,
    models: Any,
) -> None:
    recipe = RECIPES[name]
    if find_spec(PEERS[recipe.layout]) is None:
        pytest.skip(f"{PEERS[recipe.layout]} is not installed here")
    quantize(smollm2, recipe, output_dir=tmp_path / "out", limits=Limits(parallel=1))
    model = load_model(tmp_path / "out", recipe, transformers)
    assert ANSWER in answer(model, tokenizer, question)

    twin = copy.deepcopy(source)
    modules = {module.name: module.weight for module in models.quantized_modules(tmp_path / "out")}
    assert len(modules) == LINEARS - (3 if recipe.layer_rules else 0)
    for module, weight in modules.items():
        assert hasattr(model.get_submodule(module), "qweight"), f"{module} was not loaded as quantized"
        twin.set_submodule(module, Transposed(weight))
    with torch.no_grad():
        ours, theirs = twin(**question).logits, model(**question).logits.float()
        difference = torch.linalg.norm(theirs - ours) / torch.linalg.norm(ours)
        assert difference <= 1e-2  # auto-round computes in float16, rotary frequencies included
        to_float32(model, source)
        assert torch.equal(model(**question).logits, ours)
