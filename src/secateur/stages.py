"""The stages of a run as functions: each reads files of the run folder and writes the next one, so each reruns alone.

`remaining_stages` is all of them in a row with the model loaded once. The command line only parses and prints.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.attach import compensation
from secateur.budget import everything, figures
from secateur.card import model_card, public_name, update_words
from secateur.evaluate import compared
from secateur.export import as_shipped, export
from secateur.exported import load_export, plan_of
from secateur.families import FAMILIES
from secateur.files import InputError, write_json, write_text
from secateur.gates import Gates, load_gates, save_gates
from secateur.learn import learn
from secateur.methods import budget_of, find_gates
from secateur.overlap import overlap
from secateur.plan import Plan, Rounding, save_plan
from secateur.planning import HeldOutLoss, against_ragged, figures_of, plan_for, remembered
from secateur.planning import compare_shapes as compare_shapes
from secateur.policy import policy_of
from secateur.recover import LR, Recovery, recover
from secateur.refit import Refit, kept_groups, normal_equations, refit
from secateur.report import files
from secateur.report.files import checked, evaluation, verification
from secateur.run import Run, recorded, versions
from secateur.samples import samples
from secateur.session import Session
from secateur.slicing import fold
from secateur.text import local_files
from secateur.units import Group
from secateur.updates import recovery_steps, refitted, rewrite_weights, updates_of
from secateur.verify import Comparison, verified

VERIFIED_ROWS = 4
"""Held-out rows on which gated and exported logits are compared."""


class VerificationFailed(RuntimeError):
    """The export does not compute what the gated model computes."""


def learn_stage(session: Session) -> Gates:
    """Learns or scores the gates: RUN/gates.safetensors, metrics.jsonl a line a learning step."""
    session.learning = True
    run, limits, _known = session.run, budget_of(session), (session.given, session.blocks, session.guards)
    with session.timed("learn"):
        gates = find_gates(session, limits)
    run.plan.unlink(missing_ok=True)  # a plan of earlier gates
    save_gates(run.gates, gates)
    session.checkpoints(run.checkpoints).discard()
    return gates


def plan_stage(
    session: Session, shape: str | None = None, held_out_loss: HeldOutLoss | None = None
) -> tuple[Plan, Rounding]:
    """Rounds the gates to the budget: RUN/plan.json."""
    shape = str(policy_of(shape or session.config.shape))  # before the model is loaded: a word may be wrong
    with session.timed("plan"):
        plan, rounding = plan_for(session, shape, held_out_loss)
        save_plan(session.run.plan, plan, rounding, session.architecture)
    return plan, rounding


def plan_beside_ragged(session: Session, shape: str | None = None) -> tuple[Rounding, str | None]:
    """`plan_stage`, and what its shape costs beside ragged widths."""
    held_out_loss = remembered(session)  # both plans begin with the gates as learned
    plan, rounding = plan_stage(session, shape, held_out_loss)
    return rounding, against_ragged(session, plan, rounding, held_out_loss)


def export_stage(session: Session, shape: str | None = None) -> None:
    """Writes the pruned checkpoint, RUN/model; plans anew first when a shape is asked for that the plan has not.

    A dense model that is not loaded yet is not loaded for it: its weights stay in their files (`Session.on_disk`).
    """
    shape = None if shape is None else str(policy_of(shape))
    plan, rounding = plan_of(session)
    if shape not in (None, plan.shape):
        if session.low_memory:
            again = f"secateur plan {session.run.folder} --shape {shape}"
            raise InputError(f"the plan is for {plan.shape}, and --low-memory cannot plan anew; run `{again}` first")
        plan, rounding = plan_stage(session, shape)
    with session.on_disk():
        _export(session, plan, rounding)


def _export(session: Session, plan: Plan, rounding: Rounding) -> None:
    run, c, loaded = session.run, session.config, session.loaded
    if session.offload is not None:  # else learning or planning has looked at the weights
        session.check_weights(load_gates(run.gates, loaded.description.groups, session.architecture), run.gates)
    with session.timed("export"):
        export(
            loaded.model,
            loaded.tokenizer,
            loaded.description,
            plan,
            run.model,
            card=lambda stock: model_card(c, plan.shape, rounding, None, None, (), *_about(session, stock)),
            max_shard_size=c.max_shard_size,
            dtype=loaded.checkpoint_dtype,
            base_model=public_name(c.model),
            outdated=(run.verify, run.eval, run.refit, run.recovery, *run.converted()),
        )


def _is_stock(run: Run) -> bool:
    """Whether the export says one width for all layers."""
    return "per_layer_config" not in checked(run.model / "config.json", dict[str, Any], f"secateur export {run.folder}")


def _about(session: Session, stock: bool) -> tuple[frozenset[str], bool, bool, int]:
    """What the card says of the model: the kinds of its units, whether its code travels, whether it is stock; steps."""
    loaded = session.loaded
    return loaded.description.kinds, loaded.model.config.model_type in FAMILIES, stock, session.learned_steps


def verify_stage(session: Session) -> list[Comparison]:
    """Compares gated and exported logits: RUN/verify.json. Raises VerificationFailed after setting the export aside."""
    run, loaded = session.run, session.loaded
    if updates := updates_of(run.model):
        raise InputError(
            f"{run.model} has other weights than the gated model ({', '.join(updates)}), so they cannot be compared; "
            f"it was verified before. To verify anew, run `secateur export {run.folder}` first"
        )
    plan, _ = plan_of(session)
    groups, model, own = loaded.description.groups, loaded.model, loaded.checkpoint_dtype
    gates = {name: gate.to(next(model.parameters()).device) for name, gate in plan.gates(groups).items()}
    biases = compensation(model, groups, gates, plan.means)
    ids_NT = session.blocks.held_out_NT[:VERIFIED_ROWS]
    with session.timed("verify"):
        exported = load_export(session, plan, torch.float32)
        comparisons = verified(model, exported, groups, gates, biases, own, ids_NT)
        passed = all(c.passed for c in comparisons)
        write_json(run.verify, {"passed": passed, "comparisons": [asdict(c) for c in comparisons]})
    if not passed:
        shutil.rmtree(run.failed_model, ignore_errors=True)
        run.model.rename(run.failed_model)
        failed = next(c for c in comparisons if not c.passed)
        raise VerificationFailed(
            f"the export does not match the gated model: in {failed.dtype} logits differ by "
            f"{failed.mean_difference:.2g} on average and {failed.max_difference:.2g} at most ({failed.allowed:.2g} "
            f"allowed); it was moved to {run.failed_model}, and {run.verify} has the figures. Please report this with "
            "the model's name"
        )
    return comparisons


def refit_stage(session: Session) -> list[Refit]:
    """Solves the export's output projections anew, in `--refit-rounds`, and writes them in their place: RUN/model,
    refit.json."""
    session.take_whole()
    run, c, loaded = session.run, session.config, session.loaded
    if not c.steps:
        raise InputError("this run took --steps 0, so it has no calibration text to refit on")
    plan, _rounding = plan_of(session)
    groups, blocks = kept_groups(loaded.description.groups, plan), session.blocks
    student = load_export(session, plan, next(loaded.model.parameters()).dtype)
    rows = (c.refit_tokens or c.steps * c.batch_size * c.seq_len // 8) // c.seq_len
    rows_NT = blocks.calibration_NT[: max(1, rows)]
    tensors: dict[str, torch.Tensor] = {}
    done: list[Refit] = []
    with session.timed("refit"):
        with session.autocast():
            equations = normal_equations(loaded.model, loaded.description.groups, plan, rows_NT)
        for number in range(c.refit_rounds):
            regated = _regated(session, student, groups) if number else {}
            weights, result = refit(student, equations, blocks.held_out_NT)
            if number and not result.held_out_after < done[-1].held_out_after:
                session.progress.told(
                    f"refit: round {number + 1} is left out, which would have changed the held-out loss from "
                    f"{done[-1].held_out_after:.4f} to {result.held_out_after:.4f} nats a token"
                )
                break
            tensors |= regated | weights
            done.append(result)
        write_json(run.refit, [asdict(result) for result in done])  # first: the model says that it is there
        if tensors:
            _update(session, dict(as_shipped(student, tensors.items())), "refit")
    return done


def _regated(session: Session, student: PreTrainedModel, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """Learns gate values of the pruned `student` for a tenth of the steps and folds them in; the folded weights."""
    c, blocks = session.config, session.blocks
    assert c.learning is not None
    steps = max(1, c.steps // 10)
    recipe = replace(c.learning, settle=1.0, sensitivity_batches=min(steps, c.learning.sensitivity_batches))
    with session.autocast():
        learned = learn(
            student,
            tuple(groups),
            blocks.calibration_NT[-steps * c.batch_size :],
            blocks.held_out_NT,
            everything(groups),
            recipe,
            steps=steps,
            batch_size=c.batch_size,
            micro_batch_size=c.micro_batch_size,
            gradient_checkpointing=c.gradient_checkpointing,
            seed=c.seed,
            teacher=session.loaded.model,
        )
    weights = {}
    for group, gate_K in zip(groups, learned.value_N.split([g.units for g in groups]), strict=True):
        weight = student.get_parameter(group.writer)
        weight.data = fold(weight.data, group, group.by_expert(gate_K), None)
        weights[group.writer] = weight.data
    return weights


def recover_stage(session: Session) -> list[str]:
    """Trains the exported weights with the dense model as teacher and writes them in their place: RUN/model,
    recover.jsonl. Returns what has been done to the export's weights by now."""
    session.take_whole()
    run, c, loaded = session.run, session.config, session.loaded
    if c.recover is None:
        raise InputError(f"what to train? Say `secateur recover {run.folder} --recover lora` or `full`")
    assert c.learning is not None
    if session.recovered_before():
        return updates_of(run.model)
    plan, _rounding = plan_of(session)
    steps = c.recovery_steps
    settings = Recovery(
        c.recover, steps, c.batch_size, c.recover_lr or LR[c.recover], c.recover_rank, c.learning.kd_weight,
        c.learning.kd_temperature, c.seed, tuple(updates_of(run.model)),
    )  # fmt: skip
    own = torch.float32 if c.recover == "full" else next(loaded.model.parameters()).dtype
    rows_NT = session.rows_in_turn(steps)
    student = load_export(session, plan, own)
    checkpoints = session.checkpoints(run.recovery)
    with (
        session.timed("recover"),
        session.autocast(),
        recorded(run.recover_metrics, c.checkpoint_every, session.progress.recovered) as on_step,
    ):
        tensors = recover(
            student,
            loaded.model,
            loaded.description.layers,
            rows_NT,
            settings,
            micro_batch_size=c.micro_batch_size,
            gradient_checkpointing=c.gradient_checkpointing,
            checkpoints=checkpoints,
            on_step=on_step,
        )
        _update(session, dict(as_shipped(student, tensors.items())), f"recover-{c.recover}", steps)
    checkpoints.discard()
    return updates_of(run.model)


