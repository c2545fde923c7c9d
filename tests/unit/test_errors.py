import pickle

import pytest

from geotrain import errors


def concrete() -> list[type[errors.GeotrainError]]:
    found, todo = [], [errors.GeotrainError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo += kind.__subclasses__()
    return sorted(found, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", concrete())
def test_an_error_survives_the_way_from_a_worker(kind: type[errors.GeotrainError]) -> None:
    error = kind(*(3.0 if name == "waited_s" else f"<{name}>" for name in kind.fields))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)


@pytest.mark.parametrize("kind", concrete())
def test_an_error_says_who_and_what_to_do(kind: type[errors.GeotrainError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")
    if kind.fields != ("detail",):
        assert kind.remedy, "no remedy"
        error = kind(*(3.0 if name == "waited_s" else f"<{name}>" for name in kind.fields))
        for name in set(kind.fields) - {"waited_s"}:
            assert f"<{name}>" in str(error), f"{name} is not in the message"


def test_exit_codes_tell_the_branches_apart() -> None:
    codes = [kind.exit_code for kind in errors.GeotrainError.__subclasses__()]
    assert len(set(codes)) == len(codes)
