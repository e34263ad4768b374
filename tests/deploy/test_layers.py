"""Defaults, file, environment and flags: who wins, who is named, and how mistakes are answered."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.layers import Origin, SettingsProblem, known_keys, load_settings, parse_assignments
from kvstore.redis.address import mask_url


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "warmkv.toml"
    path.write_text('[store]\nhost_bytes = "1MiB"\ndevice_bytes = "1MiB"\n[workers]\ncount = 2\n')
    return path


def test_each_layer_beats_those_before_it_and_is_named(toml: Path) -> None:
    loaded = load_settings(
        file=toml,
        environ={"WARMKV_STORE__HOST_BYTES": "2MiB", "WARMKV_WORKERS__COUNT": "3"},
        flags={"workers.count": 4, "workers.cpus": None},
    )
    assert loaded.settings.store.device_bytes == 1 << 20
    assert loaded.settings.store.host_bytes == 2 << 20
    assert loaded.settings.workers.count == 4
    origins = {row.key: row.origin for row in loaded.rows()}
    assert origins["store.device_bytes"] is Origin.FILE
    assert origins["store.host_bytes"] is Origin.ENV
    assert origins["workers.count"] is Origin.FLAG
    assert origins["workers.cpus"] is Origin.DEFAULT


@given(st.sets(st.sampled_from([Origin.FILE, Origin.ENV, Origin.FLAG])))
def test_the_last_layer_that_sets_a_value_wins(tmp_path_factory: pytest.TempPathFactory, layers: set[Origin]) -> None:
    path = tmp_path_factory.mktemp("c") / "c.toml"
    path.write_text("[workers]\ncount = 11\n" if Origin.FILE in layers else "")
    loaded = load_settings(
        file=path,
        environ={"WARMKV_WORKERS__COUNT": "12"} if Origin.ENV in layers else {},
        flags={"workers.count": 13} if Origin.FLAG in layers else {},
    )
    order = [Origin.FLAG, Origin.ENV, Origin.FILE]
    winner = next((origin for origin in order if origin in layers), Origin.DEFAULT)
    assert loaded.origin("workers.count") is winner
    assert (
        loaded.settings.workers.count
        == {
            Origin.FLAG: 13,
            Origin.ENV: 12,
            Origin.FILE: 11,
            Origin.DEFAULT: 1,
        }[winner]
    )


@pytest.mark.parametrize(
    ("environ", "flags", "said"),
    [
        ({"WARMKV_STORE__HOST_BITES": "1"}, {}, "store.host_bites (set by env); did you mean store.host_bytes?"),
        ({"WARMKV_STROE__HOST_BYTES": "1"}, {}, "WARMKV_STROE__HOST_BYTES"),
        ({}, {"worker.count": 1}, "there is no setting worker (set by flag)"),
        ({}, {"redis.urll": "x"}, "did you mean redis.url?"),
        ({}, {"store.host_bytes": "12XB"}, "write it like 512MiB"),
        ({}, {"workers.count": -1}, "workers.count"),
        ({}, {"router.grpc_port": 70000}, "router.grpc_port"),
        ({}, {"workers.engine": "tf"}, "'torch' or 'simulated'"),
        ({"WARMKV_ROUTER__WEIGHTS": "{"}, {}, "JSON"),
        ({}, {"router.weights": "{load 2}"}, "TOML"),
    ],
)
def test_a_mistake_is_answered_with_the_setting_and_the_remedy(
    environ: dict[str, str], flags: dict[str, object], said: str
) -> None:
    with pytest.raises(SettingsProblem) as caught:
        load_settings(environ=environ, flags=flags)
    assert said in str(caught.value)


def test_an_unknown_key_in_a_file_names_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "warmkv.toml"
    path.write_text("[store]\nhost_byte = 1\n")
    with pytest.raises(SettingsProblem, match=r"store\.host_byte .*warmkv\.toml.*did you mean store\.host_bytes"):
        load_settings(file=path, environ={})


@pytest.mark.parametrize("content", ["[store", "\xff"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "warmkv.toml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(SettingsProblem, match=r"warmkv\.toml is not valid TOML"):
        load_settings(file=path, environ={})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsProblem, match="is no file"):
        load_settings(file=tmp_path / "no.toml", environ={})


def test_variables_of_the_command_line_are_no_settings() -> None:
    loaded = load_settings(environ={"WARMKV_ROUTER": "h:1", "WARMKV_API_KEY": "k", "WARMKV_STATE_DIR": "/x"})
    assert all(row.origin is Origin.DEFAULT for row in loaded.rows())


def test_no_secret_is_shown() -> None:
    flags: dict[str, object] = {"redis.url": "rediss://me:hunter2@h:1/0", "auth.fleet_secret": "hunter2"}
    loaded = load_settings(environ={}, flags=flags)
    rows = {row.key: row.value for row in loaded.rows()}
    assert rows["redis.url"] == "rediss://***@h:1/0"
    assert rows["auth.fleet_secret"] == "***"
    assert "hunter2" not in repr(loaded)


def test_a_wrong_secret_is_not_repeated_in_its_error() -> None:
    with pytest.raises(SettingsProblem) as caught:
        load_settings(environ={}, flags={"redis.url": "http://me:hunter2@h"})
    assert "hunter2" not in str(caught.value)
    assert "redis://" in str(caught.value)


@pytest.mark.parametrize("text", ["no-equals", "nodot=1"])
def test_an_assignment_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(SettingsProblem, match=r"section\.field=value"):
        parse_assignments([text])


def test_assignments_keep_what_follows_the_first_equals_sign() -> None:
    assert parse_assignments(["redis.url=redis://h?a=b"]) == {"redis.url": "redis://h?a=b"}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:p%40x@h:1/0", "redis://***@h:1/0"),
        ("redis+sentinel://h:1/m?sentinel_password=pw", "redis+sentinel://h:1/m?sentinel_password=***"),
        ("unix://:pw@/tmp/s.sock", "unix://***@/tmp/s.sock"),
        ("redis://u@h", "redis://***@h"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert mask_url(url) == shown


def test_every_key_can_be_set_by_a_variable() -> None:
    assert "store.host_bytes" in known_keys()
    unknown = [key for key in known_keys() if "there is no setting" in _answer_to(key)]
    assert unknown == []


def _answer_to(key: str) -> str:
    try:
        load_settings(environ={"WARMKV_" + key.replace(".", "__").upper(): "\x00 surely wrong"})
    except SettingsProblem as problem:
        return str(problem)
    return ""
