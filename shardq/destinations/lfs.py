"""Stores the content of large files ahead of a commit: the batch call, the bytes, and that they arrived.

Protocol: https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md, with the Hub's own way to send a file in parts
(`chunk_size` and one address for each part in the header of the upload action), as huggingface_hub's lfs.py speaks it.
The hash is given by the caller: nothing is read twice.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardq.destinations.base import StoredFile
from shardq.destinations.hub_client import HubClient, PassingError, decode_json
from shardq.destinations.watched import Meter
from shardq.errors import ChecksumMismatch, HubAccess, HubTransfer
from shardq.files.atomic import reading
from shardq.pace import Pace
from shardq.sources.hub_errors import RETRY_STATUSES

if TYPE_CHECKING:
    import httpx2

_HEADERS: Final = {"accept": "application/vnd.git-lfs+json", "content-type": "application/vnd.git-lfs+json"}
_BATCH_FILES: Final = 256  # as many as huggingface_hub asks about at once
_BLOCK_BYTES: Final = 1 << 20
_TRIES_WITH_WRONG_HASH: Final = 2
_REFUSED: Final = frozenset({400, 401, 403, 404, 409, 412, 413, 422})
_STORAGE_CODE: Final = re.compile(r"<Code>(\w+)</Code>")  # of an S3 error
_WRONG_CONTENT: Final = frozenset({"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"})

Chunks = Callable[[int, int], Iterator[bytes]]  # the bytes [begin, end) of a content, in pieces


class _EndedError(Exception):
    """Storage does not take more with these addresses: ask for new ones and begin the file again."""


class _WrongContentError(Exception):
    """Storage found that what arrived does not have the promised hash or size."""


def file_chunks(path: Path) -> Chunks:
    """Reads a file. Raises SourceUnreadable, and ChecksumMismatch where it ends early."""

    def read(begin: int, end: int) -> Iterator[bytes]:
        with reading(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while begin < end:
                with reading(path):
                    data = os.pread(fd, min(_BLOCK_BYTES, end - begin), begin)
                if not data:
                    raise ChecksumMismatch(f"{path} ends at byte {begin}: it was cut while it was sent; run again")
                begin += len(data)
                yield data
        finally:
            os.close(fd)

    return read


def slowed(chunks: Chunks, pace: Pace) -> Chunks:
    """The same at a pace: each piece waits until those before it are paid for."""

    def read(begin: int, end: int) -> Iterator[bytes]:
        for data in chunks(begin, end):
            yield data
            pace.took(len(data))

    return read


def bytes_chunks(data: bytes) -> Chunks:
    """Gives a content that is in memory."""
    return lambda begin, end: iter([data[begin:end]])


def ask_batch(client: HubClient, files: Sequence[StoredFile], what: str) -> dict[str, Mapping[str, Any] | None]:
    """Of each sha256, how to upload it; None where it is stored already. Raises HubAccess, HubTransfer."""
    found: dict[str, Mapping[str, Any] | None] = {}
    for first in range(0, len(files), _BATCH_FILES):
        found |= client.patiently(partial(_ask_once, client, files[first : first + _BATCH_FILES], what), what)
    missing = {f.sha256 for f in files} - found.keys()
    if missing:
        raise HubTransfer(f"{client.repo}: the Hub says nothing about {len(missing)} of {len(files)} files, {what}")
    return found


def _ask_once(client: HubClient, files: Sequence[StoredFile], what: str) -> dict[str, Mapping[str, Any] | None]:
    body = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": [{"oid": f.sha256, "size": f.size_bytes} for f in files],
        "hash_algo": "sha256",
        "ref": {"name": client.branch},
    }
    url = f"{client.endpoint}/{client.repo}.git/info/lfs/objects/batch"
    reply = decode_json(client.send_json(url, what, body, _HEADERS), client.repo, what)
    found: dict[str, Mapping[str, Any] | None] = {}
    for item in _objects(reply, client.repo, what):
        _check_error(item.get("error"), client.repo, what)
        actions = item.get("actions")
        found[str(item.get("oid"))] = actions if isinstance(actions, dict) and actions.get("upload") else None
    return found


def upload_content(client: HubClient, file: StoredFile, chunks: Chunks, meter: Meter) -> None:
    """Make the Hub store the content of `file`; nothing is sent if it has it already.

    Raises HubAccess, HubTransfer, ChecksumMismatch, and what `chunks` raises.
    """
    what = f"file {file.name}"
    wrong = 0

    def attempt() -> None:
        nonlocal wrong
        meter.add(0)  # somebody may have stopped waiting since the last attempt
        try:
            _upload_once(client, file, chunks, meter, what)
        except _WrongContentError as error:
            wrong += 1
            if wrong < _TRIES_WITH_WRONG_HASH:
                raise PassingError(str(error)) from error
            raise ChecksumMismatch(
                f"{client.repo}, {what}: storage refuses the content {wrong} times in a row, it is not sha256 "
                f"{file.sha256} ({error}); the file may have changed on this disk since: quantize again with --restart"
            ) from error

    client.patiently(attempt, what)


def _upload_once(client: HubClient, file: StoredFile, chunks: Chunks, meter: Meter, what: str) -> None:
    actions = ask_batch(client, [file], what)[file.sha256]
    if actions is None:
        meter.add(file.size_bytes)
        return
    before = meter.bytes
    try:
        href, header = _action(actions["upload"], client, what)
        if "chunk_size" in header:
            _put_parts(client, href, header, file, chunks, meter, what)
        else:
            _put(client, href, chunks, 0, file.size_bytes, meter, what)
        if actions.get("verify") is not None:
            _verify(client, _action(actions["verify"], client, what)[0], file, what)
    except _EndedError as error:
        meter.add(before - meter.bytes)
        raise PassingError(str(error)) from error
    except (PassingError, _WrongContentError):
        meter.add(before - meter.bytes)
        raise


def _put_parts(
    client: HubClient, href: str, header: Mapping[str, Any], file: StoredFile, chunks: Chunks, meter: Meter, what: str
) -> None:
    """Each part is tried again by itself; the Hub then puts them together."""
    part_bytes = int(header["chunk_size"])
    addresses = [header[key] for key in sorted((k for k in header if k.isdecimal()), key=int)]
    begins = range(0, file.size_bytes, part_bytes)
    if len(addresses) != len(begins):
        raise HubTransfer(f"{client.repo}, {what}: the Hub gives {len(addresses)} addresses for {len(begins)} parts")
    parts = []
    for number, (address, begin) in enumerate(zip(addresses, begins, strict=True), start=1):
        end = min(begin + part_bytes, file.size_bytes)
        response = client.patiently(partial(_put, client, address, chunks, begin, end, meter, what), what)
        if not response.headers.get("etag"):
            raise PassingError(f"storage gives no ETag for part {number}")
        parts.append({"partNumber": number, "etag": response.headers["etag"]})
    body = {"oid": file.sha256, "parts": parts}
    response = client.patiently(lambda: client.send_json(href, what, body, _HEADERS, _REFUSED), what)
    _check_answer(response)


def _put(
    client: HubClient, url: str, chunks: Chunks, begin: int, end: int, meter: Meter, what: str
) -> "httpx2.Response":
    """One attempt to send the bytes [begin, end)."""
    before = meter.bytes

    def content() -> Iterator[bytes]:
        for data in chunks(begin, end):
            yield data
            meter.add(len(data))

    try:
        response = client.send("PUT", url, what, content(), {"content-length": str(end - begin)}, _REFUSED)
    except PassingError:
        meter.add(before - meter.bytes)
        raise
    _check_answer(response)
    return response


def _verify(client: HubClient, href: str, file: StoredFile, what: str) -> None:
    """Let the Hub look at what has arrived."""
    body = {"oid": file.sha256, "size": file.size_bytes}
    response = client.patiently(lambda: client.send_json(href, what, body, _HEADERS, _REFUSED), what)
    if response.status_code in {400, 409, 422}:
        raise _WrongContentError(f"verification answers {response.status_code}")
    _check_answer(response)


def _check_answer(response: "httpx2.Response") -> None:
    status = response.status_code
    if status not in _REFUSED:
        return
    code = _STORAGE_CODE.search(response.text)
    words = f"storage answers {status}" + (f" {code[1]}" if code else "")
    if code and code[1] in _WRONG_CONTENT:
        raise _WrongContentError(words)
    raise _EndedError(words)


def _action(action: Any, client: HubClient, what: str) -> tuple[str, Mapping[str, Any]]:
    """Address and header of an action. Raises HubTransfer."""
    try:
        href, header = str(action["href"]), action.get("header") or {}
        if "chunk_size" in header:
            header = {**header, "chunk_size": max(1, int(header["chunk_size"]))}
    except (KeyError, TypeError, ValueError) as error:
        raise HubTransfer(f"{client.repo}, {what}: the Hub's way to upload is malformed ({error!r})") from error
    return client.own_address(href), header


def _objects(reply: Any, repo: str, what: str) -> list[Mapping[str, Any]]:
    objects = reply.get("objects") if isinstance(reply, dict) else None
    if not isinstance(objects, list) or not all(isinstance(o, dict) for o in objects):
        raise HubTransfer(f"{repo}: the answer about storage for {what} is malformed; check HF_ENDPOINT and proxies")
    return objects


def _check_error(error: Any, repo: str, what: str) -> None:
    if error is None:
        return
    code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
    if code in RETRY_STATUSES:
        raise PassingError(f"the batch answers {code}: {message}")
    raise HubAccess(f"{repo}: the Hub refuses to store {what} ({code}: {message})")
