"""A complete run as a user would make it, at tiny size, with a kill -9 in the middle; every command is a real process.

    python -m experiments.story OUT [--steps 40] [--pretrain-steps 20] [--scenes 200] [--processes 2] [--docs FILE]

Writes data in LLaVA's JSON format, checks it, pretrains, fine-tunes LoRA adapters on two processes, kills them all,
resumes, exports, loads the export in stock transformers, evaluates it with all tokens and with pruned ones, compares
it with the model before fine-tuning, and writes `story.json`. Stops at the first step that fails.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from saccade.data import digit_scenes
from saccade.files import write_json_atomically, write_text_atomically
from saccade.report.environment import environment
from saccade.report.tables import markdown_table

LOADS = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)
AutoProcessor.from_pretrained(sys.argv[1])
left = {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
assert not left, left
assert not [name for name in sys.modules if name.startswith("saccade")]
print(type(model).__name__, sum(parameter.numel() for parameter in model.parameters()))
"""


class Story:
    """Runs commands in a folder and records how long they took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []

    def saccade(self, title: str, *words: Any) -> str:
        """Run one `saccade` command, which must succeed, and return its output."""
        return self.run(title, [sys.executable, "-m", "saccade.cli.main", *map(str, words)])

    def run(self, title: str, command: list[str], shown: str | None = None) -> str:
        """Run one command, which must succeed, and return its output."""
        started = time.perf_counter()
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        self._note(title, shown or self._shown(command), started, f"exit {done.returncode}")
        if done.returncode:
            raise SystemExit(f"{title}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def kill_once_there_is(self, title: str, checkpoint: Path, *words: Any) -> None:
        """Start a command in a separate process group, and kill -9 all its processes once a checkpoint exists."""
        command = [sys.executable, "-m", "saccade.cli.main", *map(str, words)]
        started = time.perf_counter()
        log = self.folder / "killed.log"
        with log.open("w") as output:
            running = subprocess.Popen(
                command, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            while not (self.folder / checkpoint).is_dir():
                if running.poll() is not None:
                    raise SystemExit(f"{title}: it ended by itself\n{log.read_text()[-3000:]}")
                time.sleep(0.05)
            _kill_all(running.pid)
            running.wait()
        self._note(title, self._shown(command), started, f"killed by signal {-running.returncode}")

    def _note(self, title: str, command: str, started: float, outcome: str) -> None:
        seconds = round(time.perf_counter() - started, 1)
        self.steps.append({"title": title, "command": command, "seconds": seconds, "outcome": outcome})
        print(f"{title}: {outcome}, {seconds} s", flush=True)

    @staticmethod
    def _shown(command: list[str]) -> str:
        return shlex.join(["saccade", *command[3:]])


def _kill_all(leader: int) -> None:
    """kill -9 to a process and all of its descendants, whatever groups they are in."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    doomed, queue = [], [leader]
    while queue:
        process = queue.pop()
        doomed.append(process)
        queue += children.get(process, [])
    for process in doomed:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def write_llava_json(folder: Path, stage: str, rows: int, turns: int = 1) -> Path:
    """Digit scenes as PNG files and one JSON list in the shape of `llava_v1_5_mix665k.json`."""
    path = folder / f"{stage}.json"
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for number, row in enumerate(digit_scenes(stage, "train", rows, seed=0, turns=turns)):
        record: dict[str, Any] = {"id": f"{stage}-{number}"}
        for image in row["images"]:
            record["image"] = f"{stage}-{number}.png"
            image.save(images / record["image"])
        spoken = {"user": "human", "assistant": "gpt"}
        record["conversations"] = [
            {"from": spoken[message["role"]], "value": message["content"]} for message in row["messages"]
        ]
        if row["images"] and "<image>" not in record["conversations"][0]["value"]:
            record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
        records.append(record)
    write_text_atomically(path, json.dumps(records))
    return path


