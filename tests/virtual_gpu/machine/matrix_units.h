// The matrix units: mma of one warp, wgmma of four. Products are exact, sums are taken in float32. Of a float32 number
// they read what TF32 has, and cut off the rest.
#pragma once
#include "shared_memory.h"

// ends the wgmmas of a warpgroup but for the last `leave` groups
inline void Machine::retire(int wg, u32 leave) {
  auto& f = flights[wg];
  size_t kept = 0;
  for (auto& x : f) {
    if (x.group + leave < wgmma_commits[wg]) {
      for (u32 g : x.granules) {
        wgmma_readers[g]--;
        if (read_epoch[g] != epoch) {
          read_epoch[g] = epoch;
          read_warp[g] = MULTI;
        } else read_warp[g] = MULTI;
      }
      for (s32 r : x.regs) in_flight[r] = 0;
    } else {
      if (&f[kept] != &x) f[kept] = std::move(x);
      kept++;
    }
  }
  f.resize(kept);
  for (auto& x : f)
    for (s32 r : x.regs) in_flight[r] = 1;
}

// type 0: f16, 1: bf16, 2: tf32; a: registers of d, a, b, c
inline void Machine::mma(const s32* a, int w, int type, int K) {
  float A[16][16], B[16][8];
  int na = 4, nb = 2;
  if (type != 2 && K == 8) {
    na = 2;
    nb = 1;
  }
  if (type == 2 && K == 4) {
    na = 2;
    nb = 1;
  }
  const s32 *d = a, *ra = a + 4, *rb = a + 4 + na, *c = a + 4 + na + nb;
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, q = l & 3, t = w * 32 + l;
    for (int i = 0; i < na; i++) {
      u32 x = r32[(size_t)ra[i] * NT + t];
      int row = g + (i & 1) * 8;
      if (type == 2) A[row][q + (i >> 1) * 4] = tf32(x);
      else {
        int k = q * 2 + (i >> 1) * 8;
        A[row][k] = type ? bf(x & 0xffff) : hf(x & 0xffff);
        A[row][k + 1] = type ? bf(x >> 16) : hf(x >> 16);
      }
    }
    for (int i = 0; i < nb; i++) {
      u32 x = r32[(size_t)rb[i] * NT + t];
      if (type == 2) B[q + i * 4][g] = tf32(x);
      else {
        int k = q * 2 + i * 8;
        B[k][g] = type ? bf(x & 0xffff) : hf(x & 0xffff);
        B[k + 1][g] = type ? bf(x >> 16) : hf(x >> 16);
      }
    }
  }
  float S[16][8] = {{0}};
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < K; k++)
      for (int j = 0; j < 8; j++) S[i][j] += A[i][k] * B[k][j];
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, q = l & 3, t = w * 32 + l;
    for (int i = 0; i < 4; i++)
      r32[(size_t)d[i] * NT + t] = U(F(r32[(size_t)c[i] * NT + t]) + S[g + (i >> 1) * 8][q * 2 + (i & 1)]);
  }
}

// byte address of element (row along M or N, k) of a matrix in shared memory, by its descriptor
inline u32 Machine::described(u64 desc, int row, int k, int esize, bool transposed) {
  u32 start = (desc & 0x3fff) << 4, lbo = (desc >> 16 & 0x3fff) << 4, sbo = (desc >> 32 & 0x3fff) << 4;
  int mode = desc >> 62;
  int width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;  // bytes of a swizzled row
  u32 at;
  if (!transposed) {
    u32 byte = k * esize;
    if (mode) at = start + row / 8 * sbo + row % 8 * width + byte;
    else at = start + row / 8 * sbo + byte / 16 * lbo + row % 8 * 16 + byte % 16;
  } else {
    u32 byte = row * esize;
    if (mode) at = start + byte / width * lbo + byte % width + k / 8 * sbo + k % 8 * width;
    else at = start + byte / 16 * sbo + byte % 16 + k / 8 * lbo + k % 8 * 16;
  }
  if (mode == 1) at ^= (at >> 7 & 7) << 4;
  else if (mode == 2) at ^= (at >> 7 & 3) << 4;
  else if (mode == 3) at ^= (at >> 7 & 1) << 4;
  return at;
}

