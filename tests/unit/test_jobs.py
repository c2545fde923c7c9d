from pathlib import Path
from typing import Any

import pytest

from geotrain.errors import JobError
from geotrain.job import load_job, load_region, parse_job
from tests.making import points_job

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("deployments/jobs/*.yaml"), ROOT / "geotrain/template/job.yaml", *ROOT.glob("bench/jobs/*.yaml")])


def tree(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "name": "x",
        "task": "a:B",
        "regions": [{"name": "tokyo", "data": {"train": "t"}}, {"name": "paris", "data": {"train": "p"}}],
        "train": {"batch_size": 4, "epochs": 1},
        "sync": {"strategy": "ma"},
    }
    return {**whole, **changes}


def mistakes(**changes: Any) -> str:
    with pytest.raises(JobError) as caught:
        parse_job(tree(**changes))
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_job_loads(path: Path) -> None:
    job = load_job(str(path))
    assert Path(job.regions[0].data.train).is_absolute()


def test_an_unknown_key_names_the_nearest_valid_one() -> None:
    assert "sync.evry: unknown key; did you mean 'every'?" in mistakes(sync={"strategy": "ma", "evry": 3})
    assert "regions[0] (tokyo).data.trian: unknown key; did you mean 'train'?" in mistakes(
        regions=[{"name": "tokyo", "data": {"train": "t", "trian": "t"}}]
    )
    assert "train.epoch: unknown key; did you mean 'epochs'?" in mistakes(train={"batch_size": 4, "epochs": 1, "epoch": 1})


def test_every_mistake_is_listed_with_its_region() -> None:
    text = mistakes(
        regions=[{"name": "tokyo", "data": {}}, {"name": "paris", "data": {"train": "p"}, "cluster": {"kind": "adress"}}],
        sync={"strategy": "asgdga"},
    )
    assert "3 mistakes" in text
    assert "regions[0] (tokyo).data.train: is missing" in text
    assert "regions[1] (paris).cluster: no kind 'adress'; did you mean 'address'?" in text
    assert "sync: no strategy 'asgdga'; did you mean 'asgd_ga'?" in text


def test_a_missing_key_of_a_tagged_section_is_named() -> None:
    assert "regions[0] (tokyo).cluster.address: is missing" in mistakes(
        regions=[{"name": "tokyo", "data": {"train": "t"}, "cluster": {"kind": "address"}}]
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"batch_size": 4}}, "give either epochs or samples"),
        ({"train": {"batch_size": 4, "epochs": 1, "samples": 5}}, "give either epochs or samples"),
        ({"regions": [{"name": "a", "data": {"train": "t"}}] * 2}, "two regions are called a"),
        ({"regions": []}, "regions"),
        ({"links": {"pairs": {"tokyo>rome": {}}}}, "'tokyo>rome' is not 'one>other'"),
        ({"sync": {"strategy": "ma", "alpha": 0.5}}, "alpha belongs to mode: async"),
        ({"train": {"batch_size": 4, "epochs": 1, "until": {"metric": "m", "at_least": 1}}}, "held-out rows"),
        ({"task": "no-colon"}, "write module:Name"),
        ({"name": "Not Good"}, "lower-case letters"),
    ],
)
def test_a_mistake_says_what_to_write_instead(changes: dict[str, Any], says: str) -> None:
    assert says in mistakes(**changes)


def test_secrets_go_by_reference_only() -> None:
    region = {"name": "tokyo", "data": {"train": "s3://b/t"}, "storage_options": {"secret": "hunter2"}}
    text = mistakes(regions=[region])
    assert "secret: {env: NAME_OF_A_VARIABLE}" in text
    assert "hunter2" not in text
    region["storage_options"] = {"secret": {"env": "TOKYO_SECRET"}}
    assert "hunter2" not in str(parse_job(tree(regions=[region])).to_dict())


def test_plain_text_stays_on_loopback_unless_the_job_says_so() -> None:
    region = {"name": "tokyo", "data": {"train": "t"}, "wan": {"listen": "0.0.0.0:9000"}}
    assert "plaintext: true" in mistakes(regions=[region])
    region["wan"] = {"listen": "0.0.0.0:9000", "plaintext": True}
    assert "add advertise" in mistakes(regions=[region])
    region["wan"] = {"listen": "0.0.0.0:9000", "plaintext": True, "advertise": "tokyo.example:9000"}
    assert parse_job(tree(regions=[region]))


