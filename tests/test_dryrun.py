"""What a dry run says: the collectives of a program's text, and a mesh of 256 devices that isn't there."""

import importlib.util
import io
import subprocess
import sys

import jax
import pytest
import tiny
from jax.experimental import topologies

from convattn_jax import dryrun, main, sharding
from convattn_jax.collectives import Collective, collectives
from convattn_jax.config import UserError
from convattn_jax.kernels import choice

PROGRAM = """HloModule jit_step, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %g = bf16[16,4]{1,0} all-gather(%h), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
}

%inside (p: f32[2]) -> f32[2] {
  ROOT %s = f32[2]{0} reduce-scatter(%q), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
}

%first (p: f32[2]) -> f32[2] {
  ROOT %a = (f32[4]{0}, f32[4]{0}) all-to-all(%u, %v), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

%early (p: bf16[2]) -> bf16[8] {
  %e = bf16[8]{0:T(8)} all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="1"}
}

%beside (p: bf16[2]) -> bf16[8] {
  %f = bf16[8]{0:T(8)} all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="1"}
}

%all-reduce-scatter.3 (input: f32[32]) -> f32[4] {
  %l = f32[32]{0:T(8)} all-reduce(%input), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (a: f32[16,4]) -> f32[16,4] {
  %w = (s32[], f32[16,4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %r = (f32[16,4]{1,0}, /*index=1*/f32[]) all-reduce(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %m = f32[10]{0} all-reduce(%a), replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add
  %s = (f32[8]{0}, f32[16]{0}) all-gather-start(%a), replica_groups=[4,2]<=[8], dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  %o = ((f32[3]{0}, f32[5]{0}), (f32[3]{0}, f32[5]{0})) all-reduce-start(%a, %b), replica_groups={{0,1}}, to_apply=%add
  %p = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %y = ((f32[16]), f32[2], s32[]) async-start(%z), calls=%inside
  %h = (bf16[8], u32[]) fusion(%a), kind=kCustom, calls=%early
  %j = bf16[8] fusion(%h), kind=kOutput, calls=%beside
  %k = f32[4] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
  %n = f32[2] conditional(%i, %a, %b), branch_computations={%first, %add}
}
"""


def test_collectives_are_counted_as_often_as_they_run_with_the_bytes_of_their_results():
    assert collectives(PROGRAM) == [
        Collective("all-gather", 2, 13, 12 * 16 * 4 * 2 + 16 * 4),
        Collective("all-reduce", 4, 2, 16 * 4 * 4 + 4 + 10 * 4),
        Collective("all-reduce", 2, 1, 3 * 4 + 5 * 4),
        Collective("all-to-all", 2, 1, 2 * 4 * 4),
        Collective("collective-permute", 0, 1, 6 * 4),
        Collective("reduce-scatter", 8, 2, 2 * 4 + 4 * 4),
        Collective("all-gather", 4, 1, 8 * 2),
    ]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-reduce", 150), ("all-gather", 75), ("reduce-scatter", 300), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_what_goes_around_a_ring_of_four(kind, sent):
    assert Collective(kind, 4, 1, 100).sent == sent


