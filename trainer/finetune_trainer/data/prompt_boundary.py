"""Split prompt and answer in rows whose answers are chats that may repeat the prompt.

`prompt` may be absent, a text or a list of messages, and a chat may hold the answer alone or the prompt before it. As
in TRL's `extract_prompt`, the common beginning of the chats of a pair is the prompt; as in its `maybe_extract_prompt`,
a text in `prompt` is not added to chats that already contain it. A prompt that contradicts the chats is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune_trainer.data.json_values import EmptyRow, FormError, short
from finetune_trainer.data.messages import Message, without_train

Chat = list[Message]
NO_PROMPT = "no shared prompt"
SYSTEM = ("system", "developer")
"""Roles of a message that may precede the first user message."""
_MARKS = re.compile(
    r"(human|user|assistant|system|model|bot|gpt|im_start|im_end|im_sep|inst|sys|start_header_id|end_header_id|eot_id|"
    r"begin_of_text|start_of_turn|end_of_turn|bos|[\W_])*",
    re.IGNORECASE,
)
"""Role names and markers that may separate the messages of a transcript without white space."""


@dataclass(frozen=True)
class Split:
    """A prompt that ends before an assistant's turn, and the answers to it, which begin with an assistant's turn."""

    prompt: Chat
    answers: list[Chat]


def split(prompt: str | Chat | None, answers: list[Chat], column: str = "prompt") -> Split:
    """Return the prompt and the answers without it.

    Args:
        prompt: the row's prompt, if it has one.
        answers: the two chats of a pair, or one completion.
        column: name of the prompt's column, for error messages.

    Raises:
        FormError: the prompt and the chats contradict each other.
        EmptyRow: the chats of a pair share no prompt.
    """
    if not all(answers):
        raise EmptyRow("empty")
    if isinstance(prompt, list) and prompt:
        split_row = _split_by_messages(prompt, answers, column)
    else:
        split_row = _split_by_text(prompt if isinstance(prompt, str) else None, answers, column)
    return Split(without_train(split_row.prompt), split_row.answers)


def put_system(system: str | None, messages: Chat) -> Chat:
    """Return the messages with a system message before them.

    Raises:
        FormError: they begin with a different system message.
    """
    if not system:
        return messages
    if not _system_in(messages):
        return [{"role": "system", "content": system}, *messages]
    own = messages[0]["content"]
    if own.strip() != system.strip():
        raise FormError(
            f"the row has two system messages, {short(own)!r} in its messages and {short(system)!r} in its own column: "
            f"remove one, or set `columns: {{system: none}}` to ignore the column"
        )
    return messages


def _split_by_text(text: str | None, chats: list[Chat], column: str) -> Split:
    """Split chats whose prompt is a text, or that contain the whole prompt."""
    cut = _shared_prompt(chats) if len(chats) > 1 else _prompt_of_one(chats[0], text)
    head = chats[0][:cut]
    is_contained = text is None or _has_text(head, text)
    if text and not is_contained and all(_is_answer(_without_system(chat)) for chat in chats):
        asked = [*_system_in(head), {"role": "user", "content": text}, *_without_system(head)]
        return Split(asked, _answers(chats, cut))
    if not head or (text and all(message["role"] in SYSTEM for message in head)):
        raise EmptyRow(NO_PROMPT)
    if text and not is_contained:
        raise _contradiction(text, head, column)
    return Split(head, _answers(chats, cut))


def _shared_prompt(chats: list[Chat]) -> int:
    """Return how many messages of a pair are its prompt: the common beginning, without answers at its end."""
    cut = _shared(*chats)
    while cut and chats[0][cut - 1]["role"] == "assistant":
        cut -= 1
    asked = any(message["role"] not in SYSTEM for message in chats[0][:cut])
    return cut if asked or all(_is_answer(chat[cut:]) for chat in chats) else 0


def _prompt_of_one(chat: Chat, text: str | None) -> int:
    """Return how many messages of a completion are its prompt: up to the turn with the text, else to the answer."""
    turns = [
        index for index, message in enumerate(chat) if message["role"] == "user" and _has_text([message], text or "")
    ]
    if turns:
        return turns[-1] + 1
    return next((index for index, message in enumerate(chat) if message["role"] == "assistant"), len(chat))


def _answers(chats: list[Chat], cut: int) -> list[Chat]:
    """Return the chats after their prompt. Equal turns before the first difference express no preference: no loss."""
    shared = _shared(*chats) if len(chats) > 1 else cut
    if shared >= min(map(len, chats)):
        return [chat[cut:] for chat in chats]
    return [[*map(_without_loss, chat[cut:shared]), *chat[shared:]] for chat in chats]


def _without_loss(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message


def _split_by_messages(prompt: Chat, chats: list[Chat], column: str) -> Split:
    """Split chats whose prompt is a list of messages, which they may repeat or continue."""
    system = _one_system([prompt, *chats])
    asked, bare = _without_system(prompt), [_without_system(chat) for chat in chats]
    if all(_is_answer(chat) for chat in bare):
        return Split(system + asked, bare)
    if not asked:
        split_row = _split_by_text(None, bare, column)
        return Split(system + split_row.prompt, split_row.answers)
    split_row = _split_repeated(asked, bare, column)
    return Split(system + split_row.prompt, split_row.answers)


def _split_repeated(asked: Chat, chats: list[Chat], column: str) -> Split:
    """Split chats that begin with turns other than answers and system messages."""
    pair = len(chats) > 1
    cut = _shared_prompt(chats) if pair else _prompt_of_one(chats[0], _last_text(asked))
    head = chats[0][:cut]
    repeated = all(len(chat) > len(asked) and _begins(chat, asked) for chat in chats)
    if repeated and not (pair and _begins(head, asked)):
        return Split(asked, [chat[len(asked) :] for chat in chats])
    if _begins(head, asked) or _begins(head[-len(asked) :], asked):
        return Split(head, _answers(chats, cut))
    if head and asked[-1]["role"] == "assistant":
        return Split(asked + head, _answers(chats, cut))
    raise _contradiction(_last_text(asked), head or chats[0], column)


def _begins(chat: Chat, start: Chat) -> bool:
    return _shared(chat, start) == len(start)


def _one_system(chats: list[Chat]) -> Chat:
    """Return the system message of a prompt and its chats, which must not differ; [] if none has one."""
    found = [message for chat in chats for message in _system_in(chat)]
    for one in found[1:]:
        if not _same(one, found[0]):
            texts = f"{short(found[0]['content'])!r} and {short(one['content'])!r}"
            raise FormError(f"the row's prompt and chats have different system messages, {texts}: keep one of them")
    return found[:1]


def _system_in(chat: Chat) -> Chat:
    return chat[:1] if chat and chat[0]["role"] in SYSTEM else []


def _without_system(chat: Chat) -> Chat:
    return chat[len(_system_in(chat)) :]


def _is_answer(chat: Chat) -> bool:
    return bool(chat) and chat[0]["role"] == "assistant"


def _shared(first: Chat, second: Chat) -> int:
    """Return the number of equal messages at the start of two chats."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if not _same(a, b)), min(len(first), len(second)))


