"""Descriptions of plain values, and the sentence of a wrong one."""

import pytest

from lesa.core import schema
from lesa.errors import LesaError

PERSON = schema.fields(
    {
        "name": schema.text(5),
        "age": schema.whole_number(0, 150),
        "sizes": schema.items(schema.number(0, 3), 1, 2),
    },
    {
        "kind": schema.choice("cat", "dog"),
        "tame": schema.maybe(schema.truth),
        "more": schema.table_of(schema.text(), 2),
        "free": schema.anything,
    },
)
GOOD = {"name": "Tom", "age": 3, "sizes": [1, 2.5]}


@pytest.mark.parametrize(
    "more",
    [{}, {"kind": "cat", "tame": None, "more": {"a b": "c"}, "free": [{}]}, {"sizes": (0, 3)}],
)
def test_what_fits_comes_back(more):
    value = {**GOOD, **more}
    assert schema.checked(value, PERSON, "pet", "buy one") is value


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"name": 3}, "pet.name=3: not a text"),
        ({"name": "Tommy!"}, "pet.name='Tommy!': longer than 5 characters"),
        ({"age": True}, "pet.age=True: not a whole number of 0 to 150"),
        ({"age": 3.0}, "pet.age=3.0: not a whole number of 0 to 150"),
        ({"age": -1}, "pet.age=-1: not a whole number of 0 to 150"),
        ({"sizes": []}, "pet.sizes=[]: 0 items, not 1 to 2"),
        ({"sizes": "12"}, "pet.sizes='12': not a list"),
        ({"sizes": [1, 4]}, "pet.sizes[1]=4: not a finite number of 0 to 3"),
        ({"sizes": [float("nan")]}, "pet.sizes[0]=nan: not a finite number of 0 to 3"),
        ({"sizes": [False]}, "pet.sizes[0]=False: not a finite number of 0 to 3"),
        ({"kind": "cow"}, "pet.kind='cow': not one of 'cat', 'dog'"),
        ({"kind": []}, "pet.kind=[]: not one of 'cat', 'dog'"),
        ({"tame": 1}, "pet.tame=1: neither true nor false"),
        ({"more": []}, "pet.more=[]: not an object"),
        ({"more": {"a b": 1}}, "pet.more.'a b'=1: not a text"),
        ({"more": dict.fromkeys("abc", "")}, "pet.more={'a': '', 'b': '', 'c': ''}: 3 names, not"),
        ({"wings": 2}, "pet has an unknown field 'wings'"),
    ],
    ids=repr,
)
def test_what_is_wrong_is_told_by_its_place(more, told):
    with pytest.raises(LesaError) as caught:
        schema.checked({**GOOD, **more}, PERSON, "pet", "buy one")
    assert str(caught.value).startswith(told) and str(caught.value).endswith("; buy one")


def test_a_missing_field_and_no_object():
    for value, told in (({"name": "Tom"}, "pet has no age; "), ([], "pet=[]: not an object; ")):
        with pytest.raises(LesaError) as caught:
            schema.checked(value, PERSON, "pet", "buy one")
        assert str(caught.value) == f"{told}buy one"


def test_numbers_of_any_size_are_told():
    for value in (10**400, -(10**400), 1e301):
        with pytest.raises(LesaError, match="not a finite number"):
            schema.checked(value, schema.number(), "x", "")
