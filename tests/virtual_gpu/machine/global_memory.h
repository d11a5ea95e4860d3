// Global memory: bounds, alignment, what nobody wrote, and who meets whom at one place.
#pragma once
#include "machine.h"

// where an address lies on the host; null outside of the argument's tensor
inline u8* Machine::global(u64 va, u32 size, int lane, bool write, bool read) {
  u64 w = va >> 44;
  if (w == 0 || w > (u64)L.nbuf) {
    error(OUT_OF_BOUNDS, lane, va);
    return nullptr;
  }
  const Buffer& b = L.buf[w - 1];
  if (va < b.lo || va + size > b.hi) {
    error(OUT_OF_BOUNDS, lane, va - b.lo, w - 1);
    return nullptr;
  }
  if (va % size) { error(MISALIGNED, lane, va - b.lo, w - 1); }
  u8* host = b.host + (va - b.lo);
  if (!L.check) return host;
  Storage& s = L.sto[b.storage];
  u64 off = host - s.host;
  if (s.written) {
    if (write) memset(s.written + off, 1, size);
    if (read)
      for (u32 i = 0; i < size; i++)
        if (!s.written[off + i]) {
          error(UNWRITTEN, lane, va - b.lo, w - 1);
          break;
        }
  }
  GShadow& g = global_shadows[b.storage];
  if (g.w.empty()) {
    g.w.assign((s.size >> s.shift) + 1, 0);
    g.r.assign((s.size >> s.shift) + 1, 0);
  }
  u64 me = (u64)(cta + 1) << 32 | (u64)epoch << 8 | (u64)(lane / 32);
  for (u64 i = off >> s.shift; i <= (off + size - 1) >> s.shift; i++) {
    u64 lw = g.w[i], lr = g.r[i];
    if (lw) {
      if (lw >> 32 != me >> 32) error(write ? RACE_WW_BLOCKS : RACE_RW_BLOCKS, lane, va - b.lo, w - 1);
      else if (lw >> 8 == me >> 8 && lw != me) error(RACE_IN_BLOCK, lane, va - b.lo, w - 1);
    }
    if (write) {
      if (lr) {
        if (lr >> 32 != me >> 32) error(RACE_RW_BLOCKS, lane, va - b.lo, w - 1);
        else if (lr >> 8 == me >> 8 && lr != me) error(RACE_IN_BLOCK, lane, va - b.lo, w - 1);
      }
      g.w[i] = me;
    }
    if (read) {
      if (lr == 0) g.r[i] = me;
      else if (lr >> 32 != me >> 32) g.r[i] = 0xffffffffull << 32;
      else if (lr >> 8 != me >> 8) g.r[i] = me;
      else if (lr != me) g.r[i] = me | MULTI;
    }
  }
  return host;
}

// sectors of 32 bytes that the requests of all warps touch, against those they must
inline void Machine::sectors(const u64* addr, const u32* m, u32 size) {
  InsStat& st = L.stat[cur];
  for (int w = 0; w < NW; w++) {
    u64 sec[32], ad[32];
    int ns = 0, na = 0;
    for (int t = w * 32; t < w * 32 + 32; t++)
      if (m[t]) {
        u64 s = addr[t] >> 5;
        bool seen = false;
        for (int i = ns - 1; i >= 0 && !seen; i--) seen = sec[i] == s;
        if (!seen) sec[ns++] = s;
        seen = false;
        for (int i = na - 1; i >= 0 && !seen; i--) seen = ad[i] == addr[t];
        if (!seen) ad[na++] = addr[t];
      }
    st.sectors += ns;
    st.ideal += (na * size + 31) / 32;
    st.bytes += (u64)na * size;
  }
}
