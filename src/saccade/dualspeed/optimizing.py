"""What the optimizer of a trainer steps: groups with learning rates of their own, float32 masters."""

import torch
from torch import Tensor, nn
from trl import SFTTrainer

from saccade.dualspeed.checks import as_bad_input
from saccade.dualspeed.config import DualSpeedConfig
from saccade.dualspeed.masters import Float32Masters, wants_masters
from saccade.families import Family
from saccade.interfaces import check_methods
from saccade.pruning import ModeIsolator

REPLACED = (
    "_get_grad_norm",
    "_get_train_sampler",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "compute_loss",
    "compute_loss_context_manager",
    "create_optimizer",
    "evaluation_loop",
    "get_batch_samples",
    "get_eval_dataloader",
    "get_test_dataloader",
    "get_train_dataloader",
    "log",
    "prediction_step",
    "save_model",
    "train",
)
"""Methods of the stock trainer that ours replace: without one of them ours would never be called."""
check_methods(SFTTrainer, REPLACED, "transformers")


class OptimizingTrainer(SFTTrainer):
    """TRL's trainer with the options `projector_learning_rate` and `float32_masters`."""

    args: DualSpeedConfig
    family: Family
    isolator: ModeIsolator | None
    keeps_masters: bool
    masters: Float32Masters | None = None
    """The float32 masters, once training has begun, where the trainer keeps them itself."""
    _dtypes: dict[str, torch.dtype]

    @property
    def engine(self) -> str:
        """What several processes share: "ddp" for one process too, "fsdp" or "deepspeed"."""
        if self.is_fsdp_enabled:
            return "fsdp"
        return "deepspeed" if self.is_deepspeed_enabled else "ddp"

    def choose_masters(self) -> None:
        """Decide who keeps float32 masters, once it is known what trains, and before an engine wraps the model.

        Raises:
            SaccadeError: as `wants_masters` does.
        """
        self.keeps_masters = wants_masters(
            self.args, self.model, self.engine, self.accelerator.mixed_precision != "no"
        )
        self._dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with as_bad_input():
            optimizer = super().create_optimizer(model)
        self._split_groups(optimizer)
        # A second `train` goes on with the optimizer of the first, which accelerate has wrapped by then.
        stepped = getattr(optimizer, "optimizer", optimizer)
        if self.keeps_masters and (self.masters is None or self.masters.optimizer is not stepped):
            self.masters = Float32Masters(self.model, stepped)
        return optimizer

    def _split_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Give projector and isolator groups of their own where they have a learning rate of their own."""
        rate = self.args.projector_learning_rate
        if rate is None:
            return
        projector = {id(parameter) for parameter in self.family.projector.parameters()}
        if self.isolator is not None:
            projector |= {id(parameter) for parameter in self.isolator.parameters()}
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in projector]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in projector]
                optimizer.add_param_group({**group, "params": moved, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            # FSDP shards what trains in float32; its checkpoints keep that in files of their own.
            state_dict = {name: value.to(self._dtypes.get(name, value.dtype)) for name, value in state_dict.items()}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.masters is not None and self.args.should_save:
            self.masters.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.masters is not None and checkpoint is not None:
            self.masters.load(checkpoint)
