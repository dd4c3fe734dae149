"""The server, and what ORCA and Gaussian write and read."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units

from kinml_fast import KinMLCalculator, cli, external
from kinml_fast.deploy import model_file, server
from kinml_fast.errors import ConfigError
from kinml_fast.nn import AEVParameters, EnergyModel

WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]])


@pytest.fixture(scope="module")
def model() -> EnergyModel:
    torch.manual_seed(0)
    found = EnergyModel(AEVParameters.aevmod(("H", "O"), 8, 4, 4), [8, 4, 1], ["gaussian", "tanh", "identity"])
    found.sae.copy_(torch.tensor([-13.0, -2000.0]))
    return found


@pytest.fixture
def listening(model, tmp_path, monkeypatch) -> Iterator[Path]:
    """The socket of a server in another thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(external.SOCKET, "s")
    with server.listening(KinMLCalculator(model), "s") as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Path("s")
        running.shutdown()
        thread.join()
    assert not Path("s").exists()


@pytest.fixture
def expected(model) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, gradient and Hessian of water in Hartree and Bohr."""
    calculator, atoms = KinMLCalculator(model), Atoms("OH2", WATER)
    return (
        calculator.get_potential_energy(atoms) / units.Hartree,
        -calculator.get_forces(atoms) * units.Bohr / units.Hartree,
        calculator.get_hessian(atoms) * units.Bohr**2 / units.Hartree,
    )


def write_orca(gradient: int = 1, more: str = "", atoms: int = 3) -> None:
    """What ORCA 6 writes for `!ExtOpt` in a calculation that is called water."""
    lines = [f"{s} {x:.12f} {y:.12f} {z:.12f}" for s, (x, y, z) in zip("OHH", WATER, strict=True)]
    Path("water_EXT.xyz").write_text(f"{atoms}\nwater\n" + "\n".join(lines) + "\n")
    Path("water_EXT.extinp.tmp").write_text(
        "water_EXT.xyz # xyz filename: string, ending in '.xyz'\n0 # charge: integer\n1 # multiplicity: positive "
        f"integer\n1 # NCores: positive integer\n{gradient} # do gradient: 0 or 1\n{more}"
    )


def write_gaussian(derivatives: int = 1, charge: float = 0.0) -> None:
    """What Gaussian 16 writes for `External`."""
    lines = [f"{3:10d}{derivatives:10d}{0:10d}{1:10d}"]
    for number, position in zip((8, 1, 1), WATER / units.Bohr, strict=True):
        lines.append(f"{number:10d}" + "".join(f"{x:20.12f}" for x in (*position, charge)) + "          ")
    Path("in").write_text("\n".join(lines) + "\n")


@pytest.mark.usefixtures("listening")
def test_orca_gets_energy_and_gradient(expected):
    write_orca()
    assert external.orca(["water_EXT.extinp.tmp"]) == 0
    values = [line for line in Path("water_EXT.engrad").read_text().splitlines() if not line.startswith("#")]
    assert values[0] == "3"
    assert float(values[1]) == pytest.approx(expected[0], abs=1e-12)
    np.testing.assert_allclose([float(value) for value in values[2:]], expected[1].reshape(-1), rtol=0, atol=1e-11)
    write_orca(gradient=0)
    assert external.orca(["water_EXT.extinp.tmp"]) == 0
    assert "gradient" not in Path("water_EXT.engrad").read_text()


def numbers(line: str) -> list[float]:
    """The numbers of a line in Fortran's format nD20.12."""
    assert len(line) % 20 == 0
    return [float(line[i : i + 20].replace("D", "E")) for i in range(0, len(line), 20)]


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("derivatives", [0, 1, 2])
def test_gaussian_gets_energy_gradient_and_force_constants(expected, derivatives):
    write_gaussian(derivatives)
    assert external.gaussian(["R", "in", "out", "message", "fchk", "matel"]) == 0
    lines = [numbers(line) for line in Path("out").read_text().splitlines()]
    assert len(lines) == [1, 4, 4 + 2 + 9 + 15][derivatives]
    assert lines[0] == [pytest.approx(expected[0], rel=1e-12), 0, 0, 0]
    if derivatives > 0:
        np.testing.assert_allclose(lines[1:4], expected[1], rtol=0, atol=1e-11)
    if derivatives > 1:
        assert not np.any(lines[4:15])
        triangle = expected[2][np.tril_indices(9)]
        np.testing.assert_allclose(np.concatenate(lines[15:]), triangle, rtol=0, atol=1e-10)
    assert not Path("message").exists()


