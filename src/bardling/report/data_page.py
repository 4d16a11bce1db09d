"""The report of `bardling data check` as a web page: one file without scripts or requests, in light and dark colours.

Whatever comes from the data is escaped, and the page's own policy allows nothing but its style. Diagrams are plain SVG.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from bardling.monitor.format import count, percent, size_bytes

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1d1d22; --dim: #5f6068; --line: #dcdce2; --card: #f5f5f8;
  --bar: #4a4fc4;  --serious: #b3261e; --check: #8a5a00; --note: #47607a; --odd: #e4e5fb; --even: #fbeeda; }
@media (prefers-color-scheme: dark) { :root { --page: #16161a; --text: #e7e7ec; --dim: #a2a3ad; --line: #36363f;
  --card: #1f1f26; --bar: #9297ff; --serious: #ff8a80; --check: #ffc266; --note: #a9c1da; --odd: #31335c; --even: #4a3a22; } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } p { margin: .25rem 0; }
.dim { color: var(--dim); } .number { text-align: right; white-space: nowrap; }
.card { border: 1px solid var(--line); border-left: 4px solid var(--kind); border-radius: 6px; background: var(--card);
  padding: .6rem .8rem; margin: .6rem 0; }
.serious { --kind: var(--serious); } .check { --kind: var(--check); } .note { --kind: var(--note); }
.card b { color: var(--kind); } ul { margin: .4rem 0 0; padding-left: 1.1rem; } li { margin: .2rem 0; }
code, .tokens { font: .85rem/1.6 ui-monospace, monospace; white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .2rem .6rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); font-weight: normal; vertical-align: top;
  white-space: pre-wrap; } th { color: var(--dim); }
th.number { text-align: right; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 2rem; }
svg { width: 100%; max-width: 44rem; height: auto; display: block; } .columns svg { max-width: 28rem; }
svg rect { fill: var(--bar); }
svg text { fill: var(--dim); font: 12px system-ui, sans-serif; }
.tokens { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem; margin: .3rem 0 1rem; }
.tokens span { background: var(--odd); border-radius: 3px; } .tokens span:nth-child(even) { background: var(--even); }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def data_page(report: dict[str, Any]) -> str:
    """The page of a report (`tools/data_check.py`), which may lack any of its parts."""
    parts = [_findings(report["findings"])] if "findings" in report else []
    parts += [_sizes(report), _lengths(report.get("lengths"))]
    parts.append(f"<div class='columns'>{_kinds(report.get('kinds'))}{_languages(report.get('languages'))}</div>")
    parts += [_tokens(report.get("tokens")), _sequences(report.get("sequences", []))]
    title = f"Data check: {report['source']}"
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _findings(findings: Sequence[dict[str, Any]]) -> str:
    if not findings:
        return "<p>Nothing was found that should not be in the data.</p>"
    return "<h2>Findings</h2>" + "".join(map(_finding, findings))


def _finding(found: dict[str, Any]) -> str:
    examples = "".join(f"<li>{_example(example)}</li>" for example in found["examples"])
    severity, title, advice = (escape(str(found[key])) for key in ("severity", "title", "advice"))
    advice = re.sub("`([^`]+)`", r"<code>\1</code>", advice)
    listed = f"<details><summary>examples ({len(found['examples'])})</summary><ul>{examples}</ul></details>" if examples else ""
    if found["severity"] != "note":
        listed = listed.replace("<details>", "<details open>")
    return f"<div class='card {severity}'><p><b>{severity}</b>: {title}</p><p class='dim'>{advice}</p>{listed}</div>"


def _example(example: dict[str, Any]) -> str:
    place = escape(str(example.get("document", ""))) + (f", line {example['line']}" if "line" in example else "")
    twin = f" as in {escape(str(example['twin']))}" if example.get("twin") else ""
    return f"{place}{twin}{': ' if place else ''}<code>{escape(str(example['text']))}</code>"


def _sizes(report: dict[str, Any]) -> str:
    tokens = report.get("token_sizes", {})
    rows = []
    for split in dict.fromkeys([*report.get("sizes", {}), *tokens]):
        sizes = report.get("sizes", {}).get(split)
        cells = [f"{sizes['documents']:,}", size_bytes(sizes["bytes"]), count(sizes["words"])] if sizes else []
        rows.append(["training" if split == "train" else "validation", *cells, *([f"{tokens[split]:,}"] if tokens else [])])
    names = ["split", *(["documents", "text", "words"] if report.get("sizes") else []), *(["tokens"] if tokens else [])]
    return f"<h2>Sizes</h2>{_table(names, rows)}" if rows else ""


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["", *[" class='number'"] * (len(cells) - 1)]
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"
        )

    return f"<table>{line(names, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _lengths(lengths: dict[str, Any] | None) -> str:
    """A histogram whose bars double in length."""
    if not lengths or not lengths["bars"]:
        return ""
    bars, unit = lengths["bars"], lengths.get("unit", "characters")
    highest, step, height = max(number for _, number in bars), 460 / len(bars), 110
    width, every = min(0.85 * step, 60), -(-len(bars) // 12)  # labels below every so many bars
    drawn = []
    for place, (length, number) in enumerate(bars):
        tall, left = height * number / highest, place * step + (step - width) / 2
        tip = f"<title>{length:,} to {2 * length - 1:,} {unit}: {number:,}</title>"
        drawn.append(f"<rect x='{left:.1f}' y='{20 + height - tall:.1f}' width='{width:.1f}' height='{tall:.1f}'>{tip}</rect>")
        middle = left + width / 2
        if number and (every == 1 or number == highest):
            drawn.append(f"<text x='{middle:.1f}' y='{15 + height - tall:.1f}' text-anchor='middle'>{count(number)}</text>")
        if place % every == 0:
            drawn.append(f"<text x='{middle:.1f}' y='{height + 37}' text-anchor='middle'>{_power(length)}</text>")
    summary = (
        f"median about {count(lengths['median'])}, 95% up to about {count(lengths['p95'])}, longest {lengths['longest']:,}"
    )
    return (
        f"<h2>Length of documents</h2><p class='dim'>Documents by {unit}, from a number to below the next: {summary}.</p>"
        f"<svg viewBox='0 0 460 {height + 45}' role='img' aria-label='histogram of lengths'>{''.join(drawn)}</svg>"
    )


def _power(length: int) -> str:
    """`4096` -> `4Ki`."""
    for size, unit in ((1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")):
        if length >= size:
            return f"{length // size}{unit}"
    return str(length)


def _shares(pairs: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars."""
    rows = []
    for place, (name, share) in enumerate(pairs):
        top = 26 * place
        rows.append(f"<text x='0' y='{top + 16}'>{escape(name)}</text><text x='225' y='{top + 16}' text-anchor='end'>")
        rows.append(f"{percent(share)}</text><rect x='235' y='{top + 5}' width='{max(1.0, 160 * share):.1f}' height='14'/>")
    return f"<svg viewBox='0 0 400 {26 * len(pairs)}' role='img' aria-label='shares'>{''.join(rows)}</svg>"


