"""Broken files at every way into the program; KINML_MUTANTS=1000 for a long search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_doors import DOORS

MUTANTS = int(os.environ.get("KINML_MUTANTS", "24"))


@pytest.mark.parametrize("door", DOORS)
def test_broken_files_are_refused_in_a_sentence(door):
    program = [sys.executable, Path(__file__).with_name("fuzzing.py"), door, "--mutants", str(MUTANTS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["faults"] == []
    assert figures["tried"] == figures["refused"] + figures["accepted"] == MUTANTS
    assert figures["refused"] > 0
