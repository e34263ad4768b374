"""A conversation that remembers its answers by their token ids, so that the next turn finds their blocks exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, Unpack

from warmkv.requests import ChatMessage, GenerateOptions
from warmkv.stream import Generation

S_co = TypeVar("S_co", bound=Generation, covariant=True)


class Generate(Protocol[S_co]):
    """Starts a generation, and calls `on_complete` when its whole answer has come."""

    def __call__(self, text: None, on_complete: Callable[[Generation], None], options: GenerateOptions) -> S_co:
        """The running generation."""
        ...


class Chat(Generic[S_co]):
    """A conversation. `Client.chat` and `AsyncClient.chat` make it.

    Attributes:
        messages: the turns so far. A turn enters when its answer is complete: one that failed or was cancelled leaves
        no trace, and may be sent again.
    """

    def __init__(self, generate: Generate[S_co], system: str | None, options: GenerateOptions) -> None:
        self.messages = [ChatMessage("system", system)] if system else []
        self._generate = generate
        self._options = options
        self._running: Generation | None = None

    def send(self, text: str, **options: Unpack[GenerateOptions]) -> S_co:
        """Say something; the stream of the answer. Options given here come before those of the conversation.

        Raises:
            RuntimeError: the answer before this one has not been read to its end.
            TypeError: several answers were asked for, of which it could go on from one only.
        """
        if {**self._options, **options}.get("n", 1) != 1:
            raise TypeError("a chat goes on from one answer; leave n out, or use generate(messages=...).")
        if self._running is not None and not self._running.done:
            raise RuntimeError("the last answer has not been read to its end. Read it, or cancel it.")
        question = ChatMessage("user", text)

        def remember(answer: Generation) -> None:
            self.messages += [question, ChatMessage("assistant", answer.text, tuple(answer.token_ids))]

        turn: GenerateOptions = {**self._options, **options, "messages": [*self.messages, question]}
        self._running = stream = self._generate(None, remember, turn)
        return stream
