"""Work with a time limit: commands, and lists of items that are recorded one by one and go on after a crash."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esr_kernels.timing import write_json

ROOT = Path(__file__).resolve().parent.parent
TAIL_LINES = 40
# Seconds past its limit after which a process is killed: an item that has begun may end.
GRACE = 15.0


class LostError(RuntimeError):
    """The process can do no more work, such as after an illegal access on a GPU; another process can."""


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit status (None: killed at the limit), its time and its last lines of output."""

    returncode: int | None
    seconds: float
    tail: list[str]

    def to_json(self) -> dict[str, Any]:
        return {"returncode": self.returncode, "seconds": self.seconds, "tail": self.tail}


@dataclass(frozen=True)
class Item:
    """A piece of work that returns its record, and how many seconds must be left for it to begin."""

    run: Callable[[], dict[str, Any]]
    seconds: float = 1.0


def run_command(
    command: Sequence[str],
    seconds: float,
    *,
    environment: Mapping[str, str] | None = None,
    echo: bool = False,
    lines: int = TAIL_LINES,
) -> Finished:
    """Run a command in the repository's root; it and its children are killed after `seconds`.

    Args:
        environment: added to this process's.
        echo: show the output while it runs.
        lines: of output to keep.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    tail: collections.deque[str] = collections.deque(maxlen=lines)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip("\n"))
            if echo:
                print(line, end="", flush=True)

    # A grandchild may hold the pipe open after the command has ended, so nobody waits for its end without a limit.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    returncode: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            returncode = process.wait(timeout=max(seconds, 0.1))
    finally:
        if returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(timeout=5)
    return Finished(returncode, time.monotonic() - start, list(tail))


def share(part: str, pending: Sequence[str], remaining: float, weights: Mapping[str, float]) -> float:
    """Seconds for `part`, the first of `pending`: its weight's share of what remains, so that unspent time moves on."""
    return max(remaining, 0.0) * weights[part] / sum(weights[p] for p in pending)


def last_lines(error: BaseException, lines: int = 12) -> list[str]:
    return "".join(traceback.format_exception(error)).rstrip().splitlines()[-lines:]


def new_state(results: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"results": dict(results or {}), "not_run": {}, "running": None, "error": None}


def run_items(
    items: Mapping[str, Item], state: dict[str, Any], seconds: float, save: Callable[[dict[str, Any]], object]
) -> None:
    """Run what `state` has no result of, in order, saving it before and after each.

    An item that raises is recorded with its traceback's last lines and the next one runs.

    Raises:
        LostError: an item raised it; it is recorded too.
    """
    deadline = time.monotonic() + seconds
    waiting = {key: item for key, item in items.items() if key not in state["results"]}
    state["not_run"] = dict.fromkeys(waiting, "the part ended before it")
    for key, item in waiting.items():
        start = time.monotonic()
        left = deadline - start
        if left < item.seconds:
            state["not_run"][key] = f"needs {item.seconds:.0f} s, {max(left, 0):.0f} s of the part's time were left"
            continue
        state["running"] = key
        del state["not_run"][key]
        save(state)
        lost: LostError | None = None
        try:
            record = item.run()
        except Exception as error:
            record = {"error": last_lines(error)}
            lost = error if isinstance(error, LostError) else None
        record["seconds"] = time.monotonic() - start
        state["results"][key] = record
        state["running"] = None
        save(state)
        print(
            f"  {key}: {record['error'][-1] if 'error' in record else 'done'} ({record['seconds']:.1f} s)", flush=True
        )
        if lost is not None:
            raise lost
    save(state)


def run_in_processes(
    command: Callable[[Path, float], Sequence[str]],
    results: Mapping[str, Any],
    seconds: float,
    file: Path,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The state after a worker process has run a part's items; one that dies is replaced, without the item it died of.

    Args:
        command: state file, seconds -> the worker's command line; it runs `run_items` on the state in that file.
        results: what there is already.
        seconds: for all the processes together, but for the grace of the last.
        file: where the state is kept meanwhile; removed in the end.
        environment: added to this process's.
    """
    deadline = time.monotonic() + seconds
    state = new_state(results)
    while (left := deadline - time.monotonic()) > 0:
        before = len(state["results"])
        write_json(file, state)
        finished = run_command(command(file, left), left + GRACE, environment=environment, echo=True)
        state = json.loads(file.read_text(encoding="utf-8"))
        running, state["running"] = state["running"], None
        if finished.returncode is None:
            reason = "stopped at the part's time limit"
            if running is not None:
                state["not_run"][running] = reason
            state["error"] = [reason]
            break
        if finished.returncode == 0:
            break
        died = [*finished.tail[-12:], f"the process ended with status {finished.returncode}"]
        if running is not None:
            state["results"][running] = {"error": died}
        elif len(state["results"]) == before:
            state["error"] = died
            break
    file.unlink(missing_ok=True)
    return state
