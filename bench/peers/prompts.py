"""Prompts as text and as token ids, one id for every four characters, and the sessions that grow them. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from bench.peers.service import CHARS_PER_TOKEN

VOCABULARY = 2048
_LETTERS = "abcdefghijklmnopqrstuvwxyz "


def _word(number: int) -> str:
    letters = ""
    for _ in range(CHARS_PER_TOKEN):
        number, rest = divmod(number, len(_LETTERS))
        letters += _LETTERS[rest]
    return letters


_WORDS = [_word(number) for number in range(VOCABULARY)]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The same prompt for both kinds of clients: `len(text) == 4 * len(token_ids)`."""

    text: str
    token_ids: tuple[int, ...]

    def __add__(self, other: Prompt) -> Prompt:
        return Prompt(self.text + other.text, self.token_ids + other.token_ids)


def prompt_of(token_ids: tuple[int, ...]) -> Prompt:
    """The prompt of these ids, each below `VOCABULARY`."""
    return Prompt("".join(_WORDS[number] for number in token_ids), token_ids)


def random_prompt(tokens: int, seed: str) -> Prompt:
    """The same for the same seed."""
    return prompt_of(tuple(random.Random(seed).choices(range(VOCABULARY), k=tokens)))


@dataclass(frozen=True, slots=True)
class Shape:
    """A workload of growing sessions.

    Attributes:
        groups: different system prompts; session i has the one of group i modulo groups. sessions: how many.
        turns: prompts a session, each the one before with `turn_tokens` more. system_tokens: of each system prompt.
        concurrency: sessions at a time. think_s: pause after each answer. seed: makes other texts.
    """

    groups: int
    sessions: int
    concurrency: int
    turns: int = 6
    system_tokens: int = 1000
    turn_tokens: int = 200
    think_s: float = 0.05
    seed: int = 0

    def session(self, number: int) -> Iterator[Prompt]:
        """Its prompts, in order."""
        prompt = random_prompt(self.system_tokens, f"{self.seed} system {number % self.groups}")
        for turn in range(self.turns):
            prompt += random_prompt(self.turn_tokens, f"{self.seed} session {number} turn {turn}")
            yield prompt


def unique_prompts(count: int, tokens: int) -> Iterator[Prompt]:
    """Prompts that share no block: each begins with a number of its own. Cheap to make."""
    body = random_prompt(4 * tokens, "body")
    rng = random.Random("unique")
    for number in range(count):
        digits = (number // VOCABULARY**2 % VOCABULARY, number // VOCABULARY % VOCABULARY, number % VOCABULARY)
        start = rng.randrange(3 * tokens)
        end = start + tokens - len(digits)
        head = prompt_of(digits)
        text = body.text[start * CHARS_PER_TOKEN : end * CHARS_PER_TOKEN]
        yield Prompt(head.text + text, digits + body.token_ids[start:end])
