// y = value * gelu(gate), where a row of x holds the values and then the gates; gelu(g) = g Phi(g).
#include "elementary.h"
#include "kernels.h"

namespace hypersd {
namespace {

struct Problem {
  const char *x, *dy;  // dy null: forward
  char* out;           // y, or dx
  Type type, dy_type;
  int64_t width;       // elements of a row of y
  int64_t chunks;      // of a row, fixed by the shape: the same bits on any number of threads
};

template <class C>
HYPERSD_INLINE void forward_range_body(const Problem& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[3][kChunk];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / p.chunks, first = (index - row * p.chunks) * kChunk;
    const int64_t count = p.width - first < kChunk ? p.width - first : kChunk;
    const int64_t narrow = row * p.width + first, at = narrow + row * p.width;  // in y and in x
    const C* HYPERSD_RESTRICT value = load<C>(p.x, p.type, at, count, buffer[0]);
    const C* HYPERSD_RESTRICT gate = load<C>(p.x, p.type, at + p.width, count, buffer[1]);
    C* HYPERSD_RESTRICT out = target<C>(p.out, p.type, narrow, buffer[2]);
    for (int64_t i = 0; i < count; ++i) {
      C phi, density;
      normal(gate[i], phi, density);
      out[i] = value[i] * (gate[i] * phi);
    }
    store<C>(p.out, p.type, narrow, count, out);
  }
}

// d value = dy gelu(gate), d gate = dy value gelu'(gate), gelu'(g) = Phi(g) + g phi(g)
template <class C>
HYPERSD_INLINE void backward_range_body(const Problem& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[5][kChunk];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / p.chunks, first = (index - row * p.chunks) * kChunk;
    const int64_t count = p.width - first < kChunk ? p.width - first : kChunk;
    const int64_t narrow = row * p.width + first, at = narrow + row * p.width;  // in y and in x
    const C* HYPERSD_RESTRICT value = load<C>(p.x, p.type, at, count, buffer[0]);
    const C* HYPERSD_RESTRICT gate = load<C>(p.x, p.type, at + p.width, count, buffer[1]);
    const C* HYPERSD_RESTRICT dy = load<C>(p.dy, p.dy_type, narrow, count, buffer[2]);
    C* HYPERSD_RESTRICT dvalue = target<C>(p.out, p.type, at, buffer[3]);
    C* HYPERSD_RESTRICT dgate = target<C>(p.out, p.type, at + p.width, buffer[4]);
    for (int64_t i = 0; i < count; ++i) {
      C phi, density;
      normal(gate[i], phi, density);
      dvalue[i] = dy[i] * (gate[i] * phi);
      dgate[i] = dy[i] * value[i] * (phi + gate[i] * density);
    }
    store<C>(p.out, p.type, at, count, dvalue);
    store<C>(p.out, p.type, at + p.width, count, dgate);
  }
}

HYPERSD_INLINE void forward_float_body(const Problem& p, int64_t begin, int64_t end) { forward_range_body<float>(p, begin, end); }
HYPERSD_INLINE void forward_double_body(const Problem& p, int64_t begin, int64_t end) { forward_range_body<double>(p, begin, end); }
HYPERSD_INLINE void backward_float_body(const Problem& p, int64_t begin, int64_t end) { backward_range_body<float>(p, begin, end); }
HYPERSD_INLINE void backward_double_body(const Problem& p, int64_t begin, int64_t end) { backward_range_body<double>(p, begin, end); }
HYPERSD_KERNEL(forward_float, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(forward_double, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(backward_float, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(backward_double, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))

int64_t chunks_of(int64_t width) { return (width + kChunk - 1) / kChunk; }

// Runs over all chunks of all rows, `grain` of them to a thread at least: 8,192 elements of y.
template <class F>
void over_chunks(const Problem& p, int64_t elements, const F& run) {
  if (elements == 0) return;
  const int64_t size = p.width < kChunk ? p.width : kChunk;
  torch::stable::parallel_for(0, elements / p.width * p.chunks, 8 * kChunk / size, run);
}

// Sizes and strides of a row-major tensor like `view`, its last dimension replaced.
struct RowMajor {
  int64_t size[64], stride[64];

  RowMajor(const View& view, int64_t last) {
    STD_TORCH_CHECK(view.dim <= 64, "x: too many dimensions");
    for (int64_t d = view.dim - 1, running = 1; d >= 0; --d) {
      size[d] = d == view.dim - 1 ? last : view.size[d];
      stride[d] = running;
      running *= size[d] ? size[d] : 1;
    }
  }
};

View checked(const Tensor& x) {
  const View view(x);
  STD_TORCH_CHECK(view.dim > 0 && view.size[view.dim - 1] % 2 == 0, "x: expected an even last dimension");
  STD_TORCH_CHECK(view.type != Type::other, "x: not a floating-point tensor");
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  return view;
}

}  // namespace

Tensor geglu(Tensor x) {
  const View shape = checked(x);
  const int64_t width = shape.size[shape.dim - 1] / 2;
  const RowMajor rows(shape, 2 * width), halves(shape, width);
  View layout = shape, out = shape;
  layout.stride = rows.stride;
  out.size = halves.size;
  Tensor y = empty_strided(out, halves.stride, shape.type);
  std::optional<Tensor> kept;
  const Problem p{matched(x, shape, layout, kept), nullptr, data_of(y), shape.type, shape.type, width,
                  chunks_of(width)};
  const auto run = [&](int64_t begin, int64_t end) {
    shape.type == Type::float64 ? forward_double(p, begin, end) : forward_float(p, begin, end);
  };
  over_chunks(p, shape.numel / 2, run);
  return y;
}

Tensor geglu_backward(Tensor dy, Tensor x) {
  const View shape = checked(x), upstream(dy);
  const int64_t width = shape.size[shape.dim - 1] / 2;
  const RowMajor rows(shape, 2 * width), halves(shape, width);
  View layout = shape, out = shape;
  layout.stride = rows.stride;
  out.size = halves.size, out.stride = halves.stride;
  STD_TORCH_CHECK(upstream.same_size(out) && upstream.type != Type::other, "dy: not a gradient of geglu(x)");
  Tensor dx = empty_strided(layout, rows.stride, shape.type);
  std::optional<Tensor> kept[2];
  const Problem p{matched(x, shape, layout, kept[0]), matched(dy, upstream, out, kept[1]), data_of(dx), shape.type,
                  upstream.type, width, chunks_of(width)};
  const bool wide = shape.type == Type::float64;
  const auto run = [&](int64_t begin, int64_t end) {
    wide ? backward_double(p, begin, end) : backward_float(p, begin, end);
  };
  over_chunks(p, shape.numel / 2, run);
  return dx;
}

}  // namespace hypersd
