"""Audit: derive some tensors of a finished output again from its source, and compare the bytes.

Source and result are folders or repos and are read by ranges; how much is bounded before the first weight is read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardq.audit_compare import compare
from shardq.audit_magnitude import measure
from shardq.audit_meter import Meter
from shardq.audit_plan import Check, plan_checks
from shardq.audit_statement import Audit, Audited, Traffic
from shardq.audit_subjects import (
    NoSubjectError,
    Subject,
    choose_names,
    ledger_reaches,
    make_subject,
    sources_of,
    with_tuned,
)
from shardq.checkpoint import TensorRef
from shardq.errors import BadFold, BadOption, CheckpointIncomplete, UnsupportedSource, VerifyFailed
from shardq.gguf_audit import GgufSide
from shardq.headers import read_checkpoint, read_headers
from shardq.importance import Importance
from shardq.kernels import KernelSet, load
from shardq.layouts import GGUF_LAYOUT
from shardq.ledger import LEDGER
from shardq.outputs import Output, identity_sha256, read_output
from shardq.recorded import check_account, goal_of, source_of, weights_of
from shardq.same_source import (
    check_config,
    check_header,
    check_importance,
    check_listing,
    check_numerics,
    check_tuned,
)
from shardq.sources import open_source
from shardq.sources.base import Source
from shardq.staging import PROVENANCE
from shardq.tuned import TunedCodes
from shardq.unpack import check_figures
from shardq.weights import Weights

READERS: Final = 4  # tensors that are read side by side, to hide the network's delays
READERS_BYTES: Final = 64 << 20  # a larger tensor is read alone: each is held in memory
ENTRY_KEYS: Final = frozenset({"outcome", "role", "shard", "dtype", "shape", "file"})


@dataclass(frozen=True, slots=True)
class Question:
    """How an audit is to be made."""

    sample: int  # tensors
    seed: int | None  # None: from the fingerprint
    max_traffic_bytes: int | None  # of records, headers and weights together; None: no limit
    dry_run: bool
    importance: Importance | None = None  # that the result was made with
    tuned: TunedCodes | None = None  # whose codes the result has


def audit_result(result: Source, where: str, source: str | None, subfolder: str | None, question: Question) -> Audit:
    """Audit a finished output. `where` is its name as the user wrote it.

    `source` names what it was made of, by default the repo that its records name, at the commit that they name unless a
    revision is given. A byte that differs is no error: it is among the problems. Memory: what is compared of one
    tensor's result, and a window of its source; four times that for small ones.
    Raises BadOption (not the source or the folder of tuned codes that the records name, or a traffic limit that is too
    small), VerifyFailed (unfinished, no records, made with other numerics, tuned codes without their folder), BadTuned,
    and what reading raises.
    """
    if question.sample < 1:
        raise BadOption(f"--sample {question.sample}: expected at least one tensor")
    read_result = Meter(result)
    output = read_output(read_result, where)
    check_numerics(output)
    check_tuned(output, question.tuned)
    read_source = Meter(_open_recorded(source, subfolder, output))
    return audit_output(output, read_result, read_source, question)


def audit_output(output: Output, result: Meter, source: Meter, question: Question) -> Audit:
    """As audit_result, with both sides open."""
    ledger, fingerprint = output.ledger["tensors"], output.provenance["fingerprint"]
    seed = int(fingerprint[:8], 16) if question.seed is None else question.seed
    problems = list(_check_records(output))
    names = choose_names(_check_entries(output), question.sample, seed)
    check_listing(output, source)
    check_importance(output, question.importance)
    side: TensorSide | GgufSide
    if output.layout.name == GGUF_LAYOUT:
        side = GgufSide(names, output, result, source, question.importance)
    else:
        side = TensorSide(names, output, result, source, question)
    problems += side.problems
    headers = Traffic(0, source.read_bytes, result.read_bytes, result.requests + source.requests)
    audited = side.audit(_rest(question.max_traffic_bytes, headers.total_bytes), seed, question.dry_run)
    traffic = _planned_traffic(headers, audited) if question.dry_run else _read_traffic(headers, result, source)
    problems += (t.problem for t in audited if t.problem)
    return Audit(
        result=output.where,
        result_label=result.label,
        result_commit=result.commit,
        source=source.label,
        source_commit=source.commit,
        identity=output.identity,
        fingerprint=fingerprint,
        seed=seed,
        sample=question.sample,
        max_traffic_bytes=question.max_traffic_bytes,
        tensors=tuple(audited),
        tensors_in_ledger=len(ledger),
        traffic=traffic,
        problems=tuple(problems),
        dry_run=question.dry_run,
    )


def _open_recorded(text: str | None, subfolder: str | None, output: Output) -> Source:
    label, commit = output.identity["source.label"], output.identity["source.commit"]
    if text is None and commit is None:
        raise BadOption(f"{output.where} was made of {label}, which is no repo: say with --source where that is now")
    wanted = label if text is None else text
    in_repo = wanted.removeprefix("hf://") == label and not Path(wanted).expanduser().exists()
    return open_source(wanted, subfolder, revision=commit if in_repo else None)


# --- what the records say --------------------------------------------------------------------------------------------


def _check_records(output: Output) -> Iterator[str]:
    """The three places of the fingerprint agree: nobody changed the recipe or the source's name afterwards."""
    said = output.provenance["fingerprint"]
    if said != output.ledger["fingerprint"]:
        yield f"{LEDGER} and {PROVENANCE} are of different runs"
    if said != identity_sha256(output.identity):
        yield f"{PROVENANCE} has fingerprint {said}: its identity has {identity_sha256(output.identity)}"


