from __future__ import annotations

import pytest

from router.handshake import Expected, identity_of, misfit
from warmkv import versions
from warmkv.v1 import worker_pb2

EXPECTED = Expected("m", b"t")


def hello(**changes: object) -> worker_pb2.WorkerHello:
    scheme = worker_pb2.HashScheme(model_fingerprint=b"f", layout="L", block_size=16, tp_size=1, version=1)
    message = worker_pb2.WorkerHello(protocol_version=versions.NEWEST, model="m", tokenizer_sha256=b"t", scheme=scheme)
    for field, value in changes.items():
        target = message.scheme if field in worker_pb2.HashScheme.DESCRIPTOR.fields_by_name else message
        setattr(target, field, value)
    return message


def test_a_worker_like_the_others_fits() -> None:
    assert misfit(hello(), EXPECTED, None) == ""
    assert misfit(hello(), EXPECTED, identity_of(hello())) == ""
    assert misfit(hello(tokenizer_sha256=b"x"), Expected("m", b""), None) == ""


def test_a_worker_that_stores_other_k_and_v_is_told_which_settings_say_what_blocks_hold() -> None:
    fleet = hello(layout="L2 KVH2 K16 V16 float32 B16")
    problem = misfit(hello(layout="L2 KVH2 K16 V16 float32 B16 int8/row"), EXPECTED, identity_of(fleet))
    assert problem == (
        "its blocks would not be the fleet's: layout='L2 KVH2 K16 V16 float32 B16 int8/row',"
        " and the fleet has layout='L2 KVH2 K16 V16 float32 B16'; start it with the same model folder"
        " and settings (model.dtype, engine.kv_dtype, store.block_size) as the others."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"protocol_version": versions.OLDEST - 1},
            "protocol_version is 1.*install warmkv of the same or the next minor",
        ),
        ({"protocol_version": versions.NEWEST + 1}, "protocol_version is 4.*this router speaks 2 to 3"),
        ({"model": "x"}, "model is 'x'.*model_name"),
        ({"tokenizer_sha256": b"x"}, "tokenizer_sha256.*model_dir"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 32}, "block_size=32.*the fleet has block_size=16"),
        ({"layout": "M"}, "layout='M'"),
        ({"model_fingerprint": b"g"}, "model_fingerprint"),
        ({"canonical": True}, "canonical=True"),
        ({"adapter": b"a"}, "adapter"),
        ({"tp_size": 2}, "tp_size=2"),
    ],
)
def test_a_misfit_is_named_by_its_field_with_a_remedy(changes: dict[str, object], words: str) -> None:
    problem = misfit(hello(**changes), EXPECTED, identity_of(hello()))
    assert __import__("re").search(words, problem), problem
