"""The model card of an exported model: how it was trained and what was measured, nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import TrainingArguments

from saccade.dualspeed.folder import LOG_FILE, RUN_FILE, read_run_file
from saccade.errors import counted
from saccade.reducers import PRUNING_FILE
from saccade.reducers.config import pruned_how
from saccade.report.tables import markdown_table
from saccade.skip_vision import SUMMARY_FILE

MEASURED = {
    "loss": "training loss, last log",
    "loss_fast": "cross-entropy of fast steps, last log",
    "loss_slow": "cross-entropy of slow steps, last log",
    "kl": "KL(fast || slow), last log",
    "steps_fast": "fast steps",
    "steps_slow": "slow steps",
    "length_full": "tokens per sample, before pruning",
    "length_in": "tokens per sample, trained on",
    "tokens_per_second": "tokens per second, counted before pruning, last log",
    "speedup_tokens": "speed-up predicted from token counts",
    "speedup": "speed-up of the steps, running estimate",
    "train_runtime": "training time, seconds",
    "eval_loss": "evaluation loss, last",
}
IDENTITY = {"adapters", "data", "model", "processor"}
# Options about output and logging, which do not affect the model.
HOUSEKEEPING = {"overwrite", "output_dir", "resume", "report_to", "disable_tqdm"}
HOUSEKEEPING |= {"logging_steps", "save_steps", "save_total_limit"}
SECRET = {"hub_token", "model_init_kwargs"}
"""Recipes take no tokens today. Logs of earlier versions may hold some."""


def model_card(
    name: str,
    source: Path,
    facts: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """The card's Markdown, with the front matter that the hub reads.

    Args:
        source: folder of the run, whose files are used if present: `dualspeed.json`, and the log of the same run.
        facts: `parameters`, `dtype`, `architecture`, `base_model`, `own_classes`.
        evaluation: what `saccade eval` measured on these weights.
    """
    log = _read(source / LOG_FILE)
    history = log.get("log_history") or _read(source / "trainer_state.json").get("log_history") or []
    run = read_run_file(source) or {}
    if log.get("run_id") != run.get("run_id") and None not in (log.get("run_id"), run.get("run_id")):
        log, history = {}, []
    recipe = log["recipe"] if isinstance(log.get("recipe"), dict) else {}
    history = history if isinstance(history, list) else []
    base = facts["base_model"] or recipe.get("model")
    local = isinstance(base, str) and (log.get("local_model") is True or _looks_local(base))
    prunes, skips = ((source / name).is_file() for name in (PRUNING_FILE, SUMMARY_FILE))
    parts = [
        _front_matter(None if local else base, prunes, skips),
        f"# {name}\n",
        _first_words(facts, Path(base).name if local else base, run, source),
        _usage(facts["architecture"], facts["own_classes"], prunes, skips),
        _settings(run.get("config", {}), recipe, _read(source / "adapter_config.json")),
        _training(history, run, log.get("environment", {}), log.get("finished")),
        _evaluation(evaluation or {}),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(base: str | None, prunes: bool, skips: bool) -> str:
    # The hub links to this name, so that a local folder's would be a dead link, or one to somebody else's model.
    named = base if base and base != "tiny" else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["saccade", *["dualspeed", "visual-token-pruning"] * prunes, *["skip-vision"] * skips],
        base_model=named,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _looks_local(base: str) -> bool:
    """Whether this is no hub id. A log of today says it, since a relative path may lead nowhere from here."""
    return Path(base).exists() or base.startswith((".", "/", "~")) or base.count("/") > 1


def _first_words(facts: Mapping[str, Any], base: str | None, run: Mapping[str, Any], source: Path) -> str:
    words = f"{facts['architecture']}, {facts['parameters']:,} parameters, {facts['dtype']}"
    words += f", trained from `{base}`" if base else ""
    after = run.get("weights_step", run.get("global_step"))
    step = "" if after is None else f" It is the model after step {after}."
    settings = f", settings in `{RUN_FILE}`" if (source / RUN_FILE).is_file() else ""
    return f"{words}. Exported by Saccade from `{source.name}`{settings}.{step}\n"


def _usage(architecture: str, own_classes: Sequence[str], prunes: bool, skips: bool) -> str:
    as_trained = ""
    if prunes:
        as_trained += (
            "\nPruned inference, as the model was trained:\n\n```python\n"
            "from saccade import prune_inputs\n\n"
            "pruned = prune_inputs(model, inputs, folder)\n```\n"
        )
    if skips:
        as_trained += (
            "\nSkip-Vision, as the model was trained; without this call it runs every token through every layer:\n\n"
            "```python\nfrom saccade import apply_skip_vision\n\n"
            "apply_skip_vision(model, folder)\n```\n"
        )
    needs, first = "Saccade is not needed", ""
    if own_classes:
        needs = f"Saccade has the code of {' and '.join(own_classes)}"
        first = "import saccade.families  # before the folder is loaded\n"
        architecture = "AutoModelForImageTextToText"
    return (
        f"## Use\n\nA plain transformers checkpoint; {needs}.\n\n```python\n{first}"
        f"from transformers import {', '.join(sorted(('AutoProcessor', architecture)))}\n\n"
        'folder = "."  # where this file is\n'
        f"model = {architecture}.from_pretrained(folder)\n"
        f"processor = AutoProcessor.from_pretrained(folder)\n```\n{as_trained}"
    )


def _settings(config: Mapping[str, Any], recipe: Mapping[str, Any], adapters: Mapping[str, Any]) -> str:
    """A table of settings: first those that a resumed run must share, if they are DualSpeed's own or differ from TRL's
    defaults, then the rest of the recipe as written."""
    options = TrainingArguments  # of which some have other defaults, where TRL is not installed
    if find_spec("trl") is not None:
        from trl import SFTConfig as options
    stock = {entry.name: getattr(entry.default, "value", entry.default) for entry in fields(options)}
    config = {
        name: value
        for name, value in config.items()
        if name not in IDENTITY and (name not in stock or (stock[name] is not MISSING and value != stock[name]))
    }
    entries = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    lora = {name: adapters[entry] for name, entry in entries.items() if entry in adapters}
    values = {**recipe, **config, **lora, "lora": bool(adapters)}
    order = [*config, "lora", *lora, *recipe]
    names = [
        name
        for name in dict.fromkeys(order)
        if values[name] not in (None, {}, []) and name not in HOUSEKEEPING | SECRET
    ]
    rows = [[f"`{name}`", _value(values[name])] for name in names]
    return f"## Settings\n\n{markdown_table(['option', 'value'], rows)}" if rows else ""


def _training(
    history: list[Mapping[str, Any]], run: Mapping[str, Any], environment: Mapping[str, Any], date: str | None
) -> str:
    last: dict[str, Any] = {}
    for entry in history:
        last.update(entry)
    rows = [[text, _value(last[name])] for name, text in MEASURED.items() if isinstance(last.get(name), (int, float))]
    tokens = run.get("tokens", {})
    rows += [[f"tokens, {name}", f"{tokens[name]:,.0f}"] for name in ("full", "trained", "teacher") if name in tokens]
    if not rows:
        return ""
    return f"## Measured in training\n\n{markdown_table(['figure', 'value'], rows)}{_where(environment, date)}"


def _evaluation(result: Mapping[str, Any]) -> str:
    names = ("inference", "accuracy", "samples", "mean_prompt_length")
    results = [entry for entry in result.get("results", []) if set(names) <= entry.keys()]
    rows = [
        [
            entry["inference"],
            pruned_how(entry) or "",
            f"{100 * entry['accuracy']:.1f} %",
            entry["samples"],
            f"{entry['mean_prompt_length']:.0f}",
        ]
        for entry in results
    ]
    if not rows:
        return ""
    table = markdown_table(["inference", "pruned by", "accuracy", "samples", "tokens per prompt"], rows)
    where = f"the {result.get('split', 'test')} split of the digit scenes"
    if "dataset" in result:
        of = f"the {result['split']} split of " if "split" in result else "rows of "
        where = f"{of}`{result['dataset']}`, by exact match"
    title = f"## Evaluation\n\n`saccade eval` on {where}.\n\n"
    return f"{title}{table}{_where(result.get('environment', {}))}"


def _where(environment: Mapping[str, Any], date: str | None = None) -> str:
    if not environment:
        return ""
    gpus = ", ".join(gpu["name"] for gpu in environment.get("gpus", []))
    hardware = gpus or f"{environment.get('cpu')}, {counted(environment.get('threads'), 'thread')}"
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    when = f" Date: {date}." if date else ""
    return f"\nHardware: {hardware}. Versions: {versions}.{when}\n"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the run, or an empty mapping if it is missing or damaged: a card is not worth failing for."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
