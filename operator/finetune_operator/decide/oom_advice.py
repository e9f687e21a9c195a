"""After an out-of-memory: which field to change, and to what (pure)."""

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
MORE = 1.5
"""How much more memory to try."""
SHARED_MEMORY = str(Kubernetes.model_fields["shared_memory"].default)
GIB = 2**30
_QUANTITY = re.compile(r"^(\d+(?:\.\d+)?)(\D*)$")


def with_advice(ending: Ending, body: Json, status: Json) -> Ending:
    """The ending of an attempt with what to change, where it was for lack of memory or a fault of a device."""
    words = _words(ending, body["spec"], status)
    return dataclasses.replace(ending, message=f"{words}. {ending.message}") if words else ending


def _words(ending: Ending, spec: Json, status: Json) -> str:
    if ending.reason is Reason.OOM_KILLED:
        return _host(spec, status, ending.container)
    if ending.reason is Reason.DEVICE_OOM:
        return _device(spec, status)
    return _shared(spec) if ending.reason is Reason.SHARED_MEMORY else ending.advice


def with_preflight_advice(ending: Ending, memory: str) -> Ending:
    """The same for a preflight, which has `memory` of the operator's giving."""
    if ending.reason is not Reason.OOM_KILLED or ending.container:
        return ending
    words = f"Set the chart's jobs.preflight.memory to {_more(memory) or 'more'} (it is {memory}), or "
    return dataclasses.replace(ending, message=f"{words}kubernetes.preflight to false. {ending.message}")


def _host(spec: Json, status: Json, container: str) -> str:
    resources: Json = spec.get("resources", {})
    limit = _template_limit(resources.get("podTemplate") or {}, container or CONTAINER)
    if container:
        where = f"the memory limit of {container} in resources.podTemplate"
        return f"Set {where} " + (f"to {_more(limit)} (it is {limit})" if _more(limit) else "higher")
    given = resources.get("memoryPerNode") or limit
    if _more(given):
        return f"Set resources.memoryPerNode to {_more(given)} (it is {given})"
    planned = (status.get("plan") or {}).get("memoryBytes")
    if resources.get("gpusPerNode"):  # the plan counts the memory of GPUs then, which says nothing of the host's
        return (
            "Set resources.memoryPerNode, which is not set, to the memory that the node's workers need beside its GPUs"
        )
    if planned is None:
        return "Set resources.memoryPerNode, which is not set, to what the job needs"
    workers = resources.get("workersPerNode") or 1
    least = math.ceil(planned * workers * MORE / GIB)
    why = f"it is not set, and {workers} x {planned / GIB:.1f} GiB are planned"
    return f"Set resources.memoryPerNode to {least}Gi ({why})"


def _shared(spec: Json) -> str:
    given = (spec.get("kubernetes") or {}).get("sharedMemory") or SHARED_MEMORY
    return f"Set kubernetes.sharedMemory to {_more(given) or 'more'} (it is {given}), and memoryPerNode by as much more"


def _template_limit(template: Json, name: str) -> str | None:
    """A container's memory limit as its template has it; what is of another type than it should be counts as absent."""
    pod = template.get("spec")
    for kind in ("containers", "initContainers"):
        for item in (pod.get(kind) if isinstance(pod, dict) else None) or []:
            if isinstance(item, dict) and item.get("name") == name:
                limit = ((item.get("resources") or {}).get("limits") or {}).get("memory")
                return str(limit) if limit is not None else None
    return None


def _more(quantity: str | None) -> str | None:
    """A larger quantity in the same unit; None for one that can't be read."""
    match = _QUANTITY.match(quantity or "")
    return f"{math.ceil(float(match[1]) * MORE)}{match[2]}" if match else None


def _device(spec: Json, status: Json) -> str:
    """The cheapest thing that is left to do."""
    index, stage = _stage(spec, status)
    kind = next((name for name in stage if name != "name"), "")
    fields: Json = stage.get(kind) or {}
    where = f"stages[{index}].{kind}"
    batch = fields.get("perDeviceTrainBatchSize", 8)
    if batch > 1:
        return _smaller_batch(where, batch, fields.get("gradientAccumulationSteps", 1))
    if not fields.get("gradientCheckpointing"):
        return f"Set {where}.gradientCheckpointing to true"
    if spec.get("sharding", {}).get("zero") != 3:
        return f"Set sharding.zero to 3 and {_more_nodes(spec)}"
    length = "blockSize" if kind == "pretrain" else "maxLength"
    shorter = f"{where}.{length} to {fields[length] // 2} (it is {fields[length]})" if fields.get(length) else ""
    return f"Set {' or '.join(filter(None, [shorter, _more_nodes(spec)]))}"


def _smaller_batch(where: str, batch: int, accumulation: int) -> str:
    """The largest part of a batch that divides it, and the accumulation that makes up for it."""
    smaller = max(part for part in range(1, batch // 2 + 1) if batch % part == 0)
    factor = batch // smaller
    return (
        f"Set {where}.perDeviceTrainBatchSize to {smaller} (it is {batch}) and {where}.gradientAccumulationSteps to "
        f"{accumulation * factor}: the same batch in {'half' if factor == 2 else f'1/{factor} of'} the memory"
    )


def _more_nodes(spec: Json) -> str:
    resources: Json = spec.get("resources", {})
    name = "maxNodes" if resources.get("maxNodes") else "nodes"
    count = resources.get(name) or 1
    return f"resources.{name} to {2 * count} (it is {count})"


def _stage(spec: Json, status: Json) -> tuple[int, Json]:
    """The stage that ran; without a word about it, the first that trains."""
    running = [i for i, stage in enumerate(status.get("stages") or []) if stage.get("state") == "Running"]
    trained = [i for i, stage in enumerate(spec["stages"]) if "tokenizer" not in stage]
    index = next(iter(running + trained), 0)
    return index, spec["stages"][index]
