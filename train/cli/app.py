"""The commands by name, their help, and their completion in a shell.

CONTRIBUTING.md says how to add one. Packages on higher floors add theirs by an entry point
(group `tdmpc2_fast.commands`), which gets the words as they came.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from typing_extensions import override

from tdmpc2_fast import __version__
from tdmpc2_fast.errors import did_you_mean

from . import commands, completion, data, export, keys, tables, tasks

Body = Callable[[Sequence[str]], int]
_EXAMPLES = """\b
Examples:
  tdmpc2-fast train task=walker-walk
  tdmpc2-fast train task=dog-run seed=1,2,3        a sweep: three runs
  tdmpc2-fast train preset=quick                   minutes on a laptop
  tdmpc2-fast resume runs/walker-walk/default/1    goes on where it was stopped
  tdmpc2-fast eval runs/walker-walk/default/1      a run's best checkpoint

Without a command, key=value words mean train, as in the official code."""


class Words(click.Command):
    """A command that reads its words itself: `key=value` is no grammar of click's.

    Args:
        name: what a person types.
        body: what it does with the words after the name; its docstring is the help.
        usage: these words, in the line of usage.
        config: whether it takes config keys, which its help then lists and a shell completes.
        own: the class of the keys it takes besides.
    """

    def __init__(self, name: str, body: Body, usage: str, config: bool = False, own: type[Any] | None = None) -> None:
        super().__init__(name, callback=body, help=body.__doc__, short_help=(body.__doc__ or "").partition("\n")[0])
        self.body, self.usage, self.config, self.own = body, usage, config, own

    @override
    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [self.usage]

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if {"-h", "--help"} & {*args} and not ctx.resilient_parsing:
            click.echo(self.get_help(ctx))
            ctx.exit()
        ctx.args = list(args)
        return ctx.args

    @override
    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.config or self.own:
            formatter.write("\n" + tables.rendered(tables.key_tables(self.own, self.config)) + "\n")

    @override
    def invoke(self, ctx: click.Context) -> int:
        return self.body(ctx.args)

    @override
    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return completion.complete(ctx.args, incomplete, self.own, self.config)


class Plugin(click.Command):
    """A command from an entry point; its words are its own, `--help` included."""

    def __init__(self, entry: EntryPoint) -> None:
        super().__init__(entry.name, add_help_option=False)
        self.entry = entry

    @override
    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of its module, which is read, not imported: what it needs may take seconds."""
        try:
            found = importlib.util.find_spec(self.entry.module)
            source = None if found is None or found.origin is None else Path(found.origin).read_text()
        except (ImportError, OSError) as e:
            return f"Cannot be loaded: {e}"
        doc = "" if source is None else ast.get_docstring(ast.parse(source)) or ""
        return doc.partition("\n")[0].partition(": ")[2].capitalize()

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args

    @override
    def invoke(self, ctx: click.Context) -> int:
        body: Body = self.entry.load()
        return body(ctx.args)


class App(click.Group):
    """All commands; words without one mean `train`."""

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, and the official command line, which names no command, as one of `train`."""
        first = args[0] if args else ""
        if not args and not ctx.resilient_parsing:
            args = ["--help"]
        elif first == "help":
            args = [*args[1:], "--help"]
        elif first not in ("-h", "--help", "--version") and ("=" in first or first.startswith(("-", "+", "~"))):
            args = ["train", *args]
        return super().parse_args(ctx, args)

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *(e.name for e in entry_points(group="tdmpc2_fast.commands"))]

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        plugins = entry_points(group="tdmpc2_fast.commands", name=cmd_name)
        return self.commands.get(cmd_name) or next((Plugin(e) for e in plugins), None)

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            raise click.UsageError(f"unknown command {args[0]!r}.{did_you_mean(args[0], self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)

    @override
    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands and, once a letter is there, the keys of `train`."""
        found = super().shell_complete(ctx, incomplete)
        return found + (completion.complete([], incomplete, keys.Options, True) if incomplete else [])


COMMANDS = (
    Words("train", commands.train, "[key=value ...]", config=True, own=keys.Options),
    Words("resume", commands.resume, "RUN [key=value ...]", config=True),
    Words("eval", commands.evaluate, "CHECKPOINT [key=value ...]", config=True, own=keys.EvalOptions),
    Words("plot", commands.plot, "RUN ... [key=value ...]", own=keys.PlotOptions),
    Words("plan", commands.plan, "CHECKPOINT [key=value ...]", config=True, own=keys.PlanOptions),
    Words("export", export.export, "RUN [key=value ...]", own=keys.ExportOptions),
    Words("tasks", tasks.tasks, "[TEXT] [--check]", own=keys.TasksOptions),
    Words("suites", tasks.suites, "[install|remove NAME ...] [key=value ...]", own=keys.SuitesOptions),
    Words("info", commands.info, "[CHECKPOINT]"),
    Words("collect", data.collect, "SOURCE ... out=FOLDER [key=value ...]", config=True, own=keys.CollectOptions),
    Words("data", data.data, "info FOLDER | check FOLDER | convert SOURCE ... out=FOLDER", own=keys.DataOptions),
)
app = App(
    help="TD-MPC2: train an agent, look at it, measure it. COMMAND --help lists the keys of a command.",
    epilog=_EXAMPLES,
    commands=COMMANDS,
    subcommand_metavar="COMMAND [ARGUMENT ...] [key=value ...]",
    options_metavar="",
    context_settings=dict(help_option_names=["-h", "--help"]),
)
click.version_option(__version__, message="%(version)s")(app)
