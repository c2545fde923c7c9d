"""What the docs promise: docs/job.md is made from the job's own fields; commands and files that the README names exist."""

import os
import re
from pathlib import Path
from typing import Any, get_args

from geotrain.cli import app
from geotrain.job import JobSpec, Sync
from geotrain.job.base import Spec
from geotrain.mistakes import members_of

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs/job.md"


def kind(annotation: Any) -> str:
    text = str(annotation) if get_args(annotation) else getattr(annotation, "__name__", str(annotation))
    text = re.sub(r"geotrain\.job\.\w+\.|typing\.|Annotated\[", "", text)
    return re.sub(r", (FieldInfo|Field|Ge|Gt|Le|Lt|StringConstraints)\(.*", "", text).replace("|", "or")


def default(field: Any) -> str:
    if field.is_required():
        return "needed"
    shown = field.default.model_dump(mode="json") if hasattr(field.default, "model_dump") else field.default
    return "" if field.default in ((), {}, None) else f"`{shown}`"


def section(model: Any) -> list[str]:
    lines = [f"## {model.__name__}", ""]
    if model.__doc__ and model.__doc__ != Spec.__doc__:
        lines += [model.__doc__.strip(), ""]
    lines += ["| key | kind | default | what it is |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        lines.append(f"| `{name}` | {kind(field.annotation)} | {default(field)} | {(field.description or '').replace(chr(10), ' ')} |")
    return [*lines, ""]


def reference() -> str:
    seen, todo = [], [JobSpec]
    while todo:
        model = todo.pop(0)
        if model not in seen:
            seen.append(model)
            todo += [inner for field in model.model_fields.values() for inner in members_of(field.annotation)]
    head = ["# The job, key by key", "", "Made from `geotrain/job/`. An unknown key is an error. Paths are relative to the job file.", ""]
    return "\n".join(head + [line for model in seen for line in section(model)])


def test_the_job_reference_is_up_to_date() -> None:
    if os.environ.get("WRITE_DOCS"):
        DOC.write_text(reference())
    assert DOC.read_text() == reference(), "WRITE_DOCS=1 pytest tests/unit/test_docs.py writes it anew"


def test_the_readme_names_only_what_there_is() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    commands |= {group.name for group in app.registered_groups if group.name}
    named = set(re.findall(r"^\| `geotrain (\w+)", readme, re.MULTILINE))
    assert named == commands
    for target in re.findall(r"\]\((?!http)([^)]+)\)", readme):
        assert (ROOT / target).exists(), target
    for file in re.findall(r"deployments/[\w/.-]+\.yaml", readme):
        assert (ROOT / file).exists(), file


def test_the_tests_that_the_failures_name_exist() -> None:
    text = (ROOT / "docs/failures.md").read_text()
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+?)(?:_\.\.\.)?`", text):
        assert f"def {name}" in tests, name
    for file in re.findall(r"`(tests/[\w/.-]+)`", text):
        assert (ROOT / file).exists(), file


def test_every_strategy_is_described() -> None:
    text = (ROOT / "docs/strategies.md").read_text()
    for model in members_of(Sync):
        (tag,) = get_args(model.model_fields["strategy"].annotation)
        assert f"`{tag}`" in text, tag


def test_the_figures_in_the_docs_come_from_committed_results() -> None:
    from bench.figures import BLOCK, pages

    for page, text in pages().items():
        found = (ROOT / page).read_text()
        assert BLOCK.search(found), page
        assert found == text, f"{page}: python -m bench.figures writes them anew"
