// Executes PTX that instructions.py has turned into numbered instructions: one block (CTA) at a time, every instruction
// for all threads of the block at once, with the checks a GPU does not make.
//
// Threads that part at a branch are run by the smallest program counter first, so they meet again where the code does.
#include "instructions.h"

void Machine::run_block(s64 number) {
  cta = number;
  ctaid[0] = number % L.grid[0];
  ctaid[1] = number / L.grid[0] % L.grid[1];
  ctaid[2] = number / L.grid[0] / L.grid[1];
  for (int i = 0; i < P.nspecial; i++) {
    u32* d = &r32[(size_t)P.special[i].reg * NT];
    int k = P.special[i].kind;
    LANES d[t] = k == 0             ? t
                 : k == 1 || k == 2 ? 0
                 : k < 6            ? ctaid[k - 3]
                 : k < 9            ? L.grid[k - 6]
                 : k == 9           ? NT
                 : k < 12           ? 1
                 : k == 12          ? t & 31
                                    : t / 32;
  }
  size_t ng = (P.smem_size >> P.sm_shift) + 2;
  smem.assign(P.smem_size + 16, 0xff);
  filled.assign(ng, 0);
  written_epoch.assign(ng, 0);
  read_epoch.assign(ng, 0);
  written_seq.assign(ng, 0);
  written_warp.assign(ng, 0);
  read_warp.assign(ng, 0);
  arriving.assign(ng, 0);
  wgmma_readers.assign(ng, 0);
  written_thread.assign(ng, 0);
  pending.clear();
  commits.assign(NT, 0);
  fenced.assign(256, 0);
  wgmma_fenced.assign(32, 0);
  warp_synced.assign(256, 0);
  for (int i = 0; i < 32; i++) {
    flights[i].clear();
    wgmma_commits[i] = 0;
  }
  std::fill(register_seq.begin(), register_seq.end(), 0);
  std::fill(in_flight.begin(), in_flight.end(), 0);
  pc.assign(NT, 0);
  state.assign(NT, 0);
  epoch = 1;
  seq = 1;
  executed = 0;
  while (!fatal) {
    const int NONE = 1 << 30;
    int low = NONE, next = NONE;
    int from = 0, to = NT;
    if (L.schedule) {  // one warp (warp group) after the other, each as far as it gets alone
      int size = P.has_wgmma ? 128 : 32, groups = NT / size;
      for (int i = 0; i < groups; i++) {
        int g = L.schedule == 1 ? i : groups - 1 - i;
        bool runs = false;
        for (int t = g * size; t < g * size + size; t++) runs |= !state[t];
        if (runs) {
          from = g * size;
          to = from + size;
          break;
        }
      }
    }
    for (int t = from; t < to; t++)
      if (!state[t]) {
        if (pc[t] < low) {
          next = low;
          low = pc[t];
        } else if (pc[t] > low && pc[t] < next) next = pc[t];
      }
    if (low == NONE) {
      int waiting = 0, left = 0;
      LANES {
        waiting += state[t] == 1;
        left += state[t] != 2;
      }
      if (!waiting) break;
      if (waiting == left) {
        LANES if (state[t] == 1) state[t] = 0;
        epoch++;
        continue;
      }
      error(DEADLOCK, 0, waiting);
      break;
    }
    active = 0;
    LANES {
      bool on = t >= from && t < to && !state[t] && pc[t] == low;
      mask[t] = on ? ~0u : 0;
      active += on;
    }
    full = active == NT;
    cur = low;
    for (;;) {
      const Ins& in = P.ins[cur];
      if (++executed > L.max_ins) {
        error(ENDLESS, 0, 0);
        fatal = true;
        break;
      }
      const u32* m = mask.data();
      bool all = full;
      int lanes = active;
      if (in.pred >= 0 && in.op != OP_bra) {
        const u32* p = &r32[(size_t)in.pred * NT];
        lanes = 0;
        u32 inv = in.neg ? 1 : 0;
        LANES {
          u32 v = mask[t] && ((p[t] != 0) != inv) ? ~0u : 0;
          pmask[t] = v;
          lanes += v & 1;
        }
        m = pmask.data();
        all = lanes == NT;
      }
      if (L.stat && lanes) {
        InsStat& st = L.stat[cur];
        st.lanes += lanes;
        if (all) st.warps += NW;
        else
          for (int w = 0; w < NW; w++) {
            bool on = false;
            for (int l = 0; l < 32; l++) on |= m[w * 32 + l] != 0;
            st.warps += on;
          }
      }
      if (in.op == OP_bra) {
        if (in.pred < 0) {
          int target = P.pool[in.a];
          if (next == NONE) {
            cur = target;
            continue;
          }
          LANES if (mask[t]) pc[t] = target;
          break;
        }
        const u32* p = &r32[(size_t)in.pred * NT];
        int target = P.pool[in.a], taken = 0;
        LANES if (mask[t]) {
          bool go = (p[t] != 0) != (bool)in.neg;
          pc[t] = go ? target : cur + 1;
          taken += go;
        }
        if (next == NONE && taken == active) {
          cur = target;
          continue;
        }
        if (next == NONE && taken == 0) {
          cur++;
          continue;
        }
        break;
      }
      if (in.op == OP_ret) {
        if (lanes == 0) {
          cur++;
          continue;
        }
        LANES if (mask[t]) {
          if (m[t]) state[t] = 2;
          else pc[t] = cur + 1;
        }
        break;
      }
      if (in.op == OP_bar_sync) {
        if (lanes == 0) {
          cur++;
          continue;
        }
        if (lanes == NT) {
          epoch++;
          cur++;
          if (cur == next) {
            LANES if (mask[t]) pc[t] = cur;
            break;
          }
          continue;
        }
        LANES if (mask[t]) {
          pc[t] = cur + 1;
          if (m[t]) state[t] = 1;
        }
        break;
      }
      if (lanes) {
        if (P.has_wgmma && in.op != OP_wgmma) {
          const s32* rr = P.pool + in.rr;
          const s32* rw = P.pool + in.rw;
          for (int i = 0; i < in.nr; i++)
            if (in_flight[rr[i]]) {
              error(WGMMA_REGISTER_IN_FLIGHT, 0, rr[i], 0);
              break;
            }
          for (int i = 0; i < in.nw; i++) {
            if (in_flight[rw[i]]) error(WGMMA_REGISTER_IN_FLIGHT, 0, rw[i], 1);
            register_seq[rw[i]] = ++seq;
          }
        }
        if (step(in, m, all)) { break; }
      }
      cur++;
      if (cur == next) {
        LANES if (mask[t]) pc[t] = cur;
        break;
      }
    }
  }
  if (!pending.empty()) error(UNWAITED, pending[0].thread, pending[0].addr);
}

