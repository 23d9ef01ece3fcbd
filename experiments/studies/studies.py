"""The paper's studies on the digit scenes, as lists of runs, the most valuable first."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from experiments.arguments import image_reducers
from experiments.studies.methods import ALL_METHODS
from saccade.errors import SaccadeError
from saccade.sweeps import DigitSettings, RunSpec, digit_run
from saccade.sweeps.plan import Plan, make_plan
from saccade.values import check_counts

RATIOS = (0.9, 0.5, 0.7, 0.8, 0.95)
"""Ratios p of the study of reducers, the published setting first."""
CORE = ("divprune", "random", "avgpool")
"""The published reducer, and the two plain ones that every other should beat."""
POSITIONS = ("compact", "original")
CHECKPOINTS = 10
"""Number of checkpoints of stage two, as in the paper's Figure 4."""
CHECKPOINT_SCENES = 300
"""Scenes that a checkpoint is evaluated on. Fewer than for a final model, since a curve has many checkpoints."""

Planner = Callable[[DigitSettings, int], Iterator[RunSpec]]


@dataclass(frozen=True)
class Panel:
    """One picture and one table of a study: a figure of the runs over `x`, with one line per value of `series`.

    Args:
        title: text above the picture.
        where: labels that a run must have to be included.
        x: label along the axis.
        series: labels that distinguish the lines.
        figure: a key of `run_figures`, a fraction.
        y: name of the figure on the axis.
        drawn: whether it is part of the picture; its table is always written.
    """

    title: str
    x: str
    series: tuple[str, ...] = ()
    where: tuple[tuple[str, Any], ...] = ()
    figure: str = "accuracy_full"
    y: str = "accuracy on all tokens (%)"
    drawn: bool = True


@dataclass(frozen=True)
class Study:
    """A study: what varies, what the paper reports, and how it is shown.

    Args:
        title: heading.
        varies: one or two sentences on what varies and what is fixed.
        paper: what the paper reports, with the table's name; Markdown.
        planner: makes the runs, in order, from settings and the number of seeds.
        panels: the pictures.
        pivot: whether each panel is also written as a table, series by `x`, before the table of all figures.
        detail: labels that a run must have to be in the table of all figures.
        ways: for a picture of accuracy over training time, the methods, and which inferences of each are drawn.
        over_time: whether the picture and the tables show checkpoints over the training time of stage two.
    """

    title: str
    varies: str
    paper: str
    planner: Planner
    panels: tuple[Panel, ...]
    pivot: bool = False
    detail: tuple[tuple[str, Any], ...] = ()
    ways: tuple[tuple[str, tuple[str, ...]], ...] = ()
    over_time: bool = False

    def plan(self, settings: DigitSettings, seeds: int) -> list[RunSpec]:
        """The runs in the order of execution, so that an interrupted study contains complete comparisons.

        Raises:
            SaccadeError: if the number of seeds is below 1.
        """
        check_counts(seeds=seeds)
        return list(self.planner(settings, seeds))


def study(name: str) -> Study:
    """The study of that name.

    Raises:
        SaccadeError: if there is none.
    """
    if name not in STUDIES:
        raise SaccadeError(f"study={name!r} is unknown: use one of {', '.join(STUDIES)}")
    return STUDIES[name]


def plan_study(name: str, settings: DigitSettings, seeds: int) -> Plan:
    """The plan of a study.

    Raises:
        SaccadeError: on an unknown study, a number of seeds below 1, or more checkpoints than steps.
    """
    found = study(name)
    if found.over_time and settings.sft_steps < CHECKPOINTS:
        raise SaccadeError(
            f"steps={settings.sft_steps}: {name} saves {CHECKPOINTS} checkpoints, give at least as many"
        )
    about = {"study": name, "settings": asdict(settings)}
    command = ("python", "-m", "experiments.studies")
    return make_plan(f"{name}: {found.title}", found.plan(settings, seeds), command, about)


def _all_tokens(settings: DigitSettings, seed: int, labels: dict[str, Any] | None = None) -> RunSpec:
    labels = {"method": "all_tokens"} if labels is None else labels
    return digit_run(f"all_tokens-seed{seed}", labels, settings, "all_tokens", seed)


