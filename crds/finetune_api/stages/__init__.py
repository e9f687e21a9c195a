"""Stages of a job, one module for each family of stages.

A new stage is a spec in one of these modules and a field of `Stage`. The spec declares the facts about the stage that
other parts of the project need (`finetune_api.declaration`).
"""

from finetune_api.stages.corpus import PretrainSpec, TokenizerSpec
from finetune_api.stages.evaluation import BASE, Database, EvaluateSpec, Gate
from finetune_api.stages.experts import EsftSpec, GivenExperts, default_threshold
from finetune_api.stages.policy import Judge, OnlineSpec, PromptSpec, Reward, RlhfSpec, Sampling
from finetune_api.stages.preference import DpoSpec, PairSpec, PreferenceLoss, RewardSpec
from finetune_api.stages.stage import DATA_FIELDS, STAGE_KINDS, Stage, StageSpec, TrainedSpec
from finetune_api.stages.supervised import SftSpec, SupervisedSpec
from finetune_api.stages.synthesis import (
    Decontaminate,
    Dedup,
    Evolve,
    GraphDatabase,
    QueryPairs,
    Questions,
    SynthesizeSpec,
    Teacher,
    TeacherModel,
    Text2Cypher,
    Text2Sql,
)

__all__ = [
    "BASE",
    "DATA_FIELDS",
    "STAGE_KINDS",
    "Database",
    "Decontaminate",
    "Dedup",
    "DpoSpec",
    "EsftSpec",
    "EvaluateSpec",
    "Evolve",
    "Gate",
    "GivenExperts",
    "GraphDatabase",
    "Judge",
    "OnlineSpec",
    "PairSpec",
    "PreferenceLoss",
    "PretrainSpec",
    "PromptSpec",
    "QueryPairs",
    "Questions",
    "Reward",
    "RewardSpec",
    "RlhfSpec",
    "Sampling",
    "SftSpec",
    "Stage",
    "StageSpec",
    "SupervisedSpec",
    "SynthesizeSpec",
    "Teacher",
    "TeacherModel",
    "Text2Cypher",
    "Text2Sql",
    "TokenizerSpec",
    "TrainedSpec",
    "default_threshold",
]
