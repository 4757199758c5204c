"""Golden types of all cases: PYTHONPATH=.. python make_golden_gguf_types.py LIBLLAMA [CASE...]"""

import json
import sys
from hashlib import sha256

import gguf_mixtures_made as made
from golden_gguf_types.run_quantizer import quantized
from golden_gguf_types.stored import pack


def main(library: str, *names: str) -> None:
    for name in names or made.CASES:
        case = made.CASES[name]
        orders: set[str] = set()
        runs: dict[str, list[str]] = {}
        for run, tensors in quantized(library, case, made.runs(case)):
            orders.add("\n".join(name for name, _ in tensors))
            runs.setdefault(pack(dict(tensors)), []).append(run.name)
        (order,) = orders
        found = {"order": sha256(order.encode()).hexdigest(), "runs": {", ".join(runs[types]): types for types in runs}}
        (made.GOLDEN / f"{name}.json").write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
