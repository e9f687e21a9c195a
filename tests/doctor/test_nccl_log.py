"""NCCL's transport is read from logs in the formats of several NCCL versions."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from support.api.sample_job import JOB

from finetune_api.job import FineTuneJob
from finetune_trainer.doctor.facts import Fabric
from finetune_trainer.doctor.nccl_log import Transport, joined, parse_log
from finetune_trainer.progress.attempt_report import AttemptReporter
from finetune_trainer.runtime import nccl_log_variables
from finetune_trainer.training.transport import log_file, read_transport, slow_network

IB_2_18 = """\
pod-0:71:71 [0] NCCL INFO Bootstrap : Using eth0:10.0.3.7<0>
pod-0:71:71 [0] NCCL INFO NET/Plugin : No plugin found, using internal implementation
NCCL version 2.18.5+cuda12.1
pod-0:71:204 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.3.7<0>
pod-0:71:204 [0] NCCL INFO Using network IB
pod-0:71:204 [0] NCCL INFO Channel 00/0 : 1[1] -> 2[0] [receive] via NET/IB/0/GDRDMA
pod-0:71:204 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/IPC/read
pod-0:71:204 [0] NCCL INFO Channel 01/0 : 1[1] -> 2[0] [send] via NET/IB/1(0)/GDRDMA
"""
ROCE_2_29 = """\
pod-0:88:88 [0] NCCL INFO NCCL version 2.29.7+cuda13.2
pod-0:88:310 [0] NCCL INFO NET/IB : Using [0]mlx5_2:1/RoCE [RO]; OOB net1:192.168.7.2<0>
pod-0:88:310 [0] NCCL INFO Initialized NET plugin IB
pod-0:88:310 [0] NCCL INFO Assigned NET plugin IB to comm
pod-0:88:310 [0] NCCL INFO Using network IB
pod-0:88:311 [0] NCCL INFO Channel 00/0 : 3[3] -> 4[0] [receive] via NET/IB/0
pod-0:88:311 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
pod-0:88:311 [0] NCCL INFO Channel 02 : 2[2] -> 3[3] via SHM/direct/direct
"""
TCP_2_20 = """\
pod-1:64:131 [0] NCCL INFO Failed to open libibverbs.so[.1]
pod-1:64:131 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.3.9<0>
pod-1:64:131 [0] NCCL INFO Using non-device net plugin version 0
pod-1:64:131 [0] NCCL INFO Using network Socket
pod-1:64:131 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
"""
PINNED_2_21 = """\
pod-1:64:131 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [RO]; OOB eth0:10.0.3.9<0>