extern "C" {
int vg_ops() { return OP_COUNT; }
const char* vg_op(int i) { return NAMES[i]; }
int vg_kinds() { return KINDS; }
const char* vg_kind(int i) { return KIND_NAMES[i]; }
// fills `out` with up to `room` errors as rows of 7 numbers; returns how many there were
int vg_run(const Program* p, const Launch* l, s64* out, int room) {
  Machine m(*p, *l);
  s64 total = (s64)l->grid[0] * l->grid[1] * l->grid[2],
      last = l->last_block < 0 ? total : std::min<s64>(total, l->last_block);
  for (s64 b = l->first_block; b < last && !m.fatal; b++) m.run_block(l->order ? last - 1 - (b - l->first_block) : b);
  for (int i = 0; i < l->nsto; i++) {
    u64 r = 0, w = 0;
    for (u64 x : m.global_shadows[i].r) r += x != 0;
    for (u64 x : m.global_shadows[i].w) w += x != 0;
    l->unique_read[i] = r << l->sto[i].shift;
    l->unique_written[i] = w << l->sto[i].shift;
  }
  int n = 0;
  for (auto& e : m.errors)
    if (n < room) {
      s64* row = out + 7 * n++;
      const Error& x = e.second;
      row[0] = x.kind;
      row[1] = x.ins;
      row[2] = x.count;
      row[3] = x.cta;
      row[4] = x.lane;
      row[5] = x.addr;
      row[6] = x.other;
    }
  return n;
}
}
