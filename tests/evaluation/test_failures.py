"""One method that fails is a note of the comparison; the others are measured."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from tiny_pipelines import build

from lesa.cli.run_compare import prepare
from lesa.errors import LesaError
from lesa.evaluation import Bench, Method, compare
from lesa.evaluation import build as method
from lesa.evaluation.failures import Failures
from lesa.evaluation.limit import add_limits
from lesa.evaluation.method import Use
from lesa.evaluation.methods import PEERS
from lesa.evaluation.peers import trained

STEPS = 4


@pytest.fixture(scope="module")
def bench():
    pipe, call = build("flux")
    settings = call(3) | {"num_inference_steps": STEPS}
    del settings["generator"], settings["output_type"]
    return Bench(STEPS, pipe, settings, ["a", "b", "c"])


def failing(name, error, *, at):
    """A method that is the plain run until it is put on for the `at`-th time."""
    uses = 0

    @contextmanager
    def applied(pipe):
        nonlocal uses
        uses += 1
        if uses == at:
            raise error
        yield Use(lambda: 0)

    return Method(name, STEPS, applied=applied, wanted=2)


def measured(bench, *methods):
    return compare(bench.pipe, ["a", "b", "c"], methods, bench.settings, batch_size=2)


def test_the_others_are_measured_and_each_failure_is_told(bench):
    good = method("fora", 2, bench)
    early = failing("early", AssertionError("State not found.\nmore"), at=1)
    twin = failing("twin", AssertionError("State not found."), at=1)
    late = failing("late", LesaError("grid: 3 tokens"), at=3)  # counted, the first batch, here
    mine = failing("lesa", RuntimeError(), at=2)
    found = measured(bench, early, late, good, twin, mine)
    assert [row["label"] for row in found.rows] == ["fora @2"]
    assert len(found.rows[0]["psnr"]) == 3 and set(found.pictures) == {"plain", "fora @2"}
    told = [note for note in found.notes if note.startswith("left out")]
    assert told == [
        "left out: early @2, twin @2 failed while its operations were counted: "
        "AssertionError: State not found.",
        "left out: lesa @2 failed while it was measured: RuntimeError: it says nothing",
        "left out: late @2 failed while it was measured: grid: 3 tokens",
    ]
    add_limits(bench.pipe, found, [mine, good])  # has no row of lesa's to complete


def test_a_comparison_ends_where_none_is_left(bench):
    one, two = failing("one", ValueError("no"), at=2), failing("two", KeyError("x"), at=1)
    with pytest.raises(LesaError, match=r"methods=\['two @2', 'one @2'\]: none .*ValueError: no"):
        measured(bench, one, two)


def test_an_interrupt_ends_it(bench, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        measured(bench, method("fora", 2, bench), failing("one", KeyboardInterrupt(), at=2))
    early = SimpleNamespace(metadata={"interrupted": True})  # as training returns after Ctrl-C
    monkeypatch.setattr(trained, "train", lambda *_, **__: early)
    for name in ("lesa-paper", "lesa-disca"):
        with pytest.raises(KeyboardInterrupt):
            prepare(name, [2], bench, False, Failures())


def test_what_fails_in_preparation_is_left_out(bench, monkeypatch):
    own = PEERS["dpcache"]

    class Broken:
        takes_lists = False

        def unfit(self, bench):
            return own.unfit(bench)

        def build(self, name, wanted, *rest):
            if wanted > 2:
                raise AssertionError(f"not {name}")
            return own.build(name, wanted, *rest)

    monkeypatch.setitem(PEERS, "dpcache", Broken())
    failures = Failures()
    found = prepare("fora,dpcache", [3, 2], bench, False, failures)
    assert [m.name for m in found].count("dpcache") == 1 and {"fora"} < {m.name for m in found}
    (note,) = failures.notes()
    assert note == "left out: dpcache @3 failed in its preparation: AssertionError: not dpcache"
    with pytest.raises(LesaError, match="none of them could be measured .dpcache @3 failed in"):
        prepare("dpcache", [3], bench, False, Failures())
    with pytest.raises(LesaError, match="'deepcache': it needs a U-Net"):  # a refusal stays one
        prepare("fora,deepcache", [3], bench, False, Failures())


def test_the_untrained_list_of_embeddings_is_that_of_one(bench):
    """The levels come from a run of the first prompt, however many have embeddings."""
    pipe, call = build("flux")
    single = method("lesa-untrained", 2, Bench(STEPS, pipe, call()))
    assert method("lesa-untrained", 2, bench).schedule == single.schedule
