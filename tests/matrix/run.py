#!/usr/bin/env python3
"""Builds and runs the library in cells of compiler, standard, flags and LibTorch, and prints a table of what came out.

    run.py                                    cells in which every pair of values meets, arm64, clang-tidy
    run.py --all                              every cell
    run.py --compiler g++-12 --libtorch 2.2.2 the cells of these values
    run.py --rows arm64 tidy                  rows of these kinds alone
    run.py --list                             what would run

Debian's packages and the wheels are installed where they are missing (cmake/install_dependencies.sh). Exit status 1 if a
cell fails that LibTorch alone does not.
"""

import argparse
import collections
import concurrent.futures
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

SOURCE = pathlib.Path(__file__).resolve().parents[2]
COMPILERS = ["g++-12", "clang++-14"]
STANDARDS = ["17", "20", "23"]
FLAGS = ["-O0", "-O2", "-O3 -ffast-math"]
LIBTORCHS = ["debian", "2.2.2", "2.6.0", "newest"]
UNITS_AT_A_TIME = 12  # that clang-tidy reads as one
ARM64_WHEEL = "2.6.0"  # the last that PyPI has for arm64 without CUDA in 100 MB
ARM64 = [("g++-12", "17", "-O2"), ("g++-12", "20", "-O0"), ("clang++-14", "17", "-O2"),
         ("g++-12", "17", "-O3 -ffast-math")]


@dataclass(frozen=True)
class Cell:
    libtorch: str
    compiler: str
    standard: str
    flags: str
    machine: str = "x86-64"

    @property
    def name(self):
        words = [self.machine, self.libtorch, self.compiler, self.standard, self.flags]
        return re.sub(r"[^A-Za-z0-9.+]+", "-", "_".join(words)).replace("_-", "_")


def values_of(cell):
    return (cell.libtorch, cell.compiler, cell.standard, cell.flags)


def pairs_of(cell):
    return set(itertools.combinations(enumerate(values_of(cell)), 2))


def covering(cells):
    """Cells, one after another, that hold the most pairs of values that no earlier one holds."""
    chosen, missing = [], set().union(*map(pairs_of, cells))
    while missing:
        chosen.append(max(cells, key=lambda cell: len(pairs_of(cell) & missing)))
        missing -= pairs_of(chosen[-1])
    return sorted(chosen, key=lambda cell: [order.index(value) for order, value in zip(ORDERS, values_of(cell))])


ORDERS = [LIBTORCHS, COMPILERS, STANDARDS, FLAGS]


def can_be(cell):
    """The newest LibTorch is compiled as C++20 at least, and clang refuses the headers of 1.13 as C++20."""
    if cell.libtorch == "newest":
        return cell.standard != "17"
    return cell.standard == "17" or not (cell.libtorch == "debian" and "clang" in cell.compiler)


def cells_of(arguments):
    cells = list(filter(can_be, (Cell(*values) for values in itertools.product(*ORDERS))))
    cells = cells if arguments.all else covering(cells)
    if arguments.libtorch or arguments.compiler or arguments.standard or arguments.flags:
        wanted = (arguments.libtorch or LIBTORCHS, arguments.compiler or COMPILERS, arguments.standard or STANDARDS,
                  arguments.flags or FLAGS)
        cells = list(filter(can_be, (Cell(*values) for values in itertools.product(*wanted))))
    arm64 = [Cell(ARM64_WHEEL, *values, machine="arm64") for values in (ARM64 if arguments.all else ARM64[:3])]
    arm64 = [cell for cell in arm64 if cell.compiler in (arguments.compiler or COMPILERS)]
    return (cells if "x86-64" in arguments.rows else []) + (arm64 if "arm64" in arguments.rows else [])


