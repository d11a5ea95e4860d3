// Instructions that take registers to registers, and what a launch passes as parameters: one line each.
#pragma once
#include "machine.h"

// clang-format off
#define LANES for (int t = 0; t < NT; t++)
#define OUT(type, registers, expr) { type* __restrict d_ = &registers[(size_t)a[0] * NT]; (void)d_; \
  if (all) { _Pragma("GCC ivdep") LANES { d_[t] = (expr); } } else { LANES if (m[t]) d_[t] = (expr); } return true; }
#define OUT32(expr) OUT(u32, r32, expr)
#define OUT64(expr) OUT(u64, r64, expr)
#define A32(i) const u32* x##i = &r32[(size_t)a[i] * NT];  // operand i: 32 bits
#define A64(i) const u64* y##i = &r64[(size_t)a[i] * NT];  // and 64
// 32 or 64 bits out, one to three operands of the same size in; P64_2: a predicate of two of 64 bits
#define O32_1(name, expr) case OP_##name: { A32(1) OUT32(expr) }
#define O32_2(name, expr) case OP_##name: { A32(1) A32(2) OUT32(expr) }
#define O32_3(name, expr) case OP_##name: { A32(1) A32(2) A32(3) OUT32(expr) }
#define O64_1(name, expr) case OP_##name: { A64(1) OUT64(expr) }
#define O64_2(name, expr) case OP_##name: { A64(1) A64(2) OUT64(expr) }
#define P64_2(name, expr) case OP_##name: { A64(1) A64(2) OUT32(expr) }
#define PRED(c) ((c) ? 1u : 0u)
#define FZ(x) (z ? ftz(x) : (x))
// ordered comparisons are false where an operand is NaN, unordered ones (u) true
#define CMP(name, op) O32_2(setp_##name##_f32, PRED(FZ(F(x1[t])) op FZ(F(x2[t])))) \
  O32_2(setp_##name##u_f32, PRED(!(F(x1[t]) == F(x1[t]) && F(x2[t]) == F(x2[t])) || FZ(F(x1[t])) op FZ(F(x2[t]))))

// whether the instruction was one of these
bool Machine::arithmetic(const Ins& in, const u32* m, bool all) {
  const s32* a = P.pool + in.a;
  const bool z = in.flags & 1;  // .ftz
  switch (in.op) {
    O32_2(add_s32, x1[t] + x2[t])
    O32_2(sub_s32, x1[t] - x2[t])
    O32_2(mul_lo_s32, x1[t] * x2[t])
    O32_3(mad_lo_s32, x1[t] * x2[t] + x3[t])
    O32_2(and_b32, x1[t] & x2[t])
    O32_2(or_b32, x1[t] | x2[t])
    O32_2(xor_b32, x1[t] ^ x2[t])
    O32_1(not_b32, ~x1[t])
    O32_2(shl_b32, x2[t] > 31 ? 0 : x1[t] << (x2[t] & 31))
    O32_2(shr_u32, x2[t] > 31 ? 0 : x1[t] >> (x2[t] & 31))
    O32_2(shr_s32, (u32)((s32)x1[t] >> (x2[t] > 31 ? 31 : x2[t])))
    O32_2(min_s32, (u32)std::min((s32)x1[t], (s32)x2[t]))
    O32_2(max_s32, (u32)std::max((s32)x1[t], (s32)x2[t]))
    O32_2(min_u32, std::min(x1[t], x2[t]))
    O32_2(max_u32, std::max(x1[t], x2[t]))
    O32_1(neg_s32, 0u - x1[t])
    O32_1(abs_s32, (s32)x1[t] < 0 ? 0u - x1[t] : x1[t])
    O32_3(bfe_u32, bfe_u(x1[t], x2[t], x3[t]))
    O32_3(bfe_s32, bfe_s(x1[t], x2[t], x3[t]))
    O32_2(div_s32, x2[t] == 0 ? ~0u : x2[t] == ~0u ? 0u - x1[t] : (u32)((s32)x1[t] / (s32)x2[t]))
    O32_2(div_u32, x2[t] == 0 ? ~0u : x1[t] / x2[t])
    O32_2(rem_s32, x2[t] == 0 ? x1[t] : x2[t] == ~0u ? 0u : (u32)((s32)x1[t] % (s32)x2[t]))
    O32_2(rem_u32, x2[t] == 0 ? x1[t] : x1[t] % x2[t])
    O32_2(mul_hi_u32, (u32)((u64)x1[t] * x2[t] >> 32))
    O32_2(mul_hi_s32, (u32)((s64)(s32)x1[t] * (s32)x2[t] >> 32))
    O32_3(selp_b32, x3[t] ? x1[t] : x2[t])
    O32_1(mov_b32, x1[t])
    O32_3(prmt_b32, prmt(x1[t], x2[t], x3[t]))
    O32_1(popc_b32, (u32)__builtin_popcount(x1[t]))
    O32_1(clz_b32, x1[t] ? (u32)__builtin_clz(x1[t]) : 32u)
    O32_3(shf_l_wrap_b32, (u32)((((u64)x2[t] << 32 | x1[t]) << (x3[t] & 31)) >> 32))
    O32_3(shf_r_wrap_b32, (u32)(((u64)x2[t] << 32 | x1[t]) >> (x3[t] & 31)))
    case OP_lop3_b32: { A32(1) A32(2) A32(3) A32(4) OUT32(lop3(x1[t], x2[t], x3[t], x4[t])) }
    O32_2(add_s16, (x1[t] + x2[t]) & 0xffff)
    O32_2(sub_s16, (x1[t] - x2[t]) & 0xffff)
    O32_2(mul_lo_s16, (x1[t] * x2[t]) & 0xffff)
    O32_2(and_b16, x1[t] & x2[t] & 0xffff)
    O32_2(or_b16, (x1[t] | x2[t]) & 0xffff)
    O32_2(xor_b16, (x1[t] ^ x2[t]) & 0xffff)
    O32_1(not_b16, ~x1[t] & 0xffff)
    O32_2(shl_b16, x2[t] > 15 ? 0 : (x1[t] << x2[t]) & 0xffff)
    O32_2(shr_u16, x2[t] > 15 ? 0 : (x1[t] & 0xffff) >> x2[t])
    O32_2(shr_s16, (u32)((s32)(s16)x1[t] >> std::min(x2[t], 15u)) & 0xffff)
    O32_2(min_s16, (u32)std::min((s16)x1[t], (s16)x2[t]) & 0xffff)
    O32_2(max_s16, (u32)std::max((s16)x1[t], (s16)x2[t]) & 0xffff)
    case OP_mul_wide_s32: { A32(1) A32(2) OUT64((u64)((s64)(s32)x1[t] * (s64)(s32)x2[t])) }
    case OP_mul_wide_u32: { A32(1) A32(2) OUT64((u64)x1[t] * x2[t]) }
    case OP_mad_wide_s32: { A32(1) A32(2) A64(3) OUT64((u64)((s64)(s32)x1[t] * (s64)(s32)x2[t]) + y3[t]) }
    case OP_mad_wide_u32: { A32(1) A32(2) A64(3) OUT64((u64)x1[t] * x2[t] + y3[t]) }
    O32_2(mul_wide_s16, (u32)((s32)(s16)x1[t] * (s32)(s16)x2[t]))
    O32_2(mul_wide_u16, (x1[t] & 0xffff) * (x2[t] & 0xffff))
    O64_2(add_s64, y1[t] + y2[t])
    O64_2(sub_s64, y1[t] - y2[t])
    O64_2(mul_lo_s64, y1[t] * y2[t])
    case OP_mad_lo_s64: { A64(1) A64(2) A64(3) OUT64(y1[t] * y2[t] + y3[t]) }
    O64_2(and_b64, y1[t] & y2[t])
    O64_2(or_b64, y1[t] | y2[t])
    O64_2(xor_b64, y1[t] ^ y2[t])
    O64_1(not_b64, ~y1[t])
    case OP_shl_b64: { A64(1) A32(2) OUT64(x2[t] > 63 ? 0 : y1[t] << (x2[t] & 63)) }
    case OP_shr_u64: { A64(1) A32(2) OUT64(x2[t] > 63 ? 0 : y1[t] >> (x2[t] & 63)) }
    case OP_shr_s64: { A64(1) A32(2) OUT64((u64)((s64)y1[t] >> (x2[t] > 63 ? 63 : x2[t]))) }
    O64_2(min_s64, (u64)std::min((s64)y1[t], (s64)y2[t]))
    O64_2(max_s64, (u64)std::max((s64)y1[t], (s64)y2[t]))
    O64_2(min_u64, std::min(y1[t], y2[t]))
    O64_2(max_u64, std::max(y1[t], y2[t]))
    O64_1(neg_s64, 0 - y1[t])
    O64_2(div_s64, y2[t] == 0 ? ~0ull : y2[t] == ~0ull ? 0 - y1[t] : (u64)((s64)y1[t] / (s64)y2[t]))
    O64_2(div_u64, y2[t] == 0 ? ~0ull : y1[t] / y2[t])
    O64_2(rem_s64, y2[t] == 0 ? y1[t] : y2[t] == ~0ull ? 0 : (u64)((s64)y1[t] % (s64)y2[t]))
    O64_2(rem_u64, y2[t] == 0 ? y1[t] : y1[t] % y2[t])
    O64_2(mul_hi_u64, (u64)((unsigned __int128)y1[t] * y2[t] >> 64))
    case OP_selp_b64: { A64(1) A64(2) A32(3) OUT64(x3[t] ? y1[t] : y2[t]) }
    O64_1(mov_b64, y1[t])
    O32_2(add_f32, U(FZ(FZ(F(x1[t])) + FZ(F(x2[t])))))
    O32_2(sub_f32, U(FZ(FZ(F(x1[t])) - FZ(F(x2[t])))))
    O32_2(mul_f32, U(FZ(FZ(F(x1[t])) * FZ(F(x2[t])))))
    O32_3(fma_f32, U(FZ(fmaf(FZ(F(x1[t])), FZ(F(x2[t])), FZ(F(x3[t]))))))
    O32_2(div_f32, U(FZ(FZ(F(x1[t])) / FZ(F(x2[t])))))
    O32_1(rcp_f32, U(FZ(1.f / FZ(F(x1[t])))))
    O32_1(sqrt_f32, U(FZ(sqrtf(FZ(F(x1[t]))))))
    O32_1(rsqrt_f32, U(FZ(1.f / sqrtf(FZ(F(x1[t]))))))
    O32_1(ex2_f32, U(FZ(exp2f(FZ(F(x1[t]))))))
    O32_1(lg2_f32, U(FZ(log2f(FZ(F(x1[t]))))))
    O32_1(sin_f32, U(sinf(F(x1[t]))))
    O32_1(cos_f32, U(cosf(F(x1[t]))))
    O32_1(tanh_f32, U(tanhf(F(x1[t]))))
    O32_2(max_f32, U(FZ(fmax_(F(x1[t]), F(x2[t])))))
    O32_2(min_f32, U(FZ(fmin_(F(x1[t]), F(x2[t])))))
    O32_2(max_nan_f32, U(fmaxn(F(x1[t]), F(x2[t]))))
    O32_2(min_nan_f32, U(fminn(F(x1[t]), F(x2[t]))))
    O32_1(neg_f32, U(FZ(F(x1[t] ^ 0x80000000))))
    O32_1(abs_f32, U(FZ(F(x1[t] & 0x7fffffff))))
    O32_2(copysign_f32, (x2[t] & 0x7fffffff) | (x1[t] & 0x80000000))
    O32_1(cvt_rni_f32, U(nearbyintf(FZ(F(x1[t])))))
    O32_1(cvt_rzi_f32, U(truncf(F(x1[t]))))
    O32_1(cvt_rmi_f32, U(floorf(F(x1[t]))))
    O32_1(cvt_rpi_f32, U(ceilf(F(x1[t]))))
    O32_2(setp_eq_u32, PRED(x1[t] == x2[t]))
    O32_2(setp_ne_u32, PRED(x1[t] != x2[t]))
    O32_2(setp_lt_s32, PRED((s32)x1[t] < (s32)x2[t]))
    O32_2(setp_le_s32, PRED((s32)x1[t] <= (s32)x2[t]))
    O32_2(setp_gt_s32, PRED((s32)x1[t] > (s32)x2[t]))
    O32_2(setp_ge_s32, PRED((s32)x1[t] >= (s32)x2[t]))
    O32_2(setp_lt_u32, PRED(x1[t] < x2[t]))
    O32_2(setp_le_u32, PRED(x1[t] <= x2[t]))
    O32_2(setp_gt_u32, PRED(x1[t] > x2[t]))
    O32_2(setp_ge_u32, PRED(x1[t] >= x2[t]))
    O32_2(setp_lt_s16, PRED((s16)x1[t] < (s16)x2[t]))
    O32_2(setp_le_s16, PRED((s16)x1[t] <= (s16)x2[t]))
    O32_2(setp_gt_s16, PRED((s16)x1[t] > (s16)x2[t]))
    O32_2(setp_ge_s16, PRED((s16)x1[t] >= (s16)x2[t]))
    P64_2(setp_eq_u64, PRED(y1[t] == y2[t]))
    P64_2(setp_ne_u64, PRED(y1[t] != y2[t]))
    P64_2(setp_lt_s64, PRED((s64)y1[t] < (s64)y2[t]))
    P64_2(setp_le_s64, PRED((s64)y1[t] <= (s64)y2[t]))
    P64_2(setp_gt_s64, PRED((s64)y1[t] > (s64)y2[t]))
    P64_2(setp_ge_s64, PRED((s64)y1[t] >= (s64)y2[t]))
    P64_2(setp_lt_u64, PRED(y1[t] < y2[t]))
    P64_2(setp_le_u64, PRED(y1[t] <= y2[t]))
    P64_2(setp_gt_u64, PRED(y1[t] > y2[t]))
    P64_2(setp_ge_u64, PRED(y1[t] >= y2[t]))
    CMP(eq, ==)
    CMP(lt, <)
    CMP(le, <=)
    CMP(gt, >)
    CMP(ge, >=)
    O32_2(setp_ne_f32, PRED(F(x1[t]) == F(x1[t]) && F(x2[t]) == F(x2[t]) && FZ(F(x1[t])) != FZ(F(x2[t]))))
    O32_2(setp_neu_f32, PRED(FZ(F(x1[t])) != FZ(F(x2[t]))))
    O32_2(setp_nan_f32, PRED(F(x1[t]) != F(x1[t]) || F(x2[t]) != F(x2[t])))
    O32_2(setp_num_f32, PRED(F(x1[t]) == F(x1[t]) && F(x2[t]) == F(x2[t])))
    O32_1(cvt_f32_bf16, x1[t] << 16)
    O32_1(cvt_f32_f16, U(hf(x1[t])))
    O32_2(cvt_rn_bf16x2_f32, to_bf(F(x1[t])) << 16 | to_bf(F(x2[t])))
    O32_2(cvt_rn_f16x2_f32, to_hf(F(x1[t])) << 16 | to_hf(F(x2[t])))
    O32_1(cvt_rn_bf16_f32, to_bf(F(x1[t])))
    O32_1(cvt_rn_f16_f32, to_hf(F(x1[t])))
    O32_1(cvt_rna_tf32_f32, (x1[t] & 0x7f800000) == 0x7f800000 ? x1[t] : (x1[t] + 0x1000) & 0xffffe000)
    O32_1(cvt_f32_s32, U((float)(s32)x1[t]))
    O32_1(cvt_f32_u32, U((float)x1[t]))
    O32_1(cvt_s32_f32, (u32)to_s32(FZ(F(x1[t]))))
    O32_1(cvt_u32_f32, to_u32(FZ(F(x1[t]))))
    case OP_cvt_s64_s32: { A32(1) OUT64((u64)(s64)(s32)x1[t]) }
    case OP_cvt_u64_u32: { A32(1) OUT64((u64)x1[t]) }
    case OP_cvt_s64_s16: { A32(1) OUT64((u64)(s64)(s16)x1[t]) }
    case OP_cvt_u64_u16: { A32(1) OUT64((u64)(x1[t] & 0xffff)) }
    case OP_cvt_u32_u64: { A64(1) OUT32((u32)y1[t]) }
    case OP_cvt_u16_u64: { A64(1) OUT32((u32)y1[t] & 0xffff) }
    case OP_cvt_f32_s64: { A64(1) OUT32(U((float)(s64)y1[t])) }
    case OP_cvt_f32_u64: { A64(1) OUT32(U((float)y1[t])) }
    O32_1(cvt_u32_u16, x1[t] & 0xffff)
    O32_1(cvt_s32_s16, (u32)(s32)(s16)x1[t])
    O32_1(cvt_u16_u32, x1[t] & 0xffff)
    O32_1(cvt_s32_s8, (u32)(s32)(int8_t)x1[t])
    O32_1(cvt_u32_u8, x1[t] & 0xff)
    O32_2(pack_b32, (x1[t] & 0xffff) | x2[t] << 16)
    case OP_pack_b64: { A32(1) A32(2) OUT64((u64)x2[t] << 32 | x1[t]) }
    case OP_ld_param32: { u32 v; memcpy(&v, L.params + a[1], 4); OUT32(v) }
    case OP_ld_param16: { u16 v; memcpy(&v, L.params + a[1], 2); OUT32((u32)v) }
    case OP_ld_param8: { u8 v = L.params[a[1]]; OUT32((u32)v) }
    case OP_ld_param64: { u64 v; memcpy(&v, L.params + a[1], 8); OUT64(v) }
    case OP_ld_param64_s32: { s32 v; memcpy(&v, L.params + a[1], 4); OUT64((u64)(s64)v) }
    case OP_ld_param64_u32: { u32 v; memcpy(&v, L.params + a[1], 4); OUT64((u64)v) }
    case OP_bfi_b32: { A32(1) A32(2) A32(3) A32(4) OUT32(bfi(x1[t], x2[t], x3[t], x4[t])) }
    case OP_unpack_b32: { A32(2) u32 *lo = &r32[(size_t)a[0] * NT], *hi = &r32[(size_t)a[1] * NT];
      LANES if (m[t]) { u32 v = x2[t]; lo[t] = v & 0xffff; hi[t] = v >> 16; } return true; }
    case OP_unpack_b64: { A64(2) u32 *lo = &r32[(size_t)a[0] * NT], *hi = &r32[(size_t)a[1] * NT];
      LANES if (m[t]) { u64 v = y2[t]; lo[t] = (u32)v; hi[t] = v >> 32; } return true; }
  }
  return false;
}
// clang-format on
