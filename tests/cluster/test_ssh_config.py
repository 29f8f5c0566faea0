"""The ssh configuration of a run: a golden file, and what the installed ssh makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from train.cluster import ssh
from train.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "ssh_config.txt"
needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh on this machine")


def build(*hosts, **options):
    return ssh.build_config(hosts or ("node1", "node2"), **{"known_hosts": Path("/shared/run/known_hosts"), **options})


def resolved(text, host, folder):
    """What ssh itself takes from a configuration: its settings, by name in lower case."""
    file = folder / "ssh_config_under_test"
    file.write_text(text)
    done = subprocess.run(["ssh", "-G", "-F", str(file), host], capture_output=True, text=True, check=True)
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def test_golden_file():
    text = build(
        port=2222,
        user="alice",
        identity_file=Path("/home/alice/.ssh/a key"),
        host_names={"node2": "10.0.0.2"},
        included=("~/.ssh/config", "/etc/ssh/ssh_config"),
    )
    if os.environ.get("ACCEPT_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), f"to accept the change: ACCEPT_GOLDEN=1 python -m pytest {__file__}"


@needs_ssh
def test_ssh_reads_what_was_meant(awkward_path):
    text = build(port=2222, user="alice", host_names={"node2": "10.0.0.2"}, known_hosts=awkward_path / "known hosts",
                 identity_file=awkward_path / "key", included=())  # fmt: skip
    found = resolved(text, "node2", awkward_path)
    assert (found["hostname"], found["port"], found["user"]) == ("10.0.0.2", "2222", "alice")
    assert found["stricthostkeychecking"] == "accept-new"
    first, _, second = found["userknownhostsfile"].rpartition(" ")
    assert (first, second.endswith("/.ssh/known_hosts")) == (str(awkward_path / "known hosts"), True)
    assert found["identityfile"] == str(awkward_path / "key")
    assert (found["batchmode"], found["connecttimeout"]) == ("yes", "10")
    assert (found["serveraliveinterval"], found["serveralivecountmax"]) == ("5", "3")
    assert (found["controlmaster"], found["clearallforwardings"]) == ("false", "yes")
    assert resolved(text, "node1", awkward_path)["hostname"] == "node1"


@needs_ssh
def test_what_the_user_has_set_for_a_node_goes_on_to_work(tmp_path):
    """ProxyJump, HostName and another port are the user's; asking no questions and host keys are ours."""
    users = tmp_path / "users_config"
    users.write_text(
        "Host node*\n  ProxyJump gate\n  HostName 10.0.0.9\n  Port 2200\n  User bob\n  BatchMode no\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  ControlMaster auto\n  ControlPath /tmp/%C\n"
    )
    users.chmod(0o600)
    found = resolved(build(included=(str(users), str(tmp_path / "missing"))), "node1", tmp_path)
    assert (found["proxyjump"], found["hostname"]) == ("gate", "10.0.0.9")
    assert (found["port"], found["user"]) == ("2200", "bob")
    assert (found["batchmode"], found["stricthostkeychecking"], found["controlmaster"]) == (
        "yes",
        "accept-new",
        "false",
    )
    assert "/dev/null" not in found["userknownhostsfile"] and "controlpath" not in found
    ours = resolved(build(port=2222, user="alice", included=(str(users),)), "node1", tmp_path)
    assert (ours["port"], ours["user"]) == ("2222", "alice")
    assert resolved(build(included=()), "node1", tmp_path)["port"] == "22"


@needs_ssh
def test_other_hosts_are_left_to_the_user(tmp_path):
    found = resolved(build(included=(), port=2222), "gate", tmp_path)
    assert (found["port"], found["batchmode"]) == ("22", "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": ("-oProxyCommand=reboot",)}, "cannot be a host name"),
        ({"hosts": ("*",)}, r"'\*' cannot be a host name"),
        ({"hosts": ("node1 node2",)}, "cannot be a host name"),
        ({"hosts": ()}, "no host"),
        ({"host_names": {"node1": "a\nb"}}, "cannot be a host name"),
        ({"user": "bob\n  ProxyCommand x"}, "cannot be a login name"),
        ({"user": ""}, "cannot be a login name"),
        ({"known_hosts": Path('/shared/a"b')}, "choose another one"),
        ({"known_hosts": Path("/shared/%h")}, "choose another one"),
        ({"identity_file": Path("/shared/a\nb")}, "choose another one"),
        ({"identity_file": Path("/shared/${HOME}")}, "choose another one"),
    ],
)
def test_what_ssh_would_read_as_something_else_is_refused(options, message):
    given = {"hosts": ("node1",), "known_hosts": Path("/shared/known_hosts"), **options}
    with pytest.raises(UserError, match=message):
        ssh.build_config(given.pop("hosts"), **given)


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as caught:
        build("*", "?", user="a b")
    assert len(caught.value.problems) == 3


def test_a_system_configuration_that_ssh_would_refuse_is_not_included(tmp_path, monkeypatch):
    file = tmp_path / "ssh_config"
    monkeypatch.setattr(ssh, "_SYSTEM_CONFIG", file)
    assert ssh.included_files() == ("~/.ssh/config",)
    file.write_text("")
    file.chmod(0o644)
    assert ssh.included_files() == ("~/.ssh/config", str(file))
    file.chmod(0o666)
    assert ssh.included_files() == ("~/.ssh/config",)


def test_the_far_shell_gets_the_words_quoted():
    command = ssh.build_command("node1", ["echo", "a b", "$HOME"], config=Path("/c o"))
    assert command.argv == ("ssh", "-T", "-F", "/c o", "node1", "echo 'a b' '$HOME'")


def test_the_reason_of_a_failure_is_its_last_line():
    text = "Warning: Permanently added 'node1'.\nssh: connect to host node1 port 22: Connection refused\n\n"
    assert ssh.reason_of_failure(text) == "ssh: connect to host node1 port 22: Connection refused"
    assert ssh.reason_of_failure("") == "ssh said nothing"
