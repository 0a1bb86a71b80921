"""Folders whose files the fuzz changes: one that training made, one with all that there can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from file_fuzz import STATISTICS, Fuzz, sentence
from shaken_forecasters import PLAN, SIGMAS, levels, random_rows, shaken
from tiny_pipelines import build, run

import lesa
from lesa import LesaError, LesaForecaster
from lesa.core.schedule import Schedule
from lesa.forecasters.worth import Worth
from lesa.training.statistics import Statistics, inner_products

STEPS, FULL = 6, 3


def trained(folder: Path) -> Fuzz:
    """A forecaster of a tiny FLUX with the statistics of its training; pictures are made by what
    the changed files give."""
    pipe, make = build("flux")
    call = {**make(), "true_cfg_scale": 1.0}
    left_out = ("num_inference_steps", "generator", "output_type")
    given = {name: value for name, value in call.items() if name not in left_out}
    quick: dict[str, Any] = {"refine": 0, "polish": 0, "progress": False}
    forecaster = lesa.train(
        pipe, None, STEPS, FULL, form="continuous", folder=folder, call=given, **quick
    )
    forecaster.save_pretrained(folder)

    def accelerated(loaded: LesaForecaster) -> tuple[str, str]:
        try:
            with lesa.accelerate(pipe, loaded, full_steps=2):
                picture = run(pipe, call | {"num_inference_steps": 4})
                reasons = [*lesa.stats(pipe).fallbacks]
        except LesaError as error:
            return sentence(error)
        if not picture.isfinite().all():
            return "not finite", "a picture of 4 steps"
        failed = [reason for reason in reasons if "Error" in reason]
        return ("error in a step", failed[0][:300]) if failed else ("works", "")

    return Fuzz(folder, accelerated)


def full(folder: Path) -> Fuzz:
    """A forecaster with two branches, parts of batched guidance, moments, what a list is worth and
    one without rows; statistics of two branches. Nothing was trained."""
    forecaster = shaken(history=2, hidden=(4,), branches=("cond", "uncond"))
    forecaster.metadata = {
        "model_class": "M", "model_id": "a/b", "model_hash": "c", "scheduler": "E", "noise": False,
        "prompts": 3, "prompts_sha256": "d", "seed": 0, "call": {"guidance_scale": 3.5},
    }  # fmt: skip
    for branch in forecaster.branches:
        rows = random_rows(forecaster)
        forecaster.correct(PLAN, SIGMAS, branch, rows, split=torch.stack([rows, rows], -1))
    worth = Worth.of([40.0, 45.0], validated=True, lpips=[0.01, 0.02], share=0.1)
    forecaster.calibrations[0].worth = worth
    forecaster.recommend(Schedule.every(4, 28), levels(28))
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(100, 300, dtype=torch.float64, generator=draw)
    forecaster.moments.keep(SIGMAS, {"cond": values @ values.T}, latent=True)
    forecaster.save_pretrained(folder)
    statistics = Statistics(levels(6), "output", 7, {"cond": 1, "uncond": 1}, setting="a")
    basis = torch.randn(statistics.joint_size, 300, dtype=torch.float64, generator=draw)
    basis[-1] = 1
    statistics.extend(inner_products(basis)[None], ["a prompt"])
    statistics.save(folder / STATISTICS)
    return Fuzz(folder)
