"""Time and memory that a large LLaVA file costs a training process.

python -m benchmarks.large_file --records 200000
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from PIL import Image

from saccade.data.lengths import TokenCounter, estimate_lengths
from saccade.files import to_json
from saccade.tiny import build_tiny_processor
from saccade.training import ModelOptions, load_rows

WORDS = [
    "the",
    "cat",
    "dog",
    "on",
    "mat",
    "with",
    "red",
    "blue",
    "and",
    "then",
    "how",
    "many",
    "digits",
    "are",
    "there",
]


def memory() -> float:
    """Anonymous memory of this process in MiB: pages backed by no file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def write_file(path: Path, records: int, seed: int) -> None:
    """Conversations of one to nine turns of 12 and 25 words, which matches the average length of LLaVA's mix."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(records):
            turns = []
            for turn in range(draw.randint(1, 9)):
                question = ("" if turn else "<image>\n") + " ".join(draw.choices(WORDS, k=12))
                turns.append({"from": "human", "value": question})
                turns.append({"from": "gpt", "value": " ".join(draw.choices(WORDS, k=25))})
            record = {"id": f"{number:09d}", "image": "a.jpg", "conversations": turns}
            file.write(("[" if number == 0 else ", ") + json.dumps(record))
        file.write("]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    processor = build_tiny_processor()
    counter = TokenCounter(processor, processor.tokenizer.convert_tokens_to_ids("<image>"), 0.9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.json"
        write_file(path, args.records, args.seed)
        Image.new("RGB", (96, 96)).save(path.with_name("a.jpg"))
        results = {"records": args.records, "file_mb": round(path.stat().st_size / 1e6, 1)}
        before, start = memory(), time.perf_counter()
        rows = load_rows(ModelOptions(dataset=str(path)))
        results["load_seconds"] = round(time.perf_counter() - start, 2)
        results["load_mib"] = round(memory() - before, 1)
        start = time.perf_counter()
        for number in range(0, args.records, 20):
            rows[number]
        results["row_microseconds"] = round((time.perf_counter() - start) / len(range(0, args.records, 20)) * 1e6, 1)
        start = time.perf_counter()
        estimate_lengths(rows, counter, shortened=True)
        results["lengths_seconds"] = round(time.perf_counter() - start, 2)
        before, start = memory(), time.perf_counter()
        parsed = json.loads(path.read_bytes())
        results["json_loads_seconds"] = round(time.perf_counter() - start, 2)
        results["json_loads_mib"] = round(memory() - before, 1)
        assert len(parsed) == len(rows)
    print(to_json(results))


if __name__ == "__main__":
    main()
