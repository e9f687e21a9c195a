"""Advice after an out-of-memory error: which field to change, and to which value (pure)."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from finetune_api.kubernetes import Kubernetes
from finetune_operator.core.conditions import Reason
from finetune_operator.core.names import CONTAINER
from finetune_operator.decide.classify import Ending

Json = dict[str, Any]
FACTOR = 1.5
"""Factor from the current amount of memory to the advised one."""
SHARED_MEMORY = str(Kubernetes.model_fields["shared_memory"].default)
GIB = 2**30
_QUANTITY = re.compile(r"^(\d+(?:\.\d+)?)(\D*)$")


def with_advice(ending: Ending, body: Json, status: Json) -> Ending:
    """Return the ending with advice before its message, if memory ran out or a device failed."""
    advice = _advice(ending, body["spec"], status)
    return dataclasses.replace(ending, message=f"{advice}. {ending.message}") if advice else ending


def _advice(ending: Ending, spec: Json, status: Json) -> str:
    if ending.reason is Reason.OOM_KILLED:
        return _host(spec, status, ending.container)
    if ending.reason is Reason.DEVICE_OOM:
        return _device(spec, status)
    return _shared(spec) if ending.reason is Reason.SHARED_MEMORY else ending.advice


def with_preflight_advice(ending: Ending, memory: str) -> Ending:
    """Return the ending of a preflight with advice; `memory` is its memory limit, which the operator sets."""
    if ending.reason is not Reason.OOM_KILLED or ending.container:
        return ending
    advice = f"Set the chart's jobs.preflight.memory to {_more(memory) or 'more'} (it is {memory}), or "
    return dataclasses.replace(ending, message=f"{advice}kubernetes.preflight to false. {ending.message}")


def _host(spec: Json, status: Json, container: str) -> str:
    resources: Json = spec.get("resources", {})
    limit = _template_limit(resources.get("podTemplate") or {}, container or CONTAINER)
    if container:
        field = f"the memory limit of {container} in resources.podTemplate"
        return f"Set {field} " + (f"to {_more(limit)} (it is {limit})" if _more(limit) else "higher")
    current = resources.get("memoryPerNode") or limit
    if _more(current):
        return f"Set resources.memoryPerNode to {_more(current)} (it is {current})"
    planned = (status.get("plan") or {}).get("memoryBytes")
    if resources.get("gpusPerNode"):  # then the plan has the memory of GPUs, not of the host
        return "Set resources.memoryPerNode, which is not set, to the host memory that the node's workers need"
    if planned is None:
        return "Set resources.memoryPerNode, which is not set, to what the job needs"
    workers = resources.get("workersPerNode") or 1
    least = math.ceil(planned * workers * FACTOR / GIB)
    reason = f"it is not set, and {workers} x {planned / GIB:.1f} GiB are planned"
    return f"Set resources.memoryPerNode to {least}Gi ({reason})"


def _shared(spec: Json) -> str:
    size = (spec.get("kubernetes") or {}).get("sharedMemory") or SHARED_MEMORY
    larger = _more(size) or "more"
    return f"Set kubernetes.sharedMemory to {larger} (it is {size}), and increase memoryPerNode by the difference"


def _template_limit(template: Json, name: str) -> str | None:
    """Return a container's memory limit in the pod template; values of an unexpected type count as absent."""
    pod = template.get("spec")
    for kind in ("containers", "initContainers"):
        for item in (pod.get(kind) if isinstance(pod, dict) else None) or []:
            if isinstance(item, dict) and item.get("name") == name:
                limit = ((item.get("resources") or {}).get("limits") or {}).get("memory")
                return str(limit) if limit is not None else None
    return None


def _more(quantity: str | None) -> str | None:
    """Return a larger quantity in the same unit; None if the quantity cannot be parsed."""
    match = _QUANTITY.match(quantity or "")
    return f"{math.ceil(float(match[1]) * FACTOR)}{match[2]}" if match else None


def _device(spec: Json, status: Json) -> str:
    """Return the cheapest remedy that is left for a GPU."""
    index, stage = _stage(spec, status)
    kind = next((name for name in stage if name != "name"), "")
    fields: Json = stage.get(kind) or {}
    path = f"stages[{index}].{kind}"
    batch = fields.get("perDeviceTrainBatchSize", 8)
    if batch > 1:
        return _smaller_batch(path, batch, fields.get("gradientAccumulationSteps", 1))
    if not fields.get("gradientCheckpointing"):
        return f"Set {path}.gradientCheckpointing to true"
    if spec.get("sharding", {}).get("zero") != 3:
        return f"Set sharding.zero to 3 and {_more_nodes(spec)}"
    length = "blockSize" if kind == "pretrain" else "maxLength"
    shorter = f"{path}.{length} to {fields[length] // 2} (it is {fields[length]})" if fields.get(length) else ""
    return f"Set {' or '.join(filter(None, [shorter, _more_nodes(spec)]))}"


def _smaller_batch(path: str, batch: int, accumulation: int) -> str:
    """Advise the largest smaller divisor of the batch size, with more accumulation for the same global batch."""
    smaller = max(size for size in range(1, batch // 2 + 1) if batch % size == 0)
    factor = batch // smaller
    return (
        f"Set {path}.perDeviceTrainBatchSize to {smaller} (it is {batch}) and {path}.gradientAccumulationSteps to "
        f"{accumulation * factor}: the same batch in {'half' if factor == 2 else f'1/{factor} of'} the memory"
    )


def _more_nodes(spec: Json) -> str:
    resources: Json = spec.get("resources", {})
    name = "maxNodes" if resources.get("maxNodes") else "nodes"
    count = resources.get(name) or 1
    return f"resources.{name} to {2 * count} (it is {count})"


def _stage(spec: Json, status: Json) -> tuple[int, Json]:
    """Return index and spec of the running stage; if none is reported, of the first stage that trains."""
    running = [i for i, stage in enumerate(status.get("stages") or []) if stage.get("state") == "Running"]
    trained = [i for i, stage in enumerate(spec["stages"]) if "tokenizer" not in stage]
    index = next(iter(running + trained), 0)
    return index, spec["stages"][index]
