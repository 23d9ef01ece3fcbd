"""The papers' benchmarks: lmms-eval's task, the metric that the papers print, and the unit that they print it in."""

from dataclasses import dataclass

from saccade.errors import SaccadeError


@dataclass(frozen=True)
class Benchmark:
    """One column of a paper's table.

    Args:
        name: as the papers write it.
        task: lmms-eval's task.
        metric: the entry of the task's results.
        scale: what the entry is multiplied by: the papers print percent, lmms-eval shares of 1 in most tasks.
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
        average: whether the paper prints an average of the scores themselves, of those that are `in_average`.
    """

    name: str
    benchmarks: tuple[Benchmark, ...]
    average: bool = False

    @property
    def tasks(self) -> list[str]:
        """lmms-eval's names of its tasks."""
        return [benchmark.task for benchmark in self.benchmarks]


# "static" reads letters by rule. Of the usual task, which asks a judge where it finds none, there is a Chinese one.
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
"""By name. Skip-Vision's average leaves MME out, whose scores are sums and not percent."""

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.task: benchmark for suite in SUITES.values() for benchmark in suite.benchmarks
}
"""Every benchmark of a suite, by task."""


def get_suite(name: str) -> Suite:
    """The suite `name`.

    Raises:
        SaccadeError: if there is none.
    """
    if name not in SUITES:
        raise SaccadeError(f"suite={name!r} is unknown: use one of {', '.join(SUITES)}")
    return SUITES[name]
