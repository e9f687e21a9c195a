"""The `finetune-operator` command: read the settings from the environment and run the operator."""

from __future__ import annotations

import asyncio
import logging
import sys

from finetune_operator.core.settings import from_environment
from finetune_operator.engines.registry import check_engines
from finetune_operator.operator import LeaseLost, run


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # INFO has one line per event of each object
    try:
        settings = from_environment()
        check_engines(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not settings.token_key and not settings.operator_namespace:
        sys.exit("error: set FINETUNE_OPERATOR_NAMESPACE or FINETUNE_TOKEN_KEY_FILE: it sets the key of runs' tokens")
    try:
        asyncio.run(run(settings))
    except LeaseLost as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
