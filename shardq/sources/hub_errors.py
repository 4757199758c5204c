"""What the Hub's refusals mean, and how long to wait before asking again.

huggingface_hub is imported inside functions only, so that importing this module stays light.
"""

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final

from shardq.errors import HubAccess, HubTransfer, ShardqError

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

    def wait_s(self, failures: int, asked_s: float | None) -> float:
        """Seconds to wait after the given number of failures; `asked_s` is what the server asked for."""
        if asked_s is not None:
            return asked_s
        longest = min(self.longest_wait_s, self.first_wait_s * 2.0 ** (failures - 1))
        # Many downloads that failed together must not come back together.
        return longest * (0.5 + secrets.randbelow(1000) / 2000)

    def pause(self, failures: int, asked_s: float | None, what: str, reason: str) -> None:
        """Wait before the next attempt. Raises HubTransfer when patience is used up."""
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
        time.sleep(self.wait_s(failures, asked_s))


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
