from pathlib import Path

from geotrain import registry
from geotrain.registry import Version


def made(folder: str, number: int, **metrics: float) -> Version:
    return Version(number, registry.model_url(folder, "m", number), "run", "job", metrics, {"north": "w"}, None, "now")


def test_versions_count_up_and_the_champion_is_a_pointer(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert registry.champion(url, "m") is None
    assert registry.next_number(url, "m") == 1
    for number in (1, 2):
        registry.publish(made(url, number, accuracy=number / 10))
    registry.promote(url, "m", 1)
    assert registry.next_number(url, "m") == 3
    champion = registry.champion(url, "m")
    assert champion == made(url, 1, accuracy=0.1)
    assert registry.version(url, "m", 2).metrics == {"accuracy": 0.2}


def test_a_challenger_must_not_be_worse() -> None:
    reigning = made("r", 1, accuracy=0.9, loss=0.3)
    assert registry.beats({}, None, "accuracy", higher_is_better=True)[0]
    assert registry.beats({"accuracy": 0.91}, reigning, "accuracy", higher_is_better=True)[0]
    assert not registry.beats({"accuracy": 0.89}, reigning, "accuracy", higher_is_better=True)[0]
    assert registry.beats({"loss": 0.2}, reigning, "loss", higher_is_better=False)[0]
    assert not registry.beats({"loss": 0.4}, reigning, "loss", higher_is_better=False)[0]
    assert registry.beats({"loss": 9}, reigning, None, higher_is_better=True)[0]
    better, why = registry.beats({"loss": 0.2}, reigning, "accuracy", higher_is_better=True)
    assert not better
    assert "not evaluated on accuracy" in why
