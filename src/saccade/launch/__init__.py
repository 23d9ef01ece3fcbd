"""Training in several processes: accelerate configs by name, and starting and watching the processes."""

from saccade.launch.plan import PRESETS, LaunchPlan, check_engine, make_plan
from saccade.launch.processes import run_processes

__all__ = ["PRESETS", "LaunchPlan", "check_engine", "make_plan", "run_processes"]
