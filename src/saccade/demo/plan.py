"""The runs of the demo: variants and seeds."""

from saccade.sweeps import METHODS, DigitSettings, RunSpec, digit_run

MAIN_METHODS = ("all_tokens", "prune_only", "dualspeed")


def plan_runs(settings: DigitSettings, seeds: int, full: bool) -> list[RunSpec]:
    """The runs of a demo, seed by seed, so that an interrupted one contains complete comparisons.

    Args:
        seeds: number of seeds.
        full: also `slow_steps` and `slow_steps_isolator`, the steps of the paper's Table 3.
    """
    variants = [(method, "compact") for method in METHODS if full or method in MAIN_METHODS]
    variants += [(method, "original") for method in ("prune_only", "dualspeed")]
    return [
        digit_run(
            f"{method}-{positions}-seed{seed}",
            {"method": method, "positions": positions},
            settings,
            method,
            seed,
            {"positions": positions},
        )
        for seed in range(seeds)
        for method, positions in variants
    ]
