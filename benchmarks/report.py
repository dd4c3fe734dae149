"""Makes the tables of benchmarks/README.md and README.md from the JSON of a run.

pytest benchmarks --benchmark-json=run.json
python benchmarks/report.py run.json          # keeps a trimmed copy in benchmarks/results and rewrites the tables
python benchmarks/report.py --check           # exit code 1 if the tables differ from the newest kept run
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
        """Seconds of the arithmetic at the GEMM rate of this run."""
        rate = self.about["gemm_gflops"][benchmark["extra_info"]["dtype"]] * 1e9
        return benchmark["extra_info"]["flops"] / rate

    def machine(self) -> str:
        cpu = self.run["machine_info"]["cpu"]
        rates = ", ".join(f"{rate:.0f} GFLOP/s {dtype}" for dtype, rate in self.about["gemm_gflops"].items())
        return (
            f"{self.run['datetime'][:10]}, {cpu.get('brand_raw') or self.run['machine_info']['machine']}, "
            f"{self.about['threads']} threads, {self.about['build']['instruction set in use']}, "
            f"torch {self.about['torch']}; torch.mm {rates}. Medians."
        )

    def training(self) -> str:
        rows = [["energy epoch, 2000 C5H5", "float64", "", "float32", ""]]
        forms = list(dict.fromkeys(form for group, form in self.by if group.startswith("energy epoch")))
        for form in forms:
            row = [form]
            for dtype in ("float64", "float32"):
                ours = self.seconds(f"energy epoch {dtype}", "kinml_fast")
                theirs = self.seconds(f"energy epoch {dtype}", form)
                if theirs is None:
                    row += ["-", ""]
                else:
                    row += [f"{theirs * 1e3:.1f} ms", "1" if form == "kinml_fast" else f"{theirs / ours:.1f} x"]
            rows.append(row)
        row = ["floor (arithmetic at the rate of torch.mm)"]
        for dtype in ("float64", "float32"):
            b = self.by[f"energy epoch {dtype}", "kinml_fast"]
            row += [f"{self.floor(b) * 1e3:.1f} ms", f"{self.floor(b) / b['stats']['median']:.2f} x"]
        return table([*rows, row])

    def aev(self) -> str:
        rows = [["", "float64 µs/structure", "ns/triple", "x floor", "float32 µs/structure", "ns/triple", "x floor"]]
        names = {"aev": "AEV a", "vjp": "Jᵀ·g", "jvp": "J·v", "hvp": "d(g·J·v)/dx"}
        for form, name in names.items():
            row = [name]
            for dtype in ("float64", "float32"):
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
        return table(rows)

    def prepare(self) -> str:
        rows = [["from C5H5.db", "µs/structure", "ms in all"]]
        for (group, form), b in self.by.items():
            if group == "prepare":
                t, n = b["stats"]["median"], b["extra_info"]["structures"]
                rows.append([form, f"{t / n * 1e6:.1f}", f"{t * 1e3:.1f} ({n} structures)"])
        return table(rows)

    def parts(self) -> dict[str, str]:
        return {
            "machine": self.machine(),
            "training": self.training(),
            "aev": self.aev(),
            "prepare": self.prepare(),
        }


def fill(text: str, parts: dict[str, str]) -> str:
    """Replace what stands between `<!-- bench: NAME -->` and `<!-- /bench -->`."""

    def part(match: re.Match) -> str:
        return f"<!-- bench: {match[1]} -->\n{parts[match[1]]}\n<!-- /bench -->"

    return re.sub(r"<!-- bench: (\w+) -->\n.*?<!-- /bench -->", part, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--check", action="store_true", help="only compare the tables with the newest kept run")
    arguments = parser.parse_args()
    results = HERE / "results"
    if arguments.run is not None:
        run = trim(json.loads(arguments.run.read_text()))
        stamp = re.sub(r"[^0-9]", "", run["datetime"][:16])
        (results / f"cpu-{stamp}.json").write_text(json.dumps(run, indent=1) + "\n")
    kept = sorted(results.glob("cpu-*.json"))
    if not kept:
        sys.stderr.write("benchmarks/results holds no run yet\n")
        return 1
    parts = Run(json.loads(kept[-1].read_text())).parts()
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
