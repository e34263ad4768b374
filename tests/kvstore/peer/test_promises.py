"""What a maker owes to those who wait for its chains: until they have stopped asking."""

from __future__ import annotations

import threading

from kvstore.blocks import BlockHash
from kvstore.peer.promises import FIRST_QUESTION_S, SILENCE_S, PromiseBoard, PromiseState
from tests.kvstore.blocks_for_tests import ManualClock

TICKET, OTHER = BlockHash(b"t" * 32), BlockHash(b"o" * 32)


def made(board: PromiseBoard, blocks: int = 3) -> None:
    board.begin(TICKET)
    if blocks:
        board.made(TICKET, blocks, found=0)
    board.end(TICKET)


def ask(board: PromiseBoard, ticket: BlockHash = TICKET, timeout_s: float = 0.0) -> PromiseState:
    (progress,) = board.wait([ticket], [(-1, -1)], timeout_s)
    return progress.state


def test_nothing_is_owed_where_nothing_was_promised_and_all_while_it_is_made() -> None:
    board = PromiseBoard(ManualClock())
    assert not board.is_owed()
    board.begin(TICKET)
    assert board.is_owed()


def test_a_reader_has_a_moment_to_ask_for_the_first_time() -> None:
    clock = ManualClock()
    board = PromiseBoard(clock)
    made(board)
    clock.now += FIRST_QUESTION_S * 0.9
    assert board.is_owed()
    clock.now += FIRST_QUESTION_S * 0.2
    assert not board.is_owed()


def test_it_is_owed_for_as_long_as_somebody_asks_and_no_longer() -> None:
    clock = ManualClock()
    board = PromiseBoard(clock)
    made(board)
    for _ in range(100):
        assert ask(board) is PromiseState.ENDED
        clock.now += SILENCE_S * 0.9
        assert board.is_owed()
    clock.now += SILENCE_S * 0.2
    assert not board.is_owed()


def test_who_has_read_while_it_was_made_is_not_waited_for() -> None:
    clock = ManualClock()
    board = PromiseBoard(clock)
    board.begin(TICKET)
    board.made(TICKET, 3, found=0)
    ask(board)
    board.end(TICKET)
    clock.now += SILENCE_S * 1.1
    assert not board.is_owed()


def test_what_is_asked_about_with_patience_is_owed_meanwhile() -> None:
    clock = ManualClock()
    board = PromiseBoard(clock)
    made(board)
    waiting = threading.Thread(target=lambda: board.wait([TICKET], [(int(PromiseState.ENDED), 3)], 10.0))
    waiting.start()
    while not board._ended[TICKET].wanted_until >= clock.now + 10:
        pass
    clock.now += 10
    assert board.is_owed()
    board.close()
    waiting.join()


def test_a_chain_of_which_nothing_was_made_and_one_of_others_are_not_owed() -> None:
    board = PromiseBoard(ManualClock())
    made(board, blocks=0)
    ask(board)
    assert ask(board, OTHER) is PromiseState.UNKNOWN
    assert not board.is_owed()
