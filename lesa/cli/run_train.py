"""`lesa train`: a forecaster for a pipeline, as a folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from lesa.cli.inputs import parse_counts
from lesa.cli.launch import check_ranks, refuse_ranks
from lesa.cli.output import check_json, no_empty_folders, say
from lesa.cli.rehearsal import check_levels
from lesa.cli.requests import TrainRequest
from lesa.cli.run_plan import check_memory, print_plan
from lesa.cli.schedulers import check_steps
from lesa.errors import LesaError
from lesa.training.budget import default_judges
from lesa.training.numbers import check_guard
from lesa.util.files import require_writable
from lesa.util.progress import Progress
from lesa.util.ranks import Ranks, joined

if TYPE_CHECKING:
    from lesa.forecasters import LesaForecaster


def run_train(request: TrainRequest, console: Console) -> dict[str, Any]:
    """Train, save the forecaster, print its lists of full steps and return what is known of it.

    Under torchrun or `accelerate launch` the processes share the denoiser's batches.

    Raises:
        LesaError: for bad input, before the pipeline is loaded where it can be told.
        KeyboardInterrupt: after an interrupt; what training had found by then has been saved.
    """
    texts = request.texts()
    validation = request.validation_texts(texts)
    if request.dry_run:
        settings, steps, counts = _asked(request, texts, len(validation or ()))
        everyone = len(texts) + len(validation or ())
        judging = _judging(texts, len(validation or ()))
        with no_empty_folders([request.out], ever=True):
            require_writable(request.out)
        check_json(request.json)
        return print_plan(request, settings, steps, counts, everyone, judging, console)
    check_ranks(len(texts) + len(validation or ()), request.batch_size, request.device)
    if request.form == "disca":
        refuse_ranks("train --form disca")
    with joined() as ranks:
        forecaster = _train(request, texts, validation, ranks)
        if ranks.leads:
            forecaster.save_pretrained(request.out)
    for schedule in forecaster.calibrated:
        listed = ", ".join(map(str, schedule.full_steps))
        console.print(f"{len(schedule.full_steps)} of {schedule.steps} in full: {listed}")
    say(console, f"forecaster in {request.out}")
    end_if_interrupted(forecaster)
    lists = [{"num_steps": s.steps, "full_steps": s.full_steps} for s in forecaster.calibrated]
    facts = {"folder": request.out, "calibrated": lists, "metadata": forecaster.metadata}
    return facts | asdict(request.full_step)


def _train(
    request: TrainRequest, texts: list[str], validation: list[str] | None, ranks: Ranks
) -> LesaForecaster:
    with Progress(quiet=not ranks.leads).bar("load", 0):
        pipe, settings, steps, counts = _prepare(request, texts, len(validation or ()))
    import lesa

    optional: dict[str, Any] = {} if request.tap is None else {"tap": request.tap}
    return lesa.train(
        pipe,
        texts,
        num_inference_steps=steps,
        full_steps=counts,
        form=request.form,
        polish=request.polish,
        validation=validation,
        budget=request.budget,
        target_psnr=request.target_psnr,
        guard=cast(Any, request.guard),
        batch_size=request.batch_size,
        call=settings,
        seed=request.seed,
        folder=request.out,
        group=ranks.group,
        **optional,
    )


def end_if_interrupted(forecaster: LesaForecaster) -> None:
    """KeyboardInterrupt where training returned early because of one."""
    if forecaster.metadata.get("interrupted"):
        raise KeyboardInterrupt


def _prepare(
    request: TrainRequest, texts: list[str], validation: int
) -> tuple[Any, dict[str, Any], tuple[int, ...], tuple[int, ...]]:
    """The pipeline, the arguments of its call, the numbers of steps and of full steps."""
    settings, steps, counts = _asked(request, texts, validation)
    request.check_target()
    check_memory(request, settings, len(texts) + validation, steps)
    require_writable(request.out)
    check_json(request.json)
    pipe = request.load(settings, texts)
    check_levels(pipe, settings)
    request.full_step.warm_up(pipe, texts[: request.batch_size], settings)
    return pipe, settings, steps, counts


def _asked(
    request: TrainRequest, texts: list[str], validation: int
) -> tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]:
    """The arguments of the pipeline's call, the numbers of steps and of full steps, checked."""
    saved = request.saved(without=request.dry_run)
    settings = request.settings(saved)
    asked = request.num_inference_steps
    asked = f"{settings['num_inference_steps']}" if asked is None else asked
    steps = parse_counts(asked, field="num-inference-steps")
    check_steps(max(steps), saved.scheduler)
    settings["num_inference_steps"] = max(steps)
    counts = _full_steps(request, steps)
    everyone = len(texts) + validation
    check_guard(request.guard, request.form, everyone)
    judging = _judging(texts, validation)
    request.allowed.check(everyone, judging, counts, steps[0])
    return settings, steps, counts


def _judging(texts: list[str], validation: int) -> int:
    """How many of the prompts judge."""
    return validation or default_judges(len(texts))


ONE_LIST = ("paper", "disca")  # forms that are tied to one step list


def _full_steps(request: TrainRequest, steps: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of full steps to train for; LesaError where the form takes one list only, or
    the search for a target begins at one."""
    one_list, aimed = request.form in ONE_LIST, request.target_psnr is not None
    if request.full_steps is None:
        counts = usual_full_steps(min(steps))
        counts = counts[-2:-1] or counts if one_list or aimed else counts
    else:
        counts = parse_counts(request.full_steps, min(steps))
    given = {"num-inference-steps": steps} if one_list else {}
    given |= {"full-steps": counts} if one_list or aimed else {}
    for field, numbers in given.items():
        if len(numbers) > 1:
            listed, option = ",".join(map(str, numbers)), "--target-psnr"
            option = f"--form {request.form}" if one_list else option
            raise LesaError(f"{field}={listed!r}: {option} takes one number; give one")
    return counts


def usual_full_steps(steps: int) -> tuple[int, ...]:
    """Numbers of full steps where none is given: of few steps a half and a quarter."""
    found = (13, 10, 8) if steps >= 20 else (steps // 2, steps // 4)
    return tuple(dict.fromkeys(max(1, count) for count in found))
