"""The files that make root welcome by ssh on the hosts of tests/system: keys, server and client configuration, /etc."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_SERVER = """\
{ports}
HostKey {folder}/{name}/host_key
AuthorizedKeysFile {home}/.ssh/authorized_keys
PidFile /run/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
MaxStartups 100
PrintMotd no
# The test session's folder lies under /tmp, which everybody may write to.
StrictModes no
Subsystem sftp internal-sftp
"""

_CLIENT = """\
Host {names}
    User root
    IdentityFile {home}/.ssh/id_ed25519
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 5
"""

# Names come from files alone: an unknown host is unknown at once, and no name server is asked.
_NSSWITCH = "passwd: files\ngroup: files\nshadow: files\nhosts: files\nservices: files\nprotocols: files\n"


def write(folder: Path, home: Path, ssh_config: Path, addresses: Mapping[str, str], ports: Sequence[int]) -> None:
    """Writes all of it under `folder`: keys, known_hosts, `ssh_config`, sshd_config per host and what goes over /etc.

    `home`/.ssh has a key that all hosts let in, and no known_hosts: that is what a user finds on a new cluster.
    """
    user = home / ".ssh"
    user.mkdir(parents=True, mode=0o700)
    key = _new_key(user / "id_ed25519", "root@login")
    (user / "authorized_keys").write_text(key)
    (folder / "known_hosts").write_text("")
    for name, address in addresses.items():
        (folder / name).mkdir()
        host_key = _new_key(folder / name / "host_key", name)
        plain, others = f"{name},{address}", [f"[{name}]:{port},[{address}]:{port}" for port in ports if port != 22]
        with (folder / "known_hosts").open("a") as known_hosts:
            known_hosts.write(f"{','.join([plain, *others])} {host_key}")
        text = _SERVER.format(ports="\n".join(f"Port {port}" for port in ports), folder=folder, name=name, home=home)
        server_config(folder, name).write_text(text)
    ssh_config.write_text(_CLIENT.format(names=" ".join(addresses), folder=folder, home=home))

    etc = folder / "etc"
    etc.mkdir()
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (etc / "hosts").write_text("\n".join(lines) + "\n")
    (etc / "nsswitch.conf").write_text(_NSSWITCH)
    # ssh and sshd take the home folder from here, whatever HOME says: the machine's own ~/.ssh stays out of it.
    users = Path("/etc/passwd").read_text().splitlines()
    users = [f"root:x:0:0:root:{home}:/bin/bash" if user.startswith("root:") else user for user in users]
    (etc / "passwd").write_text("\n".join(users) + "\n")


def server_config(folder: Path, name: str) -> Path:
    """The sshd_config of a host; its log has the same name with .log."""
    return folder / name / "sshd.conf"


def _new_key(file: Path, comment: str) -> str:
    """A new key without a passphrase; returns its public half as a line."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(file)], check=True)
    return file.with_name(f"{file.name}.pub").read_text()