def _reducers(settings: DigitSettings, seeds: int) -> Iterator[RunSpec]:
    """Every reducer at p = 0.9, seed by seed, then other ratios and positions of the core, then everything else."""
    names = image_reducers()
    # A fixed order with the core first, so that a new reducer does not change the place of another.
    names.sort(key=lambda name: (CORE.index(name) if name in CORE else len(CORE), name))
    core = [name for name in names if name in CORE]
    done: set[str] = set()

    def plugins(chosen: list[str], ratios: tuple[float, ...], positions: str, only: range) -> Iterator[RunSpec]:
        for seed in only:
            for ratio in ratios:
                for name in chosen:
                    spec = _plugin(settings, name, ratio, positions, seed)
                    if spec.name not in done:
                        done.add(spec.name)
                        yield spec

    for seed in range(seeds):
        yield from plugins(names, RATIOS[:1], "compact", range(seed, seed + 1))
        yield _all_tokens(settings, seed, {"part": "baseline"})
        for name in names:
            yield _inference_only(settings, name, seed)
    yield from plugins(core, RATIOS[1:], "compact", range(seeds))
    yield from plugins(core, RATIOS[:1], "original", range(seeds))
    yield from plugins(names, RATIOS[1:], "compact", range(seeds))
    yield from plugins(names, RATIOS[:1], "original", range(seeds))


def _plugin(settings: DigitSettings, name: str, ratio: float, positions: str, seed: int) -> RunSpec:
    options = {"reducer": name, "prune_ratio": ratio, "positions": positions}
    run = f"plugin-{name}-p{ratio}-{positions}-seed{seed}"
    return digit_run(run, {"part": "plugin", **options}, settings, "dualspeed", seed, options)


def _inference_only(settings: DigitSettings, name: str, seed: int) -> RunSpec:
    """A model trained on all tokens, run with one reducer at every ratio; only one training per seed is needed."""
    ways = tuple(
        {"name": "pruned", "reducer": name, "prune_ratio": ratio, "positions": positions}
        for positions in POSITIONS
        for ratio in sorted(RATIOS)
    )
    labels = {"part": "inference", "reducer": name}
    return digit_run(f"inference-{name}-seed{seed}", labels, settings, "all_tokens", seed, inferences=ways)


def _prune_ratio(settings: DigitSettings, seeds: int) -> Iterator[RunSpec]:
    for seed in range(seeds):
        yield _all_tokens(settings, seed)
        for ratio in (0.9, 0.5, 0.6, 0.7, 0.8, 0.95):
            for method in ("dualspeed", "prune_only"):
                labels = {"method": method, "prune_ratio": ratio}
                run = f"{method}-p{ratio}-seed{seed}"
                yield digit_run(run, labels, settings, method, seed, {"prune_ratio": ratio})


def _varied(field: str, values: tuple[Any, ...]) -> Planner:
    """DualSpeed with one option varied, and all-token training."""

    def plan(settings: DigitSettings, seeds: int) -> Iterator[RunSpec]:
        for seed in range(seeds):
            yield _all_tokens(settings, seed)
            for value in values:
                labels, run = {"method": "dualspeed", field: value}, f"dualspeed-{field}{value}-seed{seed}"
                yield digit_run(run, labels, settings, "dualspeed", seed, {field: value})

    return plan


def _stage(settings: DigitSettings, seeds: int) -> Iterator[RunSpec]:
    pruned = {"none": (), "pretrain": ("pretrain",), "sft": ("sft",), "both": ("pretrain", "sft")}
    for seed in range(seeds):
        for name, stages in pruned.items():
            pretrain, sft = ("prune_only" if stage in stages else "all_tokens" for stage in ("pretrain", "sft"))
            labels = {"pruned_stages": name}
            yield digit_run(f"pruned_{name}-seed{seed}", labels, settings, sft, seed, pretrain_method=pretrain)


def _methods(*methods: str) -> Planner:
    def plan(settings: DigitSettings, seeds: int) -> Iterator[RunSpec]:
        for seed in range(seeds):
            for method in methods:
                yield digit_run(f"{method}-seed{seed}", {"method": method}, settings, ALL_METHODS[method], seed)

    return plan


