from __future__ import annotations

import json
import re
import subprocess
import sys
import threading

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from tokenizers import Tokenizer

from tests.deep_constraints import NAMES
from tests.workers.engine_rig import Rig, make_rig, model_folder, prompts, runner
from workers.anteroom import Anteroom
from workers.grammars import ConstraintError, Grammars, source_of
from workers.logits import _unpacked_here, _unpacked_there
from workers.protocol import Constraint, FinishReason, SamplingParams
from workers.row_state import RowState, row_state
from workers.sampler import Row, sample


@pytest.fixture(scope="module")
def rig():
    made = make_rig()
    yield made
    made.close()


def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


def _held_to(rig: Rig, kind: str, text: str, *, count: int = 4, seed: int = 0, **options: object):
    constraint = Constraint(kind, text)
    asked = {"temperature": 1.0, "max_tokens": 200, "constraint": constraint} | options
    return rig.run(*(rig.job(n, prompts(1)[0], seed=seed + n, **asked) for n in range(count)))


_numbers = st.tuples(st.integers(-50, 50), st.integers(0, 500)).map(
    lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
)
_leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    _numbers,
    st.just({"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.5}),
    st.integers(0, 12).map(lambda length: {"type": "string", "maxLength": length}),
    st.just({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"}),
    st.just({"type": "string", "format": "date"}),
    st.lists(st.sampled_from(["a", 'qu"ote', "é", 7, None, True]), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
)
_schemas = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2)).map(
            lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": 3}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
        st.dictionaries(st.sampled_from(["name", "x", "größe"]), inner, min_size=1, max_size=3).map(
            lambda fields: {
                "type": "object",
                "properties": fields,
                "required": sorted(fields)[:2],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=12, deadline=None)
@given(schema=_schemas, seed=st.integers(0, 1000))
def test_what_a_random_model_completes_under_a_schema_is_valid(rig: Rig, schema: dict[str, object], seed: int):
    answers = _held_to(rig, "json_schema", json.dumps(schema), seed=seed)
    for answer in answers:
        assert answer.finish in (FinishReason.STOP, FinishReason.LENGTH), answer.error
        if answer.finish is FinishReason.STOP:
            jsonschema.validate(json.loads(answer.text), schema)
    assert any(answer.finish is FinishReason.STOP for answer in answers)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-c]{2,5}",
        r"(yes|no|maybe)",
        r"\d{3}-\d{4}",
        r"[A-Z][a-z]+ (loves|hates) [0-9]{1,3}\.[0-9]{2}",
        r"(ä|ö|日本){3}",
        r"x*y",
    ],
)
def test_completed_answers_match_the_whole_regex(rig: Rig, pattern: str):
    answers = _held_to(rig, "regex", pattern, count=6)
    done = [answer for answer in answers if answer.finish is FinishReason.STOP]
    assert done
    for answer in done:
        assert re.fullmatch(pattern, answer.text)


def test_a_grammar_in_lark_syntax_is_kept(rig: Rig):
    grammar = 'start: expr\nexpr: NUMBER | "(" expr OP expr ")"\nNUMBER: /[0-9]{1,2}/\nOP: "+" | "*"'
    answers = _held_to(rig, "grammar", grammar, count=8)
    done = [answer.text for answer in answers if answer.finish is FinishReason.STOP]
    assert done
    assert all(isinstance(eval(text.lstrip("0") or "0"), int) for text in done if "(" not in text)
    assert all(text.count("(") == text.count(")") for text in done)


def test_any_object_is_an_object(rig: Rig):
    answers = _held_to(rig, "json_object", "", count=8, max_tokens=400)
    done = [answer for answer in answers if answer.finish is FinishReason.STOP]
    assert all(isinstance(json.loads(answer.text), dict) for answer in done)
    assert done or all(answer.text.startswith("{") for answer in answers)


def test_an_answer_that_is_whole_ends_though_the_model_says_no_end_token(rig: Rig, monkeypatch):
    (answer,) = _held_to(rig, "regex", "yes", count=1, temperature=0.0)
    assert (answer.text, answer.finish) == ("yes", FinishReason.STOP)
    # The end is told with the last token, not one step later.
    assert _tokenizer().decode(answer.token_ids) == "yes"


def test_the_end_token_is_allowed_exactly_when_the_grammar_may_end():
    tokenizer, ends = _tokenizer(), runner().folder.eos_token_ids
    grammars = Grammars(model_folder() / "tokenizer.json", vocab_size=runner().vocab_size, end_tokens=ends)
    progress = grammars.compile(Constraint("regex", "ab(cd)?")).result().begin()
    for character, may_end in zip("abcd", [False, True, False, True], strict=True):
        assert not any(_allows(progress.mask(), end) for end in ends) or progress.may_end
        progress.append(tokenizer.token_to_id(character))
        assert progress.may_end is may_end
        assert all(_allows(progress.mask(), end) is may_end for end in ends)
    assert progress.complete
    grammars.close()


def _allows(mask: bytes, token: int) -> bool:
    return bool(mask[token // 8] >> (token % 8) & 1)


def test_rows_of_the_logits_that_no_token_has_are_never_sampled():
    import torch

    padded = runner().vocab_size + 77
    grammars = Grammars(model_folder() / "tokenizer.json", vocab_size=padded, end_tokens=(0,))
    grammar = grammars.compile(Constraint("regex", "(?s).{1,50}")).result()
    params = SamplingParams(50, temperature=1.0, constraint=Constraint("regex", "(?s).{1,50}"))
    logits = torch.zeros(64, padded)
    logits[:, runner().vocab_size :] = 50.0
    rows = [Row(params, n, RowState(params, [], (), grammar)) for n in range(64)]
    assert all(each.token_id < runner().vocab_size for each in sample(logits, rows))
    grammars.close()


def test_masks_are_unpacked_alike_here_and_on_a_device():
    import numpy as np
    import torch

    packed = np.random.default_rng(0).integers(0, 256, (3, 40), dtype=np.uint8)
    here = _unpacked_here(packed, torch.device("cpu"))
    assert torch.equal(here, _unpacked_there(packed, torch.device("cpu")))
    wanted = [[int(byte) >> bit & 1 for byte in row for bit in range(8)] for row in packed]
    assert here.tolist() == wanted


def test_filters_choose_among_what_is_allowed(rig: Rig):
    for options in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
        answers = _held_to(rig, "regex", "[0-9]{4}", count=3, **options)
        assert all(re.fullmatch("[0-9]{4}", answer.text) for answer in answers)


def test_stop_strings_and_max_tokens_cut_an_answer_short(rig: Rig):
    (stopped,) = _held_to(rig, "regex", "abc+d", count=1, stop=("c",))
    assert (stopped.text, stopped.finish) == ("ab", FinishReason.STOP)
    (full,) = _held_to(rig, "regex", "[a-z]{100}", count=1, max_tokens=3)
    assert (len(full.token_ids), full.finish) == (3, FinishReason.LENGTH)
    # Whole with the last token that is allowed: that is no cut.
    (whole,) = _held_to(rig, "regex", "[0-9]", count=1, max_tokens=1)
    assert whole.finish is FinishReason.STOP


def test_penalties_and_a_constraint_go_together(rig: Rig):
    (answer,) = _held_to(rig, "regex", "[abcdefgh]{8}", count=1, temperature=0.0, frequency_penalty=2.0)
    (plain,) = _held_to(rig, "regex", "[abcdefgh]{8}", count=1, temperature=0.0)
    assert re.fullmatch("[abcdefgh]{8}", answer.text)
    assert len(set(answer.token_ids)) >= len(set(plain.token_ids))


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("grammar", "start: nowhere", "unknown name"),
        ("json_schema", "{", "Expecting property name"),
        ("json_schema", "true", "no JSON object"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
        ("sonnet", "", "there is no constraint"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_that_says_why_and_others_go_on(rig: Rig, kind: str, text: str, words: str):
    bad = rig.job("bad", prompts(1)[0], constraint=Constraint(kind, text))
    good = rig.job("good", prompts(1)[0], max_tokens=5)
    refused, other = rig.run(bad, good)
    assert refused.finish is FinishReason.ERROR
    assert refused.error.reason == "INVALID_CONSTRAINT"
    assert words in refused.error.message
    assert len(other.token_ids) == 5


def test_a_dead_end_is_an_error_and_not_a_wrong_token(rig: Rig):
    # The tokenizer has no such special token.
    (answer,) = _held_to(rig, "grammar", 'start: "a" <|nowhere|>', count=1)
    assert answer.finish is FinishReason.ERROR
    assert answer.error.reason in {"CONSTRAINT_DEAD_END", "INVALID_CONSTRAINT"}


def test_a_constraint_that_takes_long_to_compile_stalls_nobody(monkeypatch):
    rig, gate = make_rig(), threading.Event()
    compile_now = Grammars._compile

    def slowly(self, constraint):
        gate.wait(30)
        return compile_now(self, constraint)

    monkeypatch.setattr(Grammars, "_compile", slowly)
    slow = rig.job("slow", prompts(1)[0], constraint=Constraint("regex", "yes"))
    rig.engine.submit(slow)
    (other,) = [rig.job("other", prompts(2)[1], max_tokens=20)]
    rig.engine.submit(other)
    tokens = 0
    while tokens < 20:
        tokens += sum(len(output.token_ids) for output in rig.engine.step().outputs if output.job_id == "other")
    assert rig.engine.load().waiting == 1
    gate.set()
    answers = rig.collect()
    assert answers["slow"].text == "yes"
    rig.close()


def test_the_load_counts_the_prompts_of_those_that_wait_for_their_grammar(monkeypatch):
    rig, gate = make_rig(), threading.Event()
    monkeypatch.setattr(Grammars, "_compile", lambda self, constraint: gate.wait(30))
    prompt = prompts(1, lengths=[100])[0]
    for number in range(2):
        rig.engine.submit(rig.job(number, prompt, constraint=Constraint("regex", "yes")))
        rig.engine.step()
        rig.engine.step()
    load = rig.engine.load()
    assert (load.running, load.waiting) == (0, 2)
    assert load.pending_prefill_tokens == 100 + 4, "the second one finds what the first will have made"
    for number in range(2):
        rig.engine.cancel(number)
    assert (rig.engine.load().waiting, rig.engine.load().pending_prefill_tokens) == (0, 0)
    gate.set()
    rig.collect()
    rig.close()


def test_one_that_waits_for_its_grammar_can_be_cancelled_and_has_a_deadline_and_a_limit(monkeypatch):
    rig, gate = make_rig(), threading.Event()
    monkeypatch.setattr(Grammars, "_compile", lambda self, constraint: gate.wait(30))
    jobs = {
        name: rig.job(name, prompts(1)[0], constraint=Constraint("regex", name), **options)
        for name, options in {"cancelled": {}, "late": {"deadline": rig.clock() + 5}, "endless": {}}.items()
    }
    for job in jobs.values():
        rig.engine.submit(job)
    rig.engine.step()
    rig.engine.cancel("cancelled")
    assert [each.finish for each in rig.engine.step().outputs] == [FinishReason.CANCELLED]
    rig.clock.ahead_s += 6
    assert [each.finish for each in rig.engine.step().outputs] == [FinishReason.DEADLINE]
    rig.clock.ahead_s += 100
    (output,) = rig.engine.step().outputs
    assert (output.job_id, output.error.reason) == ("endless", "CONSTRAINT_TOO_COMPLEX")
    gate.set()
    rig.assert_nothing_leaked()
    rig.close()


def test_what_was_compiled_is_kept_for_the_next_and_not_without_end(rig: Rig):
    made = rig.engine.grammars.compile(Constraint("regex", "kept"))
    assert rig.engine.grammars.compile(Constraint("regex", "kept")) is made
    for number in range(80):
        rig.engine.grammars.compile(Constraint("regex", f"n{number}")).result()
    assert len(rig.engine.grammars._compiled) == 64
    assert rig.engine.grammars.compile(Constraint("regex", "kept")) is not made


def test_a_preempted_answer_goes_on_in_its_grammar():
    schema = json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 12, "maxItems": 12})
    options = {"max_tokens": 90, "temperature": 1.0, "constraint": Constraint("json_schema", schema)}
    batch = prompts(6, lengths=[60])
    roomy, tight = make_rig(), make_rig(device_blocks=20)
    alone = [roomy.run(roomy.job(n, prompt, seed=n, **options))[0] for n, prompt in enumerate(batch)]
    together = tight.run(*(tight.job(n, prompt, seed=n, **options) for n, prompt in enumerate(batch)))
    assert tight.engine.load().preemptions > 0
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    for each in (roomy, tight):
        each.close()


def test_the_grammars_state_follows_from_the_tokens(rig: Rig):
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    constraint = Constraint("json_schema", schema)
    (answer,) = _held_to(rig, "json_schema", schema, count=1)
    grammar = rig.engine.grammars.compile(constraint).result()
    walked = grammar.begin()
    for cut, token in enumerate(answer.token_ids[:-1]):
        walked.append(token)
        state = row_state(SamplingParams(1, constraint=constraint), prompts(1)[0], answer.token_ids[: cut + 1], grammar)
        replayed = state.grammar
        assert (replayed.mask(), replayed.may_end) == (walked.mask(), walked.may_end)


def test_answers_of_one_grammar_do_not_touch_one_another(rig: Rig):
    grammar = rig.engine.grammars.compile(Constraint("regex", "ab|cd")).result()
    tokenizer, first, second = _tokenizer(), grammar.begin(), grammar.begin()
    first.append(tokenizer.token_to_id("a"))
    second.append(tokenizer.token_to_id("c"))
    assert _allows(first.mask(), tokenizer.token_to_id("b"))
    assert _allows(second.mask(), tokenizer.token_to_id("d"))


def test_a_tokenizer_that_the_library_cannot_read_fails_the_job_and_not_the_worker(monkeypatch, tmp_path):
    rig = make_rig()
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    rig.engine.grammars._file = broken
    bad = rig.job("bad", prompts(1)[0], constraint=Constraint("regex", "yes"))
    refused, other = rig.run(bad, rig.job("good", prompts(1)[0], max_tokens=3))
    assert refused.error.reason == "CONSTRAINT_FAILED"
    assert len(other.token_ids) == 3
    rig.close()


def test_only_sequences_with_a_constraint_wait(rig: Rig):
    room = Anteroom(rig.engine.grammars)
    rig.engine.submit(rig.job("plain", prompts(1)[0], max_tokens=1))
    with pytest.raises(ValueError, match="scheduler"):
        room.add(rig.engine._sequences["plain"])
    rig.collect()


_COMPILE_ALL = """
import sys
from pathlib import Path
from tests.deep_constraints import NAMES, deep
from workers.grammars import ConstraintError, Grammars
from workers.protocol import Constraint

grammars = Grammars(Path(sys.argv[1]), vocab_size=1024, end_tokens=[0])
for name in NAMES:
    print(name, flush=True)
    try:
        progress = grammars.compile(Constraint(*deep(name, 64 << 10))).result().begin()
        for _ in range(8):
            mask = int.from_bytes(progress.mask(), "little")
            if progress.complete or not mask:
                break
            progress.append(mask.bit_length() - 1)
    except ConstraintError as error:
        print("refused:", error, flush=True)
grammars.close()
"""


def test_what_nests_as_deeply_as_its_size_allows_ends_no_worker() -> None:
    """Compiled in the pool's threads, and followed by one with a usual stack, as the engine's is."""
    command = [sys.executable, "-c", _COMPILE_ALL, str(model_folder() / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} {done.stderr[-2000:]}"
    looked = done.stdout.splitlines()
    assert [line for line in looked if not line.startswith("refused:")] == [*NAMES]
    assert sum(line.startswith("refused:") for line in looked) < len(NAMES) * 2 // 3


def test_a_worker_bounds_what_it_compiles_whatever_its_router_let_pass() -> None:
    with pytest.raises(ConstraintError, match="65,536 bytes"):
        source_of(Constraint("regex", "a" * 65_537))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"$ref": "#"}'),
        ("json_schema", '{"anyOf": [{"$ref": "#"}]}'),
        ("grammar", "start: a\na: b\nb: a"),
        ("regex", "a{1000}{1000}"),
    ],
)
def test_what_cannot_be_followed_is_told_in_words(rig: Rig, kind: str, text: str) -> None:
    (answer,) = _held_to(rig, kind, text, count=1)
    assert answer.error is not None
    told = answer.error.message
    assert re.search("lead back to themselves without an end|too many alternatives; use smaller repetitions", told)
    assert "<" not in told
    assert "Bias" not in told


def test_what_is_too_complex_is_given_up_after_a_bounded_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def limits(**bounds: object) -> LLParserLimits:
        made = LLParserLimits(**bounds)  # type: ignore[arg-type]
        given.append(made.initial_lexer_fuel)
        return made

    monkeypatch.setattr("llguidance.LLParserLimits", limits)
    grammars = Grammars(model_folder() / "tokenizer.json", vocab_size=1024, end_tokens=[0])
    words = "|".join(f"word{number}" for number in range(1500))
    assert grammars.compile(Constraint("regex", f"({words})( ({words}))*")).result().begin().mask()
    assert given == [200_000]
    grammars.close()
