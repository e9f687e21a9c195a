"""The command line submits, watches, suspends, resumes and waits for jobs of a running operator."""

from __future__ import annotations

from pathlib import Path

import yaml
from kubernetes import client
from support.cluster.access import Access
from support.cluster.finetune_command import Finetune
from support.cluster.finetune_jobs import Jobs, driver, job
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.operator_process import OperatorProcess

from finetune_operator.core import names
from finetune_trainer.progress.reporter import Progress

ADDRESS = "127.0.0.77"
SECONDS = "40s"


def pod_of(kubelet: KubeletStandIn, namespace: str, run: int) -> str:
    selector = ",".join(f"{name}={value}" for name, value in names.labels("tiny", run).items())
    return kubelet.pods(namespace, 1, selector=selector)[0]


def test_a_job_from_submit_to_succeeded_by_the_command_line_alone(
    admin: Access,
    finetune_jobs: client.CustomObjectsApi,
    namespace: str,
    kubelet: KubeletStandIn,
    tmp_path: Path,
) -> None:
    finetune = Finetune(admin.kubeconfig(tmp_path / "kubeconfig", namespace))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job()))
    with OperatorProcess(admin, tmp_path / "operator", FINETUNE_NAMESPACES=namespace):
        assert finetune("submit", tmp_path / "job.yaml").exit_code == 0
        uid = Jobs(finetune_jobs, namespace).read()["metadata"]["uid"]
        first = pod_of(kubelet, namespace, 1)
        assert finetune("logs", "tiny").exit_code == 2
        with driver(uid, 1, ADDRESS) as trainer:
            kubelet.running(namespace, first, ip=ADDRESS)
            assert finetune("wait", "tiny", "--for", "Running", "--timeout", SECONDS).exit_code == 0
            with finetune.started("status", "tiny", "--watch") as watching:
                assert watching.stdout is not None
                trainer.reporter.stage_started(1, "pretrain", 2, "")
                trainer.reporter.progress(Progress(1, 2, "pretrain", 4, 10, loss=3.25, eta=90.0))
                line = "Running · 2/2 pretrain · 4/10 · loss 3.2500 · ETA 1 min 30 s\n"
                assert line in iter(watching.stdout.readline, "")
            assert finetune("suspend", "tiny").exit_code == 0
            assert trainer.asked_to_stop.wait(20)
        kubelet.finished(namespace, first, 75, message='{"stages": [], "exitCode": 75}')
        assert finetune("wait", "tiny", "--for", "Suspended", "--timeout", SECONDS).exit_code == 0
        assert finetune("resume", "tiny").exit_code == 0
        second = pod_of(kubelet, namespace, 2)
        kubelet.running(namespace, second, ip=ADDRESS)
        kubelet.finished(namespace, second)
        assert finetune("wait", "tiny", "--timeout", SECONDS).stdout == "tiny: Succeeded\n"
        shown = finetune("status", "tiny").stdout
        assert shown.startswith("tiny  Succeeded") and "Interrupted" in shown and "Completed" in shown
        assert finetune("delete", "tiny", "--yes").exit_code == 0
