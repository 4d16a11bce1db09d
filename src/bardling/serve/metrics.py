"""Counters of the server, in Prometheus's text format."""

from collections import Counter
from collections.abc import Iterable, Mapping

_ROUTES = ("/", "/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/healthz", "/metrics")
_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds


class Metrics:
    """Counts since the server started; written by the event loop only."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.cancelled = 0  # completions of clients that went away, or ran out of time
        self.loads = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self._durations: dict[str, list[int]] = {}  # per route: one count per bound, then the rest
        self._seconds: dict[str, float] = {}

    def request_ended(self, path: str, status: int, seconds: float) -> None:
        """Count a request; paths without a route count as one."""
        route = path if path in _ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
        self._requests[route, status] += 1
        counts = self._durations.setdefault(route, [0] * (len(_BOUNDS) + 1))
        counts[sum(seconds > bound for bound in _BOUNDS)] += 1
        self._seconds[route] = self._seconds.get(route, 0.0) + seconds

    def text(self, gauges: Mapping[str, tuple[str, Iterable[tuple[str, float]]]]) -> str:
        """All metrics. `gauges`: name -> (help, (labels, value) of each)."""
        counters = {
            "prompt_tokens": ("Tokens of prompts", self.prompt_tokens),
            "generated_tokens": ("Tokens generated", self.generated_tokens),
            "cancelled_completions": ("Completions that were not finished", self.cancelled),
            "model_loads": ("Models loaded", self.loads),
        }
        lines: list[str] = []
        for name, (about, value) in counters.items():
            lines += _family(f"bardling_{name}_total", "counter", about, [("", value)])
        requests = [(f'{{route="{route}",status="{status}"}}', n) for (route, status), n in sorted(self._requests.items())]
        lines += _family("bardling_requests_total", "counter", "HTTP requests answered", requests)
        for name, (about, values) in gauges.items():
            lines += _family(f"bardling_{name}", "gauge", about, values)
        return "\n".join([*lines, *self._histogram()]) + "\n"

    def _histogram(self) -> list[str]:
        name = "bardling_request_seconds"
        lines = [f"# HELP {name} Time from a request to the end of its response", f"# TYPE {name} histogram"]
        for route, counts in sorted(self._durations.items()):
            for place, bound in enumerate((*_BOUNDS, "+Inf")):
                lines.append(f'{name}_bucket{{route="{route}",le="{bound}"}} {sum(counts[: place + 1])}')
            lines.append(f'{name}_sum{{route="{route}"}} {self._seconds[route]:.6f}')
            lines.append(f'{name}_count{{route="{route}"}} {sum(counts)}')
        return lines


def _family(name: str, kind: str, about: str, values: Iterable[tuple[str, float]]) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *(f"{name}{labels} {value}" for labels, value in values)]
