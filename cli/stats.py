"""`shardq stats`"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_pairs
from shardq.cli._exit_codes import SOURCE, epilog
from shardq.cli._progress import block_progress
from shardq.cli._spool import spool_options
from shardq.cli._statistics import IMATRIX_SUFFIX, SUFFIX, tell_unseen
from shardq.errors import BadImportance, BudgetTooSmall, DiskFull, MissingPackage, NonFiniteWeight
from shardq.sizes import parse_size

if TYPE_CHECKING:
    from shardq.limits import SpoolAs
    from shardq.tune.inputs import Experts
    from shardq.tune.stats import Statistics

EXAMPLES = (
    "shardq stats org/name -o name.importance.safetensors",
    "shardq stats ./folder --data texts.jsonl --tokens 65536 --format imatrix -o name.imatrix.gguf",
    "shardq quantize org/name --importance name.importance.safetensors",
)


@click.command(
    "stats",
    cls=ShardqCommand,
    epilog=epilog(EXAMPLES, (*SOURCE, MissingPackage, NonFiniteWeight, BadImportance, BudgetTooSmall, DiskFull)),
)
@click.argument("source")
@click.option(
    "--data", metavar="DATASET", default="random", show_default=True, help="random, self, or as AutoRound's --dataset."
)
@click.option("--tokens", type=int, metavar="N", help="In all. Default: 64 random ones, 2048 of self, 8192 others.")
@click.option("--seqlen", type=int, metavar="N", help="Of a sample. Default: 512 (self: 64), or all.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of random ids, and of the choice.")
@click.option(
    "--format", "form", type=click.Choice(["shardq", "imatrix"]), default="shardq", show_default=True,
    help="The file: shardq's own, or llama.cpp's importance matrix in GGUF.",
)  # fmt: skip
@click.option(
    "--experts", type=click.Choice(["all", "routed"]), default="all", show_default=True,
    help="Show each token to every expert, or count as the router has it.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="What is computed with; auto: the model's own.",
)  # fmt: skip
@spool_options("beside the output")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings along.")
@click.option("--subfolder", metavar="PATH", help="Folder inside the source that holds the checkpoint.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Default: the source's name.")
@output_options
@click.pass_obj
def stats(
    console: Console, source: str, data: str, tokens: int | None, seqlen: int | None, seed: int, form: str,
    experts: "Experts", dtype: str, max_ram: str | None, max_disk: str | None, spool: "SpoolAs",
    trust_remote_code: bool, subfolder: str | None, output: Path | None,
) -> None:  # fmt: skip
    """Run a few tokens through SOURCE, one block in memory, and write how much each input column counts.

    The file is for `quantize --importance`, or with --format imatrix for llama.cpp, too. SOURCE may be quantized
    already. Needs shardq[tune].
    """
    from shardq import quality

    suffix = IMATRIX_SUFFIX if form == "imatrix" else SUFFIX
    path = output or Path(Path(source).name.partition("@")[0] + suffix)
    with block_progress(console, "statistics") as report:
        found = quality.collect_statistics(
            source, data=data, tokens=tokens, seqlen=seqlen, seed=seed, experts=experts, dtype=dtype,
            subfolder=subfolder, folder=path.parent, max_ram_bytes=parse_size(max_ram, "--max-ram"),
            max_disk_bytes=parse_size(max_disk, "--max-disk"), spool=spool, trust_remote_code=trust_remote_code,
            report=report,
        )  # fmt: skip
    left = _write(found, path, form, seqlen)
    counts = {prefix: len(of) for prefix, of in found.routed.items()}
    never_hit = found.never_hit
    document: dict[str, Any] = {
        "output": str(path),
        "modules": len(found.modules),
        "tokens": found.provenance.tokens,
        "data": found.provenance.data,
        "experts": sum(counts.values()),
        "never_hit": {prefix: list(of) for prefix, of in never_hit.items()},
        "left_out": list(left),
    }
    if console.as_json:
        print_json(document)
        return
    if not console.quiet:
        unseen = sum(map(len, never_hit.values()))
        share = f"{unseen} of {sum(counts.values())} were given no token" if counts else ""
        print_pairs(
            [
                ("output", str(path)),
                ("modules", str(len(found.modules))),
                ("tokens", f"{found.provenance.tokens} ({found.provenance.data})"),
                ("experts", share),
            ]
        )
    console.warn(tell_unseen(never_hit, counts))
    console.warn([f"{len(left)} modules are not in the file: {', '.join(left[:3])}"] if left else [])


def _write(found: "Statistics", path: Path, form: str, seqlen: int | None) -> tuple[str, ...]:
    """Returns the modules that are not in the file."""
    if form == "imatrix":
        from shardq.tune.imatrix_file import CHUNK_TOKENS, write_imatrix

        return write_imatrix(found, path, min(seqlen or CHUNK_TOKENS, found.provenance.tokens or CHUNK_TOKENS))
    from shardq.tune.stats import write_importance

    return write_importance(found, path)
