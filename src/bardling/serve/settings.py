"""What `bardling serve` is told on the command line: where to listen, who may call, and how much a client may ask for."""

import ipaddress
import math
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from bardling.errors import UserError

_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Settings of one server; raises `UserError` for values out of range."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str = ""  # empty: none needed
    allow_origin: str = ""  # the origin of other web pages that may use the server; empty: none
    insecure: bool = False  # listen on a public address without a key
    device: str = "auto"
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    best: bool = False  # of a run, serve the checkpoint with the lowest validation loss under its name
    slots: int = 16  # completions generated at the same time, per model
    queue: int = 64  # completions that may wait, per model
    memory: float | None = None  # limit for all loaded models together (bytes)
    max_body: int = 1 << 20  # bytes
    max_tokens: int | None = None  # most tokens generated per completion; None: what the model's context allows
    timeout: float = 300.0  # seconds for one request
    drain: float = 30.0  # seconds that running requests get to finish when the server is stopped

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65_535),
            ("slots", 1, 4_096),
            ("queue", 0, 1_000_000),
            ("max_body", 1_000, 1 << 30),
            ("max_tokens", 1, math.inf),
            ("timeout", 0.001, 1e6),
            ("drain", 0, 1e6),
            ("memory", 1, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                rule = f"must be at least {low}" if high == math.inf else f"must be between {low:,} and {high:,}"
                raise UserError(f"--{name} {value}: {rule}")
        if self.api_key and not re.fullmatch(r"[!-~]{8,512}", self.api_key):
            raise UserError("the API key must have 8 to 512 visible ASCII characters; `openssl rand -hex 24` makes one")
        origin = urlsplit(self.allow_origin)
        if self.allow_origin and self.allow_origin != f"{origin.scheme}://{origin.netloc}":
            raise UserError(f"--allow_origin {self.allow_origin}: must be a scheme and a host, such as https://example.org")
        if not (self.is_local or self.api_key or self.insecure):
            raise UserError(
                f"--host {self.host}: everybody who reaches this address could use the server: set a key in BARDLING_API_KEY, "
                "listen on 127.0.0.1, or allow it with --insecure"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def local_hosts(self) -> frozenset[str] | None:
        """The names in a Host header that mean this server; None if it can have any name.

        A web page whose own name resolves to 127.0.0.1 (DNS rebinding) sends its own name.
        """
        return frozenset({*_LOCAL, self.host}) if self.is_local else None
