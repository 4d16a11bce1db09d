"""Two widely used methods of turning JSON Lines into GPT-2's tokens, as programs: the baselines of `prepare.py`.

    python prepare_sides.py datasets_map|pool_imap TEXT.jsonl OUT TOKENIZER.json

`datasets_map` is the method of nanoGPT's prepare.py: split at random, `datasets.map` with `tiktoken` in 2 processes, then copy
the column of ids into a memory map in 1,024 batches. `pool_imap` is that of nano-gpt's fineweb.py: `Pool.imap` with `tiktoken`
in 2 processes, and a buffer of 100 million ids per file. Both are code written for this comparison. They get the vocabulary
from a file instead of the network.

    python prepare_sides.py raw TEXT.jsonl PROCESSES TOKENIZER.json

`raw` prints the seconds that `gigatoken` alone takes to encode the documents from memory in that many processes, each with its
share of the documents.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

PROCESSES = 2
SHARD_TOKENS = 100_000_000
VAL_FRACTION = 0.0005
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # that of tiktoken's "gpt2"
_state: dict[str, Any] = {}  # of a process: its encoding


def gpt2(path: str) -> tiktoken.Encoding:
    """GPT-2's encoding with the vocabulary of a `tokenizer.json`."""
    vocab = json.loads(Path(path).read_text(encoding="utf-8"))["model"]["vocab"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    of_character = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    ranks = {bytes(map(of_character.__getitem__, token)): index for token, index in vocab.items() if token != "<|endoftext|>"}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def _prepare_process(tokenizer: str) -> None:
    _state["encoding"] = gpt2(tokenizer)


def datasets_map(text: str, out: Path, tokenizer: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    dataset = load_dataset("json", data_files=text, split="train", cache_dir=str(out / "cache"), num_proc=PROCESSES)
    parts = dataset.train_test_split(test_size=VAL_FRACTION, seed=2357, shuffle=True)

    def process(example: dict[str, str]) -> dict[str, Any]:
        if not _state:
            _prepare_process(tokenizer)
        ids = _state["encoding"].encode_ordinary(example["text"])
        ids.append(_state["encoding"].eot_token)
        return {"ids": ids, "len": len(ids)}

    tokenized = parts.map(process, remove_columns=["text"], num_proc=PROCESSES)
    for name, part in tokenized.items():
        total = np.sum(part["len"], dtype=np.uint64)
        tokens = np.memmap(out / f"{name}.bin", np.uint16, "w+", shape=(int(total),))
        batches, begin = min(1024, len(part)), 0
        for index in range(batches):
            batch = part.shard(num_shards=batches, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            tokens[begin : begin + len(ids)] = ids
            begin += len(ids)
        tokens.flush()


def _tokens(document: dict[str, str]) -> np.ndarray[Any, Any]:
    encoding = _state["encoding"]
    ids = np.array([encoding.eot_token, *encoding.encode_ordinary(document["text"])])
    if not ((ids >= 0).all() and (ids < 2**16).all()):
        raise ValueError("an id does not fit 16 bits")
    return ids.astype(np.uint16)


def pool_imap(text: str, out: Path, tokenizer: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    documents = load_dataset("json", data_files=text, split="train", cache_dir=str(out / "cache"))
    buffer, filled, files = np.empty(SHARD_TOKENS, np.uint16), 0, 0
    with multiprocessing.Pool(PROCESSES, _prepare_process, (tokenizer,)) as pool:
        for ids in pool.imap(_tokens, documents, chunksize=16):
            while filled + len(ids) >= SHARD_TOKENS:
                rest = SHARD_TOKENS - filled
                buffer[filled:] = ids[:rest]
                np.save(out / f"{files:06d}.npy", buffer)
                files, filled, ids = files + 1, 0, ids[rest:]
            buffer[filled : filled + len(ids)] = ids
            filled += len(ids)
    if filled:
        np.save(out / f"{files:06d}.npy", buffer[:filled])


def raw(text: str, processes: Path, tokenizer: str) -> None:
    count = int(str(processes))
    documents: list[list[bytes]] = [[] for _ in range(count)]
    with open(text, "rb") as lines:  # noqa: PTH123
        for number, line in enumerate(lines):
            documents[number // 64 % count].append(json.loads(line)["text"].encode())
    context = multiprocessing.get_context("fork")
    barrier, ends = context.Barrier(count), context.SimpleQueue()

    def encode(part: list[bytes]) -> None:
        import gigatoken

        content = json.loads(Path(tokenizer).read_text(encoding="utf-8"))
        library = gigatoken.Tokenizer.from_json(json.dumps({**content, "added_tokens": []}))
        barrier.wait()
        begun = time.monotonic()
        for document in part:
            library.encode(document)
        ends.put((begun, time.monotonic()))

    workers = [context.Process(target=encode, args=(part,)) for part in documents]
    for worker in workers:
        worker.start()
    times = [ends.get() for _ in workers]
    for worker in workers:
        worker.join()
    print(max(end for _, end in times) - min(begun for begun, _ in times))


if __name__ == "__main__":
    method, source, folder, vocabulary = sys.argv[1:]
    if method != "raw":
        Path(folder).mkdir(parents=True)
    {"datasets_map": datasets_map, "pool_imap": pool_imap, "raw": raw}[method](source, Path(folder), vocabulary)
