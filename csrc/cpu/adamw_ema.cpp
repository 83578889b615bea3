// AdamW, its moving average and a copy in another type over flat buffers, in place and in one pass.
#include <cmath>

#include "kernels.h"

namespace hypersd {
namespace {

struct Update {
  char *param, *exp_avg, *exp_avg_sq, *ema;
  const char* grad;
  Type grad_type;
  char* shadow;  // null: not wanted
  Type shadow_type;
  double clip, decay, weight1, weight2, step_size, root2, eps, weight_ema;
};

template <class C>
HYPERSD_INLINE void update_range_body(const Update& u, int64_t begin, int64_t end) {
  alignas(64) C buffer[2][kChunk];
  const C clip = static_cast<C>(u.clip), decay = static_cast<C>(u.decay), weight1 = static_cast<C>(u.weight1);
  const C weight2 = static_cast<C>(u.weight2), step_size = static_cast<C>(u.step_size), eps = static_cast<C>(u.eps);
  const C root2 = static_cast<C>(u.root2), weight_ema = static_cast<C>(u.weight_ema);
  for (; begin < end; begin += kChunk) {
    const int64_t count = end - begin < kChunk ? end - begin : kChunk;
    const C* HYPERSD_RESTRICT grad = load<C>(u.grad, u.grad_type, begin, count, buffer[0]);
    C* HYPERSD_RESTRICT p = reinterpret_cast<C*>(u.param) + begin;
    C* HYPERSD_RESTRICT m = reinterpret_cast<C*>(u.exp_avg) + begin;
    C* HYPERSD_RESTRICT v = reinterpret_cast<C*>(u.exp_avg_sq) + begin;
    C* HYPERSD_RESTRICT e = reinterpret_cast<C*>(u.ema) + begin;
    for (int64_t i = 0; i < count; ++i) {
      const C g = clip * grad[i];
      const C first = m[i] + weight1 * (g - m[i]), second = v[i] + weight2 * (g * g - v[i]);
      // the change is summed before it meets p: one rounding of p's size
      const C next = p[i] - (decay * p[i] + step_size * (first / (std::sqrt(second) * root2 + eps)));
      m[i] = first;
      v[i] = second;
      e[i] += weight_ema * (next - e[i]);
      p[i] = next;
    }
    if (!u.shadow) continue;
    C* HYPERSD_RESTRICT copy = target<C>(u.shadow, u.shadow_type, begin, buffer[1]);
    for (int64_t i = 0; i < count; ++i) copy[i] = p[i];
    store<C>(u.shadow, u.shadow_type, begin, count, copy);
  }
}
HYPERSD_INLINE void update_float_body(const Update& u, int64_t begin, int64_t end) {
  update_range_body<float>(u, begin, end);
}
HYPERSD_INLINE void update_double_body(const Update& u, int64_t begin, int64_t end) {
  update_range_body<double>(u, begin, end);
}
HYPERSD_KERNEL(update_float, (const Update& u, int64_t begin, int64_t end), (u, begin, end))
HYPERSD_KERNEL(update_double, (const Update& u, int64_t begin, int64_t end), (u, begin, end))

double number(const std::optional<Tensor>& t, const char* name, double otherwise) {
  if (!t) return otherwise;
  const Numbers numbers(*t, name);
  STD_TORCH_CHECK(numbers.view.dim == 0, name, ": expected one number");
  return numbers.read(0);
}

// A buffer of the shape of `param`, without gaps, apart from those in `taken`; it joins them.
char* flat(const Tensor& t, const char* name, const View& param, bool same_type,
           std::vector<std::pair<const char*, const char*>>& taken) {
  const View view(t);
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(view.same_size(param), name, ": its shape is not that of param");
  STD_TORCH_CHECK(same_type ? view.type == param.type : view.type != Type::other, name, ": wrong dtype");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  const char* const end = view.data + view.numel * t.element_size();
  for (const auto& [first, last] : taken)
    STD_TORCH_CHECK(view.data >= last || first >= end, name, ": shares memory with another buffer");
  taken.emplace_back(view.data, end);
  return view.data;
}

}  // namespace

void adamw_ema_(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor ema, double step, double lr,
                double beta1, double beta2, double eps, double weight_decay, double ema_decay,
                std::optional<Tensor> shadow, std::optional<Tensor> clip, std::optional<Tensor> step_tensor,
                std::optional<Tensor> lr_tensor) {
  const View shape(param);
  const bool wide = shape.type == Type::float64;
  STD_TORCH_CHECK(wide || shape.type == Type::float32, "param: expected float32 or float64");
  step *= number(step_tensor, "step", 1);
  lr *= number(lr_tensor, "lr", 1);
  STD_TORCH_CHECK(step >= 1 && lr >= 0 && std::isfinite(step + lr + eps + weight_decay) && beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1 && eps >= 0 &&
                      weight_decay >= 0 && ema_decay >= 0 && ema_decay <= 1,
                  "adamw_ema_: a number is out of range");
  Update u{};
  std::vector<std::pair<const char*, const char*>> written, none;
  u.param = flat(param, "param", shape, true, written);
  u.exp_avg = flat(exp_avg, "exp_avg", shape, true, written);
  u.exp_avg_sq = flat(exp_avg_sq, "exp_avg_sq", shape, true, written);
  u.ema = flat(ema, "ema", shape, true, written);
  u.shadow = shadow ? flat(*shadow, "shadow", shape, false, written) : nullptr;
  u.grad_type = type_of(grad);
  const bool is_ema = grad.data_ptr() == ema.data_ptr() && u.grad_type == shape.type;  // read before it is written
  u.grad = flat(grad, "grad", shape, false, is_ema ? none : written);
  STD_TORCH_CHECK(wide || !shadow || type_of(*shadow) != Type::float64, "shadow: wider than param");
  u.shadow_type = shadow ? type_of(*shadow) : shape.type;
  u.clip = number(clip, "clip", 1);
  u.decay = lr * weight_decay;
  u.weight1 = 1 - beta1;
  u.weight2 = 1 - beta2;
  u.step_size = lr / (1 - std::pow(beta1, step));
  u.root2 = 1 / std::sqrt(1 - std::pow(beta2, step));
  u.eps = eps;
  u.weight_ema = 1 - ema_decay;
  if (!std::isfinite(u.clip)) return;  // a gradient that is not finite leaves everything as it is
  over_elements(shape.numel, [&](int64_t begin, int64_t end) {
    wide ? update_double(u, begin, end) : update_float(u, begin, end);
  });
}

}  // namespace hypersd
