"""The arithmetic of rounding, compiled into loops that read each number once. Of a block, auto-round's
enable_torch_compile compiles no more either (0.16.1, `wrapper.py`: `weight_quant_func`, and `act_quant_func`).

Compiled or not, numbers are meant to be the same: scales are rounded to the type that is stored even where they go on
as fp32, which torch's compiler leaves out unless it is told, and auto-round does not tell it. This module is imported
only where it is asked for: torch's compiler takes a second, and 100 MB.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InvalidCxxCompiler

from shardq.errors import MissingPackage, ShardqError, TaskFailed
from shardq.tune.arithmetic import Arithmetic, pull_back, round_values

OPTION: Final = "--enable_torch_compile"
SETTINGS: Final[dict[str, str | int | bool | Callable[..., Any]]] = {
    "emulate_precision_casts": True,
    "compile_threads": 1,  # more are processes, of 200 MB each
}
FORMS: Final = 64  # of grids that a function may be compiled for: torch's 8 are fewer than a mixture may have


def compile_arithmetic() -> Arithmetic:
    """One for a block; what was compiled for another is not compiled again. Its functions raise TaskFailed where torch
    cannot compile them: nothing is computed in another way than was asked for."""
    return Arithmetic(_compiled(round_values), _compiled(pull_back))


def check_compiler(device: torch.device) -> None:
    """Compile a sum, before anything else is done. Raises MissingPackage without a C++ compiler, TaskFailed for what
    else torch needs on a device, as Triton."""
    _compiled(_plus_one)(torch.zeros(2, device=device))


def _plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    made = torch.compile(function, fullgraph=True, dynamic=True, options=SETTINGS)

    def call(*args: Any) -> Any:
        try:
            with dynamo.patch(recompile_limit=FORMS):
                return made(*args)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise _told(error) from error

    return call


def _told(error: Exception) -> ShardqError:
    if isinstance(getattr(error, "inner_exception", None), InvalidCxxCompiler):
        return MissingPackage(f"{OPTION}: torch finds no C++ compiler; install g++, name one in CXX, or leave it out")
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return TaskFailed(f"{OPTION}: torch {torch.__version__} cannot compile this ({line[:200]}): leave it out")
