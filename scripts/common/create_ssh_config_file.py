"""Writes an ssh configuration for the nodes of this job (Slurm, Grid Engine, PBS, or --hostfile), to use with ssh -F.

~/.ssh is read, never written; host keys that are new are accepted, changed ones refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.cluster.create_files import SshConfigSettings, create_ssh_config_file

EXAMPLE = "scripts/common/create_ssh_config_file.sh --output ssh_config --ssh_port 2222"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(SshConfigSettings, create_ssh_config_file, argv, description=__doc__, example=EXAMPLE)


if __name__ == "__main__":
    raise SystemExit(main())
