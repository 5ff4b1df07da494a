"""The command line: one module per command, each a library call and its printing.

Data goes to stdout, everything else to stderr. Exit codes: 0, 2 for what the user can mend, 1 for
what we broke (with a traceback), 130 for Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import click

from moeq import __version__
from moeq.cli.backends import backends
from moeq.cli.cache import cache
from moeq.cli.demo import demo
from moeq.cli.eval import evaluate
from moeq.cli.generate import generate
from moeq.cli.output import printable
from moeq.cli.plan import plan
from moeq.cli.quantize import quantize
from moeq.cli.serve import serve
from moeq.errors import MoeqError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: moeq demo",
)
@click.version_option(__version__, prog_name="moeq")
def cli() -> None:
    """Quantize Mixture-of-Experts models while they load."""


for _command in (demo, plan, evaluate, generate, serve, quantize, cache, backends):
    cli.add_command(_command)


def main() -> None:
    """Entry point of `moeq`. The only place that exits."""
    warnings.showwarning = _warn
    try:
        cli(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except MoeqError as error:
        _fail(error.message, error.hint, error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    text = "\n".join(map(printable, str(message).splitlines()))
    click.echo(f"warning: {text}", err=True)


def _fail(message: str, hint: str, code: int) -> None:
    click.echo(f"error: {printable(message)}", err=True)
    if hint:
        click.echo(f"hint: {printable(hint)}", err=True)
    sys.exit(code)
