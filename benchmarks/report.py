"""Makes the tables of benchmarks/README.md and README.md from the JSON of a run.

pytest benchmarks --benchmark-json=run.json
python benchmarks/report.py run.json          # keeps a trimmed copy in benchmarks/results and rewrites the tables
python benchmarks/report.py --check           # exit code 1 if the tables differ from the kept runs

Each table comes from the newest kept run that has its benchmarks: `pytest benchmarks/bench_levels.py` renews some only.
The table of GPUs is from `pytest benchmarks/bench_gpu.py`, which is kept as gpu-DATE.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGES = (HERE / "README.md", HERE.parent / "README.md")
KEPT = ("min", "median", "mean", "stddev", "max", "rounds")
DTYPES = ("float64", "float32")

# What stands above the tables that not every run has.
SECTIONS = {
    "forces": """## Training on energies and forces
The same network and data. What the floor counts stands at the top of `bench_forces.py`. Each baseline has shown on
its first batch that its energies, forces and gradient are ours.""",
    "mixed": """### Molecules of mixed sizes
Twelve hydrocarbons of 4 to 26 atoms, C2H2 to C10H16, 13.3 on average, in random order, made by
`make_training_data.py mixed`.""",
    "kernels": """### Where the time of a step goes
Batches of 50 C5H5. The floor of a kernel is its arithmetic at the rate of torch.mm, or reading what it must read.""",
    "batch": """### Growth with the batch
µs per structure in an epoch of 2048 C5H5, optimizer and all.""",
    "size": """### Growth with the molecule
µs per atom in an epoch of 20,000 atoms of shaken alkanes from CH4 to C16H34, about 500 atoms in a batch.""",
    "levels": """## Several levels of theory
An epoch of 2000 C5H5 as above, every structure with all levels: ms, and how many times that of one level.""",
    "evaluation": "## Energies and forces of C5H5",
    "inference": """### In molecular dynamics
Energy and forces again and again, weights laid out once, one thread (`bench_inference.py --threads 1`): µs.""",
    "hessian": """### Second derivatives
Of one C5H5, one thread (`bench_inference.py -k hessian --threads 1`): µs. "forces, 6N times" is the forces that
differences of them need, all in one call; a "product by autograd" is one column.""",
    "ensemble": """## Ensembles
Energies and forces of every member from one call: how many times the time of one model.""",
    "gpu": """## On a GPU
Time of a call, and atoms in it per second. Rows that are bound by memory are held against reading or writing their
bytes at the rate of a copy on the device. Plain PyTorch and TorchANI ran on the same GPU.""",
    "memory": """## Memory
Peak of a process that trains an epoch of 2000 C5H5 with forces, less its peak after `import torch`.""",
    "cold_start": """## From a cold start to an accurate model
The recipe `forces` that comes with the package, 60 epochs: seconds from the first line of a process until the test
errors of C5H5 are below 1 kcal/mol in energy and 2.3 kcal/mol/Å in forces, with reading the data, validation and a test
after every epoch.""",
}


def trim(run: dict) -> dict:
    """The run without raw timings and without what names the machine's owner."""
    machine = {
        key: run["machine_info"].get(key) for key in ("python_version", "system", "machine", "cpu", "kinml_fast")
    }
    cpu = machine["cpu"] or {}
    machine["cpu"] = {key: cpu.get(key) for key in ("brand_raw", "count", "arch", "l2_cache_size")}
    benchmarks = [
        {
            "name": b["name"],
            "group": b["group"],
            "extra_info": b["extra_info"],
            "stats": {key: b["stats"][key] for key in KEPT},
        }
        for b in run["benchmarks"]
    ]
    return {"datetime": run["datetime"], "machine_info": machine, "benchmarks": benchmarks}


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *body])


