import pytest

from benchmarks import hlo
from benchmarks.kernel_times import Event, busy, report, summary

PROGRAM = """HloModule jit_train_step, is_scheduled=true

%fused_computation (param_0: f32[8,16]) -> f32[16,8] {
  %param_0 = f32[8,16]{1,0} parameter(0)
  ROOT %transpose.1 = f32[16,8]{1,0} transpose(%param_0), dimensions={1,0}
}

%gemm_fusion_dot_computation (param_1: bf16[8,16], param_2: bf16[16,4]) -> bf16[8,4] {
  %param_1 = bf16[8,16]{1,0} parameter(0)
  %param_2 = bf16[16,4]{1,0} parameter(1)
  ROOT %dot.9 = bf16[8,4]{1,0} dot(%param_1, %param_2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main.3 (a: bf16[8,16], b: bf16[16,4], c: f32[8,16]) -> (bf16[8,4], f32[16,8]) {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %c = f32[8,16]{1,0} parameter(2)
  %gemm_fusion_dot.1 = bf16[8,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_fusion_dot_computation, metadata={op_name="jit(train_step)/jvp(MaskedLM)/encoder/layer_0/mlp_in/dot_general"}
  %custom-call.2 = (bf16[8,4]{1,0}, s8[32]{0}) custom-call(%a, /*index=1*/%b), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/transpose(jvp(MaskedLM))/encoder/layer_1/mlp_in/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %wrapped_transpose = f32[16,8]{1,0} fusion(%c), kind=kInput, calls=%fused_computation
  ROOT %tuple.1 = (bf16[8,4]{1,0}, f32[16,8]{1,0}) tuple(%gemm_fusion_dot.1, %wrapped_transpose)
}
"""  # noqa: E501


def test_operations_are_classed_placed_and_counted():
    program = hlo.operations(PROGRAM)
    gemm, call, transpose = (program[x] for x in ("gemm_fusion_dot.1", "custom-call.2", "wrapped_transpose"))
    assert (gemm.kind, gemm.place) == ("matrix product", "forward: encoder/layer_*/mlp_in/dot_general")
    assert (gemm.flops, gemm.bytes) == (2 * 8 * 16 * 4, 2 * (8 * 16 + 16 * 4 + 8 * 4))
    assert (call.kind, call.place) == ("matrix product", "backward: encoder/layer_*/mlp_in/dot_general")
    assert (call.flops, call.bytes) == (gemm.flops, gemm.bytes + 32)
    assert (transpose.kind, transpose.bytes) == ("transpose or copy", 2 * 4 * 8 * 16)


def test_time_is_summed_over_like_kernels_and_never_counted_twice_as_busy():
    events = [
        Event("gemm_fusion_dot_1", "gemm_fusion_dot.1", 0, 4e6),
        Event("wrapped_transpose", "wrapped_transpose", 1e6, 2e6),  # beside the first, on another stream
        Event("gemm_fusion_dot_1", "gemm_fusion_dot.1", 10e6, 2e6),
        Event("nvjet_tst_128x8", "nvjet_tst_128x8", 12e6, 2e6),
    ]
    assert busy(events) == 8e6
    figures = summary(events, hlo.operations(PROGRAM), steps=2)
    assert (figures["busy_ms"], figures["span_ms"], figures["kernels"]) == (4, 7, 2)
    assert figures["kinds"] == {"matrix product": 4, "transpose or copy": 1}
    first = figures["groups"][0]
    assert (first["ms"], first["count"], first["flops"]) == (3, 1, 2 * 8 * 16 * 4)
    assert "encoder/layer_*/mlp_in" in report(figures)


@pytest.mark.parametrize(("kind", "expected"), [("bf16[3,4]{1,0}", 24), ("(pred[8], s4[8], f32[])", 8 + 4 + 4)])
def test_size_of_types(kind, expected):
    assert hlo.size(kind) == expected
