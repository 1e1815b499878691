"""The mesh of devices, and from (parameter path, shape) to its PartitionSpec; the model names no axis."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from convattn_jax.config import check
from convattn_jax.model.attention import Attend
from convattn_jax.model.convolution import Convolve, Kernel
from convattn_jax.model.embedding import AddByIds
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.layers import AddNorm
from convattn_jax.model.operations import Operations

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # rows of a batch; every other array's placement follows from RULES
SEEDS = "seeds"  # the axis of models that are trained side by side

# First match decides. Heads and feed-forward columns go to `tensor`, the other large axis to `fsdp`.
RULES: tuple[tuple[str, P], ...] = (
    (r"(query|key|value)/kernel$", P("fsdp", "tensor", None)),
    (r"(query|key|value)/bias$", P("tensor", None)),
    (r"output/kernel$", P("tensor", None, "fsdp")),
    (r"fixed/taps$", P("tensor", None)),
    (r"mlp_in/kernel$", P("fsdp", "tensor")),
    (r"mlp_in/bias$", P("tensor")),
    (r"mlp_out/kernel$", P("tensor", "fsdp")),
    (r"embeddings/word$", P("tensor", "fsdp")),
    (r"(project|transform)/kernel$", P("fsdp", None)),
    (r"head/bias$", P("tensor")),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, -1 for the rest; `configs/base.py` documents each key."""

    data: int
    fsdp: int
    tensor: int
    dry_run: bool = False
    chips: str = ""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """As they are given, -1 for the rest."""
        return self.data, self.fsdp, self.tensor

    def __post_init__(self):
        sizes = self.sizes
        for axis, size in zip(AXES, sizes, strict=True):
            check(size == -1 or size >= 1, f"mesh.{axis}={size} must be at least 1, or -1 for the rest")
        check(sizes.count(-1) <= 1, "mesh: only one of data, fsdp, tensor can be -1 (the rest)")
        check(
            self.dry_run or not self.chips, f"mesh.chips={self.chips} is of a dry run: give --config.mesh.dry_run too"
        )

    def shape(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor), with the -1 filled in.

        Raises:
          UserError: the axes don't multiply to the number of devices.
        """
        sizes = list(self.sizes)
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
        text = " x ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        check(
            -1 not in sizes and math.prod(sizes) == devices,
            f"{text} does not multiply to the {devices} devices: let it, with one -1 for the rest",
        )
        return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all hosts, or these; compilers infer what no rule says (Auto axes)."""
    shape = config.shape(jax.device_count() if devices is None else len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """A mesh whose devices need not be there; all sizes are given."""
    return AbstractMesh(config.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@functools.cache
def seed_mesh(seeds: int, rows: int) -> Mesh:
    """All devices for `seeds` models trained side by side, on `rows` rows each at a time; seeds are an axis in front.

    Each device gets as many seeds, or parts of their batches; over what neither divides the same work is done again.
    The devices' order is always the same, so that what is cut along the seeds only goes with any number of rows.
    """
    devices = jax.device_count()
    apart = math.gcd(seeds, devices)
    data = math.gcd(rows, devices // apart)
    shape = (apart, data, 1, 1, devices // (apart * data))
    return Mesh(np.asarray(jax.devices()).reshape(shape), (SEEDS, *AXES, "idle"), (AxisType.Auto,) * len(shape))


def check_divides(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int, heads: int) -> None:
    """Raises a `UserError` naming both numbers when a batch or the heads don't divide over the mesh."""
    rows = row_parts(mesh)
    check(
        batch_size % (rows * accumulate) == 0,
        f"train.batch_size={batch_size} does not divide by mesh.data x mesh.fsdp x train.accumulate = "
        f"{rows} x {accumulate}: choose a multiple of {rows * accumulate}",
    )
    tensor = mesh.shape["tensor"]
    check(heads % tensor == 0, f"mesh.tensor={tensor} does not divide model.heads={heads}: choose a divisor")


def path_name(path: Any) -> str:
    """encoder/layer_0/attention/query/kernel, of a key path."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The placement of one parameter, or of an optimizer moment of it; what no rule names is on every device."""
    for pattern, rule in RULES:
        if re.search(pattern, name):
            axes = (None,) * (len(shape) - len(rule)) + tuple(rule)  # scanned layers have one axis more, in front
            return fitting(axes, shape, mesh)
    return P()


def fitting(axes: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """These mesh axes for the axes of an array, as far as they divide."""
    return P(*(axis if axis and n % mesh.shape[axis] == 0 else None for axis, n in zip(axes, shape, strict=True)))


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for each leaf of a tree of arrays or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh)), tree
    )


def row_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many ways the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH[0])


def shard_operations(operations: Operations, mesh: Mesh) -> Operations:
    """A model's operations, each device at work on its own rows and heads."""
    return operations._replace(
        attend=shard_attention(operations.attend, mesh),
        add_by_ids=shard_sums(operations.add_by_ids, mesh),
        convolve=shard_convolution(operations.convolve, mesh),
        add_norm=shard_add_norm(operations.add_norm, mesh),
        hold=hold_rows(mesh),
        gather=gather_table(mesh),
    )


def shard_add_norm(add_norm: AddNorm, mesh: Mesh) -> AddNorm:
    """The same function, each device at work on its own rows; the gradients of scale and bias are summed over them."""
    if mesh.size == 1:
        return add_norm
    axes, parts = BATCH[0], row_parts(mesh)

    def sharded(x, out, scale, bias, rate, seed):
        if x.shape[0] % parts:  # a single row, at initialisation
            return add_norm(x, out, scale, bias, rate, seed)

        def local(x, out, scale, bias, seed, rows):
            return add_norm(x, out, scale, bias, rate, seed, rows)

        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(P(axes), P(axes), P(), P(), P(), P(axes)), out_specs=P(axes), check_vma=False
        )
        return mapped(x, out, scale, bias, seed, jnp.arange(x.shape[0], dtype=jnp.uint32))

    return sharded


