"""What has been measured, a line of JSON each, so that an interrupted run goes on where it stopped.

Every process appends to a file of its own. A line that a killed process left unfinished is not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..files import atomically

_SETTINGS = "settings.json"
_PATTERN = "measured-*.jsonl"

Record = dict[str, Any]


class Journal:
    """The records of a run in its folder.

    Args:
        folder: is made where it does not exist.
        settings: what the records depend on.
        resume: go on with the records there; otherwise there must be none.
        rank: of this process.

    Raises:
        TrainingError: the folder holds a run and `resume` is false, or one with other settings.
    """

    def __init__(self, folder: Path, settings: Record, *, resume: bool = False, rank: int = 0) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / _SETTINGS
        if kept.is_file():
            before = json.loads(kept.read_text(encoding="utf-8"))
            if not resume and rank == 0:
                raise TrainingError(f"{folder}: holds a run already; go on with --resume, or choose another --output")
            changed = [key for key in settings if before.get(key) != settings[key]]
            if resume and changed:
                key = changed[0]
                raise TrainingError(
                    f"{folder}: was measured with {key} {before.get(key)!r}, now it is {settings[key]!r}; "
                    "choose another --output"
                )
        elif rank == 0:
            text = json.dumps(settings, indent=1)
            atomically(kept, lambda part: part.write_text(text, encoding="utf-8"))
        self._file = folder / f"measured-{rank}.jsonl"
        self._complete_last_line()

    def _complete_last_line(self) -> None:
        """What is appended must not become part of an unfinished line."""
        if self._file.is_file() and self._file.stat().st_size:
            with self._file.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def append(self, record: Record) -> None:
        """Keep a record; it is on its way to the disk when this returns."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> Iterator[Record]:
        """Those of all processes."""
        for path in sorted(self.folder.glob(_PATTERN)):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(record, dict):
                    yield record
