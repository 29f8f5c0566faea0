"""The ssh configuration against a real sshd on this machine: host keys, no questions, and asking nodes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from train import process
from train.cluster import ask_nodes, ssh
from train.errors import UserError

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path(SSHD).exists() or shutil.which("unshare") is None,
    reason="a real sshd needs root, openssh-server and unshare",
)


def make_key(file):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)


@pytest.fixture
def start_sshd(tmp_path):
    """Starts an sshd with a new host key on a port, once the one before has ended; each is ended with the test."""
    make_key(tmp_path / "user_key")
    running: list[subprocess.Popen[bytes]] = []

    def start(port):
        stop()
        key = tmp_path / f"host_key_{time.monotonic_ns()}"
        make_key(key)
        config = tmp_path / "sshd_config"
        config.write_text(
            f"ListenAddress 127.0.0.1:{port}\nHostKey {key}\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"PermitRootLogin yes\nPasswordAuthentication no\nAuthorizedKeysFile {tmp_path}/user_key.pub\n"
        )
        # sshd wants /run/sshd: a /run of its own, so that nothing is made on the machine
        script = 'mount -t tmpfs none /run && mkdir /run/sshd && exec "$0" -D -e -f "$1"'
        argv = ["unshare", "--mount", "sh", "-c", script, SSHD, str(config)]
        with (tmp_path / "sshd.log").open("ab") as log:
            running.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if running[-1].poll() is not None:
                break
            time.sleep(0.1)
        pytest.fail(f"sshd did not start: {(tmp_path / 'sshd.log').read_text()}")

    def stop():
        while running:
            running[-1].terminate()
            running.pop().wait()

    yield start
    stop()


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def config(tmp_path, port):
    """A configuration for two names of this machine, with nothing of the user's but the tests' own key."""
    file = tmp_path / "ssh_config"
    names = {"node1": "127.0.0.1", "node2": "127.0.0.1"}
    file.write_text(
        ssh.build_config(list(names), port=port, host_names=names, identity_file=tmp_path / "user_key", user="root",
                         known_hosts=tmp_path / "known_hosts", included=())
    )  # fmt: skip
    return file


def test_a_new_host_key_is_noted_and_a_changed_one_is_refused(start_sshd, port, config, tmp_path):
    start_sshd(port)
    echo = ssh.build_command("node1", ["echo", "it's  here"], config=config)
    status, text = process.capture(echo)
    assert (status, text.splitlines()[-1]) == (0, "it's  here"), text
    assert f"[127.0.0.1]:{port} ssh-ed25519" in (tmp_path / "known_hosts").read_text()
    assert process.capture(echo) == (0, "it's  here\n"), "the key is known now"
    start_sshd(port)
    status, text = process.capture(echo)
    assert status == 255
    assert "Host key verification failed" in ssh.reason_of_failure(text)


def test_exit_codes_come_through(start_sshd, port, config):
    start_sshd(port)
    assert process.capture(ssh.build_command("node2", ["sh", "-c", "exit 7"], config=config))[0] == 7


def test_a_node_that_asks_for_a_password_or_is_away_is_told_at_once(start_sshd, port, config, tmp_path):
    with pytest.raises(UserError) as away:
        ask_nodes.gpus(["node1", "node2"], config=config, this_host=None)
    assert len(away.value.problems) == 2
    assert "node2: ssh does not reach it (ssh: connect to host 127.0.0.1 port" in away.value.problems[1]
    start_sshd(port)
    (tmp_path / "user_key").unlink()
    make_key(tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / "user_key")
    with pytest.raises(UserError, match=r"node1: ssh does not reach it \(.*Permission denied"):
        ask_nodes.gpus(["node1"], config=config, this_host=None)


def test_nodes_without_nvidia_smi_have_no_gpu(start_sshd, port, config):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has nvidia-smi")
    start_sshd(port)
    assert ask_nodes.gpus(["node1", "node2"], config=config, this_host=None) == {"node1": 0, "node2": 0}
