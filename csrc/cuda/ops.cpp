// The launches of the CUDA kernels as operators, on one screen. hypersd/kernels/<op>.py checks and lays out the arguments
// as for Triton, makes the outputs, and calls these.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cmath>
#include <optional>

#include "kernels.h"

#ifndef HYPERSD_EMULATED
#include <dlfcn.h>
#endif

#ifdef HYPERSD_SOURCES  // fingerprint of csrc/, which is read from the file before it is loaded
extern "C" __attribute__((visibility("default"), used)) const char hypersd_cuda_sources[] = HYPERSD_SOURCES;
#endif

namespace hypersd {
namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The stream that torch launches on now, on the device of `t`, which becomes this library's current one. The shim that
// names it is in torch's CUDA library: looked up where that is loaded, so that this one builds without it.
void* stream_of(const Tensor& t) {
#ifdef HYPERSD_EMULATED
  return nullptr;
#else
  using Current = AOTITorchError (*)(int32_t, void**);
  static const Current current = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Current>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(current, "this torch has no CUDA stream");
  int32_t index;
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  ensure(cudaSetDevice(index), "device of a tensor");
  TORCH_ERROR_CODE_CHECK(current(index, &stream));
  return stream;
#endif
}

Type type_of(const Tensor& t) {
  static const int32_t codes[4] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_float16(),
                                   aoti_torch_dtype_bfloat16()};
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  for (int i = 0; i < 4; ++i)
    if (codes[i] == code) return static_cast<Type>(i);
  STD_TORCH_CHECK(false, "expected a floating-point tensor of 16, 32 or 64 bits");
}
void* data(const Tensor& t) { return t.data_ptr(); }
void* data(const Optional& t) { return t ? t->data_ptr() : nullptr; }
Type type_of(const Optional& t) { return t ? type_of(*t) : Type::float32; }
float* floats(const Tensor& t) {
  STD_TORCH_CHECK(type_of(t) == Type::float32, "expected a float32 tensor");
  return static_cast<float*>(t.data_ptr());
}
int64_t stride(const Optional& t) { return t && t->dim() ? t->stride(0) : 0; }

// Memory for `count` floats beside `like`.
Tensor scratch(const Tensor& like, int64_t count) {
  int32_t device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const int64_t one = 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &one, aoti_torch_dtype_float32(), device, index, &handle));
  return Tensor(handle);
}

// Tensors lie as `out` does, as rows of samples one after the other; a coefficient that no tensor asks for is not read.
void affine_step_cuda(Tensor x, Optional eps_cond, Optional eps_uncond, Optional history, Optional noise, Tensor out,
                      Optional coef, double k0, double k1, double k2, double k3, double k4, int64_t rows) {
  const Optional in[5] = {x, eps_cond, eps_uncond, history, noise};
  const double host[5] = {k0, k1, k2, k3, k4};
  AffineStep p{};
  for (int j = 0; j < 5; ++j) {
    p.in[j] = data(in[j]);
    p.type[j] = type_of(in[j]);
    p.host[j] = static_cast<float>(host[j]);
  }
  p.out = data(out);
  p.out_type = type_of(out);
  p.coef = data(coef);
  p.coef_type = type_of(coef);
  p.coef_stride = coef && coef->dim() > 1 ? coef->stride(0) : 0;
  p.rows = rows;
  p.width = out.numel() / rows;
  affine_step(p, stream_of(out));
}

