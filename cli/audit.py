"""`shardq audit`"""

import datetime as dt
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, describe_error, print_json, print_pairs, print_section, show_bytes
from shardq.cli._exit_codes import SOURCE, epilog
from shardq.errors import AuditFailed, BadTuned, ChecksumMismatch, DiskFull, KernelUnavailable, VerifyFailed
from shardq.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardq.audit_statement import Audit, Checked

EXAMPLES = (
    "shardq audit demo-W4A16 --source demo",
    "shardq audit org/name-W4A16 --source org/name --sample 200 --statement audit.json",
    "shardq audit org/name-W4A16 --max-traffic 5G --dry-run",
)
ERRORS = (*SOURCE, BadTuned, ChecksumMismatch, DiskFull, KernelUnavailable, VerifyFailed, AuditFailed)


@click.command("audit", cls=ShardqCommand, epilog=epilog(EXAMPLES, ERRORS))
@click.argument("result", metavar="OUT_OR_REPO")
@click.option("--source", metavar="SOURCE", help="What it was made of. Default: the repo that its records name.")
@click.option("--subfolder", metavar="PATH", help="Folder inside the source that holds the checkpoint.")
@click.option("--sample", type=int, default=200, metavar="N", show_default=True, help="Tensors to audit.")
@click.option("--seed", type=int, metavar="N", help="Chooses the tensors. Default: from the output's fingerprint.")
@click.option(
    "--max-traffic", default="1G", metavar="SIZE|none", show_default=True,
    help="Bytes to read of both sides, headers included. Of tensors that are too large for it a block is compared.",
)  # fmt: skip
@click.option("--statement", type=click.Path(dir_okay=False, path_type=Path), help="Write the statement to this file.")
@click.option(
    "--importance", metavar="FILE", type=click.Path(dir_okay=False), help="That the output was made with, if any."
)
@click.option(
    "--tuned", metavar="DIR", type=click.Path(file_okay=False, exists=True),
    help="The folder of tuned codes that the output was made with, if any: its codes and what it replaces come from "
    "there. It is hashed, and counts as no traffic.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be read, and read headers only.")
@output_options
@click.pass_obj
def audit(
    console: Console, result: str, source: str | None, subfolder: str | None, sample: int, seed: int | None,
    max_traffic: str, statement: Path | None, importance: str | None, tuned: str | None,
    dry_run: bool,
) -> None:  # fmt: skip
    """Derive random tensors of a finished output again from its source, and compare the bytes.

    OUT_OR_REPO is a folder or org/name[@revision]. Both sides are read by ranges. The statement says which tensors were
    compared, and what of each; its digest is over everything but itself and the time.
    """
    from shardq import api
    from shardq.audit_statement import make_statement

    done = api.audit(
        result,
        source=source,
        subfolder=subfolder,
        sample=sample,
        seed=seed,
        max_traffic_bytes=None if max_traffic.lower() == "none" else parse_size(max_traffic, "--max-traffic"),
        dry_run=dry_run,
        importance=importance,
        tuned=tuned,
    )
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    document = {**make_statement(done), "checked_at": now}
    if statement:
        from shardq.files.atomic import write_atomic

        write_atomic(statement, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
    _show(console, done, document)


def _show(console: Console, done: "Audit", document: dict[str, Any]) -> None:
    failure = _failure(done) if done.problems else None
    if console.as_json:
        if failure:
            document["error"] = describe_error("AuditFailed", str(failure), failure.exit_code)
        print_json(document)
        click.get_current_context().exit(failure.exit_code if failure else 0)
    for problem in done.problems:
        click.echo(problem)
    if failure:
        raise failure
    _print(console, done, document)


def _failure(done: "Audit") -> AuditFailed:
    more = f" ({len(done.problems)} problems in all)" if len(done.problems) > 1 else ""
    return AuditFailed(f"{done.result} is not what its records say: {done.problems[0]}{more}; do not use it")


def _print(console: Console, done: "Audit", document: dict[str, Any]) -> None:
    checks, traffic = [t.check for t in done.tensors], done.traffic
    header, source, result = map(show_bytes, (traffic.header_bytes, traffic.source_bytes, traffic.result_bytes))
    read = f"{show_bytes(traffic.total_bytes)} in {traffic.requests} reads: {header} of headers, {source} of source, "
    print_pairs(
        [
            ("result", done.result),
            ("commit", done.result_commit or ""),
            ("source", done.source),
            ("source commit", done.source_commit or ""),
            ("fingerprint", done.fingerprint),
            ("seed", str(done.seed)),
            ("tensors", f"{len(checks)} of {done.tensors_in_ledger}, {sum(c.whole for c in checks)} of them whole"),
            ("scales", _scales(checks)),
            ("would read" if done.dry_run else "read", f"{read}{result} of result"),
            ("compared", "" if done.dry_run else show_bytes(sum(t.bytes_compared for t in done.tensors))),
            ("verdict", document["verdict"]),
            ("digest", document["digest"]),
        ]
    )
    if console.verbose:
        rows = ((c.name, "all" if c.whole else "a block", c.scale, c.source_bytes, c.result_bytes) for c in checks)
        print_section(("tensor", "compared", "scale", "source bytes", "result bytes"), rows)


def _scales(checks: "Sequence[Checked]") -> str:
    """Where scales come from that are not of a group alone; nothing where all are."""
    counts = Counter(c.scale for c in checks)
    texts = (
        f"{counts['derived']} derived from all that they reach in the source",
        f"{counts['taken']} taken from the result, as the traffic does not allow to derive them",
    )
    return "; ".join(t for t in texts if not t.startswith("0 "))
