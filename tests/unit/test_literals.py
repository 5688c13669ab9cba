import re

import pytest

from bacalhau_node import literals
from bacalhau_node.errors import SpecError
from bacalhau_node.spec import InputSource

V0 = "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG"
V1 = "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"
FILES = {
    "/here/data",
    "/here/a:b",
    "/here/a:/b",
    "/here/" + V1,
    "/home/ann/x",
    "/abs",
    "/here/with space",
    "/here/ipfs",
}
PLACE = literals.Place(exists=FILES.__contains__, cwd="/here", home="/home/ann", names=lambda _: ("data", "codes.csv"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("64MB", 64_000_000),
        ("64mb", 64_000_000),
        ("1.5GiB", 1_610_612_736),
        ("10 KB", 10_000),
        ("7B", 7),
        ("10TB", 10_000_000_000_000),
    ],
)
def test_sizes_are_decimal_or_binary_by_their_unit(text, value):
    assert literals.size(text) == value


@pytest.mark.parametrize("text", ["", "MB", "-1", "64m", "1e9", "1.5.5GB", "64iB", "0", "9999999PB", "1GB ", "٣"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SpecError, match="size"):
        literals.size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("1.5", 1.5), ("10m", 600), ("1h30m", 5400), ("500ms", 0.5), ("2d", 172_800), ("1m500ms", 60.5)],
)
def test_times_are_seconds(text, value):
    assert literals.seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "m", "-5", "0", "0s", "30m1h", "1y", "inf", "nan", "9" * 400, "400d"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(SpecError, match="time"):
        literals.seconds(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "at least 1"),
        ("-3", "at least 1"),
        ("9" * 5000, "at most"),
        ("1.0", "whole"),
        ("", "whole"),
        ("1_0", "whole"),
    ],
)
def test_counts_are_bounded(text, says):
    with pytest.raises(SpecError, match=says):
        literals.count(text)


@pytest.mark.parametrize("text", ["0", "nan", "-1", "99999", "two", ""])
def test_cores_are_bounded(text):
    with pytest.raises(SpecError, match="cores"):
        literals.cores(text)


def test_a_pair_is_cut_at_its_first_equals_sign():
    assert literals.pair("A=b=c") == ("A", "b=c")
    assert literals.pair("A=") == ("A", "")


@pytest.mark.parametrize("text", ["A", "=b", "1A=b", "a b=c"])
def test_what_is_no_pair_is_refused(text):
    with pytest.raises(SpecError, match="KEY=VALUE"):
        literals.pair(text)


@pytest.mark.parametrize(
    ("text", "source", "mount"),
    [
        ("data", "/here/data", None),
        ("./data/", "/here/data", None),
        ("data:/m", "/here/data", "/m"),
        ("data:/m/", "/here/data", "/m"),
        ("~/x", "/home/ann/x", None),
        ("~/x:/m/n", "/home/ann/x", "/m/n"),
        ("/abs", "/abs", None),
        ("a:b", "/here/a:b", None),
        ("a:/b", "/here/a:/b", None),
        ("a:/b:/c", "/here/a:/b", "/c"),
        ("with space:/m", "/here/with space", "/m"),
        ("src=data", "/here/data", None),
        ("src=data,dst=/m", "/here/data", "/m"),
        ("src=a:/b,dst=/m", "/here/a:/b", "/m"),
        (V0, f"ipfs://{V0}", None),
        (f"{V0}/sub/dir", f"ipfs://{V0}/sub/dir", None),
        (f"{V0}:/m", f"ipfs://{V0}", "/m"),
        (f"ipfs://{V1}/a", f"ipfs://{V1}/a", None),
        (f"ipfs://{V1}/a:/m", f"ipfs://{V1}/a", "/m"),
        (V1, f"/here/{V1}", None),  # an existing path wins over a CID
    ],
)
def test_inputs_are_paths_or_cids_with_an_optional_mount(text, source, mount):
    assert literals.source(text, PLACE) == InputSource(source=source, mount=mount)


