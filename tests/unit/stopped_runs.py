"""Reports that end a run, as Ctrl-C does, once so much of it is done."""

from collections.abc import Callable

from shardq import Progress


def stop_after(count: int, stage: str = "work") -> Callable[[Progress], None]:
    """Ends the run at the `count`th step of a stage."""
    left = count

    def report(step: Progress) -> None:
        nonlocal left
        left -= step.stage == stage
        if left == 0:
            raise KeyboardInterrupt

    return report
