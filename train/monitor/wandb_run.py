"""Weights & Biases as the seeds show it: one group per launch, one run per node, named after the host.

Online when there is a login; offline, and said so, when there is none. The API key is W&B's own affair: it is read by
its client from the environment or ~/.netrc and passes through nothing of ours.
"""

from __future__ import annotations

import netrc
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.errors import UserError

_MODES = ("online", "offline", "disabled", "shared")


class WandbSettings(Protocol):
    """The settings of a recipe that concern W&B."""

    @property
    def wandb(self) -> bool: ...
    @property
    def wandb_entity(self) -> str | None: ...
    @property
    def wandb_project(self) -> str | None: ...
    @property
    def wandb_group(self) -> str | None: ...
    @property
    def wandb_tag(self) -> str | None: ...


class WatchedRun:
    """A W&B run that never ends a training: when its service is gone, that is told once, and training goes on.

    A scheduler's signal to all processes of a job ends W&B's service, while the ranks are to save and end in order.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, numbers: Mapping[str, Any], *, step: int) -> None:
        """Shows the numbers of a step."""
        self._attempt("log", dict(numbers), step=step)

    def finish(self) -> None:
        """Waits until all is handed over."""
        self._attempt("finish")

    def _attempt(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments, **options)
        except Exception as error:  # whatever it is, it is not worth a training
            self._run = None
            print(f"W&B: no longer logged to ({type(error).__name__}: {error}); training goes on", flush=True)


def start(
    logging: WandbSettings, *, run_name: str, kind: str, config: Mapping[str, Any], dir: Path
) -> WatchedRun | None:
    """Starts this node's run and returns it, or None: W&B is not wanted, or this is not the node's first rank.

    Args:
        logging: the recipe's W&B settings.
        run_name: the model's name, for the group name made when none is given.
        kind: `pretrain` or `finetune`, likewise.
        config: the resolved settings, shown beside the run.
        dir: the folder that receives `wandb/`.
    """
    if not logging.wandb or os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    import wandb

    mode, reason = choose_mode()
    print(f"W&B: {mode} ({reason})", flush=True)
    dir.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    run = wandb.init(
        entity=logging.wandb_entity,
        project=logging.wandb_project,
        group=logging.wandb_group or group_name(kind, run_name, host),
        name=host,
        tags=[logging.wandb_tag] if logging.wandb_tag else None,
        config=dict(config),
        dir=str(dir),
        mode=mode,  # type: ignore[arg-type]
    )
    return WatchedRun(run)


def group_name(kind: str, run_name: str, host: str) -> str:
    """The seeds' group name: kind, model, leading host and time, at most W&B's 128 characters."""
    stamp = time.strftime("%Y.%m.%d_%H.%M.%S")
    tail = f"_{host}_{stamp}"
    return f"{kind}_{run_name}"[: 128 - len(tail)] + tail


def choose_mode(home: Path | None = None) -> tuple[str, str]:
    """`online`, `offline` or what WANDB_MODE says, and why."""
    asked = os.environ.get("WANDB_MODE")
    if asked:
        if asked not in _MODES:
            raise UserError(f"WANDB_MODE={asked} is not one of {', '.join(_MODES)}: unset it or choose one.")
        return asked, "WANDB_MODE says so"
    if os.environ.get("WANDB_API_KEY"):
        return "online", "WANDB_API_KEY is set"
    file = (home or Path.home()) / ".netrc"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        if netrc.netrc(str(file)).authenticators(host) is not None:
            return "online", f"logged in to {host}"
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):  # none, or not ours to read
        pass
    return "offline", f"no login for {host}; 'wandb login', or 'wandb sync' the run later"
