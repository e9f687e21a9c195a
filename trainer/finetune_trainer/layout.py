"""The paths of a job's files below its root in storage."""

from __future__ import annotations

from dataclasses import dataclass

RUN_CONFIG = "run.json"
REPORT = "report.html"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.json"
DATA_REPORT = "data.json"
DONE = "done.json"
ROWS = "rows.jsonl"
EVALUATION = "evaluation.json"
ROUNDS = "rounds.json"
SYNTHESIS = "synthesis.json"
JOURNAL = "journal"
SHARED = "shared"
"""Directory of data that one node has prepared for the others; deleted when the job is done."""
EXPERT_CONFIG = "expert_config.json"
EXPERT_SCORES = "expert_scores.json"
EXPERT_LOAD = "expert_load.png"
CHECKPOINT_PREFIX = "checkpoint-"  # the prefix of transformers, so that its Trainer writes to the final directory


def stall_record(attempt: int, when: str) -> str:
    """Return the path of a stall's record: the workers' last operations and their stacks."""
    return f"stalls/attempt-{attempt}-{when}.txt"


def stage_layouts(titles: list[str]) -> list[StageLayout]:
    """Return the layouts of a job's stages, given their titles in order."""
    return [StageLayout(index, title) for index, title in enumerate(titles)]


@dataclass(frozen=True)
class StageLayout:
    """Paths of one stage, relative to the job's root, such as `stages/01-sft`."""

    index: int
    title: str

    @property
    def root(self) -> str:
        return f"stages/{self.index:02d}-{self.title}"

    @property
    def result(self) -> str:
        """Directory of the result, which `from_pretrained` loads."""
        return f"{self.root}/result"

    @property
    def rows(self) -> str:
        """Rows of a `synthesize` stage, one JSON object per line."""
        return f"{self.root}/{ROWS}"

    @property
    def synthesis(self) -> str:
        """Report of a `synthesize` stage: counts, reasons for dropped rows, examples and cost."""
        return f"{self.root}/{SYNTHESIS}"

    @property
    def journal(self) -> str:
        """Directory of all responses of a teacher, which are paid for once."""
        return f"{self.root}/{JOURNAL}"

    @property
    def done(self) -> str:
        """File that marks a stage as finished. It is written last; a finished stage never runs again."""
        return f"{self.root}/{DONE}"

    @property
    def metrics(self) -> str:
        """Metrics, one JSON object per logged step and line."""
        return f"{self.root}/{METRICS}"

    @property
    def samples(self) -> str:
        """Completions before and after the stage."""
        return f"{self.root}/{SAMPLES}"

    @property
    def dropped(self) -> str:
        """Steps whose updates are skipped after a rollback."""
        return f"{self.root}/dropped.json"

    @property
    def data_report(self) -> str:
        """Report of the data preparation: rows that were read, truncated and dropped."""
        return f"{self.root}/{DATA_REPORT}"

    @property
    def evaluation(self) -> str:
        """Metrics of an `evaluate` stage for each model, and samples of their completions."""
        return f"{self.root}/{EVALUATION}"

    def answers(self, model: str) -> str:
        """Return the path of an `evaluate` stage's completions of one model, one JSON object per row.

        It is written when all rows are complete.
        """
        return f"{self.root}/answers/{model}.jsonl"

    def answer_parts(self, model: str) -> str:
        """Return the directory of the rows of one model while it is evaluated."""
        return f"{self.root}/answers/{model}.parts"

    def task(self, model: str, task: str) -> str:
        """Return the path of the result of a task of lm-evaluation-harness for one model."""
        return f"{self.root}/answers/{model}.{task}.json"

    @property
    def expert_config(self) -> str:
        """Experts that an `esft` stage trains; written before training."""
        return f"{self.root}/{EXPERT_CONFIG}"

    @property
    def expert_scores(self) -> str:
        """Scores of each expert on the stage's data, before and after training."""
        return f"{self.root}/{EXPERT_SCORES}"

    @property
    def expert_load(self) -> str:
        """Heat map of the scores."""
        return f"{self.root}/{EXPERT_LOAD}"

    @property
    def rounds(self) -> str:
        """Results and metrics of the rounds of an `online` stage."""
        return f"{self.root}/{ROUNDS}"

    @property
    def round_data(self) -> str:
        """Hash of the prompts of an `online` stage's rounds."""
        return f"{self.root}/rounds/data"

    @property
    def round_start(self) -> str:
        """Completions of held-out prompts by the model with which an `online` stage starts."""
        return f"{self.root}/rounds/start.jsonl"

    @property
    def judgements(self) -> str:
        """Directory of all responses of an `online` stage's judge, which are paid for once."""
        return f"{self.root}/judgements"

    def round(self, number: int) -> str:
        """Return the directory of a round, counted from 0."""
        return f"{self.root}/rounds/{number:03d}"

    def round_samples(self, number: int) -> str:
        """Return the path of a round's completions with their scores, one prompt per line."""
        return f"{self.round(number)}/samples.jsonl"

    def round_pairs(self, number: int) -> str:
        """Return the path of a round's pairs, which are written last."""
        return f"{self.round(number)}/pairs.jsonl"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    def checkpoint(self, step: int) -> str:
        """Return the directory of the checkpoint after `step` optimizer steps; complete once it has a manifest."""
        return f"{self.checkpoints}/{CHECKPOINT_PREFIX}{step}"