def tell(folder: Path, steps: int, pretrain_steps: int, scenes: int, processes: int) -> dict[str, Any]:
    """Run all steps, and return the content of `story.json`."""
    story = Story(folder)
    batch = 8
    write_llava_json(folder, "pretrain", pretrain_steps * batch)
    write_llava_json(folder, "sft", steps * batch, turns=2)
    for stage in ("pretrain", "sft"):
        story.saccade(f"check the data of {stage}", "data", "check", f"{stage}.json", "--image-folder", "images")

    def data(stage: str) -> list[Any]:
        return ["--dataset", f"{stage}.json", "--image_folder", "images", "--dataset_rows", "null"]

    shared = ["--logging_steps", 5, "--disable_tqdm", "true", "--dataloader_num_workers", 0]
    story.saccade(
        "pretrain", "train", "tiny-digits/pretrain", *data("pretrain"), *shared, "--max_steps", pretrain_steps,
        "--per_device_train_batch_size", batch, "--output_dir", "out/pretrain", "--save_strategy", "no",
    )  # fmt: skip
    every = max(1, steps // 4)
    sft = [
        "train", "tiny-digits/sft_lora", *data("sft"), *shared, "--max_steps", steps, "--save_steps", every,
        "--per_device_train_batch_size", max(1, batch // processes), "--output_dir", "out/sft",
        "--launch", "ddp", "--processes", processes,
    ]  # fmt: skip
    first = Path("out/sft") / f"checkpoint-{every}"
    story.kill_once_there_is(f"fine-tune on {processes} processes, kill -9", first, *sft)
    if (folder / "out/sft/adapter_model.safetensors").exists():
        raise SystemExit("the killed run had ended already: give more --steps")
    story.saccade("resume from the newest complete checkpoint", *sft, "--resume", "auto")
    story.saccade("export", "export", "out/sft", "--output", "out/export")
    loaded = story.run(
        "load it in stock transformers",
        [sys.executable, "-c", LOADS, "out/export"],
        shown="AutoModelForImageTextToText.from_pretrained('out/export', output_loading_info=True)",
    )
    evaluate = ["--num-samples", scenes, "--inference", "full,pruned"]
    story.saccade("evaluate the model before fine-tuning", "eval", "out/pretrain", *evaluate)
    story.saccade("evaluate the export, full and pruned", "eval", "out/export", *evaluate)
    compared = story.saccade("compare", "eval", "compare", "out/pretrain", "out/export")
    log = json.loads((folder / "out/sft/log.json").read_text())["log_history"]
    reached = [entry["step"] for entry in log if "step" in entry]
    if max(reached) != steps:
        raise SystemExit(f"the resumed run ended at step {max(reached)}, not {steps}")
    accuracy = {
        name: {
            entry["inference"]: entry["accuracy"]
            for entry in json.loads((folder / "out" / name / "eval.json").read_text())["results"]
        }
        for name in ("pretrain", "export")
    }
    return {
        "settings": {"steps": steps, "pretrain_steps": pretrain_steps, "scenes": scenes, "processes": processes},
        "steps": story.steps,
        "loaded": loaded.strip(),
        "accuracy": accuracy,
        "compared": compared,
        "environment": environment(),
    }


def page(told: dict[str, Any], command: str) -> str:
    """The story as a page of documentation."""
    found, settings = told["environment"], told["settings"]
    rows = [[entry["title"], f"`{entry['command']}`", entry["outcome"], entry["seconds"]] for entry in told["steps"]]
    accuracy = [
        [name, *(f"{100 * values[way]:.1f} %" for way in ("full", "pruned"))]
        for name, values in (
            ("before fine-tuning", told["accuracy"]["pretrain"]),
            ("the export", told["accuracy"]["export"]),
        )
    ]
    versions = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "transformers", "trl", "peft"))
    kind, parameters = told["loaded"].split()
    compared = "\n".join(line.rstrip() for line in told["compared"].strip().splitlines())
    return f"""# From a data file to an evaluated model

A complete run, from a data file to an evaluated model: check the data, pretrain, fine-tune on two processes, kill
them with kill -9, resume, export, evaluate. Every command below is a real process. The data are digit scenes in
LLaVA's JSON format, the model is the embedded one, and the run is far too short to learn much: the page shows that
every step works, not how good a model gets. `tests/test_story.py` runs the same steps.

{markdown_table(["step", "command", "outcome", "seconds"], rows)}
The export is a `{kind}` of {int(parameters):,} parameters, with no missing and no unexpected key.

{markdown_table(["accuracy on the digit scenes", "all tokens", "pruned"], accuracy)}
`saccade eval compare` prints:

```text
{compared}
```

*{settings["pretrain_steps"]} and {settings["steps"]} steps, {settings["scenes"]} scenes of the test split, seed 0;
`{command}`; {time.strftime("%Y-%m-%d")}; commit {(found["commit"] or "unknown")[:7]}; {found["cpu"]}
({found["cores"]} cores), with other work beside it; Python {found["python"]}, {versions}.*
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pretrain-steps", type=int, default=20)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--docs", type=Path, help="write the story as a page")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if any(arguments.output.iterdir()):
        raise SystemExit(f"output={str(arguments.output)!r} is not empty: give a new folder")
    settings = (arguments.steps, arguments.pretrain_steps, arguments.scenes, arguments.processes)
    told = tell(arguments.output, *settings)
    write_json_atomically(arguments.output / "story.json", told)
    if arguments.docs:
        flags = " ".join(sys.argv[2:])
        write_text_atomically(arguments.docs, page(told, f"python -m experiments.story OUT {flags}".rstrip()))


if __name__ == "__main__":
    main()
