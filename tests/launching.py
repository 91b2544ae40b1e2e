"""Programs of several processes in tests: launched as on GPUs, with a time limit of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from openunlearn_nb.internals.launch import config_file

LIMIT = 420  # seconds; the first use of DeepSpeed compiles for one or two minutes


def run(line: list[str], limit: float = LIMIT, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run a program to its end. After `limit` seconds it is ended with all its children, and the test says what it was waiting for."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **env})
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        last = "\n".join([*out.splitlines()[-5:], *err.splitlines()[-15:]])
        raise AssertionError(f"Not done after {limit:g} s: {' '.join(line[-8:])}\nIts last words:\n{last}") from None
    if check:
        assert process.returncode == 0, err[-3000:] + out[-1000:]
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def accelerate(*command: str, config: str = "zero3", processes: int = 2, **how) -> subprocess.CompletedProcess:
    """`accelerate launch` with a shipped configuration; only the precision is the CPU's."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file(config)), "--mixed_precision", "no",
            "--main_process_port", "0", "--num_processes", str(processes), *command]
    return run(line, **how)


def torchrun(*command: str, processes: int = 2, **how) -> subprocess.CompletedProcess:
    """torch's own launcher: several processes without DeepSpeed."""
    return run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command], **how)


def script(folder: Path, text: str) -> str:
    """A Python file with `text`."""
    file = folder / "script.py"
    file.write_text(text)
    return str(file)