class Run:
    def __init__(self, run: dict) -> None:
        self.run = run
        self.about = run["machine_info"]["kinml_fast"]
        self.by = {(b["group"], b["extra_info"]["form"]): b for b in run["benchmarks"]}

    def seconds(self, group: str, form: str) -> float | None:
        found = self.by.get((group, form))
        return found["stats"]["median"] if found else None

    def floor(self, benchmark: dict) -> float:
        """Seconds that the counted work takes at least."""
        return self.seconds_of(benchmark["extra_info"], benchmark["extra_info"]["dtype"])

    def seconds_of(self, work: dict, dtype: str) -> float:
        """Seconds of `flops` at the GEMM rate of this run, or of `bytes` at its rate of reading memory."""
        arithmetic = work.get("flops", 0) / (self.about["gemm_gflops"][dtype] * 1e9)
        reading = work["bytes"] / (self.about["read_gb_per_s"] * 1e9) if "bytes" in work else 0.0
        return max(arithmetic, reading)

    @property
    def on_gpu(self) -> bool:
        """Whether it is a run of bench_gpu.py."""
        return any(group.startswith("gpu ") for group, _ in self.by)

    def machine(self) -> str:
        if self.on_gpu:
            gpu, rate = self.about["gpu"], self.copy_rate()
            copied = f"; copy on the device {rate / 1e9:.0f} GB/s, read and written" if rate else ""
            return (
                f"{self.run['datetime'][:10]}, {gpu['name']}, CUDA {gpu['cuda']}, torch {self.about['torch']}{copied}. "
                "Medians."
            )
        cpu = self.run["machine_info"]["cpu"]
        rates = ", ".join(f"{rate:.0f} GFLOP/s {dtype}" for dtype, rate in self.about["gemm_gflops"].items())
        return (
            f"{self.run['datetime'][:10]}, {cpu.get('brand_raw') or self.run['machine_info']['machine']}, "
            f"{self.about['threads']} threads, {self.about['build']['instruction set in use']}, "
            f"torch {self.about['torch']}; torch.mm {rates}. Medians."
        )

    def epochs(self, group: str, head: str) -> str:
        """Seconds of an epoch by form, and how many times ours; empty if the run has none."""
        forms = [form for g, form in self.by if g == f"{group} float64"]
        if not forms:
            return ""
        rows = [[head, "float64", "", "float32", ""]]
        for form in forms:
            row = [form]
            for dtype in DTYPES:
                ours, theirs = (self.seconds(f"{group} {dtype}", name) for name in ("kinml_fast", form))
                if theirs is None:
                    row += ["-", ""]
                else:
                    row += [f"{theirs * 1e3:.1f} ms", "1" if form == "kinml_fast" else f"{theirs / ours:.1f} x"]
            rows.append(row)
        floors = {"flops": "floor (arithmetic at the rate of torch.mm)", "bytes": "floor of reading the Jacobians once"}
        for counted, name in floors.items():
            row = [name]
            for dtype in DTYPES:
                found = [self.by.get((f"{group} {dtype}", form)) for form in forms]
                found = [b for b in found if b and counted in b["extra_info"]]
                if found:
                    floor = self.floor(found[0])
                    ours = self.seconds(f"{group} {dtype}", "kinml_fast")
                    row += [f"{floor * 1e3:.1f} ms", f"{floor / ours:.2f} x"]
            if len(row) == len(rows[0]):
                rows.append(row)
        return table(rows)

    def training(self) -> str:
        return self.epochs("energy epoch", "energy epoch, 2000 C5H5")

    def forces_epochs(self) -> str:
        return self.epochs("forces epoch c5h5", "energy + force epoch, 2000 C5H5")

    def mixed_epochs(self) -> str:
        made = self.epochs("forces epoch mixed", "energy + force epoch, 2000 structures")
        stored = self.by.get(("forces epoch mixed float64", "kinml_fast, Jacobians stored"))
        if stored is None:
            return made
        padded, true = (stored["extra_info"][key] / 1e9 for key in ("padded", "bytes"))
        return f"{made}\n\nIn float64 the Jacobians take {padded:.1f} GB; {true:.1f} GB of that is not padding."

    def grown(self, group: str, head: str, unit: str) -> str:
        """µs per structure or atom by what grows, for each type and number of threads."""
        steps = list(dict.fromkeys(form for g, form in self.by if g.startswith(f"{group} ")))
        if not steps:
            return ""
        columns = sorted({g.removeprefix(f"{group} ") for g, _ in self.by if g.startswith(f"{group} ")})
        columns.sort(key=lambda column: column.endswith("float32"))
        names = [f"{dtype}, {n} thread{'s' * (n != '1')}" for n, dtype in (column.split() for column in columns)]
        rows = [[head, *names]]
        for step in sorted(steps, key=int):
            found = [self.by.get((f"{group} {column}", step)) for column in columns]
            times = [b and f"{b['stats']['median'] / b['extra_info'][unit] * 1e6:.1f}" for b in found]
            triples = [b["extra_info"].get("triples", 0) / b["extra_info"]["atoms"] for b in found if b]
            name = f"{step} ({triples[0]:.0f} triples an atom)" if triples[0] else step
            rows.append([name, *(time or "-" for time in times)])
        return table(rows)

    def evaluation(self) -> str:
        groups = {"forces evaluation": "2000 at once, µs/structure", "forces call": "one, µs"}
        forms = list(dict.fromkeys(form for group, form in self.by if group.rsplit(" ", 1)[0] in groups))
        if not forms:
            return ""
        rows = [["", *(f"{name} {dtype}" for name in groups.values() for dtype in DTYPES)]]
        for form in forms:
            found = [self.by.get((f"{group} {dtype}", form)) for group in groups for dtype in DTYPES]
            rows.append(
                [
                    form,
                    *(f"{b['stats']['median'] / b['extra_info']['structures'] * 1e6:.1f}" if b else "-" for b in found),
                ]
            )
        return table(rows)

    def inference(self) -> str:
        found = {key: b for key, b in self.by.items() if key[0].startswith("inference ")}
        # In the order of the benchmarks, single molecules first.
        kinds = dict.fromkeys((b["extra_info"]["structures"], form) for (_, form), b in found.items())
        rows = [["", *DTYPES]]
        for count, form in sorted(kinds, key=lambda kind: kind[0]):
            numbers = [found.get((f"inference {count} {dtype}", form)) for dtype in DTYPES]
            name = f"{count} at once" if count > 1 else form
            rows.append([name, *(f"{b['stats']['median'] * 1e6:.1f}" if b else "-" for b in numbers)])
        return table(rows) if kinds else ""

    def hessian(self) -> str:
        groups = [f"hessian {dtype}" for dtype in DTYPES]
        forms = dict.fromkeys(form for group, form in self.by if group in groups)
        rows = [["", *DTYPES]]
        for form in forms:
            numbers = [self.by.get((group, form)) for group in groups]
            rows.append([form, *(f"{b['stats']['median'] * 1e6:.1f}" if b else "-" for b in numbers)])
        return table(rows) if forms else ""

    def levels(self) -> str:
        tasks = {"energies": "energies", "forces": "energies and forces"}
        rows = [["levels", *(f"{name}, {dtype}" for name in tasks.values() for dtype in DTYPES)]]
        counts = sorted({int(form) for group, form in self.by if group.startswith("levels ")})
        for count in counts:
            row = [str(count)]
            for group in (f"levels {task} {dtype}" for task in tasks for dtype in DTYPES):
                one, own = self.seconds(group, "1"), self.seconds(group, str(count))
                row.append(f"{own * 1e3:.1f}" + (f" ({own / one:.2f} x)" if count > 1 else ""))
            rows.append(row)
        return table(rows) if counts else ""

    def ensemble(self) -> str:
        sizes = sorted({int(g.split()[1]) for g, _ in self.by if g.startswith("ensemble ")})
        groups = [f"ensemble {size} {dtype}" for size in sizes for dtype in DTYPES]
        rows = [["members", *(f"{group.split()[1]} C5H5, {group.split()[2]}" for group in groups)]]
        for count in sorted({int(form) for group, form in self.by if group.startswith("ensemble ")}):
            row = [str(count)]
            for group in groups:
                one, own = self.seconds(group, "1"), self.seconds(group, str(count))
                row.append(f"{own * 1e6:.0f} µs" if count == 1 else f"{own / one:.2f} x")
            rows.append(row)
        return table(rows) if sizes else ""

    def copy_rate(self) -> float | None:
        """Bytes per second that a copy on the GPU reads and writes."""
        b = self.by.get(("gpu float32", "copy"))
        return b and b["extra_info"]["bytes"] * b["extra_info"]["calls"] / b["stats"]["median"]

    def gpu(self) -> str:
        rows = [["", *(f"{dtype} {what}" for dtype in DTYPES for what in ("µs", "10⁶ atoms/s", "x copy"))]]
        for form in dict.fromkeys(form for group, form in self.by if group.startswith("gpu ") and form != "copy"):
            row = [form]
            for dtype in DTYPES:
                b = self.by.get((f"gpu {dtype}", form))
                if b is None:
                    row += ["-", "", ""]
                    continue
                info, rate = b["extra_info"], self.copy_rate()
                seconds = b["stats"]["median"] / info["calls"]
                bound = f"{seconds * rate / info['bytes']:.1f}" if "bytes" in info and rate else ""
                row += [f"{seconds * 1e6:,.1f}", f"{info['atoms'] / seconds / 1e6:,.2f}", bound]
            rows.append(row)
        return table(rows) if len(rows) > 1 else ""

    def memory(self) -> str:
        forms = list(dict.fromkeys(form for group, form in self.by if group.startswith("forces memory ")))
        if not forms:
            return ""
        rows = [["MB above `import torch`", *DTYPES]]
        for form in forms:
            found = [self.by.get((f"forces memory {dtype}", form)) for dtype in DTYPES]
            more = [b and (b["extra_info"]["peak"] - b["extra_info"]["imported"]) / 1e6 for b in found]
            rows.append([form, *("-" if value is None else f"{value:.0f}" for value in more)])
        return table(rows)

    def cold_start(self) -> str:
        runs = [(form, b["extra_info"]) for (group, form), b in self.by.items() if group == "cold start"]
        if not runs:
            return ""
        rows = [["", "seconds", "of these training", "epochs", "energy RMSE", "force RMSE"]]
        for name, info in runs:
            if "epoch" in info:
                times = [f"{info['seconds']:.1f}", f"{info['training_seconds']:.1f}", str(info["epoch"] + 1)]
            else:
                times = ["not reached", "", str(info["epochs"])]
            errors = info.get("errors", info["last"])
            rows.append([name, *times, *(f"{errors[kind]:.2f}" for kind in ("energy_rmse", "forces_rmse"))])
        return table(rows)

    def kernels(self) -> str:
        """Share of the step and distance to the floor of each kernel of `--kernels`; a row "step" is the whole."""
        measured = {(k["kernel"], k["dtype"]): k for k in self.about.get("kernels", ())}
        if not measured:
            return ""
        rows = [["", *(f"{dtype} {what}" for dtype in DTYPES for what in ("µs", "share", "x floor"))]]
        for kernel in dict.fromkeys(name for name, _ in measured):
            row = [kernel]
            for dtype in DTYPES:
                k = measured.get((kernel, dtype))
                if k is None:
                    row += ["-"] * 3
                    continue
                parts = sum(x["seconds"] for (name, d), x in measured.items() if d == dtype and name != "step")
                whole = measured.get(("step", dtype), {"seconds": parts})["seconds"]
                floor = self.seconds_of(k, dtype) * self.about["threads"] / k.get("threads", 1)
                row += [
                    f"{k['seconds'] * 1e6:.1f}",
                    f"{k['seconds'] / whole:.0%}",
                    f"{k['seconds'] / floor:.1f}" if floor else "",
                ]
            rows.append(row)
        return table(rows)

    def aev(self) -> str:
        rows = [["", "float64 µs/structure", "ns/triple", "x floor", "float32 µs/structure", "ns/triple", "x floor"]]
        names = {"aev": "AEV a", "vjp": "Jᵀ·g", "jvp": "J·v", "hvp": "d(g·J·v)/dx"}
        for form, name in names.items():
            row = [name]
            for dtype in DTYPES:
                b = self.by.get((f"{form} {dtype}", form))
                if b is None:
                    row += ["-"] * 3
                    continue
                t, info = b["stats"]["median"], b["extra_info"]
                row += [
                    f"{t / info['structures'] * 1e6:.1f}",
                    f"{t / info['triples'] * 1e9:.0f}",
                    f"{t / self.floor(b):.1f}",
                ]
            rows.append(row)
        return table(rows) if ("aev float64", "aev") in self.by else ""

    def prepare(self) -> str:
        rows = [["from C5H5.db", "µs/structure", "ms in all"]]
        for (group, form), b in self.by.items():
            if group == "prepare":
                t, n = b["stats"]["median"], b["extra_info"]["structures"]
                rows.append([form, f"{t / n * 1e6:.1f}", f"{t * 1e3:.1f} ({n} structures)"])
        return table(rows) if len(rows) > 1 else ""

    def parts(self) -> dict[str, str]:
        tables = {
            "machine": self.machine(),
            "training": self.training(),
            "aev": self.aev(),
            "prepare": self.prepare(),
            "forces_epochs": self.forces_epochs(),
        }
        return tables | {name: self.section(name) for name in SECTIONS}

    def section(self, name: str) -> str:
        """A section of benchmarks/README.md, empty if the run has nothing for it."""
        of = {
            "forces": self.forces_epochs,
            "mixed": self.mixed_epochs,
            "kernels": self.kernels,
            "batch": lambda: self.grown("forces batch", "structures in a batch", "structures"),
            "size": lambda: self.grown("forces size", "atoms in a molecule", "atoms"),
            "levels": self.levels,
            "evaluation": self.evaluation,
            "inference": self.inference,
            "hessian": self.hessian,
            "ensemble": self.ensemble,
            "gpu": self.gpu,
            "memory": self.memory,
            "cold_start": self.cold_start,
        }
        made = of[name]()
        return f"{SECTIONS[name]}\n\n{made}" if made else ""


