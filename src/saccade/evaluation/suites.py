"""The papers' benchmarks: lmms-eval's task, and the metric and unit that the papers report."""

from typing import NamedTuple

from saccade.errors import SaccadeError, one_of


class Benchmark(NamedTuple):
    """One column of a paper's table.

    Its name there, lmms-eval's task, the entry in the task's results, the factor from that entry to the paper's unit
    (percent, where lmms-eval mostly has fractions), and whether the suite's average of scores includes it.
    """

    name: str
    task: str
    metric: str
    scale: float = 100.0
    in_average: bool = True


class Suite(NamedTuple):
    """The benchmarks of one paper in its order, and whether it reports the average of those that are `in_average`."""

    name: str
    benchmarks: tuple[Benchmark, ...]
    average: bool = False

    @property
    def tasks(self) -> list[str]:
        """lmms-eval's names of its tasks."""
        return [benchmark.task for benchmark in self.benchmarks]


_TEXTVQA = Benchmark("TextVQA", "textvqa_val", "exact_match")
# Its scores are sums, not percent.
_MME = Benchmark("MME", "mme", "mme_perception_score", scale=1.0, in_average=False)
# "static" extracts letters by rule. The usual task, which asks a judge if it finds none, exists in Chinese only.
_MMBENCH = Benchmark("MMBench", "mmbench_en_dev_static", "gpt_eval_score", scale=1.0)
_DUALSPEED = (
    Benchmark("VQAv2", "vqav2_val", "exact_match"),
    Benchmark("GQA", "gqa", "exact_match"),
    Benchmark("ScienceQA-IMG", "scienceqa_img", "exact_match"),
    _TEXTVQA,
    Benchmark("POPE", "pope", "pope_f1_score"),
    _MME,
    _MMBENCH,
    Benchmark("MMBench-CN", "mmbench_cn_dev", "gpt_eval_score", scale=1.0),
    Benchmark("SEED-Bench", "seedbench", "seed_image"),
)
_SKIP_VISION = (
    _MME,
    _TEXTVQA,
    _MMBENCH,
    Benchmark("MMVet", "mmvet", "gpt_eval_score", scale=1.0),
    Benchmark("MMMU", "mmmu_val", "mmmu_acc"),
    Benchmark("MathVista", "mathvista_testmini_format", "llm_as_judge_eval", scale=1.0),
    Benchmark("OCRBench", "ocrbench", "ocrbench_accuracy"),
    Benchmark("MMStar", "mmstar", "average"),
)
SUITES = {
    "dualspeed": Suite("dualspeed", _DUALSPEED),
    "skip-vision": Suite("skip-vision", _SKIP_VISION, average=True),
}
BENCHMARKS = {benchmark.task: benchmark for suite in SUITES.values() for benchmark in suite.benchmarks}
"""Every benchmark of a suite, by task."""


def get_suite(name: str) -> Suite:
    """The suite called `name`.

    Raises:
        SaccadeError: if there is none.
    """
    if name not in SUITES:
        raise SaccadeError(f"suite={name!r} is unknown: {one_of(name, SUITES)}")
    return SUITES[name]