def _trade_off(settings: DigitSettings, seeds: int) -> Iterator[RunSpec]:
    """Skip-Vision skips in stage two only, as published; stage one is that of all tokens."""
    methods = {"all_tokens": None, "skip_100_156": "all_tokens", "dualspeed": None, "dualspeed_skip": None}
    methods |= {"prune_only": None, "skip_256_320": "all_tokens", "skip_64_156": "all_tokens"}
    for seed in range(seeds):
        for method, pretrain in methods.items():
            yield digit_run(
                f"{method}-seed{seed}",
                {"method": method},
                settings,
                ALL_METHODS[method],
                seed,
                pretrain_method=pretrain,
            )


def _over_time(settings: DigitSettings, seeds: int) -> Iterator[RunSpec]:
    ways = ({"name": "full"},)
    extra = {
        "checkpoints": CHECKPOINTS,
        "scenes": min(CHECKPOINT_SCENES, settings.test_scenes),
        # Evaluated checkpoints are removed, so a stage can only be used for one evaluation of them.
        "split": settings.split,
    }
    for seed in range(seeds):
        for method in ("all_tokens", "dualspeed", "prune_only"):
            labels = {"method": method}
            yield digit_run(f"{method}-seed{seed}", labels, settings, method, seed, inferences=ways, extra=extra)


