"""The command line: arguments -> pipeline -> printed report -> exit code.

Nothing heavy is imported before a command runs, so that ``--help`` is immediate.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from bnfold._version import __version__
from bnfold.commands import COMMANDS
from bnfold.commands.terminal import Terminated, fail, heed_signals, hush, ignore_signals
from bnfold.errors import EXIT_CODES

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())
_EPILOG += (
    "\n\nAn example: bnfold export models/digits.py:digits_cnn --weights models/digits_cnn.safetensors -o net.onnx"
)


class _Commands(click.Group):
    """Arguments that cannot be understood are one line too; ``ends`` has all that happens after."""

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
        except SystemExit:  # how click answers a reader of the help that has left
            code = 0
        except OSError as error:
            hush(sys.stdout)
            code = fail(f"the help could not be printed: {error.strerror}", 6)
        sys.exit(code if isinstance(code, int) else 0)


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
    heed_signals()
    try:
        cli()
    except Terminated:  # between the end of a command and that of the process
        sys.exit(fail("terminated", 143))
    finally:
        ignore_signals()
