"""Write `report.html`, a self-contained report of a run that opens offline."""

from finetune_trainer.report.page import write_report

__all__ = ["write_report"]
