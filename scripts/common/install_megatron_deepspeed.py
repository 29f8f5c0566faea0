"""Installs Megatron-DeepSpeed below this project's .cache/, builds its dataset helpers and tests the import."""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.engine.megatron_deepspeed.install import InstallSettings, install


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        InstallSettings,
        install,
        argv,
        description=__doc__,
        example="scripts/common/install_megatron_deepspeed.sh --repository /shared/Megatron-DeepSpeed",
    )


if __name__ == "__main__":
    raise SystemExit(main())
