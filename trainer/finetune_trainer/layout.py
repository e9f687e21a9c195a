"""Where everything of a job lies below its root in storage: the one truth about paths."""

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
"""Directory of what one node has prepared for the others; it goes when the job is done."""
EXPERT_CONFIG = "expert_config.json"
EXPERT_SCORES = "expert_scores.json"
EXPERT_LOAD = "expert_load.png"
CHECKPOINT_PREFIX = "checkpoint-"  # transformers' own, so that its Trainer writes straight into place


def stall_record(attempt: int, when: str) -> str:
    """What was found of workers that stalled: their last operations and their stacks."""
    return f"stalls/attempt-{attempt}-{when}.txt"


def stage_layouts(titles: list[str]) -> list[StageLayout]:
    """The layouts of a job's stages, given their titles in order."""
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
        """What `from_pretrained` loads."""
        return f"{self.root}/result"

    @property
    def rows(self) -> str:
        """The rows that a `synthesize` stage makes, one JSON object per line."""
        return f"{self.root}/{ROWS}"

    @property
    def synthesis(self) -> str:
        """How the rows of a `synthesize` stage came about: counts, reasons, examples and cost."""
        return f"{self.root}/{SYNTHESIS}"

    @property
    def journal(self) -> str:
        """Directory of all answers of a teacher that were paid for."""
        return f"{self.root}/{JOURNAL}"

    @property
    def done(self) -> str:
        """Written last: a stage that has it is finished and never runs again."""
        return f"{self.root}/{DONE}"

    @property
    def metrics(self) -> str:
        """One JSON object per line, one line per logged step."""
        return f"{self.root}/{METRICS}"

    @property
    def samples(self) -> str:
        """Generations before and after the stage."""
        return f"{self.root}/{SAMPLES}"

    @property
    def dropped(self) -> str:
        """The steps whose updates are left out after a rollback."""
        return f"{self.root}/dropped.json"

    @property
    def data_report(self) -> str:
        """What preparation read, cut and dropped."""
        return f"{self.root}/{DATA_REPORT}"

    @property
    def evaluation(self) -> str:
        """What an `evaluate` stage has measured of each model, and samples of their answers."""
        return f"{self.root}/{EVALUATION}"

    def answers(self, model: str) -> str:
        """What an `evaluate` stage has of one model, one JSON object per row; written when it has all rows."""
        return f"{self.root}/answers/{model}.jsonl"

    def answer_parts(self, model: str) -> str:
        """Directory of the rows of one model while they are measured."""
        return f"{self.root}/answers/{model}.parts"

    def task(self, model: str, task: str) -> str:
        """What a task of lm-evaluation-harness says of one model."""
        return f"{self.root}/answers/{model}.{task}.json"

    @property
    def expert_config(self) -> str:
        """Which experts an `esft` stage trains; written before it trains."""
        return f"{self.root}/{EXPERT_CONFIG}"

    @property
    def expert_scores(self) -> str:
        """How much the stage's data uses each expert, before training and after it."""
        return f"{self.root}/{EXPERT_SCORES}"

    @property
    def expert_load(self) -> str:
        """Picture of the scores."""
        return f"{self.root}/{EXPERT_LOAD}"

    @property
    def rounds(self) -> str:
        """What an `online` stage's rounds made and measured."""
        return f"{self.root}/{ROUNDS}"

    @property
    def round_data(self) -> str:
        """Hash of the prompts that an `online` stage's rounds are drawn from."""
        return f"{self.root}/rounds/data"

    @property
    def round_start(self) -> str:
        """Answers of the model that an `online` stage starts from to held-out prompts."""
        return f"{self.root}/rounds/start.jsonl"

    @property
    def judgements(self) -> str:
        """Every answer of an `online` stage's judge that was paid for."""
        return f"{self.root}/judgements"

    def round(self, number: int) -> str:
        """Directory of a round's data, the first being 0."""
        return f"{self.root}/rounds/{number:03d}"

    def round_samples(self, number: int) -> str:
        """A round's answers with their scores, one prompt per line."""
        return f"{self.round(number)}/samples.jsonl"

    def round_pairs(self, number: int) -> str:
        """A round's pairs; written last."""
        return f"{self.round(number)}/pairs.jsonl"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    def checkpoint(self, step: int) -> str:
        """Directory of the checkpoint after `step` optimizer steps; complete once it holds a manifest."""
        return f"{self.checkpoints}/{CHECKPOINT_PREFIX}{step}"
