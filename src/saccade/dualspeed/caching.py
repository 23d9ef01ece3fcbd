"""The trainer's option `feature_cache`: the frozen tower's features on disk, and how often they were found there."""

from contextlib import ExitStack

import torch

from saccade.dualspeed.loading import LoadingTrainer
from saccade.errors import SaccadeError
from saccade.families.cache import FeatureCache


class CachingTrainer(LoadingTrainer):
    """[`LoadingTrainer`] with the options `feature_cache` and `feature_cache_gib`, in training and evaluation."""

    feature_cache: FeatureCache | None = None
    _rows_before: tuple[int, int] = (0, 0)

    def open_feature_cache(self) -> None:
        """Open the cache that the options name, once it is known what of the model trains.

        Raises:
            SaccadeError: if the run's tower cannot be served, or the folder not be written.
        """
        args = self.args
        if args.feature_cache is None:
            return
        sharded = self.is_fsdp_enabled
        if self.is_deepspeed_enabled:
            sharded = self.accelerator.state.deepspeed_plugin.zero_stage == 3
        if sharded:
            raise SaccadeError(
                f"feature_cache={args.feature_cache!r}: FSDP and ZeRO-3 gather the vision tower's weights from all "
                "ranks, of which some would wait for others that read from disk; use DDP or ZeRO-2, or leave "
                "feature_cache out"
            )
        self.feature_cache = FeatureCache(self.family, args.feature_cache, args.feature_cache_gib * 2**30)

    def compute_loss_context_manager(self) -> ExitStack:
        stack = super().compute_loss_context_manager()
        if self.feature_cache is not None:
            stack.enter_context(self.feature_cache.serving())
        return stack

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # `loss`, `eval_loss`, `eval_NAME_loss` of several sets; `train_loss` is of a whole run, at its end.
        names = (name for name in logs if name == "loss" or (name.endswith("_loss") and name != "train_loss"))
        name = next(names, None)
        if self.feature_cache is not None and name is not None:
            cache = self.feature_cache
            now = (cache.read_rows, cache.encoded_rows)
            window = torch.tensor([count - before for count, before in zip(now, self._rows_before, strict=True)])
            self._rows_before = now
            read, encoded = self.sum_over_ranks(window).tolist()
            if read + encoded:
                logs[f"{name.removesuffix('loss')}feature_cache_hits"] = round(read / (read + encoded), 6)
        super().log(logs, start_time)
