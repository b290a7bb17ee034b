// y = x W^T for weights of 4 or 8 bits, read as they lie: dequantised in no place, rounded in no place.
//
// Layout of W [N, K] ("tiles"): for every 16 rows and every group of 32 columns one tile, its bytes in the order they are consumed.
//   8 bits   tile[c][row][i]           = code[row][4 c + i]                 c = 0..7
//   4 bits   tile[c][row][i] low  half = code[row][8 c + i], high = code[row][8 c + 4 + i]     c = 0..3
// The weight is scale * (code - offset) + minimum, one scale (and minimum) a row and group, stored [N / 16][K / 32][16].
//
// An activation row is split in groups of 32 too, x = s (254 high + low) with two signed bytes: 16 bits of precision, so that products
// are exact integers and the only rounding is that of x itself, 1 part in 64,000 of the group's largest. A row's result never depends
// on the other rows: integer sums have no order, and groups are added in theirs.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "vectors.h"

namespace weft {
namespace {

constexpr int GROUP = 32;
constexpr float STEP = 254.0f;    // what the high byte counts in units of the low one
constexpr float MOST = 32258.0f;  // 127 * 254: the largest |254 high + low| used

struct Activations {  // rows of x, quantised
  std::vector<int8_t> high, low;
  std::vector<float> scale, total;  // a group: s, and s * sum(254 high + low)
};

template <typename T>
void quantise_row(const T* x, int64_t groups, int8_t* high, int8_t* low, float* scale, float* total) {
  for (int64_t g = 0; g < groups; ++g, x += GROUP, high += GROUP, low += GROUP) {
    const Floats a = load(x), b = load(x + LANES);
    const float most = largest(max(abs(a), abs(b)));
    const Floats inverse = all(most > 0.0f ? MOST / most : 0.0f);
    const int32_t codes = split(mul(a, inverse), high, low) + split(mul(b, inverse), high + LANES, low + LANES);
    scale[g] = most / MOST;
    total[g] = scale[g] * static_cast<float>(codes);
  }
}

struct Weights {
  const uint8_t* tiles;
  const c10::Half* scale;
  const c10::Half* minimum;  // or null
  float offset;
  int64_t blocks, groups;
};

#if WEFT_AVX512

inline __m512i spread(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// 16 columns of y for R rows of x. For a few rows the weights come from memory faster than they are multiplied if they are asked for early.
template <int BITS, int R>
void multiply(const Weights& w, int64_t block, const Activations& x, int64_t row, Floats* y) {
  constexpr int BYTES = GROUP * LANES * BITS / 8, SPAN = BITS == 8 ? 4 : 8;  // columns in a chunk of 64 bytes
  constexpr int AHEAD = 2048;
  const uint8_t* tile = w.tiles + block * w.groups * BYTES;
  const int64_t width = w.groups * GROUP;
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int r = 0; r < R; ++r) y[r] = zeros();
  for (int64_t g = 0; g < w.groups; ++g, tile += BYTES) {
    __m512i high[R], low[R];
    for (int r = 0; r < R; ++r) high[r] = low[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int c = 0; c < GROUP / SPAN; ++c) {
      const __m512i bytes = _mm512_loadu_si512(tile + 64 * c);
      if (R <= 2) fetch(tile + 64 * c + AHEAD);
#pragma GCC unroll 2
      for (int half = 0; half < SPAN / 4; ++half) {
        const __m512i codes = BITS == 8 ? bytes : _mm512_and_si512(half ? _mm512_srli_epi16(bytes, 4) : bytes, nibble);
        for (int r = 0; r < R; ++r) {
          const int64_t at = (row + r) * width + g * GROUP + SPAN * c + 4 * half;
          high[r] = _mm512_dpbusd_epi32(high[r], codes, spread(&x.high[at]));
          low[r] = _mm512_dpbusd_epi32(low[r], codes, spread(&x.low[at]));
        }
      }
    }
    const int64_t at = (block * w.groups + g) * LANES;
    const Floats scale = load(w.scale + at);
    const Floats minimum = w.minimum ? load(w.minimum + at) : zeros();
    for (int r = 0; r < R; ++r) {
      const int64_t group = (row + r) * w.groups + g;
      const Floats dot = fma(_mm512_cvtepi32_ps(high[r]), all(STEP), _mm512_cvtepi32_ps(low[r]));
      y[r] = fma(fma(dot, all(x.scale[group]), all(-w.offset * x.total[group])), scale, y[r]);
      if (w.minimum) y[r] = fma(minimum, all(x.total[group]), y[r]);
    }
  }
}

#else

template <int BITS, int R>
void multiply(const Weights& w, int64_t block, const Activations& x, int64_t row, Floats* y) {
  constexpr int BYTES = GROUP * LANES * BITS / 8;
  const int64_t width = w.groups * GROUP;
  for (int r = 0; r < R; ++r) {
    const uint8_t* tile = w.tiles + block * w.groups * BYTES;
    y[r] = zeros();
    for (int64_t g = 0; g < w.groups; ++g, tile += BYTES) {
      int32_t dots[LANES] = {};
      for (int k = 0; k < GROUP; ++k) {
        const int64_t at = (row + r) * width + g * GROUP + k;
        const int32_t code = 254 * x.high[at] + x.low[at];
        const int chunk = BITS == 8 ? k / 4 : k / 8, shift = BITS == 8 ? 0 : 4 * (k / 4 % 2);
        for (int n = 0; n < LANES; ++n) dots[n] += code * (tile[64 * chunk + 4 * n + k % 4] >> shift & (BITS == 8 ? 255 : 15));
      }
      const int64_t at = (block * w.groups + g) * LANES, group = (row + r) * w.groups + g;
      for (int n = 0; n < LANES; ++n) {
        const float scaled = dots[n] * x.scale[group] - w.offset * x.total[group];
        y[r].lane[n] += scaled * static_cast<float>(w.scale[at + n]);
        if (w.minimum) y[r].lane[n] += static_cast<float>(w.minimum[at + n]) * x.total[group];
      }
    }
  }
}

#endif

template <int BITS, int R, typename T>
void multiply_rows(const Weights& w, int64_t block, const Activations& x, int64_t row, T* out) {
  Floats y[R];
  multiply<BITS, R>(w, block, x, row, y);
  for (int r = 0; r < R; ++r) store(out + ((row + r) * w.blocks + block) * LANES, y[r]);
}

template <int BITS, typename T>
void multiply_blocks(const Weights& w, int64_t begin, int64_t end, const Activations& x, int64_t rows, T* out) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6) multiply_rows<BITS, 6>(w, block, x, row, out);
    switch (rows - row) {
      case 5: multiply_rows<BITS, 5>(w, block, x, row, out); break;
      case 4: multiply_rows<BITS, 4>(w, block, x, row, out); break;
      case 3: multiply_rows<BITS, 3>(w, block, x, row, out); break;
      case 2: multiply_rows<BITS, 2>(w, block, x, row, out); break;
      case 1: multiply_rows<BITS, 1>(w, block, x, row, out); break;
      default: break;
    }
  }
}