@pytest.mark.parametrize(
    ("text", "source", "mount"),
    [
        ("https://h/x.csv?a=b:/c#sha256=00", "https://h/x.csv?a=b", "/c#sha256=00"),  # ambiguous: src= is for these
        ("src=https://h/x.csv?a=b:/c", "https://h/x.csv?a=b:/c", None),
        ("https://h/x:/m", "https://h/x", "/m"),
        ("http://h:8080/x", "http://h:8080/x", None),
        ("http://h:8080", "http://h:8080", None),
        ("http://h:8080:/m", "http://h:8080", "/m"),
        ("HTTPS://h/x", "https://h/x", None),
        ("s3://bucket", "s3://bucket", None),
        ("s3://bucket/a b/", "s3://bucket/a b/", None),
        ("s3://bucket/p:/m", "s3://bucket/p", "/m"),
        ("gs://bucket/p", "gs://bucket/p", None),
        ("src=az://box/p,dst=/m", "az://box/p", "/m"),
    ],
)
def test_inputs_from_elsewhere_keep_their_text(text, source, mount):
    assert literals.source(text, PLACE) == InputSource(source=source, mount=mount)


@pytest.mark.parametrize(
    ("text", "mount"),
    [("src=data,unpack", None), ("src=data,dst=/m,unpack", "/m"), ("src=https://h/a.zip,unpack", None)],
)
def test_an_archive_is_unpacked_where_it_is_asked_for(text, mount):
    found = literals.source(text, PLACE)
    assert (found.unpack, found.mount) == (True, mount)
    assert found.source.endswith(("/data", "a.zip"))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("store", "store"),
        ("ipfs", "ipfs"),
        ("filecoin", "filecoin"),
        ("s3://b/p", "s3://b/p"),
        ("gs://b", "gs://b"),
        ("local:out", "local:/here/out"),
        ("local:~/out", "local:/home/ann/out"),
        ("local:/abs", "local:/abs"),
    ],
)
def test_results_go_where_it_is_written(text, target):
    assert literals.publish(text, PLACE) == target


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s3://", "results don't go there"),
        ("https://h/x", "what there is: store, ipfs, filecoin, local:DIR, s3://…"),
        ("filcoin", "did you mean filecoin?"),
        ("local:", "needs a folder"),
    ],
)
def test_results_go_nowhere_else(text, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        literals.publish(text, PLACE)


@pytest.mark.parametrize("text", ["1 bytes", "300 MB", "1.5 GB", "10 TB", "999 kB", "1 PB", "37 bytes"])
def test_a_size_is_told_as_it_was_typed(text):
    assert literals.size_text(literals.size(text.replace(" bytes", ""))) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nope", "no such file or folder: /here/nope"),
        ("dta", "no such file or folder: /here/dta; did you mean data?"),
        ("/gone", "no such file or folder"),
        ("nope:/m", "no such file or folder: /here/nope:/m"),
        ("", "not a path"),
        ("a\0b", "not a path"),
        ("ipfs://hello", "no CID"),
        ("ipfs://", "no CID"),
        ("s3://", "no bucket after s3://"),
        ("https:///x", "no server after https://"),
        ("https://h/\nx", "no server after https://"),
        ("ftp://h/x", "ftp:// is no place for inputs; give a path, or ipfs://, http://"),
        ("htps://h/x", "did you mean https?"),
        (
            "file:///x",
            "file:// is no place for inputs; give a path, or ipfs://, http://, https://, s3://, gs://, az://",
        ),
        ("data:/", "can't be a mount"),
        ("data:/a/../b", "can't be a mount"),
        ("data:/outputs/x", "can't be a mount"),
        ("src=data,dst=m", "can't be a mount"),
        ("src=,dst=/m", "not a path"),
    ],
)
def test_what_is_no_input_is_refused(text, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        literals.source(text, PLACE)