def test_a_mesh_of_256_devices_is_described_on_a_machine_with_one(tmp_path, capfd):
    changes = {"model__kernel": "pallas_gpu", "model__layers": 2, "model__loop": "scan", "train__batch_size": 512}
    config = tiny.write_config(tmp_path, data__files=(), **changes)  # no text is there to be read
    arguments = ["--config.mesh.dry_run", "--config.mesh.data=32", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]
    # others, and a bucket, that nothing looks for
    alone = [
        "--coordinator=localhost:1",
        "--processes=2",
        "--process=1",
    ]
    main.main(["main", f"--config={config}", "--workdir=gs://nowhere/run", *arguments, *alone])
    said = capfd.readouterr().out
    assert "mesh data=32 x fsdp=4 x tensor=2: 256 devices" in said
    lines = {line.split("  ")[0]: " ".join(line.split()[1:]) for line in said.splitlines()}
    name = "encoder/layers/mlp_in/kernel"
    assert lines[name] == f"2 x 16 x 32 -, fsdp, tensor {2 * 4 * 16 * 4} B"
    assert lines["encoder/embeddings/word"] == f"48 x 8 tensor, fsdp {24 * 2 * 4} B"
    table = {tuple(words[:2]): words[2] for line in said.splitlines() if len(words := line.split()) > 2}
    assert int(table["all-gather", "4"]) >= 2 * 6  # six kernels of each of two layers
    assert ("all-reduce", "128") in table  # gradients of what is whole on each
    assert "with model.kernel=plain, which cannot show: the fused attention kernel" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.py"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": -1}, "mesh.dry_run: no devices say what -1"),
        (
            {"mesh__data": 64, "mesh__fsdp": 64},
            "mesh.dry_run: 4096 devices, but a compilation for CPU has 2048",
        ),
        ({"mesh__data": 3}, r"train\.batch_size=4 does not divide by .* = 3 x 1"),
        ({"mesh__data": 1, "mesh__tensor": 4}, r"mesh\.tensor=4 does not divide model\.heads=2"),
    ],
)
def test_a_mesh_without_size_or_sense_is_an_error(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        dryrun.start(tiny.config(tmp_path, mesh__dry_run=True, **changes))


def compile_in_this_process(monkeypatch, capsys):
    """Has `dryrun.start` compile here; its environment comes too late to have any effect."""

    def compile_here(command, input, **_):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        try:
            dryrun.main()
        except Exception:  # a process would end with a traceback
            return subprocess.CompletedProcess(command, 1, *capsys.readouterr())
        return subprocess.CompletedProcess(command, 0, *capsys.readouterr())

    monkeypatch.setattr(dryrun.subprocess, "run", compile_here)


def test_what_the_compiling_process_finds_wrong_is_the_one_error(tmp_path, monkeypatch, capsys):
    compile_in_this_process(monkeypatch, capsys)
    with pytest.raises(UserError, match=r"^tokenizer\.model: none\.model cannot be read"):
        dryrun.start(tiny.config(tmp_path, mesh__dry_run=True, mesh__data=1, tokenizer__model="none.model"))
    assert capsys.readouterr() == ("", "")


def test_a_compilation_that_fails_is_an_error(tmp_path, monkeypatch):
    ended = subprocess.CompletedProcess([sys.executable], -9, "")
    monkeypatch.setattr(dryrun.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(UserError, match=r"mesh\.dry_run: compiling for 2 CPU devices ended with status -9"):
        dryrun.start(tiny.config(tmp_path, mesh__dry_run=True, mesh__data=2))


# --- TPUs that aren't there, by their own compiler ---


def on_chips(folder, chips, **changes):
    return dryrun.start(tiny.config(folder, mesh__dry_run=True, mesh__chips=chips, **changes))


def test_chips_are_of_a_dry_run():
    with pytest.raises(UserError, match=r"^mesh\.chips=v5e:4x4 is of a dry run: give --config\.mesh\.dry_run too$"):
        sharding.MeshConfig(-1, 1, 1, chips="v5e:4x4")


def test_without_their_compiler_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^mesh\.chips=v5e:4x4 needs libtpu, .* pip install -e '\.\[tpu\]', best"):
        on_chips(tmp_path, "v5e:4x4")


class Slice:
    """What JAX says of chips that it knows: four of them, which are this machine's CPU."""

    devices = (jax.devices()[0],) * 4


@pytest.fixture
def compiler(monkeypatch, capsys):
    """A compiler for TPUs, as far as it can be played: it knows v5e:2x2 and says what the test sets."""

    def know(name, **_):
        if name != "v5e:2x2":
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Invalid TPU external name: TPU v9")
        return Slice

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", know)
    compile_in_this_process(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("chips", "changes", "message"),
    [
        (
            "v9:2x2",
            {},
            r"^mesh\.chips=v9:2x2 is no slice that libtpu knows \(Invalid TPU external name: TPU v9\): name",
        ),
        ("v5e:2x2", {"mesh__fsdp": 3}, "mesh.data=-1 x mesh.fsdp=3 x mesh.tensor=1 does not multiply to the 4 devices"),
        ("v5e:2x2", {"train__batch_size": 6}, r"train\.batch_size=6 does not divide by .* = 4 x 1"),
    ],
)
def test_what_does_not_go_with_the_chips_is_an_error(tmp_path, compiler, chips, changes, message):
    with pytest.raises(UserError, match=message):
        on_chips(tmp_path, chips, **changes)


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the memory (37.13G) exceeds available HBM (15.75G). See",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 37.13G of 15.75G hbm. Exceeded",
    ],
)
def test_what_the_chips_cannot_hold_is_one_line_with_both_sizes(tmp_path, compiler, monkeypatch, said):
    def full(_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(dryrun.Program, "lower", full)
    with pytest.raises(
        UserError, match=r"^train\.batch_size=4: a step needs 37\.13GiB of the 15\.75GiB that a chip of"
    ):
        on_chips(tmp_path, "v5e:2x2")


def test_within_the_block_programs_are_for_another_platform():
    here = choice.default_platform()
    platforms = [choice.platform_of(kind, "tpu") for kind in ("TPU v5 lite", "TPU v4")]
    assert platforms == ["tpu", "tpu v4"]
    with choice.compiling_for(platforms[0]), choice.compiling_for(platforms[1]):
        assert choice.default_platform() == "tpu v4"
    assert choice.default_platform() == here
