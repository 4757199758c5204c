"""Every error that shardq raises on purpose, each with the exit code of the command line.

A message says what happened, to which tensor and shard, what was expected and what was found, and what to do about it,
in one line. Anything that is not a ShardqError is a bug and may show a traceback.
Codes 1 and 2 are left to Python and click; 130 and 143 follow the shells' rule for signals.
"""

from typing import ClassVar


class ShardqError(Exception):
    """Base of all expected failures; never raised itself."""

    exit_code: ClassVar[int] = 1


# --- what the user asked for -------------------------------------------------------------------------------------


class BadOption(ShardqError):
    """Options that contradict each other or have no meaning."""

    exit_code = 3


class MissingPackage(ShardqError):
    """Something that needs a package which is not a requirement of shardq, and is not installed."""

    exit_code = 4


class UnknownScheme(ShardqError):
    """A scheme name that no preset and no alias has."""

    exit_code = 10


class BadGroupSize(ShardqError):
    """A group size that is impossible, or that does not divide some tensors' columns in a layout that needs it."""

    exit_code = 11


class PatternMatchesNothing(ShardqError):
    """An --ignore, --include or --layer-config pattern that hits no module."""

    exit_code = 12


class LayoutRefuses(ShardqError):
    """A layout that cannot hold what the recipe asks for."""

    exit_code = 13


class NothingToQuantize(ShardqError):
    """A plan that would only copy."""

    exit_code = 14


class FusedGroupSplit(ShardqError):
    """Modules that servers run as one matrix, with different schemes, or only some of them quantized."""

    exit_code = 15


class TargetRefuses(ShardqError):
    """A --target that will not load what the recipe makes."""

    exit_code = 16


class BadImportance(ShardqError):
    """A file of importance that is damaged, lacks modules, or has vectors that do not fit them."""

    exit_code = 17


class BadFold(ShardqError):
    """A fold that is damaged, or of other modules than the checkpoint has."""

    exit_code = 18


class BadTuned(ShardqError):
    """Tuned codes that are damaged or unfinished, or of another model, scheme or layout than is asked for; a file
    of measured damage that is damaged itself."""

    exit_code = 19


# --- what the source holds ---------------------------------------------------------------------------------------


class SourceUnreadable(ShardqError):
    """A folder or file that is missing, not a checkpoint, or may not be read."""

    exit_code = 20


class CheckpointIncomplete(ShardqError):
    """A shard that the index names but that is absent, or a tensor that is missing from its shard."""

    exit_code = 21


class CorruptShard(ShardqError):
    """A shard whose header lies, or whose bytes are fewer or more than the header says."""

    exit_code = 22


class UnknownDtype(ShardqError):
    """A tensor with an element type that the safetensors format does not define or that shardq cannot read."""

    exit_code = 23


class UnknownTensor(ShardqError):
    """A tensor whose role cannot be told; it would be wrong to guess."""

    exit_code = 24


class UnsupportedSource(ShardqError):
    """A checkpoint that is quantized already, or stored in a form that this version cannot read."""

    exit_code = 25


class NonFiniteWeight(ShardqError):
    """NaN, infinity, or a magnitude whose scale overflows the scale format, in a tensor to be quantized."""

    exit_code = 26


class HubAccess(ShardqError):
    """The Hub does not know the repo, revision or file, or does not let us in."""

    exit_code = 27


class HubTransfer(ShardqError):
    """The Hub or the link failed for longer than the retries last."""

    exit_code = 28


class ChecksumMismatch(ShardqError):
    """A file whose content is not what its hash promises."""

    exit_code = 29


# --- where the output goes ---------------------------------------------------------------------------------------


class OutputOccupied(ShardqError):
    """An output folder that holds something else."""

    exit_code = 30


class RecipeChanged(ShardqError):
    """An unfinished or finished output folder that was made from another source or with other parameters."""

    exit_code = 31


class OutputLocked(ShardqError):
    """Another live run works in the output folder."""

    exit_code = 32


class DiskFull(ShardqError):
    """No space left for the output, or less than the plan needs."""

    exit_code = 33


class NotWritable(ShardqError):
    """No permission to write the output folder."""

    exit_code = 34


class BudgetTooSmall(ShardqError):
    """A memory or disk cap below what the largest task needs."""

    exit_code = 35


class JobUnfinished(ShardqError):
    """A job of many workers that is to be published while files are missing."""

    exit_code = 36


# --- while running -----------------------------------------------------------------------------------------------


class TaskFailed(ShardqError):
    """A task that failed, or killed its worker, more often than is retried."""

    exit_code = 40


class KernelUnavailable(ShardqError):
    """A kernel set that does not exist, is not built, or that this CPU lacks."""

    exit_code = 41


class NotExact(ShardqError):
    """Quantized weights of the source that the output cannot hold with the same numbers."""

    exit_code = 42


class VerifyFailed(ShardqError):
    """An output that does not agree with its own ledger and index."""

    exit_code = 50


class AuditFailed(ShardqError):
    """An output of which an audited byte, or a record, is not what its source and recipe give."""

    exit_code = 51


# --- batches -----------------------------------------------------------------------------------------------------


class BatchPartlyFailed(ShardqError):
    """Entries of a batch that failed; the others are done."""

    exit_code = 60


class BatchLocked(ShardqError):
    """Another live run of the same batch."""

    exit_code = 61


class BatchOverBudget(ShardqError):
    """Entries of a batch that do not fit into its memory or disk, and nothing else that failed."""

    exit_code = 62


class BatchUnfinished(ShardqError):
    """Entries of a batch that failed in passing and are to be tried again by its next run; the others are done."""

    exit_code = 63


class Interrupted(ShardqError):
    """Stopped by SIGINT; what is finished is kept and the same command resumes."""

    exit_code = 130


class Terminated(Interrupted):
    """Stopped by SIGTERM."""

    exit_code = 143
