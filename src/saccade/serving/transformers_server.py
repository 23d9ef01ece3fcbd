"""`transformers serve` on a model that prunes, or skips, in place, see `main`."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saccade.companions import find_companion
from saccade.errors import SaccadeError
from saccade.interfaces import check_methods
from saccade.pruning import apply_pruning
from saccade.pruning.prune_inputs import isolator_rows
from saccade.serving.tower import bare_family
from saccade.serving.vllm_plugin import folder_pruning
from saccade.skip_vision import SUMMARY_FILE, apply_skip_vision

logger = logging.getLogger(__name__)


def prune_when_loaded(folder: str | Path, setting: Mapping[str, Any] | bool | None) -> None:
    """Make the server prune in each model that it loads, according to `folder` and `setting`.

    A folder that was trained to skip visual tokens skips them, unless `setting` or its `pruning_config.json` says
    otherwise.

    Raises:
        SaccadeError: on a wrong setting, or if this version of transformers loads models in another way.
    """
    from transformers.cli.serving.model_manager import ModelManager

    config = folder_pruning(Path(folder), setting)
    check_methods(ModelManager, ("_load_model",), "transformers")
    skips = setting is not False and find_companion(Path(folder), SUMMARY_FILE) is not None
    if config is None and not skips:
        return
    if config is not None and skips:
        skips = False
        logger.warning(
            "saccade: %s was trained to skip visual tokens too; this server prunes, it does not skip", folder
        )
    if config is not None:
        # Before the weights are read, which takes long.
        family = bare_family(folder)
        family.check_gives(config.needs)
        isolator_rows(family, config.isolator)
    load = ModelManager._load_model

    def load_and_patch(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(self, *args, **kwargs)
        if skips:
            apply_skip_vision(model.eval(), folder)
        else:
            apply_pruning(model, config)
        return model

    ModelManager._load_model = load_and_patch


def main(argv: list[str]) -> None:
    """Serve until the server ends.

    Args:
        argv: the folder; as JSON, pruning options that override the folder's, false for all tokens, or null for the
            folder's own; and the arguments of `transformers serve`.
    """
    from transformers.cli.transformers import main as transformers

    folder, setting, *flags = argv
    prune_when_loaded(folder, json.loads(setting))
    sys.argv = ["transformers", "serve", folder, *flags]
    transformers()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SaccadeError as error:
        sys.exit(f"saccade: {error}")
