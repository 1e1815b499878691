"""Score terms whose taps are projections of position embeddings: Transformer-XL, TUPE and DeBERTa.

B batch, T query position, S key position, H heads, K head size, D width, W = 2n + 1 taps, P positions.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from convattn_jax.model.embedding import lookup
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.layers import kernel_init
from convattn_jax.model.score import Score
from convattn_jax.model.t5 import T5Table, t5
from convattn_jax.model.term import Surroundings, Term, TermRow


def sinusoid(positions: Float[np.ndarray, " P"], width: int) -> Float[np.ndarray, "P D"]:
    """[sin, cos] of the positions at wavelengths from 2 pi to 10000 x 2 pi (Vaswani et al. 2017, section 3.5)."""
    angle = positions[:, None] / 10_000.0 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :width]


def xl_relative(kernel: Float[Array, "D H K"], bias: Float[Array, "H K"], length: int) -> Score:
    """(q_i + v_h).W_R r_{i-j} / sqrt(K), r sinusoidal (Dai et al. 2019, section 3.3): radius T - 1, never clipped."""
    radius = max(length - 1, 1)
    r = jnp.asarray(sinusoid(-np.arange(-radius, radius + 1.0), kernel.shape[0]), kernel.dtype)
    taps = jnp.einsum("wd,dhk->hkw", r, kernel) * kernel.shape[-1] ** -0.5
    return Score(dynamic_query=taps, fixed=jnp.einsum("hk,hkw->hw", bias, taps))


def xl_key_bias(bias: Float[Array, "H K"]) -> Score:
    """u_h.k_j / sqrt(K) (Dai et al. 2019, section 3.3): a key-dynamic kernel of radius 0, equal at every distance."""
    return Score(dynamic_key=bias[..., None] * bias.shape[-1] ** -0.5)


def tupe_content(head_size: int) -> Score:
    """q_i.k_j / sqrt(2K) (Ke et al. 2021, equation 7)."""
    return Score(content=(2 * head_size) ** -0.5)


def tupe_absolute(
    query: Float[Array, "B T H K"], key: Float[Array, "B T H K"], resets: Float[Array, "2 H"], is_cls: Array
) -> Score:
    """(p_i U_Q).(p_j U_K) / sqrt(2K); from [CLS] theta_1, to [CLS] theta_2 instead (Ke et al. 2021, 3.1 and 3.2)."""
    correlation = jnp.einsum("bthk,bshk->bhts", query, key) * (2 * query.shape[-1]) ** -0.5
    from_cls, to_cls = is_cls[:, None, :, None], is_cls[:, None, None, :]
    theta = resets[:, None, :, None, None]
    return Score(dense=jnp.where(from_cls, theta[0], jnp.where(to_cls, theta[1], correlation)))


def tupe_relative(absolute: Score, relative: Score, is_cls: Array) -> Score:
    """`tupe_absolute` + b_{j-i}, T5's, which [CLS] resets as well (Ke et al. 2021, section 3.2, TUPE-R)."""
    assert absolute.dense is not None
    assert relative.fixed is not None
    length, radius = absolute.dense.shape[-1], relative.fixed.shape[-1] // 2
    distance = np.clip(np.arange(length) - np.arange(length)[:, None], -radius, radius) + radius
    either = is_cls[:, None, :, None] | is_cls[:, None, None, :]
    return Score(dense=absolute.dense + jnp.where(either, 0, relative.fixed[:, distance][None]))


def deberta_taps(relative: Float[Array, "rows D"], kernel: Float[Array, "D H K"], scale: float) -> Array:
    """(H, K, W) taps: at offset o the projected embedding clip(n - o, 0, 2n - 1) (He et al. 2021, equation 3)."""
    n = relative.shape[0] // 2
    rows = np.clip(n - np.arange(-n, n + 1), 0, 2 * n - 1)
    return jnp.einsum("wd,dhk->hkw", relative[rows], kernel) * scale


class XLRelative(Term):
    """`xl_relative`: kernel W_R (D, H, K), bias v (H, K)."""

    @nn.compact
    def __call__(self, around: Surroundings) -> Score:
        return xl_relative(self.head_kernel("kernel"), self.head_vectors("bias"), around.length)


class XLKeyBias(Term):
    """`xl_key_bias`: u (H, K)."""

    @nn.compact
    def __call__(self, around: Surroundings) -> Score:
        return xl_key_bias(self.head_vectors("bias"))


