"""Records that a run had to skip: counted, listed in a file, and an error if there are too many."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saccade.errors import SaccadeError
from saccade.files import reading, write_text_atomically

BAD_RECORDS_FILE = "bad_records.jsonl"
_SHOWN = 5


class BadRecordLog:
    """The distinct bad records of a run, over all of its ranks and epochs."""

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.path = Path(folder) / BAD_RECORDS_FILE
        self.limit = limit
        self.records: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def read(self) -> None:
        """Load the list of the resumed run."""
        if self.path.is_file():
            with reading(f"{self.path} is damaged, remove it"):
                lines = self.path.read_text(encoding="utf-8").splitlines()
                entries = [
                    {name: str(entry[name]) for name in ("record", "kind", "reason")}
                    for entry in map(json.loads, lines)
                ]
            self.records = {entry["record"]: entry for entry in entries}

    def unknown(self, found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of `found` that are not in the list yet."""
        return [entry for entry in found if entry["record"] not in self.records]

    def add(self, found: Iterable[dict[str, Any]]) -> None:
        """Add bad records; the order in which ranks found them does not matter."""
        for entry in sorted(found, key=lambda entry: entry["record"]):
            self.records.setdefault(entry["record"], entry)

    def write(self) -> None:
        """Write the list, whole or not at all."""
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.records.values()]
        write_text_atomically(self.path, "".join(lines))

    def check(self) -> None:
        """Check that the limit is not exceeded."""
        if len(self) <= self.limit:
            return
        lines = [f"{entry['record']}: {entry['reason']}" for entry in self.records.values()]
        if self.limit == 0:
            raise SaccadeError(f"{lines[0]} (max_bad_records=0 stops at the first bad record)")
        shown = "; ".join(lines[:_SHOWN])
        raise SaccadeError(
            f"{len(self)} bad records, more than max_bad_records={self.limit}; {shown}"
            f"{'; ...' if len(self) > _SHOWN else ''} ({self.path} lists them, `saccade data check` finds all)"
        )
