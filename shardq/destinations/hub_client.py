"""Requests that write to a Hub repo: one attempt at a time, its failures sorted, and patience around it.

A client of our own, with timeouts: the library's shared one has none, and is closed under all threads when one of them
fails. The token goes to the Hub's own origin only. huggingface_hub and its HTTP client are imported inside functions
only.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote

from shardq.errors import HubAccess, HubTransfer
from shardq.files.atomic import reading
from shardq.sources.hub_dial import origin
from shardq.sources.hub_errors import RETRY_STATUSES, RetryPolicy, explain_hub_error, server_wait_s
from shardq.version import VERSION

if TYPE_CHECKING:
    import httpx2

ANSWER_S: Final = 120.0  # a commit of many files, or putting parts together, may take the server this long
REASON_CHARS: Final = 200  # of the server's own words in a message
_PUBLIC_HUB: Final = "https://huggingface.co"
_Answer = TypeVar("_Answer")


class PassingError(Exception):
    """A failure that may not happen again."""

    def __init__(self, reason: str, asked_s: float | None = None) -> None:
        super().__init__(reason)
        self.asked_s = asked_s


class HubClient:
    """A repo at an endpoint, and how patient to be with it."""

    def __init__(
        self, endpoint: str, repo: str, branch: str, retry: RetryPolicy, client: "httpx2.Client | None" = None
    ) -> None:
        """`client`: whose connections to use; by default its own."""
        import httpx2

        self.endpoint, self.repo, self.branch, self.retry = endpoint.rstrip("/"), repo, branch, retry
        self.api = f"{self.endpoint}/api/models/{repo}"
        self.quoted_branch = quote(branch, safe="")
        self._origin = origin(endpoint)
        self._quick = httpx2.Timeout(retry.timeout_s)
        self._slow = httpx2.Timeout(retry.timeout_s, read=max(retry.timeout_s, ANSWER_S))
        self._client = client or httpx2.Client(follow_redirects=True)

    def of(self, repo: str, branch: str) -> "HubClient":
        """The same for another repo, with the same connections."""
        return HubClient(self.endpoint, repo, branch, self.retry, self._client)

    def has_token(self) -> bool:
        """True if there is a token to send. Raises SourceUnreadable for a token file that cannot be read."""
        return "authorization" in self._headers(self.endpoint)

    def own_address(self, url: str) -> str:
        """An address that the Hub gave: a mirror may give those of the Hub behind it."""
        return self.endpoint + url.removeprefix(_PUBLIC_HUB) if url.startswith(f"{_PUBLIC_HUB}/") else url

    def patiently(self, call: Callable[[], _Answer], what: str) -> _Answer:
        """Repeat `call` as long as it raises PassingError and patience lasts. Raises HubTransfer when it is used up."""
        failures = 0
        while True:
            try:
                return call()
            except PassingError as error:
                failures += 1
                self.retry.pause(failures, error.asked_s, f"{self.repo}, {what}", str(error))

    def get_json(self, url: str, what: str) -> Any:
        """The JSON at `url`, with patience. Raises HubAccess, HubTransfer."""
        return decode_json(self.patiently(lambda: self.send("GET", url, what), what), self.repo, what)

    def pages(self, url: str, what: str) -> Iterator[Any]:
        """The items of all pages of a listing."""
        place: str | None = url
        while place is not None:
            response = self.patiently(partial(self.send, "GET", place, what), what)
            yield from decode_json(response, self.repo, what)
            following = response.links.get("next", {}).get("url")
            place = self.own_address(following) if following else None

    def post_json(self, url: str, what: str, body: object, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON that answers a POST, with patience: for requests that may be repeated."""
        response = self.patiently(lambda: self.send_json(url, what, body, headers), what)
        return decode_json(response, self.repo, what)

    def send_json(
        self,
        url: str,
        what: str,
        body: object,
        headers: Mapping[str, str] | None = None,
        accepted: Collection[int] = (),
    ) -> "httpx2.Response":
        """One attempt to POST a JSON body; see `send`."""
        sent = {"content-type": "application/json", **(headers or {})}
        return self.send("POST", url, what, json.dumps(body).encode(), sent, accepted)

    def send(
        self,
        method: str,
        url: str,
        what: str,
        content: "bytes | Iterator[bytes] | None" = None,
        headers: Mapping[str, str] | None = None,
        accepted: Collection[int] = (),
    ) -> "httpx2.Response":
        """One attempt; the answer has been read. Statuses of failure count as answers when they are `accepted`.

        Raises PassingError for what may pass, HubAccess for refusals.
        """
        import httpx2
        from huggingface_hub import hf_raise_for_status
        from huggingface_hub.errors import HfHubHTTPError

        try:
            response = self._client.request(
                method,
                url,
                content=content,
                headers={**self._headers(url), **(headers or {})},
                timeout=self._quick if method == "GET" else self._slow,
                follow_redirects=content is None or isinstance(content, bytes),  # a stream cannot be sent twice
            )
        except httpx2.RequestError as error:
            raise PassingError(f"{type(error).__name__}: {error}") from error
        status = response.status_code
        if status in accepted:
            return response
        if status in RETRY_STATUSES or status >= 500:
            raise PassingError(f"HTTP {status}", server_wait_s(response.headers))
        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as error:
            if status in {400, 409, 412, 413, 422}:
                raise HubAccess(f"{self.repo}: the Hub refuses {what} ({status}: {server_reason(response)})") from error
            raise explain_hub_error(error, self.repo, self.branch, what) from error
        if status >= 300:
            raise PassingError(f"unexpected HTTP {status}")
        return response

    def _headers(self, url: str) -> dict[str, str]:
        """Headers for `url`: the token only for the Hub itself."""
        from huggingface_hub import constants, get_token

        headers = {"user-agent": f"shardq/{VERSION}"}
        if origin(url) == self._origin and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            with reading(constants.HF_TOKEN_PATH):
                token = get_token()
            if token:
                headers["authorization"] = f"Bearer {token}"
        return headers


def decode_json(response: "httpx2.Response", repo: str, what: str) -> Any:
    """The JSON of an answer. Raises HubTransfer when it is something else."""
    try:
        return response.json()
    except ValueError as error:
        raise HubTransfer(
            f"{repo}: the answer for {what} is not what the Hub sends ({error}); check HF_ENDPOINT and proxies"
        ) from error


def server_reason(response: "httpx2.Response") -> str:
    """The server's own words about a refusal, as one short line."""
    words = [response.headers.get("x-error-message", "")]
    try:
        body = response.json()
    except ValueError:
        body = {"error": response.text}
    if isinstance(body, dict):
        errors = body.get("errors")
        listed = errors if isinstance(errors, list) else []
        words += [str(body.get("error") or ""), *(str(e.get("message")) for e in listed if isinstance(e, dict))]
    text = " ".join(" ".join(dict.fromkeys(w for w in words if w)).split())
    return text[:REASON_CHARS] or "no reason given"
