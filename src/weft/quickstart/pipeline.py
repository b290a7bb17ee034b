"""The job: its steps in order, each done once for the same corpus and options, and carried on where it was stopped."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from weft.device import pick_device
from weft.files import atomic_write
from weft.quickstart.ledger import Ledger, content_key
from weft.quickstart.measuring import LABELS, measure_baselines, measure_model
from weft.quickstart.options import Options
from weft.quickstart.preparing import (
    Material,
    collect_pairs,
    describe_material,
    encode,
    make_tokens,
    read_material,
    tokenizer_of,
    write_pairs,
    write_prompts,
)
from weft.quickstart.report import Results, build_report, draw_report, markdown
from weft.quickstart.reporter import Reporter, Silent
from weft.quickstart.sampling import judge_model, sample_texts
from weft.quickstart.settings import Settings
from weft.quickstart.training import (
    can_compile,
    drop_run,
    essentials,
    fine_tuning_recipe,
    pretraining_recipe,
    read_curve,
    read_rewards,
    reinforcing_recipe,
    tell_training,
    train,
)
from weft.quickstart.workplace import PAGE, PICTURE, REPORT, Workplace, check_out
from weft.train.callbacks import clock
from weft.train.card import size
from weft.train.speed import peak_memory
from weft.weights.load import load_model
from weft.weights.save import save_model

Facts = dict[str, Any]
STEPS = 8


def quickstart(options: Options, settings: Settings | None = None, restart: bool = False, reporter: Reporter | None = None) -> Facts:
    """Do the whole job, or what is left of it, and return the report (see `docs/quickstart.md` for its keys).

    Raises UserError for a corpus or a folder that cannot be used, and training.Interrupted after a Ctrl-C in training.
    """
    settings, reporter = settings or Settings(), reporter or Silent()
    device = pick_device(options.device)
    check_out(options.out)
    reporter.begin(1, STEPS, "reading the corpus")
    material = read_material(options.corpus, settings)  # before anything is written: a bad corpus leaves no trace
    corpus = describe_material(material)
    reporter.end(_tell_corpus(corpus), known=False)
    place = Workplace(options.out.absolute(), restart)
    try:
        return _Job(options, settings, place, reporter, device).run(material, corpus)
    finally:
        place.release()


class _Job:
    """One sitting. Every step's result is a JSON-ready dict; `keys` holds what each step's result depends on."""

    def __init__(self, options: Options, settings: Settings, place: Workplace, reporter: Reporter, device: torch.device) -> None:
        self.options, self.settings, self.place, self.reporter, self.device = options, settings, place, reporter, device
        self.ledger = Ledger(place.records)
        self._number = 1
        self._compiles: bool | None = None

    def run(self, material: Material, corpus: Facts) -> Facts:
        tokens = self._tokens(material)
        pretrained = self._pretrain(tokens)
        tuned = self._fine_tune(material, pretrained)
        reinforced = self._reinforce(material, tuned)
        measured = self._measure(material, tokens, tuned, reinforced)
        judged = self._judge(material, tuned, reinforced)
        return self._report(Results(corpus, tokens, pretrained, tuned, reinforced, measured, judged))

    def _begin(self, title: str) -> None:
        self._number += 1
        self.reporter.begin(self._number, STEPS, title)

    def _step(
        self, name: str, title: str, key: str, work: Callable[[], Facts], tell: Callable[[Facts], str], outputs: Sequence[Path]
    ) -> Facts:
        """Do a step, or find it done; its result gets its key, its time and the peak memory so far."""
        self._begin(title)

        def measured() -> Facts:
            result = work()
            return {**result, "key": key, "peak_memory_bytes": peak_memory(self.device)}

        result, known = self.ledger.run(name, key, measured, outputs)
        self.reporter.end(tell(result), known)
        return result

    def _can_compile(self) -> bool:
        """Whether to compile; asked once, and only when something is trained."""
        if self._compiles is None:
            self.reporter.advance(0, None, "trying the compiler")
            self._compiles = self.settings.compile and can_compile(self.device)
            if self.settings.compile and not self._compiles:
                self.reporter.note("torch.compile does not work here (it needs a C++ compiler), so training is about a third slower.")
        return self._compiles

    # The steps.

    def _tokens(self, material: Material) -> Facts:
        key = content_key(material.key, self.settings.facts()["tokens"])
        return self._step(
            "tokens",
            "training a tokenizer",
            key,
            lambda: make_tokens(material, self.settings, self.place, key, self.reporter),
            lambda facts: (
                f"{facts['vocab']:,} tokens, {facts['bytes_per_token']:.2f} bytes each: {facts['train_tokens']:,} to train on, "
                f"{facts['heldout_tokens']:,} held out"
            ),
            [self.place.tokenizer, self._shards(key)],
        )

    def _shards(self, key: str) -> Path:
        return self.place.work / f"shards-{key[:12]}"

    def _pretrain(self, tokens: Facts) -> Facts:
        shards = self._shards(tokens["key"])
        recipe = pretraining_recipe(self.options, self.settings, tokens["vocab"], self.place.tokenizer, shards, Path("out"))
        key = content_key(tokens["key"], essentials(recipe))
        run = self.place.run_folder("pretrain", content_key(key, self.place.out))

        def work() -> Facts:
            card = train({**recipe, "out": str(run)}, self._can_compile(), self.reporter)
            model = load_model(run / "last").model
            save_model(model, self.place.base, tokenizer_of(self.place))
            facts = {"card": card, "curve": read_curve(run, card["cost"]["seconds"])}
            drop_run(run)
            return facts

        def tell(facts: Facts) -> str:
            return f"{facts['card']['model']['parameters']:,} parameters, {tell_training(facts['card'])}"

        length = f"for {clock(60 * self.options.minutes)}" if self.settings.steps is None else f"for {self.settings.steps} steps"
        return self._step("pretrain", f"pretraining {length}", key, work, tell, [self.place.base])

    def _fine_tune(self, material: Material, pretrained: Facts) -> Facts:
        settings = self.settings
        recipe = fine_tuning_recipe(self.options, settings, self.place.base, self.place.tokenizer, Path("shards"), Path("out"))
        key = content_key(pretrained["key"], essentials(recipe), settings.facts()["fine_tuning"])
        run = self.place.run_folder("fine-tune", content_key(key, self.place.out))
        why_not = _no_pairs_because(material.corpus.kind)

        def work() -> Facts:
            self.reporter.advance(0, None, "making pairs")
            pairs, heldout = ([], []) if why_not else collect_pairs(material, settings)
            reason = why_not or (f"only {len(pairs)} documented functions were found" if len(pairs) < settings.fine_tuning.fewest else "")
            tokenizer = tokenizer_of(self.place)
            if reason:
                save_model(load_model(self.place.base).model, self.place.model, tokenizer)
                return {"skipped": reason, "pairs": len(pairs), "card": None}
            write_pairs(pairs, heldout, self.place.pairs)
            shards = encode(self.place.pairs, tokenizer, self.place.run_folder("pair-shards", key), self.reporter)
            data = {**recipe["data"], "sources": [{"path": str(shards), "name": "pairs"}]}
            card = train({**recipe, "data": data, "out": str(run)}, self._can_compile(), self.reporter)
            save_model(load_model(run / "last").model, self.place.model, tokenizer)
            drop_run(run)
            return {"skipped": "", "pairs": len(pairs), "card": card}

        def tell(facts: Facts) -> str:
            if facts["skipped"]:
                return f"skipped: {facts['skipped']}"
            return f"{facts['pairs']:,} pairs, {tell_training(facts['card'])}"

        return self._step("fine-tune", "fine-tuning", key, work, tell, [self.place.model])

    def _reinforce(self, material: Material, tuned: Facts) -> Facts:
        settings, place = self.settings, self.place
        recipe = reinforcing_recipe(self.options, settings, place.model, place.tokenizer, place.prompts, Path("out"))
        key = content_key(tuned["key"], essentials(recipe), settings.facts()["reinforcing"])
        run = place.run_folder("reinforce", content_key(key, place.out))

        def work() -> Facts:
            if reason := self._no_reinforcement_because(tuned):
                return {"skipped": reason, "card": None}
            self.reporter.advance(0, None, "choosing prompts")
            tokenizer = tokenizer_of(place)
            count = write_prompts(collect_pairs(material, settings)[0], settings, tokenizer, place.prompts)
            if count < settings.reinforcing.fewest:
                return {"skipped": f"only {count} functions with parameters were found", "card": None}
            card = train({**recipe, "out": str(run)}, False, self.reporter)
            save_model(load_model(run / "last").model, place.reinforced, tokenizer)
            facts = {"skipped": "", "prompts": count, "card": card, **read_rewards(run)}
            drop_run(run)
            return facts

        def tell(facts: Facts) -> str:
            if facts["skipped"]:
                return f"skipped: {facts['skipped']}"
            return (
                f"{facts['steps']} steps of {settings.reinforcing.rows * settings.reinforcing.samples} answers in "
                f"{clock(facts['card']['cost']['seconds'])}, reward {facts['reward_before']:.2f} to {facts['reward']:.2f}, "
                f"{facts['kl']:.1f} nats an answer from the fine-tuned model"
            )

        outputs = [] if self._no_reinforcement_because(tuned) else [place.reinforced]
        return self._step("reinforce", "reinforcing", key, work, tell, outputs)

    def _no_reinforcement_because(self, tuned: Facts) -> str:
        seconds = 60 * self.options.minutes * self.settings.reinforcing.share
        if tuned["skipped"]:
            return "there is no fine-tuned model"
        if self.settings.steps is None and seconds < self.settings.reinforcing.least_seconds:
            return f"{seconds:.1f} seconds are too few for it; raise --minutes"
        return ""

    def _measure(self, material: Material, tokens: Facts, tuned: Facts, reinforced: Facts) -> Facts:
        key = content_key(tuned["key"], reinforced["key"], material.key)

        def work() -> Facts:
            baselines = measure_baselines(material, self.reporter)
            shards = self._shards(tokens["key"])
            score = measure_model(self.place.base, shards, self.options, self.settings, self.reporter, "this model")
            facts = {"baselines": baselines, "bits_per_byte": round(score.bits_per_byte, 5), "scored_tokens": score.tokens}
            if not tuned["skipped"]:
                after = measure_model(self.place.model, shards, self.options, self.settings, self.reporter, "this model, fine-tuned")
                facts["bits_per_byte_fine_tuned"] = round(after.bits_per_byte, 5)
            if not reinforced["skipped"]:
                last = measure_model(self.place.reinforced, shards, self.options, self.settings, self.reporter, "this model, reinforced")
                facts["bits_per_byte_reinforced"] = round(last.bits_per_byte, 5)
            assert score.num_bytes == material.split.heldout_bytes
            return facts

        def tell(facts: Facts) -> str:
            others = ", ".join(f"{LABELS[name].replace(chr(10), ' ')} {bits:.3f}" for name, bits in facts["baselines"].items())
            return f"{facts['bits_per_byte']:.3f} bits a byte of held-out text ({others})"

        return self._step("measure", "measuring", key, work, tell, [])

    def _judge(self, material: Material, tuned: Facts, reinforced: Facts) -> Facts:
        key = content_key(tuned["key"], reinforced["key"], self.settings.facts()["judging"])

        def work() -> Facts:
            arguments = (self.options, self.settings, self.reporter)
            best = self.place.model if reinforced["skipped"] else self.place.reinforced
            samples = sample_texts(material, best, *arguments)
            shares = {}
            if not tuned["skipped"]:
                _, heldout = collect_pairs(material, self.settings)
                before = judge_model(heldout, self.place.base, *arguments, "before fine-tuning")
                after = judge_model(heldout, self.place.model, *arguments, "after fine-tuning")
                last = None if reinforced["skipped"] else judge_model(heldout, self.place.reinforced, *arguments, "after reinforcement")
                found = {"before": before, "after": after, "reinforced": last}
                shares = {stage: share for stage, share in found.items() if share}
            return {"samples": samples, "parse_share": shares}

        def tell(facts: Facts) -> str:
            shares = facts["parse_share"]
            if not shares:
                return f"{len(facts['samples'])} samples written; there are no functions to judge"
            before, after = shares["before"], shares["after"]
            last = f", {shares['reinforced']['share']:.0%} after reinforcement" if "reinforced" in shares else ""
            return (
                f"{before['share']:.0%} of {before['samples']} sampled functions parse before fine-tuning, {after['share']:.0%} after{last}"
            )

        return self._step("judge", "sampling", key, work, tell, [])

    def _report(self, results: Results) -> Facts:
        self._begin("writing the report")
        report = build_report(self.options, self.device, results)
        try:
            atomic_write(self.place.out / PICTURE, draw_report(report, results.pretrained["curve"]))
            report["picture"] = PICTURE
        except ImportError:
            self.reporter.note("matplotlib is not installed, so there is no picture; pip install 'weft[plots]' brings it.")
        atomic_write(self.place.out / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        atomic_write(self.place.out / PAGE, markdown(report))
        self.reporter.end(f"{clock(report['seconds']['total'])} in all, {size(report['peak_memory_bytes'])} of memory", known=False)
        return report


def _no_pairs_because(kind: str) -> str:
    return "" if kind == "python" else "the corpus is not Python, and pairs are made of Python functions"


def _tell_corpus(corpus: Facts) -> str:
    whole = f"{corpus['name']}: {corpus['files']:,} files, {size(corpus['bytes'])}"
    if corpus["split"] == "units":
        return f"{whole}; {size(corpus['heldout_bytes'])} held out, {len(corpus['heldout_units'])} of {corpus['units']} top-level modules"
    return f"{whole}; {size(corpus['heldout_bytes'])} held out, the ends of files, as there are too few to hold out whole ones"
