"""One call for several requests, each at its own step: its rows of the batch are its own call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from lesa.engine import nvtx_ranges
from lesa.engine.kept import Decision
from lesa.engine.options import current_options
from lesa.engine.stats import Counters
from lesa.engine.trajectory import FeatureTap, Refusal, Trajectory
from lesa.errors import LesaError, RunError
from lesa.hooks.batch_rows import join_rows, pick_arguments, pick_rows, rows_in
from lesa.hooks.denoiser import Call, Denoiser, Run
from lesa.hooks.outputs import kind_of, make_output, read_sample
from lesa.hooks.request import Joint, Request

__all__ = ["BUSY", "run_joint"]

_SEVERAL = "an output of several tensors in a batch of several requests"
BUSY = "two threads use one slot"


class Engine(Protocol):
    """What a `CacheController` does for one request."""

    counters: Counters
    tap: FeatureTap

    def decide(self, call: Call) -> Decision: ...
    def keep(self, call: Call, trajectory: Trajectory, run: Run) -> None: ...
    def recover(
        self, call: Call | None, error: Exception, *, computed: bool = False
    ) -> Trajectory | None: ...
    def fall_back(self, reason: str) -> None: ...


@dataclass
class _Part:
    """The rows of one request: forecast in `output`, or still to be computed in full; `off` where
    they are none of lesa's."""

    rows: Sequence[int]
    off: bool = False
    call: Call | None = None
    trajectory: Trajectory | None = None
    output: Any = None

    @property
    def skipped(self) -> bool:
        """Whether it was forecast."""
        return self.output is not None


def run_joint(
    engine: Engine, denoiser: Denoiser, joint: Joint, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The model's output for a batch of several requests.

    Rows at a skipped step are forecast, each from its own ring and its own row of coefficients; the
    model runs on the others alone, or not at all.

    Raises:
        LesaError: the batch has other rows than the slots were given.
    """
    begun = perf_counter()
    given = denoiser.named(args, kwargs)
    total = _check_rows(denoiser, joint, given)
    asked = current_options()
    if asked is not None and asked.off:
        engine.counters.add_off()
        return denoiser.run(args, kwargs).output
    with _turns(joint.requests) as free:
        if not free:
            engine.fall_back(BUSY)
            output = denoiser.run(args, kwargs).output
            _count(engine, [_Part(rows) for rows in joint.rows], perf_counter() - begun)
            return output
        try:
            parts = [
                _forecast(engine, denoiser, request, rows, given, total)
                for request, rows in zip(joint.requests, joint.rows, strict=True)
            ]
            output = _complete(engine, denoiser, parts, given, total)
        except BaseException:  # these runs are over
            denoiser.reset()
            raise
    _count(engine, parts, perf_counter() - begun)
    return output


def _count(engine: Engine, parts: Sequence[_Part], seconds: float) -> None:
    """Enter what became of the parts of one call, which took so long together."""
    for part in parts:
        if part.off:
            engine.counters.add_off()
        else:
            count = engine.counters.add_skipped if part.skipped else engine.counters.add_full
            count(seconds / len(parts))


def _forecast(
    engine: Engine,
    denoiser: Denoiser,
    request: Request,
    rows: Sequence[int],
    given: dict[str, Any],
    total: int,
) -> _Part:
    """A request's part of the batch, forecast where that is possible."""
    part = _Part(rows, off=request.options is not None and request.options.off)
    if part.off:
        return part
    own = pick_arguments(given, denoiser.spec, rows, total)
    try:
        step = denoiser.clock.tick(own, request)
        part.call = call = Call(denoiser, step, (), own, request, part=True)
        part.trajectory, skip, reason = engine.decide(call)
        if skip:
            assert part.trajectory is not None
            part.output = part.trajectory.forecast(call)
        elif reason is not None:
            engine.fall_back(reason)
    except RunError:  # nothing has been computed yet
        raise
    except Exception as error:
        part.trajectory = engine.recover(part.call, error)
    return part


def _complete(
    engine: Engine, denoiser: Denoiser, parts: list[_Part], given: dict[str, Any], total: int
) -> Any:
    """The output of the whole batch, from the forecasts and a run of the model on the other
    rows."""
    samples = [read_sample(part.output) if part.skipped else None for part in parts]
    if any(part.skipped and s is None for part, s in zip(parts, samples, strict=True)):
        return _all_full(engine, denoiser, parts, given)
    rest = [n for n, part in enumerate(parts) if not part.skipped]
    if rest:
        whole = len(rest) == len(parts)
        rows = sorted(row for n in rest for row in parts[n].rows)
        own = given if whole else pick_arguments(given, denoiser.spec, rows, total)
        with nvtx_ranges.full:
            run = denoiser.run((), own, tap=engine.tap.inside)
        for n in rest:
            part_run = _run_of(run, parts[n].rows, rows)
            samples[n] = None if part_run is None else read_sample(part_run.output)
            _keep(engine, parts[n], part_run)
        if whole:
            return run.output
    found = [sample for sample in samples if sample is not None]
    if len(found) < len(parts):
        return _all_full(engine, denoiser, parts, given)
    kind = next(kind_of(part.output) for part in parts if part.skipped)
    return make_output(kind, join_rows(found, [part.rows for part in parts]))


def _all_full(engine: Engine, denoiser: Denoiser, parts: list[_Part], given: dict[str, Any]) -> Any:
    """The model's own output, where rows of it cannot be put together."""
    engine.fall_back(_SEVERAL)
    for part in parts:
        part.output = None
    return denoiser.run((), given).output


def _run_of(run: Run, rows: Sequence[int], all_rows: list[int]) -> Run | None:
    """What a run on `all_rows` gave for some of them; None where its output is no single tensor."""
    sample, total = read_sample(run.output), len(all_rows)
    if sample is None or len(sample) != total:
        return None
    places = [all_rows.index(row) for row in rows]
    output = make_output(kind_of(run.output), pick_rows(sample, places, total))
    feature, embedded = (pick_rows(part, places, total) for part in (run.feature, run.embedded))
    return Run(output, feature, embedded)


def _keep(engine: Engine, part: _Part, run: Run | None) -> None:
    """Let the request keep the feature of its rows."""
    if part.call is None or part.trajectory is None:
        return
    if run is None:
        engine.recover(part.call, Refusal(_SEVERAL), computed=True)
    else:
        engine.keep(part.call, part.trajectory, run)


def _check_rows(denoiser: Denoiser, joint: Joint, given: dict[str, Any]) -> int:
    """Rows of the batch; LesaError unless they are those of the slots."""
    total = rows_in(given.get(denoiser.spec.latent))
    told = sum(map(len, joint.rows))
    if told != total:
        raise LesaError(
            f"rows={told}: the slots have so many rows together, and this call of the denoiser "
            f"has {total}; give lesa.Slot.batch(slots, rows) the rows of every slot"
        )
    return total


@contextmanager
def _turns(requests: Sequence[Request]) -> Iterator[bool]:
    """Holds the turns of all requests; whether they were free."""
    taken = []
    try:
        for request in requests:
            if request.turn is not None and not request.turn.acquire(blocking=False):
                break
            taken.append(request)
        yield len(taken) == len(requests)
    finally:
        for request in taken:
            if request.turn is not None:
                request.turn.release()
