"""How far a run is: source bytes that are done, counted, and told to whoever asked."""

from collections.abc import Iterable, Sequence

from shardq.lane import Lane
from shardq.onepass import OnePass
from shardq.progress import Progress, Report, Stage
from shardq.supply import Supply
from shardq.tasks import Bundle


class Tally:
    """Counts bundles; asks lanes for files, and those who transfer for what they have moved."""

    def __init__(
        self, work: OnePass, left: Iterable[Bundle], lanes: Sequence[Lane], supply: Supply, report: Report
    ) -> None:
        """`left`: bundles that an earlier run has not finished, or not all of them."""
        self._lanes, self._supply, self._report = lanes, supply, report
        self._total_bytes = work.work_bytes
        self._resumed_bytes = work.work_bytes - sum(b.source_bytes for b in left)
        self._done_bytes = self._resumed_bytes

    @property
    def percent(self) -> int:
        """Of the source bytes that are done, rounded down."""
        return 100 * self._done_bytes // max(1, self._total_bytes)

    def add(self, bundle: Bundle, is_reused: bool) -> None:
        """A bundle is done; `is_reused`: an earlier run had done it, and its bytes were only checked."""
        self._done_bytes += bundle.source_bytes
        self._resumed_bytes += bundle.source_bytes if is_reused else 0

    def take_back(self, bundle: Bundle) -> None:
        """A bundle that was done has to be done again."""
        self._done_bytes -= bundle.source_bytes

    def tell(self, stage: Stage, item: str) -> None:
        """Report a step."""
        self._report(
            Progress(
                stage=stage,
                item=item,
                done_bytes=self._done_bytes,
                total_bytes=self._total_bytes,
                resumed_bytes=self._resumed_bytes,
                fetched_bytes=self._supply.fetched_bytes,
                uploaded_bytes=sum(x.uploader.moved_bytes for x in self._lanes if x.uploader),
                done_files=sum(len(lane.sealed) for lane in self._lanes),
                total_files=sum(len(lane.files) for lane in self._lanes),
            )
        )
