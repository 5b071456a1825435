"""The shard stage: text to verified tar shards, whatever the source, the executor and the number of tasks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from polytrope.models import special_tokens
from polytrope.pipeline.data.misfits import misfit
from polytrope.pipeline.data.promised import PromisedModel, PromisedText
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.tokenization import read_tokenizer, tokenizer_from_json
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources, stage_context
from polytrope.pipeline.stages.evaluate.token_bytes import byte_lengths
from polytrope.pipeline.stages.shard.parameters import ShardParameters
from polytrope.pipeline.stages.shard.shard import fingerprint, promise, shard


def run_shard(directory: Path, parameters: Mapping[str, Any], workers: int = 1, executor: str = "local") -> Path:
    """Run the stage as the engine does; returns its output."""
    context = stage_context(directory, stage="shard", executor=executor, resources=Resources(workers=workers))
    validated = ShardParameters.model_validate(parameters)
    fingerprint(validated, Path.cwd())
    summary = shard(context, validated)
    assert summary["train/tokens"] > 0
    return context.output


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def sentences(count: int) -> list[str]:
    words = ["the", "cat", "of", "a", "house", "saw", "many", "small", "green", "trees", "and", "went", "over", "there"]
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, 40)) + f" {number}." for number in range(count)]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the same 300 documents as text files, jsonl and parquet; the working directory."""
    import pyarrow
    import pyarrow.parquet

    directory = tmp_path / "corpus"
    (directory / "texts").mkdir(parents=True)
    texts = sentences(300)
    for number, text in enumerate(texts):
        (directory / "texts" / f"{number:04d}.txt").write_text(text)
    (directory / "lines.jsonl").write_text("".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), directory / "table.parquet")
    monkeypatch.chdir(directory)
    return directory


FILES: dict[str, Any] = {"kind": "files", "paths": ["lines.jsonl"], "format": "jsonl", "text_field": "body"}
SMALL: dict[str, Any] = {"sequence_length": 16, "validation_fraction": 0.2, "shard_bytes": 8000}


def test_this_machines_python_becomes_a_dataset_by_default(tmp_path: Path) -> None:
    output = run_shard(tmp_path, {"source": {"kind": "python", "source": False, "max_bytes": 200_000}}, workers=2)
    description = json.loads((output / "dataset.json").read_text())
    assert description["kind"] == "text"
    assert description["tokenizer"] == {"kind": "bpe", "vocab_size": 2048, "end_of_text": 0}
    train = description["splits"]["train"]
    reader = open_split(output, "train")
    reader.verify()
    assert len(reader) == train["samples"] == train["tokens"] // description["sequence_length"]
    tokenizer = tokenizer_from_json((output / "tokenizer.json").read_text())
    text = tokenizer.decode(reader.samples(np.arange(3)).reshape(-1))
    assert " the " in text
    # a learnt vocabulary packs more than two bytes into a token, and text is far from uniform
    assert train["bytes"] / train["tokens"] > 2
    assert 0 < description["unigram_entropy"] < np.log(2048)


@pytest.mark.usefixtures("corpus")
@pytest.mark.parametrize(
    "tokenizer", [{"kind": "bytes"}, {"kind": "bpe", "vocab_size": 300}], ids=lambda tokenizer: str(tokenizer["kind"])
)
def test_every_token_but_the_first_of_a_shard_is_a_target_once_and_bytes_are_counted(
    tmp_path: Path, tokenizer: dict[str, Any]
) -> None:
    output = run_shard(tmp_path / "run", {"source": FILES, "tokenizer": tokenizer, **SMALL, "shard_bytes": 10**9})
    description = json.loads((output / "dataset.json").read_text())
    blocks = open_split(output, "train").samples(np.arange(description["splits"]["train"]["samples"]))
    assert (blocks[1:, 0] == blocks[:-1, -1]).all()  # blocks overlap by one token
    stream = [*blocks[0], *blocks[1:, 1:].reshape(-1)]
    loaded = tokenizer_from_json((output / "tokenizer.json").read_text())
    end = loaded.end_of_text
    assert stream.count(end) in (
        description["splits"]["train"]["documents"],
        description["splits"]["train"]["documents"] - 1,
    )
    text = loaded.decode([int(token) for token in stream if token != end])
    assert abs(description["splits"]["train"]["bytes"] - len(text.encode())) <= 20  # the cut document: by its share
    documents = [loaded.decode(part) for part in _split_at(stream, end)]
    assert set(documents[:-1]) <= set(sentences(300))


