"""The command line: arguments -> pipeline -> printed report -> exit code.

Nothing heavy is imported before a command runs, so that ``--help`` is immediate.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from typing import Any

import click

from bnfold._version import __version__
from bnfold.commands import COMMANDS
from bnfold.commands.terminal import fail, write
from bnfold.errors import EXIT_CODES, BnfoldError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG}
_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())
_EPILOG += (
    "\n\nAn example: bnfold export models/digits.py:digits_cnn --weights models/digits_cnn.safetensors -o net.onnx"
)


# -- how a run fails --------------------------------------------------------------------------------------------------


class _Commands(click.Group):
    """Every failure is one line and one of the documented exit codes."""

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            code = fail(error.format_message(), 2, prefix="")
        except click.ClickException as error:
            path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "bnfold"
            message = error.format_message().rstrip(".")
            code = fail(f"{message}{'' if message.endswith('?') else '.'} Run {path} --help", 2)
        except click.Abort:
            code = fail("interrupted", 130)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            return fail("interrupted", 130)
        except BnfoldError as error:
            _trace(ctx)
            return fail(str(error), 6 if _exhausted(error) else error.exit_code)
        except Exception as error:
            _trace(ctx)
            if _exhausted(error):
                return fail(f"the memory or the disk gave out: {_one_line(error)}", 6)
            hint = "" if ctx.meta.get("debug") else ". Run it again with --debug for the traceback, and report it"
            return fail(f"internal: {_one_line(error)}{hint}", 4)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400].rstrip(": .")


def _trace(ctx: click.Context) -> None:
    if ctx.meta.get("debug"):
        write(traceback.format_exc(), sys.stderr)


def _exhausted(error: BaseException | None) -> bool:
    """Whether the memory or the disk is what was really missing."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if isinstance(error, RuntimeError) and re.search(r"can't allocate memory|out of memory", str(error)):
            return True
        error = error.__cause__
    return False


# -- commands ----------------------------------------------------------------------------------------------------------


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=_EPILOG
)
@click.version_option(__version__, prog_name="bnfold")
def cli() -> None:
    """Fold BatchNorm wherever algebra allows, export ONNX, and prove the file equal to the unfolded model.

    \b
    SOURCE is one of
      path/to/file.py:factory   a function or class that builds the model; --weights has its checkpoint
      pkg.module:factory        the same, imported
      timm:NAME                 a model of timm, or torchvision:NAME; --arg pretrained=true for its weights
      hf:DIR                    what transformers' save_pretrained wrote, or hf:ID from the hub
      net.pt2                   what torch.export.save wrote
      net.torchscript.pt        a TorchScript archive
      net.pt                    a whole pickled module, only with --unsafe-pickle
    """


for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Runs the command line and exits."""
    cli()
