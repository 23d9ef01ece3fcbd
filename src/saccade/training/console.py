"""What a person who started a run reads: what it will do, one line per log, and how it went."""

import sys
import time
from collections.abc import Mapping

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from saccade.dualspeed import DualSpeedTrainer
from saccade.dualspeed.modes import ModeConfig
from saccade.errors import counted
from saccade.report.lines import room, wrapped
from saccade.skip_vision.config import amount_of

REST = ("runtime", "samples_per_second", "steps_per_second")


def _say(text: str) -> None:
    tqdm.write(text)  # beside a bar, if there is one
    sys.stdout.flush()


class Bar(ProgressCallback):
    """The stock bar of progress, without the logs, which `Console` shows in one line each."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class Console(TrainerCallback):
    """Takes the place of the stock callbacks that print each log as a mapping."""

    def __init__(self, trainer: DualSpeedTrainer, model: str, data: str, visual_tokens: int) -> None:
        self.trainer = trainer
        self.model = model
        self.data = data
        self.visual_tokens = visual_tokens

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            lines = opening(self.trainer, self.model, self.data, self.visual_tokens)
            _say("\n".join(wrapped(line, 8) for line in lines))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            done, seconds = state.global_step - self._first_step, time.perf_counter() - self._began
            left = seconds / done * (state.max_steps - state.global_step) if done else 0
            to_go = f", {duration(left)} to go" if left else ""
            width = len(str(state.max_steps))
            steps, times = f"{state.global_step:>{width}}/{state.max_steps}", f"{duration(seconds)}{to_go}"
            lines = [f"{steps}  {log_line(logs, self.trainer.meter.modes, short)}  {times}" for short in (False, True)]
            columns = room()
            _say(wrapped(lines[columns is not None and len(lines[0]) > columns], len(steps) + 2))
        elif "train_runtime" in logs:
            rate = logs.get("train_samples_per_second")
            rows = "" if rate is None else f", {rate:.3g} rows per second"
            loss = f", mean loss {logs['train_loss']:.4g}" if "train_loss" in logs else ""
            _say(f"trained for {duration(logs['train_runtime'])}{rows}{loss}")
        else:
            told = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
            words = [f"{name} {value:.4g}" for name, value in told.items() if name not in REST]
            if words:
                _say(f"evaluated: {', '.join(words)}")


def opening(trainer: DualSpeedTrainer, model: str, data: str, visual_tokens: int) -> list[str]:
    """What a run will do, in lines, see `Console`."""
    args, state = trainer.args, trainer.state
    # Under ZeRO-3 a rank holds parts, and the number stands beside them.
    sizes = [(getattr(one, "ds_numel", one.numel()), one.requires_grad) for one in trainer.model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    rows = counted(len(trainer.train_dataset), "row") if has_length(trainer.train_dataset) else "a stream of rows"
    lines = [f"model   {model}: {_size(total)} parameters, {_size(trained)} of them trained"]
    images = counted(visual_tokens, "visual token") if visual_tokens else "no image"
    lines.append(f"data    {data}: {rows}, {images} in the first")
    counts = trainer.schedule.count(state.max_steps)
    for number, mode in enumerate(trainer.modes):
        taught = "" if mode.teacher is None else f", taught by {mode.teacher}"
        steps, what = counted(counts[mode.name], "step"), _what(mode, visual_tokens)
        lines.append(f"{'' if number else 'modes':<7} {mode.name}: {steps}, {what}{taught}")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    devices = f"one {args.device.type}" if args.world_size == 1 else f"{args.world_size} of {args.device.type}"
    resumed = f", from step {state.global_step:,} on" if state.global_step else ""
    padding = ", without padding" if trainer.packs_rows else ""
    lines.append(f"steps   {state.max_steps:,} of {counted(batch, 'row')}{resumed}, on {devices}{padding}")
    lines.append(f"output  {args.output_dir}{_saves(args)}")
    return lines


def _what(mode: ModeConfig, visual_tokens: int) -> str:
    """What a mode does with the visual tokens."""
    if mode.keeps_all:
        return "all visual tokens"
    if mode.action == "skip":
        options = mode.skip_vision
        if options.retained is None:
            kept = "the visual tokens"
        elif isinstance(options.retained, int):
            kept = f"{counted(options.retained, 'token')} of each crop"
        else:
            number = f" ({amount_of(options.retained, visual_tokens):,} of {visual_tokens:,})" if visual_tokens else ""
            kept = f"{100 * options.retained:.3g} % of the visual tokens{number}"
        return f"{kept} by {options.split}, the others skip the feed-forward layers"
    pruning = mode.pruning
    if pruning.keep_tokens is not None:
        kept = f"{counted(pruning.keep_tokens, 'token')} of each {pruning.budget}"
    else:
        number = f" ({pruning.count(visual_tokens):,} of {visual_tokens:,})" if visual_tokens else ""
        kept = f"{100 * (1 - pruning.prune_ratio):.3g} % of the visual tokens{number}"
        if mode.prune_ratio_start is not None:
            start = f"{100 * (1 - mode.prune_ratio_start):.3g}"
            kept = f"from {start} to {kept}" if mode.ratio_schedule == "linear" else f"between {start} and {kept}"
    return f"{kept} by {pruning.reducer}{', with the isolator' if mode.isolator else ''}"


def _saves(args: TrainingArguments) -> str:
    if args.save_strategy == "steps":
        return f", a checkpoint every {'step' if args.save_steps == 1 else f'{args.save_steps:g} steps'}"
    return ", a checkpoint per epoch" if args.save_strategy == "epoch" else ""


def log_line(logs: Mapping[str, float], modes: tuple[str, ...], short: bool = False) -> str:
    """The losses of the modes, the rate and the speed-up of a log, in about seventy characters, or fifty."""
    digits = 2 if short else 3
    by_mode = [f"{logs[f'loss_{mode}']:.{digits}f} {mode}" for mode in modes if f"loss_{mode}" in logs]
    words = [f"loss {', '.join(by_mode) or format(logs['loss'], f'.{digits}f')}"]
    if "kl" in logs and not short:
        words[0] += f", KL {logs['kl']:.3f}"
    if "tokens_per_second" in logs:
        words.append(f"{_size(logs['tokens_per_second'])} tokens/s")
    if "speedup" in logs:
        words.append(f"{logs['speedup']:.2f}x{'' if short else ' as fast'}")
    elif "speedup_tokens" in logs:
        words.append(f"{logs['speedup_tokens']:.2f}x by token counts")
    if logs.get("rows_cut"):
        words.append(f"{logs['rows_cut']:.0f} rows cut to fit")
    return "  ".join(words)


def duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _size(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"