Weights weights_of(const at::Tensor& tiles, const at::Tensor& scale, const std::optional<at::Tensor>& minimum, double offset) {
  return {
      tiles.const_data_ptr<uint8_t>(), scale.const_data_ptr<c10::Half>(), minimum ? minimum->const_data_ptr<c10::Half>() : nullptr,
      static_cast<float>(offset), tiles.size(0), tiles.size(1)};
}

at::Tensor multiply_all(const at::Tensor& input, const Weights& w, int64_t bits) {
  const at::Tensor x = input.contiguous();
  const int64_t width = x.size(-1), groups = width / GROUP, rows = x.numel() / width, outputs = w.blocks * LANES;
  TORCH_CHECK(width == w.groups * GROUP, "x [..., ", width, "] does not fit weights of ", w.groups, " groups of 32");
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  at::Tensor y = at::empty(sizes, x.options());
  thread_local Activations own;
  own.high.resize(rows * width);
  own.low.resize(rows * width);
  own.scale.resize(rows * groups);
  own.total.resize(rows * groups);
  Activations& act = own;  // the other threads work on this one's
  WEFT_DISPATCH(x, T, {
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        quantise_row(from + r * width, groups, &act.high[r * width], &act.low[r * width], &act.scale[r * groups], &act.total[r * groups]);
    });
    at::parallel_for(0, w.blocks, 4, [&](int64_t begin, int64_t end) {
      bits == 4 ? multiply_blocks<4>(w, begin, end, act, rows, to) : multiply_blocks<8>(w, begin, end, act, rows, to);
    });
  })
  return y;
}

at::Tensor quantised_linear(
    const at::Tensor& x, const at::Tensor& tiles, const at::Tensor& scale, const std::optional<at::Tensor>& minimum, int64_t bits, double offset) {
  return multiply_all(x, weights_of(tiles, scale, minimum, offset), bits);
}

// down(silu(gate) * up) where one weight holds gate and up: three steps in one call.
at::Tensor gated_mlp(
    const at::Tensor& x, const at::Tensor& tiles, const at::Tensor& scale, const std::optional<at::Tensor>& minimum, int64_t bits, double offset,
    const at::Tensor& down_tiles, const at::Tensor& down_scale, const std::optional<at::Tensor>& down_minimum) {
  const at::Tensor both = multiply_all(x, weights_of(tiles, scale, minimum, offset), bits);
  return multiply_all(silu_gate(both), weights_of(down_tiles, down_scale, down_minimum, offset), bits);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft_cpu, library) {
  library.def(
      "gated_mlp(Tensor x, Tensor tiles, Tensor scale, Tensor? minimum, int bits, float offset, Tensor down_tiles, Tensor down_scale, "
      "Tensor? down_minimum) -> Tensor");
  library.impl("gated_mlp", c10::DispatchKey::CPU, TORCH_FN(gated_mlp));
  library.def("quantised_linear(Tensor x, Tensor tiles, Tensor scale, Tensor? minimum, int bits, float offset) -> Tensor");
  library.impl("quantised_linear", c10::DispatchKey::CPU, TORCH_FN(quantised_linear));
}

}  // namespace weft
