// GroupNorm, then SiLU: x^ = (x - mean) rstd per sample and group, z = w x^ + b per channel, y = z sigmoid(z). With a
// shift, a number per sample and channel, x + shift stands for x; with a residual h = x + residual does, and is kept.
#include <vector>

#include "group_norm_inside.h"
#include "group_norm_outside.h"
#include "kernels.h"
#include "parallel.h"

namespace hypersd {
namespace {

// What x is: sizes, and its memory order or that of the contiguous copy that stands for it.
struct Layout {
  View view;
  bool inside = false, taken = true;  // channels inside; `taken`: x can be read as it lies
  int64_t contiguous[64];

  explicit Layout(const Tensor& x) : view(x) {
    STD_TORCH_CHECK(view.dim >= 2 && view.dim <= 64, "x: expected (batch, channels, ...)");
    STD_TORCH_CHECK(view.type != Type::other, "x: not a floating-point tensor");
    STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
    for (int64_t d = view.dim - 1, all = 1; d >= 0; --d) contiguous[d] = all, all *= view.size[d] ? view.size[d] : 1;
    int64_t inner[64], all = view.size[1];
    for (int64_t d = view.dim - 1; d >= 2; --d) inner[d] = all, all *= view.size[d];
    inner[1] = 1, inner[0] = all;
    const auto lies = [&](const int64_t* stride) {
      View other = view;
      other.stride = stride;
      return view.numel == 0 || view.same_layout(other);
    };
    if (lies(contiguous)) return;
    inside = lies(inner);
    taken = inside;
  }
  View wanted() const {
    View like = view;
    if (!taken) like.stride = contiguous;
    return like;
  }
};

// The numbers of `t`, whatever its strides and type; one or two dimensions.
template <class C>
std::vector<C> numbers(const Tensor& t, const char* name) {
  const View view(t);
  STD_TORCH_CHECK(view.type != Type::other && t.is_cpu(), name, ": not a floating-point CPU tensor");
  std::vector<C> values(view.numel);
  std::optional<Tensor> kept;
  const int64_t rows[2] = {view.size[view.dim - 1], 1};
  View dense = view;
  dense.stride = rows + 2 - view.dim;
  const char* data = matched(t, view, dense, kept);
  const C* loaded = load<C>(data, view.type, 0, view.numel, values.data());
  if (loaded != values.data()) std::memcpy(values.data(), loaded, sizeof(C) * view.numel);
  return values;
}
template <class C>
std::vector<C> by_channel(const std::optional<Tensor>& t, const char* name, int64_t channels, C otherwise) {
  if (!t) return std::vector<C>(channels, otherwise);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, name, ": expected one number per channel");
  return numbers<C>(*t, name);
}
template <class C>
std::vector<C> by_sample(const std::optional<Tensor>& shift, int64_t batch, int64_t channels) {
  if (!shift) return {};
  STD_TORCH_CHECK(shift->dim() == 2 && shift->size(0) == batch && shift->size(1) == channels,
                  "shift: expected one number per sample and channel");
  return numbers<C>(*shift, "shift");
}

template <class T>
constexpr Type kTypeOf = TypeOf<T>::value;
template <>
constexpr Type kTypeOf<BFloat> = Type::bfloat16;
template <>
constexpr Type kTypeOf<Half> = Type::float16;

template <class T>
Problem<T> problem(const Layout& layout, int64_t groups, bool silu) {
  const View& v = layout.view;
  STD_TORCH_CHECK(groups > 0 && v.size[1] % groups == 0, "num_groups: does not divide the channels of x");
  Problem<T> p{};
  p.batch = v.size[0], p.channels = v.size[1], p.groups = groups, p.silu = silu, p.pixels = 1;
  for (int64_t d = 2; d < v.dim; ++d) p.pixels *= v.size[d];
  if (v.numel == 0) return p;
  p.piece_pixels = p.channels < kPiece ? kPiece / p.channels : 1;
  p.pieces = (p.pixels + p.piece_pixels - 1) / p.piece_pixels;
  return p;
}

// `t` as T in the memory order of `wanted`: itself, or a copy. float16 is computed as a float32 copy.
template <class T>
Tensor as(const Tensor& t, const View& wanted) {
  const View view(t);
  if (view.type == kTypeOf<T> && view.same_layout(wanted)) return t;
  Tensor copy = empty_strided(wanted, wanted.stride, kTypeOf<T>);
  torch::stable::copy_(copy, t);
  return copy;
}

// Where to compute an output of type `type`, and what to hand out then.
template <class T>
Tensor empty_as(const View& wanted) { return empty_strided(wanted, wanted.stride, kTypeOf<T>); }
template <class T>
Tensor finished(const Tensor& computed, const View& wanted, Type type) {
  if (type == kTypeOf<T>) return computed;
  Tensor out = empty_strided(wanted, wanted.stride, type);
  torch::stable::copy_(out, computed);
  return out;
}

// Channels outside: run(p, group, memory of the worker), a memory of `size` numbers each.
template <class T, class F>
void over_groups(const Problem<T>& p, int64_t size, const F& run) {
  const int64_t count = p.batch * p.groups, threads = threads_for(p.batch * p.channels * p.pixels, kShare);
  std::unique_ptr<Work<T>[]> memory(new Work<T>[threads * size]);
  over_tasks(count, threads, [&](int64_t group, int64_t worker) { run(p, group, memory.get() + worker * size); });
}

template <class T>
using Step = void (*)(const Problem<T>&, int64_t, Vectors<T>);
template <class T>
void nothing(const Problem<T>&, int64_t, Vectors<T>) {}

// Channels inside: two passes over the pieces of every sample with `finish` in between. Where samples have few pieces for
// the threads and are many, each is one thread's.
template <class T, class F>
void over_samples(const Problem<T>& p, const F& first, const F& finish, const F& second) {
  const int64_t threads = threads_for(p.batch * p.channels * p.pixels, kShare);
  std::vector<Channels<T>> memory;
  for (int64_t worker = 0; worker < threads; ++worker) memory.emplace_back(p);
  if (p.batch < threads || p.pieces >= 2 * threads)
    return two_passes(
        p.batch, p.pieces, threads, [&](int64_t i, int64_t worker) { first(p, i, memory[worker]); },
        [&](int64_t n, int64_t worker) { finish(p, n, memory[worker]); },
        [&](int64_t i, int64_t worker) { second(p, i, memory[worker]); });
  over_tasks(p.batch, threads, [&](int64_t n, int64_t worker) {
    for (int64_t i = 0; i < p.pieces; ++i) first(p, n * p.pieces + i, memory[worker]);
    finish(p, n, memory[worker]);
    for (int64_t i = p.pieces; i-- > 0;) second(p, n * p.pieces + i, memory[worker]);
  });
}

constexpr int64_t kNone = 0, kOne = 1;
View no_elements(const View& like) {
  View empty = like;
  empty.dim = 1, empty.size = &kNone, empty.stride = &kOne;
  return empty;
}

Tensor empty_2d(const View& like, int64_t rows, int64_t columns, Type type) {
  const int64_t size[2] = {rows, columns}, stride[2] = {columns > 0 ? columns : 1, 1};
  View shape = like;
  shape.dim = 2, shape.size = size;
  return empty_strided(shape, stride, type);
}

HYPERSD_INLINE void add_halves_body(const Half* HYPERSD_RESTRICT x, const Half* HYPERSD_RESTRICT residual, int64_t count,
                                    Half* HYPERSD_RESTRICT h, float* HYPERSD_RESTRICT wide) {
  for (int64_t i = 0; i < count; ++i) {
    Half sum;
    assign(sum, widen(x[i]) + widen(residual[i]));
    h[i] = sum;
    wide[i] = widen(sum);
  }
}
HYPERSD_KERNEL(add_halves, (const Half* x, const Half* residual, int64_t count, Half* h, float* wide),
               (x, residual, count, h, wide))

// float16 is computed as a float32 copy: h = x + residual, and the copy of it.
Tensor sum_of_halves(const Tensor& x, const Tensor& residual, const View& wanted, const Tensor& h) {
  const Tensor one = as<Half>(x, wanted), other = as<Half>(residual, wanted), wide = empty_as<float>(wanted);
  const Half *a = reinterpret_cast<Half*>(data_of(one)), *b = reinterpret_cast<Half*>(data_of(other));
  Half* sum = reinterpret_cast<Half*>(data_of(h));
  float* copy = reinterpret_cast<float*>(data_of(wide));
  over_elements(wanted.numel, [&](int64_t begin, int64_t end) {
    add_halves(a + begin, b + begin, end - begin, sum + begin, copy + begin);
  });
  return wide;
}

// (y, h, mean, rstd)
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Forward forward(const Tensor& x, const Layout& layout, int64_t groups, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias, double eps, bool silu, const std::optional<Tensor>& shift,
                const std::optional<Tensor>& residual) {
  using C = Work<T>;
  Problem<T> p = problem<T>(layout, groups, silu);
  const View wanted = layout.wanted(), kept = residual ? wanted : no_elements(wanted);
  const Type type = layout.view.type;
  if (residual) {
    const View other(*residual);
    STD_TORCH_CHECK(other.same_size(layout.view) && other.type == type && residual->is_cpu(),
                    "residual: expected the shape and dtype of x, and a CPU tensor");
  }
  Tensor mean = empty_2d(layout.view, p.batch, groups, kTypeOf<C>);
  Tensor rstd = empty_2d(layout.view, p.batch, groups, kTypeOf<C>);
  const std::vector<C> w = by_channel<C>(weight, "weight", p.channels, 1), b = by_channel<C>(bias, "bias", p.channels, 0);
  const std::vector<C> s = by_sample<C>(shift, p.batch, p.channels);
  Tensor y = empty_as<T>(wanted), h = empty_strided(kept, kept.stride, type);
  if (layout.view.numel == 0) return {finished<T>(y, wanted, type), h, mean, rstd};
  const bool halves = residual && type == Type::float16;
  const Tensor in = halves ? sum_of_halves(x, *residual, wanted, h) : as<T>(x, wanted);
  std::optional<Tensor> added;
  if (residual && !halves) {
    added = as<T>(*residual, wanted);
    p.residual = reinterpret_cast<const T*>(data_of(*added)), p.h = reinterpret_cast<T*>(data_of(h));
  }
  p.x = reinterpret_cast<const T*>(data_of(in)), p.out = reinterpret_cast<T*>(data_of(y)), p.eps = eps;
  p.weight = w.data(), p.bias = b.data(), p.shift = shift ? s.data() : nullptr;
  p.mean = reinterpret_cast<C*>(data_of(mean)), p.rstd = reinterpret_cast<C*>(data_of(rstd));
  if (!layout.inside) {
    over_groups(p, 0, [](const Problem<T>& q, int64_t i, C* k) { run_outside_forward(q, i, k); });
  } else {
    std::vector<C> partial(p.batch * p.pieces * 2 * p.channels);
    p.partial = partial.data();
    over_samples<T, Step<T>>(p, run_inside_moments, run_inside_finish, run_inside_apply);
  }
  return {finished<T>(y, wanted, type), h, mean, rstd};
}

// Rows of sums by channel -> one gradient of the type of `like`, added up in double and in order.
template <class C>
Tensor column_sums(const std::vector<C>& rows, int64_t channels, const View& shape, Type type) {
  const int64_t one = 1;
  View like = shape;
  like.dim = 1, like.size = &channels;
  Tensor out = empty_strided(like, &one, type);
  std::vector<double> total(channels, 0.0);
  for (size_t i = 0; i < rows.size(); i += channels)
    for (int64_t c = 0; c < channels; ++c) total[c] += rows[i + c];
  if (type == Type::float64) std::copy(total.begin(), total.end(), reinterpret_cast<double*>(data_of(out)));
  else store<double>(data_of(out), type, 0, channels, total.data());
  return out;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Layout& layout, const Tensor& mean,
                                            const Tensor& rstd, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& bias, int64_t groups, bool silu, bool need_x,
                                            bool need_affine, const std::optional<Tensor>& shift,
                                            const std::optional<Tensor>& dh) {
  using C = Work<T>;
  Problem<T> p = problem<T>(layout, groups, silu);
  const View wanted = layout.wanted(), upstream(dy), m(mean), r(rstd);
  STD_TORCH_CHECK(upstream.same_size(layout.view) && upstream.type != Type::other, "dy: its shape is not that of x");
  STD_TORCH_CHECK(m.type == kTypeOf<C> && r.type == m.type && m.numel == p.batch * groups && r.numel == m.numel &&
                      mean.is_contiguous() && rstd.is_contiguous(),
                  "mean, rstd: not those of the forward pass");
  if (dh) {
    const View other(*dh);
    STD_TORCH_CHECK(other.same_size(layout.view) && other.type != Type::other, "dh: its shape is not that of x");
  }
  const View empty = no_elements(layout.view);
  Tensor dx = empty_as<T>(need_x ? wanted : empty);
  const std::vector<C> w = by_channel<C>(weight, "weight", p.channels, 1), b = by_channel<C>(bias, "bias", p.channels, 0);
  const std::vector<C> s = by_sample<C>(shift, p.batch, p.channels);
  const int64_t rows = layout.view.numel == 0 ? 0 : layout.inside ? p.batch * p.pieces : p.batch;
  std::vector<C> channel_dz(rows * p.channels), channel_dzx(rows * p.channels), slope, offset;
  if (layout.view.numel) {
    const Tensor in = as<T>(x, wanted), grad = as<T>(dy, wanted);
    std::optional<Tensor> joined;
    if (dh && need_x) {
      joined = as<T>(*dh, wanted);
      p.dh = reinterpret_cast<const T*>(data_of(*joined));
    }
    p.x = reinterpret_cast<const T*>(data_of(in)), p.dy = reinterpret_cast<const T*>(data_of(grad));
    p.out = need_x ? reinterpret_cast<T*>(data_of(dx)) : nullptr;
    p.weight = w.data(), p.bias = b.data(), p.shift = shift ? s.data() : nullptr;
    p.mean = reinterpret_cast<C*>(m.data), p.rstd = reinterpret_cast<C*>(r.data);
    p.channel_dz = channel_dz.data(), p.channel_dzx = channel_dzx.data();
    if (!layout.inside) {
      const int64_t width = p.per_group() * p.pixels;
      over_groups(p, silu ? width <= kScratch ? width : p.pixels : 0,
                  [](const Problem<T>& q, int64_t i, C* k) { run_outside_backward(q, i, k); });
    } else {
      slope.resize(p.batch * groups), offset.resize(p.batch * groups);
      p.slope = slope.data(), p.offset = offset.data();
      p.keep = need_x && silu;
      if (need_x) over_samples<T, Step<T>>(p, run_inside_sums, run_inside_finish_sums, run_inside_dx);
      else over_samples<T, Step<T>>(p, run_inside_sums, nothing<T>, nothing<T>);
    }
  }
  const auto gradient = [&](const std::optional<Tensor>& like, const std::vector<C>& sums) {
    if (!need_affine || !like) return empty_strided(empty, &kOne, layout.view.type);
    return column_sums(sums, p.channels, layout.view, type_of(*like));
  };
  dx = finished<T>(dx, need_x ? wanted : empty, layout.view.type);
  return {dx, gradient(weight, channel_dzx), gradient(bias, channel_dz)};
}

// run(a value of the type that x is computed in)
template <class F>
auto by_type(const Layout& layout, const F& run) {
  switch (layout.view.type) {
    case Type::float64: return run(double{});
    case Type::bfloat16: return run(BFloat{});
    default: return run(float{});
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu(Tensor x, int64_t num_groups, std::optional<Tensor> weight,
                                                           std::optional<Tensor> bias, double eps, bool silu,
                                                           std::optional<Tensor> shift,
                                                           std::optional<Tensor> residual) {
  const Layout layout(x);
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), "eps: expected a number of at least 0");
  return by_type(layout, [&](auto t) {
    return forward<decltype(t)>(x, layout, num_groups, weight, bias, eps, silu, shift, residual);
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                                            std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                            int64_t num_groups, bool silu, bool need_x,
                                                            bool need_affine, std::optional<Tensor> shift,
                                                            std::optional<Tensor> dh) {
  const Layout layout(x);
  return by_type(layout, [&](auto t) {
    return backward<decltype(t)>(dy, x, layout, mean, rstd, weight, bias, num_groups, silu, need_x, need_affine, shift,
                                 dh);
  });
}

}  // namespace hypersd