// an element that a wgmma reads, and who else has it
inline float Machine::element(u32 at, int type, int lane, u32 warp, InFlight* f, const u32* readers) {
  int esize = type == 2 ? 4 : 2;
  u8* p = shared(at, esize, lane);
  if (!p) return NAN;
  u32 off = at - P.smem_base;
  for (u32 i = off >> P.sm_shift; L.check && i <= (off + esize - 1) >> P.sm_shift; i++) {
    if (arriving[i]) error(ASYNC_READ_EARLY, lane, off);
    else if (!filled[i]) error(SH_UNWRITTEN, lane, off);
    if (written_epoch[i] == epoch && written_warp[i] != warp) error(SH_RAW, lane, off, written_warp[i]);
    if (written_seq[i] > std::max(fenced[written_warp[i]], *readers)) error(NO_PROXY_FENCE, lane, off, written_warp[i]);
    if (read_epoch[i] != epoch) {
      read_epoch[i] = epoch;
      read_warp[i] = warp;
    } else if (read_warp[i] != warp) read_warp[i] = MULTI;
    wgmma_readers[i]++;
    f->granules.push_back(i);
  }
  if (type == 2) {
    u32 x;
    memcpy(&x, p, 4);
    return tf32(x);
  }
  u16 h;
  memcpy(&h, p, 2);
  return type ? bf(h) : hf(h);
}

// pool: N, K, type, A in registers, scale-d is a register, scale-d, negate a, negate b, transposed a, transposed b,
//       then d..., a (4 registers or a descriptor), b
inline void Machine::wgmma(const s32* a, int wg) {
  int N = a[0], K = a[1], type = a[2], in_regs = a[3], ta = a[8], tb = a[9], w0 = wg * 4, nd = N / 2;
  const s32* d = a + 10;
  const s32* ra = d + nd;
  s32 rb = ra[in_regs ? 4 : 1];
  u32 keep = a[4] ? r32[(size_t)a[5] * NT + w0 * 32] : (u32)a[5];
  InFlight f;
  f.group = wgmma_commits[wg];
  u32 readers = ~0u;
  for (int w = w0; w < w0 + 4; w++) readers = std::min(readers, fenced[w]);
  static thread_local std::vector<float> A, B, S;
  A.assign(64 * K, 0);
  B.assign((size_t)K * N, 0);
  S.assign((size_t)64 * N, 0);
  if (in_regs) {
    for (int w = 0; w < 4; w++)
      for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
          u32 x = r32[(size_t)ra[i] * NT + (w0 + w) * 32 + l];
          int row = w * 16 + (l >> 2) + (i & 1) * 8;
          if (type == 2) A[row * K + (l & 3) + (i >> 1) * 4] = tf32(x);
          else {
            int k = (l & 3) * 2 + (i >> 1) * 8;
            A[row * K + k] = type ? bf(x & 0xffff) : hf(x & 0xffff);
            A[row * K + k + 1] = type ? bf(x >> 16) : hf(x >> 16);
          }
        }
  } else {
    u64 desc = r64[(size_t)ra[0] * NT + w0 * 32];
    for (int m = 0; m < 64; m++)
      for (int k = 0; k < K; k++)
        A[m * K + k] =
            element(described(desc, m, k, type == 2 ? 4 : 2, ta), type, (w0 + m / 16) * 32, w0 + m / 16, &f, &readers);
  }
  u64 desc = r64[(size_t)rb * NT + w0 * 32];
  for (int n = 0; n < N; n++)
    for (int k = 0; k < K; k++)
      B[(size_t)k * N + n] = element(described(desc, n, k, type == 2 ? 4 : 2, tb), type, w0 * 32, MULTI, &f, &readers);
  if (a[6] < 0)
    for (auto& x : A) x = -x;
  if (a[7] < 0)
    for (auto& x : B) x = -x;
  for (int m = 0; m < 64; m++)
    for (int k = 0; k < K; k++) {
      float x = A[m * K + k];
      float* s = &S[(size_t)m * N];
      const float* b = &B[(size_t)k * N];
      for (int n = 0; n < N; n++) s[n] += x * b[n];
    }
  for (int w = 0; w < 4; w++)
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < nd; i++) {
        int row = w * 16 + (l >> 2) + (i >> 1 & 1) * 8, col = i / 4 * 8 + (l & 3) * 2 + (i & 1);
        u32& x = r32[(size_t)d[i] * NT + (w0 + w) * 32 + l];
        x = U((keep ? F(x) : 0.f) + S[(size_t)row * N + col]);
      }
  for (int i = 0; i < nd; i++)
    if (keep && !in_flight[d[i]] && register_seq[d[i]] > wgmma_fenced[wg]) {
      error(WGMMA_NO_FENCE, w0 * 32, d[i]);
      break;
    }
  if (in_regs)
    for (int i = 0; i < 4; i++)
      if (register_seq[ra[i]] > wgmma_fenced[wg]) {
        error(WGMMA_FENCE_EARLY, w0 * 32, ra[i]);
        break;
      }
  f.regs.assign(d, d + nd);
  if (in_regs) f.regs.insert(f.regs.end(), ra, ra + 4);
  for (s32 r : f.regs) in_flight[r] = 1;
  flights[wg].push_back(std::move(f));
}
