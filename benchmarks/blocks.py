"""Measurements on a machine that may be taken away at any moment: blocks in order of value, one JSON that grows as they
end."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Found = dict[str, Any]


class Skipped(Exception):
    """Why a block cannot be run here."""


class Block(NamedTuple):
    """Something to measure. `run` returns its result, or yields it as it grows."""

    name: str
    run: Callable[[], Found | Iterator[Found]]
    seconds: float  # that it takes on an H100, roughly; of one that yields, until there is something worth having


class Record:
    """The blocks' results in a JSON file, rewritten whole with each of them. `what`: of which run, which must be the
    file's own."""

    def __init__(self, file: Path, what: Found):
        from openunlearn_nb.internals.errors import OpenUnlearnError
        from openunlearn_nb.evaluation.records import read_json

        self.file, self.what, self.started = file, what, time.time()
        there = read_json(file, "record") if file.exists() else what
        if changed := [k for k in what if there.get(k) != what[k]]:
            of = changed[0]
            raise OpenUnlearnError(
                f"{file} is a record of {of} {there.get(of)!r}, not {what[of]!r}; give another --output."
            )
        self.blocks: dict[str, Found] = there.get("blocks", {})

    def done(self, name: str) -> bool:
        """Whether a block has been measured to its end; one that failed or found no time is tried again."""
        return self.blocks.get(name, {}).keys() >= {"result", "seconds"}

    def put(self, name: str, entry: Found) -> None:
        from openunlearn_nb.evaluation.records import run_record
        from openunlearn_nb.internals.files import write_json

        self.blocks[name] = entry
        write_json(self.file, run_record(self.started, **self.what, blocks=self.blocks))


def free() -> None:
    """Give back the memory of what is not used any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """An error, short enough for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def run_block(block: Block, record: Record, deadline: float) -> Found:
    """Run a block into the record; returns its entry. Whatever goes wrong in it is told there, and ends this block
    alone."""
    entry: Found = {}
    begin = time.monotonic()
    try:
        found = block.run()
        for part in found if isinstance(found, Iterator) else [found]:
            entry = {"result": part}
            if time.monotonic() > deadline:
                entry["unfinished"] = f"time was up after {time.monotonic() - begin:.0f} s"
                break
            if isinstance(found, Iterator) and part != record.blocks.get(block.name, {}).get("result"):
                record.put(
                    block.name, entry | {"unfinished": "cut off"}
                )  # what stands there if this is the last that is written
        if isinstance(found, Iterator):
            found.close()  # ends what it has started
    except Skipped as reason:
        entry["skipped"] = str(reason)
    except Exception as e:  # out of memory, a missing library, a bug: the next block may still work
        entry["failed"] = one_line(e)
    if not entry.keys() & {"skipped", "failed", "unfinished"}:
        entry["seconds"] = round(time.monotonic() - begin, 1)
    record.put(block.name, entry)
    return entry


def run_blocks(blocks: list[Block], record: Record, deadline: float) -> None:
    """Run what is not in the record yet, each block if it can be done by `deadline` (of `time.monotonic`)."""
    for block in blocks:
        if record.done(block.name):
            continue
        left = deadline - time.monotonic()
        if left < block.seconds:
            entry: Found = {"skipped": f"needs about {block.seconds:g} s, and {max(0.0, left):.0f} s were left"}
            if "result" not in record.blocks.get(block.name, {}):  # an earlier call's part is worth more than this
                record.put(block.name, entry)
        else:
            entry = run_block(block, record, deadline)
            free()
        said = next(
            (f"{k}, {entry[k]}" for k in ("skipped", "failed", "unfinished") if k in entry), f"{entry.get('seconds')} s"
        )
        print(f"{block.name}: {said}", file=sys.stderr, flush=True)


def synchronize() -> None:
    """Wait until the GPU has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Measure:
    """Seconds, and the most GPU memory (GB) in them: in tensors, and taken from the card; on a CPU the process's peak
    so far."""

    def __enter__(self):
        import torch

        free()
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error):
        import torch

        from openunlearn_nb.evaluation.records import peak_memory

        synchronize()
        self.seconds = time.perf_counter() - self.started
        most = peak_memory()
        self.memory = {"peak_gb": most.get("gpu", most["host"])}
        if torch.cuda.is_available():
            self.memory["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)


class Steps:
    """The ends of a training's steps: give `self` as its `progress`."""

    def __init__(self):
        self.ends: list[float] = []

    def __call__(self, share: float) -> None:
        synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The median step's, without the first, which warms up."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:]))


def timed(call: Callable[[], Any], repeats: int) -> float:
    """The median of a call's seconds, after one that warms up."""
    call()
    taken = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)
