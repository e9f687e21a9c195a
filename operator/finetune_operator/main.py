"""The `finetune-operator` command: reads its settings from the environment and runs."""

from __future__ import annotations

import asyncio
import logging
import sys

from finetune_operator.operator import run
from finetune_operator.settings import from_environment


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = from_environment()
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not settings.token_key:
        sys.exit("error: FINETUNE_TOKEN_KEY_FILE must name a file with the key that runs' tokens are derived from")
    asyncio.run(run(settings))
