// Several layers in one call: for a single token, finding the way from Python to a kernel and back took longer than half of the kernels.
//
// A layer is x + out(attend(qkv(norm(x)))), then x + down(silu(gate(norm(x))) * up(norm(x))), of the kernels next door and nothing else:
// the result has the same bits as theirs, one by one.

#include <ATen/ops/add.h>
#include <torch/library.h>

namespace weft {
namespace {

// The matrices of a layer in the order in which they act, as `weights` holds them, each as tiles, scales and minima (empty: none).
enum Matrix { QKV, OUT, GATE_UP, DOWN, MATRICES };
constexpr int64_t TENSORS = 2 + 3 * MATRICES;  // a layer; its two norms come first

// x [B, T, D]; weights TENSORS a layer; keys and values one buffer a layer; bits and offsets one a matrix; epsilon one a norm.
// cos to queries, scale, window and softcap as `attend` takes them.
at::Tensor layers(
    const at::Tensor& input, at::TensorList weights, at::TensorList keys, at::TensorList values, const std::optional<at::Tensor>& cos,
    const std::optional<at::Tensor>& sin, int64_t heads, int64_t groups, int64_t head_stride, const at::Tensor& slots, const at::Tensor& index,
    const at::Tensor& positions, const at::Tensor& queries, double scale, int64_t window, double softcap, at::IntArrayRef bits,
    at::ArrayRef<double> offsets, at::ArrayRef<double> epsilon, bool unit_offset, bool coarse) {
  const int64_t count = static_cast<int64_t>(keys.size());
  TORCH_CHECK(weights.size() == keys.size() * TENSORS && values.size() == keys.size(), weights.size(), " tensors for ", count, " layers");
  TORCH_CHECK(bits.size() == MATRICES && offsets.size() == MATRICES && epsilon.size() == 2, "a number is missing");
  at::Tensor x = input;
  for (int64_t layer = 0; layer < count; ++layer) {
    const at::Tensor* own = weights.data() + layer * TENSORS;
    const auto multiplied = [&](const at::Tensor& rows, Matrix matrix) {
      const at::Tensor* parts = own + 2 + 3 * matrix;
      const std::optional<at::Tensor> minimum = parts[2].numel() ? std::optional<at::Tensor>(parts[2]) : std::nullopt;
      return multiply_all(rows, weights_of(parts[0], parts[1], minimum, offsets[matrix]), bits[matrix], coarse);
    };
    const at::Tensor qkv = multiplied(rms_norm(x, own[0], epsilon[0], unit_offset), QKV);
    const at::Tensor mixed = attend(
        qkv.view({x.size(0), x.size(1), heads + 2 * groups, -1}), cos, sin, heads, keys[layer], values[layer], head_stride, head_stride, slots, index,
        positions, queries, scale, window, softcap);
    x = at::add(x, multiplied(mixed.flatten(2), OUT));
    x = at::add(x, multiplied(silu_gate(multiplied(rms_norm(x, own[1], epsilon[1], unit_offset), GATE_UP)), DOWN));
  }
  return x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft_cpu, library) {
  library.def(
      "layers(Tensor x, Tensor[] weights, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor? cos, Tensor? sin, int heads, int groups, "
      "int head_stride, Tensor slots, Tensor index, Tensor positions, Tensor queries, float scale, int window, float softcap, int[] bits, "
      "float[] offsets, float[] epsilon, bool unit_offset, bool coarse) -> Tensor");
  library.impl("layers", c10::DispatchKey::CPU, TORCH_FN(layers));
}

}  // namespace weft
