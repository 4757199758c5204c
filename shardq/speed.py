"""How fast this machine's kernels are, as `shardq kernels --bench` has measured it, and what a plan takes by that.

Families of work have a speed each: what kernels do depends on element, scales, zero points and search, and not on names
or layouts, of which each family is measured in one.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from shardq.errors import SourceUnreadable
from shardq.files.atomic import reading, write_atomic, writing
from shardq.plans import Plan
from shardq.schemes import BLOCKS, Scheme
from shardq.search import Search

FILE: Final = "speed.json"
FORMAT: Final = 1
HASH: Final = "sha256"  # nanoseconds for a byte, as of the other two
COPY: Final = "copy"
_AGAIN: Final = "measure again with `shardq kernels --bench`"
_CPU_NAMES: Final = ("model name", "Hardware", "CPU part")


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured, of one thread."""

    cpu: str
    kernels: str  # the kernel set
    version: str  # of shardq
    measured: str  # UTC
    ns: Mapping[str, float]  # family -> nanoseconds of CPU for a weight; HASH and COPY: for a byte


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time that a plan takes, hashes of what is downloaded and written included."""

    cpu_s: float
    unknown_weights: int  # of families that were not measured, which the time leaves out
    weights: int  # that are quantized


def family_of(scheme: Scheme, search: Search | None) -> str:
    """The name of a family: `int4`, `int4 with zero points, searched`, `e2m1 under e8m0`."""
    plain = scheme.format.is_integer
    words = scheme.element if plain else f"{scheme.element} under {scheme.scale}"
    words += "" if scheme.symmetric else " with zero points"
    if search:
        words += ", searched by auto-round's rule" if search.rule == "auto_round" else ", searched"
    return words


def block_family(kind: str, weighed: bool) -> str:
    """The same of a type of GGUF."""
    return f"{kind} of GGUF{', weighed' if weighed else ''}"


def count_work(plan: Plan) -> Counter[str]:
    """Weights of each family that a plan makes codes for, and the bytes that it copies."""
    work: Counter[str] = Counter()
    if plan.gguf:
        for made in plan.gguf.tensors:
            if made.type in BLOCKS:
                work[block_family(made.type, made.weighed)] += math.prod(made.shape)
            else:
                work[COPY] += made.size_bytes
        return work
    for d in plan.decisions:
        t = d.tensor
        if d.scheme and not d.carried:
            work[family_of(d.scheme, plan.searches.searches.get(t.name))] += t.numel
        elif d.action != "drop":
            work[COPY] += t.size_bytes
    return work


def estimate(plan: Plan, speed: Speed) -> Cost:
    """What a run takes of one thread at this speed. Decoding a quantized source is not counted."""
    work = count_work(plan)
    copied_bytes = work.pop(COPY, 0)
    hashed_bytes = plan.output_bytes + (plan.source_bytes if plan.checkpoint.commit else 0)
    known = {family: n for family, n in work.items() if family in speed.ns}
    total_ns = sum(n * speed.ns[family] for family, n in known.items())
    total_ns += copied_bytes * speed.ns[COPY] + hashed_bytes * speed.ns[HASH]
    return Cost(total_ns / 1e9, work.total() - sum(known.values()), work.total())


def speed_path() -> Path:
    """Where the figures are: in the user's cache folder, by the XDG Base Directory Specification 0.8."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return base / "shardq" / FILE


def read_speed() -> Speed | None:
    """What was measured here; None if nothing was. Raises SourceUnreadable for a file that is none of ours."""
    path = speed_path()
    if not path.exists():
        return None
    with reading(path):
        data = path.read_bytes()
    try:
        values: dict[str, Any] = json.loads(data)
        ns = {str(k): float(v) for k, v in values["ns"].items()}
        cpu, kernels, version, measured = (str(values[k]) for k in ("cpu", "kernels", "version", "measured"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceUnreadable(f"{path} holds no speeds ({error!r}): {_AGAIN}") from error
    if values.get("format") != FORMAT or not {HASH, COPY} <= ns.keys():
        raise SourceUnreadable(f"{path} is of another version: {_AGAIN}")
    return Speed(cpu, kernels, version, measured, ns)


def write_speed(speed: Speed) -> Path:
    """Raises NotWritable, DiskFull."""
    path = speed_path()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **asdict(speed)}, indent=1)
    write_atomic(path, text.encode() + b"\n")
    return path


def cpu_name() -> str:
    """What the system calls this CPU; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = dict(line.partition(":")[::2] for line in lines)
    named = {key.strip(): value.strip() for key, value in found.items()}
    return next((named[name] for name in _CPU_NAMES if named.get(name)), "")
