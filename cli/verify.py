"""`shardq verify`"""

from typing import TYPE_CHECKING, Any

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, describe_error, print_json, print_pairs
from shardq.cli._exit_codes import SOURCE, epilog
from shardq.cli._serving_text import print_serving
from shardq.errors import KernelUnavailable, VerifyFailed

if TYPE_CHECKING:
    from shardq.verified import Verification

EXAMPLES = (
    "shardq verify demo-W4A16",
    "shardq verify demo-W4A16 --deep --source demo",
    "shardq verify org/name-W4A16@main",
)


@click.command("verify", cls=ShardqCommand, epilog=epilog(EXAMPLES, (*SOURCE, KernelUnavailable, VerifyFailed)))
@click.argument("result", metavar="OUT_OR_REPO")
@click.option("--deep", is_flag=True, help="Also take the hash of each shard, and unpack every module.")
@click.option(
    "--source",
    metavar="SOURCE",
    help="Also compare with the original: figures recomputed, copies and GGUF files byte for byte.",
)
@click.option(
    "--importance", metavar="FILE", type=click.Path(dir_okay=False), help="That a GGUF output was made with, if any."
)
@output_options
@click.pass_obj
def verify(console: Console, result: str, deep: bool, source: str | None, importance: str | None) -> None:
    """Check a finished output against its own ledger, index, headers and configuration, and say which engines load it.

    OUT_OR_REPO is a folder or org/name[@revision]; of a repo only headers and records are read, unless --deep or
    --source is given. A quantized checkpoint that others made has no ledger: headers, index and configuration are
    checked then. Nor have GGUF files of others, one of which may be OUT_OR_REPO; of them --deep reads all numbers.
    """
    from shardq import api
    from shardq.serving.report import describe_serving

    v = api.verify(result, deep=deep, source=source, importance=importance)
    failure = VerifyFailed(f"{result} is damaged, {len(v.problems)} problems: get it again or quantize again")
    if console.as_json:
        document: dict[str, Any] = {
            "result": v.result,
            "commit": v.commit,
            "files": v.files,
            "tensors": v.tensors,
            "deep": v.deep,
            "compared": v.compared,
            "problems": list(v.problems),
            "foreign": v.foreign,
            "notes": list(v.notes),
            "serving": describe_serving(v.served),
        }
        if v.problems:
            document["error"] = describe_error("VerifyFailed", str(failure), failure.exit_code)
        print_json(document)
        click.get_current_context().exit(failure.exit_code if v.problems else 0)
    for problem in v.problems:
        click.echo(problem)
    if v.problems:
        raise failure
    print_pairs(
        [
            ("result", v.result),
            ("commit", v.commit or ""),
            ("sound", _sound(v)),
            ("deep", "hashes taken, modules unpacked" if v.deep else ""),
            ("compared", f"{v.compared} tensors with {source}" if source else ""),
        ]
    )
    print_serving(describe_serving(v.served))
    console.warn(v.notes)


def _sound(v: "Verification") -> str:
    if v.foreign:
        return f"{v.files} shards, {v.tensors} tensors as headers and configuration tell; made by others, no ledger"
    return f"{v.files} shards, {v.tensors} source tensors accounted for"