def _update(session: Session, tensors: Mapping[str, torch.Tensor], update: str, steps: int | None = None) -> None:
    """Puts other weights into the export, and says so in its card; figures of the earlier weights go."""
    run, (plan, rounding) = session.run, plan_of(session)
    done = update_words([*updates_of(run.model), update], [*recovery_steps(run.model), *([steps] if steps else [])])
    about = _about(session, _is_stock(run))
    card = model_card(session.config, plan.shape, rounding, None, None, done, *about)
    rewrite_weights(run.model, tensors, update, {"README.md": card}, (run.eval, *run.converted()), steps)


def eval_stage(session: Session) -> dict[str, Any]:
    """Perplexity and exact sizes, dense against pruned: RUN/eval.json, and the figures into the model card."""
    tasks = session.tasks  # before the model is loaded: a name may be wrong
    run, c = session.run, session.config
    if c.eval_data is not None and not session.in_memory:
        local_files(c.eval_data)  # a wrong path shows before a large model is loaded
    loaded = session.loaded
    plan, rounding = plan_of(session)
    description = loaded.description
    ids_NT, text, join = session.evaluation_windows
    with session.timed("eval"):
        exported = load_export(session, plan, next(loaded.model.parameters()).dtype)
        bytes_per_value = loaded.checkpoint_dtype.itemsize
        quality = compared(loaded.model, exported, ids_NT)
        dense = asdict(figures(description, None, bytes_per_value)) | quality.pop("dense")
        sizes = figures_of(description, plan, bytes_per_value)
        pruned = asdict(sizes) | quality.pop("pruned")
        dense["disk_bytes"] = dense["parameters"] * bytes_per_value
        pruned["disk_bytes"] = sum(f.stat().st_size for f in run.model.glob("*.safetensors"))
        guards = session.guard_losses(exported)
        quality["samples"] = samples(loaded.model, exported, loaded.tokenizer, ids_NT)
    gates = load_gates(run.gates, description.groups, session.architecture)
    results: dict[str, Any] = {"method": c.method, "keep": list(c.keep), "text": text, "dense": dense, "pruned": pruned}
    results["rounding"] = asdict(rounding)
    results["updates"] = updates_of(run.model)
    if run.refit.exists():
        results["refit"] = checked(run.refit, list[files.Refit], f"secateur refit {run.folder}")
    other = gates.asked != (c.sparsity, c.budget)  # size than gates were learned for
    results |= {"fixing": None if other else gates.about.get("fixing"), "other_size": other}
    results |= {"join": join, "guards": guards, "versions": versions(), **quality}
    if tasks is not None:
        with session.timed("score"):
            results["tasks"] = tasks.compare(
                loaded.model, exported, loaded.tokenizer, session.bos, session.progress.scored
            )
    if run.data.exists():
        guard_texts = (run.guard(number) for number in range(len(c.guard)))
        learned_from = [run.data, *(path for path in guard_texts if path.exists())]
        results["overlap"] = overlap(learned_from, ids_NT, tasks, loaded.tokenizer)
    results["seconds"] = checked(run.timings, dict[str, float], "secateur prune")
    about = _about(session, _is_stock(run))
    done = update_words(results["updates"], recovery_steps(run.model))
    card = model_card(c, plan.shape, rounding, results, verification(run.verify), done, *about)
    write_text(run.model / "README.md", card)
    session.progress.evaluated(results)
    write_json(run.eval, results)  # last: where it is, all is done
    return results


