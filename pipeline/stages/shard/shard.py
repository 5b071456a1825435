"""The `shard` stage: a corpus → tokens → webdataset tar shards with a manifest.

Parameters and flow; the work is in corpus, tokenization and sharding.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polytrope.pipeline.data.description import (
    MANIFEST_FILE,
    Shard,
    TextDataset,
    TextSplit,
    TokenizerDescription,
    TokensSample,
    write_dataset,
    write_manifest,
)
from polytrope.pipeline.data.promised import PromisedText
from polytrope.pipeline.data.tokenization import (
    Tokenizer,
    make_tokenizer,
    tokenizer_fingerprint,
)
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources, StageContext, stage
from polytrope.pipeline.stages.shard.corpus import SymbolicSource, source_fingerprint
from polytrope.pipeline.stages.shard.parameters import ShardParameters

if TYPE_CHECKING:
    import numpy as np

    from polytrope.pipeline.stages.shard.corpus import Documents
    from polytrope.pipeline.stages.shard.token_shards import ShardResult


def fingerprint(parameters: ShardParameters, directory: Path) -> dict[str, str]:
    """Digests of the corpus and the tokenizer files."""
    return {
        **source_fingerprint(parameters.source, directory),
        **tokenizer_fingerprint(parameters.tokenizer, directory),
    }


def promise(
    parameters: ShardParameters, _upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> PromisedText:
    """The data set's sizes."""
    tokens = getattr(parameters.tokenizer, "vocab_size", None)
    return PromisedText(parameters.sequence_length, tokens, parameters.tokenizer.kind, _task(parameters))


def _task(parameters: ShardParameters) -> Literal["derivative", "integral"] | None:
    """What the lines of a symbolic source ask for."""
    return parameters.source.task if isinstance(parameters.source, SymbolicSource) else None


