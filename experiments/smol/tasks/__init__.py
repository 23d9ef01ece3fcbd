"""The four tasks, by name."""

from experiments.smol.tasks.base import Question, Region, Sample, Task
from experiments.smol.tasks.charts import Charts
from experiments.smol.tasks.digits import Digits
from experiments.smol.tasks.documents import Documents
from experiments.smol.tasks.easy_vqa import EasyVQA

TASKS: dict[str, Task] = {task.name: task for task in (Digits(), EasyVQA(), Documents(), Charts())}

__all__ = ["TASKS", "Question", "Region", "Sample", "Task"]
