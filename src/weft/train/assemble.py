"""From a plan to a trainer: data opened, model built, and the run's folder held."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weft.data.prepare import Progress
from weft.data.virtual import VirtualBatches
from weft.device import pick_device, pick_dtype
from weft.errors import UserError
from weft.methods import Place, Setup, method_of
from weft.nn import Model, build
from weft.quant.load import load_quantised
from weft.train.callbacks import Callback, TensorBoard
from weft.train.heap import keep_freed_memory
from weft.train.job import BatchSource, Compute, Job, Length
from weft.train.objective import POLICY
from weft.train.origins import origins
from weft.train.parallel import World, join_world
from weft.train.plan import Plan, make_plan
from weft.train.recipe import Recipe
from weft.train.run_folder import RunFolder, check_out
from weft.train.staged_batches import StagedBatches
from weft.train.trainer import Trainer
from weft.train.window import check_compiler
from weft.weights.adapter_files import adapt
from weft.weights.load import load_weights


def run_recipe(
    recipe: Recipe, restart: bool = False, callbacks: Sequence[Callback] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """Train as a recipe says and return the run card. A run that `out` holds already goes on where it stopped.

    restart   throw that run away and begin again.
    progress  is told how far raw text has been turned into shards.
    """
    plan = make_plan(recipe)
    method_of(recipe.objective).check(plan)
    check_out(Path(recipe.out))
    world = join_world(recipe.device)
    folder = RunFolder(recipe.out) if world.leads else None
    try:
        try:
            job = open_job(plan, folder, world, progress)
            watchers = [TensorBoard(folder.path / "tensorboard")] if folder is not None and recipe.log.tensorboard else []
            trainer = Trainer(job, [*callbacks, *watchers])
        except BaseException:
            if folder is not None:
                folder.abandon()
            raise
        if folder is not None and restart:
            folder.clear()
        return trainer.run()
    finally:
        if folder is not None:
            folder.release()


def _open_model(plan: Plan, device: torch.device, weights: torch.dtype, products: torch.dtype) -> Model:
    """The model that a run begins with, with its adapter. A base that is not trained itself is kept in the numbers of the products."""
    recipe, checkpoint = plan.recipe, plan.checkpoint
    if checkpoint is None:
        return build(plan.spec, device, weights, recipe.seed)
    frozen = checkpoint.adapter is not None or (recipe.adapter is not None and not recipe.adapter.whole)
    kept = products if frozen and products == torch.bfloat16 else weights
    if recipe.quantize is not None:
        model = load_quantised(checkpoint, recipe.quantize, device, kept)
    else:
        model = load_weights(checkpoint, device, kept)
    if recipe.adapter is not None:
        adapt(model, recipe.adapter, checkpoint.family, checkpoint.source, recipe.seed, plan.tokenizer)
    return model


def _before_texts(batches: BatchSource, policy: Model, setup: Setup) -> BatchSource:
    """The batches with the policy's virtual tokens before their texts, where it has some. All models of a run read the same texts."""
    ids = policy.virtual_ids
    for role, model in setup.models.items():
        if model.virtual_ids and model.virtual_ids != ids:
            raise UserError(
                f"the {role} model has an adapter of the form prompt or prefix, whose virtual tokens the texts of this run would not begin "
                "with; give one whose adapter is lora, or that has none."
            )
    if not ids:
        return batches
    if setup.engine is not None or any(model.virtual_ids != ids for model in setup.models.values()):
        raise UserError(
            "adapter is prompt or prefix, but this objective has texts written, or read by a model without virtual tokens; take lora."
        )
    return VirtualBatches(batches, ids)


def open_job(plan: Plan, folder: RunFolder | None, world: World, progress: Progress | None = None) -> Job:
    """Open the data, preparing it where that is needed, and build the model."""
    recipe = plan.recipe
    device = pick_device(recipe.device)
    dtype = torch.float32 if recipe.dtype == "auto" and device.type == "mps" else pick_dtype(recipe.dtype, device)
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    # Eager kernels of a CPU are deterministic as they are; compiled ones add up an embedding's gradient in whatever order threads come.
    if recipe.deterministic and (device.type != "cpu" or recipe.compile):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if recipe.compile:
        check_compiler(device)
    if device.type == "cpu":
        keep_freed_memory()
    out = Path(recipe.out)
    if not world.leads:
        world.wait()
    method, place = method_of(recipe.objective), Place(device, weights, world, out / "data", progress, dtype)
    batches, stages = method.batches(plan, place), plan.stages
    if stages is not None:
        batches = StagedBatches(stages, [method.batches(plan.of(stage), place) for stage in stages.all], batches)
    if world.leads:
        world.wait()
    if recipe.eval.patience is not None and batches.valid is None:
        raise UserError("eval.patience is given but nothing is held out to evaluate on; give data.valid a share, or drop eval.patience.")
    policy = method.policy(plan, _open_model(plan, device, weights, dtype), place)
    setup = method.begin(plan, policy, place)
    return Job(
        models={POLICY: policy, **setup.models},
        objective=setup.objective,
        batches=_before_texts(batches, policy, setup),
        folder=folder,
        out=out,
        length=Length(recipe.steps, recipe.minutes),
        compute=Compute(device, dtype, recipe.compile, recipe.gradient_checkpointing),
        tokenizer=plan.tokenizer,
        family=None if plan.checkpoint is None else plan.checkpoint.family,
        micro=recipe.batch.micro,
        optim=recipe.optim,
        evaluation=recipe.eval,
        save=recipe.save,
        log=recipe.log,
        seed=recipe.seed,
        world=world,
        essentials=recipe.essentials(),
        origins=origins(plan),
        optims=setup.optims,
        facts={**setup.facts, "records_dropped": len(place.dropped)} if plan.data.drop_bad or place.dropped else setup.facts,
        engine=setup.engine,
        stages=stages,
        average=recipe.average,
    )
