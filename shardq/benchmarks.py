"""Tasks of lm-evaluation-harness on a checkpoint, run by that package, which loads it with transformers or vLLM.

Written for lm-eval 0.4.13: `lm_eval.simple_evaluate` and `lm_eval.tasks.TaskManager`. What the engine will not load is
refused before.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, get_args

from shardq.errors import BadOption, MissingPackage, TargetRefuses, TaskFailed
from shardq.gguf.headers import holds_gguf
from shardq.headers import read_checkpoint
from shardq.outputs import open_result
from shardq.serving.served import GGUF, Served, read_served, tensors_of
from shardq.serving.targets import Target, find_refusal

Backend = Literal["hf", "vllm"]
ENGINES: Final[Mapping[Backend, str]] = {"hf": "transformers", "vllm": "vllm"}  # as serving/table names them
SHOWN: Final = 300  # characters of what a package says


@dataclass(frozen=True, slots=True)
class BenchmarkOptions:
    """Under lm-eval's names."""

    tasks: tuple[str, ...]  # names, groups, tags; `*` stands for anything
    backend: Backend = "hf"
    limit: float | None = None  # documents of each task; below 1 a share
    num_fewshot: int | None = None  # None: the task's own
    batch_size: str = "1"  # or auto
    include_path: str | None = None  # a folder with tasks of one's own
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if self.backend not in get_args(Backend):
            raise BadOption(f"--backend {self.backend!r}: expected one of {', '.join(get_args(Backend))}")
        if not self.tasks or not all(self.tasks):
            raise BadOption("--tasks needs names of lm-eval's tasks, as in --tasks arc_easy,piqa")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise BadOption(f"--limit {self.limit:g}: expected a number of documents, or a share below 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise BadOption(f"--num-fewshot {self.num_fewshot}: expected 0 or more")
        if self.batch_size.partition(":")[0] != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size)):
            raise BadOption(f"--batch-size {self.batch_size!r}: expected a number or auto")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One figure of a task, or of a group of tasks."""

    task: str
    metric: str
    filter: str  # what lm-eval does with answers before it counts; `none` mostly
    value: float | None  # None: no finite number came out
    error: float | None  # standard error; None where lm-eval gives none
    shots: int | None
    documents: int | None  # that were counted
    version: str  # of the task


def run_benchmarks(result: str | Path, options: BenchmarkOptions) -> tuple[Benchmark, ...]:
    """Run tasks on a folder or repo, quantized or not, loaded by transformers or vLLM as lm-eval does it.

    Raises MissingPackage without lm-eval or what it loads models with; TargetRefuses for what the engine will not load,
    and BadOption for tasks that lm-eval does not know, both before any weight is read; TaskFailed for whatever goes
    wrong in lm-eval; and what reading headers raises.
    """
    result = str(result)
    served = _serve(result)
    if refusal := find_refusal(served, Target(ENGINES[options.backend])):
        raise TargetRefuses(
            f"{result} --backend {options.backend}: {refusal}; choose another --backend, or evaluate with --text"
        )
    package, manager = _import("lm_eval", options.backend), _import("lm_eval.tasks", options.backend).TaskManager
    tasks = manager(include_path=options.include_path)
    if unknown := [t for t in options.tasks if not tasks.match_tasks([t])]:
        raise BadOption(f"--tasks {unknown[0]}: lm-eval knows no such task; --include-path names a folder with more")
    limit = options.limit
    try:
        found = package.simple_evaluate(
            model=options.backend,
            model_args=_model_args(result, options),
            tasks=tasks.match_tasks(list(options.tasks)),
            num_fewshot=options.num_fewshot,
            device=_device(options.backend),
            batch_size=int(options.batch_size) if options.batch_size.isdecimal() else options.batch_size,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            log_samples=False,
            task_manager=tasks,
        )
    except ImportError as error:
        raise MissingPackage(_lacking(options.backend, error)) from error
    except Exception as error:  # of lm-eval, its data, or the engine: any class
        told = " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]
        raise TaskFailed(f"{result}: lm-eval failed ({told})") from error
    return _read(found)


def _serve(result: str) -> Served:
    source = open_result(result)
    if holds_gguf(source.files()):
        return Served({}, {}, GGUF, {}, {})
    if not os.path.lexists(os.path.expanduser(result)) and result == "demo":
        raise BadOption("demo is generated on the spot, and lm-eval loads folders and repos: quantize it first")
    checkpoint = read_checkpoint(source)
    return read_served(tensors_of(checkpoint.tensors.values()), checkpoint.config or {})


def _model_args(result: str, options: BenchmarkOptions) -> dict[str, Any]:
    """Of lm-eval's HFLM and VLLM alike."""
    args: dict[str, Any] = {"dtype": options.dtype}
    if options.trust_remote_code:
        args["trust_remote_code"] = True
    path = os.path.expanduser(result)
    if os.path.lexists(path) and not result.startswith("hf://"):
        return {"pretrained": path, **args}
    repo, _, revision = result.removeprefix("hf://").partition("@")
    return {"pretrained": repo, **({"revision": revision} if revision else {}), **args}


def _device(backend: Backend) -> str | None:
    """What lm-eval is told: it would take a GPU for granted. vLLM finds its own."""
    if backend == "vllm":
        return None
    return "cuda" if _import("torch", backend).cuda.is_available() else "cpu"


def _import(name: str, backend: Backend) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(_lacking(backend, error)) from error


def _lacking(backend: Backend, error: ImportError) -> str:
    return f"--tasks needs the packages lm-eval and {ENGINES[backend]}: {error}; pip install 'lm-eval[{backend}]'"


def _read(found: Mapping[str, Any]) -> tuple[Benchmark, ...]:
    """From lm-eval's results: `metric,filter` beside `metric_stderr,filter`."""
    rows = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            rows.append(
                Benchmark(
                    task, metric, name, _finite(value), _finite(figures.get(f"{metric}_stderr,{name}")),
                    found.get("n-shot", {}).get(task), found.get("n-samples", {}).get(task, {}).get("effective"),
                    str(found.get("versions", {}).get(task, "")),
                )
            )  # fmt: skip
    return tuple(rows)


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
