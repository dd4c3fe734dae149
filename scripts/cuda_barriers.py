"""Leaves out each barrier of the GPU's kernels in turn, and lists those whose absence nothing notices.

    python scripts/cuda_barriers.py [cuda_adam cuda_networks ...]   which programs of tests/cpp; all without

Every lane is a thread here (csrc/cuda/group_threads.h), under the thread sanitizer: what needs a barrier shows as a
data race, as wrong numbers, or as a program that does not end. A barrier whose absence nothing notices is superfluous
(that of the last step of a kernel is) or not tested. The programs are those of `ctest -R threads`, built in
KINML_BUILD_DIR or build/cmake; each is run once for each step that it calls, until the first fault. Prints a table in
Markdown.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cmake_build
from cmake_build import ROOT

# What ctest runs: tests/cpp/CMakeLists.txt.
SIZES = {"cuda_adam": "few", "cuda_aev": "few", "cuda_force_step": "few", "cuda_networks": "small"}


def run(program: Path, size: str, limit: float, **environment: str) -> str:
    """What a program says when it runs so: nothing, or how it failed."""
    options = {"KINML_SHORT_TESTS": "1", "OMP_NUM_THREADS": "1", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    try:
        done = subprocess.run(
            [program, size], env={**os.environ, **options, **environment}, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return ""
    if "data race" in done.stderr:
        return "data race"
    failed = re.search(r"(\d+) failed", done.stdout)
    return f"{failed[1]} wrong numbers" if failed else f"ends with {done.returncode}"


def steps(program: Path, size: str) -> tuple[list[str], float]:
    """Where the steps are that a program calls, FILE:LINE, and how many seconds it takes."""
    with tempfile.NamedTemporaryFile() as listed:
        started = time.monotonic()
        if fault := run(program, size, 3600, KINML_BARRIERS=listed.name):
            raise SystemExit(f"{program.name} {size} fails with all of its barriers: {fault}")
        seconds = time.monotonic() - started
        found = Path(listed.name).read_text().split()
    return sorted(found, key=lambda site: (site.split(":")[0], int(site.split(":")[1]))), seconds


def source_line(site: str) -> str:
    """The line of a step, for a table."""
    name, line = site.split(":")
    text = (ROOT / "csrc" / "cuda" / name).read_text().splitlines()[int(line) - 1].strip()
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", help="cuda_adam, cuda_aev, ...")
    options = parser.parse_args()
    noticed: dict[str, str] = {}
    for name in options.programs or SIZES:
        program = cmake_build.build_folder() / "tests" / "cpp" / f"test_{name}_threads"
        if not program.is_file():
            raise SystemExit(f"{program} is not there: build it with cmake --build {cmake_build.build_folder()}")
        found, seconds = steps(program, SIZES[name])
        sys.stderr.write(f"{name}: {len(found)} steps, {seconds:.0f} s\n")
        for site in found:
            if noticed.get(site):
                continue  # by another program
            noticed[site] = run(program, SIZES[name], 60 + 5 * seconds, KINML_WITHOUT_BARRIER=site)
            sys.stderr.write(f"{site}: {noticed[site] or 'nothing'}\n")
    sys.stdout.write("| step | its barrier's absence shows as | |\n|---|---|---|\n")
    for site in sorted(noticed, key=lambda site: (site.split(":")[0], int(site.split(":")[1]))):
        sys.stdout.write(f"| {site} | {noticed[site] or '**nothing**'} | `{source_line(site)}` |\n")
    silent = sum(not fault for fault in noticed.values())
    sys.stdout.write(f"\n{len(noticed)} barriers, of which {silent} can be left out without notice\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
