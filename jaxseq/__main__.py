"""Command line: `python -m jaxseq verify` and `python -m jaxseq --version`."""

import argparse
from pathlib import Path

import jax

from jaxseq import __version__


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxseq", description="convolution and recurrence for JAX")
    versions = f"jaxseq {__version__}, jax {jax.__version__}"
    parser.add_argument("--version", action="version", version=versions, help="print the versions of jaxseq and jax")
    verify = parser.add_subparsers(dest="command", required=True).add_parser(
        "verify", help="check the gradient of every op on this machine, device and version of JAX"
    )
    verify.add_argument("--op", metavar="NAME", help="check one op (default: all)")
    verify.add_argument(
        "--level",
        choices=("quick", "full"),
        default="quick",
        help="quick (default): the main checks on variants that together cover every rule, a few minutes on two cores; "
        "full: all checks on all variants of each op, which takes far longer",
    )
    verify.add_argument("--json", type=Path, metavar="FILE", help="also write all reports to FILE")
    options = parser.parse_args(argv)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: no such directory: {options.json.parent}")
    from jaxseq import _cases, _verify  # noqa: PLC0415 - after the number of devices is set

    if options.op not in (None, *_cases.CASES):
        parser.error(f"--op: expected one of {', '.join(_cases.CASES)}, got {options.op}")
    return _verify.main(options.op, options.level, options.json)


if __name__ == "__main__":
    # Emulate two CPU devices, so that sharding is checked too. No effect on other platforms.
    jax.config.update("jax_num_cpu_devices", 2)
    raise SystemExit(main())
