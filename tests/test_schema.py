"""The published JSON Schemas are those of the code, and the shipped files keep to them."""

import json

import pytest

from testbed.config import json_schema, profile_schema
from testbed.experiments.file import experiment_schema
from testbed.package_data import data_folder

PUBLISHED = {
    ("inventory", "schema.json"): json_schema,
    ("inventory", "profile.schema.json"): profile_schema,
    ("experiments", "schema.json"): experiment_schema,
}


def text_of(folder, name):
    return json.dumps(PUBLISHED[folder, name](), indent=2) + "\n"


@pytest.mark.parametrize(("folder", "name"), PUBLISHED)
def test_published_schema_is_up_to_date(folder, name):
    published = (data_folder(folder) / name).read_text(encoding="utf-8")
    assert published == text_of(folder, name), "run `make schema`"


@pytest.mark.parametrize(
    ("folder", "pattern"), [("inventory", "*.yaml"), ("inventory", "profiles/*.yaml"), ("experiments", "*.yaml")]
)
def test_every_shipped_file_names_its_schema_for_editors(folder, pattern):
    for file in data_folder(folder).glob(pattern):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        assert (file.parent / first.rpartition("=")[2]).is_file()


if __name__ == "__main__":
    for published_folder, published_name in PUBLISHED:
        path = data_folder(published_folder) / published_name
        path.write_text(text_of(published_folder, published_name), encoding="utf-8")
