"""Where a prompt ends and an answer begins, in rows whose answers are chats that may repeat the prompt.

Rows come in several forms: `prompt` is absent, a text or a list of messages, and a chat holds the answer alone or the
prompt before it. As in TRL's `extract_prompt`, what the chats of a pair have in common is the prompt; as in its
`maybe_extract_prompt`, a text in `prompt` is not put before chats that hold it already. A prompt that says something
else than the chats is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune_trainer.data.json_values import EmptyRow, FormError, short
from finetune_trainer.data.messages import Message, without_train

Chat = list[Message]
NO_PROMPT = "no shared prompt"
SYSTEM = ("system", "developer")
"""Roles of a message that may stand before a user's first."""
_MARKS = re.compile(
    r"(human|user|assistant|system|model|bot|gpt|im_start|im_end|im_sep|inst|sys|start_header_id|end_header_id|eot_id|"
    r"begin_of_text|start_of_turn|end_of_turn|bos|[\W_])*",
    re.IGNORECASE,
)
"""What may stand between the messages of a transcript without white space."""


@dataclass(frozen=True)
class Split:
    """A prompt that ends before an assistant's turn, and the answers to it, each of which begins with one."""

    prompt: Chat
    answers: list[Chat]


def split(prompt: str | Chat | None, answers: list[Chat], column: str = "prompt") -> Split:
    """Return the prompt and the answers without it.

    Args:
        prompt: the row's prompt, where it has one.
        answers: the two chats of a pair, or one completion.
        column: name of the prompt's column, for errors.

    Raises:
        FormError: the prompt and the chats contradict each other.
        EmptyRow: the chats of a pair share no prompt.
    """
    if not all(answers):
        raise EmptyRow("empty")
    if isinstance(prompt, list) and prompt:
        made = _beside_turns(prompt, answers, column)
    else:
        made = _beside_text(prompt if isinstance(prompt, str) else None, answers, column)
    return Split(without_train(made.prompt), made.answers)


def put_system(system: str | None, messages: Chat) -> Chat:
    """Return the messages behind a system message.

    Raises:
        FormError: they begin with another system message.
    """
    if not system:
        return messages
    if not _system_in(messages):
        return [{"role": "system", "content": system}, *messages]
    own = messages[0]["content"]
    if own.strip() != system.strip():
        raise FormError(
            f"the row has two system messages, {short(own)!r} among its messages and {short(system)!r} beside them: "
            f"remove one, or set `columns: {{system: none}}` to leave the column out"
        )
    return messages


def _beside_text(text: str | None, chats: list[Chat], column: str) -> Split:
    """Chats whose prompt is a text, or that hold the whole prompt themselves."""
    cut = _shared_prompt(chats) if len(chats) > 1 else _prompt_of_one(chats[0], text)
    head = chats[0][:cut]
    said = text is None or _says(head, text)
    if text and not said and all(_is_answer(_without_system(chat)) for chat in chats):
        asked = [*_system_in(head), {"role": "user", "content": text}, *_without_system(head)]
        return Split(asked, _answers(chats, cut))
    if not head or (text and all(message["role"] in SYSTEM for message in head)):
        raise EmptyRow(NO_PROMPT)
    if text and not said:
        raise _contradiction(text, head, column)
    return Split(head, _answers(chats, cut))


def _shared_prompt(chats: list[Chat]) -> int:
    """How many messages of a pair are its prompt: what both begin with, up to the last turn that is not an answer."""
    cut = _shared(*chats)
    while cut and chats[0][cut - 1]["role"] == "assistant":
        cut -= 1
    asked = any(message["role"] not in SYSTEM for message in chats[0][:cut])
    return cut if asked or all(_is_answer(chat[cut:]) for chat in chats) else 0


def _prompt_of_one(chat: Chat, text: str | None) -> int:
    """How many messages of a completion are its prompt: up to the turn that the text repeats, else to the answer."""
    turns = [index for index, message in enumerate(chat) if message["role"] == "user" and _says([message], text or "")]
    if turns:
        return turns[-1] + 1
    return next((index for index, message in enumerate(chat) if message["role"] == "assistant"), len(chat))


