"""A warning names the line that the user wrote, not one of lesa or of a library between."""

import warnings

from tiny_pipelines import build

import lesa


def test_warnings_point_at_the_users_line():
    pipe, call = build("flux")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        lesa.enable(pipe, full_steps=10)
        pipe(**call(1) | {"num_inference_steps": 4})
    (told,) = [each for each in found if "full_steps=10" in str(each.message)]
    assert told.filename == __file__ and told.category is UserWarning
