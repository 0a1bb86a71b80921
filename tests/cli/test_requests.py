"""Requests: one frozen object per command, whose fields are the command's options."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from lesa import cli
from lesa.cli.requests import CompareRequest, GenerateRequest, TrainRequest
from lesa.errors import LesaError


@pytest.mark.parametrize(
    ("command", "request_type"),
    [(cli.train, TrainRequest), (cli.generate, GenerateRequest), (cli.compare, CompareRequest)],
)
def test_every_field_is_an_option_with_its_default(command, request_type):
    options = dict(inspect.signature(command).parameters)
    assert options.pop("pipeline_option").default is None
    assert set(options) == {field.name for field in fields(request_type)}
    for field in fields(request_type):
        if options[field.name].default is not inspect.Parameter.empty:
            assert options[field.name].default == field.default


def test_a_request_is_checked_when_it_is_made_and_stays_as_it_is():
    request = CompareRequest(pipeline="testbed", prompts=Path("p.txt"))
    with pytest.raises(FrozenInstanceError):
        request.seed = 1  # type: ignore[misc]
    for wrong in ({}, {"pipeline": "testbed"}, {"flops_only": True}, {"model": "sdxl"}):
        with pytest.raises(LesaError, match="; give "):
            CompareRequest(**wrong)
    both = {"flops_only": True, "model": "sdxl"}
    assert CompareRequest(**both).model == "sdxl"
    with pytest.raises(LesaError, match="without a pipeline"):
        CompareRequest(**both, pipeline="testbed")
