// What happens to one row at a time between the products: one call each instead of the five to ten of plain tensor code, with the same
// roundings.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "vectors.h"

namespace weft {
namespace {

constexpr int64_t GRAIN = 16384;  // elements worth waking another thread for

// x / sqrt(mean(x^2) + eps) rounded to x's dtype, then times the weight (or, with `unit_offset`, times 1 + weight before rounding).
at::Tensor rms_norm(const at::Tensor& input, const at::Tensor& weight, double eps, bool unit_offset) {
  const at::Tensor x = input.contiguous();
  const int64_t width = x.size(-1), rows = x.numel() / width;
  at::Tensor y = at::empty(x.sizes(), x.options());
  WEFT_DISPATCH(x, T, {
    const T *from = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* in = from + r * width;
        T* out = to + r * width;
        Floats squares = zeros();
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) squares = fma(load(in + d), load(in + d), squares);
        float total = sum(squares);
        for (; d < width; ++d) total += static_cast<float>(in[d]) * static_cast<float>(in[d]);
        const float inverse = 1.0f / std::sqrt(total / static_cast<float>(width) + static_cast<float>(eps));
        for (d = 0; d < width; ++d) {
          const float normal = static_cast<float>(in[d]) * inverse, factor = static_cast<float>(w[d]);
          out[d] = unit_offset ? static_cast<T>(normal * (1.0f + factor)) : static_cast<T>(static_cast<float>(static_cast<T>(normal)) * factor);
        }
      }
    });
  })
  return y;
}

template <typename T>
inline Floats gated(Floats gate, Floats up) {
  alignas(64) T rounded[LANES];
  store(rounded, mul(gate, divide(all(1.0f), add(all(1.0f), exponential(mul(gate, all(-1.0f)))))));
  return mul(load(rounded), up);
}

// silu(gate) * up for rows [gate, up], silu rounded as a tensor of its own would be.
at::Tensor silu_gate(const at::Tensor& input) {
  const at::Tensor x = input.contiguous();
  const int64_t width = x.size(-1) / 2, rows = x.numel() / (2 * width);
  auto sizes = x.sizes().vec();
  sizes.back() = width;
  at::Tensor y = at::empty(sizes, x.options());
  WEFT_DISPATCH(x, T, {
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T *gate = from + r * 2 * width, *up = gate + width;
        T* out = to + r * width;
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) store(out + d, gated<T>(load(gate + d), load(up + d)));
        if (d < width) {
          T last[3][LANES] = {};
          for (int64_t i = d; i < width; ++i) last[0][i - d] = gate[i], last[1][i - d] = up[i];
          store(last[2], gated<T>(load(last[0]), load(last[1])));
          for (int64_t i = d; i < width; ++i) out[i] = last[2][i - d];
        }
      }
    });
  })
  return y;
}

// From rows of queries, keys and values side by side: turns queries and keys by the angles, writes keys and values into state, and
// returns the queries. `index` [B, T] says where a token's entry begins, in units of one head's vector; negative means nowhere.
at::Tensor rotate_and_write(
    const at::Tensor& input, const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin, int64_t heads, int64_t groups, int64_t width,
    const at::Tensor& keys, const at::Tensor& values, int64_t key_stride, int64_t value_stride, const at::Tensor& index) {
  const at::Tensor x = input.contiguous(), where = index.contiguous();
  const int64_t tokens = x.size(0) * x.size(1), half = width / 2;
  at::Tensor q = at::empty({x.size(0), x.size(1), heads, width}, x.options());
  const at::Tensor c = cos ? cos->contiguous() : at::Tensor(), s = sin ? sin->contiguous() : at::Tensor();
  TORCH_CHECK(!cos || c.numel() == tokens * half, "angles for ", cos ? c.numel() / half : 0, " tokens, not ", tokens);
  WEFT_DISPATCH(x, T, {
    WEFT_DISPATCH(keys, S, {
      const T* from = x.const_data_ptr<T>();
      T* to = q.mutable_data_ptr<T>();
      S *k = keys.mutable_data_ptr<S>(), *v = values.mutable_data_ptr<S>();
      const float *cosines = cos ? c.const_data_ptr<float>() : nullptr, *sines = cos ? s.const_data_ptr<float>() : nullptr;
      const int64_t* entry = where.const_data_ptr<int64_t>();
      at::parallel_for(0, tokens, std::max<int64_t>(1, GRAIN / (heads * width)), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const T* in = from + t * (heads + 2 * groups) * width;
          for (int64_t h = 0; h < heads + groups; ++h, in += width) {
            const bool key = h >= heads;
            if (key && entry[t] < 0) continue;
            T* query = to + (t * heads + h) * width;
            S* slot = key ? k + entry[t] * width + (h - heads) * key_stride : nullptr;
            for (int64_t d = 0; d < half; ++d) {
              const float a = static_cast<float>(in[d]), b = static_cast<float>(in[d + half]);
              const float angle_c = cosines ? cosines[t * half + d] : 1.0f, angle_s = cosines ? sines[t * half + d] : 0.0f;
              const T first = static_cast<T>(a * angle_c - b * angle_s), second = static_cast<T>(b * angle_c + a * angle_s);
              if (key) {
                slot[d] = static_cast<S>(static_cast<float>(first));
                slot[d + half] = static_cast<S>(static_cast<float>(second));
              } else {
                query[d] = first;
                query[d + half] = second;
              }
            }
          }
          if (entry[t] < 0) continue;
          for (int64_t g = 0; g < groups; ++g, in += width) {
            S* slot = v + entry[t] * width + g * value_stride;
            for (int64_t d = 0; d < width; ++d) slot[d] = static_cast<S>(static_cast<float>(in[d]));
          }
        }
      });
    })
  })
  return q;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft_cpu, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps, bool unit_offset) -> Tensor");
  library.impl("rms_norm", c10::DispatchKey::CPU, TORCH_FN(rms_norm));
  library.def("silu_gate(Tensor x) -> Tensor");
  library.impl("silu_gate", c10::DispatchKey::CPU, TORCH_FN(silu_gate));
}

}  // namespace weft
