"""`saccade report`: one page of a run, a sweep or a demo, and its pictures."""

from saccade.pages.write import write_report

__all__ = ["write_report"]
