"""The model's chat template, rendered as `transformers` would render it, but without importing it.

Covers: loading the template and its variables from a model folder, rendering, and finding where each answer of the
conversation came out (so that its token ids can be spliced in). Does not cover: encoding (`tokenizer`), tools,
documents and non-text content, which the contract does not carry.

The environment is the one that templates in the field are written for: Jinja's immutable sandbox with `trim_blocks`,
`lstrip_blocks` and loop controls, a `tojson` that does not escape HTML, `raise_exception`, `strftime_now`, and the
`generation` tag (which marks answers for training and renders its body unchanged).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.errors import InvalidRequest
from router.model_folder import ModelFolderError, read_json_object

# Named tokens that templates may use as variables.
TOKEN_VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Marks are built from control characters that no encoding's mistakes make: no template touches them, and no tokenizer
# sees them. They are below U+0100, so that a text of most scripts of Europe keeps its one byte a character: wider ones
# double the time. All begin alike, so that a long text is cut at them by one search for a text, which takes a tenth of
# the time of a search for a pattern.
_MARK, _OPEN, _CLOSE, _MARK_END = "\x8d", "\x8f", "\x90", "\x9d"
_MARK_TAIL = re.compile(f"[{_OPEN}{_CLOSE}][0-9]+{_MARK_END}")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, as templates see it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Where one assistant message came out: `rendered[start:end]`.

    Attributes:
        message: its position in the conversation.
        start: where the prompt that asked for it ended. Space that the template sets between that prompt and its answer
        belongs to the answer: the model has said it itself, or there was none.
        end: behind its content.
    """

    message: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: what the template made.
        answers: the assistant messages whose content came out whole (but for space trimmed at its ends), in order.
    """

    text: str
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template with its variables. Rendering is pure but for `strftime_now`, which asks `now`."""

    source: str
    tokens: dict[str, str] = field(default_factory=dict)
    now: Callable[[], datetime] = datetime.now

    def __post_init__(self) -> None:
        """Compile.

        Raises:
            ModelFolderError: the template is no valid Jinja.
        """
        environment = _environment(self.now)
        try:
            object.__setattr__(self, "_compiled", environment.from_string(self.source))
        except jinja2.TemplateSyntaxError as error:
            raise ModelFolderError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}. "
                "Correct chat_template.jinja (or chat_template in tokenizer_config.json) in the model folder."
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        located: Collection[int] | None = None,
    ) -> Rendering:
        """The conversation as one text, and where answers lie in it.

        The template runs once more with each answer between marks; an answer is reported where both marks and the
        whole content came out. A template that looks at an answer's first or last characters may then behave
        differently: such a run does not fit the plain one, and no answer is reported.

        Args:
            located: assistant messages to find; None: all. To find them costs ten times what rendering costs.

        Raises:
            InvalidRequest: no messages, or the template refused them.
        """
        if not messages:
            raise InvalidRequest("the conversation has no messages. Send at least one.", field="input.chat.messages")
        text = self._run(messages, add_generation_prompt)
        wanted = (i for i, message in enumerate(messages) if message.role == "assistant")
        answers = [i for i in wanted if located is None or i in located]
        return Rendering(text, self._answers(text, messages, answers, add_generation_prompt) if answers else ())

    def _answers(
        self, text: str, messages: Sequence[Message], answers: Sequence[int], add_generation_prompt: bool
    ) -> tuple[Answer, ...]:
        marks, whole = _Marks.unused_in(messages), answers
        marked = self._run(marks.around(messages, answers), add_generation_prompt)
        outside = marks.outside(marked, messages, answers)
        if not outside:
            parts = marks.split(marked)
            whole = marks.whole_in(parts, messages)
            if len(whole) < len(answers):
                parts = marks.split(self._run(marks.around(messages, whole), add_generation_prompt))
            outside = _outside_of(parts, len(whole))
        found = _locate(text, outside, [(i, messages[i].content) for i in whole])
        return self._from_their_prompts(text, found, messages)

    def _from_their_prompts(
        self, text: str, answers: Sequence[Answer], messages: Sequence[Message]
    ) -> tuple[Answer, ...]:
        """The answers, beginning where their prompts ended. The first one's prompt is rendered and speaks for all."""
        if not answers or not answers[0].message:
            return tuple(answers)
        first = answers[0]
        try:
            prompt = self._run(messages[: first.message], True)
        except InvalidRequest:  # a template may want the whole conversation; then nothing is known of its prompts
            return tuple(answers)
        gap = text[len(prompt) : first.start] if text.startswith(prompt) else ""
        if not gap.isspace():
            return tuple(answers)
        return tuple(
            Answer(a.message, a.start - len(gap) if text.endswith(gap, 0, a.start) else a.start, a.end) for a in answers
        )

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        compiled: jinja2.Template = self._compiled  # type: ignore[attr-defined]
        try:
            return compiled.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # The template is the model's, the messages are the caller's: whatever it does not take is the caller's.
            raise InvalidRequest(
                f"the model's chat template refused the conversation: {error or type(error).__name__}. "
                "Send the roles, and the order of roles, that the model expects.",
                field="input.chat.messages",
            ) from error


