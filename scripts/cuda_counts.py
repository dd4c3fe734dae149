"""Instructions of the GPU's kernels by kind, from their machine code, and what a training step would take by them.

cuda_resources.py prints both. Nothing here is measured: `step_time` is a model, whose assumptions are the constants
below and stand under its table, so that a change of the code shows as a change of numbers before there is a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURE = "90"  # whose code is counted

# Opcodes, up to the first dot, as NVIDIA's CUDA Binary Utilities name them; the first pattern that fits holds.
KINDS = {
    "shared": r"LDS|STS|ATOMS|LDSM",
    "generic": r"LD|ST|ATOM",  # an address of which the compiler does not know what memory it is in
    "global": r"LDG|STG|RED|ATOMG",
    "local": r"LDL|STL",
    "constant": r"U?LDC|LDCU",
    "float64": r"D(ADD|FMA|MUL|SETP)|MUFU64",
    "special": r"MUFU",
    "float32": r"F(ADD|FMA|MUL|SETP|SET|SEL|MNMX|CHK|SWZADD)|F2F|F2I|I2F|I2FP|F2FP|FRND",
    "control": r"BRA|BRX|JMP|JMX|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BMOV|BPT|KILL|NANOSLEEP|YIELD|RPCMOV",
    "barrier": r"BAR|WARPSYNC|MEMBAR|DEPBAR|ERRBAR|CCTL|FENCE",
    "integer": r"",  # all others: integers, predicates, moves, votes
}

# Cycles after which a warp has its next instruction: arithmetic as measured (Hopper: arXiv 2402.13499, Ampere:
# arXiv 2208.11174), of loads half of the latency, since other instructions stand between a load and its use.
CYCLES = {
    "integer": 4.5,
    "float32": 4,
    "float64": 8,
    "special": 12,
    "shared": 15,
    "generic": 20,
    "global": 60,
    "local": 20,
    "constant": 8,
    "control": 10,
    "barrier": 30,
}
WARPS = 8  # of a block: csrc/cuda/force_step_cuda.cu
ISSUED = 4.0  # warp instructions of a multiprocessor in a cycle, at most
# Executions of each instruction of the force kernel by some warp, per atom and step: 2e4 of C5H5, by counting loops.
REPEATS = 0.44
NODES, NODE_TIME = 5, 1.5  # launches of a step in a CUDA graph, µs from one to the next
BATCH, ATOMS = 50, 10  # molecules and their atoms: C5H5
CLOCKS = {"H100": 1.755, "H200": 1.785, "A100": 1.41}  # GHz, boost, SXM; with more multiprocessors than the batch has
_CYCLES_TEXT = ", ".join(f"{kind} {cycles:g}" for kind, cycles in CYCLES.items())
_CLOCKS_TEXT = ", ".join(f"{clock} GHz ({name})" for name, clock in CLOCKS.items())
ASSUMPTIONS = (
    f"Model of a training step on {BATCH} molecules of {ATOMS} atoms, a block each: {NODES} launches of {NODE_TIME} µs "
    f"and, per atom, {REPEATS} executions of every instruction of the force kernel, by {WARPS} warps that wait "
    f"for each of theirs as long as its kind says ({_CYCLES_TEXT} cycles); at {_CLOCKS_TEXT}. Good for a factor of two."
)


@dataclass
class Counts:
    """Instructions of a kernel, with the functions that it calls, as they stand in the code."""

    file: str
    name: str
    kinds: dict[str, int] = field(default_factory=dict)
    aside: int = 0  # besides: in calls for what is rare (`aside` of csrc/cuda/group.h)

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


def kind_of(opcode: str) -> str:
    """What an opcode does, such as FFMA or LDG.E.64."""
    name = opcode.split(".")[0]
    if name == "MUFU" and "64" in opcode:
        return "float64"
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), "integer")


def parse(file: str, sass: str, elf: str = "") -> list[Counts]:
    """The kernels of what `cuobjdump -sass` and `cuobjdump -elf` print; their names are mangled."""
    rare: dict[str, list[range]] = {}  # addresses of the functions that a kernel calls for what is rare
    for start, size, kernel in re.findall(r"(0x\w+)\s+(0x\w+)\s+FUNC\s.*\s\$(\w+)\$\w*5asideI\w*$", elf, re.M):
        rare.setdefault(kernel, []).append(range(int(start, 16), int(start, 16) + int(size, 16)))
    found: list[Counts] = []
    for line in sass.splitlines():
        if start := re.match(r"\s*Function : (\S+)", line):
            found.append(Counts(file, start[1]))
        code = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if not found or not code or code[2] == "NOP":  # these stand behind the end, for alignment
            continue
        kernel = found[-1]
        if any(int(code[1], 16) in addresses for addresses in rare.get(kernel.name, [])):
            kernel.aside += 1
        else:
            kind = kind_of(code[2])
            kernel.kinds[kind] = kernel.kinds.get(kind, 0) + 1
    return found


def count(source: str, obj: Path) -> list[Counts] | None:
    """The kernels of an object; None: there is no cuobjdump (of the CUDA toolkit)."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        return None
    sass, elf = (
        subprocess.run(
            [tool, what, "-arch", f"sm_{ARCHITECTURE}", obj], capture_output=True, text=True, check=True
        ).stdout
        for what in ("-sass", "-elf")
    )
    return parse(source, sass, elf)


def step_time(force: Counts, clock: float) -> float:
    """Microseconds of a training step with this force kernel on a GPU of so many GHz, by the model."""
    cycles = sum(CYCLES[kind] * number for kind, number in force.kinds.items())
    per_instruction = max(cycles / force.total / WARPS, 1 / ISSUED)
    return NODES * NODE_TIME + ATOMS * REPEATS * force.total * per_instruction / clock / 1e3


def text(counts: list[Counts]) -> str:
    """Tables of counts and of the model, as Markdown."""
    kinds = [*KINDS]
    lines = [f"Instructions for sm_{ARCHITECTURE}, by kind; aside: besides, in calls for what is rare:", ""]
    lines += [f"| kernel | all | {' | '.join(kinds)} | aside |", "|---" + "|---:" * (len(kinds) + 2) + "|"]
    for kernel in counts:
        numbers = [kernel.total, *(kernel.kinds.get(kind, 0) for kind in kinds), kernel.aside]
        lines.append(f"| `{kernel.name}` | {' | '.join(map(str, numbers))} |")
    force = [kernel for kernel in counts if re.fullmatch(r"ForceKernel<\w+(, (true|\(bool\)1)){2}>", kernel.name)]
    if force:
        lines += ["", f"| training step, µs | {' | '.join(CLOCKS)} |", "|---" + "|---:" * len(CLOCKS) + "|"]
        for kernel in force:
            times = (f"{step_time(kernel, clock):.0f}" for clock in CLOCKS.values())
            lines.append(f"| `{kernel.name}` | {' | '.join(times)} |")
        lines += ["", ASSUMPTIONS]
    return "\n".join(lines) + "\n"