def test_links_fall_back_from_direction_to_pair_to_default_to_shape() -> None:
    links = {"mbit_per_s": 10, "pairs": {"tokyo>paris": {"mbit_per_s": 1}, "paris-tokyo": {"mbit_per_s": 2}}}
    job = parse_job(tree(links=links))
    assert job.link("tokyo", "paris").mbit_per_s == 1
    assert job.link("paris", "tokyo").mbit_per_s == 2
    assert parse_job(tree(links={"mbit_per_s": 10})).link("tokyo", "paris").mbit_per_s == 10
    assert parse_job(tree(shape={"mbit_per_s": 7, "rtt_ms": 3})).link("tokyo", "paris").rtt_ms == 3


def test_overrides_lie_over_the_file_and_reach_regions_by_name(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(str(tree()).replace("'", '"'))
    job = load_job(str(file), {"sync.every": 3, "regions.paris.data.train": "elsewhere"})
    assert job.sync.every == 3  # type: ignore[union-attr]
    assert job.region("paris").data.train == str(tmp_path / "elsewhere")
    with pytest.raises(JobError, match="nothing called 'rome'"):
        load_job(str(file), {"regions.rome.name": "x"})


def test_a_file_that_is_not_there_or_not_yaml_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot read the job file"):
        load_job(str(tmp_path / "absent.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(JobError, match="not valid YAML"):
        load_job(str(tmp_path / "bad.yaml"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "ma", "topology": "mesh"}, "mesh has nobody to merge"),
    ({"strategy": "ma", "mode": "async", "topology": "owners"}, "owners shares the merging out"),
    ({"strategy": "ma", "mode": "async", "codec": "topk"}, "whole replicas"),
    ({"strategy": "ma", "mode": "async", "quorum": 2}, "belong to mode: sync"),
    ({"strategy": "ma", "alpha": 0.5}, "belongs to mode: async"),
    ({"strategy": "asgd", "feedback": "econtrol", "codec": "int8"}, "a push strategy has no owner"),
    ({"strategy": "asgd", "topology": "ring"}, "'mesh'"),
    ({"strategy": "diloco", "feedback": "econtrol"}, "one lossy codec"),
    ({"strategy": "diloco", "feedback": "econtrol", "codec": "int8", "quorum": 2}, "leave quorum out"),
    ({"strategy": "diloco", "feedback": "dgc", "codec": "int8"}, "needs codec: topk"),
    ({"strategy": "diloco", "keep": 0.1}, "keeps every number"),
    ({"strategy": "diloco", "feedback_decay": 0.9, "feedback": "dgc", "codec": "topk"}, "belongs to feedback: ef"),
    ({"strategy": "ma", "max_staleness": 3}, "belongs to mode: async"),
    ({"strategy": "delayed", "momentum_clip": 0.1, "outer_momentum": 0}, "outer_momentum is 0"),
    ({"strategy": "diloco", "feedback_decay": 0.9}, "of a lossy codec"),
    ({"strategy": "diloco", "grace_s": 1}, "give a quorum"),
    ({"strategy": "diloco", "merge": "median", "codec": "topk"}, "use norm_clipped"),
    ({"strategy": "diloco", "merge": "median"}, "three regions or more"),
    ({"strategy": "diloco", "quorum": 3}, "it can be 2 at most"),
    ({"strategy": "streaming", "every": 10, "fragments": 4}, "not a multiple"),
    ({"strategy": "streaming", "every": 8, "fragments": 4, "overlap_steps": 2}, "must be less than every / fragments = 2"),
    ({"strategy": "diloco", "sparse_embeddings": True, "codec": "topk"}, "sends whole rows"),
    ({"strategy": "diloco", "sparse_embeddings": True, "topology": "owners"}, "whole tables in one piece"),
    ({"strategy": "streaming", "sparse_embeddings": True}, "no fragments"),
    ({"strategy": "ma", "sparse_embeddings": True, "mode": "async"}, "whole replicas"),
]


@pytest.mark.parametrize(("sync", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_does_not_go_together_is_refused_with_the_reason(sync: dict[str, Any], reason: str) -> None:
    with pytest.raises(JobError, match=reason):
        parse_job(tree(sync=sync))


def test_a_region_comes_from_a_file_of_its_own(tmp_path: Path) -> None:
    job, file = points_job(tmp_path), tmp_path / "west.yaml"
    file.write_text("name: west\ndata: {train: rows}\n")
    wider = load_region(str(file), job)
    assert [region.name for region in wider.regions] == ["north", "south", "west"]
    assert wider.region("west").data.train == str(tmp_path / "rows"), "paths are relative to the file"
    file.write_text("name: south\ndata: {train: rows}\n")
    with pytest.raises(JobError, match="has a region 'south' already"):
        load_region(str(file), job)
    file.write_text("- west\n")
    with pytest.raises(JobError, match="what an entry of a job's `regions` does"):
        load_region(str(file), job)
    with pytest.raises(JobError, match="cannot read the region's file"):
        load_region(str(tmp_path / "nowhere.yaml"), job)
