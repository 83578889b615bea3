// Every operator that has a C++ kernel, on one screen. Schemas live with the definitions in hypersd/kernels/<op>.py;
// the comment above each registration repeats them, and a test compares the two.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#ifdef HYPERSD_SOURCES  // fingerprint of csrc/, which is read from the file before it is loaded
extern "C" __attribute__((visibility("default"), used)) const char hypersd_sources[] = HYPERSD_SOURCES;
#endif

namespace hypersd {
namespace {

int widest() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return has_amx() ? 3 : 2;
  unsigned a, b, c, d;  // not every clang knows f16c by name
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C)
    return 1;
#endif
  return 0;
}

int initial() {
  const char* cap = std::getenv("HYPERSD_ISA");
  const char* const names[] = {"baseline", "avx2", "avx512"};
  int limit = 3;
  for (int level = 0; cap && level < 3; ++level)
    if (!std::strcmp(cap, names[level])) limit = level;
  return limit < widest() ? limit : widest();
}

std::atomic<int> current{initial()};

int64_t native_isa(int64_t level) { return set_isa(static_cast<int>(level)); }

}  // namespace

Isa isa() { return static_cast<Isa>(current.load(std::memory_order_relaxed)); }

int set_isa(int level) {
  if (level == -1) current = initial();
  if (level >= 0) current = level < widest() ? level : widest();
  return current;
}

}  // namespace hypersd

STABLE_TORCH_LIBRARY_FRAGMENT(hypersd, m) {
  m.def("_native_isa(int level) -> int");  // see set_isa
  m.def("_lora_rows_dtypes() -> int");     // see lora_rows_dtypes
  m.def("_lora_rows(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, int sh, int sw, int ph, "
        "int pw, bool keep, bool fold) -> (Tensor, Tensor)");
  m.def("_lora_rows_backward(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor a, Tensor b, float scale, int sh, "
        "int sw, int ph, int pw, bool need_x, bool need_adapter) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hypersd, CompositeExplicitAutograd, m) {
  m.impl("_native_isa", TORCH_BOX(&hypersd::native_isa));
  m.impl("_lora_rows_dtypes", TORCH_BOX(&hypersd::lora_rows_dtypes));
  m.impl("_lora_rows", TORCH_BOX(&hypersd::lora_rows));
  m.impl("_lora_rows_backward", TORCH_BOX(&hypersd::lora_rows_backward));
}

// A differentiable op is registered twice: with and (leading underscore) without autograd, see hypersd/kernels/_op.py.
STABLE_TORCH_LIBRARY_IMPL(hypersd, CPU, m) {
  // adamw_ema_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) ema, float step, float lr, float beta1, float beta2, float eps, float weight_decay, float ema_decay, Tensor(e!)? shadow, Tensor? clip, Tensor? step_tensor, Tensor? lr_tensor) -> ()
  m.impl("adamw_ema_", TORCH_BOX(&hypersd::adamw_ema_));

  // affine_step(Tensor x, Tensor eps_cond, Tensor coef, Tensor? eps_uncond, Tensor? history, Tensor? noise) -> Tensor
  m.impl("affine_step", TORCH_BOX(&hypersd::affine_step));
  m.impl("_affine_step", TORCH_BOX(&hypersd::affine_step));

  // affine_step_backward(Tensor grad, Tensor coef, int needed) -> Tensor[]
  m.impl("affine_step_backward", TORCH_BOX(&hypersd::affine_step_backward));

  // attention(Tensor q, Tensor k, Tensor v, float? scale) -> Tensor
  m.impl("attention", TORCH_BOX(&hypersd::attention));
  m.impl("_attention", TORCH_BOX(&hypersd::attention));

  // attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, float? scale) -> (Tensor, Tensor, Tensor)
  m.impl("attention_backward", TORCH_BOX(&hypersd::attention_backward));

  // clip_coefficient(Tensor grad, float max_norm) -> (Tensor, Tensor)
  m.impl("clip_coefficient", TORCH_BOX(&hypersd::clip_coefficient));

  // consistency_loss(Tensor eps_student, Tensor x_t, Tensor eps_target, Tensor x_s, Tensor coef, Tensor? weight, int kind, float c, bool mean, bool with_slope) -> (Tensor, Tensor)
  m.impl("consistency_loss", TORCH_BOX(&hypersd::consistency_loss));
  m.impl("_consistency_loss", TORCH_BOX(&hypersd::consistency_loss));

  // consistency_loss_backward(Tensor slope, Tensor upstream, Tensor? weight) -> Tensor
  m.impl("consistency_loss_backward", TORCH_BOX(&hypersd::consistency_loss_backward));

  // geglu(Tensor x) -> Tensor
  m.impl("geglu", TORCH_BOX(&hypersd::geglu));
  m.impl("_geglu", TORCH_BOX(&hypersd::geglu));

  // geglu_backward(Tensor dy, Tensor x) -> Tensor
  m.impl("geglu_backward", TORCH_BOX(&hypersd::geglu_backward));

  // group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? shift, Tensor? residual) -> (Tensor, Tensor, Tensor, Tensor)
  m.impl("group_norm_silu", TORCH_BOX(&hypersd::group_norm_silu));
  m.impl("_group_norm_silu", TORCH_BOX(&hypersd::group_norm_silu));

  // group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int num_groups, bool silu, bool need_x, bool need_affine, Tensor? shift, Tensor? dh) -> (Tensor, Tensor, Tensor)
  m.impl("group_norm_silu_backward", TORCH_BOX(&hypersd::group_norm_silu_backward));

  // score_gradient(Tensor x, Tensor x_real, Tensor x_fake, Tensor? weight) -> Tensor
  m.impl("score_gradient", TORCH_BOX(&hypersd::score_gradient));
}
