#!/usr/bin/env python3
"""What it costs to compile each public header and each call, beside torch/torch.h: a CSV, and a table for the README.

Counted are the seconds of processor time (user and system) of the compiler, which other programs disturb less than the clock.
torch/torch.h is compiled anew before every fourth unit, and a unit's ratio is that to the last one, so that a machine that
changes its speed changes both. The table shows medians over the rounds.
"""
import argparse
import csv
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASELINE = "torch/torch.h"


def all_units(folder):
    """Name, kind and file of each unit, torch/torch.h first; those of headers are written into the folder."""
    headers = [BASELINE] + sorted(f"free_transformer/{file.name}" for file in (ROOT / "include/free_transformer").glob("*.hpp"))
    for header in headers:
        file = folder / (header.replace("/", "_") + ".cpp")
        file.write_text(f"#include <{header}>\n")
        yield header, "header", file
    for file in sorted((ROOT / "tests/compile_time").glob("*.cpp")):
        yield file.stem, "call", file


def processor_seconds(command):
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            sys.exit(f"{' '.join(command)}\n{output.read().decode()}")
    return usage.ru_utime + usage.ru_stime


def measure(baseline, units, commands, rounds):
    """Seconds, and ratios to the baseline, of each unit with each compiler and level: one of each a round."""
    measured = {}
    for round_number in range(1, rounds + 1):
        for configuration, command in commands.items():
            for index, (name, kind, file) in enumerate(units):
                if index % 4 == 0:
                    before = processor_seconds(command + [str(baseline[2])])
                    add(measured, baseline[0], baseline[1], configuration, before, 1.0)
                seconds = processor_seconds(command + [str(file)])
                add(measured, name, kind, configuration, seconds, seconds / before)
                print(f"round {round_number}  {' '.join(configuration):14}  {name:46}{seconds:6.1f} s  {seconds / before:.2f}",
                      file=sys.stderr, flush=True)
    return measured


def add(measured, name, kind, configuration, seconds, ratio):
    measured.setdefault((name, kind), {}).setdefault(configuration, []).append((seconds, ratio))


def medians(samples):
    return statistics.median(seconds for seconds, _ in samples), statistics.median(ratio for _, ratio in samples)


def write_csv(path, measured, environment):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["unit", "kind", "compiler", "level", *environment, "compilations", "cpu_median_s", "cpu_least_s",
                       "cpu_most_s", "ratio_to_torch_h"])
        for (name, kind), configurations in measured.items():
            for (compiler, level), samples in configurations.items():
                seconds, ratio = medians(samples)
                all_seconds = [seconds for seconds, _ in samples]
                rows.writerow([name, kind, compiler, level, *environment.values(), len(samples), f"{seconds:.3f}",
                               f"{min(all_seconds):.3f}", f"{max(all_seconds):.3f}", f"{ratio:.3f}"])


def print_table(measured, configurations):
    columns = [" ".join(configuration) for configuration in configurations]
    print("| seconds (times `torch/torch.h`) | " + " | ".join(columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for (name, kind), samples in measured.items():
        cells = []
        for configuration in configurations:
            seconds, ratio = medians(samples[configuration])
            cells.append(f"{seconds:.1f} ({ratio:.2f})")
        text = f"`{name}`" if kind == "header" else f"a call: `{name}`"
        print(f"| {text} | " + " | ".join(cells) + " |")


def version_of(compiler):
    name = re.sub(r"-\d+$", "", os.path.basename(compiler))
    dumped = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    return f"{name} {dumped.split('.')[0]}"


def processor_name():
    found = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return found[1] if found else "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=pathlib.Path, default="compile_time.csv", help="where the results go")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only units whose name contains this")
    parser.add_argument("--compilers", nargs="+", default=["g++", "clang++-14"], help="those that are not here are left out")
    parser.add_argument("--levels", nargs="+", default=["0", "2"], help="of optimization")
    parser.add_argument("--libtorch", default="unknown", help="its version, for the CSV")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, help="compiler flags that find LibTorch; must come last",
                        default=["-std=c++17", "-isystem", "/usr/include/torch/csrc/api/include"])
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        compile_flags = [f"-I{ROOT / 'include'}", *options.flags, "-c", "-o", str(folder / "unit.o")]
        commands = {(version_of(compiler), f"-O{level}"): [compiler, f"-O{level}", *compile_flags]
                    for compiler in options.compilers if shutil.which(compiler) for level in options.levels}
        baseline, *units = all_units(folder)
        units = [unit for unit in units if options.only in unit[0]]
        if not units or not commands:
            sys.exit(f"nothing to compile: {len(units)} units, {len(commands)} compilers and levels")
        measured = measure(baseline, units, commands, options.rounds)

    write_csv(options.csv, measured, {"processor": processor_name(), "libtorch": options.libtorch})
    print_table(measured, commands)


if __name__ == "__main__":
    main()
