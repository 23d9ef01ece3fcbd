"""The papers' benchmarks: lmms-eval's task, and the metric and unit that the papers report."""

from dataclasses import dataclass

from saccade.errors import SaccadeError


@dataclass(frozen=True)
class Benchmark:
    """One column of a paper's table.

    Args:
        name: its name in the papers.
        task: lmms-eval's task.
        metric: the entry in the task's results.
        scale: factor for the entry: the papers report percent, lmms-eval mostly fractions.
        in_average: whether it is part of the suite's average of scores.
    """

    name: str
    task: str
    metric: str
    scale: float = 100.0
    in_average: bool = True


@dataclass(frozen=True)
class Suite:
    """The benchmarks of one paper.

    Args:
        name: as on the command line.
        benchmarks: in the paper's order.
        average: whether the paper reports an average of the scores that are `in_average`.
    """

    name: str
    benchmarks: tuple[Benchmark, ...]
    average: bool = False

    @property
    def tasks(self) -> list[str]:
        """lmms-eval's names of its tasks."""
        return [benchmark.task for benchmark in self.benchmarks]


# "static" extracts letters by rule. The usual task, which asks a judge if it finds none, exists in Chinese only.
_TEXTVQA = Benchmark("TextVQA", "textvqa_val", "exact_match")
_MME = Benchmark("MME", "mme", "mme_perception_score", scale=1.0, in_average=False)
_MMBENCH = Benchmark("MMBench", "mmbench_en_dev_static", "gpt_eval_score", scale=1.0)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "dualspeed",
            (
                Benchmark("VQAv2", "vqav2_val", "exact_match"),
                Benchmark("GQA", "gqa", "exact_match"),
                Benchmark("ScienceQA-IMG", "scienceqa_img", "exact_match"),
                _TEXTVQA,
                Benchmark("POPE", "pope", "pope_f1_score"),
                _MME,
                _MMBENCH,
                Benchmark("MMBench-CN", "mmbench_cn_dev", "gpt_eval_score", scale=1.0),
                Benchmark("SEED-Bench", "seedbench", "seed_image"),
            ),
        ),
        Suite(
            "skip-vision",
            (
                _MME,
                _TEXTVQA,
                _MMBENCH,
                Benchmark("MMVet", "mmvet", "gpt_eval_score", scale=1.0),
                Benchmark("MMMU", "mmmu_val", "mmmu_acc"),
                Benchmark("MathVista", "mathvista_testmini_format", "llm_as_judge_eval", scale=1.0),
                Benchmark("OCRBench", "ocrbench", "ocrbench_accuracy"),
                Benchmark("MMStar", "mmstar", "average"),
            ),
            average=True,
        ),
    )
}
"""The suites by name. Skip-Vision's average leaves out MME, whose scores are sums, not percent."""

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.task: benchmark for suite in SUITES.values() for benchmark in suite.benchmarks
}
"""Every benchmark of a suite, by task."""


def get_suite(name: str) -> Suite:
    """The suite called `name`.

    Raises:
        SaccadeError: if there is none.
    """
    if name not in SUITES:
        raise SaccadeError(f"suite={name!r} is unknown: use one of {', '.join(SUITES)}")
    return SUITES[name]
