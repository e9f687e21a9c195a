"""Render a job's plan for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from finetune_trainer.plan.devices import Device
from finetune_trainer.plan.memory import Memory
from finetune_trainer.plan.quantities import human_bytes, human_count
from finetune_trainer.plan.records import JobPlan, StagePlan, TeacherPlan
from finetune_trainer.plan.saving import saving, saving_words
from finetune_trainer.synthesis.estimate import SynthesisPlan

BAR = 32
"""Width in characters of a bar for the whole device memory."""


def render(plan: JobPlan) -> RenderableType:
    """Return one panel per stage: size, steps, memory by part, the ZeRO stage with its reason, and whether it fits."""
    peak = "" if plan.peak is None else f", {plan.peak / 1e12:.0f} TFLOP/s in {plan.dtype}"
    head = f"{plan.name}: {_plural(plan.workers, 'worker')} on {plan.device.name}, "
    head += f"{human_bytes(plan.device.memory_bytes)} each{peak}; computes in {plan.dtype}"
    syntheses = map(_synthesis, plan.syntheses)
    teachers = (_teacher(teacher, plan.device) for teacher in plan.teachers)
    return Group(Text(head), *syntheses, *teachers, *(_stage(stage, plan.device) for stage in plan.stages))


def _synthesis(stage: SynthesisPlan) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_row("method", f"{stage.method}, taught by {stage.teacher}")
    table.add_row("asks for", f"{_plural(stage.items, 'item')}, at most {_plural(stage.rows, 'row')}")
    table.add_row("calls", f"at most {stage.calls:,}, without those that are asked again")
    tokens = (
        f"at most about {human_count(stage.prompt_tokens)} to the teacher and {human_count(stage.completion_tokens)}"
    )
    table.add_row("tokens", f"{tokens} from it")
    table.add_row("price", _price(stage.price))
    title = escape(f"stages[{stage.index}] {stage.title} (synthesize)")
    return Panel(table, title=title, title_align="left", border_style="green")


def _price(price: float | None) -> str:
    if price is None:
        return "not known: the endpoint names none"
    return f"at most {price:,.2f}" if price else "none"


def _teacher(teacher: TeacherPlan, device: Device) -> RenderableType:
    facts = Text(f"{human_count(teacher.parameters)} parameters; prompt and answer up to {teacher.length} tokens")
    lines: list[RenderableType] = [facts, _memory(teacher.memory, device), _verdict(teacher, device)]
    lines += [Text(f"  → {line}", style="yellow") for line in teacher.advice]
    title = f"stages[{teacher.index}]: its teacher, on the job's own workers"
    return Panel(Group(*lines), title=title, title_align="left", border_style="green" if teacher.fits else "red")


def _stage(stage: StagePlan, device: Device) -> RenderableType:
    lines: list[RenderableType] = [
        _facts(stage),
        _memory(stage.memory, device),
        Text(stage.why),
        _verdict(stage, device),
    ]
    lines += [Text(f"host memory of a node: {stage.host}")] if stage.host else []
    lines += [Text(f"  → {line}", style="yellow") for line in stage.advice]
    lines += [_comparison(stage)] if stage.comparison else []
    lines += [Text(f"warning: {line}", style="yellow") for line in stage.warnings]
    lines += [Text(f"note: {line}", style="dim") for line in stage.notes]
    title = escape(f"stages[{stage.index}] {stage.title} ({stage.kind})")
    return Panel(Group(*lines), title=title, title_align="left", border_style="green" if stage.fits else "red")


def _facts(stage: StagePlan) -> Table:
    table = Table.grid(padding=(0, 2))
    share = stage.trainable / stage.parameters if stage.parameters else 0
    steps = stage.steps
    table.add_row(
        "parameters", f"{human_count(stage.parameters)}, {human_count(stage.trainable)} trained ({share:.3%})"
    )
    table.add_row("data", f"{_count(stage.rows)} rows, {_count(stage.tokens)} tokens, up to {stage.length} per row")
    if stage.kind == "evaluate":
        table.add_row("batches", f"{_count(steps.total)} ({_count(steps.per_epoch)} per model)")
    else:
        epoch = f"{_count(steps.per_epoch)} per epoch"
        table.add_row("steps", f"{_count(steps.total)} ({epoch}, {_count(steps.warmup)} warm-up)")
    table.add_row("per step", f"{steps.rows_per_step} rows, {_count(stage.tokens_per_step)} tokens")
    if stage.checkpoint:
        table.add_row("checkpoint", _checkpoint(stage))
    table.add_row("FLOPs", f"{stage.flops_per_token:.3g} per token{_total_flops(stage)}")
    return table


def _checkpoint(stage: StagePlan) -> str:
    """Return the size of a checkpoint, and how long one node writes it at the assumed speed."""
    found = saving([(stage.checkpoint, stage.zero)], 1, None)
    return "" if found is None else saving_words(found)


def _memory(memory: Memory, device: Device) -> Table:
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for name, count in memory.parts().items():
        if count:
            table.add_row(name, human_bytes(count), _bar(count / device.memory_bytes))
    table.add_row("total", human_bytes(memory.total), _bar(memory.total / device.memory_bytes), style="bold")
    if memory.host:
        table.add_row("on the host", human_bytes(memory.host), "")
    return table


def _comparison(stage: StagePlan) -> Table:
    table = Table("method", "trained", "optimizer", "total", box=None, padding=(0, 1), header_style="dim")
    for other in stage.comparison:
        table.add_row(
            other.method, human_count(other.trainable), human_bytes(other.optimizer), human_bytes(other.total)
        )
    return table


def _verdict(stage: StagePlan | TeacherPlan, device: Device) -> Text:
    where = f"{device.name} ({human_bytes(device.memory_bytes)}, 10% kept free)"
    if stage.fits:
        return Text(f"fits {where}, {human_bytes(stage.spare)} to spare", style="green")
    return Text(f"does not fit {where}: {human_bytes(-stage.spare)} too much", style="bold red")


def _bar(share: float) -> Text:
    filled = round(min(share, 1.0) * BAR)
    style = "red" if share > 1 else "cyan"
    return Text("█" * filled, style=style) + Text("·" * (BAR - filled), style="dim") + Text(f" {share:.0%}")


def _total_flops(stage: StagePlan) -> str:
    if stage.steps.total is None or stage.tokens_per_step is None:
        return ""
    return f", {stage.flops_per_token * stage.tokens_per_step * stage.steps.total:.3g} in all"


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
