"""Execute notebooks with real kernels and store what they print and draw."""

from __future__ import annotations

import os
import re
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbdev.clean import clean_nb

from .notebooks import ROOT, SETTINGS, code_sha, notebooks, read, skipped

SECONDS = 900  # the longest a cell may take, unless slow ones were asked for
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONHASHSEED": "0",
}
KEYS = SETTINGS["allowed_metadata_keys"].split()
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")
REDRAWN = re.compile(r"[^\n]*\r(?!\n)")  # what a progress bar has overwritten


def tidy(text: str) -> str:
    "Text without what changes from run to run or from machine to machine."
    text = ADDRESS.sub("", REDRAWN.sub("", text))
    return text.replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".")


def tidy_outputs(nb: nbformat.NotebookNode) -> None:
    "Apply `tidy` to every textual output; drop ids, timings and counts."
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            if "text" in out:
                out.text = tidy(out.text)
            data = out.get("data", {})
            for mime in data:
                if mime.startswith("text/"):
                    data[mime] = tidy(data[mime])
    clean_nb(nb, allowed_metadata_keys=KEYS)


class Client(NotebookClient):
    "A client that passes over the cells that nobody asked for."

    flags: set[str] = set()

    async def async_execute_cell(self, cell, *args, **kwargs):
        if cell.cell_type == "code" and skipped(cell.source, self.flags):
            return cell  # its stored output stays
        return await super().async_execute_cell(cell, *args, **kwargs)


def _busy() -> float:
    "Seconds of processor time of all kernels that have ended: a busy machine does not change them."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(path: Path, flags: set[str]) -> tuple[float, str]:
    "Run one notebook in place; returns its seconds and its error, if any."
    nb, start, busy = read(path), time.perf_counter(), _busy()
    client = Client(
        nb,
        timeout=None if flags else SECONDS,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.flags = flags
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError, TimeoutError) as error:
        return time.perf_counter() - start, str(error)[-2000:]
    tidy_outputs(nb)
    stored = dict(nb.metadata.get("gfopt", {}))
    more = {} if flags else {"seconds": round(_busy() - busy)}  # of what a reader runs
    nb.metadata["gfopt"] = stored | {"code_sha": code_sha(nb)} | more
    nbformat.write(nb, path)
    return time.perf_counter() - start, ""


def run(paths: list[Path], flags: set[str], jobs: int) -> int:
    "Run notebooks, all of them by default; returns how many failed."
    paths = [p.resolve() for p in paths] or notebooks()
    os.environ.update(ENVIRONMENT)
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), known]))
    failed = 0
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(execute, paths, [flags] * len(paths))
        for path, (seconds, error) in zip(paths, results, strict=True):
            name = path.relative_to(ROOT)
            print(f"{seconds:7.1f} s  {name}  {'FAILED' if error else 'ok'}")
            if error:
                print(error)
                failed += 1
    return failed
