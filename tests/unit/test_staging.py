"""Files reach a slot's folder the cheapest way that its reader can use, and leave it whole."""

import os
from pathlib import Path

import pytest

from bacalhau_node.errors import BugError, ContentError
from bacalhau_node.executors import staging
from bacalhau_node.executors.staging import NeedsRoot, Reader, clear, destroy, locate, mirror, stage, take_out, used
from bacalhau_node.ports import StagedFile

ANYBODY = Reader(uid=54321, gid=54321)
ODD_NAMES = ("a b.csv", "a:b.csv", "line\nbreak.csv", "quote'\".csv", "grüße.csv", os.fsdecode(b"\xff\xfe.csv"))


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    folder = tmp_path / "slot"
    folder.mkdir()
    return folder


def source(folder: Path, name: str = "a.csv", text: str = "x\n1\n", mode: int = 0o644) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return path


def file(path: Path, mount: str) -> StagedFile:
    return StagedFile(path, mount, Path(mount).name, path.stat().st_size)


def test_a_readable_file_is_linked_and_not_copied(tmp_path: Path, slot: Path) -> None:
    data = source(tmp_path)
    stage([file(data, "/inputs/deep/er/a.csv")], {"/inputs": slot}, ANYBODY)
    assert (slot / "deep/er/a.csv").samefile(data)
    assert (slot / "deep").stat().st_mode & 0o777 == 0o755


def test_folders_can_be_read_whatever_the_umask_is(tmp_path: Path, slot: Path) -> None:
    before = os.umask(0o077)
    try:
        stage([file(source(tmp_path), "/inputs/deep/a.csv")], {"/inputs": slot}, ANYBODY)
    finally:
        os.umask(before)
    assert (slot / "deep").stat().st_mode & 0o777 == 0o755


def test_a_file_that_its_reader_may_not_read_is_copied(tmp_path: Path, slot: Path) -> None:
    data = source(tmp_path, mode=0o600)
    stage([file(data, "/inputs/a.csv")], {"/inputs": slot}, ANYBODY)
    copy = slot / "a.csv"
    assert not copy.samefile(data)
    assert copy.read_text() == "x\n1\n"
    assert copy.stat().st_mode & 0o004


def test_owner_and_group_may_read_by_their_own_bits(tmp_path: Path) -> None:
    status = source(tmp_path, mode=0o640).stat()
    assert Reader(uid=status.st_uid, gid=54321).may_read(status)
    assert Reader(uid=54321, gid=status.st_gid).may_read(status)
    assert not ANYBODY.may_read(status)


