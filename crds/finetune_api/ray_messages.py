"""What Ray's error texts look like."""

from __future__ import annotations

import re

RAY_FIELD = re.compile(r"\s*(class_name|actor_id|task_id|job_id|node_id|worker_id|namespace|name|pid|ip)\s*[:=]")
"""A line below Ray's message of an error (`ActorDiedError`) that says which actor it was: no message by itself."""