def remaining_stages(session: Session) -> dict[str, Any]:
    """All stages that have not been done yet, in order; returns what eval.json holds."""
    run = session.run
    if run.config.sweep is not None:
        from secateur.sweep import sweep_stages  # which does all this for a size

        _tasks, _text = session.tasks, session.evaluation_windows
        return sweep_stages(session)
    if not run.gates.exists():
        # What is wrong is better known before learning, and before the model writes itself a text.
        session.learning = True
        _known = session.tasks, budget_of(session), session.given, session.evaluation_windows, session.guards
        learn_stage(session)
    session.checkpoints(run.checkpoints).left_over(run.config.steps)
    session.recovered_before()  # whose states go then, too
    if not run.plan.exists():
        plan_stage(session)
    is_verified = (verification(run.verify) or {"passed": False})["passed"]
    if not run.model.is_dir() or (updates_of(run.model) and not is_verified):
        export_stage(session)
        is_verified = False
    if not is_verified:
        verify_stage(session)
    if run.config.refit and not refitted(run.model, run.refit):
        refit_stage(session)
    if run.config.recover and f"recover-{run.config.recover}" not in updates_of(run.model):
        recover_stage(session)
    done = evaluation(run.eval) or eval_stage(session)
    with session.timed("report"):
        from secateur.report.page import write_report  # matplotlib takes its time to be imported

        write_report([run.folder])
    return done