@stage(
    parallel=True,
    cpu_only=True,
    promise=promise,
    fingerprint=fingerprint,
)
def shard(context: StageContext, parameters: ShardParameters) -> dict[str, float]:
    """Tokenize a corpus into webdataset tar shards with a manifest, split by document into train and validation."""
    from polytrope.pipeline.stages.shard.corpus import read_documents, split_documents
    from polytrope.pipeline.stages.shard.parallel import prepare_workers

    started = time.perf_counter()
    drawn = isinstance(parameters.source, SymbolicSource)
    modules = ["polytrope.pipeline.stages.shard.symbolic"] if drawn else []
    prepare_workers(context, *modules, "polytrope.pipeline.stages.shard.token_shards", "pyarrow", "tokenizers")
    context.progress(0, 3, "reading documents")
    directory = Path.cwd()  # the workflow file's
    cache = context.scratch / "huggingface"
    if isinstance(parameters.source, SymbolicSource):
        from polytrope.pipeline.stages.shard.symbolic import draw_documents

        documents, repeated = draw_documents(context, parameters.source, cache)
        splits, left_out = split_documents(documents, parameters.validation_fraction, None)
        left_out |= repeated
    else:
        documents = read_documents(parameters.source, directory, cache)
        splits, left_out = split_documents(documents, parameters.validation_fraction, parameters.source.max_bytes)
    count = sum(len(rows) for rows, _ in splits.values())
    for name, (rows, _) in splits.items():
        if not len(rows):
            raise UserError(
                f"source{'.count' * drawn}: {count} {'lines' if drawn else 'documents with text'}, none for the {name} "
                "split",
                f"{'draw more lines' if drawn else 'give more documents'}, or change validation_fraction",
            )
    for what, number in left_out.items():
        context.message(f"left out: {number} {what}")
    context.progress(1, 3, f"tokenizer from {count} documents")
    tokenizer = make_tokenizer(parameters.tokenizer, documents.texts(splits["train"][0]), directory)
    asked = getattr(parameters.tokenizer, "vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size < asked:
        context.message(f"the corpus gives {tokenizer.vocab_size} tokens only, fewer than vocab_size {asked}")
    (context.output / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")

    results = _write_shards(context, documents, splits, tokenizer, parameters)
    description = _describe(parameters, tokenizer, results, left_out)
    write_dataset(context.output, description)
    seconds = time.perf_counter() - started
    train, validation = description.splits["train"], description.splits["validation"]
    context.log_dataset(
        parameters.name,
        description.digest,
        parameters.source.kind,
        {"train": dict(train), "validation": dict(validation)},
    )
    return {
        "documents": float(count),
        "train/tokens": float(train.tokens),
        "validation/tokens": float(validation.tokens),
        "unigram_entropy": description.unigram_entropy,
        "vocab_size": float(tokenizer.vocab_size),
        "tokens_per_second": (train.tokens + validation.tokens) / seconds,
    }


def _write_shards(
    context: StageContext,
    documents: Documents,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    tokenizer: Tokenizer,
    parameters: ShardParameters,
) -> dict[str, list[ShardResult]]:
    """Shards and manifest of every split. One map over all of them: no worker waits where a split ends."""
    from polytrope.pipeline.stages.shard.parallel import parallel_map
    from polytrope.pipeline.stages.shard.token_shards import ShardTask, group_rows, make_shard

    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    content = tokenizer.to_json()
    groups = {name: list(group_rows(rows, sizes, parameters.shard_bytes)) for name, (rows, sizes) in splits.items()}
    for name in splits:
        (context.output / name).mkdir()
    tasks = (
        ShardTask(
            context.output / name / f"shard-{number:06d}.tar",
            documents, rows, content, tokenizer.end_of_text, parameters.sequence_length, dtype,
        )
        for name, members in groups.items()
        for number, rows in enumerate(members)
    )  # fmt: skip
    made = parallel_map(context, make_shard, tasks)
    total, done = sum(map(len, groups.values())), 0
    results: dict[str, list[ShardResult]] = {}
    for name, members in groups.items():
        results[name] = []
        for result in itertools.islice(made, len(members)):
            results[name].append(result)
            done += 1
            context.progress(2 + done / total, 3, f"{name}: {len(results[name])} of {len(members)} shards")
        if not sum(result.samples for result in results[name]):
            drawn = isinstance(parameters.source, SymbolicSource)
            raise UserError(
                f"source{'.count' * drawn}: the {name} split has too little text for one sample of "
                f"{parameters.sequence_length} tokens",
                f"{'draw more lines' if drawn else 'give more text'}, a shorter sequence_length, or another "
                "validation_fraction",
            )
        write_manifest(
            context.output / name,
            TokensSample(tokens=parameters.sequence_length + 1, dtype=dtype),
            [Shard(path=r.path, bytes=r.bytes, sha256=r.sha256, samples=r.samples) for r in results[name]],
        )
    return results


def _describe(
    parameters: ShardParameters,
    tokenizer: Tokenizer,
    results: Mapping[str, list[ShardResult]],
    left_out: dict[str, int],
) -> TextDataset:
    """`dataset.json`. `digest`: sha256 over the shards' digests, the data's identity."""
    import hashlib

    import numpy as np

    counts = {name: sum(result.counts for result in members) for name, members in results.items()}
    train = np.asarray(counts["train"], dtype=np.float64) + 1.0  # add one: no token is impossible
    surprise = -np.log(train / train.sum())
    validation = np.asarray(counts["validation"], dtype=np.float64)
    digest = hashlib.sha256("".join(r.sha256 for members in results.values() for r in members).encode()).hexdigest()
    return TextDataset(
        name=parameters.name,
        tokenizer=TokenizerDescription(
            kind=parameters.tokenizer.kind, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text
        ),
        sequence_length=parameters.sequence_length,
        splits={
            name: TextSplit(
                manifest=f"{name}/{MANIFEST_FILE}",
                documents=sum(result.documents for result in members),
                bytes=sum(result.text_bytes for result in members),
                tokens=sum(result.tokens for result in members),
                samples=sum(result.samples for result in members),
            )
            for name, members in results.items()
        },
        unigram_entropy=float((validation * surprise).sum() / validation.sum()),
        digest=digest,
        left_out=left_out,
        task=_task(parameters),
    )
