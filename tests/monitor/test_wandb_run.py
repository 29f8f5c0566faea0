"""W&B: online with a login, offline without, never in the way."""

from __future__ import annotations

import pytest

from train.errors import UserError
from train.monitor import wandb_run
from train.recipe import LoggingSettings


@pytest.fixture(autouse=True)
def no_login(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_login_it_is_offline_and_says_why(tmp_path):
    mode, reason = wandb_run.choose_mode(tmp_path)
    assert mode == "offline" and "wandb login" in reason


def test_a_login_in_netrc_or_a_key_is_online(tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    assert wandb_run.choose_mode(tmp_path) == ("online", "logged in to api.wandb.ai")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_run.choose_mode(tmp_path)[0] == "offline", "the login is for another server"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    mode, reason = wandb_run.choose_mode(tmp_path)
    assert mode == "online" and "secret" not in reason


def test_the_users_own_mode_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_run.choose_mode(tmp_path)[0] == "disabled"
    monkeypatch.setenv("WANDB_MODE", "foo")
    with pytest.raises(UserError, match="WANDB_MODE=foo is not one of online, offline"):
        wandb_run.choose_mode(tmp_path)


def test_the_group_fits_and_keeps_host_and_time():
    group = wandb_run.group_name("pretrain", "m" * 300, "host1")
    assert len(group) <= 128 and "_host1_" in group and group.startswith("pretrain_mmm")


def test_only_the_first_rank_of_a_node_has_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    started = wandb_run.start(LoggingSettings(use_wandb=True), run_name="m", kind="pretrain", config={}, dir=tmp_path)
    assert started is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert wandb_run.start(LoggingSettings(), run_name="m", kind="pretrain", config={}, dir=tmp_path) is None


def test_a_service_that_is_gone_is_told_once_and_ends_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    class Gone:
        def log(self, numbers: dict[str, float], *, step: int) -> None:
            raise ConnectionResetError("Connection lost")

        def finish(self) -> None:
            raise AssertionError("nobody is there to finish")

    run = wandb_run.WatchedRun(Gone())
    run.log({"loss": 1.0}, step=1)
    run.log({"loss": 1.0}, step=2)
    run.finish()
    assert capsys.readouterr().out.count("no longer logged to (ConnectionResetError: Connection lost)") == 1
