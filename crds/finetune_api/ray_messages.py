"""Patterns of the error messages of Ray."""

from __future__ import annotations

import re

RAY_FIELD = re.compile(r"\s*(class_name|actor_id|task_id|job_id|node_id|worker_id|namespace|name|pid|ip)\s*[:=]")
"""Matches the lines below the message of a Ray error (`ActorDiedError`) that identify the actor; they are not messages
themselves."""
