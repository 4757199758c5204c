"""Work as an executor takes it: with a number, a cost and a name for messages."""

from collections.abc import Sequence

from shardq.executors.base import Job
from shardq.tasks import SEAL_BYTES, Bundle, SealTask, SettleTask, Streamed, SurveyTask

Work = Bundle | SurveyTask | Streamed | SealTask | SettleTask


class Jobs:
    """Numbers of one run: those of its bundles, then of its files, then of what is given out by and by."""

    def __init__(self, bundles: int, files: Sequence[Sequence[str]]) -> None:
        """`files`: names, by output."""
        lanes = [(lane, name) for lane, own in enumerate(files) for name in own]
        self._numbers = {key: bundles + at for at, key in enumerate(lanes)}
        self._next = bundles + len(lanes)

    def job(self, work: Work) -> Job:
        """The job of some work."""
        what = work.work if isinstance(work, Streamed) else work
        match what:
            case Bundle():
                return Job(what.id, work, what.cost_bytes, f"{what.tensor} in {what.shard}")
            case SealTask():
                first, names = what.files[0], ", ".join(f.file for f in what.files)
                return Job(self._numbers[first.lane, first.file], work, SEAL_BYTES, f"sealing {names}")
            case SettleTask():
                return Job(self._another(), work, SEAL_BYTES, f"settling {what.shard}")
            case SurveyTask():
                return Job(self._another(), work, what.cost_bytes, f"measuring {what.tensor} in {what.shard}")

    def _another(self) -> int:
        self._next += 1
        return self._next - 1
