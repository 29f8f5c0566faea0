"""Flags, YAML and defaults become one frozen dataclass; every mistake is named, all at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from train import settings
from train.errors import UserError
from train.settings import Count, section, setting


@dataclass(frozen=True)
class Inner:
    width: int = setting(4, help="width in cells")
    kind: str = setting("round", help="its kind", choices=("round", "square"))


@dataclass(frozen=True)
class Outer:
    input: tuple[str, ...] = setting(help="files", separator=",")
    tokens: Count | None = setting(None, help="tokens")
    shuffle: bool = setting(True, help="shuffle")
    rate: float = setting(0.5, help="rate")
    folder: Path = setting(Path("out"), help="folder")
    inner: Inner = section(Inner)
    dry_run: bool = setting(False, help="only print", flag_only=True)

    def problems(self):
        if self.rate < 0:
            yield f"--rate {self.rate}: it must be 0 or more."


def parse(*words: str, recipe_dir: Path | None = None) -> Outer:
    return settings.parse(Outer, words, program="test", description="", recipe_dir=recipe_dir)


def test_flags_become_typed_values():
    given = parse("--input", "a,b", "c", "--tokens", "1.5M", "--shuffle", "False", "--width", "7", "--folder", "x y")
    assert given.input == ("a", "b", "c")
    assert (given.tokens, given.shuffle, given.inner.width, given.folder) == (1_500_000, False, 7, Path("x y"))


@pytest.mark.parametrize(("text", "number"), [("300B", 300 * 10**9), ("3e9", 3 * 10**9), ("1_000", 1000), ("12", 12)])
def test_counts_are_read_as_people_write_them(text, number):
    assert parse("--input", "a", "--tokens", text).tokens == number


def test_a_fraction_of_a_token_is_refused():
    with pytest.raises(UserError, match=r"--tokens '1.5'"):
        parse("--input", "a", "--tokens", "1.5")


@pytest.mark.parametrize("words", [["--shuffle"], ["--shuffle", "True"], ["--shuffle=yes"], ["--dry-run"]])
def test_booleans_take_a_value_or_none(words):
    assert parse("--input", "a", *words).shuffle is True


def test_dashes_and_underscores_are_the_same_flag():
    assert parse("--input", "a", "--dry-run").dry_run is True


def test_all_problems_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        parse("--tokens", "x", "--rate", "fast", "--width", "wide")
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for name in ("--input is required", "--tokens 'x'", "--rate 'fast'", "--width 'wide'"):
        assert name in text


def test_an_unknown_flag_names_the_nearest_and_hides_its_values():
    with pytest.raises(UserError) as caught:
        parse("--input", "a", "--widht", "3")
    assert caught.value.problems == ("--widht is not a setting; did you mean --width?",)


def test_a_stray_word_is_refused():
    with pytest.raises(UserError, match="'stray' is not expected here"):
        parse("stray", "--input", "a")


def test_a_wrong_choice_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"--kind 'sqare' is not one of round, square. did you mean square"):
        parse("--input", "a", "--kind", "sqare")


def test_the_class_has_its_own_say():
    with pytest.raises(UserError, match=r"--rate -1.0: it must be 0 or more"):
        parse("--input", "a", "--rate", "-1")


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    (tmp_path / "small.yaml").write_text("input: [r]\nrate: 0.1\ninner: {width: 9}\n")
    given = parse("--recipe", "small", "--rate", "0.2", recipe_dir=tmp_path)
    assert (given.input, given.rate, given.inner.width, given.shuffle) == (("r",), 0.2, 9, True)


def test_an_unknown_key_in_a_recipe_names_file_and_nearest(tmp_path):
    (tmp_path / "bad.yaml").write_text("input: [r]\ninner: {widht: 9}\nrat: 1\n")
    with pytest.raises(UserError) as caught:
        parse("--recipe", "bad", recipe_dir=tmp_path)
    assert "inner: widht is not a setting; did you mean width?" in caught.value.problems[0]
    assert "rat is not a setting; did you mean rate?" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n", "holds a list"), ("a: [", "is not YAML"), ("inner: 3\ninput: [a]", "inner is a section")],
)
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse("--recipe", "bad", recipe_dir=tmp_path)


def test_a_missing_recipe_lists_what_there_is(tmp_path):
    (tmp_path / "small.yaml").write_text("input: [r]\n")
    with pytest.raises(UserError, match=r"no recipe 'smal': did you mean small\? the shipped ones are small"):
        parse("--recipe", "smal", recipe_dir=tmp_path)


def test_dry_run_is_no_part_of_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("input: [r]\ndry_run: true\n")
    with pytest.raises(UserError, match="dry_run belongs to one call"):
        parse("--recipe", "r", recipe_dir=tmp_path)


def test_saved_settings_read_back_equal():
    given = parse("--input", "a", "--tokens", "3e9", "--rate", "1e-5", "--folder", "日本 語")
    import yaml

    assert settings.build(Outer, yaml.safe_load(settings.to_yaml(given))) == given


def test_help_shows_defaults_choices_and_what_is_required(capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    assert "width in cells [default: 4]" in shown
    assert "its kind (round, square) [default: round]" in shown
    assert "files [required]" in shown


def test_a_value_that_looks_like_a_flag_keeps_its_dashes() -> None:
    assert settings._underscored("--make-vocab-size-divisible-by=64 --x", {"dry_run"}) == (
        "--make-vocab-size-divisible-by=64 --x"
    )
    assert settings._underscored("--dry-run=a-b", {"dry_run"}) == "--dry_run=a-b"
