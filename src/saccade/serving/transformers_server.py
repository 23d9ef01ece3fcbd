"""`transformers serve` on a model that prunes in place, see `main`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saccade.interfaces import check_methods
from saccade.pruning import apply_pruning
from saccade.serving.vllm_plugin import folder_pruning


def prune_when_loaded(folder: str | Path, setting: Mapping[str, Any] | bool | None) -> None:
    """Let the server prune in each model that it loads, as `folder` and `setting` say.

    Raises:
        SaccadeError: on a wrong setting, or a transformers whose server loads models otherwise.
    """
    from transformers.cli.serving.model_manager import ModelManager

    config = folder_pruning(Path(folder), setting)
    check_methods(ModelManager, ("_load_model",), "transformers")
    if config is None:
        return
    load = ModelManager._load_model

    def load_and_prune(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(self, *args, **kwargs)
        apply_pruning(model, config)
        return model

    ModelManager._load_model = load_and_prune


def main(argv: list[str]) -> None:
    """Serve until the server ends.

    Args:
        argv: the folder; JSON of the options of pruning in place of its own, false for all tokens, null for its own;
            and what is handed to `transformers serve`.
    """
    from transformers.cli.transformers import main as transformers

    folder, setting, *flags = argv
    prune_when_loaded(folder, json.loads(setting))
    sys.argv = ["transformers", "serve", folder, *flags]
    transformers()


if __name__ == "__main__":
    main(sys.argv[1:])
