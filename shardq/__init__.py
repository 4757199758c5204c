"""shardq: quantize checkpoints of any size, shard by shard, without a GPU, without model code, in constant memory.

    import shardq
    result = shardq.quantize("org/name", "W4A16", output_dir="name-W4A16", limits=shardq.Limits(parallel=4))

With more than one worker the work is done in processes; as with any use of multiprocessing, a script then calls this
below `if __name__ == "__main__":`.

Names are imported when they are first used: a worker process imports this package too, and must stay light.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shardq.api import (
        audit,
        inspect,
        plan,
        plan_headers,
        propose,
        quantize,
        quantize_many,
        report,
        run_manifest,
        verify,
    )
    from shardq.audit_statement import Audit
    from shardq.benchmarks import run_benchmarks
    from shardq.errors import ShardqError
    from shardq.gguf_inspection import GgufInspection
    from shardq.inspection import Inspection
    from shardq.limits import Limits
    from shardq.nodes.calls import begin_job, finalize, work
    from shardq.plans import Plan
    from shardq.progress import Progress
    from shardq.quality import (
        collect_statistics,
        evaluate,
        find_fold,
        measure_damages,
        mix,
        score,
        tune_model,
    )
    from shardq.recipe import Recipe, convert_recipe, dequantize_recipe, make_recipe
    from shardq.run import Result
    from shardq.verified import Verification

    __version__: str

_HOMES: Final = {
    "Audit": "shardq.audit_statement",
    "GgufInspection": "shardq.gguf_inspection",
    "Inspection": "shardq.inspection",
    "Limits": "shardq.limits",
    "Plan": "shardq.plans",
    "Progress": "shardq.progress",
    "Recipe": "shardq.recipe",
    "Result": "shardq.run",
    "ShardqError": "shardq.errors",
    "Verification": "shardq.verified",
    "audit": "shardq.api",
    "begin_job": "shardq.nodes.calls",
    "collect_statistics": "shardq.quality",
    "convert_recipe": "shardq.recipe",
    "dequantize_recipe": "shardq.recipe",
    "evaluate": "shardq.quality",
    "finalize": "shardq.nodes.calls",
    "find_fold": "shardq.quality",
    "inspect": "shardq.api",
    "measure_damages": "shardq.quality",
    "mix": "shardq.quality",
    "make_recipe": "shardq.recipe",
    "plan": "shardq.api",
    "plan_headers": "shardq.api",
    "propose": "shardq.api",
    "quantize": "shardq.api",
    "quantize_many": "shardq.api",
    "report": "shardq.api",
    "run_benchmarks": "shardq.benchmarks",
    "run_manifest": "shardq.api",
    "score": "shardq.quality",
    "tune_model": "shardq.quality",
    "verify": "shardq.api",
    "work": "shardq.nodes.calls",
}

__all__ = [
    "Audit",
    "GgufInspection",
    "Inspection",
    "Limits",
    "Plan",
    "Progress",
    "Recipe",
    "Result",
    "ShardqError",
    "Verification",
    "__version__",
    "audit",
    "begin_job",
    "collect_statistics",
    "convert_recipe",
    "dequantize_recipe",
    "evaluate",
    "finalize",
    "find_fold",
    "inspect",
    "make_recipe",
    "measure_damages",
    "mix",
    "plan",
    "plan_headers",
    "propose",
    "quantize",
    "quantize_many",
    "report",
    "run_benchmarks",
    "run_manifest",
    "score",
    "tune_model",
    "verify",
    "work",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("shardq.version").VERSION
    if name not in _HOMES:
        raise AttributeError(f"module 'shardq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
