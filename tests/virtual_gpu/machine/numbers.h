// Numbers as a GPU holds them in registers, and operations that C++ has not.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "interface.h"

static inline float F(u32 x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}
static inline u32 U(float f) {
  u32 x;
  memcpy(&x, &f, 4);
  return x;
}
static inline float bf(u32 h) { return F(h << 16); }
static inline u32 to_bf(float f) {
  u32 x = U(f);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (x + 0x7fff + ((x >> 16) & 1)) >> 16;
}
static inline float hf(u32 h) {
  _Float16 v;
  u16 s = h;
  memcpy(&v, &s, 2);
  return (float)v;
}
static inline u32 to_hf(float f) {
  _Float16 v = (_Float16)f;
  u16 s;
  memcpy(&s, &v, 2);
  if (f != f) s = 0x7fff;
  return s;
}
static inline float tf32(u32 x) { return F(x & 0xffffe000); }
static inline u64 extend(u64 x, int bytes) { return (u64)((s64)(x << (64 - 8 * bytes)) >> (64 - 8 * bytes)); }
static inline float ftz(float f) {
  u32 x = U(f);
  return (x & 0x7f800000) == 0 ? F(x & 0x80000000) : f;
}
static inline u32 bfe_u(u32 a, u32 pos, u32 len) {
  pos &= 255;
  len &= 255;
  if (pos > 31 || !len) return 0;
  u32 v = a >> pos;
  return len >= 32 ? v : v & ((1u << len) - 1);
}
static inline u32 bfe_s(u32 a, u32 pos, u32 len) {
  pos &= 255;
  len &= 255;
  if (!len) return 0;
  u32 top = std::min(pos + len - 1, 31u), sign = (a >> top) & 1, v = 0;
  for (u32 i = 0; i < 32; i++) {
    u32 bit = (i < len && pos + i <= 31) ? (a >> (pos + i)) & 1 : sign;
    v |= bit << i;
  }
  return v;
}
static inline u32 bfi(u32 a, u32 b, u32 pos, u32 len) {
  pos &= 255;
  len &= 255;
  if (pos > 31 || !len) return b;
  u32 k = (len >= 32 ? ~0u : (1u << len) - 1) << pos;
  return (b & ~k) | (a << pos & k);
}
static inline u32 prmt(u32 a, u32 b, u32 s) {
  u64 x = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 c = s >> (4 * i) & 15;
    u8 v = x >> (8 * (c & 7));
    if (c & 8) v = (v & 0x80) ? 0xff : 0;
    r |= (u32)v << (8 * i);
  }
  return r;
}
static inline u32 lop3(u32 a, u32 b, u32 c, u32 lut) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if (lut >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
static inline float fmax_(float a, float b) { return a != a ? b : b != b ? a : a > b ? a : b; }
static inline float fmin_(float a, float b) { return a != a ? b : b != b ? a : a < b ? a : b; }
static inline float fmaxn(float a, float b) { return a != a || b != b ? F(0x7fffffff) : a > b ? a : b; }
static inline float fminn(float a, float b) { return a != a || b != b ? F(0x7fffffff) : a < b ? a : b; }
static inline s32 to_s32(float f) {
  return f != f ? 0 : f >= 2147483648.f ? 2147483647 : f <= -2147483648.f ? (s32)0x80000000 : (s32)f;
}
static inline u32 to_u32(float f) { return f != f || f <= 0 ? 0 : f >= 4294967296.f ? ~0u : (u32)f; }
