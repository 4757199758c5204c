"""What the Hub's refusals mean, and how long to wait before asking again.

huggingface_hub is imported inside functions only, so that importing this module stays light.
"""

import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shardq.errors import HubAccess, HubTransfer, ShardqError
from shardq.pace import ignore_tick, sleep_ticking

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

RETRY_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
# IETF draft-ietf-httpapi-ratelimit-headers: r requests are left in a window that ends in t seconds
_RATE_LIMIT: Final = re.compile(r";\s*r\s*=\s*(\d+)\s*;\s*t\s*=\s*(\d+)")
_LOG_IN: Final = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient to be. Waits double from the first to the longest, with up to half taken off at random."""

    failures: int = 6  # in a row, without one new byte, until giving up
    first_wait_s: float = 0.5
    longest_wait_s: float = 8.0
    longest_server_wait_s: float = 330.0  # the Hub counts requests in windows of five minutes
    timeout_s: float = 10.0  # without any byte
    least_rate_bytes_s: float = 1000.0  # a connection that is slower on the average of stall_s is given up
    stall_s: float = 30.0

    def wait_s(self, failures: int, asked_s: float | None) -> float:
        """Seconds to wait after the given number of failures; `asked_s` is what the server asked for."""
        if asked_s is not None:
            return asked_s
        longest = min(self.longest_wait_s, self.first_wait_s * 2.0 ** (failures - 1))
        # Many downloads that failed together must not come back together.
        return longest * (0.5 + secrets.randbelow(1000) / 2000)

    def next_wait_s(self, failures: int, asked_s: float | None, what: str, reason: str) -> float:
        """Seconds to wait before the next attempt. Raises HubTransfer when patience is used up."""
        if failures >= self.failures:
            raise HubTransfer(
                f"{what}: gave up after {failures} failures in a row, the last: {reason}; "
                "run the same command again later"
            )
        if asked_s is not None and asked_s > self.longest_server_wait_s:
            raise HubTransfer(
                f"{what}: {reason}, and the server asks to wait {asked_s:.0f} s, "
                f"more than {self.longest_server_wait_s:.0f} s; run the same command again later"
            )
        return self.wait_s(failures, asked_s)

    def pause(
        self, failures: int, asked_s: float | None, what: str, reason: str, tick: Callable[[], None] = ignore_tick
    ) -> None:
        """Wait before the next attempt, calling `tick`, which may raise. Raises HubTransfer as `next_wait_s`."""
        sleep_ticking(self.next_wait_s(failures, asked_s, what, reason), tick)


class Gate:
    """The moment before which nobody may send a request, shared by all threads: an answer 429 is meant for all of
    them, and requests that go on regardless only make the wait longer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opens_at = 0.0

    def hold(self, wait_s: float) -> None:
        """Nobody for so many seconds from now."""
        with self._lock:
            self._opens_at = max(self._opens_at, time.monotonic() + wait_s)

    def wait(self, tick: Callable[[], None]) -> None:
        """Return when requests may be sent, calling `tick` meanwhile, which may raise."""
        while True:
            with self._lock:
                left_s = self._opens_at - time.monotonic()
            if left_s <= 0:
                return
            # Those who wait together start one after another.
            sleep_ticking(left_s + secrets.randbelow(1000) / 1000 * min(1.0, left_s / 4), tick)


def server_wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: an exhausted `RateLimit`, else `Retry-After` (seconds or a date)."""
    lower = {key.lower(): value.strip() for key, value in headers.items()}
    limit = _RATE_LIMIT.search(lower.get("ratelimit", ""))
    if limit is not None and int(limit[1]) == 0:
        return float(limit[2])
    text = lower.get("retry-after", "")
    if text.isdecimal():
        return float(text)
    if not text:
        return None
    from email.utils import parsedate_to_datetime  # slow, for what hardly any answer has

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def explain_hub_error(error: "HfHubHTTPError", repo: str, revision: str | None, what: str) -> ShardqError:
    """HubAccess or HubTransfer for an answer that the library turned into an error.

    `what` says which file or listing was asked for. The library's own text is left out: it has many lines, and signed
    addresses in it.
    """
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return HubAccess(
            f"{repo} is gated ({what}): accept its terms on its Hub page, then {_LOG_IN} of the account that did"
        )
    if isinstance(error, errors.DisabledRepoError):
        return HubAccess(f"{repo} has been disabled by the Hub ({what}); choose another source")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubAccess(
            f"the Hub has no repo {repo} for you ({what}): check the spelling; if it is private, {_LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubAccess(f"{repo} has no revision {revision!r}; give a branch, tag or commit that exists")
    if isinstance(error, errors.EntryNotFoundError):
        return HubAccess(f"{repo} at {revision or 'its main branch'} has no such file or folder: {what}")
    if status in RETRY_STATUSES:
        return HubTransfer(f"{repo}: the Hub answers {status} for {what}; run the same command again later")
    if status in {401, 403}:
        return HubAccess(f"{repo}: the Hub refuses {what} ({status}): {_LOG_IN}, and check the token's rights")
    return HubAccess(f"{repo}: the Hub answers {status} for {what}")
