"""`lmms-keyspace`: what a person does with run folders, and `doctor` for the installation itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lmms_keyspace import __version__
from lmms_keyspace.errors import InputError
from lmms_keyspace.processes import terminable

app = typer.Typer(
    help="Join accuracy with attention key-space divergence over lmms-eval runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Runs = Annotated[list[Path], typer.Argument(help="Run folders of lmms-eval; the first is the base.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Compare runs that differ in what makes them comparable; say so.")
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lmms_keyspace {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def compare(
    runs: Runs,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Paired table of runs against the first: accuracy, flip rate, attention, divergence, with intervals."""
    from lmms_keyspace.reports import compare as compared
    from lmms_keyspace.reports import load_runs, render_comparison

    loaded = load_runs(runs, allow_mismatch=allow_mismatch)
    comparison = compared(loaded)
    if json:
        typer.echo(comparison.to_json())
    else:
        render_comparison(comparison, Console())
    _exit_if_left_out(loaded.left_out)


@app.command()
def report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", help="Folder for the page, its tables and figures.")],
    tsne_runs: Annotated[int, typer.Option("--tsne-runs", min=0, help="Draw the keys of so many runs.")] = 4,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Write figure files, too.")] = True,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """One self-contained HTML page (with Markdown, tables and figures) that puts the runs side by side."""
    from lmms_keyspace.reports import load_runs, write_report

    loaded = load_runs(runs, allow_mismatch=allow_mismatch)
    written = write_report(loaded, out, figure_files=figures, tsne_runs=tsne_runs)
    for path in dict.fromkeys(path if path.parent == out else path.parent for path in written):
        typer.echo(path)
    _exit_if_left_out(loaded.left_out)


def _exit_if_left_out(reasons: Sequence[str]) -> None:
    """The rest was reported; still, not everything that was asked for was done."""
    for reason in reasons:
        typer.echo(f"lmms-keyspace: left out: {reason}", err=True)
    if reasons:
        raise typer.Exit(1)


@app.command()
def leaderboard(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of lmms-eval, or folders above them.")],
    columns: Annotated[
        str | None, typer.Option("--columns", help="Metrics, separated by commas, each as metric or task:metric.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for HTML, Markdown and CSV.")] = None,
) -> None:
    """One row per model and adapter, with intervals and ranks; Markdown unless --out is given."""
    from lmms_keyspace.reports import leaderboard as ranked
    from lmms_keyspace.reports.leaderboard_output import leaderboard_markdown, write_leaderboard

    board = ranked(runs, [name.strip() for name in columns.split(",") if name.strip()] if columns else [])
    if out is None:
        typer.echo(leaderboard_markdown(board), nl=False)
    else:
        for path in write_leaderboard(board, out):
            typer.echo(path)


@app.command()
def gate(
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="Run folder, or a baseline file that --freeze wrote.")
    ] = None,
    candidate: Annotated[Path | None, typer.Option("--candidate", help="Run folder to judge.")] = None,
    policy: Annotated[
        str, typer.Option("--policy", help="TOML file, or the name of a policy of the package.")
    ] = "visual-reliance",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for gate.md, gate.json and gate.xml.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    junit: Annotated[Path | None, typer.Option("--junit", help="JUnit XML file to write.")] = None,
    summary: Annotated[Path | None, typer.Option("--summary", help="Markdown file to append to.")] = None,
    freeze: Annotated[Path | None, typer.Option("--freeze", help="Write this run as a baseline file to --out.")] = None,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Is the candidate at least as good as the baseline? Exits 0 pass, 1 fail, 2 inconclusive, 3 refused input."""
    from lmms_keyspace.reports.gate_command import freeze_run, run_gate

    try:
        if freeze is not None:
            typer.echo(freeze_run(freeze, out, judging=baseline or candidate))
            return
        code = run_gate(
            baseline,
            candidate,
            policy,
            allow_mismatch=allow_mismatch,
            out=out,
            json=json,
            junit=junit,
            summary=summary,
            console=Console(),
        )
    except InputError as error:
        # Not 2: a caller who lets the inconclusive pass must not let a broken run pass.
        print(f"lmms-keyspace: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    raise typer.Exit(code)


@app.command()
def rescore(
    run: Annotated[Path, typer.Argument(help="Run folder of lmms-eval, or one samples file.")],
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """All metrics of our tasks again, from the samples files alone."""
    from json import dumps

    from lmms_keyspace.tasks.rescore import rescore as rescored

    found = rescored(run)
    if json:
        typer.echo(dumps({str(one.path): one.results() for one in found}, indent=2, allow_nan=False))
    else:
        typer.echo("\n\n".join("\n".join(one.lines()) for one in found))


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of settings; without it the bundled model learns from scenes.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Folder for the adapter.")] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Model: folder or hub id.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting as name=value, e.g. loss.lambda_mmd=1; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
) -> None:
    """Train a MaLoRA or LoRA adapter, and follow divergence and text bias while it learns."""
    from lmms_keyspace.training.config import read_config
    from lmms_keyspace.training.run import train as train_adapter

    given = {"output_dir": output_dir, "pretrained": pretrained}
    flags = [f"{name}={value}" for name, value in given.items() if value is not None]
    typer.echo(train_adapter(read_config(config, [*flags, *(settings or ())]), resume=resume))


@app.command()
def analyze(
    run: Annotated[Path, typer.Argument(help="Run folder of lmms-eval; the newest run in it is taken.")],
    protocol: Annotated[str, typer.Option("--protocol", help="robust, paper or both.")] = "robust",
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Base run: its bandwidths, and the change from it.")
    ] = None,
    spaces: Annotated[
        str | None, typer.Option("--spaces", help="Joined with +, such as k_pre+k_post; default: those measured.")
    ] = None,
    permutations: Annotated[int, typer.Option("--permutations", help="Of the block permutation tests.")] = 1000,
    seed: Annotated[int | None, typer.Option("--seed", help="Default: the run's.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default: analysis beside the run.")] = None,
) -> None:
    """Tests, intervals, bands and changes of a finished run again; goes on where it was when it is stopped."""
    from lmms_keyspace.analysis import show_analysis

    show_analysis(
        run,
        protocol=protocol,
        reference=reference,
        spaces=spaces.split("+") if spaces else None,
        n_permutations=permutations,
        seed=seed,
        out=out,
    )


@app.command()
def doctor() -> None:
    """Check the installation: registration, every task, versions, bundled weights. Exits 1 when something is wrong."""
    from lmms_keyspace.doctor import examine

    console = Console()
    findings = examine()
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[red]FAIL[/red]"
        console.print(f"{mark} {finding.subject}: ", end="")
        console.print(finding.detail, markup=False, highlight=False, soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Console script: a user's mistake is one line on standard error and exit status 2, not a traceback."""
    try:
        with terminable():  # or SIGTERM would leave temporary files
            app()
    except InputError as error:
        print(f"lmms-keyspace: {error}", file=sys.stderr)
        sys.exit(2)