@pytest.mark.usefixtures("listening")
def test_orca_is_told_what_is_wrong(capsys):
    def sentence(*arguments: str) -> str:
        assert external.orca(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert not Path("water_EXT.engrad").exists()
        return said

    name = "water_EXT.extinp.tmp"
    assert "cannot be read" in sentence(name)
    write_orca(more="charges.pc # point charges\n")
    assert "has point charges (charges.pc)" in sentence(name)
    write_orca(atoms=4)
    assert "has 3 atoms, but says 4" in sentence(name)
    write_orca()
    assert "no server answers" in sentence("--socket", "elsewhere", name)
    xyz = Path("water_EXT.xyz")
    xyz.write_text(xyz.read_text().replace("O ", "N "))
    assert "contains N, but the model knows only H O" in sentence(name)
    xyz.write_text(xyz.read_text().replace("N ", "Xq "))
    assert "a request cannot be used" in sentence(name)
    xyz.write_text("3\n\nO 0 0 zero\n")
    assert "water_EXT.xyz:3: is no line of an atom" in sentence(name)
    xyz.write_text("3\n\nO nan 0 0\nH 0 0 1\nH 1 0 0\n")
    assert "NaN" in sentence(name)
    xyz.write_text("water\n")
    assert "is no XYZ file" in sentence(name)
    Path(name).write_text("water_EXT.xyz\n0\n1\n1\n2\n")
    assert "is no input of ORCA's ExtOpt" in sentence(name)


@pytest.mark.usefixtures("listening")
def test_gaussian_is_told_what_is_wrong(monkeypatch):
    def sentence() -> str:
        assert external.gaussian(["R", "in", "out", "message", "fchk", "matel"]) == 2
        assert not Path("out").exists()
        return Path("message").read_text()

    write_gaussian(charge=0.25)
    assert "in:2: has the MM charge 0.250000000000" in sentence()
    write_gaussian(3)
    assert "in:1: asks for derivatives of order 3" in sentence()
    Path("in").write_text("water\n")
    assert "in:1: is no input of Gaussian's External" in sentence()
    write_gaussian()
    Path("in").write_text("\n".join(Path("in").read_text().splitlines()[:3]))
    assert "has 2 atoms, but says 3" in sentence()
    monkeypatch.delenv(external.SOCKET)
    write_gaussian()
    assert "no server is named" in sentence()


def test_the_server_answers_on_after_nonsense_and_failures(listening, model, monkeypatch):
    for line in (b"nonsense\n", b"[]\n", b'{"elements": [], "positions": [], "length": "bohr", "derivatives": 0}\n'):
        assert "a request cannot be used" in server.answer(KinMLCalculator(model), line)["error"]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("s")  # and goes without a request
    write_orca()
    request = external.read_orca(Path("water_EXT.extinp.tmp"))
    energy = external.ask(None, request)["energy"]

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(KinMLCalculator, "get_property", fails)
        with pytest.raises(ValueError, match=r"the server failed .RuntimeError: out of order"):
            external.ask(None, request)
    assert external.ask(None, request)["energy"] == energy
    assert os.stat(listening).st_mode & 0o077 == 0


def test_sockets_that_cannot_be_made_are_refused(listening, model, tmp_path):
    calculator = KinMLCalculator(model)
    (tmp_path / "file").write_text("mine")
    for path, sentence in [
        (listening, "another server answers"),
        ("file", "is a file"),
        ("x" * 200, "is longer than"),
        ("none/s", "cannot be made"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            server.serve(calculator, path)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_killed_server_left_behind_is_replaced(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind("s")
    with server.listening(KinMLCalculator(model), "s"):
        assert Path("s").exists()


def test_the_commands_in_processes_of_their_own(model, tmp_path, expected, monkeypatch):
    """Also: the script imports nothing that takes long, and SIGTERM ends the server and removes its socket."""
    monkeypatch.chdir(tmp_path)
    model_file.save("model.pt", model)
    arguments = [sys.executable, "-m", "kinml_fast.cli", "serve", "model.pt", "--socket", "s", "--device", "cpu"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert b"waiting for requests" in process.stdout.readline()
        write_gaussian()
        script = (
            "import sys; from kinml_fast import external\n"
            "code = external.gaussian(['--socket', 's', 'R', 'in', 'out', 'm'])\n"
            "sys.exit(code or 10 * ('torch' in sys.modules or 'numpy' in sys.modules))"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
        assert numbers(Path("out").read_text().splitlines()[0])[0] == pytest.approx(expected[0], rel=1e-12)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert not Path("s").exists()
    finally:
        process.kill()
        process.wait()


def test_serve_refuses_what_is_no_model(tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path / "none.pt"), "--socket", str(tmp_path / "s")]) == 2
    assert "none.pt: cannot be read" in capsys.readouterr().err
