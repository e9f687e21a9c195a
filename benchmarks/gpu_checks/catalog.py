"""All checks in the order of execution, and the table of the memory that they measure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from gpu_checks import answers, large, machine, training
from gpu_checks.record import Check, Json, Result

CHECKS = (
    Check("versions", 1, 5, machine.versions),
    Check("bf16_ceiling", 1, 8, machine.ceiling),
    Check("imports", 1, 20, machine.imports),
    Check("compiler", 1, 30, machine.compiler),
    Check("collectives", 1, 10, machine.collectives),
    Check("out_of_memory", 1, 15, machine.out_of_memory),
    Check("models", 1, 20, lambda options: machine.models(options, "0.6B", "1.7B")),
    Check("sft_against_trl", 1, 50, training.sft_against_trl),
    Check("memory_between_stages", 1, 50, training.memory_between_stages),
    Check("generation", 1, 45, answers.generation),
    Check("dpo_references", 1, 30, training.dpo_references),
    Check("other_stages", 1, 35, training.other_stages),
    Check("models_8b", 2, 40, lambda options: machine.models(options, "8B")),
    Check("lora_8b", 2, 35, partial(large.adapters, bits=None)),
    Check("qlora4_8b", 2, 35, partial(large.adapters, bits=4)),
    Check("qlora8_8b", 2, 40, partial(large.adapters, bits=8)),
    Check("packing", 2, 35, training.packing),
    Check("experts", 2, 40, large.experts),
)
LOWEST, HIGHEST = 0.9, 1.1
"""Bounds of measured/planned memory."""


def memory_table(results: Iterable[Result], seconds: float = 0.0) -> Result:
    """Return the table of measured and planned memory of all checks that measured it.

    A ratio outside the bounds is flagged and fails the table.
    """
    rows: list[Json] = [row for result in results for row in result.values.get("memory", [])]
    told = [row | {"flag": _outside(row["ratio"])} for row in rows]
    flagged = [row["name"] for row in told if row["flag"]]
    judged = any(row["ratio"] is not None for row in told)
    error = {"class": "OutsideBounds", "message": f"outside {LOWEST} to {HIGHEST}: {', '.join(flagged)}"}
    return Result(
        "memory_table",
        not flagged if judged else None,
        seconds,
        {"rows": told},
        None if judged else "measured on a GPU alone: in --tiny the process's libraries outweigh the models",
        error if flagged else None,
    )


def _outside(ratio: float | None) -> bool:
    return ratio is not None and not LOWEST <= ratio <= HIGHEST