void consistency_loss_cuda(Tensor eps_student, Tensor x_t, Tensor eps_target, Tensor x_s, Tensor coef, Optional weight,
                           int64_t kind, double c, Optional slope, Tensor loss) {
  const Tensor* in[4] = {&eps_student, &x_t, &eps_target, &x_s};
  ConsistencyLoss p{};
  for (int j = 0; j < 4; ++j) p.in[j] = data(*in[j]), p.type[j] = type_of(*in[j]);
  p.coef = data(coef);
  p.coef_type = type_of(coef);
  p.coef_stride = coef.dim() > 1 ? coef.stride(0) : 0;
  p.weight = data(weight);
  p.weight_type = type_of(weight);
  p.kind = kind;
  p.c = static_cast<float>(c);
  p.slope = data(slope);
  p.loss = floats(loss);
  p.mean = loss.dim() == 0;
  p.rows = eps_student.size(0);
  p.width = eps_student.numel() / p.rows;
  const Tensor partial = scratch(loss, consistency_partials(p));
  p.partial = floats(partial);
  consistency_loss(p, stream_of(loss));
}

void consistency_loss_backward_cuda(Tensor slope, Tensor upstream, Optional weight, double inverse_count, Tensor out) {
  ConsistencyScale p{};
  p.slope = data(slope);
  p.type = type_of(slope);
  p.upstream = data(upstream);
  p.upstream_type = type_of(upstream);
  p.upstream_stride = stride(upstream);
  p.weight = data(weight);
  p.weight_type = type_of(weight);
  p.weight_stride = stride(weight);
  p.inverse_count = static_cast<float>(inverse_count);
  p.out = data(out);
  p.rows = slope.size(0);
  p.width = slope.numel() / p.rows;
  consistency_loss_backward(p, stream_of(out));
}

void adamw_ema_cuda(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor ema, double step, double lr,
                    double beta1, double beta2, double eps, double weight_decay, double ema_decay, Optional shadow,
                    Optional clip, Optional step_tensor, Optional lr_tensor) {
  AdamwEma u{};
  u.param = floats(param);
  u.exp_avg = floats(exp_avg);
  u.exp_avg_sq = floats(exp_avg_sq);
  u.ema = floats(ema);
  u.grad = data(grad);
  u.grad_type = type_of(grad);
  u.shadow = data(shadow);
  u.shadow_type = type_of(shadow);
  u.clip = data(clip);
  u.clip_type = type_of(clip);
  u.step_tensor = data(step_tensor);
  u.step_type = type_of(step_tensor);
  u.lr_tensor = data(lr_tensor);
  u.lr_type = type_of(lr_tensor);
  u.step = step;
  u.lr = lr;
  u.log_beta1 = std::log(beta1);  // beta = 0: minus infinity, whose power is 0
  u.log_beta2 = std::log(beta2);
  u.weight1 = static_cast<float>(1 - beta1);
  u.weight2 = static_cast<float>(1 - beta2);
  u.eps = static_cast<float>(eps);
  u.weight_decay = static_cast<float>(weight_decay);
  u.weight_ema = static_cast<float>(1 - ema_decay);
  u.decay = static_cast<float>(lr * weight_decay);
  u.step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)));
  u.root2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  u.count = param.numel();
  adamw_ema_(u, stream_of(param));
}

GroupNorm group_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Optional& weight,
                     const Optional& bias, const Optional& shift, bool silu, bool inside) {
  GroupNorm p{};
  p.x = data(x);
  p.type = type_of(x);
  p.weight = data(weight);
  p.weight_type = type_of(weight);
  p.bias = data(bias);
  p.bias_type = type_of(bias);
  p.shift = data(shift);
  p.shift_type = type_of(shift);
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  p.batch = x.size(0);
  p.channels = static_cast<int>(x.size(1));
  p.groups = static_cast<int>(mean.size(1));
  const int64_t pixels = x.numel() / (p.batch * p.channels);
  STD_TORCH_CHECK(pixels < INT32_MAX / 2, "x: a channel is too large");
  p.pixels = static_cast<int>(pixels);
  p.silu = silu;
  p.inside = inside;
  return p;
}

