"""``adflow download``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adflow.cli import _options as o
from adflow.cli._console import Talk

if TYPE_CHECKING:
    from adflow.tasks.download import Plan


def download(
    names: Annotated[
        list[str],
        typer.Argument(help="mvtec, mvtec/cable, resnet18, uflow-mvtec-cable, hub:owner/name.", show_default=False),
    ],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="An archive, file or folder that is already on this disk.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take files whose hash nobody has checked yet.")
    ] = False,
    keep_archive: Annotated[
        bool, typer.Option("--keep-archive", help="Keep archives in the cache after unpacking.")
    ] = False,
    zoo_file: Annotated[Path | None, typer.Option("--zoo", help="Your own zoo file, merged over ours.")] = None,
    data_root: o.DataRoot = None,
    runs: o.Runs = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Bring data sets, backbone weights and fitted detectors to this machine, checked."""
    from adflow import zoo
    from adflow.tasks import download as task

    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    catalogue = zoo.load(zoo_file)
    if dry_run:
        plans = [task.plan(name, catalogue=catalogue, root=data_root, unverified=unverified) for name in names]
        talk.data({"plans": [task.to_dict(plan) for plan in plans]}, "\n\n".join(map(describe, plans)))
        return
    results = []
    for name in names:
        if not name.startswith("hub:"):
            licence = catalogue.find(name).licence
            talk.say(f"{name}: {licence.name}. {licence.note}")
        with talk.progress(name) as step:

            def megabytes(done: int, total: int, what: str, step: Any = step) -> None:
                if total > 10**6:
                    done, total, what = done // 10**6, total // 10**6, f"{what} (MB)"
                step(done, total, what)

            result = task.download(
                name,
                source=source,
                root=data_root,
                runs=runs,
                catalogue=catalogue,
                no_network=offline,
                unverified=unverified,
                keep_archive=keep_archive,
                progress=megabytes,
                say=talk.say,
            )
        for note in result.notes:
            talk.warn(note)
        results.append(result)
    lines = [f"{path}{'  (was there)' if r.already else ''}" for r in results for path in r.paths]
    talk.data({"downloads": [task.to_dict(result) for result in results]}, "\n".join(lines))
    if names[0].split("/")[0] in catalogue.datasets:
        talk.next(f"adflow fit {names[0]}")


def describe(plan: Plan) -> str:
    """Write a plan for people: what, from where, how much, under what terms, whereto."""
    from adflow._store import size_text

    commercial = {True: "commercial use allowed", False: "no commercial use", None: "commercial use unclear"}
    lines = [f"{plan.name}: {plan.title} ({plan.kind})"]
    for file in plan.files:
        checked = file.trust != "not verified"
        state = f"checked by {file.trust}" if checked else "not verified, needs --unverified"
        state = "already here" if file.here else state
        lines.append(f"  file      {file.name}, {size_text(file.bytes)}, {state}")
        lines += [f"  from      {source}" for source in file.sources]
    for class_, counts in plan.counts.items():
        known = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number is not None)
        if known:
            lines.append(f"  holds     {class_}: {known}")
    licence = plan.licence
    lines.append(f"  licence   {licence.name} ({commercial[licence.commercial]}). {licence.note}")
    lines.append(f"  to        {plan.destination} ({size_text(plan.free)} free)")
    lines.append(f"  fetch     {'nothing, it is all here' if plan.here else size_text(plan.bytes)}")
    return "\n".join(lines)
