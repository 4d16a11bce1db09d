"""HTTP downloads that are either complete and verified or absent.

A file is fetched into NAME.part. Its HTTP status, content type, length and SHA-256 are checked, then it is synced and renamed,
so an error page never becomes a dataset. An interrupted download resumes where it stopped if the server supports ranges, also
in a later call and from another mirror; the checksum shows whether the pieces belong together. Transient faults (timeouts,
dropped connections, statuses 408, 425, 429 and 5xx) are retried after a pause that doubles; others move on to the next mirror.

Connections, TLS, redirects and the proxies named in the environment are handled by `httpx2`, the client of `huggingface_hub`.

Limits: HTTP and HTTPS. The timeout limits the silence between two bytes, not the whole transfer.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from socket import gaierror
from typing import TYPE_CHECKING

from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error, sync_folder
from bardling.files.digests import file_sha256
from bardling.files.lock import locked
from bardling.monitor.progress import ProgressBar

if TYPE_CHECKING:
    import httpx2

_MAX_PAUSE = 60.0  # seconds


class _Fault(Exception):  # noqa: N818 (not an error yet: a retry or a mirror may succeed)
    """Why a download failed; `retry_after` is the pause before the next attempt in seconds, or None to use the default."""

    def __init__(self, reason: str, *, transient: bool, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.transient, self.retry_after = transient, retry_after


@dataclass(frozen=True)
class Remote:
    """A text file on servers: addresses of the same content, tried in this order, its bytes and its hexadecimal SHA-256."""

    urls: tuple[str, ...]
    size: int
    sha256: str


def cache_root() -> Path:
    """Folder for downloads and datasets: $BARDLING_CACHE, else ~/.cache/bardling."""
    return Path(os.environ.get("BARDLING_CACHE") or "~/.cache/bardling").expanduser()


def download(remote: Remote, path: Path, *, timeout: float = 30.0, attempts: int = 5, pause: float = 1.0) -> Path:
    """Download a file to `path`, whose folder is created, unless a valid copy is already there; return `path`.

    `attempts` are per address, the first `pause` seconds apart. `timeout` is the longest silence in seconds. A `UserError`
    names each address and its fault.
    """
    with os_error_as_user_error(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        if path.is_file() and not _content_fault(path, remote):
            return path
        part = path.with_name(f"{path.name}.part")
        faults = []
        for url in remote.urls:
            try:
                with ProgressBar(unit="bytes") as bar:
                    _Transfer(url, remote, part, timeout, bar).run(attempts, pause)
            except _Fault as fault:
                faults.append(f"{url}: {fault}")
                continue
            with os_error_as_user_error(path, "write"):
                part.replace(path)
                sync_folder(path.parent)
            return path
    remedy = "check the connection and try again, or use a local copy of the text with --data.source FILE"
    raise UserError(f"{'; '.join(faults)}: {remedy}")


@dataclass
class _Transfer:
    """The download of one address into the file `part`, which is kept after a failure if resuming from it may help."""

    url: str
    remote: Remote
    part: Path
    timeout: float
    bar: ProgressBar

    def run(self, attempts: int, pause: float) -> None:
        """Fill and check `part`, retrying transient faults."""
        if not self.url.startswith(("https://", "http://")):
            raise _Fault("is no HTTP address", transient=False)
        for attempt in range(1, attempts + 1):
            have = self.part.stat().st_size if self.part.is_file() else 0
            try:
                if have != self.remote.size:
                    self._request(have)
                if not (reason := _content_fault(self.part, self.remote)):
                    return
                self.part.unlink()
                raise _Fault(reason, transient=have > 0, retry_after=0.0)  # earlier bytes may be the wrong ones
            except _Fault as fault:
                if not fault.transient:
                    raise
                if attempt == attempts:
                    raise _Fault(f"{fault} ({attempts} attempts)", transient=False) from fault
                wait = pause * 2 ** (attempt - 1) if fault.retry_after is None else fault.retry_after
                time.sleep(min(_MAX_PAUSE, wait))

    def _request(self, have: int) -> None:
        """Request the bytes from `have` on and append them to `part`; what has arrived stays there if the rest does not."""
        import httpx2  # here, because it takes 0.2 s and most commands download nothing

        headers = {"User-Agent": "bardling", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        done, size = have, self.remote.size
        try:
            with httpx2.stream("GET", self.url, headers=headers, timeout=self.timeout, follow_redirects=True) as response:
                self._check_response(response, have)
                if response.status_code == 200:  # the whole file, whatever was asked for
                    done = 0
                length = response.headers.get("Content-Length", "")
                if length.isdigit() and (end := done + int(length)) != size:
                    raise _Fault(f"the server's file has {end:,} bytes, not the {size:,} expected", transient=False)
                with os_error_as_user_error(self.part, "write"), self.part.open("ab" if done else "wb") as file:
                    for block in response.iter_raw():
                        done += len(block)
                        if done > size:
                            raise _Fault(f"the server sends more than the {size:,} bytes expected", transient=False)
                        file.write(block)
                        self.bar.update("downloading", done, size)
                    file.flush()
                    os.fsync(file.fileno())
        except httpx2.TimeoutException as error:
            raise _Fault(f"no answer within {self.timeout:g} seconds", transient=True) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            if isinstance(error, httpx2.RemoteProtocolError) and done:
                raise _Fault(f"the connection ended after {done:,} of {size:,} bytes", transient=True) from error
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            reason = " ".join(str((cause and cause.strerror) or error).split()).lower()
            # without a network, or without a server of that name, waiting would not help
            transient = isinstance(error, httpx2.TransportError) and not isinstance(cause, gaierror)
            raise _Fault(reason, transient=transient) from error

    def _check_response(self, response: "httpx2.Response", have: int) -> None:
        """Refuse a response whose body does not belong in `part`."""
        status, headers = response.status_code, response.headers
        if status == 416 or (status == 206 and not headers.get("Content-Range", "").startswith(f"bytes {have}-")):
            self.part.unlink(missing_ok=True)
            raise _Fault("the server does not serve the missing range", transient=True, retry_after=0.0)
        if status not in (200, 206):
            after = headers.get("Retry-After", "")
            pause = float(after) if after.isdigit() else None
            reason = f"the server answers {status} {response.reason_phrase}".strip()
            raise _Fault(reason, transient=status in (408, 425, 429) or status >= 500, retry_after=pause)
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml"):
            raise _Fault(f"the server sends a web page ({kind}) instead of the text", transient=False)


def _content_fault(path: Path, remote: Remote) -> str:
    """What is wrong with a downloaded file; empty if it is valid."""
    with os_error_as_user_error(path, "read"):
        if (size := path.stat().st_size) != remote.size:
            return f"the file has {size:,} bytes, not the {remote.size:,} expected"
        if (found := file_sha256(path)) != remote.sha256:
            return f"the file's SHA-256 is {found[:12]}…, not {remote.sha256[:12]}…: it is damaged or has changed"
    return ""
