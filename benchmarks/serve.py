"""The server under load: 200 clients, speed with 1 and 16 clients, next to `transformers serve`.

    python benchmarks/serve.py                    # about four minutes
    python benchmarks/serve.py --tiny             # half a minute: to try the script

Method. A model with random weights is written to a folder that both servers open. Each server runs in a process of its own, on
this machine; the clients are coroutines of this process that write HTTP/1.0 to a socket, so that they take little of the CPU.

- Load: 200 clients ask for completions without a pause, for a minute: 4 of 10 for whole responses, 3 for streams; 2 read their
  stream 256 bytes at a time with pauses, through a small socket buffer; 1 disconnects after the first bytes. A client that gets
  429 waits for up to the time in Retry-After. Every text, which is greedy, must equal the one that the idle server returns
  for the same prompt. Every status must be 200 or 429, the server's memory must not grow, and no slot may stay occupied.
- Speed: for 10 seconds, 1 and 16 clients ask for completions of 32 tokens, one after the other; the rate is that of generated
  tokens until the last of them is complete, at most 75 seconds later; what is not complete then does not count. The servers
  take turns. `transformers serve` runs with and without `--continuous-batching`, if it starts (it needs FastAPI).
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bardling.checkpoint.contents import write_model
from bardling.cli.parse import parse
from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError
from bardling.model.gpt import GPT
from tables import Table, megabytes, publish, rounded, say, script

KINDS = ("whole", "whole", "whole", "whole", "stream", "stream", "stream", "slow", "slow", "disconnect")
PROMPTS = [f"Chapter {number}. It was the {number}th day of the voyage, and" for number in range(1, 25)]
MOST_GROWTH = 1.1  # of memory, from a third of the time to the end
LEAST_SPEEDUP = 3.0  # of 16 clients over one
LONGEST_WAIT = 75.0  # seconds for the last completions


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    seconds: float = 60.0
    """Duration of the load."""
    clients: int = 200
    """Clients at the same time."""
    speed_seconds: float = 10.0
    """Duration of each measurement of speed."""
    rounds: int = 2
    """Measurements of speed per server and number of clients; the best counts."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Use a tiny model, few clients and short times, to try the script."""


