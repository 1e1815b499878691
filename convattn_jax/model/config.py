"""What the model side of a configuration says, checked."""

import dataclasses

from convattn_jax.config import check, check_choice
from convattn_jax.model.projections import ProjectionConfig, check_projection
from convattn_jax.model.term import TAPS_INIT, TermShape

POSITIONS = ("absolute", "none")
OUTPUT_BIASES = ("zeros", "unigram")
DTYPES = ("float32", "bfloat16", "float64")
LOOPS = ("unroll", "scan")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of the encoder; `configs/base.py` documents each key."""

    mixer: str
    scores: tuple[str, ...]
    rotation: str
    branches: tuple[str, ...]
    query_key: ProjectionConfig
    value: ProjectionConfig
    positions: str
    radius: int
    taps_init: str
    layers: int
    width: int
    heads: int
    head_size: int
    hidden: int
    embedding: int
    max_length: int
    dropout: float
    attention_dropout: float
    vocab_multiple: int
    output_bias: str
    dtype: str
    kernel: str
    loop: str
    remat: bool

    def __post_init__(self):
        for name in ("radius", "layers", "width", "heads", "hidden", "embedding", "max_length", "vocab_multiple"):
            check(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("dropout", "attention_dropout"):
            check(0 <= getattr(self, name) < 1, f"model.{name}={getattr(self, name)} must lie in [0, 1)")
        check_choice("model.positions", self.positions, POSITIONS)
        check_choice("model.taps_init", self.taps_init, TAPS_INIT)
        check_choice("model.output_bias", self.output_bias, OUTPUT_BIASES)
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.loop", self.loop, LOOPS)
        check(self.head_size >= 0, f"model.head_size={self.head_size} must be 0 (width / heads) or more")
        if self.head_size == 0:
            check(
                self.width % self.heads == 0,
                f"model.heads={self.heads} does not divide model.width={self.width}: choose a divisor, or set "
                "model.head_size",
            )
            object.__setattr__(self, "head_size", self.width // self.heads)
        self._check_variant()

    def _check_variant(self) -> None:
        # the tables' modules hold a ModelConfig, so they are not there yet while this file loads
        from convattn_jax.kernels.choice import IMPLEMENTATIONS
        from convattn_jax.model.branches import BRANCHES
        from convattn_jax.model.mixers import MIXERS
        from convattn_jax.model.rotations import ROTATIONS
        from convattn_jax.model.scores import TERMS

        check_choice("model.kernel", self.kernel, ("auto", *IMPLEMENTATIONS))
        check_choice("model.mixer", self.mixer, MIXERS)
        check_choice("model.rotation", self.rotation, ROTATIONS)
        for field, names, known in (("scores", self.scores, TERMS), ("branches", self.branches, BRANCHES)):
            for name in names:
                check_choice(f"model.{field}", name, known)
            check(len(set(names)) == len(names), f"model.{field}={','.join(names)} names an entry twice")
        uses = MIXERS[self.mixer].uses
        unused = {
            "scores": self.scores,
            "branches": self.branches,
            "rotation": self.rotation != "none",
            "query_key": self.query_key.kind != "linear",
            "value": self.value.kind != "linear",
        }
        for field, there in unused.items():
            check(
                field in uses or not there,
                f"model.{field} has no meaning with model.mixer={self.mixer}: leave it at "
                f"{'()' if field in ('scores', 'branches') else 'none' if field == 'rotation' else 'kind=linear'}",
            )
        check(
            "scores" not in uses or len(self.scores) > 0,
            f"model.scores is empty: name at least one term of {', '.join(TERMS)}",
        )
        products = [name for name, row in TERMS.items() if row.product]
        check(
            self.rotation == "none" or any(name in products for name in self.scores),
            f"model.rotation={self.rotation} turns the product of queries and keys, which model.scores="
            f"{','.join(self.scores)} lacks: add one of {', '.join(products)}, or set model.rotation=none",
        )
        check(
            self.rotation == "none" or self.head_size % 2 == 0,
            f"model.rotation={self.rotation} needs an even head size, not model.head_size={self.head_size}",
        )
        check(
            not self.mixer.startswith("convbert") or self.heads % 2 == 0,
            f"model.mixer={self.mixer} needs an even number of heads, not model.heads={self.heads}",
        )
        for field, projection in (("model.query_key", self.query_key), ("model.value", self.value)):
            check_projection(field, projection, self.width, self.heads, self.head_size)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text it takes; None without position tables."""
        from convattn_jax.model.scores import TERMS  # late, as in `_check_variant`

        bounded = self.positions == "absolute" or any(TERMS[name].table for name in self.scores)
        return self.max_length if bounded else None

    @property
    def taps(self) -> int:
        """W."""
        return 2 * self.radius + 1

    def term_shape(self) -> TermShape:
        """What a score term may know of the layer."""
        return TermShape(
            heads=self.heads,
            head_size=self.head_size,
            width=self.width,
            radius=self.radius,
            max_length=self.max_length,
            taps_init=self.taps_init,
            scores=self.scores,
        )