def _check_entries(output: Output) -> dict[str, Any]:
    """The ledger's tensors. Raises VerifyFailed for one that does not say what every entry says."""
    ledger: dict[str, Any] = output.ledger["tensors"]
    for name, entry in ledger.items():
        if not isinstance(entry, dict) or not entry.keys() >= ENTRY_KEYS:
            raise VerifyFailed(f"{LEDGER} of {output.where} has a broken entry for {name}: quantize again")
        if entry["outcome"] != "dropped" and entry["file"] not in output.files:
            raise VerifyFailed(f"{output.where} lacks {entry['file']}, where the ledger has {name}")
    return ledger


class TensorSide:
    """The chosen tensors of an output in safetensors."""

    def __init__(
        self, names: Sequence[str], output: Output, result: Source, source: Source, question: Question
    ) -> None:
        """Reads the headers that are needed of both. Raises what reading raises, BadOption, VerifyFailed."""
        self._output, self._result, self._source = output, result, source
        self._subjects, self.problems = _make_subjects(names, output, result, source, question)

    def audit(self, budget_bytes: int | None, seed: int, dry_run: bool) -> list[Audited]:
        """Compare as much as the budget allows; with `dry_run` nothing. Raises BadOption, and what reading raises."""
        checks = plan_checks(self._subjects, budget_bytes, seed)
        if dry_run:
            return [Audited(c, 0, None) for c in checks]
        return _compare_all(checks, self._output, self._result, self._source)


def _make_subjects(
    names: Sequence[str], output: Output, result: Source, source: Source, question: Question
) -> tuple[list[Subject], list[str]]:
    """The chosen tensors, and what is odd about those that cannot be audited, and about the ledger."""
    is_made = bool(source_of(output.ledger)) or output.fold is not None
    made, problems = _all_weights(output, source) if is_made else (None, [])
    weights = dict(made.tensors) if made else {}
    reaches, entries = ledger_reaches(output, weights), output.ledger["tensors"]
    if not weights:
        weights = _some_weights(
            dict.fromkeys(n for name in names for n in (name, *reaches.get(name, ()))), output, source
        )
    of_result = read_headers(result, [output.files[n] for n in dict.fromkeys(entries[n]["file"] for n in names)])
    subjects: list[Subject] = []
    sizes = made.importance if made else {}
    for name in names:
        try:
            reach = reaches.get(name, ())
            subject = make_subject(name, reach, output, weights, of_result, question.importance, sizes)
            subjects.append(with_tuned(subject, entries[name], question.tuned))
        except NoSubjectError as e:
            problems.append(str(e))
    return subjects, problems


