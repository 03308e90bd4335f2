"""`smca data`: data sets made and checked."""

from __future__ import annotations

import argparse

from . import check, digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca data`."""
    parser.description = "Data sets to train on, made and checked."
    kinds = parser.add_subparsers(title="data", dest="data", metavar="NAME", required=True)
    for name, module in {"digits": digits, "check": check}.items():
        kind = kinds.add_parser(name, help=module.PURPOSE)
        module.add_arguments(kind)
        kind.set_defaults(run=module.run)


def run(args: argparse.Namespace) -> int:
    """`smca data`: the exit status of the command chosen."""
    status: int = args.run(args)
    return status
