"""Writes three small datasets of sums, in the formats that TRL reads, to the current folder.

- `conversations.jsonl`, for SFT: `messages`, as `bardling train chat` reads them too.
- `preferences.jsonl`, for DPO: a `prompt`, the `chosen` and the `rejected` answer, each a list of messages.
- `prompts.jsonl`, for GRPO: a `prompt`, and what the reward function needs, here the correct `answer`.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path

ROWS = 200


def main() -> None:
    rng = random.Random(0)
    sums = [(rng.randrange(50), rng.randrange(50)) for _ in range(ROWS)]
    write("conversations.jsonl", ({"messages": [question(a, b), answer(a, b, a + b)]} for a, b in sums))
    write(
        "preferences.jsonl",
        ({"prompt": [question(a, b)], "chosen": [answer(a, b, a + b)], "rejected": [answer(a, b, a + b + 1)]} for a, b in sums),
    )
    write("prompts.jsonl", ({"prompt": [question(a, b)], "answer": str(a + b)} for a, b in sums))


def question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"What is {a} plus {b}?"}


def answer(a: int, b: int, total: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"{a} plus {b} is {total}."}


def write(name: str, rows: Iterable[object]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