def _same(first: Message, second: Message) -> bool:
    """Return whether two messages are equal except for `train` and white space around their content."""

    def normalized(message: Message) -> Message:
        kept = {key: value for key, value in message.items() if key != "train"}
        return {**kept, "content": kept["content"].strip()}

    return normalized(first) == normalized(second)


def _has_text(head: Chat, text: str) -> bool:
    """Return whether a text equals a user's message, or the transcript of all messages, except for white space.

    A transcript may have names of roles and a template's markers between the messages' texts.
    """
    asked = {_without_space(message["content"]) for message in head if message["role"] == "user"}
    return _without_space(text) in asked or any(_is_transcript(part, text) for part in (head, _without_system(head)))


def _is_transcript(chat: Chat, text: str) -> bool:
    rest, contents = _without_space(text), [_without_space(message["content"]) for message in chat]
    for content in filter(None, contents):
        marks, found, rest = rest.partition(content)
        if not found or not _MARKS.fullmatch(marks):
            return False
    return any(contents) and _MARKS.fullmatch(rest) is not None


def _without_space(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _last_text(chat: Chat) -> str:
    asked = [str(message["content"]) for message in chat if message["role"] == "user"]
    return (asked or [str(message["content"]) for message in chat] or [""])[-1]


def _contradiction(content: str, head: Chat, column: str) -> FormError:
    return FormError(
        f"`{column}` asks {short(content)!r}, but the row's chats begin with another prompt, which asks "
        f"{short(_last_text(head))!r}: make them equal, or set `columns: {{prompt: none}}` to use that of the chats"
    )