void group_norm_silu_cuda(Tensor x, Tensor y, Tensor mean, Tensor rstd, Optional weight, Optional bias, Optional shift,
                          Optional residual, Optional h, double eps, bool silu, bool inside) {
  STD_TORCH_CHECK(!residual || (h && type_of(*residual) == type_of(x) && type_of(*h) == type_of(x)),
                  "residual: expected the dtype of x, and h of it");
  void* stream = stream_of(x);
  GroupNorm p = group_norm(x, mean, rstd, weight, bias, shift, silu, inside);
  p.out = data(y);
  p.residual = data(residual);
  p.h = data(h);
  p.eps = static_cast<float>(eps);
  GroupNormPlan plan = plan_group_norm(p, Device::current(), true);
  const Tensor partial = scratch(x, plan.partials());
  plan.p.partial = floats(partial);
  group_norm_silu(plan, stream);
}

void group_norm_silu_backward_cuda(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Optional weight, Optional bias,
                                   Optional shift, Optional dh, bool silu, bool inside, Optional dx, Optional dweight,
                                   Optional dbias) {
  STD_TORCH_CHECK(type_of(dy) == type_of(x) && (!dh || type_of(*dh) == type_of(x)), "dy, dh: expected the dtype of x");
  void* stream = stream_of(x);
  GroupNorm p = group_norm(x, mean, rstd, weight, bias, shift, silu, inside);
  p.dy = data(dy);
  p.dh = data(dh);
  p.out = data(dx);
  p.dweight = data(dweight);
  p.dbias = data(dbias);
  GroupNormPlan plan = plan_group_norm(p, Device::current(), false);
  const int64_t items = p.batch * p.groups;
  const Tensor partial = scratch(x, plan.partials() + 2 * items);
  plan.p.level = floats(partial);
  plan.p.tilt = plan.p.level + items;
  plan.p.partial = plan.p.tilt + items;
  group_norm_silu_backward(plan, stream);
}

}  // namespace
}  // namespace hypersd

STABLE_TORCH_LIBRARY_FRAGMENT(hypersd, m) {
  m.def("_affine_step_cuda(Tensor x, Tensor? eps_cond, Tensor? eps_uncond, Tensor? history, Tensor? noise, "
        "Tensor(a!) out, Tensor? coef, float k0, float k1, float k2, float k3, float k4, int rows) -> ()");
  m.def("_consistency_loss_cuda(Tensor eps_student, Tensor x_t, Tensor eps_target, Tensor x_s, Tensor coef, "
        "Tensor? weight, int kind, float c, Tensor(a!)? slope, Tensor(b!) loss) -> ()");
  m.def("_consistency_loss_backward_cuda(Tensor slope, Tensor upstream, Tensor? weight, float inverse_count, "
        "Tensor(a!) out) -> ()");
  m.def("_adamw_ema_cuda(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) ema, "
        "float step, float lr, float beta1, float beta2, float eps, float weight_decay, float ema_decay, "
        "Tensor(e!)? shadow, Tensor? clip, Tensor? step_tensor, Tensor? lr_tensor) -> ()");
  m.def("_group_norm_silu_cuda(Tensor x, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, Tensor? weight, Tensor? bias, "
        "Tensor? shift, Tensor? residual, Tensor(d!)? h, float eps, bool silu, bool inside) -> ()");
  m.def("_group_norm_silu_backward_cuda(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
        "Tensor? shift, Tensor? dh, bool silu, bool inside, Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hypersd, CompositeExplicitAutograd, m) {
  m.impl("_affine_step_cuda", TORCH_BOX(&hypersd::affine_step_cuda));
  m.impl("_consistency_loss_cuda", TORCH_BOX(&hypersd::consistency_loss_cuda));
  m.impl("_consistency_loss_backward_cuda", TORCH_BOX(&hypersd::consistency_loss_backward_cuda));
  m.impl("_adamw_ema_cuda", TORCH_BOX(&hypersd::adamw_ema_cuda));
  m.impl("_group_norm_silu_cuda", TORCH_BOX(&hypersd::group_norm_silu_cuda));
  m.impl("_group_norm_silu_backward_cuda", TORCH_BOX(&hypersd::group_norm_silu_backward_cuda));
}
