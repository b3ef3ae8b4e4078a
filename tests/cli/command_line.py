"""The command line, made once: that takes longer than most of what is called."""

import typer

from mipipe.cli.main import app

COMMAND = typer.main.get_command(app)
