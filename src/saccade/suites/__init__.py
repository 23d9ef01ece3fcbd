"""Benchmarks through lmms-eval, which is optional, and tables of the scores of two result folders."""

from saccade.suites.compare import compare_results, comparison_rows, summarize, summary_rows
from saccade.suites.definitions import SUITES, Benchmark, Suite
from saccade.suites.results import Scores, read_scores
from saccade.suites.run import check_lmms_eval, choose_tasks, judge_notes, run_suite

__all__ = [
    "SUITES",
    "Benchmark",
    "Scores",
    "Suite",
    "check_lmms_eval",
    "choose_tasks",
    "compare_results",
    "comparison_rows",
    "judge_notes",
    "read_scores",
    "run_suite",
    "summarize",
    "summary_rows",
]