def _answers(chats: list[Chat], cut: int) -> list[Chat]:
    """The chats after their prompt. What both say before they differ carries no loss: there is no preference in it."""
    shared = _shared(*chats) if len(chats) > 1 else cut
    if shared >= min(map(len, chats)):
        return [chat[cut:] for chat in chats]
    return [[*map(_without_loss, chat[cut:shared]), *chat[shared:]] for chat in chats]


def _without_loss(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message


def _beside_turns(prompt: Chat, chats: list[Chat], column: str) -> Split:
    """Chats whose prompt is a list of messages, which they may repeat or go on from."""
    system = _one_system([prompt, *chats])
    asked, bare = _without_system(prompt), [_without_system(chat) for chat in chats]
    if all(_is_answer(chat) for chat in bare):
        return Split(system + asked, bare)
    if not asked:
        made = _beside_text(None, bare, column)
        return Split(system + made.prompt, made.answers)
    made = _behind_turns(asked, bare, column)
    return Split(system + made.prompt, made.answers)


def _behind_turns(asked: Chat, chats: list[Chat], column: str) -> Split:
    """Chats that begin with turns that are not answers, none of them a system message."""
    pair = len(chats) > 1
    cut = _shared_prompt(chats) if pair else _prompt_of_one(chats[0], _last(asked))
    head = chats[0][:cut]
    repeated = all(len(chat) > len(asked) and _begins(chat, asked) for chat in chats)
    if repeated and not (pair and _begins(head, asked)):
        return Split(asked, [chat[len(asked) :] for chat in chats])
    if _begins(head, asked) or _begins(head[-len(asked) :], asked):
        return Split(head, _answers(chats, cut))
    if head and asked[-1]["role"] == "assistant":
        return Split(asked + head, _answers(chats, cut))
    raise _contradiction(_last(asked), head or chats[0], column)


def _begins(chat: Chat, start: Chat) -> bool:
    return _shared(chat, start) == len(start)


def _one_system(chats: list[Chat]) -> Chat:
    """The system message of a prompt and its chats, which must not differ; an empty list where none has one."""
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
    """How many messages two chats have in common from their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if not _same(a, b)), min(len(first), len(second)))


def _same(first: Message, second: Message) -> bool:
    """Whether two messages are one, white space around their text and marks of loss aside."""

    def told(message: Message) -> Message:
        kept = {key: value for key, value in message.items() if key != "train"}
        return {**kept, "content": kept["content"].strip()}

    return told(first) == told(second)


def _says(head: Chat, text: str) -> bool:
    """Whether a text is what a user asks in these messages, or all that they say; white space is no difference.

    The whole may be a transcript: between the messages' texts there may be names of roles and a template's marks.
    """
    asked = {_without_space(message["content"]) for message in head if message["role"] == "user"}
    return _without_space(text) in asked or any(_tells(part, text) for part in (head, _without_system(head)))


def _tells(chat: Chat, text: str) -> bool:
    rest, said = _without_space(text), [_without_space(message["content"]) for message in chat]
    for content in filter(None, said):
        marks, found, rest = rest.partition(content)
        if not found or not _MARKS.fullmatch(marks):
            return False
    return any(said) and _MARKS.fullmatch(rest) is not None


def _without_space(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _last(chat: Chat) -> str:
    asked = [str(message["content"]) for message in chat if message["role"] == "user"]
    return (asked or [str(message["content"]) for message in chat] or [""])[-1]


def _contradiction(said: str, head: Chat, column: str) -> FormError:
    return FormError(
        f"`{column}` asks {short(said)!r}, but the row's chats begin with another prompt, which asks "
        f"{short(_last(head))!r}: make them equal, or set `columns: {{prompt: none}}` to take the prompt of the chats"
    )