def load_chat_template(folder: Path, *, now: Callable[[], datetime] = datetime.now) -> ChatTemplate | None:
    """The template of a model folder; None when it has none.

    `chat_template.jinja` comes before `chat_template` in tokenizer_config.json, which is a text or a list of
    `{"name", "template"}`, of which `default` is taken.

    Raises:
        ModelFolderError: a file cannot be read, or the template is no valid Jinja.
    """
    config = read_json_object(folder / "tokenizer_config.json", missing_ok=True)
    named = read_json_object(folder / "special_tokens_map.json", missing_ok=True) | config
    tokens = {name: _token_text(named[name]) for name in TOKEN_VARIABLES if named.get(name) is not None}
    file = folder / "chat_template.jinja"
    try:
        source = file.read_text(encoding="utf-8") if file.exists() else _default_of(config.get("chat_template"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{file} cannot be read ({error}). Restore the file.") from error
    return ChatTemplate(source, tokens, now) if source is not None else None


def _default_of(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        value = {item["name"]: item["template"] for item in value if isinstance(item, dict)}
    if isinstance(value, dict) and isinstance(value.get("default"), str):
        return str(value["default"])
    return None


def _token_text(value: object) -> str:
    """A token is written as its text, or as an object with the text as `content`."""
    return str(value["content"]) if isinstance(value, dict) else str(value)


@dataclass(frozen=True, slots=True)
class _Marks:
    """Texts that occur in no message, one pair a message."""

    salt: int

    @classmethod
    def unused_in(cls, messages: Sequence[Message]) -> _Marks:
        salt = 0
        texts = [message.content for message in messages if _MARK in message.content]
        while any(f"{_MARK}{salt}" in text for text in texts):
            salt += 1
        return cls(salt)

    def open(self, message: int) -> str:
        return f"{_MARK}{self.salt}.{_OPEN}{message}{_MARK_END}"

    def close(self, message: int) -> str:
        return f"{_MARK}{self.salt}.{_CLOSE}{message}{_MARK_END}"

    def around(self, messages: Sequence[Message], answers: Sequence[int]) -> list[Message]:
        """The messages, those at `answers` between their marks."""
        chosen = set(answers)
        return [
            Message(message.role, self.open(i) + message.content + self.close(i)) if i in chosen else message
            for i, message in enumerate(messages)
        ]

    def outside(self, marked: str, messages: Sequence[Message], answers: Sequence[int]) -> Sequence[str]:
        """The texts before, between and after the answers; empty unless all came out whole and in order.

        Contents are compared where they lie: to cut them out first takes three times as long. What stands in the texts
        besides, marks of a content that came out twice say, does not fit the plain run.
        """
        texts, at = [], 0
        for i in answers:
            before, mark, _ = marked[at : marked.find(_MARK_END, at) + 1].partition(self.open(i))
            start = at + len(before) + len(mark)
            content, close = messages[i].content, self.close(i)
            if not mark or not _stands(marked, start, content, close):
                return ()
            texts.append(before)
            at = start + len(content) + len(close)
        return [*texts, marked[at:]]

    def whole_in(self, parts: Sequence[str], messages: Sequence[Message]) -> list[int]:
        """Which messages came out once, in order, between their marks and unchanged. `parts`: as `split` gives them."""
        found = list[int]()
        for before, content, after in zip(parts[1::2], parts[2::2], parts[3::2], strict=False):
            i = int(before.partition(".")[2][1:-1])
            if (before, content, after) == (self.open(i), messages[i].content, self.close(i)):
                found.append(i)
        return found if found == sorted(set(found)) else []

    def split(self, marked: str) -> list[str]:
        """Texts and marks, alternating, a text first and last. One pass, however many messages there are."""
        first, *rest = marked.split(_MARK)
        parts, head = [first], f"{self.salt}."
        for piece in rest:
            if piece.startswith(head) and (tail := _MARK_TAIL.match(piece, len(head))):
                parts += [_MARK + piece[: tail.end()], piece[tail.end() :]]
            else:
                parts[-1] += _MARK + piece
        return parts


def _outside_of(parts: Sequence[str], answers: int) -> Sequence[str]:
    """The texts before, between and after so many marked contents; empty when there are other marks besides."""
    return parts[::4] if len(parts) == 4 * answers + 1 else []


def _locate(text: str, outside: Sequence[str], contents: Sequence[tuple[int, str]]) -> tuple[Answer, ...]:
    """Positions in `text` of the contents that stand between the texts of `outside`; empty when they do not fit."""
    answers, position = [], 0
    if not outside or not text.startswith(outside[0]):
        return ()
    for before, after, (message, content) in zip(outside, outside[1:], contents, strict=False):
        start = position + len(before)
        kept = next((c for c in _trimmings(content) if _stands(text, start, c, after)), None)
        if kept is None:
            return ()
        position = start + len(kept)
        answers.append(Answer(message, start, position))
    return tuple(answers) if position + len(outside[-1]) == len(text) else ()


def _stands(text: str, start: int, content: str, after: str) -> bool:
    return text.startswith(content, start) and text.startswith(after, start + len(content))


def _trimmings(content: str) -> Iterator[str]:
    """What templates make of a content that they keep."""
    yield content
    yield content.strip()
    yield content.lstrip()
    yield content.rstrip()


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: the body, as it is."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that Jinja's Extension declares

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