def hold_rows(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Keeps each row of the embeddings on the device that has it in the batch, and hidden states with it.

    Left to itself the compiler lets them follow the axes that parameters are cut along, and moves them instead.
    """
    parts, rows = row_parts(mesh), NamedSharding(mesh, BATCH)
    return lambda x: x if x.shape[0] % parts or mesh.size == 1 else jax.lax.with_sharding_constraint(x, rows)


def gather_table(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Brings whole rows of the token embedding together, over `fsdp` alone; the gradient is cut again.

    A look-up in rows that are cut would move its results, far more than the table.
    """

    def placed(x: jax.Array, *axes: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(axes, x.shape, mesh)))

    @jax.custom_vjp
    def gather(table: jax.Array) -> jax.Array:
        return placed(table, "tensor", None)

    gather.defvjp(lambda table: (gather(table), None), lambda _, gradient: (placed(gradient, "tensor", "fsdp"),))
    return gather if mesh.size > 1 else lambda table: table


def shard_sums(add_by_ids: AddByIds, mesh: Mesh) -> AddByIds:
    """The same function where each device adds up its own tokens, and then all of them their sums, cut as the table."""
    if mesh.size == 1:
        return add_by_ids
    axes, parts = BATCH[0], row_parts(mesh)

    def sharded(ids: jax.Array, x: jax.Array, rows: int, dtype: jnp.dtype) -> jax.Array:
        if ids.shape[0] % parts:
            return add_by_ids(ids, x, rows, dtype)

        tensor, fsdp = fitting(("tensor", "fsdp"), (rows, x.shape[1]), mesh)

        def local(ids, x):
            sums = add_by_ids(ids, x, rows, dtype)
            if tensor:  # which all have the same tokens: each keeps its rows of the table
                sums = sums.reshape(mesh.shape[tensor], -1, sums.shape[1])[jax.lax.axis_index(tensor)]
            if fsdp and mesh.shape[fsdp] > 1:
                return jax.lax.psum(jax.lax.psum_scatter(sums, fsdp, scatter_dimension=1, tiled=True), "data")
            return jax.lax.psum(sums, axes)

        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(P(axes), P(axes)), out_specs=P(tensor, fsdp), check_vma=False
        )
        return mapped(ids, x)

    return sharded