def _split_at(stream: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in stream:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(int(token))
    return parts


@pytest.mark.usefixtures("corpus")
def test_text_jsonl_and_parquet_give_the_same_bytes(tmp_path: Path) -> None:
    sources = {
        "text": {"kind": "files", "paths": ["texts/*.txt"], "format": "text"},
        "jsonl": FILES,
        "parquet": {"kind": "files", "paths": ["table.parquet"], "format": "parquet", "text_field": "body"},
    }
    outputs = {
        name: digests(run_shard(tmp_path / name, {"source": source, "tokenizer": {"kind": "bytes"}, **SMALL}))
        for name, source in sources.items()
    }
    assert outputs["text"] == outputs["jsonl"] == outputs["parquet"]


@pytest.mark.usefixtures("corpus")
def test_output_does_not_depend_on_the_number_of_tasks_or_the_executor(tmp_path: Path) -> None:
    import ray

    parameters = {"source": FILES, "tokenizer": {"kind": "bpe", "vocab_size": 300}, **SMALL}
    one = digests(run_shard(tmp_path / "one", parameters, workers=1))
    assert sum(name.endswith(".tar") for name in one) > 3
    assert digests(run_shard(tmp_path / "three", parameters, workers=3)) == one
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert digests(run_shard(tmp_path / "ray", parameters, workers=2, executor="ray")) == one
    finally:
        ray.shutdown()


def test_the_same_text_is_never_in_both_splits(corpus: Path, tmp_path: Path) -> None:
    texts = sentences(40)
    (corpus / "doubles.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts * 3))
    source = {**FILES, "paths": ["doubles.jsonl"]}
    output = run_shard(tmp_path / "run", {"source": source, "tokenizer": {"kind": "bytes"}, **SMALL})
    splits = json.loads((output / "dataset.json").read_text())["splits"]
    assert splits["train"]["documents"] % 3 == splits["validation"]["documents"] % 3 == 0
    assert 0 < splits["validation"]["documents"] < splits["train"]["documents"]


@pytest.mark.usefixtures("corpus")
def test_unigram_entropy_is_that_of_validation_tokens_under_train_counts(tmp_path: Path) -> None:
    output = run_shard(tmp_path / "run", {"source": FILES, "tokenizer": {"kind": "bytes"}, **SMALL})
    targets = {
        name: open_split(output, name).samples(np.arange(len(open_split(output, name))))[:, 1:].reshape(-1)
        for name in ("train", "validation")
    }
    counts = np.bincount(targets["train"], minlength=257) + 1
    expected = -np.log(counts / counts.sum())[targets["validation"]].mean()
    stored = json.loads((output / "dataset.json").read_text())["unigram_entropy"]
    assert stored == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("corpus")
def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    output = run_shard(tmp_path / "run", {"source": FILES, "tokenizer": {"kind": "bytes"}, **SMALL})
    manifest = json.loads((output / "train" / "manifest.json").read_text())
    paths = [str(output / "train" / entry["path"]) for entry in manifest["shards"]]
    assert len(paths) > 2
    read = [
        np.frombuffer(sample["tokens"], dtype=manifest["sample"]["dtype"])
        for sample in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
    ]
    reader = open_split(output, "train")
    assert np.array_equal(np.stack(read), reader.samples(np.arange(len(reader))))


def test_a_changed_file_changes_the_fingerprint(corpus: Path) -> None:
    parameters = ShardParameters.model_validate({"source": FILES})
    before = fingerprint(parameters, corpus)
    assert before == fingerprint(parameters, corpus)
    with (corpus / "lines.jsonl").open("a") as file:
        file.write('{"body": "one more"}\n')
    assert fingerprint(parameters, corpus) != before


def test_bad_input_is_refused_by_name_before_anything_starts(corpus: Path) -> None:
    (corpus / "empty.txt").write_text("")
    (corpus / "broken.jsonl").write_text("\n{not json}\n")
    for source, message in {
        ("text", "absent-*.txt"): "no file matches `absent-",
        ("text", "empty.txt"): "empty.txt is empty",
        ("jsonl", "broken.jsonl"): "broken.jsonl:2: not JSON",
        ("jsonl", "lines.jsonl"): "lines.jsonl:1: no text in field `text`",
    }.items():
        parameters = ShardParameters.model_validate(
            {"source": {"kind": "files", "format": source[0], "paths": [source[1]]}}
        )
        with pytest.raises(UserError, match=message) as refused:
            fingerprint(parameters, corpus)
        assert refused.value.hint
    missing = ShardParameters.model_validate({"tokenizer": {"kind": "gpt2", "vocab": "no.json", "merges": "no.bpe"}})
    with pytest.raises(UserError, match="tokenizer: no such file"):
        fingerprint(missing, corpus)


def test_the_hub_is_refused_at_once_when_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parameters = ShardParameters.model_validate({"source": {"kind": "hub", "dataset": "openwebtext"}})
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE.*openwebtext") as refused:
        fingerprint(parameters, tmp_path)
    assert "kind: files" in refused.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "good"}\n{"body": 3}\n', r"bad.jsonl:2: no text in field `body`"),
        ('{"body": "good"}\n{"body": \n', r"bad.jsonl:2: not JSON"),
        ('{"body": "good"}\n{"other": "x"}\n', r"bad.jsonl:2: no text in field `body`.*"),
        ('{"body": "  "}\n', r"0 documents with text"),
        ('{"body": "a b c"}\n', r"none for the (train|validation) split"),
    ],
)
def test_a_bad_line_is_named(corpus: Path, tmp_path: Path, content: str, message: str) -> None:
    (corpus / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        run_shard(tmp_path / "run", {"source": {**FILES, "paths": ["bad.jsonl"]}, **SMALL})


@pytest.mark.usefixtures("corpus")
def test_too_little_text_for_one_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too little text for one sample of 100000 tokens"):
        run_shard(tmp_path / "run", {"source": FILES, "tokenizer": {"kind": "bytes"}, "sequence_length": 100_000})


@pytest.mark.parametrize(
    "parameters",
    [
        {"tokenizer": {"kind": "bpe", "vocab_size": 256}},
        {"tokenizer": {"kind": "bpe", "vocab_size": 10**7}},
        {"validation_fraction": 1.0},
        {"sequence_length": 1},
        {"source": {"kind": "files", "paths": []}},
        {"source": {"kind": "python", "unknown": 1}},
    ],
)
def test_impossible_parameters_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ShardParameters.model_validate(parameters)


def write_tokenizer(directory: Path, kind: str, config: dict[str, Any] | None = None) -> Any:
    """A directory as transformers writes it: WordPiece with `[CLS]` and `[SEP]` around each text, or byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
    backend.train_from_iterator(["a few words of a text", "and some words more"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


@pytest.mark.parametrize("kind", ["wordpiece", "bytes"])
def test_a_tokenizer_of_hugging_face_is_taken_from_its_directory(corpus: Path, tmp_path: Path, kind: str) -> None:
    theirs = write_tokenizer(corpus / "tokens", kind, {"eos_token": {"content": "</s>", "special": True}})
    theirs.no_truncation()
    theirs.no_padding()
    chosen = {"kind": "huggingface", "path": "tokens"}
    output = run_shard(tmp_path / "run", {"source": FILES, "tokenizer": chosen, **SMALL})
    written = json.loads((output / "dataset.json").read_text())["tokenizer"]
    assert written == {"kind": "huggingface", "vocab_size": theirs.get_vocab_size(), "end_of_text": 4}
    texts = [json.loads(line)["body"] for line in (corpus / "lines.jsonl").read_text().splitlines()]
    ours = read_tokenizer(output)
    for text in texts[:5]:  # whole, and without the tokens that the model expects around it
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    tokens = open_split(output, "train").samples(np.arange(len(open_split(output, "train"))))
    assert set(np.unique(tokens)) & {2, 3} == set()
    assert 4 in tokens
    assert special_tokens.token_fields(output)["eos_token_id"] == 4
    lengths = byte_lengths(ours)
    assert (lengths is None) == (kind == "wordpiece")
    if lengths is not None:
        assert lengths[ours.encode("a naïve text")].sum() == len("a naïve text".encode())

    parameters = ShardParameters.model_validate({"source": FILES, "tokenizer": chosen})
    promised = promise(parameters, {}, Resources(), Path())
    assert promised == PromisedText(128, None, "huggingface")  # how many tokens it has, its file says
    assert PromisedModel("gpt2", {}).trained_on(promised).settings == {"sequence_length": 128}
    assert misfit(PromisedModel("gpt2", {"vocab_size": 7}), promised) is None
    before = fingerprint(parameters, corpus)
    (corpus / "tokens" / "tokenizer_config.json").write_text('{"eos_token": "[SEP]"}')
    assert fingerprint(parameters, corpus) != before


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"path": "absent"}, "tokenizer.path: there is no .*absent/tokenizer.json", "save_pretrained"),
        ({}, "tokenizer.end_of_text: .*tokens names no `eos_token`", r"one of `\[PAD\]`, `\[UNK\]`"),
        ({"end_of_text": "<eos>"}, "tokenizer.end_of_text: .*tokenizer.json has no token `<eos>`", "</s>"),
        ({"path": "damaged"}, "tokenizer.path: .*damaged/tokenizer.json is no tokenizer", "copy it again"),
    ],
)
def test_a_directory_without_a_tokenizer_or_an_end_of_text_is_refused(
    corpus: Path, settings: dict[str, str], message: str, hint: str
) -> None:
    write_tokenizer(corpus / "tokens", "wordpiece")
    (corpus / "damaged").mkdir()
    (corpus / "damaged" / "tokenizer.json").write_text("{}")
    chosen = {"kind": "huggingface", "path": "tokens", **settings}
    with pytest.raises(UserError, match=message) as refused:
        fingerprint(ShardParameters.model_validate({"source": FILES, "tokenizer": chosen}), corpus)
    assert re.search(hint, refused.value.hint)
    fingerprint(
        ShardParameters.model_validate(
            {"source": FILES, "tokenizer": {"kind": "huggingface", "path": "tokens", "end_of_text": "[SEP]"}}
        ),
        corpus,
    )
