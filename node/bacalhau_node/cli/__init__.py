"""`bacalhau-node`: jobs from the command line, a node for others, and what works on this machine.

Exit codes: 0 completed, 1 the job failed, 2 wrong usage, 3 node not reachable, 130 interrupted.
"""

from __future__ import annotations

import sys

import click
import msgspec

from bacalhau_node import __version__
from bacalhau_node.cli import content, jobs
from bacalhau_node.cli.common import FAILED, finish
from bacalhau_node.cli.devstack import devstack
from bacalhau_node.cli.familiar import Group
from bacalhau_node.cli.network import network
from bacalhau_node.cli.run import run
from bacalhau_node.cli.serving import serve
from bacalhau_node.doctor import Finding, examine, healthy


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run shards of your data in containers, on this machine or on a network of nodes."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def version(as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Print the version."""
    click.echo(f'{{"version":"{__version__}"}}' if as_json else __version__)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Try what a first job needs, and say what to do about what doesn't work."""
    findings = finish(examine())
    if as_json:
        click.echo(msgspec.json.encode(findings))
    else:
        for finding in findings:
            click.echo(_finding_text(finding))
    sys.exit(0 if healthy(findings) else FAILED)


def _finding_text(finding: Finding) -> str:
    mark = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}[finding.state]
    remedy = f"\n          -> {finding.remedy}" if finding.remedy else ""
    return f"{mark}  {finding.what}: {finding.detail}{remedy}"


for command in (run, serve, devstack, network, *jobs.COMMANDS, *content.COMMANDS):
    main.add_command(command)
