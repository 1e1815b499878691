"""What stands on the encoder: the masked-language-model head, tied to the token embedding."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int

from convattn_jax.model.layers import LayerNorm, Linear, gelu, wide_product


def take_positions(x: Float[Array, "B T D"], positions: Int[Array, "B P"]) -> Float[Array, "B P D"]:
    """x at the positions, as a one-hot product: the gradient of a gather would be a scatter-add."""
    hot = jax.nn.one_hot(positions, x.shape[1], dtype=x.dtype)
    return jnp.einsum("bpt,btd->bpd", hot, x)


def cross_entropy(logits: Float[Array, "... V"], labels: Int[Array, "..."]) -> Float[Array, "..."]:
    """-log softmax(logits)[label] in nats; the label's logit is picked by comparison, not by a gather."""
    return _cross_entropy(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), labels)


@jax.custom_vjp
def _cross_entropy(logits: Array, labels: Array) -> Array:
    return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits: Array, labels: Array) -> tuple[Array, tuple[Array, ...]]:
    total, picked = jax.lax.platform_dependent(logits, labels, cpu=_sums, default=sums_at_once)
    return total - picked, (logits, labels, total)


def _cross_entropy_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, None]:
    logits, labels, total = saved
    softmax = jnp.exp(logits - total[..., None])
    return gradient[..., None] * (softmax - _hit(logits, labels).astype(logits.dtype)), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _hit(logits: Array, labels: Array) -> Array:
    return jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]


def _sums(logits: Array, labels: Array) -> tuple[Array, Array]:
    return jax.nn.logsumexp(logits, axis=-1), jnp.where(_hit(logits, labels), logits, 0).sum(-1)


def sums_at_once(logits: Float[Array, "... V"], labels: Int[Array, "..."]) -> tuple[Array, Array]:
    """(log sum exp(logits), the label's logit), the logits read once: a sum is rescaled when a larger logit is met."""

    def join(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        shrink = jnp.exp(-jnp.abs(a[0] - b[0]))
        total = jnp.where(a[0] > b[0], a[1] + b[1] * shrink, a[1] * shrink + b[1])
        return jnp.maximum(a[0], b[0]), total, a[2] + b[2]

    zero, lowest = jnp.zeros((), logits.dtype), jnp.asarray(jnp.finfo(logits.dtype).min)
    parts = logits, jnp.ones_like(logits), jnp.where(_hit(logits, labels), logits, 0)
    top, total, picked = jax.lax.reduce(parts, (lowest, zero, zero), join, (logits.ndim - 1,))
    return top + jnp.log(total), picked


@jax.custom_vjp
def tied_logits(x: Float[Array, "N E"], word: Float[Array, "V E"]) -> Float[Array, "N V"]:
    """x_n.word_v in float32 or better, of a table in the type of x; so is the logits' gradient in the products of the
    backward pass, whose results are as wide as what they are gradients of."""
    return wide_product("ne,ve->nv", x, word.astype(x.dtype))


def _tied_forward(x: Array, word: Array) -> tuple[Array, tuple[Array, Array]]:
    return tied_logits(x, word), (x, word)


def _tied_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, word = saved
    gradient = gradient.astype(x.dtype)
    d_x, d_word = wide_product("nv,ve->ne", gradient, word.astype(x.dtype)), wide_product("nv,ne->ve", gradient, x)
    return d_x.astype(x.dtype), d_word.astype(word.dtype)


tied_logits.defvjp(_tied_forward, _tied_backward)


class MLMHead(nn.Module):
    """dense(D -> E), gelu, LayerNorm, product with the token embedding, bias; surplus vocabulary rows get -inf."""

    width: int
    vocab_size: int

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], word: Float[Array, "V E"]) -> Float[Array, "... V"]:
        rows, embedding = word.shape
        x = gelu(Linear((self.width,), (embedding,), name="transform")(x))
        x = LayerNorm(embedding, name="norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (rows,))
        logits = tied_logits(x.reshape(-1, embedding), word) + bias
        logits = jnp.where(jnp.arange(rows) < self.vocab_size, logits, jnp.finfo(logits.dtype).min)
        return logits.reshape(*x.shape[:-1], rows)