class Workshop:
    """The folder of all builds, and how a command is run there: its output goes to a log."""

    def __init__(self, folder, jobs):
        self.folder, self.jobs = folder, jobs

    def run(self, command, log, limit=1800):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as output:
            print("+", shlex.join(map(str, command)), file=output, flush=True)
            environment = dict(os.environ, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE")
            try:
                return subprocess.run(command, stdout=output, stderr=output, env=environment,
                                      timeout=limit).returncode == 0
            except subprocess.TimeoutExpired:
                return False

    def wheel(self, cell):
        """The torch folder of the cell's wheel, or nothing for Debian's LibTorch."""
        if cell.libtorch == "debian":
            return ""
        place = self.folder / "wheels" / (cell.libtorch if cell.machine == "x86-64" else f"arm64-{cell.libtorch}")
        if cell.machine == "x86-64":
            version = [] if cell.libtorch == "newest" else ["torch", cell.libtorch]
            subprocess.run([SOURCE / "cmake/install_dependencies.sh", "wheel", place, *version], check=True)
            return next(place.glob("lib/python3*/site-packages/torch"))
        if not (place / "torch").exists():
            platforms = [f"--platform=manylinux{tag}_aarch64" for tag in ("2014", "_2_17", "_2_28")]
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "--no-deps", "--no-compile", "--root-user-action=ignore", *platforms,
                            "--only-binary=:all:", "--target", place, f"torch=={cell.libtorch}"], check=True)
        self.add_zlib(place / "torch/lib")
        return place / "torch"

    def add_zlib(self, libraries):
        """The one library that neither the wheel nor the cross compiler brings, out of Debian's package for that machine;
        apt keeps what it knows of it in a folder of its own."""
        if (libraries / "libz.so.1").exists():
            return
        state = self.folder / "apt"
        for folder in ("lists/partial", "cache/archives/partial", "root"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        options = {"APT::Architecture": "arm64", "APT::Architectures::": "arm64", "Dir::State": state,
                   "Dir::State::lists": state / "lists", "Dir::State::status": state / "status",
                   "Dir::Cache": state / "cache", "APT::Sandbox::User": "root"}
        apt = ["apt-get", "--quiet=2", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
        subprocess.run([*apt, "update"], check=True)
        subprocess.run([*apt, "download", "zlib1g"], check=True, cwd=state)
        subprocess.run(["dpkg", "-x", next(state.glob("zlib1g_*.deb")), state / "root"], check=True)
        shutil.copy(next(state.glob("root/**/libz.so.1")), libraries / "libz.so.1")


def toolchain(cell):
    if cell.machine == "x86-64":
        return [f"-DCMAKE_CXX_COMPILER={cell.compiler}"]
    cross = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
             "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"]
    if "clang" in cell.compiler:
        return [*cross, f"-DCMAKE_CXX_COMPILER={cell.compiler}", "-DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu"]
    return [*cross, f"-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-{cell.compiler}"]


def outcome_of(cell, workshop, with_strangers):
    """What a row of the table says: a word, and how many programs were right of how many."""
    folder = workshop.folder / "cells" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    log = folder / "log.txt"
    configure = ["cmake", "-S", SOURCE / "tests/matrix", "-B", folder, "-G", "Ninja", *toolchain(cell),
                 f"-DCMAKE_CXX_STANDARD={cell.standard}", f"-DCMAKE_CXX_FLAGS={cell.flags}",
                 f"-DFREE_TRANSFORMER_TORCH_WHEEL={workshop.wheel(cell)}",
                 f"-DMATRIX_STRANGERS={'ON' if with_strangers else 'OFF'}"]
    if not workshop.run(configure, log):
        return "cannot be configured", ""
    build = ["cmake", "--build", folder, "--parallel", str(workshop.jobs)]
    if not workshop.run(build, log):
        alone = workshop.run([*build, "--target", "libtorch_alone"], log)
        return ("does not compile" if alone else "LibTorch alone does not compile"), ""
    passed = workshop.run(["ctest", "--test-dir", folder, "--output-on-failure", "--timeout", "600"], log)
    counts = re.findall(r"tests passed, (\d+) tests failed out of (\d+)", log.read_text())
    failed, of_all = map(int, counts[-1]) if counts else (1, 1)
    return ("passes" if passed else "FAILS"), f"{of_all - failed} of {of_all}"


def row_of(cell, workshop, with_strangers):
    begin = time.monotonic()
    outcome, programs = outcome_of(cell, workshop, with_strangers)
    seconds = time.monotonic() - begin
    libtorch = "1.13.1 (Debian)" if cell.libtorch == "debian" else cell.libtorch
    return [cell.machine, libtorch, cell.compiler, f"C++{cell.standard}", f"`{cell.flags}`", outcome, programs,
            f"{seconds:.0f} s"]


def groups_of_units(commands, wanted):
    """Flags, and the units that are compiled with them and stand below one .clang-tidy. One that adds to a namespace of
    a header, or defines a macro before it includes one, is read alone."""
    tests, groups = SOURCE / "tests", collections.defaultdict(set)
    for entry in commands:
        unit = pathlib.Path(entry["file"])
        if tests not in unit.parents or not re.search(wanted, str(unit)): continue
        alone = unit if re.search(r"^(namespace (?!user )[\w:]+ {|#define )", unit.read_text(), re.MULTILINE) else None
        flags = re.sub(r"^\S+ | -o \S+ -c \S+$", "", entry["command"])
        groups[unit.relative_to(tests).parts[0], flags, alone].add(unit)
    return [(flags, sorted(units)[first:first + UNITS_AT_A_TIME])
            for (_, flags, _), units in sorted(groups.items(), key=str)
            for first in range(0, len(units), UNITS_AT_A_TIME)]


def text_from_anywhere(unit):
    def absolute(include):
        beside = unit.parent / include[2]
        return f'{include[1]}"{beside}"' if beside.exists() else include[0]
    return re.sub(r'^(#\s*include )"([^"]+)"', absolute, unit.read_text(), flags=re.MULTILINE)


def one_unit(group, place):
    """The units of a group, each in a namespace of its own, after all that they include. A file that included them
    would not do: the analyzer follows the functions of the main file."""
    if len(group) == 1: return group[0]
    texts = [text_from_anywhere(unit) for unit in group]
    lines = []
    for text in texts:
        directives = re.findall(r"^#\s*(?:include|if|ifdef|ifndef|elif|else|endif)\b.*", text, re.MULTILINE)
        lines += [line for line in directives if "include" not in line or line not in lines]  # its own duplicates stay
    for unit, text in zip(group, texts):
        lines += [f"namespace of_{unit.stem} {{", re.sub(r"^#\s*include .*", "", text, flags=re.MULTILINE), "}"]
    folder = group[0].relative_to(SOURCE).parts[1]
    whole = place / "tests" / folder / f"from_{group[0].stem}.cpp"
    whole.parent.mkdir(parents=True, exist_ok=True)
    whole.write_text("\n".join(lines) + "\n")
    for configuration in [".clang-tidy", f"tests/{folder}/.clang-tidy"]:
        if (SOURCE / configuration).exists(): shutil.copy(SOURCE / configuration, place / configuration)
    return whole


def tidy_row(workshop, wanted):
    """clang-tidy over every unit of the tests and, through them, every header. It takes two minutes for LibTorch's
    headers, which the units of a group share."""
    begin = time.monotonic()
    folder, log = workshop.folder / "tidy", workshop.folder / "tidy" / "log.txt"
    shutil.rmtree(folder, ignore_errors=True)
    workshop.run(["cmake", "-S", SOURCE, "-B", folder, "-G", "Ninja", "-DCMAKE_CXX_COMPILER=clang++-14",
                  "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON",
                  "-DFREE_TRANSFORMER_BUILD_EXAMPLES=OFF", "-DFREE_TRANSFORMER_TEST_UNITY=OFF"], log)
    groups = groups_of_units(json.loads((folder / "compile_commands.json").read_text()), wanted)

    def is_clean(number):
        flags, group = groups[number]
        return workshop.run(["clang-tidy-14", "--quiet", "--warnings-as-errors=*", one_unit(group, folder), "--",
                             *shlex.split(flags)], folder / f"log_{number}.txt", limit=3600)

    with concurrent.futures.ThreadPoolExecutor(workshop.jobs) as pool:
        clean = list(pool.map(is_clean, range(len(groups))))
    outcome = "passes" if clean and all(clean) else "FAILS"
    units = {unit for _, group in groups for unit in group}
    unclean = {unit for (_, group), group_is_clean in zip(groups, clean) if not group_is_clean for unit in group}
    return ["x86-64", "1.13.1 (Debian)", "clang-tidy-14", "C++17", "", outcome,
            f"{len(units - unclean)} of {len(units)}", f"{time.monotonic() - begin:.0f} s"]


def table_of(rows):
    titles = ["machine", "LibTorch", "compiler", "standard", "flags", "outcome", "programs", "time"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, ["---"] * len(titles), *rows]) + "\n"


