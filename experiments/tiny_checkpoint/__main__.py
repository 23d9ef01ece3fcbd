"""Pretrain the tiny LLaVA's tower and language model: `python -m experiments.tiny_checkpoint --output DIR`.

The tower learns from scenes of the train digits, the language model from text alone, and the projector between them
stays random, as when a vision-language model is assembled. Writes the model folder and, next to it, `<folder>.json`
with the held-out scores of both.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from experiments.tiny_checkpoint.text import factor_embeddings, score_text, train_text
from experiments.tiny_checkpoint.tower import probe_tower, train_tower
from saccade.errors import SaccadeError
from saccade.files import write_json_atomically
from saccade.tiny.model import build_tiny_llava, build_tiny_processor, save_tiny

TOWER_STEPS, TEXT_STEPS = 1600, 2700
# Share of the text steps and peak learning rate of each cycle.
TEXT_CYCLES = ((2 / 3, 2e-3), (1 / 3, 1.5e-3))


def pretrain(output: str | os.PathLike, tower_steps: int, text_steps: int, seed: int = 0) -> dict:
    """Pretrain from random weights and write the folder `output` and the report `output` + ".json".

    Returns:
        Held-out scores, named as by `probe_tower` and `score_text`, the settings and the seconds taken.

    Raises:
        SaccadeError: a number of steps below 1.
    """
    for name, steps in (("tower_steps", tower_steps), ("text_steps", text_steps)):
        if steps < 1:
            raise SaccadeError(f"{name} is {steps}: give at least 1")
    output = Path(output)
    start = time.perf_counter()
    processor = build_tiny_processor()
    model = build_tiny_llava(processor, seed=seed)
    train_tower(model.model.vision_tower, processor, tower_steps, seed, log=_log)
    factor_embeddings(model, processor.tokenizer, seed)
    for cycle, (share, peak) in enumerate(TEXT_CYCLES):
        steps = max(1, round(share * text_steps))
        train_text(model, processor.tokenizer, steps, seed + cycle, learning_rate=peak, log=_log)
    report = {
        "tower": probe_tower(model.model.vision_tower, processor),
        "text": score_text(model, processor.tokenizer),
        "tower_steps": tower_steps,
        "text_steps": text_steps,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
    }
    save_tiny(model, processor, output)
    write_json_atomically(output.with_name(output.name + ".json"), report)
    return report


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m experiments.tiny_checkpoint`; prints the report as JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny_checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to write the model to, replaced if it exists")
    parser.add_argument("--steps", type=int, help="steps of both parts; overrides the two below")
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice if left out")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    tower_steps, text_steps = (options.steps or given for given in (options.tower_steps, options.text_steps))
    try:
        report = pretrain(options.output, tower_steps, text_steps, options.seed)
    except SaccadeError as error:
        parser.error(str(error))
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
