"""`report.html`: what a run did, in one file that opens offline."""

from finetune_trainer.report.page import write_report

__all__ = ["write_report"]