def newest(runs: list[Run]) -> dict[str, str]:
    """Each part from the newest run that has it. One on another machine than the main tables says on which."""
    made = [run.parts() for run in runs]
    main = next(run for run, own in zip(runs, made, strict=True) if own["training"])
    found = {}
    for name in made[0]:
        run, part = next(((r, own[name]) for r, own in zip(runs, made, strict=True) if own[name]), (main, ""))
        found[name] = part if run is main or not part else f"{part}\n\n{run.machine()}"
    return found | {"machine": main.machine()}


def fill(text: str, parts: dict[str, str]) -> str:
    """Replace what stands between `<!-- bench: NAME -->` and `<!-- /bench -->`."""

    def part(match: re.Match) -> str:
        body = parts[match[1]]
        return f"<!-- bench: {match[1]} -->\n{body}{body and chr(10)}<!-- /bench -->"

    return re.sub(r"<!-- bench: (\w+) -->\n.*?<!-- /bench -->", part, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--check", action="store_true", help="only compare the tables with the kept runs")
    arguments = parser.parse_args()
    results = HERE / "results"
    if arguments.run is not None:
        run = trim(json.loads(arguments.run.read_text()))
        stamp = re.sub(r"[^0-9]", "", run["datetime"][:16])
        kind = "gpu" if Run(run).on_gpu else "cpu"
        (results / f"{kind}-{stamp}.json").write_text(json.dumps(run, indent=1) + "\n")
    kept = sorted(results.glob("[cg]pu-*.json"), key=lambda path: path.stem.partition("-")[2])
    if not kept:
        sys.stderr.write("benchmarks/results holds no run yet\n")
        return 1
    parts = newest([Run(json.loads(path.read_text())) for path in reversed(kept)])
    differ = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = fill(text, parts)
        differ |= new != text
        if not arguments.check:
            page.write_text(new, encoding="utf-8")
    return int(differ and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
