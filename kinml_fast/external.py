"""Scripts that ORCA and Gaussian call for an energy: they ask the server of `kinml-fast serve` and answer in files.

Only the standard library is imported, so that a call takes the start of Python and not that of PyTorch.

`orca` is for `!ExtOpt` (ORCA 6 manual, "External optimizer"): the first argument names a file with the name of an XYZ
file, charge, multiplicity, cores, whether the gradient is wanted, and maybe a file of point charges, a line each, with
comments behind `#`; the answer is ``NAME.engrad`` beside it. `gaussian` is for the keyword ``External`` (Gaussian 16
manual): layer, input, output, message file and more; formats are given at `read_gaussian` and `write_gaussian`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kinml_fast.errors import ConfigError, DataError, InputError

SOCKET = "KINML_SOCKET"
"""Environment variable with the server's socket."""


def orca(arguments: Sequence[str] | None = None) -> int:
    """The script `kinml-fast-orca`; returns its exit code."""
    parser = _parser("kinml-fast-orca", "Energy and gradient for ORCA's !ExtOpt.")
    parser.add_argument("input", metavar="NAME.extinp.tmp", help="what ORCA has written")
    options = parser.parse_args(arguments)

    def answer() -> None:
        path = Path(options.input)
        request = read_orca(path)
        result = ask(options.socket, request)
        name = path.name.removesuffix(".tmp").removesuffix(".extinp")
        _write(path.with_name(f"{name}.engrad"), write_orca(result))

    return _run(parser.prog, answer)


def gaussian(arguments: Sequence[str] | None = None) -> int:
    """The script `kinml-fast-gaussian`; returns its exit code."""
    parser = _parser("kinml-fast-gaussian", "Energy, gradient and force constants for Gaussian's External.")
    parser.add_argument("layer", help="R (real), M (model) or S (small system) of ONIOM; R otherwise")
    parser.add_argument("input", metavar="InputFile")
    parser.add_argument("output", metavar="OutputFile")
    parser.add_argument("message", metavar="MsgFile", help="what is said here stands in Gaussian's output")
    parser.add_argument("others", metavar="FChkFile MatElFile", nargs="*", help="not used")
    options = parser.parse_args(arguments)

    def answer() -> None:
        request = read_gaussian(Path(options.input))
        result = ask(options.socket, request)
        _write(Path(options.output), write_gaussian(result, request["derivatives"]))

    return _run(parser.prog, answer, Path(options.message))


def ask(path: str | None, request: dict[str, Any]) -> dict[str, Any]:
    """What the server answers: energy, gradient and Hessian in Hartree and Bohr.

    Raises
    ------
    InputError
        There is no server, it has ended, or it refuses the request.
    """
    path = path or os.environ.get(SOCKET)
    if not path:
        raise ConfigError(
            f"no server is named: give --socket or set {SOCKET}, as in kinml-fast serve MODEL --socket FILE"
        )
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
    except OSError as error:
        raise InputError(
            f"{path}: no server answers ({error.strerror or error}): start kinml-fast serve MODEL --socket {path}"
        ) from error
    if not line.endswith(b"\n"):
        raise InputError(f"{path}: the server ended before it answered: see what it has said")
    result: dict[str, Any] = json.loads(line)
    if "error" in result:
        raise DataError(result["error"])
    return result


def read_orca(path: Path) -> dict[str, Any]:
    """The request of an input file of ORCA's.

    Raises
    ------
    DataError
        A file that cannot be read or is not in ORCA's format, or one with point charges.
    """
    lines = [line.split("#")[0].strip() for line in _text(path).splitlines()]
    lines = [line for line in lines if line]
    if len(lines) < 5 or lines[4] not in ("0", "1"):
        raise DataError(
            f"{path}: is no input of ORCA's ExtOpt: five lines are XYZ file, charge, multiplicity, cores, 0 or 1"
        )
    if len(lines) > 5:
        raise DataError(f"{path}: has point charges ({lines[5]}), which the model does not know: leave them out")
    xyz = path.with_name(lines[0]) if not Path(lines[0]).is_absolute() else Path(lines[0])
    rows = _text(xyz).splitlines()
    try:
        n_atoms = int(rows[0])
    except (IndexError, ValueError):
        raise DataError(f"{xyz}: is no XYZ file: its first line is the number of atoms") from None
    atoms = [_atom(xyz, number, row.split(), 1) for number, row in enumerate(rows[2 : 2 + n_atoms], start=3)]
    if len(atoms) != n_atoms:
        raise DataError(f"{xyz}: has {len(atoms)} atoms, but says {n_atoms}: it was cut off")
    return _request(atoms, int(lines[4]), "angstrom")


