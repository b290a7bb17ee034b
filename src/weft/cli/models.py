"""`weft models`: the families Weft knows and their published sizes."""

import math
from typing import TYPE_CHECKING, Any

import typer

from weft.cli.console import emit_json

if TYPE_CHECKING:
    from weft.spec import ModelSpec
    from weft.zoo import Entry


def _names(incomplete: str) -> list[str]:
    from weft.zoo import ENTRIES

    return [name for name in ENTRIES if name.startswith(incomplete)]


def _families(incomplete: str) -> list[str]:
    from weft.zoo import ENTRIES

    return [name for name in sorted({word for entry in ENTRIES.values() for word in _groups(entry)}) if name.startswith(incomplete)]


def _groups(entry: "Entry") -> tuple[str, str]:
    """What `--family` may call an entry by: its family, or its name without the size."""
    return entry.family, entry.series


def models(
    name: str | None = typer.Argument(None, help="Show one model: its spec as YAML and its counts.", autocompletion=_names),
    family: str | None = typer.Option(
        None, "--family", "-f", help="Only this family (llama, gpt2) or series (llama3.1, gpt3).", autocompletion=_families
    ),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON array (one object with NAME) as the last line."),
) -> None:
    """List the model families Weft knows, with sizes computed from their specs."""
    from weft.errors import UserError, unknown
    from weft.zoo import ENTRIES, entry

    if name is not None:
        if family is not None:
            raise UserError(f"NAME ('{name}') and --family ('{family}') are both given; give one of them.")
        _show_one(entry(name), json_output)
        return
    known = {word for item in ENTRIES.values() for word in _groups(item)}
    if family is not None and family not in known:
        raise unknown("family", family, known)
    chosen = [item for item in ENTRIES.values() if family is None or family in _groups(item)]
    if json_output:
        emit_json([_facts(item) for item in chosen])
    else:
        _print_table(chosen)


def _facts(item: "Entry") -> dict[str, Any]:
    """Everything that is known of a size without its weights. State is in bytes, for one sequence in 16-bit numbers."""
    spec = item.spec
    return {
        "name": item.name,
        "family": item.family,
        "parameters": spec.num_params(),
        "active_parameters": spec.num_params(active=True),
        "published": item.published,
        "source": item.source,
        "misprint": item.misprint,
        "repo": item.repo,
        "vocab": spec.vocab,
        "dim": spec.dim,
        "layers": len(spec.blocks()),
        "context": spec.context,
        "state_bytes_per_token": spec.state_bytes(2) - spec.state_bytes(1),
        "state_bytes_at_context": spec.state_bytes(spec.context),
        "state_bytes_per_token_as": _other_states(spec),
        "flops_per_token": spec.flops(1),
    }


def _other_states(spec: "ModelSpec") -> dict[str, int]:
    """Bytes a token of a model with latent attention if its heads kept keys and values instead, in 16-bit numbers; else nothing."""
    from weft.spec import LatentAttention

    total: dict[str, int] = {}
    for block in spec.blocks():
        if not isinstance(block.mixer, LatentAttention):
            return {}
        heads = block.mixer.heads
        for name, groups in (("mha", heads), ("gqa", math.gcd(8, heads)), ("mqa", 1)):
            leaves = block.mixer.grouped_state(groups).values()
            total[name] = total.get(name, 0) + sum(leaf.num_bytes(1, 2) for leaf in leaves)
    return total


def _print_table(chosen: "list[Entry]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for heading in ("params", "active", "published", "context", "state,\na token", "state,\nfull"):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in chosen:
        facts = _facts(item)
        table.add_row(
            item.name + (" *" if item.misprint else ""),
            item.family,
            short_count(facts["parameters"]),
            short_count(facts["active_parameters"]) if facts["active_parameters"] < facts["parameters"] else "",
            short_count(item.published),
            f"{facts['context']:,}",
            short_bytes(facts["state_bytes_per_token"]),
            short_bytes(facts["state_bytes_at_context"]),
        )
    console = Console(highlight=False)
    console.print(table)
    for item in chosen:
        if item.misprint:
            console.print(f"* {item.name}: {item.misprint} ({item.source}).", soft_wrap=True, markup=False)


def _show_one(item: "Entry", json_output: bool) -> None:
    facts = _facts(item)
    if json_output:
        emit_json({**facts, "spec": item.spec.model_dump(mode="json", exclude_defaults=True)})
        return
    active = f", of which a token meets {facts['active_parameters']:,}" if facts["active_parameters"] < facts["parameters"] else ""
    lines = [
        f"# {item.name}, family {item.family}",
        f"# parameters         {facts['parameters']:,}{active}",
        f"# published          {item.published:,} ({item.source})",
        f"# without embeddings {item.spec.num_params(embeddings=False):,}",
        f"# forward pass       {facts['flops_per_token'] / 1e9:,.2f} GFLOP for the first token",
        f"# state              {short_bytes(facts['state_bytes_per_token'])} a token, {short_bytes(facts['state_bytes_at_context'])} at "
        f"{facts['context']:,} tokens (16 bits)",
    ]
    if others := facts["state_bytes_per_token_as"]:
        mha, gqa, mqa = (short_bytes(others[name]) for name in ("mha", "gqa", "mqa"))
        lines.append(f"# instead of latents {mha} a token with keys and values a head, {gqa} in 8 groups of heads, {mqa} in one")
    lines += [f"# weights            {item.repo}"] if item.repo else []
    lines += [f"# misprint           {item.misprint}"] if item.misprint else []
    print("\n".join(lines) + "\n" + item.spec.to_yaml(), end="")


def short_count(count: int) -> str:
    """A number of parameters as people say it: 134.5M, 8.03B."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}" if count < 1000 * scale else f"{count / scale:,.0f}{unit}"
    return str(count)


def short_bytes(count: int) -> str:
    """Bytes in decimal units with three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
