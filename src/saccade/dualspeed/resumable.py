"""`ResumableTrainer`: a run that owns its folder, can be stopped at any moment, and goes on as if it had not been."""

import math
import shutil
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback, ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from saccade.dualspeed.callbacks import SigtermCheckpoint
from saccade.dualspeed.checkpoint import (
    STATE_FILE,
    BestOfRun,
    adapter_options,
    check_same_run,
    find_best,
    publish_checkpoint,
    remove_old_checkpoints,
    resolve_resume,
    unpublished,
)
from saccade.dualspeed.folder import PARTIAL_DIR, agreed, check_not_removed, claim, hold, new_id, read_run_file
from saccade.dualspeed.identity import identify_model, identify_processor, identify_rows
from saccade.dualspeed.lenient import LenientTrainer
from saccade.dualspeed.pushes import CheckpointPushes
from saccade.dualspeed.weights import BASE_WEIGHTS, identify_weights
from saccade.errors import SaccadeError
from saccade.files import disk_errors, reading
from saccade.model_files import ADAPTER_FILE


class ResumableTrainer(LenientTrainer):
    """Trainer whose checkpoints are whole or not there, and whose resumed run is the same run."""

    keeps_masters: bool
    _adapters_loaded: bool
    _weights_step: int | None = None
    """The step of the best model, if that is what the model holds."""

    def _attach_run(self) -> None:
        """Begin with what a run remembers, and the callbacks that follow it."""
        self.run_id: str | None = None
        self._resumed_at: int | None = None
        self._resumed_from: str | None = None
        self._identity: dict[str, Any] | None = None
        self._base_weights: dict[str, str] = {}
        self.best, self.pushes, self.sigterm = BestOfRun(), CheckpointPushes(self), SigtermCheckpoint(self)
        for callback in (self.best, self.pushes, self.sigterm):
            self.add_callback(callback)

    @property
    def engine(self) -> str:
        """The distributed engine: "ddp" (also for one process), "fsdp" or "deepspeed"."""
        if self.is_fsdp_enabled:
            return "fsdp"
        return "deepspeed" if self.is_deepspeed_enabled else "ddp"

    def _check_trainable(self) -> None:
        """Refuse what cannot be trained, before the run's folder is touched."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest complete checkpoint of the run that
                `output_dir` belongs to.

        On SIGTERM it saves a checkpoint to resume from, whatever `save_strategy` and `save_only_model` are, and
        returns without another evaluation; `sigterm.stopped` is then true. On Ctrl-C it saves one too, and raises
        `Interrupted`, a `KeyboardInterrupt`.

        Raises:
            SaccadeError: if `output_dir` contains files of another run and `args.overwrite` is not set, or another run
                is writing there; if there is no complete checkpoint, or it was trained with other options, rows or
                another model; if a loss is not finite, or a process that prepares batches dies.
            OSError: if a checkpoint cannot be written, for example on a full disk; the previous one is kept.
        """
        self._check_trainable()
        with ExitStack() as held:
            agreed(self.args, lambda: held.enter_context(hold(self.args)))
            return self._train_in_its_folder(resume_from_checkpoint, **kwargs)

    def _check_not_overwritten(self) -> None:
        """Refuse to remove the folder that the model, its adapters or their base were loaded from."""
        bases = [config.base_model_name_or_path for config in getattr(self.model, "peft_config", {}).values()]
        for path in (self.family.model.name_or_path, *bases):
            check_not_removed(path, self.args.output_dir, "model")
        check_not_removed(self.args.isolator_path, self.args.output_dir, "isolator_path")
        if self._adapters_loaded:
            # PEFT does not say from where.
            out = Path(self.args.output_dir)
            for path in (*out.glob(ADAPTER_FILE), *out.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{ADAPTER_FILE}")):
                raise SaccadeError(
                    f"overwrite=true would remove adapters, which the model may have been loaded from: {path}; name "
                    "another output_dir, or remove them yourself if it was not"
                )

    def _train_in_its_folder(self, resume: str | bool | None, **kwargs: Any):
        args = self.args
        checkpoint = agreed(args, lambda: resolve_resume(resume, args.output_dir))
        found = None if checkpoint is None else agreed(args, lambda: (read_run_file(checkpoint) or {}).get("run_id"))
        self.run_id = agreed(args, lambda: found or new_id())
        self._identity = agreed(args, self._identify)
        self._base_weights = agreed(args, self._identify_base)
        if checkpoint is not None:
            check_same_run(checkpoint, self._resume_state())
        if checkpoint is None and args.overwrite:
            agreed(args, self._check_not_overwritten)
        agreed(args, lambda: claim(args.output_dir, self.run_id, checkpoint, args.overwrite))
        self._resumed_at = self._weights_step = None
        self._resumed_from = None if checkpoint is None else str(checkpoint)
        if checkpoint is None:
            self.best.path = None
            if args.should_save:
                self.bad_records.path.unlink(missing_ok=True)
        else:
            self.bad_records.read()
            state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
            self._resumed_at = state.global_step
            best = find_best(state.best_model_checkpoint, checkpoint.parent, Path(args.output_dir))
            if best is None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
                raise SaccadeError(
                    f"best_model_checkpoint={state.best_model_checkpoint!r} in {checkpoint / STATE_FILE} is not a "
                    f"checkpoint of {checkpoint.parent}: put it there, or set load_best_model_at_end to false"
                )
            self.best.path = best
        try:
            with self.sigterm.training():
                return super().train(resume_from_checkpoint=self._resumed_from, **kwargs)
        except Exception as error:
            # Compared by name, so that `pickle` need not be imported.
            if type(error).__name__ != "UnpicklingError":
                raise
            raise SaccadeError(
                f"resume_from_checkpoint={str(checkpoint)!r} contains something other than tensors and plain values, "
                "which could run code: resume from your own checkpoint"
            ) from error
        finally:
            self.end_workers()

    def _has_not_gone_on(self, folder: Path) -> bool:
        """Whether the model is the one that `folder` holds: a finished run was resumed, and had no step left."""
        if self._resumed_at is None or self.state.global_step != self._resumed_at:
            return False
        try:
            found = read_run_file(folder) or {}
        except SaccadeError:
            return False
        return (found.get("run_id"), found.get("global_step")) == (self.run_id, self._resumed_at)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir, only_model = Path(self.args.output_dir), self.args.save_only_model
        partial = run_dir / PARTIAL_DIR
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(partial)
        # A run that was stopped is to be resumed, for which weights alone do not suffice.
        self.args.save_only_model = only_model and not self.sigterm.stopped
        try:
            with disk_errors(run_dir):
                super()._save_checkpoint(model, trial)
        except BaseException:
            # Removing the partial checkpoint frees the space that the next attempt needs.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            self.args.output_dir, self.args.save_only_model = str(run_dir), only_model
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).is_relative_to(partial):
            self.state.best_model_checkpoint = str(run_dir / Path(best).relative_to(partial))
        if self.args.should_save:
            folder = partial / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            try:
                if best != self.state.best_model_checkpoint:
                    self.state.save_to_json(str(folder / "trainer_state.json"))
                card = partial / "README.md"
                if self.args.push_to_hub and card.is_file():
                    card.replace(run_dir / card.name)
                written = publish_checkpoint(partial, run_dir)
            except BaseException:
                if not unpublished(run_dir):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            if self.args.push_to_hub:
                with disk_errors(run_dir):
                    self._push_from_checkpoint(str(written))
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            remove_old_checkpoints(written, limit, best, self.pushes.reading())
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, **options: Any) -> None:
        """The stock loop, after the evaluation that the run left out when it was stopped."""
        made = self._make_up_evaluation(options["trial"], options["ignore_keys_for_eval"])
        if made and self.control.should_training_stop:
            return
        super()._run_epoch(**options)

    def _make_up_evaluation(self, trial: Any, ignore_keys: list[str] | None = None) -> bool:
        """Make the evaluation that was due after the step that the run is resumed from, if it is not in its log.

        Returns:
            Whether it was made.
        """
        if self._resumed_at != self.state.global_step or not self._owes_evaluation():
            return False
        metrics = self._evaluate(trial, ignore_keys)
        if self._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = self._resumed_from
        return True

    def _owes_evaluation(self) -> bool:
        """Whether an evaluation was due after the current step, and is not in the log."""
        state, due, flow = self.state, TrainerControl(), DefaultFlowCallback()
        flow.on_step_end(self.args, state, due)
        if float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps:
            flow.on_epoch_end(self.args, state, due)
        seen = (entry for entry in state.log_history if entry.get("step") == state.global_step)
        return due.should_evaluate and not any(name.startswith("eval_") for entry in seen for name in entry)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """The stock end of training. A run that was stopped has not come to it: its model and checkpoints stay."""
        best = self.state.best_model_checkpoint
        if self.sigterm.stopped:
            # The stock trainer loads it, and with save_total_limit=1 removes all others.
            self.state.best_model_checkpoint = None
        else:
            # If the run was stopped in its last step, no epoch has been run since.
            self._make_up_evaluation(trial)
            best = self.state.best_model_checkpoint
        output = super()._finalize_training(trial, num_train_samples, start_time)
        self.state.best_model_checkpoint = best
        return output

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        checkpoint = Path(checkpoint_folder)
        # Called by the stock `_save_checkpoint` too, while the checkpoint is in a folder that will be gone by the time
        # that an upload reads it.
        if checkpoint.parent.name != PARTIAL_DIR:
            with self.pushes.of(checkpoint):
                super()._push_from_checkpoint(checkpoint_folder)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        """The epoch to begin with, and how many of its micro-batches a resumed run skips."""
        start = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return start
        if self.state.global_step >= max_steps:
            # The stock loop looks only after a step, and would train one too many.
            return num_train_epochs, 0
        if has_length(self.train_dataset):
            return start
        # The stock loop takes all steps for one epoch of a stream, and counts micro-batches as a share of them.
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE_FILE))
        epoch = max(math.ceil(saved.epoch) - 1, 0)
        steps = 0.0 if self.args.ignore_data_skip else (saved.epoch - epoch) * saved.max_steps
        return epoch, round(steps * self.args.gradient_accumulation_steps)

    def _load_callback_state(self) -> None:
        """Let callbacks go on counting where the checkpoint's did: the evaluations without a better one, for instance.

        With `restore_callback_states_from_checkpoint` the stock trainer replaces the callbacks, and the options that
        they were made with, by those of the checkpoint.
        """
        super()._load_callback_state()
        saved, kinds = self.state.stateful_callbacks, defaultdict(list)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                kinds[type(callback).__name__].append(callback)
        for name, callbacks in kinds.items():
            # Saving fails without an entry, as of a callback that the run did not have before. Of several callbacks of
            # one kind, each save adds the states to a list.
            found = saved.setdefault(name, callbacks[0].state() if len(callbacks) == 1 else [])
            states = found[-len(callbacks) :] if isinstance(found, list) else [found]
            for callback, state in zip(callbacks, states, strict=False):
                held = callback.state().get("attributes", {})
                for attribute, value in state.get("attributes", {}).items():
                    if attribute in held:
                        setattr(callback, attribute, value)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"resume_from_checkpoint={checkpoint!r}: the random state cannot be read"):
            super()._load_rng_state(checkpoint)

    def _resume_state(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one."""
        args, engine = self.args, self.engine
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        # DeepSpeed saves the optimizer as one shard per rank, which another number of ranks cannot read.
        ranks = {"num_processes": args.world_size} if engine == "deepspeed" else {}
        masters = {"float32_masters": self.keeps_masters}
        state = {**args.resume_state(), **masters, "global_batch_size": batch, "engine": engine, **ranks}
        return {**state, "adapters": adapter_options(self.model), **(self._identity or {})}

    def _identify(self) -> dict[str, Any]:
        """What the run is trained on and from."""
        rows = identify_rows(self.train_dataset)
        if rows["rows"] is None:
            # Each worker of each process reads its own part of a stream.
            rows |= {"readers": self.args.world_size * max(1, self.args.dataloader_num_workers)}
        return {
            "data": rows,
            "model": identify_model(self.model, self.family.model.config, self.model is not self.family.model),
            "processor": identify_processor(self.processing_class),
        }

    def _identify_base(self) -> dict[str, str]:
        """The weights that adapters belong to, for the run file: what PEFT writes is only where they were."""
        places = {config.base_model_name_or_path for config in getattr(self.model, "peft_config", {}).values()}
        found = [identify_weights(place) for place in places if place]
        return {BASE_WEIGHTS: found[0]} if len(found) == 1 and found[0] is not None else {}
