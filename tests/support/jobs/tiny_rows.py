"""Texts and dialogues for the tiny model; not in conftest.py, because several test directories have one."""

from __future__ import annotations

from typing import Any

TEXTS = [f"{a} plus {b} makes {a + b}, says the teacher. <|im_start|>" for a in range(10) for b in range(10)]


def dialogue(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
