// Shared memory of a block and what is copied into it asynchronously (cp.async).
#pragma once
#include "machine.h"

inline u8* Machine::shared(u32 addr, u32 size, int lane) {
  u32 off = addr - P.smem_base;
  if (off >= (u32)P.smem_size || off + size > (u32)P.smem_size) {
    error(SH_OUT_OF_BOUNDS, lane, off);
    return nullptr;
  }
  if (addr % size) error(SH_MISALIGNED, lane, off);
  return &smem[off];
}

inline void Machine::shared_read(u32 addr, u32 size, int lane, u32 warp, bool for_others) {
  u32 off = addr - P.smem_base;
  for (u32 i = off >> P.sm_shift; i <= (off + size - 1) >> P.sm_shift; i++) {
    if (arriving[i]) error(ASYNC_READ_EARLY, lane, i << P.sm_shift);
    else if (!filled[i]) error(SH_UNWRITTEN, lane, i << P.sm_shift);
    if (written_epoch[i] == epoch && written_warp[i] != warp) error(SH_RAW, lane, i << P.sm_shift, written_warp[i]);
    else if (written_epoch[i] == epoch && (written_thread[i] != lane || for_others) &&
             written_seq[i] > warp_synced[warp])
      error(SH_LANES, lane, i << P.sm_shift, written_thread[i]);
    if (read_epoch[i] != epoch) {
      read_epoch[i] = epoch;
      read_warp[i] = warp;
    } else if (read_warp[i] != warp) read_warp[i] = MULTI;
  }
}

inline void Machine::shared_write(u32 addr, u32 size, int lane, u32 warp, const u8* value, bool issue, bool arrive) {
  u32 off = addr - P.smem_base;
  for (u32 i = off >> P.sm_shift; i <= (off + size - 1) >> P.sm_shift; i++) {
    if (arriving[i] && !arrive) error(ASYNC_OVERWRITTEN, lane, i << P.sm_shift);
    if (wgmma_readers[i]) error(WGMMA_OVERWRITTEN, lane, i << P.sm_shift);
    if (read_epoch[i] == epoch && read_warp[i] != warp) error(SH_WAR, lane, i << P.sm_shift, read_warp[i]);
    if (written_epoch[i] == epoch && written_warp[i] != warp) {
      bool same = value && !issue;
      if (same) {
        u32 lo = std::max(off, i << P.sm_shift), hi = std::min(off + size, (i + 1) << P.sm_shift);
        same = !memcmp(value + (lo - off), &smem[lo], hi - lo);
      }
      error(same ? SAME_VALUE_RACE : SH_WAW, lane, i << P.sm_shift, written_warp[i]);
    }
    if (issue) {
      arriving[i] = 1;
    } else {
      written_epoch[i] = epoch;
      written_warp[i] = warp;
      written_thread[i] = lane;
      written_seq[i] = seq;
      filled[i] = 1;
      arriving[i] = 0;
    }
  }
}

// wavefronts that the requests of all warps take, against those they must
inline void Machine::banks(const u32* addr, const u32* m, u32 size) {
  InsStat& st = L.stat[cur];
  int group = size <= 4 ? 32 : size == 8 ? 16 : 8;
  for (int first = 0; first < NT; first += group) {
    u32 words[64];
    int n = 0;
    u8 in_bank[32] = {0};
    int most = 0;
    for (int t = first; t < first + group; t++)
      if (m[t])
        for (u32 k = 0; k < std::max(size / 4, 1u); k++) {
          u32 word = addr[t] / 4 + k;
          bool seen = false;
          for (int i = n - 1; i >= 0 && !seen; i--) seen = words[i] == word;
          if (!seen) {
            words[n++] = word;
            most = std::max<int>(most, ++in_bank[word & 31]);
          }
        }
    if (n) {
      st.sectors += most;
      st.ideal += 1;
      st.bytes += n * 4;
    }
  }
}

// the copies of these threads have arrived, but for the last `leave` groups or all
inline void Machine::arrive(const u32* m, u32 leave, bool all) {
  size_t kept = 0;
  for (auto& p : pending) {
    int t = p.thread;
    if (m[t] && (all || p.group + leave < commits[t])) {
      if (L.check) shared_write(p.addr, p.size, t, t / 32, p.data, false, true);
      memcpy(&smem[p.addr - P.smem_base], p.data, p.size);
    } else pending[kept++] = p;
  }
  pending.resize(kept);
}
