"""Chat templates, each with a property of a model family, and conversations to test them with."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import trl.chat_template_utils
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]


def _joined(user: str, assistant: str, ask: str = "", *, loop: str = "messages", before: str = "") -> str:
    """Return a chat template from its parts for user messages, assistant messages and the generation prompt."""
    branches = "{% if m['role'] == 'assistant' %}" + assistant + "{% else %}" + user + "{% endif %}"
    prompt = "{% if add_generation_prompt %}" + ask + "{% endif %}"
    return before + "{% for m in " + loop + " %}" + branches + "{% endfor %}" + prompt


_CHATML = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_ASK = "{{ '<|im_start|>assistant\n' }}"
_HEAD = "{{ '<|im_start|>assistant\n' }}"
_END = "{{ '<|im_end|>\n' }}"
_DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nDefault.<|im_end|>\n' }}{% endif %}"
_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
)
_LAST_USER = (
    "{% set last = namespace(at=-1) %}{% for m in rest %}{% if m['role'] == 'user' %}{% set last.at = loop.index0 %}"
    "{% endif %}{% endfor %}{{ bos_token }}"
)
_USERS_ONLY = "{% if m['role'] != 'user' %}{{ raise_exception('Only user and assistant roles') }}{% endif %}"
_THOUGHT = "{% set t = m['content'].split('</think>')[0].split('<think>')[-1] if '</think>' in m['content'] else '' %}"
_ANSWER = "{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}"

TEMPLATES = {
    "chatml": _joined(_CHATML, _CHATML, _ASK),
    "default-system": _joined(_CHATML, _CHATML, _ASK, before=_DEFAULT),
    # The prompt does not contain the header of an answer: the model generates it.
    "no-prompt": _joined(_CHATML, _CHATML),
    "marked-no-end": _joined(_CHATML, _HEAD + "{% generation %}{{ m['content'] }}{% endgeneration %}" + _END, _ASK),
    # The `generation` block starts inside the prompt and ends after the end of the turn.
    "marked-wide": _joined(_CHATML, "{% generation %}" + _CHATML + "{% endgeneration %}", _ASK),
    "mistral": _joined(
        _USERS_ONLY + "{{ '[INST] ' + m['content'] + ' [/INST]' }}",
        "{{ ' ' + m['content'] + eos_token }}",
        before="{{ bos_token }}",
    ),
    # The system text is part of the last user turn, so earlier turns render differently once more turns follow.
    "mistral3": _joined(
        "{{ '[INST] ' + (sys + '\n\n' if loop.index0 == last.at and sys else '') + m['content'] + '[/INST]' }}",
        "{{ ' ' + m['content'] + eos_token }}",
        loop="rest",
        before=_SYSTEM + _LAST_USER,
    ),
    "llama2": _joined(
        "{{ bos_token + '[INST] ' + ('<<SYS>>\n' + sys + '\n<</SYS>>\n\n' if loop.first and sys else '') }}"
        "{{ m['content'] + ' [/INST]' }}",
        "{{ ' ' + m['content'] + ' ' + eos_token }}",
        loop="rest",
        before=_SYSTEM,
    ),
    "vicuna": _joined(
        "{{ ('USER: ' if m['role'] == 'user' else '') + m['content'] + ' ' }}",
        "{{ 'ASSISTANT: ' + m['content'] + eos_token }}",
        "{{ 'ASSISTANT:' }}",
    ),
    # No stop token ends an answer.
    "alpaca": _joined(
        "{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}",
        "{{ '### Response:\n' + m['content'] + '\n\n' }}",
        "{{ '### Response:\n' }}",
    ),
    # The next role's special token ends an answer; nothing ends the last one.
    "glm": _joined(
        "{{ '<|' + m['role'] + '|>\n' + m['content'] }}",
        "{{ '<|assistant|>\n' + m['content'] }}",
        "{{ '<|assistant|>\n' }}",
    ),
    # The EOS token ends the conversation; a special token ends the earlier answers.
    "metharme": _joined(
        "{{ '<|' + m['role'] + '|>' + m['content'] }}",
        "{{ '<|assistant|>' + m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}",
        "{{ '<|assistant|>' }}",
    ),
    # The EOS token comes after the end of the last turn.
    "phi3": _joined(
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}",
        "{{ '<|assistant|>\n' + m['content'] + '<|end|>\n' }}",
        "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}",
    ),
    # Two tokens end an answer; an answer's header is rendered last even without `add_generation_prompt`.
    "command": _joined(
        "{{ '<|start|><|' + m['role'] + '|>' + m['content'] + '<|end|>' }}",
        "{{ '<|start|><|assistant|><|answer|>' + m['content'] + '<|/answer|><|end|>' }}",
        "{{ '<|start|><|assistant|><|answer|>' }}{% else %}{{ '<|start|><|assistant|>' }}",
    ),
    # Text is rendered last even without `add_generation_prompt`, and it is longer than an answer's header.
    "code-llama": _joined(
        "{{ 'Source: ' + m['role'] + '\n\n ' + m['content'] + ' <|step|> ' }}",
        "{{ 'Source: assistant\n\n ' + m['content'] + ' <|step|> ' }}",
        "{% endif %}{{ 'Source: assistant\nDestination: user\n\n ' }}{% if false %}",
    ),
    # The prompt opens a thought; the history omits thoughts.
    "think": _joined(
        _CHATML,
        _ANSWER + "{{ '<|im_start|>assistant\n' + (m['content'] if loop.last else c) + '<|im_end|>\n' }}",
        "{{ '<|im_start|>assistant\n<think>\n' }}",
    ),
    # As above, and the last answer's thought is omitted as well.
    "think-dropped": _joined(
        _CHATML,
        _ANSWER + "{{ '<|im_start|>assistant\n' + c + '<|im_end|>\n' }}",
        "{{ '<|im_start|>assistant\n<think>\n' }}",
    ),
    # The last answer always gets a thought, possibly an empty one; the prompt has none.
    "think-last": _joined(
        _CHATML,
        _THOUGHT + _ANSWER + "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + t.strip('\n') +"
        " '\n</think>\n\n' }}{% endif %}{{ c + '<|im_end|>\n' }}",
        _ASK,
    ),
    # The prompt ends with an empty thought.
    "think-closed": _joined(_CHATML, _CHATML, "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"),
    # Content is a list of parts, as in vision models.
    "parts": _joined(
        "{{ m['role'] | capitalize + ':' }}{% for p in m['content'] %}{{ ' ' + (p['text'] or '') }}{% endfor %}" + _END,
        "{{ 'Assistant:' }}{% for p in m['content'] %}{{ ' ' + (p['text'] or '') }}{% endfor %}" + _END,
        "{{ 'Assistant:' }}",
    ),
}
"""Templates written for these tests; some have the properties of the cases in ../shared/cases."""


def _with_tools(arguments: str, before: str = "{{ m['content'] or '' }}", after: str = "") -> str:
    """Return a ChatML template with tools that renders the arguments of a call with `arguments`."""
    calls = "{% for t in m.tool_calls or [] %}{{ '<tool_call>' + t.function.name + ' ' }}" + arguments
    calls += "{{ '</tool_call>' }}{% endfor %}"
    listed = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    return _joined(_CHATML, _HEAD + before + calls + after + _END, _ASK, before=listed)


_INSIDE = "{% if not (loop.previtem and loop.previtem['role'] == 'tool') %}" + _HEAD + "{% endif %}{{ m['content'] }}"
TOOL_TEMPLATES = {
    "objects": _with_tools("{{ t.function.arguments | tojson }}"),
    "both": _with_tools(
        "{{ t.function.arguments if t.function.arguments is string else t.function.arguments | tojson }}"
    ),
    "items": _with_tools("{% for k, v in t.function.arguments | items %}{{ k + '=' + (v | tojson) }}{% endfor %}"),
    # DeepSeek's template concatenates strings, which fails with an object.
    "strings": _with_tools("{{ '' + t.function.arguments }}"),
    # An object would be rendered as a Python repr.
    "printed": _with_tools("{{ t.function.arguments }}"),
    # DeepSeek-R1's template renders calls only if the content is null.
    "null": _with_tools(
        "{{ '' + t.function.arguments }}",
        "{% if m['content'] is not none %}{{ m['content'] }}{% else %}",
        "{% endif %}",
    ),
    # Gemma 4's template puts tool results inside the model's turn, and their special token ends a call.
    "inside": _joined(
        "{% if m['role'] == 'tool' %}{{ '<|tool_response>' + m['content'] + '<tool_response|>' }}{% else %}"
        + _CHATML
        + "{% endif %}",
        _INSIDE
        + "{% for t in m.tool_calls or [] %}{{ '<|tool_call>' + t.function.name + (t.function.arguments | tojson) +"
        " '<tool_call|>' }}{% endfor %}{% if not m.tool_calls %}" + _END + "{% endif %}",
        "{% if messages[-1]['role'] != 'tool' %}" + _ASK + "{% endif %}",
        before="{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}",
    ),
}

TRL_TEMPLATES = {
    name.removesuffix("_chat_template"): text
    for name, text in vars(trl.chat_template_utils).items()
    if name.endswith("_chat_template") and "training" not in name and isinstance(text, str)
}
"""The chat templates of real models that TRL ships."""

CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "A city."}},
                "required": ["city"],
            },
        },
    }
]


def talk(*turns: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS: dict[str, Messages] = {
    "turns": talk(("user", "Ualpha"), ("assistant", "Abeta"), ("user", "Ugamma"), ("assistant", "Adelta")),
    "repeated": talk(("user", "Usame"), ("assistant", "Asame"), ("user", "Usame"), ("assistant", "Asame")),
    "system": talk(
        ("system", "Ssigma"), ("user", "Ualpha"), ("assistant", "Abeta"), ("user", "Ug"), ("assistant", "Ad")
    ),
    "assistant-first": talk(("assistant", "Azeta"), ("user", "Ualpha"), ("assistant", "Abeta")),
    "user-last": talk(("user", "Ualpha"), ("assistant", "Abeta"), ("user", "Ugamma")),
    "thoughts": talk(
        ("user", "Ualpha"),
        ("assistant", "<think>\nTone\n</think>\n\nAbeta"),
        ("user", "Ugamma"),
        ("assistant", "<think>\nTtwo\n</think>\n\nAdelta"),
    ),
    "tools": [
        *talk(("user", "Ualpha")),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "Rsunny"},
        *talk(("assistant", "Adelta")),
    ],
}

_BAR = "\uff5c"
"""The character in DeepSeek's special tokens that looks like a vertical line."""
_MARKER = re.compile(
    rf"<[|{_BAR}][^<>\n]*?[|{_BAR}]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start_of_turn|end_of_turn|end_of_utterance)>"
)
_ENDS = (
    "<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|return|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>",
    f"<{_BAR}end\u2581of\u2581sentence{_BAR}>", "<end_of_utterance>", "<|end|>", "<|step|>",
)  # fmt: skip


@cache
def _bytes() -> str:
    """Return a byte-level tokenizer as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["What is this? It is that.\n\n", " 4", "\n\n\n"] * 9
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def tokenizer_for(template: str | None, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose special tokens are those in the template."""
    backend = Tokenizer.from_str(_bytes())
    roles = ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>") if template and "'<|' + m" in template else ()
    markers = list(dict.fromkeys([*_MARKER.findall(template or ""), *roles, *more]))
    backend.add_special_tokens(["<s>", "</s>", "<pad>", "[INST]", "[/INST]", *markers])
    backend.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    eos = next((end for end in _ENDS if end in markers), "</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    fast.chat_template = template
    return fast
