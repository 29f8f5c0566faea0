"""Hostfiles: DeepSpeed's format, every bad line told with its number."""

from __future__ import annotations

import pytest

from train.cluster import hostfile
from train.errors import UserError


def test_hosts_and_slots_in_the_files_order():
    text = "# made by hand\n\nnode2 slots=8\n node1\tslots=8  # the old one\r\n10.0.0.3 slots=8\n"
    assert hostfile.parse(text) == {"node2": 8, "node1": 8, "10.0.0.3": 8}
    assert hostfile.parse("node1\nnode2\n") == {"node1": None, "node2": None}


def test_what_is_built_is_read_again():
    assert hostfile.build(["node1", "node2"], 8) == "node1 slots=8\nnode2 slots=8\n"
    assert hostfile.parse(hostfile.build(["node1", "node2"], 8)) == {"node1": 8, "node2": 8}


def test_deepspeed_reads_what_is_built(tmp_path):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    file = tmp_path / "hostfile"
    file.write_text(hostfile.build(["node1", "node2"], 8))
    assert dict(runner.fetch_hostfile(str(file))) == {"node1": 8, "node2": 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# only a comment\n", "names no host"),
        ("node1 slots=0\n", "line 1: 'node1 slots=0'"),
        ("node1 slots=-1\n", "line 1: 'node1 slots=-1'"),
        ("node1 slots=eight\n", "line 1: 'node1 slots=eight'"),
        ("node1 slots = 8\n", "line 1: 'node1 slots = 8'"),
        ("node1 slots=8 max_slots=8\n", "line 1"),
        ("node1:8\n", "line 1: 'node1:8'"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
        ("user@node1 slots=1\n", "line 1"),
        ("node1 slots=8\n\nNODE1 slots=8\n", "line 3: NODE1 stands in line 1 already"),
        ("node1 slots=8\nnode2\n", "no slots for node2"),
    ],
)
def test_bad_lines_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        hostfile.parse(text)


def test_all_bad_lines_are_told_at_once():
    with pytest.raises(UserError) as caught:
        hostfile.parse("node1 slots=x\nnode2 slots=8\nnode2 slots=8\n")
    assert len(caught.value.problems) == 2


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no such file; create_hostfile\.sh"):
        hostfile.read(tmp_path / "no")
    with pytest.raises(UserError, match="is a folder"):
        hostfile.read(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not text"):
        hostfile.read(tmp_path / "binary")


def test_unequal_slots_are_refused_with_the_list(tmp_path):
    (tmp_path / "hostfile").write_text("node1 slots=8\nnode2 slots=4\n")
    with pytest.raises(UserError, match=r"slots differ from node to node \(node1: 8, node2: 4\)"):
        hostfile.read(tmp_path / "hostfile")
