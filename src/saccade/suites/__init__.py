"""Benchmarks through lmms-eval, which is optional, and tables of the scores of two result folders."""

from saccade.suites.compare import compare_results
from saccade.suites.definitions import SUITES, Benchmark, Suite
from saccade.suites.results import Scores, read_scores

__all__ = ["SUITES", "Benchmark", "Scores", "Suite", "compare_results", "read_scores"]
