"""A planted secret reaches the ranks of every node, and is in no file, log or process list of any host."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

import pytest
import runs  # type: ignore[import-not-found]
from hosts import Hosts, wait_until  # type: ignore[import-not-found]
from slurm import Slurm  # type: ignore[import-not-found]

_WORD = uuid.uuid4().hex  # made anew, so that it stands in no source or bytecode
PLANTED = f"hf_{_WORD}"
IN_FILE = f"wandb{_WORD}"
_LONG: dict[str, object] = {"train_tokens": "100M", "save_interval": 1_000_000, "lr_decay_tokens": "100M"}


@pytest.fixture
def secrets_file(tmp_path: Path) -> Path:
    """A user's file of secrets; another one than that of the environment."""
    file = tmp_path / "secrets"
    file.write_text(f"WANDB_API_KEY={IN_FILE}\n")
    file.chmod(0o600)
    return file


def look_everywhere(hosts: Hosts, tmp_path: Path, secrets_file: Path) -> list[str]:
    """Where a secret can be read: files of the run and of the clusters, the hosts' own disks, command lines."""
    found = []
    shared = subprocess.run(
        ["grep", "-rlaF", _WORD, str(tmp_path), str(hosts.folder)], capture_output=True, text=True, check=False
    )
    found += [line for line in shared.stdout.splitlines() if line != str(secrets_file)]
    for name in hosts.names:
        own = hosts.run(name, ["grep", "-rlaFs", _WORD, "/run", "/dev/shm", "/tmp", f"--exclude={secrets_file.name}"])
        found += [f"{name}: {line}" for line in own.stdout.splitlines()]
        found += [f"{name}: {item.argv}" for item in hosts.processes(name) if _WORD in " ".join(item.argv)]
    return found


def ranks_environments(hosts: Hosts) -> list[str]:
    """The environments of all ranks, which only root and their user can read."""
    pids = [pid for name in ("node1", "node2") for pid in runs.hosts_of_ranks(hosts, name)]
    return [Path(f"/proc/{pid}/environ").read_text(errors="replace") for pid in pids]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_over_ssh(hosts: Hosts, corpus: Path, tmp_path: Path, secrets_file: Path, launcher: str) -> None:
    command = runs.pretrain(
        corpus, tmp_path / "out", hostfile=runs.hostfile(tmp_path, "node1", "node2"), launcher=launcher,
        secrets_file=secrets_file, **_LONG,
    )  # fmt: skip
    running = hosts.popen("node1", command, env={**runs.ENVIRONMENT, "HF_TOKEN": PLANTED})
    runs.wait_for(lambda: len(runs.losses(tmp_path / "out")) > 2, running)
    environments = ranks_environments(hosts)
    assert len(environments) == 2 and all(PLANTED in text and IN_FILE in text for text in environments)
    assert look_everywhere(hosts, tmp_path, secrets_file) == []
    running.terminate()
    code, said = runs.finish(running)
    assert code == 130 and _WORD not in said
    assert look_everywhere(hosts, tmp_path, secrets_file) == []


def test_in_a_slurm_job(slurm: Slurm, hosts: Hosts, corpus: Path, tmp_path: Path, secrets_file: Path) -> None:
    words = {"submit": "slurm", "job_nodes": 2, "secrets_file": secrets_file}
    command = runs.pretrain(corpus, tmp_path / "out", **words, **_LONG)
    done = slurm.run(*command, env={**runs.ENVIRONMENT, "HF_TOKEN": PLANTED})
    assert _WORD not in done.stdout + done.stderr
    wait_until(lambda: len(runs.losses(tmp_path / "out")) > 2, "the job to train", 120)
    environments = ranks_environments(hosts)
    assert len(environments) == 2 and all(IN_FILE in text for text in environments)
    assert not any(PLANTED in text for text in environments), "it is the submitting shell's, and stays there"
    assert look_everywhere(hosts, tmp_path, secrets_file) == []