def _kinds(kinds: Sequence[dict[str, Any]] | None) -> str:
    pairs = [(kind["name"], kind["share"]) for kind in kinds or () if kind["share"] >= 0.0005][:12]
    return f"<div><h2>Characters</h2>{_shares(pairs)}</div>" if pairs else ""


def _languages(languages: dict[str, Any] | None) -> str:
    if not languages:
        return ""
    if "missing" in languages:
        return f"<div><h2>Languages</h2><p class='dim'>{escape(languages['missing'])}</p></div>"
    pairs = [("none (code, numbers)" if name == "zxx" else name, share) for name, share in languages["shares"]]
    note = f"A guess for each of {languages['excerpts']:,} excerpts."
    return f"<div><h2>Languages</h2><p class='dim'>{note}</p>{_shares(pairs)}</div>"


def _tokens(tokens: dict[str, Any] | None) -> str:
    if not tokens:
        return ""
    of = " in a sample" if tokens.get("sample") else ""
    facts = f"{escape(str(tokens['tokenizer']))}: {tokens['used']:,} of {tokens['vocabulary']:,} entries occur{of}"
    facts += f"; {tokens['bytes_per_token']:.3f} bytes per token" if tokens["bytes_per_token"] else ""
    facts += f"; unknown tokens {tokens['unknown']:.3%}; single bytes of characters {tokens['byte_tokens']:.3%}."
    total = max(1, tokens["tokens"])
    frequent = [(repr(each["text"]), f"{each['count']:,}", percent(each["count"] / total)) for each in tokens["frequent"]]
    longest = [(repr(each["text"]), f"{each['bytes']:,}") for each in tokens["longest"]]
    numbers = [(number, " | ".join(parts) or "not encodable") for number, parts in tokens["numbers"].items()]
    return (
        f"<h2>Tokens</h2><p class='dim'>{facts}</p><div class='columns'>"
        f"<div>{_table(['most frequent', 'count', 'share'], frequent)}</div>"
        f"<div>{_table(['longest', 'bytes'], longest)}{_table(['number', 'tokens'], numbers)}</div></div>"
    )


def _sequences(sequences: Sequence[dict[str, Any]]) -> str:
    shown = []
    for sequence in sequences:
        spans = "".join(f"<span>{escape(_visible(token))}</span>" for token in sequence["tokens"])
        shown.append(f"<p class='dim'>{escape(str(sequence['place']))}</p><div class='tokens'>{spans}</div>")
    return f"<h2>Random sequences</h2>{''.join(shown)}" if shown else ""


def _visible(token: str) -> str:
    """A token whose line breaks are marked and kept."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in token)
    return shown.replace("\n", "\u21b5\n")