def parsed_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every cell, not a covering subset")
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    parser.add_argument("--rows", nargs="+", choices=["x86-64", "arm64", "tidy"], default=["x86-64", "arm64", "tidy"])
    for name, values in zip(["libtorch", "compiler", "standard"], ORDERS):
        parser.add_argument(f"--{name}", nargs="+", help=f"default: {', '.join(values)}")
    parser.add_argument("--flags", action="append", help=f"as --flags=-O1, once for each; default: {', '.join(FLAGS)}")
    parser.add_argument("--strangers", choices=["none", "-O2", "all"], default="-O2",
                        help="which cells also build the programs of tests/strangers; default: those of -O2")
    parser.add_argument("--tidy-units", default="", help="a regular expression of the units that clang-tidy reads")
    parser.add_argument("--folder", type=pathlib.Path, default=SOURCE / "build/matrix", help="default: build/matrix")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    return parser.parse_args()


def main():
    arguments = parsed_arguments()
    cells = cells_of(arguments)
    if arguments.list:
        return print("\n".join(cell.name for cell in cells))
    subprocess.run([SOURCE / "cmake/install_dependencies.sh", "tests", "matrix"], check=True)
    workshop = Workshop(arguments.folder.resolve(), arguments.jobs)
    rows = []
    for cell in cells:
        rows.append(row_of(cell, workshop, arguments.strangers in ("all", cell.flags)))
        print(*rows[-1], flush=True)
    if "tidy" in arguments.rows:
        rows.append(tidy_row(workshop, arguments.tidy_units))
    table = table_of(rows)
    (workshop.folder / "table.md").write_text(table)
    print("\n" + table)
    sys.exit(any(row[5] in ("FAILS", "does not compile", "cannot be configured") for row in rows))


if __name__ == "__main__":
    main()
