"""The result of a run, as people and as scripts read it."""

from typing import TYPE_CHECKING, Any

from shardq.cli._console import print_pairs, show_bytes

if TYPE_CHECKING:
    from shardq.run import Result


def describe_result(result: "Result") -> dict[str, Any]:
    """The document of `quantize --json`; no error figures when the folder was complete already."""
    e = result.errors
    errors = e and {
        "relative": e.relative,
        "weighted_relative": e.weighted_relative,
        "mse": e.mse,
        "max": e.max_error,
        "sqnr_db": e.sqnr_db,
        "cosine": e.cosine,
        "saturated_share": e.saturated_share,
        "zeroed_groups": e.figures.zeroed_groups,
        "weights": e.weights,
    }
    return {
        "output": str(result.output),
        "fingerprint": result.fingerprint,
        "already_done": result.already_done,
        "counts": {"quantized": result.quantized, "copied": result.copied, "dropped": result.dropped},
        "bytes": {"source": result.source_bytes, "output": result.output_bytes},
        "errors": errors,
        "scales": result.scales,
        "unusual": [{"tensor": name, "relative": relative} for name, relative in result.unusual],
        "zeroed": [{"tensor": name, "groups": groups} for name, groups in result.zeroed],
        "pushed": {"to": result.pushed_to, "commit": result.pushed_commit} if result.pushed_to else None,
        "warnings": list(result.warnings),
        "seconds": result.seconds,
    }


def print_result(result: "Result") -> None:
    """The same in a few lines."""
    e = result.errors
    pairs = [
        ("output", f"{result.output}{' (was done already)' if result.already_done else ''}"),
        ("pushed", f"{result.pushed_to}, commit {result.pushed_commit}" if result.pushed_to else ""),
        (
            "modules",
            f"{result.quantized} quantized; {result.copied} tensors copied"
            + (f"; {result.dropped} dropped" if result.dropped else ""),
        ),
        ("bytes", f"{show_bytes(result.source_bytes)} -> {show_bytes(result.output_bytes)}"),
        ("error", "" if e is None else f"{e.relative:.4f} of the weights' norm, at most {e.max_error:.4g}"),
        ("scales", result.scales),
        ("look at", ", ".join(f"{name} ({relative:.3f})" for name, relative in result.unusual)),
        ("zeroed", ", ".join(f"{name} ({groups} groups)" for name, groups in result.zeroed)),
        ("time", f"{result.seconds:.1f} s"),
    ]
    print_pairs(pairs)
