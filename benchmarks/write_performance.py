"""Insert results of `python -m benchmarks.train` and their plots into docs/performance.md.

    python -m benchmarks.write_performance tiny=out/bench llava=out/bench-llava

Each NAME=FOLDER replaces the section between `<!-- bench: NAME -->` and `<!-- end -->` of the page. The surrounding
text is written by hand.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.train import RESULT_FILE, tables
from saccade.errors import counted
from saccade.files import write_text_atomically
from saccade.report.tables import markdown_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "performance.md"


def section(name: str, folder: Path) -> str:
    """Tables, plots, and the command, commit and machine that produced them."""
    result = json.loads((folder / RESULT_FILE).read_text())
    parts = []
    for title, (columns, cells) in tables(result).items():
        parts.append(f"**{title[0].upper()}{title[1:]}**\n\n{markdown_table(columns, cells)}")
    for kind, alt in (("speedups", "Speed-ups of a step"), ("parts", "Where a step's time goes, stage two")):
        picture = f"images/bench_{name}_{kind}.png"
        # Where the stock trainer ran out of memory there may be none.
        if (drawn := folder / f"bench_train_{kind}.png").is_file():
            shutil.copyfile(drawn, DOCS / picture)
            parts.append(f"![{alt}]({picture})\n")
    bench, found = result["bench"], result["environment"]
    gpus = "".join(f", {gpu['name']}" for gpu in found["gpus"]) if bench["device"] != "cpu" else ""
    given = ", ".join(f"{key} {value}" for key, value in bench.items() if value not in (None, False))
    versions = ", ".join(f"{package} {found['packages'][package]}" for package in ("torch", "transformers", "trl"))
    cores = counted(found["cores"], "core")
    parts.append(
        f"*`python -m benchmarks.train` with {given}; {result['date']}; "
        f"commit {(found['commit'] or 'unknown')[:7]}; {found['cpu']} ({cores}){gpus}, "
        f"load {result['load']}; Python {found['python']}, {versions}.*\n"
    )
    return "\n".join(parts)


def main() -> None:
    fill(PAGE, section)


def fill(page: Path, section: Callable[[str, Path], str]) -> None:
    """Put what `section` makes of each NAME=PATH of the command line between NAME's marks on a page."""
    text = page.read_text()
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        marked = re.compile(rf"(<!-- bench: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise SystemExit(f"{page} has no section {name!r}: add <!-- bench: {name} --> and <!-- end -->")
        made = section(name, Path(path))
        text = marked.sub(lambda match, made=made: match[1] + made + match[2], text)
    write_text_atomically(page, text)


if __name__ == "__main__":
    main()
