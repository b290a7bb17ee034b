// Attention over state that is read where it lies: pages, rings or plain rows, of float32, bfloat16 or scaled bytes.
//
// An entry of state is a vector of `width` channels for each key-value head; `index` [B, K] says where each of a row's entries begins, in
// units of one vector, and `positions` [B, K] which token it belongs to (negative: none). Every query is computed by itself, its keys in
// the order of the index, so that a result depends neither on the other rows nor on how many queries come at once.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "vectors.h"

namespace weft {
namespace {

constexpr int BLOCK = 128;  // slots whose softmax is taken at a time; a fixed number, so that sums are grouped alike on every machine

struct Parts {  // of a softmax over some slots, for the heads of one query: the largest score, the sum of exponentials, the weighted values
  float most[4], total[4];
};

// HEADS heads that share their keys and values, over the `count` entries at `where` (in elements). PARTS is width / 16.
template <int PARTS, int HEADS, typename S>
void attend_block(
    const float* queries, const S* keys, const S* values, const int64_t* where, int64_t count, float softcap, float* scores, Parts& parts, float* out) {
  constexpr int WIDTH = PARTS * LANES, LINE = 64 / (LANES * sizeof(S));  // parts a cache line
  Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};
  for (int64_t j = 0; j < count; ++j) {
    const S* key = keys + where[j];
    const S* ahead = keys + where[std::min(j + 8, count - 1)];
    for (int p = 0; p < PARTS; p += LINE) fetch(ahead + LANES * p);
    for (int h = 0; h < HEADS; ++h) sums[h] = zeros();
    for (int p = 0; p < PARTS; ++p) {
      const Floats k = load(key + LANES * p);
      for (int h = 0; h < HEADS; ++h) sums[h] = fma(load(queries + h * WIDTH + LANES * p), k, sums[h]);
    }
    alignas(16) float four[4];
    sum_four(sums, four);
    for (int h = 0; h < HEADS; ++h) scores[h * BLOCK + j] = four[h];
  }
  for (int h = 0; h < HEADS; ++h) {
    float* own = scores + h * BLOCK;
    float most = -INFINITY;
    for (int64_t j = 0; j < count; ++j) {
      if (softcap > 0.0f) own[j] = softcap * std::tanh(own[j] / softcap);
      most = own[j] > most ? own[j] : most;
    }
    for (int64_t j = count; j % LANES; ++j) own[j] = -INFINITY;  // fills the last vector: e^-inf adds nothing
    Floats totals = zeros();
    for (int64_t j = 0; j < count; j += LANES) {
      const Floats e = exponential(add(load(own + j), all(-most)));
      store(own + j, e);
      totals = add(totals, e);
    }
    parts.most[h] = most;
    parts.total[h] = sum(totals);
  }
  Floats y[HEADS][PARTS];
  for (int h = 0; h < HEADS; ++h)
    for (int p = 0; p < PARTS; ++p) y[h][p] = zeros();
  for (int64_t j = 0; j < count; ++j) {
    const S* value = values + where[j];
    const S* ahead = values + where[std::min(j + 8, count - 1)];
    for (int p = 0; p < PARTS; p += LINE) fetch(ahead + LANES * p);
    for (int p = 0; p < PARTS; ++p) {
      const Floats v = load(value + LANES * p);
      for (int h = 0; h < HEADS; ++h) y[h][p] = fma(all(scores[h * BLOCK + j]), v, y[h][p]);
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int p = 0; p < PARTS; ++p) store(out + h * WIDTH + LANES * p, y[h][p]);
}

struct Problem {
  int64_t batch, length, heads, groups, width, slots, window;
  float softcap;
  const int64_t *where, *when, *asked;
  int64_t key_stride, value_stride;
  int64_t blocks() const { return (slots + BLOCK - 1) / BLOCK; }
};

// The visible entries of one block, as offsets in elements.
inline int64_t visible(const Problem& problem, int64_t row, int64_t now, int64_t block, int64_t* found) {
  int64_t count = 0;
  const int64_t end = std::min(problem.slots, (block + 1) * BLOCK);
  for (int64_t j = block * BLOCK; j < end && now >= 0; ++j) {
    const int64_t then = problem.when[row * problem.slots + j];
    if (then >= 0 && then <= now && (problem.window == 0 || now - then < problem.window)) found[count++] = problem.where[row * problem.slots + j] * problem.width;
  }
  return count;
}

// Every `workers`-th unit (token, block, group, chunk of heads), from `base` on, into parts and sums [token][block][group][chunk].
template <int PARTS, int HEADS, typename S>
void attend_units(
    const Problem& problem, const float* q, const S* keys, const S* values, int64_t base, int64_t worker, int64_t workers, int64_t units, Parts* parts,
    float* sums) {
  const int64_t share = problem.heads / problem.groups, chunks = (share + HEADS - 1) / HEADS, blocks = problem.blocks();
  alignas(64) float scores[HEADS * BLOCK], queries[HEADS * PARTS * LANES];
  int64_t found[BLOCK], count = 0, last = -1;
  for (int64_t i = worker; i < units; i += workers) {
    const int64_t unit = base + i, chunk = unit % chunks, group = unit / chunks % problem.groups, place = unit / chunks / problem.groups;
    const int64_t block = place % blocks, token = place / blocks, row = token / problem.length;
    const int64_t first = group * share + chunk * HEADS, present = std::min<int64_t>(HEADS, share - chunk * HEADS);
    if (place != last) count = visible(problem, row, problem.asked[token], block, found);  // the heads of a token see the same
    last = place;
    if (count == 0) {
      for (int h = 0; h < HEADS; ++h) parts[i].most[h] = -INFINITY, parts[i].total[h] = 0.0f;
      continue;
    }
    const int64_t filled = present * problem.width;
    std::memcpy(queries, q + (token * problem.heads + first) * problem.width, filled * sizeof(float));
    std::fill(queries + filled, queries + HEADS * problem.width, 0.0f);
    attend_block<PARTS, HEADS>(
        queries, keys + group * problem.key_stride, values + group * problem.value_stride, found, count, problem.softcap, scores, parts[i],
        sums + i * HEADS * problem.width);
  }
}

// Joins the blocks of every head in their order: each is weighted by e^(its largest score - the largest of all).
template <typename T>
void join(const Problem& problem, int64_t heads_at_once, const Parts* parts, const float* sums, int64_t first, int64_t begin, int64_t end, T* out) {
  const int64_t share = problem.heads / problem.groups, chunks = (share + heads_at_once - 1) / heads_at_once, blocks = problem.blocks();
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < problem.heads; ++head) {
      const int64_t group = head / share, chunk = head % share / heads_at_once, h = head % share % heads_at_once;
      const int64_t stride = problem.groups * chunks, unit = (token - first) * blocks * stride + group * chunks + chunk;
      float most = -INFINITY, total = 0.0f;
      for (int64_t b = 0; b < blocks; ++b) most = std::max(most, parts[unit + b * stride].most[h]);
      T* to = out + (token * problem.heads + head) * problem.width;
      for (int64_t d = 0; d < problem.width; d += LANES) {
        Floats y = zeros();
        total = 0.0f;
        for (int64_t b = 0; b < blocks; ++b) {
          if (!(parts[unit + b * stride].total[h] > 0.0f)) continue;
          const float weight = std::exp(parts[unit + b * stride].most[h] - most);
          total += weight * parts[unit + b * stride].total[h];
          y = fma(all(weight), load(sums + ((unit + b * stride) * heads_at_once + h) * problem.width + d), y);
        }
        store(to + d, mul(y, all(total > 0.0f ? 1.0f / total : 0.0f)));
      }
    }
  }
}

