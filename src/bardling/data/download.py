"""Downloads that are right or are not there.

A file appears under its name only when it is complete: it is fetched into NAME.part, its HTTP status, kind, length and (where
known) SHA-256 are checked, and it is synced and renamed. An error page never becomes a dataset. What is interrupted goes on
where it stopped if the server allows it: within one call when the server tells versions of the file apart (ETag or
Last-Modified), and across calls and mirrors when a checksum is known that will show whether the parts belong together. Faults
that pass (timeouts, cut connections, statuses 408, 425, 429 and 5xx) are tried again after a pause that doubles; others lead to
the next mirror.

Limits: HTTP and HTTPS, through the proxies that the environment names. A server that sends a byte now and then is waited for.
"""

import hashlib
import http.client
import os
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardling.errors import UserError
from bardling.files import sync_folder, told_plainly
from bardling.lock import locked

_BLOCK = 1 << 18  # bytes
_PASSING = {408, 425, 429}  # statuses besides 5xx that may be gone a moment later
_LONGEST_PAUSE = 60.0  # seconds


class _Passing(Exception):  # noqa: N818 (not an error yet: it is tried again)
    """A fault that may be gone the next time."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _Lasting(Exception):  # noqa: N818 (not an error yet: a mirror may be better)
    """A fault that this address will have the next time, too."""


@dataclass(frozen=True)
class Remote:
    """A file elsewhere, and what is known of it.

    Attributes:
        urls: addresses of the same content, tried in this order.
        size: bytes; None when unknown.
        sha256: checksum, hexadecimal; empty when unknown.
        text: whether it is plain text, so that a web page in its place is refused.
    """

    urls: tuple[str, ...]
    size: int | None = None
    sha256: str = ""
    text: bool = False


def cache_root() -> Path:
    """Where downloads and datasets are kept: $BARDLING_CACHE, else ~/.cache/bardling."""
    return Path(os.environ.get("BARDLING_CACHE") or "~/.cache/bardling").expanduser()


def download(
    remote: Remote, path: Path, *, timeout: float = 30.0, attempts: int = 5, pause: float = 1.0, remedy: str = ""
) -> Path:
    """Fetch a file to `path`, unless it is there already and right.

    Args:
        remote: what to fetch.
        path: where to put it; its folder is made.
        timeout: seconds without a byte after which a connection counts as dead.
        attempts: how often one address is tried.
        pause: seconds before the second attempt; each further one waits twice as long.
        remedy: what the user can do when all fails, for the message.

    Returns:
        `path`.

    Raises:
        UserError: naming the address and what was wrong with each, if none gives the right file, or the disk refuses.
    """
    with told_plainly(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        if path.is_file() and not _fault(path, remote):
            return path
        part = path.with_name(f"{path.name}.part")
        faults = []
        for url in remote.urls:
            try:
                _fetch(url, remote, part, timeout, attempts, pause)
            except _Lasting as fault:
                faults.append(f"{url}: {fault}")
                continue
            with told_plainly(path, "write"):
                part.replace(path)
                sync_folder(path.parent)
            return path
    raise UserError(f"{'; '.join(faults)}{': ' + remedy if remedy else ''}")


def _fetch(url: str, remote: Remote, part: Path, timeout: float, attempts: int, pause: float) -> None:
    """Fill `part` from one address and check it, or raise `_Lasting`; a part that is worth going on with is left."""
    if not url.startswith(("https://", "http://")):
        raise _Lasting("is no HTTP address")
    from bardling.data.progress import Bar

    validator: list[str] = []  # what the server calls this version of the file
    with Bar() as bar:
        for attempt in range(1, attempts + 1):
            if not remote.sha256 and not validator:  # nothing would show whether the part belongs to what is there now
                part.unlink(missing_ok=True)
            begun_with = part.stat().st_size if part.is_file() else 0
            try:
                _request(url, remote, part, begun_with, validator, timeout, bar)
                if fault := _fault(part, remote):
                    part.unlink()
                    if begun_with:  # the older part may be what is wrong
                        raise _Passing(fault, pause=0.0)
                    raise _Lasting(fault)
                return
            except _Passing as fault:
                if attempt == attempts:
                    raise _Lasting(f"{fault} ({attempts} attempts)") from fault
                time.sleep(min(_LONGEST_PAUSE, pause * 2 ** (attempt - 1) if fault.pause is None else fault.pause))


def _request(url: str, remote: Remote, part: Path, have: int, validator: list[str], timeout: float, bar: Any) -> None:
    """Ask once for what is missing in `part` and append it; put the version that the server names into `validator`."""
    headers = {"User-Agent": "bardling", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator[0]
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the part is longer than the file, or whole already
            if have == remote.size:
                return
            part.unlink(missing_ok=True)
            raise _Passing("the server has no such range", pause=0.0) from error
        reason = f"the server answers {error.code} {error.reason}".strip()
        if error.code in _PASSING or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            raise _Passing(reason, float(after) if after.isdigit() else None) from error
        raise _Lasting(reason) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", None), socket.gaierror):  # offline, or no such server: waiting would not help
            raise _Lasting(_reason(error, timeout)) from error
        raise _Passing(_reason(error, timeout)) from error
    with answer:
        if answer.status not in (200, 206):
            raise _Lasting(f"the server answers {answer.status} {answer.reason}".strip())
        kind = answer.headers.get_content_type()
        if remote.text and kind in ("text/html", "application/xhtml+xml"):
            raise _Lasting(f"the server sends a web page ({kind}) in place of the text")
        start = 0
        if answer.status == 206:
            start = _range_start(answer.headers.get("Content-Range", ""))
            if start != have:
                part.unlink(missing_ok=True)
                raise _Passing("the server sends another range than was asked for", pause=0.0)
        length = answer.headers.get("Content-Length", "")
        end = start + int(length) if length.isdigit() else None
        if None not in (end, remote.size) and end != remote.size:
            raise _Lasting(f"the server's file has {end:,} bytes, not the {remote.size:,} that it should have")
        tag = answer.headers.get("ETag", "")
        version = answer.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag  # weak ones do not serve
        validator[:] = [version] if version else []
        _receive(answer, part, start, end, remote.size, timeout, bar)


def _receive(answer: Any, part: Path, start: int, end: int | None, limit: int | None, timeout: float, bar: Any) -> None:
    """Write the body behind the first `start` bytes of `part`; what has come stays there when the rest does not."""
    done = start
    with told_plainly(part, "write"):
        file = part.open("r+b" if start else "wb")
    with file:
        file.seek(start)
        while True:
            try:
                block = answer.read1(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise _Passing(_reason(error, timeout)) from error
            if not block:
                break
            done += len(block)
            if limit is not None and done > limit:
                raise _Lasting(f"the server sends more than the {limit:,} bytes that it should")
            with told_plainly(part, "write"):
                file.write(block)
            bar("downloading", done, end or limit or 0)
        with told_plainly(part, "write"):
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
    if end is not None and done < end:
        raise _Passing(f"the connection ended after {done:,} of {end:,} bytes")


def _range_start(header: str) -> int:
    """The first byte that `Content-Range: bytes 100-199/200` names; -1 where it is not of this form."""
    unit, _, rest = header.strip().partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else -1


def _fault(path: Path, remote: Remote) -> str:
    """What is wrong with a file that has come; empty when nothing is."""
    with told_plainly(path, "read"):
        size = path.stat().st_size
        if remote.size is not None and size != remote.size:
            return f"the file has {size:,} bytes, not the {remote.size:,} that it should have"
        if not size:
            return "the file is empty"
        with path.open("rb") as file:
            if remote.text and file.read(256).lstrip().lower().startswith((b"<!doctype html", b"<html")):
                return "the file is a web page, not the text"
        if remote.sha256 and (found := file_sha256(path)) != remote.sha256:
            return f"the file's SHA-256 is {found[:12]}…, not {remote.sha256[:12]}…: it was damaged or changed"
    return ""


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException, timeout: float) -> str:
    """A network error in a few words."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {timeout:g} seconds"
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
    return " ".join(text.split()).lower()