def write_orca(result: dict[str, Any]) -> str:
    """An .engrad file: number of atoms, energy (Hartree) and gradient (Hartree/Bohr), a number a line."""
    gradient = result.get("gradient", [])
    parts = [
        ("Number of atoms: must match the XYZ", [str(result["atoms"])]),
        ("The current total energy in Eh", [f"{result['energy']:.12f}"]),
    ]
    if gradient:
        parts.append(
            (
                "The current gradient in Eh/bohr: Atom1X, Atom1Y, Atom1Z, Atom2X, etc.",
                [f"{value:.12f}" for value in gradient],
            )
        )
    return "".join(f"#\n# {title}\n#\n" + "\n".join(lines) + "\n" for title, lines in parts)


def read_gaussian(path: Path) -> dict[str, Any]:
    """The request of an input file of Gaussian's.

    Notes
    -----
    First line: atoms, derivatives (0 energy, 1 gradient, 2 force constants), charge, spin (4I10); then for each atom
    atomic number, x, y, z in Bohr, MM charge (I10, 4F20.12), and maybe its MM type; a table of bonds may follow.

    Raises
    ------
    DataError
        A file that cannot be read or is not in this format, or one with MM charges.
    """
    rows = _text(path).splitlines()
    try:
        n_atoms, derivatives, _, _ = (int(rows[0][i : i + 10]) for i in range(0, 40, 10))
    except (IndexError, ValueError):
        raise DataError(
            f"{path}:1: is no input of Gaussian's External: four whole numbers of ten columns come first"
        ) from None
    if derivatives not in (0, 1, 2):
        raise DataError(f"{path}:1: asks for derivatives of order {derivatives}: 0, 1 and 2 are known")
    atoms = []
    for number, row in enumerate(rows[1 : 1 + n_atoms], start=2):
        fields = [row[:10], *(row[i : i + 20] for i in range(10, 90, 20))]
        atoms.append(_atom(path, number, [field.strip() for field in fields], 1))
        charge = fields[4].strip()
        if charge.strip("+-0.") not in ("", "D", "E"):
            raise DataError(f"{path}:{number}: has the MM charge {charge}, which the model does not know: leave it out")
    if len(atoms) != n_atoms:
        raise DataError(f"{path}: has {len(atoms)} atoms, but says {n_atoms}: it was cut off")
    return _request(atoms, derivatives, "bohr")


def write_gaussian(result: dict[str, Any], derivatives: int) -> str:
    """An output file for Gaussian, numbers as D20.12.

    Notes
    -----
    Energy and dipole moment (4D20.12); gradient (3D20.12 for each atom); with force constants also the polarizability
    (2 lines), derivatives of the dipole moment (3 lines for each atom) and the lower triangle of the force constants,
    row after row, three on a line. Dipole moments and polarizabilities, which the model does not know, are zero.
    """
    lines = [[result["energy"], 0.0, 0.0, 0.0]]
    if derivatives > 0:
        lines += _threes(result["gradient"])
    if derivatives > 1:
        lines += [[0.0] * 3] * (2 + 3 * result["atoms"])
        lines += _threes([value for row, values in enumerate(result["hessian"]) for value in values[: row + 1]])
    return "".join("".join(f"{value:20.12E}".replace("E", "D") for value in line) + "\n" for line in lines)


def _threes(values: list[float]) -> list[list[float]]:
    return [values[i : i + 3] for i in range(0, len(values), 3)]


def _atom(path: Path, number: int, fields: list[str], first: int) -> tuple[str, list[float]]:
    """Element, as it is written, and position of a line of atoms."""
    try:
        x, y, z = (float(field.replace("D", "E")) for field in fields[first : first + 3])
        return fields[0], [x, y, z]
    except (IndexError, ValueError):
        raise DataError(f"{path}:{number}: is no line of an atom: expected an element and three numbers") from None


def _request(atoms: list[tuple[str, list[float]]], derivatives: int, length: str) -> dict[str, Any]:
    return {
        "elements": [element for element, _ in atoms],
        "positions": [position for _, position in atoms],
        "length": length,
        "derivatives": derivatives,
    }


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--socket", metavar="FILE", help=f"socket of kinml-fast serve; by default {SOCKET} says it")
    return parser


def _run(prog: str, answer: Callable[[], None], message: Path | None = None) -> int:
    """Answer, or say in a sentence why not."""
    try:
        answer()
    except (InputError, OSError) as error:
        sentence = f"{prog}: {error}\n"
        sys.stderr.write(sentence)
        if message is not None:
            _write(message, sentence)
        return 2
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # also a name with a zero byte, and what is no text
        raise DataError(f"{path}: cannot be read ({error}): name a file that the program wrote") from error


def _write(path: Path, text: str) -> None:
    """Write a file as a whole (`kinml_fast.data.files.replacing` does, but imports too much)."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
