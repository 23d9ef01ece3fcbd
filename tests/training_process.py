"""A training run as a separate process that can be told to kill itself: `python training_process.py JSON`.

Keys: `output_dir`, `resume` (as for `train`), `kill_at_step` (kill -9 after that step), `signal_at_step` (SIGTERM),
`kill_rank` (the rank that these happen to), `kill_in_checkpoint` (kill -9 in the middle of writing the checkpoint of
that step), `kill_in_replacing` (kill -9 once a checkpoint is moved aside for the one that replaces it),
`text_only_rank` (a rank that sees no image), `scenes` (options of the dataset), `stream` (records to
stream instead), `stream_parts` (in how many parts it can be read; one per rank by default), `lora`, `half` (weights in
bfloat16), and options of the config. Each step's mode and loss is appended to `steps.jsonl` in `output_dir` as it
happens. Started by a launcher whose environment asks for FSDP, it lets accelerate shard on the CPU.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))

from helpers import make_trainer

from saccade.data import digit_scenes
from saccade.dualspeed.folder import PARTIAL_DIR
from saccade.launch import check_engine
from saccade.tiny import build_tiny_llava, build_tiny_processor
from saccade.training import ModelOptions, load_rows

torch.set_num_threads(1)


class Recorder(TrainerCallback):
    """Writes each logged step at once, and kills the process where it was told to."""

    def __init__(self, trainer, kill_at_step, signal_at_step):
        self.trainer, self.kill_at_step, self.signal_at_step = trainer, kill_at_step, signal_at_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and args.process_index == 0:
            entry = {name: value for name, value in logs.items() if "second" not in name and "speedup" not in name}
            entry |= {"step": state.global_step, "mode": self.trainer.mode_of(state.global_step - 1)}
            with (Path(args.output_dir) / "steps.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self.signal_at_step:
            os.kill(os.getpid(), signal.SIGTERM)


def allow_sharding_on_the_cpu() -> None:
    """Accelerate takes FSDP for GPUs only, though PyTorch shards over gloo too."""
    stock = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def main(options: dict) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_sharding_on_the_cpu()
    resume = options.pop("resume", None)
    kill_at_step, kill_in_checkpoint = options.pop("kill_at_step", None), options.pop("kill_in_checkpoint", None)
    kill_in_replacing = options.pop("kill_in_replacing", False)
    lora = options.pop("lora", False)
    rows = {"num_rows": 64, "seed": 5, **options.pop("scenes", {})}
    # On one rank only: what happens when its batches hold no image.
    text_only_rank = options.pop("text_only_rank", None)
    kill_rank, signal_at_step = options.pop("kill_rank", 0), options.pop("signal_at_step", None)
    processor = build_tiny_processor()
    model = build_tiny_llava(processor, seed=0)
    if options.pop("half", False):
        model = model.bfloat16()
    config = LoraConfig(r=4, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"])
    output = Path(options.pop("output_dir"))
    output.mkdir(parents=True, exist_ok=True)
    scenes, stream = digit_scenes("sft", "train", **rows), options.pop("stream", None)
    if stream is not None:
        streaming = ModelOptions(dataset=stream, dataset_streaming=True, dataset_shuffle_buffer=0)
        scenes = load_rows(streaming, shards=options.pop("stream_parts", int(os.environ.get("WORLD_SIZE", "1"))))
    trainer = make_trainer(model, processor, output, scenes, config if lora else None, **options)
    if text_only_rank is not None and trainer.args.process_index == text_only_rank:
        texts = digit_scenes("sft", "train", 64, kinds=["text_only"])
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: collate([texts[index] for index in range(len(rows))])
    check_engine(trainer.accelerator)
    here = trainer.args.process_index == kill_rank
    trainer.add_callback(Recorder(trainer, kill_at_step if here else None, signal_at_step if here else None))
    if kill_in_replacing:
        rename = Path.rename

        def killing(path, target):
            rename(path, target)
            if Path(target).parent.name == PARTIAL_DIR:
                os.kill(os.getpid(), signal.SIGKILL)

        Path.rename = killing
    if kill_in_checkpoint is not None:
        write = trainer._save_rng_state

        def killed(folder):
            if trainer.state.global_step == kill_in_checkpoint:
                os.kill(os.getpid(), signal.SIGKILL)
            write(folder)

        trainer._save_rng_state = killed
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output / "final"))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
