"""Several runs one after the other from one file: InstructGPT's three steps in one command. Without torch.

    out: runs/instructgpt
    model: smollm2-135m
    chain:
      sft:    {objective: sft, data: talks.jsonl, steps: 200}
      reward: {objective: reward, data: pairs.jsonl, model: $sft, steps: 100}
      ppo:    {objective: {type: ppo, reward: $reward}, data: prompts.jsonl, model: $sft, steps: 50}

What stands beside `chain` holds for every run that does not say otherwise. `$sft` is the model that the run of that name ended with: its
best where something is held out, else its last. The runs' folders are out/1-sft, out/2-reward and so on, each one like any other run's:
the same command goes on where it was stopped.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from weft.errors import UserError, nearest
from weft.files import read_text
from weft.train.recipe import Recipe, override, recipe

KEY = "chain"
_NAME, _REFERENCE = re.compile(r"[a-z][a-z0-9_-]*"), re.compile(r"\$(.*)", re.DOTALL)


@dataclass(frozen=True)
class Chain:
    """Runs in order: name -> what its recipe says, with references to earlier runs."""

    source: str
    out: Path
    runs: Mapping[str, Mapping[str, Any]]

    def folder(self, name: str) -> Path:
        return self.out / f"{list(self.runs).index(name) + 1}-{name}"

    def recipes(self) -> Iterator[tuple[str, Recipe]]:
        """The recipe of each run, made when it is asked for: those before it have to be over by then."""
        for name, data in self.runs.items():
            yield name, self._recipe(name, data)

    def check(self) -> None:
        """Validate all recipes; raises UserError."""
        for _ in self.recipes():
            pass

    def _recipe(self, name: str, data: Mapping[str, Any]) -> Recipe:
        earlier = list(self.runs)[: list(self.runs).index(name)]
        resolved = {key: self._resolve(value, earlier, f"{name}.{key}") for key, value in data.items()}
        return recipe({**resolved, "out": str(self.folder(name))}, f"{self.source}, {name}")

    def _resolve(self, value: Any, earlier: Sequence[str], place: str) -> Any:
        """A value with references replaced by folders, at any depth."""
        if isinstance(value, dict):
            return {key: self._resolve(inner, earlier, f"{place}.{key}") for key, inner in value.items()}
        if isinstance(value, list):
            return [self._resolve(inner, earlier, place) for inner in value]
        found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            return value
        if found[1] not in earlier:
            names = ", ".join(f"${name}" for name in earlier) or "none, as this is the first"
            raise UserError(f"{self.source}: {place} is {value}, but the runs before it are: {names}.{nearest(found[1], earlier)}")
        best = self.folder(found[1]) / "best"
        return str(best if best.is_dir() else self.folder(found[1]) / "last")


def read_chain(path: str | Path, overrides: Sequence[str] = ()) -> Chain | None:
    """The chain that a recipe's file holds, validated whole, or None where it is one run.

    overrides  `sft.optim.lr=1e-4` sets a value of one run; `steps=5` sets it for all, but for values that name an earlier run.
    Raises UserError.
    """
    data = _load(Path(path))
    if not isinstance(data, dict) or KEY not in data:
        return None
    runs = data.pop(KEY)
    if (
        not isinstance(runs, dict)
        or not runs
        or not all(isinstance(run, dict) and _NAME.fullmatch(str(name)) for name, run in runs.items())
    ):
        raise UserError(
            f"{path}: {KEY} is no list of runs; give each a name in small letters with its keys, such as `sft: {{steps: 100}}`."
        )
    clash = next((name for name in runs if name in Recipe.model_fields), None)
    if clash is not None:
        raise UserError(f"{path}: a run of the {KEY} is called {clash}, which is a key of a recipe; give it another name.")
    own = {name: [o.removeprefix(f"{name}.") for o in overrides if o.startswith(f"{name}.")] for name in runs}
    common = [o for o in overrides if not any(o.startswith(f"{name}.") for name in runs)]
    out = override(data, common).get("out")
    if out is None:
        raise UserError(f"{path}: no `out` is given; add `out: …` to the recipe, or out=… to the command.")
    made = {}
    for name, run in runs.items():
        lengths = {"steps", "minutes"} if {"steps", "minutes"} & run.keys() else set()
        merged = {**{key: value for key, value in data.items() if key not in {"out", *lengths}}, **run}
        wanted = [o for o in common if o.partition("=")[0] != "out" and not _names_earlier_run(merged, o.partition("=")[0])]
        made[name] = override(override(merged, wanted), own[name])
    chain = Chain(str(path), Path(out), made)
    chain.check()
    return chain


def _names_earlier_run(data: Any, key: str) -> bool:
    """Whether what stands at a dotted key is a reference such as `$sft`."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return isinstance(data, str) and _REFERENCE.fullmatch(data) is not None


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(read_text(path, "recipe"))
    except yaml.YAMLError:
        return None  # `read_recipe` says what is wrong with it
