"""Settings of the server: address, access, models and limits."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from bardling.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Settings of a server; `check` raises a `UserError` for values that cannot be used."""

    host: str = "127.0.0.1"
    """Address to listen on. Other machines reach 0.0.0.0, which needs a key."""
    port: int = 8000
    """Port to listen on; 0 chooses a free one."""
    api_key: str | None = None
    """Key that clients must send; default: BARDLING_API_KEY, which other users of this machine do not see."""
    allow_origin: str = ""
    """Origin of other web pages that may use the server, such as https://example.org; default: none."""
    insecure: bool = False
    """Listen on an address that other machines reach, without a key."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Dtype of the weights in memory."""
    best: bool = False
    """Under a run's name, serve the checkpoint with the lowest validation loss instead of the latest."""
    slots: int = 16
    """Completions that a model generates at the same time."""
    queue: int = 64
    """Completions that may wait for a slot; further ones are refused with status 429."""
    memory_gb: float | None = None
    """Memory for all loaded models (10^9 bytes); idle ones are unloaded to stay below. Default: 70% of what is free."""
    max_body: int = 1 << 20
    """Largest body of a request (bytes)."""
    max_tokens: int | None = None
    """Most tokens generated per completion; default: what the model's context allows."""
    timeout: float = 300.0
    """Longest time for one request (seconds)."""
    drain: float = 30.0
    """Time for running requests to finish when the server is stopped (seconds)."""

    def check(self) -> None:
        for name, low, high in (
            ("port", 0, 65_535),
            ("slots", 1, 4_096),
            ("queue", 0, 1_000_000),
            ("memory_gb", 1e-6, 1e9),
            ("max_body", 1_000, 1 << 30),
            ("max_tokens", 1, 1 << 30),
            ("timeout", 0.001, 1e6),
            ("drain", 0, 1e6),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} {value}: must be between {low:,} and {high:,}")
        if self.api_key and not re.fullmatch(r"[!-~]{8,512}", self.api_key):
            raise UserError("the API key must have 8 to 512 visible ASCII characters; `openssl rand -hex 24` makes one")
        origin = urlsplit(self.allow_origin)
        if self.allow_origin and not (origin.netloc and self.allow_origin == f"{origin.scheme}://{origin.netloc}"):
            raise UserError(f"--allow_origin {self.allow_origin}: must be a scheme and a host, such as https://example.org")
        if not (self.is_local or self.api_key or self.insecure):
            raise UserError(
                f"--host {self.host}: anyone who reaches this address could use the server: set a key in BARDLING_API_KEY, "
                "listen on 127.0.0.1, or add --insecure"
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
        return frozenset({"localhost", "127.0.0.1", "::1", self.host}) if self.is_local else None
