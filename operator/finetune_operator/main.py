"""The `finetune-operator` command: reads its settings from the environment and runs."""

from __future__ import annotations

import asyncio
import logging
import sys

from finetune_operator.core.settings import from_environment
from finetune_operator.engines.registry import check_engines
from finetune_operator.operator import run


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # a line for every event of every pod otherwise
    try:
        settings = from_environment()
        check_engines(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not settings.token_key and not settings.operator_namespace:
        sys.exit("error: set FINETUNE_OPERATOR_NAMESPACE (or FINETUNE_TOKEN_KEY_FILE): runs' tokens need a key")
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
