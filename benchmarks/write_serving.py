"""Put results of `python -m benchmarks.serving` into docs/serve.md, with their pictures.

    python -m benchmarks.write_serving 576=out/serving/serving-576.json 2880=out/serving/serving-2880.json

Each NAME=FILE fills what stands between `<!-- bench: NAME -->` and `<!-- end -->` on the page. The text around is
written by people.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import plot_serving
from benchmarks.serving_tables import selection_table, summarise, tables
from benchmarks.write_performance import DOCS, fill
from saccade.errors import counted
from saccade.report.tables import markdown_table


def section(name: str, path: Path) -> str:
    """The picture, tables, and where the figures come from."""
    result = json.loads(path.read_text())
    picture = f"images/serving_{name}.png"
    sizes = sorted({cell["at_once"] for cell in result["cells"]})
    plot_serving(result["visual_tokens"], {size: summarise(result, size) for size in sizes}, DOCS / picture)
    parts = [f"![Seconds to the first token and requests per second, on all visual tokens and on fewer]({picture})\n"]
    for title, (columns, cells) in tables(result).items():
        parts.append(f"**{title[0].upper()}{title[1:]}**\n\n{markdown_table(columns, cells)}")
    parts.append(f"**What selection takes, for one picture**\n\n{markdown_table(*selection_table(result))}")
    parts.append(f"*{_origin(result, sizes)}*\n")
    return "\n".join(parts)


def _origin(result: Mapping[str, Any], sizes: Sequence[int]) -> str:
    """The setting, the machine and the versions of a result."""
    cells, found, engine = result["cells"], result["environment"], result["engine"]
    given = ", ".join(f"{key} {value}" for key, value in result["bench"].items() if value not in (None, False))
    repeats = {size: 1 + max(cell["repeat"] for cell in cells if cell["at_once"] == size) for size in sizes}
    loads = sorted(float(cell["load"]) for cell in cells)
    packages = found["packages"]
    return "; ".join(
        [
            f"`python -m benchmarks.serving` with {given}",
            "bursts: " + ", ".join(f"{count} of {size} at a time" for size, count in repeats.items()),
            "median (least to greatest)",
            f"{result['date']}; commit {(found['commit'] or 'unknown')[:7]}",
            f"{found['cpu']} ({counted(found['cores'], 'core')}), load {loads[0]} to {loads[-1]}",
            f"Python {found['python']}, torch {packages['torch']}, transformers {packages['transformers']}",
            f"servers: vllm {engine['vllm']}, transformers {engine['transformers']}",
        ]
    )


if __name__ == "__main__":
    fill(DOCS / "serve.md", section)
