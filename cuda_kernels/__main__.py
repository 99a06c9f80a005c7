"""``python -m cuda_kernels``: look at kernels on a machine without a GPU."""

from __future__ import annotations

import argparse
import sys
from collections import Counter


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.0")
    return int(major), int(minor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cuda_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, kernels: str | None) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("--cc", type=_capability, default=(8, 0), help="compute capability (8.0)")
        if kernels:
            made.add_argument("kernel", nargs=kernels, help="names, see `list`" + (" (all)" if kernels == "*" else ""))
        return made

    command("list", "the kernels and what each does", None)
    profile = command("profile", "run a kernel in the interpreter and count what it does", 1)
    profile.add_argument("--draw", metavar="FILE.svg", help="draw the report as well")
    profile.add_argument("--small", action="store_true", help="small odd sizes instead of SmolLM2's")
    command("ptx", "print what the compiler makes of a kernel", 1)
    command("sass", "registers, spills, occupancy and instructions of the machine code", "*")
    predict = command("predict", "predicted times on a T4, an A100 and an H100, from the bytes they move", "*")
    predict.add_argument("--model", choices=("smollm2-135m", "llama-8b"), default="smollm2-135m", help="whose sizes")
    mutate = command("mutate", "break kernels one place at a time; list what nobody notices", "*")
    mutate.add_argument("--sort", choices=("order", "guard"), action="append", help="which mutants (both)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from cuda_kernels.toolchain.examples import EXAMPLES

    names = getattr(options, "kernel", None) or list(EXAMPLES)
    unknown = [name for name in names if name not in EXAMPLES]
    if unknown:
        print(f"no kernel is called {unknown[0]}; there are {', '.join(EXAMPLES)}", file=sys.stderr)
        return 2
    return {"list": _list, "profile": _profile, "ptx": _ptx, "sass": _sass, "predict": _predict, "mutate": _mutate}[
        options.command
    ](names, options)


def _list(names, options) -> int:
    from cuda_kernels.toolchain.examples import example

    for name in names:
        summary = example(name, cc=options.cc).kernel.doc.strip().splitlines()[0]
        print(f"{name:<24} {summary}")
    return 0


def _profile(names, options) -> int:
    from cuda_kernels.toolchain.examples import SMALL, SMOLLM2
    from cuda_kernels.toolchain.profile import draw, profile, report_text

    result = profile(names[0], options.cc, SMALL if options.small else SMOLLM2)
    print(report_text(result))
    if options.draw:
        draw(result, options.draw)
        print(f"\ndrawn to {options.draw}")
    return 0


def _ptx(names, options) -> int:
    from cuda_kernels.toolchain.profile import ptx_of

    print(ptx_of(names[0], options.cc))
    return 0


def _sass(names, options) -> int:
    from cuda_kernels.toolchain.examples import SMOLLM2, example
    from cuda_kernels.toolchain.sass_report import report, wanted_features

    complaints = 0
    print(f"{'kernel':<24} registers  spills  shared  blocks/SM  uses")
    for name in names:
        made = report(example(name, SMOLLM2, options.cc).kernel, options.cc)
        figures = f"{made.assembled.registers:>9} {made.spills:>7} {made.shared_bytes:>7} {made.blocks_per_sm:>10}"
        print(f"{name:<24} {figures}  {', '.join(sorted(made.features))}")
        for complaint in made.complaints(wanted_features(made.kernel, options.cc)):
            complaints += 1
            print(f"    {complaint}")
    return 1 if complaints else 0


def _predict(names, options) -> int:
    from cuda_kernels.toolchain.examples import MODELS
    from cuda_kernels.toolchain.profile import prediction_table

    for line in prediction_table(names, MODELS[options.model], options.cc):
        print(line, flush=True)
    return 0


def _mutate(names, options) -> int:
    from cuda_kernels.toolchain.mutation import sweep

    for name in names:
        verdicts: Counter = Counter()
        for mutant, verdict in sweep(name, options.cc, tuple(options.sort or ("order", "guard"))):
            verdicts[verdict] += 1
            if verdict == "survived":
                print(f"{name}: survived: {mutant}", flush=True)
        print(f"{name}: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
