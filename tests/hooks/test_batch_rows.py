"""Rows of a batch, picked for one request and put together again."""

from __future__ import annotations

import pytest
import torch

from lesa.errors import LesaError
from lesa.hooks.batch_rows import join_rows, pick_arguments, pick_rows, rows_of_parts
from lesa.hooks.model_specs import ModelSpec

SPEC = ModelSpec("Any", latent="x", conditioning=("words",), unbatched=("ids",))
BATCH = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("rows", [[[0], [1, 2]], [[2, 0], [1]], [[1], [0], [2]]])
def test_what_is_picked_is_put_together_again(rows):
    parts = [pick_rows(BATCH, part, 3) for part in rows]
    assert torch.equal(join_rows(parts, rows), BATCH)


def test_neighbouring_rows_are_a_view():
    assert pick_rows(BATCH, [1, 2], 3).data_ptr() == BATCH[1].data_ptr()


def test_arguments_of_some_rows():
    """Residuals have a row each in every tensor; prompts and their lengths an entry per row, also
    where a prompt has as many tokens as the batch has rows."""
    given = {
        "x": list(BATCH),
        "words": [BATCH[n] for n in range(3)],
        "ids": torch.zeros(3, 2),
        "lengths": [7, 8, 9],
        "cap_feats": [BATCH, BATCH + 1, BATCH + 2],  # of three tokens each
        "images": [BATCH[:2], BATCH, BATCH[:2]],
        "residuals": [BATCH, BATCH + 1, BATCH + 2],
        "more": {"embeds": (BATCH, None), "scale": 0.5},
        "time": torch.tensor(0.5),
        "flag": True,
    }
    found = pick_arguments(given, SPEC, [2, 0], 3)
    assert [row.tolist() for row in found["x"]] == [BATCH[2].tolist(), BATCH[0].tolist()]
    assert [len(found["words"]), found["lengths"]] == [2, [9, 7]]
    assert torch.equal(found["cap_feats"][0], BATCH + 2) and len(found["cap_feats"]) == 2
    assert [len(part) for part in found["images"]] == [2, 2]
    assert found["ids"] is given["ids"] and found["time"] is given["time"]
    assert torch.equal(found["residuals"][2], BATCH[[2, 0]] + 2) and len(found["residuals"]) == 3
    assert torch.equal(found["more"]["embeds"][0], BATCH[[2, 0]])
    assert (found["more"]["embeds"][1], found["more"]["scale"], found["flag"]) == (None, 0.5, True)


@pytest.mark.parametrize(
    ("rows", "found"),
    [(None, ([0], [1])), ([2, 1], ([0, 1], [2])), ([[0, 2], [1]], ([0, 2], [1]))],
)
def test_whose_rows_they_are(rows, found):
    assert rows_of_parts(2, rows) == found


@pytest.mark.parametrize("rows", [[1], [1, 0], [[0], [0]], [[0], [2]], [True, 1]])
def test_rows_that_are_no_batch(rows):
    with pytest.raises(LesaError, match="rows="):
        rows_of_parts(2, rows)
