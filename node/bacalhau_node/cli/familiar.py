"""What people who know upstream's `bacalhau` type first, answered with the words of this one. Nothing is an alias."""

from __future__ import annotations

import click

from bacalhau_node import literals

COMMANDS = {
    "agent": "doctor, or nodes",
    "config": "serve --help and the environment: BACALHAU_DIR, BACALHAU_API_HOST, BACALHAU_API_PORT",
    "create": "run FILE.py",
    "docker": "run --image NAME -- COMMAND…",
    "exec": "run FILE.py",
    "id": "nodes",
    "job": "run, list, describe, logs, get, cancel",
    "job describe": "describe ID",
    "job executions": "describe ID",
    "job get": "get ID",
    "job history": "describe ID",
    "job list": "list",
    "job logs": "logs ID",
    "job run": "run FILE.py",
    "job stop": "cancel ID",
    "node": "nodes",
    "ps": "list",
    "stop": "cancel ID",
}
"""Upstream's commands -> what to type after `bacalhau-node`."""


class Group(click.Group):
    """Commands by their exact names; another program's are answered with what they are called here."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See click."""
        typed = next((words for words in (" ".join(args[:2]), args[0]) if words in COMMANDS), None)
        if typed is not None and args[0] not in self.commands:
            ctx.fail(f"No such command {typed!r}. It is called here: bacalhau-node {COMMANDS[typed]}")
        return super().resolve_command(ctx, args)


class Command(click.Command):
    """A command whose unknown options are answered like those of the magic."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [name for param in self.params for name in param.opts]
            ctx.fail(f"No such option: {error.option_name}{literals.unknown(error.option_name, known)}")
