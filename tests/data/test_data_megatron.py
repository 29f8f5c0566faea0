"""Against the real thing: Megatron-DeepSpeed's own tool and dataset, when a checkout is there; stored hashes always."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_samples import hard_documents, json_lines, write_dataset

from train.data.blend import BlendPart, read_blend
from train.data.gpt_dataset import SUBSETS, GPTDataset, document_range
from train.data.indexed_dataset import IndexedDataset
from train.data.preprocess import PreprocessSettings, preprocess

# SHA-256 of what tools/preprocess_data.py of 6acc370a wrote for json_lines(hard_documents()) and tiny.model.
INPUT_SHA256 = "23ebdef5a5ffa47227f200a421c962d28b96e5c4f62888e2732367f3738331c7"
TOOL_SHA256 = {
    (False, "bin"): "32218a4700cc55af0f092fc2886f65c17ea5c8961418aacae71a7fedadd4a0b5",
    (False, "idx"): "abe7ba1d7e89b1fde27715983850e9d365ab8dbcf597a552a9ace2a03d7c1bec",
    (True, "bin"): "84c9a23a8bd85a314bc35d3001766b2e54752ef813a2bfbb5e5812356c8b9614",
    (True, "idx"): "abe7ba1d7e89b1fde27715983850e9d365ab8dbcf597a552a9ace2a03d7c1bec",
}


@pytest.fixture(scope="module")
def checkout(project_root: Path) -> Path:
    """A Megatron-DeepSpeed checkout whose tools can run."""
    named = os.environ.get("MEGATRON_DEEPSPEED_DIR")
    folders = [Path(named)] if named else list((project_root / ".cache" / "megatron-deepspeed").glob("*"))
    found = [folder for folder in folders if (folder / "tools" / "preprocess_data.py").is_file()]
    if not found:
        pytest.skip("no Megatron-DeepSpeed checkout: run scripts/common/install_megatron_deepspeed.sh")
    missing = [name for name in ("nltk", "torch", "deepspeed", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"Megatron-DeepSpeed's tool needs {', '.join(missing)}: install the extra 'megatron'")
    return max(found, key=lambda folder: folder.stat().st_mtime)


def encode(file: Path, prefix: Path, model: Path, *, append_eod: bool, workers: int) -> None:
    settings = PreprocessSettings(
        input=(str(file),), output_prefix=prefix, input_tokenizer_file=model, append_eod=append_eod, workers=workers
    )
    assert preprocess(settings) == 0


@pytest.mark.parametrize("append_eod", [False, True])
def test_same_bytes_as_the_tool_wrote_once(tmp_path: Path, tiny_model: Path, append_eod: bool) -> None:
    (tmp_path / "in.jsonl").write_bytes(json_lines(hard_documents()))
    assert hashlib.sha256((tmp_path / "in.jsonl").read_bytes()).hexdigest() == INPUT_SHA256
    encode(tmp_path / "in.jsonl", tmp_path / "ours", tiny_model, append_eod=append_eod, workers=2)
    for extension in ("bin", "idx"):
        content = (tmp_path / f"ours_text_document.{extension}").read_bytes()
        assert hashlib.sha256(content).hexdigest() == TOOL_SHA256[append_eod, extension]


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.parametrize("append_eod", [False, True])
def test_same_bytes_as_the_tool_writes_now(tmp_path: Path, tiny_model: Path, checkout: Path, append_eod: bool) -> None:
    (tmp_path / "in.jsonl").write_bytes(json_lines(hard_documents()))
    program = [sys.executable, str(checkout / "tools" / "preprocess_data.py"), "--workers", "2"]
    program += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tiny_model)]
    program += ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "theirs")]
    program += ["--append-eod"] if append_eod else []
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    encode(tmp_path / "in.jsonl", tmp_path / "ours", tiny_model, append_eod=append_eod, workers=3)
    for extension in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}_text_document.{extension}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


# Runs inside the checkout's own Python path: Megatron's own functions, put together as its GPTDataset does.
_MEGATRON_ORDER = """
import json, sys
import numpy as np
from megatron.data import dataset_utils, gpt_dataset