STUDIES: dict[str, Study] = {
    "reducers": Study(
        "Which reducer, in inference only and as DualSpeed's plug-in",
        "*Inference only*: one model per seed, trained on all tokens, answers from the tokens that each reducer "
        "keeps. *Plug-in*: DualSpeed trains with the reducer, and answers from all tokens. At equal p every reducer "
        "keeps the same number of tokens, so a step costs the same except for the choice itself; a method has to beat "
        "`random` and `avgpool`.",
        "Table 1 and Figure 5(a), LLaVA-1.5-7B, p = 0.9: in inference FasterVLM ≪ DivPrune ≤ CDPruner; as the "
        "plug-in FasterVLM ≪ DivPrune ≈ CDPruner. Its accuracies are flat up to p = 0.9 and drop sharply above. "
        "Other reducers, `random`, and a smaller image are not reported; nor are original positions.",
        _reducers,
        (
            Panel(
                "In inference only, on a model trained on all tokens", "prune_ratio", ("reducer",),
                (("part", "inference"), ("positions", "compact")), "accuracy_pruned", "accuracy on kept tokens (%)",
            ),
            Panel(
                "As the plug-in of DualSpeed", "prune_ratio", ("reducer",),
                (("part", "plugin"), ("positions", "compact")),
            ),
            Panel(
                "In inference only, original positions", "prune_ratio", ("reducer",),
                (("part", "inference"), ("positions", "original")), "accuracy_pruned", "accuracy on kept tokens (%)",
                drawn=False,
            ),
            Panel(
                "As the plug-in, original positions", "prune_ratio", ("reducer",),
                (("part", "plugin"), ("positions", "original")), drawn=False,
            ),
        ),
        pivot=True,
        detail=(("part", "plugin"), ("prune_ratio", 0.9)),
    ),
    "prune_ratio": Study(
        "How much to prune",
        "p, for DualSpeed and for pruning only; inference with all tokens.",
        "Figure 5(a), LLaVA-1.5-7B, p from 50 to 95 %: DualSpeed is flat up to 90 % and drops sharply above.",
        _prune_ratio,
        (Panel("Accuracy over the share of tokens dropped", "prune_ratio", ("method",)),),
        pivot=True,
    ),
    "slow_probability": Study(
        "How many slow steps",
        "r for DualSpeed at p = 0.9; inference with all tokens. r = 0 has the isolator and no slow steps.",
        "Figure 5(b), LLaVA-1.5-7B, r from 50 % to 0: flat from 20 % on, lower below 10 %; 99.61 % of the all-token "
        "score at the default r = 10 %.",
        _varied("slow_probability", (0.1, 0.0, 0.5, 0.2, 0.05, 0.4, 0.3)),
        (Panel("Accuracy over the share of slow steps", "slow_probability", ("method",)),),
    ),
    "isolator_length": Study(
        "How long an isolator",
        "l for DualSpeed at p = 0.9, r = 0.1; inference with all tokens.",
        "Figure 6, LLaVA-1.5-7B: an isolator of one or more rows helps, and more than four add nothing.",
        _varied("isolator_length", (4, 0, 1, 2, 8, 16)),
        (Panel("Accuracy over rows of the isolator", "isolator_length", ("method",)),),
    ),
    "stage": Study(
        "Pruning in which stage",
        "Pruning only, p = 0.9, in stage one (pretraining), in stage two (fine-tuning), in both, and in neither; "
        "inference with all tokens.",
        "Table 4, LLaVA-1.5-7B, share of the all-token score: pretraining only 100.12 %, fine-tuning only 95.83 %, "
        "both 95.89 %.",
        _stage,
        (Panel("Accuracy by the stages that prune", "pruned_stages"),),
    ),
    "parts": Study(
        "Part by part",
        "From pruning only to DualSpeed, one part of the method at a time; inference with all tokens.",
        "Table 3, LLaVA-1.5-7B, share of the all-token score: pruning only 95.89 %, with slow steps 98.88 %, with "
        "isolator and self-distillation (DualSpeed) 99.61 %.",
        _methods("all_tokens", "prune_only", "slow_steps", "slow_steps_isolator", "dualspeed"),
        (Panel("Accuracy by part", "method"),),
    ),
    "inference": Study(
        "Normal and pruned inference",
        "The same models, run with all tokens, with kept tokens, and with kept tokens preceded by the trained "
        "isolator.",
        "Table 2, LLaVA-1.5-7B, share of the all-token score: pruning only 95.89 % on all tokens and 97.85 % pruned; "
        "DualSpeed 99.61 % on all tokens, 98.12 % pruned with the isolator and 98.10 % without.",
        _methods("all_tokens", "prune_only", "dualspeed"),
        (
            Panel("On all tokens", "method"),
            Panel("On kept tokens", "method", figure="accuracy_pruned", y="accuracy on kept tokens (%)"),
        ),
    ),
    "speeds": Study(
        "More than two speeds",
        "DualSpeed, and runs with three and four speeds, all with a tenth of slow steps at p = 0.9: a third of the "
        "steps drops only two thirds of the tokens, and with four speeds tokens skip in some steps. Inference with "
        "all tokens.",
        "Named as future work; nothing is reported.",
        _methods("all_tokens", "dualspeed", "three_speeds", "four_speeds"),
        (Panel("Accuracy by speeds", "method"),),
    ),
    "trade_off": Study(
        "Both methods, alone and together: accuracy, training time and inference cost",
        "All tokens, pruning only, DualSpeed, Skip-Vision at three budgets, and DualSpeed whose fast steps skip "
        "tokens instead of dropping them, at p = 0.9. Skip-Vision trains and answers with skipped tokens; the others "
        "answer from all tokens, from kept ones, and, if trained to skip, with skipped ones.",
        "Skip-Vision (arXiv 2503.21817), Figure 3 and its tables, LLaVA with LLaMA3-8B: 22 to 36 % less training time "
        "and up to 75 % fewer FLOPs in inference, with the accuracy of the baseline to within about a point. "
        "DualSpeed: 2.1 times as fast at 99.61 %. Neither paper combines them.",
        _trade_off,
        (),
        ways=(
            ("all_tokens", ("full",)),
            ("prune_only", ("full", "pruned")),
            ("dualspeed", ("full", "pruned")),
            ("dualspeed_skip", ("full", "skip")),
            ("skip_256_320", ("skip",)),
            ("skip_100_156", ("skip",)),
            ("skip_64_156", ("skip",)),
        ),
    ),
    "over_time": Study(
        "Accuracy over training time",
        "All tokens, DualSpeed and pruning only at p = 0.9, evaluated with all tokens at ten checkpoints of stage "
        "two.",
        "Figure 4: accuracy over the wall-clock training time of stage two; DualSpeed reaches any accuracy earlier "
        "than all-token training.",
        _over_time,
        (),
        over_time=True,
    ),
}  # fmt: skip
"""The studies by name. Published figures are those of arXiv 2602.03815; its per-benchmark cells are not quoted."""
