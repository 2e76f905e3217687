"""The published JSON Schemas are those of the code, and the shipped files keep to them."""

import json

import pytest

from testbed.config import json_schema, profile_schema
from testbed.package_data import data_folder

PUBLISHED = {"schema.json": json_schema, "profile.schema.json": profile_schema}


def text_of(name):
    return json.dumps(PUBLISHED[name](), indent=2) + "\n"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schema_is_up_to_date(name):
    published = (data_folder("inventory") / name).read_text(encoding="utf-8")
    assert published == text_of(name), "run `make schema`"


@pytest.mark.parametrize("pattern", ["*.yaml", "profiles/*.yaml"])
def test_every_shipped_file_names_its_schema_for_editors(pattern):
    for file in data_folder("inventory").glob(pattern):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        assert (file.parent / first.rpartition("=")[2]).is_file()


if __name__ == "__main__":
    for published_name in PUBLISHED:
        (data_folder("inventory") / published_name).write_text(text_of(published_name), encoding="utf-8")
