"""A run's plan and its export, read back: whether they are there, fit each other, and were not changed since.

The stages that come after the export begin here.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from secateur.describe import Description
from secateur.files import InputError
from secateur.gates import load_gates
from secateur.load import read_export
from secateur.own_code import check_code
from secateur.plan import Plan, Rounding, load_plan
from secateur.run import Run
from secateur.session import Session
from secateur.slicing import pruned_shapes
from secateur.units import Group
from secateur.updates import said_of


def planned(run: Run, groups: Sequence[Group], architecture: str) -> tuple[Plan, Rounding]:
    """The plan of a run, with what removed units give way to."""
    plan, rounding = load_plan(run.plan, groups, architecture)
    return replace(plan, means=load_gates(run.gates, groups, architecture).means), rounding


def plan_of(session: Session) -> tuple[Plan, Rounding]:
    """The same of a session's run."""
    return planned(session.run, session.description.groups, session.architecture)


def checked_export(run: Run) -> Path:
    """Folder of the export. Raises InputError when there is none, or it failed verification."""
    if not run.model.is_dir():
        reason = f"failed verification (see {run.verify})" if run.failed_model.is_dir() else "is missing"
        raise InputError(f"{run.model} {reason}; run `secateur export {run.folder}`")
    check_code(run.model)
    return run.model


def check_plan(run: Run, shapes: Mapping[str, tuple[int, ...]], description: Description, plan: Plan) -> None:
    """Raises InputError where the export, whose weights have these shapes, was cut by another plan.

    Exports of earlier versions do not say by which: their shapes alone tell.
    """
    if said_of(run.model).get("plan", plan.digest) != plan.digest or shapes != pruned_shapes(description, plan):
        raise InputError(f"{run.model} was exported from another plan; run `secateur export {run.folder}` first")


def load_export(session: Session, plan: Plan, dtype: torch.dtype) -> PreTrainedModel:
    """The exported model as its user loads it; the code it runs is Secateur's own modelling file.

    Raises InputError where it was cut by another plan.
    """
    run, folder = session.run, checked_export(session.run)
    device = next(session.loaded.model.parameters()).device
    gc.collect()  # an earlier one with offloaded weights, which accelerate's hooks tie to itself
    placed = session.export_placed(device)
    exported = read_export(folder, dtype, **placed)
    shapes = {name: tuple(p.shape) for name, p in exported.named_parameters()}
    check_plan(run, shapes, session.loaded.description, plan)
    return exported if placed else exported.to(device)
