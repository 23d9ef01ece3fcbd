"""What the cells of a serving benchmark say: medians and ranges, ratios, and what counted operations allow.

A cell is one burst of one provider: `provider`, `at_once`, `repeat`, `seconds` until all were answered, and `requests`
with `first`, `further` and `prompt_tokens` of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from transformers import PreTrainedConfig

from benchmarks.flops import decode_flops, prefill_flops
from saccade.training.flops import TextShape, VisualRows, projector_flops, tower_flops

Spread = tuple[float, float, float]
"""Median, least and greatest over the repeats."""


@dataclass(frozen=True)
class Summary:
    """What one provider did with bursts of one size.

    Args:
        first: seconds to the first token: of each burst the median, over the repeats.
        further: seconds for each further token, likewise.
        rate: requests per second.
        first_ratio, rate_ratio: how many times as soon, and as many, as the baseline in the same repeat.
        first_bound, rate_bound: those ratios of counted operations.
        cached: rows of the key-value cache that a request takes in the end.
        fit: requests that fit into the cache; None where there is no cache of a fixed size.
    """

    first: Spread
    further: Spread
    rate: Spread
    first_ratio: Spread
    rate_ratio: Spread
    first_bound: float
    rate_bound: float
    cached: int
    fit: int | None


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest."""
    return median(values), min(values), max(values)


def operations(
    config: PreTrainedConfig, crops: int, visual_tokens: int, rows: int, full_rows: int, new_tokens: int
) -> dict[str, int]:
    """Operations of one request by itself, with causal attention; those of choosing tokens are not counted.

    Args:
        crops: how often the tower runs.
        visual_tokens: of the picture when none are dropped.
        rows: of the prompt.
        full_rows: of the prompt when none are dropped.
        new_tokens: of the answer.

    Returns:
        `first`, up to the first token: tower, projector and prefill; and `request`, up to the last.
    """
    text = TextShape.of(config)
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    text_tokens = full_rows - visual_tokens
    eyes = tower_flops(config, crops, (side, side)) + projector_flops(config, crops, (side, side))
    first = eyes + prefill_flops(text, VisualRows(rows - text_tokens), text_tokens, "causal")
    return {"first": first, "request": first + sum(decode_flops(text, rows + n) for n in range(new_tokens - 1))}


def requests_that_fit(blocks: int, block_size: int, rows: int) -> int:
    """How many requests of `rows` rows a cache of blocks holds at once; a block is of one request only."""
    return blocks // -(-rows // block_size)


def summarise(result: Mapping[str, Any], at_once: int) -> dict[str, Summary]:
    """The providers that were measured with bursts of this size, in the order of the result.

    Each is compared with its baseline in the same repeat; a repeat that lacks one of the two counts for no ratio.
    """
    cells: dict[str, dict[int, Mapping[str, Any]]] = {}
    for cell in result["cells"]:
        if cell["at_once"] == at_once:
            cells.setdefault(cell["provider"], {})[cell["repeat"]] = cell
    found = {}
    for name, kind in result["providers"].items():
        base = cells.get(kind["baseline"], {})
        shared = sorted(cells.get(name, {}).keys() & base.keys())
        if not shared:
            continue
        own = cells[name]
        new, cache = result["bench"]["new_tokens"], kind.get("cache")
        cached = own[shared[0]]["requests"][0]["prompt_tokens"] + new
        counts, baseline = result["operations"][name], result["operations"][kind["baseline"]]
        found[name] = Summary(
            first=spread([_first(cell) for cell in own.values()]),
            further=spread([median(each["further"] for each in cell["requests"]) for cell in own.values()]),
            rate=spread([_rate(cell) for cell in own.values()]),
            first_ratio=spread([_first(base[n]) / _first(own[n]) for n in shared]),
            rate_ratio=spread([_rate(own[n]) / _rate(base[n]) for n in shared]),
            first_bound=baseline["first"] / counts["first"],
            rate_bound=baseline["request"] / counts["request"],
            cached=cached,
            fit=None if cache is None else requests_that_fit(*cache, cached),
        )
    return found


def _first(cell: Mapping[str, Any]) -> float:
    return median(each["first"] for each in cell["requests"])


def _rate(cell: Mapping[str, Any]) -> float:
    return len(cell["requests"]) / cell["seconds"]


FIRST = ("", "first token, s", "times as soon", "operations allow", "reached", "further token, ms")
RATE = ("", "requests/s", "times as many", "operations allow", "reached", "rows of KV cache", "requests that fit")


def tables(result: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and cells for each size of bursts: first of the first token, then of whole requests."""
    found: dict[str, tuple[list[str], list[list[Any]]]] = {}
    for at_once in sorted({cell["at_once"] for cell in result["cells"]}):
        first, rate = [], []
        for name, each in summarise(result, at_once).items():
            ratios = _of_bound(each.first_ratio, each.first_bound)
            first.append([name, _range(each.first), *ratios, _range([1000 * value for value in each.further])])
            ratios = _of_bound(each.rate_ratio, each.rate_bound)
            rate.append([name, _range(each.rate), *ratios, each.cached, each.fit])
        title = f"{at_once} {'request' if at_once == 1 else 'requests'} at a time"
        found[f"{title}: the first token"] = (list(FIRST), first)
        found[f"{title}: whole requests"] = (list(RATE), rate)
    return found


def _of_bound(ratio: Spread, bound: float) -> list[str]:
    return [_range(ratio), f"{bound:.2f}", f"{100 * ratio[0] / bound:.0f} %"]


def selection_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """What choosing tokens takes, beside the tower and beside what comes to the first token of a request alone."""
    alone = summarise(result, 1)
    rows = []
    for name, times in result["selection"].items():
        share = {}
        for kind, other in (("all", result["providers"][name]["baseline"]), ("own", name)):
            share[kind] = f"{100 * times['select'][0] / alone[other].first[0]:.1f} %" if other in alone else None
        cells = [_range([1000 * value for value in times[part]]) for part in ("outline", "encode", "select")]
        rows.append([name, *cells, share["all"], share["own"]])
    columns = ["", "counting tokens, ms", "tower and projector, ms", "selection, ms"]
    return [*columns, "of the first token on all tokens", "of the pruned first token"], rows


def _range(values: Sequence[float]) -> str:
    middle, low, high = values
    return f"{rounded(middle)} ({rounded(low)} to {rounded(high)})"


def rounded(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent."""
    return f"{float(f'{value:.{digits}g}'):g}"