sizes = np.array(json.loads(sys.argv[1]), dtype=np.int32)
cases, answers = json.loads(sys.argv[2]), []
for number, length, count, seed in cases:
    splits = dataset_utils.get_train_valid_test_split_("949,50,1", len(sizes))
    documents = np.arange(splits[number], splits[number + 1], dtype=np.int32)
    tokens = gpt_dataset._num_tokens(documents, sizes)
    epochs = gpt_dataset._num_epochs(tokens, length, count)
    before = ((epochs - 1) * tokens - 1) // length
    apart = epochs > 1 and count - before < int(0.80 * ((tokens - 1) // length))
    random = np.random.RandomState(seed=seed)
    order = gpt_dataset._build_doc_idx(documents, epochs, random, apart)
    samples = gpt_dataset._build_sample_idx(sizes, order, length, epochs, tokens)
    total = len(samples) - 1
    shuffle = gpt_dataset._build_shuffle_idx(before if apart else total, total, random)
    firsts = samples[shuffle[:count]]
    answers.append([[int(order[place]), int(offset)] for place, offset in firsts])
print("ANSWER" + json.dumps(answers))
"""


@pytest.mark.slow
@pytest.mark.megatron
def test_same_samples_as_megatrons_dataset(tmp_path: Path, checkout: Path) -> None:
    random = np.random.default_rng(3)
    lengths = random.integers(1, 60, size=200).tolist()
    # Each token tells its document and place, so a sample's first token is what Megatron's sample index holds.
    documents = [[number * 64 + place for place in range(length)] for number, length in enumerate(lengths)]
    part = read_blend([str(write_dataset(tmp_path / "d", documents))])[0]
    cases = [
        (subset, length, count, seed)
        for subset in (0, 1)
        for length in (5, 32)
        for count in (1, 40, 300, 700)
        for seed in (1, 1234)
    ]
    program = [sys.executable, "-c", _MEGATRON_ORDER, json.dumps(lengths), json.dumps(cases)]
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(checkout)}
    )
    assert "ANSWER" in done.stdout, done.stderr
    answers = json.loads(done.stdout.partition("ANSWER")[2])
    for (subset, length, count, seed), expected in zip(cases, answers, strict=True):
        dataset = GPTDataset(
            [part], split="949,50,1", subset=SUBSETS[subset], sequence_length=length, sample_count=count, seed=seed
        )
        # Megatron names the place after a document's last token as that document's end; ours is the same token.
        found = [divmod(int(dataset[sample][0]), 64) for sample in range(count)]
        assert [list(place) for place in found] == expected


def test_the_tools_uncounted_ends_are_read_right(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(json_lines(["the river", "", "a stone", "light"]))
    encode(tmp_path / "in.jsonl", tmp_path / "d", tiny_model, append_eod=True, workers=1)
    dataset = IndexedDataset(tmp_path / "d_text_document")
    ends = [dataset.tokens(n)[-1] for n in range(dataset.sequence_count)]
    assert ends == [6, 6, 6]
    assert not dataset.counts_end_of_document
    part = BlendPart(dataset.prefix, 1.0, dataset.token_count, dataset.document_count)
    assert document_range("1,0,0", "train", 3) == (0, 3)
    everything = GPTDataset(
        [part], split="1,0,0", subset="train", sequence_length=dataset.token_count - 1, sample_count=1, seed=0
    )
    assert sorted(everything[0]) == sorted(np.concatenate([dataset.tokens(n) for n in range(3)]))


_READS = """
import json, sys
import numpy as np
from train.engine.megatron_deepspeed import patches
others = frozenset(patch.name for patch in patches.all_patches()) - {"uncounted-ends"}
patches.apply_all(patches.Run(), others | frozenset(sys.argv[2:]))
from megatron.data.indexed_dataset import MMapIndexedDataset
dataset = MMapIndexedDataset(sys.argv[1], skip_warmup=True)
print(json.dumps([np.asarray(dataset[number]).tolist() for number in range(len(dataset))]))
"""


@pytest.mark.slow
@pytest.mark.megatron
def test_the_engine_reads_whole_documents_from_an_index_without_ends(
    tmp_path: Path, tiny_model: Path, checkout: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(json_lines(hard_documents()[:50]))
    encode(tmp_path / "in.jsonl", tmp_path / "ours", tiny_model, append_eod=True, workers=1)
    prefix = tmp_path / "ours_text_document"
    expected = [
        IndexedDataset(prefix).tokens(number).tolist() for number in range(IndexedDataset(prefix).sequence_count)
    ]

    def read(*disabled: str) -> list[list[int]]:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", _READS, str(prefix), *disabled],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    assert read() == expected
    assert read("uncounted-ends") != expected
