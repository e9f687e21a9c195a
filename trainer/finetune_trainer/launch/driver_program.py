"""The driver as a script, which the fork server runs: `driver_program.py RUN_CONFIG`."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune_trainer.launch.drive import drive

if __name__ == "__main__":
    sys.exit(int(drive(Path(sys.argv[1]))))