@dataclasses.dataclass
class Answer:
    """What one request led to."""

    status: int
    text: str = ""
    tokens: int = 0
    first: float = 0.0  # seconds until the first byte of the body
    total: float = 0.0
    retry_after: float = 0.0


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    port: int
    pid: int
    model: str

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def ask(server: Server, prompt: str, tokens: int, kind: str) -> Answer:
    """Send one request; how the answer is read depends on the kind of client."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": kind != "whole"}
    data, start = json.dumps(body).encode(), time.perf_counter()
    head = f"POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    connection = socket.socket()
    connection.setblocking(False)
    if kind == "slow":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1_024 if kind == "slow" else 1 << 16)
    try:
        writer.write(head.encode() + b"\r\n\r\n" + data)
        headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        answer = Answer(int(headers.split(" ", 2)[1]))
        if found := re.search(r"(?im)^retry-after: (\d+)", headers):
            answer.retry_after = float(found[1])
        content = b""
        while piece := await reader.read(256 if kind == "slow" else 1 << 16):
            answer.first = answer.first or time.perf_counter() - start
            content += piece
            if kind == "disconnect" and answer.status == 200:
                return answer
            if kind == "slow":
                await asyncio.sleep(0.02)
        answer.total = time.perf_counter() - start
        if answer.status == 200:
            answer.text, answer.tokens = read_text(content, stream=kind != "whole")
        return answer
    finally:
        writer.transport.abort()


def read_text(content: bytes, *, stream: bool) -> tuple[str, int]:
    """The text of a response, and the number of its tokens (of a stream: the number of events with text)."""
    if not stream:
        value = json.loads(content)
        return value["choices"][0]["text"], value["usage"]["completion_tokens"]
    lines = [line.removeprefix(b"data: ") for line in content.splitlines() if line.startswith(b"data: ")]
    events = [json.loads(line) for line in lines if line != b"[DONE]"]
    texts = [event["choices"][0]["text"] for event in events if event.get("choices")]
    return "".join(texts), sum(map(bool, texts))


async def load(server: Server, options: Options, tokens: int) -> list[Table]:
    """Keep the server busy, and check what it answers."""
    expected = {prompt: (await ask(server, prompt, tokens, "whole")).text for prompt in PROMPTS}
    end, statuses, answers = time.monotonic() + options.seconds, Counter[int](), list[tuple[str, Answer]]()
    wrong, memory = list[str](), [server.memory()]

    async def client(number: int) -> None:
        kind, draw = KINDS[number % len(KINDS)], random.Random(number)
        while time.monotonic() < end:
            prompt = draw.choice(PROMPTS)
            answer = await ask(server, prompt, tokens, kind)
            statuses[answer.status] += 1
            if answer.status == 200:
                answers.append((kind, answer))
                if kind != "disconnect" and answer.text != expected[prompt]:
                    wrong.append(prompt)
            await asyncio.sleep(draw.random() * answer.retry_after)

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(options.seconds / 30)
            memory.append(server.memory())

    await asyncio.gather(watch(), *map(client, range(options.clients)))
    await asyncio.sleep(1)
    return _report(options, statuses, answers, wrong, memory, _occupied(server))


def _report(
    options: Options,
    statuses: Counter[int],
    answers: Sequence[tuple[str, Answer]],
    wrong: list[str],
    memory: list[int],
    occupied: int,
) -> list[Table]:
    """The tables of a load test; problems are user errors."""
    problems = [f"status {status} {count} times" for status, count in statuses.items() if status not in (200, 429)]
    problems += [f"{len(wrong)} texts differ from those of the idle server"] * bool(wrong)
    problems += [f"{occupied} slots are occupied after the end"] * bool(occupied)
    growth = memory[-1] / memory[len(memory) // 3]
    problems += [f"memory grew by a factor of {growth:.2f}"] * (growth > MOST_GROWTH)
    rows = []
    for kind in dict.fromkeys(KINDS):
        found = [answer for each, answer in answers if each == kind]
        latencies = sorted(answer.total for answer in found) if kind != "disconnect" else []
        firsts = sorted(answer.first for answer in found) if kind != "whole" else []
        rows.append([kind, f"{len(found):,}", *_percentiles(firsts), *_percentiles(latencies)])
    total = sum(statuses.values())
    notes = [
        f"{options.clients} clients for {options.seconds:g} s; {total:,} requests: {statuses[429]:,} got 429, the "
        "others with 200",
        f"the server's memory: {megabytes(memory[0])} MB before, {megabytes(memory[len(memory) // 3])} MB after a third of the "
        f"time, {megabytes(memory[-1])} MB at the end; no slot stayed occupied",
        "every greedy text equals that of the idle server; seconds from the request; a slow client's time is mostly its own",
    ]
    columns = ["client", "answered", "first byte p50", "p95", "p99", "complete p50", "p95", "p99"]
    table = Table("Load", columns, rows, notes)
    if problems:
        print(table.markdown())
        raise UserError(f"the server failed under load: {'; '.join(problems)}")
    return [table]


def _percentiles(values: Sequence[float]) -> list[str]:
    return [f"{values[min(len(values) - 1, int(len(values) * part))]:.2f}" if values else "" for part in (0.5, 0.95, 0.99)]


def _occupied(server: Server) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        text = answer.read().decode()
    return sum(int(float(n)) for n in re.findall(r"^bardling_completions_(?:running|waiting)\S* (\S+)$", text, re.MULTILINE))


async def speed(server: Server, clients: int, seconds: float, tokens: int) -> float:
    """Generated tokens per second that `clients` clients get together."""
    start = time.perf_counter()
    count = 0

    async def client(number: int) -> None:
        nonlocal count
        while time.perf_counter() < start + seconds:
            answer = await ask(server, PROMPTS[number % len(PROMPTS)], tokens, "whole")
            if answer.status != 200:
                raise UserError(f"{server.name}: status {answer.status}")
            count += answer.tokens

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    done, late = await asyncio.wait(tasks, timeout=seconds + LONGEST_WAIT)
    for task in late:
        task.cancel()
    for task in done:
        task.result()
    return count / (time.perf_counter() - start)


@contextlib.contextmanager
def running(name: str, command: Sequence[str], port: int, model: str) -> Iterator[Server | None]:
    """Run a server until the context ends; None if it does not start."""
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield Server(name, port, process.pid, model) if _answers(process, port, model) else None
        finally:
            process.kill()
            process.wait()


def _answers(process: subprocess.Popen[bytes], port: int, model: str) -> bool:
    """Wait until a server completes a text."""
    body = json.dumps({"model": model, "prompt": "a", "max_tokens": 2}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
            return bool(answer.status == 200)
        time.sleep(0.2)
    return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def main(argv: Sequence[str]) -> None:
    options = parse(Options, argv, prog="python benchmarks/serve.py", description="Measure the server under load.")
    config = ModelConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=257)
    tokens = 32
    if options.tiny:
        options = dataclasses.replace(options, seconds=4.0, clients=30, speed_seconds=1.0, rounds=1)
        config = dataclasses.replace(config, n_layer=2, n_head=2, n_embd=32, block_size=128)
        tokens = 16
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        folder.mkdir()
        write_model(folder, config, GPT(config, seed=0).state_dict(), build_tokenizer("byte", []))
        tables = asyncio.run(_measure(options, config, str(folder), tokens))
    publish("serve", tables, device=torch.device("cpu"), command=argv, folder=options.results)


async def _measure(options: Options, config: ModelConfig, folder: str, tokens: int) -> list[Table]:
    ours = ["-m", "bardling", "serve", folder, "--device", "cpu", "--weights", "float32"]
    theirs = ["-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu", "--dtype", "float32"]
    batching = [*theirs, "--continuous-batching", "--cb-max-memory-percent", "0.05"]  # its cache takes all memory otherwise
    commands = {"bardling serve": ours, "transformers serve": theirs, "transformers serve --continuous-batching": batching}
    rates: dict[str, dict[int, list[float]]] = {}
    tables: list[Table] = []
    with contextlib.ExitStack() as stack:
        servers = []
        for name, command in commands.items():
            port = free_port()
            model = "model" if name == "bardling serve" else folder
            say(f"starting {name}")
            server = stack.enter_context(running(name, [sys.executable, *command, "--port", str(port)], port, model))
            if server is None:
                say(f"{name} did not start, or does not complete texts; it is left out")
                continue
            servers.append(server)
            if name == "bardling serve":
                say("load")
                tables = await load(server, options, tokens)
                say(tables[0].markdown())
        for _ in range(options.rounds):
            for server in servers:
                for other in servers:  # even an idle server may use the CPU
                    os.kill(other.pid, signal.SIGCONT if other is server else signal.SIGSTOP)
                for clients in (1, 16):
                    say(f"speed: {server.name}, {clients} clients")
                    rate = await speed(server, clients, options.speed_seconds, tokens)
                    rates.setdefault(server.name, {}).setdefault(clients, []).append(rate)
    return [*tables, _speed_table(rates, config, options, tokens)]


def _speed_table(rates: dict[str, dict[int, list[float]]], config: ModelConfig, options: Options, tokens: int) -> Table:
    ours = {clients: max(values) for clients, values in rates["bardling serve"].items()}
    if ours[16] < LEAST_SPEEDUP * ours[1] and not options.tiny:
        raise UserError(f"16 clients get {ours[16] / ours[1]:.2f} times the tokens/s of one, not {LEAST_SPEEDUP}")
    rows: list[list[Any]] = []
    for name, found in rates.items():
        best = {clients: max(values) for clients, values in found.items()}
        ratios = [f"{ours[clients] / best[clients]:.2f}" if best[clients] else "" for clients in (1, 16)]
        rows.append([name, rounded(best[1]), rounded(best[16]), f"{best[16] / best[1]:.2f}" if best[1] else "", *ratios])
    model = f"{config.n_layer} layers, width {config.n_embd}, {tokens} tokens per completion, float32"
    notes = [
        f"generated tokens per second of all clients together, best of {options.rounds} rounds of {options.speed_seconds:g} s",
        model,
        "x: bardling's rate divided by the server's; the servers take turns, the others are stopped meanwhile",
    ]
    return Table("Speed", ["server", "1 client", "16 clients", "16 over 1", "x, 1 client", "x, 16 clients"], rows, notes)


if __name__ == "__main__":
    script(main)
