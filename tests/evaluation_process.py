"""Evaluations on several ranks, as a separate process: `python evaluation_process.py FOLDER [CASE JSON]...`.

A case: `data` (rows to evaluate on), `stream`, `call` ("evaluate" or "predict"), and options of the config. What each
rank gets of it goes to `RANK.json` in FOLDER, a list with an entry for each case: `loss` or `error`, and `listed`,
the records in its log. A case that leaves a rank waiting writes none.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from helpers import make_trainer

from saccade import SaccadeError
from saccade.tiny import build_tiny_llava, build_tiny_processor
from saccade.training import ModelOptions, load_rows

torch.set_num_threads(1)


def run(case: dict, output: Path, processor) -> dict:
    case = dict(case)
    options = ModelOptions(
        dataset=case.pop("data"), dataset_streaming=case.pop("stream", False), dataset_shuffle_buffer=0
    )
    rows, call = load_rows(options), case.pop("call", "evaluate")
    trainer = make_trainer(
        build_tiny_llava(processor, seed=0), processor, output, **{"prediction_loss_only": True, **case}
    )
    try:
        found = trainer.evaluate(rows) if call == "evaluate" else trainer.predict(rows).metrics
    except SaccadeError as error:
        return {"error": str(error), "listed": sorted(trainer.bad_records.records)}
    finally:
        trainer.accelerator.wait_for_everyone()
    loss = found["eval_loss" if call == "evaluate" else "test_loss"]
    return {"loss": loss, "listed": sorted(trainer.bad_records.records)}


def main(folder: Path, cases: list[dict]) -> None:
    processor = build_tiny_processor()
    found = [run(case, folder / str(number), processor) for number, case in enumerate(cases)]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [json.loads(case) for case in sys.argv[2:]])
