// Every opcode, once: instructions.py asks for the names. And every kind of finding, with what is said of it.
#pragma once

// clang-format off
#define OPS(X) \
 X(add_s32) X(sub_s32) X(mul_lo_s32) X(mad_lo_s32) X(and_b32) X(or_b32) X(xor_b32) X(not_b32) X(shl_b32) X(shr_u32) \
 X(shr_s32) X(min_s32) X(max_s32) X(min_u32) X(max_u32) X(neg_s32) X(abs_s32) X(bfe_u32) X(bfe_s32) X(div_s32) \
 X(div_u32) X(rem_s32) X(rem_u32) X(mul_hi_u32) X(mul_hi_s32) X(selp_b32) X(mov_b32) X(prmt_b32) X(popc_b32) \
 X(clz_b32) X(shf_l_wrap_b32) X(shf_r_wrap_b32) X(lop3_b32) X(bfi_b32) \
 X(add_s16) X(sub_s16) X(mul_lo_s16) X(and_b16) X(or_b16) X(xor_b16) X(not_b16) X(shl_b16) X(shr_u16) X(shr_s16) \
 X(min_s16) X(max_s16) \
 X(mul_wide_s32) X(mul_wide_u32) X(mad_wide_s32) X(mad_wide_u32) X(mul_wide_s16) X(mul_wide_u16) \
 X(add_s64) X(sub_s64) X(mul_lo_s64) X(mad_lo_s64) X(and_b64) X(or_b64) X(xor_b64) X(not_b64) X(shl_b64) X(shr_u64) \
 X(shr_s64) X(min_s64) X(max_s64) X(min_u64) X(max_u64) X(neg_s64) X(div_s64) X(div_u64) X(rem_s64) X(rem_u64) \
 X(mul_hi_u64) X(selp_b64) X(mov_b64) \
 X(add_f32) X(sub_f32) X(mul_f32) X(fma_f32) X(div_f32) X(rcp_f32) X(sqrt_f32) X(rsqrt_f32) X(ex2_f32) X(lg2_f32) \
 X(max_f32) X(min_f32) X(max_nan_f32) X(min_nan_f32) X(neg_f32) X(abs_f32) X(sin_f32) X(cos_f32) X(tanh_f32) \
 X(copysign_f32) X(cvt_rni_f32) X(cvt_rzi_f32) X(cvt_rmi_f32) X(cvt_rpi_f32) \
 X(setp_eq_u32) X(setp_ne_u32) X(setp_lt_s32) X(setp_le_s32) X(setp_gt_s32) X(setp_ge_s32) X(setp_lt_u32) \
 X(setp_le_u32) X(setp_gt_u32) X(setp_ge_u32) X(setp_eq_u64) X(setp_ne_u64) X(setp_lt_s64) X(setp_le_s64) \
 X(setp_gt_s64) X(setp_ge_s64) X(setp_lt_u64) X(setp_le_u64) X(setp_gt_u64) X(setp_ge_u64) \
 X(setp_lt_s16) X(setp_le_s16) X(setp_gt_s16) X(setp_ge_s16) \
 X(setp_eq_f32) X(setp_ne_f32) X(setp_lt_f32) X(setp_le_f32) X(setp_gt_f32) X(setp_ge_f32) X(setp_equ_f32) \
 X(setp_neu_f32) X(setp_ltu_f32) X(setp_leu_f32) X(setp_gtu_f32) X(setp_geu_f32) X(setp_nan_f32) X(setp_num_f32) \
 X(cvt_f32_bf16) X(cvt_f32_f16) X(cvt_rn_bf16x2_f32) X(cvt_rn_f16x2_f32) X(cvt_rn_bf16_f32) X(cvt_rn_f16_f32) \
 X(cvt_rna_tf32_f32) X(cvt_f32_s32) X(cvt_f32_u32) X(cvt_s32_f32) X(cvt_u32_f32) X(cvt_s64_s32) X(cvt_u64_u32) \
 X(cvt_u32_u64) X(cvt_u32_u16) X(cvt_s32_s16) X(cvt_u16_u32) X(cvt_s32_s8) X(cvt_u32_u8) X(cvt_f32_s64) \
 X(cvt_f32_u64) X(cvt_u16_u64) X(cvt_s64_s16) X(cvt_u64_u16) X(unpack_b32) X(pack_b32) X(unpack_b64) X(pack_b64) \
 X(ld_param32) X(ld_param64) X(ld_param64_s32) X(ld_param64_u32) X(ld_param8) X(ld_param16) \
 X(ld_global) X(st_global) X(ld_shared) X(st_shared) X(atom_global) X(cp_async) X(cp_async_commit) X(cp_async_wait) \
 X(ldmatrix) X(stmatrix) X(mma) X(wgmma) X(wgmma_fence) X(wgmma_commit) X(wgmma_wait) X(fence_proxy_async) X(bar_warp_sync) X(nop) \
 X(shfl_bfly) X(shfl_idx) X(shfl_up) X(shfl_down) X(redux_add) X(redux_min_s) X(redux_max_s) X(redux_min_u) \
 X(redux_max_u) X(vote_ballot) X(vote_any) X(vote_all) X(activemask) X(bar_sync) X(bra) X(ret) X(trap)

#define FINDINGS(X) \
  X(OUT_OF_BOUNDS, "global access outside of its argument") \
  X(MISALIGNED, "misaligned global access") \
  X(UNWRITTEN, "read of global memory that nobody wrote") \
  X(RACE_WW_BLOCKS, "two blocks write one place") \
  X(RACE_RW_BLOCKS, "a block reads what another block writes") \
  X(RACE_IN_BLOCK, "threads of a block race on global memory") \
  X(SH_OUT_OF_BOUNDS, "shared access outside of the allocation") \
  X(SH_MISALIGNED, "misaligned shared access") \
  X(SH_UNWRITTEN, "read of shared memory that nobody wrote") \
  X(SH_WAW, "shared race: two warps write") \
  X(SH_RAW, "shared race: read after another's write") \
  X(SH_WAR, "shared race: write after another's read") \
  X(ASYNC_READ_EARLY, "cp.async data used before it has arrived") \
  X(ASYNC_OVERWRITTEN, "written while a cp.async is under way") \
  X(WGMMA_OVERWRITTEN, "written while a wgmma reads it") \
  X(NO_PROXY_FENCE, "no fence.proxy.async before wgmma") \
  X(SH_LANES, "shared race: lanes of a warp without a barrier") \
  X(WGMMA_REGISTER_IN_FLIGHT, "register of an unfinished wgmma touched") \
  X(WGMMA_NO_FENCE, "no wgmma.fence after a register changed") \
  X(WGMMA_FENCE_EARLY, "(harmless) wgmma.fence before a register of the left matrix changed: ptxas moves it, certify looks") \
  X(DIVERGENT, "warp-wide instruction by part of a warp") \
  X(SHFL_INACTIVE, "shfl from an inactive thread") \
  X(DEADLOCK, "threads wait for ever at a barrier") \
  X(ENDLESS, "too many instructions") \
  X(SAME_VALUE_RACE, "(harmless) two warps write the same value") \
  X(UNWAITED, "asynchronous work never waited for") \
  X(TRAP, "trap")
// clang-format on

enum Op {
#define X(name) OP_##name,
  OPS(X)
#undef X
      OP_COUNT
};
static const char* NAMES[] = {
#define X(name) #name,
    OPS(X)
#undef X
};

enum Kind {
#define X(name, text) name,
  FINDINGS(X)
#undef X
      KINDS
};
static const char* KIND_NAMES[] = {
#define X(name, text) text,
    FINDINGS(X)
#undef X
};
