from __future__ import annotations

import json
import re
from base64 import b64encode
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from finetune_trainer.esft.heat_map import draw
from finetune_trainer.report import write_report
from finetune_trainer.storage.filesystem import Storage

TITLES = ["tokenizer", "pretrain", "sft", "dpo"]
LOADING = ("src", "href", "xlink:href", "srcset", "data")
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Elements, references and texts of a page; raises if tags are not nested correctly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        self.references += [part for _, value in attrs for part in re.findall(r"url\(([^)]*)\)", value or "")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(synthetic: ModuleType, root: Path, only: str | None = None) -> str:
    layouts = [layout for layout in synthetic.layouts() if only in (None, layout.title)]
    path = write_report(Storage(str(root)), layouts, synthetic.run_config(root))
    assert path == f"{root}/report.html"
    return Path(path).read_text()


@pytest.fixture(scope="module")
def html(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("run")
    synthetic.write_run(root)
    return report(synthetic, root)


def test_nothing_outside_the_file_is_referred_to(html: str) -> None:
    page = Page(html)
    assert page.references and all(_inside(reference) for reference in page.references)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "@import" not in html and "xmlns" not in html
    outside = re.sub(r"http://evil\.example/x\.js(&#34;|\\)", "", html)  # quoted text of the samples
    assert "http://" not in outside and "https://" not in outside


def _inside(reference: str) -> bool:
    return reference.startswith(("#", "data:image/png;base64,"))


def test_a_stage_of_experts_shows_its_heat_map(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.write_run(tmp_path)
    shares = {"0": {"0": 0.75, "1": 0.25}}
    scores = {"token_scores": shares, "selected": {"0": [0]}, "after": {"token_scores": shares}}
    layout, picture = synthetic.layouts()[2], draw(scores, "token")
    (tmp_path / layout.expert_scores).write_text(json.dumps(scores))
    (tmp_path / layout.expert_load).write_bytes(picture)
    pictures = [part for part in Page(report(synthetic, tmp_path)).references if not part.startswith("#")]
    assert pictures == ["data:image/png;base64," + b64encode(picture).decode()]


def test_pictures_find_their_own_parts(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)


def test_every_stage_and_its_values_are_there(html: str) -> None:
    text = " ".join(Page(html).text.split())
    for number, title in enumerate(TITLES, start=1):
        assert f"{number}. {title}" in text
    assert "All 4 stages are done, after 18 min 14 s of training." in text
    for value in (
        "pretrain held-out loss 1.67",
        "bytes_per_token 3.87",
        "5.6 → 1.67",
        "12.3 M",
        "eval_rewards/accuracies 0.7",
    ):
        assert value in text
    assert (
        "123 of 12.3 k (1.0%) examples were cut by 4.6 k tokens in all. 45 rows were dropped: 40 too long, 5 empty"
        in text
    )
    assert "some_new_field" in text
    assert "torch" in text and "2.13.0" in text
    assert "apiVersion: finetune.dev/v1alpha1" in text


def test_each_trained_stage_has_its_curves(html: str) -> None:
    assert re.findall(r"<figcaption>(.*?)</figcaption><svg viewBox", html) == [
        *["Loss", "Learning rate", "Gradient norm", "Throughput (tokens/s)", "Peak memory"] * 2,
        *["Loss", "Learning rate", "Gradient norm", "Throughput (tokens/s)", "Peak memory"],
        *["rewards/accuracies", "rewards/margins"],
    ]


def test_what_others_wrote_is_shown_and_not_run(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script src=" in html and "␛[2J␀" in html and "{{ 7*7 }}" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", html)


def test_the_transport_between_nodes_and_its_warning_are_shown(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.write_run(tmp_path)
    done = tmp_path / synthetic.layouts()[2].done
    transport = {"words": "NET/Socket (TCP) between nodes", "warning": "NCCL uses TCP <b>though</b>"}
    done.write_text(json.dumps(json.loads(done.read_text()) | {"transport": transport}))
    text = Page(report(synthetic, tmp_path)).text
    assert "NCCL: NET/Socket (TCP) between nodes" in text and "NCCL uses TCP <b>though</b>" in text


def test_a_long_sample_is_folded_and_capped(html: str) -> None:
    assert "show all (300,000 characters)" in html
    assert "The rest is in samples.json." in html
    assert len(html) < 1_500_000


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 plus 2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
    {"role": "tool", "content": [{"type": "text", "text": "4"}]},
    {"role": "user", "content": "So?"},
]


def test_a_chat_sample_shows_its_turns_and_what_was_asked_last(synthetic: ModuleType, tmp_path: Path) -> None:
    """`training.samples` writes the prompt of a conversation as `messages`."""
    synthetic.write_run(tmp_path)
    rows = {when: [{"messages": CHAT, "reference": "4", "output": when}] for when in ("before", "after")}
    (tmp_path / "stages/02-sft/samples.json").write_text(json.dumps(rows))
    html = report(synthetic, tmp_path, only="sft")
    section = html.partition("<h3>Samples before and after</h3>")[2].partition("</section>")[0]
    shown = " ".join(unescape(re.sub("<[^>]+>", " ", section)).split())
    call = '{"name": "add", "arguments": {"a": 2}}'
    turns = f"system Be brief. user What is 2 plus 2? assistant {call} tool 4 user So?"
    assert shown.startswith(f"{turns} Before before After after Reference 4")
    assert re.findall(r'<div class="turn asked"><span class="label">(.*?)</span>\s*<pre>(.*?)</pre>', html) == [
        ("user", "So?")
    ]


def test_a_long_chat_is_folded(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.write_run(tmp_path)
    messages = [{"role": "user" if at % 2 == 0 else "assistant", "content": f"turn {at}"} for at in range(21)]
    (tmp_path / "stages/02-sft/samples.json").write_text(json.dumps({"after": [{"messages": messages, "output": "x"}]}))
    html = report(synthetic, tmp_path, only="sft")
    assert "show 16 earlier messages" in html and html.count('class="turn') == 21


def test_no_credentials_of_a_uri_are_shown(html: str) -> None:
    assert "s3://…@bucket/x" in html and "secret" not in html


def test_the_same_run_gives_the_same_bytes(html: str, synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.write_run(tmp_path)
    assert report(synthetic, tmp_path) == report(synthetic, tmp_path)


def test_an_empty_directory_gives_a_report(synthetic: ModuleType, tmp_path: Path) -> None:
    page = Page(report(synthetic, tmp_path / "none"))
    assert page.text.count("This stage has not run yet.") == 4
    assert "0 of 4 stages are done" in page.text and "svg" not in page.tags


def test_a_run_under_way_says_how_far_it_is(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, finished=2)
    text = " ".join(Page(report(synthetic, tmp_path)).text.split())
    assert "2 of 4 stages are done, after 17 min 54 s; sft is at step 150." in text
    assert text.count("This stage has not run yet.") == 1


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b"[1, 2]", b"null", b"[" * 100_000])
def test_a_broken_file_costs_its_section_only(synthetic: ModuleType, tmp_path: Path, content: bytes) -> None:
    synthetic.write_run(tmp_path)
    for name in ("samples.json", "data.json"):
        (tmp_path / "stages/02-sft" / name).write_bytes(content)
    (tmp_path / "run.json").write_bytes(content)
    page = Page(report(synthetic, tmp_path, only="sft"))
    for name in ("run.json", "stages/02-sft/samples.json", "stages/02-sft/data.json"):
        assert f"{name} is left out: it is" in page.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples.json", {"before": None, "after": [{"prompt": [{"role": "user", "content": "hé"}]}, 3], "x": 1}),
        ("samples.json", {"after": [{"output": {"a": "\ud800"}, "reference": 1.5}]}),
        ("data.json", {"rows": None, "dropped": [1], "truncated_examples": "many", "new": {"a": {"b": [1]}}}),
        ("data.json", {"rows": 0, "truncated_examples": 3, "dropped": {"x": "y"}}),
        ("done.json", {"metrics": {"loss": None, "eval_loss": "low"}, "seconds": "long", "environment": ["a"]}),
        ("done.json", {"metrics": [1], "steps": None}),
    ],
)
def test_values_of_the_wrong_type_are_survived(
    synthetic: ModuleType, tmp_path: Path, name: str, content: dict[str, object]
) -> None:
    synthetic.write_run(tmp_path)
    (tmp_path / "stages/02-sft" / name).write_text(json.dumps(content))
    assert "1. sft" in Page(report(synthetic, tmp_path, only="sft")).text


def test_a_loss_that_is_not_finite_is_survived(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, finished=2)
    (tmp_path / "stages/02-sft/metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": "NaN"}\n{"step": 3, "loss": NaN, "grad_norm": "Infinity"}\n'
    )
    assert "sft is at step 3" in report(synthetic, tmp_path, only="sft")
