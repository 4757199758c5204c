"""Admission in bytes: how much of a cap is in use, and whether one more job fits."""


class ByteBudget:
    """Bytes taken from a cap. A job larger than the whole cap is admitted when nothing else holds any bytes.

    So the peak stays at or below the cap, except while such a giant runs, and then only the giant holds bytes. Not
    thread-safe: one owner takes and gives.
    """

    __slots__ = ("_limit_bytes", "_peak_bytes", "_used_bytes")

    def __init__(self, limit_bytes: int | None) -> None:
        """`limit_bytes` None means no cap. Raises ValueError for a negative cap."""
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"byte budget: the cap must be 0 or more, found {limit_bytes}")
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._peak_bytes = 0

    @property
    def limit_bytes(self) -> int | None:
        """The cap; None when there is none."""
        return self._limit_bytes

    @property
    def used_bytes(self) -> int:
        """Taken and not yet given back."""
        return self._used_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest `used_bytes` so far."""
        return self._peak_bytes

    def admits(self, cost_bytes: int) -> bool:
        """Whether `take(cost_bytes)` keeps the promise of this class now."""
        if self._limit_bytes is None or self._used_bytes == 0:
            return True
        return self._used_bytes + cost_bytes <= self._limit_bytes

    def take(self, cost_bytes: int) -> None:
        """Mark bytes as used. Raises ValueError for a negative cost or one not admitted."""
        if cost_bytes < 0 or not self.admits(cost_bytes):
            raise ValueError(
                f"byte budget: cannot take {cost_bytes} bytes, {self._used_bytes} of {self._limit_bytes} are in use"
            )
        self._used_bytes += cost_bytes
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)

    def give(self, cost_bytes: int) -> None:
        """Return what was taken. Raises ValueError for more than is in use."""
        if not 0 <= cost_bytes <= self._used_bytes:
            raise ValueError(f"byte budget: cannot give back {cost_bytes} bytes, {self._used_bytes} are in use")
        self._used_bytes -= cost_bytes
