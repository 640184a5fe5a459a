// CBAM2 on a CPU: each pass over full-size tensors reads them once.

#include <torch/library.h>

#include "inference.h"

TORCH_LIBRARY(timm_cbam2_cpu, m) {
  m.def("squeeze(Tensor z, Tensor? scale, Tensor? shift) -> Tensor", &squeeze);
  m.def("maps(Tensor z, Tensor? scale, Tensor? shift, Tensor ca, Tensor? weights, Tensor? offsets) -> Tensor", &maps);
  m.def(
      "finish(Tensor z, Tensor? scale, Tensor? shift, Tensor? shortcut, Tensor? gamma, Tensor ca, Tensor sa, bool relu, "
      "Tensor(a!) out) -> ()",
      &finish_into);
  m.def("products(Tensor g, Tensor? out, Tensor z, Tensor?[] norm, Tensor? gamma, Tensor[] small) -> Tensor[]",
        &products);
  m.def("spread(Tensor z, Tensor?[] norm, Tensor[] small, Tensor g_avg, Tensor g_max) -> Tensor", &spread);
  m.def(
      "input_gradient(Tensor g, Tensor z, Tensor?[] norm, Tensor? gamma, Tensor[] small, Tensor g_avg, Tensor g_max, "
      "Tensor?[] by_channel, Tensor? g_learned, Tensor? learned) -> Tensor",
      &input_gradient);
  m.def(
      "block(Tensor z, Tensor? scale, Tensor? shift, Tensor? shortcut, Tensor? gamma, Tensor? drop, bool relu, "
      "Tensor(a!) out, Tensor?[] weights_c, Tensor?[] weights_s, Tensor?[] running_c, Tensor?[] running_s, "
      "int[] numbers, float[] reals, int[] shapes, Tensor[] windows) -> Tensor[]",
      &block);
  m.def(
      "infer(Tensor z, Tensor? scale, Tensor? shift, Tensor? shortcut, Tensor? gamma, bool relu, Tensor(a!) out, "
      "Tensor?[] weights_c, Tensor?[] weights_s, Tensor?[] running_c, Tensor?[] running_s, int[] numbers, float[] reals, "
      "int[] shapes, Tensor[] windows) -> ()",
      &infer);
  m.def(
      "block_backward(Tensor g, Tensor? out, Tensor z, Tensor?[] norm, Tensor? gamma, Tensor? drop, Tensor[] small, "
      "bool needed, Tensor?[] weights_c, Tensor?[] weights_s, Tensor?[] running_c, Tensor?[] running_s, int[] numbers, "
      "float[] reals, int[] shapes, Tensor[] windows) -> Tensor[]",
      &block_backward);
  m.def("convolve(Tensor maps, Tensor kernels) -> Tensor", &convolve);
  m.def("convolve_backward(Tensor g, Tensor maps, Tensor kernels) -> Tensor[]", &convolve_backward);
}
