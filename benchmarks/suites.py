"""What `benchmarks.step` compares: rows (name, specification), and the ratios between them.

A specification is FILE[:SIZE][@KEY=VALUE...] for a configuration of this project, `transformers:SIZE[@...]` or
`authors:SIZE[@...]` for a peer of that size. Keys are those of the configuration, and

    head=masked | all            predict at the masked positions only, or score every position and ignore the rest
    products=cublas | triton     ours: whether XLA may take Triton's matrix products, as it does by itself
    attend=cudnn                 ours: plain attention by cuDNN (it has no attention dropout through JAX)
    compile=True | False         peers: torch.compile
    sdpa=auto | default | flash | cudnn | efficient    Transformers: the attention kernel; auto times them first
"""

import dataclasses

HEADS = ("masked", "all")
PRODUCTS = ("cublas", "triton")
OURS, PEERS = ("head", "attend", "products"), ("head", "compile", "sdpa")


@dataclasses.dataclass(frozen=True)
class Spec:
    """One contender."""

    source: str  # FILE[:SIZE], or transformers:SIZE, or authors:SIZE
    options: dict[str, str]
    assignments: tuple[str, ...]  # KEY=VALUE of the configuration

    @property
    def peer(self) -> str | None:
        """transformers, authors, or None for ours."""
        name = self.source.partition(":")[0]
        return name if name in ("transformers", "authors") else None

    @classmethod
    def parse(cls, text: str) -> "Spec":
        source, *rest = text.split("@")
        own = PEERS if source.partition(":")[0] in ("transformers", "authors") else OURS
        options = dict(part.split("=", 1) for part in rest if part.partition("=")[0] in own)
        return cls(source, options, tuple(part for part in rest if part.partition("=")[0] not in own))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Time of a step, fastest of `of` over fastest of `to`; with `speed` tokens a second, padding not counted."""

    name: str
    of: tuple[str, ...]
    to: tuple[str, ...]
    speed: bool = False


@dataclasses.dataclass(frozen=True)
class Suite:
    """Contenders that do the same work on rows of the same shape."""

    batch: int
    length: int
    vocabulary: int
    rows: dict[str, str]
    ratios: tuple[Ratio, ...] = ()
    mixed: bool = False  # lengths as in `benchmarks/wikipedia_lengths.json`: one text a row, padded, or packed


COMPOSITE, PLAIN = "composite", "plain"
HF, HF_MASKED, HF_EAGER = "Transformers", "Transformers, masked positions only", "Transformers, eager"
AUTHORS, AUTHORS_COMPILED = "authors' composite, eager", "authors' composite, compiled"
_NO_ATTENTION_DROPOUT = "@model.attention_dropout=0.0"
_EVEN = "no attention dropout"
_PACKED, _PADDED = f"{COMPOSITE}, packed", f"{COMPOSITE}, padded"
_AGAINST_PEERS = (
    Ratio("tokens/s: composite against Transformers", (COMPOSITE,), (HF,), speed=True),
    Ratio("tokens/s: composite against Transformers, both at masked positions", (COMPOSITE,), (HF_MASKED,), speed=True),
    Ratio("tokens/s: composite against the authors' eager", (COMPOSITE,), (AUTHORS,), speed=True),
    Ratio("tokens/s: composite against the authors' compiled", (COMPOSITE,), (AUTHORS_COMPILED,), speed=True),
)
_AGAINST_PLAIN = (
    Ratio("time: composite / plain", (COMPOSITE,), (PLAIN,)),
    Ratio(
        "time: composite / the better of plain and cuDNN, no attention dropout",
        (f"{COMPOSITE}, {_EVEN}",),
        (f"{PLAIN}, {_EVEN}", f"{PLAIN}, cuDNN, {_EVEN}"),
    ),
)


def _plain(extra: str = "") -> dict[str, str]:
    """Content attention alone, and both models without attention dropout, which cuDNN lacks."""
    ours, plain = f"configs/composite.py:base{extra}", f"configs/no_positions.py:base{extra}"
    return {
        COMPOSITE: ours,
        PLAIN: plain,
        f"{COMPOSITE}, {_EVEN}": ours + _NO_ATTENTION_DROPOUT,
        f"{PLAIN}, {_EVEN}": plain + _NO_ATTENTION_DROPOUT,
        f"{PLAIN}, cuDNN, {_EVEN}": plain + _NO_ATTENTION_DROPOUT + "@attend=cudnn",
    }


SUITES: dict[str, Suite] = {
    "demo": Suite(
        32, 64, 4096, {COMPOSITE: "configs/composite.py", "BERT": "configs/bert.py"},
        (Ratio("time: composite / BERT", (COMPOSITE,), ("BERT",)),),
    ),
    "base": Suite(
        256, 128, 30_004,
        _plain() | {
            f"{COMPOSITE}, every position scored": "configs/composite.py:base@head=all",
            f"{COMPOSITE}, no dropout": "configs/composite.py:base@model.dropout=0.0" + _NO_ATTENTION_DROPOUT,
            f"{COMPOSITE}, separable q, k, v":
                "configs/composite.py:base@model.query_key.kind=separable@model.value.kind=separable",
            HF: "transformers:base",
            HF_MASKED: "transformers:base@head=masked",
            HF_EAGER: "transformers:base@compile=False",
            AUTHORS: "authors:base@compile=False",
            AUTHORS_COMPILED: "authors:base",
        },
        (
            *_AGAINST_PEERS,
            Ratio("tokens/s: composite, every position scored, against Transformers",
                  (f"{COMPOSITE}, every position scored",), (HF,), speed=True),
            *_AGAINST_PLAIN,
            Ratio("time: dropout 0.1 / none", (COMPOSITE,), (f"{COMPOSITE}, no dropout",)),
            Ratio("time: separable q, k, v / linear", (f"{COMPOSITE}, separable q, k, v",), (COMPOSITE,)),
        ),
    ),
    "small": Suite(
        1024, 128, 30_004,
        {
            COMPOSITE: "configs/composite.py:small@model.embedding=256",
            PLAIN: "configs/no_positions.py:small@model.embedding=256",
            f"{COMPOSITE}, embedding 128": "configs/composite.py:small",
            HF: "transformers:small",
            HF_MASKED: "transformers:small@head=masked",
            AUTHORS: "authors:small@model.embedding=256@compile=False",
            AUTHORS_COMPILED: "authors:small@model.embedding=256",
        },
        (*_AGAINST_PEERS, _AGAINST_PLAIN[0]),
    ),
    "base512": Suite(
        64, 512, 30_004, _plain() | {HF: "transformers:base", HF_MASKED: "transformers:base@head=masked"},
        (*_AGAINST_PEERS, *_AGAINST_PLAIN),
    ),
    "base2048": Suite(
        16, 2048, 30_004, _plain() | {HF: "transformers:base", HF_MASKED: "transformers:base@head=masked"},
        (*_AGAINST_PEERS, *_AGAINST_PLAIN),
    ),
    "mixed": Suite(
        64, 512, 30_004,
        {
            _PACKED: "configs/composite.py:base@data.layout=packed",
            _PADDED: "configs/composite.py:base",
            HF: "transformers:base",
            HF_MASKED: "transformers:base@head=masked",
        },
        (
            Ratio("tokens/s: composite packed against Transformers padded", (_PACKED,), (HF,), speed=True),
            Ratio("tokens/s: composite against Transformers, both padded", (_PADDED,), (HF,), speed=True),
            Ratio("tokens/s: composite packed against padded", (_PACKED,), (_PADDED,), speed=True),
        ),
        mixed=True,
    ),
}  # fmt: skip
