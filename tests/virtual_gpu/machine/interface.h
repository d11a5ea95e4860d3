// What executable.py hands over: a program, a launch of it, and room for what is counted. The same fields stand there.
#pragma once
#include <cstdint>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

// an instruction: opcode; register of its predicate or -1, whether negated; place and number of its operands in the
// pool, of the registers that it reads, and of those that it writes
struct Ins {
  s32 op, pred, neg, a, n, rr, nr, rw, nw, flags;
};
// the tensor of an argument, [lo, hi) as the kernel sees it
struct Buffer {
  u64 lo, hi;
  u8* host;
  u64 storage;
};
// its memory, with a byte for each byte that says whether it was written; null: all of it
struct Storage {
  u8* host;
  u64 size;
  u8* written;
  s32 shift;  // log2 of a granule's bytes
  s32 pad;
};
// registers that hold %tid and the like, and constants
struct Special {
  s32 reg, kind;
};
struct Const32 {
  s32 reg;
  u32 value;
};
struct Const64 {
  s32 reg, pad;
  u64 value;
};
struct Program {
  s32 nins;
  const Ins* ins;
  const s32* pool;
  s32 n32, n64;  // registers
  s32 nspecial;
  const Special* special;
  s32 nc32;
  const Const32* c32;
  s32 nc64;
  const Const64* c64;
  s32 smem_base, smem_size, sm_shift, has_wgmma;
};
// of one instruction: warps and threads that ran it; sectors (global) or wavefronts (shared) and the fewest possible
struct InsStat {
  u64 warps, lanes, sectors, ideal, bytes;
};
struct Launch {
  s32 grid[3];
  s32 threads;
  const u8* params;
  s32 nbuf;
  const Buffer* buf;
  s32 nsto;
  Storage* sto;
  u64 max_ins;    // that a block may execute
  InsStat* stat;  // or null
  s32 first_block, last_block;
  u64 *unique_read, *unique_written;  // bytes, of every storage
  s32 check;                          // for races and unwritten memory
  s32 order;                          // 1: the last block first
  s32 schedule;                       // 1, 2: one warp after the other, from the first or from the last
};
