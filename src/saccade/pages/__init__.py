"""`saccade report`: one page about a run, a sweep or a demo, with pictures."""

from saccade.pages.write import write_report

__all__ = ["write_report"]
