"""`weft models` as a person and a program call it."""

import json
import subprocess
import sys

from weft.spec import model_spec
from weft.zoo import ENTRIES

RUN = "import sys; sys.argv = ['weft', *sys.argv[1:]]\nfrom weft.cli.main import main\nmain()"


def weft(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=False)


def test_the_table_fits_eighty_columns_and_has_every_name() -> None:
    done = weft("models")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ENTRIES)
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith("* gpt3"))
    assert "* gpt3-13b: the table prints d_model 5140" in done.stdout


def test_json_is_one_array_on_the_last_line() -> None:
    rows = json.loads(weft("models", "--json").stdout.splitlines()[-1])
    assert {row["name"]: row["parameters"] for row in rows} == {name: entry.spec.num_params() for name, entry in ENTRIES.items()}
    assert all({"family", "published", "context", "misprint"} <= row.keys() for row in rows)
    mistral = next(row for row in rows if row["name"] == "mistral-7b")
    mixtral = next(row for row in rows if row["name"] == "mixtral-8x7b")
    assert mixtral["active_parameters"] == ENTRIES["mixtral-8x7b"].spec.num_params(active=True) < mixtral["parameters"] / 3
    assert mistral["active_parameters"] == mistral["parameters"]
    assert mistral["state_bytes_at_context"] == 4096 * mistral["state_bytes_per_token"]


def test_a_family_and_a_series_narrow_the_list() -> None:
    by_family = json.loads(weft("models", "--family", "gemma2", "--json").stdout)
    assert [row["name"] for row in by_family] == ["gemma2-2b", "gemma2-9b", "gemma2-27b"]
    by_series = json.loads(weft("models", "-f", "gpt3", "--json").stdout)
    assert len(by_series) == 16


def test_one_model_is_yaml_with_its_counts() -> None:
    import yaml

    done = weft("models", "smollm2-135m")
    assert "134,515,008" in done.stdout
    assert model_spec(yaml.safe_load(done.stdout)) == ENTRIES["smollm2-135m"].spec
    row = json.loads(weft("models", "smollm2-135m", "--json").stdout)
    assert model_spec(row["spec"]) == ENTRIES["smollm2-135m"].spec


def test_experts_are_counted_twice_for_people_too() -> None:
    assert "46,702,792,704, of which a token meets 12,879,925,248" in weft("models", "mixtral-8x7b").stdout
    assert "of which a token meets" not in weft("models", "mistral-7b").stdout
    row = next(line for line in weft("models", "-f", "mixtral").stdout.splitlines() if line.startswith("mixtral-8x7b"))
    assert row.split()[2:4] == ["46.7B", "12.9B"]


def test_state_of_latents_stands_beside_that_of_heads() -> None:
    """DeepSeek-V2, table 1: latents of 4 head widths and a rotated key of half of one are 9/4 of multi-query attention."""
    from weft.spec import Attention, ModelSpec

    row = json.loads(weft("models", "deepseek-v2", "--json").stdout)
    spec, others = ENTRIES["deepseek-v2"].spec, row["state_bytes_per_token_as"]
    assert row["state_bytes_per_token"] == spec.state_bytes(1) == 60 * (512 + 64) * 2 == others["mqa"] * 9 // 4
    for name, groups in (("mha", 128), ("gqa", 8), ("mqa", 1)):
        data = spec.model_dump()
        for layer in data["layers"]:
            layer["mixer"] = Attention(heads=128, kv_heads=groups, head_dim=128)
        assert others[name] == ModelSpec.model_validate(data).state_bytes(1)
    shown = weft("models", "deepseek-v2").stdout
    assert "69.1 kB a token" in shown
    assert "instead of latents 3.93 MB a token with keys and values a head, 246 kB in 8 groups of heads, 30.7 kB in one" in shown
    assert "instead of latents" not in weft("models", "llama3-8b").stdout


def test_mistakes_are_sentences() -> None:
    for arguments, words in (
        (["smolm2-135m"], "Did you mean 'smollm2-135m'"),
        (["--family", "lama"], "Did you mean 'llama'"),
        (["gpt2", "--family", "gpt2"], "give one of them"),
    ):
        done = weft("models", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_torch_stays_away() -> None:
    code = RUN.replace("main()", "try:\n    main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, "models"], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False"
