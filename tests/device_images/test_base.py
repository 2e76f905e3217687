"""Whether a file is the publisher's, and what is in it."""

from __future__ import annotations

import hashlib
import io
import lzma

import pytest

from testbed.device_images.base import parse_checksums, unpack, verify
from testbed.device_images.catalogue import Base
from testbed.errors import UsageError

CONTENT = b"an operating system" * 100_000
SHA256, SHA512 = hashlib.sha256(CONTENT).hexdigest(), hashlib.sha512(CONTENT).hexdigest()
OTHER = "0" * 64


def base_of(sha256=None):
    return Base(url=None, page="https://example.org/os", checksums=None, sha256=sha256, size_bytes=None)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "os.img.xz"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def listed(tmp_path):
    """A file of checksums with that text; None for None."""

    def written(text):
        if text is None:
            return None
        path = tmp_path / "SHA256SUMS"
        path.write_text(text)
        return path

    return written


def quiet(text, done, total):
    pass


@pytest.mark.parametrize(
    ("checksums", "algorithm"),
    [
        (f"{SHA256}  os.img.xz\n", "SHA-256"),
        (f"{OTHER} *other.img.xz\n{SHA256.upper()} *os.img.xz\n", "SHA-256"),
        (f"{SHA256}\n", "SHA-256"),
        (f"# of today\n\n{SHA512}  ./images/os.img.xz\r\n", "SHA-512"),
        (f"{SHA256}  os.img.xz\n{SHA512}  os.img.xz\n", "SHA-512"),
    ],
)
def test_the_publishers_file_is_known_by_its_checksum(file, listed, checksums, algorithm):
    verified = verify(file, listed(checksums), base_of(OTHER), quiet)
    assert (verified.algorithm, verified.told_by) == (algorithm, "the file of checksums")


def test_without_a_file_of_checksums_the_catalogue_is_asked(file):
    assert verify(file, None, base_of(SHA256), quiet).told_by == "the catalogue"


@pytest.mark.parametrize(
    ("checksums", "sha256", "message"),
    [
        (f"{OTHER}  os.img.xz", None, f"its SHA-256 is {SHA256}, and the file of checksums says {OTHER}"),
        (None, OTHER, "the catalogue says"),
        (
            f"{SHA256}  os-lite.img.xz",
            SHA256,
            "SHA256SUMS is the file of checksums of os-lite.img.xz; get the publisher's",
        ),
        ("".join(f"{OTHER}  {name}\n" for name in "abcde"), None, "is the file of checksums of a, b, c and 2 more;"),
        (f"{SHA256}\n{OTHER}\n", None, "of 2 files that it does not name; get"),
        (
            "d41d8cd98f00b204e9800998ecf8427e  os.img.xz",
            None,
            "SHA256SUMS has digests by MD5 only, which can be forged",
        ),
        (f"{'0' * 40}  os.img.xz", None, "digests by SHA-1 only, which can be forged; get the publisher's file"),
        ("<html>Not found</html>", None, "by SHA-256 or SHA-512, lines of `digest  name`; "),
        (None, None, "it is at https://example.org/os"),
    ],
)
def test_any_other_file_is_refused_with_the_reason(file, listed, checksums, sha256, message):
    with pytest.raises(UsageError) as refusal:
        verify(file, listed(checksums), base_of(sha256), quiet)
    assert message in str(refusal.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        unpack_into_memory(tmp_path)
    with pytest.raises(UsageError, match="there is no file"):
        verify(tmp_path, None, base_of(), quiet)


def test_how_far_it_is_is_told(file, listed):
    told = []
    verify(file, listed(SHA256), base_of(), lambda *words: told.append(words))
    assert told[-1] == ("verifying", len(CONTENT), len(CONTENT))


def test_names_with_spaces_are_names():
    assert [each.name for each in parse_checksums(f"{OTHER}  an image.img.xz")] == ["an image.img.xz"]


def unpack_into_memory(path):
    output = io.BytesIO()
    unpack(path, output, quiet)
    return output.getvalue()


def test_a_packed_image_is_unpacked_and_a_plain_one_copied(file, tmp_path):
    packed = tmp_path / "packed.img.xz"
    packed.write_bytes(lzma.compress(CONTENT[:1000]) + lzma.compress(CONTENT[1000:]))  # xz may have several streams
    assert unpack_into_memory(packed) == CONTENT == unpack_into_memory(file)


def test_a_packed_image_that_is_cut_short_is_told(tmp_path):
    packed = tmp_path / "packed.img.xz"
    packed.write_bytes(lzma.compress(CONTENT)[:-20])
    with pytest.raises(UsageError, match="cut short"):
        unpack_into_memory(packed)
