"""What a source leaves out, and what it keeps that a reader may not expect: counts by reason, with the first names.

The counts are those of the last pass over the documents. `prepare` stores them in the dataset's manifest.
"""

from collections.abc import Iterable, Mapping
from typing import Any

_NAMES = 5  # kept for each reason


class Findings:
    """Counts by reason; `kept` tells what stays in the text, `left_out` what does not."""

    def __init__(self) -> None:
        self.total = 0
        self._tables: dict[str, dict[str, dict[str, Any]]] = {"left_out": {}, "kept": {}}

    def left_out(self, reason: str, name: str) -> None:
        self._add("left_out", reason, name, 1)

    def kept(self, reason: str, name: str, count: int) -> None:
        if count:
            self._add("kept", reason, name, count)

    def _add(self, table: str, reason: str, name: str, count: int) -> None:
        entry = self._tables[table].setdefault(reason, {"count": 0, "names": []})
        entry["count"] += count
        self.total += count
        if len(entry["names"]) < _NAMES and entry["names"][-1:] != [name]:
            entry["names"].append(name)

    def clear(self) -> None:
        self.total = 0
        for table in self._tables.values():
            table.clear()

    def facts(self) -> dict[str, Any]:
        """Plain values for a manifest; empty if there is nothing to report."""
        return {name: dict(sorted(table.items())) for name, table in self._tables.items() if table}


def describe_findings(facts: Mapping[str, Any]) -> list[str]:
    """A line for each table of `Findings.facts`, which may come from a manifest, and its part; other content is ignored."""
    lines = []
    for table, title in (("left_out", "left out"), ("kept", "kept in the text")):
        entries = facts.get(table)
        parts = []
        for reason, entry in entries.items() if isinstance(entries, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("names"), list):
                names, count = entry["names"][:_NAMES], entry.get("count")
                parts.append(f"{count} x {reason} ({', '.join(map(str, names))}{', ...' if count != len(names) else ''})")
        if parts:
            lines.append(f"{title}: {'; '.join(parts)}")
    if isinstance(part := facts.get("part"), dict):
        lines.append(f"part: {part.get('number')} of {part.get('count')}, to be joined with `bardling data merge`")
    return lines


def joined_findings(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of a whole source, given those of its parts in order."""
    whole = Findings()
    for facts in parts:
        for table in whole._tables:
            for reason, entry in facts.get(table, {}).items():
                for name in entry["names"]:
                    whole._add(table, reason, name, 0)
                whole._tables[table][reason]["count"] += entry["count"]
    return whole.facts()
