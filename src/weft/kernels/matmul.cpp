// y = x W^T for weights of 4 or 8 bits, read as they lie: dequantised in no place, rounded in no place.
//
// Layout of W [N, K] ("tiles"): for every 16 rows and every group of 32 columns one tile, its bytes in the order they are consumed.
//   8 bits   tile[c][row][i]           = code[row][4 c + i]                 c = 0..7
//   4 bits   tile[c][row][i] low  half = code[row][8 c + i], high = code[row][8 c + 4 + i]     c = 0..3
// The weight is scale * (code - offset) + minimum, one scale (and minimum) a row and group, stored [N / 16][K / 32][16].
//
// An activation row is split in groups of 32 too, x = s (254 high + low) with two signed bytes: 16 bits of precision, so that products
// are exact integers and the only rounding is that of x itself, 1 part in 64,000 of the group's largest. A coarse product has x = s high,
// 1 part in 254, and half the work. A row's result never depends on the other rows: integer sums have no order, and groups are added in
// theirs.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "vectors.h"

namespace weft {
namespace {

constexpr int GROUP = 32;
constexpr float STEP = 254.0f;    // what the high byte counts in units of the low one
constexpr float MOST = 32258.0f;  // 127 * 254: the largest |254 high + low| used

// Rows that are multiplied together. What they are read for lies in the order it is read: `bytes` [K / 4][digit][row][4], `scale` (s) and
// `total` (the sum of a group's numbers) [K / 32][row]. Digit 0 is high, 1 is low.
struct Rows {
  int64_t first;
  int size;
  int8_t* bytes;
  float *scale, *total;
};

struct Activations {
  std::vector<int8_t> bytes;
  std::vector<float> scale, total;
  std::vector<Rows> parts;