template <int PARTS, int HEADS, typename S>
void attend_all(const Problem& problem, const float* q, const at::Tensor& keys, const at::Tensor& values, at::Tensor& out) {
  const S *k = keys.const_data_ptr<S>(), *v = values.const_data_ptr<S>();
  const int64_t share = problem.heads / problem.groups, units = problem.groups * ((share + HEADS - 1) / HEADS) * problem.blocks();  // a token
  const int64_t tokens = problem.batch * problem.length, span = std::max<int64_t>(1, 4096 / units);  // tokens whose parts are held at a time
  thread_local std::vector<Parts> own_parts;  // kept from call to call: clearing them took a twentieth of the time of a prompt
  thread_local std::vector<float> own_sums;
  own_parts.resize(std::max<size_t>(own_parts.size(), std::min(span, tokens) * units));
  own_sums.resize(std::max<size_t>(own_sums.size(), std::min(span, tokens) * units * HEADS * problem.width));
  Parts* parts = own_parts.data();
  float* sums = own_sums.data();
  for (int64_t first = 0; first < tokens; first += span) {
    const int64_t last = std::min(tokens, first + span);
    const int64_t workers = at::get_num_threads();
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {  // dealt like cards: neighbouring blocks are alike, the last ones empty
      for (int64_t worker = begin; worker < end; ++worker)
        attend_units<PARTS, HEADS, S>(problem, q, k, v, first * units, worker, workers, (last - first) * units, parts, sums);
    });
    WEFT_DISPATCH(out, T, {
      T* to = out.mutable_data_ptr<T>();
      at::parallel_for(first, last, 32, [&](int64_t begin, int64_t end) { join(problem, HEADS, parts, sums, first, begin, end, to); });
    })
  }
}

