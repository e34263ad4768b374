"""Generates the Python stubs of `proto/`, and checks that the ones in the tree are what the .proto files say.

The generator is pinned (see pyproject.toml): stubs made by a newer one refuse to load under protobuf 6.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "proto"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(into: Path) -> None:
    """Write the stubs of every .proto file into the folder `into`.

    Raises:
        RuntimeError: the compiler refused a file; it has printed why.
    """
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    includes = [f"--proto_path={ROOT}", f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}"]
    outputs = [f"--{kind}_out={into}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    # The plugins lie beside the interpreter, which need not be on PATH.
    folder = Path(sys.executable).parent
    plugins = [f"--plugin=protoc-gen-{kind}={folder / f'protoc-gen-{kind}'}" for kind in ("mypy", "mypy_grpc")]
    if protoc.main(["protoc", *includes, *plugins, *outputs, *sources]):
        raise RuntimeError("protoc failed")


def stale(fresh: Path) -> list[str]:
    """Names of stubs in the tree that differ from those in the folder `fresh`."""
    wanted = {path.relative_to(fresh): path.read_bytes() for path in fresh.rglob("*_pb2*.py*")}
    present = {path.relative_to(ROOT): path.read_bytes() for path in ROOT.rglob("*_pb2*.py*") if path.suffix != ".pyc"}
    return sorted(str(name) for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))


def main() -> int:
    """Regenerate, or with --check only compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a stub is stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        names = stale(Path(folder))
    for name in names:
        sys.stderr.write(f"proto/{name} is not what the .proto file says; run: make proto\n")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
