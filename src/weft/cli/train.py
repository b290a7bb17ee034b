"""`weft train`: a recipe, with overrides, into a trained model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from weft.cli.console import emit_json, progress, say

if TYPE_CHECKING:
    from weft.train.recipe import Recipe

# Objectives whose models answer; a model of text may have a chat template that came with its tokenizer.
TALKING = ("SFT", "DPO", "PPO", "GRPO", "Rejection")


def train(
    recipe: Path = typer.Argument(..., help="A YAML recipe.", show_default=False),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Settings in place of the recipe's, such as optim.lr=3e-4."),
    restart: bool = typer.Option(False, "--restart", help="Throw away the run that out holds and begin again."),
    json: bool = typer.Option(False, "--json", help="Print the run card as the last line."),
) -> None:
    """Train a model from a recipe. The same command goes on where an interrupted run stopped."""
    from weft.train.chain import read_chain
    from weft.train.recipe import read_recipe

    chain = read_chain(recipe, overrides or [])
    if chain is None:
        _run(read_recipe(recipe, overrides or []), restart, json)
        return
    for number, (name, read) in enumerate(chain.recipes(), 1):
        if os.environ.get("RANK", "0") == "0":
            say(f"{number}/{len(chain.runs)} {name}")
        _run(read, restart, json)


def _run(read: "Recipe", restart: bool, json: bool) -> None:
    """One run, from its beginning or from where it stopped, to its end; raises Exit where it was interrupted."""
    from weft.train.assemble import run_recipe
    from weft.train.callbacks import ProgressLine

    with progress() as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"data: {stage}", total=total)
            bar.update(tasks[stage], completed=done)

        class Line(ProgressLine):
            def on_start(self, card: dict[str, Any]) -> None:
                bar.stop()
                super().on_start(card)

        card = run_recipe(read, restart, [Line()], report)
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
        say(closing(card))
        if json:
            emit_json(card)
    if card["status"] == "interrupted":
        raise typer.Exit(130)


def closing(card: dict[str, Any]) -> str:
    """What came out, and what to do next."""
    from weft.train.watched import Watched

    run, out = card["run"], card["out"]
    if card["status"] == "interrupted":
        done = f"Interrupted after step {run['steps_done']}"
        if run["steps"] is None:
            return f"{done}, before the pace was known: nothing is kept. Run the same command to begin again."
        return f"{done} of {run['steps']}, which is saved in {out}/last. Run the same command to go on."
    main = Watched(**card["watched"][0])
    reached = f": training {main.title} {main.write(card['training'][main.name])}" if main.name in card["training"] else ""
    lines = [f"{card['status']} after {run['steps_done']} steps{reached}"]
    if card["best"]:
        lines.append(f"best held-out {main.best(card['best']['loss'])} at step {card['best']['step']}: {out}/best")
    lines.append(f"last weights: {out}/last   run card: {out}/run.md")
    if "score" not in card["model"]["spec"]:
        folder = Path(out) / ("best" if card["best"] else "last")
        talks = run["objective"] in TALKING and (folder / "chat_template.jinja").is_file()
        lines.append(f"next: weft chat {folder}" if talks else f'next: weft generate {folder} -p "…"')
    return "\n".join(lines)
