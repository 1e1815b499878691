"""Text in TensorFlow Datasets, read without TensorFlow from array_record files; TFDS is imported on use only."""

import difflib
import hashlib
import logging
from collections.abc import Iterator
from typing import Any

from etils import epath

from convattn_jax.config import UserError, check
from convattn_jax.data.corpus import Corpus, Document, Report, Split, digest_of, select, to_documents

_VERSION = 1  # of the way examples become documents; part of the fingerprint
_BATCH = 512  # examples read at a time: one by one is twenty times slower
_PROBES = 64  # examples that the fingerprint looks into


def open_data_set(
    name: str, split: str, feature: str, data_dir: str, heldout_fraction: float, report: Report
) -> Corpus:
    """The corpus of one text feature of a TFDS data set, each example a document; prepared first where it is not.

    The fingerprint is taken from what TFDS records of the data set, from the sizes of its files and a few examples.

    Raises:
      UserError: an unknown data set, split or feature; one that cannot be prepared or read without TensorFlow.
    """
    report(f"opening {name}", 0, 0)
    builder = _prepared(name, data_dir)
    source = _source(builder, split)
    decoder = _decoder(builder, feature)

    def documents() -> Iterator[Document]:
        for start in range(0, len(source), _BATCH):
            for record in source.__getitems__(range(start, min(start + _BATCH, len(source)))):
                yield from to_documents(_text(decoder, record, feature))

    def read(part: Split) -> Iterator[Document]:
        return select(documents(), part, heldout_fraction)

    files = [
        (epath.Path(part.filename), part.skip, part.take, part.examples_in_shard)
        for part in builder.info.splits[split].file_instructions
    ]
    sizes = [path.stat().length for path, *_ in files]
    probes = sorted({i * len(source) // _PROBES for i in range(_PROBES)}) if len(source) else []
    fingerprint = digest_of(
        *("tfds", _VERSION, builder.info.full_name, feature, heldout_fraction),
        [[path.name, size, *rest] for (path, *rest), size in zip(files, sizes, strict=True)],
        [hashlib.blake2b(record, digest_size=16).hexdigest() for record in source.__getitems__(probes)],
    )
    size = sum(size * take // max(1, all_) for size, (_, _, take, all_) in zip(sizes, files, strict=True))
    return Corpus(fingerprint, size, read)


def _prepared(name: str, data_dir: str) -> Any:
    """The builder of a data set that lies on disk as array_record."""
    try:
        import tensorflow_datasets as tfds
        import tensorflow_datasets.text  # registers wikipedia, lm1b and their like
    except ImportError as error:
        raise UserError(
            f"data.source=tfds needs tensorflow-datasets: pip install tensorflow-datasets ({error})"
        ) from error
    where: dict[str, Any] = {"data_dir": str(epath.Path(data_dir).expanduser())} if data_dir else {}
    absl_log = logging.getLogger("absl")
    level = absl_log.level
    absl_log.setLevel(logging.ERROR)  # it warns that what is not prepared yet is not there
    try:
        builder = tfds.builder(name, **where)
        if not builder.is_prepared():
            builder = tfds.builder(name, file_format="array_record", **where)
    except tfds.core.DatasetNotFoundError as error:
        base = name.split("/")[0].split(":")[0]
        close = difflib.get_close_matches(base, tfds.list_builders(with_community_datasets=False), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        at = data_dir or "TFDS's own folder (data.tfds_data_dir)"
        raise UserError(f"data.tfds_name={name}: no such data set in TFDS or in {at}{hint}") from error
    except Exception as error:
        raise UserError(f"data.tfds_name={name}: {_line(error)}") from error
    finally:
        absl_log.setLevel(level)
    if not builder.is_prepared():
        _prepare(builder, name)
    file_format = builder.info.file_format
    kept_as = file_format.value if file_format else "nothing"
    check(
        kept_as == "array_record",
        f"data.tfds_name={name}: {builder.data_dir} holds {kept_as}, which cannot be read here without loss: "
        "prepare it as array_record (tfds build --file_format=array_record) in another data.tfds_data_dir",
    )
    return builder


def _prepare(builder: Any, name: str) -> None:
    try:
        builder.download_and_prepare()
    except Exception as error:  # downloads, generators and their missing libraries raise anything
        raise UserError(
            f"data.tfds_name={name} is not in {builder.data_dir} and cannot be prepared here ({_line(error)}): prepare "
            "it where that works (tfds build --file_format=array_record), then set data.tfds_data_dir"
        ) from error


def _source(builder: Any, split: str) -> Any:
    """The serialised examples of a split, a sequence."""
    import tensorflow_datasets as tfds

    try:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return builder.as_data_source(split, deserialize_method=raw)
    except ImportError as error:
        raise UserError(f"data.source=tfds needs array_record: pip install array_record ({error})") from error
    except (ValueError, KeyError) as error:
        raise UserError(
            f"data.tfds_split={split}: not in {builder.info.full_name}, which has {', '.join(builder.info.splits)}"
        ) from error


def _decoder(builder: Any, feature: str) -> Any:
    """What deserialises one feature and leaves the others alone."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    check(
        feature in texts,
        f"data.tfds_feature={feature}: no text feature of {builder.info.full_name}, which has {', '.join(texts)}",
    )
    return tfds.features.FeaturesDict({feature: features[feature]})


def _text(decoder: Any, record: bytes, feature: str) -> str:
    value = decoder.deserialize_example_np(record)[feature]
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise UserError(f"data.tfds_feature={feature}: an example is not UTF-8; choose another feature") from error


def _line(error: Exception) -> str:
    """The first line of an error, not too long."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
