// One block (CTA) of a launch at a time: registers, memories, and what is remembered of who touched what.
//
// "Granule": one or more neighbouring bytes with one shadow entry. "Epoch": how many barriers the block has passed.
// "Seq": a clock that every instruction with an order to keep moves on.
#pragma once
#include <cstring>
#include <map>
#include <vector>

#include "numbers.h"
#include "opcodes.h"

struct Error {
  Kind kind;
  s32 ins;
  u64 count;
  s64 cta;
  s32 lane;
  u64 addr;
  s64 other;
};

static const u32 MULTI = 255;  // in place of a warp: several of them
struct GShadow {
  std::vector<u64> w, r;
};  // (block + 1) << 32 | epoch << 8 | warp
struct Pending {
  s32 thread;
  u32 group;
  u32 addr;
  u32 size;
  u8 data[16];
};  // a cp.async under way
struct InFlight {
  u32 group;
  std::vector<u32> granules;
  std::vector<s32> regs;
};  // a wgmma under way

struct Machine {
  const Program& P;
  const Launch& L;
  int NT, NW;  // threads and warps of a block

  // registers, [register][thread]; predicates and halves in the 32-bit ones
  std::vector<u32> r32;
  std::vector<u64> r64;
  std::vector<u32> register_seq;  // when it was last written
  std::vector<u8> in_flight;      // an unfinished wgmma has it

  // where the threads are: 0 runs, 1 waits at a barrier, 2 has ended
  std::vector<s32> pc;
  std::vector<u8> state;
  std::vector<u32> mask, pmask;  // of the threads that run together; of those of them that the predicate lets
  bool full;
  int active;

  // shared memory, and of each of its granules
  std::vector<u8> smem, filled, arriving, wgmma_readers;
  std::vector<u32> written_epoch, read_epoch, written_seq;
  std::vector<u8> written_warp, read_warp;
  std::vector<u16> written_thread;

  std::vector<GShadow> global_shadows;  // of every storage
  std::vector<Pending> pending;
  std::vector<u32> commits;           // groups of cp.async, of every thread
  std::vector<InFlight> flights[32];  // of every warpgroup
  u32 wgmma_commits[32];
  std::vector<u32> fenced, wgmma_fenced, warp_synced;  // seq of the last fence of every warp, warpgroup, warp

  u32 epoch, seq;
  s64 cta;
  s32 ctaid[3];
  s32 cur;
  u64 executed;
  std::map<std::pair<int, int>, Error> errors;  // of a kind at an instruction: the first, and how many
  bool fatal = false;

  Machine(const Program& p, const Launch& l) : P(p), L(l), NT(l.threads), NW(l.threads / 32) {
    r32.assign((size_t)P.n32 * NT, 0xdeadbeef);
    r64.assign((size_t)P.n64 * NT, 0xdeadbeefdeadbeefull);
    mask.assign(NT, 0);
    pmask.assign(NT, 0);
    global_shadows.resize(L.nsto);
    for (int i = 0; i < P.nc32; i++) std::fill_n(&r32[(size_t)P.c32[i].reg * NT], NT, P.c32[i].value);
    for (int i = 0; i < P.nc64; i++) std::fill_n(&r64[(size_t)P.c64[i].reg * NT], NT, P.c64[i].value);
    register_seq.assign(P.n32, 0);
    in_flight.assign(P.n32, 0);
  }
  void error(Kind k, int lane, u64 addr, s64 other = -1) {
    auto& e = errors[{(int)k, cur}];
    if (!e.count++) e = {k, cur, 1, cta, lane, addr, other};
  }
  // calls f(warp) for all warps that take part, which must be whole
  template <class G>
  void warps(const u32* m, G f) {
    for (int w = 0; w < NW; w++) {
      int n = 0;
      for (int l = 0; l < 32; l++) n += m[w * 32 + l] != 0;
      if (n == 0) continue;
      if (n != 32) error(DIVERGENT, w * 32, n);
      f(w);
    }
  }

  // global_memory.h
  u8* global(u64 va, u32 size, int lane, bool write, bool read = true);
  void sectors(const u64* addr, const u32* m, u32 size);
  // shared_memory.h
  u8* shared(u32 addr, u32 size, int lane);
  void shared_read(u32 addr, u32 size, int lane, u32 warp, bool for_others = false);
  void shared_write(u32 addr, u32 size, int lane, u32 warp, const u8* value, bool issue = false, bool arrive = false);
  void banks(const u32* addr, const u32* m, u32 size);
  void arrive(const u32* m, u32 leave, bool all);
  // matrix_units.h
  void retire(int wg, u32 leave);
  void mma(const s32* a, int w, int type, int K);
  u32 described(u64 desc, int row, int k, int esize, bool transposed);
  float element(u32 at, int type, int lane, u32 warp, InFlight* f, const u32* readers);
  void wgmma(const s32* a, int wg);
  // arithmetic.h, instructions.h
  bool arithmetic(const Ins& in, const u32* m, bool all);
  int step(const Ins& in, const u32* m, bool all);
  // machine.cpp
  void run_block(s64 number);
};