class TupeContent(Term):
    """`tupe_content`; no parameters."""

    @nn.compact
    def __call__(self, around: Surroundings) -> Score:
        return tupe_content(self.shape.head_size)


class TupeAbsoluteBias(Term):
    """`tupe_absolute`, computed once for all layers: positions (P, D), U_Q and U_K (D, H, K), theta (2, H)."""

    @nn.compact
    def __call__(self, inputs: Inputs) -> Score:
        s = self.shape
        table = self.param("position", kernel_init, (s.max_length, s.width))
        p = lookup(table, inputs.positions, table.dtype)
        query, key = (jnp.einsum("btd,dhk->bthk", p, self.head_kernel(name)) for name in ("query", "key"))
        return tupe_absolute(query, key, self.param("reset", kernel_init, (2, s.heads)), inputs.positions == 0)


class TupeRelativeBias(Term):
    """`tupe_relative`, computed once for all layers: those of `tupe_absolute` and T5's table."""

    @nn.compact
    def __call__(self, inputs: Inputs) -> Score:
        absolute = TupeAbsoluteBias(self.shape, name="absolute")(inputs)
        relative = t5(T5Table(self.shape, name="relative")(inputs), inputs.ids.shape[1])
        return tupe_relative(absolute, relative, inputs.positions == 0)


class SharedScore(Term):
    """A score that the shared module has made whole."""

    @nn.compact
    def __call__(self, around: Surroundings) -> Score:
        return around.shared


class RelativeEmbedding(Term):
    """DeBERTa's relative embeddings (2n, D), shared by all layers."""

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:
        return self.param("embedding", kernel_init, (2 * self.shape.radius, self.shape.width))


class DebertaTerm(Term):
    """One of c2c, c2p, p2c, each divided by sqrt(K x how many of them there are) (He et al. 2021, section 3.1)."""

    @property
    def scale(self) -> float:
        """1 / sqrt(3K) when all three are there."""
        return (self.shape.head_size * sum(name in ("c2c", "c2p", "p2c") for name in self.shape.scores)) ** -0.5


class C2C(DebertaTerm):
    """Q^c_i.K^c_j, scaled; no parameters."""

    @nn.compact
    def __call__(self, around: Surroundings) -> Score:
        return Score(content=self.scale)


class C2P(DebertaTerm):
    """Q^c_i.K^r_{d(i,j)}, K^r = r W: kernel (D, H, K)."""

    @nn.compact
    def __call__(self, around: Surroundings) -> Score:
        return Score(dynamic_query=deberta_taps(around.shared, self.head_kernel("kernel"), self.scale))


class P2C(DebertaTerm):
    """K^c_j.Q^r_{d(j,i)}, Q^r = r W: kernel (D, H, K)."""

    @nn.compact
    def __call__(self, around: Surroundings) -> Score:
        return Score(dynamic_key=deberta_taps(around.shared, self.head_kernel("kernel"), self.scale))


TERMS: dict[str, TermRow] = {
    "xl_relative": TermRow(XLRelative, "(q_i + v).W_R r_{i-j}/sqrt(K)", "2 B T^2 D"),
    "xl_key_bias": TermRow(XLKeyBias, "u.k_j/sqrt(K)", "B T D"),
    "tupe_content": TermRow(TupeContent, "q_i.k_j/sqrt(2K)", "B T^2 D", product=True),
    "tupe_absolute": TermRow(
        SharedScore, "(p_i U_Q).(p_j U_K)/sqrt(2K)", "B T^2 D/layers", ("tupe_absolute", TupeAbsoluteBias), table=True
    ),
    "tupe_relative": TermRow(
        SharedScore,
        "(p_i U_Q).(p_j U_K)/sqrt(2K) + b_{j-i}",
        "B T^2 D/layers",
        ("tupe_relative", TupeRelativeBias),
        table=True,
    ),
    "c2c": TermRow(C2C, "q_i.k_j/sqrt(3K)", "B T^2 D", product=True),
    "c2p": TermRow(C2P, "q_i.K^r[d(i,j)]/sqrt(3K)", "B T D W + D^2 W", ("deberta", RelativeEmbedding)),
    "p2c": TermRow(P2C, "k_j.Q^r[d(j,i)]/sqrt(3K)", "B T D W + D^2 W", ("deberta", RelativeEmbedding)),
}
