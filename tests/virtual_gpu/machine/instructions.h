// All other instructions: memory, matrix units, and what the threads of a warp do together.
#pragma once
#include "arithmetic.h"
#include "global_memory.h"
#include "matrix_units.h"

// returns 0: go on, 1: a branch, barrier or end was reached
int Machine::step(const Ins& in, const u32* m, bool all) {
  if (arithmetic(in, m, all)) return 0;
  const s32* a = P.pool + in.a;
  switch (in.op) {
    // pool: element bytes, vector length, flags (1: 64-bit registers, 2: sign), base (64-bit; shared: 32-bit), offset,
    // registers...
    case OP_ld_global:
    case OP_st_global: {
      int es = a[0], v = a[1], wide = a[2] & 1, sign = a[2] & 2;
      const u64* base = &r64[(size_t)a[3] * NT];
      s64 off = a[4];
      bool load = in.op == OP_ld_global;
      static thread_local std::vector<u64> ad;
      ad.resize(NT);
      LANES if (m[t]) {
        ad[t] = base[t] + off;
        u8* p = global(ad[t], es * v, t, !load, load);
        for (int i = 0; i < v; i++) {
          u64 x = 0;
          if (load) {
            if (p) memcpy(&x, p + i * es, es);
            else x = ~0ull;
            if (sign) x = extend(x, es);
            if (wide) r64[(size_t)a[5 + i] * NT + t] = x;
            else r32[(size_t)a[5 + i] * NT + t] = (u32)x;
          } else if (p) {
            x = wide ? r64[(size_t)a[5 + i] * NT + t] : r32[(size_t)a[5 + i] * NT + t];
            memcpy(p + i * es, &x, es);
          }
        }
      }
      if (L.stat) sectors(ad.data(), m, es * v);
      break;
    }
    // pool: kind (0: add f32, 1: add s32/u32, 2: max s32, 3: min s32, 4: exch b32, 5: cas b32), dst or -1, base,
    // offset, value, compare
    case OP_atom_global: {
      const u64* base = &r64[(size_t)a[2] * NT];
      LANES if (m[t]) {
        u64 va = base[t] + a[3];
        u64 w = va >> 44;
        if (w == 0 || w > (u64)L.nbuf || va < L.buf[w - 1].lo || va + 4 > L.buf[w - 1].hi) {
          error(OUT_OF_BOUNDS, t, va);
          continue;
        }
        if (va % 4) error(MISALIGNED, t, va);
        u8* p = L.buf[w - 1].host + (va - L.buf[w - 1].lo);
        u32 old;
        memcpy(&old, p, 4);
        u32 x = r32[(size_t)a[4] * NT + t], n = old;
        switch (a[0]) {
          case 0: n = U(F(old) + F(x)); break;
          case 1: n = old + x; break;
          case 2: n = std::max((s32)old, (s32)x); break;
          case 3: n = std::min((s32)old, (s32)x); break;
          case 4: n = x; break;
          case 5: n = old == x ? r32[(size_t)a[5] * NT + t] : old; break;
        }
        memcpy(p, &n, 4);
        if (a[1] >= 0) r32[(size_t)a[1] * NT + t] = old;
      }
      break;
    }
    case OP_ld_shared: {
      int es = a[0], v = a[1], wide = a[2] & 1, sign = a[2] & 2;
      const u32* base = &r32[(size_t)a[3] * NT];
      u32 off = a[4];
      static thread_local std::vector<u32> ad;
      ad.resize(NT);
      LANES if (m[t]) {
        u32 at = ad[t] = base[t] + off;
        u8* p = shared(at, es * v, t);
        if (p && L.check) shared_read(at, es * v, t, t / 32);
        u64 tmp[4];
        for (int i = 0; i < v; i++) {
          u64 x = 0;
          if (p) memcpy(&x, p + i * es, es);
          else x = ~0ull;
          if (sign) x = extend(x, es);
          tmp[i] = x;
        }
        for (int i = 0; i < v; i++)
          if (wide) r64[(size_t)a[5 + i] * NT + t] = tmp[i];
          else r32[(size_t)a[5 + i] * NT + t] = (u32)tmp[i];
      }
      if (L.stat) banks(ad.data(), m, es * v);
      break;
    }
    case OP_st_shared: {
      int es = a[0], v = a[1], wide = a[2] & 1;
      const u32* base = &r32[(size_t)a[3] * NT];
      u32 off = a[4];
      static thread_local std::vector<u32> ad;
      ad.resize(NT);
      seq++;
      LANES if (m[t]) {
        u32 at = ad[t] = base[t] + off;
        u8* p = shared(at, es * v, t);
        if (!p) continue;
        u8 value[16];
        for (int i = 0; i < v; i++) {
          u64 x = wide ? r64[(size_t)a[5 + i] * NT + t] : r32[(size_t)a[5 + i] * NT + t];
          memcpy(value + i * es, &x, es);
        }
        if (L.check) shared_write(at, es * v, t, t / 32, value);
        memcpy(p, value, es * v);
      }
      if (L.stat) banks(ad.data(), m, es * v);
      break;
    }
    // pool: bytes, shared base, offset, global base, offset, source bytes (register) or -1
    case OP_cp_async: {
      u32 size = a[0];
      const u32* sb = &r32[(size_t)a[1] * NT];
      const u64* gb = &r64[(size_t)a[3] * NT];
      static thread_local std::vector<u64> ad;
      ad.resize(NT);
      static thread_local std::vector<u32> rm, sa;
      rm.assign(NT, 0);
      sa.resize(NT);
      LANES if (m[t]) {
        u32 n = a[5] < 0 ? size : std::min(size, r32[(size_t)a[5] * NT + t]);
        Pending p;
        p.thread = t;
        p.group = commits[t];
        p.addr = sa[t] = sb[t] + a[2];
        p.size = size;
        memset(p.data, 0, 16);
        if (n) {
          ad[t] = gb[t] + a[4];
          rm[t] = 1;
          if (ad[t] % size) error(MISALIGNED, t, ad[t]);
          u8* g = global(ad[t], n, t, false);
          if (g) memcpy(p.data, g, n);
          else memset(p.data, 0xff, n);
        }
        if (!shared(p.addr, size, t)) continue;
        if (L.check) shared_write(p.addr, size, t, t / 32, nullptr, true);
        pending.push_back(p);
      }
      if (L.stat) sectors(ad.data(), rm.data(), size);
      break;
    }
    case OP_cp_async_commit: LANES if (m[t]) commits[t]++; break;
    case OP_cp_async_wait:
      seq++;
      arrive(m, a[0] < 0 ? 0 : a[0], a[0] < 0);
      break;

    // pool: matrices, transposed, address, offset, registers...
    case OP_ldmatrix:
    case OP_stmatrix: {
      int nm = a[0], tr = a[1];
      const u32* base = &r32[(size_t)a[2] * NT];
      bool load = in.op == OP_ldmatrix;
      seq++;
      warps(m, [&](int w) {
        u8 buf[4][8][16];
        u32 res[4][32];
        for (int j = 0; j < nm; j++) {
          u32 ad[32];
          for (int row = 0; row < 8; row++) {
            int t = w * 32 + j * 8 + row;
            u32 at = base[t] + a[3];
            ad[row] = at;
            u8* p = shared(at, 16, t);
            if (load) {
              if (p) {
                if (L.check) shared_read(at, 16, t, w, true);
                memcpy(buf[j][row], p, 16);
              } else memset(buf[j][row], 0xff, 16);
            } else {
              for (int c = 0; c < 8; c++) {
                int l = tr ? c * 4 + row / 2 : row * 4 + c / 2, h = tr ? row & 1 : c & 1;
                u16 x = r32[(size_t)a[4 + j] * NT + w * 32 + l] >> (16 * h);
                memcpy(&buf[j][row][c * 2], &x, 2);
              }
              if (p) {
                if (L.check) shared_write(at, 16, t, w, buf[j][row]);
                memcpy(p, buf[j][row], 16);
              }
            }
          }
          if (L.stat) {
            u8 in_bank[32] = {0};
            int most = 0;
            u32 seen[32];
            int n = 0;
            for (int row = 0; row < 8; row++) {
              bool dup = false;
              for (int i = 0; i < n; i++) dup |= seen[i] == ad[row];
              if (dup) continue;
              seen[n++] = ad[row];
              for (int k = 0; k < 4; k++) most = std::max<int>(most, ++in_bank[(ad[row] / 4 + k) & 31]);
            }
            L.stat[cur].sectors += most;
            L.stat[cur].ideal += 1;
            L.stat[cur].bytes += n * 16;
          }
          if (load)
            for (int l = 0; l < 32; l++) {
              u16 lo, hi;
              if (tr) {
                memcpy(&lo, &buf[j][(l & 3) * 2][(l >> 2) * 2], 2);
                memcpy(&hi, &buf[j][(l & 3) * 2 + 1][(l >> 2) * 2], 2);
              } else {
                memcpy(&lo, &buf[j][l >> 2][(l & 3) * 4], 2);
                memcpy(&hi, &buf[j][l >> 2][(l & 3) * 4 + 2], 2);
              }
              res[j][l] = (u32)hi << 16 | lo;
            }
        }
        if (load)
          for (int j = 0; j < nm; j++)
            for (int l = 0; l < 32; l++) r32[(size_t)a[4 + j] * NT + w * 32 + l] = res[j][l];
      });
      break;
    }
    case OP_mma: warps(m, [&](int w) { mma(a + 2, w, a[0], a[1]); }); break;
    case OP_wgmma: {
      for (int wg = 0; wg < NW / 4; wg++) {
        int n = 0;
        for (int t = wg * 128; t < wg * 128 + 128; t++) n += m[t] != 0;
        if (!n) continue;
        if (n != 128) error(DIVERGENT, wg * 128, n);
        wgmma(a, wg);
      }
      if (NW < 4) {
        error(DIVERGENT, 0, NW);
        fatal = true;
      }
      break;
    }
    case OP_wgmma_fence:
      for (int wg = 0; wg < NW / 4; wg++)
        if (m[wg * 128]) wgmma_fenced[wg] = ++seq;
      break;
    case OP_wgmma_commit:
      for (int wg = 0; wg < NW / 4; wg++)
        if (m[wg * 128]) wgmma_commits[wg]++;
      break;
    case OP_wgmma_wait:
      for (int wg = 0; wg < NW / 4; wg++)
        if (m[wg * 128]) retire(wg, a[0]);
      break;
    case OP_fence_proxy_async:
      seq++;
      for (int w = 0; w < NW; w++)
        if (m[w * 32]) fenced[w] = seq;
      break;
    case OP_nop: break;
    case OP_bar_warp_sync:
      seq++;
      for (int w = 0; w < NW; w++)
        if (m[w * 32]) warp_synced[w] = seq;
      break;

    // pool: dst, predicate or -1, value, b, c, member mask
    case OP_shfl_bfly:
    case OP_shfl_idx:
    case OP_shfl_up:
    case OP_shfl_down: {
      A32(2) A32(3) A32(4) A32(5) for (int w = 0; w < NW; w++) {
        u32 res[32];
        bool ok[32];
        for (int l = 0; l < 32; l++) {
          int t = w * 32 + l;
          if (!m[t]) continue;
          if (!(x5[t] >> l & 1)) error(DIVERGENT, t, x5[t]);
          s32 b = x3[t] & 31, c = x4[t] & 31, sm = x4[t] >> 8 & 31, hi = (l & sm) | (c & ~sm), lo = l & sm, j;
          bool p;
          if (in.op == OP_shfl_bfly) {
            j = l ^ b;
            p = j <= hi;
          } else if (in.op == OP_shfl_idx) {
            j = lo | (b & ~sm);
            p = j <= hi;
          } else if (in.op == OP_shfl_up) {
            j = l - b;
            p = j >= hi;
          } else {
            j = l + b;
            p = j <= hi;
          }
          if (!p) j = l;
          if (!m[w * 32 + j]) error(SHFL_INACTIVE, t, j);
          res[l] = x2[w * 32 + j];
          ok[l] = p;
        }
        for (int l = 0; l < 32; l++)
          if (m[w * 32 + l]) {
            r32[(size_t)a[0] * NT + w * 32 + l] = res[l];
            if (a[1] >= 0) r32[(size_t)a[1] * NT + w * 32 + l] = ok[l];
          }
      }
      break;
    }
    case OP_redux_add:
    case OP_redux_min_s:
    case OP_redux_max_s:
    case OP_redux_min_u:
    case OP_redux_max_u: {
      A32(1)
      warps(m, [&](int w) {
        u32 v = x1[w * 32];
        for (int l = 1; l < 32; l++) {
          u32 x = x1[w * 32 + l];
          switch (in.op) {
            case OP_redux_add: v += x; break;
            case OP_redux_min_s: v = std::min((s32)v, (s32)x); break;
            case OP_redux_max_s: v = std::max((s32)v, (s32)x); break;
            case OP_redux_min_u: v = std::min(v, x); break;
            default: v = std::max(v, x);
          }
        }
        for (int l = 0; l < 32; l++) r32[(size_t)a[0] * NT + w * 32 + l] = v;
      });
      break;
    }
    case OP_vote_ballot:
    case OP_vote_any:
    case OP_vote_all: {  // pool: dst, predicate, negated
      A32(1)
      for (int w = 0; w < NW; w++) {
        u32 bits = 0, on = 0;
        for (int l = 0; l < 32; l++)
          if (m[w * 32 + l]) {
            on |= 1u << l;
            if ((x1[w * 32 + l] != 0) != (bool)a[2]) bits |= 1u << l;
          }
        u32 v = in.op == OP_vote_ballot ? bits : in.op == OP_vote_any ? bits != 0 : bits == on;
        for (int l = 0; l < 32; l++)
          if (m[w * 32 + l]) r32[(size_t)a[0] * NT + w * 32 + l] = v;
      }
      break;
    }
    case OP_activemask:
      for (int w = 0; w < NW; w++) {
        u32 on = 0;
        for (int l = 0; l < 32; l++)
          if (m[w * 32 + l]) on |= 1u << l;
        for (int l = 0; l < 32; l++)
          if (m[w * 32 + l]) r32[(size_t)a[0] * NT + w * 32 + l] = on;
      }
      break;
    case OP_trap:
      error(TRAP, 0, 0);
      fatal = true;
      return 1;
    case OP_bar_sync:
    case OP_bra:
    case OP_ret: return 1;
    default:
      error(TRAP, 0, in.op);
      fatal = true;
      return 1;
  }
  return 0;
}