pod-1:64:131 [0] misc/ibvwrap.cc:269 NCCL WARN Call to ibv_reg_mr failed with error Cannot allocate memory
"""
DISABLED = """\
pod-1:64:64 [0] NCCL INFO NCCL_IB_DISABLE set by environment to 1.
pod-1:64:131 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.3.9<0> [1]eth1:10.1.3.9<0>
pod-1:64:131 [0] NCCL INFO Using network Socket
"""
EFA = """\
pod-1:64:131 [0] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.9.1
pod-1:64:131 [0] NCCL INFO Using network AWS Libfabric
pod-1:64:131 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/AWS Libfabric/0/GDRDMA/Shared
"""


def parsed(log: str) -> Transport:
    return parse_log(log.splitlines())


def test_infiniband_with_gpu_direct() -> None:
    found = parsed(IB_2_18)
    assert found == Transport("IB", True, "[0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]", ("P2P/IPC",))
    assert found.words == "NET/IB with GPUDirect RDMA between nodes, P2P/IPC within a node"


def test_roce_without_gpu_direct() -> None:
    found = parsed(ROCE_2_29)
    assert (found.network, found.gpu_direct, found.inside) == ("IB", False, ("P2P/CUMEM", "SHM"))
    assert "without GPUDirect" in found.words and "RoCE" in found.devices


@pytest.mark.parametrize(
    ("log", "reason"),
    [(TCP_2_20, "Failed to open libibverbs.so[.1]"), (DISABLED, "NCCL_IB_DISABLE set by environment to 1")],
)
def test_tcp_and_why(log: str, reason: str) -> None:
    found = parsed(log)
    assert found.network == "Socket" and found.reasons == (reason,) and "NET/Socket (TCP)" in found.words


def test_a_plugins_network_has_its_own_name() -> None:
    found = parsed(EFA)
    assert (found.network, found.gpu_direct) == ("AWS Libfabric", True)


def test_refused_memory_is_a_reason() -> None:
    assert parsed(PINNED_2_21).reasons == ("Call to ibv_reg_mr failed with error Cannot allocate memory",)


def test_the_slowest_worker_counts() -> None:
    assert joined([parsed(IB_2_18), Transport(), parsed(TCP_2_20)]).network == "Socket"
    both = joined([parsed(IB_2_18), parsed(ROCE_2_29)])
    assert (both.network, both.gpu_direct, both.inside) == ("IB", False, ("P2P/CUMEM", "P2P/IPC", "SHM"))
    assert joined([Transport(), Transport()]) == Transport()


def test_a_log_without_transports_says_nothing() -> None:
    assert parsed("pod-0:1:1 [0] NCCL INFO comm 0x1 rank 0 nranks 1 - Init COMPLETE") == Transport()


def job(limits: dict[str, Any]) -> FineTuneJob:
    body = copy.deepcopy(JOB)
    container = {"name": "trainer", "resources": {"limits": limits}}
    body["spec"]["resources"] = {"nodes": 2, "gpusPerNode": 1, "podTemplate": {"spec": {"containers": [container]}}}
    return FineTuneJob.model_validate(body)


def test_a_job_with_rdma_devices_on_tcp_is_warned_with_the_remedy() -> None:
    limited = Fabric(devices=("uverbs0",), locked_bytes=65536)
    words = slow_network(parsed(TCP_2_20), job({"rdma/hca": 1}), limited)
    assert "uses TCP" in words and "64 KiB" in words and "LimitMEMLOCK=infinity" in words and "IPC_LOCK" in words
    assert "libibverbs" in words
    absent = slow_network(parsed(TCP_2_20), job({"rdma/hca": 1}), Fabric())
    assert "rdma/hca: 1" in absent and "k8s.v1.cni.cncf.io/networks" in absent
    assert slow_network(parsed(TCP_2_20), job({}), limited), "the node has an adapter all the same"


def test_a_job_without_rdma_devices_or_on_infiniband_is_not_warned() -> None:
    assert slow_network(parsed(TCP_2_20), job({}), Fabric()) == ""
    assert slow_network(parsed(IB_2_18), job({"rdma/hca": 1}), Fabric(locked_bytes=65536)) == ""


def test_the_log_is_asked_for_unless_the_user_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nccl_log_variables({"NCCL_DEBUG": "WARN"}) == {}
    variables = nccl_log_variables({})
    assert variables["NCCL_DEBUG"] == "INFO" and {"INIT", "NET"} <= set(variables["NCCL_DEBUG_SUBSYS"].split(","))
    variables["NCCL_DEBUG_FILE"] = str(tmp_path / "nccl.%h.%p.log")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    path = log_file(os.environ)
    assert path is not None and str(os.getpid()) in path.name
    assert read_transport() == Transport()
    path.write_text(TCP_2_20)
    assert read_transport().network == "Socket"
    assert log_file({"NCCL_DEBUG": "WARN", "NCCL_DEBUG_FILE": "/x"}) is None


def test_the_report_has_transport_and_warning() -> None:
    reporter = AttemptReporter(["sft"])
    reporter.transport("Socket", False, "NET/Socket (TCP) between nodes", "NCCL uses TCP")
    found = reporter.report().transport
    assert found is not None and (found.network, found.gpu_direct) == ("Socket", False)
    assert found.warning == "NCCL uses TCP"
