"""The embedding look-up, and the gradient of its table: rows added up by id.

N tokens, V rows of the table, E embedding width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

TILE = 128  # tokens whose rows one matrix product adds up

AddByIds = Callable[[Array, Array, int, jnp.dtype], Array]  # the signature of `add_by_ids`


def add_by_ids(ids: Int[Array, " N"], x: Float[Array, "N E"], rows: int, dtype: jnp.dtype) -> Float[Array, "V E"]:
    """The sum over each id's entries of x, in float32 or better, as `dtype`; in an order that does not change."""
    cpu, default = (functools.partial(f, rows=rows, dtype=dtype) for f in (add_by_scatter, add_by_sorting))
    return jax.lax.platform_dependent(ids, x, cpu=cpu, default=default)


def add_by_scatter(ids: Int[Array, " N"], x: Float[Array, "N E"], rows: int, dtype: jnp.dtype) -> Float[Array, "V E"]:
    """Entry by entry: fast on a CPU, and slow on accelerators, where it serialises and its order changes."""
    return jnp.zeros((rows, x.shape[-1]), dtype).at[ids].add(x.astype(dtype))


def add_by_sorting(ids: Int[Array, " N"], x: Float[Array, "N E"], rows: int, dtype: jnp.dtype) -> Float[Array, "V E"]:
    """Tokens sorted by id, each tile of them added up by a small one-hot product, then one gather by the table.

    A run of equal ids may go on into later tiles; those add their first sum to that of the tile where it began.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    add = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)
    order = jnp.pad(jnp.argsort(ids, stable=True), (0, -len(ids) % TILE), constant_values=-1)
    tiles = jnp.where(order < 0, rows, ids[order]).reshape(-1, TILE)

    begins = jnp.concatenate([jnp.ones_like(tiles[:, :1], bool), tiles[:, 1:] != tiles[:, :-1]], axis=1)
    run = jnp.cumsum(begins, axis=1) - 1
    hot = (run[:, None, :] == jnp.arange(TILE)[:, None]).astype(x.dtype)
    sums = add("nrt,nte->nre", hot, x[order].reshape(*tiles.shape, -1))

    goes_on = jnp.concatenate([jnp.zeros(1, bool), tiles[1:, 0] == tiles[:-1, -1]])
    of_last_run = (tiles[:, -1:] == tiles[:, 0]) & goes_on
    later = add("nm,me->ne", of_last_run.astype(wide), sums[:, 0])

    first = begins.at[:, 0].set(~goes_on)
    place = jnp.arange(len(tiles))[:, None] * TILE + run
    where = jnp.full(rows, -1).at[jnp.where(first, tiles, rows)].set(place, mode="drop")
    tile, is_last = where // TILE, where % TILE == run[where // TILE, -1]
    total = sums.reshape(-1, x.shape[-1])[where] + jnp.where(is_last[:, None], later[tile], 0)
    return jnp.where((where >= 0)[:, None], total, 0).astype(dtype)


def lookup(
    table: Float[Array, "V E"], ids: Int[Array, "B T"], dtype: jnp.dtype, add_by_ids: AddByIds = add_by_ids
) -> Float[Array, "B T E"]:
    """table[ids] as `dtype`; `add_by_ids` makes the gradient."""
    return _lookup(table, ids, dtype, add_by_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table: Array, ids: Array, dtype: jnp.dtype, add_by_ids: AddByIds) -> Array:
    return table[ids].astype(dtype)


def _forward(table: Array, ids: Array, dtype: jnp.dtype, add_by_ids: AddByIds) -> tuple[Array, tuple[Array, Array]]:
    return _lookup(table, ids, dtype, add_by_ids), (ids, jnp.zeros((table.shape[0], 0), table.dtype))


def _backward(
    dtype: jnp.dtype, add_by_ids: AddByIds, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, None]:
    ids, like = saved
    flat = gradient.reshape(-1, gradient.shape[-1])
    return add_by_ids(ids.reshape(-1), flat, like.shape[0], like.dtype), None


_lookup.defvjp(_forward, _backward)
