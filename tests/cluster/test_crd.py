"""The API server accepts the committed CRD, and each rule of it accepts one job and rejects another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from kubernetes import client
from support.api.cel_cases import CHANGES, Example, base_job, examples, without_case
from support.cluster.access import Access, namespace_of

from finetune_api.job import GROUP, PLURAL, VERSION, FineTuneJobSpec

KIND = (GROUP, VERSION)
DRY = {"dry_run": "All"}
ROOT = "<nil>"
"""The API server's name for the root of the document."""
VALUE = re.compile('^Invalid value: ("[^"]*"|[^:]*): ')


@pytest.fixture(scope="module")
def place(admin: Access) -> Iterator[str]:
    """Create a namespace for the dry runs of this module."""
    with namespace_of(admin, "crd") as name:
        yield name


@pytest.fixture(scope="module")
def stored(finetune_jobs: client.CustomObjectsApi, place: str) -> dict[str, Any]:
    """Return the sample job as the API server stores it."""
    made: dict[str, Any] = finetune_jobs.create_namespaced_custom_object(*KIND, place, PLURAL, base_job())
    return made


def causes(refusal: client.ApiException) -> list[tuple[str, str]]:
    """Return field and message of each cause in an error of the API server."""
    found = json.loads(refusal.body)["details"]["causes"]
    return [(cause["field"], VALUE.sub("", cause["message"], count=1)) for cause in found]


def test_every_rule_has_a_case() -> None:
    assert without_case() == []


@pytest.mark.parametrize("example", examples(), ids=str)
def test_a_rule_accepts_one_job_and_refuses_another(
    finetune_jobs: client.CustomObjectsApi, place: str, example: Example
) -> None:
    finetune_jobs.create_namespaced_custom_object(*KIND, place, PLURAL, example.accepted, **DRY)
    with pytest.raises(client.ApiException) as refused:
        finetune_jobs.create_namespaced_custom_object(*KIND, place, PLURAL, example.refused, **DRY)
    assert refused.value.status == 422
    assert (example.node or ROOT, example.message) in causes(refused.value)


@pytest.mark.parametrize("example", examples(CHANGES), ids=str)
def test_a_rule_accepts_one_change_and_refuses_another(
    finetune_jobs: client.CustomObjectsApi, place: str, stored: dict[str, Any], example: Example
) -> None:
    name = stored["metadata"]["name"]
    finetune_jobs.replace_namespaced_custom_object(*KIND, place, PLURAL, name, changed(example.accepted, stored), **DRY)
    with pytest.raises(client.ApiException) as refused:
        finetune_jobs.replace_namespaced_custom_object(
            *KIND, place, PLURAL, name, changed(example.refused, stored), **DRY
        )
    assert causes(refused.value) == [(example.node, example.message)]


def changed(job: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Return `job` as an update of the stored job."""
    version = stored["metadata"]["resourceVersion"]
    return {**job, "metadata": {**job["metadata"], "resourceVersion": version}}


def test_the_api_server_fills_in_the_defaults_that_the_models_have(stored: dict[str, Any]) -> None:
    model = FineTuneJobSpec.model_validate(base_job()["spec"]).model_dump(by_alias=True, exclude_none=True)
    assert stored["spec"] == model


def test_zero_is_one_of_its_values(finetune_jobs: client.CustomObjectsApi, place: str) -> None:
    for zero, fine in {3: True, "auto": True, 4: False, "some": False}.items():
        job = base_job() | {"metadata": {"name": "zero"}}
        job["spec"]["sharding"] = {"zero": zero}
        with nullcontext() if fine else pytest.raises(client.ApiException, match="Unsupported value"):
            finetune_jobs.create_namespaced_custom_object(*KIND, place, PLURAL, job, **DRY)


def test_an_unknown_field_is_refused_where_the_client_asks_for_it(
    finetune_jobs: client.CustomObjectsApi, place: str
) -> None:
    job = base_job()
    job["spec"]["resources"] = {"gpu": 1}
    with pytest.raises(client.ApiException) as refused:
        finetune_jobs.create_namespaced_custom_object(*KIND, place, PLURAL, job, field_validation="Strict", **DRY)
    assert 'unknown field "spec.resources.gpu"' in json.loads(refused.value.body)["message"]