def _some_weights(names: Iterable[str], output: Output, source: Source) -> dict[str, TensorRef]:
    """These tensors of a plain source, from the headers that they lie under."""
    files = {f.name: f for f in source.files()}
    shards = dict.fromkeys(output.ledger["tensors"][n]["shard"] for n in names)
    for shard in shards:
        if shard not in files:
            raise CheckpointIncomplete(f"{source.label} has no shard {shard}, which the ledger names")
    headers = read_headers(source, [files[n] for n in shards])
    for name, header in headers.items():
        check_header(name, header.sha256, output, source)
    return sources_of(names, output, headers)


def _all_weights(output: Output, source: Source) -> tuple[Weights, list[str]]:
    """The weights of a source with codes, with stacks that were split, or with scales that were moved, and what is odd
    about the ledger. All headers are read: companions and neighbours may be in any shard, and it takes a whole group of
    stacks to tell what they hold."""
    checkpoint = read_checkpoint(source)
    for s in checkpoint.shards:
        check_header(s.name, s.header_sha256, output, source)
    check_config(checkpoint, output)
    try:
        weights = weights_of(output, checkpoint)
    except (UnsupportedSource, BadFold) as e:
        raise VerifyFailed(f"the ledger of {output.where} does not go with its source: {e}") from e
    return weights, list(check_account(output.ledger, weights))


# --- what is read ----------------------------------------------------------------------------------------------------


def _rest(limit_bytes: int | None, header_bytes: int) -> int | None:
    """What records and headers leave of the limit, which is not reached."""
    if limit_bytes is not None and header_bytes >= limit_bytes:
        raise BadOption(f"--max-traffic {limit_bytes} is used up by {header_bytes} bytes of headers: allow more")
    return None if limit_bytes is None else limit_bytes - header_bytes - 1


def _compare_all(checks: Sequence[Check], output: Output, result: Source, source: Source) -> list[Audited]:
    kernels, entries = load(), output.ledger["tensors"]
    largest = max((c.source_bytes + c.result_bytes for c in checks), default=0)
    with ThreadPoolExecutor(READERS if largest <= READERS_BYTES else 1) as pool:
        needed = [(t, goal_of(t, entries[t.name], output.layout)) for c in checks for t in c.measured]
        measured = {t.name: pool.submit(measure, t, source, kernels, output.rounded, to) for t, to in needed}
        futures: list[Future[Audited]] = []
        try:
            magnitudes = {name: f.result() for name, f in measured.items()}
            futures += (pool.submit(_audit, c, output, result, source, kernels, magnitudes) for c in checks)
            return [f.result() for f in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _audit(
    check: Check, output: Output, result: Source, source: Source, kernels: KernelSet, magnitudes: Mapping[str, float]
) -> Audited:
    found = compare(check, source, result, output.layout, kernels, magnitudes, output.rounded)
    problem = found.problem
    if found.stats is not None and problem is None:
        entry = output.ledger["tensors"][check.subject.name]
        problem = next(check_figures(check.subject.name, entry, found.stats), None)
    return Audited(check, found.bytes_compared, problem)


def _read_traffic(headers: Traffic, result: Meter, source: Meter) -> Traffic:
    """What was read; less than was planned where a difference ended a tensor's check."""
    requests = result.requests + source.requests
    of_source, of_result = source.read_bytes - headers.source_bytes, result.read_bytes - headers.result_bytes
    return Traffic(headers.total_bytes, of_source, of_result, requests)


def _planned_traffic(headers: Traffic, audited: Sequence[Audited]) -> Traffic:
    checks = [t.check for t in audited]
    requests = headers.requests + sum(c.requests for c in checks)
    of_source, of_result = sum(c.source_bytes for c in checks), sum(c.result_bytes for c in checks)
    return Traffic(headers.total_bytes, of_source, of_result, requests)
