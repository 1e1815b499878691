"""TensorBoard events beside metrics.jsonl, when the extra `tensorboard` is installed."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping

from etils import epath

from convattn_jax.data import bucket


@contextlib.contextmanager
def recorder(folder: epath.Path, first_step: int, wanted: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A function that writes one row of metrics, if wanted; none in a bucket, where files can't grow.

    Rows from `first_step` on replace an interrupted run's.
    """
    if not wanted or bucket.in_a_bucket(folder) or importlib.util.find_spec("tensorboardX") is None:
        yield lambda row: None
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder), purge_step=first_step, write_to_disk=True) as writer:

        def write(row: Mapping[str, float | int]) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, int(row["step"]))

        yield write