def test_a_large_file_that_cannot_be_linked_needs_its_root(
    tmp_path: Path, slot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = source(tmp_path)
    monkeypatch.setattr(staging, "COPY_LIMIT", 1)
    monkeypatch.setattr(staging, "_link", lambda *_: False)
    with pytest.raises(NeedsRoot) as told:
        stage([file(data, "/inputs/a.csv")], {"/inputs": slot}, ANYBODY)
    assert told.value.file == data
    stage([file(data, "/inputs/a.csv")], {"/inputs": slot}, ANYBODY, roots={tmp_path: "/roots/0"})
    assert (slot / "a.csv").readlink() == Path("/roots/0/a.csv")


def test_a_large_file_that_nobody_may_read_names_the_remedy(
    tmp_path: Path, slot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "COPY_LIMIT", 1)
    with pytest.raises(ContentError, match=r"user 54321.*4 bytes.*chmod a\+r"):
        stage([file(source(tmp_path, mode=0o600), "/inputs/a.csv")], {"/inputs": slot}, ANYBODY)


def test_a_link_is_followed_to_its_file(tmp_path: Path, slot: Path) -> None:
    data = source(tmp_path)
    link = tmp_path / "link.csv"
    link.symlink_to(data)
    stage([file(link, "/inputs/link.csv")], {"/inputs": slot}, ANYBODY)
    assert not (slot / "link.csv").is_symlink()
    assert (slot / "link.csv").samefile(data)


def test_a_file_that_is_gone_is_told_with_its_path(tmp_path: Path, slot: Path) -> None:
    missing = StagedFile(tmp_path / "gone.csv", "/inputs/gone.csv", "gone.csv", 3)
    with pytest.raises(ContentError, match=r"gone\.csv can't be given to the shard: No such file"):
        stage([missing], {"/inputs": slot}, ANYBODY)


def test_an_empty_folder_is_made(tmp_path: Path, slot: Path) -> None:
    stage([StagedFile(tmp_path, "/inputs/empty/", "empty/", 0)], {"/inputs": slot}, ANYBODY)
    assert (slot / "empty").is_dir()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_arrives_as_it_is(tmp_path: Path, slot: Path, name: str) -> None:
    stage([file(source(tmp_path, name), f"/inputs/{name}")], {"/inputs": slot}, ANYBODY)
    assert [path.name for path in slot.iterdir()] == [name]


def test_the_longest_place_wins_and_nothing_leads_out(tmp_path: Path) -> None:
    places = {"/inputs": tmp_path / "a", "/inputs/1": tmp_path / "b"}
    assert locate("/inputs/1/x", places) == tmp_path / "b/x"
    assert locate("/inputs/10/x", places) == tmp_path / "a/10/x"
    with pytest.raises(BugError, match="leads out"):
        locate("/inputs/../x", places)
    with pytest.raises(BugError, match="/etc/x"):
        locate("/etc/x", places)


def test_a_tree_is_mirrored_by_links(tmp_path: Path, slot: Path) -> None:
    tree = tmp_path / "bundle"
    (tree / "modules/pkg").mkdir(parents=True)
    source(tree, "cell.py")
    source(tree / "modules/pkg", "__init__.py", mode=0o600)
    mirror(tree, slot / "bundle", ANYBODY)
    assert (slot / "bundle/cell.py").samefile(tree / "cell.py")
    assert (slot / "bundle/modules/pkg/__init__.py").read_text() == "x\n1\n"


def test_what_a_shard_left_is_moved_and_the_folder_stays(tmp_path: Path, slot: Path) -> None:
    (slot / "sub").mkdir()
    source(slot / "sub", "out.csv")
    inode = slot.stat().st_ino
    taken = take_out(slot, tmp_path / "taken")
    assert taken == tmp_path / "taken"
    assert (taken / "sub/out.csv").read_text() == "x\n1\n"
    assert slot.stat().st_ino == inode
    assert take_out(slot, tmp_path / "again") is None
    assert not (tmp_path / "again").exists()


def test_clearing_leaves_what_links_point_to(tmp_path: Path, slot: Path) -> None:
    outside = source(tmp_path)
    (slot / "link").symlink_to(outside)
    (slot / "folder").symlink_to(tmp_path)
    (slot / "sub/deep").mkdir(parents=True)
    clear(slot)
    assert not list(slot.iterdir())
    assert outside.exists()


def test_a_folder_goes_whatever_modes_it_holds(tmp_path: Path, slot: Path) -> None:
    (slot / "closed/deep").mkdir(parents=True)
    source(slot / "closed/deep")
    (slot / "closed/deep").chmod(0)
    (slot / "closed").chmod(0)
    destroy(slot)
    assert not slot.exists()


def test_used_counts_what_lies_on_the_disk(slot: Path) -> None:
    assert used(slot) == 0
    (slot / "sub").mkdir()
    (slot / "sub/data").write_bytes(b"x" * 100_000)
    assert 100_000 <= used(slot) < 120_000
    assert used(slot / "gone") == 0


def test_what_outlived_its_shard_can_not_change_what_is_taken_out(tmp_path: Path, slot: Path) -> None:
    """It holds a folder of its own open, and swaps what is in it for a link to a file of this machine."""
    (slot / "a/b/c").mkdir(parents=True)
    (slot / "a/b/c/x").write_text("mine")
    secret = tmp_path / "secret"
    secret.mkdir()
    held = os.open(slot / "a/b", os.O_RDONLY)
    taken = take_out(slot, tmp_path / "taken")
    assert taken is not None
    with pytest.raises(FileNotFoundError):  # the folder that it holds is gone
        os.symlink(secret, "c", dir_fd=held)
    os.close(held)
    assert (taken / "a/b/c/x").read_text() == "mine"


def test_a_folder_that_is_swapped_for_a_link_is_not_followed(
    tmp_path: Path, slot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("42")
    (slot / "a/b").mkdir(parents=True)
    (slot / "a/b/x").write_text("mine")
    real = os.mkdir

    def mkdir(path: str, *mode: int, dir_fd: int | None = None) -> None:
        """The swap happens between the look at a folder and the step into it."""
        real(path, *mode, dir_fd=dir_fd)
        if path == "b":
            (slot / "a/b").rename(slot / "elsewhere")
            (slot / "a/b").symlink_to(secret)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(OSError, match="b"):
        take_out(slot, tmp_path / "taken")
    assert (secret / "key").exists()
    assert not (tmp_path / "taken/a/b/key").exists()


def test_folders_without_end_are_an_error(tmp_path: Path, slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_LEVELS", 4)
    (slot / "1/2/3").mkdir(parents=True)
    assert take_out(slot, tmp_path / "taken") is not None
    (slot / "1/2/3/4").mkdir(parents=True)
    with pytest.raises(OSError, match="over 4 levels"):
        take_out(slot, tmp_path / "again")
