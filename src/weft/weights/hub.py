"""Getting models: pull into the cache, find by name or path, list, remove. Importable without torch.

Where things lie is in `model_cache`; what is fetched, and how, in `hub_download` (Hugging Face hub), `wheel_model` (a package) and
`local_model` (a folder or file of this machine).
"""

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from weft.errors import UserError, nearest
from weft.weights import hub_download, hub_names, local_model, model_cache, wheel_model
from weft.weights.model_cache import Progress, Pulled

__all__ = ["Pulled", "find_model", "list_models", "offline_by_environment", "pull", "remove"]


def offline_by_environment() -> bool:
    """Whether WEFT_OFFLINE or HF_HUB_OFFLINE forbids the network."""
    return any(os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off") for name in ("WEFT_OFFLINE", "HF_HUB_OFFLINE"))


def _on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pull(
    name: str,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    save_as: str | None = None,
    verify: bool = False,
    note: Callable[[str], None] = _on_stderr,
) -> Pulled:
    """Make sure that a model is in the cache, whole, and return it.

    name      a short name ("smollm2-135m"), a Hugging Face repo id ("org/name"), one GGUF file of a repo ("org/name:Q8_0"), or, with
              `save_as`, a folder in Hugging Face layout or a .gguf file of this machine.
    revision  branch, tag or commit of the repo. A model that was pulled at another one is replaced.
    offline   never touch the network (also by WEFT_OFFLINE or HF_HUB_OFFLINE in the environment).
    save_as   the name to keep it under; default `name`.
    verify    hash every file of a model that is already here, and fetch again what is damaged.
    note      is told, in a sentence, what a person should know: where a fallback is taken.

    A model that is here already is not fetched again. Raises UserError saying what to do where it cannot be had.
    """
    path = _local_path(name, bare=save_as is not None)
    if path is not None and save_as is None:
        raise UserError(
            f"{path} is on this machine and can be used by its path. To keep a copy in the cache: weft pull {name} --name NAME."
        )
    target = model_cache.check_name(save_as or name)
    if path is not None and revision is not None:
        raise UserError("--revision belongs to repos of the hub; leave it out for a path.")
    with model_cache.locked(target):
        model_cache.recover(target)
        here, bad = model_cache.find(target), []
        if here and path is None and save_as not in (None, name) and here.source not in _sources(name):
            raise UserError(
                f"'{target}' is already a model in the cache, from {here.source}; choose another name, or first: weft rm {target}"
            )
        if here and path is None and revision in (None, here.revision, here.commit):
            bad = model_cache.damaged_files(here, hashes=verify, progress=progress)
            if not bad:
                return here
        partial = model_cache.partial_of(target)
        if path is not None:
            return _finish(target, partial, *local_model.copy_in(path, partial, progress))
        if offline or offline_by_environment():
            raise UserError(
                f"'{target}' is not in the cache{' whole' if here else ''}, and --offline (or WEFT_OFFLINE, or HF_HUB_OFFLINE) forbids "
                "the network. Pull it once without."
            )
        if here:
            if bad:
                note(f"{', '.join(bad)} of '{target}' is damaged and is fetched again.")
            name = _origin(name, here, bad)
            _seed(partial, here)
            revision = revision or here.revision
        return _fetch(name, target, revision, partial, progress, note)


def _local_path(name: str, bare: bool) -> Path | None:
    """The path that `name` spells, or None where it is a model's name.

    bare  whether a plain word may be a path, if a model lies there; `file:`, a leading dot and the like always spell one.
    """
    if name.startswith("file:"):
        path = Path(name.removeprefix("file://").removeprefix("file:")).expanduser()
    else:
        path = Path(name).expanduser()
        spelled = name.startswith((".", "~")) or path.is_absolute() or name.endswith(".gguf") or name.count("/") > 1 or "\\" in name
        if not spelled and not (bare and path.is_dir() and _is_model_folder(path)):
            return None
    if not path.exists():
        raise UserError(f"there is no file or folder {path}; check the path.")
    return path.absolute()


def _fetch(name: str, target: str, revision: str | None, partial: Path, progress: Progress | None, note: Callable[[str], None]) -> Pulled:
    """Bring a model of the hub, or of a package that holds it, into `partial` and finish it."""
    model, _, kind = name.partition(":")
    repo = hub_names.repo_of(model) or (model if "/" in model else None)
    if repo is None:
        close = nearest(model, hub_names.known_names())
        raise UserError(
            f"'{model}' is not a name that can be pulled.{close} Give a repo id as org/name, or a short name that `weft models` lists."
        )
    wheel = wheel_model.WHEELS.get(model) if not kind and revision is None else None
    try:
        commit, files = hub_download.list_repo(repo, revision)
    except (hub_download.HubUnreachable, UserError) as error:
        if wheel is None and isinstance(error, UserError):
            raise
        if wheel is None:
            raise UserError(
                f"the model hub cannot be reached ({error}); check the network, or give a folder: weft pull PATH --name NAME."
            ) from None
        note(f"The model hub cannot be reached ({str(error).rstrip('.')}); taking the package {wheel.requirement} instead.")
        return _finish(target, partial, f"wheel:{wheel.requirement}", wheel_model.fetch_from_wheel(wheel, partial, progress))
    chosen = set(hub_download.choose(repo, [file.path for file in files], kind or None))
    wanted = [file for file in files if file.path in chosen]
    records = hub_download.fetch(repo, commit, wanted, partial, progress)
    return _finish(target, partial, f"hub:{repo}:{kind}" if kind else f"hub:{repo}", records, revision, commit)


def _sources(name: str) -> list[str]:
    """What the manifest of a model pulled by this name may say of where it came from."""
    model, _, kind = name.partition(":")
    repo = hub_names.repo_of(model) or model
    wheel = wheel_model.WHEELS.get(model)
    return [f"hub:{repo}:{kind}" if kind else f"hub:{repo}", *([f"wheel:{wheel.requirement}"] if wheel else [])]


def _origin(name: str, here: Pulled, bad: list[str]) -> str:
    """What to fetch for a model that is here already, under whatever name it is kept."""
    kind, _, origin = here.source.partition(":")
    if kind == "path":
        what = f"{', '.join(bad)} of '{here.name}' is damaged, and it" if bad else f"'{here.name}'"
        raise UserError(f"{what} came from {origin}, not from the hub. Copy it again: weft pull {origin} --name {here.name}")
    if kind == "wheel":
        return next((short for short, wheel in wheel_model.WHEELS.items() if wheel.requirement == origin), name)
    return name if hub_names.repo_of(name) == origin else origin


def _seed(partial: Path, here: Pulled) -> None:
    """Put the files of a model that is here into an unfinished pull: those whose hash is right need not come again."""
    partial.mkdir(exist_ok=True)
    for file in here.files:
        if (here.path / file.path).is_file() and not (partial / file.path).exists():
            try:
                os.link(here.path / file.path, partial / file.path)
            except OSError:  # a file system without links: everything comes again
                return


def _finish(
    name: str, partial: Path, source: str, records: list[model_cache.FileRecord], revision: str | None = None, commit: str | None = None
) -> Pulled:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return model_cache.finish(Pulled(name, partial, source, revision, commit, date, tuple(records)))


def find_model(name_or_path: str | Path) -> Path:
    """The model behind a name or a path: a folder in Hugging Face layout, or a .gguf file.

    A path that exists is taken as it is; a folder that holds one .gguf file and no config.json stands for that file. Otherwise the name
    has to be a pulled model's, whose files are checked for presence and size. Raises UserError that says what to do.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    pulled = _pulled(name)
    if path.exists() and not (pulled and path.is_dir() and not _is_model_folder(path)):
        return _gguf_inside(path)
    if pulled is None:
        raise _not_found(name)
    bad = model_cache.damaged_files(pulled)
    if bad:
        raise UserError(
            f"{', '.join(bad)} of the pulled model '{name}' is missing or has another size. Run `weft pull {name}` to repair it."
        )
    return _gguf_inside(pulled.path)


def _pulled(name: str) -> Pulled | None:
    try:
        return model_cache.find(name)
    except UserError:  # not a name that any model could have
        return None


def _is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file() or any(path.glob("*.gguf")) or any(path.glob("*.safetensors"))


def _gguf_inside(path: Path) -> Path:
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
        if ggufs:
            raise UserError(f"{path} holds {len(ggufs)} GGUF files; give one of them: {', '.join(file.name for file in ggufs)}.")
    return path


def _not_found(name: str) -> UserError:
    names = [model.name for model in model_cache.every_model()]
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf"):
        return UserError(f"there is no file or folder {name}; give a model folder, a .gguf file or the name of a pulled model.")
    close = nearest(name, names) or nearest(name, hub_names.known_names())
    if not close or hub_names.repo_of(name):
        return UserError(f"'{name}' is no path and has not been pulled. Run `weft pull {name}`; `weft list` shows what is here.")
    return UserError(f"'{name}' is no path and no pulled model.{close} `weft list` shows what is here.")


def list_models() -> list[Pulled]:
    """Every model in the cache, by name."""
    return model_cache.every_model()


def remove(name: str) -> int:
    """Remove a pulled model, and what an unfinished pull of it left, from the cache; returns the bytes freed.

    Nothing outside the cache is ever removed. Raises UserError where there is no pulled model of that name.
    """
    names = [model.name for model in model_cache.every_model()]
    try:
        folders = [model_cache.folder_of(name), model_cache.partial_of(name)]
    except UserError:
        raise UserError(
            f"'{name}' is not the name of a pulled model; `weft list` shows the names. Files elsewhere are yours to remove."
        ) from None
    present = [folder for folder in folders if folder.exists()]
    if not present:
        raise UserError(f"there is no pulled model '{name}'.{nearest(name, names)} `weft list` shows what is here.")
    with model_cache.locked(name):
        freed = sum(path.stat().st_size for folder in present for path in folder.rglob("*") if path.is_file())
        for folder in present:
            model_cache.discard(folder)
    return freed
