"""Writes the documents of a checked source or dataset without copies, and a record of what was removed.

OUT/documents.jsonl has a line for each document that stays (`name`, `text`), and is a source for `data.source`.
OUT/removed.jsonl has a line for each one that does not: `name`, `reason`, `kept` (the name of the document that stays in its
place), `similarity` and `split`. Of a group of copies, the first in the validation split stays, else the first: the validation
text is then the same as before, where documents are divided by their hashes (100 or more), and is not in the training text.
"""

import json
from contextlib import ExitStack
from pathlib import Path

from bardling.data.text.duplicates import THRESHOLD
from bardling.errors import UserError
from bardling.files.atomic import atomic_folder, check_place, os_error_as_user_error
from bardling.tools.data_check import DataCheck

DOCUMENTS, REMOVED = "documents.jsonl", "removed.jsonl"


def check_dedup_path(out: Path) -> None:
    """Raise a `UserError` if the clean copy cannot be written to the folder `out`, before anything slow."""
    check_place(out)
    if out.exists():
        raise UserError(f"--dedup {out}: already exists: choose a new folder")


def write_clean(check: DataCheck, out: Path) -> tuple[int, int]:
    """Write the folder `out`; returns how many documents stay and how many do not."""
    check_dedup_path(out)
    if check.text.cut:
        raise UserError(f"--dedup {out}: the source is a single document, of which nothing can be left out")
    removed: dict[int, tuple[int, float, bool]] = {}  # number -> what stays in its place, similarity, equal text
    for group in check.groups:
        held_out = [number for number in group.members if check.splits[number] == "val"]
        kept = held_out[0] if held_out else group.members[0]
        for number in group.members:
            if number != kept:
                removed[number] = (kept, *check.duplicates.compare(kept, number))
    with os_error_as_user_error(out, "write"), atomic_folder(out) as folder, ExitStack() as files:
        documents, record = (files.enter_context((folder / name).open("wb")) for name in (DOCUMENTS, REMOVED))
        for number, (name, split, pieces) in enumerate(check.text.documents()):
            if number >= len(check.names) or name != check.names[number]:
                raise UserError(f"--dedup {out}: the source changed while it was read: run the command again")
            if number not in removed:
                documents.write(_line({"name": name, "text": "".join(pieces)}))
                continue
            kept, similarity, equal = removed[number]
            reason = "exact copy" if equal else f"near-duplicate (similarity of at least {THRESHOLD}, or linked by such)"
            facts = {"name": name, "reason": reason, "kept": check.names[kept], "similarity": round(similarity, 4)}
            record.write(_line(facts | {"split": split}))
    return len(check.names) - len(removed), len(removed)


def _line(row: dict[str, object]) -> bytes:
    return json.dumps(row).encode() + b"\n"