  void divide(int64_t rows, int64_t width, int digits, int most) {  // into parts of most, most / 2, ... 1 rows
    bytes.resize(rows * width * digits);
    scale.resize(rows * width / GROUP);
    total.resize(rows * width / GROUP);
    parts.clear();
    for (int64_t row = 0; row < rows; row += parts.back().size) {
      while (most > rows - row) most /= 2;
      parts.push_back({row, most, bytes.data() + row * width * digits, scale.data() + row * width / GROUP, total.data() + row * width / GROUP});
    }
  }
};

template <typename T>
void quantise_row(const T* x, int64_t groups, int digits, const Rows& rows, int row) {
  for (int64_t g = 0; g < groups; ++g, x += GROUP) {
    alignas(64) int8_t codes[2][GROUP];
    const Floats a = load(x), b = load(x + LANES);
    const float most = largest(max(abs(a), abs(b))), levels = digits == 1 ? 127.0f : MOST;
    const Floats inverse = all(most > 0.0f ? levels / most : 0.0f);
    const int32_t sum = digits == 1 ? narrow(mul(a, inverse), codes[0]) + narrow(mul(b, inverse), codes[0] + LANES)
                                    : split(mul(a, inverse), codes[0], codes[1]) + split(mul(b, inverse), codes[0] + LANES, codes[1] + LANES);
    const float scale = most / levels + weft::sum(mul(add(a, b), all(0.0f)));  // not a number where one of x is none: integers would hide it
    rows.scale[g * rows.size + row] = scale;
    rows.total[g * rows.size + row] = scale * static_cast<float>(sum);
    for (int64_t c = 0; c < GROUP / 4; ++c)
      for (int d = 0; d < digits; ++d) std::memcpy(rows.bytes + (((g * GROUP / 4 + c) * digits + d) * rows.size + row) * 4, codes[d] + 4 * c, 4);
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
template <int BITS, int R, bool COARSE>
void multiply(const Weights& w, int64_t block, const Rows& x, Floats* y) {
  constexpr int BYTES = GROUP * LANES * BITS / 8, SPAN = BITS == 8 ? 4 : 8;  // columns in a chunk of 64 bytes
  constexpr int DIGITS = COARSE ? 1 : 2, AHEAD = 2048;
  const uint8_t* tile = w.tiles + block * w.groups * BYTES;
  const int8_t* from = x.bytes;
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int r = 0; r < R; ++r) y[r] = zeros();
  for (int64_t g = 0; g < w.groups; ++g, tile += BYTES) {
    __m512i high[R], low[R];
    for (int r = 0; r < R; ++r) high[r] = low[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int c = 0; c < GROUP / SPAN; ++c) {
      const __m512i bytes = _mm512_loadu_si512(tile + 64 * c);
      if (R <= 3) fetch(tile + 64 * c + AHEAD);
#pragma GCC unroll 2
      for (int half = 0; half < SPAN / 4; ++half, from += 4 * R * DIGITS) {
        const __m512i codes = BITS == 8 ? bytes : _mm512_and_si512(half ? _mm512_srli_epi16(bytes, 4) : bytes, nibble);
        for (int r = 0; r < R; ++r) {
          high[r] = _mm512_dpbusd_epi32(high[r], codes, spread(from + 4 * r));
          if constexpr (!COARSE) low[r] = _mm512_dpbusd_epi32(low[r], codes, spread(from + 4 * (R + r)));
        }
      }
    }
    const int64_t at = (block * w.groups + g) * LANES;
    const Floats scale = load(w.scale + at);
    const Floats minimum = w.minimum ? load(w.minimum + at) : zeros();
    for (int r = 0; r < R; ++r) {
      Floats dot = _mm512_cvtepi32_ps(high[r]);
      if constexpr (!COARSE) dot = fma(dot, all(STEP), _mm512_cvtepi32_ps(low[r]));
      const float total = x.total[g * R + r];
      y[r] = fma(fma(dot, all(x.scale[g * R + r]), all(-w.offset * total)), scale, y[r]);
      if (w.minimum) y[r] = fma(minimum, all(total), y[r]);
    }
  }
}

#else

template <int BITS, int R, bool COARSE>
void multiply(const Weights& w, int64_t block, const Rows& x, Floats* y) {
  constexpr int BYTES = GROUP * LANES * BITS / 8, DIGITS = COARSE ? 1 : 2;
  for (int r = 0; r < R; ++r) {
    const uint8_t* tile = w.tiles + block * w.groups * BYTES;
    y[r] = zeros();
    for (int64_t g = 0; g < w.groups; ++g, tile += BYTES) {
      int32_t dots[LANES] = {};
      for (int k = 0; k < GROUP; ++k) {
        const int8_t* from = x.bytes + ((g * GROUP + k) / 4 * DIGITS * R + r) * 4 + k % 4;
        const int32_t code = COARSE ? from[0] : 254 * from[0] + from[4 * R];
        const int chunk = BITS == 8 ? k / 4 : k / 8, shift = BITS == 8 ? 0 : 4 * (k / 4 % 2);
        for (int n = 0; n < LANES; ++n) dots[n] += code * (tile[64 * chunk + 4 * n + k % 4] >> shift & (BITS == 8 ? 255 : 15));
      }
      const int64_t at = (block * w.groups + g) * LANES;
      const float total = x.total[g * R + r];
      for (int n = 0; n < LANES; ++n) {
        const float scaled = dots[n] * x.scale[g * R + r] - w.offset * total;
        y[r].lane[n] += scaled * static_cast<float>(w.scale[at + n]);
        if (w.minimum) y[r].lane[n] += static_cast<float>(w.minimum[at + n]) * total;
      }
    }
  }
}

#endif

template <int BITS, int R, bool COARSE, typename T>
void multiply_rows(const Weights& w, int64_t block, const Rows& x, T* out) {
  Floats y[R];
  multiply<BITS, R, COARSE>(w, block, x, y);
  for (int r = 0; r < R; ++r) store(out + ((x.first + r) * w.blocks + block) * LANES, y[r]);
}

// As many rows at a time as accumulators fit in registers: 6, or 12 where one of two accumulators is enough.
template <int BITS, bool COARSE, typename T>
void multiply_blocks(const Weights& w, int64_t begin, int64_t end, const Activations& x, T* out) {
  for (int64_t block = begin; block < end; ++block) {
    for (const Rows& rows : x.parts) {
      switch (rows.size) {
        case 12: multiply_rows<BITS, COARSE ? 12 : 1, COARSE>(w, block, rows, out); break;
        case 6: multiply_rows<BITS, 6, COARSE>(w, block, rows, out); break;
        case 3: multiply_rows<BITS, 3, COARSE>(w, block, rows, out); break;
        default: multiply_rows<BITS, 1, COARSE>(w, block, rows, out);
      }
    }
  }
}

Weights weights_of(const at::Tensor& tiles, const at::Tensor& scale, const std::optional<at::Tensor>& minimum, double offset) {
  return {
      tiles.const_data_ptr<uint8_t>(), scale.const_data_ptr<c10::Half>(), minimum ? minimum->const_data_ptr<c10::Half>() : nullptr,
      static_cast<float>(offset), tiles.size(0), tiles.size(1)};
}

at::Tensor multiply_all(const at::Tensor& input, const Weights& w, int64_t bits, bool coarse) {
  const at::Tensor x = input.contiguous();
  const int64_t width = x.size(-1), groups = width / GROUP, rows = x.numel() / width, outputs = w.blocks * LANES;
  TORCH_CHECK(width == w.groups * GROUP, "x [..., ", width, "] does not fit weights of ", w.groups, " groups of 32");
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  at::Tensor y = at::empty(sizes, x.options());
  thread_local Activations own;
  Activations& act = own;  // the other threads work on this one's
  const int digits = coarse ? 1 : 2;
  act.divide(rows, width, digits, coarse ? 12 : 6);
  WEFT_DISPATCH(x, T, {
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    at::parallel_for(0, static_cast<int64_t>(act.parts.size()), 4, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int r = 0; r < act.parts[p].size; ++r) quantise_row(from + (act.parts[p].first + r) * width, groups, digits, act.parts[p], r);
    });
    at::parallel_for(0, w.blocks, 4, [&](int64_t begin, int64_t end) {
      if (bits == 4)
        coarse ? multiply_blocks<4, true>(w, begin, end, act, to) : multiply_blocks<4, false>(w, begin, end, act, to);
      else
        coarse ? multiply_blocks<8, true>(w, begin, end, act, to) : multiply_blocks<8, false>(w, begin, end, act, to);
    });
  })
  return y;
}

at::Tensor quantised_linear(
    const at::Tensor& x, const at::Tensor& tiles, const at::Tensor& scale, const std::optional<at::Tensor>& minimum, int64_t bits, double offset,
    bool coarse) {
  return multiply_all(x, weights_of(tiles, scale, minimum, offset), bits, coarse);
}

// down(silu(gate) * up) where one weight holds gate and up: three steps in one call.
at::Tensor gated_mlp(
    const at::Tensor& x, const at::Tensor& tiles, const at::Tensor& scale, const std::optional<at::Tensor>& minimum, int64_t bits, double offset,
    const at::Tensor& down_tiles, const at::Tensor& down_scale, const std::optional<at::Tensor>& down_minimum, bool coarse) {
  const at::Tensor both = multiply_all(x, weights_of(tiles, scale, minimum, offset), bits, coarse);
  return multiply_all(silu_gate(both), weights_of(down_tiles, down_scale, down_minimum, offset), bits, coarse);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft_cpu, library) {
  library.def(
      "gated_mlp(Tensor x, Tensor tiles, Tensor scale, Tensor? minimum, int bits, float offset, Tensor down_tiles, Tensor down_scale, "
      "Tensor? down_minimum, bool coarse) -> Tensor");
  library.impl("gated_mlp", c10::DispatchKey::CPU, TORCH_FN(gated_mlp));
  library.def("quantised_linear(Tensor x, Tensor tiles, Tensor scale, Tensor? minimum, int bits, float offset, bool coarse) -> Tensor");
  library.impl("quantised_linear", c10::DispatchKey::CPU, TORCH_FN(quantised_linear));
}

}  // namespace weft
