"""The tokenizer's part of step 3 on its own: converts a SentencePiece model and hands over what is proven equal.

    convert_and_check(ConvertTokenizerSettings(Path("botchan.model"), 2048, Path("hf")))

Whole checkpoints are converted by `train.checkpoint`, which calls the same two functions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train import manifest, outputs
from train import settings as settings_module
from train.settings import setting

STEP = "convert_tokenizer"
_CORPUS_DOCUMENTS = 20_000
_CORPUS_CHARACTERS = 20_000  # of each document


@dataclass(frozen=True)
class ConvertTokenizerSettings:
    """What is converted, and which texts must tokenize alike."""

    input_tokenizer_file: Path = setting(help="the SentencePiece .model file of step 1")
    input_model_max_length: int = setting(help="longest sequence of the language model, in tokens")
    output_tokenizer_dir: Path = setting(help="folder to write: a tokenizer for AutoTokenizer")
    parity_text_files: tuple[str, ...] = setting(
        (), separator=",", help="your own text to compare on besides the hard cases; as --input of step 1"
    )
    json_key: str = setting("text", help="key or column that holds a document's text")
    overwrite: bool = setting(False, flag_only=True, help="replace an existing output")
    dry_run: bool = setting(False, flag_only=True, help="print what would be done, and do nothing")

    def problems(self) -> Iterator[str]:
        if self.input_model_max_length < 1:
            yield f"--input_model_max_length {self.input_model_max_length}: give a number of tokens, such as 2048."


def convert_and_check(settings: ConvertTokenizerSettings) -> int:
    """Writes the folder once parity is proven; does nothing when it is there already.

    Returns:
        The exit code, 0.

    Raises:
        VerificationError: a text tokenizes or decodes differently.
        UserError: bad input, or an output that exists or cannot be written.
    """
    if settings.dry_run:
        print(f"would convert {settings.input_tokenizer_file} into {settings.output_tokenizer_dir}")
        print(f"  and compare both on hard cases and on {', '.join(settings.parity_text_files) or 'no other text'}")
        return 0

    from train.data.documents import expand_inputs
    from train.tokenizer.convert import convert_tokenizer, read_model
    from train.tokenizer.parity import check_parity, hard_cases

    started = time.time()
    model_file, output_dir = settings.input_tokenizer_file, settings.output_tokenizer_dir
    read_model(model_file)  # before the manifest looks at it
    texts = expand_inputs(settings.parity_text_files) if settings.parity_text_files else ()
    inputs = (model_file, *texts)
    shaping = {key: value for key, value in settings_module.to_plain(settings).items() if key != "output_tokenizer_dir"}
    if manifest.is_done(output_dir, step=STEP, settings=shaping, inputs=inputs):
        print(f"{output_dir} was converted from this model already: nothing to do.")
        return 0
    outputs.refuse_inputs(output_dir, inputs)
    with outputs.new_folder(output_dir, overwrite=settings.overwrite) as folder:
        convert_tokenizer(model_file, folder, model_max_length=settings.input_model_max_length)
        compared = itertools.chain(hard_cases(), corpus_texts(texts, json_key=settings.json_key))
        report = check_parity(model_file, folder, compared)
        manifest.write(
            folder / manifest.FILE_NAME,
            step=STEP,
            settings=shaping,
            inputs=inputs,
            results={"parity": report.as_dict()},
            started=started,
        )
    print(
        f"{output_dir}: {report.texts:,} texts compared ({report.characters:,} characters, {report.tokens:,} tokens),"
        f" {report.mismatched_ids} differ in ids, {report.mismatched_decodes} in decoded text"
    )
    return 0


def corpus_texts(files: Sequence[Path], *, json_key: str = "text") -> Iterator[str]:
    """Documents of the user's own to compare tokenizers on: the first 20,000, up to 20,000 characters of each."""
    from train.data.documents import read_documents

    documents = read_documents(files, json_key=json_key, on_error="skip")
    for document in itertools.islice(documents, _CORPUS_DOCUMENTS):
        yield document[:_CORPUS_CHARACTERS]
