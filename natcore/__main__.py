"""`python -m natcore info` and `python -m natcore compile`."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m natcore", description="Neighborhood attention: the installation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was found on this machine, what is missing and how to get it")
    compiling = commands.add_parser("compile", help="compile the listed kernels into the cache; needs no GPU")
    compiling.add_argument("--arch", action="append", required=True, help="such as sm_90a; may be given several times")
    compiling.add_argument("--check", action="store_true", help="fail on spills and on more than a kernel declares")
    options = parser.parse_args(arguments)
    if options.command == "info":
        from natcore.info import report

        print(report())
        return 0
    return _compile(options.arch, options.check)


def _compile(archs: list[str], check: bool) -> int:
    """One line for each kernel; status 1 where one does not compile or fails the check."""
    from natcore.compiling import compile_listed
    from natcore.errors import CompileError, CudaError

    status = 0
    for arch in archs:
        try:
            rows = compile_listed(arch, check)
        except (CompileError, CudaError, ValueError) as error:
            print(f"{arch}: {error}", file=sys.stderr)
            status = 1
            continue
        if not rows:
            print(f"{arch}: no kernel runs on it", file=sys.stderr)
            status = 1
        for row in rows:
            took = row.resources
            defines = " ".join(f"{name}={value}" for name, value in row.spec.defines)
            print(
                f"{arch} {row.spec.name} {took.registers} registers, "
                f"{took.spill_store_bytes + took.spill_load_bytes} bytes spilled, {took.shared_bytes} bytes shared, "
                f"{'cached' if row.cached else f'{row.seconds:.1f} s'}: {defines}"
            )
        print(f"{arch}: {len(rows)} kernels")
    return status


if __name__ == "__main__":
    sys.exit(main())