def shard_attention(attend: Attend, mesh: Mesh) -> Attend:
    """The same function with rows and heads mapped over the mesh: each device attends in its own part.

    A fused kernel is opaque to the compiler, which could only gather the whole batch around it. The gradients of taps
    are summed over the devices that share them.
    """
    if mesh.size == 1:
        return attend
    rows_axes, heads_axis = BATCH[0], "tensor"
    rows_parts, heads_parts = row_parts(mesh), mesh.shape[heads_axis]

    def sharded(qkv, score, query_segments, key_segments, dropout_rate, seed):
        batch, _, heads = jax.tree.leaves(qkv)[0].shape[:3]
        if batch % rows_parts or heads % heads_parts:  # a single row, at initialisation
            return attend(qkv, score, query_segments, key_segments, dropout_rate, seed)

        def of(leaf: jax.Array | None, *axes: str | None) -> P | None:
            """Maps the axes that this array has in full; those of size 1 are shared by all."""
            if leaf is None:
                return None
            full = {"rows": (batch, rows_axes), "heads": (heads, heads_axis), None: (0, None)}
            return P(
                *(full[axis][1] if size == full[axis][0] else None for axis, size in zip(axes, leaf.shape, strict=True))
            )

        parts: Any = score
        scores = parts.replace(
            fixed=of(score.fixed, "heads", None),
            dynamic_query=of(score.dynamic_query, "heads", None, None),
            dynamic_key=of(score.dynamic_key, "heads", None, None),
            dense=of(score.dense, "rows", "heads", None, None),
        )
        tokens, segments = P(rows_axes, None, heads_axis), P(rows_axes, None)

        def local(qkv, score, query_segments, key_segments, seed, rows, heads):
            return attend(qkv, score, query_segments, key_segments, dropout_rate, seed, rows, heads)

        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(tokens, scores, segments, segments, P(), P(rows_axes), P(heads_axis)),
            out_specs=tokens,
            check_vma=False,
        )
        numbers = jnp.arange(batch, dtype=jnp.uint32), jnp.arange(heads, dtype=jnp.uint32)
        return mapped(qkv, score, query_segments, key_segments, seed, *numbers)

    return sharded


def shard_convolution(convolve: Convolve, mesh: Mesh) -> Convolve:
    """The same function with rows mapped over the mesh, for the reason of `shard_attention`."""
    if mesh.size == 1:
        return convolve
    axes, parts = BATCH[0], row_parts(mesh)

    def sharded(x: jax.Array, kernels: Sequence[Kernel], inputs: Inputs) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        if x.shape[0] % parts:
            return convolve(x, kernels, inputs)

        def local(x, learned, inputs):
            own = zip(learned, kernels, strict=True)
            return convolve(x, [Kernel(taps, bias, kernel.activation) for (taps, bias), kernel in own], inputs)

        mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(axes), P(), P(axes)), out_specs=P(axes), check_vma=False)
        return mapped(x, [(kernel.taps, kernel.bias) for kernel in kernels], inputs)

    return sharded


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds in full, on the devices of all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)


def global_batch(read: Callable[[int, int], np.ndarray], rows: int, length: int, mesh: Mesh) -> jax.Array:
    """The (rows, length) batch of all processes; each calls `read(first, count)` for the rows of its own devices only.

    Which these are is the mesh's to say: where `tensor` spans hosts, several hosts read the same rows.
    """
    parts: dict[int, np.ndarray] = {}  # devices that differ in `tensor` only share their rows

    def part(index: Any) -> np.ndarray:
        first, stop, _ = index[0].indices(rows)
        if first not in parts:
            parts[first] = read(first, stop - first)
        return parts[first]

    return jax.make_array_from_callback((rows, length), NamedSharding(mesh, BATCH), part)
