"""`shardq score`"""

from typing import TYPE_CHECKING, Any

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_pairs, print_section
from shardq.cli._exit_codes import SOURCE, epilog
from shardq.cli._progress import tenths_progress
from shardq.collapse import collapse
from shardq.errors import MissingPackage

if TYPE_CHECKING:
    from shardq.ledger import Errors
    from shardq.scored import Score, Scored

EXAMPLES = (
    "shardq score org/name-AWQ --source org/name --sample 200",
    "shardq score name-W4A16 --source name --full --json",
    "shardq score org/name-GGUF --file Q4_K_M --source org/name",
)
WORST = 10


@click.command("score", cls=ShardqCommand, epilog=epilog(EXAMPLES, (*SOURCE, MissingPackage)))
@click.argument("result", metavar="OUT_OR_REPO")
@click.option("--source", metavar="SOURCE", required=True, help="What it was made of: a folder or org/name[@revision].")
@click.option("--subfolder", metavar="PATH", help="Folder inside the source that holds the checkpoint.")
@click.option("--file", metavar="NAME", help="GGUF: which model of OUT_OR_REPO, by name, a file or a part as Q4_K_M.")
@click.option("--source-file", metavar="NAME", help="GGUF: likewise of SOURCE.")
@click.option("--sample", type=int, metavar="N", help="Matrices to compare, evenly spread. Default: all.")
@click.option("--full", is_flag=True, help="All rows of each. Default: some 2 million weights of each.")
@output_options
@click.pass_obj
def score(
    console: Console,
    result: str,
    source: str,
    subfolder: str | None,
    file: str | None,
    source_file: str | None,
    sample: int | None,
    full: bool,
) -> None:
    """Measure how far a quantized checkpoint is from its source, whoever made it.

    OUT_OR_REPO is a folder, a GGUF file or org/name[@revision] in any format that `shardq inspect` knows. Both sides
    are read by ranges. Weights that had scales moved between layers (AWQ and others) are no longer those of the source:
    their figures say nothing, and norms that differ are told.

    GGUF files are compared under their own names of tensors, with a checkpoint of an architecture that shardq writes as
    GGUF, whose rows are brought into their order, or with another GGUF file of the model, as one in BF16.
    """
    from shardq import quality

    with tenths_progress(console, lambda done, count: f"compared {done} of {count} tensors") as report:
        found = quality.score(
            result,
            source,
            subfolder=subfolder,
            file=file,
            source_file=source_file,
            sample=sample,
            full=full,
            report=report,
        )
    if console.as_json:
        print_json(describe_score(found))
        return
    e, compared = found.errors, found.quantized
    print_pairs(
        [
            ("result", found.result),
            ("file", found.file or ""),
            ("commit", found.result_commit or ""),
            ("source", found.source),
            ("source file", found.source_file or ""),
            ("source commit", found.source_commit or ""),
            (
                "compared",
                f"{len(compared)} quantized matrices, {e.weights:,} weights of them; {found.matrices} are in codes",
            ),
            ("error", f"{e.relative:.4f} of the weights' norm, at most {e.max_error:.4g}" if compared else ""),
            ("sqnr", "" if e.sqnr_db is None else f"{e.sqnr_db:.2f} dB"),
            ("as they were", f"{sum(t.same for t in found.tensors)} tensors"),
            ("changed", _collapsed(found.moved)),
            ("lacking", _collapsed(found.lacking)),
            ("extra", _collapsed(found.extra)),
            ("not compared", _collapsed(found.left)),
        ]
    )
    worst = sorted(compared, key=lambda t: -t.errors.relative)[:WORST]
    print_section(("largest errors", "codes", "relative", "cosine"), (_line(t) for t in worst))
    if found.moved:
        moved = f"{len(found.moved)} vectors differ from the source: scales may have been moved between layers"
        console.warn([f"{moved}, and figures of such layers say nothing"])


def _line(t: "Scored") -> tuple[str, str, str, str]:
    cosine = t.errors.cosine
    return _shown(t.name), t.kind, f"{t.errors.relative:.5f}", "" if cosine is None else f"{cosine:.6f}"


def _collapsed(names: Any) -> str:
    return _shown(", ".join(collapse(names)))


def _shown(text: str) -> str:
    """Names of files that anyone has made, fit for one line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def describe_score(found: "Score") -> dict[str, Any]:
    """All that was found, as plain values."""
    return {
        "result": found.result,
        "file": found.file,
        "commit": found.result_commit,
        "source": found.source,
        "source_file": found.source_file,
        "source_commit": found.source_commit,
        "matrices": found.matrices,
        "errors": _figures(found.errors),
        "tensors": {t.name: _tensor(t) for t in found.tensors},
        "changed": list(found.moved),
        "lacking": list(found.lacking),
        "extra": list(found.extra),
        "not_compared": dict(found.left),
    }


def _tensor(t: "Scored") -> dict[str, Any]:
    """`weight` is there where the source has another name for it."""
    origin = {"weight": t.origin} if t.origin else {}
    return {**origin, "codes": t.kind or None, "rows": t.rows, "same": t.same, **_figures(t.errors)}


def _figures(e: "Errors") -> dict[str, Any]:
    """Codes of others are not looked at: what is counted on them is left out."""
    return {"weights": e.weights, **{k: v for k, v in e.describe().items() if k != "saturated_share"}}