template <int PARTS, typename S, typename... Arguments>
void attend_by_share(int64_t share, Arguments&&... arguments) {
  if (share == 1) return attend_all<PARTS, 1, S>(arguments...);
  if (share == 2) return attend_all<PARTS, 2, S>(arguments...);
  if (share == 3) return attend_all<PARTS, 3, S>(arguments...);
  attend_all<PARTS, 4, S>(arguments...);
}

template <typename S, typename... Arguments>
void attend_by_width(int64_t width, Arguments&&... arguments) {
  switch (width / LANES) {
    case 1: return attend_by_share<1, S>(arguments...);
    case 2: return attend_by_share<2, S>(arguments...);
    case 3: return attend_by_share<3, S>(arguments...);
    case 4: return attend_by_share<4, S>(arguments...);
    case 6: return attend_by_share<6, S>(arguments...);
    case 8: return attend_by_share<8, S>(arguments...);
    case 16: return attend_by_share<16, S>(arguments...);
    default: TORCH_CHECK(false, "heads of ", width, " channels");
  }
}

at::Tensor attend_entries(
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, int64_t key_stride, int64_t value_stride, const at::Tensor& index,
    const at::Tensor& positions, const at::Tensor& queries, int64_t groups, double scale, int64_t window, double softcap) {
  const at::Tensor q = query.contiguous(), where = index.contiguous(), when = positions.contiguous(), asked = queries.contiguous();
  TORCH_CHECK(keys.scalar_type() == values.scalar_type(), "keys and values differ in dtype");
  at::Tensor out = at::empty(q.sizes(), q.options());
  thread_local std::vector<float> own;
  own.resize(std::max<size_t>(own.size(), q.numel()));
  float* scaled = own.data();
  WEFT_DISPATCH(q, T, {
    const T* from = q.const_data_ptr<T>();
    at::parallel_for(0, q.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) scaled[i] = static_cast<float>(from[i]) * static_cast<float>(scale);
    });
  })
  const Problem problem{
      q.size(0), q.size(1), q.size(2), groups, q.size(3), where.size(1), window, static_cast<float>(softcap),
      where.const_data_ptr<int64_t>(), when.const_data_ptr<int64_t>(), asked.const_data_ptr<int64_t>(), key_stride, value_stride};
  WEFT_DISPATCH(keys, S, { attend_by_width<S>(q.size(3), q.size(2) / groups, problem, scaled, keys, values, out); })
  return out;
}

// Turns and writes this pass's keys and values at `slots`, then attends to all that `index` and `positions` name.
at::Tensor attend(
    const at::Tensor& x, const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin, int64_t heads, const at::Tensor& keys,
    const at::Tensor& values, int64_t key_stride, int64_t value_stride, const at::Tensor& slots, const at::Tensor& index, const at::Tensor& positions,
    const at::Tensor& queries, double scale, int64_t window, double softcap) {
  const int64_t groups = (x.size(2) - heads) / 2;
  const at::Tensor q = rotate_and_write(x, cos, sin, heads, groups, x.size(3), keys, values, key_stride, value_stride, slots);
  return attend_entries(q, keys, values, key_stride, value_stride, index, positions, queries, groups, scale, window, softcap);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft_cpu, library) {
  library.def(
      "attend(Tensor x, Tensor? cos, Tensor? sin, int heads, Tensor(a!) keys, Tensor(b!) values, int key_stride, int value_stride, "
      "Tensor slots, Tensor index, Tensor positions, Tensor queries, float scale, int window, float softcap) -> Tensor");
  library.impl("attend", c10::DispatchKey::CPU, TORCH_FN(attend));
}

}  // namespace weft
